"""The serving bench asks every contender the same prompts, and its verdict follows from its figures."""

import copy
import json

import pytest
import torch

from committed import RESULTS
from engrammar_lab.bench import report, serve, vllm
from engrammar_lab.bench.decode import Plan
from engrammar_lab.bench.serve import CONTENDERS, DISK, GENERATE, MOE, RAM, table, verdict

TINY = Plan(preset="nano", rows_per_head=2003, batches=(1, 3), rounds=1, steps=2, corpus="pocket:stdlib")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    patch, asked = pytest.MonkeyPatch(), []
    answer, generate = serve.answer, serve.generate

    async def noted(engine, prompts_BT, new_tokens):
        asked.append(prompts_BT)
        return await answer(engine, prompts_BT, new_tokens)

    def noted_too(model, prompts_BT, new_tokens):
        asked.append(prompts_BT)
        return generate(model, prompts_BT, new_tokens)

    patch.setenv("ENGRAMMAR_BENCH_FOLDER", str(tmp_path_factory.mktemp("bench")))
    patch.setattr(serve, "answer", noted)
    patch.setattr(serve, "generate", noted_too)
    result = report.run("serve", True, TINY)
    patch.undo()
    return result, asked


def test_every_contender_gets_the_same_prompts_once_a_round(result):
    _, asked = result
    assert len(asked) == len(CONTENDERS) * len(TINY.batches) * (TINY.rounds + 1)
    for first in range(0, len(asked), len(CONTENDERS)):
        assert all(torch.equal(one, asked[first]) for one in asked[first : first + len(CONTENDERS)])


def test_the_table_and_the_verdict_follow_from_the_figures(result):
    found = json.loads(json.dumps(result[0]))
    header, lines = table(found)
    assert len(lines) == len(CONTENDERS) * len(TINY.batches) and all(len(line) == len(header) for line in lines)
    changed = copy.deepcopy(found)
    for name, share in ((RAM, 0.96), (DISK, 0.89), (GENERATE, 0.5), (MOE, 1.0)):
        changed["requests"][-1]["variants"][name]["share"] = share
    said = verdict(changed)
    assert "RAM: 96.0% of the plain MoE at 3 requests; the aim, 95%, is met" in said
    assert "the aim, 90%, is missed" in said and "1.92 times generate in a batch; the aim of 2 is missed" in said


def test_in_the_committed_run_vllm_says_what_generate_says_and_meets_its_aims():
    found = json.loads((RESULTS / "bench" / "vllm.json").read_text())
    assert found["equal"][vllm.RAM] == found["equal"][vllm.DISK] == found["asked"] == 328
    assert found["equal"][vllm.OFF] == 0  # the control
    said = vllm.verdict(found)
    assert "8.20 GiB of bf16 rows" in found["shapes"] and said.count("is met") == 3 and "missed" not in said
    assert [part["requests"] for part in found["requests"]] == [1, 8, 32]
