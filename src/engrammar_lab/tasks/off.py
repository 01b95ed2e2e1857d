"""A model with its memory switched off (paper section 6.3, sensitivity)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engrammar.fusion import Fusion


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """In this context no fusion adds anything, as if every gate were 0.

    Raises:
        ValueError: the model has no memory.
    """
    fusions = [module for module in model.modules() if isinstance(module, Fusion)]
    if not fusions:
        raise ValueError("memory_off was given a model without memory; allowed: models with `config.memory`.")
    hooks = [
        fusion.register_forward_hook(lambda _fusion, _inputs, output: torch.zeros_like(output)) for fusion in fusions
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
