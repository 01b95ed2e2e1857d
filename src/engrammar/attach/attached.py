"""One named memory attached to a model: its tables, and the fusion at each block that reads it.

Letters: B batch, T tokens, M residual branches, D hidden width, E width of a token's rows.
"""

import secrets
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engrammar.attach.blocks import in_branches
from engrammar.attach.paged import FlatPass
from engrammar.attach.state import MemoryState
from engrammar.config import Geometry, MemoryConfig
from engrammar.fusion import Fusion
from engrammar.memory import Memory, Retrieved
from engrammar.table import Tables


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a memory has to know of the model that it is attached to."""

    num_ids: int  # ids of the tokenizer, which the class map covers
    tokenizer_sha256: str  # `vocabulary.fingerprint` of the tokenizer
    vocab_size: int  # rows of the base's token embedding
    hidden_size: int  # D, the width of one residual stream
    num_branches: int  # M, residual streams of the base; 1 in most models
    # For each memory layer, the root mean square of the residual stream at that block. The fusion's output is
    # multiplied by it, so that rows and projections have one size, and learning rates one meaning, at every block of
    # every base.
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Owner:
    """Whose state a cache holds: a memory with equal settings that is attached later is another one."""

    config: MemoryConfig
    key: str


@final
class Projection(nn.Module):
    """The numbers of an `nn.Linear` in a module that is none: PEFT's "all-linear" and quantizers leave it alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@final
class AttachedMemory(nn.Module):
    """The tables of one memory, and its fusions by the index of their block.

    All rows are zero at the start, and the projections have no bias then: nothing is added.
    """

    def __init__(self, config: MemoryConfig, geometry: Geometry, place: Place, tables: Tables = "parameters") -> None:
        super().__init__()
        self.config, self.place = config, place
        self.owner = Owner(config, secrets.token_hex(8))
        self.memory = Memory(
            config, geometry, num_ids=place.num_ids, vocab_size=place.vocab_size, tables=tables
        ).requires_grad_()
        self.fusions = nn.ModuleDict()
        for layer in config.layers:
            fusion = Fusion(config, hidden_size=place.hidden_size, num_branches=place.num_branches)
            # Rows of size 1 then give values of size 1.
            nn.init.normal_(fusion.projection.weight, std=config.memory_dim**-0.5)
            if fusion.projection.bias is not None:
                nn.init.zeros_(fusion.projection.bias)
            fusion.projection = Projection(fusion.projection)  # type: ignore[assignment]
            self.fusions[str(layer)] = fusion
            if (weight_RC := self.memory.table(layer).weight) is not None:
                nn.init.zeros_(weight_RC)

    def begin(self, name: str) -> MemoryState:
        """What this memory, of that name, keeps of a new sequence."""
        windows = dict.fromkeys(self.config.layers, self.config.conv_window) if self.config.conv_window else {}
        return MemoryState(name, self.owner, self.config.max_ngram_size - 1, windows)

    def add(
        self, layer: int, hidden: Tensor, retrieved: Retrieved, state: MemoryState | FlatPass | None, keep_all: bool
    ) -> Tensor:
        """The hidden states that block `layer` reads, in any of a block's shapes, with the memory added."""
        fusion = self.fusions[str(layer)]
        assert isinstance(fusion, Fusion)
        weight = fusion.projection.weight
        embedding_BTE, dead_BT = retrieved.wait(layer)
        assert embedding_BTE is not None

        def local(x: Tensor | None) -> Any:
            return None if x is None else x.to(weight.device)

        streams_BTMD = in_branches(hidden, self.place.hidden_size).to(weight)
        given = streams_BTMD, local(embedding_BTE), local(dead_BT)
        extend: Any
        if isinstance(state, FlatPass):
            extend = partial(state.taps, self.config, layer)
        else:
            track = None if state is None else state.windows.get(layer)
            extend = None if track is None else partial(track.extend, keep_all=keep_all)
        added_BTMD = fusion(*given, local(retrieved.starts_BT), extend)
        scale = self.place.scales[self.config.layers.index(layer)]
        return hidden + (scale * added_BTMD).view_as(hidden).to(hidden)


def first_tokens(ids_BT: Tensor, history_BS: Tensor | None, starts_BT: Tensor | None) -> Tensor:
    """[B, T], True where nothing stands before a token: at the start of a row, after padding, in front of a document.

    Such a token ends no n-gram. Models use the first position as a sink of attention, with a residual far larger than
    elsewhere; it stays as it is.
    """
    last_B1 = torch.full_like(ids_BT[:, :1], -1) if history_BS is None else history_BS[:, -1:]
    before_BT = torch.cat([last_B1, ids_BT[:, :-1]], dim=1)
    return before_BT < 0 if starts_BT is None else (before_BT < 0) | starts_BT
