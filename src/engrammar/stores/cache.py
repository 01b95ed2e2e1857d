"""A cache of rows in front of any store: some rows are pinned for good, the others are kept by how often they are read.

The memory is fixed: sets of eight places, and the hash of a row gives its set. Two places of a set are for young rows,
first in, first out: every row that is read goes there first. A row pushed out of the young places replaces the
least-read older row of its set if it was read more often; otherwise it is dropped (W-TinyLFU, arXiv:1512.00727).
So even a long scan passes through the young places only, and a text that repeats its own rows finds them there.
A sketch counts the rows that are not in the cache. All counts are halved over time, some with each admission.
Letters: U rows asked for (u: of one slice), V positions of them that missed, M distinct rows that are not in the cache,
A sets, W = 8 ways, P = A W places, S bytes of a row, K counts of the sketch.
"""

import copy
from typing import final

import numpy as np
from numpy.typing import NDArray

from engrammar.config import check_setting
from engrammar.stores.base import Arrived, Fetch, RowsMissing, RowStore
from engrammar.stores.shared import Segment, SharedLock, private_bytes

WAYS = 8
YOUNG = 2  # young rows of a set: fewer lower the hit rate of text, more that of rows drawn at random
HALVING = 20  # all counts are halved once per this many reads per row of the cache
SKETCH = 8  # at least this many counts in the sketch per row of the cache
SLICE = 4096  # rows looked up or admitted under one lock, which bounds how long others wait for it
PIN_BYTES = 2**24  # bytes of rows that `pin` reads at once
MOST = 255  # counts stop here
EMPTY = -1  # the tag of a place without a row

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

# Odd multipliers for multiplicative hashing: the golden ratio for sets, splitmix64's two for the sketch.
SET_HASH, *SKETCH_HASHES = (np.uint64(m) for m in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Eight bool bytes with one True, read as one uint64, are 256**way. Multiplying by WAY_OF moves `way` into the top
# three bits.
WAY_OF = np.uint64(sum(way << (61 - 8 * way) for way in range(WAYS)))


@final
class CachedStore(RowStore):
    """A store with its most-read rows in memory.

    Attributes:
        hits, misses: since the start or `reset_counts`, rows asked for that were in the cache, and that were not.
    """

    def __init__(self, store: RowStore, cache_rows: int, *, shared: bool = False) -> None:
        """
        Args:
            store: the store to read all other rows from; it is closed with the cache.
            cache_rows: how many rows to keep, rounded down to a multiple of 8.
            shared: all processes of this user with a cache of this size for this table use one; the last to close it
                frees it.

        Raises:
            ValueError: `cache_rows` is too small, or there is no room for them.
        """
        check_setting("cache_rows", cache_rows, cache_rows >= WAYS, f"{WAYS} or more")
        self.name, self.identity = store.name, store.identity
        self.num_rows, self.row_bytes = store.num_rows, store.row_bytes
        self._store = store
        num_sets = cache_rows // WAYS

        def clear(memory: Bytes) -> None:
            _Sets(memory, num_sets, self.row_bytes).tags_AW[:] = EMPTY

        num_bytes = _Sets.num_bytes(num_sets, self.row_bytes)
        self._segment = None
        if shared:
            content = f"{num_sets * WAYS} cached rows, {self.row_bytes} bytes each, of {store.name}, {store.identity}"
            # keep=False: killed processes may have left a row half written.
            self._segment = Segment(content, num_bytes, clear, keep=False)
            memory, self._lock = self._segment.bytes, self._segment.lock
        else:
            memory, self._lock = private_bytes(num_bytes), SharedLock()
            clear(memory)
        self._sets: _Sets | None = _Sets(memory, num_sets, self.row_bytes)
        self._num_asked = 0  # rows asked for since counts were last halved
        self.hits = self.misses = 0

    @property
    def hit_rate(self) -> float:
        """The share of the rows asked for that were in the cache; 0 before the first row."""
        return self.hits / max(self.hits + self.misses, 1)

    def reset_counts(self) -> None:
        with self._lock.reading:
            self.hits = self.misses = 0

    def pin(self, rows: Ints) -> int:
        """Pins rows in the order given, as long as there is room (7 of the 8 places of a set).

        Returns:
            How many of the distinct rows are pinned now.

        Raises:
            IndexError: a row is not in the table.
            OSError: a row could not be read.
        """
        outside = rows[(rows < 0) | (rows >= self.num_rows)]
        if len(outside):
            raise IndexError(f"Row {outside[0]} is outside {self.name}, which has rows 0 to {self.num_rows - 1}.")
        distinct, first = np.unique(rows, return_index=True)
        rows = distinct[np.argsort(first)]
        num_at_once = max(PIN_BYTES // self.row_bytes, 1)
        num_pinned = 0
        for start in range(0, len(rows), num_at_once):
            rows_M = rows[start : start + num_at_once]
            with self._lock.reading:
                pinned_M = self._open().are_pinned(rows_M)
            num_pinned += int(np.count_nonzero(pinned_M))
            rows_M = rows_M[~pinned_M]
            try:
                rows_MS = self._store.fetch(rows_M).wait()
            except RowsMissing as error:
                raise OSError(str(error)) from error  # not RowsMissing: its mask is not one of the caller's rows
            for at in range(0, len(rows_M), SLICE):
                with self._lock.writing:
                    num_pinned += self._open().pin(rows_M[at : at + SLICE], rows_MS[at : at + SLICE])
        return num_pinned

    def _fetch(self, rows_U: Ints) -> Fetch:
        rows_US = np.empty((len(rows_U), self.row_bytes), np.uint8)
        found_U = np.empty(len(rows_U), bool)
        num_found = 0
        for at in range(0, len(rows_U), SLICE):
            rows_u, end = rows_U[at : at + SLICE], at + SLICE
            with self._lock.reading:
                # Copied now and not in `wait`, when another row may be in the place.
                found_u = self._open().gather(rows_u, rows_US[at:end])
                found_U[at:end] = found_u
                num_here = int(np.count_nonzero(found_u))
                self.hits += num_here
                self.misses += len(rows_u) - num_here
                self._num_asked += len(rows_u)
            num_found += num_here
        if num_found == len(rows_U):
            return Arrived(rows_US)
        (missed_V,) = np.nonzero(~found_U)
        rows_M, which_V = np.unique(rows_U[missed_V], return_inverse=True)
        return _Filling(self, rows_M, rows_US, missed_V, which_V)

    def _admit(self, rows_M: Ints, rows_MS: Bytes) -> None:
        """Admits rows that were read, if they were read often enough."""
        for at in range(0, len(rows_M), SLICE):
            with self._lock.writing:
                if self._sets is None:
                    return
                self._num_asked -= self._sets.halve(self._num_asked)
                self._sets.admit(rows_M[at : at + SLICE], rows_MS[at : at + SLICE])

    def _open(self) -> "_Sets":
        if self._sets is None:
            raise ValueError(f"The cache of {self.name} is closed.")
        return self._sets

    def _detach(self) -> None:
        self._segment, self._store = None, copy.deepcopy(self._store)

    def close(self) -> None:
        with self._lock.writing:
            self._sets = None
        if self._segment is not None:
            self._segment.close()
        self._store.close()


@final
class _Filling(Fetch):
    """Rows of which those at V positions, M of them distinct, are being read from the cached store."""

    def __init__(self, cache: CachedStore, rows_M: Ints, rows_US: Bytes, missed_V: Ints, which_V: Ints) -> None:
        self._cache, self._rows_M, self._rows_US = cache, rows_M, rows_US
        self._missed_V, self._which_V = missed_V, which_V
        self._fetch: Fetch | None = cache._store.fetch(rows_M)

    def wait(self, seconds: float | None = None) -> Bytes:
        if self._fetch is None:
            return self._rows_US
        try:
            rows_MS = self._fetch.wait(seconds)
        except RowsMissing as error:
            self._take(error.rows_US, ~error.missing_U)
            missing_U = np.zeros(len(self._rows_US), bool)
            missing_U[self._missed_V] = error.missing_U[self._which_V]
            raise RowsMissing(str(error), missing_U, self._rows_US) from error
        self._take(rows_MS, slice(None))
        self._fetch = None
        return self._rows_US

    def _take(self, rows_MS: Bytes, good: NDArray[np.bool_] | slice) -> None:
        self._rows_US[self._missed_V] = rows_MS.take(self._which_V, 0, None, "clip")
        self._cache._admit(self._rows_M[good], rows_MS[good])


@final
class _Sets:
    """The cache's memory, and the operations on it, which are called under its lock.

    A process may be killed on any line. So a place is marked empty before its bytes change and is tagged afterwards,
    and operations without the exclusive lock change only counts.
    """

    def __init__(self, memory: Bytes, num_sets: int, row_bytes: int) -> None:
        num_places, num_counts = num_sets * WAYS, self._num_counts(num_sets)
        at = 0

        def take(num_bytes: int) -> Bytes:
            nonlocal at
            part = memory[at : at + num_bytes]
            at += -(-num_bytes // 64) * 64
            return part

        self.num_sets = np.uint64(num_sets)
        self.tags_AW = take(8 * num_places).view(np.int64).reshape(num_sets, WAYS)
        self.tags_P = self.tags_AW.reshape(-1)
        self.counts_P = take(num_places)
        self.counts_AW = self.counts_P.reshape(num_sets, WAYS)
        self.young_P = take(num_places)  # 2 for the newest row, 1 for the one before, 0 for the others
        self.young_AW = self.young_P.reshape(num_sets, WAYS)
        self.pinned_P = take(num_places).view(np.bool_)
        self.pinned_AW = self.pinned_P.reshape(num_sets, WAYS)
        self.sketch_K = take(num_counts)
        self.sketch_shift = np.uint64(64 - (num_counts - 1).bit_length())
        self.halved_to = take(8).view(np.int64)  # where the next halving starts
        self.rows_PS = take(num_places * row_bytes).reshape(num_places, row_bytes)

    @staticmethod
    def _num_counts(num_sets: int) -> int:
        return 1 << (num_sets * WAYS * SKETCH - 1).bit_length()

    @classmethod
    def num_bytes(cls, num_sets: int, row_bytes: int) -> int:
        """The size of the whole memory."""
        return num_sets * WAYS * (8 + 1 + 1 + 1 + row_bytes) + cls._num_counts(num_sets) + 7 * 64

    def gather(self, rows_U: Ints, rows_US: Bytes) -> NDArray[np.bool_]:
        """Copies the rows that are in the cache into `rows_US` and counts them; returns which ones they are."""
        place_U, found_U = self._find(rows_U)
        self.rows_PS.take(place_U, 0, rows_US, "clip")  # rows that are not in the cache get the bytes of some other row
        if not found_U.all():
            place_U = place_U[found_U]
        counts = self.counts_P.take(place_U, None, None, "clip")
        counts += counts != MOST
        self.counts_P[place_U] = counts
        return found_U

    def admit(self, rows_M: Ints, rows_MS: Bytes) -> None:
        """Counts distinct rows that were not in the cache, and admits the two most-read ones of each set."""
        (new,) = np.nonzero(~self._find(rows_M)[1])  # the others were admitted in the meantime
        count_M = self._estimate(rows_M[new])
        count_M += count_M != MOST
        self._remember(rows_M[new], count_M)
        order = np.argsort(-count_M, kind="stable")
        new, count_M = new[order], count_M[order]
        set_M = self._set(rows_M[new])
        rank_M = _rank(set_M)
        for turn in range(YOUNG):
            (now,) = np.nonzero(rank_M == turn)
            if not len(now):
                break
            place_M = self._make_room(set_M[now])
            self._write(place_M, rows_M[new[now]], rows_MS[new[now]], count_M[now])
            self.young_P[place_M] = 2

    def are_pinned(self, rows_M: Ints) -> NDArray[np.bool_]:
        place_M, found_M = self._find(rows_M)
        return found_M & self.pinned_P[place_M]

    def pin(self, rows_M: Ints, rows_MS: Bytes) -> int:
        """Pins distinct rows as long as there is room; returns how many of them are pinned now."""
        place_M, found_M = self._find(rows_M)
        pinned_M = found_M & self.pinned_P[place_M]  # by another process, in the meantime
        (new,) = np.nonzero(~pinned_M)
        set_M = self._set(rows_M[new])
        fits = _rank(set_M) < WAYS - 1 - np.count_nonzero(self.pinned_AW[set_M], 1)
        new, set_M = new[fits], set_M[fits]
        here = found_M[new]
        self._keep(place_M[new[here]])
        absent, set_M = new[~here], set_M[~here]
        rank_M = _rank(set_M)
        for turn in range(WAYS - 1):
            (now,) = np.nonzero(rank_M == turn)
            if not len(now):
                break
            place_now, _ = self._least(set_M[now], self.pinned_AW[set_M[now]])
            rows_now = rows_M[absent[now]]
            self._write(place_now, rows_now, rows_MS[absent[now]], self._estimate(rows_now))
            self._keep(place_now)
        return int(np.count_nonzero(pinned_M)) + len(new)

    def halve(self, num_asked: int) -> int:
        """Halves the counts that are due after `num_asked` rows; returns how many of these rows are settled by that."""
        num_places, num_counts = len(self.counts_P), len(self.sketch_K)
        due = min(num_asked // HALVING, num_places)
        start = int(self.halved_to[0])
        end = min(start + due, num_places)
        if end - start < min(SLICE, num_places - start):
            return 0
        self.counts_P[start:end] >>= 1
        self.sketch_K[start * num_counts // num_places : end * num_counts // num_places] >>= 1
        self.halved_to[0] = end % num_places
        return num_asked - (due - (end - start)) * HALVING  # at most one round is ever due

    def _find(self, rows_U: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """The place of each row, and whether the row is in it; if not, the place is some place of its set."""
        set_U = self._set(rows_U)
        same_UW = self.tags_AW.take(set_U, 0, None, "clip") == rows_U[:, None]
        way_U = same_UW.view("<u8").reshape(-1)
        found_U = way_U != 0
        way_U *= WAY_OF
        way_U >>= np.uint64(61)
        set_U *= WAYS
        set_U += way_U.view(np.int64)
        return set_U, found_U

    def _set(self, rows_U: Ints) -> Ints:
        hash_U = rows_U.view(np.uint64) * SET_HASH
        hash_U >>= np.uint64(32)
        hash_U *= self.num_sets
        hash_U >>= np.uint64(32)
        return hash_U.view(np.int64)

    def _sketched(self, rows_M: Ints) -> list[Ints]:
        """The two places where the sketch counts each row; the smaller count is the better estimate."""
        return [((rows_M.view(np.uint64) * hash_) >> self.sketch_shift).view(np.int64) for hash_ in SKETCH_HASHES]

    def _estimate(self, rows_M: Ints) -> Ints:
        first_M, second_M = self._sketched(rows_M)
        return np.minimum(self.sketch_K[first_M], self.sketch_K[second_M]).astype(np.int64)

    def _remember(self, rows_M: Ints, count_M: Ints | Bytes) -> None:
        for where_M in self._sketched(rows_M):
            self.sketch_K[where_M] = np.maximum(self.sketch_K[where_M], count_M)

    def _make_room(self, set_M: Ints) -> Ints:
        """Frees a place for a young row in each of M distinct sets."""
        young_MW, pinned_MW = self.young_AW[set_M], self.pinned_AW[set_M]
        num_free_M = WAYS - np.count_nonzero(pinned_MW, 1)
        full_M = np.count_nonzero(young_MW, 1) >= np.where(num_free_M < 2 * YOUNG, 1, YOUNG)
        oldest_M = set_M * WAYS + np.where(young_MW, young_MW, MOST).argmin(1)
        least_M, count_M = self._least(set_M, pinned_MW | (young_MW > 0))
        stays_M = full_M & (self.counts_P[oldest_M] > count_M)
        self.young_AW[set_M] = np.minimum(young_MW, 1)
        self.young_P[oldest_M[stays_M]] = 0
        return np.where(full_M & ~stays_M, oldest_M, least_M)

    def _least(self, set_M: Ints, kept_MW: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """The place with the smallest count in each set, and the count: -1 if empty, over MOST if all are kept."""
        count_MW = self.counts_AW[set_M].astype(np.int64)
        count_MW[self.tags_AW[set_M] == EMPTY] = -1
        count_MW[kept_MW] = MOST + 1
        way_M = count_MW.argmin(1)
        return set_M * WAYS + way_M, count_MW.min(1)

    def _keep(self, place_M: Ints) -> None:
        self.pinned_P[place_M] = True
        self.young_P[place_M] = 0

    def _write(self, place_M: Ints, rows_M: Ints, rows_MS: Bytes, count_M: Ints) -> None:
        """Writes rows into distinct places; the sketch remembers the counts of the rows that they replace."""
        old_M, old_count_M = self.tags_P[place_M], self.counts_P[place_M]
        gone = old_M != EMPTY
        self._remember(old_M[gone], old_count_M[gone])
        self.tags_P[place_M] = EMPTY
        self.rows_PS[place_M] = rows_MS
        self.counts_P[place_M] = count_M
        self.tags_P[place_M] = rows_M


def _rank(set_M: Ints) -> Ints:
    """For each entry, how many earlier entries equal it."""
    order = np.argsort(set_M, kind="stable")
    sorted_M = set_M[order]
    index_M = np.arange(len(set_M))
    starts = np.ones(len(set_M), bool)
    starts[1:] = sorted_M[1:] != sorted_M[:-1]
    rank_M = np.empty(len(set_M), np.int64)
    rank_M[order] = index_M - np.maximum.accumulate(np.where(starts, index_M, 0))
    return rank_M
