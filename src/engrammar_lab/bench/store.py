"""How fast rows are read from tables in memory; its parts read from cold disks, in several processes, and over a wire.

Letters: R rows of the table, U rows of a call, S bytes of a row.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engrammar.cells import Column
from engrammar_lab.bench import cold, footprint, remote
from engrammar_lab.bench.figures import by_variant, line_by_line, meets, slashed
from engrammar_lab.bench.large_file import draw_rows, first_rows, in_fresh_process, large_table
from engrammar_lab.bench.readers import CACHED, DISK, ENGRAMDB, FROM_FILE, RAM, READERS, TAKE, Read, why_no_engramdb
from engrammar_lab.bench.turns import measured_in_turn, rates_of, ratio, seconds_of

WAYS = (TAKE, FROM_FILE, ENGRAMDB, RAM, CACHED, DISK)
ROW_BYTES = (64, 256, 1024)
FEW = 16  # rows of a small call
NUM_SETS = 3  # sets of rows, read in turn again and again
SHARE_TARGET, FEW_TARGET, ENGRAMDB_TARGET = 0.9, 20, 5
COLUMNS = (
    Column("row bytes", "row_bytes"),
    Column("warm", "name"),
    Column("million rows/s", "rows_per_second", ".3g", 1e6),
    Column("best", "best_rows_per_second", ".3g", 1e6),
    Column("of np.take", "share", ".1%"),
    Column(f"{FEW} rows, us", "microseconds_of_few", ".1f"),
)
table = line_by_line(
    COLUMNS,
    lambda result: by_variant({"row_bytes": size, "variants": ways} for size, ways in result["row_bytes"].items()),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run measures."""

    file_gib: float  # of the file that all parts read
    warm_gib: float  # of it, the table in memory
    num_rows: int  # of a large call
    num_few: int  # small calls in a round
    rounds: int  # of each way, in turn


FULL = Plan(file_gib=16, warm_gib=1, num_rows=100_000, num_few=200, rounds=5)
QUICK = Plan(file_gib=0.25, warm_gib=0.0625, num_rows=20_000, num_few=50, rounds=2)


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

    def measure(turn: int, _place: int, way: str) -> tuple[float, float]:
        calls = sets[: 1 if way == DISK else NUM_SETS], few[turn * plan.num_few :][: plan.num_few]
        large, small = (median(seconds_of(reads[way], rows_U) for rows_U in own) for own in calls)
        return large, small

    times = measured_in_turn(measure, reads, plan.rounds)
    large = {way: [one for one, _ in own] for way, own in times.items()}
    rates = rates_of(large, plan.num_rows, "rows")
    for way, rate in rates.items():
        rate["share"] = ratio(large[TAKE], large[way])
        rate["microseconds_of_few"] = 1e6 * median(small for _, small in times[way])
    return rates


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
        "shapes": f"{'QUICK, smaller than it should be: ' if quick else ''}warm table of {plan.warm_gib:g} GiB, "
        f"{plan.num_rows:,} uniform rows a large call, {FEW} a small one, {plan.rounds} rounds in turn",
        "row_bytes": warm,
        "engramdb": why_no_engramdb(),
        "cold": cold.bench_cold(quick, file),
        "footprint": footprint.bench_footprint(quick, file),
        "remote": remote.bench_remote(quick),
    }


def verdict(result: dict[str, Any]) -> str:
    """How the stores in memory compare with np.take and engramdb, and whether the targets are met."""
    warm, sentences = result["row_bytes"], []
    for way in (RAM, CACHED):
        own = [ways[way] for ways in warm.values()]
        shares, few = [row["share"] for row in own], [row["microseconds_of_few"] for row in own]
        sentences.append(
            f"{way} reads {slashed(shares, '.2f')} at {' / '.join(warm)} bytes a row of what np.take on a memmap does "
            f"({meets(min(shares) >= SHARE_TARGET, SHARE_TARGET)}), and {FEW} rows in {slashed(few, '.1f')} us "
            f"({meets(max(few) < FEW_TARGET, f'{FEW_TARGET} us')})."
        )
        if result["engramdb"] is None:
            times = [
                row["rows_per_second"] / ways[ENGRAMDB]["rows_per_second"] for row, ways in zip(own, warm.values())
            ]
            target = meets(min(times) >= ENGRAMDB_TARGET, ENGRAMDB_TARGET)
            sentences.append(f"That is {slashed(times, '.1f')} times engramdb ({target}).")
    if result["engramdb"] is not None:
        sentences.append(f"engramdb was not measured: {result['engramdb']}.")
    sentences.append(f"{DISK} leaves nothing in the page cache, so for it every read is a cold one.")
    return " ".join(sentences)
