"""What every way of changing facts gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engrammar.edit import Fact

Model = Any


def as_it_is(prompt: str) -> str:
    """A prompt, unchanged."""
    return prompt


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A model whose facts were changed in place.

    Attributes:
        undo: brings the model back to what it was, to the bit.
        num_bytes: what has to be kept, to make the same change to another copy of the model.
        refused: facts that were not written.
        worded: what is asked in place of a prompt or a text, where the facts are told in words.
    """

    undo: Callable[[], None]
    num_bytes: int
    refused: Sequence[Fact] = ()
    worded: Callable[[str], str] = as_it_is


# model, its tokenizer, facts in the order in which they come, seed -> the same model, changed
Way = Callable[[Model, Any, Sequence[Fact], int], Edited]
