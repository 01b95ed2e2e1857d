"""Packing and quantizing: the same rows in other files, or other rows whose error is known."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from engrammar.tables import sealed
from engrammar.tables.convert import pack, quantize
from engrammar.tables.encodings import decode, encode
from engrammar.tables.folder import TableFolder, open_tables
from engrammar.tables.shards import INDEX, MEMORY
from engrammar.tables.verify import read_table, verify_tables
from models import tiny_model
from table_folders import SCALE, tiny_memory, values_of, write_folder

ENCODINGS = ("fp32", "bf16", "fp8", "fp8_row", "fp8_scale32", "int8", "int4")
NAME = "model.memory.tables.{}.weight"


def values_in(folder: TableFolder, layer: int) -> torch.Tensor:
    table = folder.tables[layer]
    rows = torch.cat([torch.from_numpy(block) for block in read_table(folder, table)])
    return decode(rows, table.width, table.encoding, torch.float32, table.scale)


@pytest.fixture(scope="module")
def model():
    return tiny_model("paper")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def older(saved, tmp_path):
    """The checkpoint as versions before table files wrote it."""
    folder = shutil.copytree(saved, tmp_path / "older")
    for path in (folder / MEMORY, *folder.glob("*.crc32.safetensors")):
        path.unlink()
    return folder


def test_what_save_pretrained_wrote_is_a_table_folder(model, saved):
    opened, state = open_tables(saved), model.state_dict()
    assert opened.encoding == "fp32" and opened.memory == model.config.memory_config
    assert opened.geometry == model.config.memory_geometry and opened.num_ids == model.config.num_ids
    for layer, table in opened.tables.items():
        assert table.name == NAME.format(layer) and table.shards[0].start % 4096 == 0
        assert torch.equal(values_in(opened, layer), state[table.name])
    assert verify_tables(saved) == sum(table.shards[0].path.stat().st_size for table in opened.tables.values())


def test_a_model_in_fp16_is_saved_as_ever_and_says_what_it_is_not(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half" / MEMORY).exists()
    with pytest.raises(ValueError, match="neither memory.json nor .* fp32 or bf16"):
        pack(tmp_path / "half", tmp_path / "out")


@pytest.mark.parametrize("shard_bytes", [None, 3000])
def test_a_packed_model_has_the_same_rows_and_weights(model, saved, tmp_path, shard_bytes):
    packed = pack(saved, tmp_path / "out", shard_bytes=shard_bytes).tables
    for layer in packed.tables:
        assert torch.equal(values_in(packed, layer), model.state_dict()[NAME.format(layer)])
    sealed.verify(tmp_path / "out")
    named = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    tables = {name for name in named if "memory.tables" in name}
    assert bool(tables) == (shard_bytes is None)
    if tables:  # still a checkpoint like any other
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_an_older_version_is_packed(model, older, tmp_path):
    with pytest.raises(ValueError, match="engrammar table pack"):
        open_tables(older)
    packed = pack(older, tmp_path / "out").tables
    assert torch.equal(values_in(packed, 1), model.state_dict()[NAME.format(1)])
    assert packed.tables[1].shards[0].crc32 is not None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_quantized_model_holds_its_rows_in_that_encoding(saved, tmp_path, encoding):
    (saved / "README.md").write_text("What a model.")
    made = quantize(saved, tmp_path / "out", encoding=encoding)
    before, after = open_tables(saved), made.tables
    assert after.encoding == encoding == after.memory.row_encoding and after.geometry == before.geometry
    for layer, error in made.errors.items():
        exact, found = values_in(before, layer), values_in(after, layer)
        scale = after.tables[layer].scale
        assert torch.equal(found, decode(encode(exact, encoding, scale), 6, encoding, torch.float32, scale))
        expected = ((exact - found).double().square().sum() / exact.double().square().sum()).sqrt()
        assert error.relative == pytest.approx(float(expected)) and error.relative < 0.1
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "backbone.safetensors").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["memory"]["row_encoding"] == encoding
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert (NAME.format(1) in index) == (encoding in ("fp32", "bf16"))
    sealed.verify(tmp_path / "out")


def test_decoded_rows_quantize_to_themselves(tmp_path):
    write_folder(tmp_path / "int4", "int4", shard_bytes=500)
    wide = quantize(tmp_path / "int4", tmp_path / "fp32", encoding="fp32").tables
    again = quantize(tmp_path / "fp32", tmp_path / "again", encoding="int4").tables
    assert torch.equal(values_in(wide, 3), values_in(again, 3))
    narrow = values_in(open_tables(tmp_path / "int4"), 3)
    assert torch.equal(values_in(again, 3), narrow)


def test_the_scale_of_an_fp8_table_is_kept_or_made_from_its_largest_value(tmp_path):
    given = write_folder(tmp_path / "fp8", "fp8")
    assert pack(tmp_path / "fp8", tmp_path / "packed").tables.tables[1].scale == SCALE
    assert torch.equal(values_in(open_tables(tmp_path / "packed"), 1), values_in(given, 1))
    write_folder(tmp_path / "bf16", "bf16")
    made = quantize(tmp_path / "bf16", tmp_path / "made", encoding="fp8").tables
    assert made.tables[1].scale == pytest.approx(float(values_of(tiny_memory(), 1).bfloat16().abs().max()) / 448)


def test_what_only_training_reads_stays_behind(saved, tmp_path):
    source = shutil.copytree(saved, tmp_path / "source")
    for name in ("optimizer.pt", "rng_state_0.pth", "memory.tables.1.optimizer.safetensors", "training_args.bin"):
        (source / name).write_bytes(b"x")
    (source / "tokenizer.json").write_bytes(b"x")
    pack(source, tmp_path / "out")
    names = set(os.listdir(tmp_path / "out"))
    assert "tokenizer.json" in names and not names & {"optimizer.pt", "rng_state_0.pth", "training_args.bin"}
    assert "memory.tables.1.optimizer.safetensors" not in names
    pack(source, tmp_path / "tables", tables_only=True)
    assert not {"config.json", "backbone.safetensors", INDEX} & set(os.listdir(tmp_path / "tables"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_no_numbers_are_named(saved, tmp_path, value):
    model = tiny_model("paper")
    with torch.no_grad():
        model.model.memory.tables["3"].weight[201, 4] = value
    model.save_pretrained(tmp_path / "broken")
    for convert in (pack, lambda source, out: quantize(source, out, encoding="fp8")):
        with pytest.raises(ValueError, match="Row 201 of table 3 .* holds NaN or infinity"):
            convert(tmp_path / "broken", tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["broken"]


def test_damage_is_never_packed_with_new_checksums(saved, tmp_path):
    source = shutil.copytree(saved, tmp_path / "source")
    path = source / "memory.tables.3.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tables.3.safetensors is damaged in bytes 12288 to .* rows 341 to 479"):
        quantize(source, tmp_path / "out", encoding="int8")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_full_disk_leaves_nothing_and_the_source_as_it_was(saved, tmp_path):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        for pages in (1, 5, 20, 60):
            mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(disk)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("needs the right to mount a tmpfs")
            with pytest.raises(OSError, match=r"could not be written \(No space left on device\); nothing was left"):
                pack(saved, disk / "out")
            assert not os.listdir(disk)
            subprocess.run(["umount", "-l", str(disk)], check=True)
    finally:
        if disk.is_mount():
            subprocess.run(["umount", "-l", str(disk)], check=True)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


def test_what_is_no_checkpoint_is_refused(older, tmp_path):
    for text in ("{}", "[]", '{"weight_map": 7}', '{"weight_map": {"model.memory.tables.1.weight": 7}}', "{"):
        (older / INDEX).write_text(text)
        with pytest.raises(ValueError) as caught:
            pack(older, tmp_path / "out")
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path):
    """96 MiB of rows are quantized within 16 MiB of what 12 MiB of rows take, in one process."""
    code = "from pathlib import Path; from engrammar.tables.convert import quantize\n"
    for rows in (4_000, 32_000):
        memory = tiny_memory(layers=(1,), rows_per_head=(rows, rows), num_heads=12, head_dim=32)
        write_folder(tmp_path / str(rows), "fp32", memory)
        source, out = str(tmp_path / str(rows)), str(tmp_path / f"{rows}-int8")
        code += f"quantize(Path({source!r}), Path({out!r}), encoding='int8')\n"
        code += "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large = (int(peak) * 1024 for peak in done.stdout.split())
    assert large - small < 16 * 2**20
