"""What is taught and what is asked: entries of a domain, facts in them, chat, and questions that should not change.

Letters: B blocks, T tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engrammar.train import corpora
from engrammar_lab.question_sets import questions
from engrammar_lab.tasks.facts import fact_questions, read_fact
from engrammar_lab.tasks.questions import Document, Question

DOMAINS = {"computing": "foldoc", "encyclopaedia": "wiki", "glosses": "wordnet"}
OTHER = {"computing": "wiki", "encyclopaedia": "foldoc", "glosses": "foldoc"}  # prose that is not taught
SETS = ("openbookqa", "piqa", "commonsenseqa")


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is taught and asked; `num_background` entries of `background` say which rows any text reads."""

    num_taught: int = 192
    num_held: int = 64
    entry_tokens: tuple[int, int] = (40, 160)
    length: int = 128
    num_facts: int = 150
    num_questions: int = 100
    num_chats: int = 48
    chat_tokens: int = 48
    background: str = "wordnet+gcide"
    num_background: int = 12_000


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One domain's text, in blocks [B, T], and questions."""

    taught: Tensor  # entries that are taught
    held: Tensor  # other entries of the domain
    other: Tensor  # other prose
    background: Tensor  # prose that is neither taught nor measured
    bytes_per_token: dict[str, float]  # of each of these
    # By task: recall and cloze (the model has to produce the words), choice; of taught entries, and of held-out ones.
    facts: dict[str, list[Question]]


def make_lesson(domain: str, seed: int, tokenizer: PreTrainedTokenizerBase, cache: Path, amount: Amount) -> Lesson:
    """The lesson of a domain and seed: other entries for every seed, the same for every model."""
    rng = random.Random(f"{domain} {seed}")
    own = _entries(DOMAINS[domain], tokenizer, cache, amount)
    other = _entries(OTHER[domain], tokenizer, cache, amount)
    document = partial(Document, corpus=DOMAINS[domain])
    with_fact = [entry for entry in own if read_fact(document(text=entry, split="seen")) is not None]
    chosen = rng.sample(with_fact, amount.num_taught + amount.num_held)
    texts = {
        "taught": chosen[: amount.num_taught],
        "held": chosen[amount.num_taught :],
        "other": rng.sample(other, amount.num_held),
    }
    prose = [entry.text for entry in corpora.entries(amount.background, cache=cache)]
    texts["background"] = rng.sample(prose, min(len(prose), amount.num_background))
    blocks, per_token = {}, {}
    for name, entries in texts.items():
        blocks[name], per_token[name] = blocks_of(entries, tokenizer, amount.length)
    documents = [document(text=entry, split="seen") for entry in texts["taught"]]
    documents += [document(text=entry, split="unseen") for entry in texts["held"]]
    return Lesson(**blocks, bytes_per_token=per_token, facts=_facts(documents, tokenizer, amount, seed))


def _entries(corpus: str, tokenizer: PreTrainedTokenizerBase, cache: Path, amount: Amount) -> list[str]:
    texts = [entry.text for entry in corpora.entries(corpus, cache=cache)]
    lengths = map(len, tokenizer(texts, add_special_tokens=False).input_ids)
    low, high = amount.entry_tokens
    return [text for text, length in zip(texts, lengths) if low <= length <= high]


def blocks_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Tensor, float]:
    """Entries one after another, each after an end of text, cut into blocks; and their bytes per token."""
    ids = [[tokenizer.eos_token_id, *own] for own in tokenizer(list(texts), add_special_tokens=False).input_ids]
    flat = torch.tensor([token for own in ids for token in own])
    num_bytes = sum(len(text.encode()) for text in texts)
    return flat[: len(flat) // length * length].view(-1, length), num_bytes / len(flat)


def _facts(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, amount: Amount, seed: int
) -> dict[str, list[Question]]:
    asked = fact_questions(documents, tokenizer, length=amount.length, num=amount.num_facts, seed=seed)
    facts = [fact for document in documents if (fact := read_fact(document)) is not None and fact.split == "seen"]
    asked["facts/recall/seen"] = [
        Question(context=fact.context, choices=(fact.definition,), answer=0, task="facts/recall/seen", split="seen")
        for fact in facts[: amount.num_facts]
    ]
    return asked


def make_chats(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Path, amount: Amount
) -> list[tuple[str, str]]:
    """Prompts in the chat template with the base's own greedy answers: what should stay as it is."""
    asked = random.Random("chat").sample(questions("nq-open", cache=cache), amount.num_chats)
    chats = []
    for question in tqdm(asked, desc="the base answers", unit=" chats", delay=2):
        words = question.context.removeprefix("Q: ").removesuffix("\nA:")
        message = {"role": "user", "content": words}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=amount.chat_tokens, do_sample=False)
        chats.append((str(prompt), str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))))
    return chats


def fixed_questions(cache: Path, amount: Amount) -> dict[str, list[Question]]:
    """Questions of knowledge and sense that no lesson teaches."""
    return {name: random.Random(name).sample(questions(name, cache=cache), amount.num_questions) for name in SETS}
