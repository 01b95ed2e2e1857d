"""The trainable table: one parameter per memory layer, looked up by row, whose gradient is the touched rows only.

Letters: B batch, T tokens, H columns (heads over all orders), C row width, E = H*C, R rows, U distinct rows touched.
"""

import torch
from torch import Tensor, nn

from engrammar.addressing import head_offsets
from engrammar.config import Geometry, MemoryConfig


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


class MemoryTable(nn.Module):
    """The rows of one memory layer, all heads end to end in one parameter [R, C].

    After backward `weight.grad` is a sparse COO tensor: each touched row once, its gradients summed. No dense gradient
    is ever made, so cost follows the touched rows. The parameter carries `is_memory_table = True` for the optimiser.
    """

    def __init__(self, config: MemoryConfig, geometry: Geometry, layer_index: int) -> None:
        super().__init__()
        self.sizes_H = geometry.head_sizes(layer_index)
        self.offsets_H = head_offsets(geometry, layer_index)
        self.weight = nn.Parameter(torch.empty(geometry.num_stored_rows(layer_index), config.head_dim))
        self.weight.is_memory_table = True  # type: ignore[attr-defined]

    def forward(self, rows_BTH: Tensor) -> Tensor:
        """Looks up head-local rows.

        Returns:
            embedding_BTE, the rows of each token side by side, in the table's dtype.

        Raises:
            ValueError: not one column per head.
            IndexError: a row is not in its head's table (checked on the CPU only).
        """
        self._check(rows_BTH)
        rows_BTH = rows_BTH + torch.tensor(self.offsets_H, device=rows_BTH.device)
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return nn.functional.embedding(rows_BTH, self.weight).flatten(-2)
        rows_U, inverse = torch.unique(rows_BTH, return_inverse=True)
        touched_UC = _TouchedRows.apply(self.weight, rows_U)
        return nn.functional.embedding(inverse, touched_UC).flatten(-2)

    def _check(self, rows_BTH: Tensor) -> None:
        if rows_BTH.shape[-1] != len(self.sizes_H):
            raise ValueError(f"Rows have {rows_BTH.shape[-1]} columns; this table has {len(self.sizes_H)} heads.")
        if rows_BTH.device.type != "cpu" or torch.compiler.is_compiling():
            return
        outside = (rows_BTH < 0) | (rows_BTH >= torch.tensor(self.sizes_H))
        if outside.any():
            *_, head = outside.nonzero()[0].tolist()
            row = int(rows_BTH[..., head][outside[..., head]][0])
            raise IndexError(f"Row {row} of head {head} is outside its table of {self.sizes_H[head]} rows.")


def lookup_reference(weight_RC: Tensor, rows_BTH: Tensor, offsets_H: tuple[int, ...]) -> Tensor:
    """The plain twin of `MemoryTable.forward`: a dense gather with a dense gradient."""
    return weight_RC[rows_BTH + torch.tensor(offsets_H)].flatten(-2)
