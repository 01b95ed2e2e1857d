"""Needles in a haystack and chains of variables, at a given length in tokens.

After RULER's multi-query needle and variable tracking (arXiv 2404.06654), in our words and small enough for a trained
length of 128: a few sentences to remember are scattered over prose, and one of them answers the question at the end.
Training (a short fine-tuning on the format) and test share no key, name or value.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engrammar_lab.tasks.questions import Question, count_tokens, pose, start_ids

Use = Literal["test", "training"]
KEYS: dict[Use, str] = {
    "test": "amber bread cloud dagger eagle forest garden hammer island jacket kettle lemon mirror needle "
    "orange pepper",
    "training": "anchor basket candle desert engine feather guitar harbour ivory jungle ladder marble nickel olive "
    "pencil ribbon saddle ticket valley window",
}
LETTERS = "bcdfghjkmnpqrstvwxz"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WHOLE = re.compile(r"[A-Z]\D+ \D+ \D+ \D+[a-z]{3}[.!?]")  # five words or more, and no abbreviation at the end


@dataclass(frozen=True)
class Haystack:
    """Sentences of prose, and the most tokens that each takes at any place in a text."""

    sentences: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> "Haystack":
        """The whole sentences of `texts`, without those that contain a digit or one of the needles' keys."""
        keys = {key for use in KEYS.values() for key in use.split()}
        sentences = dict.fromkeys(sentence for text in texts for sentence in SENTENCE_END.split(text.strip()))
        plain = [
            sentence
            for sentence in sentences
            if WHOLE.fullmatch(sentence) and keys.isdisjoint(re.findall(r"\w+", sentence.lower()))
        ]
        if not plain:
            raise ValueError("The haystack's texts hold no sentence of five words without digits; allowed: any prose.")
        first, later = (count_tokens(tokenizer, [space + sentence for sentence in plain]) for space in ("", " "))
        return cls(tuple(plain), tuple(map(max, first, later)))

    def scatter(self, statements: Sequence[str], num_tokens: int, rng: random.Random) -> str:
        """The statements in their order, mixed with random sentences of at most `num_tokens` tokens in all."""
        picked: list[str] = []
        for index in rng.sample(range(len(self.sentences)), len(self.sentences)):
            if self.lengths[index] <= num_tokens:
                picked.append(self.sentences[index])
                num_tokens -= self.lengths[index]
            if num_tokens < min(self.lengths):
                break
        total = len(picked) + len(statements)
        places = set(rng.sample(range(total), len(statements)))
        prose, told = iter(picked), iter(statements)
        return " ".join(next(told) if place in places else next(prose) for place in range(total))


def needle_questions(
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num: int,
    seed: int,
    use: Use = "test",
    num_pairs: int = 4,
    num_queries: int = 2,
) -> list[Question]:
    """`num` questions on texts of `length` tokens with `num_pairs` codes, of which `num_queries` are asked one by one.

    Each question follows the right answers to those before it. Choices: the codes of the text.

    Raises:
        ValueError: the text has no room for the codes, or more are asked for than there are.
    """
    keys = KEYS[use].split()
    if not 1 <= num_queries <= num_pairs <= len(keys):
        raise ValueError(f"num_queries is {num_queries} of num_pairs {num_pairs}; allowed: 1 to {len(keys)} in order.")
    rng = random.Random(f"needle {use} {length} {seed}")
    task = f"needle/choice/{length}"
    questions: list[Question] = []
    while len(questions) < num:
        codes = dict(zip(rng.sample(keys, num_pairs), _values(rng, num_pairs, use)))
        told = {key: f"The code of {key} is {code}." for key, code in codes.items()}
        asked = rng.sample(list(codes), num_queries)
        end = " ".join(told[key] for key in asked)
        room = _room(tokenizer, [*told.values(), end], list(codes.values()), length)
        text = haystack.scatter(list(told.values()), room, rng)
        for key in asked:
            questions.append(_ask(rng, f"{text} The code of {key} is", codes.values(), codes[key], task))
            text += f" {told[key]}"
    return questions[:num]


def tracking_questions(
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num: int,
    seed: int,
    use: Use = "test",
    num_chains: int = 4,
    num_copies: int = 2,
) -> list[Question]:
    """`num` questions on the last variable of a chain.

    The first variable of a chain has a value; each of `num_copies` more is set to the one before. Choices: the values
    of the text's `num_chains` chains, whose statements are mixed.

    Raises:
        ValueError: the text has no room for the chains.
    """
    names = [a + b for a in LETTERS for b in LETTERS if a != b and (LETTERS.index(a) % 2 == 0) == (use == "test")]
    rng = random.Random(f"tracking {use} {length} {seed}")
    task = f"tracking/choice/{length}"
    questions = []
    for _ in range(num):
        drawn = rng.sample(names, num_chains * (num_copies + 1))
        chains = [drawn[chain::num_chains] for chain in range(num_chains)]
        values = _values(rng, num_chains, use)
        turns = rng.sample([chain for chain in range(num_chains) for _ in chains[chain]], len(drawn))
        sources = [iter([value, *chain]) for value, chain in zip(values, chains)]
        targets = [iter(chain) for chain in chains]
        statements = [f"{next(targets[turn])} = {next(sources[turn])}." for turn in turns]
        which = rng.randrange(num_chains)
        end = f"{chains[which][-1]} ="
        room = _room(tokenizer, [*statements, f"{end} {values[which]}."], values, length)
        context = f"{haystack.scatter(statements, room, rng)} {end}"
        questions.append(_ask(rng, context, values, values[which], task))
    return questions


def _ask(rng: random.Random, context: str, values: Iterable[str], right: str, task: str) -> Question:
    wrong = [f" {value}." for value in values if value != right]
    return pose(rng, context=context, right=f" {right}.", wrong=wrong, task=task, split="unseen")


def _values(rng: random.Random, num: int, use: Use) -> list[str]:
    """Values of five digits; those of training have an even digit sum."""
    values: dict[str, None] = {}
    while len(values) < num:
        value = str(rng.randrange(10_000, 100_000))
        if sum(map(int, value)) % 2 == (use == "test"):
            values[value] = None
    return list(values)


def _room(tokenizer: PreTrainedTokenizerBase, parts: Sequence[str], values: Sequence[str], length: int) -> int:
    """Tokens left of `length` after the token before the text and `parts`, with any of `values` as the last answer."""
    answers = count_tokens(tokenizer, [f" {value}." for value in values])
    first, later = count_tokens(tokenizer, parts), count_tokens(tokenizer, [f" {part}" for part in parts])
    # The most tokens that a part takes more at the start of the text.
    opening = max(alone - spaced for alone, spaced in zip(first, later))
    room = length - 1 - sum(later) - max(opening, 0) - (max(answers) - min(answers))
    if room < 0:
        raise ValueError(f"length is {length}; the statements and the question alone take {length - room} tokens.")
    return room


def training_row(tokenizer: PreTrainedTokenizerBase, question: Question, length: int) -> dict[str, Tensor]:
    """A question and its answer as a row to train on: {"input_ids", "labels", "attention_mask"}, int64 [length].

    Labels are -100 outside the answer.
    """
    context, answer = tokenizer([question.context, question.right], add_special_tokens=False).input_ids
    ids = torch.tensor(start_ids(tokenizer) + context + answer)
    if len(ids) > length:
        raise ValueError(f"length is {length}; the question with its answer takes {len(ids)} tokens.")
    pad = (0, length - len(ids))
    labels = torch.full_like(ids, -100)
    labels[-len(answer) :] = ids[-len(answer) :]
    return {
        "input_ids": torch.nn.functional.pad(ids, pad, value=tokenizer.pad_token_id or 0),
        "labels": torch.nn.functional.pad(labels, pad, value=-100),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), pad),
    }
