"""A model in one call is the model of the three steps; what a preset cannot do, it says."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engrammar import EngrammarConfig, EngrammarForCausalLM, EngrammarModel, MemoryConfig, compress_vocabulary, preset
from engrammar.train.data import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["The cat sat. the Cat SAT on the mat."] * 9, vocab_size=290, path=folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def own_special_ids(tokenizer, **special_tokens):
    """The same vocabulary with other special tokens, or none."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special_tokens)


@pytest.mark.parametrize("kind", [EngrammarForCausalLM, EngrammarModel])
def test_one_call_equals_the_three_steps_to_the_bit(kind, tokenizer):
    torch.manual_seed(7)
    model = kind.from_preset("micro", tokenizer=tokenizer, hidden_size=48)

    torch.manual_seed(7)
    classes_V = compress_vocabulary(tokenizer)
    expected = kind(preset("micro", tokenizer=tokenizer, classes_V=classes_V, hidden_size=48))
    expected.base_model.memory.set_classes(torch.from_numpy(classes_V))

    assert model.config.to_dict() == expected.config.to_dict()
    found, state = model.state_dict(), expected.state_dict()
    assert list(found) == list(state) and "class_of_id" in " ".join(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
    assert torch.equal(model(ids)[0], expected(ids)[0])


def test_a_model_without_memory_or_without_compression_needs_no_class_map(tokenizer):
    ids = tokenizer("the mat", return_tensors="pt").input_ids
    for memory in (None, {"compression": "none"}):
        model = EngrammarForCausalLM.from_preset("micro", tokenizer=tokenizer, memory=memory)
        assert torch.isfinite(model(ids, labels=ids).loss)


def test_the_memory_takes_the_special_ids_of_the_tokenizer(tokenizer):
    swapped = own_special_ids(tokenizer, eos_token="a", pad_token="b")
    memory = EngrammarModel.from_preset("micro", tokenizer=swapped).config.memory_config
    assert memory.end_ids == (swapped.eos_token_id,) and memory.fill_id == swapped.pad_token_id
    no_pad = own_special_ids(tokenizer, eos_token="a")
    assert EngrammarModel.from_preset("micro", tokenizer=no_pad).config.memory_config.fill_id == no_pad.eos_token_id


def test_special_ids_that_are_given_win_over_the_tokenizer(tokenizer):
    given = {"end_ids": [5, 6], "fill_id": 7}
    memory = EngrammarModel.from_preset("micro", tokenizer=tokenizer, memory=given).config.memory_config
    assert (memory.end_ids, memory.fill_id) == ((5, 6), 7)


def test_settings_of_the_memory_go_over_the_presets_own(tokenizer):
    memory = preset("micro", memory={"num_heads": 3, "boundary": "row"}).memory_config
    own = preset("micro").memory_config
    assert (memory.num_heads, memory.boundary, memory.end_ids) == (3, "row", ())
    assert (memory.layers, memory.rows_per_head) == (own.layers, own.rows_per_head)


@pytest.mark.parametrize("name", ["micro", "moe-27b"])
def test_a_typed_memory_stands_in_the_presets_place(name):
    memory = MemoryConfig(layers=(0, 2), rows_per_head=(50, 60), head_dim=8)
    assert preset(name, memory=memory).memory_config == memory


def test_a_typed_memory_is_kept_as_json(tmp_path):
    memory = MemoryConfig(layers=(1,), rows_per_head=(50, 60), boundary="end", end_ids=(1,))
    config = EngrammarConfig(memory=memory, num_classes=9, fill_class=0, num_hidden_layers=2)
    assert config.memory == memory.to_json()
    assert config.to_dict() == EngrammarConfig(**{**config.to_dict(), "memory": memory.to_json()}).to_dict()
    config.save_pretrained(tmp_path)
    assert EngrammarConfig.from_pretrained(tmp_path).memory_config == memory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mega"}, "There is no preset 'mega'; known: micro, nano"),
        ({"hidden": 3}, "'hidden' is not a setting of EngrammarConfig"),
        ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2'; give a tokenizer of transformers"),
        ({"memory": {"rows": 5}}, "memory has unknown settings rows"),
        ({"memory": {"fill_id": 10**6}}, "memory.fill_id is 1000000; the tokenizer has ids 0 to"),
        ({"vocab_size": 3}, "vocab_size is 3; the tokenizer has"),
    ],
)
def test_what_a_preset_cannot_do_is_said(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        EngrammarForCausalLM.from_preset(**({"name": "micro", "tokenizer": tokenizer} | arguments))


def test_a_tokenizer_without_an_eos_token_is_refused_with_what_to_do(tokenizer):
    bare = own_special_ids(tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has none: set tokenizer.eos_token, or give memory="):
        EngrammarForCausalLM.from_preset("micro", tokenizer=bare)
    memory = EngrammarModel.from_preset("micro", tokenizer=bare, memory={"boundary": "row"}).config.memory_config
    assert memory.boundary == "row"


def test_forgotten_classes_give_advice_that_works(tokenizer):
    with pytest.raises(ValueError, match=r"classes_V=compress_vocabulary\(tokenizer\).*from_preset\(NAME, tokenizer"):
        preset("micro", tokenizer=tokenizer)
    memory = preset("micro").memory
    with pytest.raises(ValueError, match=r"for_tokenizer\(tokenizer, compress_vocabulary\(tokenizer\), ...\)"):
        EngrammarConfig(memory=memory, num_hidden_layers=2)
    assert EngrammarConfig.for_tokenizer(tokenizer, compress_vocabulary(tokenizer), memory=memory, num_hidden_layers=2)
