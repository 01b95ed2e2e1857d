"""What people do with any transformers model works on ours: resize, record, cast, place, compile, generate."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline

from engrammar.config import DIALECTS
from engrammar.model.modeling import EngrammarForCausalLM, EngrammarModel
from models import END, PAD, VOCABULARY, tiny_memory, tiny_model

GREEDY = {"max_new_tokens": 7, "eos_token_id": None, "pad_token_id": PAD, "do_sample": False}


def random_ids(batch: int = 2, length: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def addressed(model: EngrammarForCausalLM, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    return model.model.memory.addresses(ids)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_a_resized_vocabulary_moves_no_row_and_is_saved(dialect, tied, tmp_path):
    model, ids = tiny_model(dialect, 2, tie_word_embeddings=tied), random_ids()
    rows, hidden = addressed(model, ids), model.model(ids).last_hidden_state
    model.resize_token_embeddings(VOCABULARY + 10)
    assert torch.equal(model.model(ids).last_hidden_state, hidden)
    new = torch.tensor([[5, VOCABULARY + 3, 6, 7]])
    assert model(new).logits.shape[-1] == VOCABULARY + 10 and torch.isfinite(model(new).logits).all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    torch.testing.assert_close(loaded(new).logits, model(new).logits, atol=1e-6, rtol=0)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    loaded.resize_token_embeddings(VOCABULARY - 9)
    few = ids.clamp_max(VOCABULARY - 10)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_ids == again.config.vocab_size == VOCABULARY - 9
    first = tiny_model(dialect, 2, tie_word_embeddings=tied).model(few).last_hidden_state
    torch.testing.assert_close(again.model(few).last_hidden_state, first, atol=1e-5, rtol=0)
    assert again(few).logits.shape[-1] == VOCABULARY - 9
    for layer, rows_BTH in addressed(model, ids).items():
        assert torch.equal(rows_BTH, rows[layer])
        assert torch.equal(addressed(again, few)[layer], addressed(model, few)[layer])


@pytest.mark.parametrize("dialect", ["paper", "qwen_next"])
def test_a_new_id_is_to_the_memory_as_missing_history(dialect):
    model = tiny_model(dialect)
    model.resize_token_embeddings(VOCABULARY + 2)
    fill_class = model.config.memory_geometry.fill_class
    memory = model.model.memory
    assert memory.class_of_id[VOCABULARY:].tolist() == [fill_class] * 2
    if dialect == "paper":  # where another id has that class
        known = next(i for i in range(END + 1, VOCABULARY) if int(memory.class_of_id[i]) == fill_class)
        rows, new = (addressed(model, torch.tensor([[5, token_id, 6]])) for token_id in (known, VOCABULARY))
        assert all(torch.equal(rows[layer], new[layer]) for layer in rows)
    model.resize_token_embeddings(VOCABULARY)
    assert (memory.class_of_id is None) == (dialect == "qwen_next")


def test_a_vocabulary_does_not_shrink_below_the_ids_that_the_memory_names():
    model = tiny_model("qwen_next")
    with pytest.raises(ValueError, match=r"cannot shrink to 2 ids: .* names id 2; keep 3 or more"):
        model.resize_token_embeddings(END)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == VOCABULARY


@torch.no_grad()
def test_padding_the_vocabulary_to_a_multiple_resizes_the_class_map():
    model = tiny_model("paper")
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.config.vocab_size == len(model.model.memory.class_of_id) == 56
    assert model.resize_token_embeddings().num_embeddings == 56
    assert model(torch.tensor([[55, 3]])).logits.shape == (1, 2, 56)


@pytest.mark.parametrize("branches", [1, 3])
@torch.no_grad()
def test_recorded_hidden_states_are_the_mean_of_the_branches(branches):
    model, ids = tiny_model("paper", branches), random_ids()
    streams = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: streams.append(out)) for block in model.model.layers]
    outputs = model.model(ids, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, model.model(ids).last_hidden_state)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 13, 32)] * 5
    assert torch.equal(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    for state, streams_BTMD in zip(outputs.hidden_states[1:-1], streams):
        assert torch.equal(state, streams_BTMD.mean(2))
    chosen = model(ids, output_hidden_states=[2]).hidden_states
    assert torch.equal(chosen[2], outputs.hidden_states[2]) and chosen[1] is None
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_attentions_and_router_logits_are_recorded():
    model, ids = tiny_model("paper", 2), random_ids()
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True, output_router_logits=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 13, 13)] * 4
    assert all(torch.allclose(weights.sum(-1), torch.ones(2, 2, 13)) for weights in outputs.attentions)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(26, 4)] * 3


@torch.no_grad()
def test_grouped_experts_are_a_choice_and_plain_ones_the_default():
    model, ids = tiny_model("paper", 2), random_ids()
    assert model.config._experts_implementation == "eager"
    plain = model(ids).logits
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_cast_model_runs_and_loads_as_cast(dtype, tmp_path):
    model, ids = tiny_model("paper", 3), random_ids()
    model.save_pretrained(tmp_path)
    loaded, cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), copy.deepcopy(model).to(dtype)
    assert torch.equal(loaded(ids).logits, cast(ids).logits) and cast(ids).logits.dtype == dtype
    assert loaded.model.memory.class_of_id.dtype == torch.int64
    torch.testing.assert_close(cast(ids).logits.float(), model(ids).logits, atol=2e-2, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cached", ["no", "use_cache", "past_key_values"])
def test_checkpointed_gradients_are_equal_with_a_cache_too(reentrant, cached):
    """The backward pass computes each block again, and must not add its tokens to a cache a second time (S14)."""
    model, ids = tiny_model("paper", 3).train(), random_ids()
    recomputed = copy.deepcopy(model)
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    settings = {
        "no": {"use_cache": False},
        "use_cache": {"use_cache": True},
        "past_key_values": {"past_key_values": DynamicCache(config=model.config)},
    }[cached]
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    again = recomputed(ids, labels=ids, **settings).loss
    again.backward()
    assert torch.equal(loss, again)
    for (name, plain), other in zip(model.named_parameters(), recomputed.parameters()):
        assert (plain.grad is None) == (other.grad is None), name
        if plain.grad is not None:
            assert torch.equal(plain.grad.to_dense(), other.grad.to_dense()), name


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_forward_pass_is_equal():
    """One block, with memory and experts: compiling is slow."""
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "memory": tiny_memory("paper") | {"layers": [0]}}
    model, ids = tiny_model("paper", 2, **one), random_ids()
    model.model.memory.require_classes()
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@torch.no_grad()
def test_a_device_map_loads_the_same_model(device_map, tmp_path):
    model, ids = tiny_model("paper", 2), random_ids()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)(ids).logits, model(ids).logits
    )


@pytest.mark.parametrize("offloaded", ["model.memory", "model.layers"])
@torch.no_grad()
def test_what_accelerate_offloads_to_disk_gives_the_same_logits(offloaded, tmp_path):
    model, ids = tiny_model("paper", 2), random_ids()
    model.save_pretrained(tmp_path / "model")
    names = ("embed_tokens", "memory", "layers", "recorded", "collapse", "norm", "rotary_emb")
    device_map = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu", offloaded: "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    for use_cache in (False, True):
        assert torch.equal(loaded(ids, use_cache=use_cache).logits, model(ids, use_cache=use_cache).logits)


@torch.no_grad()
def test_generation_goes_on_from_the_cache_that_it_returned():
    model, ids = tiny_model("paper", 2), random_ids(1)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(rest, model.generate(ids, **GREEDY | {"max_new_tokens": 14}))


@torch.no_grad()
def test_generation_returns_all_that_is_asked_of_it():
    model, ids = tiny_model("paper", 2), random_ids()
    model.set_attn_implementation("eager")
    asked = {f"output_{name}": True for name in ("hidden_states", "attentions", "scores", "logits")}
    output = model.generate(ids, return_dict_in_generate=True, **asked, **GREEDY)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == 7
    assert [tuple(state.shape) for state in output.hidden_states[1]] == [(2, 1, 32)] * 5
    assert output.attentions[3][0].shape == (2, 2, 1, 16)
    again = model.generate(ids, position_ids=torch.arange(13)[None].expand(2, -1), **GREEDY)
    assert torch.equal(output.sequences, again)


@torch.no_grad()
def test_what_generation_cannot_do_is_said_in_one_sentence():
    model, ids = tiny_model("paper"), random_ids()
    with pytest.raises(ValueError, match="only supported for models with only full attention"):
        model.generate(ids, cache_implementation="quantized", **GREEDY)
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds alone"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)


@torch.no_grad()
def test_a_text_generation_pipeline_gives_one_answer_in_batches_and_alone():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{PAD}", eos_token=f"w{END}")
    answer = pipeline("text-generation", model=tiny_model("paper", 2), tokenizer=tokenizer)
    prompts = ["w5 w6 w7 w8", "w9"]
    alone = [answer(prompt, max_new_tokens=5, do_sample=False) for prompt in prompts]
    assert answer(prompts, max_new_tokens=5, do_sample=False, batch_size=2) == alone
    assert all(one[0]["generated_text"].startswith(prompt) for one, prompt in zip(alone, prompts))


def test_a_head_on_a_bare_backbone_is_refused_unless_the_loading_report_is_asked_for(tmp_path):
    model = tiny_model("paper", 2)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights .*lm_head\.weight.*output_loading_info=True"):
        EngrammarForCausalLM.from_pretrained(tmp_path)
    loaded, report = EngrammarForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(loaded.model(random_ids()).last_hidden_state, model.model(random_ids()).last_hidden_state)
    model.save_pretrained(tmp_path)
    bare = EngrammarModel.from_pretrained(tmp_path)
    assert torch.equal(bare(random_ids()).last_hidden_state, model.model(random_ids()).last_hidden_state)
