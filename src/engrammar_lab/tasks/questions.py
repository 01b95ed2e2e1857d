"""Questions with a known answer, in memory and as JSONL; every task is made of them."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from engrammar.config import check_choice, check_setting

Split = Literal["seen", "unseen"]
SPLITS: tuple[Split, ...] = ("seen", "unseen")
SplitOf = Callable[[str], Split | None]  # from a document's text; None leaves the document out


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text of a corpus, and whether the model was trained on it."""

    corpus: str
    text: str
    split: Split


@dataclass(frozen=True, kw_only=True)
class Question:
    """A context and its possible continuations. With a single choice it is a cloze: the model has to produce it."""

    context: str
    choices: tuple[str, ...]  # continuations from exactly where `context` ends; each begins with its own space
    answer: int  # index of the right choice
    task: str  # the task that the question belongs to; the part before the first "/" is its group
    split: Split = "unseen"

    def __post_init__(self) -> None:
        num, choices, answer = len(self.choices), self.choices, self.answer
        texts = num > 0 and all(isinstance(choice, str) and choice for choice in choices)
        check_setting("choices", choices, texts, "one text or more, none of them empty")
        check_setting("choices", choices, len(set(choices)) == num, "texts that differ")
        is_index = type(answer) is int and 0 <= answer < num
        check_setting("answer", answer, is_index, f"0 to {num - 1}, an index of choices")
        check_choice("split", self.split, Split)
        for name in ("context", "task"):
            check_setting(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")

    @property
    def right(self) -> str:
        return self.choices[self.answer]


def pose(rng: random.Random, *, context: str, right: str, wrong: Iterable[str], task: str, split: Split) -> Question:
    """A question with its choices in random order."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Question(context=context, choices=tuple(choices), answer=choices.index(right), task=task, split=split)


def exact(question: Question, task: str) -> Question:
    """The same question with the right choice alone: the model has to produce it."""
    return replace(question, choices=(question.right,), answer=0, task=task)


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids before a text: the beginning-of-text id, else the end-of-text id, else none."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if start is None else [start]


def fits(tokenizer: PreTrainedTokenizerBase, question: Question, length: int) -> bool:
    """Whether the context with its longest choice, and the token before them, take at most `length` tokens."""
    context, *choices = count_tokens(tokenizer, (question.context, *question.choices))
    return 1 + context + max(choices) <= length


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """One question a line, as JSON."""
    path.write_text("".join(json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in questions), encoding="utf-8")


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file: lines of `context`, `choices`, `answer` and perhaps `task` (else the file's name).

    Raises:
        ValueError: the file cannot be read, holds no question, or has a line that is not one; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the questions in {path} ({error}): name a JSONL file of questions.") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_read_question(json.loads(line), path.stem))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not a question: {error}") from error
    if not questions:
        raise ValueError(f"{path} holds no question: give one line or more with context, choices and answer.")
    return questions


def _read_question(given: object, task: str) -> Question:
    known = {field.name for field in fields(Question)}
    if not isinstance(given, dict) or not {"context", "choices", "answer"} <= set(given) <= known:
        raise ValueError(f"it is {given!r:.80}; needed: context, choices, answer; allowed too: task, split.")
    if not isinstance(given["choices"], list):
        raise ValueError(f"choices is {given['choices']!r:.80}; allowed: a list of texts.")
    settings: dict[str, Any] = {"task": task} | given | {"choices": tuple(given["choices"])}
    return Question(**settings)
