"""Requests of one batch choose patches: each is answered as a model with just these patches applied answers."""

import functools
import json

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

import batches
from edited_models import (
    ALL,
    CHOICES,
    DIRECT,
    OTHER,
    OURS,
    RICH,
    WITH_MEMORY,
    model_of_kind,
    patches_to_choose,
    spoken_ids,
    tokenizer,
)
from engrammar.edit import (
    applied_patches,
    apply_patch,
    base_of,
    build_patch,
    replace_rows,
    undo_patch,
    write_patch,
)
from engrammar.edit.offering import chosen_stack, offer_patch, offered_patches, withdraw_patch
from engrammar.serve.flat import batched_continuously
from engrammar.serve.openai import choosing
from engrammar.serve.openai.sampling import Sampler
from servers import NAME, TOKEN, ask, complete, serving

NEW = 8


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger=batches.LOGGER)


@functools.cache
def patches(kind: str) -> dict:
    return patches_to_choose(model_of_kind(kind))


def model_with(kind: str, names, offered=()):
    """A model with some patches for all requests, and some for those that choose them."""
    model = model_of_kind(kind)
    model.generation_config.eos_token_id = None
    for name in names:
        apply_patch(model, patches(kind)[name], tokenizer())
    for name in offered:
        offer_patch(model, patches(kind)[name], tokenizer())
    return model


def prompts() -> list[list[int]]:
    """One text for all choices, cut amid what entries say; it is longer than several pages of the cache."""
    ids = spoken_ids(1, 37, 1)[0].tolist()
    return [[*ids, 14, 30], [*ids[:23], 12, 30], [*ids[:22], 10]]


def answers(model, asked: list[tuple[list[int], tuple[str, ...]]], **settings) -> list:
    """What requests give that come at once, with chunks of few tokens; then again, with prefixes in the cache."""
    chosen = {"num_blocks": 96, "max_batch_tokens": 24, "page_size": 4, "return_logprobs": True, **settings}
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
    found = {}
    with batched_continuously(model):
        manager = model.init_continuous_batching(greedy, ContinuousBatchingConfig(**chosen))
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Sampler()]))
        manager.logit_processor.tensors_required = 1
        choosing.carry_choices(manager)
        manager.start()
        for again in range(2):
            for index, (ids, names) in enumerate(asked):
                choice = choosing.Choice(chosen_stack(model, names))
                manager.add_request(ids, f"{again} {index}", NEW, choice=choice)
            while len(found) < (again + 1) * len(asked) and manager.is_running():
                if (output := manager.get_result(timeout=1)) is not None:
                    found[output.request_id] = output
        manager.stop(block=True)
        manager.destroy()
    return [found.get(f"{again} {index}") for again in range(2) for index in range(len(asked))]


def asked() -> list[tuple[list[int], tuple[str, ...]]]:
    return [(ids, names) for ids in prompts() for names in CHOICES]


def check(kind: str, outputs, *, for_all=(ALL,)) -> None:
    """Each answer is, to the token, that of `generate` with these patches applied, and its log probabilities."""
    for names in set(CHOICES):
        twin = model_with(kind, [*for_all, *names])
        own = [one for one, (_, chosen) in zip(outputs, 2 * asked(), strict=True) if chosen == names]
        batches.check(twin, own)
        for ids in prompts():
            expected = twin.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
            same = [one.generated_tokens for one in own if one.prompt_ids == ids]
            assert len(same) >= 2 and all(one == expected[0, len(ids) :].tolist() for one in same)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (OURS, {}),
        pytest.param(WITH_MEMORY, {}, marks=pytest.mark.slow),
        pytest.param("llama", {"num_blocks": 40}, marks=pytest.mark.slow),  # few blocks: requests begin anew
        pytest.param("llama", {"allow_block_sharing": False}, marks=pytest.mark.slow),
    ],
)
def test_each_request_of_a_batch_has_the_patches_that_it_names(kind, settings):
    model = model_with(kind, [ALL], [RICH, OTHER, DIRECT])
    outputs = answers(model, asked(), **settings)
    check(kind, outputs)
    different = [{tuple(one.generated_tokens) for one in outputs if one.prompt_ids == ids} for ids in prompts()]
    assert max(map(len, different)) >= 4  # the patches change these very texts


def test_without_a_patch_for_all_requests_others_are_those_of_the_plain_model():
    model = model_with("llama", [], [RICH, OTHER, DIRECT])
    check("llama", answers(model, asked()), for_all=())
    for name in (RICH, OTHER, DIRECT):
        withdraw_patch(model, name)
    assert not vars(model.model)["_forward_pre_hooks"] and not offered_patches(model)


def test_a_prefix_of_other_patches_is_refused(monkeypatch):
    """Prefixes are shared by ids alone here: every pass that goes on from another choice's prefix ends in an error."""
    monkeypatch.setattr(choosing, "with_number", lambda stack, ids: ids)
    model = model_with("llama", [ALL], [RICH, OTHER, DIRECT])
    errors = [one.error for one in answers(model, asked()) if one is not None and one.error]
    assert errors and all("read with other patches" in error for error in errors)


def test_with_a_prefix_of_other_patches_answers_would_be_wrong(monkeypatch):
    """The control: without the numbers, and without the check of what they have to prevent."""
    monkeypatch.setattr(choosing, "with_number", lambda stack, ids: ids)
    monkeypatch.setattr("engrammar.edit.sequences.check_choices", lambda *given: None)
    outputs = answers(model_with("llama", [ALL], [RICH, OTHER, DIRECT]), asked())
    with pytest.raises(AssertionError):
        check("llama", outputs)


def ids_of(server, ids, names=(), **extra) -> list[int]:
    chosen = {"ignore_eos": True, "return_token_ids": True, **({"patches": [*names]} if names else {}), **extra}
    return complete(server, ids, max_tokens=NEW, extra_body=chosen).choices[0].token_ids


def test_a_client_names_patches_that_were_offered(tmp_path):
    """Over HTTP: they are offered and withdrawn with the server's token, and any request may name them."""
    ids = prompts()[2]
    expected = {}
    for names in [(), (OTHER,), (DIRECT,), (OTHER, DIRECT)]:
        twin = model_with(OURS, [ALL, *names])
        answer = twin.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        expected[names] = answer[0, len(ids) :].tolist()
    assert len({tuple(one) for one in expected.values()}) == 4
    with serving(model_with(OURS, [ALL], [RICH, OTHER]), tokenizer()) as server:
        write_patch(patches(OURS)[DIRECT], tmp_path / "direct.safetensors")
        content = (tmp_path / "direct.safetensors").read_bytes()
        assert ids_of(server, ids) == expected[()]
        assert ids_of(server, ids, [OTHER]) == ids_of(server, ids, vllm_xargs={"patches": OTHER}) == expected[(OTHER,)]
        assert ids_of(server, ids, [OTHER, ALL]) == expected[(OTHER,)]  # what is for all is named in vain
        assert ask(server, "/v1/patches?on_request=true", content)[0] == 401
        assert refused(server, {"patches": [DIRECT]}) == (404, "no_patch")
        status, listed = ask(server, "/v1/patches?on_request=true", content, token=TOKEN)
        assert status == 200 and [(one["id"], one["on_request"]) for one in listed["data"]] == [
            (ALL, False),
            (RICH, True),
            (OTHER, True),
            (DIRECT, True),
        ]
        assert ids_of(server, ids, [DIRECT]) == expected[(DIRECT,)]
        assert ids_of(server, ids, [DIRECT, OTHER]) == expected[(OTHER, DIRECT)]
        assert refused(server, {"patches": [OTHER, RICH]})[0] == 400
        assert refused(server, {"patches": ["none"], "stream": True}) == (404, "no_patch")
        assert refused(server, {"patches": 3})[0] == refused(server, {"vllm_xargs": {"other": 1}})[0] == 400
        assert refused(server, {"patches": [OTHER], "vllm_xargs": {"patches": [OTHER]}})[0] == 400
        assert ask(server, "/v1/patches?on_request=yes", content, token=TOKEN)[0] == 400
        assert ask(server, f"/v1/patches/{DIRECT}", method="DELETE", token=TOKEN)[0] == 200
        assert refused(server, {"patches": [DIRECT]}) == (404, "no_patch")
        assert ids_of(server, ids, [OTHER]) == expected[(OTHER,)]
        assert "engrammar_patches_on_request 2" in ask(server, "/metrics")[1]


def refused(server, body: dict) -> tuple[int, str | None]:
    whole = json.dumps({"model": NAME, "prompt": prompts()[0], **body}).encode()
    status, answer = ask(server, "/v1/completions", whole)
    return status, answer["error"]["code"]


def test_what_cannot_be_chosen_is_refused_in_a_sentence():
    model = model_with(OURS, [ALL], [RICH, OTHER])
    memory = model.model.memory
    layer = memory.config.layers[0]
    values = torch.ones(1, memory.config.head_dim)
    changed = replace_rows(memory, {layer: (torch.tensor([3]), values)})
    with pytest.raises(ValueError, match="replaces rows of tables, which all requests read"):
        offer_patch(model, build_patch("rows", base_of(model, tokenizer()), rows=changed))
    with pytest.raises(ValueError, match="'rich' is offered to requests already"):
        apply_patch(model, patches(OURS)[RICH])
    with pytest.raises(ValueError, match="'for_all' is applied already"):
        offer_patch(model, patches(OURS)[ALL])
    with pytest.raises(ValueError, match="'rich' and 'other' change the same differently"):
        chosen_stack(model, [RICH, OTHER])
    undo_patch(model)
    assert applied_patches(model) == [] and offered_patches(model) == [RICH, OTHER]
    with pytest.raises(ValueError, match="No patch 'for_all' is offered"):
        withdraw_patch(model, ALL)
