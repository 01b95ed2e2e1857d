"""Contexts longer than the trained one by YaRN (arXiv 2309.00071), as DeepSeek-V3 applies it to MLA."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    yarn_apply_mscale,
)

from engrammar.config import check_setting


def yarn_parameters(rope_theta: float, *, factor: float, length: int) -> dict[str, Any]:
    """transformers' `rope_parameters` for `factor` times the trained `length`.

    mscale_all_dim sets the temperature of the whole attention score, including the part without positions. An equal
    mscale leaves the rotary tables' amplitude at 1 (DeepSeek-V3's settings).
    """
    return {
        "rope_type": "yarn",
        "rope_theta": rope_theta,
        "factor": float(factor),
        "original_max_position_embeddings": length,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


@contextmanager
def stretched(model: Any, *, factor: float, length: int) -> Iterator[None]:
    """In this context an `EngrammarForCausalLM` reads `factor` times its trained `length`; then it is restored.

    Raises:
        ValueError: factor is below 1, or the model's positions are not DeepSeek-V3's plain ones.
    """
    config = model.config
    backbone: Any = getattr(model, "model", None)
    rotary = getattr(backbone, "rotary_emb", None)
    check_setting("factor", factor, factor >= 1, "1 or more, in trained lengths")
    if not isinstance(rotary, DeepseekV3RotaryEmbedding) or rotary.rope_type != "default":
        raise ValueError("Only a model with DeepSeek-V3's rotary positions of rope_type 'default' can be stretched.")
    before = (config.rope_parameters, config.max_position_embeddings)
    scaled = [module for module in model.modules() if isinstance(module, DeepseekV3Attention)]
    scaling = [module.scaling for module in scaled]
    try:
        config.rope_parameters = yarn_parameters(before[0]["rope_theta"], factor=factor, length=length)
        config.max_position_embeddings = int(factor * length)
        backbone.rotary_emb = DeepseekV3RotaryEmbedding(config).to(rotary.inv_freq.device)
        for module in scaled:
            module.scaling = yarn_apply_mscale(config.rope_parameters, module.qk_head_dim**-0.5)
        yield
    finally:
        config.rope_parameters, config.max_position_embeddings = before
        backbone.rotary_emb = rotary
        for module, own in zip(scaled, scaling):
            module.scaling = own
