"""A hashed bigram embedding added before every block, as in the modded-nanogpt speed runs (KellerJordan/modded-nanogpt,
pull request 201).

row = ((36313 * ids[t]) XOR (27191 * ids[t-1])) mod (rows - 1), or the last row if there is no token before. Before
block l the streams gain scale_l * table[row]; the table starts at zero and the scales at 0.05.
Letters: B batch, T tokens, M branches, D hidden width, L layers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from engrammar.config import check_setting
from engrammar_lab.rivals.base import Backbone, Rival, RivalConfig, plan_ngrams, see

MULTIPLIERS = (36313, 27191)
FIRST_SCALE = 0.05


@dataclass(frozen=True, kw_only=True)
class BigramConfig(RivalConfig):
    """`rows`: the rows of the table, 2 or more."""

    rows: int = 1000

    kind: ClassVar[str] = "bigram"
    solved: ClassVar[str] = "rows"

    def build(self, backbone: Backbone) -> "Bigram":
        check_setting("rival.rows", self.rows, self.rows >= 2, "2 or more, one of them for the start of a text")
        return Bigram(self, backbone)


class Bigram(Rival):
    looks_up = "ngrams"

    def __init__(self, config: BigramConfig, backbone: Backbone) -> None:
        super().__init__(config.rows, backbone.hidden_size)
        self.nothing = backbone.vocab_size  # stands for a missing token; no token has this id
        self.plan = plan_ngrams(backbone, max_ngram_size=2, num_tables=1, rows=2, fill_class=self.nothing)
        self.scales = nn.Parameter(torch.empty(backbone.num_layers))

    def init_weights(self, std: float) -> None:
        init.zeros_(self.weight)
        init.constant_(self.scales, FIRST_SCALE)

    def rows(self, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        current_BT, previous_BT = see(self.plan, ids_BT, starts_BT)
        last_row = self.weight.shape[0] - 1
        hashed_BT = (MULTIPLIERS[0] * current_BT ^ MULTIPLIERS[1] * previous_BT) % last_row
        return torch.where(previous_BT == self.nothing, last_row, hashed_BT)

    def before(self, layer: int, streams_BTMD: Tensor, read_BTX: Tensor | None) -> Tensor:
        assert read_BTX is not None
        return streams_BTMD + self.scales[layer] * read_BTX.unsqueeze(2)
