"""The optimizer bench draws what it says and measures every optimizer."""

import pytest
import torch

from engrammar_lab.bench.optimizer import (
    DENSE_ADAM,
    NUM_BATCHES,
    SPARSE_ADAM,
    _draw_batches,
    _measure,
    bench_optimizer,
)

OURS = ("adam", "row_adam", "sinkhorn")


def test_frequent_rows_come_back_in_every_step_and_repeat_only_where_drawn_repeated():
    torch.manual_seed(0)
    distinct = _draw_batches(1009, "distinct")
    assert [len(rows.unique()) for rows in distinct] == [504] * NUM_BATCHES
    assert all((rows[1:] > rows[:-1]).all() for rows in distinct)
    assert all((rows == 0).any() for rows in distinct)  # row 0 is the most frequent
    assert all(1 < len(rows.unique()) < len(rows) == 504 for rows in _draw_batches(1009, "repeated"))


def test_every_optimizer_is_measured_against_sparse_adam():
    measured = _measure(1009, "distinct", repeats=2, max_dense_rows=1009)
    rates = measured["rates"]
    assert set(rates) == {*OURS, SPARSE_ADAM, DENSE_ADAM} and measured["num_touched"] == 504
    assert rates[SPARSE_ADAM]["speedup"] == 1
    for name in OURS:
        rate = rates[name]
        assert rate["rows_per_second"] == pytest.approx(504 / rate["milliseconds"] * 1e3)
        expected = rate["rows_per_second"] / rates[SPARSE_ADAM]["rows_per_second"]
        assert rate["speedup"] == pytest.approx(expected) and rate["share_of_limit"] > 0
    assert DENSE_ADAM not in _measure(1009, "repeated", repeats=1)["rates"]


@pytest.mark.slow
def test_quick_optimizer_bench_beats_sparse_adam():
    result = bench_optimizer(quick=True)
    assert [table["num_rows"] for table in result["tables"]] == [100_000, 1_000_000, 1_000_000]
    assert all(speedup > 1 for by_size in result["speedups"].values() for speedup in by_size)  # 2.2 on a quiet machine
    assert {name: result["state_bytes"][name] for name in OURS} == {"adam": 516, "row_adam": 4, "sinkhorn": 256}
