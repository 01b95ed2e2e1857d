"""Patches of a model in vLLM, from the start on: rows of its tables that are replaced, and what is added at blocks.

vLLM's prefix cache is empty at the start, and patches stay as long as it runs: it never answers from before a change.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engrammar.edit import Patch, apply_patch, read_patch
from engrammar.edit.building import conflicts, in_conflict
from engrammar.edit.overlay import TableOverlay, check_tables, joined
from engrammar.memory import Memory


def read_patches(paths: Sequence[Path], *, self_test: bool) -> list[Patch]:
    """Reads files of patches.

    Args:
        self_test: whether the served model is compared with transformers' before it serves.

    Raises:
        ValueError: a patch is damaged, two have one name or are in conflict, or one adds to hidden states and is not
            to be compared.
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
            if found := conflicts(other, patch):
                raise ValueError(in_conflict(other.name, patch.name, found))
            if other.name == patch.name:
                raise ValueError(f"Two patches are called {patch.name!r}: leave one out, or give it another name.")
        patches.append(patch)
    return patches


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
