"""Memory for rows, in RAM or in a file that may be larger than RAM; pages are taken as rows are touched."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def zeros_in_ram(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages take memory only once they are written to; `torch.zeros` writes to every page at once."""
    pages = mmap.mmap(-1, _num_bytes(shape, dtype), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page holds thousands of rows: one touched row would claim 2 MiB
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)[: math.prod(shape)].view(tuple(shape))


def zeros_in_file(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Zeros in a mapped file in `folder`, whose pages the system may write back and drop from RAM.

    The file has no name, so its space is freed when the process ends, however it ends. The space is reserved at once,
    since writing to a mapping on a full disk would kill the process.

    Raises:
        OSError: the disk has too little space, or `folder` cannot be written.
    """
    num_bytes = _num_bytes(shape, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix="rows-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{folder} has no room for {num_bytes / 1e9:.1f} GB of rows ({error.strerror}): free space there, or "
                "choose another folder",
            ) from error
        pages = mmap.mmap(file.fileno(), num_bytes)
    if hasattr(mmap, "MADV_RANDOM"):  # rows are scattered, so reading ahead would be wasted
        pages.madvise(mmap.MADV_RANDOM)
    return torch.frombuffer(pages, dtype=dtype)[: math.prod(shape)].view(tuple(shape))


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return max(1, math.prod(shape)) * dtype.itemsize  # a mapping has at least a byte
