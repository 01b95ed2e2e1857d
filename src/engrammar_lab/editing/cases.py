"""Facts of CounterFact and zsRE to edit, and what is asked about each of them."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engrammar.edit import Fact
from engrammar.edit.forms import in_chat, is_question
from engrammar_lab.editing.relations import QUESTIONS, asked_otherwise, relation_of

FIRST, LAST = 30, 60  # of CounterFact's rows: methods were developed on them, so no test asks them
BESIDE = ("Apart from {}, {}", "Unlike {}, {}", "{} is not meant here. {}", "Near {}? {}")  # the subject, then another


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fact to edit."""

    fact: Fact  # without paraphrases, which are for testing
    true: str  # what the object was
    rephrased: str  # another prompt
    is_direct: bool  # whether that prompt asks the fact itself, not something that only follows from it
    neighbor: str  # a prompt about another subject (CounterFact: of the same relation), whose answer is to stay
    is_test: bool  # whether no method was developed on it


class Question(NamedTuple):
    """What is asked of an edited model: `about` the case of that number."""

    about: int
    prompt: str


def read_cases(path: Path) -> list[Case]:
    """The cases of a file in EasyEdit's form.

    A paraphrase counts as direct if it ends like the prompt of another fact of the same relation: those ask the fact
    itself. zsRE's are all rewordings. Rows without an object (zsRE has one) are left out.

    Raises:
        ValueError: the file cannot be read, or is of another form.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        rows = [row for row in rows if row["target_new"]]
        facts = [Fact(subject=row["subject"], prompt=row["prompt"], object=row["target_new"]) for row in rows]
        questions = all(fact.prompt.endswith("?") for fact in facts)
        relations = {fact.template: relation_of(fact.template) for fact in facts}
        return [
            Case(
                fact=fact,
                true=row["ground_truth"],
                rephrased=row["rephrase_prompt"],
                is_direct=questions or asks_the_same(fact, row["rephrase_prompt"], relations),
                neighbor=row["locality_prompt"],
                is_test=questions or FIRST <= number < len(rows) - LAST,
            )
            for number, (fact, row) in enumerate(zip(facts, rows))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read cases from {path} ({error!r}): give JSON lines in EasyEdit's form.") from error


def asks_the_same(fact: Fact, prompt: str, relations: Mapping[str, str | None]) -> bool:
    """Whether a prompt ends like one of the templates whose relation, which is known, is that of the fact."""
    own, asked = relations[fact.template], prompt.replace(fact.subject, "{}")
    longest = max((template for template in relations if asked.endswith(template)), key=len, default=None)
    return own is not None and longest is not None and relations[longest] == own


def in_order(cases: Sequence[Case], seed: int, num: int) -> list[Case]:
    """The first `num` cases in the order of a seed: those for testing, then, if they are not enough, the others.

    Raises:
        ValueError: there are not so many.
    """
    if num > len(cases):
        raise ValueError(f"{num} edits were asked for; the file has {len(cases)}.")
    shuffled = random.Random(seed).sample(list(cases), len(cases))
    return sorted(shuffled, key=lambda case: not case.is_test)[:num]


def questions(edited: Sequence[Case], most: int, tokenizer: Any = None) -> dict[str, list[Question]]:
    """What is asked after the edits, by kind: at most `most` questions of a kind, and none that a method saw.

    Args:
        tokenizer: the model's; if it has a template for chats, questions are asked in a chat, too.
    """
    numbers = [number for number, case in enumerate(edited) if case.is_test]
    direct = [number for number in numbers if edited[number].is_direct]
    follows = [number for number in numbers if not edited[number].is_direct]
    edited_subjects = {case.fact.subject for case in edited}
    # What names an edited subject is allowed to change.
    others = [n for n in numbers if not any(subject in edited[n].neighbor for subject in edited_subjects)]
    relations = {n: asked_otherwise(edited[n].fact.template) for n in numbers}
    others_of = {n: one[n % len(one)] for n, one in relations.items() if one}
    asked = {
        "prompt": [Question(n, edited[n].fact.prompt) for n in numbers[:most]],
        "direct": [Question(n, edited[n].rephrased) for n in direct[:most]],
        "follows": [Question(n, edited[n].rephrased) for n in follows[:most]],
        "neighbor": [Question(n, edited[n].neighbor) for n in others[:most]],
        "beside": [Question(n, beside(n, edited[n])) for n in others[:most]],
        "subject": [Question(n, asks.format(edited[n].fact.subject)) for n, asks in list(others_of.items())[:most]],
        "reverse": [Question(n, reverse(edited[n].fact)) for n in numbers[:most]],
    }
    own = {n: relation_of(edited[n].fact.template) for n in others_of}
    for kind, asks_of in (("question", own), ("other question", others_of)):
        chosen = list(asks_of.items())[:most]
        asked[kind] = [Question(n, QUESTIONS[asks or ""].format(edited[n].fact.subject)) for n, asks in chosen]
    if tokenizer is not None and tokenizer.chat_template:
        own_words = [one for one in asked["direct"] if is_question(one.prompt)]
        for kind, plain in (("chat", asked["question"] + own_words), ("other chat", asked["other question"])):
            asked[kind] = [one._replace(prompt=in_chat(tokenizer, one.prompt)) for one in plain[:most]]
    return asked


def beside(number: int, case: Case) -> str:
    """The neighbor's prompt after words that name the edited subject."""
    return BESIDE[number % len(BESIDE)].format(case.fact.subject, case.neighbor)


def reverse(fact: Fact) -> str:
    """Asks for the subject: what it is that has the object."""
    left_out = fact.prompt.replace(fact.subject, "____")
    return f"Fill in the name. {left_out} {fact.object}. The name left out is"
