"""A fact is tried, applied, undone, saved, loaded and compared; the model is the same to the bit before and after."""

import pytest
import torch

from attached_models import base_model, tokenizer
from edited_models import OURS, model_of_kind, small_patch
from engrammar.edit import Fact, applied_patches, gated, learn
from engrammar.edit.files import patch_bytes
from engrammar.edit.phrasings import RELATIONS
from engrammar.edit.states import last_states
from engrammar_explore import session as module
from engrammar_explore.session import Explored, Session
from engrammar_explore.trying import TrySettings, try_fact

TEXT = "w9 w3 w4 w10 w11"
FACT = {"subject": "w3 w4", "prompt": TEXT, "object": "w20"}


def new_session(model, patches=(), kept=None) -> Session:
    return Session(Explored(model=model, tokenizer=tokenizer(), title="tiny", kept=kept), patches=patches)


@pytest.fixture
def session():
    session = new_session(base_model("llama").requires_grad_(False))
    yield session
    session.close()


def logits(session, text: str = TEXT) -> torch.Tensor:
    return session.explored.model(tokenizer()(text, return_tensors="pt").input_ids, use_cache=False).logits


@torch.no_grad()
def test_a_patch_is_tried_applied_undone_and_nothing_remains(session):
    before, bare = logits(session), session.look(TEXT)
    patch = small_patch(session.explored.model, "by-hand", (8, 10))
    session.load(patch_bytes(patch))
    assert torch.equal(logits(session), before)
    session.apply("by-hand")
    assert not torch.equal(logits(session), before)
    told = session.look(TEXT)
    assert told["compare"] == "patches" and told["patches"] == ["by-hand"] and told["version"] == 1
    assert [one["applied"] for one in session.about()["patches"]] == [True]
    session.undo("by-hand")
    assert torch.equal(logits(session), before)
    assert session.look(TEXT)["tokens"] == bare["tokens"]
    assert session.save("by-hand") == patch_bytes(patch)
    session.forget("by-hand")
    assert session.about()["patches"] == []


@torch.no_grad()
def test_a_fact_is_learned_and_tried_and_the_model_is_as_it_was(session, monkeypatch):
    monkeypatch.setattr(module, "try_fact", lambda *given: try_fact(*given[:4], SHORT, given[5]))
    before, steps = logits(session), []
    told = session.learn(Fact(**FACT), ["w5 w6"], lambda done, total, what: steps.append((done, total)))
    assert told["name"] == "w3-w4" and torch.equal(logits(session), before)
    assert not applied_patches(session.explored.model)
    assert steps[0] == (0, 1) and [done for done, _ in steps[1:]] == [*range(steps[1][1])]
    tried = told["tried"]
    assert (
        tried["prompt"]["reaches"]
        and tried["prompt"]["after"]["probability"] != tried["prompt"]["before"]["probability"]
    )
    read = []
    monkeypatch.setattr(gated, "last_states", lambda *given: read.append(len(given[2])) or last_states(*given))
    again = session.learn(Fact(**FACT))
    assert again["name"] == "w3-w4-2" and 0 < sum(read) < len(RELATIONS)  # what all facts share is not read again
    fresh, _ = learn(session.explored.model, session.explored.tokenizer, [Fact(**FACT)], name="w3-w4-2")
    assert patch_bytes(fresh) == patch_bytes(session.patches["w3-w4-2"]) and sum(read) > 2 * len(RELATIONS)
    assert session.compare("w3-w4", "w3-w4-2")["conflicts"] == []  # the same fact writes the same


@torch.no_grad()
def test_another_session_of_the_model_reads_what_all_facts_share_from_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "try_fact", lambda *given: {})
    model, read, learned = base_model("llama").requires_grad_(False), [], []
    monkeypatch.setattr(gated, "last_states", lambda *given: read.append(len(given[2])) or last_states(*given))
    for _ in range(2):
        read.clear()
        session = new_session(model, kept=tmp_path)
        session.learn(Fact(**FACT))
        learned.append((patch_bytes(session.patches["w3-w4"]), sum(read)))
        session.close()
    (first, all_read), (second, few_read) = learned
    assert first == second and few_read < len(RELATIONS) < 2 * len(RELATIONS) < all_read


SHORT = TrySettings(
    max_new_tokens=2, phrasings=("w9 {}", "w12 w13"), others=("{} w14",), keep=("w5 w6",), neutral="w21 w22 w23"
)


@torch.no_grad()
def test_what_a_trial_tells_equals_passes_with_and_without():
    model = base_model("llama").requires_grad_(False)
    fact = Fact(**FACT)
    told = try_fact(model, tokenizer(), small_patch(model, "one", (8, 10)), fact, SHORT)
    probability = model(ids(TEXT)).logits[0, -1].softmax(-1)[tokenizer()("w20").input_ids[0]]
    assert told["prompt"]["before"]["probability"] == pytest.approx(float(probability), abs=1e-6)
    new = model.generate(ids(TEXT), max_new_tokens=2, do_sample=False)[0, -2:]
    assert told["prompt"]["before"]["greedy"] == tokenizer().decode(new)
    assert [(one["text"], one["reaches"]) for one in told["phrasings"]] == [(f"w9 {TEXT}", True), ("w12 w13", False)]
    assert [one["reaches"] for one in told["others"]] == [True] and [one["reaches"] for one in told["keep"]] == [False]
    assert told["neutral"] == {"tokens": 3, "changed": 0, "mean": 0.0, "most": 0.0}
    loud = try_fact(model, tokenizer(), small_patch(model, "two", (44,)), fact, SHORT)  # w21: the neutral text has it
    assert loud["neutral"]["changed"] == 0  # a first token is left alone
    middle = try_fact(model, tokenizer(), small_patch(model, "three", (46,)), fact, SHORT)
    assert middle["neutral"]["changed"] == 2 and middle["neutral"]["most"] > 0


def ids(text: str) -> torch.Tensor:
    return tokenizer()(text, return_tensors="pt").input_ids


@torch.no_grad()
def test_a_trial_that_ends_early_leaves_the_model_as_it_was():
    model = base_model("llama").requires_grad_(False)
    before, patch = model(ids(TEXT)).logits, small_patch(model, "one", (8, 10))

    def progress(done: int, total: int, what: str) -> None:
        if done > total // 2:
            assert applied_patches(model)
            raise RuntimeError("the page has gone")

    with pytest.raises(RuntimeError, match="gone"):
        try_fact(model, tokenizer(), patch, Fact(**FACT), SHORT, progress)
    assert not applied_patches(model) and torch.equal(model(ids(TEXT)).logits, before)


def test_what_cannot_be_is_one_sentence(session, monkeypatch):
    patch = small_patch(session.explored.model, "one", (8, 10))
    for act, given, said in (
        (session.apply, "absent", "No patch 'absent' is known"),
        (session.undo, "absent", "No patch is applied"),
        (session.load, b"nothing", "the file"),
        (session.load, patch_bytes(small_patch(base_model("olmo2"), "other", (8,)))[:-3], "the file"),
        (lambda given: Fact(**given), {**FACT, "prompt": " "}, "prompt"),
        (lambda given: Fact(**given), {**FACT, "subject": "w5"}, "does not name its subject"),
    ):
        with pytest.raises(ValueError, match=said):
            act(given)
    session.load(patch_bytes(patch))
    with pytest.raises(ValueError, match="known already"):
        session.load(patch_bytes(patch))
    session.apply("one")
    with pytest.raises(ValueError, match="undo it first"):
        session.forget("one")
    with pytest.raises(ValueError, match="change the same differently"):
        session.load(patch_bytes(small_patch(session.explored.model, "two", (8, 10), seed=51)))
        session.apply("two")
    told = session.compare("one", "two")
    assert (told["changed"], told["only_first"], told["same_base"]) == (1, 0, True)
    monkeypatch.setattr(module, "MOST_PATCHES", 2)
    with pytest.raises(ValueError, match="forget some"):
        session.learn(Fact(**FACT))


def test_looks_are_kept_and_made_anew_when_patches_change(session):
    passes = []
    session.explored.model.register_forward_hook(lambda *_: passes.append(1))
    session.look(TEXT)
    session.closer(TEXT, "first", 2)
    assert len(passes) == 1
    session.load(patch_bytes(small_patch(session.explored.model, "one", (8, 10))))
    session.apply("one")
    passes.clear()
    assert session.closer(TEXT, "patches", 2)["version"] == 1
    assert len(passes) == 2  # with and without
    for number in range(6):
        session.look(f"{TEXT} w{number}")
    assert len(session._seen) == module.MOST_SEEN


def test_a_session_begins_with_patches_and_tells_of_rows(tmp_path):
    model = model_of_kind(OURS)
    session = new_session(model, [small_patch(model, "one", (8, 10))])
    about = session.about()
    assert [one["name"] for one in about["patches"]] == ["one"] and about["patches"][0]["applied"]
    assert [(one["layer"], one["branches"]) for one in about["memories"]] == [(1, 2), (3, 2)]
    traffic = session.look(TEXT, "memory")["traffic"]
    assert [(one["tier"], one["rows"]) for one in traffic] == [("weights of the model", 5 * 4)] * 2
    whole = session.whole(TEXT, "memory")
    assert len(whole["look"]["details"]) == 5 and whole["look"]["compare"] == "memory"
    session.close()
    assert not model.model.memory.table(1)._forward_hooks
