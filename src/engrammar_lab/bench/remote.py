"""Rows from a Mooncake pool on this machine: our store against the client's own calls, on the same rows in one run."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engrammar.cells import Column
from engrammar.stores.mooncake.store import RemoteStore
from engrammar.stores.mooncake.upload import upload
from engrammar.tables.folder import Shard, TableFile
from engrammar_lab.bench.asking import asking
from engrammar_lab.bench.figures import line_by_line, named
from engrammar_lab.bench.loopback import LoopbackPool, why_no_pool
from engrammar_lab.bench.remote_peers import draw, peers, time_reads
from engrammar_lab.bench.turns import seconds_of

ROW_BYTES, WIDTH = 256, 128
NUM_ROWS, NUM_READ, ROUNDS = 2_000_000, 100_000, 3
QUICK_ROWS, QUICK_READ, QUICK_ROUNDS = 400_000, 10_000, 2
CALLS = (16, 512)  # rows of a token and of a prompt; the client's own calls lose rows above some thousands
BASELINE = "get_batch"
COLUMNS = (
    Column("way", "name"),
    Column("rows/s", "rows_per_second", ",.0f"),
    Column("MB/s", "mb_per_second", ",.1f"),
    Column("of get_batch", "share", ".2f"),
)
table = line_by_line(COLUMNS, lambda result: named(result["variants"]))


def bench_remote(quick: bool) -> dict[str, Any]:
    """Starts a pool on loopback and reads random rows from it, by our store and by the client's own calls in turn.

    Returns:
        per variant the best rows/s of the rounds, MB/s of rows, and its `share` of `get_batch` at as many rows a call
        (median over rounds; None if `get_batch` has no such call). If no pool can be started there are no variants,
        and `absent` says why.
    """
    num_rows, num_read, rounds = (QUICK_ROWS, QUICK_READ, QUICK_ROUNDS) if quick else (NUM_ROWS, NUM_READ, ROUNDS)
    absent = why_no_pool()
    return {
        "shapes": f"{num_read:,} distinct random rows of {ROW_BYTES} bytes out of {num_rows:,}, over TCP on loopback, "
        f"one reader, {rounds} rounds in turn",
        "absent": absent,
        "variants": {} if absent else _measure(num_rows, num_read, rounds),
    }


def _measure(num_rows: int, num_read: int, rounds: int) -> dict[str, Any]:
    rows_RS, rows_U = draw(num_rows, ROW_BYTES, num_read)
    room = 2 * num_rows * (ROW_BYTES + 4) + num_read * 1024 + 2**26
    with TemporaryDirectory() as folder, LoopbackPool(str(room)) as pool:
        written = _write(rows_RS, Path(folder))
        sent = num_rows / seconds_of(upload, written, "bench", pool.server)
        store = RemoteStore("bench", pool.server, num_rows=num_rows, row_bytes=ROW_BYTES, encoding="bf16")

        def read(part: NDArray[np.int64]) -> NDArray[np.uint8]:
            return store.fetch(part).wait()

        sizes = (num_rows, ROW_BYTES, num_read)
        with asking("Mooncake's own client", peers, pool.server.address, *sizes) as ask:
            found = [_round(read, ask, rows_RS, rows_U) for _ in range(rounds)]
        store.close()
    variants = {"upload": {"rows_per_second": sent, "mb_per_second": sent * ROW_BYTES / 1e6, "share": None}}
    for name in found[0]:
        baseline = f"{BASELINE}, {name.rpartition(', ')[2]}"
        best = max(one[name] for one in found)
        share = median(one[name] / one[baseline] for one in found) if baseline in found[0] else None
        variants[name] = {"rows_per_second": best, "mb_per_second": best * ROW_BYTES / 1e6, "share": share}
    return variants


def _round(
    read: Any, ask: Callable[[Any], float], rows_RS: NDArray[np.uint8], rows_U: NDArray[np.int64]
) -> dict[str, float]:
    """Rows/s of each variant, one after the other."""
    in_order_U = np.arange(len(rows_U))
    seconds = {}
    for call in CALLS:
        seconds[f"store, {call} a call"] = time_reads(read, rows_RS, rows_U, call)
        seconds[f"{BASELINE}, {call} a call"] = ask((BASELINE, call))
    seconds[f"EngramStore, {CALLS[-1]} a call"] = ask(("EngramStore", CALLS[-1]))
    seconds[f"put_batch, {CALLS[-1]} a call"] = ask(("put_batch", CALLS[-1]))
    seconds["store, all in one call"] = time_reads(read, rows_RS, rows_U, len(rows_U))
    seconds["store, rows in order"] = time_reads(read, rows_RS, in_order_U, len(rows_U))
    return {name: len(rows_U) / taken for name, taken in seconds.items()}


def _write(rows_RS: NDArray[np.uint8], folder: Path) -> TableFile:
    path = folder / "rows"
    path.write_bytes(rows_RS.data)
    shard = Shard(path=path, tensor="", start=0, first_row=0, num_rows=len(rows_RS), crc32=None)
    return TableFile(
        layer=0, name="bench", num_rows=len(rows_RS), width=WIDTH, encoding="bf16", scale=None, shards=(shard,)
    )


def verdict(result: dict[str, Any]) -> str:
    """Whether our store is as fast as the client's own call."""
    if result["absent"]:
        return f"Not measured: {result['absent']}."
    shares = " and ".join(f"{result['variants'][f'store, {call} a call']['share']:.2f}" for call in CALLS)
    return (
        f"The store, which checks every row, reaches {shares} of get_batch at {CALLS[0]} and {CALLS[1]} rows a call "
        "(the target is at least 0.8); in larger calls rows that lie near each other share a read."
    )
