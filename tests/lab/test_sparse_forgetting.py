"""Learning a text equally well in several ways, on a tiny model: the sparse memory changes less of other text."""

import json
from dataclasses import replace

import pytest
from report_results import made_forgetting
from small_lessons import AMOUNT, SMALL, small_place

from engrammar_lab.adapters import forgetting
from engrammar_lab.adapters.forgetting import BASE, SPARSE, WAYS, Equal
from engrammar_lab.report.forgetting import forgetting_section

HOW = replace(SMALL, memory_lr=1e-2, lora_lr=2e-2, full_lr=5e-3)
EQUAL = Equal(nats=5.4, blocks=4, epochs=40, rows=60)


def run(place, **more):
    chosen = {"seeds": 1, "jobs": 1, "amount": replace(AMOUNT, background="gcide"), "how": HOW, "equal": EQUAL, **more}
    return forgetting.run_forgetting(**place, **chosen)


@pytest.mark.slow
def test_each_way_stops_when_the_text_is_known_and_is_run_once(tmp_path, monkeypatch):
    place = small_place(tmp_path, monkeypatch, forgetting)
    made = run(place)
    runs = {one["way"]: one for one in made["runs"]}
    assert list(runs) == list(WAYS)
    assert json.loads((place["results"] / "forgetting.json").read_text()) == made
    for way in WAYS:
        if way != BASE:
            assert runs[way]["reached"] and runs[way]["taught/nats"] < 5.5 < runs[BASE]["taught/nats"]
    assert runs[SPARSE]["background_reads_changed"] < runs["memory"]["background_reads_changed"]
    monkeypatch.setattr(forgetting, "_teach", lambda *_: pytest.fail("taught again"))
    assert run(place)["runs"] == made["runs"]
    with pytest.raises(pytest.fail.Exception):  # another equality is another study
        run(place, equal=replace(EQUAL, nats=5.3))
    with pytest.raises(ValueError, match="jobs 0"):
        run(place, jobs=0)


def test_who_has_not_learned_it_is_marked_and_no_way_is_a_verdict_yet():
    section = forgetting_section(made_forgetting())
    assert section.verdict.answer.startswith("Nats by which the model's own chat gets less likely: memory")
    assert section.verdict.sure == "memory and LoRA"
    rows = {row[0]: row for row in section.body[1].rows}
    assert rows["LoRA"][6] == "2 of 3" and rows["memory"][6] == "3 of 3" and rows[BASE][6] == ""
    some = made_forgetting()
    some["runs"] = [one for one in some["runs"] if one["way"] == BASE]
    assert forgetting_section(some).verdict.answer == "No way was run yet."
