"""Counting parameters, and trading experts for memory at equal total and active parameters (paper section 3).

"Active" parameters multiply a token: all but the tables, the routed experts that a token does not visit, and the input
embedding (which is a lookup). "Inactive" ones are those experts and the tables; rho is the experts' share of them. With
these definitions the paper's 27B pair has its rho of 74.3 %.
Letters: V ids of the vocabulary.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engrammar.addressing import derive_geometry
from engrammar.config import MemoryConfig
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import model_class
from engrammar.table import SparseTable


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model, and what one token reads of its memory.

    `total = active + inactive + input_embedding` (the last is 0 if it is tied to the head).
    """

    total_parameters: int
    active_parameters: int
    inactive_parameters: int
    memory_parameters: int
    input_embedding_parameters: int
    memory_rows: int
    bytes_per_token: int

    @property
    def rho(self) -> float:
        """The experts' share of the inactive parameters; 1.0 without memory or without inactive parameters."""
        return 1 - self.memory_parameters / self.inactive_parameters if self.inactive_parameters else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rho": self.rho}


def count_parameters(config: EngrammarConfig) -> Counts:
    """Counts the parameters of the model that `config` describes, built on the meta device (it takes no memory)."""
    with torch.device("meta"):
        model = model_class(config)(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    modules = [module for module in model.modules() if isinstance(module, SparseTable)]
    tables = [module.weight for module in modules if module.weight is not None]
    memory = sum(table.numel() for table in tables)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    visited = config.num_experts_per_tok / config.n_routed_experts
    idle_experts = experts - round(experts * visited)
    embedding = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    total = sum(sizes.values())
    memory_config = config.memory_config
    return Counts(
        total_parameters=total,
        active_parameters=total - memory - idle_experts - embedding,
        inactive_parameters=memory + idle_experts,
        memory_parameters=memory,
        input_embedding_parameters=embedding,
        memory_rows=sum(len(table) for table in tables),
        bytes_per_token=memory_config.bytes_per_token if memory_config else 0,
    )


class Share(ABC):
    """Tables that get the share 1 - rho of the inactive parameters; their size is solved for."""

    @abstractmethod
    def sized(self, size: int) -> "Share":
        """The same share with tables of that size."""

    def check(self, size: int, rho: float) -> None:  # noqa: B027 (most tables may have any size)
        """Raises a ValueError if tables of that size are too small."""

    @abstractmethod
    def table_parameters(self, plain: EngrammarConfig) -> int:
        """Parameters of the tables in a model with the backbone of `plain`."""

    @abstractmethod
    def configure(self, settings: dict[str, Any]) -> EngrammarConfig:
        """The config of a model with these tables and the given settings."""


@dataclass(frozen=True, kw_only=True)
class MemoryShare(Share):
    """A memory whose `rows_per_head` is solved for; `classes_V` is the class map of a compressed vocabulary."""

    memory: MemoryConfig
    classes_V: NDArray[np.int64] | None = None

    def sized(self, size: int) -> "MemoryShare":
        return replace(self, memory=replace(self.memory, rows_per_head=(size,) * len(self.memory.orders)))

    def table_parameters(self, plain: EngrammarConfig) -> int:
        tables = derive_geometry(self.memory, num_classes=1, fill_class=0)
        layers = range(len(self.memory.layers))
        return self.memory.head_dim * sum(tables.num_stored_rows(index) for index in layers)

    def configure(self, settings: dict[str, Any]) -> EngrammarConfig:
        if self.classes_V is not None:
            fill_class = int(self.classes_V[self.memory.fill_id])
            settings = settings | {"num_classes": int(self.classes_V.max()) + 1, "fill_class": fill_class}
        return EngrammarConfig(**(settings | {"memory": self.memory.to_json()}))


def solve_budget(plain: EngrammarConfig, share: Share | MemoryConfig, *, rho: float) -> EngrammarConfig:
    """Moves a share 1 - rho of a plain MoE's inactive parameters from experts into tables (section 3).

    Total and active parameters stay the same: whole experts are removed, the tables fill their place, and the leading
    dense layers are narrowed by what the projections add. Both totals are met to within one unit (one more row per
    head, one column of the dense layers).

    Args:
        plain: a model without memory that has routed experts and at least one leading dense layer.
        share: the tables, whose size is solved for. A `MemoryConfig` is used as its `MemoryShare`.
        rho: the experts' share of the inactive parameters, in (0, 1].

    Returns:
        A config with tables of that size; `plain` itself at rho = 1.

    Raises:
        ValueError: rho is out of range, or the budget leaves too little room for the tables or the experts.
    """
    if plain.memory is not None or type(plain) is not EngrammarConfig or not 0 < rho <= 1:
        raise ValueError(f"solve_budget takes a model without memory and a rho in (0, 1]; got rho={rho}.")
    if rho == 1:
        return plain
    share = MemoryShare(memory=share) if isinstance(share, MemoryConfig) else share
    target = count_parameters(plain)
    idle, expert = _idle_experts(plain, target.inactive_parameters, rho)
    settings = plain.to_dict() | {"n_routed_experts": idle + plain.num_experts_per_tok}
    del settings["model_type"]  # each class sets its own

    def build(width: int, size: int) -> EngrammarConfig:
        return share.sized(size).configure(settings | {"intermediate_size": width})

    def fit(room: int) -> int:
        return _size_that_fits(lambda size: share.sized(size).table_parameters(plain), room)

    size = fit(target.inactive_parameters - idle * expert)  # the projections may depend on it
    share.check(size, rho)
    excess = count_parameters(build(plain.intermediate_size, size)).active_parameters - target.active_parameters
    width = plain.intermediate_size - round(excess / (3 * plain.hidden_size * plain.first_k_dense_replace))
    if width < 1:
        raise ValueError(
            f"The memory's projections add {excess:,} active parameters, more than the dense layers' "
            f"intermediate_size={plain.intermediate_size} can give up: use a narrower memory or fewer branches."
        )
    bare = count_parameters(build(width, size))
    return build(width, fit(target.total_parameters - (bare.total_parameters - bare.memory_parameters)))


def _idle_experts(plain: EngrammarConfig, inactive_parameters: int, rho: float) -> tuple[int, int]:
    """The number of idle experts that have the share rho of the inactive parameters, and one's size over all layers."""
    dense_layers = plain.first_k_dense_replace
    expert = 3 * plain.hidden_size * plain.moe_intermediate_size * (plain.num_hidden_layers - dense_layers)
    idle = round(rho * inactive_parameters / expert) if expert else 0
    if dense_layers < 1 or idle < 1:
        raise ValueError(
            f"At rho={rho} a model needs a leading dense layer to narrow and an idle expert to keep, but this one has "
            f"{dense_layers} dense layers and would keep {idle} idle experts."
        )
    return idle, expert


def _size_that_fits(parameters: Callable[[int], int], room: int) -> int:
    """The size whose tables are nearest to `room` parameters (they may grow in jumps: some sizes are primes)."""
    most = 2
    while parameters(most) < room:
        most *= 2
    above = bisect.bisect_left(range(2, most), room, key=parameters) + 2
    return min((max(above - 1, 2), above), key=lambda size: abs(parameters(size) - room))
