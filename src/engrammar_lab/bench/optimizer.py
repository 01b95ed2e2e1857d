"""What updating a table costs: touched rows/s of the row optimizers, compared with torch's SparseAdam and dense Adam.

Letters: R rows of the table, C row width, U distinct rows touched in a step.
"""

from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from engrammar.cells import Lines
from engrammar.train.row_optimizers import ROW_OPTIMIZERS, build_row_optimizer, state_bytes_per_row
from engrammar_lab.bench.turns import measured_in_turn, rates_of, seconds_of, settle_allocator

ROW_WIDTH, NUM_DRAWN, NUM_BATCHES = 64, 20_000, 16
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
SPARSE_ADAM, DENSE_ADAM = "torch SparseAdam", "torch Adam, dense"
REPEATED_ROWS = 1_000_000  # rows of the table whose gradient is not summed
# "distinct": summed gradients of distinct rows, as MemoryTable gives them; "repeated": unsummed ones, as
# nn.Embedding(sparse=True) gives them.
Draws = Literal["distinct", "repeated"]


def _draw_batches(num_rows: int, draws: Draws) -> list[Tensor]:
    """Rows of each step. Their frequencies follow Zipf's law, so the frequent ones are in every step."""
    frequencies = 1 / torch.arange(1, num_rows + 1)
    num_drawn = min(NUM_DRAWN, num_rows // 2)
    batches = []
    for _ in range(NUM_BATCHES):
        ranks = torch.multinomial(frequencies, num_drawn, replacement=draws == "repeated")
        rows = ranks * 7919 % num_rows  # scatters the frequent rows, as hashing does; 7919 is prime
        batches.append(rows.sort().values if draws == "distinct" else rows)
    return batches


def _contenders(table_RC: nn.Parameter, batches: list[Tensor], with_dense: bool) -> dict[str, Callable[[int], None]]:
    """One step of each optimizer, and the machine's limit for ours: gathering and scattering the same bytes.

    All update one table, so that a table of 2.5 GB is not held five times.
    """
    values = 1e-3 * torch.randn(len(batches[0]), ROW_WIDTH)

    def sparse(index: int) -> Tensor:
        return torch.sparse_coo_tensor(batches[index][None], values, table_RC.shape, check_invariants=False)

    def stepper(optimizer: Optimizer, gradient: Callable[[int], Tensor]) -> Callable[[int], None]:
        def step(index: int) -> None:
            table_RC.grad = gradient(index)
            optimizer.step()
            table_RC.grad = None

        return step

    def limit(optimizer: Optimizer) -> Callable[[int], None]:
        return lambda index: gather_and_scatter(
            [table_RC.detach(), *optimizer.state[table_RC].values()], distinct[index]
        )

    distinct = [rows.unique() for rows in batches]
    ours = {kind: build_row_optimizer(kind, [table_RC], **SETTINGS) for kind in ROW_OPTIMIZERS}
    contenders = {str(kind): stepper(optimizer, sparse) for kind, optimizer in ours.items()}
    contenders[SPARSE_ADAM] = stepper(torch.optim.SparseAdam([table_RC], **SETTINGS), sparse)
    if with_dense:
        dense_RC = sparse(0).to_dense()
        contenders[DENSE_ADAM] = stepper(torch.optim.Adam([table_RC], **SETTINGS), lambda _: dense_RC)
    return contenders | {f"limit of {kind}": limit(optimizer) for kind, optimizer in ours.items()}


def gather_and_scatter(tensors: list[Tensor], rows_U: Tensor) -> None:
    """Reads these rows of every tensor and writes them back, as every optimizer must."""
    for tensor in tensors:
        tensor.index_copy_(0, rows_U, tensor.index_select(0, rows_U))


def _measure(num_rows: int, draws: Draws, repeats: int, max_dense_rows: int = 0) -> dict[str, Any]:
    """Times every contender on one table, step by step in turn; each step reads other rows than the one before."""
    torch.manual_seed(0)
    batches = _draw_batches(num_rows, draws)
    table_RC = nn.Parameter(torch.ones(num_rows, ROW_WIDTH))
    contenders = _contenders(table_RC, batches, with_dense=num_rows <= max_dense_rows)
    settle_allocator()

    def measure(turn: int, place: int, name: str) -> float:
        return seconds_of(contenders[name], (11 * turn + place) % NUM_BATCHES)

    # One turn for each batch touches all memory.
    times = measured_in_turn(measure, contenders, repeats, warm_up=NUM_BATCHES)
    num_touched = median(len(rows.unique()) for rows in batches)
    all_rates = rates_of(times, num_touched, "rows")
    rates = {name: rate for name, rate in all_rates.items() if not name.startswith("limit")}
    for name, rate in rates.items():
        limit = all_rates.get(f"limit of {name}")
        rate["speedup"] = rate["rows_per_second"] / rates[SPARSE_ADAM]["rows_per_second"]
        rate["share_of_limit"] = rate["rows_per_second"] / limit["rows_per_second"] if limit else None
    return {"num_rows": num_rows, "draws": draws, "num_touched": num_touched, "rates": rates}


def bench_optimizer(quick: bool) -> dict[str, Any]:
    """Times one update of the touched rows, for tables of growing size.

    Returns:
        per table: distinct touched rows/s of each optimizer (median and best of the steps), `speedup` over SparseAdam
        by the medians, and for ours `share_of_limit`: the time to gather and scatter the same rows of table and state
        (index_select, index_copy_) over the time taken. Then `state_bytes` per row, and `speedups`: for each of our
        optimizers, those on the tables with distinct rows, in order of size.
    """
    sizes, repeats = ((100_000, 1_000_000), 16) if quick else ((10_000, 100_000, 1_000_000, 10_000_000), 64)
    max_dense_rows = 100_000 if quick else 1_000_000  # on larger ones a dense Adam takes 0.2 s a step or more
    tables = [_measure(num_rows, "distinct", repeats, max_dense_rows) for num_rows in sizes]
    speedups = {kind: [table["rates"][kind]["speedup"] for table in tables] for kind in ROW_OPTIMIZERS}
    tables.append(_measure(REPEATED_ROWS, "repeated", repeats))
    return {
        "shapes": f"rows of {ROW_WIDTH} fp32, {NUM_DRAWN:,} drawn a step (Zipf; half the table if that is fewer), "
        f"{repeats} steps each, in turn",
        "state_bytes": {
            **{kind: state_bytes_per_row(kind, ROW_WIDTH) for kind in ROW_OPTIMIZERS},
            **dict.fromkeys((SPARSE_ADAM, DENSE_ADAM), 2 * 4 * ROW_WIDTH),  # two fp32 buffers
        },
        "tables": tables,
        "speedups": speedups,
    }


def table(result: dict[str, Any]) -> tuple[list[str], Lines]:
    """Header and lines: one for each table, a column for each optimizer."""
    kinds = list(dict.fromkeys(kind for measured in result["tables"] for kind in measured["rates"]))

    def cell(rate: dict[str, Any] | None) -> str:
        if rate is None:
            return "not run"
        share = "" if rate["share_of_limit"] is None else f", {rate['share_of_limit']:.0%}"
        return f"{rate['rows_per_second'] / 1e6:.1f} ({rate['speedup']:.1f}{share})"

    rows = [
        [f"{measured['num_rows']:,}, {measured['draws']}", *(cell(measured["rates"].get(kind)) for kind in kinds)]
        for measured in result["tables"]
    ]
    return ["rows, gradient", *kinds], rows


def verdict(result: dict[str, Any]) -> str:
    """The speed-ups, what the size of the table costs, and the bytes of state."""
    tables = [measured for measured in result["tables"] if measured["draws"] == "distinct"]
    first, last = (measured["rates"]["adam"]["rows_per_second"] for measured in (tables[0], tables[-1]))
    return (
        "Million distinct touched rows a second; in brackets times SparseAdam's rate, and the share of the machine's "
        "limit: gathering and scattering the same rows of table and state in the same run. "
        f"With {tables[-1]['num_rows']:,} rows adam keeps {last / first:.0%} of its rate with "
        f"{tables[0]['num_rows']:,}. State in bytes a row: "
        + ", ".join(f"{kind} {size}" for kind, size in result["state_bytes"].items())
        + "."
    )
