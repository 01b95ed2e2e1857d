"""How benches take turns, so that all contenders see the same machine."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

Name = TypeVar("Name")


def in_turn(names: Iterable[Name], num_turns: int) -> Iterator[tuple[int, int, Name]]:
    """Yields each name once a turn. Each turn starts one name further on, so that the first is not always the same.

    Returns:
        the number of the turn, the place in it, and the name.
    """
    own = list(names)
    for turn in tqdm(range(num_turns), desc="measuring", unit="turn", delay=2, leave=False):
        for place in range(len(own)):
            yield turn, place, own[(turn + place) % len(own)]


def settle_allocator() -> None:
    """Makes the C library keep freed memory, as it does in a process that has run for a while.

    Until one large block has been freed, it returns every output to the system, and each call pays for fresh pages.
    That costs up to three times the arithmetic, depending on what ran before.
    """
    np.ones(31 * 2**20, dtype=np.uint8)
