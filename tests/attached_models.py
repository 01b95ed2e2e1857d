"""Tiny random models of transformers' families, and memories attached to them whose every weight is non-zero."""

import functools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from engrammar.attach import attach
from engrammar.attach.attaching import attachment_of
from engrammar.config import MemoryConfig

PAD, END = 0, 1
VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": END,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 256},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": {
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "deepseek_v4": {
        "head_dim": 16,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 64,
        "hc_mult": 3,
        "sliding_window": 6,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_hash_layers": 1,
    },
    "qwen4_exp_text": {
        "head_dim": 16,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention", "linear_attention"],
        "hc_count": 3,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16},
    "falcon_h1": {
        "head_dim": 16,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4},
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ...; w2 and W2, and so on, read alike."""
    words = [f"w{i // 2}" if i % 2 else f"W{i // 2}" for i in range(VOCABULARY - 2)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="W0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")


def base_model(family: str, **settings) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES[family], **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def memory_config(**settings) -> MemoryConfig:
    chosen = {"layers": (1, 2), "rows_per_head": (97, 101), "num_heads": 2, "head_dim": 6, "fill_id": PAD}
    return MemoryConfig(**{**chosen, **settings})


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Gives the memories of a model random rows, norms and convolutions."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in attachment_of(model).named_parameters():
            if name.endswith("_norm"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5 if "conv" in name else 1.0)


def attached_model(family: str, memory: dict | None = None, **settings) -> PreTrainedModel:
    model = base_model(family, **settings)
    attach(model, memory_config(**(memory or {})), tokenizer())
    randomize(model)
    return model


def random_ids(rows: int, tokens: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
