"""Skips the blocks below a memory in passes that bring what those blocks would have computed."""

import re
from functools import partial
from typing import Any

from torch import Tensor, nn

from engrammar.attach.blocks import Decoder

MEDIA = re.compile("pixel|image|video|audio|input_features")  # how arguments of models that read more than text begin
KEPT = "kept_hidden"  # an argument of the causal LM: what the first block with memory reads, [B, T, ...]


def check_frozen(decoder: Decoder, layer: int) -> None:
    """Raises a ValueError if a parameter below block `layer` is trained, or if blocks there cannot be skipped."""
    if any("forward" in vars(module) for block in decoder.blocks[:layer] for module in block.modules()):
        raise ValueError(
            "A kept prefix skips blocks, and other code (accelerate's dispatch) replaces how they compute: keep none."
        )
    below = [decoder.host.get_input_embeddings(), *decoder.blocks[:layer]]  # type: ignore[operator]
    trained = {id(p) for module in below for p in module.parameters() if p.requires_grad}
    if trained:
        name = next(name for name, parameter in decoder.host.named_parameters() if id(parameter) in trained)
        raise ValueError(
            f"{name} is trained, and it lies below the first memory (block {layer}): freeze it "
            "(set_trainable(model, 'memory'); LoRA only from that block on), or keep no prefix."
        )


def begin_skipping(
    decoder: Decoder, layer: int, as_tuple: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a pass of the causal LM: makes the blocks below `layer` hand the kept hidden states through.

    Args:
        as_tuple: whether the blocks return a tuple of one.
    """
    hidden = kwargs.pop(KEPT, None)
    if hidden is None:
        return None
    check_frozen(decoder, layer)
    input_ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(input_ids, Tensor) or hidden.shape[:2] != input_ids.shape:
        raise ValueError(f"{KEPT} is {list(hidden.shape)}: pass it with the input_ids it was computed from.")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ValueError(f"{KEPT} skips blocks, which then leave no keys and values: call with use_cache=False.")
    if media := [name for name, value in kwargs.items() if value is not None and MEDIA.match(name)]:
        raise ValueError(f"{KEPT} was computed from text alone: call without {media[0]}, or without {KEPT}.")
    for block in decoder.blocks[:layer]:
        block.forward = partial(_hand_through, (hidden,) if as_tuple else hidden)
    return args, {**kwargs, "use_cache": False}


def end_skipping(decoder: Decoder, *_: Any) -> None:
    """After the pass: the blocks compute again."""
    for block in decoder.blocks:
        if is_skipped(block):
            del block.forward


def is_skipped(block: nn.Module) -> bool:
    """Whether a block hands kept hidden states through."""
    return getattr(vars(block).get("forward"), "func", None) is _hand_through


def _hand_through(output: Tensor | tuple[Tensor], *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
    return output
