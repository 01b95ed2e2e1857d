"""Reads whole tables and checks every byte against the checksums beside them.

Letters: U rows of a block, S bytes of a stored row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.tables import checksums
from engrammar.tables.folder import Shard, TableFile, TableFolder, open_tables
from engrammar.tables.headers import AGAIN, PAGE
from engrammar.tables.shards import MEMORY

READ_BYTES = 2**20  # a multiple of PAGE


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Checksums of a shard's file, one CRC-32 per `block_bytes`, and the file that they were read from."""

    path: Path
    block_bytes: int
    values: NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was compared: the number of intact bytes, and the names of files that have no checksum."""

    num_bytes: int
    without_sums: tuple[str, ...]


def verify_folder(folder: Path) -> Verified:
    """Checks every byte of a checkpoint or a folder of tables that has a checksum.

    Raises:
        ValueError: a file is damaged, and is named with its bytes; or the folder has no checksums.
    """
    has_manifest, has_tables = (folder / checksums.MANIFEST).is_file(), (folder / MEMORY).is_file()
    if not has_manifest and not has_tables:
        raise ValueError(
            f"{folder} has neither {checksums.MANIFEST} nor {MEMORY}, so nothing in it has checksums: save it again."
        )
    shards = [shard for table in open_tables(folder).tables.values() for shard in table.shards] if has_tables else []
    paged = {shard.path.name for shard in shards}
    covered = {checksums.MANIFEST, MEMORY, *paged, *(shard.crc32.name for shard in shards if shard.crc32 is not None)}
    num_bytes = verify_tables(folder) if has_tables else 0
    if has_manifest:
        try:
            manifest = checksums.check_sizes(folder)
            num_bytes += sum(checksums.check_file(folder, manifest, name) for name in manifest.files.keys() - paged)
        except ValueError as error:
            raise ValueError(f"{error}: {AGAIN}") from error
        covered |= manifest.files.keys()
    return Verified(num_bytes=num_bytes, without_sums=tuple(sorted(checksums.file_sizes(folder).keys() - covered)))


def verify_tables(folder: Path) -> int:
    """Checks every byte of a folder's tables; a bar on stderr shows the progress.

    Returns:
        The number of bytes that were read.

    Raises:
        ValueError: a file is damaged, and is named with its bytes and rows; or a shard has no checksums.
    """
    tables = open_tables(folder)
    found = {shard.path: sums_of(tables, shard) for table in tables.tables.values() for shard in table.shards}
    for path, sums in found.items():
        if sums is None:
            raise ValueError(
                f"{path} has no checksums, neither {checksums.page_sums_path(path).name} nor in {checksums.MANIFEST}: "
                f"`engrammar table pack {folder} NEW` makes a copy that has."
            )
    num_bytes = sum(path.stat().st_size for path in found)
    with tqdm(desc=f"verifying {folder}", total=num_bytes, unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for table in tables.tables.values():
            for shard in table.shards:
                for block in _checked_blocks(table, shard, found[shard.path]):
                    bar.update(len(block))
    return num_bytes


def sums_of(folder: TableFolder, shard: Shard) -> Sums | None:
    """The checksums of a shard's pages; without those, of its blocks in the manifest; without either, None."""
    if shard.crc32 is not None:
        return Sums(path=shard.crc32, block_bytes=PAGE, values=checksums.read_page_sums(shard.crc32, shard.path))
    if (folder.path / checksums.MANIFEST).is_file():
        manifest = checksums.read_manifest(folder.path)
        if shard.path.name in manifest.files:
            sums = np.array(manifest.files[shard.path.name][1], dtype=np.uint32)
            return Sums(path=folder.path / checksums.MANIFEST, block_bytes=manifest.block_bytes, values=sums)
    return None


def read_table(folder: TableFolder, table: TableFile) -> Iterator[NDArray[np.uint8]]:
    """Yields a table's stored rows in order, in blocks [U, S], checked if the folder has checksums.

    Raises:
        ValueError: a file is damaged; names the file, the bytes and the rows.
    """
    for shard in table.shards:
        skip, left = shard.start, shard.num_rows * table.row_bytes
        kept = np.empty(0, dtype=np.uint8)
        for block in _checked_blocks(table, shard, sums_of(folder, shard)):
            data = np.frombuffer(block, dtype=np.uint8)[skip:][:left]
            skip, left = max(0, skip - len(block)), left - len(data)
            data = np.concatenate([kept, data])
            whole = len(data) // table.row_bytes * table.row_bytes
            kept = data[whole:]
            if whole:
                yield data[:whole].reshape(-1, table.row_bytes)


def _checked_blocks(table: TableFile, shard: Shard, sums: Sums | None) -> Iterator[bytes]:
    """Yields the bytes of a shard's file, checked against `sums` if there are any."""
    block_bytes = READ_BYTES if sums is None else sums.block_bytes
    step = max(READ_BYTES // block_bytes, 1) * block_bytes
    first = 0
    try:
        with shard.path.open("rb") as file:
            while data := file.read(step):
                if sums is not None:
                    _check(table, shard, sums, first, data)
                yield data
                first += len(data)
    except OSError as error:
        raise ValueError(f"{shard.path} cannot be read from byte {first} on ({error.strerror}): {AGAIN}") from error


def _check(table: TableFile, shard: Shard, sums: Sums, first: int, data: bytes) -> None:
    """Compares the bytes of a shard's file from `first` on."""
    index = checksums.first_damaged(memoryview(data), sums.values[first // sums.block_bytes :], sums.block_bytes)
    if index is None:
        return
    start = first + index * sums.block_bytes
    last = min(start + sums.block_bytes, first + len(data)) - 1
    low, high = ((byte - shard.start) // table.row_bytes for byte in (start, last))
    rows = f"rows {shard.first_row + max(low, 0)} to {shard.first_row + min(high, shard.num_rows - 1)}"
    what = f"{rows} of table {table.layer}" if high >= 0 else f"the header of table {table.layer}"
    raise ValueError(
        f"{shard.path} is damaged in bytes {start} to {last}, {what}, by the checksums in {sums.path.name}: {AGAIN}"
    )
