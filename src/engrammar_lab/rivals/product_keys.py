"""Product-key memory: values found by the hidden state, not by token ids (Lample et al., arXiv 1907.05242).

Per head a query q = norm(W x) is cut into halves. Each half scores n sub-keys, and the k best of each half make k*k
pairs (i, j) with score q1.c_i + q2.c'_j. The softmax over the k best pairs weighs rows i*n + j of one table of n*n
values, which all heads share (section 3.1). Here the result is added to the streams before one block, and x is the
normed mean of the branches. The queries' batch norm is an RMSNorm here: a batch norm would carry state and mix texts.
Letters: B batch, T tokens, M branches, D hidden width, H heads, Q query width, n sub-keys of a half, k pairs kept.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from engrammar.config import check_setting
from engrammar.fusion import rms_norm
from engrammar.table import gather_rows
from engrammar_lab.rivals.base import Backbone, Rival, RivalConfig


@dataclass(frozen=True, kw_only=True)
class ProductKeysConfig(RivalConfig):
    """`num_keys` (n) of each half, `num_heads` (H), `query_dim` (Q, even), `top_k` (k); added before block `layer`."""

    num_keys: int = 32
    num_heads: int = 2
    query_dim: int = 32
    top_k: int = 16
    layer: int = 1

    kind: ClassVar[str] = "product_keys"
    solved: ClassVar[str] = "num_keys"

    @property
    def smallest(self) -> int:
        return self.top_k

    def build(self, backbone: Backbone) -> "ProductKeys":
        check_setting("rival.query_dim", self.query_dim, self.query_dim % 2 == 0, "even numbers")
        check_setting("rival.num_keys", self.num_keys, self.num_keys >= self.top_k, f"top_k={self.top_k} or more")
        check_setting("rival.layer", self.layer, self.layer < backbone.num_layers, f"0 to {backbone.num_layers - 1}")
        return ProductKeys(self, backbone)


class ProductKeys(Rival):
    def __init__(self, config: ProductKeysConfig, backbone: Backbone) -> None:
        super().__init__(config.num_keys**2, backbone.hidden_size)
        self.config, self.norm_eps = config, backbone.norm_eps
        self.input_norm = nn.Parameter(torch.empty(backbone.hidden_size))
        self.query = nn.Linear(backbone.hidden_size, config.num_heads * config.query_dim, bias=False)
        self.query_norm = nn.Parameter(torch.empty(config.num_heads, config.query_dim))
        self.keys = nn.Parameter(torch.empty(config.num_heads, 2, config.num_keys, config.query_dim // 2))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.ones_(self.input_norm)
        init.ones_(self.query_norm)
        init.normal_(self.keys, mean=0.0, std=self.keys.shape[-1] ** -0.5)  # gives the scores of a half unit size

    def find(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B, T, H, k] and their weights, which sum to one over k."""
        config = self.config
        query_BTHQ = self.query(x_BTD).unflatten(-1, (config.num_heads, config.query_dim))
        halves_BTHsq = rms_norm(query_BTHQ, self.query_norm, self.norm_eps).unflatten(-1, (2, -1))
        scores_BTHsn = torch.einsum("bthsq,hsnq->bthsn", halves_BTHsq, self.keys)
        best_BTHsk, keys_BTHsk = scores_BTHsn.topk(config.top_k)
        pairs_BTHkk = best_BTHsk[..., 0, :, None] + best_BTHsk[..., 1, None, :]
        rows_BTHkk = keys_BTHsk[..., 0, :, None] * config.num_keys + keys_BTHsk[..., 1, None, :]
        best_BTHk, pair_BTHk = pairs_BTHkk.flatten(-2).topk(config.top_k)
        return rows_BTHkk.flatten(-2).gather(-1, pair_BTHk), best_BTHk.softmax(-1)

    def before(self, layer: int, streams_BTMD: Tensor, read_BTX: Tensor | None) -> Tensor:
        if layer != self.config.layer:
            return streams_BTMD
        rows_BTHk, weights_BTHk = self.find(rms_norm(streams_BTMD.mean(2), self.input_norm, self.norm_eps))
        values_BTHkD = gather_rows(self.weight, rows_BTHk)
        added_BTD = torch.einsum("bthk,bthkd->btd", weights_BTHk, values_BTHkD)
        return streams_BTMD + added_BTD.unsqueeze(2)
