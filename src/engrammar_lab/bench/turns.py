"""How benches take turns, so that all contenders see the same machine."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

Name = TypeVar("Name")
T = TypeVar("T")


def in_turn(names: Iterable[Name], num_turns: int) -> Iterator[tuple[int, int, Name]]:
    """Yields each name once a turn. Each turn starts one name further on, so that the first is not always the same.

    Returns:
        the number of the turn, the place in it, and the name.
    """
    own = list(names)
    for turn in tqdm(range(num_turns), desc="measuring", unit="turn", delay=2, leave=False):
        for place in range(len(own)):
            yield turn, place, own[(turn + place) % len(own)]


def measured_in_turn(
    measure: Callable[[int, int, Name], T], names: Collection[Name], num_turns: int, *, warm_up: int = 0
) -> dict[Name, list[T]]:
    """What `measure(turn, place, name)` returns for each name, turn by turn, after some turns of warming up."""
    found: dict[Name, list[T]] = {name: [] for name in names}
    for turn, place, name in in_turn(names, warm_up + num_turns):
        value = measure(turn, place, name)
        if turn >= warm_up:
            found[name].append(value)
    return found


def seconds_of(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    """Waits until all work that was started on an accelerator is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def rates_of(seconds: Mapping[str, Sequence[float]], amount: float, unit: str) -> dict[str, dict[str, Any]]:
    """Per name, units a second by the median and at best, and the median time; each time is that of `amount` units."""
    return {
        name: {
            f"{unit}_per_second": amount / median(own),
            f"best_{unit}_per_second": amount / min(own),
            "milliseconds": 1e3 * median(own),
        }
        for name, own in seconds.items()
    }


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Times over other times: the median over turns, in each of which both saw the same machine."""
    return median(one / other for one, other in zip(seconds, others, strict=True))


def settle_allocator() -> None:
    """Makes the C library keep freed memory, as it does in a process that has run for a while.

    Until one large block has been freed, it returns every output to the system, and each call pays for fresh pages.
    That costs up to three times the arithmetic, depending on what ran before.
    """
    np.ones(31 * 2**20, dtype=np.uint8)
