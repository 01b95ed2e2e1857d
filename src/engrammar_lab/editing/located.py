"""Facts written into down-projections in closed form: ROME (arXiv 2202.05262) and MEMIT (arXiv 2210.07229).

Letters: G facts, P prefixes, N texts, D hidden width, F width of a key.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engrammar.attach.blocks import evaluating, host_of
from engrammar.edit import Fact
from engrammar.edit.optimizing import Text, frozen
from engrammar.edit.states import states
from engrammar_lab.editing.covariances import KeyText, moments
from engrammar_lab.editing.edited import Edited, Model
from engrammar_lab.editing.values import ValueSettings, at_subject, find_values, prefixes, what_it_is
from engrammar_lab.editing.weights import down_projection, keep, padded

BATCH = 48  # texts of a pass


@dataclass(frozen=True, kw_only=True)
class MemitSettings:
    """MEMIT."""

    blocks: tuple[int, ...]  # R of the paper, ascending
    held: float  # lambda of eq. 15, how much the keys of other text count
    keys: KeyText  # the text that those are read from
    values: ValueSettings = field(default_factory=ValueSettings)  # how z is found


@dataclass(frozen=True, kw_only=True)
class RomeSettings:
    """ROME."""

    block: int  # l* of the paper
    keys: KeyText
    values: ValueSettings = field(default_factory=ValueSettings)


def memit(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int, settings: MemitSettings) -> Edited:
    """All facts at once, over several blocks: MEMIT's algorithm 1 (section 4.3).

    z = h + delta at the last of the blocks and the subject's last token (eq. 16). Then block by block, ascending: keys
    are averaged over prefixes (eq. 19), what is missing of z is parted among the blocks that are left (eq. 20), and the
    weight is changed by `least_squares` (eq. 14).
    """
    last = settings.blocks[-1]
    weights = [down_projection(model, block).weight for block in settings.blocks]
    moment_FF = moments(model, tokenizer, settings.blocks, settings.keys)
    undo = keep(weights)
    placed, refused = _placed(model, tokenizer, facts, settings.values, seed)
    asked = [own for own, _ in placed]
    with frozen(model), evaluating(host_of(model)), torch.no_grad():
        with torch.enable_grad():
            delta_GD = find_values(model, [own + beside for own, beside in placed], last, settings.values)
        _, hidden_GD = at_places(model, asked, last, last)
        wanted_GD = hidden_GD + delta_GD
        for block, weight in zip(settings.blocks, weights):
            key_GF, hidden_GD = at_places(model, asked, block, last)
            missing_GD = (wanted_GD - hidden_GD) / (last - block + 1)
            change_DF = least_squares(key_GF, missing_GD, settings.held * moment_FF[block])
            weight += change_DF.to(weight)
    return Edited(undo=undo, num_bytes=sum(low_rank_bytes(one, len(placed)) for one in weights), refused=refused)


def rome(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int, settings: RomeSettings) -> Edited:
    """One fact after another at one block (ROME, section 3.1): each value is found in the model that the facts before
    have changed, and each change is of rank one (eq. 2)."""
    projection = down_projection(model, settings.block)
    weight: Any = projection.weight
    (moment_FF,) = moments(model, tokenizer, [settings.block], settings.keys).values()
    undo = keep([weight])
    placed, refused = _placed(model, tokenizer, facts, settings.values, seed)
    inverse_FF = torch.linalg.inv(damped(moment_FF.double()))
    with frozen(model), evaluating(host_of(model)), torch.no_grad():
        for own, beside in placed:
            with torch.enable_grad():
                delta_1D = find_values(model, [own + beside], settings.block, settings.values)
            key_1F, _ = at_places(model, [own], settings.block, settings.block)
            home_1F, _ = at_places(model, [own[:1]], settings.block, settings.block)
            wanted_D = (projection(home_1F.to(weight)) + delta_1D)[0]  # v*, in the prompt as it is asked
            weight += rank_one(weight, key_1F[0], wanted_D, inverse_FF).to(weight)
    return Edited(undo=undo, num_bytes=low_rank_bytes(weight, len(placed)), refused=refused)


def least_squares(key_GF: Tensor, missing_GD: Tensor, held_FF: Tensor) -> Tensor:
    """MEMIT's eq. 14: the change [D, F] of a weight that gives keys what they miss, with as little as possible
    elsewhere: R K^T (C + K K^T)^-1, C = `held_FF` (eq. 15)."""
    key_GF, missing_GD = key_GF.double(), missing_GD.double()
    return torch.linalg.solve(damped(held_FF.double()) + key_GF.T @ key_GF, key_GF.T @ missing_GD).T


def rank_one(weight_DF: Tensor, key_F: Tensor, wanted_D: Tensor, inverse_FF: Tensor) -> Tensor:
    """ROME's eq. 2: the change [D, F] with which the weight gives `wanted_D` for the key, Lambda (C^-1 k)^T."""
    key_F, weight_DF = key_F.double(), weight_DF.double()
    direction_F = inverse_FF @ key_F
    lambda_D = (wanted_D.double() - weight_DF @ key_F) / (direction_F @ key_F)
    return torch.outer(lambda_D, direction_F)


def damped(moment_FF: Tensor) -> Tensor:
    """A matrix with a millionth of its mean diagonal added, so that it can be solved where no key points."""
    return moment_FF + 1e-6 * moment_FF.diagonal().mean() * torch.eye(len(moment_FF), dtype=moment_FF.dtype)


def low_rank_bytes(weight: Tensor, rank: int) -> int:
    """Bytes of a change of a weight: as a product of two matrices, or whole where that is shorter."""
    return min(rank * sum(weight.shape), weight.numel()) * weight.element_size()


def _placed(
    model: Model, tokenizer: Any, facts: Sequence[Fact], settings: ValueSettings, seed: int
) -> tuple[list[tuple[list[Text], list[Text]]], list[Fact]]:
    """Of each fact the texts in which its subject is written at, the first one at home, and those besides ("is a"); and
    the facts that have no place to be written at."""
    before = prefixes(model, tokenizer, settings, seed)
    placed = [(at_subject(tokenizer, fact, before), what_it_is(tokenizer, fact, before)) for fact in facts]
    return [both for both in placed if both[0]], [fact for fact, (own, _) in zip(facts, placed) if not own]


@torch.no_grad()
def at_places(model: Model, texts: Sequence[Sequence[Text]], block: int, last: int) -> tuple[Tensor, Tensor]:
    """The key [G, F] that the down-projection of `block` reads for each fact, a mean over its texts (ROME eq. 3, MEMIT
    eq. 19); and the output [G, D] of block `last` in its first text."""
    flat = [(g, text) for g, own in enumerate(texts) for text in own]
    flat.sort(key=lambda one: one[1].written[0])
    keys: dict[int, list[Tensor]] = {g: [] for g in range(len(texts))}
    hidden: dict[int, Tensor] = {}
    device = next(host_of(model).parameters()).device
    for first in range(0, len(flat), BATCH):
        some = flat[first : first + BATCH]
        ids_NT, mask_NT = padded([text.ids[: text.written[0] + 1] for _, text in some], device)
        token_N = mask_NT.sum(1) - 1
        row_N = torch.arange(len(some), device=device)
        read: list[Tensor] = []
        with down_projection(model, block).register_forward_pre_hook(lambda _, args, to=read: to.append(args[0])):
            after_NTD = states(model, ids_NT, mask_NT, last + 1)
        for (g, text), key_F, after_D in zip(some, read[0][row_N, token_N], after_NTD[row_N, token_N]):
            keys[g].append(key_F)
            if text is texts[g][0]:
                hidden[g] = after_D
    mean_GF = torch.stack([torch.stack(own).mean(0) for own in keys.values()])
    return mean_GF, torch.stack([hidden[g] for g in range(len(texts))])
