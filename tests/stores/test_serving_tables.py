"""A model gives the same bits wherever its tables are; what cannot be read is said, or closes its gate."""

import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engrammar.config import DIALECTS, Encoding
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.planning.touches import save_hot_rows
from engrammar.stores.base import Arrived, RowsMissing, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.ram import RamStore
from engrammar.stores.serving import ServingSettings, look_ahead, serve_tables, stored_tables_of
from engrammar.tables.convert import quantize
from engrammar.tables.shards import HOT_ROWS
from models import VOCABULARY, tiny_config, tiny_model

TIERS = {
    "RAM": {"memory": "ram"},
    "disk": {"memory": "disk"},
    "cache over disk": {"memory": "disk", "cache_rows": 64},
    "RAM, shared by processes": {"memory": "ram", "sharing": "processes"},
    "cache over disk, shared by processes": {"memory": "disk", "cache_rows": 64, "sharing": "processes"},
    "cache over RAM, by hand": {"memory": lambda table: CachedStore(RamStore(table), 32)},
}


def random_ids(batch: int = 2, length: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=DIALECTS)
def saved(request, tmp_path_factory):
    """A model of each dialect, and the folder it was saved in."""
    model, folder = tiny_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def served(tmp_path):
    """A saved model and how to open it again; what was opened is closed."""
    model = tiny_model("paper")
    model.save_pretrained(tmp_path / "model")
    opened = []

    def open_again(**serving):
        opened.append(EngrammarForCausalLM.from_pretrained(tmp_path / "model", **serving).eval())
        return opened[-1]

    yield model, open_again, tmp_path / "model"
    for again in opened:
        stored_tables_of(again).close()


@pytest.mark.parametrize("tier", TIERS)
@torch.no_grad()
def test_every_tier_gives_the_models_own_bits(saved, tier):
    model, folder = saved
    again = EngrammarForCausalLM.from_pretrained(folder, **TIERS[tier]).eval()
    for seed in range(3):
        assert torch.equal(again(random_ids(seed=seed)).logits, model(random_ids(seed=seed)).logits)
    how = {"max_new_tokens": 9, "do_sample": False, "num_beams": 3}
    assert torch.equal(again.generate(random_ids(), **how), model.generate(random_ids(), **how))
    stored_tables_of(again).close()


@torch.no_grad()
def test_the_auto_class_takes_a_place_too(served):
    model, _, folder = served
    again = AutoModelForCausalLM.from_pretrained(folder, memory="disk", cache_rows=16).eval()
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits) and stored_tables_of(again) is not None
    stored_tables_of(again).close()


def test_half_of_a_cache_is_pinned_to_the_hottest_rows(served):
    _, open_again, folder = served
    save_hot_rows({1: np.arange(100, 200), 3: np.arange(50)}, folder / HOT_ROWS)
    again = open_again(memory="disk", cache_rows=64)
    for layer, first in ((1, 100), (3, 0)):
        store = stored_tables_of(again).stores[again.model.memory.table(layer).name]
        store.fetch(np.arange(first, first + 16)).wait()
        assert store.hits >= 12 and store.hits + store.misses == 16  # a set has room for seven of its eight
    (folder / HOT_ROWS).write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"memory\.hot\.safetensors does not hold rows to pin"):
        open_again(memory="disk", cache_rows=64)
    open_again(memory="disk")  # needs none
    save_hot_rows({1: np.array([10**9])}, folder / HOT_ROWS)
    with pytest.raises(ValueError, match=r"memory\.hot\.safetensors is of other tables \(Row 1000000000"):
        open_again(memory="disk", cache_rows=64)


@torch.no_grad()
def test_reads_of_all_layers_start_before_the_first_block(served):
    _, open_again, _ = served
    events = []

    class Watched(RowStore):
        def __init__(self, table):
            self.store, self.layer = RamStore(table), table.layer
            self.name, self.num_rows, self.row_bytes = self.store.name, self.store.num_rows, self.store.row_bytes

        def _fetch(self, rows_U):
            events.append(f"read {self.layer}")
            return self.store.fetch(rows_U)

        def close(self):
            self.store.close()

    model = open_again(memory=Watched)
    model.model.layers[0].register_forward_hook(lambda *_: events.append("block 0"))
    model(random_ids())
    assert events == ["read 1", "read 3", "block 0"]


@torch.no_grad()
def test_looking_ahead_reads_each_batch_once_and_changes_no_bit(served):
    model, open_again, _ = served
    again = open_again(memory="disk")
    batches = [{"input_ids": random_ids(seed=seed)} for seed in range(4)]
    source = stored_tables_of(again)
    logits = []
    started = []
    read = source.read
    source.read = lambda passes: started.append(len(logits)) or read(passes)
    for batch in look_ahead(again, batches):
        logits.append(again(**batch).logits)
    assert started == [0, 0, 1, 2]  # batches computed when each read starts: one is ahead
    assert source.counts.rows == 4 * 2 * 2 * 13 * 4  # batches, layers, sequences, tokens, heads
    for batch, found in zip(batches, logits):
        assert torch.equal(found, model(**batch).logits)


@torch.no_grad()
def test_rows_read_for_another_batch_are_refused(served):
    model, open_again, _ = served
    again = open_again(memory="disk")
    retrieved = again.retrieve(random_ids(seed=5))
    with pytest.raises(ValueError, match="made for other input_ids"):
        again(random_ids(seed=6), retrieved=retrieved)
    assert torch.equal(again(random_ids(seed=5), retrieved=retrieved).logits, model(random_ids(seed=5)).logits)


class Lossy(RowStore):
    """Loses the rows it is told to, with junk in their place."""

    def __init__(self, table, lost):
        self.store, self.lost = RamStore(table), lost
        self.name, self.num_rows, self.row_bytes = self.store.name, self.store.num_rows, self.store.row_bytes

    def _fetch(self, rows_U):
        rows_US, missing_U = self.store.fetch(rows_U).wait(), np.isin(rows_U, self.lost)
        rows_US[missing_U] = 255  # NaN, as fp32
        if not missing_U.any():
            return Arrived(rows_US)
        self.error = RowsMissing(f"row {rows_U[missing_U][0]} of {self.name} is lost", missing_U, rows_US)
        return self

    def wait(self, seconds=None):
        raise self.error

    def close(self):
        self.store.close()


@torch.no_grad()
def test_a_missing_row_is_an_error_that_names_it(served):
    _, open_again, _ = served
    again = open_again(memory=lambda table: Lossy(table, range(table.num_rows)))
    with pytest.raises(RowsMissing, match=r"row \d+ of .* is lost"):
        again(random_ids())


@torch.no_grad()
def test_skipping_closes_the_gate_of_just_the_positions_that_lack_a_row(served, caplog):
    model, open_again, _ = served
    ids = random_ids()
    memory = open_again(memory="ram").model.memory
    rows = {memory.table(layer).name: rows_BTH for layer, rows_BTH in memory.addresses(ids).items()}
    lost = {name: rows_BTH[0, 4, 1:2].numpy() for name, rows_BTH in rows.items()}
    again = open_again(memory=lambda table: Lossy(table, lost[table.name]), on_missing="skip", deadline=1.0)
    logits = again(ids).logits
    closed = {name: (rows_BTH == int(lost[name][0])).any(-1) for name, rows_BTH in rows.items()}
    # The same by hand: the model's own fusion with those positions dead.
    for layer, name in ((1, "model.memory.tables.1.weight"), (3, "model.memory.tables.3.weight")):
        fusion = model.model.layers[layer].fusion
        fusion.gated_value = lambda h, e, dead, fusion=fusion, name=name: type(fusion).gated_value(
            fusion, h, e, closed[name]
        )
    assert torch.equal(logits, model(ids).logits) and torch.isfinite(logits).all()
    counts = stored_tables_of(again).counts
    assert counts.closed == sum(int(closed_BT.sum()) for closed_BT in closed.values()) >= 2
    assert counts.missing_rows >= 2 and "is lost" in caplog.text


@torch.no_grad()
def test_zeros_stand_for_just_the_rows_that_are_missing(served, caplog):
    model, open_again, _ = served
    lost = range(0, 400, 7)
    again = open_again(memory=lambda table: Lossy(table, lost), on_missing="zeros", deadline=1.0)
    logits = again(random_ids()).logits
    for layer in (1, 3):
        model.model.memory.table(layer).weight[lost] = 0
    assert torch.equal(logits, model(random_ids()).logits)
    counts = stored_tables_of(again).counts
    assert counts.missing_rows > 0 and counts.closed == 0 and "zeros in their place" in caplog.text


@torch.no_grad()
def test_with_every_row_missing_the_memory_is_off(served):
    model, open_again, _ = served
    again = open_again(memory=lambda t: Lossy(t, range(t.num_rows)), on_missing="skip", deadline=1.0)
    logits = again(random_ids()).logits
    for layer in (1, 3):
        model.model.layers[layer].fusion = None
    torch.testing.assert_close(logits, model(random_ids()).logits, atol=1e-6, rtol=0)


def test_a_served_model_saves_its_rows_too(served, tmp_path):
    model, open_again, _ = served
    open_again(memory="disk").save_pretrained(tmp_path / "copy")
    again = EngrammarForCausalLM.from_pretrained(tmp_path / "copy")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_saving_over_the_files_that_the_rows_are_read_from_is_refused(served):
    model, open_again, folder = served
    with pytest.raises(ValueError, match="save it to another folder"):
        open_again(memory="disk").save_pretrained(folder)
    assert torch.equal(
        EngrammarForCausalLM.from_pretrained(folder).state_dict()["model.memory.tables.1.weight"],
        model.state_dict()["model.memory.tables.1.weight"],
    )


def test_bad_settings_are_refused_in_one_sentence(served, tmp_path):
    _, open_again, folder = served
    for serving, words in (
        ({"memory": "disk", "sharing": "processes"}, "needs something to share: memory='ram', or cache_rows"),
        ({"memory": "ram", "sharing": "threads"}, "sharing is 'threads'; allowed: none, processes"),
        ({"memory": "tape"}, "memory is 'tape'; allowed: ram, disk"),
        ({"memory": "disk", "on_missing": "zero"}, "on_missing is 'zero'; allowed: error, skip, zeros"),
        ({"memory": "disk", "on_missing": "skip"}, "needs a deadline"),
        ({"memory": "disk", "cache_rows": -1}, "cache_rows is -1"),
        ({"cache_rows": 5}, "cache_rows needs memory="),
    ):
        with pytest.raises(ValueError, match=words):
            open_again(**serving)
    other = EngrammarForCausalLM(tiny_config("qwen_next"), tables="external")
    with pytest.raises(ValueError, match="another geometry"):
        serve_tables(other, folder, ServingSettings(where="disk"))
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "memory.tables.1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"memory\.tables\.1\.safetensors is missing"):
        EngrammarForCausalLM.from_pretrained(tmp_path / "cut", memory="disk")
    with pytest.raises(ValueError, match="no memory"):
        serve_tables(tiny_model(None), folder, ServingSettings(where="disk"))


@pytest.mark.parametrize("encoding", get_args(Encoding))
@torch.no_grad()
def test_quantized_rows_give_the_same_bits_from_ram_and_disk(served, encoding, tmp_path):
    model, _, folder = served
    quantize(folder, tmp_path / "small", encoding=encoding)
    if encoding not in ("fp32", "bf16"):
        with pytest.raises(ValueError, match=f"stored as {encoding}: load them with memory='ram' or 'disk'"):
            EngrammarForCausalLM.from_pretrained(tmp_path / "small")
    logits = []
    for serving in ({"memory": "ram"}, {"memory": "disk"}, {"memory": "disk", "cache_rows": 64}):
        again = EngrammarForCausalLM.from_pretrained(tmp_path / "small", **serving).eval()
        logits.append(again(random_ids()).logits)
        stored_tables_of(again).close()
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    error = (logits[0] - model(random_ids()).logits).abs().max()
    assert (error == 0) == (encoding == "fp32") and error < 1
