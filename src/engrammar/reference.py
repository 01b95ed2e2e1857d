"""The paper in plain code, to be read first: hash (section 2.2), look up (equation 2), fuse (equations 3 to 5).

Nothing here is fast. Tests compare the fast code with these functions. All of Engram is
`hidden + fuse(hidden, look_up(table, hash(ids)))`, once for each memory layer.
Letters: T tokens, K heads per order, H columns (heads over all orders), R rows, C row width, E = H*C, B batch,
M branches, D hidden width.
"""

import torch
from torch import Tensor

from engrammar.config import Geometry, MemoryConfig
from engrammar.fusion import Fusion


def hash_ngrams_reference(
    ids_T: list[int], *, config: MemoryConfig, geometry: Geometry, layer_index: int
) -> list[list[int]]:
    """Section 2.2, one token at a time in Python integers: the plain twin of `look_back` and `hash_ngrams`.

    Args:
        ids_T: the classes of one sequence. End and dead ids are recognized among them, so use this without compression,
            or with ids whose classes are the ids themselves.

    Returns:
        rows_TH, row numbers over the layer's whole table.
    """
    stops = set(config.dead_ids)
    rows_TH = []
    for t, current in enumerate(ids_T):
        looked_back = [geometry.fill_class] * config.max_ngram_size
        alive = current >= 0 and current not in stops
        looked_back[0] = current if alive else geometry.fill_class
        for k in range(1, config.max_ngram_size):
            previous = ids_T[t - k] if t >= k else -1
            alive = alive and previous >= 0 and previous not in stops and previous not in config.end_ids
            looked_back[k] = previous if alive else geometry.fill_class
        row_H, offset = [], 0  # in the one table, the heads follow each other
        for order, sizes_K in zip(config.orders, geometry.table_sizes[layer_index]):
            mix = 0
            for k in range(order):
                mix ^= looked_back[k] * geometry.multipliers[layer_index][k]
            for size in sizes_K:
                row_H.append(offset + mix % size)
                offset += size
        rows_TH.append(row_H)
    return rows_TH


def lookup_reference(weight_RC: Tensor, rows_BTH: Tensor) -> Tensor:
    """Equation 2 as a dense gather with a dense gradient: the plain twin of `MemoryTable`. Returns embedding_BTE."""
    return weight_RC[rows_BTH].flatten(-2)


def fuse_reference(fusion: Fusion, hidden_BTMD: Tensor, embedding_BTE: Tensor) -> Tensor:
    """Section 2.3, branch by branch and tap by tap, as the paper writes it: the plain twin of `Fusion.forward`."""
    config, D = fusion.config, fusion.hidden_size
    weights, biases = fusion.projection.weight, fusion.projection.bias

    def project(slot: int) -> Tensor:
        out = embedding_BTE @ weights[slot * D : (slot + 1) * D].T
        return out if biases is None else out + biases[slot * D : (slot + 1) * D]

    def normalize(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    value = project(0)
    outputs = []
    for m in range(fusion.num_branches):
        gated = value
        if config.gate != "none":
            own = m if config.branch_keys == "each" else 0
            key = normalize(project(own + 1), fusion.key_norm[own], config.key_norm_eps)
            query = normalize(hidden_BTMD[:, :, m], fusion.query_norm[m], config.key_norm_eps)
            score = (query * key).sum(-1, keepdim=True) / D**0.5
            if config.gate == "signed_root":
                score = torch.sign(score) * torch.sqrt(torch.clamp(torch.abs(score), min=1e-6))
            gated = value / (1 + torch.exp(-score))
        output = gated
        if config.conv_kernel:
            normed = normalize(gated, fusion.conv_norm[m], config.conv_norm_eps)
            taps = fusion.conv_weight[m * D : (m + 1) * D, 0]
            mixed = torch.zeros_like(gated)
            for tap in range(config.conv_kernel):
                shift = (config.conv_kernel - 1 - tap) * config.max_ngram_size
                if shift < gated.shape[1]:
                    delayed = torch.cat([torch.zeros_like(normed[:, :shift]), normed[:, : normed.shape[1] - shift]], 1)
                    mixed = mixed + delayed * taps[:, tap]
            output = gated + mixed / (1 + torch.exp(-mixed))
        outputs.append(output)
    return torch.stack(outputs, dim=2)
