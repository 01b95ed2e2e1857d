"""A key is found exactly: the longest that ends at a token, by comparison, whatever the hashes."""

import numpy as np
import pytest

from engrammar.edit import exact
from engrammar.edit.exact import NOTHING, ExactTable, distinct_rows, pad_keys


def random_keys(count: int, longest: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """Distinct keys of 1 to `longest` classes."""
    rng = np.random.default_rng(seed)
    keys_QK = rng.integers(0, num_classes, (2 * count, longest)).astype(np.int32)
    lengths = rng.integers(1, longest + 1, 2 * count)
    keys_QK[np.arange(longest) < longest - lengths[:, None]] = NOTHING
    return keys_QK[np.sort(distinct_rows(keys_QK)[0])[:count]]


def plain_find(keys_QK: np.ndarray, windows_NK: np.ndarray) -> list[int]:
    numbers = {tuple(key[key >= 0].tolist()): index for index, key in enumerate(keys_QK)}
    found = []
    for window in windows_NK.tolist():
        suffixes = (tuple(window[-length:]) for length in range(len(window), 0, -1))
        found.append(next((numbers[suffix] for suffix in suffixes if suffix in numbers), -1))
    return found


@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_longest_key_is_found_as_by_a_dict(count):
    keys_QK = random_keys(count, 5, 4)
    windows_NK = np.random.default_rng(1).integers(0, 4, (2_000, 5)).astype(np.int32)
    windows_NK[:200, :2], windows_NK[:50] = NOTHING, NOTHING
    found = ExactTable(keys_QK).find(windows_NK).tolist()
    assert found == plain_find(keys_QK, windows_NK) and (count == 1 or len(set(found)) > 2)


def test_windows_of_one_hash_do_not_answer_for_each_other(monkeypatch):
    """The control for the hash: with one hash for all windows every key stands in one bucket, and answers are right."""
    monkeypatch.setattr(exact, "window_hashes", lambda windows: np.zeros(windows.shape, np.uint64))
    keys_QK, rng = random_keys(60, 3, 5), np.random.default_rng(2)
    windows_NK = rng.integers(0, 5, (500, 3)).astype(np.int32)
    assert ExactTable(keys_QK).find(windows_NK).tolist() == plain_find(keys_QK, windows_NK)


def test_comparing_hashes_alone_would_be_wrong(monkeypatch):
    """The control: a table that believes the hash finds keys that are not there."""
    monkeypatch.setattr(exact, "window_hashes", lambda windows: np.zeros(windows.shape, np.uint64))
    monkeypatch.setattr(ExactTable, "_settle", lambda table, windows, at_N, at_C, hash_C, found: found.fill(0))
    keys_QK = random_keys(60, 3, 5)
    windows_NK = np.full((4, 3), 7, np.int32)
    assert ExactTable(keys_QK).find(windows_NK).tolist() != plain_find(keys_QK, windows_NK)


def test_a_million_keys_are_built_and_found():
    keys_QK = random_keys(1_000_000, 4, 50_000)
    table = ExactTable(keys_QK)
    assert table.nbytes < 64 * 1_000_000  # 8 bytes each: number, hash, length, half a bucket; and the key itself
    wanted = np.random.default_rng(3).integers(0, 1_000_000, 5_000)
    windows_NK = np.where(keys_QK[wanted] == NOTHING, 60_000, keys_QK[wanted]).astype(np.int32)
    assert np.array_equal(table.find(windows_NK), wanted)
    assert (table.find(np.full((9, 4), 60_001, np.int32)) == -1).all()
    buckets = np.diff(table._starts)
    assert buckets.max() <= 16 and buckets.mean() <= 1  # what a look-up costs: no more than for ten keys
    print(
        f"{table.nbytes / 1e6:.0f} MB for a million keys of up to 4 classes; the fullest bucket holds {buckets.max()}"
    )


def test_no_key_and_padded_keys():
    assert ExactTable(np.empty((0, 3), np.int32)).find(np.zeros((2, 3), np.int32)).tolist() == [-1, -1]
    padded = pad_keys(np.array([[4]], np.int32), 3)
    assert ExactTable(padded).find(np.array([[1, 2, 4], [4, 4, 1]], np.int32)).tolist() == [0, -1]
