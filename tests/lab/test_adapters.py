"""The study of attached memories: every way of teaching, on a tiny model, and what its section says."""

import json
from dataclasses import replace

import pytest
import torch
from report_results import blank_pictures, made_attach
from small_lessons import AMOUNT, SMALL, small_place
from transformers import AutoModelForCausalLM, AutoTokenizer

from engrammar_lab.adapters import measures, study
from engrammar_lab.adapters.lessons import make_lesson
from engrammar_lab.adapters.measures import nats_per_token, share_right
from engrammar_lab.adapters.variants import VARIANTS
from engrammar_lab.report.adapters import attach_section
from engrammar_lab.tasks.questions import Question


@pytest.fixture
def place(tmp_path, monkeypatch):
    return small_place(tmp_path, monkeypatch, study)


def run(place, **more):
    return study.run_attach(**place, **{"seeds": 1, "jobs": 1, "amount": AMOUNT, "how": SMALL, **more})


@pytest.mark.slow
def test_every_way_is_run_once_and_goes_on_another_day(place, monkeypatch):
    made = run(place)
    assert [run["variant"] for run in made["runs"][: len(VARIANTS)]] == list(VARIANTS)
    assert len(made["runs"]) == 2 * len(VARIANTS)
    own = {run["variant"]: run for run in made["runs"] if run["domain"] == "computing"}
    assert own["as it was"]["trained"] == 0 and own["full tuning"]["trained"] == own["full tuning"]["stored"]
    assert own["memory"]["trained"] <= own["LoRA, equal parameters"]["trained"]
    assert own["memory"]["taught/nats"] < own["as it was"]["taught/nats"] - 0.01
    assert own["memory of one row"]["stored"] < own["memory"]["stored"]
    assert own["training-free"]["trained"] == 0 and own["training-free"]["stored"] == own["memory"]["stored"]
    assert own["memory, rows shuffled"]["taught/nats"] > own["memory"]["taught/nats"]
    ways = {run["taught/nats"]: name for name, run in own.items()}
    assert set(ways.values()) == set(VARIANTS)  # no way did nothing, or what another did
    monkeypatch.setattr(study, "_teach", lambda *_, **__: pytest.fail("taught again"))
    assert run(place)["runs"] == made["runs"]
    assert json.loads((place["results"] / "attach.json").read_text())["runs"] == made["runs"]
    with pytest.raises(pytest.fail.Exception):  # other settings are another study
        run(place, how=replace(SMALL, epochs=1))
    with pytest.raises(ValueError, match="seeds is 0"):
        run(place, seeds=0)


def test_lessons_are_the_same_for_every_model_and_others_for_every_seed(place):
    tokenizer = AutoTokenizer.from_pretrained(place["base"])
    one, same, other = (make_lesson("computing", seed, tokenizer, place["cache"], AMOUNT) for seed in (0, 0, 1))
    assert torch.equal(one.taught, same.taught) and one.facts == same.facts
    assert one.taught.shape != other.taught.shape or not torch.equal(one.taught, other.taught)
    held = tokenizer.decode(one.held.flatten())
    assert one.facts["facts/recall/seen"]
    for question in one.facts["facts/recall/seen"]:
        assert question.context + question.right not in held


def test_measures_are_those_of_transformers(place):
    model = AutoModelForCausalLM.from_pretrained(place["base"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(place["base"])
    ids = torch.randint(3, 200, (11, 24), generator=torch.Generator().manual_seed(0))
    assert nats_per_token(model, ids) == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)
    prompt = tokenizer("the moss", return_tensors="pt").input_ids
    start = torch.tensor([[tokenizer.eos_token_id]])
    written = model.generate(torch.cat([start, prompt], 1), max_new_tokens=3, do_sample=False)[0, -3:]
    right = Question(context="the moss", choices=(tokenizer.decode(written),), answer=0, task="t")
    wrong = replace(right, choices=(" tern",))
    if tokenizer(right.right, add_special_tokens=False).input_ids == written.tolist():  # else the text reads otherwise
        assert share_right(model, tokenizer, [right, wrong]) == 0.5
    chats = [("the moss", " grows on stone")]
    ids = tokenizer("the moss", add_special_tokens=False).input_ids, tokenizer(" grows on stone").input_ids
    whole = torch.tensor([[tokenizer.eos_token_id, *ids[0], *ids[1]]])
    labels = whole.clone()
    labels[0, : 1 + len(ids[0])] = -100
    expected = float(model(whole, labels=labels).loss)
    assert measures.chat_nats(model, tokenizer, chats) == pytest.approx(expected, abs=1e-5)


def test_aims_are_told_as_reached_or_missed(monkeypatch):
    blank_pictures(monkeypatch)
    section = attach_section(made_attach())
    told = " ".join(part for part in section.body if isinstance(part, str))
    assert "computing: at equal seconds memory recalls 0.610 of the taught definitions, LoRA 0.210" in told
    assert told.count("reached.") == 8 and "missed" not in told
    assert section.verdict.answer.startswith("Share of taught definitions recalled, memory less LoRA at equal seconds")
    assert section.verdict.sure == "computing and encyclopaedia"
    told = " ".join(part for part in attach_section(made_attach(memory=0.3, chat=0.02)).body if isinstance(part, str))
    assert told.count("missed.") == 4  # twice LoRA's recall, and chat
    assert "computing: with memory, rare rows, chat moves by" in told
    some = made_attach()
    some["runs"] = [run for run in some["runs"] if (run["variant"], run["seed"]) != ("memory", 1)]
    assert attach_section(some).verdict.answer == "No lesson has memory and LoRA yet."
