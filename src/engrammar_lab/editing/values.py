"""What is to be added to one hidden state of each fact so that the model says it: found by gradient, many at once.

ROME (arXiv 2202.05262, section 3.1, eq. 4) and MEMIT (arXiv 2210.07229, section 4.3, eq. 16) ask for the same value at
the subject's last token; GRACE (arXiv 2211.11031, section 3) for one at the prompt's last token.
Letters: G facts, D hidden width, N texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engrammar.attach.blocks import evaluating, find_decoder
from engrammar.edit import Fact
from engrammar.edit.optimizing import Text, Texts, at_block, frozen
from engrammar_lab.editing.edited import Model
from engrammar_lab.editing.weights import object_ids

EPS, MOMENTS = 1e-8, (0.9, 0.999)  # of Adam


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """How values are found: by Adam, in sizes of the hidden state that a value is added to."""

    steps: int = 20  # at most
    lr: float = 0.3  # in the root mean square of the hidden state
    stop: float = 0.1  # loss, without the decay, at which a fact is done
    kl: float = 0.0625  # how much a nat of change at "SUBJECT is a" counts (lambda of ROME's eq. 4)
    decay: float = 0.01  # how much the value's squared length counts, in that of the hidden state
    most: float = 4.0  # the largest length of a value, in that of the hidden state
    num_prefixes: int = 2  # texts that stand before a prompt, besides none (x_j of both papers)
    prefix_tokens: int = 8  # their length
    together: int = 24  # facts that are optimized at a time


def prefixes(model: Model, tokenizer: Any, settings: ValueSettings, seed: int) -> list[str]:
    """Texts that the model writes after the end of a text, sampled, as both papers' x_j."""
    if settings.num_prefixes == 0:
        return []
    host: Any = find_decoder(model).host
    start = torch.full((settings.num_prefixes, 1), tokenizer.eos_token_id, device=next(host.parameters()).device)
    with torch.random.fork_rng(), torch.no_grad(), evaluating(host):
        torch.manual_seed(seed)
        made = host.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, min_new_tokens=settings.prefix_tokens,
            max_new_tokens=settings.prefix_tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return [" ".join(text.split()) + ". " for text in tokenizer.batch_decode(made[:, 1:], skip_special_tokens=True)]


def at_subject(tokenizer: Any, fact: Fact, before: Sequence[str]) -> list[Text]:
    """A fact's prompt alone and after each prefix, with its object, to be written at the subject's last token; those
    left out in which that is the first token, where models keep a sink."""
    words = object_ids(tokenizer, fact)
    made = []
    for prefix in ("", *before):
        ids, place = located(tokenizer, prefix + fact.prompt, len(prefix) + fact.prompt.index(fact.subject), fact)
        if place > 0:
            scored = tuple(range(len(ids) - 1, len(ids) - 1 + len(words)))
            made.append(_text((*ids, *words[:-1]), place, scored, tuple(words)))
    return made


def what_it_is(tokenizer: Any, fact: Fact, before: Sequence[str]) -> list[Text]:
    """ "SUBJECT is a", where the model should go on as it did: ROME's p' (section 3.1)."""
    for prefix in ("", *before):
        ids, place = located(tokenizer, f"{prefix}{fact.subject} is a", len(prefix), fact)
        if place > 0:
            return [_text(tuple(ids), place, (len(ids) - 1,), None)]
    return []


def at_the_end(tokenizer: Any, fact: Fact) -> list[Text]:
    """A fact's prompt with its object, to be written at the prompt's last token."""
    ids, words = list(tokenizer(fact.prompt).input_ids), object_ids(tokenizer, fact)
    last = len(ids) - 1
    if last == 0:
        return []
    return [_text((*ids, *words[:-1]), last, tuple(range(last, last + len(words))), tuple(words))]


def located(tokenizer: Any, text: str, start: int, fact: Fact) -> tuple[list[int], int]:
    """The tokens of a text, and the place of the one in which the subject that begins at `start` ends."""
    read = tokenizer(text, return_offsets_mapping=True)
    end = start + len(fact.subject)
    place = max(i for i, (first, last) in enumerate(read.offset_mapping) if first < end and last > first)
    return list(read.input_ids), place


def _text(ids: tuple[int, ...], place: int, scored: tuple[int, ...], says: tuple[int, ...] | None) -> Text:
    return Text(ids=ids, written=(place,), values=(0,), group=0, scored=scored, says=says)


def find_values(model: Model, texts: Sequence[Sequence[Text]], block: int, settings: ValueSettings) -> Tensor:
    """What is added to the output of `block` for each fact, [G, D]: Adam on -log P[object], averaged over prefixes,
    plus the KL divergence at other texts, plus a decay, inside a ball (ROME eq. 4, MEMIT eq. 16).

    Facts do not depend on each other. A fact leaves when it is done; the rest go on in a smaller batch.

    Args:
        texts: of each fact, one at least.
    """
    assert all(texts)
    found: list[Tensor] = []
    with frozen(model), evaluating(find_decoder(model).host):
        for first in range(0, len(texts), settings.together):
            found.append(_descend(model, texts[first : first + settings.together], block, settings))
    return torch.cat(found)


@dataclass(eq=False)
class _Adam:
    """Values that are sought [G, D], in units of `scale_G`, with their moments."""

    unit: Tensor
    mean: Tensor
    square: Tensor

    def step(self, grad: Tensor, number: int, settings: ValueSettings) -> None:
        """A step of Adam, then back into the ball."""
        self.mean.lerp_(grad, 1 - MOMENTS[0])
        self.square.lerp_(grad.square(), 1 - MOMENTS[1])
        size = (self.square / (1 - MOMENTS[1] ** number)).sqrt() + EPS
        self.unit -= settings.lr * self.mean / (1 - MOMENTS[0] ** number) / size
        length = self.unit.square().mean(1, keepdim=True).sqrt().clamp_min(EPS)  # 1: as long as the hidden state
        self.unit *= (settings.most / length).clamp_max(1)

    def at(self, rows: Tensor) -> "_Adam":
        return _Adam(self.unit[rows], self.mean[rows], self.square[rows])


def _descend(model: Model, texts: Sequence[Sequence[Text]], block: int, settings: ValueSettings) -> Tensor:
    running = list(range(len(texts)))
    read = _read(model, texts, block)
    scale_G = _scale(read, len(texts))
    zeros_GD = torch.zeros(len(texts), find_decoder(model).hidden_size, device=scale_G.device)
    found_GD, scale_R = zeros_GD.clone(), scale_G
    adam = _Adam(zeros_GD.clone(), zeros_GD.clone(), zeros_GD.clone())
    for number in range(1, settings.steps + 2):
        unit = adam.unit.detach().requires_grad_()
        far_R = _far(read, read.logits(unit * scale_R[:, None]), len(running), settings.kl)
        losses_R = far_R + settings.decay * unit.square().mean(1)
        left = torch.nonzero(far_R.detach() >= settings.stop)[:, 0]
        if number > settings.steps or len(left) == 0:
            break
        (grad,) = torch.autograd.grad(losses_R.sum(), [unit])
        if 2 * len(left) <= len(running):  # the others are done: their values stay as they are now
            found_GD[running] = (unit * scale_R[:, None]).detach()
            running = [running[i] for i in left.tolist()]
            adam, scale_R, grad = adam.at(left), scale_R[left], grad[left]
            read = _read(model, [texts[i] for i in running], block)
            left = torch.arange(len(running))
        before = adam.unit.clone()
        adam.step(grad, number, settings)
        done = torch.ones(len(running), dtype=torch.bool)
        done[left] = False
        adam.unit[done] = before[done]
    found_GD[running] = (adam.unit * scale_R[:, None]).detach()
    return found_GD


def _read(model: Model, texts: Sequence[Sequence[Text]], block: int) -> Texts:
    numbered = [replace(text, group=g, values=(g,)) for g, own in enumerate(texts) for text in own]
    return Texts(model, numbered, at_block(block + 1))


def _scale(read: Texts, num: int) -> Tensor:
    """[G]: the root mean square of what a fact's value is added to, a mean over its texts."""
    assert read.added.seen_WD is not None
    size_N = read.added.seen_WD.square().mean(1).sqrt()
    return _mean(size_N, torch.ones_like(size_N), read.group_N, num)


def _far(read: Texts, logits_KV: Tensor, num: int, kl: float) -> Tensor:
    """[G], ROME's eq. 4: the nats of the object, and what changes elsewhere."""
    loss_N, _ = read.losses(logits_KV)
    wants_N = torch.tensor([text.says is not None for text in read.texts], device=loss_N.device)
    nats_G, kl_G = (_mean(loss_N, one.float(), read.group_N, num) for one in (wants_N, ~wants_N))
    return nats_G + kl * kl_G


def _mean(each_N: Tensor, counted_N: Tensor, group_N: Tensor, num: int) -> Tensor:
    zeros_G = torch.zeros(num, device=each_N.device)
    total_G, number_G = (zeros_G.index_add(0, group_N, one) for one in (each_N * counted_N, counted_N))
    return total_G / number_G.clamp_min(1)
