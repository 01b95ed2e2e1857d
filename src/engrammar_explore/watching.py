"""What each memory layer reads and adds in a pass, recorded by hooks on its fusion.

Letters: B batch (1 here), T tokens, M residual branches, D hidden width, E width of a token's rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from engrammar.attach import disabled
from engrammar.attach.attaching import attachment_of
from engrammar.attach.blocks import host_of
from engrammar.edit import applied_patches, without_patches
from engrammar.fusion import Fusion
from engrammar.memory import Memory
from engrammar.model import EngrammarModel
from engrammar.off import memory_off

OWN = "memory"  # what the memory of our own models is called
Compare = Literal["memory", "patches", "both"]  # what is switched off in the pass that a text is compared with


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A block at which a memory adds."""

    name: str  # the memory's
    layer: int
    memory: Memory
    fusion: Fusion
    scale: float  # what the fusion's output is multiplied by before it is added


@dataclass(frozen=True, eq=False)
class Recorded:
    """What happened at one place in a pass of one text, in fp32 on the CPU."""

    place: Place
    gate_TM: Tensor  # the gates, 0 where the memory is silent (a first token, padding, a missing row)
    embedding_TE: Tensor  # the rows as they were read
    value_TD: Tensor  # what the gate scales
    # The norms of what is added to the residual streams, and of the streams.
    added_T: Tensor
    stream_T: Tensor


def places_of(model: nn.Module) -> list[Place]:
    """Where the memories of a model add, from the first block up; none in a plain model."""
    found = []
    host = host_of(model)
    backbone = getattr(host, "model", None)
    if isinstance(backbone, EngrammarModel) and backbone.memory is not None:
        for layer in backbone.memory.config.layers:
            fusion: Any = backbone.layers[layer].fusion
            found.append(Place(name=OWN, layer=layer, memory=backbone.memory, fusion=fusion, scale=1.0))
    attachment = attachment_of(model)
    for name, attached in ({} if attachment is None else attachment.memories()).items():
        for layer, scale in zip(attached.config.layers, attached.place.scales, strict=True):
            one: Any = attached.fusions[str(layer)]
            found.append(Place(name=name, layer=layer, memory=attached.memory, fusion=one, scale=scale))
    return sorted(found, key=lambda place: place.layer)


@contextmanager
def watching(places: Sequence[Place]) -> Iterator[list[Recorded]]:
    """In this context each pass of one text adds a `Recorded` for each place."""
    found: list[Recorded] = []
    with ExitStack() as stack:
        for place in places:
            stack.callback(place.fusion.register_forward_hook(partial(_record, place, found)).remove)
        yield found


@torch.no_grad()
def _record(place: Place, found: list[Recorded], fusion: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    hidden_BTMD, embedding_BTE, dead_BT = args[:3]
    gate_BTM, value_BTD = place.fusion.gate(hidden_BTMD, embedding_BTE)
    if dead_BT is not None:
        gate_BTM = gate_BTM.masked_fill(dead_BT[..., None], 0.0)
    added_T = place.scale * output[0].float().flatten(1).norm(dim=-1)
    arrays = gate_BTM[0], embedding_BTE[0], value_BTD[0], added_T, hidden_BTMD[0].float().flatten(1).norm(dim=-1)
    found.append(Recorded(place, *(array.detach().float().cpu() for array in arrays)))


def comparisons(model: nn.Module) -> list[Compare]:
    """What can be switched off in a model; nothing in a plain one."""
    has = {"memory": bool(places_of(model)), "patches": bool(applied_patches(model))}
    has["both"] = all(has.values())
    return [kind for kind in get_args(Compare) if has[kind]]


@contextmanager
def switched_off(model: nn.Module, compare: Compare | None) -> Iterator[None]:
    """In this context the memory, the patches or both are off; with None the model is as it is.

    Rows that a patch replaces stay replaced, as in `without_patches`.

    Raises:
        ValueError: the model has no such thing.
    """
    if compare is not None and compare not in comparisons(model):
        can = ", ".join(comparisons(model)) or "nothing"
        raise ValueError(f"compare is {compare!r}; allowed: {', '.join(get_args(Compare))}; this model has {can}.")
    with ExitStack() as stack:
        if compare in ("memory", "both"):
            stack.enter_context(disabled(model) if attachment_of(model) is not None else nullcontext())
            own = isinstance(getattr(host_of(model), "model", None), EngrammarModel)
            stack.enter_context(memory_off(model) if own else nullcontext())
        if compare in ("patches", "both"):
            stack.enter_context(without_patches(model))
        yield
