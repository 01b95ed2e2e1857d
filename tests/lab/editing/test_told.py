"""Facts in words: what stands before a question, what fits a budget, and that the nearest sentence is found."""

import pytest

from attached_models import tokenizer
from engrammar.edit import Fact
from engrammar_lab.editing.told import PromptSettings, RetrievalSettings, nearest_of, retrieve, sentence, tell

FACTS = [
    Fact(subject="Split Airport", prompt="Split Airport was named for", object="Sweden"),
    Fact(subject="Franz Kafka", prompt="The mother tongue of Franz Kafka is", object="Dutch"),
    Fact(subject="Montréal", prompt="What is the twin city of Montréal? It is", object="Venice"),
]


def test_all_facts_stand_before_a_question_as_far_as_they_fit():
    whole = tell(None, tokenizer(), FACTS, 0, PromptSettings())
    assert whole.worded("Who?").endswith("\nWho?") and not whole.refused
    assert all(sentence(fact) in whole.worded("Who?") for fact in FACTS)
    assert whole.num_bytes == sum(len(sentence(fact).encode()) for fact in FACTS)
    assert whole.num_bytes > sum(len(sentence(fact)) for fact in FACTS)  # é takes two bytes
    few = tell(None, tokenizer(), FACTS, 0, PromptSettings(budget=15))
    assert list(few.refused) == FACTS[2:] and sentence(FACTS[2]) not in few.worded("Who?")
    assert few.num_bytes == sum(len(sentence(fact).encode()) for fact in FACTS[:2])
    none = tell(None, tokenizer(), FACTS, 0, PromptSettings(budget=0))
    assert none.worded("Who?") == "Who?" and list(none.refused) == FACTS


@pytest.mark.parametrize(
    ("asked", "found"), [(fact.prompt, [number]) for number, fact in enumerate(FACTS)] + [("Quite other words", [])]
)
def test_the_nearest_fact_is_found(asked, found):
    sentences = [sentence(fact) for fact in FACTS]
    assert nearest_of(sentences, RetrievalSettings())(asked) == [sentences[number] for number in found]
    edited = retrieve(None, tokenizer(), FACTS, 0, RetrievalSettings())
    assert edited.worded(asked) == "".join(sentences[number] + "\n" for number in found) + asked


def test_the_nearest_of_two_stands_last_and_weak_ones_are_left_out():
    edited = retrieve(None, tokenizer(), FACTS, 0, RetrievalSettings(num_found=2))
    asked = "The twin city of Franz Kafka's tongue"
    first, second, rest = edited.worded(asked).split("\n")
    assert {first, second} == {sentence(FACTS[1]), sentence(FACTS[2])} and rest == asked
    assert edited.worded(FACTS[1].prompt).split("\n")[-2] == sentence(FACTS[1])
    strict = retrieve(None, tokenizer(), FACTS, 0, RetrievalSettings(num_found=2, least=0.9))
    assert strict.worded("A city") == "A city" != edited.worded("A city")


def test_one_fact_and_facts_of_stop_words_are_no_error():
    (only,) = [Fact(subject="It", prompt="It is", object="the")]
    assert retrieve(None, tokenizer(), [only], 0, RetrievalSettings()).worded("What is it?") == "What is it?"
