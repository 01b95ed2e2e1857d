"""Recognizes the model that a memory was attached to: its shape, and some values of some of its weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from engrammar.attach.blocks import Decoder, is_plain
from engrammar.tables.shards import is_table

NUM_WEIGHTS, NUM_VALUES = 24, 8  # how much of a model is looked at
TOLERANCE = 2.0**-7  # of a value: a model in bf16 is the one in fp32


def fingerprint_of(decoder: Decoder) -> dict[str, Any]:
    """What a base is recognized by, as JSON.

    `weights` holds NUM_VALUES values, evenly spread, of NUM_WEIGHTS weights, evenly spread. Quantized weights are left
    out.
    """
    weights = dict(_weights(decoder.host))
    names = [name for name, weight in weights.items() if is_plain(weight.parameter) and weight.is_there]
    last = len(names) - 1
    chosen = [names[index * last // (NUM_WEIGHTS - 1)] for index in range(NUM_WEIGHTS)] if names else []
    return {
        "class": type(decoder.host).__name__,
        "blocks": len(decoder.blocks),
        "hidden_size": decoder.hidden_size,
        "vocab_size": decoder.vocab_size,
        "weights": {name: weights[name].values() for name in dict.fromkeys(chosen)},
    }


def check_base(decoder: Decoder, saved: Mapping[str, Any], source: str) -> None:
    """Compares a model with the fingerprint that was saved; weights that are quantized now are not compared.

    Raises:
        ValueError: the model is another one; names what differs.
    """
    weights = dict(_weights(decoder.host))
    sizes = {"blocks": len(decoder.blocks), "hidden_size": decoder.hidden_size, "vocab_size": decoder.vocab_size}
    for key, value in sizes.items():
        if saved[key] != value:
            raise ValueError(f"{source} is of a model with {key} {saved[key]}, this one has {value}: {OTHER}")
    modules, compared = dict(decoder.host.named_modules(remove_duplicate=False)), 0
    for name, values in saved["weights"].items():
        if name not in weights and name.rpartition(".")[0] in modules:
            continue  # quantizers keep weights under other names
        if name not in weights:
            raise ValueError(f"{source} is of a {saved['class']} with a weight {name}, which this one lacks: {OTHER}")
        if not is_plain(weights[name].parameter):
            continue
        found = weights[name].values()
        compared += 1
        same = len(found) == len(values) and all(
            math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-6) for one, other in zip(found, values)
        )
        if not same:
            there, here = _short(values), _short(found)
            raise ValueError(f"{source} is of a model with another {name} ({there} there, {here} here): {OTHER}")
    if saved["weights"] and not compared:
        raise ValueError(f"Every weight that {source} recognizes its base by is quantized here: {OTHER}")


OTHER = "load it on the model that it was saved from."


@dataclass(frozen=True)
class _Weight:
    """A weight, and where accelerate finds it if it is offloaded."""

    module: nn.Module
    name: str  # in that module
    parameter: nn.Parameter

    @property
    def is_there(self) -> bool:
        return not self.parameter.is_meta or has_offloaded_params(self.module)

    @torch.no_grad()
    def values(self) -> list[float]:
        with align_module_device(self.module):
            flat = getattr(self.module, self.name).detach().reshape(-1)
            places = torch.arange(NUM_VALUES, device=flat.device) * max(len(flat) - 1, 0) // (NUM_VALUES - 1)
            return [float(value) for value in flat[places].float().cpu()]


def _weights(host: nn.Module) -> Iterator[tuple[str, _Weight]]:
    """The base's own weights by name; what PEFT and attached memories added is left out, and so are its own tables,
    which may be in a store."""
    for name, parameter in host.named_parameters():
        if not name.startswith("engrammar.") and ".lora_" not in name and not is_table(name):
            module, _, leaf = name.rpartition(".")
            yield name.replace(".base_layer.", "."), _Weight(host.get_submodule(module), leaf, parameter)


def _short(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:2]) + ", ..."
