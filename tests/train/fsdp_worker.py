"""A rank's work: five steps of a model in one process, replicated (DDP) and with its dense part sharded (FSDP2)."""

import json
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engrammar.train.exchange import leave_processes
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables
from models import tiny_model

# A large eps: with a small one a gradient that rounding alone makes non-zero moves a weight by a whole lr.
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}


def train(how: Literal["alone", "replicated", "sharded"], matrices: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of five steps, and the dense weights after them."""
    model = tiny_model("paper", num_branches=2).train()
    called: torch.nn.Module = model
    rank, num_ranks = (0, 1) if how == "alone" else (dist.get_rank(), dist.get_world_size())
    if how != "alone":
        place_tables(model)
    if how == "replicated":
        called = DistributedDataParallel(model)
    if how == "sharded":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(param, DTensor) for param in model.parameters())
    optimizer = build_optimizer(model, OptimizerSettings(matrices=matrices, max_grad_norm=0.5), **SETTINGS)
    losses = []
    for seed in range(5):
        ids = torch.randint(3, 53, (6, 13), generator=torch.Generator().manual_seed(seed)).chunk(num_ranks)[rank]
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / num_ranks
        if how != "alone":
            dist.all_reduce(mean)
        losses.append(mean.item())
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return losses, {name: p.detach() for name, p in full.items() if "tables" not in name}


def compare_shardings(folder: Path) -> None:
    dist.init_process_group("gloo")
    report = {}
    for matrices in ("adamw", "muon"):
        losses, weights = train("alone", matrices)
        for how in ("replicated", "sharded"):
            found_losses, found = train(how, matrices)
            assert found.keys() == weights.keys()
            report[f"{matrices} {how}"] = {
                "largest_loss_difference": max(abs(a - b) for a, b in zip(found_losses, losses)),
                "largest_weight_difference": max(float((found[name] - weights[name]).abs().max()) for name in weights),
            }
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    leave_processes()
