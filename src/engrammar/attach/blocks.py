"""Finds a model's decoder blocks by structure, and measures the residual stream that they read.

Letters: B batch, T tokens, M residual branches, D hidden width.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

PATCHES = "engrammar_patches"  # the attribute of a causal LM that holds what `engrammar.edit` has applied to it
REFUSED = "memory is attached to causal language models of transformers."


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The part of a model that takes token ids and runs its blocks one after another."""

    host: nn.Module  # the causal LM around it, without PEFT's wrapper
    module: nn.Module  # the decoder, whose `forward` takes `input_ids`
    blocks: nn.ModuleList  # its blocks, in order
    argument: str  # the name of the blocks' first argument, the hidden states
    hidden_size: int  # D, the width of one residual stream

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return int(self.host.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def host_of(model: nn.Module) -> nn.Module:
    """The causal LM inside PEFT's wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def find_decoder(model: nn.Module) -> Decoder:
    """Finds the decoder and its blocks.

    They are the longest `ModuleList` of a module whose `forward` takes `input_ids`, all of whose members take the
    same first argument, which is not ids.

    Raises:
        ValueError: there is none, or several are equally long.
    """
    host = host_of(model)
    config = getattr(host, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(host).__name__} has no config of a decoder-only model: {REFUSED}")
    found = [
        (module, child)
        for module in host.modules()
        if "input_ids" in first_parameters(module)
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) and _are_blocks(child)
    ]
    longest = max((len(blocks) for _, blocks in found), default=0)
    found = [(module, blocks) for module, blocks in found if len(blocks) == longest]
    if len(found) != 1:
        what = f"{len(found)} lists of {longest} blocks each" if found else "no list of decoder blocks"
        raise ValueError(f"{type(host).__name__} has {what}: {REFUSED}")
    module, blocks = found[0]
    argument, hidden_size = first_parameters(blocks[0])[0], config.get_text_config().hidden_size
    return Decoder(host=host, module=module, blocks=blocks, argument=argument, hidden_size=hidden_size)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module's first weight computes on; accelerate may keep it elsewhere until it is used."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            hook: Any = part._hf_hook if has_offloaded_params(part) else None
            return parameter.device if hook is None else torch.device(hook.execution_device)
    return torch.device("cpu")


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor of numbers, not quantized."""
    return weight.is_floating_point() and weight.itemsize > 1 and type(weight.data) is Tensor


def first_parameters(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's `forward`, in order."""
    return list(inspect.signature(module.forward).parameters)


def _are_blocks(blocks: nn.ModuleList) -> bool:
    firsts = {tuple(first_parameters(block)[:1]) for block in blocks}
    return len(firsts) == 1 and firsts.isdisjoint({(), ("input_ids",), ("args",)})


def hidden_of(argument: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a block's call gives it as hidden states: its first argument, by place or by name."""
    return args[0] if args else kwargs.get(argument)


def with_hidden(
    hidden: Any, argument: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's call with other hidden states, as a forward pre-hook returns it."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, argument: hidden})


def in_branches(hidden: Tensor, hidden_size: int) -> Tensor:
    """The hidden states that a block reads, [B, T, D], [B, T, M, D] or [B, T, M*D], as [B, T, M, D]."""
    return hidden.view(*hidden.shape[:2], -1, hidden_size)


@torch.no_grad()
def measure(decoder: Decoder, input_ids: Tensor) -> list[tuple[int, float]]:
    """For each block, its number of residual branches M and the median root mean square of its residual streams.

    The first position is left out: many models keep a hundred times the usual norm there.

    Args:
        input_ids: [1, T] ids of some text.

    Raises:
        ValueError: a block is not called once with hidden states that it returns in the same shape.
    """
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(hidden_of(decoder.argument, args, kwargs))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        left.append(output if isinstance(output, Tensor) else output[0])

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in decoder.blocks]
    hooks += [block.register_forward_hook(leave) for block in decoder.blocks]
    try:
        with evaluating(decoder.host):
            decoder.module(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    shapes = {tuple(hidden.shape) if isinstance(hidden, Tensor) else None for hidden in (*entered, *left)}
    shape = next(iter(shapes))
    as_expected = len(entered) == len(left) == len(decoder.blocks) and len(shapes) == 1 and shape is not None
    if not as_expected or shape[:2] != tuple(input_ids.shape) or entered[0][0, 0].numel() % decoder.hidden_size:
        raise ValueError(
            f"{type(decoder.module).__name__} does not pass hidden states of one shape through its "
            f"{len(decoder.blocks)} blocks: {REFUSED}"
        )
    sizes = [in_branches(hidden, decoder.hidden_size).float().pow(2).mean(-1).sqrt()[:, 1:] for hidden in entered]
    return [(rms.shape[-1], float(rms.median())) for rms in sizes]


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Puts a model into evaluation (or training), and each of its modules back afterwards.

    What torch.compile has compiled is not used meanwhile: it would not notice hooks.
    """
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in before:
            module.training = training
