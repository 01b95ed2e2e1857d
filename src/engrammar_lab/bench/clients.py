"""Our server, and vLLM with our plug-in, as `vllm bench serve` sees them: over HTTP, with its own client.

Each server is a process of its own that computes with one thread. The client asks prompts of random tokens, some at a
time; servers are asked one after the other. Time is that of the clock, so the machine should do nothing else.

Remake, with the Python of the environment with vLLM:
python -m engrammar_lab.bench.clients .venv-vllm/bin/python results/bench/clients.json
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from engrammar.cells import Column
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.tables.sealed import write_text
from engrammar_lab.bench.decode import sizes_of
from engrammar_lab.bench.figures import by_variant, line_by_line
from engrammar_lab.bench.load import NAME, Served, make_model, serving, started
from engrammar_lab.bench.serve import plain_config
from engrammar_lab.machine import describe_run

OURS_RAM, OURS_DISK, OURS_MOE = "engrammar serve, RAM", "engrammar serve, disk", "engrammar serve, plain MoE"
RAM, DISK, MOE = "vLLM, RAM", "vLLM, disk", "vLLM, plain MoE"
SERVERS = (OURS_RAM, OURS_DISK, OURS_MOE, RAM, DISK, MOE)
COLUMNS = (
    Column("requests at once", "requests"),
    Column("server", "name"),
    Column("answers", "completed", ","),
    Column("failed", "failed", ","),
    Column("tokens per second", "output_throughput", ",.0f"),
    Column("ms to the first token", "median_ttft_ms", ",.0f"),
    Column("the slowest of 100", "p99_ttft_ms", ",.0f"),
    Column("ms a further token", "median_tpot_ms", ",.1f"),
)
table = line_by_line(COLUMNS, lambda result: by_variant(result["requests"]))
MEASURED = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
# `vllm bench serve` does not start from vLLM's package for CPUs, which has another name; what it runs does.
CLIENT = """
import argparse, json, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
found = [main(parser.parse_args(asked)) for asked in json.load(sys.stdin)]
with open(sys.argv[1], "w") as file:
    json.dump(found, file, default=str)
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is asked, and where vLLM is."""

    python: str  # of the environment with vLLM
    rows_per_head: int = 400_000
    at_once: tuple[int, ...] = (1, 8, 32)
    prompts: int = 8  # for each of those at once
    rounds: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 32


def save_models(plan: Plan, folder: Path) -> tuple[Path, Path]:
    """Writes `nano` with tables, and a plain MoE with experts in place of its memory; returns their folders."""
    own, moe = folder / "memory", folder / "moe"
    own.mkdir()
    make_model(own, plan.rows_per_head)
    tokenizer = AutoTokenizer.from_pretrained(own)
    experts = plain_config("nano").n_routed_experts
    plain = EngrammarForCausalLM.from_preset("nano", tokenizer=tokenizer, memory=None, n_routed_experts=experts)
    plain.save_pretrained(moe)
    tokenizer.save_pretrained(moe)
    return own, moe


def vllm_serving(plan: Plan, folder: Path, **memory: Any) -> AbstractContextManager[Served]:
    """vLLM with our plug-in, `started`."""
    command = [plan.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", str(max(plan.at_once)), "--additional-config", json.dumps({"engrammar": memory})]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    return started(command, **variables)


def ask(plan: Plan, url: str, tokenizer: Path) -> list[list[dict[str, Any]]]:
    """What vLLM's client found of a server: of each number of requests at once, of each round."""
    same: dict[str, object] = {"backend": "openai", "base-url": url, "model": NAME, "tokenizer": tokenizer}
    same |= {"dataset-name": "random", "random-input-len": plan.prompt_tokens, "random-output-len": plan.new_tokens}
    same |= {"temperature": 0, "ready-check-timeout-sec": 120}
    common = ["--disable-tqdm", "--ignore-eos", "--trust-remote-code"]
    common += [f"--{name}={value}" for name, value in same.items()]
    asked = [
        [*common, "--seed", str(turn), "--max-concurrency", str(number), "--num-prompts", str(number * plan.prompts)]
        for number in plan.at_once
        for turn in range(plan.rounds)
    ]
    with TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        done = subprocess.run(
            [plan.python, "-c", CLIENT, found], input=json.dumps(asked), capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"vLLM's client ended with {done.returncode}: {done.stderr[-2000:]}")
        results = json.loads(found.read_text())
    return [results[first : first + plan.rounds] for first in range(0, len(results), plan.rounds)]


def bench_clients(plan: Plan) -> dict[str, Any]:
    """Asks each server 1, 8 and 32 prompts at once.

    Returns:
        `requests`: per number at once and server, how many prompts were answered and how many failed, over all rounds,
            and the medians over rounds of tokens per second and milliseconds, as `vllm bench serve` counts them.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # of all processes that are started here
    found: dict[str, list[list[dict[str, Any]]]] = {}
    with TemporaryDirectory() as scratch:
        own, moe = save_models(plan, Path(scratch))
        size, tenth = sizes_of(own)
        servers = {
            OURS_RAM: serving(own),
            OURS_DISK: serving(own, "--memory", "disk", "--cache-rows", str(tenth)),
            OURS_MOE: serving(moe),
            RAM: vllm_serving(plan, own, memory="ram"),
            DISK: vllm_serving(plan, own, memory="disk", cache_rows=tenth),
            MOE: vllm_serving(plan, moe),
        }
        for name, server in servers.items():  # each is started here
            with server as served:
                found[name] = ask(plan, served.url, own)
    return {
        **describe_run("python -m engrammar_lab.bench.clients .venv-vllm/bin/python results/bench/clients.json"),
        "shapes": f"nano with a vocabulary of 1,000, fp32, not compiled, {size / 2**30:.2f} GiB of fp32 rows, caches "
        f"of 10 % before the disk; {plan.prompts} prompts of {plan.prompt_tokens} tokens for each of those at once, "
        f"{plan.rounds} rounds, {plan.new_tokens} tokens an answer; the MoE has experts in place of nano's own memory",
        "requests": [
            {"requests": number, "variants": {name: _medians(found[name][place]) for name in found}}
            for place, number in enumerate(plan.at_once)
        ],
    }


def _medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    counted = {name: sum(one[name] for one in rounds) for name in ("completed", "failed")}
    return counted | {name: median(one[name] for one in rounds) for name in MEASURED}


def verdict(result: dict[str, Any]) -> str:
    """Whether requests failed, and what each server makes of the plain MoE in vLLM."""
    failed = sum(found["failed"] for part in result["requests"] for found in part["variants"].values())
    last = result["requests"][-1]
    rates = {name: found["output_throughput"] for name, found in last["variants"].items()}
    shares = ", ".join(f"{name}: {rate / rates[MOE]:.0%}" for name, rate in rates.items() if name != MOE)
    at_once = f"tokens per second beside the plain MoE's in vLLM at {last['requests']} at once"
    return f"{failed or 'No'} requests failed; {at_once}: {shares}."


if __name__ == "__main__":
    write_text(Path(sys.argv[2]), json.dumps(bench_clients(Plan(python=sys.argv[1])), indent=1) + "\n")
