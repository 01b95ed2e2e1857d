"""Patches that are kept beside a model's files, where `engrammar generate` and other commands apply them.

Row deltas are written into the folder's tables (`written`), exact entries are files of their own: no table holds them.
"""

from pathlib import Path

from engrammar.edit.files import write_patch
from engrammar.edit.patch import Patch
from engrammar.edit.written import patch_folder, patches_in, unpatch_folder

KEPT = "engrammar_patches"  # the folder in a model's folder


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
