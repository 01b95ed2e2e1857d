"""The sequences of a pass, and what patches keep of them: rows with transformers' cache, or flat tokens of requests.

Letters: B batch, T tokens, M residual branches, D hidden width, S positions of history, P = S + T positions, F flat
tokens of many requests.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from engrammar.attach.inputs import Inputs
from engrammar.attach.paged import FlatTokens, PagedState, paged_state
from engrammar.attach.passes import cache_in, continue_state
from engrammar.attach.state import MemoryState, keeps_all, positions_in, state_in
from engrammar.edit.exact import NOTHING, Ints
from engrammar.edit.lookup import text_of
from engrammar.edit.stack import Stack
from engrammar.memory import masked_ids

STATE = "applied patches"  # the name of the state in a cache; no attached memory can have it
FOUND, WRITTEN = "found", "written"  # what is kept besides ids: the key that ends at a token, and what is written
CHOSEN = "chosen"  # the number of the stack that a token was read with
STACKS = "engrammar_stacks"  # the attribute of a paged cache that says which stack each request of a pass has chosen


@final
@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the state of stacks in one paged cache is made for."""

    identity: tuple[str, ...]  # whose state it is
    num_back: int  # ids to look back to
    window: int  # positions back at which a key may have ended, or a write may have begun, that matters now

    @classmethod
    def of(cls, stacks: Sequence[Stack]) -> "Reach":
        """That of one stack, or of several among which each request chooses."""
        return cls(
            identity=tuple(digest for stack in stacks for digest in stack.identity),
            num_back=max(stack.num_back for stack in stacks),
            window=max(stack.window for stack in stacks),
        )


@final
class Rows:
    """Rows of a batch, whose state is in the cache that was given."""

    def __init__(self, stack: Stack, inputs: Inputs) -> None:
        self.stack, self.cache, self.keep_all = stack, inputs.cache, keeps_all(inputs.cache)
        windows = {FOUND: stack.window} | ({} if stack.decided_at is None else {WRITTEN: stack.window})
        new = MemoryState(STATE, stack.identity, stack.num_back, windows)
        self.state = continue_state(inputs, new) if inputs.caches else None
        continued = self.state is not None and self.state.seen > 0
        ids_BT, _, starts_BT = masked_ids(inputs.input_ids, inputs.mask_BT, inputs.position_ids, continued=continued)
        history_BS = ids_BT.new_full((len(ids_BT), stack.num_back), -1)
        if self.state is not None:
            history_BS = self.state.history(ids_BT, self.keep_all)
        self.text = text_of(_numpy(ids_BT), _numpy(history_BS), None if starts_BT is None else _numpy(starts_BT))
        self.shape = tuple(ids_BT.shape)  # what the hidden states of the pass begin with

    def found(self, found_BT: Ints) -> Ints:
        """Keeps the keys that end in this pass; returns those that end at all positions of the text [B, P]."""
        known = torch.from_numpy(found_BT)
        if self.state is not None:
            known = self.state.windows[FOUND].extend(known, self.keep_all)
        return _at_the_end(self.text.ids_BP.shape, known.numpy())

    def codes(self) -> Ints:
        """What was written at positions before the pass, as far as it is known."""
        latest = None
        if self.state is not None and WRITTEN in self.state.windows:
            latest = self.state.windows[WRITTEN].latest()
        return np.empty((len(self.text.ids_BP), 0), np.int64) if latest is None else latest.numpy()

    def keep_codes(self, codes_BT: Ints) -> Ints | None:
        """Keeps what the pass writes; returns `codes` anew where they may be of this very pass, else None."""
        if self.state is not None:
            self.state.windows[WRITTEN].extend(torch.from_numpy(codes_BT), self.keep_all)
        return None

    def streams(self, streams_BTMD: Tensor) -> Tensor:
        """The hidden states of the pass, a row for each sequence."""
        return streams_BTMD

    def places(self, row: Ints, token: Ints) -> tuple[Ints, Ints]:
        """Where tokens of sequences stand in the hidden states of the pass."""
        return row, token

    def end(self, output: Any) -> None:
        """A cache that the pass filled gets the state."""
        cache: Cache | None = self.cache if self.cache is not None else cache_in(output)
        if self.state is None or cache is None or state_in(cache, STATE) is not None:
            return
        if positions_in(cache) in (None, self.state.seen):
            cache.layers.append(self.state)


class FlatState(ABC):
    """Flat tokens of requests, and what an engine keeps of them beside its keys and values (abstract)."""

    ids_F: Tensor
    request_F: Tensor  # the number of each token's request
    chunk_F: Tensor  # how many tokens of its request stand before it in the pass
    live_F: Tensor  # False at tokens that only fill the pass up, or are not read with this stack

    @abstractmethod
    def begin(self) -> Tensor:
        """Keeps the ids; returns those before each token [F, S], -1 where there are none."""

    @abstractmethod
    def before(self, name: str, first_B: Tensor, window: int) -> Tensor:
        """What was kept of the positions before some tokens, [B, window], `NOTHING` where there are none."""

    @abstractmethod
    def keep(self, name: str, new_F: Tensor) -> None:
        """Keeps a number of each live token."""

    @abstractmethod
    def end(self) -> None:
        """Ends the pass."""


@final
class Paged(FlatState):
    """Flat tokens under transformers' continuous batching, whose state lies by slot of its paged cache."""

    def __init__(self, reach: Reach, tokens: FlatTokens) -> None:
        self.tokens, self.state = tokens, state_of(reach, tokens)
        self.ids_F, self.live_F = tokens.input_ids[0], tokens.live_T
        self.request_F, self.chunk_F = tokens.request_T, tokens.chunk_T

    def begin(self) -> Tensor:
        return self.state.begin(self.tokens)[0]

    def before(self, name: str, first_B: Tensor, window: int) -> Tensor:
        if name not in self.state.windows:
            return first_B.new_empty((len(first_B), 0))
        places_KF = self.tokens.places(range(window, 0, -1))
        return self.state.seen(self.state.windows[name], places_KF[:, first_B], NOTHING).T

    def keep(self, name: str, new_F: Tensor) -> None:
        self.state.write(name, self.tokens, new_F)

    def end(self) -> None:
        self.state.end(self.tokens)


@final
class Requests:
    """Flat tokens of requests, a row for each, as `Rows`. Short ones are padded on the right here."""

    def __init__(self, stack: Stack, state: FlatState) -> None:
        self.stack, self.state = stack, state
        history_FS = state.begin()
        live_F = state.live_F
        _, request = state.request_F[live_F].unique(return_inverse=True)
        chunk = state.chunk_F[live_F]
        index_BT = request.new_full((int(request.max()) + 1, int(chunk.max()) + 1), -1)
        index_BT[request, chunk] = live_F.nonzero()[:, 0]
        self.index_BT, self.is_real_BT = index_BT, index_BT >= 0
        ids_BT = state.ids_F[index_BT.clamp_min(0)].where(self.is_real_BT, -1)
        self.text = text_of(_numpy(ids_BT), _numpy(history_FS[index_BT[:, 0]]), None)
        self.shape = (1, len(state.ids_F))

    def found(self, found_BT: Ints) -> Ints:
        """As `Rows.found`. A request may go on from a prefix that another one computes in the same pass."""
        self._keep(FOUND, found_BT)
        return _at_the_end(self.text.ids_BP.shape, np.concatenate([self._before(FOUND), found_BT], axis=1))

    def codes(self) -> Ints:
        """As `Rows.codes`. Stacks without probes write none: their slots hold what others have left there."""
        if self.stack.decided_at is None:
            return np.empty((len(self.index_BT), 0), np.int64)
        self._keep(WRITTEN, np.full(self.index_BT.shape, NOTHING))  # not known yet
        return self._before(WRITTEN)

    def keep_codes(self, codes_BT: Ints) -> Ints | None:
        """As `Rows.keep_codes`."""
        self._keep(WRITTEN, codes_BT)
        return self._before(WRITTEN)

    def _before(self, name: str) -> Ints:
        """What was kept of the positions before each request's first token in the pass."""
        return _numpy(self.state.before(name, self.index_BT[:, 0], self.stack.window))

    def _keep(self, name: str, new_BT: Ints) -> None:
        new_F = self.index_BT.new_full((self.shape[1],), NOTHING)
        new_F[self.index_BT[self.is_real_BT]] = torch.from_numpy(new_BT).to(new_F.device)[self.is_real_BT]
        self.state.keep(name, new_F)

    def streams(self, streams_BTMD: Tensor) -> Tensor:
        """As `Rows.streams`."""
        return streams_BTMD[0][self.index_BT.clamp_min(0)]

    def places(self, row: Ints, token: Ints) -> tuple[Ints, Ints]:
        """As `Rows.places`."""
        return np.zeros_like(row), _numpy(self.index_BT)[row, token]

    def end(self, output: Any) -> None:
        """Ends the pass, unless it has failed."""
        if output is not None:
            self.state.end()


def state_of(reach: Reach, tokens: FlatTokens) -> PagedState:
    """The state of stacks in the paged cache of a pass."""
    return paged_state(STATE, reach.identity, reach.num_back, max(reach.num_back, reach.window), tokens)


def by_choice(reach: Reach, tokens: FlatTokens, chosen: Sequence[Stack | None]) -> list[tuple[Stack, FlatTokens]]:
    """The tokens of each stack that requests of a pass have chosen; tokens of other requests are not live there.

    Args:
        chosen: of each request of the pass; None where nothing is to be added.

    Raises:
        ValueError: a request goes on from keys and values of another choice.
    """
    numbers = [0 if stack is None else stack.number for stack in chosen]
    number_T = torch.tensor(numbers, device=tokens.request_T.device)[tokens.request_T]
    check_choices(state_of(reach, tokens), tokens, number_T)
    stacks = {stack.number: stack for stack in chosen if stack is not None}
    return [(stack, replace(tokens, live_T=tokens.live_T & (number_T == number))) for number, stack in stacks.items()]


def check_choices(state: PagedState, tokens: FlatTokens, number_T: Tensor) -> None:
    """Compares the choice of each token with that of the token before it, which was kept in the paged cache."""
    before_T = tokens.places([1])[0]
    seen_T = state.seen(state.write(CHOSEN, tokens, number_T), before_T, 0)
    if not torch.equal(seen_T, number_T.where(before_T >= 0, 0)):
        raise ValueError(
            "A request goes on from a prefix that was read with other patches: prefixes are shared among requests of "
            "the same patches only."
        )


def _at_the_end(shape: tuple[int, ...], known: Ints) -> Ints:
    """Keys at the last positions that are known; `NOTHING` before them."""
    found_BP = np.full(shape, NOTHING)
    found_BP[:, -known.shape[1] :] = known
    return found_BP


def _numpy(x: Tensor) -> NDArray[Any]:
    return x.detach().cpu().numpy()
