"""DeepSeek-V4.1's layout: synthetic files against plain loops and the released arithmetic."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engrammar.fusion import Fusion
from engrammar.tables.encodings import decode
from engrammar.tables.released.convert import FUSION, export_tables, import_tables, read_names
from engrammar.tables.released.deepseek import read_memory
from engrammar.tables.released.files import ReleasedModel
from released_models import (
    BRANCHES,
    GROUP,
    HIDDEN,
    change_settings,
    deepseek_release,
    deepseek_rows,
    deepseek_settings,
    files_of,
    load_all,
    rewrite,
    save_split,
    table_rows,
)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, rows_per_scale: int) -> torch.Tensor:
    """A plain loop: each fp8 number times 2^(its scale's byte - 127)."""
    exponents = scale.view(torch.uint8).tolist()
    out = weight.float()
    for row in range(out.shape[0]):
        for group, exponent in enumerate(exponents[row // rows_per_scale]):
            out[row, group * GROUP : (group + 1) * GROUP] *= 2.0 ** (exponent - 127)
    return out


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_deepseek_rows_decode_to_their_values_times_their_scales(tmp_path, scale_dtype):
    release = deepseek_release(tmp_path / "release", scale_dtype=scale_dtype)
    folder = import_tables(release, tmp_path / "tables")
    assert (folder.encoding, folder.num_ids, folder.memory.dead_ids) == ("fp8_scale32", 6, (4,))
    assert (folder.geometry.num_classes, folder.geometry.fill_class) == (5, 1)  # "a" and "A" are one class
    tensors = load_all(release)
    for layer in (1, 3):
        table, name = folder.tables[layer], f"layers.{layer}.engram.embed"
        decoded = decode(table_rows(folder, layer), table.width, table.encoding, torch.float32, table.scale)
        expected = dequantize(tensors[f"{name}.weight"], tensors[f"{name}.scale"], 1)
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize("fp8", [True, False])
def test_deepseek_export_gives_back_every_byte(tmp_path, fp8):
    release = deepseek_release(tmp_path / "release", fp8=fp8)
    import_tables(release, tmp_path / "tables")
    export_tables(tmp_path / "tables", release, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(release)


@torch.no_grad()
def test_split_product_gives_the_fused_products_output(tmp_path):
    """Their arithmetic: one product, keys first; the norms' weights count as a product alone."""
    release = deepseek_release(tmp_path / "release")
    folder = import_tables(release, tmp_path / "tables")
    tensors, ours = load_all(release), load_file(tmp_path / "tables" / FUSION)
    generator = torch.Generator().manual_seed(1)
    for layer in (1, 3):
        name = f"layers.{layer}.engram"
        wkv = dequantize(tensors[f"{name}.wkv.weight"], tensors[f"{name}.wkv.scale"], GROUP)
        q, k = tensors[f"{name}.q_weight"].float(), tensors[f"{name}.k_weight"].float()
        embedding = torch.randn(2, 7, wkv.shape[1], generator=generator)
        hidden = torch.randn(2, 7, BRANCHES, HIDDEN, generator=generator)
        key, value = (embedding @ wkv.T).split([BRANCHES * HIDDEN, HIDDEN], dim=-1)
        key = key.unflatten(-1, (BRANCHES, HIDDEN))
        rstd = torch.rsqrt(hidden.square().mean(-1) + 1e-6) * torch.rsqrt(key.square().mean(-1) + 1e-6)
        dot = (hidden * q * k * key).sum(-1) * rstd / HIDDEN**0.5
        gate = torch.sigmoid(dot.sign() * dot.abs().clamp_min(1e-6).sqrt())
        fusion = Fusion(folder.memory, hidden_size=HIDDEN, num_branches=BRANCHES)
        prefix = f"model.layers.{layer}.fusion."
        fusion.load_state_dict({n.removeprefix(prefix): t for n, t in ours.items() if n.startswith(prefix)})
        expected = gate[..., None] * value[..., None, :]
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(
            fusion(hidden, embedding), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item()
        )


def test_a_changed_product_is_quantized_again_where_it_changed_alone(tmp_path):
    release = deepseek_release(tmp_path / "release")
    import_tables(release, tmp_path / "tables")
    (tmp_path / "tables" / "manifest.json").unlink()  # it vouches for the weights that are about to change
    weights = load_file(tmp_path / "tables" / FUSION)
    name = "model.layers.1.fusion.projection.weight"
    weights[name][HIDDEN + 3, 5] = 1234.5  # row 3 of wkv: ours has the value's rows before the keys'
    save_file(weights, tmp_path / "tables" / FUSION)
    export_tables(tmp_path / "tables", release, tmp_path / "back")
    before, after = load_all(release), load_all(tmp_path / "back")
    wkv = [dequantize(t["layers.1.engram.wkv.weight"], t["layers.1.engram.wkv.scale"], GROUP) for t in (before, after)]
    assert abs(wkv[1][3, 5] - 1234.5) <= 1234.5 / 16
    wkv[0][:GROUP, :GROUP] = wkv[1][:GROUP, :GROUP] = 0
    assert torch.equal(*wkv)
    assert torch.equal(
        before["layers.3.engram.wkv.scale"].view(torch.uint8), after["layers.3.engram.wkv.scale"].view(torch.uint8)
    )


def test_the_release_has_the_geometry_of_the_reference(tmp_path, deepseek_v4, golden):
    """The settings of the released config.json and its tokenizer, against what vLLM's port gave for them."""
    reference = json.loads((golden / "deepseek_v41_geometry.json").read_text())
    release = deepseek_release(tmp_path / "release")
    shutil.copy(deepseek_v4 / "tokenizer.json", release)
    settings = {"engram_layer_ids": [1, 14], "engram_num_embeddings": [384_006_168, 384_016_682]}
    settings |= {"engram_vocab_size": 16_000_000, "engram_n_heads": 8, "engram_head_dim": 256}
    change_settings(release, **settings, engram_compressed_vocab_size=99_092)
    memory, geometry, num_ids, _ = read_memory(ReleasedModel(release))
    assert (num_ids, geometry.fill_class, memory.memory_dim) == (129_280, 2, 6144)
    for index, layer in enumerate(("1", "14")):
        assert list(geometry.multipliers[index]) == reference["multipliers"][layer]
        assert [list(sizes) for sizes in geometry.table_sizes[index]] == reference["table_sizes"][layer]


def test_other_names_can_be_given(tmp_path):
    release = deepseek_release(tmp_path / "release")
    tensors = {name.replace("engram.embed", "engram.table"): t for name, t in load_all(release).items()}
    for path in release.glob("*.safetensors"):
        path.unlink()
    save_split({f"model.{name}": t for name, t in tensors.items()}, release, 3)
    with pytest.raises(ValueError, match=r"holds \*\.layers\.1\.engram\.embed\.weight.*--names"):
        import_tables(release, tmp_path / "tables")
    path = tmp_path / "names.json"
    path.write_text('{"values": "layers.{layer}.engram.table.weight", "scales": "layers.{layer}.engram.table.scale"}')
    import_tables(release, tmp_path / "tables", read_names(path))
    export_tables(tmp_path / "tables", release, tmp_path / "back", read_names(path))
    assert files_of(tmp_path / "back") == files_of(release)
    with pytest.raises(ValueError, match="Names for shard are given; this layout has values, scales"):
        import_tables(release, tmp_path / "more", {"shard": "x"})
    with pytest.raises(ValueError, match="'x.{row}' for values has other braces"):
        import_tables(release, tmp_path / "more", {"values": "x.{row}"})
    path.write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object of names"):
        read_names(path)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (
            {"engram_compressed_vocab_size": 6},
            r"tokenizer.json has 5 classes of ids, .*config.json asks for 6.*: use the",
        ),
        ({"engram_vocab_size": 67}, r"config.json says engram_num_embeddings .* lead to .*: use the config.json"),
        (
            {"engram_vocab_size": 67, "engram_num_embeddings": deepseek_rows(deepseek_settings(engram_vocab_size=67))},
            r"holds .*embed.weight as F8_E4M3 .*: use the files",
        ),
        ({"engram_head_dim": 32}, r"safetensors holds layers.1.engram.embed.weight as F8_E4M3 \[\d+, 64\].*32\]: use"),
        (
            {"engram_pad_token_id": None},
            r"config.json should have an integer as engram_pad_token_id, not None: use",
        ),
    ],
)
def test_deepseek_faults_name_the_file_and_what_to_do(tmp_path, settings, names):
    release = deepseek_release(tmp_path / "release")
    change_settings(release, **settings)
    with pytest.raises(ValueError, match=names):
        import_tables(release, tmp_path / "tables")
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize("name", ["embed.scale", "wkv.scale", "wkv.weight", "q_weight"])
def test_deepseek_tensors_that_are_missing_are_named(tmp_path, name):
    release = deepseek_release(tmp_path / "release")
    rewrite(release, lambda tensors: tensors.pop(f"layers.3.engram.{name}"))
    with pytest.raises(ValueError, match=rf"holds \*\.layers\.3\.engram\.{name}: copy the missing file"):
        import_tables(release, tmp_path / "tables")
    (release / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json is missing.*copy it from the release"):
        import_tables(release, tmp_path / "tables")


MEASURE = """
import re, sys
from pathlib import Path
from engrammar.tables.released.convert import export_tables, import_tables
import transformers
release, out = map(Path, sys.argv[1:])
def kib(key):
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
def peak(run, *args):  # resident memory at its highest over what it was before (ru_maxrss would start at the parent's)
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    run(*args)
    return (kib("VmHWM") - before) / 1024
print(peak(import_tables, release, out / "tables"), peak(export_tables, out / "tables", release, out / "back"))
"""


@pytest.mark.slow
def test_import_and_export_of_300_mb_take_less_than_64_mb(tmp_path):
    release = deepseek_release(tmp_path / "release")
    settings = deepseek_settings(engram_layer_ids=[1], engram_vocab_size=48_000, engram_n_heads=8, engram_head_dim=256)
    (rows,) = settings["text_config"]["engram_num_embeddings"] = deepseek_rows(settings)
    generator = np.random.default_rng(0)
    name, width = "layers.1.engram", 3 * 8 * 256
    for path in release.glob("*.safetensors"):
        path.unlink()
    tensors = {
        f"{name}.wkv.weight": torch.zeros((BRANCHES + 1) * HIDDEN, width).to(torch.float8_e4m3fn),
        f"{name}.wkv.scale": torch.full((3, width // GROUP), 127, dtype=torch.uint8),
        f"{name}.q_weight": torch.ones(BRANCHES, HIDDEN),
        f"{name}.k_weight": torch.ones(BRANCHES, HIDDEN),
        f"{name}.embed.weight": torch.from_numpy(generator.integers(0, 127, (rows, 256), np.uint8)).view(
            torch.float8_e4m3fn
        ),
        f"{name}.embed.scale": torch.from_numpy(generator.integers(100, 125, (rows, 8), np.uint8)),
    }
    save_split(tensors, release, 1)
    (release / "config.json").write_text(json.dumps(settings))
    assert sum(path.stat().st_size for path in release.iterdir()) > 300e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, release, tmp_path], capture_output=True, text=True, check=True
    )
    imported, exported = map(float, done.stdout.split())
    assert imported < 64, f"import took {imported:.0f} MB"
    assert exported < 64, f"export took {exported:.0f} MB"
    before, after = load_all(release), load_all(tmp_path / "back")
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)
