"""The bench with vLLM's own client: both servers answer all that it asks, and a server that dies is an error."""

import sys
from pathlib import Path

import pytest

from engrammar_lab.bench.clients import MOE, RAM, SERVERS, Plan, ask, bench_clients, table, verdict

PYTHON = Path(".venv-vllm/bin/python").absolute()


def figures(rate, failed=0):
    waits = {"median_ttft_ms": 20.0, "p99_ttft_ms": 30.0, "median_tpot_ms": 5.0}
    return {"completed": 8, "failed": failed, "output_throughput": rate, **waits}


def test_failed_requests_are_counted_and_rates_compared_with_the_plain_moe():
    variants = {name: figures(200.0) for name in SERVERS} | {RAM: figures(150.0, failed=2)}
    result = {"requests": [{"requests": 8, "variants": variants}]}
    assert verdict(result).startswith(
        "2 requests failed; tokens per second beside the plain MoE's in vLLM at 8 at once"
    )
    assert f"{RAM}: 75%" in verdict(result) and MOE not in verdict(result)
    header, lines = table(result)
    assert len(lines) == len(SERVERS) and lines[list(SERVERS).index(RAM)][: len(header)][2:5] == ["8", "2", "150"]
    variants[RAM] = figures(150.0)
    assert verdict(result).startswith("No requests failed")


def test_a_client_that_fails_is_an_error(tmp_path):
    with pytest.raises(OSError, match="vLLM's client ended with 1"):
        ask(Plan(python=sys.executable), "http://127.0.0.1:1", tmp_path)  # this Python has no vLLM


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="the environment with vLLM is not made: make .venv-vllm/ready")
def test_every_server_answers_all_that_the_client_asks():
    sizes = {"rows_per_head": 2003, "at_once": (1, 3), "prompts": 2, "rounds": 1, "prompt_tokens": 12, "new_tokens": 4}
    result = bench_clients(Plan(python=str(PYTHON), **sizes))
    for part in result["requests"]:
        assert [*part["variants"]] == [*SERVERS]
        for found in part["variants"].values():
            assert (found["completed"], found["failed"]) == (2 * part["requests"], 0) and found["output_throughput"] > 0
