"""Counting parameters, and trading experts for memory at equal total and active parameters (paper section 3).

"Active" are the parameters that multiply a token: all but the tables of the memory or of a rival, the routed experts a
token does not visit, and the input embedding (which is a lookup). "Inactive" are those experts and the tables; rho is
the experts' share of them. With these definitions the paper's 27B pair comes out at its rho of 74.3 %.
"""

import bisect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engrammar.addressing import derive_geometry
from engrammar.config import MemoryConfig
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.rivals import RivalConfig
from engrammar.table import SparseTable


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model, and what one token reads of its memory (`bytes_per_token` is 0 for a rival).

    `total = active + inactive + input_embedding` (the last is 0 where it is tied to the head).
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
        """Share of the inactive parameters that experts have; 1.0 without memory, and without any inactive."""
        return 1 - self.memory_parameters / self.inactive_parameters if self.inactive_parameters else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rho": self.rho}


def count_parameters(config: EngrammarConfig) -> Counts:
    """Builds the model on the meta device (no memory is touched) and counts it."""
    with torch.device("meta"):
        model = EngrammarForCausalLM(config)
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


def solve_budget(
    plain: EngrammarConfig,
    memory: MemoryConfig | RivalConfig,
    *,
    rho: float,
    classes_V: NDArray[np.int64] | None = None,
) -> EngrammarConfig:
    """Moves a share 1 - rho of a plain MoE's inactive parameters from experts into tables of a memory or a rival.

    Total and active parameters stay as they are: whole experts leave, the tables' size fills what they leave, and the
    leading dense layers narrow by what the projections add. Each is met to within one unit (one more row per head, or
    whatever setting a rival's `solved` names; one column of the dense layers).

    Args:
        plain: a model without memory that has routed experts and at least one leading dense layer.
        memory: layers, heads and row width to use, its `rows_per_head` being solved for; or a rival.
        rho: the experts' share of inactive parameters, in (0, 1].
        classes_V: class map of the tokenizer, where the memory is compressed.

    Returns:
        A config with memory or the rival; `plain` itself at rho = 1.

    Raises:
        ValueError: rho is out of range, or the budget leaves no room for it.
    """
    if plain.memory is not None or plain.rival is not None or not 0 < rho <= 1:
        raise ValueError(f"solve_budget takes a model without memory or rival and a rho in (0, 1]; got rho={rho}.")
    if rho == 1:
        return plain
    target = count_parameters(plain)
    dense_layers = plain.first_k_dense_replace
    expert_layers = plain.num_hidden_layers - dense_layers
    expert = 3 * plain.hidden_size * plain.moe_intermediate_size * expert_layers
    idle = round(rho * target.inactive_parameters / expert) if expert else 0
    if dense_layers < 1 or idle < 1:
        raise ValueError(
            f"At rho={rho} a model needs a leading dense layer to narrow and an idle expert to keep, but this one has "
            f"{dense_layers} dense layers and would keep {idle} idle experts."
        )
    settings = plain.to_dict() | {"n_routed_experts": idle + plain.num_experts_per_tok}
    if classes_V is not None and isinstance(memory, MemoryConfig):
        settings |= {"num_classes": int(classes_V.max()) + 1, "fill_class": int(classes_V[memory.fill_id])}

    def build(width: int, size: int) -> EngrammarConfig:
        name = "rival" if isinstance(memory, RivalConfig) else "memory"
        return EngrammarConfig(**(settings | {"intermediate_size": width, name: _sized(memory, size).to_json()}))

    def fit(room: int) -> int:
        return _size_that_fits(lambda size: _table_parameters(_sized(memory, size), plain), room)

    size = fit(target.inactive_parameters - idle * expert)  # a rival's projections may depend on it
    if isinstance(memory, RivalConfig) and size < memory.smallest:
        raise ValueError(f"At rho={rho} there is no room for rival.{memory.solved}={memory.smallest}, its least.")
    excess = count_parameters(build(plain.intermediate_size, size)).active_parameters - target.active_parameters
    width = plain.intermediate_size - round(excess / (3 * plain.hidden_size * dense_layers))
    if width < 1:
        raise ValueError(
            f"The memory's projections add {excess:,} active parameters, more than the dense layers' "
            f"intermediate_size={plain.intermediate_size} can give up: use a narrower memory or fewer branches."
        )
    bare = count_parameters(build(width, size))
    return build(width, fit(target.total_parameters - (bare.total_parameters - bare.memory_parameters)))


def _sized(memory: MemoryConfig | RivalConfig, size: int) -> MemoryConfig | RivalConfig:
    if isinstance(memory, RivalConfig):
        return replace(memory, **{memory.solved: max(size, memory.smallest)})
    return replace(memory, rows_per_head=(size,) * len(memory.orders))


def _table_parameters(memory: MemoryConfig | RivalConfig, plain: EngrammarConfig) -> int:
    if isinstance(memory, RivalConfig):
        with torch.device("meta"):
            return memory.build(plain.backbone).weight.numel()
    tables = derive_geometry(memory, num_classes=1, fill_class=0)
    return memory.head_dim * sum(tables.num_stored_rows(index) for index in range(len(memory.layers)))


def _size_that_fits(parameters: Callable[[int], int], room: int) -> int:
    """The size whose tables come nearest to `room` parameters (they may grow in jumps: some sizes are primes)."""
    most = 2
    while parameters(most) < room:
        most *= 2
    above = bisect.bisect_left(range(2, most), room, key=parameters) + 2
    return min((max(above - 1, 2), above), key=lambda size: abs(parameters(size) - room))
