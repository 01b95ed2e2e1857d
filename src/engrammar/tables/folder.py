"""Table files: safetensors shards, and a `memory.json` that describes their rows (docs/table-files.md).

Letters: R rows of a table, C their width, S bytes of a stored row, U rows of a block.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.config import Encoding, Geometry, MemoryConfig, check_setting, row_bytes
from engrammar.tables.checksums import page_sums_path, write_manifest
from engrammar.tables.encodings import DTYPE_OF, DTYPES
from engrammar.tables.headers import AGAIN, PAGE, Requirement, is_count, only_tensor
from engrammar.tables.memory_json import geometry_of, memory_of, read_memory, write_memory
from engrammar.tables.sealed import reason_of, written_beside
from engrammar.tables.shards import MEMORY, lay_out, table_shard, write_rows


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A run of a table's rows in one safetensors file."""

    path: Path
    tensor: str
    start: int  # the byte of the file where its first row begins
    first_row: int  # that row's number in the table
    num_rows: int
    crc32: Path | None  # the file with the CRC-32 of each page of `path`; None if there is none


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """Where the rows of one memory layer are, and how they are stored.

    Attributes:
        name: the name of the table's weight in a model.
        num_rows, width: R and C.
        scale: the scale of all rows, if the encoding has one for the whole table.
        shards: consecutive runs of rows.
    """

    layer: int
    name: str
    num_rows: int
    width: int
    encoding: Encoding
    scale: float | None
    shards: tuple[Shard, ...]

    @property
    def row_bytes(self) -> int:
        """S, the bytes of a stored row."""
        return row_bytes(self.encoding, self.width)


@dataclass(frozen=True, kw_only=True)
class TableFolder:
    """A folder that holds tables: a checkpoint, or tables alone. Its attributes are those of `memory.json`."""

    path: Path
    memory: MemoryConfig
    geometry: Geometry
    num_ids: int | None
    tokenizer_sha256: str | None
    encoding: Encoding
    source: str
    tables: dict[int, TableFile]


def open_tables(folder: Path) -> TableFolder:
    """Describes a folder's tables and the places of their rows. Headers and sizes are checked; rows are not read.

    Args:
        folder: a checkpoint, or a folder of tables.

    Raises:
        ValueError: a file is missing or damaged; names the file, what is wrong with it, and what to do.
    """
    folder = Path(folder)
    return tables_of(folder, read_memory(folder))


def tables_of(folder: Path, content: Mapping[str, Any]) -> TableFolder:
    """`open_tables` for the content of a memory.json that may not be written yet; checks only its `tables`."""
    require = Requirement(folder / MEMORY)
    memory, geometry = memory_of(content["memory"], require), geometry_of(content["geometry"], require)
    encoding: Encoding = content["encoding"]
    tables = {}
    for index, layer in enumerate(memory.layers):
        require.where = f"table {layer}: "
        entry = content["tables"][str(layer)]
        keys = {"name", "rows", "width", "scale", "shards"}
        require(isinstance(entry, dict) and entry.keys() == keys, f"it does not have {sorted(keys)}")
        name, scale, rows = entry["name"], entry["scale"], geometry.num_stored_rows(index)
        require(isinstance(name, str) and name, "its name is no text")
        require(is_count(entry["rows"]) and entry["rows"] == rows, f"rows is not the {rows} of its geometry")
        wide = is_count(entry["width"]) and entry["width"] == memory.head_dim
        require(wide, f"width is not head_dim={memory.head_dim}")
        is_scale = isinstance(scale, float) and 0 < scale < math.inf
        require(is_scale if encoding == "fp8" else scale is None, f"scale is {scale!r} for {encoding}")
        bare = TableFile(
            layer=layer, name=name, num_rows=rows, width=memory.head_dim, encoding=encoding, scale=scale, shards=()
        )
        tables[layer] = replace(bare, shards=_shards_of(folder, entry["shards"], bare, require))
    require.where = ""
    require(len({table.name for table in tables.values()}) == len(tables), "two tables have one name")
    about = {key: content[key] for key in ("num_ids", "tokenizer_sha256", "source")}
    return TableFolder(path=folder, memory=memory, geometry=geometry, encoding=encoding, tables=tables, **about)


def _shards_of(folder: Path, entries: Any, table: TableFile, require: Requirement) -> tuple[Shard, ...]:
    require(isinstance(entries, list) and entries, "shards is not a list of some")
    shards: list[Shard] = []
    first_row = 0
    for index, entry in enumerate(entries):
        is_entry = isinstance(entry, dict) and entry.keys() == {"file", "rows", "crc32"}
        require(is_entry, f"shard {index} does not have file, rows and crc32")
        rows = entry["rows"]
        require(is_count(rows, table.num_rows) and rows > 0, f"shard {index} has {rows!r} rows")
        path = _inside(folder, entry["file"], require)
        crc32 = None if entry["crc32"] is None else _inside(folder, entry["crc32"], require)
        tensor = table.name if len(entries) == 1 else f"{table.name}.shard_{index}"
        width = table.width if table.encoding in DTYPE_OF else table.row_bytes
        start = only_tensor(path, tensor, DTYPE_OF.get(table.encoding, "U8"), (rows, width)).start
        if crc32 is not None:
            only_tensor(crc32, "crc32", "U32", (-(-path.stat().st_size // PAGE),))
        shards.append(Shard(path=path, tensor=tensor, start=start, first_row=first_row, num_rows=rows, crc32=crc32))
        first_row += rows
    require(first_row == table.num_rows, f"its shards have {first_row} rows, not {table.num_rows}")
    return tuple(shards)


def _inside(folder: Path, name: Any, require: Requirement) -> Path:
    """The regular file of that name in `folder`. In the Hub's cache, which consists of links, it is a blob."""
    plain = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")
    require(plain, f"{name!r} is not the name of a file in this folder")
    path = folder / name
    try:
        if not path.is_file():
            raise ValueError(f"{path}, which {MEMORY} names, is missing or no file: {AGAIN}")
        homes = [folder.resolve()]
        if folder.parent.name == "snapshots":
            homes.append(folder.parent.parent.resolve() / "blobs")
        require(path.resolve().parent in homes, f"{name!r} is a link that leads out of this folder")
    except OSError as error:
        raise ValueError(f"{folder / str(name)[:99]} cannot be read ({error.strerror}): {AGAIN}") from error
    return path


@final
class TableWriter:
    """Writes a folder of table files, some rows at a time. Use it in a `with` statement.

    The folder appears, sealed, at the end of the statement, or not at all.

    Args:
        memory, geometry, encoding, num_ids, tokenizer_sha256, source: as in `TableFolder`.
        shard_bytes: the most bytes of rows in one file; None writes one file for each table.

    Attributes:
        partial: the folder while it is being written; other files of the new folder may be put there.

    Raises:
        ValueError: the folder exists already, or rows do not fit the geometry.
        OSError: the disk is full or fails; nothing is left.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory: MemoryConfig,
        geometry: Geometry,
        encoding: Encoding,
        source: str,
        num_ids: int | None = None,
        tokenizer_sha256: str | None = None,
        shard_bytes: int | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.partial = self.folder  # until `with` replaces it by a path beside the folder
        self.writing = contextlib.ExitStack()
        self.memory, self.geometry, self.encoding = memory, geometry, encoding
        self.about = {"num_ids": num_ids, "tokenizer_sha256": tokenizer_sha256, "source": source}
        self.row_bytes = row_bytes(encoding, memory.head_dim)
        enough = shard_bytes is None or shard_bytes >= self.row_bytes
        check_setting("shard_bytes", shard_bytes, enough, f"{self.row_bytes}, the bytes of a row, or more")
        self.shard_rows = None if shard_bytes is None else shard_bytes // self.row_bytes
        self.scales: dict[int, float | None] = {}
        self.names: dict[int, str] = {}
        self.written = dict.fromkeys(memory.layers, 0)

    def __enter__(self) -> Self:
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} is there already: choose another folder.")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.partial = self.writing.enter_context(written_beside(self.folder))
            self.partial.mkdir()
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            with self.writing:
                if error is not None:
                    raise error
                self._finish()
        except BaseException as problem:
            if reason_of(problem, self.folder.parent) is None:
                raise
            raise self._failed(problem) from problem

    def add(
        self,
        layer: int,
        scale: float | None,
        blocks: Iterable[Tensor | NDArray[np.uint8]],
        name: str | None = None,
    ) -> None:
        """Writes all rows of a layer's table.

        Args:
            scale: the table's scale, for fp8.
            blocks: consecutive rows, uint8 [U, S].
            name: the name of the table's weight in the model; None is its name in our own model.
        """
        self.scales[layer] = scale
        if name is not None:
            self.names[layer] = name
        for rows_US in blocks:
            self.write(layer, rows_US)

    def write(self, layer: int, rows_US: Tensor | NDArray[np.uint8]) -> None:
        """Writes the next rows of a layer's table, uint8 [U, S]."""
        rows_US = torch.as_tensor(rows_US)
        if rows_US.dtype != torch.uint8 or rows_US.shape[1:] != (self.row_bytes,):
            raise ValueError(f"Rows are {rows_US.dtype} {list(rows_US.shape)}; allowed: uint8 [U, {self.row_bytes}].")
        while len(rows_US):
            row = self.written[layer]
            shards = self._shards(layer)
            index = row // (self.shard_rows or self._num_rows(layer))
            if index >= len(shards):
                raise ValueError(f"Table {layer} has {self._num_rows(layer)} rows; more were given.")
            path, tensor, first_row, num_rows = shards[index]
            if row == first_row:
                dtype = DTYPES[DTYPE_OF.get(self.encoding, "U8")]
                lay_out(path, {tensor: (dtype, (num_rows, self.row_bytes // dtype.itemsize))})
            fitting = rows_US[: first_row + num_rows - row]
            write_rows(path, tensor, row - first_row, fitting)
            self.written[layer], rows_US = row + len(fitting), rows_US[len(fitting) :]

    def _num_rows(self, layer: int) -> int:
        return self.geometry.num_stored_rows(self.memory.layers.index(layer))

    def _name(self, layer: int) -> str:
        return self.names.get(layer, f"model.memory.tables.{layer}.weight")

    def _shards(self, layer: int) -> list[tuple[Path, str, int, int]]:
        """The file, tensor name, first row and number of rows of each shard of a table."""
        num_rows, name = self._num_rows(layer), self._name(layer)
        each = self.shard_rows or num_rows
        firsts = range(0, num_rows, each)
        if len(firsts) == 1:
            return [(self.partial / table_shard(name), name, 0, num_rows)]
        stem = table_shard(name).removesuffix(".safetensors")
        return [
            (
                self.partial / f"{stem}-{index + 1:05}-of-{len(firsts):05}.safetensors",
                f"{name}.shard_{index}",
                first,
                min(each, num_rows - first),
            )
            for index, first in enumerate(firsts)
        ]

    def _finish(self) -> None:
        tables = {}
        for layer, written in self.written.items():
            if written != self._num_rows(layer):
                raise ValueError(f"Table {layer} has {self._num_rows(layer)} rows; {written} were given.")
            files = [
                {"file": path.name, "rows": rows, "crc32": page_sums_path(path).name}
                for path, _, _, rows in self._shards(layer)
            ]
            entry = {"name": self._name(layer), "rows": written, "width": self.memory.head_dim}
            tables[str(layer)] = {**entry, "scale": self.scales.get(layer), "shards": files}
        own = {"memory": self.memory.to_json(), "geometry": self.geometry.to_json(), "encoding": self.encoding}
        write_memory(self.partial, {**own, **self.about, "tables": tables})
        write_manifest(self.partial)

    def _failed(self, error: BaseException) -> Exception:
        if isinstance(error, FileExistsError):
            return ValueError(f"{self.folder} was written by another process meanwhile: choose another folder.")
        return OSError(
            f"{self.folder} could not be written ({reason_of(error, self.folder.parent)}); nothing was left there. "
            "Free space there, or put that right, and run the same command again."
        )
