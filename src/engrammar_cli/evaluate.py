"""`engrammar eval`: lm-evaluation-harness tasks on any model. Imports are inside the function, as in `main.py`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from engrammar_cli.extras import require


def evaluate(
    model: Positional[Path | None] = None,
    /,
    tasks: str = "",
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    memory: Literal["weights", "ram", "disk", "off"] = "weights",
    tables: Path | None = None,
    adapter: Path | None = None,
    out: Path | None = None,
    cache: Path = Path("data/pocket"),
    list_sets: Annotated[bool, arg(name="list")] = False,
) -> None:
    """Score a model on tasks of lm-evaluation-harness, on question sets, or on your own questions.

    Args:
        model: The folder of an engrammar model or of any transformers causal LM; with --adapter, a folder or name on
            the Hub.
        tasks: Names separated by commas: tasks of lm-eval, local/NAME (see --list), or a JSONL file with context,
            choices and answer in each line.
        limit: The most questions of a task.
        batch_size: Requests at a time.
        num_fewshot: Answered questions put before each question; by default as many as the task says.
        memory: Where the memory's tables are; off scores the model without what its memory adds.
        tables: For a released Qwen4-Exp model, the folder of its tables, which `engrammar table import` made.
        out: A JSON file for the scores.
        cache: Where fetched question sets are kept.
        list_sets: List the question sets and stop.
    """
    from engrammar_lab.question_sets import SETS

    if list_sets:
        for name, known in SETS.items():
            print(f"local/{name}: {known.summary} ({known.num_questions:,} questions; licence: {known.licence})")
        return
    if model is None:
        raise ValueError("engrammar eval needs the folder of a model; --list shows the question sets.")
    require("eval")
    from engrammar.tables.sealed import check_writable, write_text
    from engrammar_lab import harness
    from engrammar_lab.machine import describe_run

    if out is not None:
        check_writable(out.parent)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    how: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot}
    how |= {"tables": tables, "adapter": adapter, "cache": cache}
    result = harness.evaluate(model, names, memory=memory, **how)
    result = describe_run(" ".join(["engrammar", *sys.argv[1:]])) | result
    harness.show(result)
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
