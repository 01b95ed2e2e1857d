"""Checkpoint files: each memory table has its own safetensors shard, and shards are checked before they are read.

Rows begin at a multiple of `PAGE`, so that they can be read as whole pages of a disk (docs/table-files.md).
A table's shard is laid out first and then filled with rows. So it never has to be whole in memory, and several
processes can fill one file.
Letters: R rows of a table, C row width, U rows written or read.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from engrammar.tables.checksums import MANIFEST, TABLE_SHARD, page_sums_path
from engrammar.tables.encodings import NAME_OF
from engrammar.tables.headers import BLOCK_BYTES, read_header, read_json, write_header
from engrammar.tables.sealed import written_beside

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
BACKBONE = "backbone.safetensors"
MEMORY = "memory.json"
CODE = "modeling_engrammar.py"  # one line, which we never run: see `EngrammarConfig.save_pretrained`
HOT_ROWS = "memory.hot.safetensors"  # for each layer, the rows that are read most, hottest first


def is_table(name: str) -> bool:
    """Whether a weight with this name is a memory table."""
    return "memory.tables." in name


def table_shard(name: str) -> str:
    """The name of the file of a table whose weight has this name."""
    return f"{name.removeprefix('model.').removesuffix('.weight')}.safetensors"


def write_tables(directory: Path, tables: Mapping[str, Tensor]) -> None:
    """Adds whole tables, and their index, to the checkpoint that transformers just wrote into `directory`."""
    for name, table_RC in tables.items():
        path = directory / table_shard(name)
        lay_out(path, {name: (table_RC.dtype, tuple(table_RC.shape))})
        write_rows(path, name, 0, table_RC)
    write_index(directory, list(tables))


def write_index(directory: Path, tables: Sequence[str]) -> None:
    """Writes the index of a checkpoint in which the tables' shards have been added to what transformers wrote.

    transformers' single file `model.safetensors` is renamed to `backbone.safetensors`, since transformers' loader would
    read no other file beside it.
    """
    weights = weight_map(directory)
    if (directory / WHOLE).exists():
        weights = dict.fromkeys(weights, BACKBONE)
        os.replace(directory / WHOLE, directory / BACKBONE)
    weights |= {name: table_shard(name) for name in tables}
    size = sum((directory / shard).stat().st_size for shard in set(weights.values()))
    with written_beside(directory / INDEX) as partial:
        partial.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=1) + "\n")


def lay_out(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """`headers.write_header` for torch's dtypes."""
    write_header(path, {name: (NAME_OF[dtype], shape) for name, (dtype, shape) in tensors.items()})


def write_rows(path: Path, name: str, first_row: int, rows: Tensor) -> None:
    """Writes `rows` [U, ...] into the tensor `name` of a laid-out file, from `first_row` on; zeros are not written."""
    start = read_header(path)[name].start
    with path.open("rb+") as file:
        row_bytes = rows[:1].nbytes
        for first in range(0, len(rows), per_chunk(rows)):
            chunk = rows[first : first + per_chunk(rows)].detach().cpu().contiguous().view(torch.uint8)
            if chunk.any():  # `chunk` is bytes, so -0.0 is written
                file.seek(start + (first_row + first) * row_bytes)
                file.write(chunk.numpy().data)


def read_rows(path: Path, name: str, first_row: int, out: Tensor) -> None:
    """Fills `out` [U, ...] with rows of the tensor `name`, from `first_row` on; zeros over zeros are not written.

    Raises:
        ValueError: the file has no such tensor, or it has another shape or dtype.
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
    """Loads a checkpoint, except its tables, into a model whose tables are elsewhere.

    Raises:
        ValueError: a shard is missing or damaged, or the checkpoint lacks weights of the model.
    """
    check_shards(directory)
    shards = {shard for name, shard in weight_map(directory).items() if not is_table(name)}
    state = {name: tensor for shard in sorted(shards) for name, tensor in load_file(directory / shard).items()}
    result = model.load_state_dict(state, strict=False)
    missing = set(result.missing_keys) - set(getattr(model, "all_tied_weights_keys", ()))
    if missing or result.unexpected_keys:
        wrong = min(missing) if missing else result.unexpected_keys[0]
        raise ValueError(f"{directory} is a checkpoint of another model: they differ in {wrong}; copy it again.")


def per_chunk(rows: Tensor) -> int:
    """How many rows are read or written at once."""
    return max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))


def remove_checkpoint(directory: Path) -> None:
    """Removes the weights of an earlier checkpoint, so that none is left beside, or read instead of, the next one's.

    transformers keeps a whole `model.safetensors` beside new shards, and its loader prefers it. The manifest is deleted
    first, so a crash halfway never leaves a folder that looks complete.
    """
    for path in (
        *(directory / name for name in (MANIFEST, MEMORY, HOT_ROWS, WHOLE, INDEX, BACKBONE)),
        *directory.glob("*memory.tables.*.safetensors"),
    ):
        path.unlink(missing_ok=True)


def weight_map(directory: Path) -> dict[str, str]:
    """The file of each weight of a checkpoint; raises a ValueError if it has no weights, or its index is not one."""
    if (directory / WHOLE).exists():
        return dict.fromkeys(read_header(directory / WHOLE), WHOLE)
    path = directory / INDEX
    if not path.exists():
        raise ValueError(f"{directory} has neither {WHOLE} nor {INDEX}: it is not a checkpoint.")
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s != "" for s in shards.values()):
        raise ValueError(f"{path} is not an index from weights to files beside it: copy the checkpoint again.")
    return shards


def check_shards(directory: Path) -> None:
    """Checks that every shard of a checkpoint is there, as long as its header says, with the weights of the index.

    Raises:
        ValueError: a shard is missing or damaged; names the file and what is wrong with it.
    """
    weights = weight_map(directory)
    for shard in sorted(set(weights.values())):
        if not (directory / shard).exists():
            raise ValueError(f"Shard {directory / shard} is missing: copy it from where the checkpoint came from.")
        held = read_header(directory / shard)
        lacking = sorted(name for name, file in weights.items() if file == shard and name not in held)
        if lacking:
            raise ValueError(f"Shard {directory / shard} does not hold {lacking[0]}, as {INDEX} says: copy it again.")


def model_files(directory: Path) -> list[str]:
    """The names of the files that a model is loaded from, its tables and their checksums included."""
    tables = [path.name for path in directory.iterdir() if TABLE_SHARD.fullmatch(path.name)]
    sums = [page_sums_path(Path(shard)).name for shard in tables]
    names = ("config.json", "generation_config.json", CODE, INDEX, WHOLE, MEMORY, *tables, *sums)
    there = [name for name in names if (directory / name).is_file()]
    return sorted({*there, *weight_map(directory).values()})
