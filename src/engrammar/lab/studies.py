"""Questions to memory as small recipes over one runner: `engrammar lab run NAME`.

A study changes one thing in the recipe `lab`; every point of it sees the same text in the same order for a seed, with
equal total and active parameters where its question needs that (the report proves it). Runs are a queue that a kill
leaves where it was; results are written as they come.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engrammar.durable import write_text
from engrammar.machine import describe_machine
from engrammar.train.recipe import Recipe, load_recipe, to_yaml

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results" / "lab"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question.

    Attributes:
        question: what the report says it asks.
        axis: what changes from point to point.
        points: per point, settings over the recipe `lab` (`section.setting=value`); the first is what the others are
            compared with.
        equal: whether all points must have the same total and active parameters.
        paper: what the paper found.
    """

    question: str
    axis: str
    points: Mapping[str, tuple[str, ...]]
    equal: bool
    paper: str


def _rho(share: float) -> tuple[str, ...]:
    return ("model.memory=none",) if share == 1 else ("model.memory=budget", f"model.rho={share}")


def _rows(rows: int) -> tuple[str, ...]:
    return ("model.memory=preset", f"model.settings.memory.rows_per_head=[{rows},{rows}]")


def _memory(**settings: Any) -> tuple[str, ...]:
    return tuple(f"model.settings.memory.{name}={value}" for name, value in settings.items())


STUDIES: dict[str, Study] = {
    "allocation": Study(
        question="Which share of the idle parameters should be memory?",
        axis="experts' share of the idle parameters",
        points={f"{share:.0%}": _rho(share) for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)},
        equal=True,
        paper="best at 75 to 80 % experts, flat from 60 to 95 %",
    ),
    "scaling": Study(
        question="What do more rows buy on a fixed backbone?",
        axis="rows per head",
        points={f"{rows:,}": _rows(rows) for rows in (500, 1_600, 5_000, 16_000, 50_000)},
        equal=False,
        paper="about 0.028 nats less for ten times the rows, over 2.6e5 to 1e7 rows per head",
    ),
    "ablation": Study(
        question="What does each part of the memory contribute?",
        axis="memory",
        points={
            "whole": (),
            "without": ("model.memory=none",),
            "gate without its root": _memory(gate="sigmoid"),
            "no compression": _memory(compression="none"),
            "no convolution": _memory(conv_kernel=0),
            "2-grams alone": _memory(max_ngram_size=2, rows_per_head="[1000]"),
            "4-grams too": _memory(max_ngram_size=4, rows_per_head="[1000,1000,1000]"),
            "one head": _memory(num_heads=1, head_dim=32),
            "at the first block": _memory(layers="[0]"),
        },
        equal=True,
        paper="compression 0.0057, gate 0.0045, convolution 0.0005 nats; 4-grams cost 0.0017",
    ),
}


def recipes(
    study: Study, runs: Path, seeds: Sequence[int], overrides: Sequence[str] = ()
) -> dict[tuple[str, int], Recipe]:
    """The recipe of each point and seed, in the order of the queue: all points of a seed before the next seed."""
    return {
        (point, seed): replace(
            load_recipe("lab", (*settings, *overrides)),
            out=str(runs / f"{''.join(c if c.isalnum() else '-' for c in point)}-{seed}"),
            seed=seed,
        )
        for seed in seeds
        for point, settings in study.points.items()
    }


def run_one(recipe: Recipe) -> dict[str, Any]:
    """Trains one point on one thread, or finds it trained; what is kept of it, with measured FLOPs per token."""
    import torch

    from engrammar.train.run import train

    torch.set_num_threads(1)
    result = train(recipe)
    return {**result, "flops_per_token": measure_flops(recipe)}


def measure_flops(recipe: Recipe) -> float:
    """FLOPs of a forward pass per token, as torch counts them, of the trained model in `recipe.out`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engrammar.modeling import EngrammarForCausalLM

    model = EngrammarForCausalLM.from_pretrained(recipe.out).eval()
    length = recipe.data.sequence_length
    ids = torch.randint(model.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops() / ids.numel()


def run_study(
    name: str,
    *,
    runs: Path = Path("runs/lab"),
    seeds: int = 3,
    jobs: int = 2,
    results: Path = RESULTS,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs a study, or goes on with it; writes `results/NAME.json` after each run.

    Args:
        jobs: runs at the same time, each a process with one thread.
        overrides: settings for all points (trainer.max_steps=20 for a rehearsal).

    Returns:
        the study's `runs`: per point and seed bits per byte, the loss curve, parameters, FLOPs per token.

    Raises:
        ValueError: no such study, or a wrong setting.
    """
    from engrammar.train.run import prepare_tokens

    if name not in STUDIES:
        raise ValueError(f"There is no study {name!r}; known: {', '.join(STUDIES)}.")
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds is {seeds} and jobs {jobs}; allowed: 1 or more.")
    queue = recipes(STUDIES[name], runs / name, range(seeds), overrides)
    base = next(iter(queue.values()))
    prepare_tokens(base.data)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(run_one, recipe): key for key, recipe in queue.items()}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            made = _result(name, base, [(key, found[key]) for key in queue if key in found], seeds, overrides)
            results.mkdir(parents=True, exist_ok=True)
            write_text(results / f"{name}.json", json.dumps(made, indent=1) + "\n")
            print(f"{len(found)} of {len(queue)}: {waiting[done][0]}, seed {waiting[done][1]}", flush=True)
    return made


def _result(
    name: str,
    base: Recipe,
    found: Sequence[tuple[tuple[str, int], dict[str, Any]]],
    seeds: int,
    overrides: Sequence[str],
) -> dict[str, Any]:
    kept = ("total_parameters", "active_parameters", "memory_parameters", "memory_rows", "flops_per_token")
    return {
        "command": " ".join(["engrammar lab run", name, *overrides, *([] if seeds == 3 else [f"--seeds {seeds}"])]),
        "study": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "recipe": to_yaml(replace(base, out="")),
        "tokens": base.trainer["max_steps"] * base.data.batch_size * base.data.sequence_length,
        "runs": [
            {
                "point": point,
                "seed": seed,
                **{key: run[key] for key in kept},
                "bits_per_byte": run["validation_bits_per_byte"],
                "tokens_per_second": run["tokens_per_second"],
                "curve": [[entry["step"], round(entry["loss"], 4)] for entry in run["curve"] if "loss" in entry],
            }
            for (point, seed), run in found
        ],
    }
