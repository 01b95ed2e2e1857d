"""A rank's work: one step of a model whose tables are spread over ranks, beside the same step in one process."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engrammar.train.exchange import leave_processes
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables
from models import tiny_model

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}


def step(model, kind: str, ids: torch.Tensor) -> float:
    optimizer = build_optimizer(
        getattr(model, "module", model), OptimizerSettings(memory=kind, max_grad_norm=0.5), **SETTINGS
    )
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def whole_table(placement, name: str) -> torch.Tensor:
    parts = [None] * placement.num_ranks
    dist.all_gather_object(parts, placement.tables[name].detach())
    return torch.cat(parts)


def compare(kind: str, where: str, ids: torch.Tensor) -> dict[str, float]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    alone = tiny_model("paper", num_branches=2).train()
    loss_alone = step(alone, kind, ids)
    spread = tiny_model("paper", num_branches=2).train()
    placement = place_tables(spread, where=where)
    losses = [None] * num_ranks
    dist.all_gather_object(losses, step(DistributedDataParallel(spread), kind, ids.chunk(num_ranks)[rank]))
    expected = {name: table.weight for name, table in alone.named_modules() if name in placement.tables}
    found = {name: whole_table(placement, name) for name in placement.tables}
    traffic = placement.traffic
    row_bytes = 4 * next(iter(found.values())).shape[1]
    return {
        "largest_loss_difference": abs(sum(losses) / num_ranks - loss_alone),
        "largest_weight_difference": max(float((found[name] - expected[name]).abs().max()) for name in found),
        "rows_held": len(next(iter(placement.tables.values()))),
        "num_rows": len(next(iter(found.values()))),
        "sent_bytes": traffic.ids + traffic.rows + traffic.gradients,
        "undeduplicated_bytes": traffic.num_looked_up * (8 + 2 * row_bytes),
    }


def compare_with_one_process(folder: Path) -> None:
    dist.init_process_group("gloo")
    ids = torch.randint(3, 53, (6, 13), generator=torch.Generator().manual_seed(1))
    report = {
        f"{kind} {where}": compare(kind, where, ids)
        for kind in ("adam", "row_adam", "sinkhorn")
        for where in ("device", "ram")
    }
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    leave_processes()
