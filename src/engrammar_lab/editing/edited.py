"""What every way of changing facts gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engrammar.edit import Fact

Model = Any


def nothing() -> None:
    """Takes back nothing."""


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A model whose facts were changed in place; without arguments, one that was not changed."""

    undo: Callable[[], None] = nothing  # brings the model back to what it was, to the bit
    num_bytes: int = 0  # what has to be kept, to make the same change to another copy of the model
    refused: Sequence[Fact] = ()  # facts that were not written
    worded: Callable[[str], str] = str  # what is asked in place of a prompt or a text, where facts are told in words


# model, its tokenizer, facts in the order in which they come, seed -> the same model, changed
Way = Callable[[Model, Any, Sequence[Fact], int], Edited]
