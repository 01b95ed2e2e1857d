"""The multi-branch residual: manifold-constrained hyper-connections (mHC, arXiv 2512.24880), or the plain residual.

The mixing weights, kept doubly stochastic by Sinkhorn iterations, are transformers' DeepSeek-V4 modules.
Letters: B batch, T tokens, M branches, D hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead


class Residual(nn.Module):
    """Wraps one sub-layer f of a block: takes the streams and returns them with f's output added.

    With one branch it is h + f(norm(h)). With more, f reads a learned mix of the branches, its output is added to each
    with a learned weight, and the branches are mixed by a doubly stochastic matrix.
    """

    def __init__(self, config, norm: nn.Module) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.norm = norm
        self.connection = DeepseekV4HyperConnection(config) if config.num_branches > 1 else None

    def forward(self, streams_BTMD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return add_sublayer(streams_BTMD, self.connection, lambda x_BTD: sublayer(self.norm(x_BTD)))


def add_sublayer(streams_BTMD: Tensor, connection: nn.Module | None, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
    """The streams with the sub-layer's output added, through a hyper-connection if there are several."""
    if connection is None:
        return streams_BTMD + sublayer(streams_BTMD.squeeze(2)).unsqueeze(2)
    post_BTM, mix_BTMM, collapsed_BTD = connection(streams_BTMD)
    output_BTD = sublayer(collapsed_BTD)
    mixed_BTMD = torch.matmul(mix_BTMM.to(streams_BTMD.dtype).transpose(-1, -2), streams_BTMD)
    return post_BTM.to(output_BTD.dtype)[..., None] * output_BTD[..., None, :] + mixed_BTMD


class Collapse(nn.Module):
    """Merges the branches at the end of the model into one stream [B, T, D]."""

    def __init__(self, config) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.head = DeepseekV4HyperHead(config) if config.num_branches > 1 else None

    def forward(self, streams_BTMD: Tensor) -> Tensor:
        return streams_BTMD.squeeze(2) if self.head is None else self.head(streams_BTMD)


class BranchMean(nn.Module):
    """The hidden state [B, T, D] that transformers records after a block (`output_hidden_states`).

    Doubly stochastic mixing leaves the mean of the branches unchanged, so only sub-layers add to it. The mean is thus
    the counterpart of the one residual stream of a model without branches. Its first value is the embedding.
    """

    def forward(self, embedded_BTD: Tensor, streams_BTMD: Tensor) -> Tensor:
        """Takes `embedded_BTD` only for transformers' hook, which also records the first input of the first call."""
        return streams_BTMD.mean(2)
