"""Facts are learned without a gradient: asked in full they are answered, and where no key stands nothing changes."""

import json
from dataclasses import replace

import pytest
import torch

import engrammar
from attached_models import base_model, memory_config, random_ids, randomize, tokenizer
from engrammar.attach.blocks import find_decoder
from engrammar.edit import Fact, GatedSettings, apply_patch, learn, read_facts, undo_patch
from engrammar.edit.gated import BEFORE, TWICE, GatedReader, norm_scale
from engrammar.edit.phrasings import Relation
from engrammar.edit.states import SHARED, last_states

# In the tiny models' words: a subject of two words, what is asked of it, and the object.
ASKED = [("w3 w4", "w20"), ("w5 w6", "w21 w22"), ("w7 w8", "w23")]
FACTS = [Fact(subject=subject, prompt=f"w9 {subject} w10 w11", object=words) for subject, words in ASKED]
SETTINGS = GatedSettings(probe_depth=0.75, strength=30.0)


@pytest.fixture(scope="module")
def llama():
    return base_model("llama").requires_grad_(False)


def continued(model, prompt, num):
    ids = tokenizer()(prompt, return_tensors="pt").input_ids
    return tokenizer().decode(model.generate(ids, max_new_tokens=num, do_sample=False)[0, ids.shape[1] :])


def test_learned_facts_are_answered_and_undone(llama):
    patch, refused = learn(llama, tokenizer(), FACTS, name="three", settings=SETTINGS)
    assert not refused and [fact["object"] for fact in patch.facts] == [words for _, words in ASKED]
    before = {fact: continued(llama, fact.prompt, 2) for fact in FACTS}
    plain = random_ids(2, 12) % 3 + 2  # no subject's words
    logits = llama(plain).logits
    apply_patch(llama, patch, tokenizer())
    for fact in FACTS:
        assert continued(llama, fact.prompt, 2).startswith(fact.object)
    assert torch.equal(llama(plain).logits, logits)
    again, _ = learn(
        llama, tokenizer(), FACTS, name="again", settings=SETTINGS
    )  # patches that are applied do not matter
    assert torch.equal(torch.from_numpy(again.values), torch.from_numpy(patch.values))
    undo_patch(llama, "three")
    assert {fact: continued(llama, fact.prompt, 2) for fact in FACTS} == before


def test_what_cannot_be_told_apart_is_refused_with_a_reason(llama, monkeypatch):
    """Something else that is asked in the same words leaves nothing that a gate could go by."""
    same = Relation(kinds="plt", phrasings=tuple(one.replace("{}", "w9 {} w10 w11") for one in BEFORE))
    elsewhere = Relation(kinds="plt", phrasings=("w30 {} w31",))
    monkeypatch.setattr("engrammar.edit.probing.RELATIONS", (elsewhere, same, same, same))
    with pytest.raises(ValueError, match="No fact can be written: prompts that ask it cannot be told from others"):
        learn(llama, tokenizer(), FACTS, name="none", settings=replace(SETTINGS, ridge=1e-2))


def test_one_question_in_other_words_shares_a_probe_and_one_subject_has_one_answer(llama, monkeypatch):
    asked = Relation(kinds="plt", phrasings=("w9 {} w10 w11", "w12 {} w10 w11", "w13 {} w10 w11"))
    rest = tuple(Relation(kinds="plt", phrasings=(f"w{n} {{}} w{n + 1}", f"{{}} w{n + 2}")) for n in range(40, 60, 3))
    monkeypatch.setattr("engrammar.edit.probing.RELATIONS", (asked, *rest))
    other = Fact(subject="w7 w8", prompt="w12 w7 w8 w10 w11", object="w24")
    settings = replace(SETTINGS, match_above=0.0)
    patch, refused = learn(llama, tokenizer(), [FACTS[0], other], settings=settings)
    assert not refused and [*patch.probe_names] == ["w9 {} w10 w11"]
    again = Fact(subject="w3 w4", prompt="w9 w3 w4 w10 w11", object="w25")
    patch, refused = learn(llama, tokenizer(), [FACTS[0], other, again], settings=settings)
    assert len(patch.facts) == 3 or [(one.fact, one.reason) for one in refused] == [(again, TWICE)]


def test_states_at_the_ends_of_prompts_do_not_depend_on_their_batch(llama):
    prompts = ["w3 w4", "w9 w3 w4 w10 w11 w5", "w7"]
    together = last_states(llama, tokenizer(), prompts, 2)
    alone = torch.cat([last_states(llama, tokenizer(), [prompt], 2) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    seen = []
    hook = find_decoder(llama).blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    llama(tokenizer()(prompts[1], return_tensors="pt").input_ids)
    hook.remove()
    torch.testing.assert_close(seen[0][0, -1], together[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "engrammar on llama"])
def test_what_all_prompts_begin_with_is_read_once(family, monkeypatch):
    """The states are those of whole prompts; where a model keeps more than keys and values, prompts are read whole."""
    model = base_model(family.split()[-1])
    if "engrammar" in family:
        engrammar.attach(model, memory_config(), tokenizer())
        randomize(model)
    prompts = [" ".join(f"w{n}" for n in range(3, 4 + SHARED)) + f" w{n} w7{' w8' * (n % 3)}" for n in range(21, 26)]
    lengths = []
    hook = find_decoder(model).module.embed_tokens if family != "gpt2" else find_decoder(model).module.wte
    hook.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    read = last_states(model, tokenizer(), prompts, 2)
    assert max(lengths) == (SHARED + 1 if family in ("llama", "gpt2", "mixtral") else SHARED + 5)
    monkeypatch.setattr("engrammar.edit.states.SHARED", 1000)
    torch.testing.assert_close(read, last_states(model, tokenizer(), prompts, 2), rtol=0, atol=1e-5)
    assert not torch.allclose(read[0], read[1], rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_write_is_the_direction_that_raises_its_logit_most_against_all_others(llama):
    """In plain words: of all directions of length 1, the one with the largest logit per deviation of all logits."""
    reader = GatedReader(llama, tokenizer(), SETTINGS)
    weight_VD = llama.lm_head.weight.double() * norm_scale(find_decoder(llama).module.norm).double()
    ridge = 1e-3 * weight_VD.square().mean() * torch.eye(32, dtype=torch.float64)
    expected_DV = torch.linalg.inv(weight_VD.T @ weight_VD / len(weight_VD) + ridge) @ weight_VD.T
    expected_VD = torch.nn.functional.normalize(expected_DV.T, dim=-1).float()
    torch.testing.assert_close(reader.writes([20, 3, 20]), expected_VD[[20, 3, 20]], rtol=0, atol=1e-5)
    assert not torch.allclose(reader.writes([20]), expected_VD[[3]], rtol=0, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_the_scale_of_a_norm_is_what_it_multiplies_by(family):
    norm = find_decoder(base_model(family)).module.norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    expected = norm(x) / (x / x.square().mean(-1, keepdim=True).sqrt())
    torch.testing.assert_close(norm_scale(norm).expand(5, -1), expected, rtol=1e-3, atol=1e-3)


def test_facts_are_read_in_the_forms_that_exist(tmp_path):
    other = "Where does Moss grow? On"
    fact = Fact(subject="Moss", prompt="Moss grows on", object="stone", paraphrases=(other,))
    plain = {"subject": "Moss", "prompt": "Moss grows on"}
    rewrite = {"subject": "Moss", "prompt": "{} grows on", "target_new": {"str": "stone"}}
    rows = {
        "own.jsonl": json.dumps({**plain, "object": "stone", "paraphrases": [other]}),
        "own.csv": f"subject,prompt,object,paraphrases\nMoss,Moss grows on,stone,{other}\n",
        "easyedit.json": json.dumps([{**plain, "target_new": "stone", "rephrase_prompt": other}]),
        "authors.json": json.dumps([{"requested_rewrite": rewrite, "paraphrase_prompts": [other]}]),
    }
    for name, text in rows.items():
        (tmp_path / name).write_text(text)
        assert read_facts(tmp_path / name) == [fact]
    assert fact.template == "{} grows on"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (
            '{"subject": "Moss", "prompt": "It grows on", "object": "stone"}',
            "fact 1 of .* does not name its subject 'Moss'",
        ),
        ('{"subject": "Moss", "prompt": "Moss grows on"}', "fact 1 of .*: it has no 'object'"),
        ('{"subject": "", "prompt": "Moss", "object": "x"}', "A fact's subject is ''"),
        ("{", "cannot read facts from"),
        ("", "holds no fact"),
        ("[1]", "fact 1 of .* cannot be used"),
    ],
)
def test_what_is_no_fact_is_one_sentence(text, wrong, tmp_path):
    (tmp_path / "facts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=wrong):
        read_facts(tmp_path / "facts.jsonl")
