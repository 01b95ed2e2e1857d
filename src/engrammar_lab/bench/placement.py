"""What it costs to keep the tables off the device: tokens/s with them on it, in host RAM and in a file, overlapped.

One backbone is given another memory with its optimizer in each round; only the place of the memory's rows differs.
"""

import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from engrammar.cells import Column
from engrammar.memory import Retrieved
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.train.optimizer import MixedOptimizer
from engrammar.train.placement import Overlap, TablePlacement, Where, place_tables
from engrammar.train.row_optimizers import build_row_optimizer
from engrammar_lab.bench.figures import line_by_line, named
from engrammar_lab.bench.models import with_rows
from engrammar_lab.bench.rows import BETAS, EPS, MEMORY_LR, build_backbone, bytes_held, draw_ids, new_memory
from engrammar_lab.bench.rows import LENGTH as DRAWN_LENGTH
from engrammar_lab.bench.turns import measured_in_turn, rates_of, ratio, wait_for
from engrammar_lab.machine import accelerator

COLUMNS = (
    Column("rows, overlap", "name"),
    Column("tokens/s", "tokens_per_second", ",.0f"),
    Column("best", "best_tokens_per_second", ",.0f"),
    Column("of device", "share", ".1%"),
    Column("MB moved/step", "bytes_moved", ".2f", 1e6),
)
table = line_by_line(COLUMNS, lambda result: named(result["variants"]))
BASELINE, EXACT, STALE = "device", "RAM, exact", "RAM, stale"
VARIANTS: dict[str, tuple[Where, Overlap]] = {
    BASELINE: ("device", "none"),
    "RAM": ("ram", "none"),
    EXACT: ("ram", "exact"),
    STALE: ("ram", "stale"),
    "file, exact": ("file", "exact"),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run measures."""

    preset: str  # the preset of the backbone, and of the memory except its number of rows
    rows_per_head: int  # rows per head of each order
    # Texts of a step, and tokens of each.
    batch: int
    length: int
    num_batches: int  # batches used again and again; each variant sees all of them before it is timed
    rounds: int  # rounds of each variant, in turn
    steps: int  # timed steps in a round


ON_CPU = Plan(preset="nano", rows_per_head=100_000, batch=8, length=128, num_batches=4, rounds=6, steps=3)
# For one GPU of 80 GB: rows and their Adam state take 6 GB, the backbone and its state 8 GB, activations the rest.
ON_ACCELERATOR = Plan(preset="100m", rows_per_head=500_000, batch=16, length=1024, num_batches=8, rounds=8, steps=8)


class Variant:
    """A memory with its rows in one place, trained with the backbone that all variants share."""

    def __init__(self, model: EngrammarForCausalLM, backbone: MixedOptimizer, kind: str, folder: Path) -> None:
        self.model, self.next = model, 0
        self.ahead: deque[Retrieved] = deque()  # the next steps' rows
        self.memory = new_memory(model)
        for layer in self.memory.config.layers:
            self.memory.table(layer).init_seed = layer
        self.device = next(model.parameters()).device
        self.model.model.memory = self.memory.to(self.device)
        where, overlap = VARIANTS[kind]
        self.placement: TablePlacement = place_tables(model, where=where, folder=folder, overlap=overlap)
        tables = list(self.placement.tables.values())
        rows = build_row_optimizer("adam", tables, lr=MEMORY_LR, betas=BETAS, eps=EPS)
        self.optimizer = MixedOptimizer([*backbone.inner, rows], self.placement, max_grad_norm=1.0)

    def step(self, batches: list[Tensor]) -> None:
        """Reads ahead as the trainer does, and trains on the next batch."""
        if self.placement.reads_together:
            for ahead in range(len(self.ahead), 2 if self.placement.stale else 1):
                self.ahead.append(self.memory.retrieve(batches[(self.next + ahead) % len(batches)]))
        retrieved = self.ahead.popleft() if self.ahead else None
        ids_BT = batches[self.next % len(batches)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            loss = self.model(input_ids=ids_BT, labels=ids_BT, retrieved=retrieved, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.next += 1

    def run(self, batches: list[Tensor], num_steps: int) -> float:
        """Seconds of that many steps, after one that is not timed, so that every timed step overlaps an update."""
        self.model.model.memory = self.memory
        self.step(batches)
        wait_for(self.device)
        started = time.perf_counter()
        for _ in range(num_steps):
            self.step(batches)
        wait_for(self.device)
        seconds = time.perf_counter() - started
        self.placement.flush()  # no update of this variant runs beside the next one
        return seconds

    def bytes_moved(self) -> float:
        """Bytes to and from the device in a step: row numbers one way, rows the other, gradients back."""
        if not self.placement.reads_together:
            return 0
        num_reads = self.next + len(self.ahead)
        a_row = next(iter(self.placement.tables.values()))[0].nbytes
        return self.placement.traffic.num_distinct / num_reads * (8 + 2 * a_row)


def _measure(plan: Plan, device: torch.device, folder: Path) -> tuple[dict[str, Any], int]:
    """Runs the variants in turn; returns the figures of each, and the bytes of a variant's tables and their state."""
    model, backbone = build_backbone(with_rows(plan.preset, plan.rows_per_head), device)
    num_drawn = plan.batch * plan.length // DRAWN_LENGTH
    batches = [
        draw_ids(model.config.vocab_size, num_drawn, seed=seed).view(plan.batch, plan.length).to(device)
        for seed in range(plan.num_batches)
    ]
    variants = {kind: Variant(model, backbone, kind, folder) for kind in VARIANTS}
    for variant in variants.values():
        variant.run(batches, plan.num_batches)  # touches every row and page
    seconds = measured_in_turn(lambda *turn: variants[turn[-1]].run(batches, plan.steps), variants, plan.rounds)
    measured = rates_of(seconds, plan.steps * plan.batch * plan.length, "tokens")
    for kind, rate in measured.items():
        rate |= {"share": ratio(seconds[BASELINE], seconds[kind]), "bytes_moved": variants[kind].bytes_moved()}
    return measured, sum(bytes_held(variants[BASELINE].placement, variants[BASELINE].optimizer))


def bench_placement(quick: bool) -> dict[str, Any]:
    """Trains one backbone with its tables on the device, in RAM and in a file, in turn; without an accelerator, on CPU.

    Returns:
        per variant, tokens/s (median and best of the rounds), its `share` of the device's (median over rounds), and
        the bytes moved between device and rows in a step. `device` is the kind of device that it ran on.
    """
    device = accelerator()
    plan = ON_CPU if device.type == "cpu" else ON_ACCELERATOR
    if quick:
        plan = replace(plan, num_batches=2, rounds=2, steps=1)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        variants, held_bytes = _measure(plan, device, Path(folder))
    precision = "fp32" if device.type == "cpu" else "bf16 autocast"
    return {
        "shapes": f"{plan.preset}, {plan.batch} x {plan.length} tokens, {precision}, {held_bytes / 1e9:.2f} GB of rows "
        f"and Adam's state, {plan.rounds} rounds of {plan.steps} steps each, in turn, on {plan.num_batches} batches "
        "that come round",
        "device": device.type,
        "held_bytes": held_bytes,
        "variants": variants,
    }


def verdict(result: dict[str, Any]) -> str:
    """What RAM costs compared with the device; on a CPU alone, that this run cannot tell."""
    costs = {kind: f"{1 - result['variants'][kind]['share']:+.1%}" for kind in (EXACT, STALE)}
    how = (
        'Updates run within the optimizer\'s step, or behind the next forward pass: "exact" waits for them where rows '
        'are needed, "stale" reads rows one update old.'
    )
    if result["device"] == "cpu":
        return (
            f"No accelerator here: says nothing about offload. All places are memory of the same CPU (exact costs "
            f"{costs[EXACT]}, stale {costs[STALE]} of its tokens/s); rows read from it are copied, which is what "
            f'"MB moved" counts. {how}'
        )
    name = result["machine"]["accelerator"] or result["device"]
    return (
        f"On {name}, tables in RAM cost {costs[EXACT]} of tokens/s where updates overlap exactly and {costs[STALE]} "
        f"where they are stale (the target is at most 2 %). {how}"
    )
