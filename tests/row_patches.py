"""Patches of a saved tiny model: one that replaces rows of its tables, one that adds to hidden states."""

from pathlib import Path
from typing import Any

import torch

from attached_models import tokenizer
from engrammar import EngrammarForCausalLM
from engrammar.edit import ExactEntry, Patch, base_of, build_patch, replace_rows, write_patch
from engrammar.memory import Memory


def row_patch(model: Any, memory: Memory) -> Patch:
    """A patch that replaces every second row of a memory's first table."""
    layer, draw = memory.config.layers[0], torch.Generator().manual_seed(9)
    rows = torch.arange(0, memory.table(layer).shape[0], 2)
    values = torch.randn(len(rows), memory.config.head_dim, generator=draw)
    return build_patch("rows", base_of(model, tokenizer()), rows=replace_rows(memory, {layer: (rows, values)}))


def write_patches(folder: Path, out: Path) -> tuple[Path, Path]:
    """Writes both for the model in `folder`; returns their files."""
    model = EngrammarForCausalLM.from_pretrained(folder, memory="ram")
    changed, base = row_patch(model, model.model.memory), base_of(model, tokenizer())
    entry = ExactEntry(key=(5,), block=1, values=torch.ones(1, model.config.hidden_size))
    paths = out / "rows.safetensors", out / "entries.safetensors"
    for patch, path in zip((changed, build_patch("entries", base, [entry])), paths):
        write_patch(patch, path)
    return paths
