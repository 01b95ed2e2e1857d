"""What a memory layer keeps of each token, inside vLLM's KV cache: its id, and what it gave to the convolution.

Patches keep more numbers than an id (`patching`), and give nothing to a convolution.

Letters: T flat tokens of many requests, K positions looked back at, C channels of the convolution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

NUMBER_BYTES = 4


@dataclass
class StateMetadata(AttentionMetadata):
    """Where the tokens of one pass lie."""

    slot_T: Tensor  # the slot in the cache of each token; below 0 for those that only fill up the batch
    request_T: Tensor  # which row of the block table belongs to each token
    block_table: Tensor  # for each request, the blocks of its tokens


@final
class StateBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Makes the metadata of a pass from vLLM's."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        num_tokens, num_requests = common_attn_metadata.num_actual_tokens, common_attn_metadata.num_reqs
        ends = common_attn_metadata.query_start_loc[1 : num_requests + 1].contiguous()
        tokens_T = torch.arange(num_tokens, device=ends.device, dtype=ends.dtype)
        return StateMetadata(
            slot_T=common_attn_metadata.slot_mapping[:num_tokens].long(),
            request_T=torch.searchsorted(ends, tokens_T, right=True).clamp_max(num_requests - 1),
            block_table=common_attn_metadata.block_table_tensor.long(),
        )


@final
class StateBackend(AttentionBackend):
    """Tells vLLM that nothing is attended to: a block of any number of tokens will do."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "ENGRAMMAR_STATE"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("The state of a memory is read by its own layer.")

    @staticmethod
    def get_builder_cls() -> type[StateBuilder]:
        return StateBuilder


@final
class StateLayer(nn.Module, AttentionLayerBase):
    """The state of one memory layer, or of patches. vLLM allocates it, beside the keys and values of the same tokens.

    Args:
        name: its name in vLLM's `static_forward_context`, with the layer's number.
        num_channels: channels of the convolution's input; 0 if there is no convolution.
        num_numbers: numbers of a token, of which the first is its id.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, num_channels: int, num_numbers: int = 1) -> None:
        super().__init__()
        self.num_channels, self.num_numbers = num_channels, num_numbers
        self.dtype = vllm_config.model_config.dtype
        padded = num_channels + num_channels % 2  # a number starts at a multiple of its own size
        self.width = padded + num_numbers * NUMBER_BYTES // self.dtype.itemsize
        self.kv_cache = torch.tensor([])
        self.retriever: Any = None  # what reads it: `reading.Retriever`, `adding.Adder` or `patching.Patcher`
        self.on_bound: Callable[[], None] | None = None
        vllm_config.compilation_config.static_forward_context[name] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Called by vLLM once the cache is there and the weights are loaded; runs `on_bound`."""
        super().bind_kv_cache(kv_cache)
        if self.on_bound is not None:
            self.on_bound()

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """A row for every position, as attention has: for a window vLLM would split attention's layers into groups."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            head_size_v=0,
            dtype=self.dtype,
            max_tp_shards=1,
        )

    def numbers(self, index: int = 0) -> Tensor:
        """One of the numbers of each token in the cache, by default its id; int32 [blocks, positions]."""
        return self.kv_cache[:, 0].view(torch.int32)[..., index - self.num_numbers]

    @property
    def inputs(self) -> Tensor:
        """The convolution's inputs in the cache, [blocks, positions, C]."""
        return self.kv_cache[:, 0, :, : self.num_channels]

    def write(self, cached: Tensor, new_T: Tensor, where: StateMetadata) -> None:
        """Writes one value (or vector) for each token of a pass into `numbers` or `inputs`."""
        live_T, slot_T, new_T = where.slot_T >= 0, where.slot_T, new_T.to(cached.dtype)
        if not live_T.all():
            slot_T, new_T = slot_T[live_T], new_T[live_T]
        _by_slot(cached).index_copy_(0, slot_T, new_T)

    def read(
        self, cached: Tensor, positions_T: Tensor, back: Sequence[int], where: StateMetadata
    ) -> tuple[Tensor, Tensor]:
        """What `numbers` or `inputs` hold `back` positions before each token, [T, K, ...]; and which of them exist."""
        size = cached.shape[1]
        wanted_TK = positions_T.long()[:, None] - torch.tensor(back, device=positions_T.device)
        exists_TK, wanted_TK = wanted_TK >= 0, wanted_TK.clamp_min(0)
        slot_TK = where.block_table[where.request_T[:, None], wanted_TK // size] * size + wanted_TK % size
        return _by_slot(cached).index_select(0, slot_TK.flatten()).unflatten(0, slot_TK.shape), exists_TK


def _by_slot(cached: Tensor) -> Tensor:
    """The same numbers or inputs in the cache, [slots, ...]."""
    return cached.view(-1, *cached.shape[2:])
