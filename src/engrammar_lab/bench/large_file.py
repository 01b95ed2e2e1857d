"""A large file of rows for the benches of stores, kept from one run to the next, and choices of rows to read from it.

Letters: R rows, S bytes of a row.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np

from engrammar.tables.checksums import page_sums_path, write_page_sums
from engrammar.tables.folder import Shard, TableFile
from engrammar.tables.headers import PAGE, write_header
from engrammar_lab.bench.files import FOLDER, bench_folder

START = PAGE  # the byte where rows begin
BLOCK = 2**24  # bytes written at once
T = TypeVar("T")


def large_table(num_gib: float) -> TableFile:
    """Random rows of 256 bytes in a file of `num_gib` GiB with checksums; written if it does not exist yet.

    Raises:
        ValueError: the disk has no room for it.
    """
    num_bytes = int(num_gib * 2**30)
    path = bench_folder() / f"rows-{num_gib:g}-GiB.safetensors"
    sums = page_sums_path(path)
    if not sums.exists() or not path.exists() or path.stat().st_size != START + num_bytes:
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes + 2**30:
            raise ValueError(
                f"{path.parent} has {free / 2**30:.0f} GiB free, the bench's file takes {num_gib:g}: name another "
                f"folder in {FOLDER}, or run with --quick."
            )
        sums.unlink(missing_ok=True)
        write_header(path, {"t": ("U8", (num_bytes // 256, 256))})
        random = np.random.SFC64(0)
        with path.open("r+b") as file:
            file.seek(START)
            for first in range(0, num_bytes, BLOCK):
                file.write(random.random_raw(min(BLOCK, num_bytes - first) // 8).tobytes())
        write_page_sums(path)  # last, so that an interrupted write starts over
    return first_rows(path, num_bytes, 256)


def first_rows(path: Path, num_bytes: int, row_bytes: int) -> TableFile:
    """The first `num_bytes` of the rows of such a file, as a table with rows of any size."""
    num_rows = num_bytes // row_bytes
    shard = Shard(path=path, tensor="t", start=START, first_row=0, num_rows=num_rows, crc32=page_sums_path(path))
    return TableFile(layer=0, name="t", num_rows=num_rows, width=row_bytes, encoding="fp8", scale=None, shards=(shard,))


def draw_rows(table: TableFile, num_rows: int, seed: int) -> np.ndarray:
    """Rows of a table, drawn uniformly."""
    return np.random.default_rng(seed).integers(0, table.num_rows, num_rows)


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Runs a function in a process that has read, mapped and computed nothing yet, and returns its result."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["engrammar_lab.bench.readers"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
