"""What is lost when a text is learned equally well: a memory with few rows trained, with all, LoRA, full tuning.

Letters: B blocks, T tokens.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from engrammar.attach.attaching import require_attachment
from engrammar.attach.blocks import evaluating
from engrammar.tables.sealed import write_text
from engrammar.train.sparse import SparseRows, share_changed
from engrammar_lab.adapters.lessons import Lesson
from engrammar_lab.adapters.measures import measure, nats_per_token
from engrammar_lab.adapters.variants import How, Model, Teach, teach_full, teach_lora, teach_memory

SPARSE = "memory, sparse rows"
WAYS: Mapping[str, Teach] = {
    SPARSE: teach_memory,
    "memory": teach_memory,
    "LoRA": teach_lora,
    "full tuning": teach_full,
}


@dataclass(frozen=True, kw_only=True)
class Equal:
    """How equally well is reached."""

    nats: float = 2.0  # per token of the text that is taught, at which training stops
    epochs: int = 12  # passes over the text at most; whoever has not learned it by then is marked
    rows: int = 2000  # that a step of the sparse memory trains in each layer


def teach_equally(
    way: str, model: Model, tokenizer: Any, lesson: Lesson, seed: int, *, how: How, equal: Equal, background: Tensor
) -> dict[str, float]:
    """Teaches a text until it is known as well as `equal` says.

    Args:
        background: blocks [B, T] of prose that is neither taught nor measured.

    Returns:
        steps, CPU seconds, whether it was `reached`, and of the sparse memory the share of background reads `changed`.
    """
    started, found = time.process_time(), {"steps": 0.0, "reached": 0.0}
    per_epoch = math.ceil(len(lesson.taught) / how.batch)

    def ends(step: int, _: float) -> bool:
        """Asks after each half of a pass whether the text is known."""
        found["steps"] = float(step)
        if step % max(1, per_epoch // 2):
            return False
        with evaluating(model):
            found["reached"] = float(nats_per_token(model, lesson.taught) <= equal.nats)
        return bool(found["reached"]) or step >= equal.epochs * per_epoch

    teach = WAYS[way]
    if way == SPARSE:
        teach = partial(teach_memory, sparse=lambda own, *_: SparseRows(own, [background], equal.rows))
    teach(model, tokenizer, lesson, seed, how, ends)
    found["seconds"] = time.process_time() - started
    if way.startswith("memory"):
        memory = require_attachment(model, None).memories()["default"].memory
        found["background_reads_changed"] = share_changed(memory, [background])
    return found


def compare_forgetting(
    load: Callable[[], tuple[Model, Any]],
    lesson: Lesson,
    background: Tensor,
    path: Path,
    *,
    ways: Sequence[str] = tuple(WAYS),
    seed: int = 0,
    how: How,
    equal: Equal = Equal(),
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Teaches one lesson in each way to a fresh model, measures, and writes `path` after each.

    Args:
        load: gives a fresh model and its tokenizer.
        asked: `chats` and `fixed`, as `measure` takes them.
    """
    made: dict[str, Any] = {"how": asdict(how), "equal": asdict(equal), "seed": seed, "runs": {}}
    model, tokenizer = load()
    made["runs"]["as it was"] = measure(model, tokenizer, lesson, asked["chats"], asked["fixed"])
    for way in ways:
        model, tokenizer = load()
        taught = teach_equally(way, model, tokenizer, lesson, seed, how=how, equal=equal, background=background)
        made["runs"][way] = {**measure(model, tokenizer, lesson, asked["chats"], asked["fixed"]), **taught}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(made, indent=1) + "\n")
    return made
