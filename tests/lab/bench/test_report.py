"""The page of measurements follows from the committed JSON, and the terminal shows the same."""

import json
from statistics import mean

import pytest

from committed import RESULTS, ROOT
from engrammar_lab.bench.report import BENCHES, load_results, render, show, write_page
from engrammar_lab.report.studies import scores

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
    rows = json.loads((FOLDER / "step.json").read_text())["rows"]["contenders"]["row_adam"]
    assert f"a step takes {rows[-1]['ratio'] - 1:.1%} longer with the default optimizer" in readme
    state = json.loads((FOLDER / "optimizer.json").read_text())["state_bytes"]
    assert f"whose state is {state['row_adam']} bytes a row" in readme
    points = scores(json.loads((RESULTS / "lab" / "rivals.json").read_text()))
    bits = {point: f"{mean(values):.3f}" for point, values in points.items()}
    assert f"({bits['bigram at every layer']} against {bits['memory']} bits per byte)" in readme
    assert f"({bits['nothing (dense)']}) beats the plain MoE ({bits['experts']})" in readme
