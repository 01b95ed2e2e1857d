"""Over-Encoding: hashed n-grams in the input embedding (Over-Tokenized Transformer, arXiv 2501.16975, section 3).

An n-gram's id is its tokens read as digits of base V, ids[t] + ids[t-1]*V + ..., with 0 for a token that is missing.
Each order has k tables of different sizes m_i and width D/k. The row is the id mod m_i; each table has its own matrix
that projects rows to D. The input is the mean of the token's embedding and the k*(N-1) projected rows. Here the sizes
are primes.
Letters: B batch, T tokens, D hidden width, C row width, J = k*(N-1) tables.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engrammar.config import check_setting
from engrammar_lab.rivals.base import Backbone, Rival, RivalConfig, plan_ngrams, see


@dataclass(frozen=True, kw_only=True)
class OverEncodingConfig(RivalConfig):
    """`rows` of each table, and `num_tables` (k) of each order from 2 to `max_ngram_size`."""

    rows: int = 1000
    num_tables: int = 4
    max_ngram_size: int = 3

    kind: ClassVar[str] = "over_encoding"
    solved: ClassVar[str] = "rows"

    def build(self, backbone: Backbone) -> "OverEncoding":
        divides = backbone.hidden_size % self.num_tables == 0
        check_setting("rival.num_tables", self.num_tables, divides, f"divisors of {backbone.hidden_size}")
        return OverEncoding(self, backbone)


class OverEncoding(Rival):
    looks_up = "ngrams"

    def __init__(self, config: OverEncodingConfig, backbone: Backbone) -> None:
        plan = plan_ngrams(
            backbone,
            max_ngram_size=config.max_ngram_size,
            num_tables=config.num_tables,
            rows=config.rows,
            fill_class=0,
        )
        _, geometry = plan
        width = backbone.hidden_size // config.num_tables
        super().__init__(geometry.num_rows(0), width)
        self.plan = plan
        self.projection = nn.Linear(len(geometry.head_sizes(0)) * width, backbone.hidden_size, bias=False)

    def rows(self, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        """Rows of the one table, [B, T, J], by order, then table."""
        _, geometry = self.plan
        ngram_BT, *earlier = see(self.plan, ids_BT, starts_BT)
        columns = []
        for position, (seen_BT, sizes_K) in enumerate(zip(earlier, geometry.table_sizes[0]), start=1):
            ngram_BT = ngram_BT + seen_BT * geometry.num_classes**position
            columns += [ngram_BT % size for size in sizes_K]
        return torch.stack(columns, -1) + torch.tensor(geometry.head_offsets(0), device=ids_BT.device)

    def embed(self, embeds_BTD: Tensor, read_BTX: Tensor | None) -> Tensor:
        assert read_BTX is not None
        num_tables = read_BTX.shape[-2]
        return (embeds_BTD + self.projection(read_BTX.flatten(-2))) / (1 + num_tables)
