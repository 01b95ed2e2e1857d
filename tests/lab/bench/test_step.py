"""The step bench compares like with like."""

import pytest

from engrammar_lab.bench.step import bench_step


@pytest.mark.slow
def test_quick_step_bench_compares_equal_models():
    result = bench_step(quick=True)
    plain, memory = result["models"]["moe"], result["models"]["moe + memory"]
    for key in ("total_parameters", "active_parameters"):
        assert memory[key] == pytest.approx(plain[key], rel=1e-3)
    assert memory["flops_per_token"] == pytest.approx(plain["flops_per_token"], rel=0.01)
    assert plain["milliseconds"]["retrieval"] < 1 < memory["tokens_per_second"]
    assert 0 < memory["share_of_peak"] < 1
    assert result["memory_tax"] == pytest.approx(1 - memory["tokens_per_second"] / plain["tokens_per_second"])
    assert {name: cells[-1]["rows_per_head"] for name, cells in result["rows"]["contenders"].items()} == dict.fromkeys(
        result["rows"]["contenders"], 100_000
    )
