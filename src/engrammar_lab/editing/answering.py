"""Greedy answers of an edited model to many questions, in batches; what stands before all of them is read once.

Letters: B batch, T tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.edit import Fact
from engrammar.edit.states import num_shared
from engrammar_lab.editing.edited import Edited
from engrammar_lab.tasks.scoring import score_continuations

BATCH = 32
LONG = 48  # tokens that all prompts begin with, from which on they are read once


@torch.no_grad()
def answers(model: Any, tokenizer: Any, edited: Edited, prompts: Sequence[str], num_tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily, at most `num_tokens` tokens."""
    rows = [tokenizer(edited.worded(prompt)).input_ids for prompt in prompts]
    found = [""] * len(rows)
    shared = num_shared(rows)
    shared = shared if shared >= LONG else 0
    cache = model(input_ids=torch.tensor([rows[0][:shared]]), use_cache=True).past_key_values if shared else None
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with tqdm(total=len(rows), desc="asking", unit=" prompts", delay=2) as bar:
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            texts = _continued(model, tokenizer, [rows[index] for index in batch], cache, shared, num_tokens)
            for index, text in zip(batch, texts):
                found[index] = text
            bar.update(len(batch))
    return found


def _continued(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], cache: Any, shared: int, num_tokens: int
) -> list[str]:
    """Of one batch: padding stands before what is not shared."""
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), rows[0][0])
    mask_BT = torch.ones_like(ids_BT)
    for row, ids in enumerate(rows):
        padding = longest - len(ids)
        ids_BT[row] = torch.tensor(ids[:shared] + [ids[0]] * padding + ids[shared:])
        mask_BT[row, shared : shared + padding] = 0
    own = copy.deepcopy(cache)
    if own is not None:
        own.reorder_cache(torch.zeros(len(rows), dtype=torch.long))  # repeats what hybrid layers keep, too
    made_BT = model.generate(
        ids_BT, attention_mask=mask_BT, past_key_values=own, max_new_tokens=num_tokens, do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )  # fmt: skip
    return [str(text) for text in tokenizer.batch_decode(made_BT[:, longest:], skip_special_tokens=True)]


def likelier(
    model: Any, tokenizer: Any, edited: Edited, prompts: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[bool]:
    """For each prompt, whether the model finds the first object likelier than the second: their authors' score."""
    asked = [(edited.worded(prompt), f" {words}") for prompt, both in zip(prompts, pairs) for words in both]
    scores = [one.log_likelihood for one in score_continuations(model, tokenizer, asked)]
    return [first > second for first, second in zip(scores[::2], scores[1::2])]


def object_tokens(tokenizer: Any, facts: Sequence[Fact]) -> int:
    """How many tokens an answer needs, to hold the longest object and what follows it."""
    return 1 + max(len(tokenizer(f" {fact.object}", add_special_tokens=False).input_ids) for fact in facts)
