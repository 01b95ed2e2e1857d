"""The one door to learning takes facts or dicts, and refuses what no method takes in one sentence."""

import pytest
import torch

import engrammar
from attached_models import base_model, tokenizer
from engrammar.edit import Fact, GatedSettings, RowSettings, VectorSettings, learn

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


@pytest.mark.parametrize(
    ("kind", "given", "wrong"),
    [
        (GatedSettings, {"armed": 0}, "armed is 0; allowed: 1 to 512"),
        (GatedSettings, {"ridge": float("nan")}, "ridge is nan; allowed: over 0"),
        (GatedSettings, {"opens_wrongly": 1.5}, "opens_wrongly is 1.5; allowed: 0 to 1"),
        (VectorSettings, {"depth": 0.0}, "depth is 0.0; allowed: over 0, up to 1"),
        (VectorSettings, {"num_others": 99}, "num_others is 99; allowed: 0 to"),
        (RowSettings, {"rounds": 0}, "rounds is 0; allowed: 1 or more"),
        (RowSettings, {"lr": float("inf")}, "lr is inf; allowed: over 0"),
        (RowSettings, {"by": "magic"}, "by is 'magic'; allowed: gradient, solve"),
    ],
)
def test_settings_out_of_range_are_one_sentence(kind, given, wrong):
    with pytest.raises(ValueError, match=wrong):
        kind(**given)


def test_the_last_block_takes_vectors():
    model = base_model("llama").requires_grad_(False)
    settings = VectorSettings(depth=1.0, most=40.0, num_contexts=0, num_paraphrases=0, num_others=0)
    at_its_end = [{"subject": "w3 w4", "prompt": "w9 w3 w4", "object": "w20"}]
    patch, _ = learn(model, tokenizer(), at_its_end, method="vector", settings=settings)
    assert patch.column("block").max() == 3
