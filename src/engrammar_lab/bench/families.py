"""Which models of transformers take a memory and patches: a small random one of every type, compared with itself.

The types are those of causal LMs, and those that read images and write text; all of them are given text.

A memory with random rows is attached, or a patch is applied; then passes in chunks, which go on from a cache, are
compared with one full pass. Afterwards the base has to be there to the bit. (Tests say that an untrained memory adds
nothing.)
Remake: python -m engrammar_lab.bench.families
"""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from engrammar.attach import attach, detach
from engrammar.cells import Lines
from engrammar.config import MemoryConfig
from engrammar.edit import ExactEntry, apply_patch, base_of, build_patch, undo_patch
from engrammar.tables.sealed import write_text
from engrammar.train.attached import auto_class
from engrammar.vocabulary import compress_vocabulary
from engrammar_lab.machine import describe_run

VOCABULARY, WIDTH, BLOCKS = 61, 32, 4
LARGEST = 30_000_000  # parameters; a type that is larger with these sizes has parts that they do not reach
CHUNKS = (7, 1, 1, 5, 3)  # tokens of each pass
ENOUGH = 1e-5  # how far logits may be apart
# Sizes by the names that types give them; each type takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "linear_num_value_heads", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head", "head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size"), 8),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "mamba_d_ssm": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
PARTS: dict[str, Any] = {  # of what is not text
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "intermediate_size", "mlp_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "output_dim"), WIDTH),
    "image_size": 16,
    "patch_size": 8,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}}
HALF_RECURRENT = {"layer_types": ["linear_attention", "full_attention"] * 2}
OWN: dict[str, dict[str, Any]] = {  # where sizes alone are not enough; None: the type's own
    **{f"{kind}_text": AXES for kind in ("glm4v", "glm_ocr", "paddleocr_vl", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl")},
    **{kind: {"head_dim": None} for kind in ("axk1", "deepseek_v3", "youtu")},
    "bailing_hybrid": HALF_RECURRENT,
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4},
    "gemma3n_text": {"layer_types": ["full_attention"] * BLOCKS, "num_kv_shared_layers": 0},
    "glm4v_moe_text": {
        "rope_parameters": {**AXES["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HALF_RECURRENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "n_groups": 1, "chunk_size": 4},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "zaya": {"num_experts_per_tok": 1},
}


def types() -> list[str]:
    """Every type that continues text."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = {
        token: number for number, token in enumerate(["<pad>", "<end>", *(f"w{i}" for i in range(VOCABULARY - 2))])
    }
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")


def small_model(kind: str) -> Any:
    """A random model of a type, in evaluation, which can read text; of those that read images that part is small.

    Raises:
        ValueError: it is larger than `LARGEST` with these sizes. Other errors of transformers' own.
    """
    default: Any = CONFIG_MAPPING[kind]()
    if default.get_text_config() is default:
        sizes = _known(default, SIZES)
    else:
        sizes = {name: _known(part, PARTS) for name in default.sub_configs if (part := getattr(default, name, None))}
        sizes["text_config"] = _known(default.get_text_config(), SIZES)
    config = CONFIG_MAPPING[kind](**sizes)
    auto = auto_class(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f}M parameters with these sizes")
    torch.manual_seed(0)
    model = auto.from_config(config).eval().requires_grad_(False)
    whole(model)
    return model


def _known(default: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a config has a name for, but those that the type has others of."""
    own = OWN.get(default.model_type, {})
    names = set(vars(default)) | set(default.attribute_map) | {"attn_implementation"}
    known = {key: value for key, value in sizes.items() if key in names and key not in own}
    return known | {key: value for key, value in own.items() if value is not None}


def random_ids() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, sum(CHUNKS)), generator=torch.Generator().manual_seed(3))


def whole(model: Any) -> Tensor:
    """Logits of one full pass."""
    logits: Tensor = model(input_ids=random_ids(), use_cache=False).logits
    return logits


def in_chunks(model: Any) -> Tensor:
    """The same, in passes that each go on from the cache of the one before."""
    cached: dict[str, Any] = {}
    parts = []
    for part in random_ids().split(CHUNKS, dim=1):
        out = model(input_ids=part, use_cache=True, **cached)
        cached = {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}
        if not cached:
            raise ValueError("It returns no cache.")
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def put_memory(model: Any) -> None:
    """Attaches a memory at the middle blocks, whose every number is random."""
    attach(
        model,
        MemoryConfig(layers=(1, 2), rows_per_head=(97, 101), num_heads=2, head_dim=6, fill_id=0),
        tokenizer(),
    )
    torch.manual_seed(1)
    for name, parameter in model.engrammar.named_parameters():
        if name.endswith("_norm"):
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(std=0.5 if "conv" in name else 1.0)


def put_patch(model: Any) -> None:
    """Applies a patch that writes at each block, for every fourth word."""
    base = base_of(model, tokenizer())
    classes_V = compress_vocabulary(tokenizer())
    draw = torch.Generator().manual_seed(1)
    entries = [
        ExactEntry(
            key=(int(classes_V[word]),),
            block=number % base.num_blocks,
            values=torch.randn(1, base.hidden_size, generator=draw),
            relative=True,
        )
        for number, word in enumerate(range(2, VOCABULARY, 4))
    ]
    apply_patch(model, build_patch("check", base, entries, encoding="fp32"), tokenizer())


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {  # how each is made, and taken back
    "memory": (put_memory, detach),
    "patch": (put_patch, lambda model: undo_patch(model, "check")),
}


@torch.no_grad()
def check(model: Any) -> dict[str, Any]:
    """What a memory and a patch do to a model.

    Returns:
        `base_apart`: how far the base's own logits in chunks are from those of a full pass, or the error that it ends
            in; and for `memory` and `patch` why it is `refused`, or how far logits `moved`, how far those in chunks are
            `apart` from those of a full pass, and whether the base is `back` to the bit.
    """
    before = whole(model)
    found: dict[str, Any] = {"class": type(model).__name__, "base_apart": _or_error(lambda: _apart(model))}
    for name, (put, take) in CHANGES.items():
        try:
            put(model)
        except ValueError as error:
            found[name] = {"refused": str(error)}
            continue
        moved = _or_error(lambda: float((whole(model) - before).abs().max()))
        is_error = isinstance(moved, str)
        one = {"refused": moved} if is_error else {"moved": moved, "apart": _or_error(lambda: _apart(model))}
        take(model)
        found[name] = one | {"back": torch.equal(whole(model), before)}
    return found


def _apart(model: Any) -> float:
    return float((in_chunks(model) - whole(model)).abs().max())


def _or_error(measured: Callable[[], Any]) -> Any:
    try:
        return measured()
    except Exception as error:  # types end in errors of many kinds
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_exact(one: dict[str, Any], base_apart: float) -> bool:
    """Whether a memory or a patch changed logits, which are as exact in chunks as the base's, and left it as it was."""
    return bool(
        one.get("back")
        and one["moved"] > 1e3 * ENOUGH
        and isinstance(one["apart"], float)
        and one["apart"] < max(ENOUGH, 2 * base_apart)
    )


def measure(kinds: list[str] | None = None) -> dict[str, Any]:
    """Checks every type that continues text, or those of `kinds`.

    Returns:
        `families`: by type what `check` found, or why no small model of it was `not_built`.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    families: dict[str, Any] = {}
    for kind in tqdm(kinds or types(), desc="types", delay=2):
        model = _or_error(lambda kind=kind: small_model(kind))  # type: ignore[misc]
        families[kind] = {"not_built": model} if isinstance(model, str) else check(model)
    transformers.logging.set_verbosity(verbosity)
    return {
        **describe_run("python -m engrammar_lab.bench.families"),
        "shapes": f"{BLOCKS} blocks of width {WIDTH}, {VOCABULARY} words, random weights, fp32; 2 texts of "
        f"{sum(CHUNKS)} tokens in chunks of {', '.join(map(str, CHUNKS))}",
        "families": families,
    }


def group(one: dict[str, Any]) -> str:
    """What is said of a type."""
    if "not_built" in one:
        return "no small model could be built"
    if "refused" in one["memory"]:
        return "refused with a sentence"
    if isinstance(one["base_apart"], str):
        return "the base itself does not go on from a cache"
    if not (is_exact(one["memory"], one["base_apart"]) and is_exact(one["patch"], one["base_apart"])):
        return WRONG
    return EXACT if one["base_apart"] < ENOUGH else "as exact as the base, which differs in chunks"


EXACT, WRONG = "exact", "not exact"


def table(result: dict[str, Any]) -> tuple[list[str], Lines]:
    """Header and lines, one for each group of types."""
    groups = defaultdict(list)
    for kind, one in result["families"].items():
        groups[group(one)].append(kind)
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))
    return ["what was found", "types", "which"], [[name, str(len(kinds)), ", ".join(kinds)] for name, kinds in largest]


def verdict(result: dict[str, Any]) -> str:
    """How many types are exact, and how far logits were apart at most."""
    families, known = result["families"], result["machine"]["transformers"]
    exact = [one for one in families.values() if group(one) == EXACT]
    wrong = ", ".join(kind for kind, one in families.items() if group(one) == WRONG) or "none"
    largest = max((one[name]["apart"] for one in exact for name in ("memory", "patch")), default=0.0)
    return (
        f"Of {len(families)} types of models that continue text in transformers {known}, {len(exact)} take a memory "
        f"and a patch, give the same logits in chunks as in one pass (largest difference {largest:.1e}), and are the "
        f"base to the bit afterwards. Types that take them and do not: {wrong}."
    )


def main(out: Path = Path("results/bench/families.json")) -> None:
    """Checks every type: some five minutes.

    Args:
        out: The JSON to write.
    """
    write_text(out, json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
