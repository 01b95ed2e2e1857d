"""Row deltas: an overlay in front of a parameter or of any store, undone to the bit; table files stay as they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attached_models import base_model
from edited_models import OURS, WITH_MEMORY, bits, model_of_kind, small_patch, spoken_ids, tokenizer
from engrammar.attach import detach, load_attached, save_attached
from engrammar.edit import (
    applied_patches,
    apply_patch,
    base_of,
    build_patch,
    conflicts,
    merge,
    replace_rows,
    undo_patch,
)
from engrammar.edit.applying import memories_of
from engrammar.edit.overlay import OverlayStore
from engrammar.edit.patch import RowDelta
from engrammar.memory import Memory
from engrammar.stores.base import Fetch, RowsMissing, RowStore
from engrammar.stores.serving import StoredTables
from engrammar.tables.convert import quantize
from engrammar.tables.folder import open_tables
from engrammar.tables.verify import read_table
from engrammar.train.placement import place_tables


def memory_of(model) -> Memory:
    return memories_of(model)[0]


def test_a_model_whose_rows_a_patch_replaces_is_not_placed():
    """Placed rows would be read past the patch."""
    model, ids = model_of_kind(OURS), spoken_ids(2, 9)
    plain = bits(model, ids)
    apply_patch(model, row_patch(model, "rows", ids)[0], tokenizer())
    with pytest.raises(ValueError, match="a patch replaces rows of its tables"):
        place_tables(model)
    undo_patch(model, "rows")
    place_tables(model)
    assert torch.equal(bits(model, ids), plain)


def test_patches_are_undone_on_a_model_that_was_cast():
    """The rows that a patch holds are of the precision in which it was applied."""
    model, ids = model_of_kind(OURS), spoken_ids(2, 9)
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 4))):
        apply_patch(model, row_patch(model, name, ids, part)[0], tokenizer())
    model.bfloat16()
    undo_patch(model, "a")
    only_b = model_of_kind(OURS)
    apply_patch(only_b, row_patch(only_b, "b", ids, slice(2, 4))[0], tokenizer())
    assert applied_patches(model) == ["b"]
    assert torch.equal(bits(model, ids), bits(only_b.bfloat16(), ids))
    assert torch.equal(bits(undo_patch(model), ids), bits(model_of_kind(OURS).bfloat16(), ids))


def test_a_memory_whose_rows_a_patch_replaces_is_not_detached():
    model, ids = model_of_kind(WITH_MEMORY), spoken_ids(2, 9)
    apply_patch(model, row_patch(model, "rows", ids)[0], tokenizer())
    with pytest.raises(ValueError, match="A patch replaces rows of the memory 'default'"):
        detach(model)
    detach(undo_patch(model))


def read_rows(model, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Some rows of each layer that these ids read."""
    return {layer: rows.unique()[::3] for layer, rows in memory_of(model).addresses(ids).items()}


def row_patch(model, name: str, ids: torch.Tensor, part: slice = slice(None), seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    rows = {layer: rows[part] for layer, rows in read_rows(model, ids).items()}
    new = {layer: (one, torch.randn(len(one), 6, generator=draw)) for layer, one in rows.items()}
    return build_patch(name, base_of(model, tokenizer()), rows=replace_rows(memory_of(model), new)), new


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "default"
    save_attached(model_of_kind(WITH_MEMORY), folder)
    return folder


def served(adapter: Path, memory="ram", **settings):
    model = base_model("llama").requires_grad_(False)
    return load_attached(model, adapter, tokenizer(), memory=memory, **settings)


@pytest.mark.parametrize("kind", [WITH_MEMORY, OURS])
def test_rows_of_parameters_are_replaced_and_come_back(kind):
    """The twin: a model whose rows were written over. The parameters of the patched one do not change."""
    model, twin, ids = model_of_kind(kind), model_of_kind(kind), spoken_ids(2, 19)
    before = bits(model, ids)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch, new = row_patch(model, "rows", ids)
    with torch.no_grad():
        for layer, (rows, values) in new.items():
            memory_of(twin).table(layer).weight[rows] = values
    apply_patch(model, patch)
    assert torch.equal(bits(model, ids), bits(twin, ids)) and not torch.equal(bits(model, ids), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    undo_patch(model)
    assert torch.equal(bits(model, ids), before) and not memory_of(model).table(1)._forward_hooks


@pytest.mark.parametrize("settings", [{}, {"cache_rows": 16}, {"memory": "disk"}, {"memory": "disk", "cache_rows": 16}])
def test_rows_of_any_store_are_replaced_and_come_back(adapter, settings):
    """The same bits as with parameters; the files are read again at the end."""
    ids, plain = spoken_ids(2, 19), model_of_kind(WITH_MEMORY)
    files = {path: path.read_bytes() for path in adapter.iterdir()}
    patch, _ = row_patch(plain, "rows", ids)
    apply_patch(plain, patch)
    model = served(adapter, **settings)
    before = bits(model, ids)
    stores = dict(memory_of(model).source.stores)
    apply_patch(model, patch)
    for _ in range(2):  # from the store, and from what a cache in front of it has kept
        assert torch.equal(bits(model, ids), bits(plain, ids))
    undo_patch(model)
    assert torch.equal(bits(model, ids), before) and memory_of(model).source.stores == stores
    assert {path: path.read_bytes() for path in adapter.iterdir()} == files


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("where", ["parameters", "stores"])
def test_row_patches_are_taken_back_in_any_order(adapter, where, order):
    def fresh():
        return model_of_kind(WITH_MEMORY) if where == "parameters" else served(adapter)

    model, ids = fresh(), spoken_ids(2, 19)
    parts = [slice(0, 4), slice(4, 8), slice(8, None)]
    patches = [row_patch(model, f"p{i}", ids, part, seed=i)[0] for i, part in enumerate(parts)]
    for patch in patches:
        apply_patch(model, patch)
    whole = merge("whole", patches)
    other = apply_patch(fresh(), whole)
    assert torch.equal(bits(model, ids), bits(other, ids))
    left = [0, 1, 2]
    for gone in order:
        undo_patch(model, f"p{gone}")
        left.remove(gone)
        other = fresh()
        for index in left:
            apply_patch(other, patches[index])
        assert torch.equal(bits(model, ids), bits(other, ids))


def test_rows_that_two_patches_change_are_named():
    model, ids = model_of_kind(WITH_MEMORY), spoken_ids(2, 19)
    (first, new), (second, _) = (
        row_patch(model, "first", ids, slice(0, 4)),
        row_patch(model, "second", ids, slice(3, 6), 1),
    )
    row = int(new[1][0][3])
    assert f"row {row} of layer 1" in {str(one) for one in conflicts(first, second)}
    apply_patch(model, first)
    before = bits(model, ids)
    with pytest.raises(ValueError, match=rf"'first' and 'second' change the same differently \(row {row} of layer 1"):
        apply_patch(model, second)
    assert torch.equal(bits(model, ids), before)
    apply_patch(model, second, on_conflict="replace")
    undo_patch(model, "second")
    assert torch.equal(bits(model, ids), before)


def test_a_patch_of_both_kinds_is_applied_whole_or_not_at_all():
    model, ids = model_of_kind(WITH_MEMORY), spoken_ids(2, 19)
    before = bits(model, ids)
    rows, _ = row_patch(model, "rows", ids)
    whole = merge("whole", [small_patch(model, "key", (8,)), rows])
    apply_patch(model, whole)
    both = bits(model, ids)
    undo_patch(model)
    with torch.no_grad():
        memory_of(model).table(2).weight[int(rows.deltas[2].rows_U[1])] += 1
    with pytest.raises(ValueError, match=r"Row \d+ of layer 2 is not the one that the patch 'whole' replaces \(1 of"):
        apply_patch(model, whole)
    assert applied_patches(model) == [] and not hasattr(model, "engrammar_patches")
    with torch.no_grad():
        memory_of(model).table(2).weight[int(rows.deltas[2].rows_U[1])] -= 1
    assert not torch.equal(before, both)


def test_tables_of_another_kind_are_refused(adapter, tmp_path):
    model, ids = model_of_kind(WITH_MEMORY), spoken_ids(2, 19)
    patch, _ = row_patch(model, "rows", ids)
    with pytest.raises(ValueError, match="replaces rows of tables, and this model has no memory"):
        apply_patch(base_model("llama"), patch)
    other = replace(patch, tables=replace(patch.tables, addressing_sha256="0" * 64))
    with pytest.raises(ValueError, match="tables with another addressing_sha256"):
        apply_patch(model, other)
    with torch.no_grad():
        memory_of(model).table(1).weight.data = memory_of(model).table(1).weight.data.bfloat16()
        memory_of(model).table(2).weight.data = memory_of(model).table(2).weight.data.bfloat16()
    with pytest.raises(ValueError, match=r"another encoding \(fp32 there, bf16 here\)"):
        apply_patch(model, patch)
    with pytest.raises(ValueError, match=r"New rows are \[2, 5\]; allowed: \[2, 6\]"):
        replace_rows(memory_of(model), {1: (torch.tensor([1, 2]), torch.zeros(2, 5))})
    with pytest.raises(ValueError, match="A row is not one of the"):
        replace_rows(memory_of(model), {1: (torch.tensor([1, 10**6]), torch.zeros(2, 6))})


class Broken(RowStore):
    """A store that cannot read some rows."""

    name, identity, num_rows, row_bytes = "broken", "id", 50, 4

    def _fetch(self, rows_U):
        class Failing(Fetch):
            def wait(self, seconds=None):
                missing = np.isin(rows_U, [3, 4])
                raise RowsMissing("rows are missing", missing, np.zeros((len(rows_U), 4), np.uint8))

        return Failing()

    def close(self):
        pass


def test_a_replaced_row_is_not_missing_and_others_are():
    new = np.full((1, 4), 9, np.uint8)
    delta = RowDelta(rows_U=np.array([3]), stored_US=new, replaced_U=np.zeros(1, np.uint64))
    store = OverlayStore(Broken(), delta)
    assert store.fetch(np.array([3, 1, 3])).wait().tolist() == [[9] * 4, [0] * 4, [9] * 4]
    with pytest.raises(RowsMissing) as caught:
        store.fetch(np.array([3, 4, 1])).wait()
    assert caught.value.missing_U.tolist() == [False, True, False] and caught.value.rows_US[0].tolist() == [9] * 4
    with pytest.raises(IndexError):
        store.fetch(np.array([50]))
    assert store.identity != Broken.identity


def test_every_encoding_is_replaced_as_it_is_stored(adapter, tmp_path):
    """Rows of a quantized table: what is read back are the new values, rounded as that table rounds."""
    ids = spoken_ids(2, 19)
    for encoding in ("bf16", "fp8", "int8", "int4"):
        quantize(adapter, tmp_path / encoding, encoding=encoding)
        model = served(tmp_path / encoding)
        patch, new = row_patch(model, "rows", ids)
        apply_patch(model, patch)
        source = memory_of(model).source
        assert isinstance(source, StoredTables) and patch.tables.encoding == encoding
        name = memory_of(model).table(1).name
        rows, values = new[1]
        found = source.read([{name: rows[None, :, None]}])[0][name]().embedding[0]
        assert (found - values).abs().max() <= values.abs().max() * (1 / 7 if encoding != "bf16" else 2**-8)
        stored = np.concatenate(list(read_table(open_tables(tmp_path / encoding), source.files[name])))
        assert not np.array_equal(stored[rows.numpy()], patch.deltas[1].stored_US)
