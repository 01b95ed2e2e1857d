"""lm-evaluation-harness tasks, and question files of our own, on any transformers causal LM (`engrammar eval`).

lm-eval (0.4) asks a model for log likelihoods and continuations. Its wrapper of transformers models pads on the right
without a mask for the former, and on the left with a mask for the latter; padding changes no answer of our models.
"""

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from engrammar.cells import Column, as_text, cells, titles
from engrammar.config import check_choice, check_setting
from engrammar.edit import apply_patch, kept_files
from engrammar.off import adding_modules, memory_off
from engrammar.train.attached import load_base
from engrammar.train.recipe import BaseRecipe
from engrammar.train.sample import load, load_with_adapter
from engrammar_lab.machine import accelerator
from engrammar_lab.question_sets import SETS, questions
from engrammar_lab.tasks.questions import Question, read_questions

Where = Literal["weights", "ram", "disk", "off"]
PREFIX = "local/"  # begins the names of tasks that are our own question sets
NUM_ANSWER_TOKENS = 32
SCORES = (Column("score", "value", ".3f"), Column("stderr", "stderr", ".3f"), Column("chance", "chance", ".3f"))


def evaluate(
    folder: Path,
    tasks: Sequence[str],
    *,
    memory: Where = "weights",
    tables: Path | None = None,
    adapter: Path | None = None,
    cache: Path = Path("data/pocket"),
    **how: Any,
) -> dict[str, Any]:
    """Scores the model in a folder, and records the versions used.

    Args:
        tasks: names of lm-eval's tasks, groups or tags; local/NAME, a question set; or a JSONL file of questions.
        memory: where the tables are, or "off" for the model without what its memory adds.
        tables: for a released Qwen4-Exp model, the folder that `engrammar table import` made of its tables.
        adapter: the folder of a memory that was attached to the model, which may then be a name on the Hub.
        cache: folder of fetched question sets.
        how: limit (the most questions of a task, None for all), batch_size, num_fewshot (None: as each task says).

    Returns:
        versions, model, memory, the adapter if one was given, the settings, and `tasks`. Per task: num_questions,
        num_fewshot, num_cut (questions too long for the model, which lost their beginning), chance (None if unknown),
        and scores: per metric its value and stderr (None if lm-eval gives none).

    Raises:
        ValueError: as `load_model`; or lm-eval is not installed, a task is unknown, or a setting is not allowed.
    """
    specs, chances = _find_tasks(tasks, cache)  # before the model is read: a wrong name costs no time
    model, tokenizer = load_model(folder, memory, tables, adapter)
    with memory_off(model) if memory == "off" else nullcontext():
        scored = _score(model, tokenizer, specs, chances, **how)
    return {
        "versions": {name: version(name) for name in ("engrammar", "lm_eval", "datasets")},
        "model": str(folder),
        "memory": memory,
        **({} if adapter is None else {"adapter": str(adapter)}),
        **how,
        "tasks": scored,
    }


def load_model(
    folder: Path, memory: Where = "weights", tables: Path | None = None, adapter: Path | None = None
) -> tuple[Any, Any]:
    """The model in a folder, on the accelerator if there is one, and its tokenizer; settings are those of `evaluate`.

    Raises:
        ValueError: the folder holds no model, its tokenizer or the adapter belongs to another model, or `memory` does
            not fit it.
    """
    check_choice("memory", memory, Where)
    if adapter is not None:
        if tables is not None:
            raise ValueError("--tables and --adapter do not go together: an adapter has its own tables.")
        # What is off is not loaded.
        where: dict[str, Any] = {} if memory == "weights" else {"memory": "disk" if memory == "off" else memory}
        model, tokenizer = load_with_adapter(str(folder), adapter, **where)
    else:
        model, tokenizer = _load_alone(folder, memory, tables)
    num_ids = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_ids:
        raise ValueError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens and the model {num_ids}: it is of another model."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer in {folder} has no end-of-text token, which lm-eval needs: set eos_token.")
    for patch in kept_files(folder):
        apply_patch(model, patch, tokenizer)
    return model.to(accelerator()), tokenizer


def _load_alone(folder: Path, memory: Where, tables: Path | None) -> tuple[Any, Any]:
    """A model of ours, or any other without an adapter."""
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} has no config.json that names a model: give a folder that training or save_pretrained wrote."
        ) from error
    if tables is not None:
        if memory == "weights":
            raise ValueError("--tables is for a model whose tables are not loaded: add --memory ram, disk or off.")
        model, tokenizer = load(folder, tables=tables, memory="disk" if memory == "off" else memory)
    elif kind == "engrammar":
        where: dict[str, Any] = {"memory": memory} if memory in ("ram", "disk") else {}
        model, tokenizer = load(folder, **where)
    elif memory in ("ram", "disk"):
        raise ValueError(
            f"--memory is {memory}, but the model in {folder} is none of ours: give --tables, the folder that "
            "`engrammar table import` made, if it is a Qwen4-Exp model, or --adapter, the folder of an attached memory."
        )
    else:
        model, tokenizer = load_base(BaseRecipe(model=str(folder)))
        model.eval()
    if memory != "weights" and not adding_modules(model):
        raise ValueError(f"--memory is {memory}, but the model in {folder} has no memory; allowed: weights.")
    return model, tokenizer


def _find_tasks(tasks: Sequence[str], cache: Path) -> tuple[list[Any], dict[str, float]]:
    """What lm-eval takes for each task, and the score of chance for tasks where it is known."""
    if find_spec("lm_eval") is None:
        raise ValueError("engrammar eval needs lm-eval: pip install 'engrammar[eval]'.")
    if not tasks:
        raise ValueError("--tasks is empty: name one task or more, local/NAME or one of lm-eval's.")
    specs: list[Any] = []
    chances = {}
    for name in dict.fromkeys(tasks):
        if name.startswith(PREFIX) or name.endswith(".jsonl"):
            asked, measure = _read(name, cache)
            specs.append(_task(name, asked, measure))
            if measure == "choice":
                chances[name] = fmean(1 / len(question.choices) for question in asked)
        else:
            specs.append(name)
    _check_names([spec for spec in specs if isinstance(spec, str)])
    return specs, chances


def _read(name: str, cache: Path) -> tuple[list[Question], Literal["choice", "answer"]]:
    short = name.removeprefix(PREFIX)
    if name.startswith(PREFIX):
        if short not in SETS:
            raise ValueError(f"There is no task {name!r}; allowed: {', '.join(PREFIX + known for known in SETS)}.")
        return questions(short, cache=cache), SETS[short].measure
    asked = read_questions(Path(name))
    written = [len(question.choices) == 1 for question in asked]
    if any(written) and not all(written):
        raise ValueError(f"{name} mixes questions of one choice, to be written, with more: make two files of it.")
    return asked, "answer" if written[0] else "choice"


def _check_names(names: Sequence[str]) -> None:
    if not names:
        return
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*manager.all_tasks, *(PREFIX + known for known in SETS)])
            raise ValueError(f"lm-eval has no task {name!r}{': near it are ' * bool(near)}{', '.join(near)}.")


def _task(name: str, asked: Sequence[Question], measure: Literal["choice", "answer"]) -> dict[str, Any]:
    """The settings of a question file as an lm-eval task.

    acc takes the choice of the highest log likelihood, acc_norm the highest per character of the choice. exact_match is
    that of lm-eval's own nq_open: the first line up to a stop, without case, punctuation and articles.
    """
    settings = {
        "task": name,
        "custom_dataset": partial(_dataset, [_document(question, measure) for question in asked]),
        "test_split": "test",
        "doc_to_text": "context",
    }
    if measure == "choice":
        metrics = [{"metric": kind, "aggregation": "mean", "higher_is_better": True} for kind in ("acc", "acc_norm")]
        choosing = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        return {**settings, **choosing, "target_delimiter": "", "metric_list": metrics}
    match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    match |= {"ignore_case": True, "ignore_punctuation": True, "regexes_to_ignore": [r"\b(?:[Tt]he |[Aa]n? )"]}
    stop = {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": NUM_ANSWER_TOKENS}
    stripped = [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]
    writing = {"output_type": "generate_until", "doc_to_target": "answers", "generation_kwargs": stop}
    return {**settings, **writing, "filter_list": stripped, "metric_list": [match]}


def _document(question: Question, measure: Literal["choice", "answer"]) -> dict[str, Any]:
    if measure == "choice":
        return {"context": question.context, "choices": list(question.choices), "answer": question.answer}
    return {"context": question.context, "answers": [choice.strip() for choice in question.choices]}


def _dataset(documents: list[dict[str, Any]], **metadata: Any) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict(test=Dataset.from_list(documents))


def _score(
    model: Any,
    tokenizer: Any,
    specs: Sequence[Any],
    chances: dict[str, float],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, Any]]:
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        check_setting(name, value, value is None or value >= least, f"{least} or more")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
        try:
            found = simple_evaluate(
                wrapped,
                tasks=list(specs),
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                task_manager=manager,
            )
        except AssertionError as error:
            if "maximum sequence length" not in str(error):
                raise
            raise ValueError(f"A task writes longer answers than the model takes: {error}") from error
    assert found is not None  # None only on ranks other than 0
    return {
        name: {
            "num_questions": found["n-samples"][name]["effective"] if name in found["n-samples"] else None,
            "num_fewshot": found["n-shot"].get(name),
            "num_cut": sum(_is_cut(wrapped, sample) for sample in found["samples"].get(name, ())),
            "chance": chances.get(name),
            "scores": _scores(metrics),
        }
        for name, metrics in found["results"].items()
    }


def _scores(metrics: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Turns lm-eval's "acc,none": 0.5 and "acc_stderr,none": 0.1 into {"acc": {"value": 0.5, "stderr": 0.1}}."""
    scores = {}
    for key, value in metrics.items():
        metric, comma, pipeline = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = metrics.get(f"{metric}_stderr,{pipeline}")
            name = metric if pipeline in ("none", "stripped") else f"{metric} ({pipeline})"
            scores[name] = {"value": float(value), "stderr": stderr if isinstance(stderr, float) else None}
    return scores


def _is_cut(wrapped: Any, sample: dict[str, Any]) -> bool:
    """Whether a request of this question was too long for the model, so that its beginning was left out."""
    for context, *rest in sample["arguments"]:
        if not rest:
            continue  # a text whose every token is scored, in windows
        if isinstance(rest[0], dict):
            given, room = context, wrapped.max_length - rest[0].get("max_gen_toks", wrapped.max_gen_toks)
        else:
            given, room = context + rest[0], wrapped.max_length + 1  # the last token is scored, not read
        if len(wrapped.tok_encode(given)) > room:
            return True
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval, which warns of what is intended here: a model, and documents, that exist already."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def show(result: dict[str, Any]) -> None:
    """Prints the scores of `evaluate`."""
    lines = []
    for name, task in result["tasks"].items():
        about = [name, "" if task["num_questions"] is None else f"{task['num_questions']:,}", f"{task['num_cut']:,}"]
        for metric, score in task["scores"].items():
            lines.append([*about, metric, *cells(SCORES, score | {"chance": task["chance"]})])
            about = [""] * len(about)
    header = ["task", "asked", "cut", "measure", *titles(SCORES)]
    scored = f"{result['model']} with {result['adapter']}" if "adapter" in result else result["model"]
    print(f"{scored}, memory: {result['memory']}", as_text(header, lines), sep="\n\n")
