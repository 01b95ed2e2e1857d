"""Tables over ranks: the loss compared with one process's, memory per rank, bytes on the wire, and the time of a step.

Run by torchrun, this module is one rank.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from engrammar.cells import Column
from engrammar.memory import Retrieved, memory_of
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.presets import SMALL_MEMORY, preset
from engrammar.train.exchange import leave_processes
from engrammar.train.optimizer import MixedOptimizer, OptimizerSettings, build_optimizer
from engrammar.train.placement import TablePlacement, place_tables
from engrammar_lab.bench.figures import line_by_line, meets
from engrammar_lab.bench.models import random_model
from engrammar_lab.bench.rows import LENGTH, bytes_held, draw_ids

RANKS = (1, 2, 4)
BATCH = 8  # over all ranks
NUM_STEPS, QUICK_STEPS = 50, 4
WARM_UP = 3  # steps that are not timed
FIRST = 10  # steps within which rounding has not grown yet
TARGET = 1e-5  # for the fp64 difference over all steps
KINDS = ("ids", "rows", "gradients")
COLUMNS = (
    Column("ranks", "ranks"),
    Column(f"fp64 loss, to one process, first {FIRST} steps", "differences.fp64_first", ".1e"),
    Column("all steps", "differences.fp64", ".1e"),
    Column("fp32, to one process", "differences.fp32", ".1e"),
    Column("fp32, one process in as many passes", "differences.passes", ".1e"),
    Column("fp32, ranks to passes", "differences.ranks_to_passes", ".1e"),
    Column("table MB", "table_bytes", ".2f", 1e6),
    Column("state MB", "state_bytes", ".2f", 1e6),
    *(Column(f"{kind}, kB/step", f"wire.{kind}", ".1f", 1e3) for kind in KINDS),
    Column("undeduplicated", "wire.undeduplicated", ".1f", 1e3),
    Column("step ms", "milliseconds", ".0f"),
)
table = line_by_line(COLUMNS, lambda result: result["ranks"])
Precision = Literal["fp64", "fp32"]
Run = dict[str, Any]  # a training run, as the first rank records it


class Fp64Casts(TorchFunctionMode):
    """Turns casts to fp32 into casts to fp64: transformers' norms, softmax and router cast whatever the weights are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def precise(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(precise, args), **{key: precise(value) for key, value in (kwargs or {}).items()})


def shape() -> EngrammarConfig:
    """A model between `micro` and `nano`; the tables of its two memory layers outweigh the rest."""
    memory = {**SMALL_MEMORY, "layers": [1, 2], "num_heads": 4, "head_dim": 16, "rows_per_head": [10_000, 10_000]}
    smaller: dict[str, Any] = {
        "vocab_size": 1024,
        "num_hidden_layers": 3,
        "intermediate_size": 384,
        "n_routed_experts": 8,
    }
    return preset("nano", memory=memory, **smaller)


def _build(precision: Precision) -> tuple[DistributedDataParallel, TablePlacement, MixedOptimizer]:
    """The model under DDP, its tables placed without any rank holding a whole one, and the optimizer of both.

    fp64 does without Muon, which computes in fp32.
    """
    model = random_model(shape(), "external").train()
    if precision == "fp64":
        model.double()
    placement = place_tables(model, where="ram")
    optimizer = build_optimizer(
        model,
        OptimizerSettings(matrices="adamw" if precision == "fp64" else "muon", max_grad_norm=1.0),
        lr=5e-5 if precision == "fp64" else 1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-6 if precision == "fp64" else 1e-8,
    )
    return DistributedDataParallel(model), placement, optimizer


def _accumulate(
    model: DistributedDataParallel, precision: Precision, passes: list[Tensor], reads: list[Retrieved]
) -> Tensor:
    """Accumulates the gradients of the mean loss over the passes; returns that loss, in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for ids_BT, retrieved in zip(passes, reads):
        with Fp64Casts() if precision == "fp64" else nullcontext():
            logits_BTV = model(input_ids=ids_BT, retrieved=retrieved, use_cache=False).logits
        loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        (loss / len(passes)).backward()
        total += loss.detach().double() / len(passes)
    return total


def train(precision: Precision, num_steps: int, num_passes: int) -> Run:
    """Trains on this rank's share of every batch, in `num_passes` accumulated passes.

    Returns:
        `losses`, the mean over the whole batch at every step; `milliseconds`, the median of a step from reading ahead
        to the update; `table_bytes` and `state_bytes`, as `_bytes_held` says; and `wire`, as `_wire` says.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model, placement, optimizer = _build(precision)
    losses, seconds = [], []
    for step in range(num_steps):
        ids_BT = draw_ids(shape().vocab_size, BATCH, seed=step)
        passes = list(ids_BT.chunk(num_ranks)[rank].chunk(num_passes))
        dist.barrier()
        started = time.perf_counter()
        memory = memory_of(model)
        assert memory is not None
        reads = memory.retrieve_step([{"input_ids": part_BT} for part_BT in passes])
        loss = _accumulate(model, precision, passes, reads)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        dist.all_reduce(loss)
        losses.append(loss.item() / num_ranks)
    wire, milliseconds = _wire(placement, num_steps), 1e3 * median(seconds[WARM_UP:])
    return {"losses": losses, "milliseconds": milliseconds, **_bytes_held(placement, optimizer), "wire": wire}


def _bytes_held(placement: TablePlacement, optimizer: MixedOptimizer) -> dict[str, int]:
    """Bytes of rows and of their optimizer state, on the rank that holds most."""
    held = torch.tensor(bytes_held(placement, optimizer))
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return dict(zip(("table_bytes", "state_bytes"), held.tolist()))


def _wire(placement: TablePlacement, num_steps: int) -> dict[str, float]:
    """Bytes that leave a rank in a step, by kind; the mean over ranks.

    "undeduplicated" is an id, a row and a gradient for every lookup elsewhere.
    """
    traffic, num_ranks = placement.traffic, placement.num_ranks
    a_row = next(iter(placement.tables.values()))[0].nbytes
    undeduplicated = traffic.num_looked_up * (8 + 2 * a_row) * (num_ranks - 1) / num_ranks
    counts = torch.tensor([*(getattr(traffic, kind) for kind in KINDS), undeduplicated], dtype=torch.float64)
    dist.all_reduce(counts)
    return dict(zip((*KINDS, "undeduplicated"), (counts / num_ranks / num_steps).tolist()))


def _run_rank(out: Path, num_steps: int) -> None:
    """Trains in fp64 and in fp32 on one rank; the first rank writes `out`.

    A process that is alone also accumulates as many passes as other runs have ranks.
    """
    dist.init_process_group("gloo")
    num_passes = RANKS if dist.get_world_size() == 1 else (1,)
    runs = {"fp64": train("fp64", num_steps, 1)} | {f"fp32 {n}": train("fp32", num_steps, n) for n in num_passes}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(runs))
    leave_processes()


def _torchrun(num_ranks: int, num_steps: int) -> dict[str, Run]:
    """The runs of that many ranks, by name; each rank has one thread.

    Raises:
        subprocess.CalledProcessError: a rank failed; its error is on stderr.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "runs.json"
        subprocess.run(
            [*launch, "-m", "engrammar_lab.bench.sharded", str(out), str(num_steps)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        return json.loads(out.read_text())


def _largest_difference(run: Run, other: Run, num_steps: int | None = None) -> float:
    """The largest difference of any step's loss, or of any of the first `num_steps`."""
    return max(abs(a - b) for a, b in list(zip(run["losses"], other["losses"], strict=True))[:num_steps])


def bench_sharded(quick: bool) -> dict[str, Any]:
    """Trains one model over 1, 2 and 4 processes at the same global batch, tables in RAM in equal shares.

    Returns:
        per number of ranks: `differences`, the largest of any step's loss; bytes of tables and of their state on the
        rank that holds most; bytes that leave a rank in a step, by kind; ms of an fp32 step; and the fp32 losses.
        The differences are to one process in fp64 (`fp64_first`: over the first 10 steps) and in fp32; between one
        process that accumulates as many passes and one that does not (`passes`: rounding alone); and between the ranks
        and those passes (`ranks_to_passes`).
    """
    num_steps = QUICK_STEPS if quick else NUM_STEPS
    runs = {num_ranks: _torchrun(num_ranks, num_steps) for num_ranks in RANKS}
    alone = runs[1]
    rows = []
    for num_ranks, own in runs.items():
        passes, run = alone[f"fp32 {num_ranks}"], own["fp32 1"]
        differences = {
            "fp64_first": _largest_difference(own["fp64"], alone["fp64"], FIRST),
            "fp64": _largest_difference(own["fp64"], alone["fp64"]),
            "fp32": _largest_difference(run, alone["fp32 1"]),
            "passes": _largest_difference(passes, alone["fp32 1"]),
            "ranks_to_passes": _largest_difference(run, passes),
        }
        rows.append({"ranks": num_ranks, "differences": differences, **run})
    return {
        "shapes": f"{BATCH} x {LENGTH} tokens over all ranks, {num_steps} steps, DDP on gloo, each rank a process with "
        "one thread, tables in RAM",
        "ranks": rows,
    }


def verdict(result: dict[str, Any]) -> str:
    """How much the curves differ, what a rank holds and sends, and what its time means on this machine."""
    first, *others = result["ranks"]
    cores, most = result["machine"]["cores"], others[-1]["ranks"]

    def each(values: list[str]) -> str:
        return ", ".join(f"{value} with {row['ranks']} ranks" for value, row in zip(values, others))

    def differences(key: str) -> str:
        return each([format(row["differences"][key], ".1e") for row in others])

    shares = each([f"{row['table_bytes'] / first['table_bytes']:.2%}" for row in others])
    sent = each([f"{sum(row['wire'][kind] for kind in KINDS) / row['wire']['undeduplicated']:.0%}" for row in others])
    met = all(row["differences"]["fp64"] < TARGET for row in others)
    crowded = f" {most} ranks share {cores} cores: their step time is not that of {most} machines." * (cores < most)
    return (
        f"Largest difference of any step's loss. In fp64 (AdamW, rate 5e-5, eps 1e-6) it is "
        f"{differences('fp64_first')} over the first {FIRST} steps "
        f"and {differences('fp64')} over {len(first['losses'])}, which "
        f"{meets(met, f'{TARGET:.0e}')}: what differs is rounding, and it grows from step to step. In fp32 (Muon) the "
        "yardstick is one process that splits its batch into as many accumulated passes: it differs from one pass by "
        f"{differences('passes')}, the ranks from it by {differences('ranks_to_passes')}. A rank holds {shares} of the "
        f"tables' bytes (the one with most rows). It sends {sent} of what it would if every lookup sent its id, row "
        f"and gradient.{crowded}"
    )


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), int(sys.argv[2]))
