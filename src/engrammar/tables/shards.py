"""Checkpoint files: each memory table in a safetensors shard of its own, and shards checked before they are read.

Rows begin at a multiple of `PAGE`, so that whole pages of a disk serve them (docs/table-files.md).
A table's shard is laid out first and filled by rows, so that it never has to be in memory at once, and several
processes fill one file. Letters: R rows of a table, U rows written or read.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from engrammar.tables.sealed import MANIFEST, PAGE

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
BACKBONE = "backbone.safetensors"
MEMORY = "memory.json"
HOT_ROWS = "memory.hot.safetensors"  # by layer, the rows that are read most, hottest first
CHUNK_BYTES = 8 * 2**20  # read or written at once
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def is_table(name: str) -> bool:
    """Whether a weight's name is that of a memory table."""
    return "memory.tables." in name


def table_shard(name: str) -> str:
    """The file of a table, by its weight's name."""
    return f"{name.removeprefix('model.').removesuffix('.weight')}.safetensors"


def write_tables(directory: Path, tables: Mapping[str, Tensor]) -> None:
    """Adds whole tables to the checkpoint that transformers just wrote into `directory`: shards and index."""
    for name, table_RC in tables.items():
        path = directory / table_shard(name)
        lay_out(path, {name: (table_RC.dtype, tuple(table_RC.shape))})
        write_rows(path, name, 0, table_RC)
    write_index(directory, list(tables))


def write_index(directory: Path, tables: Sequence[str]) -> None:
    """The index of a checkpoint whose tables' shards stand beside what transformers wrote.

    transformers' own single file becomes `backbone.safetensors`, since its loader would read that name alone.
    """
    if (directory / WHOLE).exists():
        with safe_open(directory / WHOLE, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), BACKBONE)
        os.replace(directory / WHOLE, directory / BACKBONE)
    else:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    weight_map |= {name: table_shard(name) for name in tables}
    size = sum((directory / shard).stat().st_size for shard in set(weight_map.values()))
    partial = directory / (INDEX + ".partial")
    partial.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1) + "\n")
    os.replace(partial, directory / INDEX)


def lay_out(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """A safetensors file of these tensors, all zeros; it takes disk space as rows are written.

    Its data starts at a multiple of `PAGE`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_rows(path: Path, name: str, first_row: int, rows: Tensor) -> None:
    """Writes `rows` [U, ...] into tensor `name` of a laid-out file, from `first_row` on; zeros stay holes."""
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
        row_bytes = rows[:1].nbytes
        for first in range(0, len(rows), per_chunk(rows)):
            chunk = rows[first : first + per_chunk(rows)].detach().cpu().contiguous().view(torch.uint8)
            if chunk.any():  # of the bytes: -0.0 is written
                file.seek(start + (first_row + first) * row_bytes)
                file.write(chunk.numpy().data)


def read_rows(path: Path, name: str, first_row: int, out: Tensor) -> None:
    """Fills `out` [U, ...] with rows of tensor `name`, from `first_row` on; zeros over zeros are not written.

    Raises:
        ValueError: the file has no such tensor, or one of another shape or dtype.
    """
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name) if name in file.keys() else None  # noqa: SIM118 (not a dict)
        if part is None or part.get_shape()[1:] != list(out.shape[1:]) or part.get_shape()[0] < first_row + len(out):
            shape = "none" if part is None else part.get_shape()
            raise ValueError(f"{path} should hold {name} with rows of {list(out.shape[1:])}, but its shape is {shape}.")
        for first in range(0, len(out), per_chunk(out)):
            target = out[first : first + per_chunk(out)]
            chunk = part[first_row + first : first_row + first + len(target)]
            if chunk.dtype != out.dtype:
                raise ValueError(f"{path} holds {name} as {chunk.dtype}; {out.dtype} is expected.")
            if chunk.view(torch.uint8).any() or target.view(torch.uint8).any():
                target.copy_(chunk)


def load_backbone(directory: Path, model: nn.Module) -> None:
    """Loads everything but the tables of a checkpoint into a model whose tables are elsewhere.

    Raises:
        ValueError: a shard is missing or damaged, or the checkpoint lacks weights of the model.
    """
    check_shards(directory)
    shards = {WHOLE}
    if not (directory / WHOLE).exists():
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        shards = {shard for name, shard in weight_map.items() if not is_table(name)}
    state = {name: tensor for shard in sorted(shards) for name, tensor in load_file(directory / shard).items()}
    result = model.load_state_dict(state, strict=False)
    missing = set(result.missing_keys) - set(getattr(model, "all_tied_weights_keys", ()))
    if missing or result.unexpected_keys:
        wrong = min(missing) if missing else result.unexpected_keys[0]
        raise ValueError(f"{directory} is a checkpoint of another model: they differ in {wrong}; copy it again.")


def per_chunk(rows: Tensor) -> int:
    """Rows that are read or written at once."""
    return max(1, CHUNK_BYTES // max(1, rows[:1].nbytes))


def remove_checkpoint(directory: Path) -> None:
    """Removes the weights of an earlier checkpoint, so that none is left beside (or read instead of) the next one's.

    transformers keeps a whole `model.safetensors` beside new shards, and its loader prefers it. What says that the
    earlier one is whole goes first.
    """
    for path in (
        *(directory / name for name in (MANIFEST, MEMORY, HOT_ROWS, WHOLE, INDEX, BACKBONE)),
        *directory.glob("*memory.tables.*.safetensors"),
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
