"""What a taught model knows of its lesson, and what it has lost elsewhere.

Letters: B blocks, T tokens, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engrammar_lab.adapters.lessons import Lesson
from engrammar_lab.tasks.questions import Question
from engrammar_lab.tasks.scoring import best, score_continuations, score_questions

BATCH = 8


@torch.inference_mode()
def nats_per_token(model: Any, ids_BT: Tensor) -> float:
    """Mean cross entropy of blocks, each read from its beginning."""
    total = 0.0
    for own_BT in ids_BT.split(BATCH):
        logits_BTV = model(input_ids=own_BT, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits_BTV.flatten(0, 1), own_BT[:, 1:].flatten(), reduction="sum"))
    return total / ids_BT[:, 1:].numel()


def share_right(model: Any, tokenizer: Any, asked: Sequence[Question]) -> float:
    """The share of questions answered rightly.

    Where there are choices, it is the likeliest one for its length. Where there is one choice, greedy decoding has to
    begin with exactly its tokens; that is what free generation would write.
    """
    scored = score_questions(model, tokenizer, asked)
    right = [
        choices[0].greedy if len(choices) == 1 else best(choices)[1] == question.answer
        for question, choices in zip(asked, scored)
    ]
    return sum(right) / len(right)


def chat_nats(model: Any, tokenizer: Any, chats: Sequence[tuple[str, str]]) -> float:
    """Nats per token of the base's own answers."""
    scored = score_continuations(model, tokenizer, chats)
    lengths = [len(tokenizer(answer, add_special_tokens=False).input_ids) for _, answer in chats]
    return -sum(each.log_likelihood for each in scored) / sum(lengths)


def measure(
    model: Any,
    tokenizer: Any,
    lesson: Lesson,
    chats: Sequence[tuple[str, str]],
    fixed: Mapping[str, Sequence[Question]],
) -> dict[str, float]:
    """All measures of one model: text in nats per token and bits per byte, facts and questions as shares."""
    found: dict[str, float] = {}
    for name in ("taught", "held", "other"):
        nats = nats_per_token(model, getattr(lesson, name))
        found |= {f"{name}/nats": nats, f"{name}/bits_per_byte": nats / math.log(2) / lesson.bytes_per_token[name]}
    found |= {task: share_right(model, tokenizer, asked) for task, asked in lesson.facts.items() if asked}
    found["chat/nats"] = chat_nats(model, tokenizer, chats)
    return found | {f"questions/{name}": share_right(model, tokenizer, asked) for name, asked in fixed.items()}
