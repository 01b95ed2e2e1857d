"""Memory that stores take: in several processes that share one table, and over a long series of fetches.

Letters: U rows of a call.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from threading import Barrier
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from engrammar.cells import Column
from engrammar.stores.base import RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.ram import RamStore
from engrammar.tables.folder import TableFile
from engrammar.tables.headers import PAGE
from engrammar_lab.bench.figures import Figures, line_by_line, slashed
from engrammar_lab.bench.files import drop_page_cache, pages_in_cache
from engrammar_lab.bench.large_file import draw_rows, first_rows, in_fresh_process
from engrammar_lab.bench.readers import CACHED, RAM

NUM_PROCESSES = (1, 2, 4)
NUM_SETS = 3  # sets of rows, read in turn again and again
ROWS_PER_TOKEN = 16
MIB = 2**20
COLUMNS = (
    Column("memory", "name"),
    Column("processes", "processes"),
    Column("MiB of rows, or bound", "bytes", ",.0f", MIB),
    Column("MiB taken", "memory", ",.0f", MIB),
    Column("not shared", "own", ",.0f", MIB),
    Column("million rows/s together", "rows_per_second", ".3g", 1e6),
)


def memory_of_process() -> tuple[int, int]:
    """Bytes mapped from files and shared memory, each divided by the processes that map it (PSS), and private bytes."""
    with open("/proc/self/smaps_rollup") as file:
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Pss")}
    return sizes["Pss:"] - sizes["Pss_Anon:"], sizes["Pss_Anon:"]


def _open(kind: str, table: TableFile) -> tuple[RowStore, int]:
    """The store, and the number of bytes of its rows."""
    if kind == RAM:
        return RamStore(table, shared=True), table.num_rows * table.row_bytes
    cache_rows = table.num_rows // 2
    return CachedStore(DiskStore(table), cache_rows, shared=True), cache_rows * table.row_bytes


def _work(kind: str, table: TableFile, plan: tuple[int, float], barrier: Barrier) -> dict[str, float]:
    (num_rows, seconds), before = plan, memory_of_process()
    store, num_bytes = _open(kind, table)
    sets = [draw_rows(table, num_rows, seed) for seed in range(NUM_SETS)]
    for rows_U in sets * 3:
        store.fetch(rows_U).wait()
    barrier.wait()
    started, num_calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        store.fetch(sets[num_calls % NUM_SETS]).wait()
        num_calls += 1
    rate = num_calls * num_rows / (time.perf_counter() - started)
    if kind == RAM:
        for first in range(0, table.num_rows, num_rows):  # touch all of it: the whole table counts
            store.fetch(np.arange(first, min(first + num_rows, table.num_rows))).wait()
    del sets, rows_U
    barrier.wait()
    shared, own = (after - earlier for after, earlier in zip(memory_of_process(), before))
    barrier.wait()  # no process closes its store while another one counts
    store.close()
    return {"rows_per_second": rate, "shared": shared, "own": own, "bytes": num_bytes}


def measure_processes(kind: str, table: TableFile, num_processes: int, plan: tuple[int, float]) -> dict[str, float]:
    """Runs processes on one table together; each asks for the rows of a call again and again for some seconds.

    Returns:
        `rows_per_second` of all processes together; `memory`, what opening and reading added to the memory of all, and
        `own`, the part of it that they do not share; `bytes` of the rows.
    """
    context = get_context("forkserver")
    with context.Manager() as manager, ProcessPoolExecutor(num_processes, context) as pool:
        barrier = manager.Barrier(num_processes, timeout=600)
        waiting = [pool.submit(_work, kind, table, plan, barrier) for _ in range(num_processes)]
        runs = [one.result() for one in waiting]
    return {
        "processes": num_processes,
        "rows_per_second": sum(run["rows_per_second"] for run in runs),
        "memory": sum(run["shared"] + run["own"] for run in runs),
        "own": sum(run["own"] for run in runs),
        "bytes": runs[0]["bytes"],
    }


def measure_long_run(table: TableFile, num_tokens: int, tokens_per_call: int) -> dict[str, float]:
    """The most memory and page cache that many fetches add, and what they may add. Rows follow Zipf's law, as words."""
    path, cache_rows = table.shards[0].path, table.num_rows // 10
    drop_page_cache(path)
    num_pages = table.num_rows * table.row_bytes // PAGE
    # Per place: row, tag, count and mark, and up to 16 counts in the sketch. Per page: a checksum. Calls and staging.
    bound = cache_rows * (table.row_bytes + 10 + 16) + 4 * num_pages + 64 * MIB
    process, cached, random = psutil.Process(), pages_in_cache(path), np.random.default_rng(0)
    memory = process.memory_info().rss
    store = CachedStore(DiskStore(table), cache_rows)
    most, num_calls = 0, num_tokens // tokens_per_call
    started = time.perf_counter()
    for call in range(num_calls):
        rank_U = table.num_rows ** random.random(tokens_per_call * ROWS_PER_TOKEN)
        rows_U = (rank_U.astype(np.int64) * 0x9E3779B1) % table.num_rows
        store.fetch(rows_U).wait()
        if call % 16 == 0 or call == num_calls - 1:
            grown = process.memory_info().rss - memory + PAGE * (pages_in_cache(path) - cached)
            most = max(most, grown)
    rate = num_calls * tokens_per_call * ROWS_PER_TOKEN / (time.perf_counter() - started)
    hit_rate = store.hits / (store.hits + store.misses)
    store.close()
    return {"rows_per_second": rate, "memory": most, "bytes": bound, "hit_rate": hit_rate, "tokens": num_tokens}


def bench_footprint(quick: bool, file: TableFile) -> dict[str, Any]:
    """Opens one table in several processes at once, and reads a long series of rows through a cache of a tenth of it.

    Returns:
        `shared`: per store, what `measure_processes` returns for each number of processes. `long`: what
        `measure_long_run` returns.
    """
    warm_gib, plan = (0.0625, (20_000, 0.1)) if quick else (1, (100_000, 5.0))
    num_tokens = 10_240 if quick else 1_000_000
    gib = file.num_rows * file.row_bytes / 2**30
    table = first_rows(file.shards[0].path, int(warm_gib * 2**30), 256)
    return {
        "shapes": f"shared: {warm_gib:g} GiB of 256-byte rows, {plan[0]:,} uniform rows a call, the cache as large as "
        f"half of them; long: {num_tokens:,} tokens of {ROWS_PER_TOKEN} Zipf rows over {gib:g} GiB, "
        "a cache of a tenth of the rows",
        "shared": {
            kind: [measure_processes(kind, table, count, plan) for count in NUM_PROCESSES] for kind in (RAM, CACHED)
        },
        "long": in_fresh_process(measure_long_run, file, num_tokens, 1024),
    }


def _lines(result: Figures) -> list[Figures]:
    """Each store with each number of processes, then the long run."""
    shared = [{"name": f"{kind}, shared", **run} for kind, runs in result["shared"].items() for run in runs]
    long = result["long"]
    alone = {"name": f"{CACHED}, {long['tokens']:,} tokens", "processes": 1, "own": long["memory"]}
    return [*shared, long | alone]


table = line_by_line(COLUMNS, _lines)


def verdict(result: dict[str, Any]) -> str:
    """Whether several processes hold one copy, and whether a long run stays within its bound."""
    sentences = []
    for kind, runs in result["shared"].items():
        shared = [run["memory"] - run["own"] for run in runs]
        counts = slashed((run["processes"] for run in runs), "d")
        own = slashed((run["own"] / run["processes"] / MIB for run in runs), ",.0f")
        rates = slashed((run["rows_per_second"] / 1e6 for run in runs), ".3g")
        more = max(shared) - shared[0] > runs[0]["bytes"] / 2  # each process's staging memory counts as shared too
        copies = "MORE THAN ONE COPY" if more else "one copy"
        sentences.append(
            f"{counts} processes on one {kind} share {slashed((size / MIB for size in shared), ',.0f')} MiB ({copies}) "
            f"and have {own} MiB each of their own; they read {rates} million rows/s together."
        )
    run = result["long"]
    holds = "stays under" if run["memory"] <= run["bytes"] else "BREAKS"
    sentences.append(
        f"Over {run['tokens']:,} tokens ({run['hit_rate']:.0%} of their rows were in the cache), resident memory and "
        f"page cache grew by {run['memory'] / MIB:,.0f} MiB at most, which {holds} the bound of "
        f"{run['bytes'] / MIB:,.0f} MiB."
    )
    return " ".join(sentences)
