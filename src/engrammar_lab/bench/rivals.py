"""Other libraries' ways to hold the rows of a table, for comparison: `nn.Embedding` and FBGEMM's table for CPUs.

Letters: B batch, T tokens, H columns, C row width, E = H*C, R rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from engrammar.table import Rows, RowSource


class RivalRows(RowSource, ABC):
    """Another library's way to hold the rows of one table; abstract."""

    @abstractmethod
    def look_up(self, rows_BTH: Tensor) -> Tensor:
        """embedding_BTE of stored rows."""

    def read(self, passes: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Callable[[], Rows]]]:
        return [{name: partial(self._wait, rows_BTH) for name, rows_BTH in one.items()} for one in passes]

    def _wait(self, rows_BTH: Tensor) -> Rows:
        return Rows(self.look_up(rows_BTH))

    def save(self, directory: Path) -> None:
        raise AssertionError("a bench saves nothing")


class EmbeddingRows(RivalRows):
    """Rows in `nn.Embedding`."""

    def __init__(self, weight_RC: Tensor, *, sparse: bool) -> None:
        self.embedding = nn.Embedding.from_pretrained(weight_RC, freeze=False, sparse=sparse)
        self.tables = {"": self.embedding.weight}

    def look_up(self, rows_BTH: Tensor) -> Tensor:
        return self.embedding(rows_BTH).flatten(-2)


class FbgemmRows(RivalRows):
    """Rows in FBGEMM's table-batched embedding, all heads in one table as in ours.

    The backward pass updates them by row-wise Adagrad; on the CPU it has no Adam.
    """

    def __init__(self, weight_RC: Tensor, *, lr: float, eps: float) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.bags = SplitTableBatchedEmbeddingBagsCodegen(
            [(*weight_RC.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=lr,
            eps=eps,
            device=torch.device("cpu"),
        )
        assert self.bags.weights_host.numel() == weight_RC.numel()
        self.bags.weights_host.data = weight_RC.view(-1)
        self.tables = {"": self.bags.weights_host}

    def look_up(self, rows_BTH: Tensor) -> Tensor:
        rows = rows_BTH.flatten()  # bags of one row each
        return self.bags(rows, torch.arange(len(rows) + 1)).view(*rows_BTH.shape[:-1], -1)


def why_no_fbgemm() -> str | None:
    """Why FBGEMM's table cannot be used here (not installed, or its libraries do not load); None if it can."""
    try:
        import fbgemm_gpu.split_table_batched_embeddings_ops_training  # noqa: F401
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fbgemm_gpu":
            return "fbgemm-gpu-cpu is not installed"
        return f"{type(error).__name__}: {error}"
    return None
