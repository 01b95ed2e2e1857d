"""A model that torch.compile has compiled is the same model: its rows are read anew, and what changes it is seen."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig

from attached_models import PAD, attached_model, base_model, memory_config, random_ids, randomize
from edited_models import OURS, edited_model, model_of_kind, rich_patch, spoken_ids, tokenizer
from engrammar import EngrammarForCausalLM, attach, detach, disabled
from engrammar.edit import apply_patch, learn, undo_patch
from engrammar.edit.states import states
from engrammar.off import memory_off
from engrammar.train.placement import place_tables
from row_patches import row_patch

EXACT = {"rtol": 0.0, "atol": 1e-5}
NEW = 6
# Where it is not about the backbone: experts, whose loop breaks the graph again and again, are compiled for long.
DENSE = {"first_k_dense_replace": 4}
Change = Callable[[nn.Module], None]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def ours(tmp_path: Path) -> nn.Module:
    """Our model without experts, its rows in RAM: compiling it takes a fifth of the time of one that holds them."""
    model_of_kind(OURS, **DENSE).save_pretrained(tmp_path)
    return EngrammarForCausalLM.from_pretrained(tmp_path, memory="ram").eval().requires_grad_(False)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def check_change(model: nn.Module, compiled: nn.Module, ids: Tensor, change: Change, back: Change) -> None:
    """Compares the compiled model with the plain one before a change, after it, and after it was taken back."""
    before = logits_of(model, ids)
    torch.testing.assert_close(logits_of(compiled, ids), before, **EXACT)
    change(model)
    changed = logits_of(model, ids)
    assert float((changed - before).abs().max()) > 1e-3
    torch.testing.assert_close(logits_of(compiled, ids), changed, **EXACT)
    back(model)
    torch.testing.assert_close(logits_of(compiled, ids), before, **EXACT)


def check_patch(model: nn.Module, patch) -> None:
    compiled = torch.compile(model, backend="eager")
    change, back = partial(apply_patch, patch=patch, tokenizer=tokenizer()), partial(undo_patch, patch=patch.name)
    check_change(model, compiled, spoken_ids(2, 21), change, back)


def test_a_patch_that_comes_after_compiling_is_seen():
    model = model_of_kind("llama")
    check_patch(model, rich_patch(model))


def test_what_reads_hidden_states_reads_those_of_a_compiled_model():
    plain, compiled = (model_of_kind("llama") for _ in range(2))
    compiled.model.compile(backend="eager")
    ids = spoken_ids(2, 12)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        compiled.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for block in (1, 3):
        assert torch.equal(states(compiled, ids, mask, block), states(plain, ids, mask, block))
    fact = {"subject": "w3 w4", "prompt": "w9 w3 w4 w10", "object": "w20"}
    patches = [learn(one, tokenizer(), [fact]).patch for one in (plain, compiled)]
    assert torch.equal(patches[0].decoded(), patches[1].decoded())


@pytest.mark.slow
def test_a_patch_of_stored_rows_that_comes_after_compiling_is_seen(ours):
    check_patch(ours, row_patch(ours, ours.model.memory))


def test_rows_that_are_replaced_after_compiling_are_seen():
    model = model_of_kind(OURS)
    memory = model.model.memory
    patch, layer = row_patch(model, memory), memory.layers[0]
    table, rows_BTH = memory.table(layer), memory.addresses(spoken_ids(2, 21))[layer]
    compiled, before = torch.compile(lambda rows_BTH: table(rows_BTH), backend="eager"), table(rows_BTH)
    assert torch.equal(compiled(rows_BTH), before)
    apply_patch(model, patch, tokenizer())
    assert torch.equal(compiled(rows_BTH), table(rows_BTH)) and not torch.equal(table(rows_BTH), before)
    undo_patch(model, patch.name)
    assert torch.equal(compiled(rows_BTH), before)


def test_a_memory_that_is_attached_after_compiling_is_seen():
    model = base_model("llama")

    def change(model: nn.Module) -> None:
        attach(model, memory_config(), tokenizer())
        randomize(model)

    check_change(model, torch.compile(model, backend="eager"), random_ids(2, 13), change, detach)


def check_switch(model: nn.Module, off: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    switch = off(model)
    change, back = (lambda _: switch.__enter__()), (lambda _: switch.__exit__(None, None, None))
    check_change(model, torch.compile(model, backend="eager"), random_ids(2, 13), change, back)


def test_an_attached_memory_that_is_switched_off_after_compiling_is_off():
    check_switch(attached_model("llama"), disabled)


@pytest.mark.slow
def test_a_memory_that_is_switched_off_after_compiling_is_off(ours):
    check_switch(ours, memory_off)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "blocks"), [("ram", DENSE), ("disk", {})], ids=["ram", "disk"])
@torch.no_grad()
def test_rows_from_stores_are_read_anew_in_each_pass(where, blocks, tmp_path):
    model_of_kind(OURS, **blocks).save_pretrained(tmp_path)
    model = EngrammarForCausalLM.from_pretrained(tmp_path, memory=where).eval()
    compiled = torch.compile(model, backend="eager")
    for seed in range(3):
        ids = spoken_ids(2, 17, seed)
        torch.testing.assert_close(logits_of(compiled, ids), logits_of(model, ids), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "blocks"), [("device", DENSE), ("ram", {}), ("file", DENSE)], ids=["device", "ram", "file"]
)
def test_training_from_placed_tables_gives_the_same_gradients(where, blocks, tmp_path):
    gradients = []
    for compiling in (False, True):
        model = model_of_kind(OURS, **blocks).requires_grad_()
        placed = place_tables(model, where=where, folder=tmp_path / f"{compiling}")
        call = torch.compile(model, backend="eager") if compiling else model
        for seed in range(2):
            ids = spoken_ids(2, 17, seed)
            call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        placed.collect()
        gradients.append([*(p.grad for p in model.parameters()), *(t.grad for t in placed.tables.values())])
        assert all(table.grad is not None for table in placed.tables.values())
    for plain, other in zip(*gradients):
        assert (plain is None) == (other is None)
        if plain is not None:
            torch.testing.assert_close(other.to_dense(), plain.to_dense(), **EXACT)


def decode(model: nn.Module, compiled: bool) -> Tensor:
    """The logits of each new token of a padded batch; a static cache, with which transformers compiles on a GPU."""
    ids = spoken_ids(2, 11)
    ids[1, :7] = PAD
    how = CompileConfig(backend="eager", mode=None, fullgraph=False)
    how._compile_all_devices = True
    given = {"compile_config": how} if compiled else {"disable_compile": True}
    out = model.generate(
        ids, attention_mask=(ids != PAD).long(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        cache_implementation="static", pad_token_id=PAD, eos_token_id=None, return_dict_in_generate=True,
        output_logits=True, **given,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("make", [attached_model, edited_model], ids=["attached", "patched"])
def test_decoding_with_a_static_cache_that_is_compiled(make, family, monkeypatch):
    """Twice, since the second call finds code that the first one compiled."""
    model, calls = make(family), []
    compile_call = type(model).get_compiled_call
    monkeypatch.setattr(type(model), "get_compiled_call", lambda *a: (calls.append(a), compile_call(*a))[1])
    expected = decode(model, compiled=False)
    assert not calls
    for count in (1, 2):
        torch.testing.assert_close(decode(model, compiled=True), expected, **EXACT)
        assert len(calls) == count
