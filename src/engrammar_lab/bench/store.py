"""How fast rows are read from tables in memory; its parts read from cold disks, in several processes, and over a wire.

Letters: R rows of the table, U rows of a call, S bytes of a row.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engrammar.cells import Column, Lines, cells, titles
from engrammar_lab.bench import cold, footprint, remote
from engrammar_lab.bench.large_file import draw_rows, first_rows, in_fresh_process, large_table
from engrammar_lab.bench.readers import (
    CACHED,
    DISK,
    ENGRAMDB,
    FROM_FILE,
    RAM,
    READERS,
    TAKE,
    Read,
    why_no_engramdb,
)
from engrammar_lab.bench.turns import in_turn
from engrammar_lab.machine import describe_run

WAYS = (TAKE, FROM_FILE, ENGRAMDB, RAM, CACHED, DISK)
ROW_BYTES = (64, 256, 1024)
FEW = 16  # rows of a small call
NUM_SETS = 3  # sets of rows, read in turn again and again
SHARE_TARGET, FEW_TARGET, ENGRAMDB_TARGET = 0.9, 20, 5
COLUMNS = (
    Column("million rows/s", "rows_per_second", ".3g", 1e6),
    Column("best", "best_rows_per_second", ".3g", 1e6),
    Column("of np.take", "share", ".1%"),
    Column(f"{FEW} rows, us", "microseconds_of_few", ".1f"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run measures.

    Attributes:
        file_gib: size of the file that all parts read, in GiB.
        warm_gib: how much of it is the table in memory, in GiB.
        num_rows: rows of a large call.
        num_few: small calls in a round.
        rounds: rounds of each way, in turn.
    """

    file_gib: float
    warm_gib: float
    num_rows: int
    num_few: int
    rounds: int


FULL = Plan(file_gib=16, warm_gib=1, num_rows=100_000, num_few=200, rounds=5)
QUICK = Plan(file_gib=0.5, warm_gib=0.0625, num_rows=20_000, num_few=50, rounds=2)


def measure_warm(plan: Plan, path: Path, row_bytes: int) -> dict[str, dict[str, float]]:
    """Per way, rows/s of large calls, its share of np.take's in the same round, and microseconds of a small call."""
    table = first_rows(path, int(plan.warm_gib * 2**30), row_bytes)
    sets = [draw_rows(table, plan.num_rows, seed) for seed in range(NUM_SETS)]
    few = [rows_U[first : first + FEW] for rows_U in sets for first in range(0, plan.num_rows - FEW, FEW)]
    reads: dict[str, Read] = {}
    for way in WAYS:
        if way != ENGRAMDB or why_no_engramdb() is None:
            reads[way] = READERS[way](table)
            for rows_U in sets * (3 if way == CACHED else 1):  # touches all pages and fills the cache
                assert np.array_equal(reads[way](rows_U), reads[TAKE](rows_U)), way
    large: dict[str, list[float]] = {way: [] for way in reads}
    small: dict[str, list[float]] = {way: [] for way in reads}
    for turn, _, way in in_turn(reads, plan.rounds):
        large[way].append(_seconds(reads[way], sets[: 1 if way == DISK else NUM_SETS]))
        small[way].append(_seconds(reads[way], few[turn * plan.num_few :][: plan.num_few]))
    return {
        way: {
            "rows_per_second": plan.num_rows / median(large[way]),
            "best_rows_per_second": plan.num_rows / min(large[way]),
            "share": median(base / own for own, base in zip(large[way], large[TAKE])),
            "microseconds_of_few": 1e6 * median(small[way]),
        }
        for way in reads
    }


def _seconds(read: Read, calls: list[np.ndarray]) -> float:
    """Seconds of the median call."""
    seconds = []
    for rows_U in calls:
        started = time.perf_counter()
        read(rows_U)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def bench_store(quick: bool) -> dict[str, Any]:
    """Reads uniform rows of one file in every way: warm here, cold and in several processes in the parts.

    Returns:
        `row_bytes`: per row size and way, what `measure_warm` returns. `cold`, `footprint` and `remote`: the results of
        the parts. `engramdb`: why it was left out, or None.
    """
    plan = QUICK if quick else FULL
    file = large_table(plan.file_gib)
    path = file.shards[0].path
    warm = {str(row_bytes): in_fresh_process(measure_warm, plan, path, row_bytes) for row_bytes in ROW_BYTES}
    return {
        **describe_run("engrammar bench store"),
        "quick": quick,
        "shapes": f"{'QUICK, smaller than it should be: ' if quick else ''}warm table of {plan.warm_gib:g} GiB, "
        f"{plan.num_rows:,} uniform rows a large call, {FEW} a small one, {plan.rounds} rounds in turn",
        "row_bytes": warm,
        "engramdb": why_no_engramdb(),
        "cold": cold.bench_cold(quick, file),
        "footprint": footprint.bench_footprint(quick, file),
        "remote": remote.bench_remote(quick),
    }


def table(result: dict[str, Any]) -> tuple[list[str], Lines]:
    """Header and lines, one for each row size and way."""
    lines = [
        [row_bytes, way, *cells(COLUMNS, own)]
        for row_bytes, ways in result["row_bytes"].items()
        for way, own in ways.items()
    ]
    return ["row bytes", "warm", *titles(COLUMNS)], lines


def verdict(result: dict[str, Any]) -> str:
    """How the stores in memory compare with np.take and engramdb, and whether the targets are met."""
    warm = result["row_bytes"]

    def each(values: list[str]) -> str:
        return f"{' / '.join(values)} at {' / '.join(warm)} bytes a row"

    def met(holds: bool, target: str) -> str:
        return f"{'meets' if holds else 'misses'} the target of {target}"

    sentences = []
    for way in (RAM, CACHED):
        own = [ways[way] for ways in warm.values()]
        shares, few = [row["share"] for row in own], [row["microseconds_of_few"] for row in own]
        sentences.append(
            f"{way} reads {each([f'{share:.2f}' for share in shares])} of what np.take on a memmap does "
            f"({met(min(shares) >= SHARE_TARGET, str(SHARE_TARGET))}), and {FEW} rows in "
            f"{' / '.join(f'{us:.1f}' for us in few)} us ({met(max(few) < FEW_TARGET, f'{FEW_TARGET} us')})."
        )
        if result["engramdb"] is None:
            times = [
                row["rows_per_second"] / ways[ENGRAMDB]["rows_per_second"] for row, ways in zip(own, warm.values())
            ]
            sentences.append(
                f"That is {' / '.join(f'{ratio:.1f}' for ratio in times)} times engramdb "
                f"({met(min(times) >= ENGRAMDB_TARGET, str(ENGRAMDB_TARGET))})."
            )
    if result["engramdb"] is not None:
        sentences.append(f"engramdb was not measured: {result['engramdb']}.")
    sentences.append(f"{DISK} leaves nothing in the page cache, so for it every read is a cold one.")
    return " ".join(sentences)
