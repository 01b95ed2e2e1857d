"""Bytes that unrelated processes of one machine share (`Segment`), and a lock for changes to them (`SharedLock`).

The protocol uses a file (by default in /dev/shm) that is never truncated, so that no mapping can break:
1. The process that gets the exclusive flock is the only user: it keeps a complete segment left by an earlier one or
   removes it, reserves the space of a new file, fills it, and last writes the mark that says it is complete. All other
   processes wait for a shared flock and hold it while they use the bytes. If the file is then incomplete or no longer
   has its name, they start over.
2. A process that gets the exclusive flock after closing was the last user, and removes the name.
3. A killed process loses its flocks, so the next process can get the exclusive one and decide by the mark.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import final

import numpy as np
from numpy.typing import NDArray

HEADER = 4096  # bytes before the shared ones; they hold the mark
Fill = Callable[[NDArray[np.uint8]], None]


def private_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Zeros for this process alone; a page takes memory once it is written to."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Rows are read at random: with small pages every row misses the TLB, which takes 20 % of a gather.
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, num_bytes)


@final
class SharedLock:
    """A lock for one writing process or many reading ones, and in each process for one thread at a time.

    Use it as `with lock.reading:` or `with lock.writing:`. Without a path it is a lock between threads only. The file
    at `path` is empty; the flock is taken on it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._mutex = threading.Lock()
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._process = os.getpid()
        self.reading = _Held(self, fcntl.LOCK_SH)
        self.writing = _Held(self, fcntl.LOCK_EX)

    def _acquire(self, kind: int) -> None:
        if self._process != os.getpid():
            self._separate()
        self._mutex.acquire()
        if self._file is not None:
            try:
                fcntl.flock(self._file, kind)
            except BaseException:
                self._mutex.release()
                raise

    def _release(self) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._mutex.release()

    def _separate(self) -> None:
        """Gives a forked child its own file and mutex.

        The flock of its parent's open file would belong to both, and a thread of the parent may hold the mutex.
        """
        self._mutex, self._process = threading.Lock(), os.getpid()
        if self._file is not None:
            inherited, self._file = self._file, os.open(f"/proc/self/fd/{self._file}", os.O_RDWR)
            os.close(inherited)

    def close(self) -> None:
        """Makes this a lock between threads only."""
        if self._process != os.getpid():
            self._separate()
        with self._mutex:
            if self._file is not None:
                os.close(self._file)
                self._file = None


@final
class _Held:
    def __init__(self, lock: SharedLock, kind: int) -> None:
        self._lock, self._kind = lock, kind

    def __enter__(self) -> None:
        self._lock._acquire(self._kind)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock._release()


@final
class Segment:
    """Bytes that are shared by all processes of this user that ask for the same content."""

    def __init__(
        self, content: str, num_bytes: int, fill: Fill, *, keep: bool = True, folder: Path | None = None
    ) -> None:
        """Joins the segment, or makes it; waits while another process fills it.

        Args:
            content: describes the bytes, in any words; the same text and number of bytes give the same segment.
            fill: writes the content into the bytes, which are zeros. Only the process that makes the segment calls it.
            keep: whether a complete segment that killed processes left is used; otherwise it is made again.
            folder: the folder of the file; None is /dev/shm or, on a system without it, the one for temporary files.

        Raises:
            ValueError: there is no room, the file cannot be opened, or this system lacks shared segments.
        """
        if not hasattr(os, "posix_fallocate"):
            raise ValueError("Memory shared between processes needs Linux; leave `shared` out.")
        self.path = segment_path(f"{content}, {num_bytes} bytes", folder)
        self._mark = json.dumps({"content": content, "bytes": num_bytes, "boot": _boot()}).encode().ljust(HEADER)
        if len(self._mark) > HEADER:
            raise ValueError(
                f"`content` of {self.path} has {len(content)} characters; allowed are about {HEADER - 200}."
            )
        self._num_bytes = num_bytes
        while (file := self._open(fill, keep)) is None:
            time.sleep(random.uniform(0, 0.01))  # processes that start over should do so at different times
        self._file = file
        self.lock = SharedLock(_lock_path(self.path))  # must be held to change the bytes once they are filled
        self.bytes = self._map(file)  # the shared bytes, as writable uint8 [num_bytes]
        self._finalizer = weakref.finalize(self, _leave, file, self.path, self.lock, os.getpid())

    def close(self) -> None:
        """Releases the bytes; the last user's call removes the name. Arrays that view the bytes stay readable."""
        self.bytes = np.empty(0, np.uint8)
        self._finalizer()

    def _open(self, fill: Fill, keep: bool) -> int | None:
        """Opens the file, complete and under a shared flock; None if another process was faster or died: start over."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if os.fstat(file).st_uid != os.geteuid():
                os.close(file)
                raise PermissionError(errno.EPERM, "it belongs to another user")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be opened ({error.strerror}): give another name.") from error
        settled = False
        try:
            settled = self._settle(file, fill, keep)
        finally:
            if not settled:
                # Closing is not enough: a mapping in a traceback would keep the file open, and others would wait.
                fcntl.flock(file, fcntl.LOCK_UN)
                os.close(file)
        return file if settled else None

    def _settle(self, file: int, fill: Fill, keep: bool) -> bool:
        """Gets a shared flock on the file; returns whether the file is complete and still has its name."""
        if _try_alone(file):
            if not _is_named(file, self.path):
                return False
            if os.fstat(file).st_size and not (keep and self._is_whole(file)):
                _remove(self.path)
                return False
            if not self._is_whole(file):
                self._make(file, fill)
        fcntl.flock(file, fcntl.LOCK_SH)
        if not _is_named(file, self.path):
            return False
        return self._is_whole(file)

    def _make(self, file: int, fill: Fill) -> None:
        """Reserves, fills and marks a file that only this process has open."""
        try:
            _reserve(file, HEADER + self._num_bytes, self.path)
            fill(self._map(file))
            os.pwrite(file, self._mark, 0)
        except BaseException:
            _remove(self.path)
            raise

    def _map(self, file: int) -> NDArray[np.uint8]:
        return np.frombuffer(mmap.mmap(file, HEADER + self._num_bytes), np.uint8, self._num_bytes, HEADER)

    def _is_whole(self, file: int) -> bool:
        """Whether the file is complete, has our content, and is not from before a restart of the machine."""
        return os.fstat(file).st_size == HEADER + self._num_bytes and os.pread(file, HEADER, 0) == self._mark


def segment_path(name: str, folder: Path | None = None) -> Path:
    """The file of a segment; its name is readable, and differs for each `name` and user."""
    shm = Path("/dev/shm")
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name)[-40:].strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    where = folder or (shm if shm.is_dir() else Path(tempfile.gettempdir()))
    return where / f"engrammar-{os.geteuid()}-{readable}-{digest}"


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _boot() -> str:
    """An id of this start of the machine, since a half-written file on a disk may outlive a crash."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _reserve(file: int, num_bytes: int, path: Path) -> None:
    # Without this, the first write without room would kill the process with SIGBUS.
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM):
            raise
        free = shutil.disk_usage(path.parent).free
        raise ValueError(
            f"{path.parent} has no room for a shared segment of {num_bytes:,} bytes ({free:,} are free, "
            f"{error.strerror}): enlarge it (`mount -o remount,size=...`, or `--shm-size` of a container), "
            "or leave `shared` out."
        ) from error


def _try_alone(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    for name in (_lock_path(path), path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _leave(file: int, path: Path, lock: SharedLock, process: int) -> None:
    """Leaves a segment. A forked child shares its parent's flock and must not release it."""
    lock.close()
    if process == os.getpid():
        if _try_alone(file) and _is_named(file, path):
            _remove(path)
        fcntl.flock(file, fcntl.LOCK_UN)  # the mapping keeps the file open
    os.close(file)
