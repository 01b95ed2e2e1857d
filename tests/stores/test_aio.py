"""Many reads at once: each read says what became of it, whichever way it is made."""

import errno
import os

import numpy as np
import pytest

from engrammar.stores import aio
from engrammar.stores.aio import AioQueue, thread_queues
from engrammar.tables.headers import PAGE

KINDS = {"aio": AioQueue, "threads": thread_queues()}


@pytest.fixture(params=KINDS)
def queues(request):
    try:
        KINDS[request.param](1).close()
    except OSError:
        pytest.skip("this system has no such reads")
    return KINDS[request.param]


@pytest.fixture
def file(tmp_path):
    """Five pages and a bit, and its descriptor."""
    data = np.random.default_rng(0).integers(0, 256, 5 * PAGE + 77, np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    handle = os.open(tmp_path / "file", os.O_RDONLY)
    yield handle, data
    os.close(handle)


def start(queue, *reads):
    queue.start(*np.array(reads, np.int64).T)


def collect(queue, num_reads):
    results = {}
    while len(results) < num_reads:
        slot_D, result_D = queue.collect(num_reads - len(results))
        assert len(slot_D) and not set(results) & set(slot_D.tolist())
        results |= dict(zip(slot_D.tolist(), result_D.tolist()))
    assert not queue.in_flight
    return results


def test_every_read_reports_its_own_result(queues, file):
    handle, data = file
    queue = queues(16)
    queue.memory[:] = 0xAB
    start(
        queue,
        (handle, 2 * PAGE, 0, 1),
        (987_654, 0, 1, 1),  # no such file
        (handle, 0, 2, 3),
        (handle, 5 * PAGE, 5, 2),  # ends early
        (handle, 6 * PAGE, 7, 1),  # behind the end
        (987_654, 0, 8, 1),
        (handle, PAGE, 9, 1),
    )
    results = collect(queue, 7)
    bad = -errno.EBADF
    assert results == {0: PAGE, 1: bad, 2: 3 * PAGE, 5: 77, 7: 0, 8: bad, 9: PAGE}
    for slot, byte in ((0, 2 * PAGE), (2, 0), (5, 5 * PAGE), (9, PAGE)):
        count = results[slot]
        assert np.array_equal(queue.memory[slot * PAGE :][:count], data[byte : byte + count])
    assert (queue.memory[7 * PAGE : 9 * PAGE] == 0xAB).all() and (queue.memory[10 * PAGE :] == 0xAB).all()
    queue.close()


def test_memory_begins_at_a_page(queues):
    assert queues(3).memory.ctypes.data % PAGE == 0


def test_slots_serve_again_and_again(queues, file):
    handle, data = file
    queue = queues(4)
    for turn in range(200):
        pages = np.random.default_rng(turn).integers(0, 5, 4)
        start(queue, *((handle, int(page) * PAGE, slot, 1) for slot, page in enumerate(pages)))
        collect(queue, 4)
        assert np.array_equal(queue.memory.reshape(4, PAGE), data[: 5 * PAGE].reshape(5, PAGE)[pages])
    queue.close()


def test_collecting_stops_at_the_deadline(queues, tmp_path):
    """A pipe that nobody writes to; io_submit would block on it, so there only the empty queue is waited for."""
    queue = queues(2)
    assert not len(queue.collect(0, 0.0)[0])
    if queues is KINDS["threads"]:
        reader, writer = os.pipe()
        queue._threads.submit(os.read, reader, 1)
        queue.in_flight = 1  # one that never comes
        assert not len(queue.collect(1, 0.05)[0])
        os.write(writer, b"x")
        os.close(writer)


def test_a_system_without_such_calls_says_so(monkeypatch):
    monkeypatch.setattr(aio, "NUMBERS", {})
    with pytest.raises(OSError) as caught:
        AioQueue(4)
    assert caught.value.errno == errno.ENOSYS


def test_more_slots_than_the_system_grants_are_an_error():
    with pytest.raises(OSError):
        AioQueue(2**30)


def test_a_closed_queue_closes_again(queues):
    queue = queues(2)
    queue.close()
    queue.close()
