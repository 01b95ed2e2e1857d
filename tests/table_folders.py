"""Small folders of tables, in any encoding."""

from pathlib import Path

import torch
from torch import Tensor

from engrammar.addressing import derive_geometry
from engrammar.config import Encoding, MemoryConfig
from engrammar.tables.encodings import encode
from engrammar.tables.folder import TableFolder, TableWriter, open_tables

SCALE = 0.0625


def tiny_memory(**settings) -> MemoryConfig:
    return MemoryConfig(**{"layers": (1, 3), "rows_per_head": (47, 51), "num_heads": 2, "head_dim": 6, **settings})


def values_of(memory: MemoryConfig, layer: int) -> Tensor:
    """The values [R, C] of a layer's table, the same at every call."""
    geometry = derive_geometry(memory, num_classes=41, fill_class=2)
    num_rows = geometry.num_stored_rows(memory.layers.index(layer))
    return torch.randn(num_rows, memory.head_dim, generator=torch.Generator().manual_seed(layer))


def write_folder(
    folder: Path, encoding: Encoding = "bf16", memory: MemoryConfig | None = None, **settings
) -> TableFolder:
    """A sealed folder of `tiny_memory`'s tables, or those of `memory`, written in blocks of odd sizes."""
    memory = tiny_memory() if memory is None else memory
    geometry = derive_geometry(memory, num_classes=41, fill_class=2)
    about = {"num_ids": 53, "tokenizer_sha256": "0" * 64, "source": "a test", **settings}
    with TableWriter(folder, memory=memory, geometry=geometry, encoding=encoding, **about) as writer:
        for layer in memory.layers:
            scale = SCALE if encoding == "fp8" else None
            writer.add(layer, scale, encode(values_of(memory, layer), encoding, scale).split(37))
    return open_tables(folder)
