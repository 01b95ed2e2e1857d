"""Checkpoint files: each memory table in a safetensors shard of its own, and shards checked before they are read."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
BACKBONE = "backbone.safetensors"


def is_table(name: str) -> bool:
    """Whether a weight's name is that of a memory table."""
    return "memory.tables." in name


def write_tables(directory: Path, tables: Mapping[str, Tensor]) -> None:
    """Adds tables to the checkpoint that transformers just wrote into `directory`: one shard each, and the index.

    transformers' own single file becomes `backbone.safetensors`, since its loader would read that name alone.
    """
    if (directory / WHOLE).exists():
        with safe_open(directory / WHOLE, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), BACKBONE)
        os.replace(directory / WHOLE, directory / BACKBONE)
    else:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    for name, table in tables.items():
        shard = f"{name.removeprefix('model.').removesuffix('.weight')}.safetensors"
        save_file({name: table.detach().contiguous()}, directory / shard, metadata={"format": "pt"})
        weight_map[name] = shard
    size = sum((directory / shard).stat().st_size for shard in set(weight_map.values()))
    partial = directory / (INDEX + ".partial")
    partial.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1) + "\n")
    os.replace(partial, directory / INDEX)


def remove_checkpoint(directory: Path) -> None:
    """Removes the weights of an earlier checkpoint, so that none is left beside (or read instead of) the next one's.

    transformers keeps a whole `model.safetensors` beside new shards, and its loader prefers it.
    """
    for path in (
        *(directory / name for name in (WHOLE, INDEX, BACKBONE)),
        *directory.glob("memory.tables.*.safetensors"),
    ):
        path.unlink(missing_ok=True)


def check_shards(directory: Path) -> None:
    """Checks that every shard of a checkpoint is there and whole, reading headers only.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    if (directory / WHOLE).exists():
        shards = {WHOLE}
    elif (directory / INDEX).exists():
        try:
            shards = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{directory / INDEX} is not a safetensors index: copy the checkpoint again.") from error
    else:
        raise ValueError(f"{directory} has neither {WHOLE} nor {INDEX}: it is not a checkpoint.")
    for shard in sorted(shards):
        path = directory / shard
        if not path.exists():
            raise ValueError(f"Shard {path} is missing: copy it from where the checkpoint came from.")
        size, expected = path.stat().st_size, _size_by_header(path)
        if size != expected:  # None, where the header itself is broken, never equals
            raise ValueError(
                f"Shard {path} is damaged: {size} bytes on disk, {expected or 'unknown'} by its header; copy it again."
            )


def _size_by_header(path: Path) -> int | None:
    """The bytes that a safetensors file should have by its own header; None where the header cannot be read."""
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return None
        (length,) = struct.unpack("<Q", head)
        if length > path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(length))
            return 8 + length + max(int(t["data_offsets"][1]) for n, t in header.items() if n != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
