"""All tasks over the pocket corpora, for one tokenizer and one split into seen and unseen; scores of a model."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from engrammar.train import corpora
from engrammar_lab.tasks.code import code_questions
from engrammar_lab.tasks.context import context_questions
from engrammar_lab.tasks.facts import PATTERNS, fact_questions
from engrammar_lab.tasks.needle import Haystack, needle_questions, tracking_questions
from engrammar_lab.tasks.questions import Document, Question, SplitOf, count_tokens, exact
from engrammar_lab.tasks.scoring import Continuation, score_continuations, score_questions
from engrammar_lab.tasks.yarn import stretched

Suite = dict[str, list[Question]]
STRETCH = 4  # the paper's long-context tasks also exceed the trained length


def read_corpus(name: str, split_of: SplitOf, *, cache: Path) -> list[Document]:
    """The entries of a pocket corpus for which `split_of` returns a split."""
    texts = (entry.text for entry in corpora.entries(name, cache=cache))
    sides = ((text, split_of(text)) for text in texts if not text.isspace())
    return [Document(corpus=name, text=text, split=split) for text, split in sides if split is not None]


def build_suite(
    tokenizer: PreTrainedTokenizerBase,
    split_of: SplitOf,
    *,
    cache: Path,
    length: int,
    trained_on: Sequence[str] = ("wiki", "wordnet", "gcide"),
    per_task: int = 200,
    seed: int = 0,
) -> Suite:
    """The questions of every task; a task without questions is left out. Equal arguments give equal questions.

    Args:
        split_of: whether the model was trained on a document of the corpora in `trained_on`; it saw no others.
        length: the trained length in tokens, which no question exceeds, except needles and tracking at 4 times it.
    """
    if length < 2 or per_task < 1:
        raise ValueError(f"length is {length} and per_task {per_task}; allowed: 2 or more, 1 or more.")

    def read(name: str) -> list[Document]:
        return read_corpus(name, split_of if name in trained_on else lambda _: "unseen", cache=cache)

    how = {"length": length, "num": per_task, "seed": seed}
    wiki = read("wiki")
    known = [name for name in PATTERNS if name in trained_on] or list(PATTERNS)
    entries = [document for name in known for document in (wiki if name == "wiki" else read(name))]
    suite = fact_questions(entries, tokenizer, **how) | context_questions(wiki, tokenizer, **how)
    haystack = Haystack.of([document.text for document in wiki if document.split == "unseen"], tokenizer)
    for group, ask in (("needle", needle_questions), ("tracking", tracking_questions)):
        for size in (length, STRETCH * length):
            asked = ask(haystack, tokenizer, length=size, num=per_task, seed=seed)
            suite[f"{group}/choice/{size}"] = asked
            suite[f"{group}/exact/{size}"] = [exact(question, f"{group}/exact/{size}") for question in asked]
    suite |= code_questions(read("stdlib"), tokenizer, **how)
    return {task: questions for task, questions in suite.items() if questions}


def score_suite(
    model: Any, tokenizer: PreTrainedTokenizerBase, suite: Mapping[str, Sequence[Question]], *, length: int
) -> dict[str, dict[str, Any]]:
    """Scores each task; questions longer than the trained `length` are read with YaRN, at the next whole multiple.

    Returns:
        per task: `measure` ("choice", or "recall" for questions of one choice), `chance`, `questions` (their number),
        `score` (the share that is right), `right` (0 or 1 for each) and `bits_per_byte` of the right answers (mean over
        questions). The model's choice is the one whose log likelihood the context raises most over that at the start of
        a text, so a choice that is likely anywhere has no advantage.

    Raises:
        ValueError: a task is empty or mixes questions of one choice with others, or the model cannot be stretched.
    """
    for task, questions in suite.items():
        if len({len(question.choices) == 1 for question in questions}) != 1:
            raise ValueError(
                f"{task} mixes clozes (one choice) with choices, or is empty; allowed: one kind in a task."
            )
    longest = {task: _longest(tokenizer, questions) for task, questions in suite.items()}
    factors = {task: max(1, math.ceil(num / length)) for task, num in longest.items()}
    found: dict[str, dict[str, Any]] = {}
    for factor in sorted(set(factors.values())):
        tasks = [task for task in suite if factors[task] == factor]
        asked = [question for task in tasks for question in suite[task]]
        choices = sorted({choice for question in asked if len(question.choices) > 1 for choice in question.choices})
        with stretched(model, factor=factor, length=length) if factor > 1 else nullcontext():
            scores = iter(score_questions(model, tokenizer, asked))
            scored = score_continuations(model, tokenizer, [("", choice) for choice in choices])
        alone = {choice: continuation.log_likelihood for choice, continuation in zip(choices, scored)}
        for task in tasks:
            found[task] = _summary(suite[task], [next(scores) for _ in suite[task]], alone)
    return {task: found[task] for task in suite}


def _longest(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> int:
    contexts = count_tokens(tokenizer, [question.context for question in questions])
    choices = [max(count_tokens(tokenizer, question.choices)) for question in questions]
    return 1 + max(context + choice for context, choice in zip(contexts, choices))


def _summary(
    questions: Sequence[Question], scores: Sequence[Sequence[Continuation]], alone: Mapping[str, float]
) -> dict[str, Any]:
    pairs = list(zip(questions, scores))
    bits = [-choices[question.answer].per_byte / math.log(2) for question, choices in pairs]
    summary: dict[str, Any] = {"questions": len(questions), "bits_per_byte": sum(bits) / len(bits)}
    if len(questions[0].choices) == 1:
        right = [int(choices[0].greedy) for choices in scores]
        return {"measure": "recall", "chance": 0.0, "score": sum(right) / len(right), "right": right, **summary}
    right = []
    for question, choices in pairs:
        gains = [each.log_likelihood - alone[choice] for choice, each in zip(question.choices, choices)]
        right.append(int(gains.index(max(gains)) == question.answer))
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    return {"measure": "choice", "chance": chance, "score": sum(right) / len(right), "right": right, **summary}
