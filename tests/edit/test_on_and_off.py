"""Patches are off for as long as somebody wants them off, and nothing of them is left where they are off or undone."""

import copy

import pytest
import torch

from attached_models import base_model
from edited_models import OURS, bits, model_of_kind, rich_patch, small_patch, spoken_ids, tokenizer
from engrammar.attach.blocks import find_decoder
from engrammar.edit import (
    Fact,
    applied_patches,
    apply_patch,
    base_of,
    build_patch,
    learn,
    replace_rows,
    undo_patch,
    without_patches,
)
from engrammar.edit.applying import memories_of, unpatched
from engrammar.edit.offering import offer_patch


def patched_model(kind: str = "llama"):
    model = model_of_kind(kind)
    return apply_patch(model, rich_patch(model), tokenizer())


def interrupted(model, ids: torch.Tensor) -> None:
    """A pass that Ctrl-C ends in its last block; torch calls no hook after it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    last = find_decoder(model).blocks[-1]
    with pytest.raises(KeyboardInterrupt), last.register_forward_pre_hook(interrupt), torch.no_grad():
        model(ids, use_cache=False)


def test_patches_are_on_again_when_the_last_block_has_ended():
    model, ids = patched_model(), spoken_ids(2, 19)
    on = bits(model, ids)
    with without_patches(model):
        off = bits(model, ids)
    first, second = without_patches(model), without_patches(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(bits(model, ids), off)
    second.__exit__(None, None, None)
    assert torch.equal(bits(model, ids), on) and not torch.equal(on, off)


@pytest.mark.parametrize("how", ["undone", "off", "off, others applied", "on"])
def test_an_interrupted_pass_leaves_nothing_behind(how):
    model, ids = patched_model(), spoken_ids(2, 19)
    other = ids.flip(1)
    expected = bits(model, other)
    plain = bits(model_of_kind("llama"), other)
    if how == "off, others applied":
        apply_patch(model, small_patch(model, "second", (40,)))
    interrupted(model, ids)
    if how == "undone":
        assert torch.equal(bits(undo_patch(model), other), plain)
        assert not find_decoder(model).blocks[-1]._forward_pre_hooks
    elif how == "on":
        assert torch.equal(bits(model, other), expected)
    else:
        with without_patches(model):
            assert torch.equal(bits(model, other), plain)
    assert not torch.equal(expected, plain)


@torch.no_grad()
def test_a_cache_that_was_filled_with_patches_is_not_continued_without():
    model, ids = patched_model(), spoken_ids(1, 9)
    cache = model(ids, use_cache=True).past_key_values
    with without_patches(model), pytest.raises(ValueError, match="filled with patches that are off or undone"):
        model(ids, past_key_values=cache)
    model(ids, past_key_values=copy.deepcopy(cache))
    cache.reset()
    with without_patches(model):
        logits = model(ids, past_key_values=cache).logits
    assert torch.equal(logits, model_of_kind("llama")(ids).logits)


@pytest.mark.parametrize("add", [apply_patch, offer_patch])
def test_patches_of_two_tokenizers_are_not_on_one_model(add):
    """The classes of ids of the second would be read for the keys of the first, which would then be found nowhere."""
    model, ids = patched_model(), spoken_ids(2, 19)
    expected = bits(model, ids)
    longer = copy.deepcopy(tokenizer())
    longer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(longer))
    alone = base_model("llama")
    alone.resize_token_embeddings(len(longer))
    first = small_patch(alone, "second", (40,))
    second = build_patch("second", base_of(alone, longer), list(first.exact_entries()), first.all_probes())
    with pytest.raises(ValueError, match="tokenizer with other classes of ids .62 ids. than 'rich' .61 ids."):
        add(model, second, longer)
    assert applied_patches(model) == ["rich"]
    assert torch.equal(bits(model, ids)[..., :61], expected)


def test_facts_are_learned_in_evaluation_and_on_the_models_own_rows():
    model = model_of_kind("llama").train()
    with unpatched(model):
        assert not model.training
    assert model.training
    ours = model_of_kind(OURS)
    (memory,) = memories_of(ours)
    rows = replace_rows(memory, {memory.config.layers[0]: (torch.arange(3), torch.randn(3, memory.config.head_dim))})
    apply_patch(ours, build_patch("rows", base_of(ours, tokenizer()), rows=rows), tokenizer())
    with pytest.raises(ValueError, match="Patches that replace rows are applied: undo them"):
        learn(ours, tokenizer(), [Fact(subject="w3 w4", prompt="w3 w4 w12 w14", object="w21")])
