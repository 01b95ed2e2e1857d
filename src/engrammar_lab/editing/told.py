"""Facts in words: all of them before what is asked, or those that BM25 finds nearest to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engrammar.edit import Fact
from engrammar_lab.editing.edited import Edited, Model


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """All facts before what is asked."""

    budget: int = 1024  # tokens that the sentences may take; facts that come later are refused


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """The nearest facts before what is asked."""

    num_found: int = 1  # at most
    least: float = 0.0  # the share that a sentence's score must have of the score that the sentence has for itself


def sentence(fact: Fact) -> str:
    """A fact as a sentence: its prompt, its object and a full stop."""
    return f"{fact.prompt.rstrip()} {fact.object.strip()}."


def lines(sentences: Sequence[str]) -> str:
    """What stands before a question: a line for each sentence."""
    return "".join(f"{one}\n" for one in sentences)


def tell(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int, settings: PromptSettings) -> Edited:
    """All facts as sentences before what is asked, in their order, as far as they fit a budget. Nothing is changed."""
    told: list[str] = []
    for fact in facts:
        longer = [*told, sentence(fact)]
        if len(tokenizer(lines(longer), add_special_tokens=False).input_ids) > settings.budget:
            break
        told = longer
    return Edited(num_bytes=num_bytes(told), refused=facts[len(told) :], worded=lambda prompt: lines(told) + prompt)


def retrieve(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int, settings: RetrievalSettings) -> Edited:
    """The facts whose sentences are nearest to what is asked stand before it, the nearest one last."""
    told = [sentence(fact) for fact in facts]
    find = nearest_of(told, settings)
    return Edited(num_bytes=num_bytes(told), worded=lambda prompt: lines(find(prompt)[::-1]) + prompt)


def nearest_of(sentences: Sequence[str], settings: RetrievalSettings) -> Callable[[str], list[str]]:
    """Finds the sentences with the highest scores of BM25 (bm25s' default, English stop words left out) for a text.

    A sentence that shares no word with the text, or too little, is not found.
    """
    import bm25s

    def words(texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)

    split = words(sentences)
    if not any(split):  # nothing to look for
        return lambda text: []
    index = bm25s.BM25()
    index.index(split, show_progress=False)
    most = [float(index.get_scores(own)[number]) if own else 0.0 for number, own in enumerate(split)]

    def find(text: str) -> list[str]:
        (asked,) = words([text])
        known = [one for one in asked if one in index.vocab_dict]
        if not known:
            return []
        scores = index.get_scores(known).tolist()
        ranked = sorted(range(len(scores)), key=lambda number: (-scores[number], number))[: settings.num_found]
        return [sentences[number] for number in ranked if scores[number] > settings.least * most[number]]

    return find


def num_bytes(sentences: Sequence[str]) -> int:
    """Bytes of sentences in UTF-8."""
    return sum(len(one.encode()) for one in sentences)
