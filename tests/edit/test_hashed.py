"""Facts in hashed rows: the patch gives exactly the rows that were found, other rows do not say them, undo is exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attached_models import random_ids, tokenizer
from edited_models import OURS, WITH_MEMORY, classes, model_of_kind
from engrammar.attach import detach, load_attached, save_attached
from engrammar.edit import Fact, RowSettings, apply_patch, base_of, build_patch, learn, replace_rows, undo_patch, uses
from engrammar.edit.asking import Asking
from engrammar.edit.hashed import SHORT
from engrammar.edit.optimizing import Texts
from engrammar.edit.solving import at_rows, find_site, fused, linearized, read_places
from engrammar.tables.encodings import decode
from steerable_models import FACTS, KINDS, SEEDS, SETTINGS, WIDTH, steerable


def says(model, fact: Fact) -> bool:
    ids = tokenizer()(fact.prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    return tokenizer().decode(made).startswith(fact.object)


def new_rows(patch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    values = {
        layer: decode(torch.from_numpy(delta.stored_US), patch.tables.width, patch.tables.encoding, torch.float32)
        for layer, delta in patch.deltas.items()
    }
    return {layer: (torch.from_numpy(patch.deltas[layer].rows_U), values[layer]) for layer in values}


@pytest.mark.parametrize(("kind", "by"), [(OURS, "solve"), (WITH_MEMORY, "solve"), (WITH_MEMORY, "gradient")])
def test_facts_in_rows_are_generated_and_undone(kind, by):
    model = steerable(kind)
    for seed in SEEDS:
        settings = replace(SETTINGS, by=by, seed=seed)
        patch, refused = learn(model, tokenizer(), FACTS, method="rows", settings=settings)
        if not refused:
            break
    assert not refused and not len(patch.entries) and not any(says(model, fact) for fact in FACTS)
    asked = tokenizer()(FACTS[0].prompt, return_tensors="pt").input_ids
    other = random_ids(2, 12) % 2 + 50  # n-grams of other words
    before = [model(ids).logits for ids in (asked, other)]
    apply_patch(model, patch, tokenizer())
    assert all(says(model, fact) for fact in FACTS)
    assert torch.equal(model(other).logits, before[1]) and not torch.equal(model(asked).logits, before[0])
    with_patch = model(asked).logits
    undo_patch(model, patch)
    assert torch.equal(model(asked).logits, before[0])
    memory = find_site(model, None).memory
    ((layer, (rows_U, values_UC)),) = new_rows(patch).items()
    with torch.no_grad():  # the twin: the same rows, written into the table itself
        memory.table(layer).weight[rows_U] = values_UC
    assert torch.equal(model(asked).logits, with_patch)
    read_U = uses(patch, [asked], classes(), memory).rows
    assert read_U and {row for _, row in read_U} <= set(rows_U.tolist())


@pytest.mark.parametrize("kind", [WITH_MEMORY])
def test_the_same_values_in_other_rows_do_not_say_it(kind):
    """The control: the new rows shuffled among themselves, and written elsewhere in the table."""
    model = steerable(kind)
    patch, _ = learn(model, tokenizer(), FACTS, method="rows", settings=SETTINGS)
    memory = find_site(model, None).memory
    ((layer, (rows_U, values_UC)),) = new_rows(patch).items()
    free_R = np.setdiff1d(np.arange(memory.table(layer).shape[0]), rows_U.numpy())[: len(rows_U)]
    for number, places_U in enumerate([rows_U.roll(1), torch.from_numpy(free_R)]):
        rows = replace_rows(memory, {layer: (places_U, values_UC)})
        apply_patch(model, build_patch(f"control{number}", base_of(model, tokenizer()), rows=rows), tokenizer())
        assert not all(says(model, fact) for fact in FACTS)
        undo_patch(model)


def test_the_gradient_goes_on_where_the_solve_ends():
    model = steerable(WITH_MEMORY)
    rough = replace(SETTINGS, rounds=1, ridge=3.0)  # so little of the vector is given that nothing is said
    with pytest.raises(ValueError, match="No fact can be learned"):
        learn(model, tokenizer(), FACTS[:1], method="rows", settings=rough)
    better = replace(rough, by="gradient", steps=90)
    patch, refused = learn(model, tokenizer(), FACTS[:1], method="rows", settings=better)
    assert not refused and len(patch.facts) == 1


def test_rows_that_others_changed_stay_as_those_want_them():
    """Two subjects that end alike share the rows of their last two words."""
    model = steerable(WITH_MEMORY)
    pair = [FACTS[0], Fact(subject="w6 w4 w5", prompt="w9 w6 w4 w5", object="w21")]
    first, _ = learn(model, tokenizer(), pair[:1], method="rows", settings=SETTINGS)
    both, refused = learn(model, tokenizer(), pair, method="rows", settings=SETTINGS)
    ((layer, (rows_U, values_UC)),) = new_rows(first).items()
    rows_of_both, values_of_both = new_rows(both)[layer]
    kept = torch.isin(rows_of_both, rows_U)
    assert not any(one.fact == pair[0] for one in refused)
    assert torch.equal(rows_of_both[kept], rows_U) and torch.equal(values_of_both[kept], values_UC)


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_by_rows_is_that_of_the_fusion(kind):
    """The twin: the whole fusion over whole texts, its outputs at the places by its rows there."""
    model = steerable(kind)
    site, made = find_site(model, None), Asking(model, tokenizer(), SETTINGS)
    subjects = made.subjects(FACTS)
    prompts = ["w10 w11 w12 w13 w14 w15 {}", "{} w30"]
    texts = [made.text(one.format(s.facts[0].prompt), "w20", s, 0, by_key=True) for s in subjects for one in prompts]
    read = Texts(model, texts, at_rows(site))
    values_KE = torch.randn(2, site.memory.config.memory_dim, generator=torch.Generator().manual_seed(0))
    given = []
    with site.fusion.register_forward_pre_hook(lambda _, args: given.append(args)):
        model(read.ids, attention_mask=read.mask, use_cache=False)
    hidden_BTMD, embedding_BTE, dead_BT = given[0][:3]
    at = (read.added.row, read.added.token + read.num_before)

    def gives(embedding_WE):
        return site.fusion(hidden_BTMD, embedding_BTE.index_put(at, embedding_WE), dead_BT)[at].flatten(1)

    embedding_WE = embedding_BTE[at] + values_KE[read.added.number]
    whole = torch.autograd.functional.jacobian(gives, embedding_WE)  # [W, M*D, W, E]
    own = torch.stack([whole[w, :, w] for w in range(len(embedding_WE))])
    places = read_places(read, site, values_KE)
    torch.testing.assert_close(fused(site.fusion, places).flatten(1), gives(embedding_WE), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linearized(site.fusion, places), own, rtol=1e-3, atol=1e-4)


def test_added_rows_are_read_as_rows_of_the_table_are():
    model = steerable(WITH_MEMORY)
    site = find_site(model, None)
    made = Asking(model, tokenizer(), SETTINGS)
    (subject,) = made.subjects(FACTS[:1])
    text = made.text(FACTS[0].prompt, "w20", subject, 0, by_key=True)
    read = Texts(model, [text], at_rows(site))
    added_E = torch.randn(site.memory.config.memory_dim, generator=torch.Generator().manual_seed(0))
    logits_KV = read.logits(added_E[None])
    ids = torch.tensor([text.ids])
    rows_H = site.memory.addresses(ids)[site.layer][0, text.written[0]]
    table = site.memory.table(site.layer).weight
    with torch.no_grad():
        table[rows_H] += added_E.view(len(rows_H), -1)
    torch.testing.assert_close(logits_KV, model(ids).logits[0, list(text.scored)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "facts", "settings", "wrong"),
    [
        ("llama", FACTS, {}, "This model has 0 memories"),
        (WITH_MEMORY, FACTS, {"layer": 0}, "layer is 0; allowed: the memory's, "),
        (WITH_MEMORY, [Fact(subject="w3", prompt="w9 w3", object="w20")], {}, f"No fact can be learned: {SHORT}"),
    ],
)
def test_what_has_no_rows_is_refused_in_one_sentence(kind, facts, settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        learn(model_of_kind(kind), tokenizer(), facts, method="rows", settings=replace(SETTINGS, **settings))


def test_rows_are_not_learned_on_top_of_patched_rows():
    model = steerable(WITH_MEMORY)
    memory = find_site(model, None).memory
    rows = {memory.config.layers[0]: (torch.tensor([1]), torch.ones(1, WIDTH))}
    apply_patch(model, build_patch("one", base_of(model, tokenizer()), rows=replace_rows(memory, rows)), tokenizer())
    with pytest.raises(ValueError, match="Patches that replace rows are applied"):
        learn(model, tokenizer(), FACTS, method="rows", settings=SETTINGS)
    with pytest.raises(ValueError, match="by is 'magic'; allowed: gradient, solve"):
        RowSettings(by="magic")


def test_rows_of_a_table_on_a_disk_are_learned_as_those_of_a_parameter(tmp_path):
    model = steerable(WITH_MEMORY)
    patch, _ = learn(model, tokenizer(), FACTS[:1], method="rows", settings=SETTINGS)
    save_attached(model, tmp_path / "adapter")
    load_attached(detach(model), tmp_path / "adapter", tokenizer(), memory="disk")
    served, refused = learn(model, tokenizer(), FACTS[:1], method="rows", settings=SETTINGS)
    ((layer, (rows_U, values_UC)),) = new_rows(patch).items()
    rows_of_served, values_of_served = new_rows(served)[layer]
    assert not refused and torch.equal(rows_of_served, rows_U) and torch.equal(values_of_served, values_UC)
    assert not says(model, FACTS[0])
    apply_patch(model, served, tokenizer())
    assert says(model, FACTS[0])
