"""Safetensors headers, and JSON, out of files that are not trusted: checked, bounded, named in errors."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from engrammar.tables.sealed import is_count

MOST_HEADER = 2**20  # bytes of a header, which names one tensor
MOST_REASON = 300  # characters of what is wrong: a sentence, however long the values in it
AGAIN = "copy the folder again from where it came from."


class Requirement:
    """Raises the ValueError that names a file, and what is wrong in it where."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, ""

    def __call__(self, holds: object, wrong: str) -> None:
        if not holds:
            wrong = wrong if len(wrong) <= MOST_REASON else wrong[:MOST_REASON] + "..."
            wrong = " ".join(wrong.encode("utf-8", "backslashreplace").decode().split())
            raise ValueError(f"{self.path} is not right ({self.where}{wrong}): {AGAIN}")


def load_json(data: bytes, require: Requirement) -> Any:
    """JSON without NaN, infinity, or keys that occur twice."""

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(data, parse_constant=no_number, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        require(False, f"it is not JSON: {error}")


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The tensors of a safetensors file, the byte where their data starts, and the bytes of the file.

    Raises:
        ValueError: it is damaged, or cannot be read.
    """
    require = Requirement(path)
    try:
        require(path.is_file(), "it is missing, or no file")  # a pipe would be waited for
        with path.open("rb") as file:
            size, head = path.stat().st_size, file.read(8)
            require(len(head) == 8, f"{size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", head)
            require(
                length <= min(MOST_HEADER, size - 8), f"its header should have {length} bytes; it has {size} in all"
            )
            header = load_json(file.read(length), require)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from error
    require(isinstance(header, dict), "its header is not an object")
    header.pop("__metadata__", None)
    data_bytes = size - 8 - length
    for name, tensor in header.items():
        known = isinstance(tensor, dict) and tensor.keys() == {"dtype", "shape", "data_offsets"}
        require(known, f"tensor {name} in its header does not have dtype, shape and data_offsets")
        offsets = tensor["data_offsets"]
        pair = isinstance(offsets, list) and len(offsets) == 2 and all(is_count(o, 2**63) for o in offsets)
        require(pair and offsets[0] <= offsets[1], f"the data_offsets of {name} are {offsets!r}")
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    require(end == data_bytes, f"{data_bytes} bytes of data on disk, {end} by its header")
    return header, 8 + length, size


def check_tensor(path: Path, header: dict[str, Any], name: str, expected: tuple[str, list[int]]) -> int:
    """Where in a file's data its one tensor starts, which must be the expected one (dtype and shape)."""
    require = Requirement(path)
    require([*header] == [name], f"it should hold {name} alone, but holds {', '.join(header) or 'nothing'}")
    dtype, shape = header[name]["dtype"], header[name]["shape"]
    found = (dtype, shape) if isinstance(shape, list) and all(is_count(n, 2**63) for n in shape) else None
    require(found == expected, f"{name} is {dtype} {shape}, not {expected[0]} {expected[1]}")
    first, end = header[name]["data_offsets"]
    num_bytes = math.prod(shape) * {"F32": 4, "U32": 4, "BF16": 2}.get(dtype, 1)
    require(end - first == num_bytes, f"{name} has {end - first} bytes, not {num_bytes}")
    return first
