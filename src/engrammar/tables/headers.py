"""Reads safetensors files and JSON without trusting them: both are checked and bounded, and errors name the file.

Tensors are read in blocks.

Letters: U rows of a block, S bytes of a row.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = 4096  # bytes that a disk reads at once; the data in our files begin at a multiple of this
BLOCK_BYTES = 8 * 2**20  # read or written at once
MOST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
MOST_REASON = 300  # characters of a problem in an error: a sentence, however long the values in it are
# Bytes of a value, by the name of its dtype in safetensors.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1}
ITEM_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
AGAIN = "copy it again from where it came from."


class Requirement:
    """`require(holds, wrong)` raises a ValueError that names the file, the section being checked and the problem."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, ""

    def __call__(self, holds: object, wrong: str) -> None:
        if not holds:
            wrong = wrong if len(wrong) <= MOST_REASON else wrong[:MOST_REASON] + "..."
            wrong = " ".join(wrong.encode("utf-8", "backslashreplace").decode().split())
            raise ValueError(f"{self.path} is not right ({self.where}{wrong}): {AGAIN}")


def is_count(value: object, largest: int = 2**63) -> bool:
    """Whether a value of a JSON file is an integer from 0 to `largest`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def load_json(data: bytes, require: Requirement) -> Any:
    """Parses JSON in UTF-8; NaN, infinity and keys that occur twice are refused."""

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(data.decode(), parse_constant=no_number, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        require(False, f"it is not JSON: {error}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; raises a ValueError if the file is missing, unreadable or something else."""
    require = Requirement(path)
    try:
        require(path.is_file(), "it is missing, or no file")  # reading a pipe would wait for ever
        content = load_json(path.read_bytes(), require)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from error
    require(isinstance(content, dict), "it is not an object")
    return content


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a safetensors file."""

    path: Path
    name: str
    dtype: str  # its name in safetensors
    shape: tuple[int, ...]
    start: int  # the first byte of its values in the file
    num_bytes: int

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // max(1, self.num_rows)

    def blocks(self, first_row: int = 0, num_rows: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """Yields the bytes of its rows from `first_row` on, in blocks [U, S] of about BLOCK_BYTES.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        row, last = first_row, self.num_rows if num_rows is None else first_row + num_rows
        per_block = max(1, BLOCK_BYTES // max(1, self.row_bytes))
        with self.path.open("rb", buffering=0) as file:
            while row < last:
                block_US = np.empty((min(per_block, last - row), self.row_bytes), dtype=np.uint8)
                read_exactly(file, block_US.reshape(-1).data, self.start + row * self.row_bytes, self.path)
                yield block_US
                row += len(block_US)

    def read(self) -> NDArray[np.uint8]:
        """Reads all its bytes; for small tensors."""
        return np.concatenate([block.reshape(-1) for block in self.blocks()] or [np.empty(0, np.uint8)])


def read_exactly(file: RawIOBase, out: memoryview, start: int, path: Path) -> None:
    """Fills `out` with the bytes of an open file from `start` on; raises a ValueError if the file ends before."""
    file.seek(start)
    done = 0
    while done < len(out):
        count = file.readinto(out[done:])
        if not count:
            raise ValueError(f"{path} is cut off at byte {start + done}: {AGAIN}")
        done += count
    if hasattr(os, "posix_fadvise") and len(out) >= 2**20:  # read once: leave the cache to others
        os.posix_fadvise(file.fileno(), start, len(out), os.POSIX_FADV_DONTNEED)


def read_header(path: Path) -> dict[str, Part]:
    """Reads the tensors of a safetensors file, by name. They fill the file after its header, without gaps.

    Raises:
        ValueError: the file is missing, cut off, or not safetensors; names the file and what is wrong.
    """
    require = Requirement(path)
    try:
        require(path.is_file(), "it is missing, or no file")  # reading a pipe would wait for ever
        size = path.stat().st_size
        with path.open("rb") as file:
            text = file.read(header_bytes(file.read(8), size, require))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from error
    return parse_header(text, size, require)[0]


def parse_header(text: bytes, size: int, require: Requirement) -> tuple[dict[str, Part], dict[str, str]]:
    """The tensors of a safetensors file of `size` bytes, by name, and its metadata, from the JSON of its header.

    Raises:
        ValueError: as `read_header`.
    """
    header = load_json(text, require)
    require(isinstance(header, dict), "its header is not an object")
    about = header.pop("__metadata__", {})
    require(isinstance(about, dict) and all(isinstance(v, str) for v in about.values()), "its metadata are not texts")
    start = end = 8 + len(text)
    parts = [_part(require.path, name, entry, start, require) for name, entry in header.items()]
    for part in sorted(parts, key=lambda part: (part.start, part.num_bytes)):
        require(part.start == end, f"its header puts {part.name} over or apart from another tensor")
        end += part.num_bytes
    require(end == size, f"it has {size} bytes, {end} by its header")
    return {part.name: part for part in parts}, about


def header_bytes(head: bytes, size: int, require: Requirement) -> int:
    """The length of a header in bytes, from the first 8 bytes of a file of `size` bytes."""
    require(len(head) == 8, f"{size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", head)
    require(length <= min(MOST_HEADER, size - 8), f"its header should have {length} bytes; it has {size} in all")
    return int(length)


def _part(path: Path, name: str, entry: Any, start: int, require: Requirement) -> Part:
    known = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    require(known, f"tensor {name} in its header does not have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(isinstance(dtype, str) and dtype in ITEM_BYTES, f"the dtype of {name} is {dtype!r}")
    require(isinstance(shape, list) and all(map(is_count, shape)), f"the shape of {name} is {shape!r}")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(is_count, offsets))
    require(pair and offsets[0] <= offsets[1], f"the data_offsets of {name} are {offsets!r}")
    found, expected = offsets[1] - offsets[0], math.prod(shape) * ITEM_BYTES[dtype]
    require(found == expected, f"{name} is {dtype} {shape} and has {found} bytes, not {expected}")
    return Part(path=path, name=name, dtype=dtype, shape=tuple(shape), start=start + offsets[0], num_bytes=expected)


def only_tensor(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    """The only tensor of a file, which must have this name, dtype and shape; errors are as in `read_header`."""
    require, header = Requirement(path), read_header(path)
    require([*header] == [name], f"it should hold {name} alone, but holds {', '.join(header) or 'nothing'}")
    part = header[name]
    fits = (part.dtype, part.shape) == (dtype, shape)
    require(fits, f"{name} is {part.dtype} {[*part.shape]}, not {dtype} {[*shape]}")
    return part


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Makes a safetensors file with tensors of the given dtypes and shapes.

    The tensors are zeros, which take no disk space until they are written. The data begin at a multiple of `PAGE`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
