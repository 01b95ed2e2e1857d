"""Runs torchtitan's own `train.main` on a CPU over gloo: what it takes for granted of an accelerator is replaced.

usage: titan_cpu.py NOTES [--averaged] TORCHTITAN-ARGUMENTS
The last rank adds a line of losses and norms to NOTES for each step.
"""

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch._utils
import torch.distributed as dist
import torch.nn.functional as F

torch.set_num_threads(1)
torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan takes "cuda" where there is none
sys.modules["triton"] = None
sys.modules["torchtitan.distributed.minimal_async_ep.kernels"] = MagicMock()

import torchtitan.tools.utils as tools  # noqa: E402

tools.device_module = types.SimpleNamespace(
    set_device=lambda device: None, device_count=lambda: 1, current_device=lambda: 0, synchronize=lambda *a: None,
    get_device_name=lambda device=None: "cpu", empty_cache=lambda: None, reset_peak_memory_stats=lambda *a: None,
    get_device_properties=lambda device=None: types.SimpleNamespace(total_memory=8 << 30),
    memory_stats=lambda device=None: {}, is_available=lambda: True,
)  # fmt: skip
tools.get_local_device = lambda: torch.device("cpu")
plain_barrier = dist.barrier
dist.barrier = lambda group=None, async_op=False, device_ids=None: plain_barrier(group=group, async_op=async_op)
if not hasattr(dist, "set_timeout"):  # torchtitan 0.3.0 calls what torch 2.13.0 lacks
    from torch.distributed.distributed_c10d import _set_pg_timeout

    dist.set_timeout = lambda timeout, group=None: _set_pg_timeout(timeout, group)

import torchtitan.distributed.fsdp as fsdp  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

without_division = fsdp.disable_fsdp_gradient_division


def summed(model) -> None:
    """gloo has no sum with a factor."""
    without_division(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


fsdp.disable_fsdp_gradient_division = summed

from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts  # noqa: E402


class Causal(ScaledDotProductAttention):
    """Plain causal attention, of whole rows, or of what a mask of booleans allows."""

    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        pass

    def forward(self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks=None, scale=None, **_):
        heads = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        causal = attention_masks is None
        return F.scaled_dot_product_attention(*heads, attention_masks, scale=scale, is_causal=causal).transpose(1, 2)


def exact_experts(self, x, counts):
    """Experts in fp32, one by one; torchtitan's own are in bf16."""
    w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
    out, first = torch.zeros_like(x), 0
    for expert, count in enumerate(counts.long().tolist()):
        own = x[first : first + count]
        inner = F.silu(own @ w1[expert].T) * (own @ w3[expert].T)
        out[first : first + count] = inner @ w2[expert].T
        first += count
    return out


GroupedExperts.forward = exact_experts

from torchtitan.components.metrics import BaseLogger, LoggerContainer  # noqa: E402

import engrammar.titan.config_registry as configs  # noqa: E402
from engrammar.titan.metrics import MemoryMetrics  # noqa: E402
from engrammar.train.placement import TablePlacement  # noqa: E402

# A large eps: with a small one a gradient that rounding alone makes non-zero moves a weight by a whole lr.
plain_adamw = configs.default_adamw
configs.default_adamw = lambda lr: plain_adamw(lr=lr, eps=1e-3)
plain_spec = configs.spec


def spec_for_cpu(name, model):
    for layer in model.layers:
        assert isinstance(layer.attention.inner_attention, FlexAttention.Config)
        layer.attention.inner_attention = Causal.Config()
    return plain_spec(name, model)


configs.spec = spec_for_cpu


def main() -> None:
    notes, arguments = Path(sys.argv[1]), sys.argv[2:]
    if "--averaged" in arguments:  # the control: rows averaged over ranks, as dense gradients are not
        arguments.remove("--averaged")
        start = TablePlacement.__init__
        TablePlacement.__init__ = lambda self, *a, **k: start(self, *a, **{**k, "reduce": "mean"})
    log, tables = MemoryMetrics.log, []

    def noted(self, step, *losses, extra_metrics=None):
        tables[:] = [name for placement in self.optimizers.placements() for name in placement.tables]
        log(self, step, *losses, extra_metrics=extra_metrics)

    def note(self, metrics, step):
        memory = {name.removeprefix("memory/"): value for name, value in metrics.items() if name.startswith("memory/")}
        loss, norm = metrics["loss_metrics/global_avg_loss"], metrics["grad_norm"]
        if dist.get_rank() == dist.get_world_size() - 1:  # the last stage of a pipeline has the loss
            with notes.open("a") as file:
                print(json.dumps({"step": step, "loss": loss, "norm": norm, "tables": tables, **memory}), file=file)

    MemoryMetrics.log, BaseLogger.log, LoggerContainer.log = noted, note, note
    sys.argv = ["train", *arguments]
    from torchtitan.train import main as train

    train()


if __name__ == "__main__":
    main()
