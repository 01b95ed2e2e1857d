"""A patched model does what the plain loops do, and every way of decoding gives the logits of a full pass."""

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from attached_models import PAD
from edited_models import (
    OURS,
    WITH_MEMORY,
    edited_model,
    model_of_kind,
    plainly_patched,
    probes,
    rich_entries,
    rich_patch,
    small_patch,
    spoken_ids,
    tokenizer,
)
from engrammar.attach.state import MemoryState, Track
from engrammar.edit import apply_patch, undo_patch
from engrammar.edit import passes as passes_module
from engrammar.edit.applying import edits_of
from engrammar.edit.gating import CODES
from generated import EXACT, check_generated, full

KINDS = ["llama", "gpt2", "qwen3_moe", "gemma3_text", "deepseek_v4", "falcon_h1", WITH_MEMORY, OURS]
ROLLS_BACK = ["llama", "gpt2", "qwen3_moe", WITH_MEMORY, OURS]
NEW = 9
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True}


@functools.cache
def model_of(kind: str):
    model = edited_model(kind)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def padded(lengths: list[int], seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    ids = spoken_ids(len(lengths), max(lengths), seed)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def lengths_for(kind: str, *lengths: int) -> list[int]:
    """All the same for a base that cannot skip padding itself."""
    return [max(lengths)] * len(lengths) if kind == "deepseek_v4" else list(lengths)


def generate(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **{**GREEDY, **settings})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_full_pass_is_edited_as_by_plain_loops(kind):
    model, ids = model_of_kind(kind), spoken_ids(3, 41)
    with plainly_patched(model, rich_entries(), probes(), ids):
        expected = full(model, ids)
    base = full(model, ids)
    apply_patch(model, rich_patch(model), tokenizer())
    found = full(model, ids)
    torch.testing.assert_close(found, expected, **EXACT)
    assert ((found - base).abs().amax(-1) > 1e-3).float().mean() > 0.5  # there is something to compare


def test_the_texts_hold_every_kind_of_write(monkeypatch):
    """Each step of each entry is written somewhere, and some object is said to its end."""
    direct, decided = [], []
    found, decide = passes_module.direct_writes, passes_module.decide
    monkeypatch.setattr(passes_module, "direct_writes", lambda *given: direct.append(found(*given)) or direct[-1])
    monkeypatch.setattr(passes_module, "decide", lambda *given: decided.append(decide(*given)) or decided[-1])
    model = model_of("llama")
    for seed in range(3, 9):
        full(model, spoken_ids(3, 41, seed))
    writes = [*direct, *(gated for gated, _ in decided)]
    written = {pair for one in writes for pair in zip(one.entry.tolist(), one.step.tolist())}
    num_steps = edits_of(model).hooks.stack.columns["num_steps"]
    assert written == {(entry, step) for entry, count in enumerate(num_steps) for step in range(count)}
    codes = np.concatenate([codes.flatten() for _, codes in decided])
    entry, step = np.divmod(codes[codes >= 0], CODES)
    assert (step == num_steps[entry]).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_padded_rows_are_edited_as_by_plain_loops(kind):
    model, (ids, mask) = model_of_kind(kind), padded([23, 11, 4])
    positions = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with plainly_patched(model, rich_entries(), probes(), ids.masked_fill(mask == 0, -1)):
        expected = model(input_ids=ids, use_cache=False, **positions).logits
    apply_patch(model, rich_patch(model), tokenizer())
    logits = model(input_ids=ids, use_cache=False, **positions).logits
    torch.testing.assert_close(logits[mask > 0], expected[mask > 0], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1] * 31, [9, 1, 1, 12, 8]], ids=["tokens", "chunks"])
@torch.no_grad()
def test_any_split_equals_whole(kind, sizes):
    model, ids = model_of(kind), spoken_ids(2, 31)
    cache, parts = None, []
    for part in ids.split(sizes, dim=1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full(model, ids), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_in_a_padded_batch(kind):
    model, lengths = model_of(kind), lengths_for(kind, 21, 9, 2)
    check_generated(model, generate(model, *padded(lengths)), lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["no cache", "chunked prefill", "sampling"])
def test_other_ways_of_decoding(kind, how):
    model, lengths = model_of(kind), lengths_for(kind, 21, 9)
    if how == "no cache":
        settings = {"use_cache": False}
    elif how == "chunked prefill":
        settings = {"prefill_chunk_size": 4}
    else:
        torch.manual_seed(0)
        settings = {"do_sample": True, "top_k": 0, "num_return_sequences": 2}
    check_generated(model, generate(model, *padded(lengths), **settings), lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_beams(kind):
    """The score of a beam is the sum of its tokens' log probabilities in a full pass."""
    model, lengths = model_of(kind), lengths_for(kind, 15, 9)
    out = generate(model, *padded(lengths), num_beams=3, num_return_sequences=2, output_scores=True, length_penalty=0.0)
    for row, ids in enumerate(out.sequences):
        length = lengths[row // 2]
        logits = full(model, ids[None, max(lengths) - length :])[0]
        chosen = logits.log_softmax(-1)[length - 1 : -1].gather(1, ids[-NEW:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row], chosen, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "falcon_h1", WITH_MEMORY, OURS])
def test_static_cache(kind):
    model, lengths = model_of(kind), [21, 9]
    check_generated(model, generate(model, *padded(lengths), cache_implementation="static"), lengths)


@pytest.mark.parametrize("kind", ["llama", "gpt2", WITH_MEMORY])
def test_assisted_decoding(kind, monkeypatch):
    """Drafts of the prompt are checked in one pass, and the rejected ones are taken back."""
    taken_back, crop = [], MemoryState.crop
    monkeypatch.setattr(MemoryState, "crop", lambda state, count: (taken_back.append(-count), crop(state, count)))
    model, ids = model_of(kind), spoken_ids(1, 9).repeat(1, 3)
    check_generated(model, generate(model, ids, prompt_lookup_num_tokens=4), [27])
    assert max(taken_back) > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", OURS])
def test_a_draft_model_with_the_same_patch(kind):
    model, helper, ids = model_of(kind), edited_model(kind), spoken_ids(1, 15)
    helper.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0, pad_token_id=PAD)
    check_generated(model, generate(model, ids, assistant_model=helper), [15])


def filled(model, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def next_logits(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_done_to_the_batch_of_a_cache_is_done_to_the_state(kind):
    model, ids, more = model_of(kind), spoken_ids(3, 23), spoken_ids(3, 6, seed=8)
    order = torch.tensor([2, 0, 0])
    cache = filled(model, ids)
    cache.reorder_cache(order)
    logits = next_logits(model, cache, more)
    torch.testing.assert_close(logits, full(model, torch.cat([ids[order], more], 1))[:, 23:], **EXACT)


@pytest.mark.parametrize("kind", ROLLS_BACK)
@pytest.mark.parametrize("lost", [1, 5, 30])
@torch.no_grad()
def test_tokens_are_taken_back_any_number_of_times(kind, lost):
    model, ids, more = model_of(kind), spoken_ids(2, 73), spoken_ids(2, 12, seed=8)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for part in (*ids[:, :40].split(40, 1), *ids[:, 40:].split(3, 1)):
        next_logits(model, cache, part)
    cache.crop(-lost)
    logits = [next_logits(model, cache, part) for part in more.split([1, 11], 1)]
    expected = full(model, torch.cat([ids[:, :-lost], more], 1))[:, 73 - lost :]
    torch.testing.assert_close(torch.cat(logits, 1), expected, **EXACT)


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    model, ids = model_of("llama"), spoken_ids(1, 13)
    cache = filled(model, ids)
    for seed in (1, 2):
        more = spoken_ids(1, 5, seed)
        logits = next_logits(model, copy.deepcopy(cache), more)
        torch.testing.assert_close(logits, full(model, torch.cat([ids, more], 1))[:, 13:], **EXACT)


@torch.no_grad()
def test_a_static_cache_is_used_again_after_a_reset_and_holds_no_more_than_is_read():
    model, cache = model_of("llama"), StaticCache(config=model_of("llama").config, max_cache_len=40)
    for seed in (1, 2):
        ids = spoken_ids(2, 35, seed)
        logits = [next_logits(model, cache, part) for part in ids.split([20, 1, 14], 1)]
        torch.testing.assert_close(torch.cat(logits, 1), full(model, ids), **EXACT)
        state = cache.layers[-1]
        assert [len(track) for track in state.tracks()] == [track.window for track in state.tracks()] == [7, 7, 7]
        cache.reset()


@pytest.mark.parametrize("dropped", [0, 1, 2], ids=["ids", "keys that were found", "writes"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "deepseek_v4"])
def test_without_the_state_the_test_fails(kind, dropped, monkeypatch):
    """The control: with any of the three things that the state carries left out, decoding is wrong."""
    extend, latest = Track.extend, Track.latest
    before = MemoryState.tracks

    def is_dropped(track) -> bool:
        return getattr(track, "number", None) == dropped

    def numbered(state):
        for number, track in enumerate(before(state)):
            track.number = number
        return before(state)

    def begun(state, *args, init=MemoryState.__init__):
        init(state, *args)
        numbered(state)

    monkeypatch.setattr(MemoryState, "__init__", begun)
    monkeypatch.setattr(Track, "extend", lambda t, new, keep: new if is_dropped(t) else extend(t, new, keep))
    monkeypatch.setattr(Track, "latest", lambda t: None if is_dropped(t) else latest(t))
    with pytest.raises(AssertionError, match="not close"):
        for seed in range(5):  # what a dropped track would have held matters in some texts only
            model, ids = model_of(kind), spoken_ids(2, 31, seed)
            parts, cache = [], None
            for part in ids.split([9, 1, 1, 12, 8], dim=1):
                with torch.no_grad():
                    out = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1), full(model, ids), **EXACT)


@torch.no_grad()
def test_packed_documents_are_edited_one_by_one():
    model, first, second = model_of("llama"), spoken_ids(1, 19), spoken_ids(1, 12, seed=9)
    positions = torch.cat([torch.arange(19), torch.arange(12)])[None]
    packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :19], full(model, first), **EXACT)
    torch.testing.assert_close(packed[:, 19:], full(model, second), **EXACT)


@torch.no_grad()
def test_a_cache_of_other_patches_is_refused():
    model, ids = model_of_kind("llama"), spoken_ids(1, 9)
    plain = filled(model, ids)
    apply_patch(model, rich_patch(model), tokenizer())
    patched = filled(model, ids)
    with pytest.raises(ValueError, match="memory 'applied patches' has seen none of them: pass a cache"):
        next_logits(model, plain, ids)
    apply_patch(model, small_patch(model, "second", (40,)))
    with pytest.raises(ValueError, match="holds 9 positions, and the memory 'applied patches' has seen none"):
        next_logits(model, patched, ids)
    undo_patch(model, "second")
    logits = next_logits(model, patched, ids)
    torch.testing.assert_close(logits, full(model, ids.repeat(1, 2))[:, 9:], **EXACT)
