"""What facts share is kept on a disk: patches are the same to the bit with it, and no other file is used in silence."""

import json
import logging

import pytest
import torch

from attached_models import base_model, tokenizer
from engrammar.edit import GatedSettings, learn_units, request
from engrammar.edit.files import patch_digest
from engrammar.edit.gated import GatedReader
from engrammar.edit.patch import base_of
from engrammar.edit.shared import SharedStates

SETTINGS = GatedSettings(probe_depth=0.75, num_worded=2)
ROW = {"subject": "w3 w4", "prompt": "w9 w3 w4 w10 w11", "object": "w20 w21"}
TEXTS = ["w1", "w2 w3"]


@pytest.fixture(scope="module")
def llama():
    return base_model("llama").requires_grad_(False)


def learned(model, keep):
    return patch_digest(learn_units(request(model, tokenizer(), [ROW], settings=SETTINGS, keep=keep)).patch)


def nothing_is_read(*args):
    raise AssertionError("states were read from the model")


def test_a_patch_is_the_same_with_and_without_what_is_kept(llama, tmp_path, monkeypatch):
    plain = learned(llama, None)
    assert learned(llama, tmp_path) == plain
    assert len([*tmp_path.iterdir()]) == 3  # of two forms, and of what sentences go on with
    reading, asked = GatedReader.units, []
    monkeypatch.setattr(GatedReader, "units", lambda *args: asked.append(len(args[1])) or reading(*args))
    assert learned(llama, tmp_path) == plain and max(asked) < 100
    asked.clear()
    learned(llama, None)
    assert max(asked) > 200  # the control: a whole bank is read


def shared(model, folder, known=0.0):
    return SharedStates(folder, base_of(model, tokenizer()), 3, torch.full((2, 4), known))


def test_states_are_found_again_only_where_everything_is_the_same(llama, tmp_path):
    states = torch.randn(2, 4)
    shared(llama, tmp_path).read(TEXTS, lambda: states)
    assert torch.equal(shared(llama, tmp_path).read(TEXTS, nothing_is_read), states)
    with pytest.raises(AssertionError):
        shared(llama, tmp_path, known=1e-7).read(TEXTS, nothing_is_read)  # another model under the same fingerprint
    with pytest.raises(AssertionError):
        shared(llama, tmp_path).read(TEXTS[::-1], nothing_is_read)
    with pytest.raises(AssertionError):
        shared(base_model("gpt2"), tmp_path).read(TEXTS, nothing_is_read)


def test_a_weight_that_no_fingerprint_sees_is_seen(tmp_path):
    """The fingerprint of a base holds some values of some weights; what is kept has to be of all of them."""
    model = base_model("llama").requires_grad_(False)
    base, first = base_of(model, tokenizer()), learned(model, tmp_path)
    for weight in model.model.layers[1].mlp.down_proj.weight.view(-1)[1::7]:
        weight += 0.5
    assert base_of(model, tokenizer()) == base
    assert learned(model, tmp_path) == learned(model, None) != first


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [
        (lambda data: data[:-5], "bytes"),
        (lambda data: b"", "0 bytes are too few"),
        (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "its sha256 is not that of its states"),
        (lambda data: data.replace(b'\\"version\\\\\\": 1', b'\\"version\\\\\\": 2'), "something else"),
    ],
)
def test_a_damaged_file_is_read_anew_with_a_warning(llama, tmp_path, caplog, harm, wrong):
    states = torch.randn(2, 4)
    shared(llama, tmp_path).read(TEXTS, lambda: states)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    assert path.read_bytes() != whole
    with caplog.at_level(logging.WARNING):
        assert torch.equal(shared(llama, tmp_path).read(TEXTS, lambda: states), states)
    assert wrong in caplog.text and "read from the model again" in caplog.text
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_told(llama, tmp_path, caplog):
    (tmp_path / "file").write_text(json.dumps({}))
    states = torch.randn(2, 4)
    assert torch.equal(shared(llama, tmp_path / "file").read(TEXTS, lambda: states), states)
    assert "cannot be kept" in caplog.text
