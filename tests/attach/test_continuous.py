"""Continuous batching gives the tokens, and their log probabilities, of full passes of the same attached model."""

import pytest
import torch

import batches
from attached_models import attached_model, random_ids, randomize, tokenizer
from batches import check
from engrammar.attach import attach, disabled
from engrammar.attach.attaching import attachment_of
from engrammar.attach.paged import PagedState

FAMILIES = ["llama", "gemma3_text"]
FAMILIES += [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3", "qwen3_moe", "olmo2", "mixtral")]
LENGTHS = (5, 23, 1, 9, 14)
FORKS = {"do_sample": True, "num_return_sequences": 3}


def prompts() -> list[list[int]]:
    """Prompts of several lengths, of which two begin alike for longer than a page of the cache."""
    found = [random_ids(1, length, seed)[0].tolist() for seed, length in enumerate(LENGTHS)]
    return [*found, [*found[1][:17], 3, 4, 5]]


def batches_of(model, **settings):
    return batches.generate(model, prompts(), **settings)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger=batches.LOGGER)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_of_all_lengths_in_one_batch(family):
    """Sixteen tokens a pass: prompts are cut into chunks, which stand beside requests that are decoding."""
    model = attached_model(family)
    outputs = batches_of(model)
    assert [len(out.generated_tokens) for out in outputs] == [8] * (len(LENGTHS) + 1)
    check(model, outputs)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 14},
        pytest.param({"allow_block_sharing": False}, marks=pytest.mark.slow),
        pytest.param({"max_batch_tokens": 64}, marks=pytest.mark.slow),
        FORKS,
    ],
    ids=str,
)
def test_other_ways_of_batching(settings):
    """Too few blocks for all requests; no shared prefixes; one pass for all; requests that fork."""
    model = attached_model("llama", {"max_ngram_size": 4, "rows_per_head": (97, 101, 103)})
    attach(model, attachment_of(model)["default"].config, tokenizer(), "second")
    randomize(model)
    outputs = batches_of(model, **settings)
    assert len(outputs) == (len(LENGTHS) + 1) * settings.get("num_return_sequences", 1)
    check(model, outputs)


@pytest.mark.parametrize("dropped", ["history", "window"])
def test_without_the_state_the_test_fails(dropped, monkeypatch):
    model, seen = attached_model("llama"), PagedState.seen

    def without_past(state, values_P, places_T, missing):
        found = seen(state, values_P, places_T, missing)
        is_dropped = found.is_floating_point() == (dropped == "window")
        return torch.full_like(found, missing) if is_dropped else found

    monkeypatch.setattr(PagedState, "seen", without_past)
    with pytest.raises(AssertionError, match="not close"):
        check(model, batches_of(model))


def test_slots_that_were_filled_without_the_memory_are_refused():
    """As if the base had moved the cache without the state: the memory is off in every other pass."""
    model, calls = attached_model("llama"), []

    def every_other(*_):
        calls.append(1)
        attachment_of(model).closed["default"] = len(calls) % 2

    with model.register_forward_pre_hook(every_other):
        outputs = batches_of(model)
    attachment_of(model).closed.clear()
    refused = [out.error for out in outputs if out.error]
    assert refused and all("has not seen there" in error for error in refused)


def test_requests_that_fork_without_the_state_are_refused(monkeypatch):
    """The control of forking: blocks that are copied in the base's cache alone."""
    monkeypatch.setattr(PagedState, "_copy_blocks", lambda _, copy, source, copied: copy(source, copied))
    refused = [out.error for out in batches_of(attached_model("llama"), **FORKS) if out.error]
    assert refused and all("has not seen there" in error for error in refused)


def test_a_model_of_sliding_windows_only_is_refused():
    model = attached_model("mixtral", sliding_window=6)
    assert all("without full attention" in out.error for out in batches_of(model))
    with disabled(model):
        assert all(out.error is None for out in batches_of(model))
