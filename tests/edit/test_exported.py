"""Overlays for forks of llama.cpp, read back by the layout that their authors describe."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from attached_models import attached_model, tokenizer
from edited_models import WITH_MEMORY, model_of_kind, small_patch
from engrammar.edit import base_of, build_patch, export_overlay, replace_rows
from engrammar.edit.exported import q8_0
from engrammar.edit.solving import find_site


def qwen_patch(width: int = 160, size: float = 1.0):
    """A patch of five rows; only its class is that of Qwen's model."""
    model = attached_model("llama", {"layers": (1,), "head_dim": width})
    values_UC = torch.randn(5, width, generator=torch.Generator().manual_seed(0)) * size
    rows = replace_rows(find_site(model, None).memory, {1: (torch.tensor([3, 7, 11, 200, 390]), values_UC)})
    base = base_of(model, tokenizer())
    base = replace(base, model={**base.model, "class": "Qwen4ExpForCausalLM"})
    return build_patch("five", base, rows=rows, facts=[{"subject": "w3"}]), values_UC.numpy()


def test_pleo_is_numbers_then_values(tmp_path):
    patch, values_UC = qwen_patch()
    export_overlay(patch, tmp_path / "five.pleo")
    content = (tmp_path / "five.pleo").read_bytes()
    assert content[:4] == b"PLEO" and struct.unpack("<II", content[4:12]) == (5, 160)
    assert np.frombuffer(content[12:32], "<i4").tolist() == [3, 7, 11, 200, 390]
    assert np.array_equal(np.frombuffer(content[32:], "<f4").reshape(5, 160), values_UC)


@pytest.mark.parametrize(("kind", "number", "size"), [("Q8_0", 8, 170), ("F16", 1, 320), ("F32", 0, 640)])
def test_plepatch_is_a_header_a_manifest_and_rows_as_a_gguf_has_them(kind, number, size, tmp_path):
    patch, values_UC = qwen_patch()
    export_overlay(patch, tmp_path / "five.plepatch", gguf_type=kind)
    content = (tmp_path / "five.plepatch").read_bytes()
    assert content[:8] == b"PLEOVLY1" and struct.unpack_from("<H", content, 8) == (1,)
    assert struct.unpack_from("<I", content, 12) == (number,)
    width, row_size, num_rows, length, reserved = struct.unpack_from("<5Q", content, 16)
    assert (width, row_size, num_rows, reserved) == (160, size, 5, 0)
    assert content[56:128].rstrip(b"\0") == b"per_layer_token_embd.weight"
    assert json.loads(content[128 : 128 + length])["facts"] == [{"subject": "w3"}]
    records = content[128 + length :]
    assert len(records) == 5 * (8 + size)
    for place, row in enumerate([3, 7, 11, 200, 390]):
        record = records[place * (8 + size) : (place + 1) * (8 + size)]
        assert struct.unpack_from("<Q", record) == (row,)
        stored = np.frombuffer(record[8:], np.uint8)
        read_C = dequantize(stored, GGMLQuantizationType[kind]).reshape(-1)
        np.testing.assert_allclose(read_C, values_UC[place], rtol=1e-3, atol=0.02 if kind == "Q8_0" else 1e-3)


def test_q8_0_is_that_of_gguf_to_the_bit():
    values_UC = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    values_UC[3] = 0
    values_UC[4, :32] = np.arange(32) - 16  # halves
    assert np.array_equal(q8_0(values_UC), quantize(values_UC, GGMLQuantizationType.Q8_0))


def test_what_the_formats_cannot_hold_is_refused_and_no_file_is_left(tmp_path):
    model = model_of_kind(WITH_MEMORY)
    whole, narrow, large = qwen_patch()[0], qwen_patch(width=32)[0], qwen_patch(size=1e7)[0]
    other = replace(whole, base=replace(whole.base, model={**whole.base.model, "class": "LlamaForCausalLM"}))
    for patch, name, how, wrong in (
        (small_patch(model, "exact", (4,)), "a.pleo", {}, "has exact entries"),
        (other, "a.pleo", {}, "1 tables of a LlamaForCausalLM"),
        (narrow, "a.pleo", {}, "rows of 32 values"),
        (qwen_patch(width=40)[0], "a.plepatch", {}, "Q8_0 takes multiples of 32"),
        (large, "a.plepatch", {"gguf_type": "F16"}, "too large for F16"),
        (large, "a.plepatch", {}, "too large for Q8_0"),
        (whole, "a.plepatch", {"gguf_type": "Q4_0"}, "gguf_type is 'Q4_0'; allowed"),
        (whole, "a.plepatch", {"scale": 2.0}, "give the scale of an fp8 table, and of no other"),
        (whole, "a.gguf", {}, "allowed: .pleo, .plepatch"),
    ):
        with pytest.raises(ValueError, match=wrong):
            export_overlay(patch, tmp_path / name, **how)
    assert not list(tmp_path.iterdir())
