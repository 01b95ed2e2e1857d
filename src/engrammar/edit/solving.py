"""Rows that make a memory give a wanted vector: the smallest change, linearized through gate, value and convolution.

Letters: N texts, S tokens, W places at which a key ends, H columns, C row width, E = H*C, M residual branches, D hidden
width, U rows, Q equations.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engrammar.attach.attached import AttachedMemory
from engrammar.attach.blocks import find_decoder
from engrammar.config import check_choice
from engrammar.edit.applying import memories_of
from engrammar.edit.asking import require_asking
from engrammar.edit.optimizing import Added, Adding, Texts
from engrammar.edit.ranges import require_range
from engrammar.edit.states import Reached
from engrammar.fusion import Fusion
from engrammar.memory import Memory

By = Literal["gradient", "solve"]


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How rows are found.

    Attributes:
        by: "solve": rows that give a vector, which is optimized first; "gradient": from there on, on the
            rows themselves.
        layer: the block of the memory whose rows are written; None: its first.
        steps, stop, kl: as of `VectorSettings`.
        lr: of Adam, in sizes of the hidden state, or of the solved rows.
        most: the largest size of the vector, and of what the gradient adds to a solved row, in the same.
        ridge, rounds: of the solve: its ridge as a share of the mean square, and how often it is linearized anew.
        num_contexts, num_paraphrases, num_others, seed: as of `VectorSettings`.
    """

    by: By = "solve"
    layer: int | None = None
    steps: int = 40
    stop: float = 0.15
    kl: float = 0.5
    lr: float = 0.3
    most: float = 8.0
    ridge: float = 1e-6
    rounds: int = 8
    num_contexts: int = 2
    num_paraphrases: int = 2
    num_others: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("by", self.by, By)
        require_range(self, "over 0", "lr", "most", "ridge")
        require_range(self, "0 or more", "stop", "kl")
        require_range(self, "1 or more", "steps", "rounds")
        require_asking(self)


@final
@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a memory is read: its fusion at a block, and what the fusion's output is multiplied by there."""

    memory: Memory
    layer: int
    fusion: Fusion
    scale: float


def find_site(model: nn.Module, layer: int | None) -> Site:
    """The place at which the one memory of a model, its own or attached, is read.

    Raises:
        ValueError: there is none, or several, or it is not read at this block.
    """
    decoder = find_decoder(model)
    memories = memories_of(decoder.host)
    if len(memories) != 1:
        raise ValueError(f"This model has {len(memories)} memories; rows are learned in a model that has one.")
    (memory,) = memories
    layer = memory.config.layers[0] if layer is None else layer
    if layer not in memory.config.layers:
        raise ValueError(f"layer is {layer}; allowed: the memory's, {', '.join(map(str, memory.config.layers))}.")
    attached = [module for module in decoder.host.modules() if isinstance(module, AttachedMemory)]
    if attached:
        fusion: Any = attached[0].fusions[str(layer)]
        scale = attached[0].place.scales[memory.config.layers.index(layer)]
    else:
        fusion, scale = getattr(decoder.blocks[layer], "fusion", None), 1.0
    if not isinstance(fusion, Fusion):
        raise ValueError(f"{type(decoder.host).__name__} fuses its rows in code that is not ours: learn vectors.")
    return Site(memory=memory, layer=layer, fusion=fusion, scale=scale)


def at_rows(site: Site) -> Adding:
    """Values [.., E] are added to what the memory has looked up at a token."""

    def adding(model: nn.Module, added: Added) -> RemovableHandle:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_BTMD, embedding_BTE, *rest = args
            return hidden_BTMD, added.to(embedding_BTE[:, :, None]).flatten(2), *rest

        return site.fusion.register_forward_pre_hook(before)

    return adding


def after_memory(site: Site) -> Adding:
    """Values [.., D] are added to what the memory gives, in the size of the residual stream."""

    def adding(model: nn.Module, added: Added) -> RemovableHandle:
        def after(_: nn.Module, args: tuple[Any, ...], output_BTMD: Tensor) -> Tensor:
            changed_BTMD = added.to(args[0])  # its size is measured where it will be added
            return output_BTMD + (changed_BTMD - args[0]) / site.scale

        return site.fusion.register_forward_hook(after)

    return adding


@final
class Spread:
    """Makes the values [keys, E] of rows [U, C]: each key reads its own in its columns, and zeros in others."""

    def __init__(self, index_KH: Tensor, num_rows: int, width: int) -> None:
        self.index_KH, self.num_rows, self.width = index_KH, num_rows, width

    def __call__(self, rows_UC: Tensor) -> Tensor:
        padded = torch.cat([rows_UC, rows_UC.new_zeros(1, self.width)])
        return padded[self.index_KH.to(rows_UC.device)].flatten(1)


@torch.no_grad()
def solve_rows(read: Texts, site: Site, spread: Spread, value_D: Tensor, settings: RowSettings) -> Tensor:
    """The smallest rows_UC that, added to what the memory looks up, make it give `value_D` more at all written places.

    Each round linearizes the fusion anew where the last one ended, and solves by least squares with a ridge.
    """
    rows_UC = torch.zeros(spread.num_rows, spread.width, device=value_D.device)
    wanted_WMD: Tensor | None = None
    for _ in range(settings.rounds):
        places = read_places(read, site, spread(rows_UC))
        output_WMD = fused(site.fusion, places)
        if wanted_WMD is None:
            wanted_WMD = output_WMD + value_D
        jacobian_QX = _in_rows(linearized(site.fusion, places), spread, read.added.number)
        square_XX = jacobian_QX.T @ jacobian_QX
        square_XX.diagonal().add_(settings.ridge * square_XX.diagonal().mean())
        step_X = torch.linalg.solve(square_XX, jacobian_QX.T @ (wanted_WMD - output_WMD).flatten())
        rows_UC = rows_UC + step_X.view_as(rows_UC)
    return rows_UC


@final
@dataclass(frozen=True, kw_only=True)
class Places:
    """What a fusion reads at some tokens: hidden_WMD, embedding_WE, and what its convolution sums of earlier tokens."""

    hidden_WMD: Tensor
    embedding_WE: Tensor
    earlier_WC: Tensor | None


def read_places(read: Texts, site: Site, values_KE: Tensor) -> Places:
    """The written places of texts, with values added to what is looked up there. The pass ends at the memory."""
    row_W, token_W = read.added.row, read.added.token + read.num_before
    found: list[Any] = []

    def before(fusion: nn.Module, args: tuple[Any, ...]) -> None:
        hidden_BTMD, embedding_BTE, dead_BT = args[:3]
        added_WE = values_KE[read.added.number].to(embedding_BTE)
        embedding_BTE = embedding_BTE.index_put((row_W, token_W), added_WE, accumulate=True)
        earlier_WC = _earlier(site.fusion, (hidden_BTMD, embedding_BTE, dead_BT), row_W, token_W)
        found.append((hidden_BTMD[row_W, token_W], embedding_BTE[row_W, token_W], earlier_WC))
        raise Reached

    with site.fusion.register_forward_pre_hook(before), suppress(Reached):
        read.decoder.module(read.ids, attention_mask=read.mask, position_ids=read.positions, use_cache=False)
    hidden_WMD, embedding_WE, earlier_WC = found[0]
    return Places(hidden_WMD=hidden_WMD.float(), embedding_WE=embedding_WE.float(), earlier_WC=earlier_WC)


def _earlier(fusion: Fusion, given: tuple[Any, ...], row_W: Tensor, token_W: Tensor) -> Tensor | None:
    """What the convolution sums of tokens before each place, [W, M*D]; None without one."""
    if not fusion.config.conv_kernel:
        return None
    normed_BCT = fusion.normed_value(fusion.gated_value(*given))
    total_WC = torch.zeros(len(row_W), normed_BCT.shape[1], device=normed_BCT.device)
    for tap in range(fusion.config.conv_kernel - 1):
        place_W = token_W - (fusion.config.conv_kernel - 1 - tap) * fusion.config.max_ngram_size
        seen_WC = normed_BCT[row_W, :, place_W.clamp_min(0)] * (place_W >= 0)[:, None]
        total_WC = total_WC + seen_WC * fusion.conv_weight[:, 0, tap]
    return total_WC


def fused(fusion: Fusion, places: Places) -> Tensor:
    """What the fusion gives at some places, output_WMD."""
    value_WMD = fusion.gated_value(places.hidden_WMD[:, None], places.embedding_WE[:, None])[:, 0]
    if places.earlier_WC is None:
        return value_WMD
    own_WC = fusion.normed_value(value_WMD[:, None])[..., 0] * fusion.conv_weight[:, 0, -1]
    return value_WMD + F.silu(places.earlier_WC + own_WC).view_as(value_WMD)


@torch.enable_grad()
def linearized(fusion: Fusion, places: Places) -> Tensor:
    """The derivative [W, M*D, E] of what the fusion gives by the rows that are looked up at the same token."""
    embedding_WE = places.embedding_WE.detach().requires_grad_()
    output_WQ = fused(fusion, replace(places, embedding_WE=embedding_WE)).flatten(1)
    each_QWQ = torch.eye(output_WQ.shape[1], device=output_WQ.device)[:, None].expand(-1, len(output_WQ), -1)
    (slope_QWE,) = torch.autograd.grad(output_WQ, embedding_WE, each_QWQ, is_grads_batched=True)
    return slope_QWE.transpose(0, 1)


def _in_rows(jacobian_WQE: Tensor, spread: Spread, number_W: Tensor) -> Tensor:
    """The same derivative by the rows, [Q, U*C]: a row that several columns read is moved in all of them."""
    by_column = jacobian_WQE.unflatten(-1, (-1, spread.width))  # [W, M*D, H, C]
    index_WH = spread.index_KH.to(number_W.device)[number_W]
    index_WH = torch.where(index_WH < 0, spread.num_rows, index_WH)
    num_places, num_outputs, _, width = by_column.shape
    found = by_column.new_zeros(num_places, spread.num_rows + 1, num_outputs, width)
    place_W1 = torch.arange(num_places, device=number_W.device)[:, None].expand_as(index_WH)
    found.index_put_((place_W1, index_WH), by_column.transpose(1, 2), accumulate=True)
    return found[:, :-1].permute(0, 2, 1, 3).reshape(num_places * num_outputs, -1)
