"""Models for benches: presets with as many rows as a bench wants, and random weights."""

from typing import Any

import torch

from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.model.presets import preset
from engrammar.table import Tables


def with_rows(name: str, rows_per_head: int, **memory: Any) -> EngrammarConfig:
    """A preset with that many rows per head of each order, and other settings of its memory."""
    own = preset(name).memory_config
    assert own is not None
    return preset(name, memory={"rows_per_head": [rows_per_head] * len(own.orders), **memory})


def random_model(config: EngrammarConfig, tables: Tables = "parameters") -> EngrammarForCausalLM:
    """A model with random weights, the same ones each time; in its memory each id is a class of its own."""
    torch.manual_seed(0)
    model = EngrammarForCausalLM(config, tables=tables)
    if model.model.memory is not None:
        model.model.memory.set_classes(torch.arange(config.vocab_size))
    return model
