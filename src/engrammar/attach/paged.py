"""Memories under transformers' continuous batching: flat tokens of many sequences, with a paged cache.

A memory's state is kept by slot of the paged cache, so prefixes that requests share and requests that begin anew need
nothing. A slot also holds a stamp, some numbers of the key that the base cached there. If the base has moved a slot
without the state (requests swapped to RAM), or filled one with the memory off, stamps differ, and the pass is refused.
Letters: T flat tokens of a pass, P slots of the cache, S positions of history (N-1), C channels, F numbers of a stamp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from engrammar.config import MemoryConfig
from engrammar.fusion import Fusion

STATES = "engrammar_states"  # the attribute of a paged cache that holds the states
STAMP = 4  # numbers of a key
GROUP = "full_attention"  # the layers whose cache holds every position


@dataclass(frozen=True, kw_only=True)
class FlatTokens:
    """The tokens of a pass and their places in the paged cache.

    Attributes:
        input_ids: [1, T].
        positions_T: each token's position in its sequence.
        request_T: the index of each token's request.
        chunk_T: how many tokens before this one are of the same request and this pass.
        live_T: False at tokens that only fill the pass up.
        writes, reads: places in the cache, as the base's attention uses them; no reads if all sequences begin here.
        starts: where the reads of each request begin.
        cache: the paged cache.
    """

    input_ids: Tensor
    positions_T: Tensor
    request_T: Tensor
    chunk_T: Tensor
    live_T: Tensor
    writes: Tensor
    reads: Tensor
    starts: Tensor
    cache: Any

    def places(self, back: int) -> Tensor:
        """For each token the place in the cache of the token `back` positions before it, [T], -1 for none."""
        before_T = self.positions_T - back
        if self.reads.numel():
            index_T = self.starts[self.request_T] + before_T.clamp_min(0)
            places_T = self.reads[index_T.clamp_max(self.reads.numel() - 1)]
        else:
            places_T = self.writes[(torch.arange(len(before_T), device=before_T.device) - back).clamp_min(0)]
        return places_T.where((before_T >= 0) & self.live_T, -1)


def read_flat(given: Mapping[str, Any]) -> FlatTokens:
    """Reads the arguments of a decoder's `forward` under continuous batching.

    Raises:
        ValueError: the model has no layer of full attention, or the pass reads the cache by blocks.
    """
    cache, input_ids = given["cache"], given["input_ids"]
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


@final
class PagedState:
    """What one memory keeps of the sequences in a paged cache, by slot."""

    def __init__(self, config: MemoryConfig, cache: Any) -> None:
        self.config = config
        self.allocator = cache.cache_allocators[GROUP]
        blocks, device = cache.cache_tensor.numel() // self.allocator.bytes_per_block, cache.cache_tensor.device
        self.num_slots = blocks * self.allocator.tokens_per_page
        self.ids_P = torch.full((self.num_slots,), -1, device=device)
        self.stamps_PF = torch.full((self.num_slots, STAMP), float("nan"), device=device)
        self.windows: dict[int, Tensor] = {}  # for each layer [P, C]; C is known to its fusion only
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

    def _seen(self, values_P: Tensor, places_T: Tensor, missing: int) -> Tensor:
        seen_T = values_P[self._slots(places_T.clamp_min(0))]
        return seen_T.where((places_T >= 0).view(-1, *[1] * (values_P.ndim - 1)), missing)

    def _stamp(self, places: Tensor) -> Tensor:
        return self.keys[places].flatten(1)[:, :STAMP].float()

    def _check(self, tokens: FlatTokens, back: int) -> None:
        """Compares the stamps of the tokens `back` positions before, as far as they are of earlier passes."""
        places_T = tokens.places(back)
        places = places_T[(places_T >= 0) & (tokens.chunk_T < back)]
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
        num_back = self.config.max_ngram_size - 1
        for back in range(1, max(num_back, self.config.conv_window) + 1):
            self._check(tokens, back)
        self.ids_P[self._slots(tokens.places(0)[tokens.live_T])] = tokens.input_ids[0, tokens.live_T]
        history = [self._seen(self.ids_P, tokens.places(back), -1) for back in range(num_back, 0, -1)]
        return torch.stack(history, dim=-1)[None]

    def end(self, tokens: FlatTokens) -> None:
        """Stamps the slots that a pass has written."""
        places = tokens.places(0)[tokens.live_T]
        self.stamps_PF[self._slots(places)] = self._stamp(places)


@dataclass(frozen=True, kw_only=True)
class PagedPass:
    """A pass of flat tokens, and the state of one memory."""

    state: PagedState
    tokens: FlatTokens

    def fuse(
        self, layer: int, fusion: Fusion, hidden_BTMD: Tensor, embedding_BTE: Tensor, dead_BT: Tensor | None
    ) -> Tensor:
        """`Fusion.forward` for these tokens; B is 1."""
        value_BTMD = fusion.gated_value(hidden_BTMD, embedding_BTE, dead_BT)
        config, tokens, state = fusion.config, self.tokens, self.state
        if not config.conv_kernel:
            return value_BTMD
        normed_TC = fusion.normed_value(value_BTMD)[0].T
        if layer not in state.windows:
            state.windows[layer] = normed_TC.new_zeros(state.num_slots, normed_TC.shape[1])
        window_PC = state.windows[layer]
        window_PC[state._slots(tokens.places(0)[tokens.live_T])] = normed_TC[tokens.live_T]
        backs = range(config.conv_window, -1, -config.max_ngram_size)
        return value_BTMD + fusion.convolve_seen(state._seen(window_PC, tokens.places(back), 0) for back in backs)


def begin_paged(name: str, config: MemoryConfig, tokens: FlatTokens) -> tuple[PagedPass, Tensor]:
    """A memory's part in a pass, and the history [1, T, N-1] of its tokens; the cache carries the state."""
    states = vars(tokens.cache).setdefault(STATES, {})
    if name not in states or states[name].config != config:
        states[name] = PagedState(config, tokens.cache)
    return PagedPass(state=states[name], tokens=tokens), states[name].begin(tokens)
