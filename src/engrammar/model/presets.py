"""Models by name, from seconds on a laptop to the paper's (appendix A, table 5).

Where the paper gives no number (MLA ranks, widths of dense layers), ours are chosen so that total and active
parameters are as printed: 26.7B, 39.5B and 4.1B in total, 3.8B active.
Letters: V ids of the vocabulary.
"""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from engrammar.model.configuration import EngrammarConfig
from engrammar.vocabulary import require_tokenizer

DEEPSEEK_V3 = {"vocab_size": 129_280, "num_ids": 128_815, "num_classes": 98_627, "fill_class": 2}
PAPER_BACKBONE: dict[str, Any] = {
    **DEEPSEEK_V3,
    "hidden_size": 2560,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 72,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "num_branches": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
SMALL: dict[str, Any] = {
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
SMALL_MEMORY: dict[str, Any] = {"dialect": "paper", "boundary": "end", "end_ids": [1], "fill_id": 0}

PRESETS: dict[str, dict[str, Any]] = {
    "micro": {
        **SMALL,
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "memory": {**SMALL_MEMORY, "layers": [1], "num_heads": 2, "head_dim": 16, "rows_per_head": [1000, 1000]},
    },
    "nano": {
        **SMALL,
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "intermediate_size": 768,
        "moe_intermediate_size": 128,
        "n_routed_experts": 24,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "memory": {**SMALL_MEMORY, "layers": [1], "num_heads": 4, "head_dim": 16, "rows_per_head": [6000, 6000]},
    },
    "100m": {
        **SMALL,
        "vocab_size": 32_768,
        "hidden_size": 640,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 3840,
        "moe_intermediate_size": 448,
        "n_routed_experts": 48,
        "num_experts_per_tok": 4,
        "num_branches": 4,
        "max_position_embeddings": 2048,
        "memory": {**SMALL_MEMORY, "layers": [1, 5], "head_dim": 32, "rows_per_head": [110_000, 110_000]},
    },
    "engram-27b": {**PAPER_BACKBONE, "n_routed_experts": 55, "memory": {"dialect": "paper"}},
    "engram-40b": {
        **PAPER_BACKBONE,
        "n_routed_experts": 55,
        "memory": {"dialect": "paper", "rows_per_head": [7_239_680, 7_239_680]},
    },
    "moe-27b": PAPER_BACKBONE,
    "dense-4b": {**PAPER_BACKBONE, "first_k_dense_replace": 30, "intermediate_size": 12_288},
}


def preset(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    classes_V: NDArray[np.int64] | None = None,
    **overrides: Any,
) -> EngrammarConfig:
    """The config of a named model, for `tokenizer` if one is given.

    Args:
        name: the name of the preset.
        tokenizer: gives the vocabulary size, special ids and, with `classes_V`, the memory's addresses.
        classes_V: `compress_vocabulary(tokenizer)`.
        overrides: any setting of `EngrammarConfig`. `memory` is a whole `MemoryConfig`, a dict of settings over the
            preset's own, or None to leave the memory out.

    Raises:
        ValueError: there is no such preset or setting, or the tokenizer does not fit the memory.
    """
    if tokenizer is not None:
        require_tokenizer(tokenizer)
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; known: {', '.join(PRESETS)}.")
    unknown = sorted(set(overrides) - {field.name for field in fields(EngrammarConfig)})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a setting of EngrammarConfig; see its docstring for those there are.")
    settings = {**PRESETS[name], **overrides}
    if isinstance(settings.get("memory"), dict):
        settings["memory"] = _memory_settings(PRESETS[name].get("memory") or {}, overrides.get("memory", {}), tokenizer)
    if tokenizer is None:
        if settings.get("memory") is not None and "num_classes" not in settings and "geometry" not in settings:
            settings |= {"num_classes": settings["vocab_size"], "fill_class": 0}  # enough to count parameters
        return EngrammarConfig(**settings)
    for key in ("vocab_size", "num_ids", "num_classes", "fill_class", "pad_token_id", "bos_token_id", "eos_token_id"):
        if key not in overrides:
            settings.pop(key, None)
    return EngrammarConfig.for_tokenizer(tokenizer, classes_V, **settings)


def _memory_settings(
    own: dict[str, Any], given: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """A preset's memory settings, overridden first by the tokenizer's special ids, then by `given`."""
    memory = {**own, **given}
    if own.get("boundary") != "end":
        return memory
    if memory["boundary"] != "end" and "end_ids" not in given:
        memory["end_ids"] = []
    if tokenizer is None or not memory["end_ids"]:
        return memory
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None and not {"end_ids", "fill_id"} <= set(given):
        raise ValueError(
            "This preset's memory never looks back over the tokenizer's eos token, but the tokenizer has none: set "
            "tokenizer.eos_token, or give memory={'end_ids': [...], 'fill_id': ...}."
        )
    memory |= {"end_ids": [end], "fill_id": end if pad is None else pad}
    return memory | given
