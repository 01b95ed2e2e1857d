"""Finds by gradient what is to be added at some tokens so that a model goes on as wanted. Its weights stay as they are.

Letters: N texts, S tokens from the first write on, M residual streams, W writes, K scored tokens, G groups or
values, D width of a value, P rows of X numbers that are sought, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engrammar.attach.blocks import device_of, find_decoder, hidden_of, in_branches, with_hidden
from engrammar.attach.passes import cache_in

Adding = Callable[[nn.Module, "Added"], RemovableHandle]  # hooks a model, whose passes are changed until it is removed
MOMENTS, DECAY = (0.9, 0.99), 0.05  # of Adam


@final
@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that is read again and again with other values."""

    ids: tuple[int, ...]
    written: tuple[int, ...]  # the places at which a value is added, ascending; the first token is none of them
    values: tuple[int, ...]  # the value that is added at each of them
    group: int  # what the text is about: its losses are summed with those of the same group
    scored: tuple[int, ...]  # the places whose next token counts
    says: tuple[int, ...] | None = None  # the tokens wanted there; None: what the model expects without the value

    def __post_init__(self) -> None:
        assert len(self.written) == len(self.values) > 0
        assert 0 < self.written[0] <= min(self.scored) and max(self.scored) < len(self.ids)


@final
@dataclass(eq=False)
class Added:
    """What is added in a pass: at each place of a batch, a `row` and a `token` [W], the value of a `number` [W]."""

    row: Tensor
    token: Tensor
    number: Tensor
    values_GD: Tensor | None = None  # None: nothing is added
    seen_WD: Tensor | None = None  # what stood there in the last pass, the mean over residual streams

    def to(self, x_NSMD: Tensor) -> Tensor:
        """A tensor with the values added, to each of its streams."""
        self.seen_WD = x_NSMD[self.row, self.token].detach().float().mean(1)
        if self.values_GD is None:
            return x_NSMD
        added_WD = self.values_GD[self.number].to(x_NSMD)
        added_WMD = added_WD[:, None].expand(-1, x_NSMD.shape[2], -1)
        return x_NSMD.index_put((self.row, self.token), added_WMD, accumulate=True)


def at_block(block: int) -> Adding:
    """Values are added to the input of a block, before a memory there reads it, as an exact entry adds them."""

    def adding(model: nn.Module, added: Added) -> RemovableHandle:
        decoder = find_decoder(model)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            hidden = hidden_of(decoder.argument, args, kwargs)
            changed = added.to(in_branches(hidden, decoder.hidden_size)).view_as(hidden)
            return with_hidden(changed, decoder.argument, args, kwargs)

        return decoder.blocks[block].register_forward_pre_hook(before, with_kwargs=True, prepend=True)

    return adding


@final
class Texts:
    """Some texts as one batch. What stands before the first write is computed once."""

    def __init__(self, model: nn.Module, texts: Sequence[Text], adding: Adding) -> None:
        self.model, self.adding, self.texts = model, adding, texts
        self.decoder = find_decoder(model)
        device = device_of(self.decoder.module)
        first = [text.written[0] for text in texts]
        num_before = max(first)
        num_after = max(len(text.ids) - one for text, one in zip(texts, first))
        ids = torch.zeros(len(texts), num_before + num_after, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (text, one) in enumerate(zip(texts, first)):  # the first writes stand below each other
            place = slice(num_before - one, num_before - one + len(text.ids))
            ids[row, place], mask[row, place] = torch.tensor(text.ids), 1
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.num_before = num_before
        row_W, token_W = self._places([text.written for text in texts], first)
        number_W = torch.tensor([number for text in texts for number in text.values], device=device)
        self.added = Added(row_W, token_W, number_W)
        self.row_K, self.token_K = self._places([text.scored for text in texts], first)
        said = [one for text in texts for one in (text.says or [-1] * len(text.scored))]
        self.said_K = torch.tensor(said, device=device)
        self.group_N = torch.tensor([text.group for text in texts], device=device)
        with torch.no_grad():
            before = slice(0, num_before)
            read = {"attention_mask": self.mask[:, before], "position_ids": self.positions[:, before]}
            self.cache = cache_in(self.decoder.module(self.ids[:, before], **read, use_cache=True))
            if self.cache is None:
                raise ValueError(
                    f"{type(self.decoder.host).__name__} keeps no cache of transformers: its values are not optimized."
                )
            self.without_KV = self.logits(None).float().log_softmax(-1)

    def _places(self, places: Sequence[Sequence[int]], first: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row, and token from the first write on, of some places of each text."""
        found = [(row, place - first[row]) for row, own in enumerate(places) for place in own]
        row, token = torch.tensor(found, device=self.ids.device).T
        return row, token

    def logits(self, values_GD: Tensor | None) -> Tensor:
        """The logits [K, V] at all scored places, with the values of each group added."""
        self.added.values_GD = values_GD
        head: Any = self.decoder.host.get_output_embeddings()  # type: ignore[operator]

        def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            return (args[0][self.row_K, self.token_K][None],)

        after = slice(self.num_before, None)
        given = {"attention_mask": self.mask, "position_ids": self.positions[:, after]}
        with self.adding(self.model, self.added), head.register_forward_pre_hook(choose):
            cache = copy.deepcopy(self.cache)
            return self.decoder.host(self.ids[:, after], **given, past_key_values=cache, use_cache=True).logits[0]

    def losses(self, logits_KV: Tensor) -> tuple[Tensor, Tensor]:
        """Of each text: the nats of what is wanted or the KL divergence from what was expected, a mean over its scored
        places; and whether all that is wanted is the likeliest. [N] each."""
        log_KV = logits_KV.float().log_softmax(-1)
        said_K = self.said_K.clamp_min(0)
        nats_K = -log_KV.gather(1, said_K[:, None])[:, 0]
        kl_K = (self.without_KV.exp() * (self.without_KV - log_KV)).sum(-1)
        wants_K = self.said_K >= 0
        missed_K = (log_KV.argmax(-1) != said_K) & wants_K
        return self._sum(torch.where(wants_K, nats_K, kl_K)) / self._sum(torch.ones_like(nats_K)), (
            self._sum(missed_K.float()) == 0
        )

    def _sum(self, each_K: Tensor) -> Tensor:
        """[N], the sum over the scored places of each text."""
        return torch.zeros(len(self.texts), device=each_K.device).index_add(0, self.row_K, each_K)


@final
@dataclass(frozen=True, kw_only=True)
class Descent:
    """How values are found."""

    steps: int  # at most
    stop: float  # nats at which what is wanted is said surely enough
    kl: float  # how much a nat of change elsewhere counts
    most: float  # the largest size of a row of what is sought, in its scale
    lr: float = 0.15  # of Adam, in the same


@final
@dataclass(frozen=True, kw_only=True)
class Sought:
    """Numbers [P, X] that are sought, and how values are made of them."""

    scale_P: Tensor  # the size that a number has at first, for each row of them
    group_P: Tensor  # the group that a row belongs to
    width: int  # X
    spread: Callable[[Tensor], Tensor] | None = None  # makes values_GD of them; None: they are the values

    def values(self, unit_PX: Tensor) -> Tensor:
        found_PX = unit_PX * self.scale_P[:, None]
        return found_PX if self.spread is None else self.spread(found_PX)


def one_value_a_group(texts: Texts) -> Sought:
    """The value of each group, in sizes of what it is added to."""
    seen_WD, number_W = texts.added.seen_WD, texts.added.number
    assert seen_WD is not None
    size_W, num_groups = seen_WD.square().mean(-1).sqrt(), int(texts.group_N.max()) + 1
    scale_G = torch.stack([size_W[number_W == group].median() for group in range(num_groups)])
    return Sought(scale_P=scale_G, group_P=torch.arange(num_groups, device=scale_G.device), width=seen_WD.shape[1])


def descend(texts: Texts, sought: Sought, how: Descent) -> Tensor:
    """What is sought, found_PX: Adam from zero, in its units. A group stops when all that it wants is said.

    What is found of a group does not depend on the others, but for the rounding of other batch shapes.
    """
    num_groups = int(texts.group_N.max()) + 1
    unit_PX = torch.zeros(len(sought.scale_P), sought.width, device=sought.scale_P.device)
    optimizer = torch.optim.Adam([unit_PX.requires_grad_()], lr=how.lr, betas=MOMENTS)
    for step in range(how.steps + 1):
        loss_G, said_G = _by_group(texts, texts.logits(sought.values(unit_PX)), how.kl, num_groups)
        done_G = said_G & (loss_G < how.stop)
        if step == how.steps or bool(done_G.all()):
            break
        (unit_PX.grad,) = torch.autograd.grad((loss_G * ~done_G).sum(), [unit_PX])
        with torch.no_grad():
            before_PX, done_P = unit_PX.clone(), done_G[sought.group_P]
            optimizer.step()
            unit_PX.mul_(1 - DECAY * how.lr)
            size_P1 = unit_PX.square().mean(1, keepdim=True).sqrt()
            unit_PX.mul_((how.most / size_P1.clamp_min(1e-12)).clamp_max(1))
            unit_PX[done_P] = before_PX[done_P]
    return (unit_PX * sought.scale_P[:, None]).detach()


def _by_group(texts: Texts, logits_KV: Tensor, kl: float, num_groups: int) -> tuple[Tensor, Tensor]:
    """Of each group [G]: the mean nats of its texts that want something and `kl` times the mean KL of the others; and
    whether all is said."""
    loss_N, said_N = texts.losses(logits_KV)
    wants_N = torch.tensor([text.says is not None for text in texts.texts], device=loss_N.device)

    def mean(counted_N: Tensor) -> Tensor:
        nothing_G = torch.zeros(num_groups, device=loss_N.device)
        number_G = nothing_G.index_add(0, texts.group_N, counted_N.float())
        return nothing_G.index_add(0, texts.group_N, loss_N * counted_N) / number_G.clamp_min(1)

    return mean(wants_N) + kl * mean(~wants_N), mean(~said_N) == 0


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight takes a gradient inside a `with` block, so that passes keep nothing for it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
