"""One block of the backbone: memory (where the layer has one), attention, MLP or experts.

Letters: B batch, T tokens, M branches, D hidden width, E width of a token's rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
)

from engrammar.fusion import Fusion
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.hyper import Residual

IDS_STATE, CONV_STATE = 0, 1  # what a memory layer keeps in the attention cache


class EngrammarBlock(GradientCheckpointingLayer):
    """Memory (where the layer has one), attention, MLP or experts, each added to the residual streams."""

    def __init__(self, config: EngrammarConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        memory = config.memory_config
        self.fusion = (
            Fusion(memory, hidden_size=config.hidden_size, num_branches=config.num_branches)
            if memory is not None and layer_idx in memory.layers
            else None
        )
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        self.mlp = DeepseekV3MLP(config) if layer_idx < config.first_k_dense_replace else DeepseekV3MoE(config)
        self.attn_residual = Residual(config, DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.mlp_residual = Residual(config, DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(
        self,
        streams_BTMD: Tensor,
        embedding_BTE: Tensor | None = None,
        dead_BT: Tensor | None = None,
        starts_BT: Tensor | None = None,
        extend: Callable[[Tensor], Tensor] | None = None,
        **attention: Any,
    ) -> Tensor:
        if self.fusion is not None:
            assert embedding_BTE is not None
            if extend is None and self.fusion.config.conv_kernel:
                extend = self._window_in(attention.get("past_key_values"))
            streams_BTMD = streams_BTMD + self.fusion(streams_BTMD, embedding_BTE, dead_BT, starts_BT, extend)

        def attend(x_BTD: Tensor) -> Tensor:
            return self.self_attn(x_BTD, **attention)[0]

        def feed(x_BTD: Tensor) -> Tensor:  # not the module itself: accelerate would move an argument that has `.to`
            return self.mlp(x_BTD)

        return self.mlp_residual(self.attn_residual(streams_BTMD, attend), feed)

    def _window_in(self, cache: Cache | None) -> Callable[[Tensor], Tensor] | None:
        """`Fusion.forward`'s `extend`, where the convolution's window is a state of the attention cache."""
        if cache is None or self.fusion is None:
            return None
        return partial(
            cache.update_conv_state,
            layer_idx=self.layer_idx,
            state_idx=CONV_STATE,
            conv_kernel_size=self.fusion.config.conv_window,
        )
