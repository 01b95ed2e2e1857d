"""Studies are equal where they say so, go on after a kill, and their report says what the JSON says and no more."""

import json

import pytest

from engrammar.lab import studies_report
from engrammar.lab.studies import STUDIES, recipes, run_study
from engrammar.lab.studies_report import agree, bits, differences, render, scaling_fit, unequal, verdict, write_report
from engrammar_lab_cli import main

TINY = (
    "data.vocab_size=300",
    "data.limit_documents=80",
    "data.batch_size=2",
    "data.sequence_length=16",
    "trainer.max_steps=2",
    "trainer.warmup_steps=1",
)


def made(study: str, values: dict[str, list[float]]) -> dict:
    """A result with these bits per byte."""
    return {
        "command": f"engrammar lab run {study}",
        "study": study,
        "date": "2026-11-24",
        "machine": {"cpu": "a CPU", "cores": 2, "torch": "2"},
        "tokens": 1000,
        "runs": [
            {
                "point": point,
                "seed": seed,
                "bits_per_byte": value,
                "total_parameters": 1000,
                "active_parameters": 100 + (point == "40%"),
                "memory_rows": 5,
                "flops_per_token": 2e5,
                "tokens_per_second": None,
            }
            for point, each in values.items()
            for seed, value in enumerate(each)
        ],
    }


def test_every_point_of_a_seed_sees_the_same_text_and_training(tmp_path):
    for study in STUDIES.values():
        queue = recipes(study, tmp_path, (0, 1))
        assert len({recipe.out for recipe in queue.values()}) == 2 * len(study.points)
        for seed in (0, 1):
            own = [recipe for (_, of), recipe in queue.items() if of == seed]
            assert all(recipe.seed == seed for recipe in own)
            assert all(recipe.data == own[0].data and recipe.trainer == own[0].trainer for recipe in own)
            assert all(recipe.optimiser == own[0].optimiser for recipe in own)


def test_the_issues_studies_have_as_many_points_as_they_should():
    assert len(STUDIES["allocation"].points) >= 6
    assert len(STUDIES["scaling"].points) >= 5 and len(STUDIES["ablation"].points) >= 7


def test_differences_are_paired_and_agreement_needs_every_seed():
    result = made("allocation", {"100%": [2.0, 3.0, 4.0], "80%": [1.9, 2.9, 3.9], "60%": [1.9, 3.1, 3.9]})
    assert differences(result, "80%") == pytest.approx([-0.1, -0.1, -0.1])
    assert agree([-0.1, -0.11, -0.09]) and not agree([-0.1, 0.1, -0.1]) and not agree([-0.1]) and not agree([0.0, 0.0])
    assert not agree([-0.001, -0.2, -0.01])  # one way, but within two standard errors
    said = verdict(result)
    assert "Fewest bits per byte: 80% (2.9000 ± 1.0000)" in said and "all seeds agree" in said
    assert "Settled against 100%: 80%." in said and "Not settled: 60%." in said


def test_a_budget_that_is_not_equal_shows():
    result = made("allocation", {"100%": [2.0, 2.0], "40%": [2.0, 2.1]})
    assert unequal(result) == pytest.approx({"total_parameters": 0, "active_parameters": 0.01})
    assert "active ones by 1.000%" in verdict(result)


def test_the_slope_of_a_straight_line_is_found_for_each_seed():
    rows = {f"{rows:,}": [2 - 0.03 * place, 3 - 0.05 * place] for place, rows in enumerate((500, 5_000, 50_000))}
    said = scaling_fit(made("scaling", rows))
    assert "-0.0400 ± 0.0141 bits per byte" in said and "neither clearly" in said
    curved = {
        f"{rows:,}": [1 + (rows / 500) ** -0.5, 1 + (rows / 500) ** -0.5]
        for rows in (500, 1_600, 5_000, 16_000, 50_000)
    }
    assert "a power law with a floor fits better" in scaling_fit(made("scaling", curved))


def test_points_without_all_seeds_are_left_out():
    result = made("allocation", {"100%": [2.0, 2.0], "80%": [1.9]})
    assert studies_report.points(result) == ["100%"] and bits(result, "80%") == [1.9]
    assert "| 80% |" not in render({"allocation": result})


def test_the_committed_report_follows_from_the_committed_json():
    write_report(check=True)
    for name, result in studies_report.load_results().items():
        assert studies_report.points(result) == list(STUDIES[name].points)
        assert len({run["seed"] for run in result["runs"]}) >= 3
        if STUDIES[name].equal:
            assert max(unequal(result).values()) < 0.005
        assert (studies_report.RESULTS / f"{name}.png").stat().st_size > 5_000


def test_a_report_that_does_not_follow_is_refused(tmp_path, capsys):
    result = made("allocation", {"100%": [2.0, 2.1], "80%": [1.9, 1.95]})
    (tmp_path / "allocation.json").write_text(json.dumps(result))
    write_report(tmp_path)
    write_report(tmp_path, check=True)
    (tmp_path / "allocation.json").write_text(json.dumps(result).replace("1.95", "1.96"))
    with pytest.raises(SystemExit):
        main(["report", "--results", str(tmp_path), "--check"])
    assert "does not follow from the JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", "--results", str(tmp_path / "none")])
    assert "holds no results" in capsys.readouterr().err


def test_unknown_studies_and_counts_are_refused():
    with pytest.raises(ValueError, match="no study 'luck'; known: allocation"):
        run_study("luck")
    with pytest.raises(ValueError, match="seeds is 0"):
        run_study("allocation", seeds=0)


@pytest.mark.slow
def test_a_study_runs_and_a_second_call_trains_nothing_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = [{"text": f"the cat {i} sat on the mat and the dog {i % 7} ate {i * 13 % 50} fish " * 4} for i in range(90)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in text))
    overrides = (*TINY, "data.source=text.jsonl", "data.validation_share=0.2")
    how = {"runs": tmp_path / "runs", "seeds": 1, "jobs": 2, "results": tmp_path / "results", "overrides": overrides}
    first = run_study("allocation", **how)
    assert [run["point"] for run in first["runs"]] == list(STUDIES["allocation"].points)
    assert all(run["flops_per_token"] > 1e5 and len(run["curve"]) <= 1 for run in first["runs"])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    again = run_study("allocation", **how)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    assert [run["bits_per_byte"] for run in again["runs"]] == [run["bits_per_byte"] for run in first["runs"]]
    assert json.loads((tmp_path / "results" / "allocation.json").read_text()) == again
    assert max(unequal(first).values()) < 0.01
