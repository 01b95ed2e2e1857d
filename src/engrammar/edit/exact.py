"""Finds the longest key that ends at a position, by an exact comparison. The cost does not depend on how many keys.

A window's hash gives a bucket, a run of a sorted array with half a key on average. Each key of the bucket is
compared with the window itself, so two windows of one hash never answer for each other.
Letters: Q keys, K the longest key, O lengths that occur, N windows, C candidates: pairs of a window and a key.
"""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

NOTHING = -1  # left of a short key, and where a window has no token; no class is negative
Ints = NDArray[np.int64]
Classes = NDArray[np.int32]

GOLDEN, MULTIPLIER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's


@final
class ExactTable:
    """Q distinct keys of 1 to K classes, in an order of their hashes.

    Args:
        keys_QK: the keys, the last class in the last column, `NOTHING` left of a short one.
    """

    def __init__(self, keys_QK: Classes) -> None:
        self.num_keys, self.longest = keys_QK.shape
        lengths_Q = (keys_QK != NOTHING).sum(1)
        self._lengths_O = np.unique(lengths_Q)
        hashes_QK = window_hashes(keys_QK)
        hash_Q = np.take_along_axis(hashes_QK, lengths_Q[:, None] - 1, axis=1)[:, 0]
        self._order_Q = np.argsort(hash_Q, kind="stable")
        self._hash_Q = hash_Q[self._order_Q]
        self._keys_QK, self._lengths_Q = keys_QK[self._order_Q], lengths_Q[self._order_Q]
        num_bits = int(self.num_keys).bit_length() + 1  # two to four buckets a key
        self._shift = np.uint64(64 - num_bits)
        counts = np.bincount((self._hash_Q >> self._shift).astype(np.int64), minlength=2**num_bits)
        # Of each bucket, and the end of the last.
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    @property
    def nbytes(self) -> int:
        """The memory that the table takes."""
        kept = (self._order_Q, self._hash_Q, self._keys_QK, self._lengths_Q, self._starts)
        return sum(array.nbytes for array in kept)

    def find(self, windows_NK: Classes) -> Ints:
        """The longest key that each window ends with, key_N: its row in `keys_QK`, -1 for none.

        Args:
            windows_NK: classes, the last token in the last column, `NOTHING` where there is no token.
        """
        found_N = np.full(len(windows_NK), -1)
        if not self.num_keys:
            return found_N
        hashes_NO = window_hashes(windows_NK)[:, self._lengths_O - 1]
        bucket_NO = (hashes_NO >> self._shift).astype(np.int64)
        first_NO, end_NO = self._starts[bucket_NO], self._starts[bucket_NO + 1]
        window_C, length_C = np.nonzero(first_NO < end_NO)
        at_C = first_NO[window_C, length_C].astype(np.int64)
        end_C = end_NO[window_C, length_C].astype(np.int64)
        hash_C = hashes_NO[window_C, length_C]
        while len(at_C):  # seldom more than once
            self._settle(windows_NK, window_C, at_C, hash_C, found_N)
            at_C = at_C + 1
            more = at_C < end_C
            window_C, at_C, end_C, hash_C = window_C[more], at_C[more], end_C[more], hash_C[more]
        is_found = found_N >= 0
        found_N[is_found] = self._order_Q[found_N[is_found]]
        return found_N

    def _settle(
        self, windows_NK: Classes, window_C: Ints, at_C: Ints, hash_C: NDArray[np.uint64], found_N: Ints
    ) -> None:
        """Enters the candidates that are equal to their window, and longer than what was found there."""
        alike = self._hash_Q[at_C] == hash_C
        window_C, at_C = window_C[alike], at_C[alike]
        keys_CK = self._keys_QK[at_C]
        equal = ((keys_CK == windows_NK[window_C]) | (keys_CK == NOTHING)).all(1)
        window_C, at_C = window_C[equal], at_C[equal]
        # Candidates of one window are sorted by length, and of a repeated index NumPy keeps the last.
        before_C = found_N[window_C]
        longer = (before_C < 0) | (self._lengths_Q[at_C] > self._lengths_Q[before_C])
        found_N[window_C[longer]] = at_C[longer]


def window_hashes(windows_NK: Classes) -> NDArray[np.uint64]:
    """Hashes [N, K] of the last 1, 2, ..., K classes of each window."""
    hashes_NK = np.empty(windows_NK.shape, np.uint64)
    mix_N = np.full(len(windows_NK), GOLDEN)
    for back in range(windows_NK.shape[1]):
        mix_N = (mix_N ^ windows_NK[:, -1 - back].astype(np.uint64)) * MULTIPLIER
        mix_N ^= mix_N >> np.uint64(29)
        hashes_NK[:, back] = mix_N
    return hashes_NK


def distinct_rows(rows_NC: NDArray[Any]) -> tuple[Ints, Ints]:
    """Of a matrix, the number of the first row of each kind, and the kind of each row [N]."""
    rows_NC = np.ascontiguousarray(rows_NC)
    whole_N = rows_NC.view(np.dtype((np.void, rows_NC.itemsize * rows_NC.shape[1])))[:, 0]
    _, first, kind_N = np.unique(whole_N, return_index=True, return_inverse=True)
    return first, kind_N.reshape(-1)


def pad_keys(keys_QK: Classes, longest: int) -> Classes:
    """The same keys in `longest` columns."""
    return np.pad(keys_QK, ((0, 0), (longest - keys_QK.shape[1], 0)), constant_values=NOTHING)
