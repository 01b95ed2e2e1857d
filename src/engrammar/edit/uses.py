"""What a patch touches in a text: where its keys occur, and which n-grams read the rows that it replaces.

Letters: B batch, T tokens, H columns, V ids of the tokenizer.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.addressing import look_back
from engrammar.edit.exact import ExactTable
from engrammar.edit.lookup import find_keys, text_of
from engrammar.edit.patch import Key, Patch
from engrammar.memory import Memory

NGram = tuple[int, ...]  # class ids


@dataclass(frozen=True, kw_only=True)
class Uses:
    """What a text reads of a patch."""

    num_tokens: int
    keys: Counter[Key]  # how often each key occurs, as the longest that ends at its token
    rows: dict[tuple[int, int], Counter[NGram]]  # for a layer and a replaced row, how often each n-gram reads it

    @property
    def collisions(self) -> dict[tuple[int, int], Counter[NGram]]:
        """The rows that more than one n-gram reads: all of them read what was written for one."""
        return {place: ngrams for place, ngrams in self.rows.items() if len(ngrams) > 1}


def uses(patch: Patch, batches: Iterable[Tensor], classes_V: NDArray[np.int64], memory: Memory | None = None) -> Uses:
    """Counts what a text reads of a patch.

    Args:
        batches: ids [B, T], negative where they are masked.
        classes_V: `vocabulary.compress_vocabulary` of the tokenizer.
        memory: the memory whose rows the patch replaces; None leaves them out.
    """
    table = ExactTable(patch.keys_QK)
    key_of = [patch.key_of(int(entry)) for entry in np.unique(patch.column("key"), return_index=True)[1]]
    num_tokens, keys = 0, Counter[Key]()
    rows: dict[tuple[int, int], Counter[NGram]] = {}
    for ids_BT in batches:
        num_tokens += int((ids_BT >= 0).sum())
        ids = ids_BT.cpu().numpy()
        before = np.full((len(ids), table.longest - 1), -1)
        found_BT = find_keys(table, classes_V.astype(np.int32), text_of(ids, before, None))
        keys.update(key_of[number] for number in found_BT[found_BT >= 0].tolist())
        if memory is not None:
            _count_rows(patch, memory, ids_BT, rows)
    return Uses(num_tokens=num_tokens, keys=keys, rows=rows)


def inner_rows(ids: Sequence[int], memory: Memory, device: torch.device) -> dict[int, Tensor]:
    """For each layer the rows [H] that the n-grams read which end at the last of some ids and begin no earlier than the
    first; -1 in columns of longer n-grams."""
    given_BT = torch.tensor([[ids[0], *ids]], device=device)
    order_H = torch.tensor(memory.config.orders).repeat_interleave(memory.config.num_heads)
    found = memory.addresses(given_BT)
    return {layer: rows_BTH[0, -1].cpu().where(order_H <= len(ids), -1) for layer, rows_BTH in found.items()}


def _count_rows(patch: Patch, memory: Memory, ids_BT: Tensor, rows: dict[tuple[int, int], Counter[NGram]]) -> None:
    config, geometry = memory.config, memory.geometry
    seen_NBT = torch.stack(look_back(ids_BT, config=config, geometry=geometry, classes_V=memory.class_of_id))
    for layer, rows_BTH in memory.addresses(ids_BT).items():
        if layer not in patch.deltas:
            continue
        is_replaced = torch.isin(rows_BTH.cpu(), torch.from_numpy(patch.deltas[layer].rows_U))
        is_replaced &= (ids_BT >= 0).cpu()[..., None]
        for row, token, column in is_replaced.nonzero().tolist():
            order = config.orders[column // config.num_heads]
            ngram = tuple(seen_NBT[:order, row, token].flip(0).tolist())
            rows.setdefault((layer, int(rows_BTH[row, token, column])), Counter())[ngram] += 1
