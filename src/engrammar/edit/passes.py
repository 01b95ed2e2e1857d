"""The hooks of a model with patches: keys are found as the decoder is called, values are added as a block is called.

Letters: B batch, T tokens, M residual branches, D hidden width, S positions of history.
"""

import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engrammar.attach.around import note_ids
from engrammar.attach.blocks import Decoder, first_parameters, hidden_of, in_branches, with_hidden
from engrammar.attach.inputs import cache_given, read_inputs
from engrammar.attach.paged import flat_in
from engrammar.attach.skipping import is_skipped
from engrammar.attach.state import state_in
from engrammar.edit.exact import Ints
from engrammar.edit.gating import CODES, NO_WRITE, decide, margins
from engrammar.edit.lookup import NO_CANDIDATES, NO_WRITES, NONE, Writes, candidates, direct_writes, find_keys
from engrammar.edit.rows import ReadRows
from engrammar.edit.sequences import STACKS, STATE, Paged, Reach, Requests, Rows, by_choice
from engrammar.edit.stack import Stack
from engrammar.stores.base import RowStore

_passes: ContextVar[tuple["Begun", ...]] = ContextVar("engrammar_edit_passes", default=())


def refuse_filled(given: Mapping[str, Any]) -> None:
    """Raises a ValueError if a pass without patches is to go on from a cache that was filled with some."""
    cache = cache_given(given)
    state = state_in(cache, STATE) if hasattr(cache, "layers") else None
    if state is not None and state.seen:
        raise ValueError("The cache was filled with patches that are off or undone now: pass a new cache.")


@final
class EditPass:
    """The sequences of a pass that share a stack: which keys they hold, and what is to be added where."""

    def __init__(self, classes_V: NDArray[np.int32], width: int, sequences: Rows | Requests) -> None:
        self.width, self.sequences = width, sequences
        stack = self.stack = sequences.stack
        text = self.text = sequences.text
        found_BP = sequences.found(find_keys(stack.table, classes_V, text))
        self.writes, self.candidates = NO_WRITES, NO_CANDIDATES
        if (found_BP >= 0).any():
            self.writes = direct_writes(stack, text, found_BP)
            self.candidates = candidates(stack, text, found_BP)
        self.margin_C = np.full(len(self.candidates.entry), -np.inf, np.float32)
        self.codes_BH = sequences.codes()
        self.rows = ReadRows(stack.rows, stack.first_rows, width, self._wanted_rows())

    def _wanted_rows(self) -> Ints:
        """The value rows of everything that may be added in this pass."""
        if not len(self.writes.entry) and not len(self.candidates.entry) and (self.codes_BH[:, -1:] == NO_WRITE).all():
            return NONE
        under_way = self.codes_BH[:, -1:][self.codes_BH[:, -1:] != NO_WRITE] // CODES
        entry = np.unique(np.concatenate([self.writes.entry, self.candidates.entry, under_way]))
        columns = self.stack.columns
        first, count = columns["first_step"][entry], columns["num_steps"][entry]
        steps = [np.arange(*ends) for ends in zip(first, first + count)]
        binding = columns["binding"][entry]
        return np.concatenate([self.stack.steps[np.concatenate([*steps, NONE]), 0], binding[binding >= 0]])

    def at(self, block: int, hidden: Tensor) -> Tensor:
        """The input of a block, or of the final norm, with what is to be added; the tensor itself if nothing is."""
        if hidden.shape[:2] != self.sequences.shape:
            raise RuntimeError(f"Block {block} reads {list(hidden.shape)} in a pass of {list(self.sequences.shape)}.")
        streams_BTMD = in_branches(hidden, self.width)
        if len(self.candidates.entry):
            each_BTMD = self.sequences.streams(streams_BTMD)
            read_C = margins(self.stack, self.candidates, block, each_BTMD, self.rows).numpy()
            self.margin_C = np.where(np.isnan(read_C), self.margin_C, read_C)
        if block == self.stack.decided_at:
            self._decide()
        return self._add(block, hidden, streams_BTMD)

    def _decide(self) -> None:
        """Decides what the entries with a probe write, and keeps it for later passes.

        It is decided anew while something changes in a prefix that another request of this pass computes.
        """
        while True:
            written, codes_BT = decide(self.stack, self.text, self.candidates, self.margin_C, self.codes_BH)
            codes_BH = self.sequences.keep_codes(codes_BT)
            if codes_BH is None or np.array_equal(codes_BH, self.codes_BH):
                break
            self.codes_BH = codes_BH
        if len(written.entry):
            names = ("row", "token", "entry", "step")
            pairs = {name: np.concatenate([getattr(self.writes, name), getattr(written, name)]) for name in names}
            self.writes = Writes(**pairs)

    def _add(self, block: int, hidden: Tensor, streams_BTMD: Tensor) -> Tensor:
        writes, columns = self.writes, self.stack.columns
        if not len(writes.entry):
            return hidden
        (here,) = np.nonzero(columns["block"][writes.entry] == block)
        if not len(here):
            return hidden
        entry = writes.entry[here]
        places = self.sequences.places(writes.row[here], writes.token[here])
        row, token = (torch.from_numpy(place).to(hidden.device) for place in places)
        values_CD = self.rows.values(
            self.stack.steps[columns["first_step"][entry] + writes.step[here], 0], hidden.device
        )
        gate_C11 = torch.from_numpy(self.stack.strengths[entry, 0]).to(hidden.device)[:, None, None]
        relative_C = torch.from_numpy(columns["relative"][entry] > 0).to(hidden.device)
        norm_CM1 = streams_BTMD[row, token].float().norm(dim=-1, keepdim=True)
        size_CM1 = gate_C11 * torch.where(relative_C[:, None, None], norm_CM1, 1.0)
        added_CMD = (size_CM1 * values_CD[:, None]).to(hidden.dtype)
        return streams_BTMD.index_put((row, token), added_CMD, accumulate=True).view_as(hidden)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """A pass of a decoder that has begun: a part for each stack. There are several where requests choose theirs."""

    hooks: "EditHooks"
    parts: list[EditPass]


@final
class EditHooks:
    """The hooks of a model with patches. They are on every block, so that a pass ends with the stack it began with."""

    def __init__(self, decoder: Decoder, final_norm: nn.Module | None) -> None:
        self.decoder, self.arguments = decoder, first_parameters(decoder.module)
        self.handles: list[RemovableHandle] = []
        self.stack: Stack | None = None  # what is applied
        self.reach: Reach | None = None  # that of all stacks among which requests choose in a paged cache, if they do
        self.classes_V = np.empty(0, np.int32)  # the class of each id
        self.closed = 0  # how many `without_patches` blocks are open, in all threads; then no keys are looked up
        self.under_way, self.lock = 0, threading.Lock()  # passes that have begun and not ended, in all threads
        self.places = [*decoder.blocks, *([] if final_norm is None else [final_norm])]
        self.closing: list[RowStore] = []
        self.threads: set[int] = set()  # those that have begun a pass since the hooks were placed

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model, which are not in use."""
        return {**vars(self), "lock": None, "under_way": 0, "threads": set(), "closing": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = threading.Lock()

    def place(self, stack: Stack | None, closing: Iterable[RowStore] = (), reach: Reach | None = None) -> None:
        """Passes that begin from now on use this stack. If it is None, and `reach` too, the hooks are taken off.

        Args:
            closing: stores to be closed when no pass reads them any more.
        """
        with self.lock:
            self.stack, self.reach = stack, reach
            self.closing += closing
            if not self._is_idle() and not self.handles:
                torch.compiler.reset()  # compiled code does not notice hooks that come or go
                module = self.decoder.module
                self.handles = [
                    *note_ids(self.decoder),
                    module.register_forward_pre_hook(self.before_pass, with_kwargs=True),
                    module.register_forward_hook(self.after_pass, always_call=True),
                ]
                for block, place in enumerate(self.places):
                    before = partial(self.before, block, first_parameters(place)[0])
                    # Before a memory at that block, attached earlier or later, reads the hidden state.
                    self.handles.append(place.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._tidy()

    def _is_idle(self) -> bool:
        return self.stack is None and self.reach is None

    def _tidy(self) -> None:
        if self.under_way:
            return
        while self.closing:
            self.closing.pop().close()
        if self._is_idle():
            self.threads.clear()
            if self.handles:
                torch.compiler.reset()
            while self.handles:
                self.handles.pop().remove()

    @torch.compiler.disable
    def before_pass(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds the keys of this pass."""
        self._drop_interrupted()
        stack, reach = self.stack, self.reach
        given: Mapping[str, Any] = dict(zip(self.arguments, args)) | kwargs
        if self.closed or self._is_idle():
            refuse_filled(given)
            return
        tokens = flat_in(given)
        chosen = None if tokens is None or reach is None else getattr(tokens.cache, STACKS, None)
        sequences: list[Rows | Requests] = []
        if chosen is not None:
            assert tokens is not None and reach is not None
            parts = by_choice(reach, tokens, chosen())
            sequences += [Requests(one, Paged(reach, own)) for one, own in parts]
        elif stack is not None and tokens is not None:
            sequences.append(Requests(stack, Paged(Reach.of([stack]), tokens)))
        elif stack is not None:
            sequences.append(Rows(stack, read_inputs(decoder, given)))
        width = self.decoder.hidden_size
        begun = Begun(hooks=self, parts=[EditPass(self.classes_V, width, one) for one in sequences])
        with self.lock:
            self.under_way += 1
            self.threads.add(threading.get_ident())
        _passes.set((*_passes.get(), begun))

    def _drop_interrupted(self) -> None:
        """Forgets passes of this thread that a KeyboardInterrupt ended: torch calls no hook after one."""
        passes = _passes.get()
        others = tuple(one for one in passes if one.hooks is not self)
        if len(others) < len(passes):
            _passes.set(others)
            with self.lock:
                self.under_way -= len(passes) - len(others)
                self._tidy()

    @torch.compiler.disable
    def before(
        self, block: int, argument: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds to the input of a block, or of the final norm."""
        current = next((one for one in reversed(_passes.get()) if one.hooks is self), None)
        if current is None:
            if self.closed or self.stack is None or block not in self.stack.blocks:
                return None
            if threading.get_ident() not in self.threads and not torch.is_grad_enabled():
                return None  # a pass that was under way before there were hooks
            raise RuntimeError(
                f"Block {block} was called outside a pass of its model, so patches do not know its ids: call the "
                "model, or undo the patches."
            )
        parts = [part for part in current.parts if block in part.stack.blocks]
        if not parts:
            return None
        if is_skipped(module):
            raise ValueError(
                "Blocks that a patch writes at are skipped in this pass: undo the patch, or keep no prefix."
            )
        hidden = hidden_of(argument, args, kwargs)
        changed = hidden
        for part in parts:
            changed = part.at(block, changed)
        if changed is hidden:
            return None
        return with_hidden(changed, argument, args, kwargs)

    @torch.compiler.disable
    def after_pass(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends the pass; a cache that it filled gets the state."""
        passes = _passes.get()
        if not passes or passes[-1].hooks is not self:  # it was refused, or nothing is applied
            return
        ended = passes[-1]
        _passes.set(passes[:-1])
        with self.lock:
            self.under_way -= 1
            self._tidy()
        for part in ended.parts:
            part.sequences.end(output)
