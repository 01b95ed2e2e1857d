"""What is lost when a text is learned equally well: a memory with few rows trained, with all, LoRA, full tuning.

The text is a thousand glosses of WordNet. Letters: B blocks, T tokens.
"""

import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engrammar.attach.attaching import require_attachment
from engrammar.attach.blocks import evaluating
from engrammar.tables.sealed import write_text
from engrammar.train.sparse import SparseRows, share_changed
from engrammar_lab.adapters.lessons import Amount, Lesson, fixed_questions, make_lesson
from engrammar_lab.adapters.measures import measure, nats_per_token
from engrammar_lab.adapters.smollm import base_chats, fetch_smollm, load_plain
from engrammar_lab.adapters.study import done_runs
from engrammar_lab.adapters.variants import HOW, How, Model, Teach, rare_rows, teach_full, teach_lora, teach_memory
from engrammar_lab.machine import describe_run
from engrammar_lab.studies import RESULTS, command_line

NAME, KEY = "forgetting", ("way", "seed")
BASE, SPARSE = "as it was", "memory, sparse rows"
WAYS: Mapping[str, Teach | None] = {
    BASE: None,
    SPARSE: teach_memory,
    "memory, rare rows": partial(teach_memory, sparse=rare_rows),
    "memory": teach_memory,
    "LoRA": teach_lora,
    "full tuning": teach_full,
}
FACTS = Amount(num_taught=1000, num_held=200, entry_tokens=(8, 40), background="gcide")


@dataclass(frozen=True, kw_only=True)
class Equal:
    """How equally well is reached."""

    nats: float = 1.0  # per token of some of the text that is taught, at which training stops
    blocks: int = 32  # of that text, which are asked after each half of a pass
    epochs: int = 12  # passes over the text at most; who has not learned it by then is marked
    rows: int = 2000  # that a step of the sparse memory trains in each layer


def run_forgetting(
    *,
    seeds: int = 3,
    jobs: int = 2,
    results: Path = RESULTS,
    cache: Path = Path("data/pocket"),
    base: Path | None = None,
    amount: Amount = FACTS,
    how: How = HOW,
    equal: Equal = Equal(),
) -> dict[str, Any]:
    """Teaches glosses in every way until they are known equally well, and writes `results/forgetting.json` each time.

    Args:
        jobs: models at the same time, each in a process with one thread.
        base: the folder of the model; None fetches SmolLM2-135M-Instruct.
        amount, how, equal: other amounts than the study's; runs with others are not taken over.

    Returns:
        The study's `runs`: per way and seed what `measure` and `teach_equally` return.

    Raises:
        ValueError: seeds or jobs is below 1, or something cannot be fetched.
    """
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds is {seeds} and jobs {jobs}; allowed: 1 or more.")
    folder, path = base or fetch_smollm(cache), results / f"{NAME}.json"
    chosen = {"base": folder.name, "amount": asdict(amount), "how": asdict(how), "equal": asdict(equal)}
    settings = json.loads(json.dumps(chosen))
    found = done_runs(path, settings, KEY)
    base_chats(folder, cache, amount)
    results.mkdir(parents=True, exist_ok=True)

    def keep() -> dict[str, Any]:
        order = [(way, seed) for seed in range(seeds) for way in WAYS]
        runs = [dict(zip(KEY, key)) | found[key] for key in order if key in found]
        made = {**describe_run(command_line(NAME, "lab", seeds, ())), **settings, "runs": runs}
        write_text(path, json.dumps(made, indent=1) + "\n")
        return made

    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        left = [(way, seed) for seed in range(seeds) for way in WAYS if (way, seed) not in found]
        tasks = {pool.submit(_teach, *key, folder, cache, amount, how, equal): key for key in left}
        for done in as_completed(tasks):
            found[tasks[done]] = done.result()
            keep()
            print(f"{len(found)} of {seeds * len(WAYS)}: {', '.join(map(str, tasks[done]))}", flush=True)
    return keep()


def _teach(
    way: str, seed: int, folder: Path, cache: Path, amount: Amount, how: How, equal: Equal
) -> dict[str, float | str]:
    """Teaches one model on one thread and measures it."""
    model, tokenizer = load_plain(folder)
    lesson = make_lesson("glosses", seed, tokenizer, cache, amount)
    found = teach_equally(way, model, tokenizer, lesson, seed, how=how, equal=equal)
    found |= measure(model, tokenizer, lesson, base_chats(folder, cache, amount), fixed_questions(cache, amount))
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def teach_equally(
    way: str, model: Model, tokenizer: Any, lesson: Lesson, seed: int, *, how: How, equal: Equal
) -> dict[str, float]:
    """Teaches a text until it is known as well as `equal` says. The model is changed.

    Returns:
        steps, CPU seconds, whether it was `reached`, and of a memory the share of background reads that was `changed`.
    """
    teach = WAYS[way]
    if teach is None:
        return {}
    started, found = time.process_time(), {"steps": 0.0, "reached": 0.0}
    per_epoch = math.ceil(len(lesson.taught) / how.batch)
    some_BT = lesson.taught[:: max(1, len(lesson.taught) // equal.blocks)]

    def ends(step: int, _: float) -> bool:
        """Asks after each half of a pass whether the text is known."""
        found["steps"] = float(step)
        if step % max(1, per_epoch // 2):
            return False
        with evaluating(model):
            found["reached"] = float(nats_per_token(model, some_BT) <= equal.nats)
        return bool(found["reached"]) or step >= equal.epochs * per_epoch

    if way == SPARSE:
        teach = partial(teach_memory, sparse=lambda own, *_: SparseRows(own, [lesson.background], equal.rows))
    teach(model, tokenizer, lesson, seed, how, ends)
    found["seconds"] = time.process_time() - started
    if way.startswith("memory"):
        memory = require_attachment(model, None).memories()["default"].memory
        found["background_reads_changed"] = share_changed(memory, [lesson.background])
    return found
