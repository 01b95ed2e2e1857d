"""Patches as vLLM gets them, without vLLM: replaced rows are, to the bit, those of a patch on a running model."""

import pytest
import torch

from engrammar import EngrammarForCausalLM
from engrammar.edit import apply_patch, read_patch, write_patch
from engrammar.serve.vllm.patches import read_offer, read_patches, replace_patched_rows
from models import VOCABULARY, tiny_model
from row_patches import write_patches


@torch.no_grad()
def test_patched_rows_are_those_of_a_running_model(tmp_path):
    folder = tmp_path / "model"
    tiny_model("paper").save_pretrained(folder)
    rows, entries = write_patches(folder, tmp_path)
    ids = torch.arange(3, VOCABULARY)[None]
    models = [EngrammarForCausalLM.from_pretrained(folder, memory=place) for place in ("ram", "disk", "ram")]
    base = models[0](ids).logits
    apply_patch(models[0], rows)
    replace_patched_rows(models[1].model.memory, read_patches([rows], self_test=False))
    replace_patched_rows(models[2].model.memory, read_patches([entries], self_test=True))
    assert torch.equal(models[1](ids).logits, models[0](ids).logits)
    assert torch.equal(models[2](ids).logits, base) and not torch.equal(models[1](ids).logits, base)


def test_patches_that_would_be_wrong_are_refused(tmp_path):
    tiny_model("paper").save_pretrained(tmp_path / "model")
    rows, entries = write_patches(tmp_path / "model", tmp_path)
    other = read_patch(rows)
    for delta in other.deltas.values():
        delta.stored_US[:] = 0
    write_patch(other, tmp_path / "other.safetensors")
    for given, self_test, said in (
        ([entries], False, "found out by the self-test: do not turn it off"),
        ([rows, tmp_path / "other.safetensors"], True, "change the same differently"),
    ):
        with pytest.raises(ValueError, match=said):
            read_patches(given, self_test=self_test)
    with pytest.raises(ValueError, match="Two patches are called 'entries'"):
        read_offer([entries], [entries])
    with pytest.raises(ValueError, match="which all requests read: it cannot be chosen"):
        read_offer([], [rows])
    with pytest.raises(ValueError, match="No patch 'other' can be chosen; patches for requests are: entries"):
        read_offer([rows], [entries]).stack(["other"])
    with pytest.raises(ValueError, match="replaces rows of tables, and this model has no memory"):
        replace_patched_rows(None, read_patches([rows], self_test=True))
