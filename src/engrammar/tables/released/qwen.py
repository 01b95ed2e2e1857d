"""Qwen3.8-Flash-Next (`qwen4_exp`): its n-gram tables, each in several shards, as bf16 or as fp8 with one scale.

A table's shards are `*.ngram_embedding.shard_N.weight`, with rows in the order of N and padding rows at the end. fp8
adds one bf16 `*.ngram_embedding.weight_scale` for the table.
Letters: U rows of a block, S bytes of a row.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engrammar.addressing import derive_geometry
from engrammar.config import DIALECTS, Encoding, Geometry, MemoryConfig
from engrammar.tables.encodings import ENCODING_OF
from engrammar.tables.headers import AGAIN, Part
from engrammar.tables.released.files import ReleasedModel, Settings, require


def read_memory(model: ReleasedModel, names: Mapping[str, str]) -> tuple[MemoryConfig, Geometry]:
    """Reads the memory that the model's config.json describes, and compares it with the hash buffers in the files.

    Files without hash buffers are allowed.

    Raises:
        ValueError: there is no table, a setting is missing, or the buffers belong to another geometry.
    """
    settings = model.settings
    first = require_layers(settings)[0] - 1
    memory, geometry = describe_memory(settings, ENCODING_OF[table_parts(model, names, first)[0].dtype])
    for index, layer in enumerate(memory.layers):
        for key, derived in (
            ("multipliers", geometry.multipliers[index]),
            ("sizes", geometry.head_sizes(index)),
            ("offsets", geometry.head_offsets(index)),
        ):
            _compare_buffer(model, model.find(names[key].format(layer=layer)), derived)
    return memory, geometry


def require_layers(settings: Settings) -> list[int]:
    """The layers that have a table, counted from 1; raises a ValueError if there is none."""
    layers: list[int] = settings.need("ple_layer_ids", list)
    if not layers:
        raise ValueError(f"{settings.where} has no ple_layer_ids: this model has no n-gram table.")
    return layers


def describe_memory(settings: Settings, encoding: Encoding) -> tuple[MemoryConfig, Geometry]:
    """The memory that settings describe, with rows in `encoding`; raises a ValueError if a setting is missing."""
    dialect, need = DIALECTS["qwen_next"], settings.need
    layers = require_layers(settings)
    size, heads = need("ngram_size", int, dialect.max_ngram_size), need("heads_per_ngram", int, dialect.num_heads)
    ends = settings.values.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else need("eos_token_id", int)
    width = need("hidden_size" if settings.values.get("ple_embed_dim") is None else "ple_embed_dim", int)
    eps = need("rms_norm_eps", float, 1e-6)
    memory = replace(
        dialect,
        layers=tuple(sorted(layer - 1 for layer in layers)),  # theirs count from 1
        rows_per_head=(need("ngram_vocab_size_base", int, dialect.rows_per_head[0]),) * (size - 1),
        max_ngram_size=size,
        num_heads=heads,
        head_dim=width // max(1, (size - 1) * heads),
        seed=need("seed", int, dialect.seed),
        fill_id=end,
        end_ids=(end,),
        conv_kernel=need("ple_conv_kernel_size", int, dialect.conv_kernel),
        key_norm_eps=eps,
        conv_norm_eps=eps,
        rows_multiple=need("make_ngram_vocab_size_divisible_by", int, dialect.rows_multiple),
        row_encoding=encoding,
    )
    return memory, derive_geometry(memory, num_classes=need("vocab_size", int), fill_class=end)


def _compare_buffer(model: ReleasedModel, part: Part | None, derived: tuple[int, ...]) -> None:
    if part is None:
        return
    stored = tuple(part.read().view("<i8").tolist()) if part.dtype == "I64" else None
    if stored != derived:
        raise ValueError(
            f"{part.path} holds {part.name} = {stored and list(stored)}, but {model.folder / 'config.json'} leads to "
            f"{list(derived)} (vocab_size, seed and the ngram settings decide): use the config.json of these files."
        )


def table_parts(model: ReleasedModel, names: Mapping[str, str], layer: int) -> list[Part]:
    """The shards of a layer's table, in the order of their rows; a table that is not sharded has one.

    Raises:
        ValueError: a shard is missing, or has another width or dtype than the first.
    """
    whole = model.find(names["table"].format(layer=layer))
    if whole is not None:
        parts = [whole]
    else:
        by_number = model.numbered(names["shard"], layer=layer)
        count = max(by_number, default=0) + 1
        parts = [by_number.get(n) or model.need(names["shard"].format(layer=layer, shard=n)) for n in range(count)]
    require(parts[0], tuple(ENCODING_OF), (None, None), "a shard of the table")
    for part in parts[1:]:
        require(part, (parts[0].dtype,), (None, parts[0].shape[1]), "a shard of this table, by its first shard,")
    return parts


def read_table(
    model: ReleasedModel, names: Mapping[str, str], memory: MemoryConfig, geometry: Geometry, layer: int
) -> tuple[float | None, Iterator[NDArray[np.uint8]]]:
    """Returns the scale of a layer's table (fp8 only), and its rows in blocks [U, S].

    Raises:
        ValueError: the rows do not fit the geometry, an fp8 table has no scale, or its shards have different ones.
    """
    parts, rows = table_parts(model, names, layer), geometry.num_stored_rows(memory.layers.index(layer))
    found = sum(part.num_rows for part in parts)
    if found != rows or parts[0].shape[1] != memory.head_dim:
        last = parts[-1]
        raise ValueError(
            f"The shards of layer {layer} end with {last.name} in {last.path} and have {found} rows of "
            f"{last.shape[1]}; {model.folder / 'config.json'} leads to {rows} rows of {memory.head_dim}: a shard is "
            "missing, or the config.json is that of another model."
        )
    if ENCODING_OF[parts[0].dtype] != memory.row_encoding:
        raise ValueError(f"{parts[0].path} holds layer {layer} as {parts[0].dtype}, unlike the first table.")
    scale = _read_scale(model, names, layer, parts) if memory.row_encoding == "fp8" else None
    return scale, (block for part in parts for block in part.blocks())


def scale_parts(model: ReleasedModel, names: Mapping[str, str], layer: int) -> list[Part]:
    """The tensors that hold the scale of a layer's fp8 table: one for the table, or one for each shard."""
    whole = model.find(names["scale"].format(layer=layer))
    return [whole] if whole else list(model.numbered(names["shard_scale"], layer=layer).values())


def _read_scale(model: ReleasedModel, names: Mapping[str, str], layer: int, parts: list[Part]) -> float:
    scales = scale_parts(model, names, layer)
    if not scales or len(scales) not in (1, len(parts)):
        raise ValueError(
            f"{parts[0].path} holds layer {layer} as fp8, but no file of {model.folder} holds its scale "
            f"*.{names['scale'].format(layer=layer)}: copy the missing file, or name the tensor with --names."
        )
    values = [scale_value(part) for part in scales]
    if not 0 < values[0] < math.inf:
        raise ValueError(f"{scales[0].path} holds {scales[0].name} = {values[0]}, which is no scale: {AGAIN}")
    if len(set(values)) > 1:
        other = next(i for i, value in enumerate(values) if value != values[0])
        raise ValueError(
            f"{scales[other].path} holds {scales[other].name} = {values[other]}, but {scales[0].name} = {values[0]}; a "
            "table has one scale, and another one would change rows: import the bf16 files of this model instead."
        )
    return values[0]


def scale_value(part: Part) -> float:
    """The number in a tensor of one bf16 or fp32 number."""
    if part.dtype not in ("BF16", "F32") or part.num_bytes not in (2, 4):
        require(part, ("BF16", "F32"), (1,), "a table's scale")
    raw = part.read()
    raw = np.concatenate([np.zeros(2, np.uint8), raw]) if part.dtype == "BF16" else raw  # bf16: fp32's upper half
    return float(raw.view("<f4")[0])


def scale_bytes(part: Part, scale: float) -> NDArray[np.uint8]:
    """The bytes of a scale in the dtype of `part`; raises a ValueError if bf16 cannot hold it exactly."""
    raw = np.array([scale], dtype="<f4").view(np.uint8)
    if part.dtype == "BF16" and raw[:2].any():
        raise ValueError(f"The table's scale {scale} is no bf16 number, as {part.name} is: quantize with one that is.")
    return raw[2:] if part.dtype == "BF16" else raw
