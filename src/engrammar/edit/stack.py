"""The exact entries of all applied patches as one: one table of keys, one numbering of entries, steps and rows.

Letters: Q keys, K the longest key, E exact entries, S steps, P probes, D hidden width.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.edit.exact import NOTHING, Classes, ExactTable, Ints, distinct_rows, pad_keys
from engrammar.edit.patch import COLUMNS, Patch, require_same_names
from engrammar.edit.rows import ValueRows

PLACE = [COLUMNS.index(name) for name in ("key", "block", "probe")]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """What is looked up and added while patches are applied; arrays are those of `Patch`, of all patches together.

    Numbers of keys, probes, rows, steps and facts are the stack's. An entry without a fact has a number of its own.
    """

    identity: tuple[str, ...]  # the digests of the patches; a cache that was filled with others is not continued
    table: ExactTable
    lengths_Q: Ints  # classes of each key
    columns: dict[str, Ints]  # those of `patch.COLUMNS` by name, [E]
    strengths: NDArray[np.float32]
    steps: Ints
    names_V: NDArray[np.bool_]
    probe_blocks: Ints
    probes_P2D: Tensor  # centre and direction
    thresholds_P: Tensor
    rows: Sequence[ValueRows]  # of each patch
    first_rows: Ints  # the number of each patch's first row, and of all rows

    @cached_property
    def number(self) -> int:
        """A number over 0 that no stack of other patches has."""
        return 1 + int.from_bytes(hashlib.sha256("".join(self.identity).encode()).digest()[:7], "little")

    @cached_property
    def gated(self) -> tuple[Ints, Ints]:
        """The entries with a probe, in the order of their keys; where those of each key begin, [Q+1]."""
        return self._of_key(self.columns["probe"] >= 0)

    @cached_property
    def direct(self) -> tuple[Ints, Ints]:
        """As `gated`, without a probe."""
        return self._of_key(self.columns["probe"] < 0)

    def _of_key(self, wanted_E: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        (entries,) = np.nonzero(wanted_E)
        keys = self.columns["key"][entries]
        return entries, np.searchsorted(keys, np.arange(self.table.num_keys + 1))

    @cached_property
    def num_armed(self) -> int:
        """The most tokens that a key stays armed."""
        return int(self.columns["armed"].max(initial=0))

    @cached_property
    def num_direct_steps(self) -> int:
        """The most steps of an entry without a probe."""
        return int(self.columns["num_steps"][self.direct[0]].max(initial=0))

    @cached_property
    def window(self) -> int:
        """Positions back at which a key may have ended, or a write may have begun, that matters now."""
        return max(self.num_armed, self.num_direct_steps - 1, 1)

    @cached_property
    def num_back(self) -> int:
        """Ids to look back to."""
        return max(self.table.longest - 1, self.window)

    @cached_property
    def decided_at(self) -> int | None:
        """The block before which all probes have been read, so that writes are decided; None without probes."""
        gated, _ = self.gated
        return int(self.probe_blocks[self.columns["probe"][gated]].max()) if len(gated) else None

    @cached_property
    def blocks(self) -> list[int]:
        """The blocks whose input is read or changed."""
        probed = self.probe_blocks[self.columns["probe"][self.gated[0]]]
        return sorted({*self.columns["block"].tolist(), *probed.tolist()})


def stack_patches(patches: Sequence[Patch], rows: Sequence[ValueRows], identity: tuple[str, ...]) -> Stack:
    """Stacks patches in the order in which they were applied; of entries at one place the last one counts.

    Args:
        patches: one at least.
        rows: the value rows of each.

    Raises:
        ValueError: a patch writes at a block before that of another one's probe, or takes other ids for names.
    """
    require_same_names(patches)
    keys_QK, places, first = _places(patches)
    kept = _last_of_each(places)
    order = kept[np.argsort(places[kept, 0], kind="stable")]
    entries = np.concatenate([patch.entries for patch in patches]).astype(np.int64)[order]
    columns = {name: entries[:, index].copy() for index, name in enumerate(COLUMNS)}
    patch_E = _owners([len(patch.entries) for patch in patches])[order]
    columns["key"] = places[order, 0]
    for name, counted in (("probe", "probes"), ("binding", "rows")):
        columns[name] = np.where(columns[name] < 0, -1, columns[name] + first[counted][patch_E])
    columns["first_step"] += first["steps"][patch_E]
    alone = np.arange(len(order)) + first["facts"][-1]
    columns["fact"] = np.where(columns["fact"] < 0, alone, columns["fact"] + first["facts"][patch_E])
    steps = np.concatenate([patch.steps for patch in patches]).astype(np.int64)
    steps[:, 0] += first["rows"][_owners([len(patch.steps) for patch in patches])]
    stack = Stack(
        identity=identity,
        table=ExactTable(keys_QK),
        lengths_Q=(keys_QK != NOTHING).sum(1),
        columns=columns,
        strengths=np.concatenate([patch.strengths for patch in patches])[order],
        steps=steps,
        names_V=next((patch.names_V() for patch in patches if len(patch.name_ids)), np.empty(0, np.bool_)),
        probe_blocks=np.concatenate([patch.probe_blocks for patch in patches]).astype(np.int64),
        probes_P2D=torch.from_numpy(np.concatenate([patch.probe_pairs() for patch in patches])),
        thresholds_P=torch.from_numpy(np.concatenate([patch.thresholds for patch in patches])),
        rows=rows,
        first_rows=first["rows"],
    )
    gated, _ = stack.gated
    if stack.decided_at is not None and (lowest := stack.columns["block"][gated].min()) < stack.decided_at:
        raise ValueError(
            f"One patch writes at block {lowest} and another one's probe is at block {stack.decided_at}: all probes "
            "have to be read before the first write; make them for the same blocks, or undo one."
        )
    return stack


def sharing_places(patches: Sequence[Patch]) -> list[tuple[int, int]]:
    """The pairs of patches, by their numbers, that have an entry of one key, block and probe, or rows of one layer."""
    replacing: dict[int, list[int]] = {}  # of each layer, the patches
    for index, patch in enumerate(patches):
        for layer in patch.deltas:
            replacing.setdefault(layer, []).append(index)
    found = {pair for own in replacing.values() for pair in itertools.combinations(own, 2)}
    places = _places(patches)[1]
    patch_E = _owners([len(patch.entries) for patch in patches])
    number_E = distinct_rows(places)[1]
    for number in np.nonzero(np.bincount(number_E) > 1)[0]:
        found |= {*itertools.combinations(patch_E[number_E == number].tolist(), 2)}
    return sorted(found)


def _places(patches: Sequence[Patch]) -> tuple[Classes, Ints, dict[str, Ints]]:
    """All keys; of each entry its key, block and probe by name [E, 3]; and each patch's first probe, step and row."""
    first = {
        "keys": np.cumsum([0, *[len(patch.keys_QK) for patch in patches]]),
        "probes": np.cumsum([0, *[len(patch.probe_names) for patch in patches]]),
        "steps": np.cumsum([0, *[len(patch.steps) for patch in patches]]),
        "rows": np.cumsum([0, *[len(patch.values) for patch in patches]]),
        "facts": np.cumsum([0, *[len(patch.facts) for patch in patches]]),
    }
    longest = max(patch.keys_QK.shape[1] for patch in patches)
    all_keys = np.concatenate([pad_keys(patch.keys_QK, longest) for patch in patches])
    distinct, number_of = distinct_rows(all_keys)
    key, block, probe = np.concatenate([patch.entries for patch in patches]).astype(np.int64)[:, PLACE].T
    patch_E = _owners([len(patch.entries) for patch in patches])
    names: dict[str, int] = {}
    numbers = [names.setdefault(name, len(names)) for patch in patches for name in patch.probe_names]
    named = np.array([*numbers, -1])[np.where(probe < 0, -1, first["probes"][patch_E] + probe)]
    return all_keys[distinct], np.stack([number_of[first["keys"][patch_E] + key], block, named], axis=1), first


def _owners(counts: Sequence[int]) -> Ints:
    """The number of the patch of each entry or step."""
    return np.repeat(np.arange(len(counts)), counts)


def _last_of_each(places: Ints) -> Ints:
    """The number of the last entry at each place, ascending."""
    last, _ = distinct_rows(places[::-1])
    return np.sort(len(places) - 1 - last)
