"""The page of measurements follows from the committed JSON."""

import json

from engrammar.bench.report import DOCUMENT, RESULTS, ROOT, render


def test_the_committed_page_is_made_from_the_committed_json():
    assert DOCUMENT.read_text() == render()


def test_the_readme_states_the_committed_figures():
    readme = " ".join((ROOT / "README.md").read_text().split())
    step = json.loads((RESULTS / "step.json").read_text())
    assert f"cost {step['memory_tax']:.1%} of training throughput" in readme
    demo = json.loads((ROOT / "results" / "demo" / "demo.json").read_text())
    (rho,) = {run["rho"] for run in demo["runs"] if run["variant"] == "moe + memory"}
    assert f"hold {1 - rho:.0%} of the idle parameters" in readme
