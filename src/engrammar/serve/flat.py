"""Our models under transformers' continuous batching: flat tokens of many requests, latents in its paged cache.

A memory's ids and windows lie by slot of that cache, as those of attached memories do (`attach.paged`). DeepSeek's
attention caches latents, before it expands them to keys and values: half of them are cached as a key, half as a value.
Letters: T flat tokens of a pass, W width of a latent with its rotary part.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engrammar.attach.paged import STATES, FlatTokens, begin_paged, read_flat
from engrammar.memory import Retrieved
from engrammar.model.modeling import EngrammarForCausalLM

STATE = "the model's own memory"


@final
class Latents:
    """What an attention layer of ours takes for its cache in a flat pass."""

    def __init__(self, given: Mapping[str, Any], tokens: FlatTokens) -> None:
        self.given, self.flat_tokens = given, tokens  # hooks that are called after ours find the tokens here

    def update(self, latent: Tensor, rotary: Tensor, layer_idx: int) -> tuple[Tensor, ...]:
        """Keeps the latents [1, 1, T, ...] of a layer; returns all those that the tokens of this pass may see."""
        widths = (latent.shape[-1], rotary.shape[-1])
        new = torch.cat((latent, rotary), dim=-1)
        halves = F.pad(new, (0, new.shape[-1] % 2)).chunk(2, dim=-1)
        key, value = self.flat_tokens.cache.update(*halves, layer_idx, dict(self.given))
        return torch.cat((key, value), dim=-1)[..., : sum(widths)].split(widths, dim=-1)


def before_pass(
    model: EngrammarForCausalLM, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Reads the rows of a flat pass, and lets the attention cache its latents."""
    if not hasattr(kwargs.get("cache"), "cache_allocators"):
        return None
    tokens = read_flat(kwargs)
    given = {name: value for name, value in kwargs.items() if name != "cache"}
    given |= {"input_ids": tokens.input_ids, "past_key_values": Latents(kwargs, tokens)}
    if model.model.memory is not None:
        given["retrieved"] = retrieve(model, tokens)
    return args, given


def retrieve(model: EngrammarForCausalLM, tokens: FlatTokens) -> Retrieved:
    """Starts reading the rows of a pass; each token has the history and the window of its own request."""
    memory = model.model.memory
    assert memory is not None
    config = memory.config
    begun, history = begin_paged(STATE, config, tokens)
    retrieved = memory.retrieve(tokens.input_ids, tokens.live_T[None], history=history)
    windows: dict[int, Callable[[Tensor], Tensor]] = {}
    if config.conv_kernel:
        windows = {layer: partial(begun.taps, config, layer) for layer in config.layers}
    return replace(retrieved, windows=windows)


def after_pass(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Stamps what a flat pass has written."""
    tokens = getattr(kwargs.get("past_key_values"), "flat_tokens", None)
    state = None if tokens is None else vars(tokens.cache).get(STATES, {}).get(STATE)
    if state is not None:
        state.end(tokens)


@contextmanager
def batched_continuously(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' continuous batching runs a model of ours, and `generate` does not. Others stay as they are.

    transformers sizes its cache by the config of the outermost module: there it finds the width of half a latent, and
    no kinds of layers.
    """
    if not isinstance(model, EngrammarForCausalLM):
        yield
        return
    own = model.config
    view = copy.copy(own)
    view.head_dim = (own.kv_lora_rank + own.qk_rope_head_dim + 1) // 2
    view.num_key_value_heads, view.layer_types = 1, None  # type: ignore[assignment]
    hooks = [
        model.model.register_forward_pre_hook(partial(before_pass, model), with_kwargs=True),
        model.model.register_forward_hook(after_pass, with_kwargs=True),
    ]
    model.config = view
    try:
        yield
    finally:
        model.config = own
        for hook in hooks:
            hook.remove()
