"""Commands and code in the README run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engrammar_cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ENGRAMMAR = str(Path(sys.executable).parent / "engrammar")
DEMO_MODEL = "runs/demo/moe-memory-0"


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory) -> Path:
    """`engrammar demo`, whole, on a small text with a small model."""
    folder = tmp_path_factory.mktemp("demo")
    source = folder / "licence.jsonl"
    paragraphs = [text for text in (ROOT / "LICENSE").read_text().split("\n\n") if text.strip()]
    source.write_text("\n".join(json.dumps({"text": text}) for text in paragraphs))
    recipe = yaml.safe_load((ROOT / "src" / "engrammar" / "recipes" / "demo.yaml").read_text())
    recipe["data"] |= {
        "source": str(source),
        "vocab_size": 400,
        "validation_share": 0.2,
        "folder": str(folder / "data"),
    }
    recipe["data"]["sequence_length"] = 32
    recipe["model"] |= {"preset": "micro", "rho": 0.78}
    recipe["trainer"] |= {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "logging_steps": 1}
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    command = [ENGRAMMAR, "demo", "--recipe", str(folder / "small.yaml"), "--out", str(folder / "out")]
    for _ in range(2):  # the second finds everything trained
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        said = " ".join(done.stdout.split())
        assert "bits per byte" in said and "this is one seed" in said
    return folder / "out"


@pytest.mark.slow
def test_the_demo_leaves_its_results_pictures_and_models(small_demo):
    result = json.loads((small_demo / "demo.json").read_text())
    assert [run["variant"] for run in result["runs"]] == ["moe", "moe + memory"]
    assert all(run["steps"] == 6 for run in result["runs"]) and result["samples"][0].startswith("The United States is")
    assert len(result["gates"]) >= 3 and all(text["gates"] for text in result["gates"])
    for picture in ("curves.png", "gates.png"):
        assert (small_demo / picture).read_bytes().startswith(b"\x89PNG")
    assert (small_demo / "demo.md").read_text().startswith("# Plain experts against experts with memory")


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_in_the_readme_runs(block, small_demo):
    code = block.replace(DEMO_MODEL, str(small_demo / "moe-memory-0"))
    assert code != block
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_in_the_readme_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)
    named = set(re.findall(r"`engrammar (\w+)", README))
    assert named == COMMANDS.keys() - {"demo"} and "engrammar demo --seeds 3" in README


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]
    assert all((path.parent / link).exists() for link in links), links
