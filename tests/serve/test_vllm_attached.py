"""vLLM gives, for a base with an attached memory, the tokens and log-probabilities of `generate` in transformers.

Bases and memories are tiny and random, with gates open and a convolution that is not zero.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")
from attached_models import END, VOCABULARY, attached_model, tokenizer
from engrammar.attach import disabled, load_attached, save_attached
from engrammar.edit import apply_patch, write_patch
from engrammar.memory import memory_of
from engrammar.serve.folder import link_folder
from row_patches import row_patch
from vllm_engines import (
    BLOCK,
    answers_of,
    check_equal,
    count,
    engine,
    forget_history,
    forget_windows,
    num_equal,
    prompts,
    served,
    slow,
)

pytestmark = pytest.mark.vllm
BASE = {"head_dim": 32, "max_position_embeddings": 1024}  # vLLM's attention on a CPU has no kernel for heads of 16
MEMORY = {"boundary": "end", "end_ids": (END,)}


def save(folder, family, memory=None, **base):
    """Saves a base, and the memory attached to it, in two folders; returns the model and the folder for vLLM."""
    model = attached_model(family, {**MEMORY, **(memory or {})}, **{**BASE, **base})
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    save_attached(model, folder / "adapter")
    link_folder(str(folder / "base"), folder / "adapter", folder / "vllm")
    return model, folder / "vllm"


def asked():
    return prompts(VOCABULARY, END)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def expected(llama):
    return answers_of(llama[0], asked())


@pytest.mark.parametrize(
    ("place", "chunk"), [slow({}, 32), ({"memory": "disk", "cache_rows": 64}, 128)], ids=["ram", "cached"]
)
def test_greedy_tokens_and_prefix_hits_from_every_place_and_in_every_chunk(llama, expected, place, chunk):
    with engine(llama[1], place, max_num_batched_tokens=chunk) as llm:
        check_equal(served(llm, asked()), expected)
        before = count(llm, "vllm:prefix_cache_hits")
        check_equal(served(llm, asked()), expected)
        assert count(llm, "vllm:prefix_cache_hits") - before > 40 * BLOCK  # of 40 long prompts


def test_preempted_requests_go_on_with_the_same_tokens(llama, expected):
    with engine(llama[1], num_gpu_blocks_override=40) as llm:
        check_equal(served(llm, asked()), expected)
        assert count(llm, "vllm:num_preemptions") > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_compiled_as_vllm_compiles_by_default_and_a_control(tmp_path, monkeypatch, family):
    model, folder = save(tmp_path, family)
    some = asked()[::4]
    expected = answers_of(model, some)
    with engine(folder, enforce_eager=False) as llm:
        decoder = llm.llm_engine.model_executor.driver_worker.model_runner.model.model
        assert decoder.compiled and type(decoder) is not type(model.model)
        check_equal(served(llm, some), expected)
        forget_history(monkeypatch)
        llm.reset_prefix_cache()
        assert num_equal(served(llm, some), expected) <= 2


@pytest.mark.parametrize(
    ("family", "memory"),
    [slow("qwen3", {"layers": (0, 3), "max_ngram_size": 4, "rows_per_head": (97, 101, 103)}), ("qwen3_moe", {})],
)
def test_other_bases(tmp_path, family, memory):
    model, folder = save(tmp_path, family, memory)
    some = asked()[::4]
    with engine(folder) as llm:
        check_equal(served(llm, some), answers_of(model, some))


@pytest.mark.slow
def test_no_convolution(tmp_path):
    """The state then holds ids alone, once for all layers."""
    model, folder = save(tmp_path, "llama", {"conv_kernel": 0})
    some = asked()[::4]
    with engine(folder) as llm:
        check_equal(served(llm, some), answers_of(model, some))


def without_memory(model, ids):
    with disabled(model):
        return answers_of(model, ids)


@pytest.mark.parametrize(("forget", "at_most"), [slow(forget_history, 10), (forget_windows, 40)])
def test_control_without_history_or_windows_tokens_differ_and_nothing_is_served(
    llama, expected, monkeypatch, forget, at_most
):
    assert num_equal(without_memory(llama[0], asked()), expected) <= 10
    forget(monkeypatch)
    with engine(llama[1], {"self_test": False}) as llm:
        assert num_equal(served(llm, asked()), expected) <= at_most
    with pytest.raises(ValueError, match="self-test: logits in vLLM differ"), engine(llama[1]):
        pass


@pytest.mark.slow
def test_patched_rows_are_read(llama, tmp_path):
    """From the start on; the self-test compares with rows that are patched as well."""
    some, file = asked()[::4], tmp_path / "rows.safetensors"
    model = load_attached(AutoModelForCausalLM.from_pretrained(llama[1]), llama[1] / "adapter", memory="ram")
    write_patch(row_patch(model, memory_of(model)), file)
    before, after = answers_of(model, some), answers_of(apply_patch(model, file), some)
    assert num_equal(before, after) < len(some)
    with engine(llama[1], {"patches": [str(file)]}) as llm:
        check_equal(served(llm, some), after)


def test_bases_that_attend_to_windows_are_refused(tmp_path):
    _, folder = save(tmp_path, "gemma3_text")
    said = "does not run a base of type .*: serve it with `engrammar serve"
    with pytest.raises(ValueError, match=said), engine(folder):
        pass


def test_an_adapter_of_another_base_is_refused_by_the_self_test(llama, tmp_path):
    other = attached_model("llama", MEMORY, **BASE)
    with torch.no_grad():
        other.get_input_embeddings().weight.neg_()
    other.save_pretrained(tmp_path / "base")
    folder = tmp_path / "vllm"
    folder.mkdir()
    for path in llama[1].iterdir():
        (folder / path.name).symlink_to(path.resolve())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="is of a model with another"), engine(folder):
        pass
