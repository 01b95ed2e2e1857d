"""Folders of the two released layouts, tiny: one from transformers' own model, one synthetic."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

from engrammar.tables.folder import TableFolder
from engrammar.tables.released.files import INDEX

VOCABULARY, END, HIDDEN, BRANCHES = 97, 5, 24, 2
GROUP = 32


def table_rows(folder: TableFolder, layer: int) -> torch.Tensor:
    """A table's stored rows as bytes, read by the offsets that its shards name."""
    table = folder.tables[layer]
    runs = []
    for shard in table.shards:
        assert shard.first_row == sum(len(run) for run in runs)
        raw = np.fromfile(shard.path, np.uint8, shard.num_rows * table.row_bytes, offset=shard.start)
        runs.append(torch.from_numpy(raw).view(shard.num_rows, table.row_bytes))
    return torch.cat(runs)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def qwen_model(dtype: torch.dtype, seed: int = 0, vocab_size: int = VOCABULARY) -> Qwen4ExpForCausalLM:
    config = Qwen4ExpTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=3,
        layer_types=["linear_attention"] * 3,
        hc_count=BRANCHES,
        hc_lowrank=4,
        ple_layer_ids=[1, 3],
        ple_embed_dim=28,
        ngram_size=3,
        heads_per_ngram=2,
        ngram_vocab_size_base=53,
        make_ngram_vocab_size_divisible_by=16,
        eos_token_id=END,
        split_ngram_parts=5,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = Qwen4ExpForCausalLM(config).eval()
    for layer in (0, 2):
        torch.nn.init.normal_(embedding_of(model, layer).ngram_embedding.weight)
    return model.to(dtype)


def embedding_of(model: Qwen4ExpForCausalLM, layer: int) -> torch.nn.Module:
    return model.model.layers[layer].ple.ple_embedding


def save_split(tensors: dict[str, torch.Tensor], folder: Path, num_files: int) -> None:
    """Tensors over several files with an index, neighbours apart, as a release has them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for n in range(num_files):
        file = f"model-{n + 1:05}-of-{num_files:05}.safetensors"
        weight_map |= dict.fromkeys(names[n::num_files], file)
        save_file({name: tensors[name].contiguous() for name in names[n::num_files]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def qwen_release(
    model: Qwen4ExpForCausalLM,
    folder: Path,
    *,
    fp8: bool = False,
    num_files: int = 4,
    layers: tuple[int, ...] = (0, 2),
) -> Path:
    """The model as it is released: `shard_N` tensors over several files; fp8 with one bf16 scale a table."""
    saved = folder.with_name(folder.name + "-saved")
    model.save_pretrained(saved)
    tensors = load_file(saved / "model.safetensors")
    assert any("shard_4.weight" in name for name in tensors), "transformers no longer writes shards"
    if fp8:
        for layer in layers:
            scale = torch.tensor([0.0123 * (1 + layer)]).bfloat16()
            for name in [name for name in tensors if f"layers.{layer}." in name and ".shard_" in name]:
                tensors[name] = (tensors[name].float() / scale.float()).to(torch.float8_e4m3fn)
            tensors[f"model.layers.{layer}.ple.ple_embedding.ngram_embedding.weight_scale"] = scale
    save_split(tensors, folder, num_files)
    shutil.copy(saved / "config.json", folder)
    return folder


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dict of all tensors and writes them again."""
    tensors = load_all(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    change(tensors)
    save_split(tensors, folder, 4)


def change_settings(folder: Path, **settings) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content.update(settings) if "text_config" not in content else content["text_config"].update(settings)
    path.write_text(json.dumps(content))


def deepseek_settings(**settings) -> dict:
    text = {
        "hidden_size": HIDDEN,
        "hc_mult": BRANCHES,
        "rms_norm_eps": 1e-6,
        "engram_layer_ids": [1, 3],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 53,
        "engram_n_heads": 2,
        "engram_head_dim": 64,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 5,
    }
    return {"model_type": "deepseek_v41", "image_token_id": 4, "text_config": text | settings}


def deepseek_rows(settings: dict) -> list[int]:
    """Rows of each table, by a sieve that shares nothing with ours."""
    text = settings["text_config"]
    primes = (
        n for n in range(text["engram_vocab_size"], 10**6) if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
    )
    heads = (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"]
    return [sum(next(primes) for _ in range(heads)) for _ in text["engram_layer_ids"]]


def deepseek_release(folder: Path, *, scale_dtype: torch.dtype = torch.float8_e8m0fnu, fp8: bool = True) -> Path:
    """Synthetic files of V4.1's layout, random bytes wherever random bytes make numbers."""
    generator = torch.Generator().manual_seed(0)
    settings = deepseek_settings()
    rows, text = deepseek_rows(settings), settings["text_config"]
    settings["text_config"]["engram_num_embeddings"] = rows
    shape = ((BRANCHES + 1) * HIDDEN, 3 * text["engram_n_heads"] * text["engram_head_dim"])

    def numbers(*shape: int) -> torch.Tensor:
        raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        raw[(raw & 0x7F) == 0x7F] = 0x7E  # fp8's two NaNs
        return raw.view(torch.float8_e4m3fn)

    def scales(*shape: int, low: int = 100) -> torch.Tensor:
        return torch.randint(low, 125, shape, generator=generator, dtype=torch.uint8).view(scale_dtype)

    tensors = {"embed.weight": torch.zeros(7, HIDDEN).bfloat16()}
    for layer, num_rows in zip((1, 3), rows):
        name = f"layers.{layer}.engram"
        tensors[f"{name}.embed.weight"] = numbers(num_rows, 64)
        tensors[f"{name}.embed.scale"] = scales(num_rows, 2)
        wkv, scale = numbers(*shape), scales(-(-shape[0] // GROUP), shape[1] // GROUP, low=110)
        tensors[f"{name}.wkv.weight"] = wkv if fp8 else torch.randn(shape, generator=generator).bfloat16()
        if fp8:
            tensors[f"{name}.wkv.scale"] = scale
        tensors[f"{name}.q_weight"] = torch.randn(BRANCHES, HIDDEN, generator=generator).bfloat16()
        tensors[f"{name}.k_weight"] = torch.randn(BRANCHES, HIDDEN, generator=generator).bfloat16()
    save_split(tensors, folder, 2)
    (folder / "config.json").write_text(json.dumps(settings))
    Tokenizer(models.WordLevel({"a": 0, "A": 1, "<pad>": 2, "b": 3, "c": 4, "d": 5}, "a")).save(
        str(folder / "tokenizer.json")
    )
    return folder
