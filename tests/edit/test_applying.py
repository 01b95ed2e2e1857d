"""A patch is applied and taken back to the bit, and what cannot be right is refused in one sentence."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import engrammar
from attached_models import attached_model, base_model, random_ids
from edited_models import (
    BLOCKS,
    OURS,
    WITH_MEMORY,
    bits,
    everything,
    key,
    model_of_kind,
    probes,
    rich_entries,
    rich_patch,
    small_patch,
    spoken_ids,
    tokenizer,
    vectors,
)
from engrammar.attach import attach, detach, disabled, keep_prefix
from engrammar.edit import (
    ExactEntry,
    Probe,
    applied_patches,
    apply_patch,
    base_of,
    build_patch,
    conflicts,
    diff,
    merge,
    subject_keys,
    undo_patch,
    without_patches,
    write_patch,
)
from engrammar.vocabulary import compress_vocabulary

KINDS = ["llama", "gpt2", "qwen3_moe", "deepseek_v4", "gemma3_text", "falcon_h1", WITH_MEMORY, OURS]
EXACT = {"rtol": 0.0, "atol": 1e-5}
OTHER_KEYS = (40, 42, 44, 46)  # ids of words that `quiet_ids` leaves out


def quiet_ids(rows: int, tokens: int) -> torch.Tensor:
    """Ids of words that no key of `rich_entries` holds."""
    return random_ids(rows, tokens) % 17 + 22


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_key_occurs_the_logits_are_those_of_the_model_to_the_bit(kind):
    """Integers of bits are compared. The control: with a key in the text they differ."""
    model, quiet, spoken = model_of_kind(kind), quiet_ids(3, 19), spoken_ids(3, 19)
    before, spoken_before = bits(model, quiet), bits(model, spoken)
    apply_patch(model, rich_patch(model), tokenizer())
    assert torch.equal(bits(model, quiet), before)
    assert not torch.equal(bits(model, spoken), spoken_before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_before_the_first_key_of_a_row_and_in_other_rows_the_bits_stay(kind):
    """In models whose tokens do not share experts; there each row of a batch is computed by itself."""
    model, ids = model_of_kind(kind), quiet_ids(3, 19)
    before = bits(model, ids)
    apply_patch(model, small_patch(model, "one", (4,)), tokenizer())
    ids[1, 11] = 4
    base = bits(model_of_kind(kind), ids)
    after = bits(model, ids)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and torch.equal(after[1, :11], base[1, :11])
    assert not torch.equal(after[1, 11], base[1, 11])


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_leaves_nothing_behind(kind):
    model, ids = model_of_kind(kind), spoken_ids(2, 19)
    logits, before = bits(model, ids), everything(model)
    assert apply_patch(model, rich_patch(model), tokenizer()) is model
    bits(model, ids)
    assert applied_patches(model) == ["rich"] and everything(model) != before
    assert undo_patch(model) is model
    assert everything(model) == before and applied_patches(model) == []
    assert torch.equal(bits(model, ids), logits)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_patches_are_taken_back_in_any_order(order):
    """After each step the bits are those of a model that never had the patches that are gone."""
    model, ids = model_of_kind("llama"), spoken_ids(3, 25)
    ids[:, 4::6] = torch.tensor(OTHER_KEYS)
    patches = [rich_patch(model), *(small_patch(model, f"p{one}", (one,), seed=one) for one in OTHER_KEYS[:3])]
    for patch in patches:
        apply_patch(model, patch, tokenizer())
    left = list(range(len(patches)))
    for gone in order:
        undo_patch(model, patches[gone] if gone % 2 else patches[gone].name)
        left.remove(gone)
        fresh = model_of_kind("llama")
        for index in left:
            apply_patch(fresh, patches[index], tokenizer())
        assert torch.equal(bits(model, ids), bits(fresh, ids))
        assert applied_patches(model) == [patches[index].name for index in left]


def test_weights_are_never_touched():
    model = model_of_kind("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_patch(model, rich_patch(model), tokenizer())
    bits(model, spoken_ids(2, 19))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_conflicts_are_named_key_by_key():
    model = model_of_kind("llama")
    first, second = rich_patch(model), small_patch(model, "second", (8,), seed=99)
    assert [str(one) for one in conflicts(first, second)] == [f"key {list(key(8))} at block 2"]
    other_probe = replace(probes()[1], threshold=0.25)
    entries = [replace(rich_entries()[7], until_name=False, fact=-1, values=vectors(98, 2))]
    entries.append(replace(rich_entries()[0], gate=0.5))
    third = build_patch("third", base_of(model, tokenizer()), entries, [other_probe])
    named = {str(one) for one in conflicts(first, third)}
    assert named == {f"key {list(key(14))} at block 4 with probe 'late'", f"key {list(key(4))} at block 1"}
    apply_patch(model, first, tokenizer())
    before = bits(model, spoken_ids(2, 19))
    with pytest.raises(ValueError, match=r"'rich' and 'second' change the same differently \(key \[5\] at block 2\)"):
        apply_patch(model, second)
    with pytest.raises(ValueError, match=r"key \[3\] at block 1; key \[8\] at block 4 with probe 'late'"):
        apply_patch(model, third)
    assert applied_patches(model) == ["rich"] and torch.equal(bits(model, spoken_ids(2, 19)), before)
    apply_patch(model, replace(rich_patch(model), name="same"))  # the same change is no conflict
    assert torch.equal(bits(model, spoken_ids(2, 19)), before)
    undo_patch(model, "rich")
    assert torch.equal(bits(model, spoken_ids(2, 19)), before)


def test_a_patch_that_replaces_counts_as_long_as_it_is_applied():
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    first, second = small_patch(model, "first", (8,), seed=1), small_patch(model, "second", (8,), seed=2)
    apply_patch(model, second, tokenizer())
    alone = bits(model, ids)
    undo_patch(model)
    apply_patch(model, first, tokenizer())
    before = bits(model, ids)
    apply_patch(model, second, on_conflict="replace")
    assert torch.equal(bits(model, ids), alone) and not torch.equal(before, alone)
    undo_patch(model, "second")
    assert torch.equal(bits(model, ids), before)


def test_one_key_of_two_patches_at_two_blocks_is_no_conflict():
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    low, high = (small_patch(model, f"at{block}", (8,), seed=block, block=block) for block in (1, 3))
    apply_patch(model, low, tokenizer())
    apply_patch(model, high)
    both = bits(model, ids)
    undo_patch(model)
    apply_patch(model, merge("both", [low, high]), tokenizer())
    assert torch.equal(bits(model, ids), both)


def test_a_merged_patch_does_what_its_parts_do():
    model, ids = model_of_kind("llama"), spoken_ids(3, 25)
    ids[:, 4::6] = torch.tensor(OTHER_KEYS)
    fact = {"subject": "w19", "object": "w20"}
    parts = [rich_patch(model), *(small_patch(model, f"p{one}", (one,), one, facts=[fact]) for one in OTHER_KEYS)]
    for part in parts:
        apply_patch(model, part, tokenizer())
    expected = bits(model, ids)
    undo_patch(model)
    whole = merge("whole", parts)
    assert whole.facts == [*parts[0].facts, *[fact] * 4]
    apply_patch(model, whole, tokenizer())
    assert torch.equal(bits(model, ids), expected)
    with pytest.raises(ValueError, match="'p40' and 'other' change the same differently"):
        merge("none", [*parts, small_patch(model, "other", (40,), 7)])
    gone = diff(whole, parts[0])
    assert len(gone.only_first) == 4 and gone.only_second == [] and gone.changed == []
    changed = diff(parts[1], small_patch(model, "other", (40,), 7))
    assert [str(one) for one in changed.changed] == [f"key {list(key(40))} at block 2"] and not changed.only_first


def test_a_patch_written_and_read_from_any_tier_is_the_same(tmp_path):
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    patch = rich_patch(model)
    apply_patch(model, patch, tokenizer())
    expected = bits(model, ids)
    undo_patch(model)
    write_patch(patch, tmp_path / "rich.safetensors")
    for memory in ("ram", "disk", lambda table: engrammar.CachedStore(engrammar.RamStore(table), 8)):
        apply_patch(model, tmp_path / "rich.safetensors", tokenizer(), memory=memory)
        assert torch.equal(bits(model, ids), expected)
        with pytest.raises(ValueError, match="change the same differently"):
            apply_patch(model, small_patch(model, "second", (8,), seed=99))
        undo_patch(model)
    with pytest.raises(ValueError, match="memory is 'disk', which reads value rows from a file"):
        apply_patch(model, patch, tokenizer(), memory="disk")
    assert applied_patches(model) == []


def test_another_model_or_tokenizer_is_refused_by_what_differs():
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    before, patch = bits(model, ids), rich_patch(model)
    for other, what in (
        (base_model("llama", num_hidden_layers=3), "with blocks 4, this one has 3"),
        (base_model("gpt2"), "with a weight"),
    ):
        with pytest.raises(ValueError, match=rf"The patch 'rich' is of a .*{what}"):
            apply_patch(other, patch, tokenizer())
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"another model.layers.0.mlp.up_proj.weight"):
        apply_patch(changed, patch, tokenizer())
    words = copy.deepcopy(tokenizer())
    words.add_tokens(["new"])
    with pytest.raises(ValueError, match="for a tokenizer with another vocabulary"):
        apply_patch(model, patch, words)
    with pytest.raises(ValueError, match="Give the model's tokenizer"):
        apply_patch(model, patch)
    assert torch.equal(bits(model, ids), before) and applied_patches(model) == []


def test_a_model_with_memory_knows_the_classes_of_its_ids():
    for kind in (WITH_MEMORY, OURS):
        model, ids = model_of_kind(kind), spoken_ids(2, 19)
        before = bits(model, ids)
        apply_patch(model, rich_patch(model))
        assert not torch.equal(bits(model, ids), before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"key": (999,)}, "a key has a class outside 0 to"),
        ({"key": tuple(range(17))}, "keys is int32"),
        ({"block": 5}, r"block of an entry is \[5\]; allowed: 0 to 4"),
        ({"armed": 3}, "armed or bound without a probe"),
        ({"binding": vectors(1)}, "armed or bound without a probe"),
        ({"gate": float("nan")}, "a gate or a threshold of an entry is not finite"),
        ({"says": (5, 6)}, "says more tokens than it has values"),
        ({"says": (61,)}, "says an id that the tokenizer lacks"),
        ({"probe": "late"}, "names a probe 'late', which it lacks"),
        ({"fact": 0}, "fact of an entry"),
        ({"values": vectors(1, 17)}, "num_steps of an entry"),
    ],
)
def test_an_entry_that_is_not_allowed_is_refused(changes, sentence):
    model = model_of_kind("llama")
    entry = replace(ExactEntry(key=key(8), block=1, values=vectors(0, 1)), **changes)
    with pytest.raises(ValueError, match=f"^The patch 'p' is not right: .*{sentence}"):
        build_patch("p", base_of(model, tokenizer()), [entry])


def test_other_things_are_refused():
    model, base = model_of_kind("llama"), base_of(model_of_kind("llama"), tokenizer())
    entry = ExactEntry(key=key(8), block=1, values=vectors(0, 1))
    with pytest.raises(ValueError, match=r"A value is \[31\]"):
        build_patch("p", base, [replace(entry, values=torch.zeros(1, 31))])
    with pytest.raises(ValueError, match="two entries have one key, block and probe"):
        build_patch("p", base, [entry, replace(entry, gate=2.0)])
    with pytest.raises(ValueError, match="its name is 'a b'"):
        build_patch("a b", base, [entry])
    with pytest.raises(ValueError, match="it changes nothing"):
        build_patch("p", base)
    late = Probe(name="late", block=3, centre=vectors(1), direction=vectors(2), threshold=0.0)
    with pytest.raises(ValueError, match="written at a block before that of a probe"):
        build_patch("p", base, [replace(entry, probe="late", block=2)], [late])
    apply_patch(model, build_patch("early", base, [replace(entry, probe="late", block=3)], [late]), tokenizer())
    with pytest.raises(ValueError, match="applied already: undo it"):
        apply_patch(model, small_patch(model, "early", (4,)))
    early = replace(late, name="early", block=0)
    with pytest.raises(ValueError, match="One patch writes at block 1 and another one's probe is at block 3"):
        apply_patch(model, build_patch("q", base, [replace(entry, probe="early", block=1)], [early]))
    with pytest.raises(ValueError, match="No patch 'other' is applied; applied are early"):
        undo_patch(model, "other")
    undo_patch(model)
    for what in (undo_patch, lambda one: without_patches(one).__enter__()):
        with pytest.raises(ValueError, match="No patch is applied"):
            what(model)
    for setting in ({"memory": "tape"}, {"on_conflict": "win"}):
        with pytest.raises(ValueError, match="allowed: "):
            apply_patch(model, rich_patch(model), tokenizer(), **setting)


def test_patches_and_memories_come_and_go_beside_each_other():
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    plain = bits(model, ids)
    patch = rich_patch(model)
    apply_patch(model, patch, tokenizer())
    patched = bits(model, ids)
    config = {"layers": (1, 2), "rows_per_head": (97, 101), "num_heads": 2, "head_dim": 6}
    attach(model, config, tokenizer())
    assert torch.equal(bits(model, ids), patched)  # its rows are zero
    with torch.no_grad():
        for table in model.engrammar["default"].memory.tables.values():
            table.weight.normal_()
    both = bits(model, ids)
    with without_patches(model), disabled(model):
        assert torch.equal(bits(model, ids), plain)
    with disabled(model):
        assert torch.equal(bits(model, ids), patched)
    undo_patch(model)
    assert not torch.equal(bits(model, ids), both)
    apply_patch(model, patch)  # the memory knows the classes; whichever came first, it reads what the patch wrote
    assert torch.equal(bits(model, ids), both)
    detach(model)
    assert torch.equal(bits(model, ids), patched)
    undo_patch(model)
    assert torch.equal(bits(model, ids), plain)


def test_kept_prefixes_of_a_patched_model_are_refused(tmp_path):
    """A prefix is neither computed under a patch nor used under one that writes below it."""
    model, ids = attached_model("llama"), quiet_ids(2, 12)
    items, patch = [{"input_ids": row} for row in ids], small_patch(model, "low", (4,), block=0)
    apply_patch(model, patch)
    with pytest.raises(ValueError, match="what it writes would be kept: undo it"):
        keep_prefix(model, items, tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()
    undo_patch(model)
    kept = keep_prefix(model, items, tmp_path / "prefix")
    apply_patch(model, patch)
    with pytest.raises(ValueError, match="Blocks that a patch writes at are skipped"):
        model(**{name: value[None] for name, value in kept[0].items()})


def test_a_pass_that_is_under_way_ends_as_it_began():
    """A patch that comes while a pass runs in another thread changes the next pass; so does one that goes."""
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    ids[0, 3], ids[1, 5] = 8, 4
    base, patches = bits(model, ids), [small_patch(model, f"p{one}", (one,), one, block=3) for one in (8, 4)]
    inside, go_on, found = threading.Event(), threading.Event(), []

    def stop(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(20)

    def run():
        found.append(bits(model, ids))

    def during(change):
        inside.clear()
        go_on.clear()
        with model.model.layers[1].register_forward_pre_hook(stop):
            thread = threading.Thread(target=run)
            thread.start()
            assert inside.wait(20)
            change()
            go_on.set()
            thread.join()
        return found.pop()

    assert torch.equal(during(lambda: apply_patch(model, patches[0], tokenizer())), base)
    first = bits(model, ids)
    assert torch.equal(during(lambda: apply_patch(model, patches[1])), first)
    second = bits(model, ids)
    assert torch.equal(during(lambda: undo_patch(model)), second)
    assert torch.equal(bits(model, ids), base) and not model.model.layers[1]._forward_pre_hooks
    assert len({one.sum().item() for one in (base, first, second)}) == 3


def test_a_copied_model_keeps_its_patches():
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    base = bits(model, ids)
    apply_patch(model, rich_patch(model), tokenizer())
    patched = bits(model, ids)
    other = copy.deepcopy(model)
    undo_patch(model)
    assert torch.equal(bits(other, ids), patched) and torch.equal(bits(model, ids), base)
    undo_patch(other)
    assert torch.equal(bits(other, ids), base) and not other.model.layers[1]._forward_pre_hooks


def test_peft_may_wrap_a_patched_model_and_the_other_way_round():
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    base, patch = bits(model, ids), rich_patch(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
    for one in (wrapped, model):
        apply_patch(one, patch, tokenizer())
        assert not torch.equal(bits(wrapped, ids), base)
        undo_patch(model if one is wrapped else wrapped)
        assert torch.equal(bits(wrapped, ids), base)


def test_two_facts_of_one_subject_are_no_conflict_if_their_probes_have_other_names():
    model, entry = model_of_kind("llama"), replace(rich_entries()[7], until_name=False, fact=-1)
    base, (early, late) = base_of(model, tokenizer()), probes()
    first = build_patch("first", base, [entry], [late])
    second = build_patch("second", base, [replace(entry, probe="early", gate=2.0)], [early])
    assert conflicts(first, second) == []
    apply_patch(model, first, tokenizer())
    apply_patch(model, second)
    renamed = replace(early, name="late")
    assert len(conflicts(first, build_patch("third", base, [replace(entry, gate=2.0)], [renamed]))) == 1


def test_a_failed_pass_leaves_no_pass_behind():
    model, ids = model_of_kind("llama"), spoken_ids(2, 19)
    apply_patch(model, rich_patch(model), tokenizer())
    expected = bits(model, ids)
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(RuntimeError), model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0):
        try:
            model(ids)
        except ZeroDivisionError as error:
            raise RuntimeError from error
    assert torch.equal(bits(model, ids), expected)
    with pytest.raises(RuntimeError, match="Block 1 was called outside a pass"), torch.no_grad():
        model.model.layers[1](torch.zeros(1, 3, 32))
    undo_patch(model)
    assert not model.model.layers[3]._forward_pre_hooks


def test_a_subject_has_a_key_with_and_without_a_space_before_it():
    class Spaced:
        def __call__(self, text, add_special_tokens):
            return type("Out", (), {"input_ids": [7, 8] if text.startswith(" ") else [9]})

    classes_V = compress_vocabulary(tokenizer())
    assert subject_keys(" Rome ", Spaced(), classes_V) == [key(7, 8), key(9)]
    assert subject_keys("w3 w5", tokenizer(), classes_V) == [tuple(classes_V[tokenizer()("w3 w5").input_ids].tolist())]
    with pytest.raises(ValueError, match="a key has 1 to 16"):
        subject_keys("w3 " * 17, tokenizer(), classes_V)


def test_gradients_flow_through_a_patched_model():
    model, ids = base_model("llama"), spoken_ids(2, 19)
    apply_patch(model, rich_patch(model), tokenizer())
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_write_before_the_final_norm_is_at_the_number_of_blocks():
    model, ids = model_of_kind("llama"), quiet_ids(1, 9)
    ids[0, 4] = 8
    apply_patch(model, small_patch(model, "last", (8,), block=BLOCKS), tokenizer())
    with without_patches(model), torch.no_grad():
        hidden = model.model(ids, use_cache=False)
        captured = []
        with model.model.norm.register_forward_pre_hook(lambda _, args: captured.append(args[0])):
            model.model(ids, use_cache=False)
        changed = captured[0].clone()
        changed[0, 4] += vectors(50, 1)[0]
        expected = model.model.norm(changed)
    with torch.no_grad():
        found = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found != hidden.last_hidden_state).any(-1)[0].tolist() == [place == 4 for place in range(9)]
