"""Trains only the rows that a step's text reads often and background text seldom, so that the rest is not forgotten.

Source: sparse memory fine-tuning (arXiv 2510.15103); there the memory is one of learned keys, here the rows of n-grams.
Letters: B blocks, T tokens, H columns, U rows that a step reads, R rows that the background reads.
"""

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.attach.around import note_ids
from engrammar.attach.blocks import find_decoder, first_parameters
from engrammar.attach.inputs import read_inputs
from engrammar.config import check_setting
from engrammar.memory import Memory
from engrammar.train.placement import TablePlacement
from engrammar.train.row_optimizers import sum_by_row


@final
class SparseRows:
    """Chooses, for each step and layer, the rows that take a gradient; give it to `MixedOptimizer.sparse`.

    A row's score is its share of the step's reads, times log((N + 1) / (n + 1)) where n of the N background blocks read
    it. The rows with the highest scores are trained, and none with a score of zero, which every block reads. All others
    keep their bits; so does, where rows begin as zeros and the base is frozen, what the model says of a text that
    reads none of the chosen rows.

    Attributes:
        num_rows: rows of a layer that take a step, at most; None for no limit.
        num_blocks: N.
    """

    def __init__(
        self, model: nn.Module, background: Iterable[Tensor], num_rows: int | None, *, most_common: float = 1.0
    ) -> None:
        """
        Args:
            model: a model with one memory, its own or attached.
            background: blocks of ids [B, T] of text that should stay as it is, each row a block.
            most_common: the share of background blocks that may read a row which is trained; 0 leaves alone whatever
                the background reads.

        Raises:
            ValueError: the model has no memory or several, there is no background, or a number is not allowed.
        """
        decoder = find_decoder(model)
        memories = [module for module in decoder.host.modules() if isinstance(module, Memory)]
        if len(memories) != 1:
            raise ValueError(f"This model has {len(memories)} memories; rows are chosen in a model that has one.")
        check_setting("num_rows", num_rows, num_rows is None or num_rows >= 1, "1 or more, or None")
        check_setting("most_common", most_common, 0 <= most_common <= 1, "0 to 1")
        (self.memory,) = memories
        self.num_rows, self.most_common, self.num_blocks = num_rows, most_common, 0
        read: dict[int, list[Tensor]] = {layer: [] for layer in self.memory.config.layers}
        for ids_BT in tqdm(background, desc="background text", unit=" batches", delay=2):
            self.num_blocks += len(ids_BT)
            for layer, rows_BTH in self.memory.addresses(ids_BT).items():
                read[layer] += [rows.unique().cpu() for rows in rows_BTH]
        if not self.num_blocks:
            raise ValueError("There is no background text: give blocks of what should stay as it is.")
        # Of each layer the rows_R that the background reads, ascending, and the number of blocks that read each.
        self.background = {layer: torch.cat(rows).unique(return_counts=True) for layer, rows in read.items()}
        self.counted: dict[int, list[Tensor]] = {}  # what the passes of a step have read so far
        self.arguments = first_parameters(decoder.module)
        count = decoder.module.register_forward_pre_hook(self._count, with_kwargs=True)
        self.handles = [*note_ids(decoder), count]

    @torch.compiler.disable
    def _count(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the rows that a training pass reads."""
        if not (decoder.training and torch.is_grad_enabled()):
            return
        inputs = read_inputs(decoder, dict(zip(self.arguments, args)) | kwargs)
        rows = self.memory.addresses(inputs.input_ids, inputs.mask_BT, inputs.position_ids)
        for layer, rows_BTH in rows.items():
            self.counted.setdefault(layer, []).append(rows_BTH.flatten().cpu())

    def chosen(self, layer: int) -> Tensor:
        """The rows of a layer that this step trains, ascending."""
        counted = self.counted.get(layer, [])
        if not counted:
            return torch.empty(0, dtype=torch.long)
        rows_U, count_U = torch.cat(counted).unique(return_counts=True)
        rows_R, blocks_R = self.background[layer]
        place_U = torch.searchsorted(rows_R, rows_U).clamp_max(len(rows_R) - 1)
        blocks_U = torch.where(rows_R[place_U] == rows_U, blocks_R[place_U], 0)
        rarity_U = math.log(self.num_blocks + 1) - (blocks_U + 1).double().log()
        score_U = count_U / count_U.sum() * rarity_U * (blocks_U <= self.most_common * self.num_blocks)
        best = score_U.argsort(descending=True, stable=True)[: self.num_rows]
        return rows_U[best[score_U[best] > 1e-12]].sort().values

    @torch.no_grad()
    def keep(self, placement: TablePlacement | None) -> None:
        """Drops the gradients of rows that are not chosen; raises a ValueError if the tables are spread over ranks."""
        if placement is not None and placement.num_ranks > 1:
            raise ValueError("The rows to train are chosen by one process: train on one, or train all rows.")
        for layer in self.memory.config.layers:
            table = self.memory.table(layer)
            table_RC = table.weight if placement is None else placement.tables[table.name]
            if table_RC is None or table_RC.grad is None:
                continue
            gradient = sum_by_row(table_RC.grad)
            rows_U = gradient.indices()[0]
            is_chosen_U = torch.isin(rows_U, self.chosen(layer).to(rows_U.device))
            table_RC.grad = torch.sparse_coo_tensor(
                rows_U[None, is_chosen_U],
                gradient.values()[is_chosen_U],
                table_RC.shape,
                is_coalesced=True,
                check_invariants=False,
            )

    def end_step(self) -> None:
        """Begins to count anew."""
        self.counted = {}

    def remove(self) -> None:
        """Takes the hook off the model."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def share_changed(memory: Memory, blocks: Iterable[Tensor]) -> float:
    """The share of reads of a text that fall on rows that are not zero, of a memory whose rows began as zeros.

    Args:
        blocks: ids [B, T].
    """
    changed, total = 0, 0
    for ids_BT in blocks:
        retrieved = memory.retrieve(ids_BT)
        for layer in memory.config.layers:
            embedding_BTE, _ = retrieved.wait(layer)
            assert embedding_BTE is not None
            is_changed = (embedding_BTE.unflatten(-1, (memory.config.num_columns, -1)) != 0).any(-1)
            changed, total = changed + int(is_changed.sum()), total + is_changed.numel()
    return changed / total
