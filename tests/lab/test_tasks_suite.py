"""The whole suite: every task within its length, planted answers found, scores equal to the plain scorer's."""

import json
import math
import zlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from engrammar.train import corpora
from engrammar_lab.tasks.questions import Question, fits
from engrammar_lab.tasks.scoring import Continuation
from engrammar_lab.tasks.suite import _summary, build_suite, read_corpus, score_suite
from engrammar_lab.tasks.yarn import stretched
from models import tiny_model
from tasks_models import Knows, byte_tokenizer, choose, recall, write_corpora

TOKENIZER = byte_tokenizer()
LENGTH = 330  # of bytes


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket")
    write_corpora(folder)
    return folder


def split_of(text: str):
    return ("seen", "unseen", None)[zlib.crc32(text.encode()) % 3]


@pytest.fixture(scope="module", autouse=True)
def few_common_words():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engrammar_lab.tasks.context.NUM_COMMON", 20)
        yield


@pytest.fixture(scope="module")
def suite(cache):
    return build_suite(TOKENIZER, split_of, cache=cache, length=LENGTH, per_task=6)


def test_every_task_is_there_and_within_its_length(suite):
    sizes = (LENGTH, 4 * LENGTH)
    facts = [f"{group}/{split}" for group in ("facts/choice", "facts/cloze") for split in ("seen", "unseen")]
    long = [
        f"{group}/{form}/{size}" for group in ("needle", "tracking") for form in ("choice", "exact") for size in sizes
    ]
    code = ["code/choice/unseen", "code/exact/unseen"]  # nothing of it is trained on
    assert sorted(suite) == sorted([*facts, "context/with", "context/without", *long, *code])
    for task, questions in suite.items():
        assert 0 < len(questions) <= 6
        limit = int(task.rsplit("/", 1)[1]) if task.split("/")[-1].isdigit() else LENGTH
        assert all(question.task == task and fits(TOKENIZER, question, limit) for question in questions)
        assert all(question.right not in question.context for question in questions if task.split("/")[0] == "facts")


def test_a_document_on_no_side_is_never_asked_about(cache, suite):
    documents = read_corpus("wordnet", split_of, cache=cache)
    entries = [entry.text for entry in corpora.entries("wordnet", cache=cache)]
    left_out = [text for text in entries if split_of(text) is None]
    assert len(documents) + len(left_out) == len(entries) and left_out
    for task in ("facts/choice/seen", "facts/choice/unseen", "facts/cloze/seen", "facts/cloze/unseen"):
        assert not any(text.startswith(question.context) for question in suite[task] for text in left_out)


def test_the_same_arguments_give_the_same_suite(cache, suite):
    assert build_suite(TOKENIZER, split_of, cache=cache, length=LENGTH, per_task=6) == suite
    assert build_suite(TOKENIZER, split_of, cache=cache, length=LENGTH, per_task=6, seed=1) != suite


def test_of_a_corpus_that_was_not_trained_on_nothing_is_seen(cache):
    suite = build_suite(TOKENIZER, split_of, cache=cache, length=LENGTH, per_task=6, trained_on=("stdlib", "wiki"))
    assert {"code/choice/seen", "code/choice/unseen"} <= set(suite)
    assert all(" is" in question.context for question in suite["facts/choice/unseen"])  # of the wiki alone
    none = build_suite(TOKENIZER, split_of, cache=cache, length=LENGTH, per_task=6, trained_on=())
    assert none and not any(task.endswith("/seen") for task in none)


def test_planted_answers_are_all_found_and_their_absence_too(suite):
    short = {task: questions for task, questions in suite.items() if not task.endswith(str(4 * LENGTH))}
    planted = [question.context + question.right for questions in short.values() for question in questions]
    knows = score_suite(Knows(TOKENIZER, planted).eval(), TOKENIZER, short, length=LENGTH)
    assert list(knows) == list(short)
    for task, result in knows.items():
        assert result["score"] == 1 and result["right"] == [1] * result["questions"] == [1] * len(suite[task])
        assert result["bits_per_byte"] < 1e-3
        assert result["measure"] == ("recall" if result["chance"] == 0 else "choice")
    assert knows["facts/choice/seen"]["chance"] == 0.25
    knows_nothing = score_suite(Knows(TOKENIZER).eval(), TOKENIZER, short, length=LENGTH)
    for task, result in knows_nothing.items():
        assert result["bits_per_byte"] == pytest.approx(8.0168, abs=1e-3)  # log2 of 259 ids, a byte each
        if result["measure"] == "recall":
            assert result["score"] == 0
        if task == f"needle/choice/{LENGTH}":  # equal lengths: the first choice is taken
            assert result["right"] == [int(question.answer == 0) for question in suite[task]]


def test_what_is_likely_anywhere_gains_nothing():
    question = Question(context="c", choices=(" a", " bb", " cc"), answer=1, task="made/up")
    scores = [
        Continuation(log_likelihood=log_likelihood, greedy=False, num_bytes=num_bytes)
        for log_likelihood, num_bytes in ((-1.0, 2), (-2.1, 3), (-1.2, 3))
    ]
    result = _summary([question], [scores], {" a": -1.0, " bb": -9.0, " cc": -1.5})
    assert (result["score"], result["right"]) == (1, [1])
    (total_right,) = _summary([replace(question, answer=0)], [scores], {" a": -1.0, " bb": -9.0, " cc": -1.5})["right"]
    assert total_right == 0 and result["bits_per_byte"] == pytest.approx(0.7 / math.log(2))


def test_scores_are_those_of_each_task_alone_and_longer_tasks_are_stretched(suite):
    model = tiny_model("qwen_next", vocab_size=len(TOKENIZER), max_position_embeddings=LENGTH)
    some = {
        task: suite[task][:1]
        for task in ("facts/cloze/seen", "context/with", f"needle/exact/{4 * LENGTH}", f"tracking/choice/{LENGTH}")
    }
    results = score_suite(model, TOKENIZER, some, length=LENGTH)
    for task, questions in some.items():
        far = task.endswith(str(4 * LENGTH))
        with stretched(model, factor=4, length=LENGTH) if far else nullcontext():
            if len(questions[0].choices) == 1:
                right = recall(model, TOKENIZER, questions)
            else:
                chosen = choose(model, TOKENIZER, questions)[1]
                right = [choice == question.answer for choice, question in zip(chosen, questions)]
        assert results[task]["right"] == [int(each) for each in right]
    assert model.config.max_position_embeddings == LENGTH
    assert json.loads(json.dumps(results)) == results
    with pytest.raises(ValueError, match="max_position_embeddings"), torch.no_grad():
        recall(model, TOKENIZER, some[f"needle/exact/{4 * LENGTH}"])


def test_counts_that_cannot_be_are_refused(cache):
    with pytest.raises(ValueError, match="length is 330 and per_task 0"):
        build_suite(TOKENIZER, split_of, cache=cache, length=LENGTH, per_task=0)


def test_a_task_of_two_kinds_is_refused(suite):
    mixed = {"made/up": [suite["facts/choice/seen"][0], suite["facts/cloze/seen"][0]]}
    for task in (mixed, {"made/up": []}):
        with pytest.raises(ValueError, match="made/up mixes clozes"):
            score_suite(Knows(TOKENIZER).eval(), TOKENIZER, task, length=LENGTH)
