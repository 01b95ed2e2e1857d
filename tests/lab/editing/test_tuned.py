"""Fine-tuning and LoRA teach facts, keep to their bounds, and are taken back to the bit."""

from dataclasses import replace

import pytest
import torch

from attached_models import random_ids, tokenizer
from engrammar_lab.editing.tuned import LoraSettings, TuneSettings, divergence, fine_tune, held_prompts, low_rank
from taught_facts import FACTS, all_bits, says, strong_model

TUNE = TuneSettings(block=1, lr=5e-3, steps=120, batch=3)
LORA = LoraSettings(rank=3, lr=5e-2, steps=120, batch=3, num_held=20, held_batch=7)


@pytest.mark.parametrize(("way", "settings"), [(fine_tune, TUNE), (low_rank, LORA)])
def test_facts_are_learned_and_taken_back_to_the_bit(way, settings):
    model = strong_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    ids, before, modules = random_ids(2, 9), all_bits(model), [type(one) for one in model.modules()]
    logits = model(ids).logits
    assert not any(says(model, fact) for fact in FACTS)
    edited = way(model, tokenizer(), FACTS, 0, settings)
    assert sum(says(model, fact) for fact in FACTS) >= 3 and not edited.refused
    assert not torch.equal(model(ids).logits, logits)
    assert [type(one) for one in model.modules()] == modules and not model.training
    assert not hasattr(model, "peft_config")
    edited.undo()
    assert all(torch.equal(one, other) for one, other in zip(all_bits(model), before))
    assert torch.equal(model(ids).logits, logits)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_kept_is_counted():
    model = strong_model()
    assert fine_tune(model, tokenizer(), FACTS, 0, replace(TUNE, steps=1)).num_bytes == 4 * 32 * 48
    made = low_rank(model, tokenizer(), FACTS, 0, replace(LORA, steps=1))
    assert made.num_bytes == 4 * 4 * 2 * 3 * (32 + 48)  # four blocks, two layers each, of rank three


def test_fine_tuning_changes_one_weight_and_equals_a_plain_loop():
    model, plain = strong_model(), strong_model()
    one = replace(TUNE, steps=3, batch=9, stop=0.0)
    fine_tune(model, tokenizer(), FACTS[:1], 0, one)
    weight = plain.model.layers[1].mlp.down_proj.weight
    optimizer = torch.optim.Adam([weight], lr=one.lr)
    for _ in range(3):
        ids = tokenizer()(f"{FACTS[0].prompt} {FACTS[0].object}", return_tensors="pt").input_ids
        logits = plain(ids[:, :-1]).logits[0, -1:]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, ids[0, -1:]).backward()
        optimizer.step()
    changed = [
        name for (name, a), b in zip(model.named_parameters(), all_bits(strong_model())) if not torch.equal(a, b)
    ]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight, weight, atol=1e-4, rtol=1e-3)


def test_a_bound_holds_and_without_one_it_is_passed():
    moved = {}
    for most in (0.004, None):
        model, before = strong_model(), strong_model().model.layers[1].mlp.down_proj.weight
        fine_tune(model, tokenizer(), FACTS, 0, replace(TUNE, steps=8, stop=0.0, most=most))
        moved[most] = float((model.model.layers[1].mlp.down_proj.weight - before).abs().max())
    assert moved[0.004] <= 0.004 + 1e-6 < moved[None]


def test_held_prompts_are_held():
    far = {}
    for kl in (0.0, 5.0):
        model = strong_model()
        held = held_prompts(FACTS, LORA.num_held, 0)
        batch = tokenizer()(held[0], return_tensors="pt").input_ids
        expected = model(batch).logits[0].log_softmax(-1).detach()
        low_rank(model, tokenizer(), FACTS, 0, replace(LORA, kl=kl, stop=0.0, steps=40))
        far[kl] = float(divergence(expected, model(batch).logits[0]))
    assert far[5.0] < far[0.0]


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="targets are nowhere"):
        low_rank(strong_model(), tokenizer(), FACTS, 0, replace(LORA, targets=("nowhere",)))
    with pytest.raises(ValueError, match="block is 4"):
        fine_tune(strong_model(), tokenizer(), FACTS, 0, replace(TUNE, block=4))
