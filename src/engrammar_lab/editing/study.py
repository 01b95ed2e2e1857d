"""Runs the study of fact editing: every way, number of edits and order; goes on after a kill."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engrammar.tables.sealed import write_text
from engrammar_lab.adapters.lessons import Amount
from engrammar_lab.adapters.smollm import base_chats, fetch_smollm, load_plain
from engrammar_lab.editing.cases import in_order, read_cases
from engrammar_lab.editing.edited import Edited, Model, Way
from engrammar_lab.editing.measures import Unedited, asked_before, measure_edits
from engrammar_lab.editing.neutral import Read, changed, neutral_blocks, read_block, read_blocks
from engrammar_lab.editing.patches import by_patch
from engrammar_lab.editing.ways import RIVALS
from engrammar_lab.machine import describe_run
from engrammar_lab.studies import RESULTS

NAME = "edit"
WAYS: Mapping[str, Way] = {
    "as it was": lambda model, tokenizer, facts, seed: Edited(),
    "gated": by_patch("gated"),
    "gated, in sequence": by_patch("gated", in_parts=True),
    "vector": by_patch("vector"),
    **RIVALS,
}
# Numbers of edits that a way is not run at: what it would take, or be no other than, is said in the report.
LEAST = {"gated, in sequence": 200}
MOST = {"vector": 100}
KEY = ("cases", "way", "edits", "seed")
Key = tuple[str, str, int, int]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How much is asked."""

    questions: int = 100  # of each kind, at most
    neutral: int = 8192  # tokens of neutral text


def run_edits(
    facts: Sequence[Path],
    *,
    edits: Sequence[int] = (1, 10, 100, 1000),
    seeds: int = 3,
    jobs: int = 2,
    results: Path = RESULTS,
    cache: Path = Path("data/pocket"),
    base: Path | None = None,
    ask: Ask | None = None,
    ways: Sequence[str] = tuple(WAYS),
) -> dict[str, Any]:
    """Edits facts in every way, measures, undoes, and writes `results/edit.json` after each run.

    Args:
        facts: files of CounterFact or zsRE in EasyEdit's form; they are not part of the project.
        edits: numbers of facts that are changed.
        seeds: orders of the facts.
        jobs: orders at the same time, each in a process with one thread.
        base: the folder of the model; None fetches SmolLM2-135M-Instruct.
        ask: other amounts than the study's; runs with others are not taken over.
        ways: some of `WAYS`.

    Returns:
        The study's `runs`: what `measure_edits` and `changed` return, bytes, CPU seconds and refusals of each.

    Raises:
        ValueError: seeds or jobs is below 1, a way is not known, or a file cannot be read.
    """
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds is {seeds} and jobs {jobs}; allowed: 1 or more.")
    if not set(ways) <= set(WAYS):
        raise ValueError(f"ways are {', '.join(ways)}; allowed: {', '.join(WAYS)}.")
    ask = ask or Ask()
    folder, path = base or fetch_smollm(cache), results / f"{NAME}.json"
    files = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in facts}
    settings: dict[str, Any] = {"base": folder.name, "ask": asdict(ask), "facts": files}
    found = _done(path, settings)
    base_chats(folder, cache, Amount())
    results.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for num, file in ((num, file) for num in edits for file in facts):
            keys = [(file.stem, way, num, seed) for seed in range(seeds) for way in ways if _fits(way, num)]
            tasks = {pool.submit(_run, key, file, folder, cache, ask): key for key in keys if key not in found}
            for done in as_completed(tasks):
                found[tasks[done]] = done.result()
                _keep(path, settings, found)
                print(f"{len(found)}: {', '.join(map(str, tasks[done]))}", flush=True)
    return _keep(path, settings, found)


def _fits(way: str, num: int) -> bool:
    return LEAST.get(way, 0) <= num <= MOST.get(way, num)


def _done(path: Path, settings: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The runs that stand in the results, if they were made with the same settings and facts."""
    made = json.loads(path.read_text()) if path.exists() else {}
    if any(made.get(name) != settings[name] for name in ("base", "ask")):
        return {}
    kept = [run for run in made["runs"] if settings["facts"].get(run["cases"]) in (None, made["facts"][run["cases"]])]
    settings["facts"].update({run["cases"]: made["facts"][run["cases"]] for run in kept})
    return {tuple(run.pop(name) for name in KEY): run for run in kept}


def _keep(path: Path, settings: Mapping[str, Any], found: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    """Writes what was found so far."""
    order = sorted(found, key=lambda key: (key[0], key[2], key[3], list(WAYS).index(key[1])))
    runs = [dict(zip(KEY, key)) | dict(found[key]) for key in order]
    made = {**describe_run("engrammar lab edit FACTS..."), **settings, "runs": runs}
    write_text(path, json.dumps(made, indent=1) + "\n")
    return made


@lru_cache(maxsize=1)
def _base(folder: Path, cache: Path, ask: Ask) -> tuple[Model, Any, Unedited, Any, list[Read]]:
    """The model before any edit, its tokenizer and answers, neutral text in blocks, and what the model says along it.

    Loaded once in each process: every run leaves the model as it was.
    """
    model, tokenizer = load_plain(folder)
    blocks_BT = neutral_blocks(tokenizer, cache, base_chats(folder, cache, Amount()), ask.neutral)
    return model, tokenizer, Unedited(model, tokenizer), blocks_BT, read_blocks(model, blocks_BT)


def _run(key: Key, file: Path, folder: Path, cache: Path, ask: Ask) -> dict[str, Any]:
    """Edits the model, measures it, and takes the edits back."""
    _, way, num, seed = key
    model, tokenizer, unedited, blocks_BT, reads = _base(folder, cache, ask)
    cases = in_order(read_cases(file), seed, num)
    for num_tokens, prompts in asked_before(cases, ask.questions, tokenizer).items():
        unedited.ask(prompts, num_tokens)
    started = time.process_time()
    edited = WAYS[way](model, tokenizer, [case.fact for case in cases], seed)
    seconds = time.process_time() - started
    scores = measure_edits(model, tokenizer, edited, cases, unedited, ask.questions)
    scores |= changed(model, tokenizer, edited, blocks_BT, reads, 3 * ask.neutral)
    started = time.process_time()
    edited.undo()
    undone = time.process_time() - started
    as_before = read_block(model, blocks_BT[0]).sums == reads[0].sums
    if not as_before:  # the next run needs the model as it was
        _base.cache_clear()
    rounded = {name: float(f"{value:.6g}") for name, value in scores.items()}
    sizes = {"bytes": edited.num_bytes, "seconds": round(seconds, 2), "undo seconds": round(undone, 2)}
    return {**rounded, **sizes, "refused": len(edited.refused), "undone to the bit": as_before}
