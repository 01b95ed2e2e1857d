"""Reading from context: a word that occurred over 20 words earlier, asked with and without that passage."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from engrammar_lab.tasks.questions import Document, Question, fits, pose

WORD = re.compile(r"\b[A-Za-z]{3,}\b")
SENTENCE = re.compile(r".+?(?:[.!?](?=\s|$)|$)\s*", re.DOTALL)
APART = 20  # words between the passage and the question
NUM_COMMON = 500  # the most frequent words are not asked for
SIMILAR = 1.25  # how far a wrong word's frequency may be from the right one's, either way


@dataclass(frozen=True)
class Frequencies:
    """How often each word occurs in a corpus, and the words of each frequency and capitalization."""

    counts: Counter[str]
    common: frozenset[str]
    words: dict[tuple[str, int], list[str]]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Frequencies":
        counts: Counter[str] = Counter()
        folded: Counter[str] = Counter()
        for document in documents:
            counts.update(WORD.findall(document.text))
        for word, count in counts.items():
            folded[word.lower()] += count
        words: dict[tuple[str, int], list[str]] = {}
        for word, count in sorted(counts.items()):
            words.setdefault((_capitals(word), count), []).append(word)
        return cls(counts, frozenset(word for word, _ in folded.most_common(NUM_COMMON)), words)

    def similar(self, word: str, count: int) -> list[str]:
        """Words that are capitalized alike and occur about `count` times."""
        near = range(-int(-count // SIMILAR), int(count * SIMILAR) + 1)
        return [other for c in near for other in self.words.get((_capitals(word), c), ()) if other != word]


def _capitals(word: str) -> str:
    return "all" if word.isupper() else "first" if word[0].isupper() else "none"


def context_questions(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, num: int, seed: int
) -> dict[str, list[Question]]:
    """Up to `num` questions for context/with, and the same ones for context/without: one per unseen document.

    Context: the text up to a word's second occurrence, within `length` tokens; context/without leaves out the sentence
    of the first. Choices: the word, and three that are about as frequent in other documents and not in the text.
    """
    rng = random.Random(f"context {seed}")
    frequencies = Frequencies.of(documents)
    unseen = [document for document in documents if document.split == "unseen"]
    rng.shuffle(unseen)
    found: list[tuple[Question, Question]] = []
    for document in unseen:
        pair = _pair(document.text, frequencies, tokenizer, length, rng)
        if pair is not None:
            found.append(pair)
        if len(found) == num:
            break
    return {"context/with": [pair[0] for pair in found], "context/without": [pair[1] for pair in found]}


def _pair(
    text: str, frequencies: Frequencies, tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random
) -> tuple[Question, Question] | None:
    occurrences: dict[str, list[tuple[int, int]]] = {}  # word -> (number of the word, place in the text)
    for number, match in enumerate(WORD.finditer(text)):
        occurrences.setdefault(match[0], []).append((number, match.start()))
    candidates = [
        (word, first[1], second[1], len(others) + 2)
        for word, (first, second, *others) in ((w, o) for w, o in occurrences.items() if len(o) > 1)
        if second[0] - first[0] > APART and word.lower() not in frequencies.common
    ]
    rng.shuffle(candidates)
    for word, first, second, count in candidates:
        if text[second - 1] != " ":
            continue
        context = text[: second - 1]
        passage = next(m for m in SENTENCE.finditer(text) if m.end() > first)
        without = context[: passage.start()] + context[passage.end() :]
        if passage.end() >= second or not without or word.lower() in without.lower():
            continue
        pool = [w for w in frequencies.similar(word, frequencies.counts[word] - count) if w.lower() not in text.lower()]
        if len(pool) < 3:
            continue
        wrong = [f" {other}" for other in rng.sample(pool, 3)]
        asked = pose(rng, context=context, right=f" {word}", wrong=wrong, task="context/with", split="unseen")
        if fits(tokenizer, asked, length):
            return asked, replace(asked, context=without, task="context/without")
    return None
