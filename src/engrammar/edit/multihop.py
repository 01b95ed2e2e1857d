"""Questions whose answer follows from several facts, some of them edited: MQuAKE in its authors' form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engrammar.edit.facts import Fact


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
    cases = []
    for number, row in enumerate(rows, 1):
        try:
            cases.append(_case(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"case {number} of {path} cannot be used: {reason}") from error
    return cases


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
    subject, question = rewrite["subject"], rewrite.get("question")
    return Fact(
        subject=subject,
        prompt=rewrite["prompt"].replace("{}", subject),
        object=rewrite["target_new"]["str"],
        paraphrases=(question,) if question and subject in question else (),
    )


def _hop(hop: Mapping[str, Any]) -> Hop:
    return Hop(question=hop["question"], prompt=hop["cloze"], answers=(hop["answer"], *hop.get("answer_alias", ())))
