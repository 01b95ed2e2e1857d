"""A memory is attached in place, changes nothing at first, and leaves nothing behind."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, T5Config, T5ForConditionalGeneration

import engrammar
from attached_models import (
    FAMILIES,
    PAD,
    VOCABULARY,
    attached_model,
    base_model,
    memory_config,
    random_ids,
    randomize,
    tokenizer,
)
from engrammar.attach import attach, detach, disabled, set_trainable
from engrammar.attach.attaching import attachment_of
from engrammar.reference import fuse_reference, hash_ngrams_reference, lookup_reference

EXACT = {"rtol": 0.0, "atol": 1e-5}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(torch.int32)


def everything(model: nn.Module) -> dict:
    """What a model consists of: attributes and hooks of every module, and which parameters are trained."""
    kinds = (nn.Parameter, torch.Tensor, nn.Module)
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}:{key}"] = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else repr(value)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(isinstance(value, kinds) for value in found.values())
    return found | trained | {"keys": list(model.state_dict())}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_logits_are_those_of_the_base_to_the_bit(family):
    """The base is frozen for the comparison too: torch chooses other kernels for weights that are trained."""
    model, ids = base_model(family).requires_grad_(False), random_ids(2, 13)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, ::3] = -0.0  # x + 0.0 is another bit pattern here
    before = bits(model(ids).logits)
    attach(model, memory_config(), tokenizer())
    assert torch.equal(bits(model(ids).logits), before)
    randomize(model)
    assert not torch.equal(bits(model(ids).logits), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_leaves_nothing_behind(family):
    model, ids = base_model(family), random_ids(2, 13)
    next(model.parameters()).requires_grad_(False)
    logits, before = bits(model(ids).logits), everything(model)
    attach(model, memory_config(), tokenizer())
    randomize(model)
    model(ids)
    assert everything(model) != before
    assert detach(model) is model
    assert everything(model) == before
    assert torch.equal(bits(model(ids).logits), logits)


def test_the_public_names_are_those_of_the_package():
    assert engrammar.attach is attach and engrammar.detach is detach and engrammar.disabled is disabled


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v4", "qwen4_exp_text"])
def test_the_fusion_is_the_papers_added_at_the_entrance_of_a_block(family):
    """The twin: rows looked up, fused and added by plain code, in a hook of this test's own."""
    layer, model, ids = 2, attached_model(family, {"layers": (2,)}), random_ids(2, 13)
    memory = attachment_of(model)["default"]
    expected = model(ids, use_cache=False).logits
    classes = memory.memory.class_of_id
    chosen = {"config": memory.config, "geometry": memory.memory.geometry, "layer_index": 0}
    rows = torch.tensor([hash_ngrams_reference(classes[row].tolist(), **chosen) for row in ids])
    embedding = lookup_reference(memory.memory.table(layer).weight, rows)
    embedding = torch.cat(
        [torch.zeros_like(embedding[:, :1]), embedding[:, 1:]], 1
    )  # no n-gram ends at the first token
    fusion, scale = memory.fusions[str(layer)], memory.place.scales[0]

    def add(_, args):
        streams = args[0].view(2, 13, -1, 32)
        return ((streams + scale * fuse_reference(fusion, streams, embedding)).view_as(args[0]), *args[1:])

    with disabled(model):
        blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        with blocks[layer].register_forward_pre_hook(add):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **EXACT)


@pytest.mark.parametrize("family", ["llama", "deepseek_v4", "qwen4_exp_text"])
def test_outputs_are_scaled_to_the_residual_stream(family):
    """Ten times the embeddings are ten times the residual stream at the first block."""
    small, large = base_model(family), base_model(family)
    with torch.no_grad():
        large.get_input_embeddings().weight.mul_(10)
    config = memory_config(layers=(0, 3))
    first, second = (attachment_of(attach(one, config, tokenizer()))["default"].place for one in (small, large))
    assert second.scales[0] == pytest.approx(10 * first.scales[0])
    assert first.num_branches == {"llama": 1}.get(family, 3)


def test_a_switched_off_memory_is_not_there():
    model, ids = base_model("llama").requires_grad_(False), random_ids(2, 13)
    base = bits(model(ids).logits)
    attach(model, memory_config(layers=(0, 2)), tokenizer(), "first")
    attach(model, memory_config(layers=(2,), seed=7), tokenizer(), "second")
    randomize(model)
    both = bits(model(ids).logits)
    with disabled(model, "second"):
        first = bits(model(ids).logits)
        with disabled(model):
            assert torch.equal(bits(model(ids).logits), base)
        assert torch.equal(bits(model(ids).logits), first)
    assert torch.equal(bits(model(ids).logits), both)
    assert len({tuple(one.flatten().tolist()) for one in (base, first, both)}) == 3
    detach(model, "second")
    assert torch.equal(bits(model(ids).logits), first)
    with disabled(model):
        detach(model, "first")
    assert torch.equal(bits(model(ids).logits), base)


@torch.no_grad()
def test_two_memories_decode_exactly():
    model, ids = attached_model("llama"), random_ids(2, 13)
    attach(model, memory_config(layers=(0, 2), max_ngram_size=4, rows_per_head=(97, 101, 103)), tokenizer(), "other")
    randomize(model)
    cache, logits = DynamicCache(config=model.config), []
    for part in ids.split([5, 1, 7], 1):
        logits.append(model(input_ids=part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, **EXACT)


@torch.no_grad()
def test_packed_documents_are_read_as_if_alone():
    model, ids = attached_model("llama"), random_ids(1, 15)
    positions = torch.cat([torch.arange(n) for n in (6, 1, 8)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = [model(input_ids=part, use_cache=False).logits for part in ids.split([6, 1, 8], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)


@torch.no_grad()
def test_the_first_token_stays_as_it_is():
    model = attached_model("llama")
    for ids, mask in ((random_ids(2, 9), None), (random_ids(2, 9), torch.tensor([[0] * 3 + [1] * 6, [1] * 9]))):
        with_memory = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-2]
        with disabled(model):
            base = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-2]
        first = [0, 0] if mask is None else [3, 0]
        for row in range(2):
            assert torch.equal(with_memory[row, first[row]], base[row, first[row]])
            assert not torch.equal(with_memory[row, first[row] + 1], base[row, first[row] + 1])


@torch.no_grad()
def test_threads_do_not_meet():
    model, ids = attached_model("llama"), [random_ids(1, 9, seed) for seed in range(6)]
    expected = [model(one, use_cache=False).logits for one in ids]
    found: dict[int, bool] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            found[index] = all(
                torch.equal(model(ids[index], use_cache=False).logits, expected[index]) for _ in range(5)
            )

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(6), True)


@torch.no_grad()
def test_a_copied_model_has_a_memory_of_its_own():
    model, ids = attached_model("llama"), random_ids(2, 9)
    before = model(ids).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, before)
    randomize(copied, seed=9)
    assert torch.equal(model(ids).logits, before) and not torch.equal(copied(ids).logits, before)
    detach(copied)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_after_a_pass_that_failed_the_next_one_is_right():
    model, ids = attached_model("llama"), random_ids(2, 9)
    before = model(ids).logits
    with model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        model(ids)
    assert torch.equal(model(ids).logits, before)


def refusal(model, **call) -> str:
    with torch.no_grad(), pytest.raises(ValueError) as refused:
        model(**call)
    return str(refused.value)


def test_what_cannot_be_right_is_refused():
    model, ids = attached_model("llama"), random_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert "pass input_ids" in refusal(model, inputs_embeds=embeds)
    with disabled(model):
        foreign = model(ids, use_cache=True).past_key_values
    assert "holds 9 positions" in refusal(model, input_ids=ids, past_key_values=foreign)
    own = model(ids, use_cache=True).past_key_values
    detach(copy.deepcopy(model))(ids, past_key_values=own)  # its base, which knows nothing of memories
    assert "has seen 9 of them" in refusal(model, input_ids=ids, past_key_values=own)
    assert "a cache of transformers" not in refusal(model, input_ids=ids, attention_mask=torch.ones(2, 5))
    packed = torch.cat([torch.arange(4), torch.arange(5)])[None]
    assert "use_cache=False" in refusal(model, input_ids=ids, position_ids=packed, use_cache=True)
    assert "come before these" in refusal(model, input_ids=ids, position_ids=packed + 3, use_cache=False)
    blocks = torch.full((2, 1, 9, 9), True).tril()
    blocks[:, :, 4:, :4] = False
    assert "before a token" in refusal(model, input_ids=ids, attention_mask=blocks)
    with pytest.raises(RuntimeError, match="outside a pass"):
        model.model.layers[1](embeds)
    with disabled(model):
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize("settings", [{"conv_kernel": 0}, {}])
def test_a_cache_of_another_memory_is_refused(settings):
    """Even of one with equal settings, which has other rows."""
    model, ids = attached_model("llama"), random_ids(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    detach(model)
    attach(model, memory_config(**settings), tokenizer())
    assert "has seen none of them" in refusal(model, input_ids=ids, past_key_values=cache)


def test_a_cache_that_a_memory_filled_is_not_continued_without_it():
    model, ids = attached_model("llama"), random_ids(2, 9)
    randomize(attach(model, memory_config(layers=(2,)), tokenizer(), name="second"))
    cache = model(ids, use_cache=True).past_key_values
    for off in (None, "default", "second"):
        with disabled(model, off):
            assert "is off or detached now" in refusal(model, input_ids=ids, past_key_values=cache)
    detach(model, "second")
    assert "'second', which is off or detached" in refusal(model, input_ids=ids, past_key_values=cache)
    cache.reset()  # nothing is in it any more
    with disabled(model), torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_a_memory_is_off_until_the_last_block_that_switched_it_off_has_ended():
    model, ids = attached_model("llama"), random_ids(2, 9)
    on = model(ids).logits
    first, second = disabled(model), disabled(model, "default")
    first.__enter__()
    off = model(ids).logits
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, off)
    second.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, on) and not torch.equal(on, off)
    with disabled(model):
        detach(model)
        randomize(attach(model, memory_config(), tokenizer()))
        assert not torch.allclose(model(ids).logits, off, atol=1e-4)  # another memory of that name was not switched off


def test_memories_at_one_block_give_one_answer_in_whatever_order_they_were_attached():
    logits, ids = [], random_ids(2, 9)
    for names in (("first", "second"), ("second", "first")):
        model = base_model("llama")
        for name in names:
            attach(model, memory_config(), tokenizer(), name=name)
        for name in ("first", "second"):
            torch.manual_seed(len(name))
            for parameter in attachment_of(model)[name].parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_weights_of_the_base_alone_are_not_loaded_into_a_model_with_memory():
    """Which transformers' Trainer does when it resumes, or takes the best of several checkpoints."""
    model = attached_model("llama")
    base = base_model("llama").state_dict()
    for part in (base, {name: base[name] for name in list(base)[-3:-1]}):  # as a whole, or in shards
        with pytest.raises(ValueError, match="resume with EngrammarTrainer"):
            model.load_state_dict(part, strict=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(adapted))  # adapters are loaded as ever
    model = adapted.unload()
    assert not model.load_state_dict({**model.state_dict(), **base}).missing_keys
    assert not detach(model).load_state_dict(base).missing_keys


class TwoTowers(LlamaModel):
    """Two lists of blocks of the same length."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.others = copy.deepcopy(self.layers)


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        (lambda: nn.Linear(2, 2), "has no config"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=61)), "no config"),
        (lambda: TwoTowers(base_model("llama").config), "2 lists of 4 blocks each"),
    ],
)
def test_models_without_blocks_to_be_found_are_refused(model, wrong):
    with pytest.raises(ValueError, match=wrong):
        attach(model(), memory_config(), tokenizer())


@pytest.mark.parametrize(
    ("settings", "name", "wrong"),
    [
        ({"layers": (1, 4)}, "default", r"layers is \[1, 4\], but the model has blocks 0 to 3"),
        ({"fill_id": VOCABULARY}, "default", "fill_id"),
        ({"boundary": "end", "end_ids": (99,)}, "default", "end_ids"),
        ({}, "a.b", "name is 'a.b'"),
        ({}, "training", "name is 'training'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, name, wrong):
    model = base_model("llama")
    before = everything(model)
    with pytest.raises(ValueError, match=wrong):
        attach(model, memory_config(**settings), tokenizer(), name)
    assert everything(model) == before


def test_a_name_is_given_once_and_must_exist():
    model = attached_model("llama")
    with pytest.raises(ValueError, match="has a memory 'default'"):
        attach(model, memory_config(), tokenizer())
    for call in (lambda: detach(model, "other"), lambda: disabled(model, "other").__enter__()):
        with pytest.raises(ValueError, match="no memory 'other'; it has default"):
            call()
    with pytest.raises(ValueError, match="no memory attached"):
        detach(base_model("llama"))


def test_a_larger_tokenizer_and_unloaded_weights_are_refused():
    with pytest.raises(ValueError, match="has 61 ids, the model 60"):
        attach(base_model("llama", vocab_size=60), memory_config(), tokenizer())
    model = base_model("llama")
    nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
    with pytest.raises(ValueError, match="load the model's weights first"):
        attach(model, memory_config(), tokenizer())


def test_raw_ids_need_no_class_map():
    model, ids = base_model("llama", vocab_size=VOCABULARY + 3), random_ids(2, 9)
    attach(model, memory_config(compression="none"), tokenizer())
    randomize(model)
    assert attachment_of(model)["default"].memory.class_of_id is None
    assert model(ids).logits.isfinite().all()


def test_the_base_is_frozen_until_both_are_to_be_trained():
    model = base_model("llama")
    model.lm_head.weight.requires_grad_(False)
    own = list(model.parameters())
    attach(model, memory_config(), tokenizer())
    assert not any(p.requires_grad for p in own)
    assert {p.requires_grad for p in attachment_of(model).parameters()} == {True}
    set_trainable(model, "joint")
    assert all(p.requires_grad for p in model.parameters())
    set_trainable(model, "memory")
    detach(model)
    assert [p.requires_grad for p in own] == [p is not model.lm_head.weight for p in own]
    with pytest.raises(ValueError, match="what is 'base'"):
        set_trainable(attached_model("llama"), "base")


def test_fill_id_is_the_class_of_missing_history():
    assert attachment_of(attached_model("llama"))["default"].memory.geometry.fill_class == PAD


@torch.no_grad()
def test_hidden_states_given_by_name_are_found():
    model, ids = attached_model("llama"), random_ids(2, 9)
    expected = model(ids).logits
    blocks = model.model.layers

    def by_name(_, args, kwargs):
        return (), {"attention_mask": kwargs.pop("attention_mask"), "hidden_states": args[0], **kwargs}

    with blocks[1].register_forward_pre_hook(by_name, with_kwargs=True, prepend=True):
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_block_whose_forward_was_replaced_keeps_it():
    """As accelerate does to move blocks between devices."""
    model, ids, calls = attached_model("llama"), random_ids(2, 9), []
    block = model.model.layers[0]
    before = block.forward
    block.forward = lambda *args, **kwargs: (calls.append(1), before(*args, **kwargs))[1]
    model(ids)
    model(ids)
    assert len(calls) == 2


@torch.no_grad()
def test_an_attached_model_can_be_pickled(tmp_path):
    model, ids = attached_model("llama"), random_ids(2, 9)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    detach(loaded)
