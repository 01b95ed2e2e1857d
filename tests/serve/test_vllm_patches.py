"""Rows of patches in front of a model's stores, as vLLM gets them: the same bits as a patch on a running model."""

import pytest
import torch

from engrammar import EngrammarForCausalLM
from engrammar.edit import apply_patch, read_patch, write_patch
from engrammar.serve.vllm.patches import replace_patched_rows
from models import VOCABULARY, tiny_model
from row_patches import write_patches


@torch.no_grad()
def test_patched_rows_are_those_of_a_running_model_and_other_patches_are_refused(tmp_path):
    folder = tmp_path / "model"
    tiny_model("paper").save_pretrained(folder)
    rows, entries = write_patches(folder, tmp_path)
    ids = torch.arange(3, VOCABULARY)[None]
    models = [EngrammarForCausalLM.from_pretrained(folder, memory=place) for place in ("ram", "disk", "ram")]
    base = models[0](ids).logits
    apply_patch(models[0], rows)
    replace_patched_rows(models[1].model.memory, [rows])
    replace_patched_rows(models[2].model.memory, [])
    assert torch.equal(models[1](ids).logits, models[0](ids).logits)
    assert torch.equal(models[2](ids).logits, base) and not torch.equal(models[1](ids).logits, base)
    other = read_patch(rows)
    for delta in other.deltas.values():
        delta.stored_US[:] = 0
    write_patch(other, tmp_path / "other.safetensors")
    for given, said in (
        ([entries], "adds to hidden states"),
        ([rows, tmp_path / "other.safetensors"], "change the same differently"),
    ):
        with pytest.raises(ValueError, match=said):
            replace_patched_rows(models[2].model.memory, given)
    assert torch.equal(models[2](ids).logits, base)
