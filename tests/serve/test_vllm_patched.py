"""vLLM gives, for models with patches that add to hidden states, the tokens and log-probabilities of `generate`.

Models are tiny and random. The patch has entries of every kind, and the prompts hold its keys and what it says.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from attached_models import attached_model, base_model, tokenizer
from edited_models import OURS, model_of_kind, rich_patch, small_patch, spoken_ids
from engrammar import EngrammarForCausalLM
from engrammar.attach import load_attached, save_attached
from engrammar.edit import apply_patch, keep_patch, read_patch, write_patch
from engrammar.edit.sequences import FOUND, WRITTEN
from engrammar.serve.folder import link_folder
from engrammar.serve.vllm.patching import Slots
from vllm_engines import BLOCK, EXACT, Answer, answers_of, check_equal, count, engine, num_equal, served

pytestmark = pytest.mark.vllm
BASE = {"head_dim": 32, "max_position_embeddings": 1024}  # vLLM's attention on a CPU has no kernel for heads of 16
NGRAMS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PLAIN, ATTACHED = "llama", "llama with memory"


def asked() -> list[list[int]]:
    """Of all lengths, cut amid what an entry says; the last ones begin alike for more than three blocks."""
    texts = [spoken_ids(1, length, seed)[0].tolist() for seed, length in enumerate((1, 4, 9, 33, 70, 95))]
    shared = spoken_ids(1, 3 * BLOCK + 7, 50)[0].tolist()
    texts += [shared + spoken_ids(1, 2 + 5 * number, 60 + number)[0].tolist() for number in range(4)]
    return [text + ending for text in texts for ending in ([14, 30], [12, 30])]


def make(place: Path, kind: str) -> tuple[Path, list[Path], object]:
    """A folder for vLLM, the patches that it does not name itself, and the patched model in transformers."""
    base, path = place / "base", place / "rich.safetensors"
    model = model_of_kind(OURS) if kind == OURS else base_model(kind.split()[0], **BASE).requires_grad_(False)
    if kind == ATTACHED:
        model = attached_model("llama", **BASE).requires_grad_(False)
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    patch = rich_patch(model)
    write_patch(patch, path)
    if kind == OURS:
        return base, [path], apply_patch(EngrammarForCausalLM.from_pretrained(base), patch, tokenizer())
    adapter = None
    if kind == ATTACHED:
        adapter = place / "adapter"
        save_attached(model, adapter)
    link_folder(str(base), adapter, place / "vllm", [path])
    plain = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        load_attached(plain, adapter, tokenizer())
    return place / "vllm", [], apply_patch(plain, patch, tokenizer())


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return made_and_asked(tmp_path_factory.mktemp("ours"), OURS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made_and_asked(tmp_path_factory.mktemp("plain"), PLAIN)


def made_and_asked(place: Path, kind: str) -> tuple[Path, dict, list[Answer]]:
    """The folder, its settings, and what the patched model answers; without the patch most answers are others."""
    folder, paths, model = make(place, kind)
    return folder, {"patches": [str(path) for path in paths]}, answers_of(model, asked())


def check_twice(llm, expected: list[Answer]) -> None:
    check_equal(served(llm, asked()), expected)
    before = count(llm, "vllm:prefix_cache_hits")
    check_equal(served(llm, asked()), expected)
    assert count(llm, "vllm:prefix_cache_hits") - before > 20 * BLOCK


def num_exact(found: list[Answer], expected: list[Answer]) -> int:
    """Answers whose tokens and log-probabilities are those that are expected."""
    pairs = zip(found, expected, strict=True)
    return sum(one.tokens == other.tokens and close(one, other) for one, other in pairs)


def close(one: Answer, other: Answer) -> bool:
    return torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=EXACT, rtol=0)


def forget(monkeypatch, name: str) -> None:
    read = Slots._read

    def without(slots, wanted, tokens, num_back):
        known = read(slots, wanted, tokens, num_back)
        return torch.full_like(known, -1) if wanted == name else known

    monkeypatch.setattr(Slots, "_read", without)


def test_ours_in_chunks_and_with_prefix_hits_and_controls_without_what_is_kept(ours, monkeypatch):
    folder, settings, expected = ours
    with engine(folder, {**settings, "memory": "disk"}, max_num_seqs=4, max_num_batched_tokens=9) as llm:
        check_twice(llm, expected)
        some, same = asked()[6:], expected[6:]  # those of more than a chunk
        for name in ("id", FOUND, WRITTEN):
            with monkeypatch.context() as changed:
                forget(changed, name)
                llm.reset_prefix_cache()
                assert num_exact(served(llm, some), same) < (len(same) if name == WRITTEN else 2)
        llm.reset_prefix_cache()
        check_equal(served(llm, some), same)
        named = SamplingParams(max_tokens=1, extra_args={"patches": ["none"]})
        with pytest.raises(VLLMValidationError, match="No patch 'none' can be chosen"):
            llm.generate([{"prompt_token_ids": [3]}], named, use_tqdm=False)


def test_a_plain_base_with_preempted_requests(plain):
    folder, settings, expected = plain
    with engine(folder, settings, max_model_len=160, num_gpu_blocks_override=12) as llm:
        check_equal(served(llm, asked()), expected)
        assert count(llm, "vllm:num_preemptions") > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ATTACHED, "qwen3_moe", "olmo2"])
def test_other_bases_with_and_without_a_memory(tmp_path, kind):
    folder, settings, expected = made_and_asked(tmp_path, kind)
    with engine(folder, settings) as llm:
        check_twice(llm, expected)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["ours", "plain"])
def test_speculation_by_ngrams(request, which):
    folder, settings, expected = request.getfixturevalue(which)
    with engine(folder, settings, speculative_config=NGRAMS) as llm:
        check_equal(served(llm, asked()), expected)
        assert count(llm, "vllm:spec_decode_num_accepted_tokens") > 0


@pytest.mark.slow
@pytest.mark.parametrize("which", ["ours", "plain"])
def test_compiled_as_vllm_compiles_by_default(request, which):
    folder, settings, expected = request.getfixturevalue(which)
    with engine(folder, settings, enforce_eager=False) as llm:
        check_twice(llm, expected)


@pytest.mark.slow
def test_a_patch_that_is_kept_in_the_folder_is_applied(ours, tmp_path):
    folder, settings, expected = ours
    kept = shutil.copytree(folder, tmp_path / "kept")
    keep_patch(read_patch(settings["patches"][0]), kept)
    with engine(kept, {}) as llm:
        check_equal(served(llm, asked()), expected)


def test_without_the_patch_answers_are_others(ours, plain):
    for (folder, _, expected), kind in ((ours, OURS), (plain, PLAIN)):
        model = EngrammarForCausalLM if kind == OURS else AutoModelForCausalLM
        found = answers_of(model.from_pretrained(folder), asked()[::4])
        assert num_equal(found, expected[::4]) <= 1


def test_a_patch_of_another_base_or_tokenizer_is_refused(ours, plain, tmp_path):
    """By the self-test, which is why it cannot be turned off."""
    other = base_model("llama", **BASE)
    with torch.no_grad():
        other.get_input_embeddings().weight.neg_()
    write_patch(small_patch(other, "other", (4,)), tmp_path / "other.safetensors")
    wrong = {"patches": [str(tmp_path / "other.safetensors")]}
    with pytest.raises(ValueError, match="is of a model with another"), engine(plain[0], wrong):
        pass
    with pytest.raises(ValueError, match="do not turn it off"), engine(ours[0], {**ours[1], "self_test": False}):
        pass
    with pytest.raises(ValueError, match="is of a model with another"):
        link_folder(str(plain[0].parent / "base"), None, tmp_path / "out", [tmp_path / "other.safetensors"])
    with pytest.raises(ValueError, match="one of our own models: give vLLM the model itself"):
        link_folder(str(ours[0]), None, tmp_path / "out", [Path(ours[1]["patches"][0])])
    with pytest.raises(ValueError, match="neither an adapter nor a patch"):
        link_folder(str(ours[0]), None, tmp_path / "out")
