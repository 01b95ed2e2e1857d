"""Continuous batching gives the log probabilities of full passes of our own models, patched or not."""

import pytest
import torch

import batches
from batches import check
from edited_models import OURS, model_of_kind, rich_patch, spoken_ids, tokenizer
from engrammar.attach.paged import PagedState
from engrammar.edit import apply_patch
from engrammar.serve.flat import batched_continuously
from models import END, VOCABULARY, tiny_model

ODD = {"kv_lora_rank": 15, "v_head_dim": 12}  # latents of an odd width; values wider than keys without rotary parts


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger=batches.LOGGER)


def prompts() -> list[list[int]]:
    """Two begin alike for longer than a page of the cache; the long one has ends of texts in it."""
    draw = torch.Generator().manual_seed(3)
    made = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in (1, 5, 61, 14, 2)]
    for place in (1, 20, 57):
        made[2][place] = END
    return [*made, [*made[2][:40], 3, 4, 5]]


@pytest.mark.parametrize(
    ("dialect", "branches", "sizes"),
    [
        ("paper", 2, {}),
        pytest.param("qwen_next", 1, ODD, marks=pytest.mark.slow),
        pytest.param("deepseek_v41", 3, {}, marks=pytest.mark.slow),
        pytest.param(None, 2, ODD, marks=pytest.mark.slow),
    ],
)
def test_requests_of_all_lengths_in_one_batch(dialect, branches, sizes):
    model = tiny_model(dialect, branches, **sizes)
    with batched_continuously(model):
        outputs = [*batches.generate(model, prompts())]
    check(model, outputs)
    ids = torch.tensor([prompts()[1]])
    assert model.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]  # the model is as it was


@pytest.mark.parametrize("dropped", ["history", "window"])
def test_without_the_state_the_test_fails(dropped, monkeypatch):
    model, seen = tiny_model("paper", 2), PagedState.seen

    def without_past(state, values_P, places_T, missing):
        found = seen(state, values_P, places_T, missing)
        is_dropped = found.is_floating_point() == (dropped == "window")
        return torch.full_like(found, missing) if is_dropped else found

    monkeypatch.setattr(PagedState, "seen", without_past)
    with batched_continuously(model):
        outputs = [*batches.generate(model, prompts())]
    with pytest.raises(AssertionError, match="not close"):
        check(model, outputs)


@pytest.mark.parametrize("patch_first", [True, False])
def test_with_a_patch(patch_first):
    model = model_of_kind(OURS)
    patch = rich_patch(model)
    if patch_first:
        apply_patch(model, patch, tokenizer())
    with batched_continuously(model):
        if not patch_first:
            apply_patch(model, patch, tokenizer())
        outputs = [*batches.generate(model, [spoken_ids(1, length)[0].tolist() for length in (41, 7, 20)])]
    check(model, outputs)
