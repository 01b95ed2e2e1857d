"""Tensor parallelism in vLLM: two processes with half of each layer, and with one copy of the tables."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")

from test_vllm import HEADS, generated, save
from test_vllm_attached import asked as asked_of_bases
from test_vllm_attached import save as save_attached_model
from test_vllm_patched import OURS, check_twice, made_and_asked

from vllm_engines import BLOCK, answers_of, check_equal, count, engine, forget_history, num_equal, prompts, served

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def tables(worker) -> set[str]:
    """The tables that a process shares with others."""
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "engrammar" in line}


def forget(worker) -> None:
    forget_history(pytest.MonkeyPatch())


def check_two_processes(folder, asked, expected) -> None:
    """Equal twice, the second time with prefix hits; not equal once the processes forget what stands before a token."""
    with engine(folder, {"sharing": "processes"}, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        check_equal(served(llm, asked), expected)
        before = count(llm, "vllm:prefix_cache_hits")
        check_equal(served(llm, asked), expected)
        assert count(llm, "vllm:prefix_cache_hits") - before > 40 * BLOCK
        one, other = llm.collective_rpc(tables)
        assert one == other and len(one) > 0
        llm.collective_rpc(forget)
        llm.reset_prefix_cache()
        assert num_equal(served(llm, asked), expected) <= 3


def test_our_models(tmp_path):
    folder = save(tmp_path / "model", "paper", 2, **HEADS)
    check_two_processes(folder, prompts(), generated(folder, prompts()))


def test_attached_memories(tmp_path):
    model, folder = save_attached_model(tmp_path, "llama")
    check_two_processes(folder, asked_of_bases(), answers_of(model, asked_of_bases()))


def test_patches(tmp_path):
    """Both processes find the same keys, and add to whole hidden states."""
    folder, settings, expected = made_and_asked(tmp_path, OURS)
    with engine(folder, settings, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        check_twice(llm, expected)
