"""A rank's work: a few steps with the backbone in shards (FSDP2) and tables over the ranks; what was held and sent."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.train.exchange import leave_processes
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables
from models import VOCABULARY, tiny_config, tiny_memory

SEQUENCE, SEQUENCES, STEPS, RANKS = 64, 8, 3, 2
CLASSES = np.arange(VOCABULARY) % 41


def planned_config():
    memory = {**tiny_memory("paper"), "rows_per_head": [4001, 4001]}
    return tiny_config("paper", num_branches=2, memory=memory)


def text() -> np.ndarray:
    """Tokens with the repeats of a language, [sequences, SEQUENCE]."""
    weights = 1 / np.arange(1, VOCABULARY - 2)
    shape = (STEPS * RANKS * SEQUENCES, SEQUENCE)
    return np.random.default_rng(0).choice(np.arange(3, VOCABULARY), shape, p=weights / weights.sum())


def train_and_count(folder: Path, memory: str, matrices: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = EngrammarForCausalLM(planned_config()).train()
    model.model.memory.set_classes(torch.from_numpy(CLASSES))
    placement = place_tables(model)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    settings = OptimizerSettings(memory=memory, matrices=matrices)
    optimizer = build_optimizer(model, settings, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    steps = torch.from_numpy(text()).view(STEPS, RANKS, SEQUENCES, SEQUENCE)
    for step in range(STEPS):
        ids = steps[step, dist.get_rank()]
        model(ids, labels=ids).loss.backward()
        gradients = sum(local_bytes(param.grad) for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    traffic, rows = placement.traffic, optimizer.rows
    dense = [state for inner in optimizer.inner if inner is not rows for state in inner.state.values()]
    found = {
        "held": {
            "weights": sum(local_bytes(param) for param in model.parameters()),
            "gradients": gradients,
            "optimizer state": sum(local_bytes(v) for state in dense for key, v in state.items() if key != "step"),
            "table rows": sum(local_bytes(table) for table in placement.tables.values()),
            "rows' optimizer state": sum(local_bytes(v) for state in rows.state.values() for v in state.values()),
        },
        "sent": {
            "row numbers": traffic.ids / STEPS,
            "rows": traffic.rows / STEPS,
            "row gradients": traffic.gradients / STEPS,
        },
        "distinct": traffic.num_distinct / STEPS,
        "looked up": traffic.num_looked_up / STEPS,
    }
    (folder / f"counted-{dist.get_rank()}.json").write_text(json.dumps(found))
    leave_processes()


def local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()
