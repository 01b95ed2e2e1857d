"""The report on row optimisers is made from its JSON, and the study runs as it says."""

import json

import pytest

from engrammar.lab import optimisers
from engrammar.lab.optimisers import KINDS, RESULTS, difference, draw, render, run_optimisers


def committed() -> dict:
    return json.loads((RESULTS / "optimisers.json").read_text())


def test_the_committed_report_is_made_from_the_committed_json(tmp_path):
    assert (RESULTS / "optimisers.md").read_text() == render(committed())
    draw(committed(), tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000 and (RESULTS / "optimisers.png").exists()


def test_every_optimiser_had_three_seeds_and_its_best_rate():
    result = committed()
    assert set(result["optimisers"]) == set(KINDS) and len(result["seeds"]) >= 3
    for found in result["optimisers"].values():
        tuning = found["tuning_bits_per_byte"]
        assert len(found["bits_per_byte"]) == len(result["seeds"])
        assert f"{found['memory_lr_scale']:g}" == min(tuning, key=tuning.get)


def test_differences_are_paired_by_seed():
    made = {"optimisers": {"a": {"bits_per_byte": [1.5, 2.5, 3.5]}, "b": {"bits_per_byte": [1.0, 2.0, 3.0]}}}
    assert difference(made, "a", "b") == "+0.5000 ± 0.0000"


@pytest.mark.slow
def test_the_study_runs_and_is_resumable(tmp_path, monkeypatch):
    monkeypatch.setattr(optimisers, "SCALES", (2.5, 5.0))
    monkeypatch.setattr(optimisers, "TUNING_STEPS", 2)
    monkeypatch.setattr(optimisers, "STEPS", 3)
    monkeypatch.chdir(tmp_path)
    first = run_optimisers(tmp_path / "runs", "micro")
    assert run_optimisers(tmp_path / "runs", "micro")["optimisers"] == first["optimisers"]
    assert len({found["mean"] for found in first["optimisers"].values()}) == len(KINDS)
    assert "| row_adam | 4 |" in render({**first, "seeds": [0, 1, 2]})
