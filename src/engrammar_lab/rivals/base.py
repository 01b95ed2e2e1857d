"""What a rival of the memory is to the backbone: what it looks up, what it adds, and which table holds its parameters.

Letters: B batch, T tokens, M branches, D hidden width, R rows of the table, C row width, X whatever a rival looks up.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from engrammar.addressing import look_back, table_sizes
from engrammar.config import Geometry, MemoryConfig, check_setting
from engrammar.table import SparseTable, gather_rows


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a rival needs to know of its model. `end_ids` end a text; no n-gram crosses one."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    norm_eps: float
    end_ids: tuple[int, ...]


class Rival(SparseTable, ABC):
    """Looks up by token ids before the first block (`read`), and adds to the embeddings and before each block.

    It keeps no state between calls. `weight` [R, C] is a table that is trained as memory is: touched rows
    only, by the row optimizer.
    """

    weight: nn.Parameter
    # What `read` looks up by. A model whose rival looks up n-grams reads whole texts; it cannot continue from a
    # cache.
    looks_up: ClassVar[Literal["tokens", "ngrams"]] = "tokens"

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def init_weights(self, std: float) -> None:
        """Initializes the parameters outside linear layers; `std` is the backbone's."""
        init.normal_(self.weight, mean=0.0, std=std)

    def rows(self, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor | None:
        """Rows that ids look up, [B, T, ...]. An id is -1 where masked; `starts_BT` is True where a text begins."""
        return None

    def read(self, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor | None:
        """What stands in those rows, [B, T, ..., C]."""
        rows = self.rows(ids_BT, starts_BT)
        return None if rows is None else gather_rows(self.weight, rows)

    def embed(self, embeds_BTD: Tensor, read_BTX: Tensor | None) -> Tensor:
        """The input embeddings, as the rival changes them."""
        return embeds_BTD

    def before(self, layer: int, streams_BTMD: Tensor, read_BTX: Tensor | None) -> Tensor:
        """The residual streams that block `layer` reads."""
        return streams_BTMD


@dataclass(frozen=True, kw_only=True)
class RivalConfig(ABC):
    """The sizes of a rival, integers of 1 or more (a layer: 0 or more)."""

    kind: ClassVar[str]  # its name in `EngrammarConfig.rival`
    solved: ClassVar[str]  # the setting that gives its table a share of the parameters (`budget.solve_budget`)

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "layer")
            is_count = type(value) is int and value >= least
            check_setting(f"rival.{field.name}", value, is_count, f"an integer of {least} or more")

    @property
    def smallest(self) -> int:
        """The smallest value of the solved setting."""
        return 2

    @abstractmethod
    def build(self, backbone: Backbone) -> Rival:
        """The module, with parameters that are not yet initialized.

        Raises:
            ValueError: it does not fit the backbone.
        """

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


def plan_ngrams(
    backbone: Backbone, *, max_ngram_size: int, num_tables: int, rows: int, fill_class: int
) -> tuple[MemoryConfig, Geometry]:
    """The settings that `addressing.look_back` needs: the memory's boundary on raw ids, and primes as table sizes."""
    config = MemoryConfig(
        layers=(0,),
        max_ngram_size=max_ngram_size,
        num_heads=num_tables,
        rows_per_head=(rows,) * (max_ngram_size - 1),
        compression="none",
        boundary="end" if backbone.end_ids else "row",
        end_ids=backbone.end_ids,
    )
    geometry = Geometry(
        num_classes=backbone.vocab_size, fill_class=fill_class, multipliers=(), table_sizes=table_sizes(config)
    )
    return config, geometry


def see(plan: tuple[MemoryConfig, Geometry], ids_BT: Tensor, starts_BT: Tensor | None) -> list[Tensor]:
    """The ids 0, 1, ... positions back, [B, T] each; the plan's fill class where there is none."""
    config, geometry = plan
    return look_back(ids_BT, config=config, geometry=geometry, starts_BT=starts_BT)
