"""Many requests at once in vLLM: rows in RAM and on disk, beside the model without memory, a plain MoE, and `generate`.

Each contender is a process of its own with one thread, beside a second one with the plain MoE; a round asks both the
same prompts, in turn, and each of the two is started first once. What is counted is CPU time of the process that
answers, and whether it answers as `generate` does.

Remake, in the environment with vLLM: python -m engrammar_lab.bench.vllm results/bench/vllm.json
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.model.presets import preset
from engrammar.stores.serving import ServingSettings, serve_tables
from engrammar_lab.bench.asking import asking
from engrammar_lab.bench.decode import Plan, Texts, config_of, make_tables, read_text, sizes_of
from engrammar_lab.bench.files import bench_folder
from engrammar_lab.bench.models import random_model
from engrammar_lab.bench.serve import PROMPT, against_aims, generate, medians, plain_config
from engrammar_lab.machine import describe_run

RAM, DISK, OFF, MOE = "vLLM, RAM", "vLLM, disk, cache of 10 %", "vLLM, without memory", "vLLM, plain MoE"
GENERATE = "generate in a batch, RAM"
CONTENDERS = (RAM, DISK, OFF, MOE, GENERATE)
FULL = Plan(preset="100m", rows_per_head=4_300_000, batches=(1, 8, 32), rounds=3, steps=24, corpus="pocket:wiki")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def save_models(plan: Plan, folder: Path) -> dict[str, Path]:
    """Writes the checkpoint with tables, and those without memory, unless they are there; returns their folders."""
    config = config_of(plan)
    with_memory, moe, off = folder / "memory", folder / "moe", folder / "off"
    for path, plain in ((moe, plain_config(plan.preset)), (off, preset(plan.preset, memory=None))):
        if not path.exists():
            random_model(plain).save_pretrained(path)
    if not with_memory.exists():
        make_tables(config, folder / "tables")
        model = random_model(config, "external")
        with closing(serve_tables(model, folder / "tables", ServingSettings(where="disk"))):
            model.save_pretrained(with_memory)
        rmtree(folder / "tables")
    return {RAM: with_memory, DISK: with_memory, OFF: off, MOE: moe, GENERATE: with_memory}


Ids = list[list[int]]  # of each request
Speeds = dict[str, list[float]]  # of each round, by contender


def _vllm(name: str, folder: Path, plan: Plan) -> Callable[[Ids], Ids]:
    from vllm import LLM, SamplingParams

    memory: dict[str, Any] = {"memory": "ram", "sharing": "processes"} if name == RAM else {}
    if name == DISK:
        memory = {"memory": "disk", "cache_rows": sizes_of(folder)[1]}
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=max(plan.batches),
        max_model_len=PROMPT + plan.steps,
        additional_config={"engrammar": memory},
    )

    sampling = SamplingParams(temperature=0, max_tokens=plan.steps, ignore_eos=True, detokenize=False)

    def answer(prompts: Ids) -> Ids:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(one.outputs[0].token_ids) for one in llm.generate(asked, sampling, use_tqdm=False)]

    return answer


def _generate(folder: Path, plan: Plan) -> Callable[[Ids], Ids]:
    model = EngrammarForCausalLM.from_pretrained(folder, memory="ram", sharing="processes").eval()
    return lambda prompts: generate(model, torch.tensor(prompts), plan.steps).tolist()


def _answers(name: str, folder: Path, plan: Plan) -> Callable[[Ids], tuple[Ids, float]]:
    """Returns what answers prompts with the new tokens and the CPU seconds that they took, on one thread."""
    torch.set_num_threads(1)
    answer = _generate(folder, plan) if name == GENERATE else _vllm(name, folder, plan)

    def timed(prompts: Ids) -> tuple[Ids, float]:
        started = time.process_time()
        found = answer(prompts)
        return found, time.process_time() - started

    return timed


def _beside_moe(name: str, plan: Plan, folders: Mapping[str, Path], texts: Texts) -> tuple[list[Speeds], Ids]:
    """Tokens per CPU second of a contender and of the plain MoE, for each number of requests; and all its answers."""
    speeds: list[Speeds] = [{name: [], MOE: []} for _ in plan.batches]
    answers: Ids = []
    for order in ((name, MOE), (MOE, name)):  # whichever starts first is slower by some 7 %
        with ExitStack() as stack:
            asked = {one: stack.enter_context(asking(one, _answers, one, folders[one], plan)) for one in order}
            for own, batch in zip(speeds, plan.batches):
                for turn in range(plan.rounds + 1):  # the first one is left out: it fills caches
                    prompts = texts.take(batch, PROMPT).tolist()
                    for one, ask in asked.items():
                        found, seconds = ask(prompts)
                        answers += found if one == name else []
                        own[one] += [sum(map(len, found)) / seconds] if turn else []
                print(f"{order}, {batch} requests: {medians(own, MOE)}", file=sys.stderr, flush=True)
    return speeds, answers


def bench_vllm(plan: Plan = FULL) -> dict[str, Any]:
    """Answers 1, 8 and 32 requests at once.

    Returns:
        `requests`: per number of requests and contender, tokens per CPU second (median of rounds) and its share of the
            plain MoE's in the same round. `asked`: how many prompts; `equal`: per contender, how many answers are
            the tokens of `generate`.
    """
    os.environ |= ENVIRONMENT
    folders = save_models(plan, bench_folder() / f"vllm-{plan.preset}-{plan.rows_per_head}")
    twice = replace(plan, rounds=2 * plan.rounds + 1)  # both orders
    ids, speeds, answers = read_text(twice, config_of(plan).vocab_size), {}, {}
    for name in (RAM, DISK, OFF, GENERATE):
        speeds[name], answers[name] = _beside_moe(name, plan, folders, Texts(ids))
    found = []
    for place, batch in enumerate(plan.batches):
        base = {MOE: [speed for own in speeds.values() for speed in own[place][MOE]]}
        shown = medians(base, MOE) | {name: medians(own[place], MOE)[name] for name, own in speeds.items()}
        found.append({"requests": batch, "variants": {name: shown[name] for name in CONTENDERS}})
    return {
        **describe_run("python -m engrammar_lab.bench.vllm results/bench/vllm.json"),
        "shapes": f"{plan.preset}, fp32, not compiled, {sizes_of(folders[RAM])[0] / 2**30:.2f} GiB of bf16 rows, "
        f"{plan.rounds} rounds of {plan.steps} tokens after {PROMPT} of prompt, in each order of starting; "
        "the MoE has experts in place of the preset's memory",
        "requests": found,
        "asked": len(answers[GENERATE]),
        "equal": {
            name: sum(map(list.__eq__, answers[name], answers[GENERATE])) for name in CONTENDERS if name in answers
        },
    }


def verdict(result: dict[str, Any]) -> str:
    """Compares with the aims of `engrammar bench serve`, and says how many answers are those of `generate`."""
    asked, equal = result["asked"], result["equal"]
    return (
        f"{against_aims(result, RAM, DISK, GENERATE)} The tokens are those of generate for {equal[RAM]} of {asked} "
        f"prompts with rows in RAM and {equal[DISK]} with rows on disk; without the memory for {equal[OFF]}."
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(bench_vllm(), indent=1) + "\n")
