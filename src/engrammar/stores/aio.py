"""Many page reads at once: by Linux's asynchronous reads (system calls), and a plain twin that uses threads.

A queue owns staging memory in slots of one page. A read fills consecutive slots, and the first one is its id.
Letters: N reads started together, D finished reads.
"""

import ctypes
import errno
import mmap
import os
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from typing import final

import numpy as np
from numpy.typing import NDArray

from engrammar.tables.headers import PAGE

Ints = NDArray[np.int64]

# io_setup, io_destroy, io_submit, io_getevents
NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
# struct iocb and struct io_event of <linux/aio_abi.h>, both machines being little-endian; opcode 0 is a read
IOCB = np.dtype(
    {
        "names": ["id", "opcode", "descriptor", "address", "bytes", "offset"],
        "formats": ["u8", "u2", "u4", "u8", "u8", "i8"],
        "offsets": [0, 16, 20, 24, 32, 40],
        "itemsize": 64,
    }
)
EVENT = np.dtype([("id", "u8"), ("iocb", "u8"), ("result", "i8"), ("more", "i8")])
NUM_THREADS = 32


class ReadQueue(ABC):
    """Staging memory and the reads into it. Only one thread may use it at a time."""

    memory: NDArray[np.uint8]  # the bytes of all slots; it starts at a page boundary
    in_flight: int  # how many reads were started but not collected yet; their slots must not be touched
    closed = False  # whether it can be used no more

    @abstractmethod
    def start(self, descriptor_N: Ints, byte_N: Ints, slot_N: Ints, pages_N: Ints) -> None:
        """Starts N reads: each reads `pages` pages of a file from `byte` on into the slots from `slot` on."""

    @abstractmethod
    def collect(self, at_least: int, seconds: float | None = None) -> tuple[Ints, Ints]:
        """Waits until `at_least` reads have finished, one was refused, or `seconds` have passed.

        Returns:
            slot_D and result_D of the finished reads. A result is the number of bytes read (fewer at the end of the
            file), or minus an errno.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases what the queue holds, once no read is in flight."""


def _stage(num_slots: int) -> NDArray[np.uint8]:
    # A shared mapping: a fork would otherwise copy pages while reads into them are in flight.
    return np.frombuffer(mmap.mmap(-1, num_slots * PAGE), np.uint8)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@final
class AioQueue(ReadQueue):
    """Reads by io_submit and io_getevents. They are asynchronous on files that were opened with O_DIRECT.

    Raises:
        OSError: this system has no such calls, forbids them, or has no more contexts (/proc/sys/fs/aio-max-nr).
    """

    def __init__(self, num_slots: int) -> None:
        self.in_flight, self._context, self._process = 0, ctypes.c_ulong(0), os.getpid()
        numbers = NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
        if numbers is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._setup, self._destroy, self._submit, self._getevents = map(ctypes.c_long, numbers)
        self._call(self._setup, ctypes.c_long(num_slots), ctypes.byref(self._context))
        self.memory = _stage(num_slots)
        self._iocbs, self._events = np.zeros(num_slots, IOCB), np.zeros(num_slots, EVENT)
        self._pointers = (self._iocbs.ctypes.data + IOCB.itemsize * np.arange(num_slots)).astype(np.uint64)
        # Kept, since looking these up costs more than a system call.
        self._memory_at, self._pointers_at = self.memory.ctypes.data, self._pointers.ctypes.data
        self._events_at = ctypes.c_void_p(self._events.ctypes.data)
        self._refused: list[tuple[int, int]] = []

    def start(self, descriptor_N: Ints, byte_N: Ints, slot_N: Ints, pages_N: Ints) -> None:
        count, done = len(slot_N), 0
        iocbs = self._iocbs[:count]
        iocbs["id"], iocbs["descriptor"], iocbs["offset"] = slot_N, descriptor_N, byte_N
        iocbs["address"], iocbs["bytes"] = self._memory_at + slot_N * PAGE, pages_N * PAGE
        while done < count:
            pointers = ctypes.c_void_p(self._pointers_at + 8 * done)
            try:
                taken = self._call(self._submit, self._context, ctypes.c_long(count - done), pointers)
                done += taken
                self.in_flight += taken
            except OSError as error:  # about the first read that is left: a closed file, no memory
                self._refused.append((int(slot_N[done]), -(error.errno or errno.EIO)))
                done += 1
                self.in_flight += 1

    def collect(self, at_least: int, seconds: float | None = None) -> tuple[Ints, Ints]:
        if self._refused:
            slot_D, result_D = np.array(self._refused, np.int64).T
            self._refused = []
        else:
            wait = None if seconds is None else _Timespec(int(seconds), int(seconds % 1 * 1e9))
            most, least = ctypes.c_long(len(self._events)), ctypes.c_long(min(at_least, self.in_flight))
            pointer = None if wait is None else ctypes.byref(wait)
            count = self._call(self._getevents, self._context, least, most, self._events_at, pointer)
            done = self._events[:count]
            slot_D, result_D = done["id"].astype(np.int64), done["result"].copy()
        self.in_flight -= len(slot_D)
        return slot_D, result_D

    def close(self) -> None:
        # A context belongs to the process that made it; in a fork its number may be another context's.
        if self._context and self._process == os.getpid():
            self._call(self._destroy, self._context)  # waits for what is in flight
        self._context, self.closed = ctypes.c_ulong(0), True

    def __del__(self) -> None:
        self.close()

    def _call(self, number: ctypes.c_long, *arguments: object) -> int:
        while (result := self._libc.syscall(number, *arguments)) < 0:
            if (code := ctypes.get_errno()) != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return result


@final
class ThreadQueue(ReadQueue):
    """The plain twin, for any file on any system: threads, each of which reads one piece after another."""

    def __init__(self, threads: ThreadPoolExecutor, num_slots: int) -> None:
        self.memory, self.in_flight = _stage(num_slots), 0
        self._threads = threads
        self._done: SimpleQueue[tuple[int, int]] = SimpleQueue()

    def start(self, descriptor_N: Ints, byte_N: Ints, slot_N: Ints, pages_N: Ints) -> None:
        reads = list(zip(descriptor_N.tolist(), byte_N.tolist(), slot_N.tolist(), pages_N.tolist()))
        self.in_flight += len(reads)
        for first in range(min(NUM_THREADS, len(reads))):
            self._threads.submit(_read, reads[first::NUM_THREADS], self.memory.data, self._done)

    def collect(self, at_least: int, seconds: float | None = None) -> tuple[Ints, Ints]:
        deadline = None if seconds is None else time.monotonic() + seconds
        done: list[tuple[int, int]] = []
        try:
            while len(done) < self.in_flight:
                block = len(done) < at_least
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                done.append(self._done.get(block, left))
        except Empty:
            pass
        self.in_flight -= len(done)
        slot_D, result_D = np.array(done, np.int64).reshape(-1, 2).T
        return slot_D, result_D

    def close(self) -> None:
        self.collect(self.in_flight)


def _read(reads: list[tuple[int, int, int, int]], memory: memoryview, done: "SimpleQueue[tuple[int, int]]") -> None:
    for descriptor, byte, slot, pages in reads:
        try:
            result = os.preadv(descriptor, [memory[slot * PAGE : (slot + pages) * PAGE]], byte)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        done.put((slot, result))


def thread_queues() -> Callable[[int], ReadQueue]:
    """Returns a function that makes a queue with the given number of slots; its queues share their threads."""
    return partial(ThreadQueue, ThreadPoolExecutor(NUM_THREADS, "engrammar-read"))
