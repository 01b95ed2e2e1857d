"""The one door to learning takes facts or dicts, and refuses what no method takes in one sentence."""

import pytest
import torch

import engrammar
from attached_models import base_model, tokenizer
from engrammar.edit import Fact, GatedSettings, learn

ROWS = [{"subject": s, "prompt": f"w9 {s} w10 w11", "object": o} for s, o in [("w3 w4", "w20"), ("w5 w6", "w21 w22")]]


def test_dicts_are_learned_as_facts_are():
    model = base_model("llama").requires_grad_(False)
    settings = GatedSettings(probe_depth=0.75)
    patch, refused = engrammar.edit.learn(model, tokenizer(), ROWS, settings=settings)
    again = learn(model, tokenizer(), [Fact(**row) for row in ROWS], method="gated", settings=settings)
    assert patch.name == "facts" and not refused and [*patch.facts] == ROWS
    assert torch.equal(patch.decoded(), again.patch.decoded())


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"method": "magic"}, "method is 'magic'; allowed: gated"),
        ({"settings": 3}, "settings are int; method 'gated' takes GatedSettings"),
        ({"facts": [{"subject": "w3", "prompt": "w3 w4"}]}, "it has no 'object'"),
        ({"facts": []}, "No fact can be written: none was given"),
    ],
)
def test_what_is_no_request_is_one_sentence(given, wrong):
    chosen = {"facts": ROWS, **given}
    with pytest.raises(ValueError, match=wrong):
        learn(base_model("llama"), tokenizer(), chosen.pop("facts"), **chosen)
