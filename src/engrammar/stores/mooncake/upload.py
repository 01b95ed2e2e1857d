"""Sends a table from its files into a Mooncake Store pool, for `store.py` to read (docs/remote-tables.md).

Letters: U rows of a piece, S bytes of a row, W = S + 4 with the checksum.
"""

import hashlib
import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.config import Geometry
from engrammar.stores.base import RowStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.mooncake.pool import Pool, PoolLost, PoolServer
from engrammar.stores.mooncake.store import CRC_BYTES, Note, hash_geometry, note_key, read_note, row_sums
from engrammar.tables.folder import TableFile

PIECE_BYTES = 2**24
NO_ROOM = -200  # the pool's answer if it is full


def upload(table: TableFile, name: str, server: PoolServer, *, geometry: Geometry | None = None) -> int:
    """Sends a table in pieces, then the note that makes it readable. Pieces that are there already are not sent again.

    It takes the memory of three pieces, whatever the table's size. A table that had this name before is removed last.

    Args:
        name: the table's name in the pool.
        geometry: the model's geometry, which stores compare when they open the table.

    Returns:
        The number of pieces sent.

    Raises:
        ValueError: a shard is shorter than its header says, or the client is not installed.
        OSError: a row is damaged, or the pool does not answer or has no room; says how many pieces are there.
    """
    note = Note(
        num_rows=table.num_rows,
        row_bytes=table.row_bytes,
        encoding=table.encoding,
        geometry=hash_geometry(geometry) if geometry else "",
        piece_rows=max(1, PIECE_BYTES // (table.row_bytes + CRC_BYTES)),
        upload=_identify(table),
    )
    keys = note.keys(name)
    pool, there, rows = None, 0, DiskStore(table)  # checks every page that it reads
    try:
        pool = Pool(server, min(note.piece_rows, note.num_rows) * (note.row_bytes + CRC_BYTES), server.seconds)
        before = read_note(pool, name, server.seconds)
        found = pool.ask("exist", server.seconds, keys=keys)
        there = found.count(1)
        absent = [piece for piece, answer in enumerate(found) if answer != 1]
        with tqdm(absent, desc=f"uploading {name}", unit=" pieces", delay=2, leave=False) as pieces:
            for piece in pieces:
                size = _lay_out(rows, note, piece, pool.memory)
                _require(pool.ask("put", server.seconds, key=keys[piece], start=0, size=size), f"piece {piece}")
                there += 1
        _require(pool.ask("note", server.seconds, key=note_key(name), text=json.dumps(asdict(note))), "the note")
        if before is not None and before.upload != note.upload:
            pool.ask("remove", server.seconds, keys=before.keys(name))
        return len(absent)
    except PoolLost as error:
        raise OSError(
            f"{table.name} could not be sent to the Mooncake pool at {server.address} ({error}); {there} of "
            f"{len(keys)} pieces ({note.num_rows * (note.row_bytes + CRC_BYTES) / 1e9:.3g} GB in all) are there. See "
            "that mooncake_master runs there and that its mooncake_client processes have room (--global_segment_size), "
            "and run the same command again, which goes on from there."
        ) from error
    finally:
        rows.close()
        if pool is not None:
            pool.close()


def _require(code: int, what: str) -> None:
    if code != 0:
        raise PoolLost(f"{what} was refused with error {code}" + (", no room" if code == NO_ROOM else ""))


def _identify(table: TableFile) -> str:
    """An id that differs between tables of the same name: from their checksums or, without any, from size and date."""
    hashed = hashlib.sha256(f"{table.num_rows} {table.row_bytes} {table.encoding} {table.scale}".encode())
    for shard in table.shards:
        status = shard.path.stat()
        dated = f"{status.st_size} {status.st_mtime_ns}".encode()
        hashed.update(shard.crc32.read_bytes() if shard.crc32 else dated)
    return hashed.hexdigest()[:16]


def _lay_out(rows: RowStore, note: Note, piece: int, memory: NDArray[np.uint8]) -> int:
    """Writes a piece's rows and their checksums to the start of `memory`; returns how many bytes they take."""
    first = piece * note.piece_rows
    rows_U = np.arange(first, min(first + note.piece_rows, note.num_rows))
    values_US = rows.fetch(rows_U).wait()
    size = len(rows_U) * (note.row_bytes + CRC_BYTES)
    piece_UW = memory[:size].reshape(len(rows_U), -1)
    piece_UW[:, : note.row_bytes] = values_US
    piece_UW[:, note.row_bytes :] = row_sums(values_US, rows_U, note.upload).astype("<u4")[:, None].view(np.uint8)
    return size
