"""Other libraries' ways to hold the rows of a table, for comparison: `nn.Embedding` and FBGEMM's table for CPUs.

Letters: B batch, T tokens, H columns, C row width, E = H*C, R rows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from engrammar.table import Rows, RowSource


@final
class RivalRows(RowSource):
    """Rows that another library holds in `weight`; `look_up` gives embedding_BTE of rows_BTH, with its gradient."""

    def __init__(self, weight: nn.Parameter, look_up: Callable[[Tensor], Tensor]) -> None:
        self.tables, self.look_up = {"": weight}, look_up

    def read(self, passes: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Callable[[], Rows]]]:
        return [{name: partial(self._wait, rows_BTH) for name, rows_BTH in one.items()} for one in passes]

    def _wait(self, rows_BTH: Tensor) -> Rows:
        return Rows(self.look_up(rows_BTH))

    def save(self, directory: Path) -> None:
        raise AssertionError("a bench saves nothing")


def embedding_rows(weight_RC: Tensor, *, sparse: bool) -> RivalRows:
    """Rows in `nn.Embedding`."""
    embedding = nn.Embedding.from_pretrained(weight_RC, freeze=False, sparse=sparse)
    return RivalRows(embedding.weight, lambda rows_BTH: embedding(rows_BTH).flatten(-2))


def fbgemm_rows(weight_RC: Tensor, *, lr: float, eps: float) -> RivalRows:
    """Rows in FBGEMM's table-batched embedding, all heads in one table as in ours.

    The backward pass updates them by row-wise Adagrad; on the CPU it has no Adam.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    bags = SplitTableBatchedEmbeddingBagsCodegen(
        [(*weight_RC.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=lr,
        eps=eps,
        device=torch.device("cpu"),
    )
    assert bags.weights_host.numel() == weight_RC.numel()
    bags.weights_host.data = weight_RC.view(-1)

    def look_up(rows_BTH: Tensor) -> Tensor:
        rows = rows_BTH.flatten()  # bags of one row each
        return bags(rows, torch.arange(len(rows) + 1)).view(*rows_BTH.shape[:-1], -1)

    return RivalRows(bags.weights_host, look_up)


def why_missing(module: str, sentence: str) -> str | None:
    """Why a module cannot be used here: the sentence if it is not installed, or how it fails; None if it can."""
    try:
        import_module(module)
    except (ImportError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        return sentence if absent else f"{type(error).__name__}: {error}"
    return None


def why_no_fbgemm() -> str | None:
    """Why FBGEMM's table cannot be used here; None if it can."""
    return why_missing("fbgemm_gpu.split_table_batched_embeddings_ops_training", "fbgemm-gpu-cpu is not installed")
