"""Patches of a saved tiny model: one that replaces rows of its tables, one that adds to hidden states."""

from pathlib import Path

import torch

from attached_models import tokenizer
from engrammar import EngrammarForCausalLM
from engrammar.edit import ExactEntry, base_of, build_patch, replace_rows, write_patch


def write_patches(folder: Path, out: Path) -> tuple[Path, Path]:
    """Writes both for the model in `folder`; returns their files."""
    model = EngrammarForCausalLM.from_pretrained(folder, memory="ram")
    memory, base = model.model.memory, base_of(model, tokenizer())
    layer, draw = memory.config.layers[0], torch.Generator().manual_seed(9)
    rows = torch.arange(0, memory.table(layer).shape[0], 2)
    values = torch.randn(len(rows), memory.config.head_dim, generator=draw)
    changed = build_patch("rows", base, rows=replace_rows(memory, {layer: (rows, values)}))
    entry = ExactEntry(key=(5,), block=1, values=torch.ones(1, model.config.hidden_size))
    paths = out / "rows.safetensors", out / "entries.safetensors"
    for patch, path in zip((changed, build_patch("entries", base, [entry])), paths):
        write_patch(patch, path)
    return paths
