"""The page of measurements follows from the committed JSON, and the terminal shows the same."""

import json
from statistics import mean

import pytest

from committed import RESULTS, ROOT
from engrammar_lab.bench.report import BENCHES, load_result, render, show, write_page
from engrammar_lab.report.studies import scores

FOLDER, DOCUMENT = RESULTS / "bench", ROOT / "docs" / "measurements.md"


def test_the_committed_page_is_made_from_the_committed_json():
    assert DOCUMENT.read_text() == render(FOLDER, DOCUMENT)


@pytest.mark.parametrize("name", BENCHES)
def test_the_terminal_shows_the_cells_of_the_page(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = load_result(FOLDER, name)
    show(name, result)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for part, figures in BENCHES[name].parts(result):
        header, lines = part.table(figures)
        assert all(cell in shown for line in lines for cell in line)
        assert all(word in shown for title in header for word in title.split())
        assert " ".join(part.verdict(figures).split()) in " ".join(shown.split())
        assert all(f"| {' | '.join(line)} |" in DOCUMENT.read_text() for line in [header, *lines])


@pytest.mark.parametrize("name", ["rows.png", "titan.png"])
def test_the_page_shows_its_pictures(name):
    assert f"](../results/bench/{name})" in DOCUMENT.read_text() and (FOLDER / name).stat().st_size > 10_000


def test_how_far_torchtitan_and_our_trainer_part_is_what_their_losses_say():
    for run in json.loads((FOLDER / "titan.json").read_text())["runs"]:
        first = run["losses"]["torchtitan"]
        for name, apart in run["largest_difference_to_torchtitan"].items():
            assert apart["all_steps"] == max(abs(a - b) for a, b in zip(run["losses"][name], first, strict=True)) > 0
        for name, loss in run["mean_of_last_20_steps"].items():
            assert loss == pytest.approx(mean(run["losses"][name][-20:]))


def test_the_page_is_written_where_the_caller_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / "bench").mkdir(parents=True)
    for path in FOLDER.glob("*.json"):
        (tmp_path / "results" / "bench" / path.name).write_text(path.read_text())
    write_page()
    assert (tmp_path / "docs" / "measurements.md").read_text() == DOCUMENT.read_text()
    assert all((tmp_path / "results" / "bench" / name).exists() for name in ("rows.png", "titan.png"))


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
