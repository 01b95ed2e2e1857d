"""GRACE: entries are made, widened and narrowed as the paper says; facts are answered, all else is left alone."""

from dataclasses import replace

import pytest
import torch

from attached_models import random_ids, tokenizer
from engrammar_lab.editing.codebook import ALONE, Codebook, CodebookSettings, codebook
from taught_facts import FACTS, all_bits, says, strong_model

SETTINGS = CodebookSettings(block=2, radius=0.05, values=replace(ALONE, steps=60, most=8.0, together=3))


def test_facts_are_answered_from_a_cache_and_taken_back():
    model = strong_model()
    ids, before = random_ids(2, 9), all_bits(model)
    logits = model(ids).logits
    assert not any(says(model, fact) for fact in FACTS)
    edited = codebook(model, tokenizer(), FACTS, 0, SETTINGS)
    assert sum(says(model, fact) for fact in FACTS) >= 3
    assert edited.num_bytes == 4 * len(FACTS) * (32 + 32 + 1)
    assert torch.equal(model(ids).logits, logits)  # deferral
    edited.undo()
    assert not any(says(model, fact) for fact in FACTS)
    assert all(torch.equal(one, bits) for one, bits in zip(model.parameters(), before))


def test_a_radius_that_takes_in_everything_changes_everything():
    model, ids = strong_model(), random_ids(2, 9)
    logits = model(ids).logits
    edited = codebook(model, tokenizer(), FACTS[:1], 0, replace(SETTINGS, radius=1e3))
    assert not torch.equal(model(ids).logits, logits)
    edited.undo()
    assert torch.equal(model(ids).logits, logits)


def test_padding_and_a_cache_answer_as_one_pass_does():
    model = strong_model()
    codebook(model, tokenizer(), FACTS, 0, SETTINGS)
    ids = tokenizer()(FACTS[1].prompt, return_tensors="pt").input_ids
    alone = model(ids).logits[0, -1]
    longer = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0, 0] + [1] * ids.shape[1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with_padding = model(longer, attention_mask=mask, position_ids=positions).logits[0, -1]
    torch.testing.assert_close(with_padding, alone, atol=1e-3, rtol=1e-3)
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits[0, -1], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("place", "label", "radii"),
    [(5.0, "b", [1.0, 1.0]), (1.5, "a", [1.5]), (1.5, "b", [0.75, 0.75]), (0.5, "a", [1.0])],
)
def test_entries_are_new_widened_or_narrowed(place, label, radii):
    made = Codebook(3, torch.device("cpu"))
    made.learn(torch.zeros(3), torch.ones(3), "a", 1.0)
    made.learn(torch.tensor([place, 0, 0]), torch.full((3,), 2.0), label, 1.0)
    assert made.radius_E.tolist() == pytest.approx(radii, rel=2e-3) and len(made.labels) == len(radii)
    asked, own = torch.tensor([[[place, 0, 0], [0, 0.1, 0], [0, 0, 9.0]]]), torch.zeros(1, 3, 3)
    expected = [2.0 if len(radii) == 2 else 1.0, 1.0, 0.0]
    assert made.replace(torch.nn.Identity(), (asked,), own)[0, :, 0].tolist() == expected


def test_without_entries_nothing_is_replaced():
    output = torch.randn(2, 3, 4)
    assert Codebook(4, torch.device("cpu")).replace(torch.nn.Identity(), (output,), output) is output
