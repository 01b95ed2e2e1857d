"""Files and memory, for benches of stores: where large files are kept, and what the page cache holds of them."""

import ctypes
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

FOLDER = "ENGRAMMAR_BENCH_FOLDER"  # environment variable: the folder for large files, by default a temporary one


def bench_folder() -> Path:
    """Where benches keep files of many GiB from one run to the next."""
    folder = Path(os.environ.get(FOLDER, Path(tempfile.gettempdir()) / "engrammar-bench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def drop_page_cache(path: Path) -> None:
    """Writes back a file's pages and drops those that no process maps."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def pages_in_cache(path: Path) -> int:
    """How many of a file's pages the page cache holds."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        mapped = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        start = np.frombuffer(mapped, np.uint8)
        address, into = ctypes.c_void_p(start.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), into):
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
        return int((pages & 1).sum())
