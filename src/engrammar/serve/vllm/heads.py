"""Heads of a width that vLLM's attention on a CPU has no kernel for are padded with zeros, which change no score.

Letters: T flat tokens, H heads, W width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend


class PaddedAttention(nn.Module):
    """vLLM's attention layer with heads wider than the model's."""

    def __init__(self, attention: Any, width: int) -> None:
        super().__init__()
        self.attention, self.width = attention, width
        self.wide = int(attention.head_size)

    def forward(self, query_TX: Tensor, key_TX: Tensor, value_TX: Tensor) -> Tensor:
        """Attends; the arguments and the result are [T, H*W]."""
        heads = [x_TX.unflatten(-1, (-1, self.width)) for x_TX in (query_TX, key_TX, value_TX)]
        padded = [F.pad(x_THW, (0, self.wide - self.width)).flatten(1) for x_THW in heads]
        attended_THW = self.attention(*padded).unflatten(-1, (-1, self.wide))
        return attended_THW[..., : self.width].flatten(1)


def width_of(config: Any) -> int:
    """The width of a model's queries and keys."""
    return int(config.qk_nope_head_dim + config.qk_rope_head_dim)


@contextmanager
def wide_heads(config: Any) -> Iterator[None]:
    """While vLLM makes its attention layers, the config names a width that it has kernels for.

    Raises:
        ValueError: the model's heads are wider than any kernel's, or its values are wider than its keys.
    """
    width, sizes = width_of(config), sorted(CPUAttentionBackend.get_supported_head_sizes())
    fits = [size for size in sizes if size >= width]
    if not fits or config.v_head_dim > width:
        raise ValueError(
            f"vLLM's attention on a CPU takes heads of up to {sizes[-1]} numbers, values no wider than keys; this "
            f"model's have {width} and {config.v_head_dim}: serve it in transformers."
        )
    own = config.qk_nope_head_dim
    config.qk_nope_head_dim = fits[0] - config.qk_rope_head_dim
    try:
        yield
    finally:
        config.qk_nope_head_dim = own


def pad_heads(model: nn.Module, width: int) -> None:
    """Wraps the attention layers of a model that were made under `wide_heads`, where they are wider than `width`."""
    for module in [*model.modules()]:
        attention = getattr(module, "attn", None)
        if attention is not None and attention.head_size != width:
            module.attn = PaddedAttention(attention, width)
