"""A patch's file says the same in memory and on a disk, and a damaged or hostile one is refused in one sentence."""

import errno
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edited_models import key, model_of_kind, names, probes, rich_entries, rich_patch, spoken_ids, tokenizer, vectors
from engrammar.attach.attaching import attachment_of
from engrammar.edit import (
    ExactEntry,
    applied_patches,
    apply_patch,
    base_of,
    build_patch,
    read_patch,
    replace_rows,
    undo_patch,
    write_patch,
)
from engrammar.edit.files import METADATA, parse_patch, patch_bytes, patch_digest, value_table

NAME = Path("hostile.safetensors")


def whole_patch(model):
    """A patch with entries of both kinds."""
    memory = attachment_of(model)["default"].memory
    rows = replace_rows(memory, {1: (torch.tensor([30, 4, 17]), torch.randn(3, 6))})
    about = {"facts": [{"subject": "Rome", "object": "w9"}], "provenance": {"method": "by hand"}, "scores": {"kl": 0.5}}
    entries = [replace(entry, fact=0) for entry in rich_entries()]
    about |= {"names_V": names(), "encoding": "int8"}
    return build_patch("whole", base_of(model, tokenizer()), entries, probes(), rows, **about)


def same(one, other) -> bool:
    arrays, others = one.arrays(), other.arrays()
    equal = all(np.array_equal(arrays[name], others[name]) for name in arrays)
    about = [
        (p.name, p.base, p.facts, p.provenance, p.scores, p.encoding, p.probe_names, p.tables) for p in (one, other)
    ]
    return equal and arrays.keys() == others.keys() and about[0] == about[1]


@pytest.fixture(scope="module")
def model():
    return model_of_kind("llama with memory")


@pytest.fixture(scope="module")
def patch(model):
    return whole_patch(model)


def test_a_file_holds_the_patch_and_nothing_but_safetensors(patch, tmp_path):
    path = tmp_path / "whole.safetensors"
    write_patch(patch, path)
    assert path.read_bytes() == patch_bytes(patch)
    read = read_patch(path)
    assert same(read, patch) and patch_digest(read) == patch_digest(patch)
    with safe_open(path, framework="numpy") as file:
        content = json.loads(file.metadata()[METADATA])
        assert set(file.keys()) == patch.arrays().keys()
        assert np.array_equal(file.get_tensor("keys"), patch.keys_QK)
    assert content["facts"] == [{"subject": "Rome", "object": "w9"}] and content["sha256"] == patch_digest(patch)


def test_entries_come_back_as_they_were_given(model):
    given = sorted(rich_entries(), key=lambda entry: (entry.key, entry.block, entry.probe or ""))
    found = rich_patch(model).exact_entries()
    for one, other in zip(given, found, strict=True):
        assert (one.key, one.block, one.says, one.relative, one.probe, one.armed, one.fact) == (
            (other.key, other.block, other.says, other.relative, other.probe, other.armed, other.fact)
        )
        assert torch.equal(one.values, other.values) and one.gate == pytest.approx(other.gate)
        assert one.binding is None or torch.equal(one.binding, other.binding)


def test_values_that_occur_twice_are_kept_once(model):
    value = vectors(0, 1)
    entries = [ExactEntry(key=key(8, one), block=1, values=value) for one in range(20, 40, 2)]
    assert len(build_patch("p", base_of(model, tokenizer()), entries).values) == 1


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One or a few bytes changed, removed, put in, or moved; more often in the header, which is small."""
    changed = bytearray(data)
    end = int.from_bytes(data[:8], "little") + 8 if rng.random() < 0.6 else len(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(end)
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            changed[at : at + 1] = bytes([changed[at % len(changed)] ^ 1 << rng.randrange(8)])
        elif kind == 2:
            del changed[at : at + rng.choice([1, 8, 100])]
        elif kind == 3:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8])))
        elif kind == 4:
            changed[at : at + 1] = rng.choice([b"0", b"9", b"-", b'"', b"[", b"]", b"{", b"}", b",", b":", b"e", b" "])
        else:
            other = rng.randrange(len(changed))
            changed[at : at + 8], changed[other : other + 8] = changed[other : other + 8], changed[at : at + 8]
    return bytes(changed)


def refused(data: bytes, patch) -> bool:
    """Whether a file is refused, in one sentence that names it; if not, it means the same."""
    try:
        read = parse_patch(data, NAME)
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"{NAME} ") and "\n" not in text and text.endswith(".") and len(text) < 500
        return True
    assert same(read, patch)
    return False


def test_of_ten_thousand_mutated_files_each_is_refused_or_means_the_same(patch):
    data, rng = patch_bytes(patch), random.Random(0)
    outcomes = [refused(mutated(data, rng), patch) for _ in range(10_000)]
    print(f"{sum(outcomes)} of 10,000 mutated files were refused; the others mean the same")
    assert sum(outcomes) > 9_000


def signed(patch, **changes) -> bytes:
    """The file of a patch with arrays or settings that `build_patch` would not make, and a right digest."""
    return patch_bytes(replace(patch, **changes))


def array(patch, name: str, place, value) -> dict:
    changed = (patch.keys_QK if name == "keys_QK" else getattr(patch, name)).copy()
    changed[place] = value
    return {name: changed}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (lambda p: array(p, "keys_QK", (0, -1), -1), "a key has no class at a place"),
        (lambda p: array(p, "keys_QK", (0, 0), 500), "a key has a class outside"),
        (lambda p: array(p, "keys_QK", 0, p.keys_QK[1]), "a key occurs twice"),
        (lambda p: array(p, "keys_QK", (0, 0), -2), "a key has a class outside"),
        (lambda p: array(p, "entries", (0, 0), 10**6), "its keys are not those of its entries"),
        (lambda p: array(p, "entries", (0, 0), -1), "its keys are not those of its entries"),
        (lambda p: array(p, "entries", (2, 1), 99), "block of an entry is"),
        (lambda p: array(p, "entries", (2, 4), 2), "probe of an entry is"),
        (lambda p: array(p, "entries", (2, 5), 10**6), "binding of an entry is"),
        (lambda p: array(p, "entries", (2, 7), 1), "fact of an entry is"),
        (lambda p: array(p, "entries", (2, 8), 10**6), "do not share out its steps"),
        (lambda p: array(p, "entries", (2, 9), 10**6), "num_steps of an entry is"),
        (lambda p: array(p, "entries", (2, 3), 2), "until_name of an entry is"),
        (lambda p: array(p, "entries", (2, 10), 10**6), "after of an entry is"),
        (lambda p: {"name_ids": p.name_ids[:0]}, "entries that end at names, or ids of names, alone"),
        (lambda p: {"name_ids": p.name_ids[:1]}, "name_ids is uint8"),
        (lambda p: {"entries": np.where(np.arange(p.entries.shape[1]) == 3, 0, p.entries)}, "ids of names, alone"),
        (lambda p: array(p, "steps", (1, 0), len(p.values)), "a step has a value row that is not there"),
        (lambda p: array(p, "steps", (1, 1), 61), "a step says an id that the tokenizer lacks"),
        (lambda p: array(p, "strengths", (1, 0), np.nan), "a gate or a threshold of an entry is not finite"),
        (lambda p: array(p, "values", (3, slice(-4, None)), 255), "value row 3 is not finite"),
        (lambda p: array(p, "centres", (0, 3), np.inf), "a probe is not finite"),
        (lambda p: array(p, "directions", (1, 3), np.inf), "a probe is not finite"),
        (lambda p: array(p, "probe_centres", 0, 9), "its centres are not those of its probes"),
        (lambda p: array(p, "probe_centres", 1, -1), "its centres are not those of its probes"),
        (lambda p: array(p, "thresholds", 0, np.nan), "a probe is not finite"),
        (lambda p: array(p, "probe_blocks", 0, -1), "a probe is at a block that is not there"),
        (lambda p: {"probe_names": ["late", "late"]}, "two probes have one name"),
        (lambda p: {"probe_names": ["late"]}, "probe_blocks is int32"),
        (lambda p: {"values": p.values[:, :-1]}, "values is uint8"),
        (lambda p: {"steps": p.steps.astype(np.int64)}, "steps is int64"),
        (lambda p: {"encoding": "fp8"}, "values are stored as 'fp8'"),
        (lambda p: {"encoding": "gzip"}, "values are stored as 'gzip'"),
        (lambda p: {"name": "../../etc"}, "its name is"),
        (lambda p: {"tables": None}, "row deltas without their tables"),
        (lambda p: {"tables": replace(p.tables, num_rows={1: 20})}, "a row of layer 1 is outside its table of 20 rows"),
        (lambda p: {"tables": replace(p.tables, num_rows={2: 20})}, "rows of a layer 1, whose table it does not know"),
        (lambda p: {"deltas": {1: replace(p.deltas[1], rows_U=p.deltas[1].rows_U[::-1])}}, "are not ascending"),
        (lambda p: {"deltas": {1: replace(p.deltas[1], rows_U=p.deltas[1].rows_U[:2])}}, "layer 1 has other shapes"),
        (
            lambda p: {"deltas": {1: replace(p.deltas[1], stored_US=np.full_like(p.deltas[1].stored_US, 255))}},
            "the new row .* of layer 1 is not finite",
        ),
        (lambda p: {"base": replace(p.base, num_classes=2**40)}, "a size of its base"),
        (lambda p: {"base": replace(p.base, model={**p.base.model, "hidden_size": -1})}, "a size of its base"),
        (lambda p: {"base": replace(p.base, model={**p.base.model, "weights": {"a": ["b"]}})}, "is not numbers"),
        (lambda p: {"base": replace(p.base, model={"blocks": 4, "hidden_size": 32})}, "its model does not have"),
        (lambda p: {"facts": [{"subject": 3}]}, "its facts are not words"),
        (lambda p: {"scores": {"kl": "low"}}, "its scores are not numbers"),
    ],
)
def test_a_file_made_with_intent_is_refused(patch, changes, sentence):
    """Its digest is right, so only the checks of its numbers can refuse it."""
    with pytest.raises(ValueError, match=rf"^{NAME} is not right \(.*{sentence}"):
        parse_patch(signed(patch, **changes(patch)), NAME)


def test_numbers_changed_with_a_right_digest_are_refused_or_do_no_harm(model, patch):
    """What passes every check is another patch, which a model can run."""
    rng, ids, ran = random.Random(2), spoken_ids(2, 19), 0
    for _ in range(600):
        names = ["keys_QK", "entries", "entries", "strengths", "steps", "probe_blocks", "probe_centres", "thresholds"]
        name = rng.choice(names)
        kept = getattr(patch, name)
        place = tuple(rng.randrange(size) for size in kept.shape)
        value = rng.choice([-1, 0, 1, 2, 3, 5, 17, 1024, 2**31 - 1, -(2**31)])
        try:
            read = parse_patch(signed(patch, **array(patch, name, place, value)), NAME)
        except ValueError as error:
            assert str(error).startswith(f"{NAME} is not right (")
            continue
        if rng.random() < 0.1:
            apply_patch(model, replace(read, deltas={}, tables=None))
            with torch.no_grad():
                model(ids)
            undo_patch(model)
            ran += 1
    assert ran > 8


def test_other_files_are_refused(patch, tmp_path):
    for data, sentence in (
        (b"", "0 bytes are too few"),
        (b"\x80\x04pickle....", "its header should have"),
        ((2**62).to_bytes(8, "little") + b"{}", "its header should have"),
        ((2).to_bytes(8, "little") + b"{}", f"its metadata have no {METADATA}"),
        (patch_bytes(patch) + b"\0", "bytes by its header|by its header"),
        (patch_bytes(patch)[:-1], "by its header"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_patch(data, NAME)
    with pytest.raises(ValueError, match="it is missing, or no file"):
        read_patch(tmp_path / "none.safetensors")


def test_a_refused_file_leaves_the_model_as_it_was(model, patch, tmp_path):
    ids, rng = spoken_ids(2, 19), random.Random(1)
    with torch.no_grad():
        before = model(ids).logits
    tried = 0
    while tried < 20:
        data = mutated(patch_bytes(patch), rng)
        (tmp_path / "bad.safetensors").write_bytes(data)
        if not refused(data, patch):
            continue
        tried += 1
        with pytest.raises(ValueError):
            apply_patch(model, tmp_path / "bad.safetensors", tokenizer())
        with torch.no_grad():
            assert applied_patches(model) == [] and torch.equal(model(ids).logits, before)


def test_a_full_disk_leaves_the_file_that_was_there(patch, tmp_path, monkeypatch):
    path = tmp_path / "whole.safetensors"
    write_patch(patch, path)
    before, real = path.read_bytes(), Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        Path, "open", lambda s, mode="r", *a, **k: Full(real(s, mode)) if mode == "wb" else real(s, mode)
    )
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\); what was there is still there"
    ):
        write_patch(replace(patch, name="other"), path)
    monkeypatch.undo()
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_the_values_of_a_file_are_a_table_like_any(patch, tmp_path):
    path = tmp_path / "whole.safetensors"
    write_patch(patch, path)
    table = value_table(path)
    start = table.shards[0].start
    assert path.read_bytes()[start : start + patch.values.nbytes] == patch.values.tobytes()
    assert table.num_rows == len(patch.values) and table.row_bytes == patch.values.shape[1]
