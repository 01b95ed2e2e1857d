"""What the number of rows costs a training step in time and memory, compared with the usual ways to hold a table.

One backbone is trained by Muon and AdamW throughout; each step gives it another memory, and only that differs.
Letters: B batch, T tokens, H columns, C row width, E = H*C, R rows, U distinct rows touched.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from engrammar.addressing import derive_geometry
from engrammar.cells import Column, Lines, cells, titles
from engrammar.memory import Memory
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.table import MemoryTable
from engrammar.train.optimizer import MixedOptimizer, build_optimizer, clip_grad_norm
from engrammar.train.placement import TablePlacement
from engrammar.train.row_optimizers import ROW_OPTIMIZERS, build_row_optimizer
from engrammar_lab.bench.models import random_model, with_rows
from engrammar_lab.bench.optimizer import gather_and_scatter
from engrammar_lab.bench.rivals import embedding_rows, fbgemm_rows, why_no_fbgemm
from engrammar_lab.bench.turns import in_turn, ratio, seconds_of, settle_allocator

LENGTH, NUM_HEADS = 128, 2  # two heads per order, not nano's four, so that all tables of a run fit 16 GB
LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
MEMORY_LR = 5 * LR  # the scale that build_optimizer uses
DENSE_ADAM, SPARSE_ADAM, FBGEMM = "Adam, dense", "SparseAdam", "FBGEMM"
COLUMNS = (
    Column("rows a head", "rows_per_head", ","),
    Column("step ms", "milliseconds.step", ".1f"),
    Column("best", "best_milliseconds", ".1f"),
    Column("ratio", "ratio", ".3f"),
    Column("new batch", "milliseconds.fresh_step", ".1f"),
    Column("table ms", "milliseconds.table", ".2f"),
    Column("new batch", "milliseconds.fresh_table", ".2f"),
    Column("limit ms", "milliseconds.limit", ".2f"),
    Column("MB", "bytes", ",.0f", 1e6),
)
PROCESS = Path("/proc/self")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run measures."""

    sizes: tuple[int, ...]  # rows per head, ascending
    batch: int  # texts of LENGTH tokens in a step
    num_batches: int  # batches used again and again, so that steps touch pages that were touched before
    repeats: int  # timed steps on those
    num_fresh: int  # timed steps on batches that were never used before; at most `repeats`
    max_dense_rows: int  # rows per head up to which the dense Adam runs


FULL = Plan(
    sizes=(10_000, 100_000, 1_000_000, 10_000_000),
    batch=16,
    num_batches=16,
    repeats=24,
    num_fresh=8,
    max_dense_rows=1_000_000,  # on larger tables a step takes seconds and 20 GB
)
QUICK = Plan(sizes=(10_000, 100_000), batch=2, num_batches=2, repeats=2, num_fresh=1, max_dense_rows=100_000)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to hold and train the rows: a memory for the backbone, and the optimizer that updates its rows."""

    memory: Memory
    optimizer: Optimizer | None  # None if the backward pass updates the rows

    @property
    def table(self) -> MemoryTable:
        (layer,) = self.memory.config.layers
        return self.memory.table(layer)

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def build_backbone(
    config: EngrammarConfig | None = None, device: torch.device | None = None
) -> tuple[EngrammarForCausalLM, MixedOptimizer]:
    """`nano`, or another model, without its memory, which `new_memory` makes; and the optimizer of its parameters."""
    model = random_model(config or with_rows("nano", 2, num_heads=NUM_HEADS), "external").train().to(device)
    model.model.memory = None
    return model, build_optimizer(model, lr=LR, weight_decay=0.1, betas=BETAS, eps=EPS)


def new_memory(model: EngrammarForCausalLM, rows_per_head: int | None = None) -> Memory:
    """Another memory for this backbone, of its own size or of that one; the rows are external."""
    config = model.config.memory_config
    assert config is not None and model.config.num_classes is not None and model.config.fill_class is not None
    if rows_per_head is not None:
        config = replace(config, rows_per_head=(rows_per_head,) * len(config.orders))
    geometry = derive_geometry(config, num_classes=model.config.num_classes, fill_class=model.config.fill_class)
    vocab_size = model.config.vocab_size
    memory = Memory(config, geometry, num_ids=vocab_size, vocab_size=vocab_size, tables="external")
    memory.set_classes(torch.arange(vocab_size))
    return memory


def build_contender(name: str, memory: Memory, weight_RC: Tensor) -> Contender:
    """The contender of that name on this table. All contenders may share the table's storage."""
    (layer,) = memory.config.layers
    table = memory.table(layer)
    optimizer: Optimizer | None = None
    if name in ROW_OPTIMIZERS:
        weight = nn.Parameter(weight_RC)
        table.take_back(weight)
        optimizer = build_row_optimizer(name, [weight], lr=MEMORY_LR, betas=BETAS, eps=EPS)
    elif name == FBGEMM:
        table.move_to(fbgemm_rows(weight_RC, lr=MEMORY_LR, eps=EPS), "")
    else:
        source = embedding_rows(weight_RC, sparse=name == SPARSE_ADAM)
        table.move_to(source, "")
        kind = torch.optim.SparseAdam if name == SPARSE_ADAM else torch.optim.Adam
        optimizer = kind(list(source.tables.values()), lr=MEMORY_LR, betas=BETAS, eps=EPS)
    return Contender(memory=memory, optimizer=optimizer)


def bytes_held(placement: TablePlacement, optimizer: MixedOptimizer) -> tuple[int, int]:
    """Bytes of placed rows, and of their optimizer state, on this rank."""
    assert optimizer.rows is not None
    tables = placement.tables.values()
    state = [values for table_RC in tables for values in optimizer.rows.state_of(table_RC).values()]
    return sum(table_RC.nbytes for table_RC in tables), sum(values.nbytes for values in state)


def draw_ids(vocab_size: int, batch: int, *, seed: int) -> Tensor:
    """Token ids of one batch [B, LENGTH], as frequent as in a text (Zipf), so that rows repeat as in training."""
    weights, generator = 1 / torch.arange(1, vocab_size + 1), torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, batch * LENGTH, replacement=True, generator=generator).view(batch, LENGTH)


def train_step(
    model: EngrammarForCausalLM, optimizer: MixedOptimizer, contender: Contender, ids_BT: Tensor
) -> tuple[float, float]:
    """Trains backbone and table for one step; returns its seconds and the loss before it."""
    model.model.memory = contender.memory
    started = time.perf_counter()
    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    source = contender.table.source
    clip_grad_norm([*model.parameters(), *(source.tables.values() if source is not None else ())], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    contender.update()
    return time.perf_counter() - started, loss.item()


def table_step(contender: Contender, ids_BT: Tensor) -> float:
    """Seconds of the table's part of a step: lookup, its backward pass and the update, without hashing."""
    (rows_BTH,) = contender.memory.addresses(ids_BT).values()
    gradient_BTE = torch.full((*ids_BT.shape, contender.memory.config.memory_dim), 1e-3)
    started = time.perf_counter()
    contender.table(rows_BTH).backward(gradient_BTE)
    contender.update()
    return time.perf_counter() - started


def limit_step(contender: Contender, ids_BT: Tensor) -> float | None:
    """Seconds just to gather and scatter the rows of one of our tables and of its state; None for other contenders."""
    table = contender.table
    if table.weight is None or contender.optimizer is None:
        return None
    (rows_BTH,) = contender.memory.addresses(ids_BT).values()
    rows_U = rows_BTH.unique()
    tensors = [table.weight.detach(), *contender.optimizer.state[table.weight].values()]
    return seconds_of(gather_and_scatter, tensors, rows_U)


def _memory_of(run: Callable[[], None]) -> int | None:
    """Bytes by which the highest resident memory during `run` exceeds that before it; None if not on Linux."""
    reset = PROCESS / "clear_refs"
    if not reset.exists():
        return None

    def status(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", (PROCESS / "status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    reset.write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def _build_cells(
    plan: Plan, names: list[str], model: EngrammarForCausalLM, ids: Callable[[int], Tensor]
) -> Iterator[tuple[tuple[str, int], Contender, dict[str, Any]]]:
    """Every contender at every size; its memory is measured over a table step on each of the repeated batches."""
    for rows_per_head in plan.sizes:
        shape = Contender(memory=new_memory(model, rows_per_head), optimizer=None).table.shape
        weight_RC = torch.empty(shape).normal_(std=model.config.initializer_range)
        for name in names:
            if name == DENSE_ADAM and rows_per_head > plan.max_dense_rows:
                continue
            contender = build_contender(name, new_memory(model, rows_per_head), weight_RC)

            def warm_up(contender: Contender = contender) -> None:
                for index in range(plan.num_batches):
                    table_step(contender, ids(index))

            sizes = {"rows_per_head": rows_per_head, "num_rows": len(weight_RC), "table_bytes": weight_RC.nbytes}
            yield (name, rows_per_head), contender, sizes | {"growth_bytes": _memory_of(warm_up)}


def _measure(plan: Plan, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Times all cells in turn; returns each contender's cells in order of size."""
    model, optimizer = build_backbone()

    def ids(seed: int) -> Tensor:
        return draw_ids(model.config.vocab_size, plan.batch, seed=seed)

    settle_allocator()
    contenders, sizes = {}, {}
    for key, contender, measured in _build_cells(plan, names, model, ids):
        contenders[key], sizes[key] = contender, measured
        train_step(model, optimizer, contender, ids(0))
    times: dict[tuple[str, int], dict[str, list[float]]] = {
        key: {kind: [] for kind in ("step", "table", "limit", "fresh_step", "fresh_table")} for key in contenders
    }
    for turn, place, key in in_turn(contenders, plan.repeats):
        timed, contender = times[key], contenders[key]
        again = [(11 * turn + place + shift) % plan.num_batches for shift in range(3)]
        timed["step"].append(train_step(model, optimizer, contender, ids(again[0]))[0])
        timed["table"].append(table_step(contender, ids(again[1])))
        limit = limit_step(contender, ids(again[2]))
        timed["limit"] += [] if limit is None else [limit]
        if turn < plan.num_fresh:
            fresh = plan.num_batches + 2 * (turn * len(contenders) + place)
            timed["fresh_step"].append(train_step(model, optimizer, contender, ids(fresh))[0])
            timed["fresh_table"].append(table_step(contender, ids(fresh + 1)))
    return {
        name: [sizes[key] | _summary(times[key], times[name, plan.sizes[0]]) for key in contenders if key[0] == name]
        for name in names
    }


def _summary(timed: dict[str, list[float]], smallest: dict[str, list[float]]) -> dict[str, Any]:
    milliseconds = {kind: 1e3 * median(seconds) if seconds else None for kind, seconds in timed.items()}
    best = 1e3 * min(timed["step"])
    return {"milliseconds": milliseconds, "best_milliseconds": best, "ratio": ratio(timed["step"], smallest["step"])}


def bench_rows(plan: Plan) -> dict[str, Any]:
    """Times a training step for tables of growing size.

    Returns:
        per contender its cells in order of size: the median ms of a whole `step`, of the `table`'s part of it alone
        and, for ours, of the `limit` (gather and scatter of the same rows of table and state). Each is measured on
        batches that were used before and, with the prefix `fresh_`, on new ones. `ratio` is the step's time over that
        of the smallest size (median over turns); `growth_bytes` is the most memory used on top of `table_bytes`.
        `missing` says why a contender was left out.
    """
    reason = why_no_fbgemm()
    names = [*ROW_OPTIMIZERS, DENSE_ADAM, SPARSE_ADAM, *([FBGEMM] if reason is None else [])]
    memory = build_backbone()[0].config.memory_config
    assert memory is not None
    return {
        "shapes": f"nano, {plan.batch} x {LENGTH} tokens, fp32, one memory layer of {memory.num_columns} heads x "
        f"{memory.head_dim}; {plan.repeats} steps each, in turn, on {plan.num_batches} batches that come round, "
        f"{plan.num_fresh} on new ones",
        "contenders": _measure(plan, names),
        "missing": {} if reason is None else {FBGEMM: reason},
    }


def table(result: dict[str, Any]) -> tuple[list[str], Lines]:
    """Header and lines: one for every contender and size, and one for each contender that was left out."""
    header, largest, lines = ["", *titles(COLUMNS)], result["contenders"]["adam"][-1]["rows_per_head"], []
    empty = [""] * (len(header) - 3)
    for name, measured in result["contenders"].items():
        for cell in measured:
            growth = cell["growth_bytes"]
            held = {"bytes": None if growth is None else cell["table_bytes"] + growth}
            lines.append([name, *cells(COLUMNS, cell | held)])
        if measured[-1]["rows_per_head"] < largest:
            lines.append([name, f"{largest:,}", "not run", *empty])
    return header, [*lines, *([name, "", "missing", *empty] for name in result["missing"])]


def verdict(result: dict[str, Any]) -> str:
    """What the largest table costs compared with the smallest, and how much of that is the machine's memory."""
    first, last = result["contenders"]["adam"][0], result["contenders"]["adam"][-1]
    changes = ", ".join(
        f"{name} {cells[-1]['ratio'] - 1:+.1%}"
        + ("" if cells[-1]["rows_per_head"] == last["rows_per_head"] else f" (to {cells[-1]['rows_per_head']:,})")
        for name, cells in result["contenders"].items()
    )

    def growth(kind: str) -> str:
        return f"from {first['milliseconds'][kind]:.2f} to {last['milliseconds'][kind]:.2f} ms"

    missing = "".join(f" {name} is missing: {reason}." for name, reason in result["missing"].items())
    return (
        f"Step time from {first['rows_per_head']:,} to {last['rows_per_head']:,} rows a head (ratio: to the smallest, "
        f"median over turns): {changes}. adam's table alone (lookup, its backward, update) goes {growth('table')}, "
        "and the limit, the machine's own gather and scatter of the same rows of table and state, "
        f"{growth('limit')}: cache and page misses. On new batches, which touch state for the first time, adam's table "
        f"goes {growth('fresh_table')}. MB: the table and what its contender takes on top at its highest on the "
        "batches that come round; the state of ours grows with the rows touched. Adam, dense and SparseAdam train "
        "nn.Embedding; FBGEMM is its table-batched embedding for CPUs, which updates by row-wise Adagrad within "
        f"backward.{missing}"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the time of a whole step, and of the table's part of it, against rows per head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    whole, alone = figure.subplots(1, 2)
    for (name, measured), marker in zip(result["contenders"].items(), "osv^DX"):
        sizes = [cell["rows_per_head"] for cell in measured]
        for axes, kind in ((whole, "step"), (alone, "table")):
            axes.plot(sizes, [cell["milliseconds"][kind] for cell in measured], marker=marker, label=name)
    limits = result["contenders"]["adam"]
    sizes = [cell["rows_per_head"] for cell in limits]
    alone.plot(sizes, [cell["milliseconds"]["limit"] for cell in limits], "k--", label="gather + scatter, adam's rows")
    whole.set(title="Whole training step", xlabel="rows per head", ylabel="ms", xscale="log", ylim=(0, None))
    alone.set(title="Table alone", xlabel="rows per head", ylabel="ms", xscale="log", yscale="log")
    for axes in (whole, alone):
        axes.grid(alpha=0.3)
    figure.legend(*alone.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
