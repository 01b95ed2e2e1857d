"""Facts learned by gradient descent: fine-tuning of one weight, and LoRA that holds on to what else the model says.

Letters: N texts, T tokens, D hidden width, K scored places, V vocabulary.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engrammar.attach.blocks import evaluating, find_decoder, host_of
from engrammar.attach.skipping import KEPT, KEPT_BLOCK, begin_skipping, end_skipping, restore_blocks
from engrammar.edit import Fact
from engrammar.edit.forms import is_question
from engrammar.edit.optimizing import frozen
from engrammar.edit.phrasings import NAMES, PLAIN, RELATIONS, about
from engrammar.edit.states import states
from engrammar_lab.editing.edited import Edited, Model
from engrammar_lab.editing.weights import (
    Batch,
    down_projection,
    fact_batch,
    keep,
    logits_at,
    nats_of,
    only_training,
    prompt_batch,
)


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Fine-tuning as in ROME's paper, by Adam."""

    block: int  # whose down-projection is trained
    lr: float
    steps: int = 400  # at most
    batch: int = 32  # facts of a step
    stop: float = 0.05  # nats of a fact at which it counts as learned; all of them learned ends the training
    most: float | None = None  # how far a number of the weight may move (the norm constraint of FT+L); None: any way


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA with a term of locality; rate, steps, batch and stop are as in `TuneSettings`."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("down_proj", "up_proj")  # in every block
    lr: float = 1e-3
    steps: int = 250
    batch: int = 32
    stop: float = 0.1
    kl: float = 1.0  # how much a nat of change at held prompts counts
    num_held: int = 320  # held prompts altogether
    held_batch: int = 24  # those in a step


def fine_tune(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int, settings: TuneSettings) -> Edited:
    """Minimizes -log P[object | prompt] by Adam, with early stopping, in the down-projection of one block (ROME,
    section 3.2, "FT" and "FT+L"); all facts together, in batches. What lies below the block is computed once."""
    weight: Any = down_projection(model, settings.block).weight
    undo, before = keep([weight]), weight.detach().clone()
    optimizer = torch.optim.Adam([weight], lr=settings.lr)
    with only_training(model, weight), evaluating(host_of(model)), _kept_below(model, settings.block):
        mixed = random.Random(seed).sample(list(facts), len(facts))
        batches = [fact_batch(tokenizer, part, weight.device) for part in _cut(mixed, settings.batch)]
        block = torch.tensor([settings.block])
        below = [states(model, one.ids, one.mask, settings.block) for one in batches]
        order, step, unlearned = random.Random(seed), 0, 1
        while unlearned and step < settings.steps:
            unlearned = 0
            for number in order.sample(range(len(batches)), len(batches)):
                kept = {KEPT: below[number], KEPT_BLOCK: block}
                nats_N = nats_of(logits_at(model, batches[number], **kept), batches[number])
                missed = int((nats_N > settings.stop).sum())
                if missed and step < settings.steps:
                    _step(optimizer, nats_N.mean())
                    if settings.most is not None:
                        weight.data.clamp_(before - settings.most, before + settings.most)
                    step += 1
                unlearned += missed
    return Edited(undo=undo, num_bytes=weight.numel() * weight.element_size())


def low_rank(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int, settings: LoraSettings) -> Edited:
    """LoRA on all facts in batches, plus the KL divergence from what the model said before at held prompts. It is
    merged into the weights in the end."""
    import peft

    host: Any = host_of(model)
    device, prompts = next(host.parameters()).device, held_prompts(facts, settings.num_held, seed)
    batches = [prompt_batch(tokenizer, some, device) for some in _cut(prompts, settings.held_batch)]
    with torch.no_grad(), evaluating(host):
        held = [(one, logits_at(host, one).float().log_softmax(-1)) for one in batches]
    linear = [name for name, module in host.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if name.rpartition(".")[2] in settings.targets]
    if not names:
        raise ValueError(f"targets are {', '.join(settings.targets)}: {type(host).__name__} has no such linear layer.")
    undo = keep([host.get_submodule(name).weight for name in names])
    own = {name: vars(host).get(name) for name in ("peft_config", "_hf_peft_config_loaded")}
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names, lora_dropout=0.0)
    with frozen(host):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped: Any = peft.get_peft_model(host, config)
        trained = [parameter for parameter in host.parameters() if parameter.requires_grad]
        with evaluating(host):
            _fit(host, tokenizer, facts, random.Random(seed), settings, held)
        wrapped.merge_and_unload()
    for name, value in own.items():
        if value is None and name in vars(host):
            delattr(host, name)
    return Edited(undo=undo, num_bytes=sum(one.numel() * one.element_size() for one in trained))


Item = TypeVar("Item")
Held = Sequence[tuple[Batch, Tensor]]  # prompts, and log-probabilities [K, V] that are expected there


def _fit(host: Any, tokenizer: Any, facts: Sequence[Fact], rng: random.Random, how: LoraSettings, held: Held) -> None:
    optimizer = torch.optim.Adam([one for one in host.parameters() if one.requires_grad], lr=how.lr)
    step, unlearned = 0, 1
    while unlearned and step < how.steps:
        unlearned = 0
        for part in _cut(rng.sample(list(facts), len(facts)), how.batch):
            asked = fact_batch(tokenizer, part, held[0][1].device)
            nats_N = nats_of(logits_at(host, asked), asked)
            other, expected_KV = held[rng.randrange(len(held))]
            loss = nats_N.mean() + how.kl * divergence(expected_KV, logits_at(host, other))
            unlearned += int((nats_N > how.stop).sum())
            if step < how.steps:
                _step(optimizer, loss)
            step += 1


def held_prompts(facts: Sequence[Fact], num: int, seed: int) -> list[str]:
    """Prompts at which a model should go on as before: what the facts ask, asked of subjects that do not exist; other
    relations of them; and beginnings of plain text. No test's prompt is among them."""
    asked = [fact.template.format(name) for fact in facts for name in NAMES.values()]
    relations = [
        about(one, NAMES[kind])
        for each in RELATIONS
        for kind in each.kinds
        for one in each.phrasings
        if not is_question(one)
    ]
    words = PLAIN.split()
    plain = [" ".join(words[max(0, end - 20) : end]) for end in range(8, len(words), 3)]
    rng = random.Random(seed)
    chosen = [rng.sample(some, min(len(some), num // 2)) for some in (asked, relations)]
    mixed = [*chosen[0], *chosen[1], *plain]
    return rng.sample(mixed, min(len(mixed), num))


def divergence(expected_KV: Tensor, logits_KV: Tensor) -> Tensor:
    """The mean KL divergence of what is said from what was expected (log-probabilities)."""
    return F.kl_div(logits_KV.float().log_softmax(-1), expected_KV, log_target=True, reduction="batchmean")


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Parts of one size; the last one may be smaller."""
    return [items[first : first + size] for first in range(0, len(items), size)]


@contextmanager
def _kept_below(model: Model, block: int) -> Iterator[None]:
    """Passes that bring what the block reads skip what lies below it."""
    decoder = find_decoder(model)
    as_tuple: list[bool] = []
    first = decoder.blocks[0].register_forward_hook(lambda *given: as_tuple.append(isinstance(given[2], tuple)))
    with torch.no_grad(), first:
        decoder.module(torch.zeros(1, 2, dtype=torch.long, device=next(decoder.host.parameters()).device))
    begin = decoder.host.register_forward_pre_hook(
        lambda _, args, kwargs: begin_skipping(decoder, block, as_tuple[0], args, kwargs), with_kwargs=True
    )
    end = decoder.host.register_forward_hook(end_skipping, always_call=True)
    try:
        yield
    finally:
        begin.remove()
        end.remove()
        restore_blocks(decoder)
