"""Skips the blocks below a memory in passes that bring what those blocks would have computed."""

import re
from contextvars import ContextVar
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor, nn

from engrammar.attach.blocks import Decoder

MEDIA = re.compile("pixel|image|video|audio|input_features")  # how arguments of models that read more than text begin
# Arguments of the causal LM: what the first block with memory reads, [B, T, ...], and the index of that block, [B].
KEPT, KEPT_BLOCK = "kept_hidden", "kept_block"
# In the pass under way in this thread: the decoder whose first blocks are skipped, and what they return.
_kept: ContextVar[tuple[nn.Module, Any] | None] = ContextVar("engrammar_kept", default=None)


def parts_below(decoder: Decoder, layer: int) -> list[nn.Module]:
    """What runs before block `layer`: the embeddings, the decoder's parts that stand before its blocks, and blocks."""
    first = decoder.blocks[0]
    children = list(decoder.module.children())
    before = next(index for index, child in enumerate(children) if any(module is first for module in child.modules()))
    parts = [decoder.host.get_input_embeddings(), *children[:before], *decoder.blocks[:layer]]  # type: ignore[operator]
    return list(dict.fromkeys(parts))


def check_frozen(decoder: Decoder, layer: int) -> None:
    """Raises a ValueError if a parameter below block `layer` is trained, or if blocks there cannot be skipped."""
    modules = [module for block in decoder.blocks[:layer] for module in block.modules()]
    if any("forward" in vars(module) and not _can_skip(module) for module in modules):
        raise ValueError(
            "A kept prefix skips blocks, and other code (accelerate's dispatch) replaces how they compute: keep none."
        )
    trained = {id(p) for module in parts_below(decoder, layer) for p in module.parameters() if p.requires_grad}
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
    _kept.set(None)  # an interrupted pass may have left its own
    hidden, kept_block = kwargs.pop(KEPT, None), kwargs.pop(KEPT_BLOCK, None)
    if hidden is None:
        return None
    if kept_block is None or bool((kept_block != layer).any()):
        blocks = "unknown blocks" if kept_block is None else f"block {int(kept_block[kept_block != layer][0])}"
        raise ValueError(
            f"{KEPT} is what {blocks} reads, and the first memory is at block {layer}: pass {KEPT_BLOCK} beside it, or "
            "call keep_prefix again with the memories that are attached now."
        )
    check_frozen(decoder, layer)
    input_ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(input_ids, Tensor) or hidden.shape[:2] != input_ids.shape:
        raise ValueError(f"{KEPT} is {list(hidden.shape)}: pass it with the input_ids it was computed from.")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ValueError(f"{KEPT} skips blocks, which then leave no keys and values: call with use_cache=False.")
    if media := [name for name, value in kwargs.items() if value is not None and MEDIA.match(name)]:
        raise ValueError(f"{KEPT} was computed from text alone: call without {media[0]}, or without {KEPT}.")
    for block in decoder.blocks[:layer]:
        if not _can_skip(block):
            forward = partial(_compute_or_hand_through, block, decoder.module)
            block.forward = update_wrapper(forward, block.forward)
    _kept.set((decoder.module, (hidden,) if as_tuple else hidden))
    return args, {**kwargs, "use_cache": False}


def end_skipping(*_: Any) -> None:
    """After the pass: the blocks compute again."""
    _kept.set(None)


def restore_blocks(decoder: Decoder) -> None:
    """Gives the blocks their own `forward` back, as they had it before the first pass that skipped them."""
    for block in decoder.blocks:
        if _can_skip(block):
            del block.forward


def is_skipped(block: nn.Module) -> bool:
    """Whether a block hands kept hidden states through in the pass under way."""
    kept, forward = _kept.get(), vars(block).get("forward")
    return kept is not None and _can_skip(block) and forward.args[1] is kept[0]  # type: ignore[union-attr]


def _can_skip(block: nn.Module) -> bool:
    return getattr(vars(block).get("forward"), "func", None) is _compute_or_hand_through


def _compute_or_hand_through(block: nn.Module, decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a block that passes may skip; in other threads, and other passes, it computes."""
    kept = _kept.get()
    return type(block).forward(block, *args, **kwargs) if kept is None or kept[0] is not decoder else kept[1]
