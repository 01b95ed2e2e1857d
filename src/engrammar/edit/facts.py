"""Facts to teach, and the files that they come in.

A fact is a subject, a prompt that ends where its object begins, and the object.
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")
NAMES = {"object": ("object", "target_new"), "paraphrases": ("paraphrases", "rephrase_prompt", "paraphrase_prompts")}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact.

    Attributes:
        subject: what it is about; the prompt contains it.
        prompt: a text that ends where the object begins.
        object: the words that are to follow.
        paraphrases: other prompts that ask for the object.
    """

    subject: str
    prompt: str
    object: str
    paraphrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "object"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"A fact's {name} is {value!r}; allowed: a text.")
        if self.subject not in self.prompt:
            raise ValueError(f"The prompt {self.prompt!r:.80} does not name its subject {self.subject!r}: word it so.")
        if not all(isinstance(one, str) and one.strip() for one in self.paraphrases):
            raise ValueError(f"paraphrases of {self.subject!r} are {self.paraphrases!r:.80}; allowed: texts.")

    @property
    def template(self) -> str:
        """The prompt with {} in the subject's place: what is asked of it."""
        return self.prompt.replace("{", "{{").replace("}", "}}").replace(self.subject, "{}", 1)


def told(facts: Sequence[Fact], method: str, settings: object) -> dict[str, Any]:
    """What a patch says of the facts that are in it, and of how they were learned: for `build_patch`."""
    described = [{"subject": fact.subject, "prompt": fact.prompt, "object": fact.object} for fact in facts]
    return {"facts": described, "provenance": {"method": method, "settings": repr(settings)}}


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A fact that was not written, and why."""

    fact: Fact
    reason: str


def read_facts(path: str | Path) -> list[Fact]:
    """Facts of a CSV file with a header, a JSON list or JSON lines.

    Columns are `subject`, `prompt`, `object` and, if there are any, `paraphrases` (in CSV separated by "|"); the names
    of CounterFact and zsRE in EasyEdit's form (`target_new`, `rephrase_prompt`) are known, and the nested form of
    CounterFact's authors (`requested_rewrite`, `paraphrase_prompts`).

    Raises:
        ValueError: the file cannot be read, or a line is no fact; the line is named.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        rows: Iterable[Mapping[str, Any]]
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read facts from {path} ({error}): give CSV, JSON or JSON lines.") from error
    facts = _each(rows, "fact", path, as_fact)
    if not facts:
        raise ValueError(f"{path} holds no fact: write one in a line, with subject, prompt and object.")
    return facts


def as_fact(row: Mapping[str, Any]) -> Fact:
    """The fact of a row with the names that `read_facts` knows.

    Raises:
        ValueError: it is no fact.
    """
    try:
        return _fact(row)
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{row!r:.80} is no fact: {error}") from error


def _fact(row: Mapping[str, Any]) -> Fact:
    nested = row.get("requested_rewrite")
    if isinstance(nested, list):
        raise ValueError("it is a question of several hops: read the file with read_multihop.")
    if nested is not None:  # CounterFact as its authors wrote it
        return _rewritten(nested, row.get("paraphrase_prompts", ()))
    found = {name: next((row[key] for key in keys if row.get(key)), None) for name, keys in NAMES.items()}
    others = found["paraphrases"] or ()
    if isinstance(others, str):
        others = tuple(part.strip() for part in others.split("|"))
    if found["object"] is None:
        raise KeyError("object")
    return Fact(subject=row["subject"], prompt=row["prompt"], object=found["object"], paraphrases=tuple(others))


def _rewritten(rewrite: Mapping[str, Any], paraphrases: Iterable[str]) -> Fact:
    """The fact of a `requested_rewrite`, in which {} stands for the subject."""
    subject = rewrite["subject"]
    prompt, words = rewrite["prompt"].replace("{}", subject), rewrite["target_new"]["str"]
    return Fact(subject=subject, prompt=prompt, object=words, paraphrases=tuple(paraphrases))


def _each(rows: Iterable[Any], what: str, path: str | Path, made: Callable[[Any], Made]) -> list[Made]:
    """What is made of each row of a file; raises a ValueError that names the first row of which it cannot be made."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(made(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{what} {number} of {path} cannot be used: {reason}") from error
    return found


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One fact on the way to an answer: the question, the prompt that ends where the answer begins, and its answers."""

    question: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MultiHop:
    """A case of MQuAKE.

    Attributes:
        facts: what is edited.
        questions: wordings of one question.
        answers, new_answers: its answer before and after the edits, each with its aliases.
        hops, new_hops: the facts that lead to the answer, before and after.
    """

    facts: tuple[Fact, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    new_answers: tuple[str, ...]
    hops: tuple[Hop, ...]
    new_hops: tuple[Hop, ...]


def read_multihop(path: str | Path) -> list[MultiHop]:
    """Reads MQuAKE (`MQuAKE-CF.json`, `MQuAKE-CF-3k.json`, `MQuAKE-T.json`) as its authors wrote it: a JSON list.

    The question of an edited fact is a paraphrase of its prompt if it names the subject, as paraphrases have to.

    Raises:
        ValueError: the file cannot be read, or a case lacks something; the case is named.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read cases from {path} ({error}): give the JSON file of MQuAKE.") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no list of cases: give the JSON file of MQuAKE.")
    return _each(rows, "case", path, _case)


def _case(row: Mapping[str, Any]) -> MultiHop:
    facts = tuple(_edited(one) for one in row["requested_rewrite"])
    if not facts or not row["questions"]:
        raise ValueError("it edits nothing, or asks nothing")
    return MultiHop(
        facts=facts,
        questions=tuple(row["questions"]),
        answers=(row["answer"], *row.get("answer_alias", ())),
        new_answers=(row["new_answer"], *row.get("new_answer_alias", ())),
        hops=tuple(map(_hop, row["single_hops"])),
        new_hops=tuple(map(_hop, row["new_single_hops"])),
    )


def _edited(rewrite: Mapping[str, Any]) -> Fact:
    question = rewrite.get("question")
    return _rewritten(rewrite, [question] if question and rewrite["subject"] in question else [])


def _hop(hop: Mapping[str, Any]) -> Hop:
    return Hop(question=hop["question"], prompt=hop["cloze"], answers=(hop["answer"], *hop.get("answer_alias", ())))
