"""Rows on their way to an accelerator. Here one is imitated whose copies arrive late (`make gpu` has a real one)."""

import threading

import pytest
import torch

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores import serving
from engrammar.stores.base import Arrived, RowsMissing, RowStore
from engrammar.stores.ram import RamStore
from engrammar.stores.serving import stored_tables_of
from engrammar.stores.to_device import DeviceCopies
from models import VOCABULARY, tiny_model

CPU = torch.device("cpu")
GARBAGE = 0x7F  # bytes of a copy that has not arrived; four of them are a large number


class LateStream:
    """A stream whose copies arrive after a while; an event of it tells when those before it have."""

    def __init__(self, device: torch.device) -> None:
        self.arrivals: list[threading.Event] = []

    def __enter__(self) -> None:
        LateStream.current = self

    def __exit__(self, *_: object) -> None:
        LateStream.current = None

    def record_event(self) -> list[threading.Event]:
        return list(self.arrivals)


class Reading:
    """The stream of the model's own work."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def wait_event(self, arrivals: list[threading.Event]) -> None:
        assert arrivals
        if self.waits:
            assert all(arrival.wait(10) for arrival in arrivals)


@pytest.fixture
def late(monkeypatch):
    """Imitates the accelerator; returns what waits for it, which can be told not to wait."""
    reading, kept, to = Reading(waits=True), [], torch.Tensor.to

    def late_to(x, *args, non_blocking=False, **settings):
        if not non_blocking:
            return to(x, *args, **settings)
        assert LateStream.current is not None and any(x is one for one in kept)
        copy, arrival = torch.full_like(x, GARBAGE), threading.Event()

        def arrive() -> None:
            copy.copy_(x)
            arrival.set()

        LateStream.current.arrivals.append(arrival)
        threading.Timer(0.05, arrive).start()
        return copy

    monkeypatch.setattr(serving, "HOST", "another device")
    monkeypatch.setattr(torch, "Stream", LateStream)
    monkeypatch.setattr(torch.Tensor, "to", late_to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (kept.append(x.clone()), kept[-1])[1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: reading)
    return reading


def random_ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(tmp_path):
    """A model, and the same model with its rows on disk."""
    model = tiny_model("paper")
    model.save_pretrained(tmp_path)
    served = EngrammarForCausalLM.from_pretrained(tmp_path, memory="disk").eval()
    yield model, served
    stored_tables_of(served).close()


@torch.no_grad()
def test_copies_that_arrive_late_are_waited_for(pair, late):
    model, served = pair
    for seed in range(3):
        assert torch.equal(served(random_ids(seed)).logits, model(random_ids(seed)).logits)
    assert len(stored_tables_of(served).copies) == 1


@torch.no_grad()
def test_the_imitation_gives_other_logits_to_those_who_do_not_wait(pair, late):
    model, served = pair
    late.waits = False
    assert not torch.equal(served(random_ids()).logits, model(random_ids()).logits)


@torch.no_grad()
def test_all_reads_and_copies_start_before_the_first_wait(pair, late):
    _, served = pair
    memory, wait = served.model.memory, late.wait_event
    started = served.retrieve(random_ids())
    assert set(started.waits) == set(memory.config.layers) and len(memory.config.layers) > 1
    copies = next(iter(stored_tables_of(served).copies.values()))
    copies.thread.submit(lambda: None).result(10)  # behind the copies of all layers, none of which was waited for
    seen = []
    late.wait_event = lambda arrivals: (seen.append(len(arrivals)), wait(arrivals))
    for layer in memory.config.layers:
        started.wait(layer)
    assert seen == [1, 2]


class Refusing(RowStore):
    """A table whose first row asked for is missing."""

    def __init__(self, store: RowStore) -> None:
        self.store, self.name, self.identity = store, store.name, store.identity
        self.num_rows, self.row_bytes = store.num_rows, store.row_bytes

    def _fetch(self, rows_U):
        rows_US, missing_U = self.store.fetch(rows_U).wait(), rows_U == rows_U[0]

        class Failing(Arrived):
            def wait(self, seconds=None):
                raise RowsMissing("this row is lost", missing_U, rows_US)

        return Failing(rows_US)

    def close(self) -> None:
        self.store.close()


@torch.no_grad()
def test_missing_rows_are_reported_or_close_their_gates_as_on_the_host(tmp_path, request):
    tiny_model("paper").save_pretrained(tmp_path)

    def served(**settings):
        return EngrammarForCausalLM.from_pretrained(
            tmp_path, memory=lambda table: Refusing(RamStore(table)), **settings
        ).eval()

    here = served(on_missing="skip", deadline=5.0)
    expected, counts = here(random_ids()).logits, stored_tables_of(here).counts
    request.getfixturevalue("late")
    with pytest.raises(RowsMissing, match="this row is lost"):
        served()(random_ids())
    there = served(on_missing="skip", deadline=5.0)
    assert torch.equal(there(random_ids()).logits, expected) and stored_tables_of(there).counts == counts


def test_what_making_raises_reaches_the_reader(late):
    def make(_: object) -> tuple[torch.Tensor]:
        raise ValueError("these rows cannot be decoded")

    wait = DeviceCopies(CPU).start(lambda: (torch.zeros(3),), make)
    with pytest.raises(ValueError, match="cannot be decoded"):
        wait()
