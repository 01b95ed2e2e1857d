"""A checkpoint folder is whole or absent at any moment, and damage is one clear sentence."""

import json
import logging
import os
import random
import re
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrammar.tables import checksums
from engrammar.tables import sealed as sealing
from engrammar.tables.checksums import MANIFEST
from engrammar.tables.sealed import clear_partials, last_good, rotate, seal, verify, write_text, writing

BLOCK = 7  # bytes
CONTENTS = {"empty": b"", "block": b"1234567", "model/two and a half": bytes(range(17)), "state.json": b"{}"}


def fill(folder, contents=CONTENTS):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def sealed(out, step, contents=CONTENTS):
    final = out / f"checkpoint-{step}"
    seal(fill(out / f".partial-{step}", contents), final, block_bytes=BLOCK)
    return final


def refused(folder):
    """The sentence in which `verify` refuses a folder; any other exception is the test's failure."""
    with pytest.raises(ValueError) as caught:
        verify(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert f"delete {folder} to go on from the checkpoint before it, or copy it again." in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("out"), 4)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "checkpoint-4")


def test_a_sealed_folder_verifies_and_lists_every_file(folder):
    verify(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["version"] == 1 and manifest["block_bytes"] == BLOCK
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(content) for name, content in CONTENTS.items()
    }
    assert [len(entry["crc32"]) for _, entry in sorted(manifest["files"].items())] == [1, 0, 3, 1]
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_whoever_may_read_the_folder_may_read_its_files(tmp_path, folder_mode, file_mode):
    """safetensors writes files that only their owner can read; a server often runs as another user."""
    fill(tmp_path / "new", {"own": b"1"})
    (tmp_path / "new").chmod(folder_mode)
    (tmp_path / "elsewhere").write_bytes(b"2")
    os.link(tmp_path / "elsewhere", tmp_path / "new" / "linked")
    for name in ("own", "linked"):
        (tmp_path / "new" / name).chmod(0o600)
    seal(tmp_path / "new", tmp_path / "final", block_bytes=BLOCK)
    assert (tmp_path / "final" / "own").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("name", "byte"), [(n, i) for n, content in CONTENTS.items() for i in range(len(content))])
@pytest.mark.parametrize("bit", [0, 7])
def test_any_flipped_bit_is_found_in_its_block(copy, name, byte, bit):
    content = bytearray((copy / name).read_bytes())
    content[byte] ^= 1 << bit
    (copy / name).write_bytes(content)
    first = byte // BLOCK * BLOCK
    last = min(first + BLOCK, len(content)) - 1
    assert f"{copy / name} is damaged in bytes {first} to {last} (block {byte // BLOCK})" in refused(copy)
    assert last_good(copy.parent) == copy  # sizes only
    verify(copy, only=[other for other in CONTENTS if other != name])
    with pytest.raises(ValueError, match="is damaged"):
        verify(copy, only=[name])


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 13, 14, 15, 16, 18, 21, 22])
def test_a_file_of_another_size_is_named(copy, size):
    path = copy / "model/two and a half"
    path.write_bytes((path.read_bytes() * 2)[:size])
    assert f"{path} has {size} bytes, 17 when it was saved" in refused(copy)
    assert last_good(copy.parent) is None


@pytest.mark.parametrize("name", CONTENTS)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert f"lacks the file {name!r}" in refused(copy)
    (copy / name).mkdir()
    assert f"lacks the file {name!r}" in refused(copy)


def test_a_folder_without_manifest_is_refused(copy, tmp_path):
    (copy / MANIFEST).unlink()
    assert "has no manifest.json" in refused(copy)
    assert "has no manifest.json" in refused(tmp_path / "nowhere")


def test_a_disk_that_cannot_be_read_is_one_sentence(copy, monkeypatch):
    def fails(path, block_bytes):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checksums, "_block_sums", fails)
    assert "cannot be read (Input/output error)" in refused(copy)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([*CONTENTS, "bytes", "crc32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from([*CONTENTS]), inner),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries({"bytes": JSON | st.integers(0, 20), "crc32": JSON | st.lists(st.integers(0, 2**33))})
NEARLY = st.fixed_dictionaries(
    {
        "version": st.sampled_from([1, 1, 1, 2, "1", None]),
        "block_bytes": st.sampled_from([BLOCK, BLOCK, 0, -1, 2**70, 7.0, True]) | JSON,
        "files": st.dictionaries(
            st.sampled_from(["", "..", "/etc/passwd", "\0", "\ud800", "x" * 300]), ENTRY, min_size=1
        )
        | st.dictionaries(st.sampled_from([*CONTENTS]), ENTRY, min_size=1)
        | JSON.filter(lambda value: value != {}),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(JSON, NEARLY, NEARLY).map(json.dumps) | st.binary() | st.just("[" * 100_000) | st.just("9" * 5000))
@pytest.mark.slow
def test_no_manifest_leads_to_another_error(folder, content):
    copy = folder.parent / "fuzz" / "checkpoint-4"
    if not copy.exists():
        shutil.copytree(folder, copy)
    (copy / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    if not is_true_of_what_it_lists(content):
        refused(copy)
    last_good(copy.parent)


def is_true_of_what_it_lists(content) -> bool:
    """Whether a drawn manifest happens to be right: it lists the empty file alone, which needs no sums."""
    try:
        manifest = json.loads(content)
        right = manifest["version"] == 1 and manifest["files"] == {"empty": {"bytes": 0, "crc32": []}}
        return right and type(manifest["block_bytes"]) is int and 0 < manifest["block_bytes"] <= checksums.BLOCK_BYTES
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


@pytest.mark.parametrize("files", [{"empty": {"bytes": 0, "crc32": []}}, {"empty": {"bytes": 1, "crc32": [0]}}])
def test_a_manifest_of_one_file_is_right_or_refused(copy, files):
    """The case that `is_true_of_what_it_lists` leaves out, and its control."""
    content = json.dumps({"version": 1, "block_bytes": BLOCK, "files": files})
    (copy / MANIFEST).write_text(content)
    if is_true_of_what_it_lists(content):
        verify(copy)
    else:
        assert "empty" in refused(copy)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_the_manifest_never_hides_damage(folder, data):
    copy = folder.parent / "flipped" / "checkpoint-4"
    if not copy.exists():
        shutil.copytree(folder, copy)
    text = bytearray((folder / MANIFEST).read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (copy / MANIFEST).write_bytes(text)
    (copy / "block").write_bytes(b"1234567")
    try:
        verify(copy)
    except ValueError:
        refused(copy)
    (copy / "block").write_bytes(b"1234667")
    refused(copy)


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Dies before the k-th change to the disk; 0 never."""

    def arm(moment):
        left = [moment]

        def guard(original):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return original(*args, **kwargs)

            return call

        for module, names in ((os, ("fsync", "rename", "unlink", "rmdir")), (sealing.Path, ("write_text",))):
            for name in names:
                monkeypatch.setattr(module, name, guard(getattr(module, name)))

    return arm


@pytest.mark.parametrize("moment", range(1, 40))
@pytest.mark.parametrize("there", ["nothing", "an earlier one", "the same step"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, killed_at, there, moment):
    before = {"nothing": None, "an earlier one": 3, "the same step": 4}[there]
    if before is not None:
        sealed(tmp_path, before, {"state.json": b"old"})
    with monkeypatch.context():
        killed_at(moment)
        try:
            sealed(tmp_path, 4)
            finished = True
        except Killed:
            finished = False
    monkeypatch.undo()
    good = last_good(tmp_path)
    assert (good is not None) or (before is None and not finished)
    if good is not None:
        verify(good)
        assert not finished or good == tmp_path / "checkpoint-4"
    clear_partials(tmp_path)
    assert last_good(tmp_path) == good and not list(tmp_path.glob(".partial-*"))
    again = sealed(tmp_path, 4)
    verify(again)
    assert last_good(tmp_path) == again
    assert (again / "state.json").read_bytes() == b"{}"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", range(1, 18))
def test_a_kill_while_rotating_leaves_the_newest(tmp_path, monkeypatch, killed_at, moment):
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    killed_at(moment)
    try:
        rotate(tmp_path, 1, ())
        finished = True
    except Killed:
        finished = False
    monkeypatch.undo()
    assert last_good(tmp_path) == tmp_path / "checkpoint-3"
    for folder in tmp_path.glob("checkpoint-*"):
        verify(folder)
    rotate(tmp_path, 1, ())
    clear_partials(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-3"]
    assert finished == (moment == 17)


def test_the_newest_whole_checkpoint_is_used_and_the_skipped_are_named(tmp_path, caplog):
    assert last_good(tmp_path) is None and last_good(tmp_path / "nowhere") is None
    for step in (2, 10, 9):
        sealed(tmp_path, step)
    (tmp_path / "checkpoint-100x").mkdir()
    assert last_good(tmp_path) == tmp_path / "checkpoint-10"
    assert not caplog.records
    fill(tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-10" / "block").write_bytes(b"123456")
    with caplog.at_level(logging.WARNING):
        assert last_good(tmp_path) == tmp_path / "checkpoint-9"
    eleven, ten = (record.getMessage() for record in caplog.records)
    assert "checkpoint-11 has no manifest.json" in eleven and "going on from" in eleven and "checkpoint-9" in eleven
    assert "block has 6 bytes, 7 when it was saved" in ten and "checkpoint-9" in ten


@pytest.mark.parametrize(
    ("keep", "protect", "left"),
    [
        (None, (), [1, 2, 3, 10]),
        (0, (), [1, 2, 3, 10]),
        (1, (), [10]),
        (2, (), [3, 10]),
        (9, (), [1, 2, 3, 10]),
        (1, (2,), [2, 10]),
        (2, (1,), [1, 10]),
        (3, (1, 10), [1, 3, 10]),
    ],
)
def test_rotation_keeps_the_newest_and_the_protected(tmp_path, keep, protect, left):
    for step in (3, 1, 10, 2):
        sealed(tmp_path, step)
    fill(tmp_path / "checkpoint-11")  # not sealed: neither counted nor touched
    rotate(tmp_path, keep, [tmp_path / f"checkpoint-{step}" for step in protect])
    expected = {f"checkpoint-{step}" for step in (*left, 11)}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_rotation_never_counts_a_damaged_checkpoint_as_kept(tmp_path):
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    (tmp_path / "checkpoint-3" / "block").unlink()
    rotate(tmp_path, 1, ())
    assert last_good(tmp_path) == tmp_path / "checkpoint-2"


def test_a_text_file_is_the_old_or_the_new_one(tmp_path, monkeypatch, killed_at):
    path = tmp_path / "result.json"
    write_text(path, "old")
    for moment in range(1, 6):
        killed_at(moment)
        try:
            write_text(path, "new")
        except Killed:
            assert path.read_text() in ("old", "new")
        monkeypatch.undo()
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_reader_beside_a_writer_meets_no_error(tmp_path):
    sealed(tmp_path, 4)
    stop, rounds = threading.Event(), random.Random(0)

    def write():
        while not stop.is_set():
            sealed(tmp_path, 4, CONTENTS | {"state.json": str(rounds.random()).encode()})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            good = last_good(tmp_path)
            assert good is None or good.name.endswith("checkpoint-4")
    finally:
        stop.set()
        writer.join()
    verify(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "torch.save: .*pos 576",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "torch.save: basic_ios"),
    ],
)
def test_a_failed_write_is_one_sentence(tmp_path, error, reason):
    scratch = fill(tmp_path / ".partial-x")
    expected = f"checkpoint-8 could not be written to {re.escape(str(tmp_path))} [(]{reason}.*[)]; there is no earlier"
    with pytest.raises(OSError, match=expected), writing("checkpoint-8", tmp_path, scratch):
        raise error
    assert not scratch.exists()
    good = sealed(tmp_path, 4)
    expected = f"the last good checkpoint is {good}.*run the same command again"
    with pytest.raises(OSError, match=expected), writing("checkpoint-8", tmp_path):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA error"), AssertionError()])
def test_other_errors_pass_and_leave_no_scratch(tmp_path, error):
    scratch = fill(tmp_path / ".partial-x")
    with pytest.raises(type(error)) as caught, writing("checkpoint-8", tmp_path, scratch):
        raise error
    assert caught.value is error and not scratch.exists()


def test_what_a_killed_write_left_beside_its_file_is_cleared(tmp_path):
    with sealing.written_beside(tmp_path / "model.safetensors.index.json") as partial:
        partial.write_text("half")
        left = partial.with_name(partial.name.replace(".partial", "0.partial"))
        left.write_text("what a kill leaves")
    clear_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.index.json"]
