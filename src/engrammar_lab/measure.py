"""Measures of a study's pair (MoE, MoE + memory) beside its loss: tasks, depth, gates, traffic.

Each seed's two models are compared with each other, on questions and text that all seeds share.
"""

import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.off import memory_off
from engrammar.tables.sealed import write_text
from engrammar.train import corpora
from engrammar.train.documents import is_kept, is_validation
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.recipe import DataRecipe, Recipe
from engrammar.train.run import prepare_tokens
from engrammar_lab.depth import compare_depth
from engrammar_lab.frequency import gate_by_frequency
from engrammar_lab.gates import gates_over_text
from engrammar_lab.machine import describe_run
from engrammar_lab.studies import RESULTS, command_line, finished, recipes
from engrammar_lab.tasks.needle import Haystack, needle_questions, tracking_questions, training_row
from engrammar_lab.tasks.questions import Split
from engrammar_lab.tasks.suite import build_suite, score_suite
from engrammar_lab.traffic import memory_traffic

PAIR = ("MoE", "MoE + memory")
PAIRS = {"pair": PAIR, "horizon": ("32M, 100%", "32M, 10%")}  # the points of a study that are measured
OFF = f"{PAIR[1]}, memory off"
MEASURES = ("tasks", "depth", "gates", "traffic")
FORMATS = ("needle", "tracking")  # groups of questions in a format that no text of the corpora has


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured. Results that were measured with other settings are measured again."""

    num_tuning_steps: int = 300
    tuning_batch: int = 32
    tuning_lr: float = 2e-3
    num_tuning_sentences: int = 400  # sentences of the text that tuning hides needles in
    num_questions: int = 200  # questions of each task
    depth_tokens: int = 32_768  # tokens that CKA and LogitLens read
    # Layers that the soft alignment index averages over: two of seven, about the paper's five of thirty.
    nearest: int = 2
    # Number and size of the texts that are shown with their gates.
    num_texts: int = 4
    text_bytes: int = 400


SETTINGS = Settings()


def split_of(data: DataRecipe, text: str) -> Split:
    """Whether a run on `data` trained on a document of its corpora."""
    trained = is_kept(text, data.keep_share) and not is_validation(text, data.validation_share)
    return "seen" if trained else "unseen"


def tuning_rows(
    tokenizer: PreTrainedTokenizerBase, data: DataRecipe, *, seed: int, num_steps: int
) -> list[dict[str, Tensor]]:
    """Answered needle and tracking questions in random order, `tuning_batch` per step.

    The test has other keys and values.
    """
    whole = Haystack.of(_leads(data, "seen")[:200], tokenizer)
    haystack = Haystack(
        whole.sentences[: SETTINGS.num_tuning_sentences], whole.lengths[: SETTINGS.num_tuning_sentences]
    )
    num, length = num_steps * SETTINGS.tuning_batch // 2, data.sequence_length
    questions = [
        question
        for ask in (needle_questions, tracking_questions)
        for question in ask(haystack, tokenizer, length=length, num=num, seed=seed, use="training")
    ]
    random.Random(seed).shuffle(questions)
    return [training_row(tokenizer, question, length) for question in questions]


def tune(model: EngrammarForCausalLM, rows: Sequence[dict[str, Tensor]]) -> None:
    """Trains `model` for a few steps on `tuning_rows`, which teaches it the format."""
    clipped = OptimizerSettings(max_grad_norm=1.0)
    optimizer = build_optimizer(model, clipped, lr=SETTINGS.tuning_lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    model.train()
    num_steps = len(rows) // SETTINGS.tuning_batch
    for step in range(num_steps):
        batch = rows[step * SETTINGS.tuning_batch : (step + 1) * SETTINGS.tuning_batch]
        for group in optimizer.param_groups:
            group["lr"] *= 1 - 1 / (num_steps - step + 1)  # linearly to zero
        model(**{name: torch.stack([row[name] for row in batch]) for name in batch[0]}, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def measure_pair(memory: Recipe, plain: Recipe) -> dict[str, Any]:
    """All measures of one seed's two trained models, on one thread.

    Returns:
        `tasks` (per point and task, what `score_suite` returns), `depth`, `gates`, `traffic`, `texts`.
    """
    torch.set_num_threads(1)
    tokens, length = prepare_tokens(memory.data), memory.data.sequence_length
    tokenizer = AutoTokenizer.from_pretrained(memory.out)
    own, other = (EngrammarForCausalLM.from_pretrained(recipe.out).eval() for recipe in (memory, plain))
    texts = [text[: SETTINGS.text_bytes] for text in _leads(memory.data, "unseen")[: SETTINGS.num_texts]]
    found = {
        "depth": compare_depth(own, other, tokens, length=length, num_tokens=SETTINGS.depth_tokens, k=SETTINGS.nearest),
        "gates": gate_by_frequency(own, tokens, length=length, plain=other),
        "traffic": memory_traffic(own.model.memory, tokens, length=length),
        "texts": gates_over_text(own, tokenizer, texts),
    }
    return found | {"tasks": _score(own, other, tokenizer, memory)}


def _leads(data: DataRecipe, split: Split) -> list[str]:
    """Wikipedia leads that a run on `data` trained on, or did not."""
    texts = (entry.text for entry in corpora.entries("wiki", cache=Path(data.folder) / "pocket"))
    return [text for text in texts if split_of(data, text) == split]


def _score(
    own: EngrammarForCausalLM, other: EngrammarForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> dict[str, Any]:
    """Scores every task, then needles and tracking again after both models have been tuned to their format."""
    data = recipe.data
    suite = build_suite(
        tokenizer,
        partial(split_of, data),
        cache=Path(data.folder) / "pocket",
        length=data.sequence_length,
        per_task=SETTINGS.num_questions,
        trained_on=data.source.removeprefix("pocket:").split("+"),
    )
    tuned = {name: questions for name, questions in suite.items() if name.split("/")[0] in FORMATS}
    found: dict[str, Any] = {}
    for asked, suffix in ((suite, ""), (tuned, "/tuned")):
        if suffix:
            rows = tuning_rows(tokenizer, data, seed=recipe.seed, num_steps=SETTINGS.num_tuning_steps)
            for model in (own, other):
                tune(model, rows)
        for point, model in zip((*PAIR, OFF), (other, own, own)):
            with memory_off(model) if point == OFF else nullcontext():
                scores = score_suite(model, tokenizer, asked, length=data.sequence_length)
            found.setdefault(point, {}).update({name + suffix: score for name, score in scores.items()})
    return found


def run_measures(
    study: str = "pair",
    *,
    runs: Path = Path("runs/lab"),
    seeds: int = 3,
    jobs: int = 2,
    results: Path = RESULTS,
    scale: str = "lab",
    overrides: Sequence[str] = (),
) -> None:
    """Measures the pair of every seed.

    Of the study `pair` it writes tasks.json, depth.json, gates.json and traffic.json; of another one, only
    STUDY-tasks.json, with the seeds of which both models are trained. A seed's measures are kept beside its run, and
    for another study in that file, so a later call adds the seeds that are left, on another machine as well.

    Raises:
        ValueError: the study has no pair; a model of `pair`, of all seeds of another study, or of one that was measured
            with other settings is not trained yet; or one was trained with other settings.
    """
    if study not in PAIRS:
        raise ValueError(f"{study} has no pair of models to measure; studies that have one: {', '.join(PAIRS)}.")
    path = results / f"{study}-tasks.json"
    before, done = _measured_before(path) if study != "pair" else (set(), {})
    queue = recipes(study, runs, range(seeds), overrides, scale=scale)
    pairs = {seed: (queue[PAIRS[study][1], seed], queue[PAIRS[study][0], seed]) for seed in range(seeds)}
    untrained = {
        seed: recipe.out
        for seed, pair in pairs.items()
        for recipe in pair
        if seed not in done and finished(recipe) is None
    }
    if untrained and (study == "pair" or untrained.keys() == pairs.keys() or untrained.keys() & before):
        folder = next(iter(untrained.values()))
        raise ValueError(f"{folder} holds no finished run: engrammar lab run {study}, with the same settings.")
    pairs = {seed: pair for seed, pair in pairs.items() if seed not in untrained}
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {seed: pool.submit(_measured, *pair) for seed, pair in pairs.items() if seed not in done}
        each = {seed: waiting[seed].result() if seed in waiting else {"tasks": done[seed]} for seed in pairs}
    verb = "measure" if study == "pair" else f"measure --study {study}"
    head = describe_run(command_line(verb, scale, seeds, overrides))
    results.mkdir(parents=True, exist_ok=True)
    if study != "pair":
        runs_of = [{"seed": seed, "tasks": _without_answers(found["tasks"])} for seed, found in each.items()]
        _write(path, head | {"study": study, "pair": PAIRS[study], "settings": asdict(SETTINGS), "runs": runs_of})
        return
    for name in MEASURES[1:]:
        made = head | {"runs": [{"seed": seed, **found[name]} for seed, found in each.items()]}
        _write(results / f"{name}.json", made | ({"texts": each[0]["texts"]} if name == "gates" else {}))
    _write(results / "tasks.json", head | merge_tasks([found["tasks"] for found in each.values()]))


def _measured_before(path: Path) -> tuple[set[int], dict[int, dict[str, Any]]]:
    """The seeds that stand in STUDY-tasks.json, and the scores of those that were measured as they would be now."""
    made = json.loads(path.read_text()) if path.exists() else {"runs": []}
    scores = {run["seed"]: run["tasks"] for run in made["runs"]}
    is_same = made.get("settings") == asdict(SETTINGS) and made["pair"] == list(PAIRS[made["study"]])
    return set(scores), scores if is_same else {}


def _without_answers(tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The scores without the answers to single questions."""
    kept = ("measure", "chance", "questions", "score", "bits_per_byte")
    return {point: {task: {key: own[key] for key in kept} for task, own in of.items()} for point, of in tasks.items()}


def _measured(memory: Recipe, plain: Recipe) -> dict[str, Any]:
    path, settings = Path(memory.out) / "measures.json", asdict(SETTINGS)
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("settings") != settings:
        kept = {"settings": settings, "found": measure_pair(memory, plain)}
        write_text(path, json.dumps(kept) + "\n")
    return kept["found"]


def merge_tasks(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of every seed side by side, for the report."""
    points = [*PAIR, OFF]
    first = each[0][points[0]]
    return {
        "points": points,
        "seeds": list(range(len(each))),
        "tasks": {
            name: {
                **{key: first[name][key] for key in ("measure", "chance", "questions")},
                "scores": {point: [found[point][name]["score"] for found in each] for point in points},
                "bits_per_byte": {point: [found[point][name]["bits_per_byte"] for found in each] for point in points},
            }
            for name in first
        },
    }


def _write(path: Path, result: dict[str, Any]) -> None:
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    write_text(path, json.dumps(rounded, indent=1) + "\n")
