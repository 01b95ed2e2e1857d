"""The hash bench compares equal integers and shows the speed-up that the docs claim."""

import json

import pytest

from committed import RESULTS
from engrammar_lab.bench.hash import bench_hash


@pytest.mark.slow
def test_quick_hash_bench_beats_demo_style():
    result = bench_hash(quick=True)
    assert result["speedup"] > 1  # 3.8 on a quiet machine; this one may be busy
    rates = result["rates"]
    assert result["speedup"] == pytest.approx(
        rates["ours, NumPy"]["tokens_per_second"] / rates["demo-style NumPy"]["tokens_per_second"]
    )


def test_the_committed_run_is_a_full_one_and_three_times_demo_style():
    result = json.loads((RESULTS / "bench" / "hash.json").read_text())
    assert not result["quick"] and result["speedup"] >= 3
