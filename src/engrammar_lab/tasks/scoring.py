"""How likely continuations of contexts are to a model: choices among them, and exact recall.

Letters: B batch, T tokens, S scored tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar_lab.tasks.questions import Question, start_ids


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A model's score of a continuation."""

    log_likelihood: float  # log likelihood of its tokens given the context, in nats
    greedy: bool  # whether greedy decoding from the context begins with exactly its tokens
    num_bytes: int  # size of its text in UTF-8

    @property
    def per_byte(self) -> float:
        return self.log_likelihood / self.num_bytes


def score_continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_tokens: int = 4096,
) -> list[Continuation]:
    """Scores (context, continuation) pairs with any causal model that has `.logits` [B, T, V].

    Context and continuation are encoded separately, so the boundary between them does not depend on their texts.
    `start_ids` precede them, as they precede documents in training.

    Raises:
        ValueError: the model is in training mode, a continuation has no tokens or nothing before it, or a row is longer
            than the model's `max_position_embeddings`.
    """
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() before scoring.")
    unique = list(dict.fromkeys(pairs))
    rows = _encode(tokenizer, unique, getattr(getattr(model, "config", None), "max_position_embeddings", None))
    order = sorted(range(len(unique)), key=lambda index: sum(map(len, rows[index])))
    found: dict[tuple[str, str], Continuation] = {}
    with tqdm(total=len(unique), desc="scoring", unit=" rows", delay=2) as progress:
        for batch in _batches([(index, sum(map(len, rows[index]))) for index in order], batch_tokens):
            scores = _score_rows(model, [rows[index] for index in batch], tokenizer.pad_token_id or 0)
            for index, (log_likelihood, greedy) in zip(batch, scores):
                num_bytes = len(unique[index][1].encode())
                found[unique[index]] = Continuation(log_likelihood=log_likelihood, greedy=greedy, num_bytes=num_bytes)
            progress.update(len(batch))
    return [found[pair] for pair in pairs]


def _encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], limit: int | None
) -> list[tuple[list[int], list[int]]]:
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False).input_ids)) if texts else {}
    start = start_ids(tokenizer)
    rows = []
    for context, continuation in pairs:
        before, after = start + ids[context], ids[continuation]
        if not before or not after:
            raise ValueError(f"{context!r:.60} goes on as {continuation!r:.60}; both need at least one token.")
        if limit is not None and len(before) + len(after) > limit:
            raise ValueError(
                f"{context!r:.60} with its continuation takes {len(before) + len(after)} tokens; the model's "
                f"max_position_embeddings allows {limit}: shorten it, or stretch the model with yarn.stretched."
            )
        rows.append((before, after))
    return rows


def _batches(lengths: Sequence[tuple[int, int]], batch_tokens: int) -> Iterator[list[int]]:
    """Groups (index, length) pairs in order of length; each group, padded, is within the budget or is a single row."""
    batch: list[int] = []
    for index, length in lengths:
        if batch and (len(batch) + 1) * length > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def _score_rows(model: Any, rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> list[tuple[float, bool]]:
    device = getattr(model, "device", "cpu")
    whole = [torch.tensor(before + after) for before, after in rows]
    ids_BT = pad_sequence(whole, batch_first=True, padding_value=pad_id).to(device)
    first_B, stop_B = torch.tensor([[len(before), len(ids)] for (before, _), ids in zip(rows, whole)], device=device).T
    place_T = torch.arange(ids_BT.shape[1], device=device)
    mask_BT = place_T < stop_B[:, None]
    scored_BT = mask_BT & (place_T >= first_B[:, None])
    logits_BTV: Tensor = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
    logits_SV = logits_BTV[:, :-1][scored_BT[:, 1:]].float()
    target_S = ids_BT[scored_BT]
    log_likelihood_S = -torch.nn.functional.cross_entropy(logits_SV, target_S, reduction="none")
    greedy_S = logits_SV.argmax(-1) == target_S
    sizes = [len(after) for _, after in rows]
    parts = zip(log_likelihood_S.double().split(sizes), greedy_S.split(sizes))
    return [(float(log_likelihood.sum()), bool(greedy.all())) for log_likelihood, greedy in parts]


def score_questions(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, batch_tokens: int = 4096
) -> list[list[Continuation]]:
    """Per question, the scores of its choices; see `score_continuations`."""
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    scores = iter(score_continuations(model, tokenizer, pairs, batch_tokens=batch_tokens))
    return [[next(scores) for _ in question.choices] for question in questions]


def best(choices: Sequence[Continuation]) -> tuple[int, int]:
    """The index of the most likely choice, by total log likelihood and by log likelihood per byte."""
    total = max(range(len(choices)), key=lambda index: choices[index].log_likelihood)
    return total, max(range(len(choices)), key=lambda index: choices[index].per_byte)
