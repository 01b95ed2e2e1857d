"""Optimizers for tables, with time and memory in proportion to the touched rows: lazy Adam, row Adam, Sinkhorn.

Letters: R rows of a table, C row width, U touched rows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import call
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from engrammar.config import check_choice
from engrammar.train.pages import zeros_in_ram

Closure = Callable[[], float]
RowOptimizerKind = Literal["adam", "row_adam", "sinkhorn"]
Rounding = Literal["nearest", "stochastic"]
StateLayout = dict[str, tuple[torch.dtype, Literal["element", "row"]]]  # one number per element or per row

COUNT_BITS = 8  # bits of a row's 32-bit word in RowAdam that hold its count
MAX_COUNT = 2**COUNT_BITS - 1
SINKHORN_STEPS = 11  # odd: rows, columns, ..., rows
SINKHORN_SMALL_ROW = 1e-3  # norm of a small row, relative to the mean row norm


def evaluate(closure: Closure | None) -> float | None:
    """Calls `closure` with gradients enabled and returns its value; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, whose pages in RAM take memory once they are written to."""
    return zeros_in_ram(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class RowBackend:
    """How a row optimizer gets memory, runs updates and sums over ranks; by default in one process, at once."""

    # Makes zeros of a shape, for state.
    allocate: Callable[[Sequence[int], torch.dtype, torch.device], Tensor] = allocate
    submit: Callable[[Callable[[], None]], None] = call  # runs an update, now or in order after earlier ones
    all_sum: Callable[[Tensor], Tensor] = _same  # sums a tensor in place over the ranks that share the tables
    is_sharded: bool = False  # whether there are several such ranks. All of them then take part in every update.


def sum_by_row(gradient: Tensor) -> Tensor:
    """Coalesces a table's sparse gradient: rows become distinct and ascending, and gradients of equal rows are summed.

    Gradients of a `MemoryTable` are coalesced already, but autograd drops the flag for it. Such rows are not summed
    again, and the result shares its values with `gradient`.
    """
    rows = gradient._indices()
    if gradient.is_coalesced() or rows.shape[0] != 1 or not bool((rows[0, 1:] > rows[0, :-1]).all()):
        return gradient.coalesce()
    return torch.sparse_coo_tensor(rows, gradient._values(), gradient.shape, is_coalesced=True, check_invariants=False)


def round_stochastically(values: Tensor, seed: int) -> Tensor:
    """Rounds fp32 to bf16, up or down at random, with the probabilities that make the mean exact.

    The upper half of an fp32 is a bf16, so adding a random number to the lower half carries with that probability.
    """
    # 64 random bits are used for four numbers: one draw for each would take longer than an Adam step.
    num_draws = math.ceil(values.numel() / 4)
    bits = torch.empty(num_draws, dtype=torch.int64, device=values.device)
    bits.random_(-(2**63), None, generator=torch.Generator(values.device).manual_seed(seed))
    lower_half = bits.view(torch.uint16)[: values.numel()].view(values.shape).int()
    return ((values.contiguous().view(torch.int32) + lower_half) & -(2**16)).view(torch.float32).bfloat16()


def balance_(update_UC: Tensor, all_sum: Callable[[Tensor], Tensor] = _same) -> Tensor:
    """Balances in place (Sinkhorn): scales rows and columns in turn to norm 1, 11 times, then every row to RMS 1.

    Rows whose norm is at most 1e-3 of the mean row norm become zeros and do not count. Scaling the rows and columns of
    x needs only sums of its squares, which are 11 products of x^2 with a vector. `all_sum` adds column sums over ranks.
    """
    norm_U1 = torch.linalg.vector_norm(update_UC, dim=1, keepdim=True)
    norm_and_count = all_sum(torch.stack([norm_U1.sum(), torch.tensor(float(len(norm_U1)), device=norm_U1.device)]))
    mean_norm = (norm_and_count[0] / norm_and_count[1]).clamp(min=1e-30)
    kept_UC = update_UC.div_(mean_norm).masked_fill_(norm_U1 <= SINKHORN_SMALL_ROW * mean_norm, 0)
    square_UC = kept_UC.square()
    column_square_C = torch.ones_like(square_UC[0])  # squared factors of columns, as row_square_U are of rows
    for _ in range(SINKHORN_STEPS // 2):
        row_square_U = (square_UC @ column_square_C).clamp_(min=1e-30).reciprocal_()
        column_square_C = all_sum(row_square_U @ square_UC).clamp_(min=1e-30).reciprocal_()
    row_square_U = (square_UC @ column_square_C).clamp_(min=1e-30).reciprocal_()
    num_columns = update_UC.shape[1]
    return kept_UC.mul_(column_square_C.sqrt_()).mul_(row_square_U.mul_(num_columns).sqrt_().unsqueeze(1))


class RowOptimizer(Optimizer, ABC):
    """Updates only the touched rows of tables `[R, C]`, from their sparse gradients (abstract).

    A row without a gradient keeps its bits, and so does its state. There is no weight decay (arXiv 2601.07372, section
    4). Tables are fp32 or bf16. State and updates are fp32, and each number written to a bf16 table is rounded once:
    "nearest" loses updates below about 1/256 of a weight, "stochastic" keeps their mean (`round_stochastically`). On
    the CPU, a page of state (4 KiB) takes memory once one of its rows is touched.

    Raises:
        ValueError: a gradient is dense, a table with stochastic rounding is not bf16, or loaded state is that of
            another optimizer or has another shape.
    """

    state_layout: ClassVar[StateLayout]
    backend = RowBackend()  # for placed tables, `MixedOptimizer` sets their placement's

    def __init__(self, params: ParamsT, defaults: dict[str, Any], rounding: Rounding) -> None:
        check_choice("rounding", rounding, Rounding)
        super().__init__(params, {**defaults, "rounding": rounding})
        for group in self.param_groups:
            for table_RC in group["params"]:
                if rounding == "stochastic" and table_RC.dtype != torch.bfloat16:
                    raise ValueError(f"rounding is 'stochastic' for a table of {table_RC.dtype}; allowed: bfloat16.")

    @abstractmethod
    def _direction(self, rows_U: Tensor, grad_UC: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Updates the state of these rows; returns fp32 `[U, C]`, which the caller scales by lr and subtracts."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Updates every touched row; returns what `closure` returns."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for table_RC in group["params"]:
                if table_RC.grad is not None:
                    seed = int(torch.randint(2**62, ())) if group["rounding"] == "stochastic" else None
                    # A copy of the group: a scheduler may write to it before the update runs.
                    self.backend.submit(
                        partial(self._update_table, table_RC, self._gradient(table_RC), {**group}, seed)
                    )
        return loss

    def _gradient(self, table_RC: Tensor) -> Tensor:
        assert table_RC.grad is not None
        if not table_RC.grad.is_sparse:
            name, shape = type(self).__name__, list(table_RC.shape)
            raise ValueError(f"The gradient of a table {shape} is dense; allowed in {name}: sparse ones.")
        assert table_RC.grad.sparse_dim() == 1 and table_RC.ndim == 2, (table_RC.grad.sparse_dim(), table_RC.shape)
        return table_RC.grad

    @torch.no_grad()
    def _update_table(self, table_RC: Tensor, gradient: Tensor, group: dict[str, Any], seed: int | None) -> None:
        gradient = sum_by_row(gradient)
        rows_U, grad_UC = gradient.indices()[0], gradient.values()
        if rows_U.numel() == 0 and not self.backend.is_sharded:
            return
        update_UC = self._direction(rows_U, grad_UC.float(), self.state_of(table_RC), group)
        updated_UC = table_RC.index_select(0, rows_U).float().add_(update_UC, alpha=-group["lr"])
        rounded_UC = updated_UC.to(table_RC.dtype) if seed is None else round_stochastically(updated_UC, seed)
        table_RC.index_copy_(0, rows_U, rounded_UC)

    def layout(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of each state of a table `[R, C]`."""
        return {
            key: (tuple(shape) if per == "element" else (shape[0],), dtype)
            for key, (dtype, per) in self.state_layout.items()
        }

    def state_of(self, table_RC: Tensor) -> dict[str, Tensor]:
        """The state of a table; the first call makes it, of zeros."""
        state = self.state[table_RC]
        if not state:
            for key, (shape, dtype) in self.layout(table_RC.shape).items():
                state[key] = self.backend.allocate(shape, dtype, table_RC.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, which would cast the fp32 state of a bf16 table to bf16."""
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
        tables = [table_RC for group in self.param_groups for table_RC in group["params"]]
        for saved_id, table_RC in zip(saved_ids, tables, strict=True):
            if saved_id not in state_dict["state"]:  # the table was not touched before the save
                continue
            state = {key: value.to(table_RC.device) for key, value in state_dict["state"][saved_id].items()}
            expected = self.layout(table_RC.shape)
            if state.keys() != expected.keys():
                name = type(self).__name__
                raise ValueError(
                    f"The saved state holds {sorted(state)}; {name} needs {sorted(expected)}: check `memory`."
                )
            for key, (shape, dtype) in expected.items():
                saved_shape = tuple(state[key].shape)
                if saved_shape != shape:
                    raise ValueError(f"The saved {key} has shape {saved_shape}; this table's is {shape}.")
                assert state[key].dtype == dtype, (key, state[key].dtype)
            self.state[table_RC] = state


class LazyAdam(RowOptimizer):
    """Adam on the touched rows: two fp32 buffers and a step count per row, 8 C + 4 bytes a row.

    A row with a gradient at every step follows `torch.optim.Adam`. A row without one keeps its bits. In a dense Adam,
    momentum keeps moving rows after their last touch, and `exp_avg` and `exp_avg_sq` decay once a step; here they decay
    once a touch. The bias correction counts a row's own touches, so its first update is a full one, however late it is.
    """

    state_layout: ClassVar[StateLayout] = {
        "exp_avg": (torch.float32, "element"),
        "exp_avg_sq": (torch.float32, "element"),
        "step": (torch.int32, "row"),
    }

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rounding: Rounding = "nearest",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, rounding)

    def _direction(self, rows_U: Tensor, grad_UC: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        step_U = state["step"].index_select(0, rows_U) + 1
        exp_avg_UC = state["exp_avg"].index_select(0, rows_U).lerp_(grad_UC, 1 - beta1)
        exp_avg_sq_UC = state["exp_avg_sq"].index_select(0, rows_U)
        exp_avg_sq_UC.mul_(beta2).addcmul_(grad_UC, grad_UC, value=1 - beta2)
        state["step"].index_copy_(0, rows_U, step_U)
        state["exp_avg"].index_copy_(0, rows_U, exp_avg_UC)
        state["exp_avg_sq"].index_copy_(0, rows_U, exp_avg_sq_UC)
        # In fp64: 1 - beta2 is a difference of close numbers, and fp32 would lose 4 digits of a row's first update.
        correction1_U1 = (1 - beta1 ** step_U.double()).float().unsqueeze(1)
        correction2_U1 = (1 - beta2 ** step_U.double()).sqrt().float().unsqueeze(1)
        denominator_UC = exp_avg_sq_UC.sqrt_().div_(correction2_U1).add_(group["eps"])
        return exp_avg_UC.div_(correction1_U1).div_(denominator_UC)


class RowAdam(RowOptimizer):
    """Adam without momentum and with one second moment per row, the mean of its squared gradients: 4 bytes a row.

    It is `LazyAdam` with beta1 = 0 and `exp_avg_sq` averaged over the row: the moment decays once a touch, and its
    bias is corrected by the row's own count of touches. Moment and count share the row's 4 bytes: the count is in the
    last 8 bits of the fp32 moment, which is rounded to the 15 bits of fraction that remain. The count stops at 255.
    From then on the average forgets (1 - beta2) / (1 - beta2^255) per touch, so a beta2 above 0.98 acts as a smaller
    one: 0.999 as 0.9955. A decay per step (beta2^n after n untouched steps) would also fit into 4 bytes, but a row that
    is touched every n steps would get updates sqrt(n) times larger, up to 1/sqrt(1 - beta2).
    """

    state_layout: ClassVar[StateLayout] = {"moment_and_count": (torch.int32, "row")}

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        rounding: Rounding = "nearest",
    ) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps}, rounding)

    def _direction(self, rows_U: Tensor, grad_UC: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        beta2 = group["beta2"]
        word_U = state["moment_and_count"].index_select(0, rows_U)
        count_U = (word_U & MAX_COUNT).add_(1).clamp_(max=MAX_COUNT)
        moment_U = (word_U & ~MAX_COUNT).view(torch.float32)
        # The bias-corrected average after k touches is a running mean with this weight.
        weight_U = ((1 - beta2) / (1 - beta2 ** count_U.double())).float()
        square_U = torch.linalg.vector_norm(grad_UC, dim=1).square_().div_(grad_UC.shape[1])
        moment_U = moment_U.lerp(square_U, weight_U)
        word_U = (moment_U.view(torch.int32) + (MAX_COUNT + 1) // 2) & ~MAX_COUNT | count_U
        state["moment_and_count"].index_copy_(0, rows_U, word_U)
        return grad_UC / moment_U.sqrt_().add_(group["eps"]).unsqueeze(1)


class Sinkhorn(RowOptimizer):
    """Nesterov momentum in one fp32 buffer, then `balance_` over the touched rows together: 4 C bytes a row.

    Every updated row moves by an RMS of lr per element. A row's first Adam step has this size, so Adam's lr is a good
    start. Momentum decays once a touch. Rows whose update is at most 1e-3 of the mean norm do not move, but their
    momentum is updated. Because of the column norms, a row's update depends on the other rows that were touched.
    Source: DeepSeek-V4.1.
    """

    state_layout: ClassVar[StateLayout] = {"momentum_buffer": (torch.float32, "element")}

    def __init__(self, params: ParamsT, *, lr: float, momentum: float = 0.95, rounding: Rounding = "nearest") -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum}, rounding)

    def _direction(self, rows_U: Tensor, grad_UC: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        momentum_UC = state["momentum_buffer"].index_select(0, rows_U).lerp_(grad_UC, 1 - group["momentum"])
        state["momentum_buffer"].index_copy_(0, rows_U, momentum_UC)
        return balance_(grad_UC.lerp(momentum_UC, group["momentum"]), self.backend.all_sum)


ROW_OPTIMIZERS: dict[RowOptimizerKind, type[RowOptimizer]] = {
    "adam": LazyAdam,
    "row_adam": RowAdam,
    "sinkhorn": Sinkhorn,
}


def build_row_optimizer(
    kind: RowOptimizerKind,
    params: ParamsT,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    rounding: Rounding = "nearest",
) -> RowOptimizer:
    """Builds the row optimizer `kind`; "row_adam" uses only the second of `betas`, "sinkhorn" neither betas nor eps.

    Raises:
        ValueError: the kind or the rounding is not allowed.
    """
    check_choice("memory", kind, RowOptimizerKind)
    if kind == "adam":
        return LazyAdam(params, lr=lr, betas=betas, eps=eps, rounding=rounding)
    if kind == "row_adam":
        return RowAdam(params, lr=lr, beta2=betas[1], eps=eps, rounding=rounding)
    return Sinkhorn(params, lr=lr, rounding=rounding)


def state_bytes_per_row(kind: RowOptimizerKind, row_width: int) -> int:
    """The bytes of optimizer state for a touched row of `row_width` elements."""
    layout = ROW_OPTIMIZERS[kind].state_layout.values()
    return sum(dtype.itemsize * (row_width if per == "element" else 1) for dtype, per in layout)
