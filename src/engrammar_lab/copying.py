"""Whether a model copies from its context: how much easier a text is to read a second time.

Models learn to copy within a short part of their training, in which their loss falls (induction heads, arXiv
2209.11895).
Letters: B texts, T tokens.
"""

from typing import Any

import torch

from engrammar.train.data import TokenSet

NUM_TEXTS, AT_ONCE = 200, 50


@torch.no_grad()
def repeat_gain(model: Any, tokens: TokenSet, length: int) -> float:
    """By how many nats per token validation texts are easier when they follow themselves.

    Args:
        model: a causal language model, in evaluation.
        length: tokens of a text and its repetition, as many as the model was trained on at once.
    """
    blocks = tokens.blocks("validation", length // 2)
    places = torch.linspace(0, max(len(blocks) - 2, 0), min(NUM_TEXTS, len(blocks))).long()  # the last one has padding
    texts_BT = torch.stack([blocks[place]["input_ids"] for place in places.tolist()])
    gains = []
    for part_BT in torch.cat([texts_BT, texts_BT], dim=1).split(AT_ONCE):
        scores = model(input_ids=part_BT, use_cache=False).logits[:, :-1].log_softmax(-1)
        scores_BT = scores.gather(-1, part_BT[:, 1:, None])[..., 0]
        first, again = scores_BT[:, : length // 2 - 1], scores_BT[:, length // 2 :]  # of the same tokens
        gains.append((again - first).mean(dim=1))
    return float(torch.cat(gains).mean())
