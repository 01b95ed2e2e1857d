"""Patches of a model in vLLM: rows of its tables that are replaced, from the start on."""

from collections.abc import Sequence
from pathlib import Path

from engrammar.edit import Patch, read_patch
from engrammar.edit.building import conflicts, in_conflict
from engrammar.edit.overlay import TableOverlay, check_tables, joined
from engrammar.memory import Memory


def replace_patched_rows(memory: Memory, paths: Sequence[Path]) -> None:
    """Puts the rows of patches in front of the stores of a memory, which stay as they are.

    vLLM's prefix cache is empty then, and patches stay as long as it runs, so it never answers from before a change.

    Raises:
        ValueError: a patch adds to hidden states, is for other tables, or is in conflict with another one.
    """
    patches: list[Patch] = []
    for path in paths:
        patch = read_patch(path)
        if len(patch.entries):
            raise ValueError(
                f"The patch {patch.name!r} adds to hidden states, and vLLM gets patches that replace rows of tables "
                "only: serve it with `engrammar serve --patch`, or leave it out."
            )
        check_tables(patch, memory)
        for other in patches:
            if found := conflicts(other, patch):
                raise ValueError(in_conflict(other.name, patch.name, found))
        patches.append(patch)
    for layer in memory.config.layers:
        deltas = [patch.deltas[layer] for patch in patches if layer in patch.deltas]
        if deltas:
            TableOverlay(memory.table(layer)).show(joined(deltas))
