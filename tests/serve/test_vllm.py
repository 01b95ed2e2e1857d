"""vLLM gives, in every mode that is served, the tokens and log-probabilities of `generate` in transformers.

The model is tiny and random, with gates open and a convolution that is not zero. vLLM has an environment of its own:
`make test-serve`.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")

from engrammar import EngrammarForCausalLM
from engrammar.edit import apply_patch
from engrammar.serve.vllm import reading, settings
from models import END, tiny_memory, tiny_model
from row_patches import write_patches
from vllm_engines import (
    BLOCK,
    Answer,
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
    stay_asynchronous,
)

pytestmark = pytest.mark.vllm
HEADS = {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20}  # 32 numbers: vLLM has a kernel
ODD_HEADS = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}  # 48, as in `nano`: it has none

NGRAMS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def save(folder: Path, dialect: str | None, branches: int, **settings) -> Path:
    tiny_model(dialect, branches, max_position_embeddings=1024, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    memory = {**tiny_memory("paper"), "boundary": "end", "end_ids": [END]}  # n-grams end where a text ends
    return save(tmp_path_factory.mktemp("served") / "model", "paper", 2, memory=memory, **HEADS)


def generated(folder: Path, asked: list[list[int]]) -> list[Answer]:
    return answers_of(EngrammarForCausalLM.from_pretrained(folder), asked)


@pytest.fixture(scope="module")
def expected(folder) -> list[Answer]:
    return generated(folder, prompts())


PLACES = {
    "ram": {},
    "disk": {"memory": "disk"},
    "cached": {"memory": "disk", "cache_rows": 64},
}


@pytest.mark.parametrize(("place", "chunk"), [slow("ram", 32), slow("disk", 128), ("cached", 512)])
def test_greedy_tokens_and_prefix_hits_from_every_place_and_in_every_chunk(folder, expected, place, chunk):
    with engine(folder, PLACES[place], max_num_batched_tokens=chunk) as llm:
        check_equal(served(llm, prompts()), expected)
        before = count(llm, "vllm:prefix_cache_hits")
        check_equal(served(llm, prompts()), expected)
        assert count(llm, "vllm:prefix_cache_hits") - before > 40 * BLOCK  # of 40 long prompts


@pytest.mark.slow
def test_compiled_as_vllm_compiles_by_default(folder, expected):
    with engine(folder, enforce_eager=False) as llm:
        check_equal(served(llm, prompts()), expected)


def test_without_a_prefix_cache(folder, expected):
    with engine(folder, enable_prefix_caching=False) as llm:
        check_equal(served(llm, prompts()), expected)


def test_preempted_requests_go_on_with_the_same_tokens(folder, expected):
    with engine(folder, num_gpu_blocks_override=40) as llm:
        check_equal(served(llm, prompts()), expected)
        assert count(llm, "vllm:num_preemptions") > 0


def test_speculation_by_ngrams(folder, expected):
    with engine(folder, speculative_config=NGRAMS) as llm:
        check_equal(served(llm, prompts()), expected)
        assert count(llm, "vllm:spec_decode_num_accepted_tokens") > 0
        rejected = count(llm, "vllm:spec_decode_num_draft_tokens") - count(llm, "vllm:spec_decode_num_accepted_tokens")
        assert rejected > 0


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False])
def test_asynchronous_scheduling_is_off_on_a_cpu_whatever_is_asked(folder, expected, asked):
    with engine(folder, async_scheduling=asked) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling is False
        check_equal(served(llm, prompts()), expected)


def test_asynchronous_scheduling_made_to_stay_on(folder, expected, monkeypatch):
    """A pass is then prepared before the tokens of the one before it are known to the scheduler."""
    stay_asynchronous(monkeypatch)
    with engine(folder, async_scheduling=True) as llm:
        assert llm.llm_engine.engine_core.engine_core.batch_queue_size == 2
        for _ in range(2):
            check_equal(served(llm, prompts()), expected)


def test_asynchronous_scheduling_with_ngrams_is_refused_by_vllm(folder):
    said = "async scheduling is only supported"
    with pytest.raises(ValueError, match=said), engine(folder, async_scheduling=True, speculative_config=NGRAMS):
        pass


@pytest.mark.parametrize(
    ("dialect", "branches", "heads"),
    [slow("qwen_next", 1, HEADS), slow("deepseek_v41", 3, HEADS), ("demo", 2, ODD_HEADS), slow(None, 2, HEADS)],
)
def test_other_dialects_and_heads(tmp_path, dialect, branches, heads):
    folder, asked = save(tmp_path / "model", dialect, branches, **heads), prompts()[::4]
    with engine(folder) as llm:
        check_equal(served(llm, asked), generated(folder, asked))
        check_equal(served(llm, asked), generated(folder, asked))


@pytest.mark.parametrize(("forget", "at_most"), [(forget_history, 3), slow(forget_windows, 30)])
def test_control_without_history_or_windows_tokens_differ_and_nothing_is_served(
    folder, expected, monkeypatch, forget, at_most
):
    forget(monkeypatch)
    with engine(folder, {"self_test": False}) as llm:
        assert num_equal(served(llm, prompts()), expected) <= at_most
    with pytest.raises(ValueError, match="self-test: logits in vLLM differ"), engine(folder):
        pass


def test_tables_are_neither_allocated_nor_read_as_weights(folder, monkeypatch):
    from vllm.model_executor.model_loader import default_loader

    read, iterate = [], default_loader.safetensors_weights_iterator

    def note(files, *given, **named):
        read.extend(Path(file).name for file in files)
        return iterate(files, *given, **named)

    monkeypatch.setattr(default_loader, "safetensors_weights_iterator", note)
    with engine(folder, {"memory": "disk"}) as llm:
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        assert not [name for name, _ in model.named_parameters() if "tables" in name]
    assert read == ["backbone.safetensors"]


def test_patched_rows_are_read(folder, tmp_path):
    """From the start on, with prefix hits: answers are those of the patched model in transformers, twice."""
    asked, (rows, _) = prompts()[::4], write_patches(folder, tmp_path)
    model = EngrammarForCausalLM.from_pretrained(folder, memory="ram")
    unpatched = answers_of(model, asked[:5])
    patched = answers_of(apply_patch(model, rows), asked)
    assert num_equal(unpatched, patched[:5]) < 5
    with engine(folder, {"patches": [str(rows)]}) as llm:
        for _ in range(2):
            check_equal(served(llm, asked), patched)


def test_vllms_own_transformers_backend_is_refused(folder, monkeypatch):
    """vLLM itself refuses a class that transformers does not name; one that is named there gets as far as ours."""
    monkeypatch.setattr("transformers.EngrammarForCausalLM", EngrammarForCausalLM, raising=False)
    with pytest.raises(ValueError, match="Leave out --model-impl"), engine(folder, model_impl="transformers"):
        pass


def engine_config(**changed) -> SimpleNamespace:
    parts = {
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "kv_transfer_config": None,
        "enable_prompt_embeds": False,
        "speculative_config": None,
        "device_type": "cpu",
        "use_v2_model_runner": False,
        "additional_config": {},
        **changed,
    }
    widths = {"num_attention_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 17}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parts),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(**widths), model="m", **parts),
        device_config=SimpleNamespace(**parts),
        **parts,
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size over 1"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2: it does not divide moe_intermediate_size=17"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "speculation by 'eagle'"),
        ({"device_type": "cuda"}, "a device other than the CPU"),
        ({"use_v2_model_runner": True}, "newer runner"),
    ],
)
def test_what_would_be_wrong_or_was_never_compared_is_refused(changed, said):
    settings.check_engine(engine_config())
    settings.check_engine(engine_config(speculative_config=SimpleNamespace(method="ngram")))
    with pytest.raises(ValueError, match=f"does not serve with .*{said}"):
        settings.check_engine(engine_config(**changed))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache": 3}, "has 'cache'; allowed: address, cache_rows, deadline"),
        ({"memory": "gpu"}, "memory is 'gpu'; allowed: ram, disk"),
        ({"self_test": "no"}, "self_test is 'no'"),
        ({"memory": "remote"}, "memory='remote' and `name` go together"),
        ({"name": "nano"}, "memory='remote' and `name` go together"),
        ({"on_missing": "skip"}, "needs a deadline"),
        ({"patches": "rows.safetensors"}, "patches is 'rows.safetensors'; allowed: a list of files"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        settings.memory_settings(engine_config(additional_config={"engrammar": given}), Path("m"))


def test_a_model_without_memory_takes_patches_alone():
    given = {"patches": ["facts.safetensors"], "self_test": True}
    made = settings.memory_settings(engine_config(additional_config={"engrammar": given}), None)
    assert made.patches == (Path("facts.safetensors"),)
    with pytest.raises(ValueError, match="has 'memory', which is about a memory, and this model has none"):
        settings.memory_settings(engine_config(additional_config={"engrammar": {**given, "memory": "disk"}}), None)


def test_settings_are_those_of_from_pretrained():
    made = settings.memory_settings(
        engine_config(additional_config={"engrammar": {"memory": "disk", "cache_rows": 7, "sharing": "processes"}}),
        Path("m"),
    )
    assert made.self_test and made.serving.where == "disk"
    assert (made.serving.cache_rows, made.serving.sharing) == (7, "processes")
    assert settings.memory_settings(engine_config(), Path("m")).serving.where == "ram"


def test_operators_say_the_shapes_that_they_return():
    """torch.compile believes them; where vLLM has no cache yet, the operators themselves return zeros."""
    ids = torch.zeros(1, 5, dtype=torch.int64)
    normed = torch.zeros(1, 6, 5)
    assert reading._fetch_shape(ids, ids, "").shape == (0,)
    embedding, dead = reading._rows_shape(ids, ids, 1, 8, torch.float32)
    assert embedding.shape == (1, 5, 8) and dead.shape == (1, 5)
    assert reading._taps_shape(normed, ids, "", [6, 3, 0]).shape == (1, 5, 3, 6)
