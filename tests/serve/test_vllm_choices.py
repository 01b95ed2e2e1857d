"""In vLLM, too, each request of a batch has the patches that it names, and shares prefixes with none of others."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from attached_models import base_model, tokenizer
from edited_models import ALL, CHOICES, DIRECT, OTHER, OURS, RICH, model_of_kind, patches_to_choose, spoken_ids
from engrammar.edit import apply_patch, undo_patch, write_patch
from engrammar.serve.folder import link_folder
from engrammar.serve.vllm import patching
from engrammar.serve.vllm.choosing import SaltedAsyncScheduler, SaltedScheduler
from vllm_engines import BLOCK, EXACT, NEW, Answer, answers_of, count, engine, stay_asynchronous

pytestmark = pytest.mark.vllm
BASE = {"head_dim": 32, "max_position_embeddings": 1024}
SMALL = {"max_num_seqs": 6, "max_num_batched_tokens": 25}
ALONE = {**SMALL, "enable_prefix_caching": False}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def prompts() -> list[list[int]]:
    ids = spoken_ids(1, 3 * BLOCK, 1)[0].tolist()
    return [[*ids, 14, 30], [*ids[: BLOCK + 5], 14, 30], [*ids[:23], 12, 30], [*ids[:22], 10]]


def make(place: Path, kind: str):
    """The folder for vLLM, its settings, the model in transformers, and the patches."""
    model = model_of_kind(OURS) if kind == OURS else base_model(kind, **BASE).requires_grad_(False)
    model.save_pretrained(place / "base")
    tokenizer().save_pretrained(place / "base")
    patches = patches_to_choose(model)
    paths = {name: str(place / f"{name}.safetensors") for name in patches}
    for name, patch in patches.items():
        write_patch(patch, paths[name])
    settings, folder = {"patches_on_request": [paths[name] for name in (RICH, OTHER, DIRECT)]}, place / "base"
    if kind == OURS:
        settings["patches"] = [paths[ALL]]
    else:
        folder = place / "vllm"
        link_folder(str(place / "base"), None, folder, [Path(paths[ALL])])
    return folder, settings, model, patches


def expected_of(model, patches) -> dict:
    """What the model answers with the patch for all, and those of each choice."""
    found = {}
    for names in dict.fromkeys(CHOICES):
        for name in (ALL, *names):
            apply_patch(model, patches[name], tokenizer())
        found[names] = answers_of(model, prompts())
        undo_patch(model)
    return found


def served(llm) -> list[tuple[tuple[str, ...], int, Answer]]:
    """All prompts with all choices at once: the choice, the number of the prompt, and the answer."""
    asked = [(names, number) for number in range(len(prompts())) for names in CHOICES]
    common = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 0, "detokenize": False}
    sampling = [SamplingParams(**common, extra_args={"patches": [*names]} if names else None) for names, _ in asked]
    given = [{"prompt_token_ids": prompts()[number]} for _, number in asked]
    found = []
    for (names, number), output in zip(asked, llm.generate(given, sampling, use_tqdm=False)):
        one = output.outputs[0]
        logprobs = [step[token].logprob for token, step in zip(one.token_ids, one.logprobs)]
        found.append((names, number, Answer(list(one.token_ids), logprobs)))
    return found


def num_equal(found, expected) -> int:
    pairs = [(answer, expected[names][number]) for names, number, answer in found]
    close = [one.logprobs == pytest.approx(other.logprobs, abs=EXACT, rel=0) for one, other in pairs]
    return sum(one.tokens == other.tokens and is_close for (one, other), is_close in zip(pairs, close))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OURS, "llama"])
def test_each_request_of_a_batch_has_the_patches_that_it_names(tmp_path, kind, monkeypatch):
    folder, settings, model, patches = make(tmp_path, kind)
    expected = expected_of(model, patches)
    with engine(folder, settings, **ALONE) as llm:
        for _ in range(2):
            found = served(llm)
            assert num_equal(found, expected) == len(found)
        for named, said in (
            (["none"], "No patch 'none' can be chosen; patches for requests are: rich, other, direct"),
            ([RICH, OTHER], "'rich' and 'other' change the same differently"),
            (3, "patches is not a list of names"),
        ):
            with pytest.raises(VLLMValidationError, match=said):
                sampling = SamplingParams(max_tokens=1, extra_args={"patches": named})
                llm.generate([{"prompt_token_ids": [3]}], sampling, use_tqdm=False)
        monkeypatch.setattr(patching, "names_in", lambda context: {})  # the control: nobody has named any
        assert num_equal(served(llm), expected) < len(found) * 2 / 3


@pytest.mark.parametrize("kind", [OURS, pytest.param("llama", marks=pytest.mark.slow)])
def test_prefixes_are_shared_with_requests_of_the_same_patches_alone(tmp_path, kind, monkeypatch):
    folder, settings, model, patches = make(tmp_path, kind)
    expected = expected_of(model, patches)
    with engine(folder, settings, **SMALL) as llm:
        assert type(llm.llm_engine.engine_core.engine_core.scheduler) is SaltedScheduler
        for least in (0, len(CHOICES) * 3 * BLOCK):  # the first prompt has three full blocks, and each choice its own
            before = count(llm, "vllm:prefix_cache_hits")
            found = served(llm)
            assert num_equal(found, expected) == len(found)
            assert count(llm, "vllm:prefix_cache_hits") - before >= least
        monkeypatch.delattr(SaltedScheduler, "add_request")  # the control: all share their prefixes
        llm.reset_prefix_cache()
        assert num_equal(served(llm), expected) < len(found) * 2 / 3


@pytest.mark.slow
def test_prefixes_under_asynchronous_scheduling(tmp_path, monkeypatch):
    folder, settings, model, patches = make(tmp_path, OURS)
    expected = expected_of(model, patches)
    stay_asynchronous(monkeypatch)
    with engine(folder, settings, async_scheduling=True, **SMALL) as llm:
        assert type(llm.llm_engine.engine_core.engine_core.scheduler) is SaltedAsyncScheduler
        for _ in range(2):
            found = served(llm)
            assert num_equal(found, expected) == len(found)


@pytest.mark.slow
def test_beside_another_scheduler_or_speculation_it_is_refused(tmp_path):
    folder, settings, *_ = make(tmp_path, "llama")
    other = {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}
    with pytest.raises(ValueError, match="would share prefixes"), engine(folder, settings, **other):
        pass
    alone = {**ALONE, "speculative_config": NGRAMS}
    with pytest.raises(ValueError, match="beside speculation vLLM does not say"), engine(folder, settings, **alone):
        pass
