"""Optimizers: Muon for matrices, AdamW for the rest, a row optimizer for memory tables, behind the interface of one.

Letters: O output width, I input width, E experts of a stack, R rows of a table, C row width.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from engrammar.config import check_choice, check_setting
from engrammar.table import SparseTable
from engrammar.train.placement import TablePlacement, placement_of
from engrammar.train.row_optimizers import (
    Closure,
    Rounding,
    RowOptimizer,
    RowOptimizerKind,
    build_row_optimizer,
    evaluate,
    sum_by_row,
)
from engrammar.train.sparse import SparseRows

MatrixOptimizerKind = Literal["muon", "adamw"]
MemoryOptimizerKind = Literal[RowOptimizerKind, "dense_adam"]

# The quintic of Keller Jordan's post. Its slope at zero is as steep as five steps allow, so singular values end near 1
# (about 0.7 to 1.2), not at 1.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Matrices that AdamW trains in place of Muon: output head, router, depthwise convolution, hyper-connection mixers.
ADAMW_MATRICES = re.compile(r"(^|\.)lm_head\.|(^|\.)mlp\.gate\.weight$|conv(\.|_weight$)|(^|\.)(hc_)?fn$")


def orthogonalize(update: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix of `[O, I]`, or of each `[O, I]` of a stack `[E, O, I]`.

    This is the Newton-Schulz iteration of Jordan et al., https://kellerjordan.github.io/posts/muon. A zero matrix stays
    zero. The result is fp32 on the CPU (where a bf16 product is very slow) and bf16 elsewhere.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    num_rows, num_columns = update.shape[-2:]
    x = update.float().reshape(-1, num_rows, num_columns)
    x = x.mT if num_rows > num_columns else x  # the smaller Gram matrix of the two
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # the iteration needs singular values of at most 1
    x = x if x.device.type == "cpu" else x.bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if num_rows > num_columns else x).reshape(update.shape)


class Muon(Optimizer):
    """Orthogonalized Nesterov momentum for matrices `[O, I]` and stacks of matrices `[E, O, I]`.

    Each matrix of a stack gets the update that it would get alone. Weight decay is decoupled. The step is
    `lr * 0.2 * sqrt(max(O, I))`, the size of an AdamW step, so that both can have one lr.
    Sources: Muon (Jordan et al., https://kellerjordan.github.io/posts/muon); step size, arXiv 2502.16982.
    It equals `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which takes `[O, I]` only.

    Raises:
        ValueError: a parameter of other dimensions, or a sparse gradient.
    """

    def __init__(self, params: ParamsT, *, lr: float, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim not in (2, 3):
                    raise ValueError(
                        f"A parameter has shape {list(param.shape)}; allowed in Muon: [O, I] or [E, O, I]."
                    )

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure` returns."""
        loss = evaluate(closure)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise ValueError(
                        f"The gradient of a parameter {list(grad.shape)} is sparse; allowed in Muon: dense."
                    )
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                momentum_buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = orthogonalize(grad.lerp(momentum_buffer, momentum))
                param.mul_(1 - lr * group["weight_decay"])
                param.add_(update, alpha=-lr * 0.2 * math.sqrt(max(param.shape[-2:])))
        return loss


class DenseAdam(torch.optim.Adam):
    """torch's Adam on every row of a table in every step: the baseline of the row optimizers.

    Its time and memory grow with the size of the table.
    """

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for table_RC in group["params"]:
                grad = table_RC.grad
                table_RC.grad = torch.zeros_like(table_RC) if grad is None else grad.to_dense()
        return super().step(closure)


class MixedOptimizer(Optimizer):
    """Several optimizers behind the interface of one, for learning rate schedulers, accelerate and the Trainer.

    `param_groups` lists the inner optimizers' own group dicts, so a scheduler's changes to a group reach its optimizer.
    The groups are fixed at construction.
    """

    def __init__(
        self, inner: Sequence[Optimizer], placement: TablePlacement | None = None, max_grad_norm: float | None = None
    ) -> None:
        super().__init__([group for optimizer in inner for group in optimizer.param_groups], {})
        self.inner = tuple(inner)
        self.placement = placement
        self.max_grad_norm = max_grad_norm
        self.sparse: SparseRows | None = None  # chooses the rows that take a step
        self.exclude_rows = False  # whether `state_dict` leaves out the rows' state, which the placement saves
        self.rows = next((optimizer for optimizer in inner if isinstance(optimizer, RowOptimizer)), None)
        if placement is not None and self.rows is not None:
            self.rows.backend = placement.backend

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """The state of every parameter: a new dict of the inner optimizers' own dicts."""
        return {param: state for optimizer in self.inner for param, state in optimizer.state.items()}

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        assert not state, "only Optimizer.__init__ sets it, to an empty dict: state lives in the inner optimizers"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises a ValueError: the groups are fixed at construction."""
        if hasattr(self, "inner"):
            raise ValueError("A MixedOptimizer has fixed groups: build a new one from optimizers that hold the group.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Makes one step of every inner optimizer; returns what `closure` returns."""
        loss = evaluate(closure)
        if self.max_grad_norm is not None:
            self.clip_grad_norm(self.max_grad_norm)
        self._collect()
        for optimizer in self.inner:
            optimizer.step()
        if self.sparse is not None:
            self.sparse.end_step()
        if self.placement is not None:
            for table_RC in self.placement.tables.values():
                table_RC.grad = None  # model.zero_grad() does not reach it
        return loss

    @contextmanager
    def without_rows(self) -> Iterator[None]:
        """Leaves the row optimizer out for a while, for code that knows the model's parameters only."""
        whole = self.inner
        self.inner = tuple(optimizer for optimizer in whole if optimizer is not self.rows)
        self._list_groups()
        try:
            yield
        finally:
            self.inner = whole
            self._list_groups()

    def _list_groups(self) -> None:
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]

    def _collect(self) -> None:
        """Brings the gradients of placed tables, and leaves those of the rows that are chosen."""
        if self.placement is not None:
            self.placement.collect()
        if self.sparse is not None:
            self.sparse.keep(self.placement)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clips the gradients of all parameters and placed tables together, as the function `clip_grad_norm` does."""
        self._collect()
        parameters = [param for group in self.param_groups for param in group["params"]]
        return clip_grad_norm(parameters, max_norm, self.placement)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.placement is not None:
            self.placement.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        if self.placement is not None:
            self.placement.flush()
        state = super().state_dict()
        if self.exclude_rows:
            of_rows = {i for group in state["param_groups"] if group.get("name") == "memory" for i in group["params"]}
            state["state"] = {i: values for i, values in state["state"].items() if i not in of_rows}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` returned; raises a ValueError if names or sizes of the groups differ."""
        saved_groups = state_dict["param_groups"]
        saved, own = ([(g.get("name"), len(g["params"])) for g in gs] for gs in (saved_groups, self.param_groups))
        if saved != own:
            raise ValueError(f"The saved groups (name, parameters) are {saved}; this optimizer's are {own}.")
        start = 0
        for optimizer in self.inner:
            groups = saved_groups[start : start + len(optimizer.param_groups)]
            start += len(groups)
            ids = [saved_id for group in groups for saved_id in group["params"]]
            state = {saved_id: state_dict["state"][saved_id] for saved_id in ids if saved_id in state_dict["state"]}
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._list_groups()  # loading gave the inner optimizers new group dicts


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Which optimizer trains which parameters. Adam's own numbers are arguments of `build_optimizer`.

    Attributes:
        memory: the row optimizer of the tables (docs/row-optimizers.md), or "dense_adam", the baseline `DenseAdam`.
        memory_lr_scale: the tables' lr divided by the lr of all other parameters (5 in the paper, section 4).
        memory_rounding: how numbers written to a bf16 table are rounded.
        matrices: the optimizer of the backbone's matrices.
        max_grad_norm: the norm to which each step first clips rows and dense gradients together. It is for loops that
            cannot do so, such as transformers' plain Trainer (whose own max_grad_norm must then be 0). None: no clip.

    Raises:
        ValueError: a choice is not allowed, or a number is out of its range.
    """

    memory: MemoryOptimizerKind = "row_adam"
    memory_lr_scale: float = 5.0
    memory_rounding: Rounding = "nearest"
    matrices: MatrixOptimizerKind = "muon"
    muon_momentum: float = 0.95
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        check_choice("memory", self.memory, MemoryOptimizerKind)
        check_choice("memory_rounding", self.memory_rounding, Rounding)
        check_choice("matrices", self.matrices, MatrixOptimizerKind)
        check_setting("memory_lr_scale", self.memory_lr_scale, self.memory_lr_scale >= 0, "0 or more")
        if self.max_grad_norm is not None:
            check_norm(self.max_grad_norm)


DEFAULTS = OptimizerSettings()


def build_optimizer(
    model: nn.Module,
    settings: OptimizerSettings = DEFAULTS,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> MixedOptimizer:
    """Sorts the model's trainable parameters with `group_parameters` and gives each group its optimizer.

    Muon trains "muon", AdamW the other two groups of the backbone, and the row optimizer "memory", with a scaled lr and
    without weight decay. Tables that `place_tables` took out of the model are included, so place them first.

    Raises:
        ValueError: the model has no trainable parameter, or its tables are placed and memory is "dense_adam".
    """
    placement = placement_of(model)
    grouped = group_parameters(model, placement, settings.matrices)

    def filled(name: str, **values: float) -> list[dict[str, Any]]:
        return [{"params": grouped[name], "name": name, **values}] if grouped[name] else []

    inner: list[Optimizer] = []
    if muon := filled("muon"):
        inner.append(Muon(muon, lr=lr, weight_decay=weight_decay, momentum=settings.muon_momentum))
    if adamw := filled("adamw_decay", weight_decay=weight_decay) + filled("adamw_no_decay", weight_decay=0.0):
        inner.append(torch.optim.AdamW(adamw, lr=lr, betas=betas, eps=eps))
    if tables := filled("memory"):
        memory_lr, rounding = lr * settings.memory_lr_scale, settings.memory_rounding
        if settings.memory != "dense_adam":
            rows = build_row_optimizer(settings.memory, tables, lr=memory_lr, betas=betas, eps=eps, rounding=rounding)
            inner.append(rows)
        elif placement is None:
            inner.append(DenseAdam(tables, lr=memory_lr, betas=betas, eps=eps))
        else:
            raise ValueError("memory is 'dense_adam', which updates every row: it is for tables that are not placed.")
    return MixedOptimizer(inner, placement, settings.max_grad_norm)


def group_parameters(
    model: nn.Module, placement: TablePlacement | None, matrices: MatrixOptimizerKind
) -> dict[str, list[nn.Parameter]]:
    """Groups the trainable parameters by kind; tied weights count once.

    Returns:
        "memory": tables, which are the weights of every `SparseTable`, in the model or placed.
        "adamw_no_decay": vectors, scalars and all norm weights, stacked ones too.
        "adamw_decay": embeddings, `lm_head`, routers (`mlp.gate.weight`), depthwise convolutions (`conv.`),
            hyper-connections (`fn`, `hc_fn`), and with matrices="adamw" all other matrices.
        "muon": all other matrices `[O, I]` and stacks `[E, O, I]` of the backbone.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    placed = {} if placement is None else placement.tables
    tables = {id(table_RC) for table_RC in placed.values()}
    tables |= {id(module.weight) for module in model.modules() if isinstance(module, SparseTable)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "adamw_decay": [], "adamw_no_decay": [], "memory": []}
    trainable = [(name, p) for name, p in [*model.named_parameters(), *placed.items()] if p.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameter: every requires_grad is False.")
    for name, param in trainable:
        if id(param) in tables:
            group = "memory"
        elif param.ndim < 2 or "norm" in name:
            group = "adamw_no_decay"
        elif matrices == "adamw" or param.ndim > 3 or id(param) in embeddings or ADAMW_MATRICES.search(name):
            group = "adamw_decay"
        else:
            group = "muon"
        groups[group].append(param)
    return groups


def check_norm(max_norm: float) -> None:
    """Raises a ValueError unless `max_norm` is above 0."""
    check_setting("max_grad_norm", max_norm, max_norm > 0, "over 0 (math.inf only measures)")


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, placement: TablePlacement | None = None) -> Tensor:
    """Scales gradients in place so that their total L2 norm is at most `max_norm`.

    This is `torch.nn.utils.clip_grad_norm_`, but for sparse gradients too: they are replaced by their coalesced form,
    so that a row touched twice counts as one sum. Rows that a `placement` shards over ranks count on every rank. A
    `max_norm` of `math.inf` only measures. A norm that is not finite leaves the gradients unchanged.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    check_norm(max_norm)
    sharded = placement is not None and placement.num_ranks > 1
    values: list[Tensor] = []
    row_values: list[Tensor] = []
    for param in parameters:
        if param.grad is not None and param.grad.is_sparse:
            param.grad = sum_by_row(param.grad)
            (row_values if sharded else values).append(param.grad.values())
        elif param.grad is not None:
            values.append(param.grad)
    norm = nn.utils.get_total_norm([value for value in values if not isinstance(value, DTensor)])
    if in_shards := [value for value in values if isinstance(value, DTensor)]:
        norm_of_shards = nn.utils.get_total_norm(in_shards)
        assert isinstance(norm_of_shards, DTensor)
        norm = torch.hypot(norm, norm_of_shards.full_tensor())
    if placement is not None and sharded:
        squares = placement.backend.all_sum(sum((v.square().sum() for v in row_values), torch.zeros(())))
        norm = (norm.square() + squares.to(norm.device)).sqrt()
    if max_norm < norm.item() < math.inf:  # False for nan
        for value in (*values, *row_values):
            value.mul_((max_norm / (norm + 1e-6)).to(value.device))
    return norm
