"""Patches that are offered to the requests of a continuous batch: each request chooses its own.

An engine says in the paged cache which stack each request has chosen (`sequences.STACKS`). Row deltas cannot be chosen:
all requests read the same tables.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from engrammar.edit.applying import Applied, Edits, add_patch, edits_of, forget_edits, refuse_beside
from engrammar.edit.patch import Patch
from engrammar.edit.stack import Stack


def offer_patch(model: nn.Module, patch: Patch | str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Offers a patch to requests. Passes that no request has chosen it for stay as they are.

    Raises:
        ValueError: as `apply_patch`, but for conflicts, which `chosen_stack` refuses; or it replaces rows.
    """

    def add(edits: Edits, one: Applied) -> None:
        if one.patch.deltas:
            raise ValueError(
                f"The patch {one.patch.name!r} replaces rows of tables, which all requests read: it cannot be chosen "
                "by single requests, so apply it for all."
            )
        edits.set(edits.applied, [*edits.offered, one])

    add_patch(model, patch, tokenizer, "ram", add)


def withdraw_patch(model: nn.Module, name: str) -> None:
    """Offers a patch no longer.

    Raises:
        ValueError: it is not offered.
    """
    edits = edits_of(model)
    if edits is None or name not in offered_patches(model):
        raise ValueError(f"No patch {name!r} is offered; offered are: {', '.join(offered_patches(model)) or 'none'}.")
    edits.set(edits.applied, [one for one in edits.offered if one.patch.name != name])
    forget_edits(model)


def offered_patches(model: nn.Module) -> list[str]:
    """The names of the patches that requests may choose, in the order in which they were offered."""
    edits = edits_of(model)
    return [] if edits is None else [one.patch.name for one in edits.offered]


def chosen_stack(model: nn.Module, names: Sequence[str]) -> Stack | None:
    """What a request with these patches is read with: those that are applied, then its own, as they were offered.

    Args:
        names: of patches that are offered or applied, in any order.

    Raises:
        ValueError: two of the patches change the same differently, or cannot be stacked.
    """
    edits = edits_of(model)
    if edits is None:
        assert not names
        return None
    chosen = [one for one in edits.offered if one.patch.name in names]
    if not chosen:
        return edits.hooks.stack
    for index, one in enumerate(chosen):
        refuse_beside(one, [*edits.applied, *chosen[:index]])
    return edits.stack_of([*edits.applied, *chosen])
