"""Models that read images: their text has the memory and the patches of a text model, and images have none."""

import copy
import functools

import pytest
import torch

import batches
from attached_models import PAD, memory_config, randomize, tokenizer
from edited_models import rich_patch, spoken_ids
from engrammar.attach import attach, detach, disabled, keep_prefix, load_attached, save_attached
from engrammar.attach.around import text_positions
from engrammar.attach.attaching import attachment_of
from engrammar.attach.blocks import find_decoder
from engrammar.attach.skipping import KEPT, KEPT_BLOCK
from engrammar.edit import apply_patch, undo_patch
from generated import EXACT, check_generated, full
from image_models import FAMILIES, IMAGE, READ_IMAGES, image_model, prompt_with_images, text_ids, text_twin, with_pixels

HAVE_TWINS = [family for family in FAMILIES if family != "qwen3_vl"]  # whose text model is no causal LM of its own
NEW = 7
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True}
GREEDY |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": PAD}
GREEDY["suppress_tokens"] = [57, 58, 59, IMAGE]


def with_memory(model, **settings):
    attach(model, memory_config(**settings), tokenizer())
    randomize(model)
    return model


@functools.cache
def model_of(family: str):
    return with_memory(image_model(family))


@pytest.mark.parametrize("family", HAVE_TWINS)
def test_text_has_the_logits_of_a_text_model(family):
    twin, ids = with_memory(text_twin(family)), text_ids(3, 13)
    torch.testing.assert_close(full(model_of(family), ids), full(twin, ids), **EXACT)
    with disabled(twin):
        assert not torch.allclose(full(model_of(family), ids), full(twin, ids), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_decoding_text(family):
    model, lengths = model_of(family), [11, 4, 1]
    ids = torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 11 - length :] = text_ids(1, length, seed=row)
    mask = (ids != PAD).long()
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        check_generated(model, model.generate(ids, attention_mask=mask, **GREEDY, **settings), lengths)
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, use_cache=use_cache, **GREEDY).sequences
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_batched_continuously(family):
    prompts = [text_ids(1, length, seed=length)[0].tolist() for length in (5, 19, 3)]
    batches.check(model_of(family), batches.generate(model_of(family), prompts, 4))


@torch.no_grad()
def added(model, given) -> dict[int, torch.Tensor]:
    """What the memory adds at each of its blocks, and what it would add by its own parts."""
    decoder, (memory,) = find_decoder(model), attachment_of(model).memories().values()
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in memory.config.layers}
    hooks = [
        decoder.blocks[layer].register_forward_pre_hook(lambda _, args, into=into: into.append(args[0]), prepend=first)
        for layer, into in seen.items()
        for first in (True, False)
    ]
    model(**given, use_cache=False)
    for hook in hooks:
        hook.remove()
    is_text_BT = given["input_ids"] != IMAGE
    retrieved = memory.memory.retrieve(given["input_ids"], is_text_BT & given["attention_mask"].bool())
    ends_none_BT = torch.nn.functional.pad(retrieved.dead_BT[:, :-1], (1, 0), value=True) | retrieved.dead_BT
    for layer, (before, after) in seen.items():
        embedding_BTE, _ = retrieved.wait(layer)
        expected = memory.fusions[str(layer)](before[:, :, None], embedding_BTE, ends_none_BT, None, None)[:, :, 0]
        scale = memory.place.scales[memory.config.layers.index(layer)]
        seen[layer] = [after - before, scale * expected, ends_none_BT]
    return seen


@pytest.mark.parametrize("family", READ_IMAGES)
@pytest.mark.parametrize("kernel", [4, 0])
def test_an_image_is_no_token_and_nothing_is_looked_up_across_it(family, kernel):
    model = with_memory(image_model(family), conv_kernel=kernel)
    for found, expected, ends_none_BT in added(model, prompt_with_images(family, 2)).values():
        torch.testing.assert_close(found, expected, **EXACT)
        assert (found[~ends_none_BT].abs().amax(dim=-1) > 1e-3).all() and not ends_none_BT.all()
        if kernel == 0:  # the convolution reads what stands before an image
            assert not found[ends_none_BT].any()


@pytest.mark.parametrize("family", READ_IMAGES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_what_follows_an_image_is_generated_as_in_a_full_pass(family, settings):
    model, given = model_of(family), prompt_with_images(family, 2)
    out = model.generate(**given, **GREEDY, **settings)
    for row, ids in enumerate(out.sequences):
        pixels = given["pixel_values"].chunk(2)[row]
        logits = full_with_image(model, family, ids[None], pixels)[0]
        for step, found in enumerate(out.logits if not settings.get("num_beams") else ()):
            torch.testing.assert_close(found[row], logits[13 + step], **EXACT)
    if "num_beams" in settings:
        with_cache, without = out.sequences, model.generate(**given, **GREEDY, **settings, use_cache=False).sequences
        assert torch.equal(with_cache, without)


def full_with_image(model, family, ids, pixels):
    with torch.no_grad():
        return model(**with_pixels(family, ids, pixels), use_cache=False).logits


@pytest.mark.parametrize("family", READ_IMAGES)
@torch.no_grad()
def test_padding_before_an_image_changes_nothing(family):
    model, given = model_of(family), prompt_with_images(family, 1)
    ids = torch.nn.functional.pad(given["input_ids"], (3, 0), value=PAD)
    out = model.generate(**with_pixels(family, ids, given["pixel_values"]), **GREEDY)
    logits = full_with_image(model, family, out.sequences[:, 3:], given["pixel_values"])[0]
    for step, found in enumerate(out.logits):
        torch.testing.assert_close(found[0], logits[13 + step], **EXACT)


def test_positions_by_axes_are_those_of_the_text():
    """[3, 1, T]: two documents; in the first, an image of 2x2 patches stands after two tokens."""
    axes = torch.tensor(
        [
            [0, 1, 2, 2, 2, 2, 4, 5, 0, 1],
            [0, 1, 2, 2, 3, 3, 4, 5, 0, 1],
            [0, 1, 2, 3, 2, 3, 4, 5, 0, 1],
        ]
    )[:, None]
    assert text_positions(axes)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert text_positions(torch.cat([axes[:1] * 0 + 7, axes]))[0].tolist() == [7] * 10
    assert text_positions(axes[0]) is not None and torch.equal(text_positions(axes[0]), axes[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_those_of_a_text_model(family):
    model, ids = image_model(family).requires_grad_(False), spoken_ids(3, 24)
    ids = ids.where(ids < 57, 29)  # no image
    plain = full(model, ids)
    apply_patch(model, rich_patch(model), tokenizer())
    patched = full(model, ids)
    assert not torch.allclose(patched, plain, atol=1e-2)
    if family in HAVE_TWINS:
        twin = text_twin(family).requires_grad_(False)
        apply_patch(twin, rich_patch(twin), tokenizer())
        torch.testing.assert_close(patched, full(twin, ids), **EXACT)
    given = {"attention_mask": torch.ones_like(ids), **GREEDY}
    check_generated(model, model.generate(ids, **given), [24] * 3)
    undo_patch(model, "rich")
    assert torch.equal(full(model, ids), plain)


@pytest.mark.parametrize("family", READ_IMAGES)
def test_adapters_are_saved_loaded_and_taken_away(family, tmp_path):
    given, plain = prompt_with_images(family, 2), image_model(family)
    before, model = plain(**given).logits, with_memory(image_model(family))
    save_attached(model, tmp_path / "adapter")
    load_attached(plain, tmp_path / "adapter", tokenizer())
    assert torch.equal(plain(**given).logits, model(**given).logits)
    copied = copy.deepcopy(plain)
    assert torch.equal(copied(**given).logits, model(**given).logits)
    assert torch.equal(detach(plain)(**given).logits, before)


def test_embeddings_without_ids_and_a_prefix_with_an_image_are_refused(tmp_path):
    model, given = model_of("llava"), prompt_with_images("llava", 1)
    embedded = model.get_input_embeddings()(given["input_ids"])
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=embedded)
    items = [{"input_ids": ids} for ids in text_ids(4, 14)]
    kept = keep_prefix(model, items, tmp_path / "prefix")
    with pytest.raises(ValueError, match="pixel_values"):
        model(**given, **{name: kept[0][name][None] for name in (KEPT, KEPT_BLOCK)}, use_cache=False)
