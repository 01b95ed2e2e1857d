"""Studies of memory as small recipes over one runner: `engrammar lab run NAME`.

A study changes one thing in a recipe. With one seed, all of its points see the same text in the same order, and have
equal total and active parameters if its question needs that (the report proves it). A killed study continues with the
runs that are left; results are written after each run.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import variance
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engrammar.cells import Column
from engrammar.model.budget import count_parameters
from engrammar.tables.sealed import write_text
from engrammar.train.recipe import PLACES, Recipe, flat, load_recipe, to_yaml
from engrammar.train.run import check_same_recipe, prepare_tokens, train
from engrammar.vocabulary import cached_classes
from engrammar_lab.catalogue import SCALES, Study, studies_at
from engrammar_lab.copying import repeat_gain
from engrammar_lab.machine import describe_machine, describe_run
from engrammar_lab.rivals.modeling import build_lab_config

RESULTS = Path("results/lab")  # in the current directory
PLANNED = (
    Column("point", "point"),
    Column("total", "total_parameters", ","),
    Column("active", "active_parameters", ","),
    Column("rows", "memory_rows", ","),
    Column("tokens a run", "tokens", ","),
    Column("training FLOPs a run", "training_flops", ".2e"),
)  # what `plan` returns, as a table
FINISHED = "finished.json"  # in a run's folder: what `run_one` returned


def find_study(name: str, scale: str = "lab") -> Study:
    """A study at one scale, by name.

    Raises:
        ValueError: there is no study of that name, or no such scale.
    """
    if scale not in SCALES:
        raise ValueError(f"There is no scale {scale!r}; known: {', '.join(SCALES)}.")
    studies = studies_at(SCALES[scale])
    if name not in studies:
        raise ValueError(f"There is no study {name!r}; known: {', '.join(studies)}.")
    return studies[name]


def recipes(
    name: str, runs: Path, seeds: Sequence[int], overrides: Sequence[str] = (), *, scale: str = "lab"
) -> dict[tuple[str, int], Recipe]:
    """The recipe of each point and seed, in the order of the queue: all points of a seed before the next seed.

    Shorter runs come before longer ones. A run's folder is named after its settings, so that studies share the runs
    they have in common.
    """
    study, queue = find_study(name, scale), {}
    for seed in seeds:
        for point, settings in study.points.items():
            recipe = replace(
                load_recipe(study.recipe or scale, (*study.common, *settings, *overrides)), out="", seed=seed
            )
            queue[point, seed] = replace(recipe, out=str(runs / _digest(recipe)))
    return dict(sorted(queue.items(), key=lambda item: item[1].trainer["max_steps"]))


def _digest(recipe: Recipe) -> str:
    """Names a run by the settings that differ from the defaults, so that old runs are found after settings are added.

    A run that was made with other defaults has the same name, so `finished` compares all settings.
    """
    plain = flat(asdict(Recipe()))
    own = {name: value for name, value in flat(asdict(recipe)).items() if plain.get(name) != value}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def run_one(recipe: Recipe) -> dict[str, Any]:
    """Trains one point on one thread, unless it is trained; returns what is kept of it, and measured of the model."""
    torch.set_num_threads(1)
    result = train(recipe, build_lab_config)
    model, length = AutoModelForCausalLM.from_pretrained(recipe.out).eval(), recipe.data.sequence_length
    again = repeat_gain(model, prepare_tokens(recipe.data), length)
    found = {**result, "flops_per_token": measure_flops(model, length), "repeat_gain": again}
    write_text(Path(recipe.out) / FINISHED, json.dumps(found) + "\n")
    return found


def measure_flops(model: PreTrainedModel, length: int) -> float:
    """FLOPs per token of a forward pass over texts of `length` tokens, as torch counts them."""
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
    scale: str = "lab",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs a study, or continues it; writes `results/NAME.json` after each run.

    Args:
        jobs: number of runs at the same time, each in a process with one thread.
        overrides: settings for all points (trainer.max_steps=20 for a rehearsal).

    Returns:
        the study's `runs`: per point and seed, bits per byte, the loss curve, parameters, FLOPs per token.

    Raises:
        ValueError: there is no such study or scale, a setting is wrong, or a run in `runs` or `results` was made with
            other settings.
    """
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds is {seeds} and jobs {jobs}; allowed: 1 or more.")
    queue = recipes(name, runs, range(seeds), overrides, scale=scale)
    base = next(iter(queue.values()))
    found = committed(queue, results)
    found |= {key: _kept(recipe, run) for key, recipe in queue.items() if (run := finished(recipe)) is not None}
    tokens = prepare_tokens(base.data)
    bytes_per_token = tokens.num_bytes("validation") / tokens.num_tokens("validation")
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(run_one, recipe): key for key, recipe in queue.items() if key not in found}
        for done in itertools.chain([None], as_completed(waiting)):
            if done is not None:
                key = waiting[done]
                found[key] = _kept(queue[key], done.result())
            made = _head(name, scale, base, seeds, overrides) | {
                "bytes_per_token": bytes_per_token,
                "runs": [{"point": key[0], "seed": key[1], **found[key]} for key in queue if key in found],
            }
            results.mkdir(parents=True, exist_ok=True)
            write_text(results / f"{name}.json", json.dumps(made, indent=1) + "\n")
            last = "" if done is None else f": {key[0]}, seed {key[1]}"
            print(f"{len(found)} of {len(queue)}{last}", flush=True)
    return made


def committed(queue: Mapping[tuple[str, int], Recipe], results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The queue's runs that are in the JSON of any study in `results`, whichever machine made them.

    Raises:
        ValueError: such a run was made with other settings, or with other vector instructions, which round differently.
    """
    wanted = {Path(recipe.out).name: key for key, recipe in queue.items()}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(results.glob("*.json")):
        made = json.loads(path.read_text())
        runs = {wanted[run["recipe"]]: run for run in made.get("runs", ()) if run.get("recipe") in wanted}
        if not runs:
            continue
        there, plain = flat(yaml.safe_load(made["recipe"])), flat(asdict(Recipe()))
        for key in runs:  # a run is named by what differs from the defaults, so a default may have changed
            for name, value in sorted(flat(asdict(queue[key])).items()):
                if name not in PLACES and value == plain.get(name) != there.get(name, value):
                    raise ValueError(
                        f"{path} holds runs of another recipe ({name} is {there[name]!r} there, {value!r} here): "
                        "choose another folder for the results."
                    )
        if made["machine"]["instructions"] != (instructions := describe_machine()["instructions"]):
            raise ValueError(
                f"{path} holds runs made with {made['machine']['instructions']} instructions, here they are "
                f"{instructions}: set ATEN_CPU_CAPABILITY to those, or choose another folder for the results."
            )
        found |= {key: {name: run[name] for name in run if name not in ("point", "seed")} for key, run in runs.items()}
    return found


def plan(name: str, *, scale: str = "lab", overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What `run_study` would train, without training: prepares the text and counts every model's parameters.

    Returns:
        per point its counts of parameters and rows, and the `tokens` and `training_flops` of a run (6 per token and
        active parameter: forward and backward, without attention's products).
    """
    planned = []
    for (point, _), recipe in recipes(name, Path(), range(1), overrides, scale=scale).items():
        folder = prepare_tokens(recipe.data).tokenizer_path
        tokenizer = AutoTokenizer.from_pretrained(folder)
        counts = count_parameters(build_lab_config(recipe.model, tokenizer, cached_classes(tokenizer, folder)))
        tokens = num_tokens(recipe)
        flops = 6.0 * counts.active_parameters * tokens
        planned.append({"point": point, **counts.to_json(), "tokens": tokens, "training_flops": flops})
    return planned


def num_tokens(recipe: Recipe) -> int:
    """Tokens that a run trains on."""
    return recipe.trainer["max_steps"] * recipe.data.batch_size * recipe.data.sequence_length


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """What `run_one` kept of the run in `recipe.out`; None if the run is not finished.

    Raises:
        ValueError: the run there was made with other settings.
    """
    path = Path(recipe.out) / FINISHED
    if not path.exists():
        return None
    check_same_recipe(recipe)
    return json.loads(path.read_text())


def command_line(verb: str, scale: str, seeds: int, overrides: Sequence[str]) -> str:
    """The `engrammar lab` command that makes a result, without options that have their default."""
    options = [*([] if scale == "lab" else [f"--scale {scale}"]), *([] if seeds == 3 else [f"--seeds {seeds}"])]
    return " ".join(["engrammar lab", verb, *overrides, *options])


def _head(name: str, scale: str, base: Recipe, seeds: int, overrides: Sequence[str]) -> dict[str, Any]:
    return {
        **describe_run(command_line(f"run {name}", scale, seeds, overrides)),
        "study": name,
        "scale": scale,
        "overrides": list(overrides),
        "recipe": to_yaml(replace(base, out="")),
        "tokens": num_tokens(base),
    }


def _kept(recipe: Recipe, run: dict[str, Any]) -> dict[str, Any]:
    counts = ("total_parameters", "active_parameters", "memory_parameters", "memory_rows", "flops_per_token")
    return {
        "recipe": Path(recipe.out).name,
        **{key: run[key] for key in counts},
        **{key: run[key] for key in ("repeat_gain",) if key in run},  # runs of before 1 December 2026 lack it
        "tokens": num_tokens(recipe),
        "bits_per_byte": run["validation_bits_per_byte"],
        "tokens_per_second": run["tokens_per_second"],
        "curve": [[entry["step"], round(entry["loss"], 4)] for entry in run["curve"] if "loss" in entry],
    }


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """A committed run and the same run here, in bits per byte."""

    committed: float
    here: float
    # Two runs of a point differ by less than this 99 times in 100, by the study's deviation over seeds.
    most_apart: float
    # The instruction set that the committed run used; "" if it is not recorded. On another one the same run rounds
    # differently.
    committed_on: str
    here_on: str

    @property
    def difference(self) -> float:
        return self.here - self.committed

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= self.most_apart

    def words(self) -> str:
        """Both figures and the meaning of their difference, in words."""
        words = f"{self.committed:.6f} bits per byte committed, {self.here:.6f} here.\n"
        if self.difference == 0:
            return words + "Equal to the last bit."
        if self.committed_on != self.here_on:
            words += (
                f"The committed run used {self.committed_on or 'unrecorded'} instructions, this one {self.here_on}.\n"
            )
        words += f"They differ by {self.difference:+.6f}{'' if self.agrees else ', too much'}: "
        return words + f"two runs of a point differ by up to {self.most_apart:.6f}, 99 times in 100."


def rerun(name: str, point: str, seed: int, *, out: Path, results: Path = RESULTS) -> Rerun:
    """Trains one point of a committed study again from scratch, and compares.

    Args:
        out: folder for the run; a run that it already holds is not trained again.

    Raises:
        ValueError: the study's JSON is not in `results`, has no such point and seed, or has no point with two seeds.
    """
    path = results / f"{name}.json"
    if not path.exists():
        there = [known for known in studies_at(SCALES["lab"]) if (results / f"{known}.json").exists()]
        raise ValueError(f"{path} does not exist; studies with results: {', '.join(there) or 'none'}.")
    result = json.loads(path.read_text())
    known = {(run["point"], run["seed"]): run["bits_per_byte"] for run in result["runs"]}
    if (point, seed) not in known:
        points = ", ".join(dict.fromkeys(repr(of) for of, _ in known))
        raise ValueError(f"{name} has no run of point {point!r} with seed {seed}; points: {points}; seeds: 0 and up.")
    most_apart = _most_apart(result["runs"])
    scale, overrides = result.get("scale", "lab"), result.get("overrides", ())
    recipe = recipes(name, out, (seed,), overrides, scale=scale)[point, seed]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        here = pool.submit(run_one, recipe).result()["validation_bits_per_byte"]
    return Rerun(
        committed=known[point, seed],
        here=here,
        most_apart=most_apart,
        committed_on=result["machine"].get("instructions", ""),
        here_on=describe_machine()["instructions"],
    )


def _most_apart(runs: Sequence[Mapping[str, Any]]) -> float:
    """The most by which two runs of a point differ, 99 times in 100: by the deviation over seeds, pooled over points.

    Raises:
        ValueError: no point has two seeds.
    """
    from scipy.stats import t

    seeds: dict[str, list[float]] = {}
    for run in runs:
        seeds.setdefault(run["point"], []).append(run["bits_per_byte"])
    squares = [(len(own) - 1) * variance(own) for own in seeds.values() if len(own) > 1]
    freedom = sum(len(own) - 1 for own in seeds.values())
    if not freedom:
        raise ValueError("The study has one seed of each point: nothing says how far two runs of one are apart.")
    return float(t.ppf(0.995, freedom)) * math.sqrt(2 * sum(squares) / freedom)
