"""Facts are asked as sentences, as questions and in a chat: each form has a probe of its own, and writes the object."""

from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attached_models import base_model, tokenizer
from engrammar.edit import Fact, GatedSettings, apply_patch, learn, undo_patch, without_patches
from engrammar.edit.forms import forms_of, in_chat, is_question, reworded
from engrammar.edit.phrasings import RELATIONS, Relation

TEMPLATE = "w24 w25 {{ messages[0].content }} w26 {% if add_generation_prompt %}w27 w28{% endif %}"
SETTINGS = GatedSettings(probe_depth=0.75, strength=30.0, match_above=9.0, num_worded=0)
ASKED = [("w3 w4", "w20"), ("w5 w6", "w21 w22"), ("w7 w8", "w23")]
FACTS = [Fact(subject=subject, prompt=f"w9 {subject} w10 w11 ?", object=words) for subject, words in ASKED]


def asking_tokenizer(template=None):
    """The tiny models' words, with a question mark in place of one of them."""
    vocabulary = tokenizer().get_vocab()
    vocabulary["?"] = vocabulary.pop("W28")
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="W0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def chatting():
    return asking_tokenizer(TEMPLATE)


@pytest.fixture
def llama():
    return base_model("llama").requires_grad_(False)


def continued(model, prompt, num):
    made = asking_tokenizer()
    ids = made(prompt, return_tensors="pt").input_ids
    return made.decode(model.generate(ids, max_new_tokens=num, do_sample=False)[0, ids.shape[1] :])


def test_a_question_is_learned_in_a_chat_too(llama, chatting):
    patch, refused = learn(llama, chatting, FACTS, settings=SETTINGS)
    assert not refused
    names = {"w9 {} w10 w11 ?", "w9 {} w10 w11 ? (chat)"}
    assert names <= set(patch.probe_names)
    is_chat = [patch.probe_names[probe].endswith("(chat)") for probe in patch.column("probe").tolist()]
    armed = set(zip(is_chat, patch.column("armed").tolist()))
    assert armed == {(False, SETTINGS.armed), (True, SETTINGS.armed + 3)}  # w26 w27 w28 follow on a question

    apply_patch(llama, patch, chatting)
    for fact in FACTS:
        for prompt in (fact.prompt, in_chat(chatting, fact.prompt)):
            assert continued(llama, prompt, 2).startswith(fact.object)
            with without_patches(llama):
                assert not continued(llama, prompt, 2).startswith(fact.object)


def test_without_a_template_nothing_is_learned_for_a_chat(llama):
    patch, _ = learn(llama, asking_tokenizer(), FACTS, settings=SETTINGS)
    assert [form.name for form in forms_of(asking_tokenizer())] == ["sentence", "question"]
    assert not any(name.endswith("(chat)") for name in patch.probe_names)


def test_a_sentence_is_learned_as_its_relation_is_asked(llama, chatting, monkeypatch):
    """The relation's own question, of which the fact says nothing, is answered; not if its relation is not known."""
    asked = Relation(kinds="plt", phrasings=("w9 {} w10 w11", "w12 {} w10 w11", "w13 {} w14 ?"))
    pairs = ((1, 2), (15, 16), (17, 18), (19, 29), (16, 1), (18, 15), (29, 17))
    rest = tuple(
        Relation(kinds="plt", phrasings=(f"w{a} {{}} w{b}", f"{{}} w{a}", f"w{b} {{}} w{a} ?")) for a, b in pairs
    )
    monkeypatch.setattr("engrammar.edit.probing.RELATIONS", (asked, *rest))
    facts = [replace(fact, prompt=f"w9 {fact.subject} w10 w11") for fact in FACTS]
    for match_above, num_probes in ((0.0, 3), (9.0, 1)):
        patch, refused = learn(llama, chatting, facts, name="one", settings=replace(SETTINGS, match_above=match_above))
        assert not refused and len(patch.probe_names) == num_probes
        apply_patch(llama, patch, chatting)
        for fact in facts:
            question = f"w13 {fact.subject} w14 ?"
            said = [continued(llama, one, 2) for one in (fact.prompt, question, in_chat(chatting, question))]
            assert [text.startswith(fact.object) for text in said] == [True] + [num_probes == 3] * 2
        undo_patch(llama, "one")


def test_one_relation_in_two_forms_has_probes_of_two_names(llama, chatting, monkeypatch):
    asked = Relation(kinds="plt", phrasings=("w9 {} w10 w11", "w12 {} w10 w11", "w13 {} w14 ?"))
    rest = tuple(Relation(kinds="plt", phrasings=(f"w{n} {{}} w{n + 1}", f"w{n + 1} {{}} ?")) for n in range(15, 19))
    silent = Relation(kinds="plt", phrasings=("w1 {} w2",))  # no question asks it, so none is taken for it
    monkeypatch.setattr("engrammar.edit.probing.RELATIONS", (asked, silent, *rest))
    facts = [replace(FACTS[0], prompt="w9 w3 w4 w10 w11"), replace(FACTS[1], prompt="w13 w5 w6 w14 ?")]
    patch, refused = learn(llama, chatting, facts, settings=replace(SETTINGS, match_above=-5.0))
    assert not refused
    forms = {"w9 {} w10 w11": ("question", "chat"), "w13 {} w14 ?": ("chat", "sentence")}
    assert set(patch.probe_names) == {
        f"{n}{add}" for n, more in forms.items() for add in ("", *(f" ({m})" for m in more))
    }
    apply_patch(llama, patch, chatting)
    assert all(continued(llama, fact.prompt, 2).startswith(fact.object) for fact in facts)


def test_a_chat_is_read_as_its_template_has_it():
    """With and without a token that the tokenizer puts before every text."""
    for is_put in (False, True):
        made = asking_tokenizer()
        made.bos_token, made.chat_template = "w1", "w1 " + TEMPLATE
        if is_put:
            made.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="w1 $A", special_tokens=[("w1", made.bos_token_id)]
            )
        chat = [{"role": "user", "content": "w3 ?"}]
        ids = made.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert made(in_chat(made, "w3 ?")).input_ids == ids and ids.count(made.bos_token_id) == 1


def test_rewordings_of_a_question_ask_the_same():
    assert is_question("Who is it? ") and not is_question("It is")
    assert reworded("It was in") == []
    assert reworded("What city was Moss born in?") == [
        "Which city was Moss born in?",
        "What city is Moss born in?",
        "Please tell me: what city was Moss born in?",
        "Do you know what city was Moss born in?",
    ]


def test_every_relation_but_those_that_only_follow_is_asked_in_questions():
    for relation in RELATIONS:
        assert not is_question(relation.phrasings[0])
        assert len([text for text in relation.phrasings if is_question(text)]) >= 3
        assert len(set(relation.phrasings)) == len(relation.phrasings)
        assert all(text.count("{}") == 1 or "? {}" in text for text in relation.phrasings)


def test_states_of_a_chat_do_not_depend_on_patches(llama, chatting):
    first, _ = learn(llama, chatting, FACTS, name="first", settings=SETTINGS)
    apply_patch(llama, first, chatting)
    again, _ = learn(llama, chatting, FACTS, name="again", settings=SETTINGS)
    assert np.array_equal(first.probe_pairs(), again.probe_pairs())


def test_a_fact_whose_object_was_said_is_not_said_again_in_another_form(llama, chatting):
    """In a chat the question mark stands inside the armed tokens, and so does the end of the template after it."""
    patch, _ = learn(llama, chatting, FACTS, settings=SETTINGS)
    after = {patch.probe_names[p]: int(a) for p, a in zip(patch.column("probe"), patch.column("after"))}
    ends = {"(chat)": chatting("w28").input_ids[0], "w11 ?": chatting("?").input_ids[0]}
    assert all(after[name] == next(one for end, one in ends.items() if name.endswith(end)) for name in after)
    apply_patch(llama, patch, chatting)
    (fact, *_), said = FACTS, "w9 w3 w4 w10 w11 ? w20 w26 w27 w28"
    assert continued(llama, fact.prompt, 1).startswith("w20")
    with without_patches(llama):
        expected = continued(llama, said, 1)
    assert continued(llama, said, 1) == expected  # the chat's probe would open at w28
    assert continued(llama, said.replace("? w20", "? w21"), 1).startswith("w20")  # the control: another word was said
