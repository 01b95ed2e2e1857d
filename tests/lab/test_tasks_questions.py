"""Questions hold their answer once, seen and unseen share nothing, and a seed gives the same questions."""

import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engrammar.train.data import train_tokenizer
from engrammar_lab.tasks.code import code_questions, function_lines
from engrammar_lab.tasks.context import WORD, Frequencies, context_questions
from engrammar_lab.tasks.facts import fact_questions, read_fact
from engrammar_lab.tasks.needle import KEYS, LETTERS, Haystack, needle_questions, tracking_questions, training_row
from engrammar_lab.tasks.questions import Document, Question, count_tokens, fits, read_questions, write_questions
from tasks_models import byte_tokenizer

TOKENIZER = byte_tokenizer()
NOUNS = [
    "stone",
    "river",
    "castle",
    "engine",
    "garden",
    "market",
    "planet",
    "forest",
    "bridge",
    "island",
    "museum",
    "valley",
]
COLOURS = ["red", "green", "blue", "white", "black", "brown", "grey", "purple"]
PROSE = [f"The old {noun} was near the {other} of this town." for noun in NOUNS for other in NOUNS]


def glosses() -> list[Document]:
    """96 nouns; every third unseen, and the first unseen one's definition stands in a seen text."""
    documents = [
        Document(
            corpus="wordnet",
            text=f'{colour}{noun}, {noun} that is {colour} (noun): a kind of {noun} found in {place}; "an example"',
            split="unseen" if number % 3 == 2 else "seen",
        )
        for number, (colour, noun, place) in enumerate(
            (colour, noun, f"{colour} {noun}land") for colour in COLOURS for noun in NOUNS
        )
    ]
    leak = "Told before: A kind of castle, found in RED castleland!"
    return [*documents, Document(corpus="wiki", text=f"Leak is a text that tells something. {leak}", split="seen")]


def facts(num: int = 9, seed: int = 0) -> dict[str, list[Question]]:
    return fact_questions(glosses(), TOKENIZER, length=200, num=num, seed=seed)


def test_entries_of_each_corpus_are_read():
    wordnet, gcide, wiki = (
        read_fact(Document(corpus=corpus, text=text, split="seen"))
        for corpus, text in (
            ("wordnet", 'dog, hound (noun): a tame animal that barks; "the dog barked"'),
            ("gcide", "Dotal, a. (Law) Given with a wife on marriage; as, dotal lands. --Garth."),
            ("wiki", "Gold is a chemical element of yellow colour, with symbol Au. It is heavy."),
        )
    )
    assert (wordnet.context, wordnet.definition) == ("dog, hound (noun):", " a tame animal that barks")
    assert wordnet.names == {"dog", "hound"} and wordnet.kind == "noun" and wordnet.sentence == wordnet.definition
    assert (gcide.context, gcide.definition) == ("Dotal, a. (Law)", " Given with a wife on marriage")
    assert (wiki.context, wiki.definition) == ("Gold is", " a chemical element of yellow colour")
    assert wiki.kind == "is" and wiki.sentence == "Gold is a chemical element of yellow colour"


@pytest.mark.parametrize(
    ("corpus", "text"),
    [
        ("wordnet", "lento (adverb): in music"),
        ("gcide", "Male, n. Same as Mail, a bag. --Chaucer."),
        ("gcide", "Untransferable See transferable."),
        ("wiki", "Henry IV ruled France. He is a king of note and of old."),
    ],
)
def test_entries_that_say_nothing_plain_are_left_out(corpus, text):
    assert read_fact(Document(corpus=corpus, text=text, split="seen")) is None


def test_facts_tell_seen_from_unseen_and_never_hold_their_answer():
    found = facts(num=500)
    side = {document.text: document.split for document in glosses()}
    assert len(found["facts/cloze/seen"]) == 64 + 1
    texts = {}
    for task, questions in found.items():
        for question in questions:
            assert question.task == task and task.endswith(f"/{question.split}")
            assert question.right not in question.context and fits(TOKENIZER, question, 200)
            (text,) = (text for text in side if text.startswith(question.context + question.right))
            assert side[text] == question.split
            texts.setdefault(task, set()).add(text)
            if len(question.choices) == 4:  # wrong ones are definitions of the same side, of other words
                for choice in question.choices:
                    assert {side[text] for text in side if f"{choice};" in text} == {question.split}
    assert not texts["facts/choice/seen"] & texts["facts/choice/unseen"]


def test_an_unseen_fact_that_a_seen_document_tells_is_left_out():
    found = facts(num=500)
    assert any("a kind of castle found in" in q.context for q in found["facts/cloze/unseen"])
    for questions in (found["facts/choice/unseen"], found["facts/cloze/unseen"]):
        assert len(questions) == 32 - 1
        assert not any("red castle" in question.context + question.right for question in questions)


def test_a_seed_gives_the_same_questions_and_another_gives_others():
    assert facts() == facts() != facts(seed=1)
    assert all(len(questions) == 9 for questions in facts().values() if questions[0].task != "facts/choice/seen")
    haystack = Haystack.of(PROSE, TOKENIZER)
    for make in (needle_questions, tracking_questions):
        first, again, other = (make(haystack, TOKENIZER, length=600, num=5, seed=seed) for seed in (0, 0, 1))
        assert first == again != other


def test_answers_stand_at_every_place():
    questions = facts(num=500)["facts/choice/seen"]
    assert {question.answer for question in questions} == {0, 1, 2, 3}


def test_a_corpus_without_known_form_is_refused():
    with pytest.raises(ValueError, match="corpus 'stdlib'; allowed: wordnet, gcide, foldoc, wiki"):
        fact_questions([Document(corpus="stdlib", text="x", split="seen")], TOKENIZER, length=200, num=1, seed=0)


def readings() -> list[Document]:
    """One unseen text that names Zorba twice, far apart, and others with as many rare names."""
    filler = " ".join(f"common{'abcdefghij'[i % 10]}" for i in range(25))
    asked = f"Here begins a text of Nimrod. Then Zorba came by. It was {filler} until late. At last Zorba went."
    names = ["Quilla", "Ferrin", "Mostar", "Zorba"]
    seen = [Document(corpus="wiki", text=f"Once {name} sat alone. Once {name} stood.", split="seen") for name in names]
    seen.append(Document(corpus="wiki", text="Once Nimrod sat alone.", split="seen"))  # as frequent, but in the text
    return [Document(corpus="wiki", text=asked, split="unseen"), *seen]


def test_reading_asks_for_the_second_occurrence_and_leaves_the_passage_out(monkeypatch):
    monkeypatch.setattr("engrammar_lab.tasks.context.NUM_COMMON", 0)
    found = context_questions(readings(), TOKENIZER, length=500, num=9, seed=0)
    (with_passage,), (without,) = found["context/with"], found["context/without"]
    assert with_passage.right == " Zorba" and set(with_passage.choices) == {" Zorba", " Quilla", " Ferrin", " Mostar"}
    assert with_passage.context.endswith("At last") and with_passage.context.count("Zorba") == 1
    assert "Zorba" not in without.context
    assert without.context == with_passage.context.replace("Then Zorba came by. ", "")
    assert (without.choices, without.answer) == (with_passage.choices, with_passage.answer)
    assert not context_questions(readings(), TOKENIZER, length=60, num=9, seed=0)["context/with"]
    seen_only = [document for document in readings() if document.split == "seen"]
    assert not context_questions(seen_only, TOKENIZER, length=500, num=9, seed=0)["context/with"]


def test_common_words_are_not_asked_for_and_wrong_words_are_as_frequent():
    assert not context_questions(readings(), TOKENIZER, length=500, num=9, seed=0)["context/with"]
    frequencies = Frequencies.of([Document(corpus="wiki", text="aaa aaa bbb bbb ccc Ddd Ddd ABC ABC", split="seen")])
    assert frequencies.counts["aaa"] == 2 and frequencies.similar("aaa", 2) == ["bbb"]
    assert frequencies.similar("Eee", 2) == ["Ddd"] and frequencies.similar("EEE", 2) == ["ABC"]
    assert WORD.findall("an old-fashioned co2 lamp's") == ["old", "fashioned", "lamp"]


@pytest.mark.parametrize("use", ["test", "training"])
@pytest.mark.parametrize("length", [300, 1200])
def test_needles_are_in_the_text_once_and_only_the_asked_code_is_right(use, length):
    haystack = Haystack.of(PROSE, TOKENIZER)
    questions = needle_questions(haystack, TOKENIZER, length=length, num=7, seed=0, use=use)
    assert len(questions) == 7
    for question in questions:
        told = dict(re.findall(r"The code of (\w+) is (\d{5})\.", question.context))
        key = re.search(r"The code of (\w+) is$", question.context)[1]
        assert set(told) <= set(KEYS[use].split()) and len(told) == 4
        assert question.right == f" {told[key]}." and set(question.choices) == {f" {code}." for code in told.values()}
        assert question.context.count(told[key]) == 1 and fits(TOKENIZER, question, length)
    assert max(len(question.context) for question in questions) > length - 60


@pytest.mark.parametrize("make", [needle_questions, tracking_questions])
def test_no_text_is_over_its_length_with_a_trained_vocabulary(make, tmp_path):
    names = [f"The x {a}{b} = {a}{b}." for a in LETTERS for b in LETTERS]  # names are one token after a space alone
    numbers = [f"is {number}." for number in range(20_000, 20_090)]  # some values take fewer tokens than others
    train_tokenizer([*names, *numbers], vocab_size=800, path=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert count_tokens(tokenizer, ["mg", " mg"]) == [2, 1]
    assert len(set(count_tokens(tokenizer, [" 20001.", " 98765."]))) == 2
    short = max(count_tokens(tokenizer, ["Qz.", " Qz."]))
    haystack = Haystack(("Qz.",) * 80, (short,) * 80)  # so small that texts are filled to the last tokens
    for length in (230, 231, 232, 233):
        for question in make(haystack, tokenizer, length=length, num=20, seed=length):
            taken = [1 + sum(count_tokens(tokenizer, [question.context, choice])) for choice in question.choices]
            assert max(taken) <= length


def test_later_queries_go_on_after_right_answers():
    first, second = needle_questions(
        Haystack.of(PROSE, TOKENIZER), TOKENIZER, length=400, num=2, seed=3, num_pairs=4, num_queries=2
    )
    assert second.context.startswith(first.context + first.right)


@pytest.mark.parametrize("use", ["test", "training"])
def test_chains_lead_from_the_asked_variable_to_its_value(use):
    haystack = Haystack.of(PROSE, TOKENIZER)
    for question in tracking_questions(haystack, TOKENIZER, length=400, num=11, seed=0, use=use, num_copies=3):
        steps = re.findall(r"\b([a-z]{2}) = (\w+)\.", question.context)
        values = {}
        for name, source in steps:
            values[name] = source if source.isdigit() else values[source]  # a copy comes after what it copies
        asked = re.search(r"([a-z]{2}) =$", question.context)[1]
        assert len(values) == len(steps) == 16 and question.right == f" {values[asked]}."
        assert asked not in {source for _, source in steps}  # the last of its chain
        assert set(question.choices) == {f" {value}." for value in values.values()}
        assert fits(TOKENIZER, question, 400)


def test_training_and_test_share_no_key_name_or_value():
    haystack = Haystack.of(PROSE, TOKENIZER)
    used = {}
    for use in ("test", "training"):
        texts = [
            question.context
            for make in (needle_questions, tracking_questions)
            for question in make(haystack, TOKENIZER, length=400, num=40, seed=0, use=use)
        ]
        words = {word for text in texts for word in re.findall(r"code of (\w+)|\b(\w{2,5}) =|(\d{5})", text)}
        used[use] = {part for parts in words for part in parts if part}
    assert len(used["test"]) > 100 and not used["test"] & used["training"]
    assert not set(KEYS["test"].split()) & set(KEYS["training"].split())


def test_the_haystack_is_whole_sentences_without_digits_or_keys():
    good = "This is a sentence of some words."
    text = f"{good} It has 5 digits and some more words. An amber lamp hung over this door. to T.D.C. Short one."
    assert Haystack.of([text], TOKENIZER).sentences == (good,)
    with pytest.raises(ValueError, match="no sentence"):
        Haystack.of(["12 34."], TOKENIZER)


def test_lengths_and_counts_that_cannot_be_are_refused():
    haystack = Haystack.of(PROSE, TOKENIZER)
    with pytest.raises(ValueError, match="length is 90; the statements and the question alone take"):
        needle_questions(haystack, TOKENIZER, length=90, num=1, seed=0)
    with pytest.raises(ValueError, match="num_queries is 5 of num_pairs 4"):
        needle_questions(haystack, TOKENIZER, length=900, num=1, seed=0, num_queries=5)


def test_a_training_row_learns_the_answer_alone():
    (question,) = needle_questions(Haystack.of(PROSE, TOKENIZER), TOKENIZER, length=300, num=1, seed=0)
    row = training_row(TOKENIZER, question, 300)
    assert all(tensor.shape == (300,) for tensor in row.values())
    learned = row["labels"] != -100
    assert TOKENIZER.decode(row["labels"][learned]) == question.right
    assert (row["labels"][learned] == row["input_ids"][learned]).all()
    assert TOKENIZER.decode(row["input_ids"][row["attention_mask"] == 1][1:]) == question.context + question.right
    with pytest.raises(ValueError, match="length is 50"):
        training_row(TOKENIZER, question, 50)


def source(name: str) -> str:
    return f'''"""Module {name}."""

def first_{name}(value):
    """Returns {name} of a value."""
    start = open_{name}(value)
    {name}_total = start + len("{name}")
    if {name}_total:
        print("{name} is", {name}_total)
    both = (start,
            value)
    return combine_{name}(both)
'''


def test_lines_that_are_asked_for_are_whole_statements_inside_functions():
    lines = function_lines(source("stone"))
    assert sorted(line.text.strip() for line in lines) == [
        'print("stone is", stone_total)',
        "return combine_stone(both)",
        'stone_total = start + len("stone")',
    ]
    assert all(line.function == 3 and source("stone").split("\n")[line.number] == line.text for line in lines)
    assert function_lines("def f(:") == [] and function_lines("x = 1\n" * 30) == []


def test_code_questions_go_on_in_their_file_and_choose_among_lines_of_other_functions():
    documents = [
        Document(corpus="stdlib", text=source(name), split="unseen" if number % 2 else "seen")
        for number, name in enumerate(NOUNS)
    ]
    found = code_questions(documents, TOKENIZER, length=260, num=50, seed=0)
    for split in ("seen", "unseen"):
        own = [document.text for document in documents if document.split == split]
        choices, exacts = found[f"code/choice/{split}"], found[f"code/exact/{split}"]
        assert len(choices) == len(exacts) == 18  # three lines of each of six files
        for question, alone in zip(choices, exacts):
            assert sum(question.context + question.right in text for text in own) == 1
            assert len({len(choice) - len(choice.lstrip()) for choice in question.choices}) == 1
            assert all(any(choice in text for text in own) for choice in question.choices)
            assert not any(choice.strip() in question.context for choice in question.choices)
            assert alone.choices == (question.right,) and alone.context == question.context
            assert fits(TOKENIZER, question, 260)
    assert found == code_questions(documents, TOKENIZER, length=260, num=50, seed=0)
    assert len(code_questions(documents, TOKENIZER, length=260, num=5, seed=0)["code/choice/seen"]) == 5


def test_the_library_of_this_python_gives_questions():
    text = Path(random.__file__).read_text(encoding="utf-8")
    lines = function_lines(text)
    assert len(lines) > 100 and all(text.split("\n")[line.number].startswith(line.text) for line in lines)


def test_questions_survive_a_file(tmp_path):
    questions = [*facts()["facts/choice/unseen"], *facts()["facts/cloze/seen"]]
    write_questions(tmp_path / "own.jsonl", questions)
    assert read_questions(tmp_path / "own.jsonl") == questions
    (tmp_path / "mine.jsonl").write_text('\n{"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}\n')
    (mine,) = read_questions(tmp_path / "mine.jsonl")
    assert mine == Question(context="2 + 2 =", choices=(" 4", " 5"), answer=0, task="mine", split="unseen")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, is not a question: Expecting"),
        ("[]", "needed: context, choices, answer"),
        ({"context": "a", "choices": ["b"]}, "needed: context, choices, answer"),
        ({"context": "a", "choices": ["b"], "answer": 0, "hint": "c"}, "allowed too: task, split"),
        ({"context": "a", "choices": "bc", "answer": 0}, "allowed: a list of texts"),
        ({"context": "a", "choices": [], "answer": 0}, "none of them empty"),
        ({"context": "a", "choices": ["b", ""], "answer": 0}, "none of them empty"),
        ({"context": "a", "choices": ["b", "b"], "answer": 0}, "allowed: texts that differ"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "answer is 2; allowed: 0 to 1"),
        ({"context": "a", "choices": ["b", "c"], "answer": True}, "answer is True"),
        ({"context": 1, "choices": ["b", "c"], "answer": 0}, "context is 1; allowed: a text"),
        ({"context": "a", "choices": ["b"], "answer": 0, "split": "held"}, "split is 'held'; allowed: seen, unseen"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    good = json.dumps({"context": "a", "choices": ["b"], "answer": 0})
    (tmp_path / "own.jsonl").write_text(f"{good}\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "own.jsonl")


def test_files_without_questions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read the questions"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(tmp_path / "empty.jsonl")
