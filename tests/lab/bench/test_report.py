"""The page of measurements follows from the committed JSON, and the terminal shows the same."""

import json

import pytest

from committed import RESULTS, ROOT
from engrammar_lab.bench.report import BENCHES, load_results, render, show, write_page

FOLDER, DOCUMENT = RESULTS / "bench", ROOT / "docs" / "measurements.md"


def test_the_committed_page_is_made_from_the_committed_json():
    assert DOCUMENT.read_text() == render(FOLDER, DOCUMENT)


@pytest.mark.parametrize("name", BENCHES)
def test_the_terminal_shows_the_cells_of_the_page(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = load_results(FOLDER)[name]
    show(name, result)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for part, figures in BENCHES[name].parts(result):
        header, lines = part.table(figures)
        assert all(cell in shown for line in lines for cell in line)
        assert all(word in shown for title in header for word in title.split())
        assert " ".join(part.verdict(figures).split()) in " ".join(shown.split())
        assert all(f"| {' | '.join(line)} |" in DOCUMENT.read_text() for line in [header, *lines])


def test_the_page_shows_the_rows_picture():
    assert "](../results/bench/rows.png)" in DOCUMENT.read_text() and (FOLDER / "rows.png").stat().st_size > 10_000


def test_the_page_is_written_where_the_caller_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / "bench").mkdir(parents=True)
    for path in FOLDER.glob("*.json"):
        (tmp_path / "results" / "bench" / path.name).write_text(path.read_text())
    write_page()
    assert (tmp_path / "docs" / "measurements.md").read_text() == DOCUMENT.read_text()
    assert (tmp_path / "results" / "bench" / "rows.png").exists()


def test_the_readme_states_the_committed_figures():
    readme = " ".join((ROOT / "README.md").read_text().split())
    step = json.loads((FOLDER / "step.json").read_text())
    assert f"cost {step['memory_tax']:.1%} of training throughput" in readme
    demo = json.loads((ROOT / "results" / "demo" / "demo.json").read_text())
    (rho,) = {run["rho"] for run in demo["runs"] if run["variant"] == "moe + memory"}
    assert f"hold {1 - rho:.0%} of the idle parameters" in readme
