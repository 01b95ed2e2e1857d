"""How benches take turns, so that all contenders see the same machine."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

Name = TypeVar("Name")


def in_turn(names: Iterable[Name], num_turns: int) -> Iterator[tuple[int, int, Name]]:
    """Each name once a turn, beginning one further in every turn, so that none always follows the same one.

    Returns:
        the number of the turn, the place in it, and the name.
    """
    own = list(names)
    for turn in tqdm(range(num_turns), desc="measuring", unit="turn", delay=2, leave=False):
        for place in range(len(own)):
            yield turn, place, own[(turn + place) % len(own)]


def settle_allocator() -> None:
    """Brings the C library to keep freed memory, as it does in a process that has run for a while.

    Until one large block was freed it returns every output to the system, and each call then pays for fresh pages: up
    to three times the arithmetic, by chance of what ran before.
    """
    np.ones(31 * 2**20, dtype=np.uint8)
