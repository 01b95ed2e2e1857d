"""The sharded bench trains the same curve over ranks, each with its share of the tables, and sends less than all."""

import json

import pytest

from committed import RESULTS
from engrammar_lab.bench import report, sharded
from engrammar_lab.bench.sharded import KINDS, RANKS, table, verdict
from processes import succeed_on_ranks


def check(result):
    """What every run must show, however short: in fp64 one curve, until rounding has grown."""
    first, *others = result["ranks"]
    assert [row["ranks"] for row in result["ranks"]] == list(RANKS) == [1, 2, 4]
    assert set(first["differences"].values()) == {0} and set(first["wire"].values()) == {0}
    for row in others:
        assert 0 <= row["differences"]["fp64_first"] < 1e-10
        for held in ("table_bytes", "state_bytes"):  # up to one row of each of the two tables
            assert 0 <= row[held] - first[held] / row["ranks"] < 2 * (3 * 64 + 4)
        assert 0 < sum(row["wire"][kind] for kind in KINDS) < row["wire"]["undeduplicated"]
        assert row["wire"]["rows"] == row["wire"]["gradients"] == 8 * row["wire"]["ids"]  # 16 fp32 beside an int64
        assert row["milliseconds"] > 0
        assert row["losses"][-1] < row["losses"][0] == pytest.approx(first["losses"][0], abs=1e-5)
    two, four = (row["wire"]["undeduplicated"] for row in others)
    assert four / two == pytest.approx((1 / 4 * 3 / 4) / (1 / 2 * 1 / 2))  # a rank's lookups, the share elsewhere


@pytest.mark.slow
def test_quick_sharded_bench_is_on_one_curve_with_equal_shares(tmp_path, monkeypatch):
    """torchrun starts two ranks; one and four are forks, which need not load torch."""
    by_torchrun = sharded._torchrun

    def started(num_ranks, num_steps):
        if num_ranks == 2:
            return by_torchrun(num_ranks, num_steps)
        succeed_on_ranks(num_ranks, tmp_path, sharded._run_rank, out := tmp_path / "runs.json", num_steps)
        return json.loads(out.read_text())

    monkeypatch.setattr(sharded, "_torchrun", started)
    result = json.loads(json.dumps(report.run("sharded", True)))
    assert result["quick"] and all(row["differences"]["fp64"] < 1e-5 for row in result["ranks"])
    check(result)


def test_the_committed_run_has_fifty_steps_and_says_whether_the_target_is_met():
    result = json.loads((RESULTS / "bench" / "sharded.json").read_text())
    assert not result["quick"] and {len(row["losses"]) for row in result["ranks"]} == {50}
    check(result)
    met = all(row["differences"]["fp64"] < 1e-5 for row in result["ranks"])
    assert ("meets the target" if met else "misses the target") in verdict(result)


def test_differences_are_those_of_the_runs_they_name(monkeypatch):
    def run(*losses):
        held = {"milliseconds": 5.0, "table_bytes": 100, "state_bytes": 200}
        return {"losses": list(losses), **held, "wire": {**dict.fromkeys(KINDS, 10.0), "undeduplicated": 60.0}}

    runs = {
        1: {"fp64": run(8, 7), "fp32 1": run(8, 6), "fp32 2": run(8, 6.25), "fp32 4": run(8, 6.5)},
        2: {"fp64": run(8.5, 7), "fp32 1": run(8, 6.125)},
        4: {"fp64": run(8, 6), "fp32 1": run(7.5, 6.5)},
    }
    monkeypatch.setattr(sharded, "_torchrun", lambda num_ranks, num_steps: runs[num_ranks])
    result = report.run("sharded", True)
    assert [row["differences"] for row in result["ranks"]] == [
        {"fp64_first": 0, "fp64": 0, "fp32": 0, "passes": 0, "ranks_to_passes": 0},
        {"fp64_first": 0.5, "fp64": 0.5, "fp32": 0.125, "passes": 0.25, "ranks_to_passes": 0.125},
        {"fp64_first": 1, "fp64": 1, "fp32": 0.5, "passes": 0.5, "ranks_to_passes": 0.5},
    ]
    header, lines = table(result)
    assert {len(line) for line in lines} == {len(header)} and lines[2][:2] == ["4", "1.0e+00"]
    assert "It sends 50% with 2 ranks, 50% with 4 ranks" in verdict(result)
    result["machine"]["cores"] = 2
    assert "4 ranks share 2 cores" in verdict(result)
    result["machine"]["cores"] = 8
    assert "share" not in verdict(result)
