"""DeepSeek-V4.1-Flash: its two tables of fp8 rows with E8M0 scales, and the fused product `wkv` of their fusion.

A table is `*.engram.embed.weight` [R, C] of fp8 and `*.engram.embed.scale` [R, C/32] of E8M0, a power of two for each
32 values. `*.engram.wkv.weight` [(M+1)*D, E] gives the keys of M branches, then the value; ours gives the value first.
Letters: U rows of a block, S bytes of a row, C row width, M branches, D hidden width, E width of a token's rows, V ids.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.addressing import derive_geometry
from engrammar.config import DIALECTS, Geometry, MemoryConfig
from engrammar.tables.encodings import DTYPES, FP8, FP8_MAX, GROUP, from_e8m0, from_fp8
from engrammar.tables.headers import BLOCK_BYTES, Part
from engrammar.tables.released.files import ReleasedModel, require
from engrammar.vocabulary import compress_vocabulary, fingerprint

VALUES, SCALES, FLOATS = ("F8_E4M3",), ("F8_E8M0", "U8"), ("F32", "BF16")


def read_memory(model: ReleasedModel) -> tuple[MemoryConfig, Geometry, int, str]:
    """Reads the memory that config.json and tokenizer.json describe.

    Returns:
        The memory, its geometry, the number of the tokenizer's ids, and the tokenizer's fingerprint.

    Raises:
        ValueError: a setting or the tokenizer is missing, or they belong to different models.
    """
    dialect, setting = DIALECTS["deepseek_v41"], model.setting
    where, image = model.folder / "config.json", model.settings.values.get("image_token_id")
    size, pad = setting("engram_max_ngram_size", int), setting("engram_pad_token_id", int)
    memory = replace(
        dialect,
        layers=tuple(setting("engram_layer_ids", list)),
        rows_per_head=(setting("engram_vocab_size", int),) * (size - 1),
        max_ngram_size=size,
        num_heads=setting("engram_n_heads", int),
        head_dim=setting("engram_head_dim", int),
        fill_id=pad,
        boundary="row" if image is None else "dead",
        dead_ids=() if image is None else (image,),
        key_norm_eps=setting("rms_norm_eps", float, dialect.key_norm_eps),
    )
    num_classes = setting("engram_compressed_vocab_size", int)
    classes_V, sha256 = _read_classes(model)
    found = int(classes_V.max()) + 1
    if found != num_classes or not 0 <= pad < len(classes_V):
        raise ValueError(
            f"{model.folder / 'tokenizer.json'} has {found} classes of ids, {where} asks for {num_classes} with the "
            f"padding id {pad}: use the tokenizer.json and the config.json of one release."
        )
    geometry = derive_geometry(memory, num_classes=num_classes, fill_class=int(classes_V[pad]))
    derived = [geometry.num_rows(index) for index in range(len(memory.layers))]
    stated = setting("engram_num_embeddings", list)
    if stated != derived:
        raise ValueError(
            f"{where} says engram_num_embeddings {stated}, but its other engram settings lead to {derived}: use the "
            "config.json of the release."
        )
    return memory, geometry, len(classes_V), sha256


def _read_classes(model: ReleasedModel) -> tuple[NDArray[np.int64], str]:
    path = model.folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing, and addresses depend on it: copy it from the release.")
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    return compress_vocabulary(tokenizer), fingerprint(tokenizer)


def table_parts(
    model: ReleasedModel, names: Mapping[str, str], memory: MemoryConfig, geometry: Geometry, layer: int
) -> tuple[Part, Part]:
    """The values [R, C] and the scales [R, C/32] of a layer's table; raises a ValueError if one does not fit."""
    rows, width = geometry.num_stored_rows(memory.layers.index(layer)), memory.head_dim
    values = model.need(names["values"].format(layer=layer))
    scales = model.need(names["scales"].format(layer=layer))
    require(values, VALUES, (rows, width), f"the table of layer {layer}, by config.json,")
    require(scales, SCALES, (rows, -(-width // GROUP)), f"its scales, one for {GROUP} values,")
    return values, scales


def read_table(values: Part, scales: Part) -> Iterator[NDArray[np.uint8]]:
    """Yields rows in blocks [U, S]: a row's fp8 values, then its scales, as in the encoding `fp8_scale32`."""
    width, size = values.row_bytes, values.row_bytes + scales.row_bytes
    per_block = BLOCK_BYTES // size
    for first in range(0, values.num_rows, per_block):
        count = min(per_block, values.num_rows - first)
        rows_US = np.empty((count, size), dtype=np.uint8)
        for part, columns in ((values, slice(0, width)), (scales, slice(width, size))):
            row = 0
            for block in part.blocks(first, count):
                rows_US[row : row + len(block), columns] = block
                row += len(block)
        yield rows_US


def fusion_parts(model: ReleasedModel, names: Mapping[str, str], memory: MemoryConfig, layer: int) -> dict[str, Part]:
    """The tensors of a layer's fusion by our keys: wkv, wkv_scale (only if wkv is fp8), query_norm, key_norm.

    Raises:
        ValueError: one is missing, or of another shape or dtype.
    """
    keys = ("wkv", "query_norm", "key_norm")
    parts = {key: model.need(names[key].format(layer=layer)) for key in keys}
    for key in ("query_norm", "key_norm"):
        require(parts[key], FLOATS, (None, None), "a norm of all branches")
    branches, hidden = parts["query_norm"].shape
    require(parts["key_norm"], FLOATS, (branches, hidden), "the other norm")
    shape = ((branches + 1) * hidden, memory.memory_dim)
    require(parts["wkv"], (*VALUES, *FLOATS), shape, "the product of keys and value")
    if parts["wkv"].dtype in VALUES:
        parts["wkv_scale"] = model.need(names["wkv_scale"].format(layer=layer))
        squares = (-(-shape[0] // GROUP), -(-shape[1] // GROUP))
        require(parts["wkv_scale"], SCALES, squares, f"the scale of {GROUP} x {GROUP} values")
    return parts


def read_fusion(parts: Mapping[str, Part], layer: int) -> dict[str, tuple[tuple[int, ...], Iterator[Tensor]]]:
    """A layer's fusion under our model's names: the shape of each weight, and its rows in blocks, as exact fp32."""
    branches, hidden = parts["query_norm"].shape
    rows, name = (branches + 1) * hidden, f"model.layers.{layer}.fusion"

    def projection() -> Iterator[Tensor]:
        yield from _product_rows(parts, branches * hidden, rows)  # the value
        yield from _product_rows(parts, 0, branches * hidden)

    def norm(key: str) -> Iterator[Tensor]:
        return (_floats(block, parts[key]) for block in parts[key].blocks())

    return {
        f"{name}.projection.weight": (parts["wkv"].shape, projection()),
        **{f"{name}.{key}": (parts[key].shape, norm(key)) for key in ("key_norm", "query_norm")},
    }


def norm_bytes(part: Part, norm: Part) -> Iterator[NDArray[np.uint8]]:
    """The bytes of our norm (fp32) in the dtype of `part`."""
    return (_floats(block, norm).to(DTYPES[part.dtype]).view(torch.uint8).numpy() for block in norm.blocks())


def _product_rows(parts: Mapping[str, Part], first: int, last: int) -> Iterator[Tensor]:
    """Yields rows first..last-1 of `wkv` as fp32, one band of rows that share scales at a time."""
    wkv, width = parts["wkv"], parts["wkv"].shape[1]
    while first < last:
        until = min(last, (first // GROUP + 1) * GROUP)
        raw = np.concatenate(list(wkv.blocks(first, until - first)))
        if wkv.dtype in VALUES:
            yield from_fp8(torch.from_numpy(raw)) * _scales_of(parts["wkv_scale"], first // GROUP, width)
        else:
            yield _floats(raw, wkv)
        first = until


def _scales_of(part: Part, band: int, width: int) -> Tensor:
    """The scale of each column in a band of `wkv`, as fp32."""
    exponents = np.concatenate(list(part.blocks(band, 1))).reshape(-1)
    return from_e8m0(torch.from_numpy(exponents)).repeat_interleave(GROUP)[:width]


def product_bytes(parts: Mapping[str, Part], projection: Part) -> dict[str, Iterator[NDArray[np.uint8]]]:
    """The bytes of `wkv`, and of its scales if it has any, for our projection (fp32, value first), in bands.

    A square of 32 x 32 values keeps its old scale if they fit it, so that unchanged weights give their old bytes.

    Raises:
        ValueError: a weight is not finite.
    """
    wkv = parts["wkv"]
    if "wkv_scale" not in parts:
        dtype = DTYPES[wkv.dtype]
        return {wkv.name: (band.to(dtype).view(torch.uint8).numpy() for band in _bands(parts, projection))}

    def quantized() -> Iterator[tuple[Tensor, Tensor]]:
        for index, band in enumerate(_bands(parts, projection)):
            old = np.concatenate(list(parts["wkv_scale"].blocks(index, 1))).reshape(-1)
            if not band.isfinite().all():
                raise ValueError(
                    f"{projection.path} holds {projection.name} with values that are not finite: fix them."
                )
            yield _quantize_band(band, torch.from_numpy(old))

    return {
        wkv.name: (values.numpy() for values, _ in quantized()),
        parts["wkv_scale"].name: (scales.numpy() for _, scales in quantized()),
    }


def _bands(parts: Mapping[str, Part], projection: Part) -> Iterator[Tensor]:
    """Yields rows of our projection in wkv's order, keys first, in bands of rows that share scales."""
    branches, hidden = parts["query_norm"].shape
    rows, keys = projection.num_rows, branches * hidden
    for first in range(0, rows, GROUP):
        last, pieces = min(first + GROUP, rows), []
        if first < keys:
            pieces.append((first + hidden, min(last, keys) - first))
        if last > keys:
            start = max(first, keys)
            pieces.append((start - keys, last - start))
        raw = np.concatenate([block for row, count in pieces for block in projection.blocks(row, count)])
        yield _floats(raw, projection)


def _quantize_band(band: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 values and E8M0 scales of up to 32 rows; a scale that does not fit becomes the smallest one that does."""
    width = band.shape[1]
    padded = torch.nn.functional.pad(band, (0, len(old) * GROUP - width)).unflatten(1, (-1, GROUP))

    def quantize(exponents: Tensor) -> Tensor:
        return (padded / from_e8m0(exponents)[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)

    kept = (quantize(old).float() * from_e8m0(old)[:, None] == padded).all(dim=2).all(dim=0)
    largest = padded.abs().amax(dim=(0, 2)).clamp_min(FP8_MAX * 2.0**-126) / FP8_MAX
    fitting = (torch.log2(largest).ceil() + 127).to(torch.uint8)
    scales = torch.where(kept, old, fitting)
    return quantize(scales).view(torch.uint8).flatten(1)[:, :width].contiguous(), scales


def _floats(raw: NDArray[np.uint8], part: Part) -> Tensor:
    return torch.from_numpy(raw).view(DTYPES[part.dtype]).float()
