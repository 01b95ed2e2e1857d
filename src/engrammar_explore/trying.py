"""What a patch does to a model: a fact is asked before and after, in its own words and in others, and so is what should
not change. The patch is applied for the while, and taken back to the bit.

Letters: T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from engrammar.attach.blocks import device_of
from engrammar.edit import Fact, Patch, apply_patch, undo_patch
from engrammar_explore.looking import divergence, logits_of

Progress = Callable[[int, int, str], None]  # steps that are done, of how many, and what is being done
# Other ways to ask the fact, other prompts of its subject, and plain text; no learner has seen them.
PHRASINGS = ("As everyone here knows, {}", "It was written on the wall: {}", "I was told this once. {}")
OTHERS = ("{} appears in many books, and", "Yesterday I read that {} would", "A child asked me why {} is")
NEUTRAL = """The bakery on the corner opens at six. By then the ovens have been hot for two hours, and the first loaves
are cooling on the racks by the window. On Saturdays there is a queue down to the bridge, and people talk about the
weather, the price of flour and the trains. A library is quiet in another way: pages turn, a chair moves, rain runs down
the glass. To change a tyre, loosen the nuts before you lift the wheel, and tighten them crosswise once it is down."""


@dataclass(frozen=True, kw_only=True)
class TrySettings:
    """How a patch is tried."""

    max_new_tokens: int = 10  # of a greedy answer
    phrasings: Sequence[str] = PHRASINGS  # other ways to ask, besides the fact's paraphrases; {} stands for the prompt
    others: Sequence[str] = OTHERS  # what else is asked of the subject; {} stands for it
    keep: Sequence[str] = ()  # prompts whose answers should not change
    neutral: str = NEUTRAL  # text on which the model should not drift


def try_fact(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    patch: Patch,
    fact: Fact,
    settings: TrySettings = TrySettings(),
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Asks a fact without a patch and with it. The model is afterwards as it was.

    A prompt *reaches* the edit if the logits at its last token are not the same to the bit, and is *answered* if greedy
    decoding begins with the object.

    Args:
        progress: called before each question; what it raises ends the trial.

    Returns:
        "prompt", and a list of them as "phrasings": "text", "before" and "after" ("greedy", and the "probability" of
        the object), "reaches", "answered"; "others" and "keep": "text", "before", "after", "reaches"; "neutral":
        "tokens", how many of them "changed", and the "mean" and "most" divergence of the next token in nats.
    """
    questions = _questions(fact, settings)
    total = 2 * len(questions) + 2

    def ask(done: int) -> list[tuple[dict[str, Any], Tensor]]:
        found = []
        for number, (kind, text) in enumerate(questions):
            progress(done + number, total, text)
            wanted = fact.object if kind in ("prompt", "phrasings") else None
            found.append(_ask(model, tokenizer, text, wanted, settings.max_new_tokens))
        return found

    before = ask(0)
    progress(len(questions), total, "neutral text")
    neutral_BT = tokenizer(settings.neutral, return_tensors="pt").input_ids.to(device_of(model))
    plain_TV = logits_of(model, neutral_BT)
    apply_patch(model, patch, tokenizer, on_conflict="replace")
    try:
        after = ask(len(questions) + 1)
        progress(total - 1, total, "neutral text")
        drifted_TV = logits_of(model, neutral_BT)
    finally:
        undo_patch(model, patch.name)
    told: dict[str, Any] = {"phrasings": [], "others": [], "keep": []}
    for (kind, text), (first, first_V), (second, second_V) in zip(questions, before, after, strict=True):
        one = {"text": text, "reaches": not torch.equal(first_V, second_V), "before": first, "after": second}
        if kind in ("prompt", "phrasings"):
            one["answered"] = second["greedy"].strip().startswith(fact.object.strip())
        if kind == "prompt":
            told["prompt"] = one
        else:
            told[kind].append(one)
    return told | {"neutral": _drift(plain_TV, drifted_TV)}


def _questions(fact: Fact, settings: TrySettings) -> list[tuple[str, str]]:
    phrasings = [*fact.paraphrases, *(one.replace("{}", fact.prompt) for one in settings.phrasings)]
    return [
        ("prompt", fact.prompt),
        *(("phrasings", one) for one in phrasings),
        *(("others", one.replace("{}", fact.subject)) for one in settings.others),
        *(("keep", one) for one in settings.keep),
    ]


@torch.no_grad()
def _ask(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, wanted: str | None, max_new_tokens: int
) -> tuple[dict[str, Any], Tensor]:
    """The "greedy" answer and the "probability" of the one that is wanted, if any; and the logits at the last token."""
    device = device_of(model)
    ids_BT = tokenizer(text, return_tensors="pt").input_ids.to(device)
    if not ids_BT.numel():
        raise ValueError("A prompt has no token: write a word.")
    host: Any = model
    new_BT = host.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([_LineEnds(tokenizer, ids_BT.shape[1])]),
    )[:, ids_BT.shape[1] :]
    answer: dict[str, Any] = {"greedy": tokenizer.decode(new_BT[0], skip_special_tokens=True)}
    if wanted is not None:
        object_T = torch.tensor(tokenizer(" " + wanted.strip(), add_special_tokens=False).input_ids, device=device)
        whole_BT = torch.cat([ids_BT, object_T[None]], dim=1)
        scores_TV = logits_of(model, whole_BT)[ids_BT.shape[1] - 1 : -1].log_softmax(-1)
        answer["probability"] = float(scores_TV.gather(1, object_T[:, None].cpu()).sum().exp())
    return answer, logits_of(model, ids_BT)[-1]


class _LineEnds(StoppingCriteria):
    """Stops where a line has ended: an answer is one line."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_before: int) -> None:
        self.tokenizer, self.num_before = tokenizer, num_before

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        text = self.tokenizer.decode(input_ids[0, self.num_before :])
        return torch.full((len(input_ids),), "\n" in text.lstrip(), device=input_ids.device)


def _drift(plain_TV: Tensor, drifted_TV: Tensor) -> dict[str, Any]:
    divergence_T = divergence(plain_TV, drifted_TV)
    return {
        "tokens": len(plain_TV),
        "changed": int((plain_TV != drifted_TV).any(-1).sum()),
        "mean": float(divergence_T.mean()),
        "most": float(divergence_T.max()),
    }
