"""Figures as tables of words: how a value becomes a cell, and cells as text for a terminal or as Markdown."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Lines = Sequence[Sequence[str]]
GAP, SHORT = "  ", 12


class Column(NamedTuple):
    """What a column shows of a result.

    Attributes:
        key: of the value; dots lead into nested dicts. A value that is None is an empty cell.
        form: as `format` takes it.
        per: the unit, by which values are divided.
    """

    title: str
    key: str
    form: str = ""
    per: float = 1

    def cell(self, figures: Mapping[str, Any]) -> str:
        value: Any = figures
        for key in self.key.split("."):
            value = value[key]
        return "" if value is None else format(value if self.per == 1 else value / self.per, self.form)


def cells(columns: Sequence[Column], figures: Mapping[str, Any]) -> list[str]:
    """The cells of one line."""
    return [column.cell(figures) for column in columns]


def titles(columns: Sequence[Column]) -> list[str]:
    """The cells of the header."""
    return [column.title for column in columns]


def by_name(title: str, columns: Sequence[Column], named: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], Lines]:
    """Header and lines of a table with a line for each name, which is in the column `title`."""
    return [title, *titles(columns)], [[name, *cells(columns, figures)] for name, figures in named.items()]


def as_text(header: Sequence[str], lines: Lines, *, num_keys: int = 1, width: int | None = None) -> str:
    """Columns side by side, those of numbers to the right.

    A table wider than `width` (the terminal's; 80 where there is none) goes on below, its first `num_keys` columns
    repeated, so that every line can be read.
    """
    width = width or shutil.get_terminal_size().columns
    columns = [[title, *(line[place] for line in lines)] for place, title in enumerate(header)]
    keys, parts = columns[:num_keys], [list[list[str]]()]
    for column in columns[num_keys:]:
        if parts[-1] and sum(_width(each) + len(GAP) for each in (*keys, *parts[-1])) + _width(column) > width:
            parts.append([])
        parts[-1].append(column)
    return "\n\n".join(_draw([*keys, *part]) for part in parts)


def _width(column: Sequence[str]) -> int:
    """As wide as the longest cell and the longest word of the title, of which a short one is not broken."""
    title, *cells = column
    return max(1, *map(len, cells), *map(len, title.split()), min(len(title), SHORT))


def _draw(columns: Sequence[Sequence[str]]) -> str:
    wrapped = [textwrap.wrap(title, _width([title, *cells])) for title, *cells in columns]
    num_rows, drawn = max(map(len, wrapped)), []
    for title, column in zip(wrapped, columns):
        width, cells = _width(column), column[1:]
        numbers = all(cell in ("", "?") or cell.lstrip("+-±")[:1].isdigit() for cell in cells)
        rows = (*[""] * (num_rows - len(title)), *title, "-" * width, *cells)
        drawn.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in rows])
    return "\n".join(GAP.join(line).rstrip() for line in zip(*drawn))


def as_markdown(header: Sequence[str], lines: Lines) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]


def in_lines(text: str) -> str:
    """A paragraph in lines as long as the terminal's."""
    return textwrap.fill(text, shutil.get_terminal_size().columns)
