"""Checkpoint folders that are whole or absent: checksummed, flushed to the disk, then renamed into place.

- `checkpoint-N` with a `manifest.json` is sealed: {"version": 1, "block_bytes": b, "files": {name: {"bytes": n,
  "crc32": [one per block of b bytes]}}}, names relative with `/`.
- `memory.tables.*.crc32.safetensors` beside a table's shard: one tensor `crc32` [pages], the CRC-32 of each page of
  `PAGE` bytes of the shard's file, header included, for those who read single rows of it.
- `.partial-*` is a save (or a deletion) that did not finish; nothing reads it.
- `.replaced-checkpoint-N` is an earlier sealed checkpoint N, kept until its successor stands in its place.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

MANIFEST = "manifest.json"
VERSION = 1
BLOCK_BYTES = 16 * 2**20
PAGE = 4096  # bytes that a disk reads at once
READ_BYTES = 2**18  # between two reads, while pages are summed, other threads of Python wait
PARTIAL = ".partial-"
REPLACED = ".replaced-"
CHECKPOINT = re.compile(rf"(?:{re.escape(REPLACED)})?checkpoint-([0-9]+)")
TABLE_SHARD = re.compile(r"(?:.+\.)?memory\.tables\.[0-9]+(?:-[0-9]+-of-[0-9]+)?\.safetensors")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a sealed folder holds: per file its bytes and the CRC-32 of each block."""

    block_bytes: int
    files: dict[str, tuple[int, tuple[int, ...]]]


def check_writable(directory: Path) -> None:
    """Makes `directory`, or raises a ValueError that says why it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"Cannot write to {directory} ({error.strerror}): choose another `out`.") from error


def seal(partial: Path, final: Path, *, block_bytes: int = BLOCK_BYTES) -> None:
    """Flushes and checksums every file under `partial`, adds the manifest, and renames the folder to `final`.

    Table shards get their page checksums in the same reading; those are files of the folder like any other.
    After a kill at any moment `final` is absent or whole. A `final` that is there already is set aside first and
    deleted last, so that one of the two is whole all along (`last_good` finds either).

    Raises:
        OSError: the disk is full or fails.
    """
    paged = {}
    for path in sorted(path for path in partial.rglob("*") if TABLE_SHARD.fullmatch(path.name)):
        paged[path], page_sums = _sums_and_page_sums(path, block_bytes)
        _write_page_sums(path, page_sums)
    files = {}
    for name in sorted(_sizes(partial)):
        path = partial / name
        sums = paged[path] if path in paged else list(_block_sums(path, block_bytes))
        files[name] = {"bytes": _flush(path), "crc32": sums}
    text = json.dumps({"version": VERSION, "block_bytes": block_bytes, "files": files}, indent=1) + "\n"
    (partial / MANIFEST).write_text(text)
    _flush(partial / MANIFEST)
    for folder, _, _ in os.walk(partial):
        _flush(Path(folder))
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        if aside.exists():
            discard(aside)
        os.rename(final, aside)
    os.rename(partial, final)
    _flush(final.parent)
    if aside.exists():
        discard(aside)


def page_sums_path(shard: Path) -> Path:
    """The file of a shard's page checksums."""
    return shard.with_name(f"{shard.name.removesuffix('.safetensors')}.crc32.safetensors")


def write_checksums(shard: Path) -> Path:
    """Writes the page checksums of a shard's file, and returns their own file."""
    return _write_page_sums(shard, _sums_and_page_sums(shard, BLOCK_BYTES)[1])


def verify(folder: Path, *, only: Collection[str] | None = None) -> None:
    """Checks a sealed folder: every file is there with its size, and the contents (of `only`, where given) are intact.

    Raises:
        ValueError: names the file, the bytes, and what to do.
    """
    try:
        manifest = _check_sizes(folder)
        for name in manifest.files if only is None else only:
            if name not in manifest.files:
                raise ValueError(f"{folder / MANIFEST} does not list {name}")
            size, sums = manifest.files[name]
            for index, (found, expected) in enumerate(zip(_block_sums(folder / name, manifest.block_bytes), sums)):
                if found != expected:
                    first = index * manifest.block_bytes
                    last = min(first + manifest.block_bytes, size) - 1
                    raise ValueError(f"{folder / name} is damaged in bytes {first} to {last} (block {index})")
    except (ValueError, OSError) as error:
        reason = f"{error.filename} cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ValueError(
            f"{reason}: delete {folder} to go on from the checkpoint before it, or copy it again."
        ) from error


def last_good(out: Path) -> Path | None:
    """The newest sealed checkpoint in `out` whose files all have their sizes; contents are not read (see `verify`).

    Newer ones that are not whole are skipped with a warning.
    """
    good, skipped = None, []
    for folder in reversed(_checkpoints(out)):
        reason = _damage(folder)
        if reason is None:
            good = folder
            break
        skipped.append(reason)
    used = f"going on from {good}" if good else f"{out} holds no other checkpoint to go on from"
    for reason in skipped:
        logger.warning("Skipped a checkpoint: %s; %s.", reason, used)
    return good


def clear_partials(out: Path) -> None:
    """Removes what killed saves left in `out`. Only while nothing is being saved there."""
    for path in out.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)
    for aside in out.glob(f"{REPLACED}*"):
        successor = aside.with_name(aside.name.removeprefix(REPLACED))
        if successor.exists() and _damage(successor) is None:
            discard(aside)


def rotate(out: Path, keep: int | None, protect: Collection[Path]) -> None:
    """Deletes the oldest sealed checkpoints in `out` beyond `keep` (None or 0: keep all).

    Never the newest sealed one, nor any of `protect`.
    """
    if not keep:
        return
    sealed = [folder for folder in _checkpoints(out) if _damage(folder) is None]
    protected = {folder.resolve() for folder in (*protect, *sealed[-1:])}
    free = [folder for folder in sealed if folder.resolve() not in protected]
    for folder in free[: max(0, len(sealed) - keep)]:
        discard(folder)


def discard(folder: Path) -> None:
    """Deletes a folder such that a kill halfway leaves nothing that looks whole."""
    doomed = folder.with_name(f"{PARTIAL}deleted-{folder.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is its old self or its new self at any moment, kills and full disks included.

    One that holds `text` already is left alone: a full disk is then no reason to fail.
    """
    if path.is_file() and path.read_bytes() == text.encode():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(what: str, out: Path, scratch: Path | None = None) -> Iterator[None]:
    """Turns a failed write into one sentence: what, where, why, what is left, what to do. `scratch` is removed.

    Raises:
        OSError: in place of an OSError, and of what safetensors, tokenizers and torch.save raise where a write fails.
    """
    try:
        yield
    except BaseException as error:
        reason = reason_of(error, out)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if reason is None:
            raise
        good = last_good(out)
        left = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        raise OSError(
            f"{what} could not be written to {out} ({reason}); {left}. "
            "Free space there, or put that right, and run the same command again."
        ) from error


def reason_of(error: BaseException, out: Path) -> str | None:
    """Why a write to `out` failed; None where `error` is about something else.

    safetensors and tokenizers put the errno into their text; torch.save drops it, and dies in its zip writer or, where
    only the last bytes do not fit, in the stream below it.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if found := re.search(r"\(os error ([0-9]+)\)", str(error)):
        return os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and re.search("inline_container|iostream", str(error)):
        full = shutil.disk_usage(out).free < 2**20
        return os.strerror(errno.ENOSPC) if full else f"torch.save: {str(error).splitlines()[0]}"
    return None


def _checkpoints(out: Path) -> list[Path]:
    """The checkpoints of `out`, sealed or not, oldest first; one that was set aside only where it has no successor."""
    if not out.is_dir():
        return []
    by_step = {}
    for folder in sorted(out.iterdir()):  # `.replaced-checkpoint-4` comes before `checkpoint-4`, which then counts
        if (match := CHECKPOINT.fullmatch(folder.name)) and folder.is_dir():
            by_step[int(match[1])] = folder
    return [folder for _, folder in sorted(by_step.items())]


def _damage(folder: Path) -> str | None:
    """Why a folder is not a sealed one, by its manifest and file sizes; None where it is."""
    try:
        _check_sizes(folder)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _check_sizes(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    there = _sizes(folder)
    for name, (size, _) in manifest.files.items():
        if name not in there:
            raise ValueError(f"{folder} lacks the file {name!r}")
        if there[name] != size:
            raise ValueError(f"{folder / name} has {there[name]} bytes, {size} when it was saved")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a sealed folder.

    Raises:
        ValueError: it has none, or one that is not a manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST} (never completed, or made by an older version)")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON") from error

    def require(holds: bool, wrong: str) -> None:
        if not holds:
            raise ValueError(f"{path} is not a manifest ({wrong})")

    require(isinstance(content, dict), "it is not an object")
    require(content.get("version") == VERSION, f"its version is not {VERSION}")
    block_bytes, entries = content.get("block_bytes"), content.get("files")
    require(is_count(block_bytes, BLOCK_BYTES) and block_bytes > 0, f"block_bytes is not 1 to {BLOCK_BYTES}")
    require(isinstance(entries, dict), "files is not an object")
    files = {}
    for name, entry in entries.items():
        require(isinstance(entry, dict), f"the entry {name!r} is not an object")
        size, sums = entry.get("bytes"), entry.get("crc32")
        require(is_count(size, 2**63) and isinstance(sums, list), f"the entry {name!r} lacks bytes or crc32")
        require(len(sums) == -(-size // block_bytes), f"{name!r} has {len(sums)} sums for {size} bytes")
        require(all(is_count(value, 2**32 - 1) for value in sums), f"a sum of {name!r} is not a CRC-32")
        files[name] = (size, tuple(sums))
    return Manifest(block_bytes=block_bytes, files=files)


def is_count(value: object, largest: int) -> bool:
    """Whether a value out of a JSON file is an integer from 0 to `largest`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file under a folder but its manifest, by relative name."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    sizes.pop(MANIFEST, None)
    return sizes


def _block_sums(path: Path, block_bytes: int) -> Iterator[int]:
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            yield zlib.crc32(block)


def _sums_and_page_sums(path: Path, block_bytes: int) -> tuple[list[int], NDArray[np.uint32]]:
    """The sums of a file's blocks and of its pages, read once.

    zlib lets other threads run while it sums a block, but not for as little as a page: hence the short reads.
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


def _flush(path: Path) -> int:
    """Flushes a file or a folder's list of names to the disk; its size in bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)
