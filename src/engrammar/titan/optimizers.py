"""torchtitan's optimizers with those of rows: one step, one norm over dense gradients and rows, one checkpoint."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer, register_moe_load_balancing_hook
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_

from engrammar.titan.retrieval import Retrieval, own_values
from engrammar.train.optimizer import clip_grad_norm
from engrammar.train.row_optimizers import RowOptimizerKind, build_row_optimizer


class MemoryOptimizers(OptimizersContainer):
    """torchtitan's optimizers of the model's parameters, and a row optimizer of each model part's tables."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """`max_norm` clips dense gradients and rows together; the trainer takes it from `training.max_norm`."""

        rows: RowOptimizerKind = "row_adam"
        rows_lr: float = 4e-3
        rows_betas: tuple[float, float] = (0.9, 0.95)
        rows_eps: float = 1e-8
        max_norm: float = math.inf

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        super().__init__(config, model_parts=model_parts)
        self.max_norm = config.max_norm
        self.dims: ParallelDims | None = None
        self.num_steps = 0  # since the last log
        self.norm = self.row_norm = torch.zeros(())  # of the last step: of dense gradients and rows, and of rows alone
        found = [module for part in model_parts for module in part.modules() if isinstance(module, Retrieval)]
        self.retrievals = [module for module in found if module.placement is not None]
        self.rows = []
        for placement in self.placements():
            tables = [{"params": list(placement.tables.values())}]
            rows = build_row_optimizer(
                config.rows, tables, lr=config.rows_lr, betas=config.rows_betas, eps=config.rows_eps
            )
            rows.backend = placement.backend
            self.rows.append(rows)

    def placements(self) -> list[Any]:
        return [module.placement for module in self.retrievals]

    def __iter__(self) -> Iterator[Any]:
        """All optimizers, for learning rate schedules."""
        return iter([*self.optimizers, *self.rows])

    def __len__(self) -> int:
        return len(self.optimizers) + len(self.rows)

    def clip(self) -> None:
        """Measures the norm of dense gradients and of rows, as one, and scales both down to `max_norm`."""
        dense = [param for part in self.model_parts for param in part.parameters()]
        pp = None if self.dims is None else self.dims.get_optional_mesh("pp")
        with_experts = self.dims is not None and self.dims.ep_enabled
        dense_norm = clip_grad_norm_(dense, math.inf, foreach=True, pp_mesh=pp, ep_enabled=with_experts)
        own = [clip_grad_norm(placement.tables.values(), math.inf, placement) for placement in self.placements()]
        squares = sum((norm.square() for norm in own), torch.zeros(())).to(dense_norm.device)
        if pp is not None:
            dist.all_reduce(squares, group=pp.get_group())
        self.row_norm = squares.sqrt()
        self.norm = norm = torch.hypot(dense_norm, self.row_norm)
        if self.max_norm < norm.item() < math.inf:
            scale = self.max_norm / (norm + 1e-6)
            for param in dense:
                if param.grad is not None:
                    param.grad.mul_(scale)
            for placement in self.placements():
                for table_RC in placement.tables.values():
                    if table_RC.grad is not None:
                        table_RC.grad.values().mul_(scale.to(table_RC.device))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.num_steps += 1
        for placement in self.placements():
            placement.collect()
        self.clip()
        for optimizer in self:
            optimizer.step()
        for placement in self.placements():
            for table_RC in placement.tables.values():
                table_RC.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for placement in self.placements():
            placement.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for name, key, whole, _ in self._row_states():
            state[f"state.{name}.{key}"] = whole
        for rows in self.rows[:1]:  # all have the same
            state["rows.lr"] = torch.tensor(rows.param_groups[0]["lr"], dtype=torch.float64)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name, key, _, own in self._row_states():
            given = own_values(state_dict[f"state.{name}.{key}"])
            if given.data_ptr() != own.data_ptr():
                own.copy_(given)
        for rows in self.rows:  # torchtitan's schedules do not set it before their next step
            rows.param_groups[0]["lr"] = float(state_dict["rows.lr"])

    def _row_states(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """For each state of each table its name, its key, the whole and this rank's part."""
        for module, rows in zip(self.retrievals, self.rows):
            assert module.placement is not None
            module.placement.flush()
            for name, table_RC in module.placement.tables.items():
                for key, own in rows.state_of(table_RC).items():
                    yield f"retrieval.tables.{name}.weight", key, module.whole(name, own), own


def with_rows(config: OptimizersContainer.Config, **rows: Any) -> MemoryOptimizers.Config:
    """torchtitan's settings of optimizers, with those of rows."""
    return MemoryOptimizers.Config(**{field.name: getattr(config, field.name) for field in fields(config)}, **rows)


def after_build(optimizers: MemoryOptimizers, model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
    """torchtitan's hook once the optimizers are built: experts are balanced, and norms know the ranks."""
    optimizers.dims = parallel_dims
    register_moe_load_balancing_hook(optimizers, model_parts, parallel_dims)
