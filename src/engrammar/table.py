"""The trainable table: one parameter per memory layer, looked up by row, whose gradient is the touched rows only.

Letters: B batch, T tokens, H columns (heads over all orders), C row width, E = H*C, R rows, U distinct rows touched.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from engrammar.addressing import head_offsets
from engrammar.config import Geometry, MemoryConfig

INIT_BLOCK = 4096  # rows drawn from one seed
Rows = Literal["own", "elsewhere"]  # whether a model holds its tables' rows, or something else does


class Embedded(NamedTuple):
    """The rows of each token side by side, [..., E], and True where one could not be had (None: all are there)."""

    embedding: Tensor
    missing: Tensor | None = None


class RowSource(ABC):
    """Holds the rows of tables outside their model: elsewhere in memory, in a file, spread over processes.

    Attributes:
        tables: per table name, the rows that this process holds, a parameter [rows, C].
    """

    tables: dict[str, nn.Parameter]

    @abstractmethod
    def read(self, rows: Mapping[str, Tensor]) -> dict[str, Callable[[], Embedded]]:
        """Starts reading stored rows [..., H] of each table; each function waits for its embedding [..., E]."""

    def check_save(self, directory: Path) -> None:  # noqa: B027 (most sources can save anywhere)
        """Raises a ValueError where `save` into `directory` cannot do; called before anything there is touched."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Adds the tables to the checkpoint in `directory`, which already holds the rest of the model."""


class _TouchedRows(torch.autograd.Function):
    """Gathers distinct rows; hands their gradient back as a sparse tensor (rows, summed gradients)."""

    @staticmethod
    def forward(ctx, weight_RC: Tensor, rows_U: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows_U)
        ctx.shape = weight_RC.shape
        return weight_RC.index_select(0, rows_U)

    @staticmethod
    def backward(ctx, gradient_UC: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (rows_U,) = ctx.saved_tensors
        # rows_U is sorted and distinct, so the tensor is coalesced as it stands.
        gradient = torch.sparse_coo_tensor(
            rows_U[None], gradient_UC, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return gradient, None


class SparseTable(nn.Module):
    """A module whose `weight` [R, C] is a table, of which each step trains the touched rows only (abstract).

    Optimizers know tables by this type: a mark on the parameter would be lost in a copy of it.
    """

    weight: nn.Parameter | None


class MemoryTable(SparseTable):
    """The rows of one memory layer, all heads end to end in one parameter [R, C].

    After backward `weight.grad` is a sparse COO tensor: each touched row once, its gradients summed. No dense gradient
    is ever made, so cost follows the touched rows.
    With rows="elsewhere" there is no parameter: `weight` is None, and rows are read from `source`, where this table is
    called `name`.
    """

    source: RowSource | None = None
    name: str = ""

    def __init__(self, config: MemoryConfig, geometry: Geometry, layer_index: int, rows: Rows = "own") -> None:
        super().__init__()
        self.sizes_H = geometry.head_sizes(layer_index)
        self.offsets_H = head_offsets(geometry, layer_index)
        self.shape = (geometry.num_stored_rows(layer_index), config.head_dim)
        self.init_seed: int | None = None  # of `draw_rows_`; None where the rows are in a checkpoint
        self.register_parameter("weight", nn.Parameter(torch.empty(self.shape)) if rows == "own" else None)

    def forward(self, rows_BTH: Tensor) -> Tensor:
        """Looks up head-local rows.

        Returns:
            embedding_BTE, the rows of each token side by side, in the table's dtype.

        Raises:
            ValueError: not one column per head, or rows that are nowhere.
            IndexError: a row is not in its head's table (checked on the CPU only).
        """
        rows_BTH = self.stored_rows(rows_BTH)
        if self.source is not None:
            return self.source.read({self.name: rows_BTH})[self.name]().embedding
        if self.weight is None:
            raise ValueError("This table's rows are elsewhere: give them a place (train.placement.place_tables).")
        return gather_rows(self.weight, rows_BTH).flatten(-2)

    def stored_rows(self, rows_BTH: Tensor) -> Tensor:
        """Rows of this layer's one parameter for head-local rows; errors as `forward`."""
        if rows_BTH.shape[-1] != len(self.sizes_H):
            raise ValueError(f"Rows have {rows_BTH.shape[-1]} columns; this table has {len(self.sizes_H)} heads.")
        if rows_BTH.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (rows_BTH < 0) | (rows_BTH >= torch.tensor(self.sizes_H))
            if outside.any():
                *_, head = outside.nonzero()[0].tolist()
                row = int(rows_BTH[..., head][outside[..., head]][0])
                raise IndexError(f"Row {row} of head {head} is outside its table of {self.sizes_H[head]} rows.")
        return rows_BTH + torch.tensor(self.offsets_H, device=rows_BTH.device)


def gather_rows(weight_RC: Tensor, rows: Tensor) -> Tensor:
    """Rows [..., C] of a table for row numbers [...]; the table's gradient is sparse, each touched row once."""
    if not (weight_RC.requires_grad and torch.is_grad_enabled()):
        return nn.functional.embedding(rows, weight_RC)
    rows_U, inverse = torch.unique(rows, return_inverse=True)
    return nn.functional.embedding(inverse, _TouchedRows.apply(weight_RC, rows_U))


@torch.no_grad()
def draw_rows_(out_UC: Tensor, *, seed: int, first_row: int, std: float) -> None:
    """Fills `out_UC` with the initial values of rows first_row, first_row + 1, ... of a table: normal, deviation `std`.

    A row's values depend on the seed and its number alone, so parts of a table can be drawn anywhere, in any order.
    """
    num_rows, width = out_UC.shape
    for block in range(first_row // INIT_BLOCK, -(-(first_row + num_rows) // INIT_BLOCK)):
        generator = torch.Generator().manual_seed(seed + block)
        drawn = torch.empty(INIT_BLOCK, width).normal_(0.0, std, generator=generator)
        start = block * INIT_BLOCK - first_row
        low, high = max(start, 0), min(start + INIT_BLOCK, num_rows)
        out_UC[low:high] = drawn[low - start : high - start].to(out_UC)


def lookup_reference(weight_RC: Tensor, rows_BTH: Tensor, offsets_H: tuple[int, ...]) -> Tensor:
    """The plain twin of `MemoryTable.forward`: a dense gather with a dense gradient."""
    return weight_RC[rows_BTH + torch.tensor(offsets_H)].flatten(-2)
