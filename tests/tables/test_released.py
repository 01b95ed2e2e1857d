"""Qwen's layout against transformers' own models: rows, addresses, logits, and every way in which files are wrong."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

from engrammar.addressing import hash_ngrams, look_back
from engrammar.tables.encodings import decode
from engrammar.tables.folder import open_tables
from engrammar.tables.released.convert import NAMES, export_tables, import_tables
from engrammar.tables.shards import INDEX
from engrammar_cli.main import main
from released_models import (
    END,
    VOCABULARY,
    change_settings,
    deepseek_release,
    embedding_of,
    files_of,
    load_all,
    qwen_model,
    qwen_release,
    rewrite,
    table_rows,
)

PLE = "model.layers.2.ple.ple_embedding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_imported_rows_are_the_models_rows_to_the_bit(tmp_path, dtype):
    model = qwen_model(dtype)
    for source in (qwen_release(model, tmp_path / "split"), tmp_path / "split-saved"):
        folder = import_tables(source, tmp_path / f"tables-{source.name}")
        assert folder.encoding == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        assert folder.num_ids == VOCABULARY
        for layer in (0, 2):
            expected = embedding_of(model, layer).ngram_embedding.weight.data
            assert torch.equal(table_rows(folder, layer), expected.view(torch.uint8))


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True])
def test_our_addresses_find_what_transformers_module_looks_up(tmp_path, fp8):
    model = qwen_model(torch.bfloat16)
    release = qwen_release(model, tmp_path / "release", fp8=fp8)
    import_tables(release, tmp_path / "tables")
    folder = open_tables(tmp_path / "tables")  # what the files say, not what the import remembers
    assert folder.memory.row_encoding == folder.encoding == ("fp8" if fp8 else "bf16")
    ids_BT = torch.randint(0, VOCABULARY, (3, 29))
    ids_BT[0, [0, 8, 9, -1]] = END
    looked_back = look_back(ids_BT, config=folder.memory, geometry=folder.geometry)
    for index, layer in enumerate(folder.memory.layers):
        rows_BTH = hash_ngrams(looked_back, config=folder.memory, geometry=folder.geometry, layer_index=index)
        table = folder.tables[layer]
        rows_US = table_rows(folder, layer)[rows_BTH.flatten()]
        ours = decode(rows_US, table.width, table.encoding, torch.bfloat16, table.scale)
        module = embedding_of(model, layer)
        if fp8:  # transformers' module has no scale: give it the rows that the fp8 files stand for
            stored = [
                part for name, part in sorted(load_all(release).items()) if f"{layer}.ple" in name and "shard_" in name
            ]
            scale = load_all(release)[f"model.layers.{layer}.ple.ple_embedding.ngram_embedding.weight_scale"]
            module.ngram_embedding.weight.copy_(torch.cat(stored).bfloat16() * scale)
            assert table.scale == scale.item()
        assert torch.equal(ours.view(3, 29, -1), module(ids_BT, None))


@pytest.mark.parametrize("fp8", [False, True])
def test_export_gives_back_every_byte(tmp_path, fp8):
    release = qwen_release(qwen_model(torch.bfloat16), tmp_path / "release", fp8=fp8)
    import_tables(release, tmp_path / "tables")
    export_tables(tmp_path / "tables", release, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(release)


def test_equal_scales_of_shards_are_one_scale(tmp_path):
    release = qwen_release(qwen_model(torch.bfloat16), tmp_path / "release", fp8=True)
    one = import_tables(release, tmp_path / "one")
    scale_each_shard(release, 1.0)
    each = import_tables(release, tmp_path / "each")
    assert each.tables[2].scale == one.tables[2].scale
    assert torch.equal(table_rows(each, 2), table_rows(one, 2))
    export_tables(tmp_path / "each", release, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(release)


@torch.no_grad()
def test_exported_tables_work_in_transformers(tmp_path):
    mine, other = qwen_model(torch.bfloat16, seed=0), qwen_model(torch.bfloat16, seed=1)
    import_tables(qwen_release(other, tmp_path / "other"), tmp_path / "tables")
    export_tables(tmp_path / "tables", qwen_release(mine, tmp_path / "mine"), tmp_path / "both")
    loaded = Qwen4ExpForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.bfloat16).eval()
    ids_BT = torch.randint(0, VOCABULARY, (2, 17))
    before = mine(ids_BT).logits
    for layer in (0, 2):
        weight = embedding_of(other, layer).ngram_embedding.weight
        embedding_of(mine, layer).ngram_embedding.weight.copy_(weight)
    assert torch.equal(loaded(ids_BT).logits, mine(ids_BT).logits)
    assert not torch.equal(before, mine(ids_BT).logits)


def test_the_names_are_those_that_transformers_writes(tmp_path):
    release = qwen_release(qwen_model(torch.bfloat16), tmp_path / "release")
    with safe_open(tmp_path / "release-saved" / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert release.is_dir()
    for key in ("shard", "multipliers", "sizes", "offsets"):
        assert f"model.{NAMES['qwen'][key].format(layer=2, shard=4)}" in saved


def file_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def drop_file(folder: Path) -> None:
    file_with(folder, f"{PLE}.ngram_embedding.shard_3.weight").unlink()


def drop_shard(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{PLE}.ngram_embedding.shard_3.weight"))


def drop_last_shard(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{PLE}.ngram_embedding.shard_4.weight"))


def narrow_shard(folder: Path) -> None:
    name = f"{PLE}.ngram_embedding.shard_3.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1]}))


def drop_scale(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{PLE}.ngram_embedding.weight_scale"))


def unlike_scales(folder: Path) -> None:
    scale_each_shard(folder, 2.0)


def scale_each_shard(folder: Path, last: float) -> None:
    """Gives each shard of the table a scale of its own, the last one's multiplied by `last`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors.pop(f"{PLE}.ngram_embedding.weight_scale")
        for n in range(5):
            tensors[f"{PLE}.ngram_embedding.shard_{n}.weight_scale"] = scale * (last if n == 4 else 1)

    rewrite(folder, change)


def cut_file(folder: Path) -> None:
    path = file_with(folder, f"{PLE}.ngram_embedding.shard_3.weight")
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    path = file_with(folder, f"{PLE}.ngram_embedding.shard_3.weight")
    path.write_bytes(path.read_bytes()[:100])


def other_vocabulary(folder: Path) -> None:
    change_settings(folder, vocab_size=VOCABULARY + 1)


def other_sizes(folder: Path) -> None:
    change_settings(folder, ngram_vocab_size_base=67)


def other_sizes_without_buffers(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if "ngram_heads" in name])
    change_settings(folder, ngram_vocab_size_base=67)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (drop_file, r"model-0000\d-of-00004.safetensors, which holds model.layers.*, is missing: copy it"),
        (drop_shard, r"release holds \*\.layers\.2\..*shard_3.weight: copy the missing file"),
        (drop_last_shard, r"shards of layer 2 end with .*shard_3.weight in .*safetensors .*: a shard is missing"),
        (narrow_shard, r"safetensors holds .*shard_3.weight as F8_E4M3 \[\d+, 6\].*\['any', 7\]: use the files"),
        (drop_scale, r"safetensors holds layer 2 as fp8, but .*layers.2.*weight_scale: copy the missing file"),
        (unlike_scales, r"safetensors holds .*shard_4.weight_scale = .*one scale.*: import the bf16 files"),
        (cut_file, r"safetensors is not right \(it has \d+ bytes, \d+ by its header\): copy it"),
        (cut_header, r"safetensors is not right \(its header should have \d+ bytes; it has \d+ in all\): copy it"),
        (other_vocabulary, r"safetensors holds .*layer_multipliers = .*config.json leads to .*: use the config.json"),
        (other_sizes, r"safetensors holds .*ngram_heads_vocab_sizes = .*config.json leads to .*: use the config.json"),
        (other_sizes_without_buffers, r"shards of layer 0 end with .* leads to \d+ rows of 7: a shard is missing, or"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_qwen_faults_name_the_file_and_what_to_do(tmp_path, damage, names):
    release = qwen_release(qwen_model(torch.bfloat16), tmp_path / "release", fp8=True)
    damage(release)
    with pytest.raises(ValueError, match=names):
        import_tables(release, tmp_path / "tables")
    assert not (tmp_path / "tables").exists()


def test_export_into_another_model_is_refused(tmp_path):
    bf16 = qwen_release(qwen_model(torch.bfloat16), tmp_path / "bf16")
    fp8 = qwen_release(qwen_model(torch.bfloat16), tmp_path / "fp8", fp8=True)
    import_tables(bf16, tmp_path / "tables")
    with pytest.raises(ValueError, match=r"differ in their encoding \(bf16 and fp8\): export into the model"):
        export_tables(tmp_path / "tables", fp8, tmp_path / "back")
    with pytest.raises(ValueError, match="differ in their layers"):
        export_tables(tmp_path / "tables", deepseek_release(tmp_path / "deepseek"), tmp_path / "back")
    (tmp_path / "back").mkdir()
    with pytest.raises(ValueError, match="back is there already, or is within .*: choose"):
        export_tables(tmp_path / "tables", bf16, tmp_path / "back")
    with pytest.raises(ValueError, match="or is within .*bf16: choose"):
        export_tables(tmp_path / "tables", bf16, bf16 / "back")
    with pytest.raises(ValueError, match="neither ple_layer_ids .* nor engram_layer_ids"):
        (bf16 / "config.json").write_text("{}")
        import_tables(bf16, tmp_path / "none")


def test_damaged_tables_are_not_exported(tmp_path):
    release = qwen_release(qwen_model(torch.bfloat16), tmp_path / "release")
    folder = import_tables(release, tmp_path / "tables")
    shard = folder.tables[2].shards[0]
    content = bytearray(shard.path.read_bytes())
    content[shard.start + 17] ^= 4
    shard.path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.path.name} is damaged"):
        export_tables(tmp_path / "tables", release, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_commands_import_and_export(tmp_path, capsys):
    release = qwen_release(qwen_model(torch.bfloat16), tmp_path / "release", fp8=True)
    tables, back = tmp_path / "tables", tmp_path / "back"
    main(["table", "import", str(release), str(tables)])
    assert "table 2: 320 rows of 7 values in fp8" in capsys.readouterr().out
    main(["table", "export", str(tables), str(release), str(back)])
    assert files_of(back) == files_of(release)
    with pytest.raises(SystemExit) as stop:
        main(["table", "export", str(tables), str(release), str(back)])
    assert stop.value.code == 2
    assert "back is there already" in capsys.readouterr().err


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
    release = qwen_release(qwen_model(torch.bfloat16), tmp_path / "release")
    import_tables(release, tmp_path / "tables")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"back could not be written \(No space left on device\), and nothing"):
        export_tables(tmp_path / "tables", release, tmp_path / "back")
    with pytest.raises(OSError, match="No space left on device"):
        import_tables(release, tmp_path / "more")
    assert {path.name for path in tmp_path.iterdir()} == {"release", "release-saved", "tables"}
