"""What the pair is measured by: each model for itself, tuned with other keys than the test's, kept when killed."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from engrammar.train.data import prepare
from engrammar.train.documents import read_documents
from engrammar.train.recipe import DataRecipe
from engrammar_lab import measure, studies
from engrammar_lab.measure import MEASURES, OFF, PAIR, SETTINGS, run_measures, split_of, tune, tuning_rows
from engrammar_lab.report import write_report
from engrammar_lab.studies import recipes, run_study
from engrammar_lab.tasks.needle import KEYS, Haystack, needle_questions
from models import tiny_model
from tasks_models import byte_tokenizer, write_corpora

SMALL = (
    "data.vocab_size=300", "data.batch_size=2", "trainer.max_steps=2", "trainer.warmup_steps=1", "data.keep_share=0.5",
    "data.validation_share=0.3", "data.sequence_length=192", "model.settings.num_hidden_layers=3", "model.rho=0.8",
)  # fmt: skip


def test_seen_is_what_the_tokens_were_made_of(tmp_path):
    write_corpora(tmp_path / "pocket")
    data = DataRecipe(source="pocket:wiki+gcide", keep_share=0.6, validation_share=0.3, folder=str(tmp_path))
    tokens = prepare(replace(data, vocab_size=300), out=tmp_path / "t", cache=tmp_path / "pocket")
    sides = [split_of(data, text) for text in read_documents(data.source, cache=tmp_path / "pocket")]
    assert sides.count("seen") == tokens.splits["train"].num_documents and "unseen" in sides


@pytest.mark.slow
def test_tuning_teaches_the_format_and_uses_other_keys_than_the_test(tmp_path):
    write_corpora(tmp_path / "pocket")
    assert not set(KEYS["test"].split()) & set(KEYS["training"].split())
    tokenizer = byte_tokenizer()
    model = tiny_model("qwen_next", vocab_size=len(tokenizer))
    data = DataRecipe(source="pocket:wiki", sequence_length=420, folder=str(tmp_path))
    haystack = Haystack.of(["Once upon a time there was a king. He had nothing to do at all."], tokenizer)
    asked = needle_questions(haystack, tokenizer, length=420, num=12, seed=3)
    scored = partial(_loss_of_answers, model, tokenizer, asked)
    before = scored()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SETTINGS", replace(SETTINGS, tuning_batch=4, tuning_lr=1e-2))
        tune(model, tuning_rows(tokenizer, data, seed=0, num_steps=25))
    assert scored() < 0.8 * before and not model.training


@torch.no_grad()
def _loss_of_answers(model, tokenizer, questions) -> float:
    from engrammar_lab.tasks.needle import training_row

    rows = [training_row(tokenizer, question, 420) for question in questions]
    return float(model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss)


@pytest.mark.slow
def test_a_pair_is_measured_once_and_makes_every_section_of_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "SETTINGS", replace(SETTINGS, num_tuning_steps=2, num_questions=5))
    for module in (measure, studies):  # other processes would not know of these settings
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr("engrammar_lab.tasks.context.NUM_COMMON", 20)
    write_corpora(tmp_path / "data" / "pocket")
    how = {"runs": tmp_path / "runs", "seeds": 2, "results": tmp_path / "results", "overrides": SMALL}
    with pytest.raises(ValueError, match="holds no finished run: engrammar lab run pair"):
        run_measures(**how)
    run_study("pair", **how)
    run_measures(**how)
    queue = recipes("pair", tmp_path / "runs", range(2), SMALL)
    found = json.loads((tmp_path / queue[PAIR[1], 1].out / "measures.json").read_text())["found"]
    assert set(found["tasks"]) == {*PAIR, OFF}
    names = set(found["tasks"][OFF])
    assert {"facts/choice/unseen", "needle/choice/768", "needle/choice/768/tuned", "code/choice/unseen"} <= names
    assert all(set(scores) == names for scores in found["tasks"].values())
    own = found["tasks"][PAIR[1]]["facts/choice/unseen"]["bits_per_byte"]
    assert own != found["tasks"][OFF]["facts/choice/unseen"]["bits_per_byte"]
    monkeypatch.setattr(measure, "measure_pair", lambda *_: pytest.fail("measured again"))
    run_measures(**how)
    tasks = json.loads((tmp_path / "results" / "tasks.json").read_text())
    assert tasks["tasks"]["facts/choice/unseen"]["bits_per_byte"][PAIR[1]][1] == pytest.approx(own, rel=1e-5)
    assert [run["seed"] for run in json.loads((tmp_path / "results" / "depth.json").read_text())["runs"]] == [0, 1]
    write_report(tmp_path / "results")
    page = (tmp_path / "results" / "report.html").read_text()
    assert all(f'id="{name}"' in page for name in (*MEASURES, "pair"))


def test_a_seed_that_was_measured_on_another_day_is_taken_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(measure, "finished", lambda recipe: {} if recipe.seed in trained else None)
    score = {"measure": "choice", "chance": 0.25, "questions": 4, "bits_per_byte": 1.0, "right": [0, 1, 1, 0]}
    calls = []

    def measured(memory, plain):
        calls.append(memory.seed)
        return {"tasks": {point: {"facts": score | {"score": 0.5 + memory.seed}} for point in (*PAIR, OFF)}}

    monkeypatch.setattr(measure, "_measured", measured)
    trained, path = set(), tmp_path / "horizon-tasks.json"
    with pytest.raises(ValueError, match="holds no finished run: engrammar lab run horizon"):
        run_measures("horizon", results=tmp_path, seeds=2)
    trained.add(0)
    run_measures("horizon", results=tmp_path, seeds=2)
    assert [run["seed"] for run in json.loads(path.read_text())["runs"]] == [0]
    trained.symmetric_difference_update({0, 1})  # seed 0 was trained on a machine that is gone
    run_measures("horizon", results=tmp_path, seeds=2)
    assert calls == [0, 1]
    made = json.loads(path.read_text())
    assert [run["tasks"][OFF]["facts"]["score"] for run in made["runs"]] == [0.5, 1.5]
    assert "right" not in made["runs"][0]["tasks"][OFF]["facts"]
    assert made["command"] == "engrammar lab measure --study horizon --seeds 2"
    monkeypatch.setattr(measure, "SETTINGS", replace(SETTINGS, num_questions=SETTINGS.num_questions + 1))
    with pytest.raises(ValueError, match="holds no finished run"):  # seed 0 would have to be measured anew
        run_measures("horizon", results=tmp_path, seeds=2)
    with pytest.raises(ValueError, match="gate has no pair of models to measure; studies that have one: pair, horizon"):
        run_measures("gate", results=tmp_path)


def test_what_was_measured_with_other_settings_is_measured_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        measure, "measure_pair", lambda memory, plain: calls.append(memory.out) or {"tasks": len(calls)}
    )
    pair = recipes("pair", tmp_path, (0,))
    own, other = (replace(pair[point, 0], out=str(tmp_path)) for point in PAIR[::-1])
    assert measure._measured(own, other) == measure._measured(own, other) == {"tasks": 1}
    monkeypatch.setattr(measure, "SETTINGS", replace(SETTINGS, num_questions=SETTINGS.num_questions + 1))
    assert measure._measured(own, other) == measure._measured(own, other) == {"tasks": 2}
