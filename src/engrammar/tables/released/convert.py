"""Converts tables of the two released models to our table files and back, in constant memory, rows bit for bit.

docs/released-tables.md describes both layouts and the sources of their names.
Letters: U rows of a block, S bytes of a row.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.config import Geometry, MemoryConfig
from engrammar.tables import shards
from engrammar.tables.checksums import MANIFEST
from engrammar.tables.folder import TableFile, TableFolder, TableWriter, open_tables
from engrammar.tables.headers import Part, read_header
from engrammar.tables.released import deepseek, qwen
from engrammar.tables.released.files import ReleasedModel, copy_model, require
from engrammar.tables.sealed import verify

FUSION = "fusion.safetensors"
Layout = Literal["qwen", "deepseek"]
# The name of each tensor in the released files, after any prefix that ends in a dot. {layer} counts from 0.
NAMES: dict[Layout, dict[str, str]] = {
    "qwen": {
        "shard": "layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{shard}.weight",
        "table": "layers.{layer}.ple.ple_embedding.ngram_embedding.weight",
        "scale": "layers.{layer}.ple.ple_embedding.ngram_embedding.weight_scale",
        "shard_scale": "layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{shard}.weight_scale",
        "multipliers": "layers.{layer}.ple.ple_embedding.layer_multipliers",
        "sizes": "layers.{layer}.ple.ple_embedding.ngram_heads_vocab_sizes",
        "offsets": "layers.{layer}.ple.ple_embedding.ngram_heads_offsets",
    },
    "deepseek": {
        "values": "layers.{layer}.engram.embed.weight",
        "scales": "layers.{layer}.engram.embed.scale",
        "wkv": "layers.{layer}.engram.wkv.weight",
        "wkv_scale": "layers.{layer}.engram.wkv.scale",
        "query_norm": "layers.{layer}.engram.q_weight",
        "key_norm": "layers.{layer}.engram.k_weight",
    },
}


def import_tables(model: Path, out: Path, names: Mapping[str, str] | None = None) -> TableFolder:
    """Makes a folder of our table files from a released model's folder, with a few blocks in memory at once.

    It needs only config.json, the index, and the files that hold the tables; for DeepSeek-V4.1 also tokenizer.json and
    the files with the fusion weights, which are written to `fusion.safetensors` as fp32, under our model's names.

    Args:
        names: replaces names of tensors in this layout's `NAMES`.

    Returns:
        The new folder, opened.

    Raises:
        ValueError: a file is missing or damaged, or files do not belong together; names the file and says what to do.
        OSError: the disk is full or fails.
    """
    released = ReleasedModel(model)
    layout = _layout(released)
    known = _names(layout, names)
    num_ids, sha256 = None, None
    if layout == "qwen":
        memory, geometry = qwen.read_memory(released, known)
        num_ids = geometry.num_classes
    else:
        memory, geometry, num_ids, sha256 = deepseek.read_memory(released)
    tables: dict[int, tuple[float | None, Iterator[NDArray[np.uint8]]]] = {}
    fusion: dict[str, tuple[tuple[int, ...], Iterator[Tensor]]] = {}
    for layer in memory.layers:  # all files are checked before the first byte is written
        if layout == "qwen":
            tables[layer] = qwen.read_table(released, known, memory, geometry, layer)
        else:
            parts = deepseek.table_parts(released, known, memory, geometry, layer)
            tables[layer] = None, deepseek.read_table(*parts)
            fusion |= deepseek.read_fusion(deepseek.fusion_parts(released, known, memory, layer), layer)
    with TableWriter(
        out,
        memory=memory,
        geometry=geometry,
        num_ids=num_ids,
        tokenizer_sha256=sha256,
        encoding=memory.row_encoding,
        source=f"{layout} release in {model.resolve().name}",
    ) as writer:
        for layer, (scale, blocks) in tables.items():
            writer.add(layer, scale, blocks)
        if fusion:
            _write_fusion(writer.partial / FUSION, fusion)
    return open_tables(out)


def _write_fusion(path: Path, fusion: Mapping[str, tuple[tuple[int, ...], Iterator[Tensor]]]) -> None:
    shards.lay_out(path, {name: (torch.float32, shape) for name, (shape, _) in fusion.items()})
    for name, (_, blocks) in fusion.items():
        row = 0
        for block in blocks:
            shards.write_rows(path, name, row, block)
            row += len(block)


def export_tables(tables: Path, model: Path, out: Path, names: Mapping[str, str] | None = None) -> None:
    """Writes a copy of a released model's folder that has the rows of our table folder.

    Only the tables, their scale and, for DeepSeek-V4.1, the fusion weights (if `tables` has `fusion.safetensors`)
    change; every other byte is that of `model`. Exporting what `import_tables` made of `model` gives `model` again.

    Args:
        tables: a folder of table files, in the encoding of the model's files.
        model: the released model, or the part of it that holds the tables.
        names: as for `import_tables`.

    Raises:
        ValueError: the tables are damaged, or have another geometry or encoding than the model.
        OSError: the disk is full or fails.
    """
    released, folder = ReleasedModel(model), open_tables(tables)
    layout = _layout(released)
    known = _names(layout, names)
    memory, geometry = qwen.read_memory(released, known) if layout == "qwen" else deepseek.read_memory(released)[:2]
    _require_same(folder, memory, geometry, model)
    if (tables / MANIFEST).is_file():
        verify(tables)
    fusion = read_header(tables / FUSION) if (tables / FUSION).is_file() else {}
    replaced: dict[str, Iterator[NDArray[np.uint8]]] = {}
    for layer in memory.layers:
        if layout == "qwen":
            replaced |= _qwen_bytes(released, known, folder.tables[layer])
        else:
            values, scales = deepseek.table_parts(released, known, memory, geometry, layer)
            rows = (0, values.num_rows)
            replaced[values.name] = (block[:, : values.row_bytes] for block in _rows(folder.tables[layer], *rows))
            replaced[scales.name] = (block[:, values.row_bytes :] for block in _rows(folder.tables[layer], *rows))
            if fusion:
                replaced |= _fusion_bytes(deepseek.fusion_parts(released, known, memory, layer), fusion, layer)
    copy_model(released, out, replaced)


def _rows(table: TableFile, first: int, last: int) -> Iterator[NDArray[np.uint8]]:
    """Yields the stored rows first..last-1 of a table in blocks [U, S]."""
    for shard in table.shards:
        start, end = max(first, shard.first_row), min(last, shard.first_row + shard.num_rows)
        if start < end:
            whole = Part(
                path=shard.path,
                name=shard.tensor,
                dtype="U8",
                shape=(shard.num_rows, table.row_bytes),
                start=shard.start,
                num_bytes=shard.num_rows * table.row_bytes,
            )
            yield from whole.blocks(start - shard.first_row, end - start)


def _qwen_bytes(
    released: ReleasedModel, names: Mapping[str, str], table: TableFile
) -> dict[str, Iterator[NDArray[np.uint8]]]:
    replaced, row = {}, 0
    for part in qwen.table_parts(released, names, table.layer):
        replaced[part.name] = _rows(table, row, row + part.num_rows)
        row += part.num_rows
    if table.scale is not None:
        for part in qwen.scale_parts(released, names, table.layer):
            replaced[part.name] = iter([qwen.scale_bytes(part, table.scale)])
    return replaced


def _fusion_bytes(
    parts: Mapping[str, Part], fusion: Mapping[str, Part], layer: int
) -> dict[str, Iterator[NDArray[np.uint8]]]:
    ours = {}
    for key, name in (("wkv", "projection.weight"), ("key_norm", "key_norm"), ("query_norm", "query_norm")):
        name = f"model.layers.{layer}.fusion.{name}"
        if name not in fusion:
            raise ValueError(f"{FUSION} beside the tables lacks {name}: import the model again.")
        ours[key] = fusion[name]
        require(ours[key], ("F32",), parts[key].shape, "the released weight")
    norms = {parts[key].name: deepseek.norm_bytes(parts[key], ours[key]) for key in ("key_norm", "query_norm")}
    return deepseek.product_bytes(parts, ours["wkv"]) | norms


def _require_same(folder: TableFolder, memory: MemoryConfig, geometry: Geometry, model: Path) -> None:
    for what, ours, theirs in (
        ("layers", tuple(sorted(folder.tables)), memory.layers),
        ("head_dim", folder.memory.head_dim, memory.head_dim),
        ("encoding", folder.encoding, memory.row_encoding),
        ("hash geometry", folder.geometry, geometry),
    ):
        if ours != theirs:
            raise ValueError(
                f"{folder.path} and {model} differ in their {what} ({ours} and {theirs}): export into the model that "
                "the tables came from, in the encoding of its files."
            )


def read_names(path: Path) -> dict[str, str]:
    """Reads the names of tensors in a JSON file; raises a ValueError if it holds no object of strings."""
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): give a JSON object of names.") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{path} is not a JSON object of names, such as {{"scale": "layers.{{layer}}.scale"}}.')
    return names


def _layout(released: ReleasedModel) -> Layout:
    settings = released.settings.values
    if "engram_layer_ids" in settings:
        return "deepseek"
    if "ple_layer_ids" in settings:
        return "qwen"
    raise ValueError(
        f"{released.folder / 'config.json'} has neither ple_layer_ids (Qwen3.8-Flash-Next) nor engram_layer_ids "
        "(DeepSeek-V4.1): give the folder of one of these models."
    )


def _names(layout: Layout, names: Mapping[str, str] | None) -> dict[str, str]:
    known = NAMES[layout]
    unknown = sorted(set(names or {}) - set(known))
    if unknown:
        raise ValueError(f"Names for {', '.join(unknown)} are given; this layout has {', '.join(known)}.")
    for key, name in (names or {}).items():
        try:
            name.format(layer=0, shard=0)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"The name {name!r} for {key} has other braces than {{layer}} and {{shard}}.") from error
    return known | dict(names or {})
