"""The safetensors files of a released model, read and written in blocks: no tensor is ever whole in memory.

Letters: U rows of a block, S bytes of a row.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from io import BufferedWriter, RawIOBase
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from engrammar.tables.headers import AGAIN, BLOCK_BYTES, Part, read_exactly, read_header, read_json
from engrammar.tables.sealed import reason_of, written_beside
from engrammar.tables.shards import INDEX, weight_map


def require(part: Part, dtypes: tuple[str, ...], shape: tuple[int | None, ...], meaning: str) -> None:
    """Raises a ValueError unless the tensor has one of `dtypes` and this shape (None: any length)."""
    fits = len(part.shape) == len(shape) and all(b in (None, a) for a, b in zip(part.shape, shape))
    if part.dtype not in dtypes or not fits:
        wanted = [length if length is not None else "any" for length in shape]
        raise ValueError(
            f"{part.path} holds {part.name} as {part.dtype} {list(part.shape)}; {meaning} is {' or '.join(dtypes)} "
            f"{wanted}: use the files and the config.json of one release (or name other tensors with --names)."
        )


@final
class Settings:
    """The settings of a released model."""

    def __init__(self, where: Path | str, config: Mapping[str, Any]) -> None:
        self.where = where  # what errors call them
        # The settings of the language model; those of `text_config` win, if there is one.
        self.values: dict[str, Any] = {**config, **(config.get("text_config") or {})}

    def need(self, name: str, kind: type, default: Any = None) -> Any:
        """A setting of the language model: an int, a number (kind float), or a list of ints.

        Raises:
            ValueError: it has another type, or it is missing and has no default.
        """
        value = self.values.get(name, default)
        whole = kind is not list or (type(value) is list and all(type(v) is int for v in value))
        if not whole or type(value) not in ((int, float) if kind is float else (kind,)):
            meaning = {int: "an integer", float: "a number", list: "a list of integers"}[kind]
            raise ValueError(
                f"{self.where} should have {meaning} as {name}, not {value!r}: use the config.json of the release."
            )
        return value


@final
class ReleasedModel:
    """A released model's folder: its settings, and which file holds which tensor. Headers are read only when needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(folder / "config.json", read_json(folder / "config.json"))
        self._headers: dict[str, dict[str, Part]] = {}
        if (folder / INDEX).is_file():
            self.file_of = weight_map(folder)
        else:
            paths = sorted(folder.glob("*.safetensors"))
            if not paths:
                raise ValueError(f"{folder} holds no safetensors file: give the folder of a released model.")
            self._headers = {path.name: read_header(path) for path in paths}
            self.file_of = {name: file for file, parts in self._headers.items() for name in parts}

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """As `Settings.need`."""
        return self.settings.need(name, kind, default)

    def find(self, ending: str) -> Part | None:
        """The tensor called `ending`, with or without a prefix that ends in a dot; None if there is none.

        Raises:
            ValueError: there are several, or the file is missing or damaged.
        """
        names = [name for name in self.file_of if name == ending or name.endswith("." + ending)]
        if len(names) > 1:
            raise ValueError(f"{self.folder} holds {names[0]} and {names[1]}: name the one wanted with --names.")
        return self.part(names[0]) if names else None

    def need(self, ending: str) -> Part:
        """As `find`, but raises a ValueError if the tensor is missing."""
        part = self.find(ending)
        if part is None:
            raise ValueError(
                f"No file of {self.folder} holds *.{ending}: copy the missing file, or name the tensor with --names."
            )
        return part

    def numbered(self, ending: str, **known: int) -> dict[int, Part]:
        """The tensors whose name is `ending` with a number in place of `{shard}`, by that number."""
        pattern = re.escape(ending.format(shard="#", **known)).replace(re.escape("#"), "([0-9]+)")
        numbers = (re.search(rf"(?:^|\.){pattern}$", name) for name in self.file_of)
        found = sorted({int(match[1]) for match in numbers if match})
        return {number: self.need(ending.format(shard=number, **known)) for number in found}

    def part(self, name: str) -> Part:
        """The tensor with this full name; errors are as in `find`."""
        file = self.file_of[name]
        if file not in self._headers:
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path}, which holds {name}, is missing: {AGAIN}")
            self._headers[file] = read_header(path)
        if name not in self._headers[file]:
            raise ValueError(f"{self.folder / file} does not hold {name}, as {INDEX} says: {AGAIN}")
        return self._headers[file][name]


def copy_model(model: ReleasedModel, out: Path, replaced: Mapping[str, Iterator[NDArray[np.uint8]]]) -> None:
    """Copies a model's folder and replaces the bytes of some tensors; every other byte stays the same.

    Files that the index lists but the folder lacks are skipped. `out` appears once it is whole.

    Args:
        replaced: by full tensor name, the new bytes in blocks, as many bytes as the tensor had.

    Raises:
        ValueError: `out` exists already, or is inside the model's folder.
        OSError: the disk is full or fails; nothing is left.
    """
    if out.exists() or out.resolve().is_relative_to(model.folder.resolve()):
        raise ValueError(f"{out} is there already, or is within {model.folder}: choose a new folder elsewhere.")
    by_file: dict[str, list[Part]] = {}
    for name in replaced:
        by_file.setdefault(model.file_of[name], []).append(model.part(name))
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with written_beside(out.absolute()) as partial:
            partial.mkdir()
            for path in sorted(model.folder.iterdir()):
                if path.is_file() and path.name in by_file:
                    _copy_file(path, partial / path.name, by_file[path.name], replaced)
                elif path.is_file():
                    shutil.copyfile(path, partial / path.name)
                elif path.is_dir():
                    shutil.copytree(path, partial / path.name)
    except OSError as error:
        raise OSError(
            f"{out} could not be written ({reason_of(error, out.absolute().parent)}), and nothing of it is left: free "
            "space there, or put that right, and run the same command again."
        ) from error


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


def _copy_until(old: RawIOBase, new: BufferedWriter, end: int, path: Path) -> None:
    while (position := new.tell()) < end:
        block = memoryview(bytearray(min(BLOCK_BYTES, end - position)))
        read_exactly(old, block, position, path)
        new.write(block)
