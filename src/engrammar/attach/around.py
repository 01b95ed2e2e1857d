"""Ids of models that read images or sound too: they embed them around the decoder, which sees embeddings alone."""

import re
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engrammar.attach.blocks import Decoder, first_parameters

PLACEHOLDER = re.compile("(image|video|audio)_token_(id|index)")  # settings that name an id in whose place media stand

# What the calls under way in this thread were given, the innermost last: mask, positions, ids (-1 where media stand).
_noted: ContextVar[tuple[Mapping[str, Any], ...]] = ContextVar("engrammar_noted", default=())


def as_called(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a decoder's pass; to embeddings alone come ids, mask and positions of the call around it.

    Where an image or sound stands there is no token: the id is -1, as at padding. Positions that the model around makes
    itself mark no documents, and may begin at 1 (PaliGemma).
    """
    embedded = given.get("inputs_embeds")
    if given.get("input_ids") is None and isinstance(embedded, Tensor) and _noted.get():
        noted = _noted.get()[-1]
        if noted and noted["input_ids"].shape == embedded.shape[:2]:
            return {**given, **noted}
    return given


def note_ids(decoder: Decoder) -> list[RemovableHandle]:
    """If the decoder is a part of a model that reads more than text, places hooks on the module that embeds its ids."""
    config: Any = decoder.host.config
    if config.get_text_config() is config:
        return []
    configs = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    (name,) = (name for name, module in decoder.host.named_modules() if module is decoder.module)
    parts = name.split(".")
    enclosing = [decoder.host.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    around = next((module for module in reversed(enclosing) if "input_ids" in first_parameters(module)), None)
    if around is None:
        return []
    settings = [item for one in configs if one is not None for item in vars(one).items()]
    ids = {value for key, value in settings if PLACEHOLDER.fullmatch(key) and isinstance(value, int)}
    before = partial(_before, first_parameters(around), torch.tensor(sorted(ids), dtype=torch.long))
    return [
        around.register_forward_pre_hook(before, with_kwargs=True),
        around.register_forward_hook(_after, always_call=True),
    ]


@torch.compiler.disable
def _before(
    arguments: list[str], media: Tensor, around: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = dict(zip(arguments, args)) | kwargs
    noted, input_ids = {}, given.get("input_ids")
    if input_ids is not None:
        input_ids = input_ids.masked_fill(torch.isin(input_ids, media.to(input_ids.device)), -1)
        noted = {"input_ids": input_ids, **{name: given.get(name) for name in ("attention_mask", "position_ids")}}
    _noted.set((*_noted.get(), noted))


@torch.compiler.disable
def _after(*_: Any) -> None:
    _noted.set(_noted.get()[:-1])


def text_positions(position_ids: Any) -> Any:
    """The positions [B, T] of tokens as text, if a row is given for each axis of an image ([axes, B, T]).

    The first of four rows holds them. Of three, a document starts where all are 0, and its tokens are counted.
    """
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 3:
        return position_ids
    if len(position_ids) == 4:
        return position_ids[0]
    place_T = torch.arange(position_ids.shape[-1], device=position_ids.device)
    starts_BT = (position_ids == 0).all(dim=0)
    return place_T - torch.where(starts_BT, place_T, -1).cummax(dim=-1).values
