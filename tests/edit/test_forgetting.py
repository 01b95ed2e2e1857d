"""A forgotten fact leaves nothing behind, and the others stay the same to the bit; patches are kept beside a model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attached_models import base_model, tokenizer
from edited_models import WITH_MEMORY
from engrammar.edit import (
    Fact,
    GatedSettings,
    answer,
    applied_patches,
    apply_patch,
    drop_patch,
    forget,
    keep_patch,
    kept_names,
    learn,
    phrasings_of,
    prove_forgotten,
    reached,
    says,
    undo_patch,
)
from engrammar.edit.files import patch_digest
from steerable_models import FACTS as IN_ROWS
from steerable_models import SETTINGS as ROW_SETTINGS
from steerable_models import steerable

ASKED = [("w3 w4", "w20"), ("w5 w6", "w21 w22"), ("w7 w8", "w20")]
FACTS = [Fact(subject=subject, prompt=f"w9 {subject} w10 w11", object=words) for subject, words in ASKED]
SETTINGS = GatedSettings(probe_depth=0.75, strength=30.0, num_worded=0)


@pytest.fixture(scope="module")
def llama():
    return base_model("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def patch(llama):
    return learn(llama, tokenizer(), FACTS, settings=SETTINGS).patch


def test_a_forgotten_fact_is_gone_and_the_others_are_as_they_were(llama, patch):
    prompts = [fact.prompt for fact in FACTS]
    plain = answer(llama, tokenizer(), prompts, 2)
    done = forget(patch, "w3 w4")
    proof = prove_forgotten(done, llama, tokenizer(), 2)
    assert proof.holds and len(proof.answered) == 20 and (proof.keys, proof.rows, proof.told) == (0, 0, [])
    assert done.facts == [FACTS[0]] and [row["subject"] for row in done.after.facts] == ["w5 w6", "w7 w8"]
    ids = tokenizer()([prompts[1], prompts[2]], return_tensors="pt").input_ids
    apply_patch(llama, patch, tokenizer())
    whole = llama(ids).logits
    undo_patch(llama)
    apply_patch(llama, done.after, tokenizer())
    assert torch.equal(llama(ids).logits, whole)
    left = answer(llama, tokenizer(), prompts, 2)
    undo_patch(llama)
    assert left[0] == plain[0] and says(left[1], "w21 w22") and says(left[2], "w20")


def test_a_proof_fails_where_the_fact_is_still_there(llama, patch):
    """The control: a patch that was not changed."""
    done = forget(patch, "w5 w6")
    unchanged = type(done)(facts=done.facts, before=patch, after=patch)
    proof = prove_forgotten(unchanged, llama, tokenizer(), 2)
    assert not proof.holds and proof.keys and proof.rows and proof.told


def test_nothing_is_proved_on_a_model_that_has_the_patch(llama, patch):
    """Every answer would be as it was, since it was already the fact's."""
    apply_patch(llama, patch, tokenizer())
    try:
        with pytest.raises(ValueError, match="is applied: undo it, since answers without it are needed"):
            prove_forgotten(forget(patch, "w3 w4"), llama, tokenizer(), 2)
    finally:
        undo_patch(llama)


def test_facts_without_a_prompt_stay(llama, patch):
    facts = [{**row, "prompt": None} if row["subject"] == "w7 w8" else row for row in patch.facts]
    facts = [{name: value for name, value in row.items() if value is not None} for row in facts]
    done = forget(replace(patch, facts=facts), "w3 w4")
    assert prove_forgotten(done, llama, tokenizer(), 2).holds


def test_forgotten_and_learned_again_is_a_fresh_edit(llama, patch):
    other = Fact(subject="w3 w4", prompt=FACTS[0].prompt, object="w25")
    again = learn(llama, tokenizer(), [other, *FACTS[1:]], settings=SETTINGS).patch
    rest, fresh = forget(patch, "w3 w4").after, forget(again, "w3 w4").after
    assert patch_digest(rest) == patch_digest(fresh)
    apply_patch(llama, again, tokenizer())
    assert says(answer(llama, tokenizer(), [other.prompt], 1)[0], "w25")
    undo_patch(llama)


def test_the_last_fact_leaves_no_patch_and_an_unknown_one_is_refused(llama, patch):
    one = learn(llama, tokenizer(), FACTS[:1], settings=SETTINGS).patch
    assert forget(one, "w3 w4", FACTS[0].prompt).after is None
    with pytest.raises(ValueError, match="holds no such fact about 'w30'; it is about 'w3 w4', 'w5 w6', 'w7 w8'"):
        forget(patch, "w30")


def test_twenty_phrasings_are_asked_and_those_that_reach_the_edit_are_told(llama, patch):
    asked = phrasings_of(FACTS[0])
    assert len(asked) == len(set(asked)) == 20 and asked[0] == FACTS[0].prompt
    before = reached(llama, tokenizer(), FACTS[0], patch)
    apply_patch(llama, patch, tokenizer())
    after = reached(llama, tokenizer(), FACTS[0], patch)
    undo_patch(llama)
    assert not before[FACTS[0].prompt] and after[FACTS[0].prompt]


def test_answers_begin_with_the_whole_object():
    assert says(" Rome, which", "Rome") and says("New York", "New York")
    assert not says("Romeo", "Rome") and not says("in Rome", "Rome")


def test_patches_are_kept_in_a_folder_and_dropped(patch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    keep_patch(patch, tmp_path)
    assert kept_names(tmp_path) == ["facts"]
    with pytest.raises(ValueError, match="holds a patch 'facts' already"):
        keep_patch(patch, tmp_path)
    drop_patch(tmp_path, "facts")
    assert kept_names(tmp_path) == [] and [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="holds no patch 'facts'; it holds none"):
        drop_patch(tmp_path, "facts")
    with pytest.raises(ValueError, match="is not a folder"):
        keep_patch(patch, tmp_path / "nowhere")


def test_a_fact_in_rows_of_its_own_is_forgotten_and_its_rows_are_back():
    model = steerable(WITH_MEMORY)
    patch, refused = learn(model, tokenizer(), IN_ROWS, method="rows", settings=ROW_SETTINGS)
    assert not refused
    prompts = [fact.prompt for fact in IN_ROWS]
    ids = [tokenizer()(prompt, return_tensors="pt").input_ids for prompt in prompts]
    plain = [model(one).logits for one in ids]
    alone, _ = learn(model, tokenizer(), IN_ROWS[1:], method="rows", settings=ROW_SETTINGS)
    with pytest.raises(ValueError, match="give the model and its tokenizer"):
        forget(patch, IN_ROWS[0].subject)
    done = forget(patch, IN_ROWS[0].subject, None, model, tokenizer())
    assert not applied_patches(model) and [*done.after.facts] == [*patch.facts][1:]
    (before,), (after,) = patch.deltas.values(), done.after.deltas.values()
    is_kept_U = np.isin(before.rows_U, after.rows_U)
    assert 0 < len(after.rows_U) < len(before.rows_U)
    assert np.array_equal(after.stored_US, before.stored_US[is_kept_U])
    assert [after.rows_U.tolist()] == [delta.rows_U.tolist() for delta in alone.deltas.values()]  # the twin
    proof = prove_forgotten(done, model, tokenizer(), 2)
    assert proof.holds and len(proof.answered) == 20
    apply_patch(model, patch, tokenizer())
    whole = model(ids[1]).logits
    undo_patch(model)
    apply_patch(model, done.after, tokenizer())
    assert torch.equal(model(ids[0]).logits, plain[0])
    assert torch.equal(model(ids[1]).logits, whole) and not torch.equal(whole, plain[1])
    undo_patch(model)
    unchanged = replace(done, after=patch)  # the control
    proof = prove_forgotten(unchanged, model, tokenizer(), 2)
    assert not proof.holds and proof.rows == len(before.rows_U) - len(after.rows_U) and proof.told
    last = forget(done.after, IN_ROWS[1].subject, None, model, tokenizer())
    assert last.after is None and prove_forgotten(last, model, tokenizer(), 2).holds


def test_rows_that_several_facts_read_are_not_taken_out():
    """Two subjects that end alike read the same rows; rows that no fact reads may be anyone's."""
    model = steerable(WITH_MEMORY)
    first, _ = learn(model, tokenizer(), IN_ROWS[:1], method="rows", settings=ROW_SETTINGS)
    alike = {"subject": "w6 w4 w5", "prompt": "w9 w6 w4 w5", "object": "w21"}
    both = replace(first, facts=[*first.facts, alike])
    for subject, other in (("w3 w4 w5", "w9 w6 w4 w5"), ("w6 w4 w5", "w9 w3 w4 w5")):
        with pytest.raises(ValueError, match=f"also read for '{other}': learn those again without it"):
            forget(both, subject, None, model, tokenizer())
    strange = replace(first, facts=[{**first.facts[0], "subject": "w6 w7 w8"}])
    with pytest.raises(ValueError, match="No subject of 'part' reads|No subject of 'facts' reads"):
        forget(strange, "w6 w7 w8", None, model, tokenizer())
    with pytest.raises(ValueError, match="is of a model with hidden_size|another|lacks"):
        forget(first, "w3 w4 w5", None, base_model("gpt2"), tokenizer())
    assert not applied_patches(model)
