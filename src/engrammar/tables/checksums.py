"""CRC-32 sums of files: how they are made, kept in a manifest and beside table shards, read, and compared.

- `manifest.json`: {"version": 1, "block_bytes": b, "files": {name: {"bytes": n, "crc32": [one per block of b bytes]}},
  "crc32": c}. Names are relative, with `/`. c is the sum of the other keys as JSON, with sorted keys and no spaces;
  older manifests lack it.
- `memory.tables.*.crc32.safetensors` beside a table's shard: one tensor `crc32` [pages], the CRC-32 of each page of
  `PAGE` bytes of the shard's file, header included, for reading single rows of it.
Letters: B blocks of a file.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engrammar.tables.headers import AGAIN, PAGE, Requirement, header_bytes, is_count, load_json, only_tensor

MANIFEST = "manifest.json"
VERSION = 1
BLOCK_BYTES = 16 * 2**20
READ_BYTES = 2**18  # read at once: summing pages holds the GIL, so this bounds how long other threads stall
TABLE_SHARD = re.compile(r"(?:.+\.)?memory\.tables\.[0-9]+(?:-[0-9]+-of-[0-9]+)?\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds: for each file, its size in bytes and the CRC-32 of each block."""

    block_bytes: int
    files: dict[str, tuple[int, tuple[int, ...]]]


def json_sum(content: dict[str, Any]) -> int:
    """The CRC-32 that the key `crc32` of an object must have: the sum of all other keys."""
    rest = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def require_sum(content: dict[str, Any], require: Requirement) -> None:
    """Requires of an object that was read that its `crc32` is the sum of all other keys."""
    try:
        found = json_sum(content)
    except (ValueError, RecursionError):  # numbers too long to write, text that is not Unicode
        found = None
    require(content["crc32"] == found, "its crc32 is not that of its contents")


def write_manifest(folder: Path, names: Iterable[str] | None = None, *, block_bytes: int = BLOCK_BYTES) -> None:
    """Writes the manifest of a folder, with new sums of the named files (None: of all files).

    Sums of other files in the manifest are kept. The page checksums of table shards are made in the same reading, and
    are then files of the folder like any other. Whoever may read the folder may read the files afterwards: safetensors
    writes files that only their owner can read.
    """
    listed = read_manifest(folder).files if names is not None and (folder / MANIFEST).is_file() else {}
    sums: dict[str, list[int]] = {}
    paths = [folder / name for name in (file_sizes(folder) if names is None else names)]
    for path in sorted(path for path in paths if TABLE_SHARD.fullmatch(path.name)):
        sums[path.relative_to(folder).as_posix()], page_sums = _sums_and_page_sums(path, block_bytes)
        paths.append(_write_page_sums(path, page_sums))
    readers = folder.stat().st_mode & 0o444
    for path in paths:
        name, stat = path.relative_to(folder).as_posix(), path.stat()
        if stat.st_mode & readers != readers and stat.st_nlink == 1:  # a link is a file of another folder too
            path.chmod(stat.st_mode | readers)
        listed[name] = stat.st_size, tuple(sums.get(name) or _block_sums(path, block_bytes))
    files = {name: {"bytes": size, "crc32": [*sums_B]} for name, (size, sums_B) in sorted(listed.items())}
    content: dict[str, Any] = {"version": VERSION, "block_bytes": block_bytes, "files": files}
    content["crc32"] = json_sum(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def file_stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """For each file in a folder, its inode, size and time, which change if it is written again."""
    if not folder.is_dir():
        return {}
    stats = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def add_to_manifest(folder: Path, *, since: dict[str, tuple[int, int, int]]) -> None:
    """Adds to the manifest the files that were written since these stamps and that it does not list yet."""
    listed = read_manifest(folder).files.keys() if (folder / MANIFEST).is_file() else ()
    written = [name for name, stamp in file_stamps(folder).items() if since.get(name) != stamp]
    write_manifest(folder, [name for name in written if name not in {MANIFEST, *listed}])


def page_sums_path(shard: Path) -> Path:
    """The file of a shard's page checksums."""
    return shard.with_name(f"{shard.name.removesuffix('.safetensors')}.crc32.safetensors")


def write_page_sums(shard: Path) -> Path:
    """Writes the page checksums of a shard's file, and returns their own file."""
    return _write_page_sums(shard, _sums_and_page_sums(shard, BLOCK_BYTES)[1])


def read_page_sums(path: Path, of: Path) -> NDArray[np.uint32]:
    """The checksums of the pages of the file `of`, uint32 [pages]; raises a ValueError if `path` holds no such sums."""
    try:
        return only_tensor(path, "crc32", "U32", (-(-of.stat().st_size // PAGE),)).read().view("<u4")
    except ValueError as error:
        raise ValueError(f"{path.name} does not hold the checksums of {of.name}: {error}") from error


def first_damaged(data: memoryview, sums: NDArray[np.uint32], block_bytes: int = PAGE) -> int | None:
    """The index of the first block of `data` whose CRC-32 is not the one in `sums`; None if all blocks are intact."""
    for index, start in enumerate(range(0, len(data), block_bytes)):
        if index >= len(sums) or zlib.crc32(data[start : start + block_bytes]) != sums[index]:
            return index
    return None


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a folder; raises a ValueError if there is none, or the file is not a manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST} (never completed, or made by an older version)")
    require = Requirement(path)
    content = load_json(path.read_bytes(), require)
    require(isinstance(content, dict), "it is not an object")
    require(content.keys() - {"crc32"} == {"version", "block_bytes", "files"}, "it has other keys than a manifest")
    require(content["version"] == VERSION, f"its version is not {VERSION}")
    if "crc32" in content:
        require_sum(content, require)
    block_bytes, entries = content["block_bytes"], content["files"]
    require(is_count(block_bytes, BLOCK_BYTES) and block_bytes > 0, f"block_bytes is not 1 to {BLOCK_BYTES}")
    require(isinstance(entries, dict), "files is not an object")
    files = {}
    for name, entry in entries.items():
        require(isinstance(entry, dict), f"the entry {name!r} is not an object")
        size, sums = entry.get("bytes"), entry.get("crc32")
        require(is_count(size) and isinstance(sums, list), f"the entry {name!r} lacks bytes or crc32")
        require(len(sums) == -(-size // block_bytes), f"{name!r} has {len(sums)} sums for {size} bytes")
        require(all(is_count(value, 2**32 - 1) for value in sums), f"a sum of {name!r} is not a CRC-32")
        files[name] = (size, tuple(sums))
    return Manifest(block_bytes=block_bytes, files=files)


def check_sizes(folder: Path) -> Manifest:
    """Reads a folder's manifest; raises a ValueError that names a file which is missing or has another size."""
    manifest = read_manifest(folder)
    there = file_sizes(folder)
    for name, (size, _) in manifest.files.items():
        if name not in there:
            raise ValueError(f"{folder} lacks the file {name!r}")
        _require_size(folder / name, there[name], size)
    return manifest


def check_file(folder: Path, manifest: Manifest, name: str, *, head: bool = False) -> int:
    """Compares a file with the sums in the manifest; with `head`, a safetensors file only to the end of its header.

    Returns:
        The number of bytes that were read.

    Raises:
        ValueError: the manifest does not list the file, or the file is missing or damaged; names the bytes.
    """
    path = folder / name
    if name not in manifest.files:
        raise ValueError(f"{folder / MANIFEST} does not list {name}")
    expected, sums = manifest.files[name]
    if not path.is_file():
        raise ValueError(f"{folder} lacks the file {name!r}")
    size = path.stat().st_size
    _require_size(path, size, expected)
    last = size
    if head and path.suffix == ".safetensors":
        with path.open("rb") as file:
            last = 8 + header_bytes(file.read(8), size, Requirement(path))
    done = 0
    for index, found in enumerate(_block_sums(path, manifest.block_bytes)):
        first, done = done, min(done + manifest.block_bytes, size)
        if found != sums[index]:
            raise ValueError(f"{path} is damaged in bytes {first} to {done - 1} (block {index})")
        if done >= last:
            break
    return done


def check_files(folder: Path, names: Iterable[str], *, whole: bool) -> None:
    """Compares files that a model is loaded from with the folder's manifest: all bytes, or only JSON and headers.

    Raises:
        ValueError: a file is damaged or not the one that was saved. With `whole`, also: the folder has no manifest, or
            the manifest does not list a file.
    """
    if not (folder / MANIFEST).is_file():
        if whole:
            raise ValueError(
                f"{folder} has no {MANIFEST}, so its files cannot be verified: load it without verify=True, and save "
                "it again to give it one."
            )
        return
    manifest = read_manifest(folder)
    for name in names:
        if not whole and name not in manifest.files:
            continue
        try:
            check_file(folder, manifest, name, head=not whole)
        except (ValueError, OSError) as error:
            reason = f"{error.filename} cannot be read ({error.strerror})" if isinstance(error, OSError) else error
            raise ValueError(
                f"{reason}, so it is not the file that was saved: {AGAIN[:-1]}, or, where you changed it on purpose, "
                f"delete {MANIFEST} there."
            ) from error


def file_sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every file under a folder except its manifest, by relative name."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    sizes.pop(MANIFEST, None)
    return sizes


def _require_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, {expected} when it was saved")


def _block_sums(path: Path, block_bytes: int) -> Iterator[int]:
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            yield zlib.crc32(block)


def _sums_and_page_sums(path: Path, block_bytes: int) -> tuple[list[int], NDArray[np.uint32]]:
    """The sums of a file's blocks and of its pages; the file is read once.

    zlib releases the GIL while it sums a block, but not for data as short as a page: hence the short reads.
    """
    assert block_bytes % PAGE == 0
    sums, page_sums = [], [np.empty(0, dtype=np.uint32)]
    with path.open("rb") as file:
        for _ in range(0, os.fstat(file.fileno()).st_size, block_bytes):
            total, left = 0, block_bytes
            while left and (part := file.read(min(left, READ_BYTES))):
                total, left = zlib.crc32(part, total), left - len(part)
                view = memoryview(part)
                each = [zlib.crc32(view[first : first + PAGE]) for first in range(0, len(part), PAGE)]
                page_sums.append(np.array(each, dtype=np.uint32))
            sums.append(total)
    return sums, np.concatenate(page_sums)


def _write_page_sums(shard: Path, page_sums: NDArray[np.uint32]) -> Path:
    path = page_sums_path(shard)
    save_file({"crc32": page_sums}, path)
    return path
