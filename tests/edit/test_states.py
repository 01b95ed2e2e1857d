"""What a model goes on with: the same as one prompt at a time, and what it asks nothing in closes a probe."""

import torch

from attached_models import base_model, tokenizer
from engrammar.edit import Fact, GatedSettings
from engrammar.edit.gated import GatedReader
from engrammar.edit.states import last_states, worded_states

PROMPTS = ["w9 w3 w4", "w5", "w9 w7 w8", "w10 w11 w12 w13"]


def test_states_of_what_a_model_goes_on_with_are_those_of_one_text_at_a_time():
    model = base_model("llama").requires_grad_(False)
    found_NJD = worded_states(model, tokenizer(), PROMPTS, 3, 2)
    assert found_NJD.shape[:2] == (4, 2)
    for prompt, found_JD in zip(PROMPTS, found_NJD):
        ids = tokenizer()(prompt, return_tensors="pt").input_ids
        for state_D in found_JD:
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
            text = tokenizer().decode(ids[0])
            torch.testing.assert_close(state_D, last_states(model, tokenizer(), [text], 3)[0], rtol=0, atol=1e-5)


def test_sentences_alone_are_gone_on_with_and_it_can_be_left_out():
    model = base_model("llama").requires_grad_(False)
    fact = Fact(subject="w3 w4", prompt="w9 w3 w4 w10 w11", object="w20")
    probes = {}
    for num in (0, 2):
        reader = GatedReader(model, tokenizer(), GatedSettings(probe_depth=0.75, num_worded=num))
        sentence, question = (reader.bank(form) for form in reader.forms)
        assert sentence.later_NJD.shape[1] == num and question.later_NJD.shape[1] == 0
        (unit,) = reader.facts_in_units([fact])
        probes[num] = unit.learn().patch.all_probes()[0]
    is_other_N = sentence.is_other(sentence.match(sentence.units_ND[:1], sentence.units_ND[:3]))
    later_ND = sentence.later_NJD[is_other_N].flatten(0, 1)
    above = {num: float((later_ND @ one.direction).mean()) for num, one in probes.items()}
    assert above[2] < above[0]
