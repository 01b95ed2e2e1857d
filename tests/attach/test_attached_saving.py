"""Adapters are saved and loaded to the bit, from every tier, and never onto the wrong model."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from attached_models import attached_model, base_model, memory_config, random_ids, randomize, tokenizer
from engrammar.attach import attach, detach, load_attached, save_attached
from engrammar.attach import folder as adapter_folder
from engrammar.attach.attaching import attachment_of
from engrammar.model import saving as model_saving
from engrammar.tables import quantize
from engrammar.tables.shards import CODE
from engrammar.tables.verify import verify_folder
from engrammar.train.placement import place_tables

PLACES = [{}, {"memory": "ram"}, {"memory": "disk"}, {"memory": "disk", "cache_rows": 50, "verify": True}]


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids(2, 13)).logits


@pytest.fixture
def saved(tmp_path):
    model = attached_model("llama")
    save_attached(model, tmp_path / "adapter")
    return tmp_path / "adapter", logits_of(model)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v4"])
def test_what_is_loaded_is_what_was_saved(family, place, tmp_path):
    model = attached_model(family)
    save_attached(model, tmp_path / "adapter")
    loaded = base_model(family)
    assert load_attached(loaded, tmp_path / "adapter", tokenizer(), **place) is loaded
    assert torch.equal(logits_of(loaded), logits_of(model))
    names = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert all(name.startswith("engrammar.default.") for name in names)
    assert any("tables" in name for name in names) == (not place)


@pytest.mark.parametrize(
    "settings",
    [
        {"compression": "none", "conv_kernel": 0},
        {"bias": "learned", "gate": "sigmoid", "branch_keys": "shared"},
        {"layers": (0,), "max_ngram_size": 4, "rows_per_head": (97, 101, 103), "boundary": "end", "end_ids": (1,)},
    ],
    ids=str,
)
def test_every_setting_is_kept(settings, tmp_path):
    model = attached_model("llama", settings)
    save_attached(model, tmp_path / "adapter")
    loaded = load_attached(base_model("llama"), tmp_path / "adapter")
    assert attachment_of(loaded)["default"].config == memory_config(**settings)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_served_adapter_generates_the_same(saved):
    folder, _ = saved
    ids = random_ids(2, 7)
    settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    expected = attached_model("llama").generate(ids, **settings)
    assert torch.equal(load_attached(base_model("llama"), folder, memory="disk").generate(ids, **settings), expected)


def test_tables_of_an_adapter_are_tables_like_any(saved, tmp_path):
    folder, logits = saved
    assert not verify_folder(folder).without_sums
    quantize(folder, tmp_path / "small", encoding="int8")
    verify_folder(tmp_path / "small")
    with pytest.raises(ValueError, match="stored as int8: load them with memory='ram'"):
        load_attached(base_model("llama"), tmp_path / "small")
    loaded = load_attached(base_model("llama"), tmp_path / "small", memory="ram")
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=0.01)
    assert not torch.equal(logits_of(loaded), logits)


@pytest.mark.parametrize("where", ["served", "placed", "bf16"])
def test_rows_are_saved_wherever_they_are(where, saved, tmp_path):
    folder, logits = saved
    model = load_attached(base_model("llama"), folder, **({"memory": "disk"} if where == "served" else {}))
    if where == "placed":
        place_tables(model)
    if where == "bf16":
        attachment_of(model).to(torch.bfloat16)
        logits = logits_of(model)
    save_attached(model, tmp_path / "again")
    loaded = load_attached(base_model("llama"), tmp_path / "again")
    if where == "bf16":
        attachment_of(loaded).to(torch.bfloat16)
    assert torch.equal(logits_of(loaded), logits)
    if where == "served":
        with pytest.raises(ValueError, match="save it to another folder"):
            save_attached(model, folder)
        assert torch.equal(logits_of(load_attached(base_model("llama"), folder)), logits)


def test_an_adapter_is_replaced_as_a_whole(saved, monkeypatch):
    folder, logits = saved
    other = attached_model("llama")
    randomize(other, seed=9)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(adapter_folder, "seal", fail)
        save_attached(other, folder)
    assert torch.equal(logits_of(load_attached(base_model("llama"), folder)), logits)
    save_attached(other, folder)
    assert torch.equal(logits_of(load_attached(base_model("llama"), folder)), logits_of(other))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no adapter"):
        save_attached(attached_model("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def changed_base(**weights: float):
    model = base_model("llama")
    with torch.no_grad():
        for name, factor in weights.items():
            model.get_parameter(name).mul_(factor)
    return model


@pytest.mark.parametrize(
    ("base", "wrong"),
    [
        (lambda: base_model("gpt2"), "is of a LlamaForCausalLM with a weight"),
        (lambda: base_model("llama", num_hidden_layers=3), "blocks 4, this one has 3"),
        (lambda: base_model("llama", hidden_size=64), "hidden_size 32, this one has 64"),
        (lambda: base_model("llama", vocab_size=64), "vocab_size 61, this one has 64"),
        (lambda: changed_base(**{"model.embed_tokens.weight": 1.05}), "another model.embed_tokens.weight"),
        (lambda: changed_base(**{"lm_head.weight": 0.95}), "another lm_head.weight"),
    ],
)
def test_another_base_is_refused_and_the_difference_named(base, wrong, saved):
    model = base()
    before = [*model.state_dict()]
    with pytest.raises(ValueError, match=wrong):
        load_attached(model, saved[0])
    assert [*model.state_dict()] == before and attachment_of(model) is None


def test_the_same_base_is_known_in_another_dtype_and_under_lora(saved):
    folder, logits = saved
    load_attached(base_model("llama").to(torch.bfloat16), folder)
    wrapped = get_peft_model(base_model("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(logits_of(load_attached(wrapped, folder)), logits)
    save_attached(wrapped, folder)
    assert torch.equal(logits_of(load_attached(base_model("llama"), folder)), logits)


def test_another_tokenizer_is_refused(saved):
    words = {token: i for i, token in enumerate(["<pad>", *(f"x{i}" for i in range(60))])}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="x0")))
    with pytest.raises(ValueError, match="another tokenizer than this one of 61 tokens"):
        load_attached(base_model("llama"), saved[0], other)


@pytest.mark.parametrize("memory", [None, "ram"])
@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors", "memory.json", "memory.tables.1.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_damage_is_one_sentence_and_the_model_is_unchanged(name, how, memory, saved):
    folder, _ = saved
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.unlink() if how == "missing" else path.write_bytes(data if how == "flipped" else data[:-30])
    model = base_model("llama")
    before = logits_of(model)
    with pytest.raises(ValueError) as refused:
        load_attached(model, folder, memory=memory, verify=True)
    assert name in str(refused.value) and "\n" not in str(refused.value)
    assert attachment_of(model) is None and torch.equal(logits_of(model), before)


def test_a_flipped_bit_of_a_row_is_found_without_verify(saved):
    path = saved[0] / "memory.tables.2.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="memory.tables.2.safetensors"):
        load_attached(base_model("llama"), saved[0])


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"version": 2}, "version is 2"),
        ({"name": 3}, "crc32 is not"),
        ({"extra": 3}, "does not have the keys"),
    ],
)
def test_an_adapter_json_of_another_kind_is_refused(change, wrong, saved):
    path = saved[0] / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=wrong):
        load_attached(base_model("llama"), saved[0])


def test_settings_are_known_ones(saved, tmp_path):
    folder, _ = saved
    for settings, wrong in (
        ({"memry": "ram"}, "no setting 'memry'"),
        ({"cache_rows": 3}, "cache_rows needs memory="),
        ({"memory": "tape"}, "memory is 'tape'"),
    ):
        with pytest.raises(ValueError, match=wrong):
            load_attached(base_model("llama"), folder, **settings)
    with pytest.raises(ValueError, match="has no adapter.json"):
        load_attached(base_model("llama"), tmp_path)


def test_several_memories_are_saved_one_by_one(tmp_path):
    model = attached_model("llama")
    attach(model, memory_config(layers=(3,)), tokenizer(), "other")
    randomize(model)
    with pytest.raises(ValueError, match="default, other: name one of them"):
        save_attached(model, tmp_path / "any")
    for name in ("default", "other"):
        save_attached(model, tmp_path / name, name)
    loaded = load_attached(base_model("llama"), tmp_path / "default", name="renamed", memory="disk")
    load_attached(loaded, tmp_path / "other", memory="ram")
    assert [*attachment_of(loaded)] == ["renamed", "other"]
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_save_pretrained_writes_the_base_and_the_memory_beside_it(tmp_path):
    """The folder is the plain base to transformers; nothing is mixed in, and nothing is lost."""
    model = attached_model("llama")
    with pytest.raises(ValueError, match="push_to_hub would leave the memories out"):
        model.save_pretrained(tmp_path / "both", push_to_hub=True)
    model.save_pretrained(tmp_path / "both")
    base_model("llama").save_pretrained(tmp_path / "plain")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both", attn_implementation="eager")
    assert torch.equal(logits_of(loaded), logits_of(base_model("llama")))
    load_attached(loaded, tmp_path / "both" / "engrammar" / "default")
    assert torch.equal(logits_of(loaded), logits_of(model))
    shutil.rmtree(tmp_path / "both")
    detach(model).save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both" / "engrammar").exists()


def test_values_that_are_given_are_what_is_saved(tmp_path):
    """As averaged weights, or those that a sharded model gathers; by name and by place."""
    model, other = attached_model("llama"), attached_model("llama")
    randomize(other, seed=3)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    given = other.state_dict()
    model.save_pretrained(tmp_path / "named", state_dict=given)
    model.save_pretrained(tmp_path / "placed", True, given)
    for folder in ("named", "placed"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager")
        load_attached(loaded, tmp_path / folder / "engrammar" / "default")
        assert torch.equal(logits_of(loaded), logits_of(other))
    assert not torch.equal(logits_of(model), logits_of(other))
    with pytest.raises(ValueError, match="state_dict lacks engrammar.default"):
        model.save_pretrained(tmp_path / "lacking", state_dict=base_model("llama").state_dict())
    model.save_pretrained(tmp_path / "other rank", False)
    assert not list((tmp_path / "other rank").rglob("*.safetensors"))


def test_a_name_on_the_hub_is_downloaded(saved, monkeypatch):
    folder, logits = saved
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(folder)

    monkeypatch.setattr(model_saving, "snapshot_download", download)
    loaded = load_attached(base_model("llama"), "someone/hamlet", revision="v1")
    assert torch.equal(logits_of(loaded), logits)
    assert asked["name"] == "someone/hamlet" and asked["revision"] == "v1"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert {"*.json", "*.safetensors", CODE} == set(asked["allow_patterns"])  # the module is never run here
