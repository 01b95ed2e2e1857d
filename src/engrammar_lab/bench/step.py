"""What memory costs a training step: tokens/s with it and without, at equal total and active parameters.

The same command measures what the number of rows costs (`bench.rows`).
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engrammar.cells import Column
from engrammar.model.budget import count_parameters, solve_budget
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.presets import preset
from engrammar.train.optimizer import build_optimizer, clip_grad_norm
from engrammar_lab.bench.figures import line_by_line, named
from engrammar_lab.bench.models import random_model
from engrammar_lab.bench.rows import FULL, LENGTH, QUICK, bench_rows, draw_ids
from engrammar_lab.bench.turns import measured_in_turn, rates_of, seconds_of

BATCH, RHO = 16, 0.78
PHASES = ("retrieval", "forward", "backward", "optimizer")
COLUMNS = (
    Column("", "name"),
    Column("total", "total_parameters", ","),
    Column("active", "active_parameters", ","),
    Column("tokens/s", "tokens_per_second", ",.0f"),
    Column("best", "best_tokens_per_second", ",.0f"),
    *(Column(f"{phase}, ms", f"milliseconds.{phase}", ".1f") for phase in PHASES),
    Column("MFLOPs/token", "flops_per_token", ".2f", 1e6),
    Column("share of peak", "share_of_peak", ".0%"),
)
table = line_by_line(COLUMNS, lambda result: named(result["models"]))


def _pair() -> dict[str, EngrammarConfig]:
    """The plain `nano` and the one with memory, equal in total and active parameters."""
    own = preset("nano")
    plain = preset("nano", memory=None, num_classes=own.vocab_size, fill_class=0)
    assert own.memory_config is not None
    return {"moe": plain, "moe + memory": solve_budget(plain, own.memory_config, rho=RHO)}


def _stepper(config: EngrammarConfig, ids: list[Tensor]) -> Callable[[int], dict[str, float]]:
    model = random_model(config).train()
    memory = model.model.memory
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)

    def step(index: int) -> dict[str, float]:
        batch = ids[index % len(ids)]
        marks = [time.perf_counter()]
        if memory is not None:
            with torch.no_grad():
                memory.retrieve(batch)  # timed alone, in addition to the one inside the forward pass
        marks.append(time.perf_counter())
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        return {phase: after - before for phase, before, after in zip(PHASES, marks, marks[1:])}

    return step


def _flops_per_token(config: EngrammarConfig, ids: Tensor) -> float:
    """Floating point operations of forward and backward per token: three times what torch counts for the forward pass.

    torch's counter mistakes the backward pass of a depthwise convolution for that of a full one.
    """
    model = random_model(config).train()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False)
    return 3 * counter.get_total_flops() / ids.numel()


def _peak_flops(seconds: float) -> float:
    """The best rate of a large fp32 matrix product in this run: the machine's limit."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, seconds_of(torch.matmul, a, b))
    return 2 * 1024**3 / best


def bench_step(quick: bool) -> dict[str, Any]:
    """Times `nano` with and without memory, step by step in turn, so that both see the same machine.

    Returns:
        tokens/s (median and best of the steps), the phases in ms, FLOPs per token, and the share of the machine's fp32
        matrix rate measured in the same run. `memory_tax` is the share of throughput that memory costs. `rows` is
        what `bench_rows` returns.
    """
    repeats, warmup = (4, 1) if quick else (40, 4)
    pair = _pair()
    ids = [draw_ids(pair["moe"].vocab_size, BATCH, seed=seed) for seed in range(8)]
    steppers = {name: _stepper(config, ids) for name, config in pair.items()}
    times = measured_in_turn(lambda turn, _place, name: steppers[name](turn), pair, repeats, warm_up=warmup)
    steps = {name: [sum(one.values()) - one["retrieval"] for one in own] for name, own in times.items()}
    rows, peak = rates_of(steps, BATCH * LENGTH, "tokens"), _peak_flops(0.5 if quick else 2.0)
    for name, config in pair.items():
        flops = _flops_per_token(config, ids[0])
        rows[name] |= count_parameters(config).to_json() | {
            "milliseconds": {p: 1e3 * median(phases[p] for phases in times[name]) for p in PHASES},
            "flops_per_token": flops,
            "share_of_peak": rows[name]["tokens_per_second"] * flops / peak,
        }
    with_memory, without = rows["moe + memory"], rows["moe"]
    return {
        "shapes": f"nano, {BATCH} x {LENGTH} tokens, fp32, {repeats} steps each, in turn",
        "peak_gflops": peak / 1e9,
        "models": rows,
        "memory_tax": 1 - with_memory["tokens_per_second"] / without["tokens_per_second"],
        "rows": bench_rows(QUICK if quick else FULL),
    }


def verdict(result: dict[str, Any]) -> str:
    """What memory costs, and the share of the machine's limit."""
    return (
        f"Memory costs {result['memory_tax']:.1%} of throughput (median over steps). The machine's limit, the best "
        f"fp32 matrix product of this run, is {result['peak_gflops']:.0f} GFLOP/s. Retrieval (hash and gather) is "
        "timed on its own, beside the one inside forward."
    )
