"""Mooncake's own ways to read rows, measured in a process of their own: its library may abort or block."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PUT_AT_ONCE = 512


def draw(num_rows: int, row_bytes: int, num_read: int) -> tuple[Any, Any]:
    """The table's rows, and the distinct row numbers that every way reads."""
    random = np.random.default_rng(0)
    rows_RS = random.integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
    return rows_RS, random.permutation(num_rows)[:num_read]


def time_reads(read: Callable[[Any], Any], rows_RS: Any, rows_U: Any, call: int) -> float:
    """Seconds of reading rows, `call` at once. The rows are compared after the clock has stopped."""
    started = time.perf_counter()
    arrived = [read(rows_U[first : first + call]) for first in range(0, len(rows_U), call)]
    seconds = time.perf_counter() - started
    found = np.concatenate([np.frombuffer(values, np.uint8).reshape(-1, rows_RS.shape[1]) for values in arrived])
    assert np.array_equal(found, rows_RS[rows_U]), "wrong rows"
    return seconds


def peers(address: str, num_rows: int, row_bytes: int, num_read: int) -> Callable[[tuple[str, int]], float]:
    """Returns the function that gives the seconds of a way ("get_batch", ...) to read `num_read` rows, so many a call.

    It is for `asking`: what its process writes to stderr is thrown away, as the library logs much.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    from mooncake.store import EngramStore, EngramStoreConfig, MooncakeDistributedStore, ReplicateConfig

    rows_RS, rows_U = draw(num_rows, row_bytes, num_read)
    store, pinned = MooncakeDistributedStore(), ReplicateConfig()
    pinned.with_hard_pin = True
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 2**26, "tcp", "", address) == 0
    keys = {row: f"row/{row}" for row in rows_U.tolist()}

    def put(part: Any) -> bytes:
        store.batch_remove([keys[row] for row in part.tolist()], True)
        values = [rows_RS[row].tobytes() for row in part.tolist()]
        assert store.put_batch([keys[row] for row in part.tolist()], values, pinned) == 0
        return b"".join(values)

    def get(part: Any) -> bytes:
        return b"".join(store.get_batch([keys[row] for row in part.tolist()]))

    layout = EngramStoreConfig()
    layout.table_vocab_sizes, layout.embedding_dim = [num_rows], row_bytes // 4
    engram = EngramStore(0, layout, store)
    engram.populate([rows_RS.view(np.float32)])

    def look_up(part: Any) -> bytes:
        return engram.lookup(part.reshape(1, -1, 1)).tobytes()

    time_reads(put, rows_RS, rows_U, PUT_AT_ONCE)
    ways: dict[str, Callable[[Any], bytes]] = {"put_batch": put, "get_batch": get, "EngramStore": look_up}
    return lambda asked: time_reads(ways[asked[0]], rows_RS, rows_U, asked[1])
