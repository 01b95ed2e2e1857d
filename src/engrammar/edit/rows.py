"""The value rows of all applied patches, kept in stores like the rows of any table, under one numbering.

Letters: U distinct rows asked for, D hidden width, S bytes of a stored row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
class ReadRows:
    """Some value rows of several patches, read once for a pass. Reading has begun when there is one of these.

    Args:
        first: the number of each patch's first row, and of all rows: they are numbered one patch after the other.
    """

    def __init__(
        self, parts: Sequence[ValueRows], first: NDArray[np.int64], width: int, wanted: NDArray[np.int64]
    ) -> None:
        self.width, self.rows_U = width, np.unique(wanted) if len(wanted) else wanted
        bounds = np.searchsorted(self.rows_U, first)
        self._started = [
            (parts[index], parts[index].store.fetch(self.rows_U[bounds[index] : bounds[index + 1]] - first[index]))
            for index in np.nonzero(np.diff(bounds))[0].tolist()
        ]

    @cached_property
    def _values_UD(self) -> Tensor:
        """Waits for the rows."""
        values = [
            decode(torch.from_numpy(fetch.wait()), self.width, part.encoding, torch.float32)
            for part, fetch in self._started
        ]
        return torch.cat(values) if values else torch.empty(0, self.width)

    def values(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Rows [..., D] of those that were asked for, on a device."""
        return self._values_UD[torch.from_numpy(np.searchsorted(self.rows_U, rows))].to(device)
