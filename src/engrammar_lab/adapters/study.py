"""Runs the study of attached memories: every domain, seed and variant; goes on after a kill, and on another machine."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engrammar.tables.sealed import write_text
from engrammar_lab.adapters.lessons import Amount, fixed_questions, make_lesson
from engrammar_lab.adapters.measures import measure
from engrammar_lab.adapters.smollm import base_chats, fetch_smollm, load_plain
from engrammar_lab.adapters.variants import HOW, VARIANTS, How
from engrammar_lab.machine import describe_run
from engrammar_lab.studies import RESULTS, command_line

NAME = "attach"
TAUGHT = ("computing", "encyclopaedia")  # domains
TIMED = "memory"  # whose seconds "LoRA, equal seconds" gets; it comes before it in VARIANTS
KEY = ("domain", "seed", "variant")
Key = tuple[str, int, str]


def run_attach(
    *,
    seeds: int = 3,
    jobs: int = 2,
    results: Path = RESULTS,
    cache: Path = Path("data/pocket"),
    base: Path | None = None,
    amount: Amount | None = None,
    how: How = HOW,
) -> dict[str, Any]:
    """Teaches every lesson in every way, measures, and writes `results/attach.json` after each model.

    Args:
        jobs: lessons at the same time, each in a process with one thread.
        base: the folder of the model; None fetches SmolLM2-135M-Instruct.
        amount, how: other amounts of text and training than the study's; runs with others are not taken over.

    Returns:
        The study's `runs`: per domain, seed and variant what `measure` returns, trained and stored parameters, and CPU
        seconds of training.

    Raises:
        ValueError: seeds or jobs is below 1, or something cannot be fetched.
    """
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds is {seeds} and jobs {jobs}; allowed: 1 or more.")
    amount = amount or Amount()
    folder, path = base or fetch_smollm(cache), results / f"{NAME}.json"
    settings = json.loads(json.dumps({"base": folder.name, "amount": asdict(amount), "how": asdict(how)}))
    found, chats = done_runs(path, settings, KEY), base_chats(folder, cache, amount)
    lessons = [(domain, seed) for seed in range(seeds) for domain in TAUGHT]
    results.mkdir(parents=True, exist_ok=True)

    def keep() -> dict[str, Any]:
        order = [(domain, seed, variant) for domain, seed in lessons for variant in VARIANTS]
        runs = [{**dict(zip(KEY, key)), **found[key]} for key in order if key in found]
        made = {**describe_run(command_line("attach", "lab", seeds, ())), **settings, "runs": runs}
        write_text(path, json.dumps(made, indent=1) + "\n")
        return made

    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for variant in VARIANTS:
            waiting = {}
            for domain, seed in lessons:
                key = (domain, seed, variant)
                if key not in found:
                    seconds = found.get((domain, seed, TIMED), {}).get("seconds", 0.0)
                    task = pool.submit(_teach, key, folder, cache, amount, how, seconds=seconds, chats=chats)
                    waiting[task] = key
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                keep()
                of = len(lessons) * len(VARIANTS)
                print(f"{len(found)} of {of}: {', '.join(map(str, waiting[done]))}", flush=True)
    return keep()


def done_runs(path: Path, settings: Mapping[str, Any], names: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """The runs that stand in the results, if they were made with the same settings, by their values of `names`."""
    made = json.loads(path.read_text()) if path.exists() else {}
    if any(made.get(name) != value for name, value in settings.items()):
        return {}
    return {tuple(run.pop(name) for name in names): run for run in made["runs"]}


def _teach(
    key: Key,
    folder: Path,
    cache: Path,
    amount: Amount,
    how: How,
    *,
    seconds: float,
    chats: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Teaches one model on one thread and measures it."""
    domain, seed, variant = key
    model, tokenizer = load_plain(folder)
    lesson = make_lesson(domain, seed, tokenizer, cache, amount)
    ends = (lambda _, spent: spent >= seconds) if variant == "LoRA, equal seconds" else None
    taught = VARIANTS[variant](model, tokenizer, lesson, seed, how, ends)
    scores = measure(taught.model, tokenizer, lesson, chats, fixed_questions(cache, amount))
    rounded = {name: float(f"{value:.6g}") for name, value in scores.items()}
    sizes = {"trained": taught.trained, "stored": taught.stored, "seconds": round(taught.seconds, 3)}
    return {**rounded, **sizes, "tokens": lesson.taught.numel()}
