"""A base whose weights accelerate keeps in RAM or on disk until a module runs is treated as one that is whole."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from attached_models import attached_model, base_model, memory_config, random_ids, randomize, tokenizer
from edited_models import rich_patch, spoken_ids
from engrammar.attach import attach, detach, fill_rows, keep_prefix, load_attached, save_attached
from engrammar.attach.blocks import find_decoder
from engrammar.attach.fingerprints import fingerprint_of
from engrammar.edit import GatedSettings, VectorSettings, apply_patch, learn, undo_patch
from taught_facts import FACTS, strong_model

FAMILIES = ["llama", "gpt2"]  # gpt2's head is its embedding


def offloaded(model, kind, folder):
    """A copy of a model that has its weights elsewhere; they compute on the CPU, since any machine has one."""
    moved = copy.deepcopy(model)
    if kind == "ram":
        cpu_offload(moved, execution_device=torch.device("cpu"))
    else:
        disk_offload(moved, folder / "offloaded", execution_device=torch.device("cpu"))
    assert next(moved.parameters()).is_meta
    return moved


@torch.no_grad()
def logits_of(model, ids=None):
    return model(input_ids=random_ids(2, 13) if ids is None else ids).logits


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_is_attached_trained_and_taken_away(family, kind, tmp_path):
    base = base_model(family)
    whole, moved = copy.deepcopy(base), offloaded(base, kind, tmp_path)
    steps = []
    for model in (whole, moved):
        attach(model, memory_config(), tokenizer())
        assert torch.equal(logits_of(model), logits_of(base))
        randomize(model)
        model(input_ids=random_ids(2, 13), labels=random_ids(2, 13)).loss.backward()
        steps.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.equal(logits_of(moved), logits_of(whole)) and not torch.equal(logits_of(moved), logits_of(base))
    assert len(steps[0]) == len(steps[1]) > 0
    for one, other in zip(*steps):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(ValueError, match="accelerate's dispatch"):
        keep_prefix(moved, [{"input_ids": ids} for ids in random_ids(2, 13)], tmp_path / "prefix")
    detach(moved)
    assert torch.equal(logits_of(moved), logits_of(base))


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_adapter_is_that_of_the_whole_model_and_fits_no_other(family, kind, tmp_path):
    model = attached_model(family)
    save_attached(model, tmp_path / "adapter")
    moved = offloaded(base_model(family), kind, tmp_path)
    assert fingerprint_of(find_decoder(moved)) == fingerprint_of(find_decoder(model))
    load_attached(moved, tmp_path / "adapter", tokenizer())
    assert torch.equal(logits_of(moved), logits_of(model))
    save_attached(moved, tmp_path / "again")
    load_attached(base_model(family), tmp_path / "again", tokenizer())
    other = base_model(family)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    with pytest.raises(ValueError, match="is of a model with another"):
        load_attached(offloaded(other, kind, tmp_path / "other"), tmp_path / "again", tokenizer())


@pytest.mark.parametrize("how", ["embeddings", "hidden"])
def test_rows_are_filled_from_it(how, tmp_path):
    tables = []
    for model in (base_model("llama"), offloaded(base_model("llama"), "ram", tmp_path)):
        torch.manual_seed(0)
        attach(model, memory_config(), tokenizer())
        items = [{"input_ids": ids} for ids in random_ids(8, 20).tolist()]
        fill_rows(model, items, how=how)
        tables.append([weight for name, weight in model.named_parameters() if ".tables." in name])
    assert tables[0] and all(torch.equal(one, other) and one.any() for one, other in zip(*tables))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gated", GatedSettings(probe_depth=0.75, strength=30.0)),
        ("vector", VectorSettings(depth=1.0, most=40.0, num_paraphrases=1)),
    ],
)
def test_facts_are_learned_as_in_the_whole_model(method, settings, tmp_path):
    whole = strong_model().requires_grad_(False)
    moved = offloaded(whole, "ram", tmp_path)
    patches = [
        learn(model, tokenizer(), FACTS, name="three", method=method, settings=settings)[0] for model in (whole, moved)
    ]
    assert torch.equal(*(torch.from_numpy(patch.values) for patch in patches))


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_applied_and_undone(family, tmp_path):
    whole, ids = base_model(family).requires_grad_(False), spoken_ids(3, 24)
    moved = offloaded(whole, "disk", tmp_path)
    patch, before = rich_patch(whole), logits_of(whole, ids)
    apply_patch(whole, patch, tokenizer())
    apply_patch(moved, patch, tokenizer())
    assert torch.equal(logits_of(moved, ids), logits_of(whole, ids))
    assert not torch.equal(logits_of(moved, ids), before)
    undo_patch(moved, "rich")
    assert torch.equal(logits_of(moved, ids), before)
