"""Every way of decoding gives the logits of a full forward pass of the same attached model, in every family."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from attached_models import FAMILIES, PAD, VOCABULARY, attached_model, memory_config, random_ids
from engrammar.attach.state import MemoryState, Track
from generated import EXACT, check_generated, full

NEW = 9
# What transformers' own models cannot do: take back tokens of a recurrent or compressed state (they refuse), keep a
# compressed state in a static cache, and skip padding when compressing (the plain model's logits move by 0.07).
ROLLS_BACK = [f for f in FAMILIES if f not in ("deepseek_v4", "qwen4_exp_text", "falcon_h1", "mamba2")]
STATIC = [family for family in FAMILIES if family != "deepseek_v4"]
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True}


@functools.cache
def model_of(family: str):
    model = attached_model(family)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def ragged(family: str, *lengths: int) -> list[int]:
    """Lengths of rows to be padded; all the same for a model that cannot skip padding."""
    return [max(lengths)] * len(lengths) if family == "deepseek_v4" else list(lengths)


def padded(lengths: list[int], seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of random ids, padded on the left, and their mask."""
    ids = random_ids(len(lengths), max(lengths), seed)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def generate(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **{**GREEDY, **settings})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[1] * 17, [7, 1, 1, 5, 3]], ids=["tokens", "chunks"])
@torch.no_grad()
def test_any_split_equals_whole(family, sizes):
    model, ids = model_of(family), random_ids(2, 17)
    name = "cache_params" if family == "mamba2" else "past_key_values"
    cache, parts = None, []
    for part in ids.split(sizes, dim=1):
        out = model(input_ids=part, use_cache=True, **{name: cache})
        cache = out[name]
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full(model, ids), **EXACT)


@pytest.mark.parametrize("family", STATIC)
@torch.no_grad()
def test_left_padding_changes_nothing(family):
    model, lengths = model_of(family), [11, 4, 1]
    ids, mask = padded(lengths)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row, -length:], full(model, ids[row : row + 1, -length:])[0], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_in_a_padded_batch(family):
    model, lengths = model_of(family), ragged(family, 11, 4, 1)
    check_generated(model, generate(model, *padded(lengths)), lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache(family):
    model, lengths = model_of(family), ragged(family, 11, 4)
    check_generated(model, generate(model, *padded(lengths), use_cache=False), lengths)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba2"])  # transformers refuses it
def test_chunked_prefill(family):
    model, lengths = model_of(family), ragged(family, 11, 4)
    check_generated(model, generate(model, *padded(lengths), prefill_chunk_size=3), lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family):
    """The score of a beam is the sum of its tokens' log probabilities in a full pass."""
    model, lengths = model_of(family), ragged(family, 7, 3)
    out = generate(model, *padded(lengths), num_beams=3, num_return_sequences=2, output_scores=True, length_penalty=0.0)
    for row, ids in enumerate(out.sequences):
        length = lengths[row // 2]
        logits = full(model, ids[None, max(lengths) - length :])[0]
        chosen = logits.log_softmax(-1)[length - 1 : -1].gather(1, ids[-NEW:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row], chosen, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling(family):
    model, lengths = model_of(family), ragged(family, 7, 7)
    torch.manual_seed(0)
    out = generate(model, *padded(lengths), do_sample=True, top_k=0, num_return_sequences=3)
    assert len({tuple(row.tolist()) for row in out.sequences}) > 2
    check_generated(model, out, lengths)


@pytest.mark.parametrize("family", STATIC)
def test_static_cache(family):
    model, lengths = model_of(family), ragged(family, 11, 4)
    check_generated(model, generate(model, *padded(lengths), cache_implementation="static"), lengths)


@pytest.mark.parametrize("family", ROLLS_BACK)
@pytest.mark.parametrize("how", ["draft", "lookup"])
def test_assisted_decoding(family, how, monkeypatch):
    """Drafts of another model, or of the prompt, are checked in one pass, and the rejected ones are taken back."""
    taken_back, crop = [], MemoryState.crop
    monkeypatch.setattr(MemoryState, "crop", lambda state, count: (taken_back.append(-count), crop(state, count)))
    model, ids = model_of(family), random_ids(1, 6).repeat(1, 3)
    if how == "draft":
        helper = attached_model(family)
        noise = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            helper.get_output_embeddings().weight.add_(noise * 0.01)
        helper.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
        out = generate(model, ids, assistant_model=helper)
    else:
        out = generate(model, ids, prompt_lookup_num_tokens=4)
    assert max(taken_back) > 0
    assert how == "lookup" or len(taken_back) < 2 * NEW  # some drafts were accepted
    check_generated(model, out, [18])


def filled(model, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    next_logits(model, cache, ids)
    return cache


def next_logits(model, cache, ids: torch.Tensor) -> torch.Tensor:
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    return model(input_ids=ids, use_cache=True, **{name: cache}).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_done_to_the_batch_of_a_cache_is_done_to_the_state(family):
    model, ids, more = model_of(family), random_ids(3, 13), random_ids(3, 4, seed=8)
    order = torch.tensor([2, 0, 0])
    cache = filled(model, ids)
    cache.reorder_cache(order)
    logits = next_logits(model, cache, more)
    torch.testing.assert_close(logits, full(model, torch.cat([ids[order], more], 1))[:, 13:], **EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_sequences_of_a_cache_are_selected_and_repeated(family):
    model, ids, more = model_of(family), random_ids(3, 13), random_ids(4, 4, seed=8)
    cache = filled(model, ids)
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    logits = next_logits(model, cache, more)
    torch.testing.assert_close(logits, full(model, torch.cat([ids[[2, 2, 1, 1]], more], 1))[:, 13:], **EXACT)


@pytest.mark.parametrize("family", ROLLS_BACK)
@pytest.mark.parametrize("lost", [1, 5, 30])
@torch.no_grad()
def test_tokens_are_taken_back_any_number_of_times(family, lost):
    model, ids, more = model_of(family), random_ids(2, 73), random_ids(2, 40, seed=8)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for part in (*ids[:, :40].split(40, 1), *ids[:, 40:].split(1, 1)):
        next_logits(model, cache, part)
    cache.crop(-lost)
    logits = [next_logits(model, cache, part) for part in more.split([1, 39], 1)]
    expected = full(model, torch.cat([ids[:, :-lost], more], 1))[:, 73 - lost :]
    torch.testing.assert_close(torch.cat(logits, 1), expected, **EXACT)


@torch.no_grad()
def test_a_conversation_is_cut_back_to_its_start():
    """A cache of full attention keeps all positions, so it can be cut anywhere without a word before."""
    model, ids, more = model_of("llama"), random_ids(1, 200), random_ids(1, 9, seed=8)
    cache = filled(model, ids)
    cache.crop(-190)
    torch.testing.assert_close(
        next_logits(model, cache, more), full(model, torch.cat([ids[:, :10], more], 1))[:, 10:], **EXACT
    )


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    model, ids = model_of("llama"), random_ids(1, 13)
    cache = filled(model, ids)
    for seed in (1, 2):
        more = random_ids(1, 3, seed)
        logits = next_logits(model, copy.deepcopy(cache), more)
        torch.testing.assert_close(logits, full(model, torch.cat([ids, more], 1))[:, 13:], **EXACT)


@torch.no_grad()
def test_a_static_cache_is_used_again_after_a_reset():
    model, cache = model_of("llama"), StaticCache(config=model_of("llama").config, max_cache_len=20)
    for seed in (1, 2):
        ids = random_ids(2, 15, seed)
        logits = [next_logits(model, cache, part) for part in ids.split([8, 1, 6], 1)]
        torch.testing.assert_close(torch.cat(logits, 1), full(model, ids), **EXACT)
        cache.reset()


@torch.no_grad()
def test_a_static_cache_holds_no_more_of_the_past_than_is_read():
    model = model_of("llama")
    cache = StaticCache(config=model.config, max_cache_len=40)
    for part in random_ids(2, 30).split([20, 1, 1, 8], 1):
        next_logits(model, cache, part)
    state = cache.layers[-1]
    assert [len(track) for track in state.tracks()] == [2, 9, 9]


@pytest.mark.parametrize("dropped", ["history", "window"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_state_the_test_fails(family, dropped, monkeypatch):
    """The control: with the look-back ids, or the convolution's window, left out, decoding is wrong."""
    extend = Track.extend

    def without_past(track, new, keep_all):
        is_dropped = new.is_floating_point() == (dropped == "window")
        with_past = extend(track, new, keep_all)
        return new if is_dropped else with_past

    monkeypatch.setattr(Track, "extend", without_past)
    with pytest.raises(AssertionError, match="not close"):
        test_any_split_equals_whole(family, [7, 1, 1, 5, 3])


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in ("llama", "gpt2", "gemma3_text") for kind in ("own", "plain", "static")),
        *((family, kind) for family in ("lfm2", "falcon_h1") for kind in ("own", "static")),
    ],
)
def test_a_conversation_goes_on_from_the_cache(family, kind):
    """`generate` again and again with the cache of the turn before: its own, one without a config, a static one."""
    model, ids = model_of(family), random_ids(1, 7)
    cache = {"own": None, "plain": DynamicCache(), "static": StaticCache(config=model.config, max_cache_len=80)}[kind]
    for turn in range(3):
        out = generate(model, ids, past_key_values=cache)
        check_generated(model, out, [ids.shape[1]])
        cache = out.past_key_values
        assert sum(isinstance(layer, MemoryState) for layer in cache.layers) == 1
        ids = torch.cat([out.sequences, random_ids(1, 5, seed=turn)], dim=1)


def test_drafts_of_an_early_exit_are_exact():
    model, ids = model_of("llama"), random_ids(1, 6).repeat(1, 3)
    check_generated(model, generate(model, ids, assistant_early_exit=2), [18])


def test_a_quantized_cache_carries_the_state():
    """Keys and values lose bits, the memory's state does not: only attention differs from an exact cache."""
    model, ids = model_of("llama"), random_ids(2, 7)
    exact = generate(model, ids).past_key_values.layers[-1]
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    out = generate(model, ids, **settings)
    state = out.past_key_values.layers[-1]
    assert isinstance(state, MemoryState) and state.seen == exact.seen == 7 + NEW - 1
    lossy = out.logits[0] - full(model, ids)[:, -1]
    assert lossy.abs().max() < 0.05


def test_what_was_not_recorded_is_not_taken_back():
    state = MemoryState("default", memory_config(), 2, {})
    for part in random_ids(2, 20).split([18, 1, 1], 1):
        state.history(part, keep_all=False)
    with pytest.raises(ValueError, match="cannot take back 1 tokens"):
        state.crop(-1)
    with pytest.raises(ValueError, match="give minus the number"):
        state.crop(3)
    with pytest.raises(ValueError, match="the cache holds"):
        state.crop(-1000)
    assert state.seen == 20 and len(state.ids) == 2
