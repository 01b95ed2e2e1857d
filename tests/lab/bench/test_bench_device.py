"""What `make gpu` writes follows from the tests that it runs and from what it measures."""

import json

import pytest
import torch

from committed import ROOT
from engrammar_lab.bench import device
from engrammar_lab.bench.decode import Plan
from engrammar_lab.bench.device import bench_device, check, verdict
from engrammar_lab.bench.report import DEVICE, NOT_RUN, render

TINY = Plan(preset="micro", rows_per_head=2003, batches=(1, 2), rounds=1, steps=2, corpus="pocket:stdlib")
CASES = """
import os, pytest
def test_right(): assert os.environ["ENGRAMMAR_DEVICE"] == "cpu"
def test_wrong(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_never_begun(broken): pass
@pytest.mark.skip
def test_left_out(): pass
"""


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAMMAR_BENCH_FOLDER", str(tmp_path / "bench"))
    monkeypatch.setattr(device, "COPIED", 2**16)
    path = tmp_path / "test_cases.py"
    path.write_text(CASES)
    return bench_device(TINY, (str(path), "--noconftest"))


def test_failed_and_skipped_tests_are_named(result, tmp_path):
    assert result["checks"] == {"passed": 1, "failed": ["test_wrong", "test_never_begun"], "skipped": ["test_left_out"]}
    assert "1 passed, 2 failed (test_wrong, test_never_begun) and 1 were skipped" in verdict(result)
    assert result["gb_per_second"]["any"] > 0
    (tmp_path / "results").mkdir()
    for path in (ROOT / "results" / "bench").glob("*.json"):
        (tmp_path / "results" / path.name).write_text(path.read_text())
    before = render(tmp_path / "results", tmp_path / "page.md")
    (tmp_path / "results" / "device.json").write_text(json.dumps(result))
    page = render(tmp_path / "results", tmp_path / "page.md")
    assert NOT_RUN not in page and f"## {DEVICE.title}: `make gpu`" in page and verdict(result) in page
    assert (NOT_RUN in before) != (ROOT / "results" / "bench" / "device.json").exists()


def test_without_an_accelerator_nothing_is_run_or_written(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "accelerator", lambda: torch.device("cpu"))
    with pytest.raises(SystemExit, match="torch finds no accelerator here, so nothing was run"):
        device.main(tmp_path / "device.json")
    assert not list(tmp_path.iterdir())


def test_tests_that_leave_no_report_are_an_error():
    with pytest.raises(ChildProcessError, match="ended with status 4 and left no report"):
        check("cpu", ["--an-option-that-pytest-lacks"])


@pytest.mark.slow
def test_everything_works_on_an_imitated_device():
    """Host and device are told apart there: `tests/imitated_device.py`. What needs CUDA is left out."""
    found = check("imitated", ["tests/device"])
    assert found["failed"] == [] and found["passed"] > 50
    assert found["skipped"] == ["test_a_copy_that_nobody_waits_for_is_read_too_early"]
