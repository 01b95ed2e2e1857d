"""Fusion of retrieved rows with the hidden state (paper section 2.3): keys, gate, value, convolution.

Letters: B batch, T tokens, M residual branches, D hidden width, E width of a token's rows, C = M*D channels,
S = window + T positions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engrammar.config import MemoryConfig


class Fusion(nn.Module):
    """One memory layer's fusion: `forward(hidden, embedding) -> what is added to the residual`.

    One matrix product computes the value and the M keys (one key if the branches share it, none without a gate). The
    module keeps no state: the caller stores the convolution's window.
    """

    def __init__(self, config: MemoryConfig, *, hidden_size: int, num_branches: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.num_branches = num_branches
        self.num_keys = 0 if config.gate == "none" else num_branches if config.branch_keys == "each" else 1
        self.projection = nn.Linear(config.memory_dim, (self.num_keys + 1) * hidden_size, bias=config.bias == "learned")
        if self.num_keys:
            self.key_norm = nn.Parameter(torch.ones(self.num_keys, hidden_size))
            self.query_norm = nn.Parameter(torch.ones(num_branches, hidden_size))
        if config.conv_kernel:
            self.conv_norm = nn.Parameter(torch.ones(num_branches, hidden_size))
            self.conv_weight = nn.Parameter(torch.zeros(num_branches * hidden_size, 1, config.conv_kernel))
            if config.conv_init == "default":
                nn.init.kaiming_uniform_(self.conv_weight, a=math.sqrt(5))  # as nn.Conv1d does

    def gate(self, hidden_BTMD: Tensor, embedding_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """The gate of each branch, from 0 to 1, and the value that it scales (equations 3 and 4).

        With `gate="none"` the gate is 1.

        Returns:
            gate_BTM, value_BTD.
        """
        projected = self.projection(embedding_BTE.to(self.projection.weight.dtype))
        if self.config.gate == "none":
            return projected.new_ones(hidden_BTMD.shape[:-1]), projected
        value_BTD, key_BTMD = projected.split([self.hidden_size, self.num_keys * self.hidden_size], dim=-1)
        key_BTMD = key_BTMD.unflatten(-1, (self.num_keys, self.hidden_size))
        eps = self.config.key_norm_eps
        key_BTMD = rms_norm(key_BTMD, self.key_norm, eps)
        query_BTMD = rms_norm(hidden_BTMD, self.query_norm, eps)
        score_BTM = (query_BTMD * key_BTMD).sum(-1) / math.sqrt(self.hidden_size)
        if self.config.gate == "signed_root":
            score_BTM = score_BTM.abs().clamp_min(1e-6).sqrt() * score_BTM.sign()
        return torch.sigmoid(score_BTM), value_BTD

    def gated_value(self, hidden_BTMD: Tensor, embedding_BTE: Tensor, dead_BT: Tensor | None = None) -> Tensor:
        """Returns value_BTMD, gate * value for each branch. It is exactly zero at `dead_BT` positions."""
        gate_BTM, value_BTD = self.gate(hidden_BTMD, embedding_BTE)
        if dead_BT is not None:
            gate_BTM = gate_BTM.masked_fill(dead_BT[..., None], 0.0)
        return gate_BTM[..., None] * value_BTD[..., None, :]

    def normed_value(self, value_BTMD: Tensor) -> Tensor:
        """The normalized value [B, M*D, T] that the convolution reads. It is zero where the value is zero."""
        return rms_norm(value_BTMD, self.conv_norm, self.config.conv_norm_eps).flatten(-2).transpose(1, 2)

    def convolve(self, normed_BCS: Tensor, num_tokens: int, starts_BT: Tensor | None = None) -> Tensor:
        """SiLU of the causal depthwise convolution, dilated by N, for the last `num_tokens` positions (equation 5).

        Args:
            normed_BCS: [B, M*D, window + T] of `normed_value`; a shorter history is padded with zeros. Or what each
                tap reads at each token, [B, T, kernel, M*D], zero where a text begins.
            starts_BT: True where a packed document begins (whole rows only): no tap reaches across.
        """
        if normed_BCS.ndim == 4:
            weight_KC = self.conv_weight[:, 0].T.contiguous()
            mixed_BTC = normed_BCS[:, :, 0] * weight_KC[0]
            for tap in range(1, len(weight_KC)):
                mixed_BTC = torch.addcmul(mixed_BTC, normed_BCS[:, :, tap], weight_KC[tap])
            return F.silu(mixed_BTC).unflatten(-1, (self.num_branches, self.hidden_size))
        window, dilation = self.config.conv_window, self.config.max_ngram_size
        if missing := window + num_tokens - normed_BCS.shape[-1]:
            normed_BCS = F.pad(normed_BCS, (missing, 0))
        if num_tokens == 1:  # `conv1d` is slow on one
            mixed = (normed_BCS[..., ::dilation] * self.conv_weight[:, 0]).sum(-1, keepdim=True)
        elif starts_BT is None:
            mixed = F.conv1d(normed_BCS, self.conv_weight, dilation=dilation, groups=self.conv_weight.shape[0])
        else:
            document_BS = F.pad(starts_BT.cumsum(-1), (window, 0), value=-1)
            mixed = torch.zeros_like(normed_BCS[..., window:])
            for tap in range(self.config.conv_kernel):
                seen = slice(tap * dilation, tap * dilation + num_tokens)
                same_BT = document_BS[:, seen] == document_BS[:, window:]
                mixed = mixed + normed_BCS[..., seen] * same_BT[:, None] * self.conv_weight[:, 0, tap, None]
        return F.silu(mixed).transpose(1, 2).unflatten(-1, (self.num_branches, self.hidden_size))

    def forward(
        self,
        hidden_BTMD: Tensor,
        embedding_BTE: Tensor,
        dead_BT: Tensor | None = None,
        starts_BT: Tensor | None = None,
        extend: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Computes what is added to the residual (section 2.3).

        Args:
            dead_BT: True where the gated value is zero; the convolution may still add earlier positions there.
            starts_BT: True where a packed document begins.
            extend: prepends to the convolution's input [B, M*D, T] the inputs of up to `conv_window` earlier positions,
                and keeps what later calls need. Or it returns what each tap reads at each token: see `convolve`.
                None: the rows begin here.

        Returns:
            output_BTMD.
        """
        value_BTMD = self.gated_value(hidden_BTMD, embedding_BTE, dead_BT)
        if not self.config.conv_kernel:
            return value_BTMD
        normed_BCS = self.normed_value(value_BTMD)
        if extend is not None:
            normed_BCS = extend(normed_BCS)
        return value_BTMD + self.convolve(normed_BCS, value_BTMD.shape[1], starts_BT)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; each branch may have its own weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight
