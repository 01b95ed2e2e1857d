"""The trainable table: one parameter per memory layer, looked up by row, with a gradient of the touched rows only.

Letters: B batch, T tokens, H columns (heads over all orders), C row width, E = H*C, R rows, U distinct rows touched.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from engrammar.config import Geometry, MemoryConfig

INIT_BLOCK = 4096  # rows drawn from one seed
Tables = Literal["parameters", "external"]  # whether a model holds its tables' rows, or a `RowSource` does


class Rows(NamedTuple):
    """The rows of each token side by side, [..., E], and [...], True where one is missing (None: no row is missing)."""

    embedding: Tensor
    missing: Tensor | None = None


class RowSource(ABC):
    """Holds the rows of tables outside their model: in other memory, in a file, spread over processes."""

    tables: dict[str, nn.Parameter]  # by the table's name, the rows that this process holds, a parameter [rows, C]
    is_first = True  # whether this process is the first of those that share the tables

    @abstractmethod
    def read(self, passes: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Callable[[], Rows]]]:
        """Starts reading the rows of one or more forward passes.

        Args:
            passes: for each pass, the row numbers [..., H] by the table's name.

        Returns:
            For each pass and table, a function that waits for its rows.
        """

    def flush(self) -> None:  # noqa: B027 (most sources change nothing by themselves)
        """Waits until the rows of `tables` are those of the last step."""

    def whole(self, name: str, rows_per_block: int) -> Iterator[Tensor]:
        """All rows of a table in order, in blocks [U, C] of at most `rows_per_block`.

        Processes that share the table must all exhaust it together; the first of them gets the rows, others none.
        """
        self.flush()
        yield from self.tables[name].detach().split(rows_per_block)

    def check_save(self, directory: Path) -> None:  # noqa: B027 (most sources can save anywhere)
        """Raises a ValueError if saving into `directory` would fail; called before anything there is changed."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Adds the tables to the checkpoint in `directory`, which already holds the rest of the model."""


class _TouchedRows(torch.autograd.Function):
    """Gathers distinct rows; their gradient is a sparse tensor (rows, summed gradients)."""

    @staticmethod
    def forward(ctx, weight_RC: Tensor, rows_U: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows_U)
        ctx.shape = weight_RC.shape
        return weight_RC.index_select(0, rows_U)

    @staticmethod
    def backward(ctx, gradient_UC: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (rows_U,) = ctx.saved_tensors
        # rows_U is sorted and distinct, so the tensor is already coalesced.
        gradient = torch.sparse_coo_tensor(
            rows_U[None], gradient_UC, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return gradient, None


class SparseTable(nn.Module):
    """A module whose `weight` [R, C] is a table; optimizers train only the few rows that a step touches.

    `weight` is None if the rows are held outside the module.
    """

    weight: nn.Parameter | None


class MemoryTable(SparseTable):
    """The rows of one memory layer in one parameter [R, C], in which the heads follow each other.

    After backward, `weight.grad` is a sparse COO tensor: each touched row once, with its gradients summed. No dense
    gradient is ever made, so the cost follows the touched rows. With tables="external" there is no parameter: `weight`
    is None, and rows are read from `source`, where this table is called `name`.
    """

    source: RowSource | None = None
    name: str = ""

    def __init__(
        self, config: MemoryConfig, geometry: Geometry, layer_index: int, tables: Tables = "parameters"
    ) -> None:
        super().__init__()
        self.num_heads = config.num_columns
        self.shape = (geometry.num_stored_rows(layer_index), config.head_dim)
        self.init_seed: int | None = None  # the seed of `draw_rows_`; None if the rows are in a checkpoint
        weight = nn.Parameter(torch.empty(self.shape)) if tables == "parameters" else None
        self.register_parameter("weight", weight)

    def forward(self, rows_BTH: Tensor) -> Tensor:
        """Looks up rows (equation 2).

        Args:
            rows_BTH: row numbers over the whole table, from `addressing.hash_ngrams`.

        Returns:
            embedding_BTE, the rows of each token side by side, in the table's dtype.

        Raises:
            ValueError: there is not one column per head, or the table has neither rows nor a source.
            IndexError: a row is not in the table (checked on the CPU only).
        """
        if rows_BTH.shape[-1] != self.num_heads:
            raise ValueError(f"Rows have {rows_BTH.shape[-1]} columns; this table has {self.num_heads} heads.")
        if self.source is not None:
            return self.source.read([{self.name: rows_BTH}])[0][self.name]().embedding
        if self.weight is None:
            raise ValueError(
                "This model was built without the rows of its tables: give them with place_tables, or load the model "
                "with memory=."
            )
        if rows_BTH.device.type == "cpu" and not torch.compiler.is_compiling() and rows_BTH.numel():
            for row in (int(rows_BTH.min()), int(rows_BTH.max())):
                if not 0 <= row < self.shape[0]:
                    raise IndexError(f"Row {row} is outside this table of {self.shape[0]} rows.")
        return gather_rows(self.weight, rows_BTH).flatten(-2)

    def move_to(self, source: RowSource, name: str) -> None:
        """Drops the parameter: the rows are now read from `source`, where this table is called `name`."""
        self.weight, self.source, self.name = None, source, name

    def take_back(self, weight: nn.Parameter) -> None:
        """Makes `weight` this module's own parameter again."""
        self.weight, self.source, self.name = weight, None, ""


def gather_rows(weight_RC: Tensor, rows: Tensor) -> Tensor:
    """Rows [..., C] of a table for row numbers [...]. The table's gradient is sparse, with each touched row once."""
    if not (weight_RC.requires_grad and torch.is_grad_enabled()):
        return nn.functional.embedding(rows, weight_RC)
    rows_U, inverse = torch.unique(rows, return_inverse=True)
    return nn.functional.embedding(inverse, _TouchedRows.apply(weight_RC, rows_U))


@torch.no_grad()
def draw_rows_(out_UC: Tensor, *, seed: int, first_row: int, std: float) -> None:
    """Fills `out_UC` with the initial values of a table's rows from `first_row` on: normal, with deviation `std`.

    A row's values depend only on the seed and its number, so parts of a table can be drawn anywhere, in any order.
    """
    num_rows, width = out_UC.shape
    for block in range(first_row // INIT_BLOCK, -(-(first_row + num_rows) // INIT_BLOCK)):
        generator = torch.Generator().manual_seed(seed + block)
        drawn = torch.empty(INIT_BLOCK, width).normal_(0.0, std, generator=generator)
        start = block * INIT_BLOCK - first_row
        low, high = max(start, 0), min(start + INIT_BLOCK, num_rows)
        out_UC[low:high] = drawn[low - start : high - start].to(out_UC)
