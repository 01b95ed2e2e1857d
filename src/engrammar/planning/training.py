"""What a training step of a preset costs on a cluster: memory of a rank, bytes that it sends, what hides behind what.

Counts (parameters, rows, bytes) follow from the model and are compared with runs in the tests; speeds are assumptions
(`Cluster`), and so are times. Letters: C row width, L blocks, D hidden size, M residual branches.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch

from engrammar.config import MemoryConfig, check_setting
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import model_class
from engrammar.train.optimizer import MatrixOptimizerKind, group_parameters
from engrammar.train.row_optimizers import RowOptimizerKind, state_bytes_per_row

Where = Literal["device", "ram", "file"]
WHERE: tuple[Where, ...] = ("device", "ram", "file")
FP32, BF16, ID = 4, 2, 8
MOMENTS = {"muon": 1, "adamw_decay": 2, "adamw_no_decay": 2}  # fp32 numbers of state for each parameter


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Speeds of one rank, a GPU. The defaults are assumptions for nodes of 8 H100 SXM (80 GB), none measured here."""

    gpus_per_node: int = 8  # GPUs that reach each other faster than the network
    gpu_bytes: float = 80e9
    flops_per_s: float = 346e12  # what the model reaches: 35 % of the 989 TFLOP/s of dense bf16
    gpu_bytes_per_s: float = 1.0e12  # gathering and scattering rows in the GPU's memory, a third of its bandwidth
    node_bytes_per_s: float = 300e9  # sent to GPUs of the node (NVLink), of 450 GB/s
    network_bytes_per_s: float = 35e9  # sent to other nodes by a GPU, of its 400 Gb/s
    host_bytes_per_s: float = 1.5e9  # sent between hosts' RAM by a rank, over gloo and TCP
    pcie_bytes_per_s: float = 45e9  # between RAM and GPU
    host_rows_per_s: float = 10e6  # rows gathered from RAM by a rank
    host_updates_per_s: float = 5e6  # rows updated in RAM by a rank
    disk_reads_per_s: float = 2e6  # random 4 KiB reads and writes of a node's disks, which its ranks share


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and how."""

    config: EngrammarConfig
    gpus: int  # ranks, all of one data-parallel group: the backbone is sharded over them (FSDP2), and so are the tables
    tokens: int  # tokens of a rank's step
    share: float  # distinct rows divided by rows looked up, of a rank's step
    memory: RowOptimizerKind = "row_adam"
    matrices: MatrixOptimizerKind = "muon"
    table_bytes: int = FP32  # bytes of a value of a table: 4 (fp32) or 2 (bf16)

    def __post_init__(self) -> None:
        if self.config.memory_config is None:
            raise ValueError("This model has no memory: plan a preset that has one.")
        check_setting("gpus", self.gpus, self.gpus >= 1, "1 or more")
        check_setting("tokens", self.tokens, self.tokens >= 1, "1 or more")
        check_setting("The share of distinct rows", self.share, 0 < self.share <= 1, "over 0, up to 1")

    @property
    def rows(self) -> MemoryConfig:
        assert self.config.memory_config is not None
        return self.config.memory_config

    @property
    def remote(self) -> float:
        """The share of rows that another rank holds: the hash spreads rows evenly."""
        return (self.gpus - 1) / self.gpus

    @property
    def looked_up(self) -> int:
        """Rows of a rank's step, repeats included."""
        return self.tokens * self.rows.num_columns * len(self.rows.layers)

    @property
    def distinct(self) -> float:
        return self.looked_up * self.share

    @property
    def rows_held(self) -> int:
        """Rows of all tables that the fullest rank holds."""
        geometry = self.config.memory_geometry
        return sum(-(-geometry.num_stored_rows(index) // self.gpus) for index in range(len(self.rows.layers)))

    @cached_property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For each parameter of the backbone, its group of optimizer and its shape."""
        with torch.device("meta"):
            model = model_class(self.config)(self.config, tables="external")
        groups = group_parameters(model, None, self.matrices)
        group_of = {id(param): group for group, params in groups.items() for param in params}
        return {name: (group_of[id(param)], tuple(param.shape)) for name, param in model.named_parameters()}

    @cached_property
    def active(self) -> dict[str, float]:
        """Parameters that multiply a token, by block ("0", "1", ...); the head is "head"."""
        visited = self.config.num_experts_per_tok / max(self.config.n_routed_experts or 1, 1)
        counts: Counter[str] = Counter()
        for name, (_, shape) in self.shapes.items():
            if "embed_tokens" not in name:
                counts[block_of(name)] += prod(shape) * (visited if ".experts." in name else 1)
        return dict(counts)


def block_of(name: str) -> str:
    """The number of the block that a parameter is in; "head" outside of them."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return found[1] if found else "head"


def sharded_bytes(job: Job) -> dict[str, int]:
    """fp32 weights, gradients and optimizer state of the backbone on the fullest rank, cut along dimension 0."""
    held: Counter[str] = Counter()
    for group, shape in job.shapes.values():
        own = -(-shape[0] // job.gpus) * prod(shape[1:]) * FP32
        held["weights"] += own
        held["gradients"] += own
        held["optimizer state"] += own * MOMENTS[group]
    return dict(held)


def table_bytes(job: Job) -> dict[str, int]:
    """The fullest rank's rows, and the row optimizer's state once every row was touched."""
    width = job.rows.head_dim
    return {
        "table rows": job.rows_held * width * job.table_bytes,
        "rows' optimizer state": job.rows_held * state_bytes_per_row(job.memory, width),
    }


def step_bytes(job: Job) -> dict[str, float]:
    """What a step takes on the GPU on top, at its fullest.

    Every block keeps its input only (full activation checkpointing), one block's matrices keep their inputs and outputs
    while it is recomputed, two blocks and the head are gathered in bf16, and the loss makes no logits of all tokens
    (`chunked_loss`).
    """
    config, tokens = job.config, job.tokens
    whole: Counter[str] = Counter()
    inner: Counter[str] = Counter()
    for name, (_, shape) in job.shapes.items():
        block = block_of(name)
        whole[block] += prod(shape) * BF16
        if len(shape) >= 2 and block != "head":
            copies = config.num_experts_per_tok if ".experts." in name else 1
            inner[block] += copies * sum(shape[-2:]) * tokens * BF16
    root = whole.pop("head")
    largest = max(whole.values())
    return {
        "gathered blocks": 2 * largest + root,
        "gradients not yet scattered": largest + root,
        "activations": config.num_hidden_layers * tokens * config.num_branches * config.hidden_size * BF16
        + max(inner.values()),
        "rows of the step": job.distinct * job.rows.head_dim * 2 * FP32  # values and gradients
        + job.looked_up * (ID + job.rows.head_dim * BF16),  # places, and the rows of every token side by side
    }


def sent_bytes(job: Job) -> dict[str, float]:
    """Bytes that a rank sends to others in a step, by kind."""
    rows, width = job.distinct * job.remote, job.rows.head_dim
    backbone = sum(prod(shape) for _, shape in job.shapes.values())
    return {
        "row numbers": rows * ID,
        "rows": rows * width * job.table_bytes,
        "row gradients": rows * width * FP32,
        "weights": 2 * backbone * BF16 * job.remote,  # gathered for the forward pass, and again for backward
        "gradients": backbone * BF16 * job.remote,
    }


def device_seconds(job: Job, cluster: Cluster, num_bytes: float) -> float:
    """Seconds for bytes that a GPU sends evenly to all others; links of a node and of the network run at once."""
    if job.gpus == 1:
        return 0.0
    near = min(job.gpus, cluster.gpus_per_node) - 1
    far = job.gpus - 1 - near
    per_peer = num_bytes / (job.gpus - 1)
    return max(per_peer * near / cluster.node_bytes_per_s, per_peer * far / cluster.network_bytes_per_s)


def row_seconds(job: Job, cluster: Cluster, where: Where) -> dict[str, float]:
    """Seconds to bring a step's rows, to return their gradients, and to update them."""
    sent, width = sent_bytes(job), job.rows.head_dim
    asked, returned = sent["row numbers"] + sent["rows"], sent["row gradients"]
    if where == "device":
        row = job.distinct * width * job.table_bytes
        return {
            "bring rows": device_seconds(job, cluster, asked) + row / cluster.gpu_bytes_per_s,
            "return gradients": device_seconds(job, cluster, returned),
            "update rows": 4 * row / cluster.gpu_bytes_per_s,
        }
    copied = job.distinct * width * FP32 / cluster.pcie_bytes_per_s
    reads = job.distinct / (cluster.disk_reads_per_s / cluster.gpus_per_node) if where == "file" else 0.0
    return {
        "bring rows": asked / cluster.host_bytes_per_s + job.distinct / cluster.host_rows_per_s + copied + reads,
        "return gradients": returned / cluster.host_bytes_per_s + copied,
        "update rows": job.distinct / cluster.host_updates_per_s + reads,  # pages are written back
    }


def step_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Seconds of computing: a step with everything recomputed once, and the blocks before the first with memory."""
    first = job.rows.layers[0]
    per_pass = 2 * job.tokens / cluster.flops_per_s
    before = sum(job.active[str(block)] for block in range(first))
    return {"step": 4 * per_pass * sum(job.active.values()), "blocks before memory": per_pass * before}


def exposed_seconds(job: Job, cluster: Cluster, where: Where) -> dict[str, tuple[float, float]]:
    """For each of `row_seconds`, how long it takes and how much of it the step waits for.

    On the device rows are exchanged and updated in order with the model's own work: nothing hides. Elsewhere a thread
    updates rows and then brings the next step's, while the blocks before the first with memory compute
    (overlap="exact"); gradients are returned between backward and the optimizer's step, which waits.
    """
    seconds = row_seconds(job, cluster, where)
    if where == "device":
        return {kind: (taken, taken) for kind, taken in seconds.items()}
    window = step_seconds(job, cluster)["blocks before memory"]
    updated = max(0.0, seconds["update rows"] - window)
    window -= min(window, seconds["update rows"])
    return {
        "bring rows": (seconds["bring rows"], max(0.0, seconds["bring rows"] - window)),
        "return gradients": (seconds["return gradients"],) * 2,
        "update rows": (seconds["update rows"], updated),
    }


def make_training_plan(job: Job, cluster: Cluster, where: Where) -> dict[str, Any]:
    """The plan of one placement as plain data: bytes and seconds of a rank and step."""
    gpu: dict[str, float] = {**sharded_bytes(job), **step_bytes(job)}
    tables = table_bytes(job)
    gpu |= tables if where == "device" else {}
    elsewhere: Mapping[str, int] = {} if where == "device" else tables
    exposed = exposed_seconds(job, cluster, where)
    computing, sent = step_seconds(job, cluster)["step"], sent_bytes(job)
    dense = device_seconds(job, cluster, sent["weights"] + sent["gradients"])
    step = max(computing, dense)
    waits = sum(waited for _, waited in exposed.values())
    return {
        "gpus": job.gpus,
        "where": where,
        "gpu_bytes": gpu,
        "gpu_total": sum(gpu.values()),
        "fits": sum(gpu.values()) <= cluster.gpu_bytes,
        "ram_total": sum(elsewhere.values()) if where == "ram" else 0,
        "file_total": sum(elsewhere.values()) if where == "file" else 0,
        "sent_bytes": sent,
        "seconds": {"computing": computing, "weights and gradients": dense, **{k: v for k, (v, _) in exposed.items()}},
        "waits": {kind: waited for kind, (_, waited) in exposed.items()},
        "step_seconds": step + waits,
        "share_of_step": waits / (step + waits),
    }
