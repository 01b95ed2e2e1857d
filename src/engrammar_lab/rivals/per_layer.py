"""Per-layer embeddings, as in Gemma 3n: every block has its own narrow embedding of the token.

Source: transformers' `gemma3n`. Before block l the streams gain norm_l(W_up_l (gelu(W_gate_l x) * e_l[id] * sqrt(P))),
where x is the normed mean of the branches and e_l a table [V, P].
Left out: Gemma's second term in the gate's product, a projection of the input embedding. Gemma's embeddings, and its
norm's weight, start at unit size; here both start at `initializer_range`.
Letters: B batch, T tokens, M branches, D hidden width, L layers, P width of a layer's embedding, V ids.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from engrammar.fusion import rms_norm
from engrammar_lab.rivals.base import Backbone, Rival, RivalConfig


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig(RivalConfig):
    """`width`: P, the width of a layer's embedding."""

    width: int = 16

    kind: ClassVar[str] = "per_layer"
    solved: ClassVar[str] = "width"

    def build(self, backbone: Backbone) -> "PerLayer":
        return PerLayer(self, backbone)


class PerLayer(Rival):
    def __init__(self, config: PerLayerConfig, backbone: Backbone) -> None:
        super().__init__(backbone.num_layers * backbone.vocab_size, config.width)
        self.vocab_size, self.norm_eps = backbone.vocab_size, backbone.norm_eps
        layers, width = range(backbone.num_layers), backbone.hidden_size
        self.gates = nn.ModuleList([nn.Linear(width, config.width, bias=False) for _ in layers])
        self.ups = nn.ModuleList([nn.Linear(config.width, width, bias=False) for _ in layers])
        self.input_norms = nn.Parameter(torch.empty(backbone.num_layers, width))
        self.output_norms = nn.Parameter(torch.empty(backbone.num_layers, width))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.ones_(self.input_norms)
        init.constant_(self.output_norms, std)

    def rows(self, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        first_rows_L = torch.arange(len(self.gates), device=ids_BT.device) * self.vocab_size
        return ids_BT.clamp_min(0)[..., None] + first_rows_L

    def before(self, layer: int, streams_BTMD: Tensor, read_BTX: Tensor | None) -> Tensor:
        assert read_BTX is not None
        embedding_BTP = read_BTX[..., layer, :] * read_BTX.shape[-1] ** 0.5
        input_BTD = rms_norm(streams_BTMD.mean(2), self.input_norms[layer], self.norm_eps)
        gated_BTP = F.gelu(self.gates[layer](input_BTD), approximate="tanh") * embedding_BTP
        added_BTD = rms_norm(self.ups[layer](gated_BTP), self.output_norms[layer], self.norm_eps)
        return streams_BTMD + added_BTD.unsqueeze(2)
