"""Rows in the memory of other machines: a Mooncake Store pool (docs/remote-tables.md).

A table is stored as pieces of consecutive rows, one key each, and a note that describes them. In its piece a row is S
bytes followed by their CRC-32, which starts from the row's number and the id of the upload. So a flipped bit is
noticed, and also another row, or a row of another table, in its place.
Letters: U rows asked for, D distinct ones in ascending order, L of them that are still missing, G ranges, S bytes of a
row, W = S + 4 with the checksum.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from engrammar.config import Encoding, Geometry
from engrammar.stores.base import Arrived, Fetch, RowsMissing, RowStore
from engrammar.stores.mooncake.pool import IN_FLIGHT, Pool, PoolLost, PoolServer

CRC_BYTES = 4
GAP_BYTES = 2**14  # nearer rows are read as one range: a range costs about as much as this many bytes
RANGE_BYTES = 2**17
SLICE_RANGES = 256  # ranges of one message; the library loses ranges if some thousands are in flight
SLICE_BYTES = 2**21
ADVICE = "see that mooncake_master and mooncake_client run there and that the table is uploaded"


@dataclass(frozen=True, kw_only=True)
class Note:
    """Describes a table in the pool; it is kept beside the table's pieces."""

    # The table's rows, S, and how a row is stored.
    num_rows: int
    row_bytes: int
    encoding: Encoding
    geometry: str  # `hash_geometry` of the geometry of its addresses; empty if that is not known
    piece_rows: int  # rows of a piece; the last piece may have fewer
    upload: str  # the id in the pieces' keys; another table uploaded under the same name has another id

    def keys(self, table: str) -> list[str]:
        """The keys of the pieces, in order."""
        return [f"{table}/{self.upload}/{piece}" for piece in range(-(-self.num_rows // self.piece_rows))]


def note_key(table: str) -> str:
    """The key of a table's note."""
    return f"{table}/table.json"


def hash_geometry(geometry: Geometry) -> str:
    """SHA-256 of the integers that decide every address."""
    return hashlib.sha256(json.dumps(geometry.to_json(), sort_keys=True).encode()).hexdigest()


def row_sums(rows_US: NDArray[np.uint8], rows_U: NDArray[np.int64], upload: str) -> NDArray[np.uint32]:
    """CRC-32 of each row, which starts from the row's number and the id of the upload."""
    data, size = np.ascontiguousarray(rows_US).data.cast("B"), rows_US.shape[1]
    starts = ((rows_U & 0xFFFFFFFF) ^ zlib.crc32(upload.encode())).tolist()
    sums = (zlib.crc32(data[i * size : (i + 1) * size], start) for i, start in enumerate(starts))
    return np.fromiter(sums, dtype=np.uint32, count=len(rows_U))


def read_note(pool: Pool, table: str, seconds: float) -> Note | None:
    """Reads the note of a table; None if there is none. Raises a ValueError if the value there is not a note."""
    text = pool.ask("text", seconds, key=note_key(table))
    if not text:
        return None
    try:
        note = Note(**json.loads(text))
        counts = (note.num_rows, note.row_bytes, note.piece_rows)
        if any(type(count) is not int or not 1 <= count < 2**40 for count in counts):
            raise ValueError(f"{counts} are not counts of rows and bytes")
        return note
    except (ValueError, TypeError) as error:
        raise ValueError(f"{note_key(table)} in the pool is not what upload writes ({error}): upload again.") from error


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The rows of one message to the pool, as ranges of pieces that are read into shared memory end to end."""

    # The message's rows are `first` to `last` - 1 of the distinct rows.
    first: int
    last: int
    # The piece of each range, its first byte there, and its number of bytes.
    piece_G: NDArray[np.int64]
    start_G: NDArray[np.int64]
    size_G: NDArray[np.int64]
    range_D: NDArray[np.int64]  # the range of each row
    place_D: NDArray[np.int64]  # the place of each row among the rows that arrive


def cut_slices(rows_D: NDArray[np.int64], note: Note) -> Iterator[Slice]:
    """Cuts distinct ascending rows into messages, each row in one of them; neighboring rows are read together."""
    width = note.row_bytes + CRC_BYTES
    piece_D, start_D = rows_D // note.piece_rows, rows_D % note.piece_rows * width
    opens_D = np.ones(len(rows_D), dtype=bool)
    opens_D[1:] = (np.diff(piece_D) != 0) | (np.diff(start_D) > width + GAP_BYTES)
    opens_D[1:] |= np.diff(start_D // RANGE_BYTES) != 0
    opening_G = np.flatnonzero(opens_D)
    closing_G = np.append(opening_G[1:], len(rows_D)) - 1
    size_G = start_D[closing_G] - start_D[opening_G] + width
    end_G = np.cumsum(size_G)
    group = 0
    while group < len(opening_G):
        before = end_G[group] - size_G[group]
        fits = int(np.searchsorted(end_G, before + SLICE_BYTES, side="right"))
        after = max(group + 1, min(fits, group + SLICE_RANGES))
        first, last = int(opening_G[group]), int(closing_G[after - 1]) + 1
        range_D = np.cumsum(opens_D[first:last]) - 1 + group  # the range of each row
        into_D = start_D[first:last] - start_D[opening_G[range_D]]
        place_D = (end_G[range_D] - size_G[range_D] - before + into_D) // width
        yield Slice(
            first=first,
            last=last,
            piece_G=piece_D[opening_G[group:after]],
            start_G=start_D[opening_G[group:after]],
            size_G=size_G[group:after],
            range_D=range_D - group,
            place_D=place_D,
        )
        group = after


@final
class RemoteStore(RowStore):
    """A table in a pool. Each row is checked; failed rows are asked for once more, over a new connection."""

    def __init__(
        self,
        table: str,
        server: PoolServer,
        *,
        num_rows: int,
        row_bytes: int,
        encoding: Encoding,
        geometry: Geometry | None = None,
    ) -> None:
        """Connects, and checks that the pool holds the table that the model needs.

        Args:
            table: the name that the table was uploaded under.
            num_rows, row_bytes, encoding: what the table must have.
            geometry: the model's geometry, which the table must have too; None does not compare it.

        Raises:
            ValueError: the pool has no such table, only part of it, or another one; or the client is not installed.
            OSError: no server answers.
        """
        self.name = f"table {table!r} in the Mooncake pool at {server.address}"
        self.num_rows, self.row_bytes = num_rows, row_bytes
        self.server = server
        self._slot_bytes = SLICE_BYTES + RANGE_BYTES + row_bytes + CRC_BYTES
        self._pool: Pool | None = None
        self._closed = False
        try:
            self._note = self._find_note(table, encoding, geometry)
            self._keys = self._note.keys(table)
            self.identity = f"{self.name}, upload {self._note.upload}"
            self._check_pieces()
        except PoolLost as error:
            self._disconnect()
            raise OSError(f"Cannot open {self.name} ({error}): {ADVICE}.") from error
        except BaseException:
            self._disconnect()
            raise
        self._start_reader()

    def _start_reader(self) -> None:
        self._owner, self._reader = os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="remote rows")

    def _find_note(self, table: str, encoding: Encoding, geometry: Geometry | None) -> Note:
        note = read_note(self._connect(), table, self.server.seconds)
        if note is None:
            raise ValueError(f"There is no {self.name}: upload it (docs/remote-tables.md).")
        wanted: dict[str, int | str] = {"num_rows": self.num_rows, "row_bytes": self.row_bytes, "encoding": encoding}
        if geometry is not None and note.geometry:
            wanted["geometry"] = hash_geometry(geometry)
        for setting, value in wanted.items():
            if (found := getattr(note, setting)) != value:
                raise ValueError(
                    f"The {self.name} has {setting} {found!r}, this model needs {value!r}: upload the right table."
                )
        return note

    def _check_pieces(self) -> None:
        found = self._connect().ask("exist", self.server.seconds, keys=self._keys)
        absent = [key for key, there in zip(self._keys, found) if there != 1]
        if absent:
            raise ValueError(
                f"The {self.name} lacks {len(absent)} of {len(self._keys)} pieces, the first is {absent[0]}: "
                "upload it again, which sends only those."
            )

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        if not rows_U.size:
            return Arrived(np.empty((0, self.row_bytes), np.uint8))
        if self._closed:
            raise ValueError(f"The {self.name} is closed: open it again to read rows.")
        if self._owner != os.getpid():  # a fork has neither the thread nor its own connection
            self._disconnect()
            self._start_reader()
        rows_U = rows_U.copy()  # the caller may change theirs while the thread reads
        return RemoteFetch(self, rows_U, self._reader.submit(self._read, rows_U))

    def _detach(self) -> None:
        self._pool = None
        self._start_reader()

    def close(self) -> None:
        self._closed = True
        if self._owner == os.getpid():
            self._reader.shutdown(cancel_futures=True)
        self._disconnect()

    def _connect(self) -> Pool:
        if self._pool is None:
            self._pool = Pool(self.server, IN_FLIGHT * self._slot_bytes, self.server.seconds / 2)
        return self._pool

    def _disconnect(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _read(self, rows_U: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Reads rows in the order asked for; rows that do not arrive are asked for once more, over a new connection."""
        rows_D, place_U = np.unique(rows_U, return_inverse=True)
        rows_DS = np.empty((len(rows_D), self.row_bytes), np.uint8)
        missing_D, reason = np.ones(len(rows_D), dtype=bool), ""
        for _ in range(2):
            reason = self._read_missing(rows_D, rows_DS, missing_D)
            if not missing_D.any():
                return rows_DS[place_U]
            self._disconnect()
        first, others = rows_D[missing_D][0], int(missing_D.sum()) - 1
        raise RowsMissing(
            f"Row {first} and {others} more of {self.name} could not be had ({reason}): {ADVICE}.",
            missing_D[place_U],
            rows_DS[place_U],
        )

    def _read_missing(self, rows_D: NDArray[np.int64], rows_DS: NDArray[np.uint8], missing_D: NDArray[np.bool_]) -> str:
        """Asks once for the missing rows, some slices at a time; marks what arrived and returns why others did not."""
        wanted_L = np.flatnonzero(missing_D)
        reason = ""
        try:
            pool = self._connect()
            under_way = list[tuple[int, NDArray[np.uint8], Slice]]()
            slices = enumerate(cut_slices(rows_D[wanted_L], self._note))
            while True:
                while len(under_way) < IN_FLIGHT and (following := next(slices, None)):
                    under_way.append(self._ask(pool, len(wanted_L), *following))
                if not under_way:
                    return reason
                number, slot, cut = under_way.pop(0)
                got = pool.receive(number, self.server.seconds / 4)
                to_D = wanted_L[cut.first : cut.last]
                values_DS, whole_D = self._check(slot, cut, got, rows_D[to_D])
                rows_DS[to_D[whole_D]] = values_DS[whole_D]
                missing_D[to_D[whole_D]] = False
                reason = reason if whole_D.all() else self._reason(cut, got)
        except PoolLost as error:
            return str(error)

    def _ask(self, pool: Pool, num_wanted: int, index: int, cut: Slice) -> tuple[int, NDArray[np.uint8], Slice]:
        """Asks for a slice; returns the number of the answer, the memory for its bytes, and the slice."""
        base = index % IN_FLIGHT * self._slot_bytes
        begins = [0, *(np.flatnonzero(np.diff(cut.piece_G)) + 1).tolist()]
        parts = [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(cut.piece_G)])]
        start, size = cut.start_G.tolist(), cut.size_G.tolist()
        to = (base + np.cumsum(cut.size_G) - cut.size_G).tolist()
        number = pool.send(
            "read",
            alone=cut.last - cut.first == num_wanted,
            keys=[self._keys[cut.piece_G[begin]] for begin in begins],
            to=[to[part] for part in parts],
            start=[start[part] for part in parts],
            size=[size[part] for part in parts],
        )
        return number, pool.memory[base : base + sum(size)], cut

    def _check(
        self, slot: NDArray[np.uint8], cut: Slice, got: list[int], rows_D: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Returns the slice's rows, and which of them arrived undamaged."""
        stored_DW = slot.reshape(-1, self.row_bytes + CRC_BYTES)[cut.place_D]
        values_DS = np.ascontiguousarray(stored_DW[:, : self.row_bytes])
        sums_D = np.ascontiguousarray(stored_DW[:, self.row_bytes :]).view("<u4")[:, 0]
        key_G = np.append(0, np.cumsum(np.diff(cut.piece_G) != 0))
        whole_G = np.equal(got, np.bincount(key_G, cut.size_G))[key_G]
        return values_DS, whole_G[cut.range_D] & (row_sums(values_DS, rows_D, self._note.upload) == sums_D)

    def _reason(self, cut: Slice, got: list[int]) -> str:
        for piece, answer in zip(np.unique(cut.piece_G).tolist(), got):
            if answer < 0:
                return f"{self._keys[piece]} answered error {answer}"
        return "checksums do not fit"


@final
class RemoteFetch(Fetch):
    """Rows that are read by the store's thread."""

    def __init__(self, store: RemoteStore, rows_U: NDArray[np.int64], reading: Future[NDArray[np.uint8]]) -> None:
        self.store, self.rows_U, self.reading = store, rows_U, reading

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        try:
            return self.reading.result(seconds)
        except TimeoutError:
            self.reading.cancel()  # a read that has not started never will: reads must not pile up for a dead pool
            raise self._missing(f"did not arrive within {seconds:.3g} s: {ADVICE}, or wait longer") from None
        except CancelledError:
            raise self._missing(
                "were given up, since an earlier wait ran out of time or the store was closed: ask for them again"
            ) from None

    def _missing(self, why: str) -> RowsMissing:
        return RowsMissing(
            f"Row {self.rows_U[0]} and {len(self.rows_U) - 1} more of {self.store.name} {why}.",
            np.ones(len(self.rows_U), dtype=bool),
            np.empty((len(self.rows_U), self.store.row_bytes), np.uint8),
        )
