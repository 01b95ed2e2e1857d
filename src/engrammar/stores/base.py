"""The one interface between a memory and the place of its rows: `fetch` starts reading, `wait` returns the rows.

To a store a row is bytes; `tables.encodings` knows what they mean. The store to read first is `ram.RamStore`.
Letters: R rows of the table, U rows asked for (in any order, repeats allowed), S bytes of a stored row.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray


class RowsMissing(OSError):
    """Some rows could not be read. The message names the place, the first such row, and what to do.

    Attributes:
        missing_U: True where a row is missing.
        rows_US: all rows asked for; the bytes of the missing ones are undefined.
    """

    def __init__(self, message: str, missing_U: NDArray[np.bool_], rows_US: NDArray[np.uint8]) -> None:
        super().__init__(message)
        self.missing_U = missing_U
        self.rows_US = rows_US


class Fetch(ABC):
    """Rows that are being read."""

    @abstractmethod
    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        """Waits for all rows and returns rows_US, in the order asked for. The caller may keep and change them.

        Args:
            seconds: how long to wait; None waits as long as the store itself allows.

        Raises:
            RowsMissing: some rows could not be read, are damaged, or did not arrive within `seconds`.
        """


class RowStore(ABC):
    """A table of R rows of S bytes, wherever it is. It must not change while it is open.

    Attributes:
        name: the place of the rows, as error messages name it.
        identity: a fingerprint of the contents; it differs once the table was changed or replaced.
        num_rows: R.
        row_bytes: S.
    """

    name: str
    identity: str
    num_rows: int
    row_bytes: int

    @final
    def fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        """Starts reading rows; returns at once.

        Raises:
            IndexError: a row is not in the table.
        """
        # As unsigned integers, negative rows are huge, so one comparison finds rows beyond either end.
        if rows_U.size and rows_U.view(np.uint64).max() >= self.num_rows:
            outside = rows_U[(rows_U < 0) | (rows_U >= self.num_rows)]
            raise IndexError(f"Row {outside[0]} is outside {self.name}, which has rows 0 to {self.num_rows - 1}.")
        return self._fetch(rows_U)

    @abstractmethod
    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        """Starts reading rows, all of which are in the table."""

    @final
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a model reads the same rows, which are not copied. Closing one leaves the other open."""
        copied = copy.copy(self)
        copied._detach()
        return copied

    def _detach(self) -> None:  # noqa: B027 (most stores hold nothing that is theirs alone)
        """Gives a shallow copy what must be its own, since `close` releases it."""

    @abstractmethod
    def close(self) -> None:
        """Releases what the store holds. Fetches that were not waited for are lost."""


@final
class Arrived(Fetch):
    """Rows that are in memory already."""

    def __init__(self, rows_US: NDArray[np.uint8]) -> None:
        self.rows_US = rows_US

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        return self.rows_US
