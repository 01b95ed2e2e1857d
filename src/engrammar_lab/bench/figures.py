"""How benches show their figures: a table with a line for each part of a result, and whether a target is met."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from engrammar.cells import Column, Lines, cells, titles

Figures = Mapping[str, Any]


def line_by_line(
    columns: Sequence[Column], lines: Callable[[Figures], Iterable[Figures]]
) -> Callable[[Figures], tuple[list[str], Lines]]:
    """Returns the function that makes a table of a result: the header, and a line for each of `lines(result)`."""
    return lambda result: (titles(columns), [cells(columns, line) for line in lines(result)])


def named(found: Mapping[str, Figures]) -> list[Figures]:
    """The figures of each name, and the name as "name"."""
    return [{"name": name, **figures} for name, figures in found.items()]


def by_variant(parts: Iterable[Figures]) -> list[Figures]:
    """For each of the "variants" of each part, what the part has, the figures, and the name as "name"."""
    return [{**part, **figures} for part in parts for figures in named(part["variants"])]


def slashed(values: Iterable[float], form: str) -> str:
    """Numbers beside each other, as in "0.9 / 1.0"."""
    return " / ".join(format(value, form) for value in values)


def meets(holds: bool, target: object) -> str:
    """Whether a target is met, in words."""
    return f"{'meets' if holds else 'misses'} the target of {target}"
