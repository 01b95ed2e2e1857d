"""Text that has nothing to do with any edit, and what an edited model changes there.

Letters: B blocks, T tokens, V vocabulary.
"""

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.train import corpora
from engrammar_lab.adapters.lessons import blocks_of
from engrammar_lab.editing.edited import Edited

LENGTH = 128  # tokens of a block
EVERY = 16  # positions whose whole distribution is kept, for the divergence


class Read(NamedTuple):
    """What a model says along one block."""

    best_T: Tensor  # its likeliest next tokens
    sums: list[int]  # CRC-32 of the logits of each position
    logits_SV: Tensor  # of every 16th position
    nats: float  # what the block costs it, per token


def neutral_blocks(tokenizer: Any, cache: Path, chats: Sequence[tuple[str, str]], num_tokens: int) -> Tensor:
    """At most `num_tokens` tokens in blocks [B, T]: half of them chat, half the beginnings of encyclopaedia entries."""
    prose = [entry.text for entry in corpora.entries("wiki", cache=cache)]
    prose = random.Random("neutral").sample(prose, min(len(prose), num_tokens // 64))
    both = ([prompt + answer for prompt, answer in chats], prose)
    return torch.cat([blocks_of(texts, tokenizer, LENGTH)[0][: num_tokens // 2 // LENGTH] for texts in both])


@torch.no_grad()
def read_block(model: Any, ids_T: Tensor, before: Sequence[int] = ()) -> Read:
    """Reads a block after other tokens."""
    ids = torch.cat([torch.tensor(before, dtype=torch.long), ids_T])
    logits_TV = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(ids_T)).logits[0].float()
    return Read(
        best_T=logits_TV.argmax(-1),
        sums=[zlib.crc32(row) for row in logits_TV.numpy()],
        logits_SV=logits_TV[::EVERY].clone(),
        nats=float(F.cross_entropy(logits_TV[:-1], ids_T[1:])),
    )


def read_blocks(model: Any, blocks_BT: Tensor) -> list[Read]:
    """What a model says along neutral text."""
    return [read_block(model, ids_T) for ids_T in tqdm(blocks_BT, desc="neutral text", unit=" blocks", delay=2)]


def changed(
    model: Any, tokenizer: Any, edited: Edited, blocks_BT: Tensor, unedited: Sequence[Read], most: int
) -> dict[str, float]:
    """What the edits change along neutral text.

    Args:
        unedited: what the model said before.
        most: tokens that are read at most; where the facts are told before each block, fewer blocks are read.

    Returns:
        Of the positions, the share whose logits are the same bits, and the share whose likeliest token is another; the
        Kullback-Leibler divergence and the rise of the text's own cost, in nats per token; the number of positions.
    """
    same = other = positions = spent = 0
    divergence: list[float] = []
    rise = 0.0
    for place in torch.randperm(len(blocks_BT), generator=torch.Generator().manual_seed(0)).tolist():
        ids_T, old = blocks_BT[place], unedited[place]
        text = tokenizer.decode(ids_T)
        told = edited.worded(text)
        assert told.endswith(text)
        before = tokenizer(told[: len(told) - len(text)]).input_ids
        spent += len(before) + len(ids_T)
        if spent > most and positions:
            break
        new = read_block(model, ids_T, before)
        same += sum(a == b for a, b in zip(old.sums, new.sums, strict=True))
        other += int((old.best_T != new.best_T).sum())
        positions += len(ids_T)
        rise += new.nats - old.nats
        log_old, log_new = old.logits_SV.log_softmax(-1), new.logits_SV.log_softmax(-1)
        divergence += (log_old.exp() * (log_old - log_new)).sum(-1).tolist()
    return {
        "neutral/same bits": same / positions,
        "neutral/other token": other / positions,
        "neutral/divergence": sum(divergence) / len(divergence),
        "neutral/rise": rise / (positions / LENGTH),
        "neutral/positions": float(positions),
    }
