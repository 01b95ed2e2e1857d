"""The value rows of all applied patches, kept in stores like the rows of any table, under one numbering.

Letters: U distinct rows asked for, D hidden width, S bytes of a stored row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.config import Encoding
from engrammar.stores.base import Arrived, Fetch, RowStore
from engrammar.tables.encodings import decode


@final
class ArrayStore(RowStore):
    """Rows of an array in memory."""

    def __init__(self, name: str, identity: str, rows_RS: NDArray[np.uint8]) -> None:
        self.name, self.identity, self.rows_RS = name, identity, rows_RS
        self.num_rows, self.row_bytes = rows_RS.shape

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        return Arrived(self.rows_RS[rows_U])

    def close(self) -> None:
        self.rows_RS = self.rows_RS[:0]


@dataclass(frozen=True, kw_only=True)
class ValueRows:
    """The value rows of one patch: where they are read, and what they mean."""

    store: RowStore
    encoding: Encoding


@final
class StackedRows:
    """The value rows of several patches, numbered one patch after the other."""

    def __init__(self, parts: Sequence[ValueRows], width: int) -> None:
        self.parts, self.width = parts, width
        self.first = np.cumsum([0, *[part.store.num_rows for part in parts]])

    def fetch(self, rows_U: NDArray[np.int64]) -> Callable[[], Tensor]:
        """Starts reading ascending distinct rows; the function that is returned waits for them, fp32 [U, D]."""
        bounds = np.searchsorted(rows_U, self.first)
        started = [
            (self.parts[index], self.parts[index].store.fetch(rows_U[low:high] - self.first[index]))
            for index in np.nonzero(np.diff(bounds))[0].tolist()
            for low, high in [bounds[index : index + 2]]
        ]

        def wait() -> Tensor:
            values = [
                decode(torch.from_numpy(fetch.wait()), self.width, part.encoding, torch.float32)
                for part, fetch in started
            ]
            return torch.cat(values) if values else torch.empty(0, self.width)

        return wait


@final
class ReadRows:
    """Some rows of a stack, read once for a pass."""

    def __init__(self, rows: StackedRows, wanted: NDArray[np.int64]) -> None:
        self.rows_U = np.unique(wanted) if len(wanted) else wanted
        self._wait = rows.fetch(self.rows_U)
        self._values: Tensor | None = None

    def values(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Rows [..., D] of those that were asked for, on a device."""
        if self._values is None:
            self._values = self._wait()
        return self._values[torch.from_numpy(np.searchsorted(self.rows_U, rows))].to(device)
