"""Tables of words can be read at any width, and lose no cell."""

import pytest

from engrammar.cells import Column, as_markdown, as_text, cells, titles

HEADER = ["name", "rows a head", "a title of many words", "ms", "share"]
LINES = [["row_adam", "10,000", "6.8 (1.7, 46%)", "+0.5", ""], ["none", "7", "", "-12.25", "30%"]]


@pytest.mark.parametrize("width", [24, 40, 60, 200])
def test_no_line_is_wider_than_the_terminal_and_no_cell_is_lost(width):
    text = as_text(HEADER, LINES, width=width)
    tables = [table.splitlines() for table in text.split("\n\n")]
    assert all(len(line) <= width for table in tables for line in table)
    for line in LINES:
        found = [shown for table in tables for shown in table if shown.startswith(line[0])]
        assert len(found) == len(tables) and all(cell in " ".join(found) for cell in line)
    assert all(word in text for title in HEADER for word in title.split())
    assert (len(tables) == 1) == (width >= 60)


def test_columns_of_numbers_are_to_the_right_and_stand_under_their_title():
    text = as_text(["name", "ms", "kind"], [["a", "1.5", "x"], ["b", "-10.25", "yy"]], width=80)
    assert text == "name      ms  kind\n----  ------  ----\na        1.5  x\nb     -10.25  yy"


def test_keys_of_several_columns_are_repeated():
    header, lines = ["batch", "rows", "tokens/s", "misses"], [["1", "disk, cold", "23.3", "0"]]
    assert as_text(header, lines, num_keys=2, width=28).count("disk, cold") == 2


def test_cells_are_what_the_columns_say():
    columns = (
        Column("million", "times.rate", ".1f", 1e6),
        Column("rows", "rows", ","),
        Column("share", "share", ".0%"),
    )
    assert cells(columns, {"times": {"rate": 2_340_000}, "rows": 12_000, "share": None}) == ["2.3", "12,000", ""]
    assert as_markdown(titles(columns), [["2.3", "12,000", ""]])[1:] == ["| --- | --- | --- |", "| 2.3 | 12,000 |  |"]
