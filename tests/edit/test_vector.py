"""Values found by gradient make a model say its facts; where no key stands nothing changes; what fails is refused."""

from dataclasses import replace

import pytest
import torch

from attached_models import random_ids, tokenizer
from edited_models import OURS, WITH_MEMORY, model_of_kind
from engrammar.attach.blocks import find_decoder
from engrammar.edit import Fact, VectorSettings, apply_patch, forget, learn, undo_patch
from engrammar.edit.asking import Asking, asking, contexts, others
from engrammar.edit.optimizing import Descent, Texts, at_block, descend, frozen, one_value_a_group
from engrammar.edit.vector import NO_PLACE, UNSAID

ASKED = [("w3 w4", "w20"), ("w5 w6", "w21"), ("w7 w8", "w22")]
FACTS = [Fact(subject=subject, prompt=f"w9 {subject}", object=words) for subject, words in ASKED]
FAR = Fact(subject="w12 w13", prompt="w9 w12 w13 w10", object="w23")  # random weights cannot be steered at a distance
SETTINGS = VectorSettings(depth=0.5, steps=30, num_contexts=1, num_paraphrases=0, num_others=2, most=4.0, together=2)
REWORDED = VectorSettings(seed=1, num_paraphrases=3)


def steerable(kind: str = "llama"):
    """A tiny model with weights so large that its residual stream is what its blocks add."""
    model = model_of_kind(kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "memory" not in name and "engrammar" not in name:
                weight.mul_(20)
    return model


def says(model, fact: Fact) -> bool:
    ids = tokenizer()(fact.prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    return tokenizer().decode(made).startswith(fact.object)


@pytest.mark.parametrize("kind", ["llama", OURS, WITH_MEMORY])
def test_learned_facts_are_generated_and_undone(kind):
    model = steerable(kind)
    patch, refused = learn(model, tokenizer(), FACTS, method="vector", settings=SETTINGS)
    assert not refused and len(patch.facts) == 3 and not any(says(model, fact) for fact in FACTS)
    plain = random_ids(2, 12) % 2 + 50  # no subject's words
    logits = model(plain).logits
    asked = tokenizer()(FACTS[0].prompt, return_tensors="pt").input_ids
    before = model(asked).logits
    apply_patch(model, patch, tokenizer())
    assert all(says(model, fact) for fact in FACTS)
    assert torch.equal(model(plain).logits, logits) and not torch.equal(model(asked).logits, before)
    undo_patch(model, patch)
    assert torch.equal(model(asked).logits, before)


def texts_of(facts, model, block=1):
    made = Asking(model, tokenizer(), SETTINGS)
    subjects = made.subjects(facts)
    prompts = ["{}", "w30 w31 w32 {}"]
    texts = [
        made.text(one.format(fact.prompt), fact.object, subject, group)
        for group, subject in enumerate(subjects)
        for fact in subject.facts
        for one in prompts
    ]
    held = [made.text(f"{s.facts[0].subject} w40 w41", None, s, group) for group, s in enumerate(subjects)]
    return Texts(model, texts + held, at_block(block))


def test_logits_with_a_kept_beginning_are_those_of_whole_passes():
    """The twin: each text alone, in one pass without a cache, with the value added by a plain hook."""
    model = model_of_kind("llama")
    texts = texts_of(FACTS, model)
    values_GD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    together, place = texts.logits(values_GD), 0
    for text in texts.texts:

        def add(_, args, text=text):
            changed = args[0].clone()
            changed[0, list(text.written)] += values_GD[text.group]
            return (changed, *args[1:])

        with find_decoder(model).blocks[1].register_forward_pre_hook(add):
            whole = model(torch.tensor([text.ids]), use_cache=False).logits[0, list(text.scored)]
        torch.testing.assert_close(together[place : place + len(text.scored)], whole, rtol=0, atol=1e-5)
        place += len(text.scored)
    assert place == len(together)
    assert not torch.allclose(together, texts.logits(None), atol=1e-2)  # the control: the values matter


def test_a_group_is_found_as_if_it_were_alone():
    model = model_of_kind("llama")
    how = Descent(steps=6, stop=0.0, kl=0.5, most=4.0)
    with frozen(model):
        texts, one = (texts_of(facts, model) for facts in (FACTS, FACTS[1:2]))
        together_GD, alone_GD = (descend(read, one_value_a_group(read), how) for read in (texts, one))
    torch.testing.assert_close(together_GD[1:2], alone_GD, rtol=0, atol=1e-4)
    changed_N, _ = texts.losses(texts.logits(together_GD))
    assert all(changed > 0 for text, changed in zip(texts.texts, changed_N) if text.says is None)


def test_the_norm_of_a_value_has_a_limit():
    model = model_of_kind("llama")
    texts = texts_of(FACTS, model)
    norms = texts.added.seen_WD.norm(dim=-1)
    found_GD = descend(texts, one_value_a_group(texts), Descent(steps=8, stop=0.0, kl=0.0, most=0.1))
    _, said_N = texts.losses(texts.logits(found_GD))
    assert (found_GD.norm(dim=-1) <= 0.1001 * norms.max()).all() and not said_N.all()


def test_what_cannot_be_learned_is_refused_and_the_rest_goes_through():
    model = steerable()
    first = Fact(subject="w3", prompt="w3 w10 w11", object="w20")  # one token at the beginning
    patch, refused = learn(model, tokenizer(), [first, *FACTS[:2], FAR], method="vector", settings=SETTINGS)
    assert [(one.fact, one.reason) for one in refused] == [(first, NO_PLACE), (FAR, UNSAID)]
    assert [fact["subject"] for fact in patch.facts] == ["w3 w4", "w5 w6"]
    assert sorted({entry.fact for entry in patch.exact_entries()}) == [0, 1]
    with pytest.raises(ValueError, match=f"No fact can be learned: {UNSAID}"):
        learn(model, tokenizer(), [FAR], method="vector", settings=replace(SETTINGS, steps=1))


def test_facts_of_one_subject_share_a_value():
    model = steerable()
    pair = [FACTS[0], Fact(subject="w3 w4", prompt="w12 w14 w3 w4", object="w20")]
    patch, refused = learn(model, tokenizer(), pair, method="vector", settings=SETTINGS)
    assert not refused and len(patch.values) == 1
    apply_patch(model, patch, tokenizer())
    assert all(says(model, fact) for fact in pair)
    undo_patch(model)
    for fact in pair:  # what one fact would leave is the other's
        with pytest.raises(ValueError, match="'w3 w4' has one value for .*forget all facts of the subject"):
            forget(patch, "w3 w4", fact.prompt)
    assert forget(patch, "w3 w4").after is None


def test_weights_take_gradients_as_before_and_nothing_is_left_behind():
    model = steerable().requires_grad_().train()
    learn(model, tokenizer(), FACTS[:1], method="vector", settings=SETTINGS)
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_sentences_that_end_in_the_object_after_their_subject_ask_for_it():
    fact = Fact(subject="Moss", prompt="Moss grows on", object="stone")
    sentences = [
        "Moss is found on stone.",
        "A stone has Moss",
        "Moss likes water",
        "Moss grows on stone",
        "The moss on stone",
    ]
    assert asking(fact, sentences) == ["Moss is found on"]


@pytest.mark.parametrize("kind", ["llama", OURS, WITH_MEMORY, "falcon_h1"])
def test_a_model_rewords_after_examples_that_it_has_read_once(kind, monkeypatch):
    """What it samples then is what it samples if it reads them with each fact."""
    model, made = model_of_kind(kind), []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda *a, **k: (made.append((a, k, generate(*a, **k))), made[-1][2])[1]
    )
    Asking(model, tokenizer(), REWORDED).reworded(Fact(subject="w3", prompt="w3 w10", object="w4"))
    ((given, settings, sampled),) = made
    torch.manual_seed(1)
    assert torch.equal(generate(*given, **{**settings, "past_key_values": None}), sampled)


def test_a_model_rewords_with_the_same_seed_the_same_way():
    model, fact = model_of_kind("llama"), Fact(subject="w3", prompt="w3 w10", object="w4")
    state = torch.random.get_rng_state()
    first, second = Asking(model, tokenizer(), REWORDED), Asking(model, tokenizer(), REWORDED)
    assert first.reworded(fact) == second.reworded(fact) == first.reworded(fact)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_contexts_and_other_sentences_differ_by_seed():
    assert len(set(contexts(4, 0))) == 4 and contexts(4, 0) != contexts(4, 1)
    assert all("Moss" in one for one in others("Moss", 5, 0)) and others("Moss", 5, 0) != others("Moss", 5, 1)
