"""Serving many requests at once: our engine with rows in RAM, on disk and with the memory off, beside a plain MoE.

In each round every contender answers the same prompts of real text, greedily, all at once. What is counted is CPU time
of the process, HTTP left out, so that other programs of the machine change little.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from engrammar.cells import Column
from engrammar.model.budget import count_parameters
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.model.presets import preset
from engrammar.off import memory_off
from engrammar.serve.openai.asked import Asked, Limits
from engrammar.serve.openai.engine import Engine
from engrammar.stores.serving import ServingSettings, serve_tables
from engrammar_lab.bench.decode import Plan, Texts, config_of, make_tables, read_text, sizes_of
from engrammar_lab.bench.figures import by_variant, line_by_line
from engrammar_lab.bench.files import bench_folder
from engrammar_lab.bench.models import random_model

RAM, DISK, OFF, MOE, GENERATE = "RAM", "disk, cache of 10 %", "memory off", "plain MoE", "RAM, generate in a batch"
CONTENDERS = (RAM, DISK, OFF, MOE, GENERATE)
COLUMNS = (
    Column("requests", "requests"),
    Column("contender", "name"),
    Column("tokens per CPU s", "tokens_per_cpu_second", ",.0f"),
    Column("of plain MoE", "share", ".1%"),
)
table = line_by_line(COLUMNS, lambda result: by_variant(result["requests"]))
PROMPT = 32
FULL = Plan(preset="nano", rows_per_head=600_000, batches=(1, 8, 32), rounds=3, steps=24, corpus="pocket:wiki")
QUICK = Plan(preset="nano", rows_per_head=60_000, batches=(1, 8), rounds=2, steps=8, corpus="pocket:stdlib")


def plain_config(name: str) -> EngrammarConfig:
    """The preset without memory, with as many experts more as its own memory's parameters would be."""
    own = preset(name)
    counts = count_parameters(own)
    expert = 3 * own.hidden_size * own.moe_intermediate_size * (own.num_hidden_layers - own.first_k_dense_replace)
    more = round(counts.memory_parameters / expert)
    return preset(name, memory=None, n_routed_experts=own.n_routed_experts + more)


async def answer(engine: Engine, prompts_BT: Tensor, new_tokens: int) -> int:
    """Answers all prompts at once; returns the number of new tokens."""
    prompts = prompts_BT.tolist()
    asked = Asked(prompts=prompts, max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    async def one(ids: list[int]) -> int:
        async with aclosing(engine.tokens(ids, asked, None, [])) as tokens:
            return sum([len(new) async for new in tokens])

    async with engine.turn():
        return sum(await asyncio.gather(*map(one, prompts)))


@torch.no_grad()
def generate(model: EngrammarForCausalLM, prompts_BT: Tensor, new_tokens: int) -> Tensor:
    """The new tokens [B, new_tokens] of transformers' `generate` in one batch."""
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
    out = model.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), generation_config=greedy)
    return out[:, prompts_BT.shape[1] :]


@contextmanager
def contenders(plan: Plan, folder: Path) -> Iterator[dict[str, EngrammarForCausalLM]]:
    """The model of each contender; the weights beside the tables are the same ones."""
    config = config_of(plan)
    made: dict[str, EngrammarForCausalLM] = {}
    with ExitStack() as stack:
        for name in CONTENDERS:
            if name == MOE:
                made[name] = random_model(plain_config(plan.preset)).eval()
                continue
            made[name] = model = random_model(config, "external").eval()
            settings = ServingSettings(where="ram")
            if name == DISK:
                settings = ServingSettings(where="disk", cache_rows=sizes_of(folder)[1])
            stack.callback(serve_tables(model, folder, settings).close)
            if name == OFF:
                stack.enter_context(memory_off(model))
        yield made


async def rates(plan: Plan, models: dict[str, EngrammarForCausalLM], texts: Texts) -> list[dict[str, Any]]:
    """Tokens per CPU second of each contender, for each number of requests."""
    limits = Limits(max_length=PROMPT + plan.steps, cache_tokens=max(plan.batches) * (PROMPT + plan.steps))
    engines = {name: Engine(model, None, limits) for name, model in models.items() if name != GENERATE}
    found = []
    try:
        for batch in plan.batches:
            speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            for turn in range(plan.rounds + 1):  # the first one is left out: it fills caches
                prompts_BT = texts.take(batch, PROMPT)
                for name in CONTENDERS:
                    started = time.process_time()
                    if name == GENERATE:
                        num_new = generate(models[name], prompts_BT, plan.steps).numel()
                    else:
                        num_new = await answer(engines[name], prompts_BT, plan.steps)
                    speeds[name] += [num_new / (time.process_time() - started)] if turn else []
            found.append({"requests": batch, "variants": medians(speeds, MOE)})
    finally:
        for engine in engines.values():
            engine.close()
    return found


def medians(speeds: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Per contender the median of its rounds, and of its share of what `base` did in the same round."""
    return {
        name: {
            "tokens_per_cpu_second": median(own),
            "share": median(one / other for one, other in zip(own, speeds[base])),
        }
        for name, own in speeds.items()
    }


def bench_serve(quick: bool, plan: Plan | None = None) -> dict[str, Any]:
    """Answers 1, 8 and 32 requests at once.

    Returns:
        `requests`: per number of requests and contender, tokens per CPU second (median of rounds) and its share of the
            plain MoE's in the same round.
    """
    plan = plan or (QUICK if quick else FULL)
    config = config_of(plan)
    folder = bench_folder() / f"decode-{plan.preset}-{plan.rows_per_head}"
    make_tables(config, folder)
    texts = Texts(read_text(plan, config.vocab_size))
    with contenders(plan, folder) as models:
        found = asyncio.run(rates(plan, models, texts))
    return {
        "shapes": f"{plan.preset}, fp32, {sizes_of(folder)[0] / 2**30:.2f} GiB of bf16 rows, {plan.rounds} rounds of "
        f"{plan.steps} tokens after {PROMPT} of prompt; the MoE has experts in place of {plan.preset}'s own memory",
        "requests": found,
    }


def verdict(result: dict[str, Any]) -> str:
    """Compares with the aims, and says what a quick run cannot show."""
    few = " Quick: a small table, which says little about a disk." if result["quick"] else ""
    return against_aims(result, RAM, DISK, GENERATE) + few


def against_aims(result: dict[str, Any], ram: str, disk: str, generated: str) -> str:
    """Compares with the aims: RAM within 5 % of the MoE, disk within 10 %, at least twice `generate`."""
    last = result["requests"][-1]
    shares = {name: found["share"] for name, found in last["variants"].items()}
    sentences = []
    for name, aim in ((ram, 0.95), (disk, 0.9)):
        met = "met" if shares[name] >= aim else "missed"
        sentences.append(
            f"{name}: {shares[name]:.1%} of the plain MoE at {last['requests']} requests; the aim, {aim:.0%}, is {met}."
        )
    times = shares[ram] / shares[generated]
    sentences.append(f"{times:.2f} times generate in a batch; the aim of 2 is {'met' if times >= 2 else 'missed'}.")
    return " ".join(sentences)
