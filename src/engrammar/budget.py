"""Counting parameters, and trading experts for memory at equal total and active parameters (paper section 3).

"Active" are the parameters that multiply a token: all but the memory tables, the routed experts a token does not
visit, and the input embedding (which is a lookup). "Inactive" are those experts and the tables; rho is the experts'
share of them. With these definitions the paper's 27B pair comes out at its rho of 74.3 %.
"""

import bisect
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engrammar.addressing import derive_geometry
from engrammar.checkpoint import is_table
from engrammar.config import Geometry, MemoryConfig
from engrammar.configuration import EngrammarConfig
from engrammar.modeling import EngrammarForCausalLM


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model, and what one token reads of its memory.

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
    memory = sum(size for name, size in sizes.items() if is_table(name))
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
        memory_rows=memory // memory_config.head_dim if memory_config else 0,
        bytes_per_token=memory_config.bytes_per_token if memory_config else 0,
    )


def solve_budget(
    plain: EngrammarConfig, memory: MemoryConfig, *, rho: float, classes_V: NDArray[np.int64] | None = None
) -> EngrammarConfig:
    """Moves a share 1 - rho of a plain MoE's inactive parameters from experts into memory tables.

    Total and active parameters stay as they are: whole experts leave, rows per head fill what they leave, and the
    leading dense layers narrow by what the memory's projections add. Each is met to within one unit (one more row per
    head, one column of the dense layers).

    Args:
        plain: a model without memory that has routed experts and at least one leading dense layer.
        memory: layers, heads and row width to use; its `rows_per_head` is solved for.
        rho: the experts' share of inactive parameters, in (0, 1].
        classes_V: class map of the tokenizer, where the memory is compressed.

    Returns:
        A config with memory; `plain` itself at rho = 1.

    Raises:
        ValueError: rho is out of range, or the budget leaves no room for it.
    """
    if plain.memory is not None or not 0 < rho <= 1:
        raise ValueError(f"solve_budget takes a model without memory and a rho in (0, 1]; got rho={rho}.")
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
    num_classes, fill_class = plain.num_classes, plain.fill_class
    if classes_V is not None:
        num_classes, fill_class = int(classes_V.max()) + 1, int(classes_V[memory.fill_id])
    experts = idle + plain.num_experts_per_tok
    settings = plain.to_dict() | {"n_routed_experts": experts, "num_classes": num_classes, "fill_class": fill_class}

    def build(width: int, rows: int) -> EngrammarConfig:
        sized = replace(memory, rows_per_head=(rows,) * len(memory.orders))
        return EngrammarConfig(**(settings | {"intermediate_size": width, "memory": sized.to_json()}))

    smallest = build(plain.intermediate_size, 2)
    excess = count_parameters(smallest).active_parameters - target.active_parameters
    width = plain.intermediate_size - round(excess / (3 * plain.hidden_size * dense_layers))
    if width < 1:
        raise ValueError(
            f"The memory's projections add {excess:,} active parameters, more than the dense layers' "
            f"intermediate_size={plain.intermediate_size} can give up: use a narrower memory or fewer branches."
        )
    bare = count_parameters(build(width, 2))
    room = target.total_parameters - (bare.total_parameters - bare.memory_parameters)
    return build(width, _rows_that_fit(memory, room, smallest.memory_geometry))


def _rows_that_fit(memory: MemoryConfig, room: int, geometry: Geometry) -> int:
    """The rows per head whose tables come nearest to `room` parameters (sizes are primes, so it moves in jumps)."""

    def parameters(rows: int) -> int:
        sized = replace(memory, rows_per_head=(rows,) * len(memory.orders))
        tables = derive_geometry(sized, num_classes=geometry.num_classes, fill_class=geometry.fill_class)
        return memory.head_dim * sum(tables.num_stored_rows(index) for index in range(len(memory.layers)))

    most = max(room // (memory.head_dim * memory.num_columns * len(memory.layers)), 2)
    above = bisect.bisect_left(range(2, most + 1), room, key=parameters) + 2
    return min((max(above - 1, 2), above), key=lambda rows: abs(parameters(rows) - room))
