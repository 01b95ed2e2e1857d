"""Continuous batching gives the log probabilities of full passes of the same patched model."""

import pytest

import batches
from batches import check
from edited_models import WITH_MEMORY, model_of_kind, rich_patch, spoken_ids, tokenizer
from engrammar.edit import apply_patch, undo_patch
from engrammar.edit.exact import NOTHING
from engrammar.edit.sequences import FOUND, WRITTEN, Requests

LENGTHS = (14, 41, 1, 23, 5, 2)
SHARED = 17  # tokens in which two prompts are alike: longer than a page of the cache


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger=batches.LOGGER)


def patched(kind: str):
    model = model_of_kind(kind)
    apply_patch(model, rich_patch(model), tokenizer())
    return model


def batches_of(model, **settings):
    """Prompts that end amid what an entry says; the first one is cut there, where a write is under way."""
    prompts = [[*spoken_ids(1, length, seed)[0].tolist(), 14, 30] for seed, length in enumerate(LENGTHS)]
    chosen = {"max_batch_tokens": 5, **settings}
    return batches.generate(model, [*prompts, [*prompts[1][:SHARED], 3, 12, 30]], **chosen)


@pytest.mark.parametrize("kind", ["llama", WITH_MEMORY])
def test_requests_of_all_lengths_in_one_batch(kind):
    model = patched(kind)
    outputs = [*batches_of(model)]
    check(model, outputs)
    undo_patch(model)
    with pytest.raises(AssertionError, match="not close"):  # the control: the patch changes these very texts
        check(model, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"num_blocks": 20}, {"allow_block_sharing": False}, {"max_batch_tokens": 64}])
def test_other_ways_of_batching(settings):
    model = patched("llama")
    check(model, batches_of(model, **settings))


@pytest.mark.parametrize("dropped", [FOUND, WRITTEN])
def test_without_what_is_kept_the_test_fails(dropped, monkeypatch):
    model, before = patched("llama"), Requests._before

    def without(requests, name):
        known = before(requests, name)
        return known * 0 + NOTHING if name == dropped else known

    monkeypatch.setattr(Requests, "_before", without)
    with pytest.raises(AssertionError, match="not close"):
        check(model, batches_of(model))
