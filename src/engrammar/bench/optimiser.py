"""What updating a table costs: touched rows/s of the row optimisers, beside torch's SparseAdam and dense Adam.

Letters: R rows of the table, C row width, U distinct rows touched in a step.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from engrammar.machine import describe_machine
from engrammar.train.row_optimisers import ROW_OPTIMISERS, RowOptimiserKind, build_row_optimiser, state_bytes_per_row

ROW_WIDTH, NUM_DRAWN, NUM_BATCHES = 64, 20_000, 16
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
SPARSE_ADAM, DENSE_ADAM = "torch SparseAdam", "torch Adam, dense"
REPEATED_ROWS = 1_000_000  # rows of the table whose gradient comes unsummed
# "distinct": rows as MemoryTable hands them over, summed; "repeated": as nn.Embedding(sparse=True) does, unsummed.
Draws = Literal["distinct", "repeated"]


def _draw_batches(num_rows: int, draws: Draws) -> list[Tensor]:
    """Rows of each step. Row frequencies follow Zipf, so the frequent ones come back in every step."""
    frequencies = 1 / torch.arange(1, num_rows + 1)
    num_drawn = min(NUM_DRAWN, num_rows // 2)
    batches = []
    for _ in range(NUM_BATCHES):
        ranks = torch.multinomial(frequencies, num_drawn, replacement=draws == "repeated")
        rows = ranks * 7919 % num_rows  # frequent rows lie scattered, as hashing leaves them; 7919 is prime
        batches.append(rows.sort().values if draws == "distinct" else rows)
    return batches


def _contenders(table_RC: nn.Parameter, batches: list[Tensor], with_dense: bool) -> dict[str, Callable[[int], None]]:
    """One step of each optimiser, and of the machine's limit for ours: the same bytes gathered and scattered.

    All update one table, so that tables of 2.5 GB need not be held five times.
    """
    values = 1e-3 * torch.randn(len(batches[0]), ROW_WIDTH)

    def sparse(index: int) -> Tensor:
        return torch.sparse_coo_tensor(batches[index][None], values, table_RC.shape, check_invariants=False)

    def stepper(optimiser: Optimizer, gradient: Callable[[int], Tensor]) -> Callable[[int], None]:
        def step(index: int) -> None:
            table_RC.grad = gradient(index)
            optimiser.step()

        return step

    def limit(optimiser: Optimizer) -> Callable[[int], None]:
        def gather_and_scatter(index: int) -> None:
            rows_U = distinct[index]
            for tensor in (table_RC.detach(), *optimiser.state[table_RC].values()):
                tensor.index_copy_(0, rows_U, tensor.index_select(0, rows_U))

        return gather_and_scatter

    distinct = [rows.unique() for rows in batches]
    ours = {kind: build_row_optimiser(kind, [table_RC], **SETTINGS) for kind in ROW_OPTIMISERS}
    contenders = {str(kind): stepper(optimiser, sparse) for kind, optimiser in ours.items()}
    contenders[SPARSE_ADAM] = stepper(torch.optim.SparseAdam([table_RC], **SETTINGS), sparse)
    if with_dense:
        dense_RC = sparse(0).to_dense()
        contenders[DENSE_ADAM] = stepper(torch.optim.Adam([table_RC], **SETTINGS), lambda _: dense_RC)
    return contenders | {f"limit of {kind}": limit(optimiser) for kind, optimiser in ours.items()}


def _state_bytes(name: str) -> int:
    if name in (SPARSE_ADAM, DENSE_ADAM):
        return 2 * 4 * ROW_WIDTH  # two fp32 buffers
    kind: RowOptimiserKind = name  # type: ignore[assignment]
    return state_bytes_per_row(kind, ROW_WIDTH)


def _measure(num_rows: int, draws: Draws, repeats: int, max_dense_rows: int = 0) -> dict[str, Any]:
    """Times every contender on one table, step by step in turn, each step on other rows than the one before."""
    torch.manual_seed(0)
    batches = _draw_batches(num_rows, draws)
    table_RC = nn.Parameter(torch.ones(num_rows, ROW_WIDTH))
    contenders = _contenders(table_RC, batches, with_dense=num_rows <= max_dense_rows)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    # The C library keeps freed memory once a block of this size was freed, as in a process that has run for a while.
    # Until then a step pays for fresh pages, most of all SparseAdam's.
    torch.ones(31 * 2**20, dtype=torch.uint8)
    for turn in range(NUM_BATCHES + repeats):  # after one turn for each batch, all memory has been touched
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]  # nobody always follows the same one
            index = (11 * turn + place) % NUM_BATCHES
            started = time.perf_counter()
            contenders[name](index)
            if turn >= NUM_BATCHES:
                times[name].append(time.perf_counter() - started)
            table_RC.grad = None
    num_touched = median(len(rows.unique()) for rows in batches)
    seconds = {name: median(measured) for name, measured in times.items()}
    rates = {
        name: {
            "rows_per_second": num_touched / seconds[name],
            "best_rows_per_second": num_touched / min(times[name]),
            "milliseconds": 1e3 * seconds[name],
            "speedup": seconds[SPARSE_ADAM] / seconds[name],
            "share_of_limit": seconds[f"limit of {name}"] / seconds[name] if name in ROW_OPTIMISERS else None,
        }
        for name in contenders
        if not name.startswith("limit")
    }
    return {"num_rows": num_rows, "draws": draws, "num_touched": num_touched, "rates": rates}


def bench_optimiser(quick: bool) -> dict[str, Any]:
    """Times one update of the touched rows, for tables of growing size.

    Returns:
        per table: distinct touched rows/s of each optimiser (median and best of the steps), `speedup` over SparseAdam
        by the medians, and for ours `share_of_limit`: the time to gather and scatter the same rows of table and state
        (index_select, index_copy_) over the time taken. Then `state_bytes` per row, and `speedups`: those of each
        of ours over the tables whose rows come distinct, in order of size.
    """
    sizes, repeats = ((100_000, 1_000_000), 16) if quick else ((10_000, 100_000, 1_000_000, 10_000_000), 64)
    max_dense_rows = 100_000 if quick else 1_000_000  # beyond, a dense Adam takes 0.2 s a step or more
    tables = [_measure(num_rows, "distinct", repeats, max_dense_rows) for num_rows in sizes]
    speedups = {kind: [table["rates"][kind]["speedup"] for table in tables] for kind in ROW_OPTIMISERS}
    tables.append(_measure(REPEATED_ROWS, "repeated", repeats))
    return {
        "command": "engrammar bench optimiser",
        "quick": quick,
        "shapes": f"rows of {ROW_WIDTH} fp32, {NUM_DRAWN:,} drawn a step (Zipf; half the table if that is fewer), "
        f"{repeats} steps each, in turn",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "state_bytes": {name: _state_bytes(name) for name in (*ROW_OPTIMISERS, SPARSE_ADAM, DENSE_ADAM)},
        "tables": tables,
        "speedups": speedups,
    }


def print_optimiser(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = result["machine"]
    table = Table(title=f"{result['shapes']}; {machine['cpu']}, {machine['threads']} threads")
    columns = ("rows", "touched", "", "state B/row", "touched rows/s", "best", "ms", "x SparseAdam", "share of limit")
    for column in columns:
        table.add_column(column, justify="right")
    for measured in result["tables"]:
        for name, rate in measured["rates"].items():
            share = rate["share_of_limit"]
            table.add_row(
                f"{measured['num_rows']:,}",
                f"{measured['num_touched']:,.0f} {measured['draws']}",
                name,
                str(result["state_bytes"][name]),
                f"{rate['rows_per_second']:,.0f}",
                f"{rate['best_rows_per_second']:,.0f}",
                f"{rate['milliseconds']:.2f}",
                f"{rate['speedup']:.2f}",
                "" if share is None else f"{share:.0%}",
            )
    console = Console()
    console.print(table)
    console.print(verdict(result))


def verdict(result: dict[str, Any]) -> str:
    """The speed-ups, and what the size of the table costs, in two sentences."""
    tables = [table for table in result["tables"] if table["draws"] == "distinct"]
    sizes = [f"{table['num_rows']:,}" for table in tables]
    speedups = "; ".join(
        f"{kind} {', '.join(f'{speedup:.1f}' for speedup in by_size)}" for kind, by_size in result["speedups"].items()
    )
    first, last = (table["rates"]["adam"]["rows_per_second"] for table in (tables[0], tables[-1]))
    return (
        f"Times SparseAdam's rate, with {' / '.join(sizes)} rows: {speedups}. "
        f"With {sizes[-1]} rows adam keeps {last / first:.0%} of its rate with {sizes[0]}."
    )
