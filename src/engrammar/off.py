"""A model with its memory switched off (paper section 6.3, sensitivity)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engrammar.fusion import Fusion


def adding_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose output is what the memory adds: our fusions, and those of transformers' Qwen4-Exp models.

    The latter are known by name, since older versions of transformers have no such class.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, Fusion) or type(module).__name__ == "Qwen4ExpTextPLELayer"
    ]


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """In this context the memory adds nothing, as if every gate were 0, or every row.

    Raises:
        ValueError: the model has no memory.
    """
    modules = adding_modules(model)
    if not modules:
        raise ValueError(
            "memory_off was given a model without memory; allowed: models with `config.memory`, and Qwen4-Exp models."
        )
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output)) for module in modules
    ]
    torch.compiler.reset()  # compiled code does not notice hooks that come or go
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.compiler.reset()
