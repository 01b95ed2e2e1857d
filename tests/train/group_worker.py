"""A rank's work: steps in which some of the ranks share tables, under the loss of an engine that sums gradients."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engrammar.train.exchange import leave_processes
from engrammar.train.optimizer import OptimizerSettings, build_optimizer, clip_grad_norm
from engrammar.train.placement import place_tables
from models import tiny_model

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}
MEMBERS = (0, 2)  # not the first ranks, so that a rank of the group is not the rank of the job
LENGTHS = (13, 4)  # tokens scored of each member's sequences: a mean over ranks is not the mean over tokens
STEPS = 3


def batch(step: int) -> torch.Tensor:
    return torch.randint(3, 53, (4, 13), generator=torch.Generator().manual_seed(step))


def labels_of(ids: torch.Tensor, length: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:, length:] = -100
    return labels


def nats(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).logits[:, :-1].mT, labels[:, 1:], ignore_index=-100, reduction="sum")


def train(group, num_tokens: int, **sharing: object) -> dict[str, object]:
    """Losses, total norms and rows of some steps; on one rank (`group` is None) or over the group's."""
    model = tiny_model("paper", num_branches=2).train()
    placement = place_tables(model, where="ram", group=group, **sharing)
    # adamw: Muon would hide a wrong scale of the dense part, as Adam does of the rows; the norm shows both
    optimizer = build_optimizer(model, OptimizerSettings(matrices="adamw", memory="adam"), **SETTINGS)
    losses, norms, row_norms = [], [], []
    for step in range(STEPS):
        parts = list(zip(batch(step).chunk(len(LENGTHS)), LENGTHS))
        if placement.num_ranks > 1:
            parts = [parts[dist.get_rank(group)]]
        loss = sum(nats(model, ids, labels_of(ids, length)) for ids, length in parts) / num_tokens
        loss.backward()
        loss = loss.detach()
        if placement.num_ranks > 1:
            for param in model.parameters():
                dist.all_reduce(param.grad, group=group)
            dist.all_reduce(loss, group=group)
        norms.append(optimizer.clip_grad_norm(math.inf).item())
        row_norms.append(clip_grad_norm(placement.tables.values(), math.inf, placement).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = {"losses": losses, "norms": norms, "row_norms": row_norms}
    return {**found, "rows": whole(placement, group), "num_ranks": placement.num_ranks}


def whole(placement, group) -> dict[str, torch.Tensor]:
    parts = [None] * placement.num_ranks
    own = {name: table.detach() for name, table in placement.tables.items()}
    if placement.num_ranks == 1:
        return own
    dist.all_gather_object(parts, own, group=group)
    return {name: torch.cat([part[name] for part in parts]) for name in own}


def compare(found: dict, expected: dict) -> dict[str, float]:
    def largest(name: str) -> float:
        return max(abs(a - b) / b for a, b in zip(found[name], expected[name]))

    return {
        **{name: largest(name) for name in ("losses", "norms", "row_norms")},
        "rows": max(float((found["rows"][name] - expected["rows"][name]).abs().max()) for name in expected["rows"]),
    }


def share_in_groups(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {members: dist.new_group(list(members)) for members in (MEMBERS, (1,))}
    group = groups[MEMBERS if rank in MEMBERS else (1,)]
    num_tokens = sum(2 * (length - 1) for length in LENGTHS)
    if rank == 1:  # a group of one: no exchange, whatever the convention
        alone = train(group, num_tokens, reduce="sum")
        assert alone["num_ranks"] == 1
        again = train(group, num_tokens, reduce="mean")
        assert again["losses"] == alone["losses"] and again["norms"] == alone["norms"]
        with pytest.raises(ValueError, match="Rank 1 is not in the group"):
            place_tables(tiny_model("paper"), group=groups[MEMBERS])
        torch.save(alone, folder / "alone.pt")
        dist.barrier()
    else:
        summed = train(group, num_tokens, reduce="sum")
        averaged = train(group, num_tokens, reduce="mean")
        dist.barrier()
        alone = torch.load(folder / "alone.pt")
        assert summed["num_ranks"] == 2
        if rank == 0:
            report = {"sum": compare(summed, alone), "mean": compare(averaged, alone)}
            (folder / "report.json").write_text(json.dumps(report))
    leave_processes()
