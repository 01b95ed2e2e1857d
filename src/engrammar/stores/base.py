"""The one seam between a memory and where its rows are: `fetch` starts reading, `wait` hands over.

A store knows rows as bytes; what they mean is `rows.py`'s. Letters: R rows of the table, U rows asked for (in any
order, repeats allowed), S bytes of a stored row.
"""

from abc import ABC, abstractmethod
from typing import final

import numpy as np
from numpy.typing import NDArray


class RowsMissing(OSError):
    """Rows that could not be had: one sentence with the place, the first such row, and what to do.

    Attributes:
        missing_U: True where a row is missing.
        rows_US: the other rows; what stands at the missing ones is not defined.
    """

    def __init__(self, message: str, missing_U: NDArray[np.bool_], rows_US: NDArray[np.uint8]) -> None:
        super().__init__(message)
        self.missing_U = missing_U
        self.rows_US = rows_US


class Fetch(ABC):
    """Rows on their way."""

    @abstractmethod
    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        """rows_US in the order asked for, once all are there. The caller may keep and change them.

        Args:
            seconds: how long to wait for rows; None is as long as the store itself allows.

        Raises:
            RowsMissing: some could not be read, are damaged, or are not there after `seconds`.
        """


class RowStore(ABC):
    """A table of R rows of S bytes, somewhere. Nobody writes to it while it is open.

    Attributes:
        name: where the rows are, as errors name it.
        identity: of their bytes: another one where the table was changed or replaced.
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
        # As unsigned integers, negative rows are the largest: one pass finds both kinds of row that are not there.
        if rows_U.size and rows_U.view(np.uint64).max() >= self.num_rows:
            outside = rows_U[(rows_U < 0) | (rows_U >= self.num_rows)]
            raise IndexError(f"Row {outside[0]} is outside {self.name}, which has rows 0 to {self.num_rows - 1}.")
        return self._fetch(rows_U)

    @abstractmethod
    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        """Starts reading rows that are all in the table."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the store holds. Fetches that were not waited for are lost."""


@final
class Arrived(Fetch):
    """Rows that are there already."""

    def __init__(self, rows_US: NDArray[np.uint8]) -> None:
        self.rows_US = rows_US

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        return self.rows_US
