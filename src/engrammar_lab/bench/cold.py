"""Reads of rows that are only on disk, compared with what the disk itself can do.

Cold means: `os.sync`, the file's pages dropped from the page cache, and a fresh process for each way and round.
Letters: U rows, P pages.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from engrammar.cells import Column
from engrammar.stores.aio import AioQueue
from engrammar.tables.folder import TableFile
from engrammar.tables.headers import PAGE
from engrammar_lab.bench.figures import Figures, line_by_line, meets, named
from engrammar_lab.bench.files import drop_page_cache
from engrammar_lab.bench.large_file import draw_rows, in_fresh_process
from engrammar_lab.bench.readers import (
    ADVISED,
    DISK,
    ENGRAMDB,
    ENGRAMDB_PAGES,
    FROM_FILE,
    READERS,
    TAKE,
    pages_of,
    why_no_engramdb,
)
from engrammar_lab.bench.turns import seconds_of

SLOW = (TAKE, FROM_FILE)  # these read ahead: fewer rows, or one round, are enough
THREADS, DEPTHS = (16, 64, 128), (64, 256, 512)
LIMIT_TARGET, BYTES_TARGET, ENGRAMDB_TARGET = 0.85, 1.05, 1.5
NUM_CHECKED = 200
COLUMNS = (
    Column("cold", "name"),
    Column("rows/s", "rows_per_second", ",.0f"),
    Column("pages/s", "pages_per_second", ",.0f"),
    Column("of the limit", "share", ".1%"),
    Column("bytes read / distinct pages", "bytes", ".3f"),
)


def measure_cold(table: TableFile, way: str, num_rows: int, seed: int) -> dict[str, float]:
    """Seconds of one call, distinct pages of its rows, and bytes that came from the disk."""
    rows_U = draw_rows(table, num_rows, seed)
    (shard,) = table.shards
    os.sync()
    drop_page_cache(shard.path)
    read = READERS[way](table)
    process = psutil.Process()
    before, started = process.io_counters().read_bytes, time.perf_counter()
    rows_US = read(rows_U)
    seconds, num_bytes = time.perf_counter() - started, process.io_counters().read_bytes - before
    with shard.path.open("rb") as file:
        for row, found in zip(rows_U[:NUM_CHECKED].tolist(), rows_US):
            file.seek(shard.start + row * table.row_bytes)
            assert file.read(table.row_bytes) == found.tobytes(), f"{way} read row {row} wrongly"
    return {"seconds": seconds, "pages": len(pages_of(table, rows_U)), "bytes": num_bytes}


def measure_limit(table: TableFile, num_pages: int, seed: int) -> dict[str, float]:
    """Pages/s that the disk alone delivers, bypassing the page cache, to threads and to asynchronous reads."""
    (shard,) = table.shards
    random = np.random.default_rng(seed)
    handle = os.open(shard.path, os.O_RDONLY | os.O_DIRECT)
    rates = {}
    for kind, numbers, reading in (("threads", THREADS, _read_by_threads), ("AIO, depth", DEPTHS, _read_by_aio)):
        for number in numbers:
            page_P = np.unique(random.integers(0, shard.path.stat().st_size // PAGE, num_pages))
            queue = AioQueue(number)
            rates[f"{kind} {number}"] = len(page_P) / seconds_of(reading, handle, page_P, queue, number)
            queue.close()
    os.close(handle)
    return rates


def _read_by_threads(handle: int, page_P: np.ndarray, queue: AioQueue, num_threads: int) -> None:
    pages = iter(page_P.tolist())  # shared: each thread takes the next page when it is done with one

    def work(number: int) -> None:
        own = [queue.memory.data[number * PAGE : (number + 1) * PAGE]]
        for page in pages:
            assert os.preadv(handle, own, page * PAGE) == PAGE

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))


def _read_by_aio(handle: int, page_P: np.ndarray, queue: AioQueue, depth: int) -> None:
    slot_D, begin = np.arange(depth), 0
    while begin < len(page_P) or queue.in_flight:
        page_N = page_P[begin : begin + len(slot_D)]
        slot_N = slot_D[: len(page_N)]
        queue.start(np.full_like(slot_N, handle), page_N * PAGE, slot_N, np.ones_like(slot_N))
        begin += len(page_N)
        slot_D, result_D = queue.collect(max(1, depth // 8))
        assert (result_D == PAGE).all()


def bench_cold(quick: bool, table: TableFile) -> dict[str, Any]:
    """Reads rows of a cold file in every way, after measuring what the disk can do, in rounds.

    Returns:
        `limit`: pages/s of the disk by kind of read, the median of the rounds. `ways`: for each, the median rows/s and
        pages/s; `share`, its pages/s over the best of `limit` in the same round; and `bytes`, the bytes read over
        those of the distinct pages.
    """
    num_rows, rounds = (10_000, 1) if quick else (100_000, 3)
    num_slow = num_rows // 20 if quick else num_rows
    gib = table.num_rows * table.row_bytes / 2**30
    rivals = () if why_no_engramdb() else (ENGRAMDB, ENGRAMDB_PAGES)
    ways = (DISK, ADVISED, *rivals, *SLOW)  # our store next to the limit, which varies when others use the disk
    limits: list[dict[str, float]] = []
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(rounds):
        limits.append(in_fresh_process(measure_limit, table, num_rows, turn))
        for place, way in enumerate(ways):
            if way not in SLOW or turn == 0:
                count = num_slow if way in SLOW else num_rows
                # Each run draws its own rows: caches below the file system may still hold the pages of others.
                run = in_fresh_process(measure_cold, table, way, count, 1000 + turn * len(ways) + place)
                runs[way].append(run | {"rows": count})
    best = [max(limit.values()) for limit in limits]
    return {
        "shapes": f"cold file of {gib:g} GiB{' (smaller than it should be: hides read-ahead)' if quick else ''}, "
        f"256-byte rows, {num_rows:,} uniform rows in one call ({num_slow:,} for {' and '.join(SLOW)}), "
        f"{rounds} rounds in turn, a fresh process each",
        "limit": {kind: median(limit[kind] for limit in limits) for kind in limits[0]},
        "ways": {
            way: {
                "rows_per_second": median(run["rows"] / run["seconds"] for run in own),
                "pages_per_second": median(run["pages"] / run["seconds"] for run in own),
                "share": median(run["pages"] / run["seconds"] / limit for run, limit in zip(own, best)),
                "bytes": median(run["bytes"] / PAGE / run["pages"] for run in own),
            }
            for way, own in runs.items()
        },
    }


def _lines(result: Figures) -> list[Figures]:
    """The disk's limit, then each way."""
    best, unknown = max(result["limit"].values()), {"rows_per_second": None, "bytes": None}
    limits = {
        f"limit: 4 KiB, O_DIRECT, {kind}": {"pages_per_second": rate, "share": rate / best, **unknown}
        for kind, rate in result["limit"].items()
    }
    return named(limits | result["ways"])


table = line_by_line(COLUMNS, _lines)


def verdict(result: dict[str, Any]) -> str:
    """Our store compared with the disk's limit and the best of the others, and whether the target is met."""
    ways, own = result["ways"], result["ways"][DISK]
    kind, rate = max(result["limit"].items(), key=lambda item: item[1])
    text = (
        f"The disk does {rate:,.0f} random 4 KiB reads/s at best ({kind}). {DISK}, checksums included, reads "
        f"{own['share']:.2f} of the best of its round ({meets(own['share'] >= LIMIT_TARGET, LIMIT_TARGET)}), and "
        f"{own['bytes']:.3f} times the bytes of the distinct pages "
        f"({meets(own['bytes'] <= BYTES_TARGET, f'at most {BYTES_TARGET}')})."
    )
    rivals = [way for way in (ENGRAMDB, ENGRAMDB_PAGES) if way in ways]
    if rivals:
        best = max(rivals, key=lambda way: ways[way]["rows_per_second"])
        times = own["rows_per_second"] / ways[best]["rows_per_second"]
        target = meets(times >= ENGRAMDB_TARGET, ENGRAMDB_TARGET)
        text += f" That is {times:.2f} times engramdb's best, its {best.removeprefix('engramdb ')} ({target})."
    else:
        text += f" engramdb was not measured: {why_no_engramdb()}."
    plain = own["rows_per_second"] / ways[TAKE]["rows_per_second"]
    return text + f" {TAKE} reads {ways[TAKE]['bytes']:.0f} times those bytes: {DISK} is {plain:.0f} times as fast."
