"""Rows from files. Each page of a fetch is read once and checked; reads run at the same time and bypass the page cache.

Hashing scatters rows, so a page cache would keep sixteen cold rows for each hot one; a `CachedStore` in front keeps the
rows that are read often. Small fetches are read in the caller's thread, large ones in slices by a thread of the store.
Letters: U rows asked for, V rows of a slice, P distinct pages, S bytes of a row, D finished reads.
"""

import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import final

import numpy as np
from numpy.typing import NDArray

from engrammar.config import check_setting
from engrammar.stores.aio import AioQueue, Ints, ReadQueue, thread_queues
from engrammar.stores.base import Arrived, Fetch, RowsMissing, RowStore
from engrammar.stores.paged import NOT_READ, PagedFiles, PageReads
from engrammar.tables.folder import TableFile
from engrammar.tables.headers import PAGE

DEPTH = 512  # pages of large fetches in flight, which take 2 MiB of memory
NUM_PARTS = 8  # parts of these pages: one is gathered while the others are read
BATCH = 32  # reads of a large fetch that are collected together
SMALL = 128  # the most pages of a small fetch
NUM_LANES = 8  # small fetches in flight, 512 KiB each; further ones wait in line with the large ones

logger = logging.getLogger(__name__)


@final
class _Source:
    """What a store shares with its thread and its fetches, which may outlive the store."""

    def __init__(self, files: PagedFiles, depth: int, queues: Callable[[int], ReadQueue] | None) -> None:
        self.files = files
        self.part_slots = max(-(-depth // NUM_PARTS), files.pages_per_row)
        num_slots = NUM_PARTS * self.part_slots
        if queues is not None:
            self.queues, self.queue = queues, queues(num_slots)
        else:
            self.queues, self.queue = _best_queues(files, num_slots)
        self.lanes: SimpleQueue[ReadQueue] = SimpleQueue()
        self.num_lanes, self.told_of_lanes = 0, False
        self.requests: SimpleQueue[weakref.ref[_LargeFetch] | None] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.lock, self.closed = threading.Lock(), False

    def take_lane(self) -> ReadQueue | None:
        """Returns a queue for one small fetch, with nothing in flight; None if none is left."""
        try:
            queue = self.lanes.get_nowait()
        except Empty:
            with self.lock:
                taken = self.num_lanes == NUM_LANES
                self.num_lanes += not taken
            why = f"{NUM_LANES} small reads are under way"
            if not taken:
                try:
                    return self.queues(SMALL)
                except OSError as error:  # the system has no more contexts; the thread has its own
                    why = f"the system gives no more queues: {error.strerror}"
            if not self.told_of_lanes:
                logger.info("%s: small reads wait behind large ones at times (%s).", self.files.name, why)
            self.told_of_lanes = True
            return None
        if queue.closed:  # Python may finalize a queue before the fetch that gives it back, if both are in a cycle
            try:
                return self.queues(SMALL)
            except OSError:
                self.lanes.put(queue)
                return None
        # The queue may still have reads of a fetch that was never waited for.
        while queue.in_flight and len(queue.collect(0, 0)[0]):
            pass
        if queue.in_flight:
            self.lanes.put(queue)
            return None
        return queue

    def ask(self, fetch: "_LargeFetch") -> None:
        """Has the thread read a fetch's rows, after those of earlier fetches."""
        with self.lock:
            if self.closed:  # just now, by another thread: the fetch is lost
                fetch.finish()
                return
            if self.thread is None:
                self.thread = threading.Thread(target=_serve, args=(self,), name="engrammar-disk", daemon=True)
                self.thread.start()
            self.requests.put(weakref.ref(fetch))

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.requests.put(None)


@final
class _SmallFetch(Fetch):
    """A fetch whose pages are all in flight; `wait` collects them in the caller's thread."""

    def __init__(self, source: _Source, queue: ReadQueue, rows_U: Ints) -> None:
        self._source, self._rows_U, self._lock = source, rows_U, threading.Lock()
        self._queue: ReadQueue | None = None
        page_P, self._begin_U = source.files.pages(source.files.addresses(rows_U))
        self._reads = PageReads(source.files, queue, 0, page_P)
        self._queue = queue
        self._rows_US: NDArray[np.uint8] | None = None
        self._missing_U: NDArray[np.bool_] | None = None
        self._message = ""

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        with self._lock:
            if self._queue is not None:
                # Removed for good: after an interruption, what is in flight in the queue is not known.
                queue, self._queue = self._queue, None
                if not self._source.closed:
                    self._collect(queue, seconds)
                    self._gather(seconds)
                self._source.lanes.put(queue)
            if self._rows_US is None:
                raise _lost(self._source, self._rows_U)
            if self._missing_U is not None:
                raise RowsMissing(self._message, self._missing_U, self._rows_US)
            return self._rows_US

    def _collect(self, queue: ReadQueue, seconds: float | None) -> None:
        reads, deadline = self._reads, None if seconds is None else time.monotonic() + seconds
        while reads.left:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            slot_D, result_D = queue.collect(-(-reads.left // 4), left)
            for slot, result in zip(slot_D.tolist(), result_D.tolist()):
                reads.take(slot, result)
            if left == 0:
                return

    def _gather(self, seconds: float | None) -> None:
        rows_US = self._reads.gather(self._begin_U).view(np.uint8).reshape(len(self._rows_U), -1)
        self._missing_U = self._reads.missing(self._begin_U)
        if self._missing_U is not None:
            first = int(self._missing_U.argmax())
            self._message = self._reads.explain(int(self._rows_U[first]), int(self._begin_U[first]), seconds)
        self._rows_US = rows_US

    def __del__(self) -> None:
        if self._queue is not None:  # it was never waited for
            self._source.lanes.put(self._queue)


@final
class _LargeFetch(Fetch):
    """Rows that the store's thread reads, slice by slice."""

    def __init__(self, source: _Source, rows_U: Ints) -> None:
        # given_up: whether rows that have not arrived are no longer wanted.
        self._source, self.rows_U, self.given_up = source, rows_U, False
        self._rows_US = np.empty((len(rows_U), source.files.row_bytes), np.uint8)
        self._have_U = np.zeros(len(rows_U), bool)
        self._lock, self._done = threading.Lock(), threading.Event()
        self._first_bad, self._message = len(rows_U), ""
        self._error: BaseException | None = None

    def put(self, place_V: Ints, reads: PageReads, begin_V: Ints) -> None:
        """Copies rows that were read to their places in the result."""
        missing_V = reads.missing(begin_V)
        with self._lock:
            if self.given_up:  # the caller owns the memory now
                return
            self._rows_US.view(f"V{self._rows_US.shape[1]}")[place_V, 0] = reads.gather(begin_V)
            self._have_U[place_V] = True if missing_V is None else ~missing_V
            if missing_V is not None and (place := int(place_V[missing_V].min())) < self._first_bad:
                (begin,) = begin_V[place_V == place].tolist()
                self._first_bad, self._message = place, reads.explain(int(self.rows_U[place]), begin)

    def finish(self, error: BaseException | None = None) -> None:
        """Marks the fetch as finished: all rows have arrived, or `error` stopped it."""
        self._error = error
        self._done.set()

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        in_time = self._done.wait(seconds)
        with self._lock:
            self.given_up = self.given_up or not in_time
            if self._error is not None:
                raise self._error
            if self._have_U.all():
                return self._rows_US
            missing_U = ~self._have_U
            first = int(missing_U.argmax())
            if first < self._first_bad:  # its pages were not checked yet
                if not self.given_up:
                    raise _lost(self._source, self.rows_U)
                row, files = int(self.rows_U[first]), self._source.files
                page = int(files.addresses(self.rows_U[first : first + 1])[0]) // PAGE
                self._first_bad, self._message = first, files.explain(row, page, NOT_READ, seconds)
            raise RowsMissing(self._message, missing_U, self._rows_US)


def _lost(source: _Source, rows_U: Ints) -> RowsMissing:
    files = source.files
    message = (
        f"Row {rows_U[0]} of {files.name} cannot be read, since its read from {files.paths[0].parent} was given up "
        "(the table was closed, or waiting was interrupted): ask for it again."
    )
    rows_US = np.empty((len(rows_U), files.row_bytes), np.uint8)
    return RowsMissing(message, np.ones(len(rows_U), bool), rows_US)


def _best_queues(files: PagedFiles, num_slots: int) -> tuple[Callable[[int], ReadQueue], ReadQueue]:
    """Returns a function that makes the best kind of queue for these files, and one such queue."""
    if files.direct:
        try:
            return AioQueue, AioQueue(num_slots)
        except OSError as error:
            logger.info("%s: threads read it, since Linux AIO cannot be used here (%s).", files.name, error.strerror)
    queues = thread_queues()
    return queues, queues(num_slots)


def _serve(source: _Source) -> None:
    """The store's thread: one large fetch after another, until the store is closed."""
    queue = source.queue
    try:
        while (request := source.requests.get()) is not None:
            fetch = request()
            if fetch is None:  # it was dropped
                continue
            try:
                if not source.closed:
                    _bring(source, queue, fetch)
                fetch.finish()
            except BaseException as error:
                fetch.finish(error)
                if queue.in_flight:
                    raise
            del fetch, request
    finally:
        source.close()
        while not source.requests.empty():
            request = source.requests.get()
            if request is not None and (fetch := request()) is not None:
                fetch.finish()
        queue.close()


def _bring(source: _Source, queue: ReadQueue, fetch: _LargeFetch) -> None:
    files = source.files
    address_U = files.addresses(fetch.rows_U)
    order_U = np.argsort(address_U)
    slices = _slices(address_U[order_U], files.row_bytes, source.part_slots)
    free, reading = list(range(NUM_PARTS)), {}
    try:
        while not (source.closed or fetch.given_up):
            for first, end in itertools.islice(slices, len(free)):
                place_V, part = order_U[first:end], free.pop()
                page_P, begin_V = files.pages(address_U[place_V])
                reading[part] = PageReads(files, queue, part * source.part_slots, page_P), place_V, begin_V
            if not reading:
                break
            slot_D, result_D = queue.collect(min(BATCH, queue.in_flight))
            for slot, result in zip(slot_D.tolist(), result_D.tolist()):
                part = slot // source.part_slots
                reads, place_V, begin_V = reading[part]
                reads.take(slot, result)
                if not reads.left:
                    fetch.put(place_V, reads, begin_V)
                    del reading[part]
                    free.append(part)
    finally:
        while queue.in_flight:
            queue.collect(queue.in_flight)


def _slices(address_U: Ints, row_bytes: int, most_pages: int) -> Iterator[tuple[int, int]]:
    """Cuts sorted rows into runs on at most `most_pages` pages each; yields the first row and one past the last.

    A page that two runs share is read twice.
    """
    first_U, last_U = address_U // PAGE, (address_U + row_bytes - 1) // PAGE
    added_U = last_U - first_U + 1  # pages that a row adds to those before it
    added_U[1:] = last_U[1:] - np.maximum(first_U[1:] - 1, last_U[:-1])
    pages_U, begin = np.cumsum(added_U), 0
    while begin < len(address_U):
        before = pages_U[begin] - (last_U[begin] - first_U[begin] + 1)
        end = int(np.searchsorted(pages_U, before + most_pages, "right"))
        yield begin, end
        begin = end


@final
class DiskStore(RowStore):
    """A table in its files. Several threads may fetch and wait at once.

    Args:
        depth: how many pages of large fetches are in flight at once.
        queues: makes queues of reads. None takes the best kind that this system and the files allow.

    Raises:
        ValueError: a file cannot be opened, or its checksums are those of another file.
    """

    def __init__(
        self, table: TableFile, *, depth: int = DEPTH, queues: Callable[[int], ReadQueue] | None = None
    ) -> None:
        check_setting("depth", depth, depth >= 1, "1 or more pages in flight")
        self.name = f"{table.name} in {table.shards[0].path.parent}"
        self.num_rows, self.row_bytes, self._settings = table.num_rows, table.row_bytes, (depth, queues)
        self._open(PagedFiles(table))

    def _open(self, files: PagedFiles) -> None:
        self.identity = files.identity
        self._source: _Source | None = _Source(files, *self._settings)
        self._process, self._end = os.getpid(), weakref.finalize(self, self._source.close)

    def _fetch(self, rows_U: Ints) -> Fetch:
        source = self._source
        if source is not None and self._process != os.getpid():
            # A fork has neither its parent's thread nor its reads.
            self._end.detach()
            self._open(source.files)
            source = self._source
        if source is None:
            raise ValueError(f"{self.name} is closed: open it again to read rows.")
        if not len(rows_U):
            return Arrived(np.empty((0, self.row_bytes), np.uint8))
        queue = source.take_lane() if len(rows_U) * source.files.pages_per_row <= SMALL else None
        if queue is not None:
            return _SmallFetch(source, queue, rows_U)
        fetch = _LargeFetch(source, rows_U)
        source.ask(fetch)
        return fetch

    def _detach(self) -> None:
        if self._source is not None:
            self._open(self._source.files)

    def close(self) -> None:
        source, self._source = self._source, None  # the files are closed with the last fetch that uses them
        if source is not None:
            self._end()
            if source.thread is not None:
                source.thread.join()
