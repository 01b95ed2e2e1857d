"""The check of transformers' types finds what is exact, what is refused, and what would be wrong."""

import pytest

from engrammar.attach import passes
from engrammar_lab.bench import families
from engrammar_lab.bench.families import EXACT, WRONG, group, measure


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("llama", EXACT),
        ("qwen3_next", EXACT),
        ("gemma3", EXACT),
        ("bert", "refused with a sentence"),
        ("openai-gpt", "the base itself does not go on from a cache"),
        ("longcat_flash", "no small model could be built"),
    ],
)
def test_what_is_said_of_a_type(kind, found):
    assert group(measure([kind])["families"][kind]) == found


def test_a_state_that_is_lost_and_a_base_that_is_not_back_are_found(monkeypatch):
    one = measure(["llama"])["families"]["llama"]
    assert group(one) == EXACT
    assert group({**one, "memory": {**one["memory"], "back": False}}) == WRONG
    monkeypatch.setattr(passes, "continue_state", lambda inputs, begin: begin)
    lost = measure(["llama"])["families"]["llama"]
    assert group(lost) == WRONG and lost["memory"]["apart"] > 1e-3 > lost["patch"]["apart"]


def test_the_verdict_counts_and_names():
    one = measure(["llama", "bert"])
    assert families.verdict(one).startswith("Of 2 types") and families.verdict(one).endswith("none.")
    header, lines = families.table(one)
    assert [line[1:] for line in lines] == [["1", "llama"], ["1", "bert"]] and len(header) == 3
