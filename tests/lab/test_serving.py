"""The report on serving is made from its JSON; the study loses just the rows it says, and scores what it says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from committed import RESULTS
from engrammar.stores.base import Arrived, RowsMissing, RowStore
from engrammar.train.data import prepare
from engrammar.train.recipe import DataRecipe
from engrammar_lab.serving import LossyStore, differences, make_questions, render, run_serving, score, write_serving
from models import tiny_model

TEXT = ["the cat sat on the mat and ate the rat " * 12, "a hash table maps keys to values by their sums " * 12]


def committed() -> dict:
    return json.loads((RESULTS / "serving" / "serving.json").read_text())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(40) for text in TEXT)
    )
    recipe = DataRecipe(source=str(folder / "text.jsonl"), vocab_size=300, validation_share=0.3)
    return prepare(recipe, out=folder / "tokens", cache=folder)


def test_the_committed_report_is_made_from_the_committed_json():
    assert (RESULTS / "serving" / "serving.md").read_text() == render(committed())


def test_every_kind_was_scored_on_three_seeds():
    result = committed()
    assert len(result["models"]) == 3
    assert all(len(found["scores"]) == 3 for part in ("encodings", "missing") for found in result[part].values())
    assert differences(result["encodings"]["fp32"], result["missing"]["gate closed 0%"], "bits_per_byte") == [0, 0, 0]


class Numbered(RowStore):
    name, identity, num_rows, row_bytes = "numbers", "numbers", 5000, 1

    def _fetch(self, rows_U):
        return Arrived((rows_U % 251).astype(np.uint8)[:, None])

    def close(self):
        pass


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_a_lossy_store_always_lacks_the_same_share_of_rows(share):
    rows = np.arange(5000)
    with pytest.raises(RowsMissing) as lost:
        LossyStore(Numbered(), share).fetch(rows).wait()
    missing = lost.value.missing_U
    assert missing.mean() == pytest.approx(share, rel=0.2)
    few = rows[missing][:3].copy()
    with pytest.raises(RowsMissing) as again:
        LossyStore(Numbered(), share).fetch(few).wait()
    assert again.value.missing_U.all()
    if share < 1:
        kept = rows[~missing]
        assert (LossyStore(Numbered(), share).fetch(kept).wait()[:, 0] == kept % 251).all()


def test_questions_begin_alike_and_only_the_first_continuation_is_their_own(tokens):
    questions = make_questions(tokens, end_id=1)
    assert questions.shape[1:] == (4, 48) and (questions[:, :, :24] == questions[:, :1, :24]).all()
    text = tokens.read("validation", 0, tokens.num_tokens("validation")).tolist()
    own = questions[0, 0].tolist()
    assert any(text[i : i + 48] == own for i in range(len(text)))


@torch.no_grad()
def test_a_model_that_knows_the_text_scores_all_and_one_that_knows_nothing_little(tokens):
    questions = make_questions(tokens, end_id=1)[:4]
    after = {}
    text = tokens.read("validation", 0, tokens.num_tokens("validation"))
    for one, two, three in zip(text, text[1:], text[2:]):
        after[int(one), int(two)] = int(three)

    class Knows(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            logits = torch.zeros(*input_ids.shape, 300)
            for row, ids in enumerate(input_ids.tolist()):
                for place, pair in enumerate(zip([-1, *ids], ids)):
                    if pair in after:
                        logits[row, place, after[pair]] = 20.0
            return SimpleNamespace(logits=logits)

    class Guesses(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 300))

    knows, guesses = score(Knows(), tokens, questions), score(Guesses(), tokens, questions)
    assert knows["next_token"] > 0.5 > guesses["next_token"] and knows["bits_per_byte"] < guesses["bits_per_byte"]
    bytes_per_token = tokens.num_bytes("validation") / tokens.num_tokens("validation")
    assert guesses["bits_per_byte"] == pytest.approx(np.log2(300) / bytes_per_token, rel=1e-4)


@pytest.mark.slow
def test_the_study_runs_on_any_model(tokens, tmp_path, monkeypatch):
    model = tiny_model("qwen_next", vocab_size=300, num_ids=300, num_classes=300, eos_token_id=1)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("engrammar_lab.serving.SHARES", (0.0, 1.0))
    result = run_serving([tmp_path / "model"] * 2, tokens)
    assert result["missing"]["zeros 100%"]["closed"] == [0, 0] and result["missing"]["gate closed 100%"]["closed"] == [
        1,
        1,
    ]
    assert result["encodings"]["int4"]["bytes_per_row"] == 3 + 2
    scores = [found["scores"][0]["bits_per_byte"] for found in result["encodings"].values()]
    assert len(set(scores)) > 3 and max(scores) - min(scores) < 0.5


def test_results_go_where_the_caller_is(tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"runs/demo holds no moe-memory-\*"):
        write_serving(tokens=tokens.path)
    (tmp_path / "runs" / "demo" / "moe-memory-0").mkdir(parents=True)
    monkeypatch.setattr("engrammar_lab.serving.run_serving", lambda models, tokens: committed())
    write_serving(tokens=tokens.path)
    assert (tmp_path / "results/serving/serving.md").read_text() == render(committed())
