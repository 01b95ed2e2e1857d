"""Rows filled from the base itself, without training: what usually comes after an n-gram, as the base would put it.

After NGM (arXiv 2605.16893: means of token embeddings) and Memory Grafting (arXiv 2605.20948: hidden states); the
definition is our own.
Letters: B batch, T tokens, P positions of the text, D hidden width, E width of a token's rows, H columns, C row width,
U distinct rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from engrammar.addressing import look_back
from engrammar.attach.attached import AttachedMemory, first_tokens
from engrammar.attach.attaching import disabled, only_memory
from engrammar.attach.blocks import find_decoder, in_branches
from engrammar.attach.prefix import NAMES, Below, Items, input_batches
from engrammar.config import check_choice
from engrammar.fusion import Fusion
from engrammar.memory import Memory, masked_ids

How = Literal["embeddings", "hidden"]
SMALLEST = 1e-2  # directions that W_V passes on by less than this share of its strongest are not used


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What `fill_rows` did at one block."""

    num_positions: int  # positions of the text that an n-gram ends at and a token follows
    num_rows: int  # rows that were set
    num_shared: int  # those of them that several n-grams of the text read, so that they hold a mean over n-grams
    unreached: float  # the share of the targets' variance in directions that the value projection does not reach


@torch.no_grad()
def fill_rows(
    model: Any, items: Items, how: How = "embeddings", *, strength: float = 0.25, name: str | None = None
) -> dict[int, Filled]:
    """Sets the rows of an attached memory that a text reads, from the base itself; nothing is trained.

    At each position t of the text that ends an n-gram, let y_t be, for the token t+1, its input embedding
    ("embeddings") or what the block reads there ("hidden", a mean over residual branches). With m and s the mean and
    the root mean square of y - m over all positions, the value that is wanted at t is

        v_t = strength * (y_t - m) / s / g,

    where g is 1/2, the gate of a query that has nothing to do with its key (1 without a gate). The rows of the token
    that would give it are e_t = W_V^+ (v_t - b), the shortest solution of least squares; E numbers, C for each column.
    Each row becomes the mean of its column's part over all positions that read it. So rows of n-grams that collide are
    averaged, an n-gram that is followed by many things gets little, and a text's rows of short and of long n-grams
    each bring their share.

    It is not exact: gates are what they turn out to be with the new rows, W_V reaches at most `memory_dim` of the D
    directions, and a convolution of non-zero weights is left out of account.

    Args:
        items: the text, as for `keep_prefix`: a dataset of {"input_ids": [T], ...}, all of one length.
        strength: the size of a value, in units of the residual stream at the block.
        name: which memory; None is the only one.

    Returns:
        For each block with memory, what was done.

    Raises:
        ValueError: there is no such memory, or its rows are not parameters; embeddings are not of the hidden width; or
            no n-gram of the text is followed by a token.
    """
    check_choice("how", how, How)
    _, attached = only_memory(model, name)
    done = {}
    for layer in attached.config.layers:
        weight_RC = attached.memory.table(layer).weight
        if weight_RC is None:
            raise ValueError("The rows are served or placed elsewhere: fill them where they are parameters.")
        with disabled(model):
            sums = _sum(model, attached, layer, items, how)
        weight_RC[sums.rows_U.to(weight_RC.device)] = sums.rows(strength).to(weight_RC)
        done[layer] = Filled(
            num_positions=sums.num_positions,
            num_rows=len(sums.rows_U),
            num_shared=sums.num_shared,
            unreached=sums.unreached(),
        )
    return done


@final
class _Sums:
    """Sums over the positions of a text; and how the fusion of a block makes its value of a token's rows, backwards."""

    def __init__(self, fusion: Fusion, pairs_Q: Tensor) -> None:
        # pairs_Q: for each distinct pair of a row and an n-gram that reads it, the row.
        hidden_size, bias = fusion.hidden_size, fusion.projection.bias
        # weight_DE, bias_D: W_V and b.
        self.weight_DE = fusion.projection.weight[:hidden_size].float().cpu()
        self.inverse_ED = torch.linalg.pinv(self.weight_DE, rtol=SMALLEST)  # W_V^+
        self.bias_D = torch.zeros(hidden_size) if bias is None else bias[:hidden_size].float().cpu()
        self.gate = 0.5 if fusion.num_keys else 1.0  # the gate that is reckoned with
        self.num_columns = fusion.config.num_columns
        # rows_U: the rows that it reads, sorted; of them `num_shared` are read by several n-grams.
        self.rows_U, num_ngrams_U = pairs_Q.unique(return_counts=True)
        self.num_shared = int((num_ngrams_U > 1).sum())
        self.column_U = torch.zeros_like(self.rows_U)  # the column that a row belongs to
        # part_UC, reads_U: the sum of W_V^+ y over the positions that read a row, its column's part; and their number.
        self.part_UC = torch.zeros(len(self.rows_U), self.weight_DE.shape[1] // self.num_columns)
        self.reads_U = torch.zeros(len(self.rows_U))
        # total_D, square_DD: the sums of y and of its outer products over all positions.
        self.total_D = torch.zeros(hidden_size, dtype=torch.float64)
        self.square_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self.num_positions = 0

    def add(self, rows_PH: Tensor, target_PD: Tensor) -> None:
        parts_PHC = (target_PD @ self.inverse_ED.T).unflatten(-1, (self.num_columns, -1))
        for column in range(self.num_columns):
            places_P = torch.searchsorted(self.rows_U, rows_PH[:, column].contiguous())
            self.column_U[places_P] = column
            self.part_UC.index_add_(0, places_P, parts_PHC[:, column])
            self.reads_U.index_add_(0, places_P, torch.ones(len(places_P)))
        self.total_D += target_PD.double().sum(0)
        self.square_DD += target_PD.T.double() @ target_PD.double()
        self.num_positions += len(target_PD)

    def rows(self, strength: float) -> Tensor:
        """The rows [U, C] of `fill_rows`."""
        covariance_DD, mean_D = self._spread()
        size = float(covariance_DD.diagonal().mean().sqrt())
        if not size > 1e-6 * float(mean_D.square().mean().sqrt()):
            raise ValueError("All targets are equal: what follows the n-grams of this text is one token only.")
        columns = (self.num_columns, -1)
        mean_HC = (self.inverse_ED @ mean_D).unflatten(0, columns)
        bias_HC = (self.inverse_ED @ self.bias_D).unflatten(0, columns)
        own_UC = self.part_UC / self.reads_U[:, None] - mean_HC[self.column_U]
        return strength / (size * self.gate) * own_UC - bias_HC[self.column_U]

    def unreached(self) -> float:
        covariance_DD, _ = self._spread()
        reached = ((self.weight_DE @ self.inverse_ED) * covariance_DD).sum() / covariance_DD.diagonal().sum()
        return max(0.0, 1 - float(reached))

    def _spread(self) -> tuple[Tensor, Tensor]:
        """The covariance of the targets, and their mean."""
        mean_D = self.total_D / self.num_positions
        covariance_DD = self.square_DD / self.num_positions - torch.outer(mean_D, mean_D)
        return covariance_DD.float(), mean_D.float()


def _sum(model: Any, attached: AttachedMemory, layer: int, items: Items, how: How) -> _Sums:
    """Reads the text twice: for its n-grams, then for what follows them."""
    decoder, memory, fusion = find_decoder(model), attached.memory, attached.fusions[str(layer)]
    assert isinstance(fusion, Fusion)
    with align_module_device(model.get_input_embeddings()):
        embedding_VD = model.get_input_embeddings().weight
    if how == "embeddings" and embedding_VD.shape[1] != decoder.hidden_size:
        raise ValueError(
            f"Token embeddings have width {embedding_VD.shape[1]}, the residual stream {decoder.hidden_size}: fill "
            'the rows from "hidden" states.'
        )
    pairs = [_pairs(memory, rows_PH, classes_PN) for _, _, rows_PH, classes_PN in _read(memory, layer, items)]
    distinct = torch.cat(pairs).unique(dim=0)
    if not len(distinct):
        raise ValueError("No n-gram of the text is followed by a token: give more text.")
    sums, below = _Sums(fusion, distinct[:, 0]), Below(model=model, decoder=decoder, layer=layer)
    for batch, ends_BT, rows_PH, _ in _read(memory, layer, items):
        given = {key: x.to(embedding_VD.device) for key, x in batch.items()}
        if how == "embeddings":
            target_BTD = embedding_VD[given["input_ids"]]
        else:
            target_BTD = in_branches(below.run(given, training=False), decoder.hidden_size).mean(-2)
        target_PD = target_BTD[:, 1:][ends_BT[:, :-1].to(target_BTD.device)].float().cpu()
        sums.add(rows_PH, target_PD)
    return sums


def _read(memory: Memory, layer: int, items: Items) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor, Tensor]]:
    """Batches of the text, and True [B, T] where an n-gram ends and a token of the same document follows.

    Of these positions also the rows [P, H] and the classes [P, N] that are seen from there.
    """
    device = memory.table(layer).weight.device  # type: ignore[union-attr]
    chosen: dict[str, Any] = {"config": memory.config, "geometry": memory.geometry, "classes_V": memory.class_of_id}
    for batch in input_batches(items, 8):
        given: Any = [batch[key].to(device) if key in batch else None for key in NAMES]
        retrieved, rows = memory.look_up(*given)
        masked_BT, mask_BT, starts_BT = masked_ids(*given, continued=False)
        ends_BT = ~first_tokens(masked_BT, None, starts_BT)
        if retrieved.dead_BT is not None:
            ends_BT &= ~retrieved.dead_BT
        for follows_BT in (mask_BT, None if starts_BT is None else ~starts_BT):
            if follows_BT is not None:
                ends_BT[:, :-1] &= follows_BT[:, 1:]
        ends_BT[:, -1] = False
        classes_BTN = torch.stack(look_back(masked_BT, starts_BT=starts_BT, **chosen), dim=-1)
        yield batch, ends_BT.cpu(), rows[layer][ends_BT].cpu(), classes_BTN[ends_BT].cpu()


def _pairs(memory: Memory, rows_PH: Tensor, classes_PN: Tensor) -> Tensor:
    """The distinct pairs [Q, 1 + N] of a row and an n-gram that reads it: its classes, -1 beyond its order."""
    found = []
    for column in range(rows_PH.shape[1]):
        ngram_PN = classes_PN.clone()
        ngram_PN[:, memory.config.orders[column // memory.config.num_heads] :] = -1
        found.append(torch.cat([rows_PH[:, column : column + 1], ngram_PN], dim=1))
    return torch.cat(found).unique(dim=0)
