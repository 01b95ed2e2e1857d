"""Patches that are kept in the folder of a model, and taken back to the bit.

Exact entries are files of their own, which `engrammar generate` and other commands apply: no table holds them. Row
deltas are written into the folder's tables, for engines that read such folders. The folder is then replaced as a whole:
files that do not change are links to the same data, shards with changed rows are copies. Beside them stands the record
of each patch, `memory.patch.NAME.safetensors`: a patch that holds the rows that were there. Whatever fails, and
whenever the process is killed, the folder is the old one or the new one.
Letters: U rows, S bytes of a stored row.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engrammar.edit.files import patch_digest, read_patch, write_patch
from engrammar.edit.overlay import check_replaced, require_tables
from engrammar.edit.patch import Patch, RowDelta, Tables, addressing_digest, row_digests
from engrammar.stores.disk import DiskStore
from engrammar.tables.checksums import MANIFEST, read_manifest, write_manifest, write_page_sums
from engrammar.tables.folder import TableFile, TableFolder, open_tables
from engrammar.tables.sealed import REPLACED, put_in_place, reason_of

RECORD = "memory.patch.{}.safetensors"
KEPT = "engrammar_patches"  # the folder in a model's folder in which exact entries are kept


def patch_folder(patch: Patch | str | Path, folder: str | Path) -> None:
    """Writes the row deltas of a patch into a folder of tables: a checkpoint, an adapter, or tables alone.

    The folder takes, for the time being, as much more of the disk as the shards with changed rows. What has it open
    goes on with what it opened.

    Raises:
        ValueError: the patch has exact entries, which no table holds, or is for other tables, or is in the folder; or
            a row is not the one that it replaces.
        OSError: the disk is full or fails; the folder is as it was.
    """
    patch = patch if isinstance(patch, Patch) else read_patch(patch)
    if len(patch.entries):
        raise ValueError(f"The patch {patch.name!r} has exact entries, which no table holds: apply it to a model.")
    with _locked(Path(folder).absolute()) as path:
        record = path / RECORD.format(patch.name)
        if record.exists():
            raise ValueError(f"{path} holds a patch {patch.name!r} already: undo it, or give this one another name.")
        opened = _tables_for(patch, path)
        stored = {layer: _stored_rows(opened.tables[layer], delta) for layer, delta in patch.deltas.items()}
        for layer, delta in patch.deltas.items():
            check_replaced(patch.name, layer, delta, stored[layer])
        undoing = {
            layer: replace(delta, stored_US=stored[layer], replaced_U=row_digests(delta.stored_US))
            for layer, delta in patch.deltas.items()
        }
        provenance = {"undoes": patch.name, "sha256": patch_digest(patch)}
        _rewrite(opened, patch.deltas, record.name, replace(patch, deltas=undoing, provenance=provenance))


def unpatch_folder(folder: str | Path, name: str) -> None:
    """Takes a patch back that `patch_folder` wrote, in any order where rows are disjoint. Files are as they were.

    Raises:
        ValueError: the folder has no such patch, or a row was changed since.
        OSError: the disk is full or fails; the folder is as it was.
    """
    with _locked(Path(folder).absolute()) as path:
        record = path / RECORD.format(name)
        if not record.is_file():
            found = ", ".join(patches_in(path)) or "none"
            raise ValueError(f"{path} holds no patch {name!r}; it holds {found}.")
        undoing = read_patch(record)
        opened = _tables_for(undoing, path)
        for layer, delta in undoing.deltas.items():
            check_replaced(name, layer, delta, _stored_rows(opened.tables[layer], delta))
        _rewrite(opened, undoing.deltas, record.name, None)


def patches_in(folder: str | Path) -> list[str]:
    """The names of the patches that `patch_folder` wrote into a folder."""
    before, after = RECORD.split("{}")
    names = sorted(path.name for path in Path(folder).glob(RECORD.format("*")))
    return [name.removeprefix(before).removesuffix(after) for name in names]


def keep_patch(patch: Patch, folder: str | Path) -> None:
    """Keeps a patch in the folder of a model, whose own files stay as they are (but for rows that it replaces).

    Raises:
        ValueError: it is no folder, or holds a patch of that name.
        OSError: the disk is full or fails; the folder is as it was.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder: patches are kept in the folder of a model (save_pretrained makes one)."
        )
    if patch.name in kept_names(path):
        raise ValueError(f"{path} holds a patch {patch.name!r} already: undo it, or give this one another name.")
    if patch.deltas:
        patch_folder(patch, path)
        return
    (path / KEPT).mkdir(exist_ok=True)
    write_patch(patch, path / KEPT / f"{patch.name}.safetensors")


def drop_patch(folder: str | Path, name: str) -> None:
    """Takes a kept patch out of a folder. Its files are as they were.

    Raises:
        ValueError: it holds no such patch.
        OSError: the disk is full or fails; the folder is as it was.
    """
    path = Path(folder)
    if name in patches_in(path):
        unpatch_folder(path, name)
        return
    file = path / KEPT / f"{name}.safetensors"
    if file not in kept_files(path):
        raise ValueError(f"{path} holds no patch {name!r}; it holds {', '.join(kept_names(path)) or 'none'}.")
    file.unlink()
    if not any(file.parent.iterdir()):
        file.parent.rmdir()


def kept_files(folder: str | Path) -> list[Path]:
    """The files of the patches that are kept in a folder and are not in its tables, in the order of their names."""
    return sorted((Path(folder) / KEPT).glob("*.safetensors"))


def kept_names(folder: str | Path) -> list[str]:
    """The names of all patches that are kept in a folder."""
    return sorted([*patches_in(folder), *(file.stem for file in kept_files(folder))])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Lets one process at a time change a folder; puts back what a killed one had renamed."""
    aside = folder.with_name(REPLACED + folder.name)
    if not folder.exists() and aside.exists():
        os.rename(aside, folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a checkpoint, or a folder of table files.")
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):  # else it was replaced while we waited
                yield folder
                return
        finally:
            os.close(handle)


def _tables_for(patch: Patch, folder: Path) -> TableFolder:
    """The tables of a folder, which must be those that a patch is for."""
    opened = open_tables(folder)
    found = Tables(
        addressing_sha256=addressing_digest(opened.memory, opened.geometry),
        encoding=opened.encoding,
        width=opened.memory.head_dim,
        num_rows={layer: table.num_rows for layer, table in opened.tables.items()},
    )
    require_tables(patch, found, f"in {folder}")
    return opened


def _stored_rows(table: TableFile, delta: RowDelta) -> NDArray[np.uint8]:
    with contextlib.closing(DiskStore(table)) as store:
        return store.fetch(delta.rows_U).wait()


def _rewrite(opened: TableFolder, deltas: Mapping[int, RowDelta], record: str, content: Patch | None) -> None:
    """Replaces rows of a folder, and writes the record (None: removes it)."""
    folder = opened.path
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    changed = _changed_shards(opened, deltas)
    try:
        written = {name for path in changed for name in (path.name, changed[path])} | {MANIFEST, record}
        _link(folder, partial, copied=written - {record}, left_out={record})
        for layer, delta in deltas.items():
            _write_rows(opened.tables[layer], delta, partial)
        if (folder / MANIFEST).is_file():
            names = [path.name for path in changed]
            write_manifest(partial, names, block_bytes=read_manifest(folder).block_bytes)
        else:
            for path in changed:
                if changed[path]:
                    write_page_sums(partial / path.name)
        if content is not None:
            write_patch(content, partial / record)
        put_in_place(partial, folder)
    except OSError as error:
        raise OSError(
            f"{folder} could not be changed ({reason_of(error, folder.parent)}); it is as it was. Free space there, or "
            "put that right, and run the same command again."
        ) from error
    finally:
        if folder.exists():
            shutil.rmtree(partial, ignore_errors=True)


def _changed_shards(opened: TableFolder, deltas: Mapping[int, RowDelta]) -> dict[Path, str]:
    """The shards that hold rows to be replaced, and the names of their checksums' files ("" for none)."""
    found = {}
    for layer, delta in deltas.items():
        for shard in opened.tables[layer].shards:
            inside = (delta.rows_U >= shard.first_row) & (delta.rows_U < shard.first_row + shard.num_rows)
            if inside.any():
                found[shard.path] = "" if shard.crc32 is None else shard.crc32.name
    if "" in found.values() and (opened.path / MANIFEST).is_file():
        raise ValueError(
            f"{opened.path} has tables without checksums of their pages: `engrammar table pack {opened.path} NEW` "
            "makes a copy that has."
        )
    return found


def _link(folder: Path, partial: Path, copied: set[str], left_out: set[str]) -> None:
    """Makes a folder of the same files; those that will be written are copies, so that the old ones stay."""
    partial.mkdir()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir():
            (partial / name).mkdir()
        elif str(name) in copied or path.is_symlink():
            shutil.copyfile(path, partial / name)
        elif str(name) not in left_out:
            try:
                os.link(path, partial / name)
            except OSError:  # a file system without links
                shutil.copyfile(path, partial / name)


def _write_rows(table: TableFile, delta: RowDelta, partial: Path) -> None:
    for shard in table.shards:
        inside = (delta.rows_U >= shard.first_row) & (delta.rows_U < shard.first_row + shard.num_rows)
        if not inside.any():
            continue
        with (partial / shard.path.name).open("rb+") as file:
            for row, stored_S in zip(delta.rows_U[inside].tolist(), delta.stored_US[inside]):
                file.seek(shard.start + (row - shard.first_row) * table.row_bytes)
                file.write(stored_S.tobytes())
