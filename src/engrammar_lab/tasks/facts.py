"""Facts from an encyclopaedia, glosses and a dictionary, seen in training or not.

A fact is the first thing an entry says of its headword: `headword (noun): definition` in WordNet, `Headword, n.
Definition` in GCIDE, `X is a ...` up to the first comma or stop in Wikipedia. Two forms of question:
choice: the headword -> its definition among three of the same kind (corpus and part of speech, or verb) and split;
cloze: the entry up to the last word of the definition -> that word, if it is plain and does not occur before.
An unseen fact is left out if its sentence (Wikipedia) or definition (the others) occurs in any seen document.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from engrammar_lab.tasks.questions import SPLITS, Document, Question, Split, fits, pose

PATTERNS = {
    "wordnet": r"(?P<names>.+?) \((?P<kind>noun|verb|adjective|adverb)\):(?P<definition> [^;:.()\"]+)",
    "gcide": r"(?P<names>[^,.]+),? (?P<kind>n|a|adv|v\. t|v\. i)\.(?: \([A-Z][\w. ]*\))?(?: 1\.)?"
    r"(?P<definition> [^;:.()\"]+)(?=[;:.])",
    "foldoc": r"(?P<names>[^:]{2,60})(?P<kind>:)(?P<definition> [^;:.()\"]+)(?=[;:.(])",
    "wiki": r"(?P<names>[^.;:]{2,80}?) (?P<kind>is|are|was|were)(?P<definition> (?:an?|the) [^.,;:()\"]+)",
}
REFERENCES = ("Same as", "See ", "Of or pertaining to", "Pertaining to")  # definitions that say little of the headword
DEFINITION_WORDS = range(4, 26)
LAST_WORD = re.compile(r" [a-z]{4,}$")

Form = Literal["choice", "cloze"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """What an entry says of its headword; the entry's text begins with `context` + `definition`."""

    names: frozenset[str]
    context: str
    definition: str
    corpus: str
    kind: str
    split: Split

    @property
    def sentence(self) -> str:
        """The words that no seen document may contain if the fact is unseen."""
        return self.context + self.definition if self.corpus == "wiki" else self.definition


def read_fact(document: Document) -> Fact | None:
    """The fact that a document begins with, or None if it does not begin as entries of its corpus do."""
    match = re.match(PATTERNS[document.corpus], document.text)
    if match is None:
        return None
    definition = match["definition"].rstrip(" ,")
    if len(_words(definition)) not in DEFINITION_WORDS or definition.strip().startswith(REFERENCES):
        return None
    return Fact(
        names=frozenset(match["names"].casefold().split(", ")),
        context=document.text[: match.start("definition")],
        definition=definition,
        corpus=document.corpus,
        kind=match["kind"],
        split=document.split,
    )


def fact_questions(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, num: int, seed: int
) -> dict[str, list[Question]]:
    """Up to `num` questions for each of facts/{choice,cloze}/{seen,unseen}, within `length` tokens.

    The corpora take turns.

    Raises:
        ValueError: a document is from a corpus whose entries have no known form.
    """
    strange = sorted({document.corpus for document in documents} - set(PATTERNS))
    if strange:
        raise ValueError(f"There are no facts to read in the corpus {strange[0]!r}; allowed: {', '.join(PATTERNS)}.")
    facts = [fact for document in documents if (fact := read_fact(document)) is not None]
    told = _told(facts, documents)
    facts = [fact for fact in facts if fact.split == "seen" or _words(fact.sentence) not in told]
    own = {split: [fact for fact in facts if fact.split == split] for split in SPLITS}
    return {
        f"facts/{form}/{split}": _take(own[split], form, tokenizer, length, num, seed)
        for form in get_args(Form)
        for split in SPLITS
    }


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def _told(facts: Sequence[Fact], documents: Sequence[Document]) -> set[tuple[str, ...]]:
    """The sentences of unseen facts, as words, that occur in seen documents; found in one pass over these."""
    by_start: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for fact in facts:
        if fact.split == "unseen":
            sentence = _words(fact.sentence)
            by_start.setdefault(sentence[:3], set()).add(sentence)
    told = set()
    for document in documents:
        if document.split == "seen":
            words = _words(document.text)
            for place, start in enumerate(zip(words, words[1:], words[2:])):
                if start in by_start:
                    told |= {each for each in by_start[start] if words[place : place + len(each)] == each}
    return told


def _take(
    facts: Sequence[Fact],
    form: Form,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    num: int,
    seed: int,
) -> list[Question]:
    rng = random.Random(f"facts {form} {seed}")
    kinds: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        kinds.setdefault((fact.corpus, fact.kind), []).append(fact)
    questions: list[Question] = []
    for fact in _in_turn(facts, rng):
        if len(questions) == num:
            break
        question = _cloze(fact) if form == "cloze" else _choice(fact, kinds[fact.corpus, fact.kind], rng)
        if question is not None and fits(tokenizer, question, length):
            questions.append(question)
    return questions


def _in_turn(facts: Sequence[Fact], rng: random.Random) -> Iterator[Fact]:
    """All facts in random order, one from each corpus in turn."""
    corpora: dict[str, list[Fact]] = {}
    for fact in facts:
        corpora.setdefault(fact.corpus, []).append(fact)
    for own in corpora.values():
        rng.shuffle(own)
    return (fact for fact in chain.from_iterable(zip_longest(*corpora.values())) if fact is not None)


def _choice(fact: Fact, kind: Sequence[Fact], rng: random.Random) -> Question | None:
    wrong: dict[str, Fact] = {}
    for other in rng.sample(kind, min(len(kind), 12)):
        if len(wrong) < 3 and other.definition != fact.definition and not other.names & fact.names:
            wrong[other.definition] = other
    if len(wrong) < 3 or fact.definition.strip().casefold() in fact.context.casefold():
        return None
    task = f"facts/choice/{fact.split}"
    return pose(rng, context=fact.context, right=fact.definition, wrong=wrong, task=task, split=fact.split)


def _cloze(fact: Fact) -> Question | None:
    last = LAST_WORD.search(fact.definition)
    if last is None:
        return None
    context = fact.context + fact.definition[: last.start()]
    if last[0].strip() in context.casefold():
        return None
    return Question(context=context, choices=(last[0],), answer=0, task=f"facts/cloze/{fact.split}", split=fact.split)
