"""TableWriter: a folder that is whole or absent."""

import errno
import os
import subprocess

import pytest
import torch

from engrammar.addressing import derive_geometry
from engrammar.tables import folder as format_module
from engrammar.tables.folder import TableWriter, open_tables
from engrammar.tables.headers import PAGE
from table_folders import tiny_memory, values_of, write_folder


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "tables")
    return tmp_path / "tables"


def writer_of(folder, **settings):
    memory = tiny_memory()
    geometry = derive_geometry(memory, num_classes=41, fill_class=2)
    return TableWriter(folder, memory=memory, geometry=geometry, encoding="bf16", source="a test", **settings)


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_too_few_or_too_many_rows_leave_nothing(tmp_path):
    num_rows = len(values_of(tiny_memory(), 1))
    few = f"has {num_rows} rows; {num_rows - 1} were given"
    for count, wrong in ((num_rows - 1, few), (num_rows + 1, "more were")):
        with pytest.raises(ValueError, match=wrong), writer_of(tmp_path / "t") as writer:
            writer.write(1, torch.full((count, 12), 7, dtype=torch.uint8))
        assert not left_in(tmp_path)
    with pytest.raises(ValueError, match=r"allowed: uint8 \[U, 12\]"), writer_of(tmp_path / "t") as writer:
        writer.write(1, torch.zeros(3, 6))


def test_a_folder_that_is_there_is_never_written_over(folder):
    before = left_in(folder)
    with pytest.raises(ValueError, match="is there already"), writer_of(folder):
        pass
    assert left_in(folder) == before and open_tables(folder)


def test_an_interrupted_write_leaves_nothing_and_an_empty_folder_is_used(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer_of(tmp_path / "t") as writer:
        writer.write(1, torch.full((9, 12), 7, dtype=torch.uint8))
        raise KeyboardInterrupt
    assert not left_in(tmp_path)
    (tmp_path / "t").mkdir()
    write_folder(tmp_path / "t")
    assert left_in(tmp_path) == ["t"]


def test_a_full_disk_is_one_sentence_wherever_it_fills_up(tmp_path, monkeypatch):
    failing = {"lay_out", "write_rows", "write_memory", "write_manifest"}
    for name in failing:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(format_module, name, full)
            write_folder(tmp_path / "t")
        assert str(caught.value).startswith(f"{tmp_path / 't'} could not be written (No space left on device); nothing")
        assert not left_in(tmp_path)


def test_a_disk_of_few_pages_keeps_nothing_half_made(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={5 * PAGE}", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(OSError, match="could not be written .No space left on device.; nothing was left"):
            write_folder(disk / "t")
        assert not left_in(disk)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_writers_of_one_name_never_mix(tmp_path):
    rows = {1: torch.full((220, 12), 1, dtype=torch.uint8), 2: torch.full((220, 12), 2, dtype=torch.uint8)}
    memory = tiny_memory(layers=(1,))
    geometry = derive_geometry(memory, num_classes=41, fill_class=2)
    first, second = (
        TableWriter(tmp_path / "t", memory=memory, geometry=geometry, encoding="bf16", source=source)
        for source in ("first", "second")
    )
    num_rows = geometry.num_stored_rows(0)
    with pytest.raises(ValueError, match="was written by another process meanwhile"), first:
        first.write(1, rows[1][: num_rows // 2])
        with second:
            second.write(1, rows[2][:num_rows])
        first.write(1, rows[1][num_rows // 2 : num_rows])
    opened = open_tables(tmp_path / "t")
    assert opened.source == "second" and left_in(tmp_path) == ["t"]
    assert opened.tables[1].shards[0].path.read_bytes().endswith(bytes([2]) * num_rows * 12)
