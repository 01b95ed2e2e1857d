"""Memories under transformers' continuous batching: flat tokens of many sequences, with a paged cache.

A memory's state is kept by slot of the paged cache, so prefixes that requests share and requests that begin anew need
nothing. A slot also holds a stamp, some numbers of the key that the base cached there. If the base has moved a slot
without the state (requests swapped to RAM), or filled one with the memory off, stamps differ, and the pass is refused.
Letters: T flat tokens of a pass, K positions looked back at, P slots of the cache, C channels, F numbers of a stamp.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor

from engrammar.attach.around import as_called
from engrammar.config import MemoryConfig

STATES = "engrammar_states"  # the attribute of a paged cache that holds the states
STAMP = 4  # numbers of a key
GROUP = "full_attention"  # the layers whose cache holds every position


@dataclass(frozen=True, kw_only=True)
class FlatTokens:
    """The tokens of a pass and their places in the paged cache."""

    input_ids: Tensor  # [1, T]
    positions_T: Tensor  # each token's position in its sequence
    request_T: Tensor  # the index of each token's request
    chunk_T: Tensor  # how many tokens before this one are of the same request and this pass
    live_T: Tensor  # False at tokens that only fill the pass up
    # Places in the cache, as the base's attention uses them; no reads if all sequences begin here.
    writes: Tensor
    reads: Tensor
    starts: Tensor  # where the reads of each request begin
    cache: Any  # the paged cache

    def places(self, backs: Sequence[int]) -> Tensor:
        """For each token the places in the cache of the tokens so many positions before it, [K, T], -1 for none."""
        device = self.positions_T.device
        backs_K1 = torch.tensor(backs, device=device)[:, None]
        before_KT = self.positions_T - backs_K1
        if self.reads.numel():
            index_KT = self.starts[self.request_T] + before_KT.clamp_min(0)
            places_KT = self.reads[index_KT.clamp_max(self.reads.numel() - 1)]
        else:
            places_KT = self.writes[(torch.arange(before_KT.shape[1], device=device) - backs_K1).clamp_min(0)]
        return places_KT.where((before_KT >= 0) & self.live_T, -1)

    @cached_property
    def own(self) -> Tensor:
        """The places of the live tokens themselves."""
        return self.places([0])[0, self.live_T]


def read_flat(given: Mapping[str, Any]) -> FlatTokens:
    """Reads the arguments of a decoder's `forward` under continuous batching.

    Raises:
        ValueError: the model has no layer of full attention, or the pass reads the cache by blocks.
    """
    cache, input_ids = given["cache"], as_called(given)["input_ids"]
    allocator = getattr(cache, "cache_allocators", {}).get(GROUP)
    if allocator is None:
        raise ValueError("A memory cannot be batched continuously in a model without full attention: use generate.")
    if given.get("block_table") is not None:
        raise ValueError(
            "A memory cannot read a cache by blocks: use ContinuousBatchingConfig(max_blocks_per_request=0)."
        )
    ends = given["cu_seq_lens_q"].long()
    place_T = torch.arange(input_ids.shape[1], device=input_ids.device)
    request_T = torch.searchsorted(ends[1:].contiguous(), place_T, right=True).clamp_max(len(ends) - 2)
    return FlatTokens(
        input_ids=input_ids.long(),
        positions_T=given["position_ids"][0].long(),
        request_T=request_T,
        chunk_T=place_T - ends[request_T],
        live_T=place_T < ends[-1],
        writes=given["write_index"][allocator.index].long(),
        reads=given["read_index"][allocator.index].long(),
        starts=given["cu_seq_lens_k"][GROUP].long(),
        cache=cache,
    )


def flat_in(given: Mapping[str, Any]) -> FlatTokens | None:
    """The tokens of a pass under continuous batching, from the arguments of a decoder's `forward`; None if it is none.

    Our own models are called without the paged cache: what stands in for it has read the tokens.
    """
    tokens = getattr(given.get("past_key_values"), "flat_tokens", None)
    if tokens is None and hasattr(given.get("cache"), "cache_allocators"):
        tokens = read_flat(given)
    return tokens


@final
class PagedState:
    """What one memory, or a stack of patches, keeps of the sequences in a paged cache, by slot."""

    def __init__(self, identity: Hashable, num_back: int, longest: int, cache: Any) -> None:
        self.identity = identity  # whose it is
        # Ids that are looked back to, and positions back at which anything is read.
        self.num_back, self.longest = num_back, longest
        self.allocator = cache.cache_allocators[GROUP]
        blocks, device = cache.cache_tensor.numel() // self.allocator.bytes_per_block, cache.cache_tensor.device
        self.num_slots = blocks * self.allocator.tokens_per_page
        self.ids_P = torch.full((self.num_slots,), -1, device=device)
        self.stamps_PF = torch.full((self.num_slots, STAMP), float("nan"), device=device)
        self.windows: dict[Hashable, Tensor] = {}  # by layer [P, C], or by another name; made when first written
        self.keys = self.allocator._kv_token_views[self.allocator.layer_indices[-1]][0]
        self.allocator.copy_blocks = partial(self._copy_blocks, self.allocator.copy_blocks)

    def _copy_blocks(self, copy_blocks: Any, source_block_ids: list[int], dest_block_ids: list[int]) -> None:
        """The allocator's `copy_blocks`, for requests that go on from another one's cache."""
        copy_blocks(source_block_ids, dest_block_ids)
        for values in (self.ids_P, self.stamps_PF, *self.windows.values()):
            blocks = values.view(-1, self.allocator.tokens_per_page, *values.shape[1:])
            blocks[dest_block_ids] = blocks[source_block_ids]

    def _slots(self, places: Tensor) -> Tensor:
        """The slots of places in the cache, where keys of other layers stand between one block and the next."""
        stride, page = self.allocator.block_physical_stride, self.allocator.tokens_per_page
        return torch.div(places, stride, rounding_mode="floor") * page + places % stride

    def write(self, name: Hashable, tokens: FlatTokens, new_T: Tensor) -> Tensor:
        """Keeps a number, or a vector, of each token of a pass; returns what is kept, by slot."""
        if name not in self.windows:
            self.windows[name] = new_T.new_zeros(self.num_slots, *new_T.shape[1:])
        self.windows[name][self._slots(tokens.own)] = new_T[tokens.live_T]
        return self.windows[name]

    def seen(self, values_P: Tensor, places: Tensor, missing: int) -> Tensor:
        """What is kept at places of the cache, in the shape of the places; `missing` where there is no place."""
        found = values_P[self._slots(places.clamp_min(0))]
        return found.where((places >= 0).view(*places.shape, *[1] * (values_P.ndim - 1)), missing)

    def _stamp(self, places: Tensor) -> Tensor:
        return self.keys[places].flatten(1)[:, :STAMP].float()

    def _check(self, tokens: FlatTokens, places_KT: Tensor, backs: Sequence[int]) -> None:
        """Compares the stamps of tokens before those of a pass, as far as they are of earlier passes."""
        earlier_KT = tokens.chunk_T < torch.tensor(backs, device=places_KT.device)[:, None]
        places = places_KT[(places_KT >= 0) & earlier_KT]
        if not torch.equal(self.stamps_PF[self._slots(places)], self._stamp(places)):
            raise ValueError(
                "The paged cache holds tokens that the memory has not seen there: leave out cpu_offload_space_gib, "
                "and do not switch memories on or off while requests run."
            )

    def begin(self, tokens: FlatTokens) -> Tensor:
        """Writes the ids of a pass; returns the history [1, T, N-1] of each token, -1 where there is none.

        Raises:
            ValueError: the cache holds tokens that this memory has not seen there.
        """
        backs = range(self.longest, 0, -1)
        places_KT = tokens.places(backs)
        self._check(tokens, places_KT, backs)
        self.ids_P[self._slots(tokens.own)] = tokens.input_ids[0, tokens.live_T]
        return self.seen(self.ids_P, places_KT[self.longest - self.num_back :], -1).T[None]

    def end(self, tokens: FlatTokens) -> None:
        """Stamps the slots that a pass has written."""
        self.stamps_PF[self._slots(tokens.own)] = self._stamp(tokens.own)


class FlatPass(ABC):
    """A pass of flat tokens of many sequences, whose engine keeps the state of one memory (abstract)."""

    @abstractmethod
    def taps(self, config: MemoryConfig, layer: int, normed_BCT: Tensor) -> Tensor:
        """`Fusion.forward`'s `extend` for these tokens: what each tap of the convolution reads, [1, T, kernel, C]."""


@final
@dataclass(frozen=True, kw_only=True)
class PagedPass(FlatPass):
    """A pass of flat tokens under transformers' continuous batching."""

    state: PagedState
    tokens: FlatTokens

    def taps(self, config: MemoryConfig, layer: int, normed_BCT: Tensor) -> Tensor:
        window_PC = self.state.write(layer, self.tokens, normed_BCT[0].T)
        places_KT = self.tokens.places(range(config.conv_window, -1, -config.max_ngram_size))
        return self.state.seen(window_PC, places_KT.T, 0)[None]


def begin_paged(name: str, config: MemoryConfig, tokens: FlatTokens) -> tuple[PagedPass, Tensor]:
    """A memory's part in a pass, and the history [1, T, N-1] of its tokens; the cache carries the state."""
    num_back = config.max_ngram_size - 1
    state = paged_state(name, config, num_back, max(num_back, config.conv_window), tokens)
    return PagedPass(state=state, tokens=tokens), state.begin(tokens)


def paged_state(name: str, identity: Hashable, num_back: int, longest: int, tokens: FlatTokens) -> PagedState:
    """The state called `name` in the cache of a pass; a new one if it is not of `identity`."""
    states = vars(tokens.cache).setdefault(STATES, {})
    if name not in states or states[name].identity != identity:
        states[name] = PagedState(identity, num_back, longest, tokens.cache)
    found: PagedState = states[name]
    return found
