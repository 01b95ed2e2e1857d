"""Patches of a model in vLLM: rows of its tables that are replaced, and what is added at blocks.

vLLM's prefix cache is empty at the start, and patches stay as long as it runs: it never answers from before a change.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, final

from engrammar.edit import Patch, apply_patch, read_patch
from engrammar.edit.building import refuse_conflicts
from engrammar.edit.files import patch_digest
from engrammar.edit.overlay import TableOverlay, check_tables
from engrammar.edit.patch import joined
from engrammar.edit.rows import ArrayStore, ValueRows
from engrammar.edit.stack import Stack, stack_patches
from engrammar.memory import Memory

MOST_STACKS = 64  # sets of patches whose keys are kept in one table; others are put together anew


def read_patches(paths: Sequence[Path], *, self_test: bool) -> list[Patch]:
    """Reads files of patches.

    Args:
        self_test: whether the served model is compared with transformers' before it serves.

    Raises:
        ValueError: a patch is damaged, two are in conflict, or one adds to hidden states and is not to be compared.
    """
    patches: list[Patch] = []
    for path in paths:
        patch = read_patch(path)
        if len(patch.entries) and not self_test:
            raise ValueError(
                f"The patch {patch.name!r} adds to hidden states, and whether it is for this model is found out by the "
                "self-test: do not turn it off."
            )
        for other in patches:
            refuse_conflicts(other, patch)
        patches.append(patch)
    return patches


@final
class Offer:
    """The patches of an engine, for all requests and for those that name them, and the stack that a request has."""

    def __init__(self, for_all: Sequence[Patch], on_request: Sequence[Patch]) -> None:
        self.for_all, self.on_request = for_all, on_request
        self._stacks = lru_cache(MOST_STACKS)(self._put_together)

    @property
    def adding(self) -> list[Patch]:
        """Those that add to hidden states."""
        return [one for one in (*self.for_all, *self.on_request) if len(one.entries)]

    def stack(self, names: Sequence[str]) -> Stack | None:
        """What a request is read with that names these patches; None if nothing is added.

        Raises:
            ValueError: a name is not known, or the patches do not fit each other.
        """
        known = [one.name for one in self.on_request]
        for name in names:
            if name not in known and name not in [one.name for one in self.for_all]:
                raise ValueError(
                    f"No patch {name!r} can be chosen; patches for requests are: {', '.join(known) or 'none'}."
                )
        return self._stacks(tuple(name for name in known if name in names))

    def _put_together(self, chosen: tuple[str, ...]) -> Stack | None:
        own = [one for one in self.on_request if one.name in chosen]
        for index, one in enumerate(own):
            for other in (*self.for_all, *own[:index]):
                refuse_conflicts(other, one)
        patches = [one for one in (*self.for_all, *own) if len(one.entries)]
        if not patches:
            return None
        digests = tuple(map(patch_digest, patches))
        stores = [ArrayStore(f"the values of {one.name}", digest, one.values) for one, digest in zip(patches, digests)]
        rows = [ValueRows(store=store, encoding=patch.encoding) for store, patch in zip(stores, patches)]
        return stack_patches(patches, rows, digests)


def read_offer(for_all: Sequence[Path], on_request: Sequence[Path], *, self_test: bool = True) -> Offer:
    """Reads the patches of an engine.

    Raises:
        ValueError: as `read_patches`; or a patch replaces rows and is not for all requests.
    """
    offered = [patch for path in on_request for patch in read_patches([path], self_test=self_test)]
    for patch in offered:
        if patch.deltas:
            raise ValueError(
                f"The patch {patch.name!r} replaces rows of tables, which all requests read: it cannot be chosen by "
                "single requests, so apply it for all."
            )
    offer = Offer(read_patches(for_all, self_test=self_test), offered)
    names = [patch.name for patch in (*offer.for_all, *offered)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two patches are called {twice!r}: leave one out, or give it another name.")
    return offer


def replace_patched_rows(memory: Memory | None, patches: Sequence[Patch]) -> None:
    """Puts the rows of patches in front of the stores of a memory, which stay as they are.

    Raises:
        ValueError: a patch is for other tables, or there is no memory.
    """
    for patch in patches:
        if patch.deltas:
            if memory is None:
                raise ValueError(f"The patch {patch.name!r} replaces rows of tables, and this model has no memory.")
            check_tables(patch, memory)
    for layer in memory.config.layers if memory is not None else ():
        deltas = [patch.deltas[layer] for patch in patches if layer in patch.deltas]
        if deltas:
            assert memory is not None
            TableOverlay(memory.table(layer)).show(joined(deltas))


def apply_entries(model: Any, patches: Sequence[Patch], tokenizer: Any) -> Any:
    """Applies what patches add at blocks to transformers' model, whose rows are replaced in its stores already.

    Raises:
        ValueError: a patch is for another model or tokenizer.
    """
    for patch in patches:
        if len(patch.entries):
            apply_patch(model, replace(patch, tables=None, deltas={}), tokenizer)
    return model
