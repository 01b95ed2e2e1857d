"""Table files: what was written is found again; whatever else is in the folder is one sentence."""

import copy
import json
import os
import random
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engrammar.tables import sealed
from engrammar.tables.checksums import json_sum
from engrammar.tables.encodings import decode, encode
from engrammar.tables.folder import open_tables
from engrammar.tables.headers import PAGE
from engrammar.tables.shards import MEMORY
from engrammar.tables.verify import read_table, verify_tables
from table_folders import SCALE, tiny_memory, values_of, write_folder

ENCODINGS = ("fp32", "bf16", "fp8", "fp8_row", "fp8_scale32", "int8", "int4")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "tables"
    write_folder(folder, shard_bytes=1000)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "tables")


@pytest.fixture
def in_memory(written):
    """A copy in RAM where there is such a place: a file is written thousands of times."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as scratch:
        yield shutil.copytree(written, Path(scratch) / "tables")


def refused(folder):
    """The sentence in which a folder is refused; any other exception is the test's failure."""
    with pytest.raises(ValueError) as caught:
        open_tables(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


def rewrite(folder, change, *, summed=True):
    """Changes a folder's memory.json, by default as one who knows its checksum would; its manifest is gone."""
    (folder / "manifest.json").unlink(missing_ok=True)
    content = json.loads((folder / MEMORY).read_text())
    change(content)
    if summed:
        content["crc32"] = json_sum(content)
    (folder / MEMORY).write_text(json.dumps(content))


@pytest.mark.parametrize("shard_bytes", [None, 1000])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_lie_where_the_folder_says(tmp_path, encoding, shard_bytes):
    opened = write_folder(tmp_path / "out" / "tables", encoding, shard_bytes=shard_bytes)
    assert (opened.encoding, opened.num_ids, opened.source) == (encoding, 53, "a test")
    assert opened.memory == tiny_memory() and list(opened.tables) == [1, 3]
    for layer, table in opened.tables.items():
        expected = encode(values_of(opened.memory, layer), encoding, table.scale)
        assert table.num_rows == len(expected) and (len(table.shards) > 1) == (shard_bytes is not None)
        for shard in table.shards:
            assert shard.start == PAGE  # one page of header: rows begin where a page does
            data = shard.path.read_bytes()
            assert len(data) == shard.start + shard.num_rows * table.row_bytes
            rows = np.frombuffer(data, np.uint8, offset=shard.start).reshape(-1, table.row_bytes)
            assert np.array_equal(rows, expected[shard.first_row : shard.first_row + shard.num_rows])
            sums = load_file(shard.crc32)["crc32"].tolist()
            assert sums == [zlib.crc32(data[i : i + PAGE]) for i in range(0, len(data), PAGE)]
            (tensor,) = load_file(shard.path).items()
            assert tensor[0] == shard.tensor and tensor[1].shape[0] == shard.num_rows
    sealed.verify(tmp_path / "out" / "tables")
    assert verify_tables(tmp_path / "out" / "tables") > 0


def test_float_tables_are_weights_of_their_own_dtype(tmp_path):
    for encoding, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        opened = write_folder(tmp_path / encoding, encoding)
        weight = load_file(opened.tables[1].shards[0].path)["model.memory.tables.1.weight"]
        values = values_of(opened.memory, 1)
        assert weight.dtype == dtype and opened.tables[1].scale == (SCALE if encoding == "fp8" else None)
        torch.testing.assert_close(weight.float() * (SCALE if encoding == "fp8" else 1), values, rtol=0.07, atol=0.01)


def test_tables_are_read_in_blocks_of_any_size(folder, monkeypatch):
    opened = open_tables(folder)
    monkeypatch.setattr("engrammar.tables.verify.READ_BYTES", PAGE)
    for layer, table in opened.tables.items():
        rows = np.concatenate(list(read_table(opened, table)))
        assert torch.equal(
            decode(torch.from_numpy(rows), 6, "bf16", torch.bfloat16), values_of(opened.memory, layer).bfloat16()
        )


# Damage.

VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, 1e308, "", "x", "..", "/"]
VALUES += ["../x", "\0", "\ud800", "a" * 300, "memory.json", [], {}, [[]], [1, 2], {"a": 1}, "fp8", "1"]


def places(value, path=()):
    """The paths of every value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def mutate(content, rng):
    """One to three values of `content` replaced, removed, repeated, swapped or nested deeper."""
    for _ in range(rng.randint(1, 3)):
        *path, key = rng.choice([place for place in places(content) if place])
        parent = content
        for step in path:
            parent = parent[step]
        kind, value = rng.randrange(7), parent[key]
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = [value]
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(value))
        elif kind == 3 and isinstance(value, int):
            parent[key] = value + rng.choice([-2, -1, 1, 2, 2**40])
        elif kind == 4 and isinstance(parent, dict):
            parent[rng.choice(["x", "preset", "version", "2"])] = value
        elif kind == 5 and isinstance(value, str) and value:
            parent[key] = value.replace(rng.choice(value), rng.choice("0/.x\\"))
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return content


def test_five_thousand_changed_memory_files_are_refused_or_say_the_same(in_memory):
    folder = in_memory
    rng, right, text = random.Random(0), open_tables(folder), (folder / MEMORY).read_bytes()
    (folder / "manifest.json").unlink()
    for index in range(5000):
        changed = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(changed))
            if index % 3 == 0:
                changed[place] ^= 1 << rng.randrange(8)
            elif index % 3 == 1:
                del changed[place : place + rng.choice([1, 1, 100, len(changed) if index % 7 == 1 else 1])]
            else:
                changed[place:place] = rng.choice([b"0", b"[" * 9, b"\xff", b'"', b"}", changed[place : place + 99]])
            if not changed:
                break
        (folder / MEMORY).write_bytes(changed)
        try:
            found = open_tables(folder)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert found == right, bytes(changed)


@pytest.mark.slow
def test_five_thousand_forged_memory_files_are_refused_or_stay_inside(in_memory):
    """Whoever forges a checksum may name other settings, but no other file, no row outside, and nothing huge."""
    folder = in_memory
    (folder / "manifest.json").unlink()
    rng, content = random.Random(1), json.loads((folder / MEMORY).read_text())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    num_opened = 0
    for _ in range(5000):
        forged = mutate(copy.deepcopy(content), rng)
        try:
            forged["crc32"] = json_sum(forged)
            text = json.dumps(forged)
        except (ValueError, TypeError):  # 10**400 cannot even be written
            continue
        (folder / MEMORY).write_text(text)
        try:
            found = open_tables(folder)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 800 and str(error).encode()
            continue
        num_opened += 1
        for index, layer in enumerate(found.memory.layers):
            table = found.tables[layer]
            assert table.num_rows == found.geometry.num_stored_rows(index) == sum(s.num_rows for s in table.shards)
            for shard in table.shards:
                assert shard.path.parent == folder
                assert shard.start + shard.num_rows * table.row_bytes == sizes[shard.path.name]
    assert num_opened > 20  # or the checks of what is opened check nothing


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"[" * 10**5, b'{"version": NaN}', b"{}", b'{"a":1,"a":2}', b"9" * 10**4, b"\xff\xfe"]
)
def test_other_files_in_its_place_are_refused(folder, text):
    (folder / "manifest.json").unlink()
    (folder / MEMORY).write_bytes(text)
    assert MEMORY in refused(folder)


CUTS = ("empty", "length", "header", "header end", "data start", "mid row", "last byte", "longer")


@pytest.mark.parametrize("at", CUTS)
@pytest.mark.parametrize("file", ["shard", "crc32"])
def test_a_cut_file_is_named(folder, file, at):
    shard = open_tables(folder).tables[3].shards[1]
    path = shard.path if file == "shard" else shard.crc32
    size = path.stat().st_size
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    sizes = {"empty": 0, "length": 5, "header": 20, "header end": 7 + length, "data start": 8 + length}
    sizes |= {"mid row": (8 + length + size) // 2, "last byte": size - 1, "longer": size + 1}
    os.truncate(path, sizes[at])
    assert str(path) in refused(folder)


@pytest.mark.parametrize("file", ["shard", "crc32"])
@pytest.mark.parametrize("there", ["nothing", "folder", "fifo", "link"])
def test_a_file_that_is_not_there_or_none_is_named(folder, tmp_path, file, there):
    shard = open_tables(folder).tables[1].shards[0]
    path = shard.path if file == "shard" else shard.crc32
    data = path.read_bytes()
    path.unlink()
    if there == "folder":
        path.mkdir()
    elif there == "fifo":
        os.mkfifo(path)
    elif there == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    assert path.name in refused(folder)


def test_the_links_of_a_hub_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "1234"
    shutil.copytree(folder, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for index, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(index))
        path.symlink_to(blobs / str(index))
    assert verify_tables(snapshot) == verify_tables(folder)


@pytest.mark.parametrize("name", ["../tables/x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", 7, None, ["x"]])
def test_names_that_leave_the_folder_are_refused(folder, name):
    rewrite(folder, lambda content: content["tables"]["1"]["shards"][0].update(file=name))
    assert "is not the name of a file in this folder" in refused(folder)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda c: c["geometry"]["table_sizes"][0][0].__setitem__(0, 999), "is not the"),
        (lambda c: c["geometry"]["multipliers"].pop(), "geometry: multipliers are not N for each layer"),
        (lambda c: c["geometry"]["multipliers"][0].__setitem__(0, 4), "geometry: a multiplier is even"),
        (lambda c: c["memory"].update(head_dim=7), "width is not head_dim=7"),
        (lambda c: c["memory"].update(layers=[1, 2]), "tables are not of layers 1, 2"),
        (lambda c: c["memory"].update(num_heads=10**12), "geometry: table_sizes are not one for each head"),
        (lambda c: c["memory"].update(max_ngram_size=10**30), "memory.rows_per_head"),
        (lambda c: c["memory"].pop("seed"), "memory does not have the settings"),
        (lambda c: c.update(encoding="fp32"), "is BF16"),
        (lambda c: c.update(encoding="fp8"), "scale is None for fp8"),
        (lambda c: c.update(version=2), "its version is 2, not 1"),
        (lambda c: c.update(tokenizer_sha256="x"), "tokenizer_sha256 is 'x'"),
        (lambda c: c["tables"]["1"].update(rows=True), "rows is not the"),
        (lambda c: c["tables"]["1"].update(name=c["tables"]["3"]["name"]), "it should hold"),
        (lambda c: c["tables"]["1"]["shards"].reverse(), "it should hold"),
        (lambda c: c["tables"]["1"]["shards"].pop(), "it should hold|shards have"),
    ],
)
def test_what_does_not_fit_is_said(folder, change, wrong):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=wrong):
        open_tables(folder)
    refused(folder)


def test_a_changed_multiplier_is_never_another_memory(folder):
    rewrite(folder, lambda content: content["geometry"]["multipliers"][0].__setitem__(0, 5), summed=False)
    assert "its crc32 is not that of its contents" in refused(folder)


def test_a_memory_file_of_another_folder_is_noticed(folder, tmp_path):
    write_folder(tmp_path / "other", source="another", shard_bytes=1000)
    shutil.copyfile(tmp_path / "other" / MEMORY, folder / MEMORY)
    assert "it is not the one that manifest.json lists" in refused(folder)


def test_users_may_add_files(folder):
    (folder / "README.md").write_text("What a table.")
    assert verify_tables(folder) == verify_tables(folder)


def test_a_folder_without_tables_says_what_to_do(tmp_path):
    assert f"engrammar table pack {tmp_path} NEW" in refused(tmp_path)
    assert "nowhere is not a folder" in refused(tmp_path / "nowhere")
    assert "has no memory.json" in refused(tmp_path)


@pytest.mark.parametrize("sums", ["pages", "blocks"])
@pytest.mark.parametrize("encoding", ["bf16", "fp8_row"])
def test_any_flipped_bit_is_found_and_its_rows_named(tmp_path, encoding, sums):
    opened = write_folder(tmp_path / "t", encoding, tiny_memory(rows_per_head=(997, 1201)), shard_bytes=20_000)
    if sums == "blocks":  # as where a sealed checkpoint's page checksums are gone
        forget = lambda content: [s.update(crc32=None) for t in content["tables"].values() for s in t["shards"]]  # noqa: E731
        manifest = (tmp_path / "t" / "manifest.json").read_bytes()
        rewrite(tmp_path / "t", forget)
        content = json.loads(manifest)
        content["files"].pop(MEMORY)
        content["crc32"] = json_sum(content)
        (tmp_path / "t" / "manifest.json").write_text(json.dumps(content))
    rng = random.Random(0)
    for _ in range(40):
        table = opened.tables[rng.choice([1, 3])]
        shard = rng.choice(table.shards)
        data = bytearray(shard.path.read_bytes())
        place = rng.randrange(shard.start, len(data))
        data[place] ^= 1 << rng.randrange(8)
        kept = shard.path.read_bytes()
        shard.path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            verify_tables(tmp_path / "t")
        shard.path.write_bytes(kept)
        words = str(caught.value).replace(",", " ").split()
        low, high = (int(words[words.index("rows") + i]) for i in (1, 3))
        row = shard.first_row + (place - shard.start) // table.row_bytes
        assert str(shard.path) in str(caught.value) and low <= row <= high
        first, last = (int(words[words.index("bytes") + i]) for i in (1, 3))
        assert first <= place <= last and (sums == "blocks" or last - first < PAGE)


def test_a_shard_without_checksums_is_not_called_whole(folder):
    rewrite(folder, lambda content: content["tables"]["1"]["shards"][0].update(crc32=None))
    with pytest.raises(ValueError, match="has no checksums.*engrammar table pack"):
        verify_tables(folder)
