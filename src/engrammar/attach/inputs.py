"""Reads a decoder's call: ids, padding, positions and cache, and refuses what a memory could not answer rightly.

Letters: B batch, T tokens, P positions, cached ones included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from engrammar.attach.around import as_called, text_positions
from engrammar.attach.state import positions_in
from engrammar.model.modeling import check_follow

CACHES = ("past_key_values", "cache_params")
OTHER_STATES = ("mems", "state", "past_buckets_states", "cache")  # what else a model may carry from pass to pass


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a pass of a decoder was called with."""

    input_ids: Tensor  # [B, T]; -1 where an image or sound stands
    mask_BT: Tensor | None  # False at padding; None if nothing is padded
    position_ids: Tensor | None  # [B or 1, T], if they may mark packed documents; else None
    cache: Cache | None
    seen: int | None  # positions in that cache; None if it cannot say
    caches: bool  # whether later passes may go on from this one


def read_inputs(decoder: nn.Module, given: Mapping[str, Any]) -> Inputs:
    """Reads the arguments of a decoder's `forward`.

    Raises:
        ValueError: there are no ids; the cache is of a kind that cannot hold a memory's state; the mask has another
            shape; or positions mark packed documents although the pass is cached.
    """
    given = as_called(given)
    input_ids = given.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError("A model with memory looks up token ids: pass input_ids [batch, tokens], not inputs_embeds.")
    for name in OTHER_STATES:
        if given.get(name) is not None:
            raise ValueError(
                f"A memory keeps its state in a cache of transformers, and {name} is none: detach the memory, or call "
                "the model in disabled(model)."
            )
    cache = cache_given(given)
    if cache is not None and not (isinstance(cache, Cache) and hasattr(cache, "layers")):
        raise ValueError(
            f"A {type(cache).__name__} has no place for a memory's state: pass a DynamicCache or StaticCache, or "
            "use_cache=False."
        )
    seen = positions_in(cache)
    use_cache = given.get("use_cache")
    will_cache = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
    caches = cache is not None or bool(will_cache)
    mask_BT = new_mask(given.get("attention_mask"), input_ids, seen)
    position_ids = given.get("position_ids")
    in_axes = isinstance(position_ids, Tensor) and position_ids.ndim == 3  # after an image they do not count tokens
    position_ids = text_positions(position_ids)
    if caches and mask_BT is None and position_ids is not None and seen is not None and not (in_axes and seen):
        check_follow(position_ids, seen)
    return Inputs(
        input_ids=input_ids,
        mask_BT=mask_BT,
        position_ids=None if caches else position_ids,
        cache=cache,
        seen=seen,
        caches=caches,
    )


def cache_given(given: Mapping[str, Any]) -> Any:
    """What a pass was given as its cache, of whatever kind; None if it was given none."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)


def new_mask(attention_mask: Any, input_ids: Tensor, seen: int | None) -> Tensor | None:
    """The padding mask [B, T] of the new tokens.

    It is the end of a mask [B, P]. `generate` with a static cache makes a mask [B or 1, 1, T, P], or one for each kind
    of attention, in which a token that is no padding sees itself and the one before it.

    Raises:
        ValueError: the mask has another shape, or hides from a token the one before it.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    num_rows, num_tokens = input_ids.shape
    dims = attention_mask.ndim if isinstance(attention_mask, Tensor) else None
    if dims == 2 and attention_mask.shape[0] == num_rows:
        if seen is None or attention_mask.shape[1] == seen + num_tokens:
            return attention_mask[:, -num_tokens:].bool()
    elif dims == 4 and seen == 0 and attention_mask.shape[-2] == num_tokens <= attention_mask.shape[-1]:
        sees_BTT = attention_mask[:, 0, :, :num_tokens]
        sees_BTT = (sees_BTT if sees_BTT.dtype == torch.bool else sees_BTT == 0).expand(num_rows, -1, -1)
        real_BT = sees_BTT.diagonal(dim1=1, dim2=2)
        neighbours = sees_BTT.diagonal(offset=-1, dim1=1, dim2=2)
        if bool((neighbours | ~real_BT[:, 1:] | ~real_BT[:, :-1]).all()):
            return real_BT
    shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    raise ValueError(
        f"attention_mask is {shape}; a model with memory needs one of [batch, positions] = "
        f"[{num_rows}, {num_tokens + (seen or 0)}], cached positions included: it has to know what stands before a "
        "token."
    )
