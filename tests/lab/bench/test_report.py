"""The page of measurements follows from the committed JSON, and the terminal shows the same."""

import json

import pytest

from engrammar_lab.bench.report import BENCHES, DOCUMENT, RESULTS, ROOT, load_results, render, show


def test_the_committed_page_is_made_from_the_committed_json():
    assert DOCUMENT.read_text() == render()


@pytest.mark.parametrize("name", BENCHES)
def test_the_terminal_shows_the_cells_of_the_page(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # no line is broken
    result = load_results()[name]
    show(result)
    shown, module = capsys.readouterr().out, BENCHES[name].module
    header, lines = module.table(result)
    assert all(cell in shown for line in [header, *lines] for cell in line) and module.verdict(result) in shown
    assert all(f"| {' | '.join(line)} |" in render() for line in [header, *lines])


def test_the_page_shows_the_rows_picture():
    assert "](../results/bench/rows.png)" in render() and (RESULTS / "rows.png").stat().st_size > 10_000


def test_the_readme_states_the_committed_figures():
    readme = " ".join((ROOT / "README.md").read_text().split())
    step = json.loads((RESULTS / "step.json").read_text())
    assert f"cost {step['memory_tax']:.1%} of training throughput" in readme
    demo = json.loads((ROOT / "results" / "demo" / "demo.json").read_text())
    (rho,) = {run["rho"] for run in demo["runs"] if run["variant"] == "moe + memory"}
    assert f"hold {1 - rho:.0%} of the idle parameters" in readme
