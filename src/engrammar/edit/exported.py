"""Row deltas as the two overlays that forks of llama.cpp read for Qwen3.8-Flash-Next's table.

`.pleo` (github.com/fulvian/engraft-ngram, docs/lens.md): "PLEO", u32 rows, u32 width (always 160), i32 rows, fp32
values. `.plepatch` (github.com/ortegaalfredo/ngram-knowledge-injector, README.md): a header of 128 bytes, a manifest in
JSON, and for each row its u64 number and its bytes as they stand in the GGUF. Both are little-endian, and number rows
over the whole table, as we do.
Letters: U rows, C row width, S bytes of a row.
"""

import json
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from engrammar.config import check_choice
from engrammar.edit.patch import Patch
from engrammar.tables.encodings import decode
from engrammar.tables.sealed import check_writable, written_beside

GgufType = Literal["F32", "F16", "Q8_0"]
NUMBERS: dict[GgufType, int] = {"F32": 0, "F16": 1, "Q8_0": 8}  # GGML's numbers of the types
PLEO_WIDTH, TENSOR, GROUP = 160, "per_layer_token_embd.weight", 32


def export_overlay(patch: Patch, path: str | Path, *, gguf_type: GgufType = "Q8_0", scale: float | None = None) -> None:
    """Writes the row deltas of a patch as a `.pleo` or `.plepatch` file, as the path's suffix says.

    Such a file holds the new rows and nothing that could undo them; the engine that reads it leaves the table as it is.

    Args:
        gguf_type: of a `.plepatch`: how the table is stored in the GGUF that it is for. Q8_0 rounds rows to 8 bits.
        scale: the table's, if its rows are stored as fp8.

    Raises:
        ValueError: the suffix is another, the patch has exact entries, is not of one Qwen table, or its rows have
            another width than the format takes, or a number that is too large for it.
        OSError: the file cannot be written; none is left.
    """
    path = Path(path)
    check_choice("gguf_type", gguf_type, GgufType)
    rows_U, values_UC = _rows(patch, scale)
    if path.suffix == ".pleo":
        content = _pleo(patch.name, rows_U, values_UC)
    elif path.suffix == ".plepatch":
        content = _plepatch(patch, rows_U, values_UC, gguf_type)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; allowed: .pleo, .plepatch.")
    check_writable(path.parent)
    with written_beside(path) as partial:
        partial.write_bytes(content)


def _rows(patch: Patch, scale: float | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The replaced rows and their values."""
    tables, kind = patch.tables, str(patch.base.model.get("class", ""))
    if len(patch.entries) or tables is None:
        raise ValueError(f"The patch {patch.name!r} has exact entries, which no table holds: export row deltas.")
    if len(patch.deltas) != 1 or not kind.startswith("Qwen4Exp"):
        raise ValueError(
            f"The patch {patch.name!r} is for {len(patch.deltas)} tables of a {kind}; these formats are for the one of "
            "Qwen3.8-Flash-Next (Qwen4Exp)."
        )
    if (tables.encoding == "fp8") != (scale is not None):
        raise ValueError(f"Rows are stored as {tables.encoding}: give the scale of an fp8 table, and of no other.")
    ((_, delta),) = patch.deltas.items()
    stored_US = torch.from_numpy(delta.stored_US)
    return delta.rows_U, decode(stored_US, tables.width, tables.encoding, torch.float32, scale).numpy()


def _pleo(name: str, rows_U: NDArray[np.int64], values_UC: NDArray[np.float32]) -> bytes:
    width = values_UC.shape[1]
    if width != PLEO_WIDTH or rows_U[-1] >= 2**31:
        raise ValueError(
            f"{name!r} has rows of {width} values up to row {rows_U[-1]}; .pleo: {PLEO_WIDTH}, below 2^31."
        )
    head = b"PLEO" + struct.pack("<II", len(rows_U), width)
    return head + rows_U.astype("<i4").tobytes() + values_UC.astype("<f4").tobytes()


def _plepatch(patch: Patch, rows_U: NDArray[np.int64], values_UC: NDArray[np.float32], kind: GgufType) -> bytes:
    if kind == "Q8_0":
        stored_US = q8_0(values_UC)
    else:
        wanted = np.dtype("<f4" if kind == "F32" else "<f2")
        if not np.isfinite(values_UC.astype(wanted)).all():
            raise ValueError(f"{patch.name!r} has a value that is too large for {kind}.")
        stored_US = values_UC.astype(wanted).view(np.uint8)
    about = {"made_by": "engrammar", "name": patch.name, "facts": [dict(fact) for fact in patch.facts]}
    manifest = json.dumps(about).encode()
    sizes = (values_UC.shape[1], stored_US.shape[1], len(rows_U), len(manifest), 0)
    head = struct.pack("<8sHxxI5Q72s", b"PLEOVLY1", 1, NUMBERS[kind], *sizes, TENSOR.encode())
    assert len(head) == 128
    record = np.dtype([("row", "<u8"), ("stored", "u1", (stored_US.shape[1],))])
    records = np.empty(len(rows_U), record)
    records["row"], records["stored"] = rows_U, stored_US
    return head + manifest + records.tobytes()


def q8_0(values_UC: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows as GGML's Q8_0: for each 32 values an fp16 scale, then 32 int8, rounded half away from zero.

    Raises:
        ValueError: the width is no multiple of 32, or a value is too large.
    """
    num_rows, width = values_UC.shape
    if width % GROUP:
        raise ValueError(f"Rows have {width} values; Q8_0 takes multiples of {GROUP}.")
    groups = values_UC.reshape(-1, GROUP)
    scale = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    if not np.isfinite(scale.astype(np.float16)).all():
        raise ValueError("A value is too large for Q8_0.")
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    size = np.abs(groups * inverse)
    whole = np.floor(size)
    numbers = np.sign(groups) * (whole + (size - whole >= 0.5))
    stored = np.concatenate([scale.astype("<f2").view(np.uint8), numbers.astype(np.int8).view(np.uint8)], axis=1)
    return stored.reshape(num_rows, -1)
