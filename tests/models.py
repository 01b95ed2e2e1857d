"""Small models of every dialect, with every weight of the memory non-zero."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM, model_class
from engrammar.train.data import train_tokenizer

PAD, BOS, END, VOCABULARY = 0, 1, 2, 53


def tiny_memory(dialect: str) -> dict:
    memory = {"dialect": dialect, "layers": [1, 3], "head_dim": 6, "num_heads": 2, "fill_id": END}
    memory["rows_per_head"] = [97, 101, 131] if dialect == "deepseek_v41" else [97, 101]
    if dialect == "deepseek_v41":
        memory["dead_ids"] = [END]
    if dialect == "qwen_next":
        memory |= {"end_ids": [END], "rows_multiple": 64}
    return memory


def tiny_config(
    dialect: str | None, num_branches: int = 1, kind: type[EngrammarConfig] = EngrammarConfig, **settings
) -> EngrammarConfig:
    return kind(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "num_branches": num_branches,
            "memory": None if dialect is None else tiny_memory(dialect),
            "num_classes": 41,
            "fill_class": END,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": END,
            **settings,
        }
    )


def tiny_model(dialect: str | None, num_branches: int = 1, seed: int = 0, **settings) -> EngrammarForCausalLM:
    torch.manual_seed(seed)
    config = tiny_config(dialect, num_branches, **settings)
    model = model_class(config)(config).eval()
    memory = model.model.memory
    if memory is None:
        return model
    if memory.class_of_id is not None:
        memory.set_classes(torch.arange(VOCABULARY) % 41)
    with torch.no_grad():
        for table in memory.tables.values():
            table.weight.normal_()
        for block in model.model.layers:
            if block.fusion is not None and block.fusion.config.conv_kernel:
                block.fusion.conv_weight.normal_()
    return model


def save_micro(folder: Path) -> None:
    """Saves an untrained `micro` with a tokenizer, as training leaves them."""
    train_tokenizer(["To be, or not to be, that is the question."], vocab_size=300, path=folder)
    model = EngrammarForCausalLM.from_preset("micro", tokenizer=AutoTokenizer.from_pretrained(folder))
    model.save_pretrained(folder)
