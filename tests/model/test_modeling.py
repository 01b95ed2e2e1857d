"""The model gives one answer however its tokens arrive: whole, in chunks, cached, in beams, padded, rolled back."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import engrammar.tables.shards as checkpoint
from engrammar.config import DIALECTS
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM
from models import END, PAD, VOCABULARY, tiny_config, tiny_memory, tiny_model

SHAPES = [(dialect, branches) for dialect in DIALECTS for branches in (1, 3)]
shapes = pytest.mark.parametrize(("dialect", "branches"), SHAPES)


def random_ids(batch: int = 2, length: int = 13, seed: int = 1) -> torch.Tensor:
    """Ids with an end-of-text inside, so that boundaries are crossed."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[0, length // 3] = END
    return ids


def pad_left(ids: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the first `lengths[b]` ids of each row, pushed to the right end."""
    width = max(lengths)
    padded = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        padded[row, width - length :] = ids[row, :length]
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return padded, mask


@shapes
@torch.no_grad()
def test_chunked_prefill_and_cached_decode_equal_the_whole(dialect, branches):
    model, ids = tiny_model(dialect, branches), random_ids()
    whole = model(ids).logits
    for cuts in ([0, 5, 6, 7, 13], [0, 1, 12, 13], list(range(14))):
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in zip(cuts, cuts[1:])]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


@shapes
@torch.no_grad()
def test_left_padding_changes_no_logit(dialect, branches):
    model, ids = tiny_model(dialect, branches), random_ids(3)
    lengths = [13, 9, 1]
    padded, mask = pad_left(ids, lengths)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    cache = DynamicCache(config=model.config)
    first = model(padded[:, :6], attention_mask=mask[:, :6], position_ids=positions[:, :6], past_key_values=cache)
    rest = model(padded[:, 6:], attention_mask=mask, position_ids=positions[:, 6:], past_key_values=cache)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row, -length:], alone, atol=1e-5, rtol=0)
        cached = torch.cat([first.logits, rest.logits], 1)[row, -length:]
        torch.testing.assert_close(cached, alone, atol=1e-5, rtol=0)


@shapes
@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(dialect, branches):
    model, ids = tiny_model(dialect, branches), random_ids()
    padded, mask = pad_left(ids, [13, 8])
    common = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": PAD}
    for settings in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 7},
    ):
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            outputs.append(model.generate(padded, attention_mask=mask, use_cache=use_cache, **settings, **common))
        assert torch.equal(*outputs), settings
    greedy = model.generate(padded, attention_mask=mask, do_sample=False, **common)
    chunked = model.generate(padded, attention_mask=mask, do_sample=False, prefill_chunk_size=3, **common)
    assert torch.equal(greedy, chunked)
    assert torch.equal(greedy[0], model.generate(ids[:1], do_sample=False, **common)[0])


@shapes
@torch.no_grad()
def test_rolling_back_speculation_equals_greedy(dialect, branches):
    model, other, ids = tiny_model(dialect, branches), tiny_model(dialect, branches, seed=5), random_ids(1)
    common = {"max_new_tokens": 17, "eos_token_id": None, "pad_token_id": PAD, "do_sample": False}
    greedy = model.generate(ids, **common)
    assert torch.equal(greedy, model.generate(ids, assistant_model=other, **common))
    assert torch.equal(greedy, model.generate(ids, assistant_model=model, **common))
    assert torch.equal(greedy, model.generate(ids, prompt_lookup_num_tokens=3, **common))


@torch.no_grad()
def test_a_cropped_cache_continues_as_if_the_cut_tokens_never_came():
    model, ids = tiny_model("paper", 2), random_ids(1)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(torch.cat([ids[:, :8], random_ids(1, 4, seed=9)], 1), past_key_values=cache)
    cache.crop(-4)
    torch.testing.assert_close(model(ids[:, 8:], past_key_values=cache).logits, whole[:, 8:], atol=1e-5, rtol=0)


def test_a_reordered_cache_follows_its_beams():
    model, ids = tiny_model("qwen_next", 2), random_ids(3)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :9], past_key_values=cache)
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        logits = model(ids[order, 9:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids[order]).logits[:, 9:], atol=1e-5, rtol=0)


@shapes
@pytest.mark.skipif(
    not hasattr(EngrammarForCausalLM, "activation_checkpointing_enable"),
    reason="transformers 5.19 has another name for it",
)
def test_gradient_checkpointing_changes_no_gradient(dialect, branches):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(dialect, branches).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(random_ids(), labels=random_ids(), use_cache=False).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys() and any("tables" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=0, rtol=0)


@shapes
@torch.no_grad()
def test_saved_and_loaded_is_the_same_to_the_last_bit(dialect, branches, tmp_path):
    model, ids = tiny_model(dialect, branches), random_ids()
    model.save_pretrained(tmp_path)
    assert {"memory.tables.1.safetensors", "memory.tables.3.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, EngrammarForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.geometry == model.config.geometry
    loaded.save_pretrained(tmp_path)  # over itself, into the same folder
    assert torch.equal(EngrammarForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_model_without_a_gate_is_saved_and_decoded_as_the_others_are(tmp_path):
    model, ids = tiny_model("paper", 2, memory=tiny_memory("paper") | {"gate": "none"}), random_ids()
    model.save_pretrained(tmp_path)
    loaded, whole = AutoModelForCausalLM.from_pretrained(tmp_path), model(ids).logits
    assert torch.equal(loaded(ids).logits, whole)
    cache = DynamicCache(config=loaded.config)
    parts = [loaded(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 5), (5, 6), (6, 13))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


def test_a_saved_geometry_is_read_not_derived(tmp_path):
    config = tiny_config("paper")
    config.geometry["multipliers"][0][0] += 2
    config.save_pretrained(tmp_path)
    loaded = EngrammarConfig.from_pretrained(tmp_path)
    assert loaded.memory_geometry.multipliers[0][0] == config.geometry["multipliers"][0][0]
    assert loaded.memory_geometry != tiny_config("paper").memory_geometry


@torch.no_grad()
def test_a_model_sharded_by_size_keeps_its_tables_apart(tmp_path):
    model, ids = tiny_model("paper", 2), random_ids()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = set(json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"].values())
    assert len(shards) > 4 and {s for s in shards if "tables" in s} == {
        "memory.tables.1.safetensors",
        "memory.tables.3.safetensors",
    }
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_checkpoint_over_another_leaves_nothing_of_it(tmp_path):
    ids, memory, plain = random_ids(), tiny_model("paper"), tiny_model(None)
    for model, size in ((memory, "50GB"), (plain, "50GB"), (plain, "20KB"), (memory, "20KB"), (memory, "50GB")):
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
        shards = {path.name for path in tmp_path.glob("*.safetensors") if ".crc32." not in path.name}
        index = tmp_path / checkpoint.INDEX
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {checkpoint.WHOLE}
        assert shards == named, (size, shards ^ named)


@pytest.mark.parametrize("shard", ["memory.tables.1.safetensors", "backbone.safetensors"])
def test_a_missing_or_cut_shard_is_named(tmp_path, shard):
    tiny_model("paper").save_pretrained(tmp_path)
    content = (tmp_path / shard).read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        (tmp_path / shard).write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"{shard} is not right"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_table_is_refused(tmp_path):
    tiny_model("paper").save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()  # which would say that the index was changed
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    del index["weight_map"]["model.memory.tables.3.weight"]
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks 1 weights .*memory\.tables\.3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / checkpoint.INDEX).write_text("{")
    with pytest.raises(ValueError, match="index.json is not right .it is not JSON"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / checkpoint.INDEX).unlink()
    with pytest.raises(ValueError, match="not a checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_bad_input_is_refused_in_one_sentence():
    model = tiny_model("paper")
    with pytest.raises(ValueError, match="Token id 53 is outside the vocabulary of 53 ids"):
        model(torch.tensor([[3, 53]]))
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(random_ids(), attention_mask=torch.ones(2, 1, 13, 13))
    with pytest.raises(ValueError, match="DynamicCache\\(config=model.config\\)"):
        model(random_ids(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="DynamicCache\\(config=model.config\\)"):
        model(random_ids(), past_key_values=StaticCache(config=tiny_config(None), max_cache_len=20))


def test_a_model_whose_class_map_was_never_set_refuses_to_run():
    model = EngrammarForCausalLM(tiny_config("paper"))
    with pytest.raises(ValueError, match="class map"):
        model(random_ids())
    with pytest.raises(ValueError, match="41 classes"):
        model.model.memory.set_classes(torch.arange(VOCABULARY))


@torch.no_grad()
def test_all_retrieval_happens_before_the_first_block():
    model, order = tiny_model("paper", 2), []
    for layer, table in model.model.memory.tables.items():
        table.register_forward_hook(lambda *_, layer=layer: order.append(f"table {layer}"))
    model.model.layers[0].register_forward_pre_hook(lambda *_: order.append("block 0"))
    model(random_ids())
    assert order == ["table 1", "table 3", "block 0"]


@torch.no_grad()
def test_memory_changes_the_output_and_its_absence_leaves_the_plain_model():
    with_memory, ids = tiny_model("paper"), random_ids()
    plain = tiny_model(None)
    plain.load_state_dict(with_memory.state_dict(), strict=False)
    assert (with_memory(ids).logits - plain(ids).logits).abs().max() > 1e-3
    for table in with_memory.model.memory.tables.values():
        table.weight.zero_()
    torch.testing.assert_close(with_memory(ids).logits, plain(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_a_packed_document_equals_itself_alone(dialect):
    """Position ids that restart tell documents apart, for attention, n-grams and convolution alike."""
    model, first, second = tiny_model(dialect, 2), random_ids(1, 7), random_ids(1, 11, seed=4)
    positions = torch.cat([torch.arange(7), torch.arange(11)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :7], model(first).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[:, 7:], model(second).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mask_of_another_width_is_refused():
    model, ids = tiny_model("paper"), random_ids()
    for shape in ((2, 20), (2, 1), (1, 13), (2, 13, 13)):
        with pytest.raises(ValueError, match=r"\[batch, positions\] = \[2, 13\]"):
            model(ids, attention_mask=torch.ones(shape))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"= \[2, 14\], cached positions included"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_an_id_outside_the_vocabulary_is_named_with_and_without_memory():
    for dialect in ("paper", None):
        for token_id in (-1, VOCABULARY):
            with pytest.raises(ValueError, match=f"Token id {token_id} is outside the vocabulary of 53 ids"):
                tiny_model(dialect)(torch.tensor([[3, token_id]]))


@torch.no_grad()
def test_ids_that_pad_the_vocabulary_can_be_generated():
    model = tiny_model("paper", vocab_size=64, num_ids=VOCABULARY)
    logits = model(torch.tensor([[3, 60, 4]])).logits
    assert logits.shape[-1] == 64 and torch.isfinite(logits).all()
    assert (model.model.memory.class_of_id[VOCABULARY:] == END).all()


def test_a_class_map_that_is_not_this_models_is_refused():
    model, classes = tiny_model("paper"), torch.arange(VOCABULARY) % 41
    for wrong in (classes.flip(0), classes[:-1], classes.float(), classes - 1, torch.arange(VOCABULARY)):
        with pytest.raises(ValueError, match="use the tokenizer it was built with"):
            model.model.memory.set_classes(wrong)


def test_a_geometry_that_contradicts_the_settings_is_refused():
    saved = tiny_config("paper").geometry
    for change in ({"rows_per_head": [5000, 5000]}, {"num_heads": 3}, {"layers": [1, 2, 3]}, {"rows_multiple": 64}):
        with pytest.raises(ValueError, match="saved geometry does not fit the memory settings"):
            tiny_config("paper", memory=tiny_memory("paper") | change, geometry=saved)


def test_memory_that_the_config_does_not_name_is_refused(tmp_path):
    tiny_model("paper").save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()  # which would say that the config was changed
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"memory": None, "geometry": None, "layer_types": None}))
    with pytest.raises(ValueError, match=r"holds memory that its config\.json does not name"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    with pytest.raises(ValueError, match=r"other shapes than its config\.json says"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_saving_takes_what_transformers_takes(tmp_path):
    model = tiny_model("paper")
    model.save_pretrained(tmp_path / "other rank", False)
    assert not list((tmp_path / "other rank").glob("*.safetensors"))
    with pytest.raises(ValueError, match="variant is .fp16.; checkpoints with memory tables have none"):
        model.save_pretrained(tmp_path, variant="fp16")
    model.save_pretrained(tmp_path / "outer" / "inner")
    loaded = EngrammarForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_save_that_dies_leaves_no_checkpoint_of_two_halves(tmp_path, monkeypatch):
    tiny_model("paper", seed=0).save_pretrained(tmp_path)

    def dies(*_args, **_kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_rows", dies)
        with pytest.raises(OSError, match="No space"):
            tiny_model("paper", seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="checkpoint is incomplete"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("num_items", [None, 11])
def test_the_chunked_loss_and_its_gradients_are_those_of_all_logits(num_items):
    model, ids = tiny_model("paper", 3).train(), random_ids(3)
    labels = ids.masked_fill(ids == END, -100)
    found = {}
    for model.chunked_loss in (False, True):
        model.zero_grad()
        out = model(ids, labels=labels, use_cache=False, num_items_in_batch=num_items)
        out.loss.backward()
        grads = {name: weight.grad.to_dense() for name, weight in model.named_parameters() if weight.grad is not None}
        found[model.chunked_loss] = (out.loss, grads)
        assert (out.logits is None) == model.chunked_loss
    torch.testing.assert_close(found[True], found[False], atol=1e-6, rtol=1e-5)
    assert model.eval()(ids, labels=labels).logits is not None  # for training only


@pytest.mark.parametrize("other", ["LoRA", "a hook", "shifted labels"])
def test_a_head_that_does_more_than_its_weight_has_the_loss_of_its_logits(other):
    model, ids = tiny_model("paper"), random_ids(3)
    given = {"shift_labels": ids} if other == "shifted labels" else {}
    if other == "a hook":
        model.lm_head.register_forward_hook(lambda _module, _args, logits: 2 * logits)
    elif other == "LoRA":
        torch.manual_seed(1)
        get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    plain = tiny_model("paper").train()
    losses = {}
    for model.chunked_loss in (False, True):
        losses[model.chunked_loss] = model.train()(ids, labels=ids, use_cache=False, **given).loss
    assert torch.equal(losses[True], losses[False])
    assert not torch.isclose(losses[True], plain(ids, labels=ids, use_cache=False).loss, rtol=1e-3)
