"""The page of measurements follows from the committed JSON."""

from engrammar.bench.report import DOCUMENT, render


def test_the_committed_page_is_made_from_the_committed_json():
    assert DOCUMENT.read_text() == render()
