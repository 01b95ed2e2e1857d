"""MQuAKE's own form is read; what is missing is named."""

import json

import pytest

from engrammar.edit import Fact, read_facts, read_multihop

ROW = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} grows on",
            "relation_id": "P1",
            "subject": "Moss",
            "question": "What does Moss grow on?",
            "target_new": {"str": "glass", "id": "Q2"},
            "target_true": {"str": "stone", "id": "Q3"},
        }
    ],
    "questions": ["What is made of that on which moss grows?", "Of what on which moss grows is something made?"],
    "answer": "a wall",
    "answer_alias": ["walls"],
    "new_answer": "a window",
    "new_answer_alias": [],
    "single_hops": [
        {"question": "What does Moss grow on?", "cloze": "Moss grows on", "answer": "stone", "answer_alias": []}
    ],
    "new_single_hops": [
        {"question": "What does Moss grow on?", "cloze": "Moss grows on", "answer": "glass", "answer_alias": ["panes"]},
        {"question": "What is made of glass?", "cloze": "Of glass one makes", "answer": "a window", "answer_alias": []},
    ],
    "orig": {"triples": []},
}


def write(tmp_path, rows):
    path = tmp_path / "mquake.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_case_is_its_edits_its_question_and_its_hops(tmp_path):
    case, same = read_multihop(write(tmp_path, [ROW, ROW]))
    question = "What does Moss grow on?"
    assert case.facts == (Fact(subject="Moss", prompt="Moss grows on", object="glass", paraphrases=(question,)),)
    assert case.questions == tuple(ROW["questions"]) and case == same
    assert (case.answers, case.new_answers) == (("a wall", "walls"), ("a window",))
    assert [hop.prompt for hop in case.hops + case.new_hops] == ["Moss grows on", "Moss grows on", "Of glass one makes"]
    assert case.new_hops[0].answers == ("glass", "panes")


def test_a_question_that_does_not_name_the_subject_is_no_paraphrase(tmp_path):
    rewrite = {**ROW["requested_rewrite"][0], "question": "What does it grow on?"}
    (case,) = read_multihop(write(tmp_path, [{**ROW, "requested_rewrite": [rewrite]}]))
    assert case.facts[0].paraphrases == ()


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        (
            [ROW, {key: value for key, value in ROW.items() if key != "new_answer"}],
            "case 2 of .*: it has no 'new_answer'",
        ),
        ([{**ROW, "requested_rewrite": []}], "case 1 of .*: it edits nothing"),
        (
            [{**ROW, "requested_rewrite": [{**ROW["requested_rewrite"][0], "prompt": "It grows on"}]}],
            "does not name its",
        ),
        ([1], "case 1 of .* cannot be used"),
        ({}, "holds no list of cases"),
    ],
)
def test_what_is_no_case_is_one_sentence(rows, wrong, tmp_path):
    with pytest.raises(ValueError, match=wrong):
        read_multihop(write(tmp_path, rows))


def test_a_file_of_facts_and_one_of_cases_are_told_apart(tmp_path):
    with pytest.raises(
        ValueError, match="fact 1 of .*: it is a question of several hops: read the file with read_multihop"
    ):
        read_facts(write(tmp_path, [ROW]))
    with pytest.raises(ValueError, match="cannot read cases from"):
        read_multihop(tmp_path / "none.json")
