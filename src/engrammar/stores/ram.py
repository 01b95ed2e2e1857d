"""Rows in memory: a copy of this process alone, or one for all processes of a user on the machine.

Letters: R rows of the table, U rows asked for, S bytes of a row, P pages of a piece of a file.
"""

import contextlib
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.stores.base import Arrived, Fetch, RowStore
from engrammar.stores.paged import identity_of
from engrammar.stores.shared import Segment, private_bytes
from engrammar.tables.checksums import first_damaged, read_page_sums
from engrammar.tables.folder import Shard, TableFile
from engrammar.tables.headers import AGAIN, PAGE, read_exactly

PIECE = 2**20  # bytes read at once: few enough to stay in the processor's cache while they are summed and copied


@final
class RamStore(RowStore):
    """All rows of a table as one array: the plainest store.

    The rows are copied from the table's files, which may change or vanish afterwards.
    """

    def __init__(self, table: TableFile, *, shared: bool = False, verify: bool = True) -> None:
        """Reads the table; shows a progress bar if that takes more than two seconds.

        Args:
            shared: all processes of this user that open the table use one copy; the last to close it frees it.
            verify: checks each page against its CRC-32, if the table has checksums.

        Raises:
            ValueError: a file cannot be read, is damaged or too short, or there is no room.
        """
        self.name = f"{table.name} in {table.shards[0].path.parent}"
        self.num_rows, self.row_bytes = table.num_rows, table.row_bytes
        memory, self.identity, self._segment = _load(table, self.name, shared, verify)
        self._rows_RS = memory.reshape(self.num_rows, self.row_bytes)

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        if self._rows_RS.shape[0] != self.num_rows:
            raise ValueError(f"{self.name} is closed.")
        # The fastest form of rows_RS[rows_U] for rows of 64 to 1,024 bytes. `fetch` has checked the range, and the
        # mode "clip" does not check it again.
        return Arrived(self._rows_RS.take(rows_U, 0, None, "clip"))

    def _detach(self) -> None:
        self._segment = None

    def close(self) -> None:
        self._rows_RS = np.empty((0, self.row_bytes), np.uint8)
        if self._segment is not None:
            self._segment.close()


def _load(table: TableFile, name: str, shared: bool, verify: bool) -> tuple[NDArray[np.uint8], str, Segment | None]:
    """Returns the bytes of all rows, a fingerprint of the files, and the segment of the bytes if they are shared."""
    num_bytes, segment = table.num_rows * table.row_bytes, None
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(shard.path)) for shard in table.shards]
        handles = [file.fileno() for file in files]
        identity = identity_of(table, handles)

        def fill(memory: NDArray[np.uint8]) -> None:
            _read(table, files, memory, verify)
            if identity_of(table, handles) != identity:
                raise ValueError(f"The files of {name} changed while they were read: open the table again.")

        if shared:
            segment = Segment(f"{name}, files {identity}, {'' if verify else 'not '}verified", num_bytes, fill)
            memory = segment.bytes
        else:
            memory = private_bytes(num_bytes)
            fill(memory)
    memory.flags.writeable = False
    return memory, identity, segment


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be opened ({error.strerror}): put it back, or copy the folder again."
        ) from error


def _read(table: TableFile, files: list[FileIO], memory: NDArray[np.uint8], verify: bool) -> None:
    bar = tqdm(desc=f"reading {table.name}", total=len(memory), unit="B", unit_scale=True, delay=2, leave=False)
    with bar:
        for shard, file in zip(table.shards, files):
            first = shard.first_row * table.row_bytes
            rows = memory[first : first + shard.num_rows * table.row_bytes]
            _read_shard(shard, file, rows, verify, bar.update)


def _read_shard(
    shard: Shard, file: FileIO, rows: NDArray[np.uint8], verify: bool, advance: Callable[[int], object]
) -> None:
    """Copies a shard's rows into `rows` [num_rows * S], whole pages at a time, and checks the pages."""
    size, end = os.fstat(file.fileno()).st_size, shard.start + len(rows)
    if size < end:
        raise ValueError(f"{shard.path} has {size} bytes, its rows end at {end}: copy it again.")
    crc32_P = read_page_sums(shard.crc32, shard.path) if verify and shard.crc32 is not None else None
    buffer = np.empty(PIECE, np.uint8)
    last = min(-(-end // PAGE) * PAGE, size)
    for at in range(shard.start // PAGE * PAGE, last, PIECE):
        piece = buffer[: min(PIECE, last - at)]
        try:
            read_exactly(file, piece.data, at, shard.path)
        except OSError as error:
            raise ValueError(f"{shard.path} cannot be read from byte {at} on ({error.strerror}): {AGAIN}") from error
        if crc32_P is not None:
            bad_page = first_damaged(piece.data, crc32_P[at // PAGE :])
            if bad_page is not None:
                bad = at + bad_page * PAGE
                row = shard.first_row + max(bad - shard.start, 0) * shard.num_rows // len(rows)
                raise ValueError(f"{shard.path} is damaged at byte {bad}, row {row} of the table: copy it again.")
        low, high = max(at, shard.start), min(at + len(piece), end)
        rows[low - shard.start : high - shard.start] = piece[low - at : high - at]
        advance(high - low)
