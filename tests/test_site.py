"""The documentation site builds without a broken link, shows every public name, and fetches nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import engrammar

ROOT = Path(__file__).parent.parent
NEEDED = ("mkdocs.yml", "docs", ".ci", "results", "src", "README.md", "CONTRIBUTING.md", "tests")


def build(place: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site of the checkout `place`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # --quiet would hide warnings from --strict
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        if name == "docs":
            shutil.copytree(ROOT / name, place / name)
        else:
            (place / name).symlink_to(ROOT / name)
    return place


@pytest.mark.slow
def test_the_site_builds_and_a_broken_link_ends_the_build(checkout):
    built = build(checkout)
    assert built.returncode == 0, built.stderr
    site = checkout / "build" / "site"
    assert (site / "results" / "lab" / "report.html").is_file() and (site / "results" / "bench" / "rows.png").is_file()
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"?(https?:[^\" >]+)", page)
        assert not [url for url in loaded if "canonical" not in url], name
        assert 'href="../' not in page.replace('href="../results', ""), name
    for name in engrammar.__all__:
        assert re.search(rf'id="engrammar\.(\w+\.)?{name}["\.]', pages["api.html"]), name
    page = checkout / "docs" / "glossary.md"
    page.write_text(page.read_text() + "\n[nowhere](nowhere.md)\n")
    broken = build(checkout)
    assert broken.returncode != 0 and "nowhere.md" in broken.stderr


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_every_public_name_says_what_it_is():
    undocumented = [name for name in engrammar.__all__ if not (getattr(engrammar, name).__doc__ or "").strip()]
    assert not undocumented
    api = (ROOT / "docs" / "api.md").read_text()
    assert not [
        name for name in engrammar.__all__ if not re.search(rf"::: engrammar\.(\w+\.)?{name}$", api, re.MULTILINE)
    ]
