"""Tables of figures: turns values into cells, and cells into text for a terminal or into Markdown."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Lines = Sequence[Sequence[str]]
GAP, SHORT = "  ", 12


class Column(NamedTuple):
    """One column of a table of results."""

    title: str
    key: str  # the key of the value in a result; dots lead into nested dicts. A value of None gives an empty cell.
    form: str = ""  # the format of a value, as `format` takes it
    per: float = 1  # the unit; values are divided by it

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


def as_text(header: Sequence[str], lines: Lines, *, num_keys: int = 1, width: int | None = None) -> str:
    """Draws columns side by side, numbers aligned to the right.

    A table wider than `width` (default: the terminal's width, or 80 without a terminal) is continued below. There its
    first `num_keys` columns are repeated, so that every line can be read.
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
    """The width of the longest cell or of the title's longest word; a short title is not broken into words."""
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
    """Wraps a paragraph to the width of the terminal."""
    return textwrap.fill(text, shutil.get_terminal_size().columns)
