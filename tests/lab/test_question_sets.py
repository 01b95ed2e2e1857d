"""What the question sets promise: the package's lines become questions, and lines that say nothing are left out."""

import json
from pathlib import Path

import pytest

from engrammar_lab import question_sets
from engrammar_lab.question_sets import SETS, parse, questions
from engrammar_lab.tasks.questions import read_questions, write_questions


def line(question: str, options: str, answer: str, **more: object) -> str:
    return json.dumps({"question": question, "options": options, "answer": answer, **more})


def test_options_become_choices_and_the_answer_their_index():
    (question,) = parse("openbookqa", [line("Owls eat ", "A. stones\nB. mice \nC. glass", "B. mice ")])
    assert question.context == "Owls eat" and question.choices == (" stones", " mice", " glass")
    assert question.answer == 1 and question.task == "openbookqa"
    (question,) = parse("commonsenseqa", [line("Where are owls?", "\nA. in barns\nB. in soup", "A. in barns")])
    assert question.context == "Question: Where are owls?\nAnswer:" and question.right == " in barns"
    (question,) = parse("piqa", [line("Open a tin", "A. bite\nB. use a tin opener", "B. use a tin opener")])
    assert question.right == " use a tin opener"


def test_mmlu_lists_the_options_and_asks_for_the_letter():
    (question,) = parse("mmlu", [line(" What is 2 + 2? ", "A. 3\nB. 5\nC. 4\nD. 4", "C. 4")])
    assert question.context == "What is 2 + 2?\nA. 3\nB. 5\nC. 4\nD. 4\nAnswer:"
    assert question.choices == (" A", " B", " C", " D") and question.right == " C"


def test_boolq_reads_the_passage_and_says_yes_or_no():
    lines = [json.dumps({"question": "are owls birds", "passage": "Owls fly.", "title": "Owl", "answer": "True"})]
    (question,) = parse("boolq", lines)
    assert question.context == "Owls fly.\nQuestion: are owls birds?\nAnswer:" and question.right == " yes"
    assert parse("boolq", [lines[0].replace('"True"', '"False"')])[0].right == " no"


def test_nq_open_keeps_every_accepted_answer_once():
    (question,) = parse("nq-open", [json.dumps({"question": "who hoots", "answer": ["Owls", "an owl", "Owls"]})])
    assert question.context == "Q: who hoots?\nA:" and question.choices == (" Owls", " an owl")


@pytest.mark.parametrize(
    "damaged",
    [
        line("What is\nA. one", "\nB. two\nC. three", "B. two"),  # the first option went into the question
        line("Owls?", ".\nA. birds\nB. fish", "A. birds"),
        line("Owls?", "A. birds\nB. fish", "C. stones"),
        line("Owls?", "A. birds\nB. birds\nC. fish", "A. birds"),  # no choice is the right one
        "",
    ],
)
def test_lines_without_a_clear_answer_are_left_out(damaged):
    whole = line("Owls?", "A. birds\nB. fish", "A. birds")
    assert len(parse("commonsenseqa", [damaged, whole])) == 1


def test_cached_questions_are_read_without_fetching(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(question_sets, "_fetch", lambda cache: pytest.fail("fetched"))
    made = parse("piqa", [line("Open a tin", "A. bite\nB. cut", "B. cut")])
    write_questions(question_sets._path("piqa", tmp_path), made)
    assert questions("piqa", cache=tmp_path) == made


def test_an_unknown_set_is_a_clear_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown question set 'hellaswag': choose from mmlu, .*nq-open"):
        questions("hellaswag", cache=tmp_path)


@pytest.mark.slow
def test_the_pinned_package_holds_every_set(tmp_path: Path):
    assert len(questions("mmlu", cache=tmp_path)) == 2850
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {question_sets._path(name, tmp_path).name for name in SETS}
    for name in SETS:
        assert len(read_questions(question_sets._path(name, tmp_path))) == SETS[name].num_questions
