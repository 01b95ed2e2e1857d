"""The file pages of a table's rows: which pages they are, how they are read, and whether they are undamaged.

Letters: H shards, F files, U or V rows, S bytes of a row, P distinct pages (sorted), N reads.
"""

import errno
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from engrammar.stores.aio import Ints, ReadQueue
from engrammar.tables.checksums import read_page_sums
from engrammar.tables.folder import TableFile
from engrammar.tables.headers import PAGE

TRIES = 3
LONGEST_READ = 16  # neighboring pages in one read
NOT_READ, SHORT, DAMAGED = -1, -2, -3  # what is wrong with a page; above 0 it is an errno, 0 is a good page

logger = logging.getLogger(__name__)


@final
class PagedFiles:
    """The open shards of a table. Pages are numbered across all files, with a gap between two files.

    Raises:
        ValueError: a file cannot be opened or is shorter than its rows, or its checksums are those of another file.
    """

    def __init__(self, table: TableFile) -> None:
        # direct: whether reads bypass the page cache.
        self.name, self.row_bytes, self.direct = table.name, table.row_bytes, hasattr(os, "O_DIRECT")
        # The most pages that one row can be on.
        self.pages_per_row = (self.row_bytes + PAGE - 2) // PAGE + 1  # at most
        shard_of = {shard.path: shard for shard in table.shards}
        self.paths = list(shard_of)
        self._open: list[int] = []
        while len(self._open) < len(self.paths):
            handle = _open(self.paths[len(self._open)], self.direct)
            if handle is None:  # tmpfs and the like: all files are then read through the page cache
                folder = self.paths[len(self._open)].parent
                logger.info("%s: reads go through the page cache, since %s allows no others.", self.name, folder)
                self._close()
                self.direct = False
            else:
                self._open.append(handle)
        self.descriptor_F = np.array(self._open, np.int64)
        self.identity = identity_of(table, self._open)  # a fingerprint of the contents
        self.size_F = np.array([os.fstat(handle).st_size for handle in self._open], np.int64)
        pages_F = -(-self.size_F // PAGE)
        self.first_page_F = np.cumsum(pages_F + 1) - (pages_F + 1)
        file_H = [self.paths.index(shard.path) for shard in table.shards]
        self.first_row_H = np.array([shard.first_row for shard in table.shards], np.int64)
        start_H = np.array([shard.start for shard in table.shards], np.int64)
        self.shift_H = self.first_page_F[file_H] * PAGE + start_H - self.first_row_H * self.row_bytes
        for shard, file in zip(table.shards, file_H):
            end = shard.start + shard.num_rows * self.row_bytes
            if end > self.size_F[file]:
                raise ValueError(f"{shard.path} has {self.size_F[file]} bytes, its rows end at {end}: copy it again.")
        self.crc32_P, self.has_crc32_F = np.zeros(int(np.sum(pages_F + 1)), np.uint32), np.zeros(len(pages_F), bool)
        for file, shard in enumerate(shard_of.values()):
            if shard.crc32 is not None:
                first, self.has_crc32_F[file] = self.first_page_F[file], True
                self.crc32_P[first : first + pages_F[file]] = read_page_sums(shard.crc32, shard.path)

    def addresses(self, rows_U: Ints) -> Ints:
        """The byte where each row begins, counted across all files, each padded to whole pages."""
        if len(self.first_row_H) == 1:
            return rows_U * self.row_bytes + self.shift_H[0]
        shard_U = np.searchsorted(self.first_row_H, rows_U, "right") - 1
        return rows_U * self.row_bytes + self.shift_H[shard_U]

    def pages(self, address_V: Ints) -> tuple[Ints, Ints]:
        """Returns page_P, the pages of the rows, and begin_V, the byte where each row begins in these pages joined."""
        first_V, last_V = address_V // PAGE, (address_V + self.row_bytes - 1) // PAGE
        page_P = np.concatenate([np.minimum(first_V + step, last_V) for step in range(self.pages_per_row)])
        page_P.sort()
        distinct_P = np.ones(len(page_P), bool)
        np.not_equal(page_P[1:], page_P[:-1], out=distinct_P[1:])
        page_P = page_P[distinct_P]
        return page_P, np.searchsorted(page_P, first_V) * PAGE + address_V % PAGE

    def files(self, page_P: Ints) -> Ints:
        """The file of each page."""
        return np.searchsorted(self.first_page_F, page_P, "right") - 1

    def explain(self, row: int, page: int, why: int, seconds: float | None = None) -> str:
        """The error message about a row that cannot be read because of a page."""
        file = int(self.files(np.array([page]))[0])
        first = (page - int(self.first_page_F[file])) * PAGE
        of = f"bytes {first} to {min(first + PAGE, int(self.size_F[file])) - 1}"
        if why == DAMAGED:
            what = f"is damaged in {of}: copy it again"
        elif why == SHORT:
            what = f"ends before {of} do, it was cut off while open: copy it again, and open the table again"
        elif why == NOT_READ:
            after = "" if seconds is None else f" after {seconds:g} s"
            what = f"had not delivered {of}{after}: allow more time, or check the disk"
        else:
            what = f"fails in {of} ({os.strerror(why)}): check the disk, or copy the table to another"
        return f"Row {row} of {self.name} cannot be read, since {self.paths[file]} {what}."

    def _close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def __del__(self) -> None:  # not in the store's `close`, since a fetch may outlive the store
        self._close()


def _open(path: Path, direct: bool) -> int | None:
    """Opens a file and returns its descriptor; None if `direct` is asked for and the file cannot be read that way."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            return None
        raise ValueError(
            f"{path} cannot be opened ({error.strerror}): put it back, or copy the folder again."
        ) from error
    try:
        if direct:
            os.preadv(handle, [mmap.mmap(-1, PAGE)], 0)
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            os.close(handle)
            return None
    return handle


def identity_of(table: TableFile, handles: Sequence[int]) -> str:
    """A fingerprint of a table's open files, made without reading them."""
    stats = [os.fstat(handle) for handle in handles]
    files = [(stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]
    runs = [(shard.start, shard.first_row, shard.num_rows) for shard in table.shards]
    return hashlib.sha256(json.dumps([files, runs, table.row_bytes]).encode()).hexdigest()[:16]


@final
class PageReads:
    """Reads of distinct pages into a queue's slots from `base` on; a page that fails is read again."""

    def __init__(self, files: PagedFiles, queue: ReadQueue, base: int, page_P: Ints) -> None:
        self.files, self.queue, self.base, self.page_P = files, queue, base, page_P
        file_P = files.files(page_P)
        self._descriptor_P = files.descriptor_F[file_P]
        self._byte_P = (page_P - files.first_page_F[file_P]) * PAGE
        self._size = np.minimum(files.size_F[file_P] - self._byte_P, PAGE).tolist()
        self._crc32, self._checked = files.crc32_P[page_P].tolist(), files.has_crc32_F[file_P].tolist()
        self._memory = queue.memory.data[base * PAGE :]
        # why: for each page, what is wrong with it; 0 once the page was read and its checksum fits.
        # left: how many reads are in flight.
        self.why, self.left, self._tries = [NOT_READ] * len(page_P), 0, TRIES
        beginning_P = np.ones(len(page_P), bool)
        beginning_P[1:] = (page_P[1:] != page_P[:-1] + 1) | (np.arange(1, len(page_P)) % LONGEST_READ == 0)
        index_N = np.flatnonzero(beginning_P)
        pages_N = np.empty_like(index_N)
        np.subtract(index_N[1:], index_N[:-1], out=pages_N[:-1])
        pages_N[-1] = len(page_P) - index_N[-1]
        self._start(index_N, pages_N)

    def _start(self, index_N: Ints, pages_N: Ints) -> None:
        """Starts N reads, each of `pages` pages from the page at `index` on."""
        self._failed: list[int] = []
        self._pages = dict(zip(index_N.tolist(), pages_N.tolist()))
        self.left, self._tries = len(index_N), self._tries - 1
        self.queue.start(self._descriptor_P[index_N], self._byte_P[index_N], self.base + index_N, pages_N)

    def take(self, slot: int, result: int) -> None:
        """Checks the pages of a finished read; after the last read, starts reading the failed pages again."""
        first = slot - self.base
        for index in range(first, first + self._pages[first]):
            size, begin = self._size[index], index * PAGE
            if result - (index - first) * PAGE < size:
                self.why[index] = -result if result < 0 else SHORT
            elif self._checked[index] and crc32(self._memory[begin : begin + size]) != self._crc32[index]:
                self.why[index] = DAMAGED
            else:
                self.why[index] = 0
                continue
            self._failed.append(index)
        self.left -= 1
        if not self.left and self._failed and self._tries:
            self._start(np.array(self._failed), np.ones(len(self._failed), np.int64))

    def gather(self, begin_V: Ints) -> NDArray[np.void]:
        """Returns rows_V, one item of S bytes for each byte in `begin_V`; rows on bad pages are undefined."""
        size = self.files.row_bytes
        # A view with a row at every byte, since NumPy copies items of any size fast.
        rows = np.ndarray((self._memory.nbytes - size + 1,), f"V{size}", self._memory, 0, (1,))
        return rows[begin_V]

    def missing(self, begin_V: Ints) -> NDArray[np.bool_] | None:
        """Which rows are on a bad page; None if there is no bad page."""
        if not any(self.why):
            return None
        bad_P = np.concatenate([[0], np.cumsum(np.array(self.why) != 0)])
        return bad_P[(begin_V + self.files.row_bytes - 1) // PAGE + 1] > bad_P[begin_V // PAGE]

    def explain(self, row: int, begin: int, seconds: float | None = None) -> str:
        """The error message about a missing row that begins at the byte `begin` of the pages."""
        index = next(index for index in range(begin // PAGE, len(self.why)) if self.why[index])
        return self.files.explain(row, int(self.page_P[index]), self.why[index], seconds)
