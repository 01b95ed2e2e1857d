import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from engrammar.stores import shared
from engrammar.stores.shared import Segment, SharedLock, private_bytes, segment_path

SOURCE = Path(shared.__file__).parent.parent
# Workers import single files: what packages import takes seconds.
PREAMBLE = f"""
import os, signal, sys, time, types
from pathlib import Path
for name, folder in (("engrammar", ""), ("engrammar.stores", "/stores"), ("engrammar.tables", "/tables")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(SOURCE)!r} + folder]
import numpy as np
def say(*words): print(*words, flush=True)
def hear(): return sys.stdin.readline().strip()
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""
SEGMENT = """
from engrammar.stores.shared import Segment
folder, dies = Path(sys.argv[1]), sys.argv[2] == "dies"
def fill(memory):
    (folder / f"filler-{os.getpid()}").touch()
    memory[: len(memory) // 2] = 7
    time.sleep(0.2)
    if dies: die()
    memory[len(memory) // 2 :] = 7
segment = Segment("sevens", 100_000, fill, folder=folder)
say(int(segment.bytes.sum()))
hear()
segment.close()
"""


class Worker:
    """A process that runs `code` after PREAMBLE; `say` there is `hear` here, and the other way round."""

    def __init__(self, code: str, *arguments: object) -> None:
        command = [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid

    def hear(self) -> str:
        return self.process.stdout.readline().strip()

    def say(self, line: str = "") -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        self.process.stdin.close()
        return self.process.wait()


def sevens(memory):
    memory[:] = 7


def never(memory):
    pytest.fail("filled again")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("engrammar-*"))


def test_all_who_join_see_the_same_bytes_and_the_last_removes_the_name(tmp_path):
    first = Segment("a", 10_000, sevens, folder=tmp_path)
    second = Segment("a", 10_000, never, folder=tmp_path)
    first.bytes[5] = 9
    assert second.bytes[5] == 9 and second.bytes[9_999] == 7 and len(second.bytes) == 10_000
    first.close()
    assert len(names(tmp_path)) == 2  # the segment and its lock
    second.close()
    second.close()
    assert not names(tmp_path)


def test_unrelated_processes_fill_once_and_leave_nothing(tmp_path):
    workers = [Worker(SEGMENT, tmp_path, "lives") for _ in range(4)]
    assert [worker.hear() for worker in workers] == ["700000"] * 4
    assert len(list(tmp_path.glob("filler-*"))) == 1
    for worker in workers:
        worker.say()
    assert [worker.end() for worker in workers] == [0] * 4
    assert not names(tmp_path)


def test_a_process_killed_while_filling_leaves_nothing_that_looks_whole(tmp_path):
    dying = Worker(SEGMENT, tmp_path, "dies")
    while not list(tmp_path.glob("filler-*")):
        time.sleep(0.005)
    waiting = [Worker(SEGMENT, tmp_path, "lives") for _ in range(2)]
    assert dying.end() == -signal.SIGKILL
    assert [worker.hear() for worker in waiting] == ["700000"] * 2
    assert len(list(tmp_path.glob("filler-*"))) == 2
    assert [worker.end() for worker in waiting] == [0] * 2
    assert not names(tmp_path)


@pytest.mark.parametrize("keep", [True, False])
def test_what_killed_users_left_whole_is_kept_or_made_anew(tmp_path, keep):
    worker = Worker(SEGMENT, tmp_path, "lives")
    assert worker.hear() == "700000"
    worker.process.kill()
    worker.end()
    assert len(names(tmp_path)) == 2
    filled = []
    segment = Segment("sevens", 100_000, filled.append, keep=keep, folder=tmp_path)
    assert len(filled) == (0 if keep else 1) and segment.bytes.sum() == (700_000 if keep else 0)
    filled.clear()
    segment.close()
    assert not names(tmp_path)


def test_bytes_stay_readable_while_an_array_shows_them(tmp_path):
    segment = Segment("a", 10_000, sevens, folder=tmp_path)
    shown = segment.bytes[100:200]
    segment.close()
    other = Segment("a", 10_000, lambda memory: None, folder=tmp_path)
    assert shown.sum() == 700 and other.bytes.sum() == 0
    other.close()


def test_other_content_is_another_segment(tmp_path):
    segments = [
        Segment(content, num_bytes, sevens, folder=tmp_path)
        for content, num_bytes in (("a", 10_000), ("b", 10_000), ("a", 10_001))
    ]
    assert len({segment.path for segment in segments}) == 3
    for segment in segments:
        segment.close()
    assert not names(tmp_path)


def test_a_file_that_is_not_whole_is_made_anew(tmp_path):
    Segment("a", 10_000, sevens, folder=tmp_path).close()
    path = segment_path("a, 10000 bytes", tmp_path)
    path.write_bytes(bytes(20_000))  # as a killed process, or a crash of the machine, may leave it
    segment = Segment("a", 10_000, sevens, folder=tmp_path)
    assert segment.path == path and segment.bytes.sum() == 70_000
    segment.close()


def test_a_filling_that_fails_leaves_nothing(tmp_path):
    def fail(memory):
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged") as caught:
        Segment("a", 10_000, fail, folder=tmp_path)
    assert not names(tmp_path)
    Segment("a", 10_000, sevens, folder=tmp_path).close()
    assert caught.tb is not None  # its frames still held the first mapping


def test_no_room_is_one_error_that_says_how_much_is_needed(tmp_path):
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    mounted = mounted and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path]).returncode
    if not mounted:
        pytest.skip("only root can mount a small tmpfs")
    try:
        with pytest.raises(ValueError, match=r"no room for a shared segment of 4,004,096 bytes \(1,048,576 are free"):
            Segment("a", 4_000_000, never, folder=tmp_path)
        assert not names(tmp_path)
        Segment("a", 500_000, sevens, folder=tmp_path).close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_names_are_safe_and_differ():
    paths = [segment_path(name) for name in ("a/b", "a b", "../../etc/passwd", "x" * 300, "x" * 301, "")]
    assert len(set(paths)) == len(paths) and len({path.parent for path in paths}) == 1
    assert all(len(path.name) < 100 and path.name.startswith("engrammar-") for path in paths)


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    path = segment_path("a, 10 bytes", tmp_path)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot be opened"):
        Segment("a", 10, never, folder=tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_writers_of_threads_and_processes_exclude_each_other(tmp_path):
    path = tmp_path / "lock"
    total = np.memmap(tmp_path / "total", np.int64, "w+", shape=1)

    def add(lock: SharedLock, times: int) -> None:
        for _ in range(times):
            with lock.writing:
                old = int(total[0])
                time.sleep(0)
                total[0] = old + 1

    locks = [SharedLock(path), SharedLock(path)]  # two open files: as good as two processes
    threads = [threading.Thread(target=add, args=(lock, 500)) for lock in locks for _ in range(2)]
    child = os.fork()
    if not child:
        add(locks[0], 500)  # with its parent's lock
        os._exit(0)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert total[0] == 2_500


def test_processes_read_side_by_side_and_a_writer_waits_for_them(tmp_path):
    first, second = SharedLock(tmp_path / "lock"), SharedLock(tmp_path / "lock")
    wrote = threading.Event()

    def write() -> None:
        with second.writing:
            wrote.set()

    with first.reading:
        with second.reading:
            pass
        thread = threading.Thread(target=write)
        thread.start()
        assert not wrote.wait(0.05)
    thread.join()
    assert wrote.is_set()


def test_a_forked_child_that_closes_leaves_its_parents_segment_alone(tmp_path):
    segment = Segment("a", 10_000, sevens, folder=tmp_path)
    child = os.fork()
    if not child:
        segment.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 2
    joined = Segment("a", 10_000, never, folder=tmp_path)
    segment.close()
    assert len(names(tmp_path)) == 2
    joined.close()
    assert not names(tmp_path)


def test_private_bytes_are_zeros_of_any_length():
    for num_bytes in (0, 1, 4_097):
        memory = private_bytes(num_bytes)
        assert memory.shape == (num_bytes,) and not memory.any() and memory.flags.writeable
