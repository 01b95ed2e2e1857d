"""Files and folders that are whole or absent: they are written under another name, flushed to the disk, then renamed.

- `checkpoint-N` with a `manifest.json` (`checksums`) is sealed.
- `.partial-*` is a checkpoint whose saving (or deletion) has not finished; nothing reads it.
- `.replaced-checkpoint-N` is an earlier sealed checkpoint N, kept until its successor is in its place.
- `.NAME.*.partial` is a file or folder NAME that is being written, or that a killed process left.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from engrammar.tables.checksums import BLOCK_BYTES, check_file, check_sizes, write_manifest

PARTIAL = ".partial-"
REPLACED = ".replaced-"
CHECKPOINT = re.compile(rf"(?:{re.escape(REPLACED)})?checkpoint-([0-9]+)")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def written_beside(final: Path) -> Iterator[Path]:
    """Yields a path for a new file or folder, which is then flushed and renamed to `final`, or removed after an error.

    Each call has its own path, so that several processes may write the same `final`. Of files, the last one written
    replaces the others; of folders, the first one is kept.

    Raises:
        FileExistsError: `final` is a folder that is not empty.
    """
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        _flush_tree(partial)
        try:
            os.replace(partial, final)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from error
        _flush(final.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


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
    """Adds the manifest to a folder `partial`, flushes every file in it, and renames it to `final`.

    Whenever the process is killed, `final` is absent or whole. A `final` that exists already is renamed first and
    deleted last, so that one of the two is whole at any moment (`last_good` finds either).

    Raises:
        OSError: the disk is full or fails.
    """
    write_manifest(partial, block_bytes=block_bytes)
    put_in_place(partial, final)


def put_in_place(partial: Path, final: Path) -> None:
    """Flushes every file of a whole folder `partial` and renames it to `final`, as `seal` does."""
    _flush_tree(partial)
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        if aside.exists():
            discard(aside)
        os.rename(final, aside)
    os.rename(partial, final)
    _flush(final.parent)
    if aside.exists():
        discard(aside)


def verify(folder: Path, *, only: Collection[str] | None = None) -> None:
    """Checks that every file of a sealed folder is there with its size, and that the contents are intact.

    Args:
        only: the files whose contents are checked; None checks all.

    Raises:
        ValueError: a file is missing or damaged; names the file, the bytes, and what to do.
    """
    try:
        manifest = check_sizes(folder)
        for name in manifest.files if only is None else only:
            check_file(folder, manifest, name)
    except (ValueError, OSError) as error:
        reason = f"{error.filename} cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ValueError(
            f"{reason}: delete {folder} to go on from the checkpoint before it, or copy it again."
        ) from error


def last_good(out: Path) -> Path | None:
    """The newest sealed checkpoint in `out` whose files all have their sizes; None if there is none.

    Contents are not read (see `verify`). Newer checkpoints that are not whole are skipped with a warning.
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
    """Removes what killed saves left in `out`. Call it only while nothing is being saved there."""
    for path in (*out.glob(f"{PARTIAL}*"), *out.glob(".*.partial")):  # of saves, and of `written_beside`
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for aside in out.glob(f"{REPLACED}*"):
        successor = aside.with_name(aside.name.removeprefix(REPLACED))
        if successor.exists() and _damage(successor) is None:
            discard(aside)


def rotate(out: Path, keep: int | None, protect: Collection[Path]) -> None:
    """Deletes the oldest sealed checkpoints in `out` beyond `keep` (None or 0: keep all).

    The newest sealed one and those in `protect` are never deleted.
    """
    if not keep:
        return
    sealed = [folder for folder in _checkpoints(out) if _damage(folder) is None]
    protected = {folder.resolve() for folder in (*protect, *sealed[-1:])}
    free = [folder for folder in sealed if folder.resolve() not in protected]
    for folder in free[: max(0, len(sealed) - keep)]:
        discard(folder)


def discard(folder: Path) -> None:
    """Deletes a folder so that a kill halfway leaves nothing that looks whole."""
    doomed = folder.with_name(f"{PARTIAL}deleted-{folder.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    """Writes a file that at any moment has its old or its new content, whatever is killed and even on a full disk.

    A file that holds `text` already is not written: a full disk is then no reason to fail.
    """
    if not path.is_file() or path.read_bytes() != text.encode():
        with written_beside(path) as partial:
            partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing(what: str, out: Path, scratch: Path | None = None) -> Iterator[None]:
    """Turns a failed write into one sentence: what, where, why, what is left, what to do; then removes `scratch`.

    Raises:
        OSError: replaces an OSError, and what safetensors, tokenizers and torch.save raise if a write fails.
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
    """Why a write to `out` failed; None if `error` is about something else.

    safetensors and tokenizers put the errno into their message. torch.save drops it, and fails in its zip writer or, if
    only the last bytes do not fit, in the stream below that.
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
    """The checkpoints of `out`, sealed or not, oldest first; a replaced one counts only if its successor is missing."""
    if not out.is_dir():
        return []
    by_step = {}
    for folder in sorted(out.iterdir()):  # `checkpoint-4` sorts after `.replaced-checkpoint-4`, so it wins
        if (match := CHECKPOINT.fullmatch(folder.name)) and folder.is_dir():
            by_step[int(match[1])] = folder
    return [folder for _, folder in sorted(by_step.items())]


def _damage(folder: Path) -> str | None:
    """Why a folder is not sealed, judged by its manifest and file sizes; None if it is."""
    try:
        check_sizes(folder)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _flush_tree(path: Path) -> None:
    """Flushes a file, or a folder with everything in it, to the disk."""
    for inner in sorted(path.rglob("*")) if path.is_dir() else ():
        _flush(inner)
    _flush(path)


def _flush(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
