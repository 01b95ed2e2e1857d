"""What goes wrong in a load test: a busy disk, damaged files, a pool that is killed, patches that come and go."""

import mmap
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from engrammar.stores.mooncake.upload import upload
from engrammar.tables.folder import open_tables
from engrammar.tables.headers import PAGE
from engrammar_lab.bench.loopback import LoopbackPool

DAMAGED = 8  # of so many pages one is damaged
PATCHED_FOR = 5.0  # seconds between changes of patches


@contextmanager
def slow_disk(path: Path) -> Iterator[None]:
    """Programs that read large pieces of a file all the time, past the page cache, so that others wait for the disk."""
    code = (
        "import mmap, os, random, sys; handle = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT);"
        "size, buffer = os.fstat(handle).st_size, mmap.mmap(-1, 1 << 22)\n"
        "while True: os.preadv(handle, [buffer], random.randrange(max(size >> 22, 1)) << 22)"
    )
    readers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(4)]
    try:
        yield
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def read_ms(path: Path, number: int = 200) -> float:
    """Milliseconds that reading one page of a file takes past the page cache, the median."""
    handle, buffer = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, PAGE)
    took = []
    try:
        for _ in range(number):
            place = random.randrange(os.fstat(handle).st_size // PAGE) * PAGE
            started = time.perf_counter()
            os.preadv(handle, [buffer], place)
            took.append(time.perf_counter() - started)
    finally:
        os.close(handle)
    return 1e3 * median(took)


def damage(path: Path) -> None:
    """Flips a bit in one of so many pages of a file; the same call again mends it."""
    with path.open("r+b") as file:
        for place in range(PAGE + PAGE // 2, path.stat().st_size, DAMAGED * PAGE):
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """A damaged copy in the place of a file; then the file itself again."""
    kept, other = path.with_suffix(".kept"), path.with_suffix(".damaged")
    os.link(path, kept)
    other.write_bytes(path.read_bytes())
    damage(other)
    other.rename(path)
    try:
        yield
    finally:
        kept.rename(path)


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """A file is damaged where it is, then mended."""
    damage(path)
    try:
        yield
    finally:
        damage(path)


@contextmanager
def killed(pool: LoopbackPool, folder: Path, name: str) -> Iterator[None]:
    """The pool's processes are killed, then started again; the rows are uploaded once more."""
    pool.stop()
    try:
        yield
    finally:
        pool.start()
        send(pool, folder, name)


def send(pool: LoopbackPool, folder: Path, name: str) -> None:
    """Uploads a folder's tables under a name."""
    opened = open_tables(folder)
    for layer, table in opened.tables.items():
        upload(table, f"{name}/{layer}", pool.server, geometry=opened.geometry)


@contextmanager
def changing(url: str, token: str, patch: Path) -> Iterator[None]:
    """A patch is applied and undone, again and again."""
    ending, wrong = threading.Event(), []

    def change() -> None:
        while not ending.is_set():
            for method, place, body in (("POST", "", patch.read_bytes()), ("DELETE", "/changes", None)):
                headers = {"Authorization": f"Bearer {token}"}
                request = urllib.request.Request(f"{url}/v1/patches{place}", body, headers, method=method)
                try:
                    urllib.request.urlopen(request).close()
                except OSError as error:
                    wrong.append(str(error))
                ending.wait(PATCHED_FOR)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
    if wrong:
        raise OSError(f"A patch could not be changed: {wrong[0]}.")
