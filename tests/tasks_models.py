"""Tokenizers small enough to follow by hand, and a model that knows given texts and nothing else."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from engrammar.train import corpora, parsers
from engrammar_lab.tasks.scoring import best, score_continuations, score_questions

SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>")
LETTERS = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("X") + 1))]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """53 ids, as tests/models.py has: three special ones and a letter each."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return _wrap(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """259 ids: three special ones and a byte each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>"
    )


class Knows(nn.Module):
    """Gives the next token of any known text that begins as the row does a logit of 20, all else 0."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str] = ()) -> None:
        super().__init__()
        self.num_ids = len(tokenizer)
        self.next_of: dict[bytes, int] = {}
        for text in texts:
            ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
            packed = torch.tensor(ids, dtype=torch.int16).numpy().tobytes()
            self.next_of |= {packed[: 2 * place]: token for place, token in enumerate(ids)}

    def forward(self, input_ids, attention_mask, use_cache):
        assert not use_cache and (attention_mask.diff(dim=1) <= 0).all()  # padded on the right
        logits = torch.zeros(*input_ids.shape, self.num_ids)
        for row, ids in enumerate(input_ids):
            packed = ids.to(torch.int16).numpy().tobytes()
            for place in range(len(ids)):
                if (known := self.next_of.get(packed[: 2 * place + 2])) is not None:
                    logits[row, place, known] = 20.0
        return SimpleNamespace(logits=logits)


SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def word(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=3))


def made_up(corpus: str, rng: random.Random) -> list[str]:
    names = list(dict.fromkeys(word(rng) for _ in range(60)))
    if corpus == "wiki":
        filler = f"was {' '.join(['the'] * 22)} and again"
        return [
            f"{name.title()} is a {word(rng)} of the {word(rng)}. In {word(rng)} {filler} {name.title()} came there."
            for name in names
        ] + [f"Once {name.title()} went where {name.title()} had been." for name in names]
    if corpus == "wordnet":
        return [f"{name} (noun): a {word(rng)} of some {word(rng)}; more of it" for name in names]
    if corpus == "gcide":
        return [f"{name.title()}, n. A {word(rng)} which has {word(rng)}; other words." for name in names]
    return [
        f"def {name}(value):\n    one = {word(rng)}(value)\n    two = {word(rng)}(one)\n    return {word(rng)}(two)"
        for name in names
    ]


def write_corpora(folder: Path) -> None:
    """Fills a cache of pocket corpora with made-up entries, so that nothing is downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("wiki", "wordnet", "gcide", "stdlib"):
        texts = made_up(name, random.Random(name))
        entries = [asdict(parsers.Entry(text.split()[0], text)) for text in texts]
        path = folder / f"{name}-{corpora.POCKET[name].version}-{parsers.VERSION}.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def choose(model, tokenizer, questions) -> tuple[list[int], list[int]]:
    """The index of each question's most likely choice, by total log likelihood and by log likelihood per byte."""
    chosen = [best(choices) for choices in score_questions(model, tokenizer, questions)]
    return [total for total, _ in chosen], [per_byte for _, per_byte in chosen]


def recall(model, tokenizer, questions) -> list[bool]:
    """Whether greedy decoding from each context begins with exactly the answer's tokens."""
    pairs = [(question.context, question.right) for question in questions]
    return [continuation.greedy for continuation in score_continuations(model, tokenizer, pairs)]
