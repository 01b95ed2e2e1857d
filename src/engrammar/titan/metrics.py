"""What torchtitan logs of memory: norms, rows, bytes and gates."""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from engrammar.titan.model import TitanFusion
from engrammar.titan.optimizers import MemoryOptimizers
from engrammar.train.exchange import Traffic


class MemoryMetrics(MetricsProcessor):
    """torchtitan's logs, with those of memory, over all ranks and per step since the last log."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(self, step: int, *losses: float, extra_metrics: dict[str, Any] | None = None) -> None:
        """As in torchtitan; the last of `losses` is the norm of the dense gradients alone. All ranks must call it."""
        assert isinstance(self.optimizers, MemoryOptimizers)
        layers = self.model_parts[0].memory_layers
        *gates, looked_up, distinct, num_bytes = self._counted(layers).tolist()
        num_steps = max(self.optimizers.num_steps, 1)
        self.optimizers.num_steps = 0
        found = {
            "memory/rows_grad_norm": self.optimizers.row_norm.item(),
            "memory/rows_looked_up": looked_up / num_steps,
            "memory/rows_distinct": distinct / num_steps,
            "memory/bytes_sent": num_bytes / num_steps,
        }
        for layer, total, num_means in zip(layers, gates[::2], gates[1::2]):
            found[f"memory/gate_mean/{layer}"] = total / max(num_means, 1)
        norm = float(self.optimizers.norm.item())
        super().log(step, *losses[:-1], norm, extra_metrics={**(extra_metrics or {}), **found})
        logger.info("  ".join(f"{name.removeprefix('memory/')}: {value:.4g}" for name, value in found.items()))

    def _counted(self, layers: tuple[int, ...]) -> Tensor:
        """For each layer the sum of its gates' means and their number, then rows and bytes; then all start anew."""
        assert isinstance(self.optimizers, MemoryOptimizers)
        counted = torch.zeros(2 * len(layers) + 3, dtype=torch.float64, device=self.optimizers.norm.device)
        for part in self.model_parts:
            for name, module in part.named_modules():
                if isinstance(module, TitanFusion):
                    place = 2 * layers.index(int(re.findall(r"layers\.(\d+)", name)[0]))
                    counted[place : place + 2] += module.gate_total
                    module.gate_total.zero_()
        for placement in self.optimizers.placements():
            traffic = placement.traffic
            num_bytes = traffic.ids + traffic.rows + traffic.gradients
            counted[-3:] += torch.tensor([traffic.num_looked_up, traffic.num_distinct, num_bytes]).to(counted)
            placement.traffic = Traffic()
        for name in ("loss", "pp"):
            if (mesh := self.parallel_dims.get_optional_mesh(name)) is not None:
                dist.all_reduce(counted, group=mesh.get_group())
        return counted
