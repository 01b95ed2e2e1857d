"""A model with its memory switched off (paper section 6.3, sensitivity).

Letters: B batch, T tokens, M branches, D hidden width, E width of a token's rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from engrammar.fusion import Fusion


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """Within it every gate of the model is 0, so no fusion adds anything; gates are as before after it.

    Raises:
        ValueError: the model has no memory.
    """
    fusions = [module for module in model.modules() if isinstance(module, Fusion)]
    if not fusions:
        raise ValueError("memory_off was given a model without memory; allowed: models with `config.memory`.")
    for fusion in fusions:
        fusion.__dict__["gate"] = partial(_closed_gate, fusion)  # before the method of the same name
    try:
        yield
    finally:
        for fusion in fusions:
            del fusion.__dict__["gate"]


def _closed_gate(fusion: Fusion, hidden_BTMD: Tensor, embedding_BTE: Tensor) -> tuple[Tensor, Tensor]:
    gate_BTM, value_BTD = Fusion.gate(fusion, hidden_BTMD, embedding_BTE)
    return torch.zeros_like(gate_BTM), value_BTD
