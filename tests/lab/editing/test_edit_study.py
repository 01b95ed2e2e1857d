"""The study of fact editing: cases, answers in batches, measures, and runs that leave the model as it was."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from base_folder import write_base
from engrammar.edit import answer
from engrammar.edit.phrasings import RELATIONS
from engrammar.edit.states import num_shared
from engrammar.train import parsers
from engrammar.train.corpora import POCKET
from engrammar_lab.adapters import smollm
from engrammar_lab.editing import measures, neutral, study
from engrammar_lab.editing.answering import answers
from engrammar_lab.editing.cases import BESIDE, FIRST, LAST, in_order, questions, read_cases
from engrammar_lab.editing.edited import Edited
from engrammar_lab.editing.measures import Unedited, asked_before, entropy, measure_edits
from engrammar_lab.editing.relations import KINDS, QUESTIONS, asked_otherwise
from engrammar_lab.report.editing import edit_section
from texts import WORDS

PLAIN = Edited(undo=lambda: None, num_bytes=0)


def rows(count: int) -> list[dict[str, str]]:
    """Cases in the form of CounterFact: every other paraphrase asks the fact itself."""
    found = []
    for number in range(count):
        subject, other = (f"{WORDS[number % 12]} {WORDS[(number // 12 + shift) % 12]}" for shift in (3, 5))
        found.append(
            {
                "subject": subject,
                "prompt": f"{subject} was born in",
                "target_new": WORDS[(number + 1) % 12],
                "ground_truth": WORDS[(number + 2) % 12],
                "rephrase_prompt": f"Well. {subject} was born in" if number % 2 else f"{subject} likes",
                "locality_prompt": f"the {other} was born in",
            }
        )
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(FIRST + LAST + 20)))
    return path


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)


def test_cases_that_methods_were_developed_on_come_last_and_are_never_asked(file):
    cases = read_cases(file)
    assert [case.is_test for case in cases].count(True) == 20 and not cases[0].is_test and not cases[-1].is_test
    chosen = in_order(cases, 0, 30)
    assert [case.is_test for case in chosen] == [True] * 20 + [False] * 10
    assert in_order(cases, 0, 10) == chosen[:10] and in_order(cases, 1, 20) != chosen[:20]
    asked = questions(chosen, 100)
    assert all(chosen[one.about].is_test for own in asked.values() for one in own)
    assert len(asked["prompt"]) == 20 and len(asked["direct"]) == len(asked["follows"]) == 10
    with pytest.raises(ValueError, match="the file has 110"):
        in_order(cases, 0, 111)


def test_a_neighbor_that_names_an_edited_subject_is_not_asked(file):
    cases = in_order(read_cases(file), 0, 20)
    cases[3] = replace(cases[3], neighbor=f"the {cases[7].fact.subject} was born in")
    asked = {one.about for one in questions(cases, 100)["neighbor"]}
    assert 3 not in asked and len(asked) > 5
    assert all(case.fact.subject not in cases[n].neighbor for n in asked for case in cases)


def test_questions_are_asked_plainly_and_in_a_chat_in_words_that_no_probe_knows(file, loaded):
    cases, tokenizer = in_order(read_cases(file), 0, 20), copy.deepcopy(loaded[1])
    tokenizer.chat_template = None
    assert "chat" not in questions(cases, 100, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}so: "
    asked = questions(cases, 100, tokenizer)
    for kind, in_chat in (("question", "chat"), ("other question", "other chat")):
        assert [f"<{one.prompt}>so: " for one in asked[kind]] == [one.prompt for one in asked[in_chat]] != []
    assert set(QUESTIONS) == {asks for kind in KINDS for asks in kind}
    assert not set(QUESTIONS.values()) & {text for relation in RELATIONS for text in relation.phrasings}
    for question, sentence in zip(asked["other question"], asked["subject"]):
        assert question.about == sentence.about and cases[question.about].fact.subject in question.prompt


def test_what_stands_beside_a_subject_names_it_first(file):
    cases = in_order(read_cases(file), 0, 20)
    for number, prompt in questions(cases, 100)["beside"]:
        subject, neighbor = cases[number].fact.subject, cases[number].neighbor
        assert prompt == BESIDE[number % len(BESIDE)].format(subject, neighbor)
        assert prompt.index(subject) < prompt.index(neighbor)


def test_other_relations_are_of_the_same_kind_and_not_the_one_that_was_edited():
    assert "{} was born in" not in asked_otherwise("{} was born in") and len(asked_otherwise("{} was born in")) > 5
    assert set(asked_otherwise("{} is a twin city of")) == {one for one in KINDS[1] if "twin" not in one}
    assert asked_otherwise("{}, the") == []  # ambiguous


def test_a_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"subject": "a", "prompt": "a is", "object": "b"}) + "\n")
    with pytest.raises(ValueError, match="give JSON lines in EasyEdit's form"):
        read_cases(path)


def test_answers_in_batches_are_those_one_by_one(loaded):
    model, tokenizer = loaded
    prompts = [" ".join(WORDS[: n % 7 + 1]) for n in range(9)]
    assert answers(model, tokenizer, PLAIN, prompts, 5) == answer(model, tokenizer, prompts, 5)


def test_what_all_prompts_begin_with_is_read_once(loaded, monkeypatch):
    model, tokenizer = loaded
    told = Edited(undo=lambda: None, num_bytes=0, worded=lambda prompt: " ".join(WORDS * 5) + f". {prompt}")
    prompts = [" ".join(WORDS[n : n + n % 4 + 1]) for n in range(7)]
    expected = answer(model, tokenizer, [told.worded(prompt) for prompt in prompts], 4)
    lengths, forward = [], type(model).forward

    def counted(own, input_ids=None, **given):
        lengths.append(input_ids.numel())
        return forward(own, input_ids=input_ids, **given)

    monkeypatch.setattr(type(model), "forward", counted)
    assert answers(model, tokenizer, told, prompts, 4) == expected
    assert sum(lengths) < 2 * len(tokenizer(told.worded("")).input_ids) + 200
    assert num_shared([[1] * 60 + [2], [1] * 60 + [3, 4]]) == 60 and num_shared([[1] * 60, [1] * 60 + [3]]) == 59
    assert num_shared([[1, 2], [1, 3]]) == 1 and num_shared([[1] * 60]) == 0


def test_entropy_is_that_of_its_authors():
    assert entropy("a b c d") == pytest.approx((1 / 3) * torch.tensor(3.0).log2() + (2 / 3) * 1.0)
    assert entropy("a a a a") == 0.0 and entropy("") == 0.0


def test_measures_of_an_unedited_model_say_that_nothing_has_changed(loaded, file):
    model, tokenizer = loaded
    cases, unedited = in_order(read_cases(file), 0, 12), Unedited(model, tokenizer)
    for num_tokens, prompts in asked_before(cases, 12, tokenizer).items():
        unedited.ask(prompts, num_tokens)
    found = measure_edits(model, tokenizer, PLAIN, cases, unedited, 12)
    assert {found[f"kept/{kind}"] for kind in ("neighbor", "beside", "subject", "other question")} == {1.0}
    assert found["fluency/entropy"] == found["fluency/entropy before"]
    unedited.known = {key: text + "!" for key, text in unedited.known.items()}  # the control: other answers before
    assert measure_edits(model, tokenizer, PLAIN, cases, unedited, 12)["kept/neighbor"] == 0.0


def test_measures_of_a_model_that_says_every_object(loaded, file, monkeypatch):
    _, tokenizer = loaded
    cases = in_order(read_cases(file), 0, 12)
    objects = {case.fact.prompt: case.fact.object for case in cases}
    monkeypatch.setattr(measures, "answers", lambda *given: [f" {objects.get(one, 'no')} so" for one in given[3]])
    monkeypatch.setattr(measures, "likelier", lambda *given: [True] * len(given[3]))
    found = measure_edits(None, tokenizer, PLAIN, cases, SimpleNamespace(known=EveryAnswer()), 12)
    assert found["free/prompt"] == 1.0 and found["free/follows"] == 0.0 and found["probability/prompt"] == 1.0


class EveryAnswer(dict):
    def __missing__(self, key):
        return "what was said before"


def test_neutral_text_is_unchanged_by_nothing_and_changed_by_other_weights(loaded):
    model, tokenizer = loaded
    blocks = torch.randint(3, 200, (3, neutral.LENGTH), generator=torch.Generator().manual_seed(0))
    blocks = torch.stack([torch.tensor(tokenizer(tokenizer.decode(row)).input_ids)[:64] for row in blocks])
    reads = neutral.read_blocks(model, blocks)
    found = neutral.changed(model, tokenizer, PLAIN, blocks, reads, 10**6)
    assert found["neutral/same bits"] == 1.0 and found["neutral/other token"] == found["neutral/divergence"] == 0.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    found = neutral.changed(model, tokenizer, PLAIN, blocks, reads, 10**6)
    assert found["neutral/same bits"] == 0.0 and found["neutral/divergence"] > 0
    assert neutral.changed(model, tokenizer, PLAIN, blocks, reads, 70)["neutral/positions"] == 64


@pytest.mark.slow
def test_runs_leave_the_model_as_it_was_and_go_on_another_day(base, file, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    cache = tmp_path / "cache"
    cache.mkdir()
    texts = [" ".join(WORDS[(i * k) % 12] for k in range(1, 90)) for i in range(20)]
    lines = [json.dumps(asdict(parsers.Entry(text, text))) for text in texts]
    (cache / f"wiki-{POCKET['wiki'].version}-{parsers.VERSION}.jsonl").write_text("\n".join(lines) + "\n")
    chats = [(" ".join(WORDS), " ".join(WORDS[:n])) for n in range(1, 20)]
    monkeypatch.setattr(smollm, "make_chats", lambda *_: chats)
    where = {"base": base, "cache": cache, "results": tmp_path / "results"}
    small = {"edits": (1, 4), "seeds": 1, "jobs": 1, "ask": study.Ask(questions=4, neutral=512), "ways": ("gated",)}
    made = study.run_edits([file], **where, **small)
    assert [(run["way"], run["edits"]) for run in made["runs"]] == [("gated", 1), ("gated", 4)]
    assert all(run["undone to the bit"] for run in made["runs"])
    assert "cases" in made["facts"] and edit_section(made).verdict.sure == "no: 1 of 3 orders"
    monkeypatch.setattr(study, "_run", lambda *_: pytest.fail("run again"))
    assert study.run_edits([file], **where, **small)["runs"] == made["runs"]
    with pytest.raises(pytest.fail.Exception):  # other facts
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(FIRST + LAST + 21)))
        study.run_edits([file], **where, **small)
    with pytest.raises(ValueError, match="ways are by magic; allowed: as it was, gated"):
        study.run_edits([file], **where, **{**small, "ways": ("by magic",)})
