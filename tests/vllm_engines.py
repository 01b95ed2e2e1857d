"""vLLM in the process of a test, prompts for it, and what `generate` answers. Import it where vLLM is installed."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where a control can change it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

from engrammar.serve.vllm import state
from models import END, VOCABULARY

NEW = 16
EXACT = 1e-4  # of a log-probability
BLOCK = 32  # positions of a block of vLLM's cache


def slow(*values: Any) -> Any:
    """A case that `make test-serve-quick` leaves out: it has most ways of serving once."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


def prompts(vocabulary: int = VOCABULARY, end: int = END) -> list[list[int]]:
    """20 short, 20 long with ends of texts inside, 20 that begin alike."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    short = [ids(1 + number % 7) for number in range(20)]
    long = [ids(60 + 9 * number) for number in range(20)]
    for number, prompt in enumerate(long):
        for place in (1, 20 + number, len(prompt) - 1 - number % 5):
            prompt[place] = end
    prefix = ids(3 * BLOCK + 5)
    return short + long + [prefix + ids(1 + 3 * number) for number in range(20)]


@torch.no_grad()
def answers_of(model: Any, asked: list[list[int]]) -> list[Answer]:
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in asked:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logprobs = [logits[0].log_softmax(-1)[token].item() for token, logits in zip(tokens, out.logits)]
        answers.append(Answer(tokens, logprobs))
    return answers


@contextmanager
def engine(folder: Path, memory: dict | None = None, **given) -> Iterator[LLM]:
    """vLLM in this process, with 32 requests at once."""
    chosen = {"max_num_seqs": 32, "max_num_batched_tokens": 128, "max_model_len": 512, "block_size": BLOCK}
    chosen |= {"enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32"}
    llm, llvm = None, sys.modules.get("llvmlite.binding.ffi")
    if llvm is not None:
        # numba is loaded: vLLM looks for kernels in the `__dict__` of all there is, and falls over this one
        llvm.lib._fntab["__dict__"] = {}
    try:
        llm = LLM(
            str(folder),
            disable_log_stats=False,
            additional_config={"engrammar": memory or {}},
            **{**chosen, **given},
        )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()  # also of an engine that refused: its groups would be taken for the next one's


def served(llm: LLM, asked: list[list[int]]) -> list[Answer]:
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], sampling, use_tqdm=False)
    return [
        Answer(list(one.token_ids), [step[token].logprob for token, step in zip(one.token_ids, one.logprobs)])
        for one in (output.outputs[0] for output in outputs)
    ]


def num_equal(found: list[Answer], expected: list[Answer]) -> int:
    return sum(one.tokens == other.tokens for one, other in zip(found, expected))


def check_equal(found: list[Answer], expected: list[Answer]) -> None:
    assert num_equal(found, expected) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=EXACT, rtol=0)


def count(llm: LLM, name: str) -> float:
    """The value of one of vLLM's metrics."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def stay_asynchronous(monkeypatch) -> None:
    """On a CPU vLLM turns asynchronous scheduling off; then it does not."""
    platform = type(current_platform)
    check = platform.check_and_update_config

    def keep(config) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(keep))


def forget_history(monkeypatch) -> None:
    read = state.StateLayer.read

    def read_no_ids(self, cached, positions_T, back, where):
        found, exists = read(self, cached, positions_T, back, where)
        return found, exists & (cached.dtype != torch.int32)

    monkeypatch.setattr(state.StateLayer, "read", read_no_ids)


def forget_windows(monkeypatch) -> None:
    read = state.StateLayer.read

    def read_only_here(self, cached, positions_T, back, where):
        found, exists = read(self, cached, positions_T, back, where)
        return found, exists & ((cached.dtype == torch.int32) | (torch.tensor(back) == 0))

    monkeypatch.setattr(state.StateLayer, "read", read_only_here)
