"""Ways to read rows of a file at random: other people's, the plain ones, and ours.

Letters: R rows, U rows asked for, S bytes of a row.
"""

import mmap
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from engrammar.stores.aio import Ints
from engrammar.stores.base import RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.ram import RamStore
from engrammar.tables.folder import TableFile
from engrammar.tables.headers import PAGE
from engrammar_lab.bench.rivals import why_missing

Read = Callable[[Ints], NDArray[np.uint8]]


def _map(table: TableFile) -> np.memmap:
    (shard,) = table.shards
    return np.memmap(shard.path, np.uint8, "r", shard.start, (table.num_rows, table.row_bytes))


def take_from_map(table: TableFile) -> Read:
    rows_RS = _map(table)
    return lambda rows_U: np.take(rows_RS, rows_U, axis=0)


def take_from_advised_map(table: TableFile) -> Read:
    """Asks for all distinct pages at once, then gathers from a map without read-ahead."""
    rows_RS, (shard,) = _map(table), table.shards
    rows_RS._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    handle = os.open(shard.path, os.O_RDONLY)

    def read(rows_U: Ints) -> NDArray[np.uint8]:
        for page in pages_of(table, rows_U).tolist():
            os.posix_fadvise(handle, page * PAGE, PAGE, os.POSIX_FADV_WILLNEED)
        return np.take(rows_RS, rows_U, axis=0)

    return read


def pages_of(table: TableFile, rows_U: Ints) -> Ints:
    """The distinct pages of the file that rows are on, ascending."""
    first_U = table.shards[0].start + rows_U * table.row_bytes
    return np.union1d(first_U // PAGE, (first_U + table.row_bytes - 1) // PAGE)


def select_from_file(table: TableFile) -> Read:
    (shard,) = table.shards
    size = shard.start + table.num_rows * table.row_bytes
    tensor = torch.from_file(str(shard.path), shared=False, size=size, dtype=torch.uint8)
    rows_RS = tensor[shard.start :].view(table.num_rows, table.row_bytes)
    return lambda rows_U: rows_RS.index_select(0, torch.from_numpy(rows_U)).numpy()


def why_no_engramdb() -> str | None:
    """Why engramdb cannot be used here; None if it can."""
    return why_missing("engramdb", "not installed")


def engramdb_store(table: TableFile) -> Read:
    """engramdb's own store. Its shards have no header, so our header counts as rows that are never asked for."""
    engramdb = import_module("engramdb")
    (shard,) = table.shards
    folder, skipped = TemporaryDirectory(), shard.start // table.row_bytes
    (Path(folder.name) / "shard_000.bin").symlink_to(shard.path)
    store = engramdb.Store(folder.name, 1, skipped + table.num_rows, table.row_bytes)

    def read(rows_U: Ints, folder: object = folder) -> NDArray[np.uint8]:  # keeps the folder as long as this function
        return np.frombuffer(store.fetch(rows_U + skipped), np.uint8).reshape(len(rows_U), -1)

    return read


def engramdb_pages(table: TableFile) -> Read:
    """engramdb's io_uring reader of pages, and a gather from these; only for rows that are within one page."""
    engramdb = import_module("engramdb")
    assert PAGE % table.row_bytes == 0 and table.shards[0].start % PAGE == 0
    handle = os.open(table.shards[0].path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    reader = engramdb.IoUringPageReader(PAGE)

    def read(rows_U: Ints) -> NDArray[np.uint8]:
        page_P, first_U = pages_of(table, rows_U), table.shards[0].start + rows_U * table.row_bytes
        pages = reader.read_pages([handle] * len(page_P), (page_P * PAGE).tolist())
        rows_RS = np.frombuffer(b"".join(pages), np.uint8).reshape(-1, table.row_bytes)
        begin_U = np.searchsorted(page_P, first_U // PAGE) * PAGE + first_U % PAGE
        return np.take(rows_RS, begin_U // table.row_bytes, axis=0)

    return read


def _fetcher(store: RowStore) -> Read:
    return lambda rows_U: store.fetch(rows_U).wait()


TAKE, FROM_FILE = "np.take on a memmap", "torch.from_file, index_select"
ENGRAMDB, ENGRAMDB_PAGES = "engramdb Store", "engramdb io_uring pages"
ADVISED = "fadvise WILLNEED, gather from a map"
RAM, CACHED, DISK = "RamStore", "CachedStore over DiskStore", "DiskStore"
READERS: dict[str, Callable[[TableFile], Read]] = {
    TAKE: take_from_map,
    FROM_FILE: select_from_file,
    ADVISED: take_from_advised_map,
    ENGRAMDB: engramdb_store,
    ENGRAMDB_PAGES: engramdb_pages,
    RAM: lambda table: _fetcher(RamStore(table)),
    CACHED: lambda table: _fetcher(CachedStore(DiskStore(table), table.num_rows)),  # as much memory as the table
    DISK: lambda table: _fetcher(DiskStore(table)),
}
