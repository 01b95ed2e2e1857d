"""The safetensors files of a released model, read and written by blocks: no tensor is ever whole in memory.

Letters: U rows of a block, S bytes of a row.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter, RawIOBase
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from engrammar.tables.sealed import PARTIAL

INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 8 * 2**20  # read or written at once
ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I64": 8}
AGAIN = "copy it from the release again"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a file.

    Attributes:
        path: the file.
        name: the tensor's name in it.
        dtype: as safetensors writes it.
        shape: of the tensor.
        start, num_bytes: where its values are in the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // max(1, self.num_rows)

    def require(self, dtypes: tuple[str, ...], shape: tuple[int | None, ...], meaning: str) -> None:
        """ValueError unless the tensor has one of `dtypes` and this shape (None: any length)."""
        fits = len(self.shape) == len(shape) and all(b in (None, a) for a, b in zip(self.shape, shape))
        if self.dtype not in dtypes or not fits:
            wanted = [length if length is not None else "any" for length in shape]
            raise ValueError(
                f"{self.path} holds {self.name} as {self.dtype} {list(self.shape)}; {meaning} is {' or '.join(dtypes)} "
                f"{wanted}: use the files and the config.json of one release (or name other tensors with --names)."
            )

    def blocks(self, first_row: int = 0, num_rows: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """The bytes of its rows from `first_row` on, as blocks [U, S] of about BLOCK_BYTES.

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
        """All its bytes, for small tensors."""
        return np.concatenate([block.reshape(-1) for block in self.blocks()] or [np.empty(0, np.uint8)])


def read_exactly(file: RawIOBase, out: memoryview, start: int, path: Path) -> None:
    """Fills `out` with the bytes of an open file from `start` on, or raises a ValueError."""
    file.seek(start)
    done = 0
    while done < len(out):
        count = file.readinto(out[done:])
        if not count:
            raise ValueError(f"{path} is cut off at byte {start + done}: {AGAIN}.")
        done += count
    if hasattr(os, "posix_fadvise") and len(out) > BLOCK_BYTES // 2:  # nobody reads it again: keep what others cached
        os.posix_fadvise(file.fileno(), start, len(out), os.POSIX_FADV_DONTNEED)


def read_header(path: Path) -> dict[str, Part]:
    """The tensors of a safetensors file, by name, once its size is what its header says.

    Raises:
        ValueError: the file is missing, cut off, or not safetensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: {AGAIN}.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header ends behind the file")
            header = json.loads(file.read(length), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        parts = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            item = ITEM_BYTES.get(entry["dtype"])
            if type(first) is not int or type(last) is not int:
                raise ValueError(f"the bytes of {name} are nowhere")
            if not 0 <= first <= last or (item is not None and math.prod(shape) * item != last - first):
                raise ValueError(f"the bytes of {name} do not fit its shape")
            parts[name] = Part(
                path=path,
                name=name,
                dtype=entry["dtype"],
                shape=shape,
                start=8 + length + first,
                num_bytes=last - first,
            )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError(f"{path} is cut off or not a safetensors file ({error}): {AGAIN}.") from error
    end = 8 + length
    for part in sorted(parts.values(), key=lambda part: (part.start, part.num_bytes)):
        if part.start != end:  # safetensors files have neither gaps nor bytes of two tensors
            raise ValueError(f"{path} has a header that lays {part.name} over or apart from another tensor: {AGAIN}.")
        end += part.num_bytes
    if end != size:
        raise ValueError(f"{path} has {size} bytes, {end} by its header: {AGAIN}.")
    return parts


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


@final
class ReleasedModel:
    """A released model's folder: its settings, and which file holds which tensor. Reads headers only when asked.

    Attributes:
        folder: where it is.
        config: its config.json.
        file_of: per tensor, the name of its file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = _read_json(folder / "config.json")
        self._headers: dict[str, dict[str, Part]] = {}
        if (folder / INDEX).is_file():
            self.file_of: dict[str, str] = _read_json(folder / INDEX).get("weight_map", {})
            named = isinstance(self.file_of, dict) and all(isinstance(file, str) for file in self.file_of.values())
            if not named or any(Path(file).name != file for file in self.file_of.values()):
                raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files beside it: {AGAIN}.")
        else:
            paths = sorted(folder.glob("*.safetensors"))
            if not paths:
                raise ValueError(f"{folder} holds no safetensors file: give the folder of a released model.")
            self._headers = {path.name: read_header(path) for path in paths}
            self.file_of = {name: file for file, parts in self._headers.items() for name in parts}

    def settings(self) -> dict[str, Any]:
        """Settings of the language model: those of `text_config` where there is one."""
        return {**self.config, **(self.config.get("text_config") or {})}

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """A setting of the language model: an int, a number (kind float), or a list of ints.

        Raises:
            ValueError: it is missing without a default, or something else.
        """
        value = self.settings().get(name, default)
        whole = kind is not list or (type(value) is list and all(type(v) is int for v in value))
        if not whole or type(value) not in ((int, float) if kind is float else (kind,)):
            meaning = {int: "an integer", float: "a number", list: "a list of integers"}[kind]
            raise ValueError(
                f"{self.folder / 'config.json'} should have {meaning} as {name}, not {value!r}: use the config.json of "
                "the release."
            )
        return value

    def find(self, ending: str) -> Part | None:
        """The tensor called `ending`, with any prefix before a dot; None where there is none.

        Raises:
            ValueError: there are several, or its file is missing or damaged.
        """
        names = [name for name in self.file_of if name == ending or name.endswith("." + ending)]
        if len(names) > 1:
            raise ValueError(f"{self.folder} holds {names[0]} and {names[1]}: name the one wanted with --names.")
        return self.part(names[0]) if names else None

    def need(self, ending: str) -> Part:
        """`find`, or a ValueError that says which tensor is missing."""
        part = self.find(ending)
        if part is None:
            raise ValueError(
                f"No file of {self.folder} holds *.{ending}: copy the missing file, or name the tensor with --names."
            )
        return part

    def numbered(self, ending: str, **known: int) -> dict[int, Part]:
        """Tensors whose name is `ending` with a number for `{shard}`, by that number."""
        pattern = re.escape(ending.format(shard="#", **known)).replace(re.escape("#"), "([0-9]+)")
        numbers = (re.search(rf"(?:^|\.){pattern}$", name) for name in self.file_of)
        found = sorted({int(match[1]) for match in numbers if match})
        return {number: self.need(ending.format(shard=number, **known)) for number in found}

    def part(self, name: str) -> Part:
        """A tensor by its full name; errors as `find`."""
        file = self.file_of[name]
        if file not in self._headers:
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path}, which holds {name}, is missing: {AGAIN}.")
            self._headers[file] = read_header(path)
        if name not in self._headers[file]:
            raise ValueError(f"{self.folder / file} does not hold {name}, as {INDEX} says: {AGAIN}.")
        return self._headers[file][name]


def copy_model(model: ReleasedModel, out: Path, replaced: Mapping[str, Iterator[NDArray[np.uint8]]]) -> None:
    """Copies a model's folder with the bytes of some tensors replaced; every other byte stays as it is.

    Files that the index names but the folder lacks stay away. `out` appears once it is whole.

    Args:
        replaced: per full tensor name, its new bytes in blocks, as many as it had.

    Raises:
        ValueError: `out` is there already, or is within the model's folder.
        OSError: the disk is full or fails; nothing is left.
    """
    if out.exists() or out.resolve().is_relative_to(model.folder.resolve()):
        raise ValueError(f"{out} is there already, or is within {model.folder}: choose a new folder elsewhere.")
    partial = out.absolute().with_name(f"{PARTIAL}{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        by_file: dict[str, list[Part]] = {}
        for name in replaced:
            by_file.setdefault(model.file_of[name], []).append(model.part(name))
        for path in sorted(model.folder.iterdir()):
            if path.is_file() and path.name in by_file:
                _copy_file(path, partial / path.name, by_file[path.name], replaced)
            elif path.is_file():
                shutil.copyfile(path, partial / path.name)
            elif path.is_dir():
                shutil.copytree(path, partial / path.name)
        os.rename(partial, out)
    except OSError as error:
        raise OSError(
            f"{out} could not be written ({error.strerror}), and nothing of it is left: free space there, or put that "
            "right, and run the same command again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_file(
    source: Path, target: Path, parts: list[Part], replaced: Mapping[str, Iterator[NDArray[np.uint8]]]
) -> None:
    with source.open("rb", buffering=0) as old, target.open("wb") as new:
        for part in sorted(parts, key=lambda part: part.start):
            _copy_until(old, new, part.start, source)
            for block in replaced[part.name]:
                new.write(np.ascontiguousarray(block).reshape(-1).data)
            assert new.tell() == part.start + part.num_bytes, f"{part.name} got another number of bytes"
        _copy_until(old, new, source.stat().st_size, source)
        new.flush()
        os.fsync(new.fileno())


def _copy_until(old: RawIOBase, new: BufferedWriter, end: int, path: Path) -> None:
    while (position := new.tell()) < end:
        block = memoryview(bytearray(min(BLOCK_BYTES, end - position)))
        read_exactly(old, block, position, path)
        new.write(block)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of a released model.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {AGAIN}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: {AGAIN}.")
    return content
