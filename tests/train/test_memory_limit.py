"""A table larger than the memory that a process may use trains from a mapped file, to the bits of one in RAM."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from processes import run

LIMIT = 420 * 2**20  # most of it is Python's, torch's and transformers' own
DISK = 3 * 10**9
WORKER = Path(__file__).parent / "memory_worker.py"


def own_group() -> Path | None:
    """This process's memory cgroup (version 1): a limit below it leaves every limit above it in force."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = [path for _, controllers, path in lines if controllers == "memory"]
    return Path("/sys/fs/cgroup/memory") / paths[0].lstrip("/") if paths else None


@pytest.fixture
def limited():
    """A memory cgroup of LIMIT bytes, page cache and swap included."""
    above = own_group()
    if above is None or not above.is_dir():
        pytest.skip("a limit of memory needs cgroup version 1 with the memory controller")
    group = above / f"engrammar-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a limit of memory needs the right to make a cgroup in {above}: {error.strerror}")
    try:
        for file in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            if (group / file).exists():  # the second where swap is accounted for
                (group / file).write_text(str(LIMIT))
        yield group
    finally:
        for _ in range(50):  # a process that just died may still count for a moment
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def work(where: str, folder: Path, *group: str) -> tuple[int, dict | None]:
    """The exit code, and what the process reported."""
    folder.mkdir()
    done = run([sys.executable, str(WORKER), where, str(folder), str(folder / "report.json"), *group])
    report = json.loads((folder / "report.json").read_text()) if done.returncode == 0 else None
    assert done.returncode <= 0, done.stderr[-3000:]
    shutil.rmtree(folder)
    return done.returncode, report


@pytest.mark.slow
def test_a_table_twice_the_memory_trains_from_a_file(tmp_path, limited):
    """Drawing rows, steps, a checkpoint and reading it back; the same in RAM is killed by the system."""
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"a table and its checkpoint need {DISK / 1e9:.0f} GB in {tmp_path}")
    assert work("ram", tmp_path / "killed", str(limited)) == (-9, None)
    returned, found = work("file", tmp_path / "file", str(limited))
    assert returned == 0 and found["table_bytes"] > 2 * LIMIT
    assert int((limited / "memory.max_usage_in_bytes").read_text()) <= LIMIT
    _, expected = work("ram", tmp_path / "ram")
    for part in ("losses", "sum_of_some_rows", "table_bytes"):
        assert found[part] == expected[part], part
    assert found["peak_bytes"] <= LIMIT + 2**30 < expected["peak_bytes"]
