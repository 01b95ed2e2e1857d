"""The bench of vLLM: every contender answers, and those with the memory answer as `generate` does."""

from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own")
from engrammar_lab.bench import vllm

pytestmark = pytest.mark.slow
TINY = replace(vllm.FULL, preset="nano", rows_per_head=2003, batches=(1, 3), rounds=1, steps=4, corpus="pocket:stdlib")


def test_contenders_with_memory_answer_as_generate_does(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAMMAR_BENCH_FOLDER", str(tmp_path))
    found = vllm.bench_vllm(TINY)
    assert [part["requests"] for part in found["requests"]] == [1, 3]
    assert all(set(part["variants"]) == set(vllm.CONTENDERS) for part in found["requests"])
    assert found["equal"][vllm.RAM] == found["equal"][vllm.DISK] == found["asked"] == 16
    assert "the aim, 95%, is" in vllm.verdict(found) and "for 16 of 16 prompts with rows in RAM" in vllm.verdict(found)
    assert found["equal"][vllm.OFF] < 8  # the control: the same weights without their memory
