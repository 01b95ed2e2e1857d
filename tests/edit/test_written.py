"""Row deltas in a folder of tables: written and taken back as a whole, whatever fails."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import engrammar.edit.written as written
from attached_models import base_model
from edited_models import WITH_MEMORY, bits, model_of_kind, small_patch, spoken_ids, tokenizer
from engrammar.attach import load_attached, save_attached
from engrammar.edit import (
    apply_patch,
    base_of,
    build_patch,
    patch_folder,
    patches_in,
    replace_rows,
    unpatch_folder,
    write_patch,
)
from engrammar.edit.applying import memories_of
from engrammar.tables.convert import pack, quantize
from engrammar.tables.folder import open_tables
from engrammar.tables.verify import verify_folder

PAGE = os.sysconf("SC_PAGE_SIZE")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def served(folder: Path, memory="disk"):
    return load_attached(base_model("llama").requires_grad_(False), folder, tokenizer(), memory=memory)


def rows_patch(folder: Path, name: str, part: slice = slice(None), seed: int = 0):
    """A patch of rows that `spoken_ids` reads, made for the tables of a folder."""
    model, draw = served(folder), torch.Generator().manual_seed(seed)
    memory = memories_of(model)[0]
    rows = {layer: rows.unique()[::3][part] for layer, rows in memory.addresses(spoken_ids(2, 19)).items()}
    new = {layer: (one, torch.randn(len(one), 6, generator=draw)) for layer, one in rows.items()}
    return build_patch(name, base_of(model, tokenizer()), rows=replace_rows(memory, new))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "default"
    save_attached(model_of_kind(WITH_MEMORY), folder)
    return folder


@pytest.fixture(params=["fp32", "shards", "int8", "no manifest"])
def tables(request, adapter, tmp_path) -> Path:
    """A folder of tables in several forms."""
    folder = tmp_path / "tables"
    if request.param == "shards":
        pack(adapter, folder, shard_bytes=1_000)
    elif request.param == "int8":
        quantize(adapter, folder, encoding="int8")
    else:
        pack(adapter, folder)
    if request.param == "no manifest":
        (folder / "manifest.json").unlink()
    return folder


def test_a_written_patch_reads_as_an_applied_one_and_is_undone_to_the_bit(tables, tmp_path):
    ids, before, patch = spoken_ids(2, 19), contents(tables), rows_patch(tables, "rows")
    model = served(tables)
    base = bits(model, ids)
    apply_patch(model, patch)
    expected = bits(model, ids)
    write_patch(patch, tmp_path / "rows.safetensors")
    patch_folder(tmp_path / "rows.safetensors", tables)
    assert patches_in(tables) == ["rows"] and contents(tables) != before
    verify_folder(tables)
    assert torch.equal(bits(served(tables), ids), expected)
    assert torch.equal(bits(served(tables, "ram"), ids), expected)
    assert torch.equal(bits(model, ids), expected)  # it has the old files open, under its overlay
    unpatch_folder(tables, "rows")
    assert contents(tables) == before and patches_in(tables) == []
    assert torch.equal(bits(served(tables), ids), base) and [p.name for p in tables.parent.glob(".*")] == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_written_patches_are_undone_in_any_order(adapter, tmp_path, order):
    folder = tmp_path / "tables"
    pack(adapter, folder)
    before = contents(folder)
    parts = [slice(0, 3), slice(3, 5), slice(5, None)]
    patches = [rows_patch(folder, f"p{i}", part, i) for i, part in enumerate(parts)]
    for patch in patches:
        patch_folder(patch, folder)
    left = [0, 1, 2]
    for gone in order:
        unpatch_folder(folder, f"p{gone}")
        left.remove(gone)
        verify_folder(folder)
        fresh = tmp_path / f"fresh-{gone}"
        pack(adapter, fresh)
        for index in left:
            patch_folder(patches[index], fresh)
        assert contents(folder) == contents(fresh)
    assert contents(folder) == before


def test_what_cannot_be_right_is_refused_and_the_folder_stays(adapter, tmp_path):
    folder = tmp_path / "tables"
    pack(adapter, folder)
    patch, other = rows_patch(folder, "rows"), rows_patch(folder, "other", slice(0, 1), 5)
    before = contents(folder)
    with pytest.raises(ValueError, match="has exact entries, which no table holds"):
        patch_folder(small_patch(model_of_kind("llama"), "key", (8,)), folder)
    with pytest.raises(ValueError, match="another addressing_sha256"):
        patch_folder(replace(patch, tables=replace(patch.tables, addressing_sha256="0" * 64)), folder)
    quantize(folder, tmp_path / "int8", encoding="int8")
    with pytest.raises(ValueError, match=r"another encoding \(fp32 there, int8 in"):
        patch_folder(patch, tmp_path / "int8")
    with pytest.raises(ValueError, match="is not a folder"):
        patch_folder(patch, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no patch 'rows'; it holds none"):
        unpatch_folder(folder, "rows")
    assert contents(folder) == before
    patch_folder(patch, folder)
    after = contents(folder)
    with pytest.raises(ValueError, match="holds a patch 'rows' already"):
        patch_folder(patch, folder)
    with pytest.raises(ValueError, match=r"Row \d+ of layer 1 is not the one that the patch 'other' replaces"):
        patch_folder(other, folder)
    assert contents(folder) == after


def test_a_row_that_was_changed_since_is_not_taken_back(adapter, tmp_path):
    folder = tmp_path / "tables"
    pack(adapter, folder)
    patch_folder(rows_patch(folder, "first"), folder)
    patch_folder(rows_patch(folder, "second", slice(0, 1), 7), folder)  # made for what the first one wrote
    after = contents(folder)
    with pytest.raises(ValueError, match=r"Row \d+ of layer 1 is not the one that the patch 'first' replaces \(1 of"):
        unpatch_folder(folder, "first")
    assert contents(folder) == after
    unpatch_folder(folder, "second")
    unpatch_folder(folder, "first")


STEPS = ["_link", "_write_rows", "write_manifest", "write_patch", "put_in_place"]


@pytest.mark.parametrize(
    ("way", "step", "when"),
    [
        (way, step, when)
        for way in ("patch", "undo")
        for step in STEPS
        for when in ("before", "after")
        if (way, step) != ("undo", "write_patch") and (step, when) != ("put_in_place", "after")
    ],
)
def test_a_disk_that_fills_at_any_step_leaves_the_folder_as_it_was(adapter, tmp_path, monkeypatch, way, step, when):
    folder = tmp_path / "tables"
    pack(adapter, folder)
    patch = rows_patch(folder, "rows")
    if way == "undo":
        patch_folder(patch, folder)
    before, real = contents(folder), getattr(written, step)

    def full(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(written, step, full)
    change = (lambda: patch_folder(patch, folder)) if way == "patch" else (lambda: unpatch_folder(folder, "rows"))
    with pytest.raises(OSError, match=r"tables could not be changed \(No space left on device\); it is as it was"):
        change()
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["tables"]
    monkeypatch.undo()
    change()
    verify_folder(folder)


def test_a_kill_between_two_renames_is_put_right(adapter, tmp_path, monkeypatch):
    folder = tmp_path / "tables"
    pack(adapter, folder)
    patch, before, rename = rows_patch(folder, "rows"), contents(folder), os.rename

    class Killed(BaseException):
        pass

    def killed(source, target):
        if Path(target) == folder:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(Killed):
        patch_folder(patch, folder)
    monkeypatch.undo()
    assert not folder.exists()
    with pytest.raises(ValueError, match="holds no patch 'rows'"):
        unpatch_folder(folder, "rows")  # whatever is done next, the folder is there again
    assert contents(folder) == before
    patch_folder(patch, folder)
    verify_folder(folder)


@pytest.mark.parametrize("way", ["patch", "undo"])
def test_a_full_disk_is_one_sentence(adapter, mount, way, tmp_path):
    """A real disk, with room for the folder and no copy of a shard."""
    disk = mount(2**24)
    folder = disk / "tables"
    pack(adapter, folder)
    patch = rows_patch(folder, "rows")
    if way == "undo":
        patch_folder(patch, folder)
    before = contents(folder)
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(PAGE))
    with pytest.raises(OSError, match=r"tables could not be changed \(No space left on device\); it is as it was"):
        patch_folder(patch, folder) if way == "patch" else unpatch_folder(folder, "rows")
    assert contents(folder) == before and sorted(path.name for path in disk.iterdir()) == ["filler", "tables"]
    filler.unlink()
    patch_folder(patch, folder) if way == "patch" else unpatch_folder(folder, "rows")
    verify_folder(folder)


def test_what_is_read_back_are_the_rows(adapter, tmp_path):
    folder = tmp_path / "tables"
    pack(adapter, folder)
    patch = rows_patch(folder, "rows")
    patch_folder(patch, folder)
    for layer, delta in patch.deltas.items():
        assert np.array_equal(written._stored_rows(open_tables(folder).tables[layer], delta), delta.stored_US)
