"""A forgotten fact leaves nothing behind, and the others stay the same to the bit; patches are kept beside a model."""

import pytest
import torch

from attached_models import base_model, tokenizer
from engrammar.edit import (
    Fact,
    GatedSettings,
    answer,
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

ASKED = [("w3 w4", "w20"), ("w5 w6", "w21 w22"), ("w7 w8", "w20")]
FACTS = [Fact(subject=subject, prompt=f"w9 {subject} w10 w11", object=words) for subject, words in ASKED]
SETTINGS = GatedSettings(probe_depth=0.75, strength=30.0)


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
