"""Rows from files: the bytes of the file at any row, from any start, over any shards; or an error that says which."""

import ctypes
import errno
import gc
import json
import mmap
import os
import struct
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from engrammar.stores import aio, disk
from engrammar.stores.aio import AioQueue, ReadQueue, thread_queues
from engrammar.stores.base import RowsMissing
from engrammar.stores.disk import NUM_LANES, DiskStore
from engrammar.tables.folder import Shard, TableFile
from engrammar.tables.headers import PAGE

THREADS = thread_queues()
KINDS = {"aio": AioQueue, "threads": THREADS}


@pytest.fixture(params=KINDS)
def queues(request):
    try:
        KINDS[request.param](1)
    except OSError:
        pytest.skip("this system has no such reads")
    return KINDS[request.param]


def write_file(path, tensors, pad):
    """A safetensors file of uint8 [R, S] tensors whose header is `pad` bytes longer than it need be; their starts."""
    header, end = {}, 0
    for name, rows_RS in tensors.items():
        header[name] = {"dtype": "U8", "shape": list(rows_RS.shape), "data_offsets": [end, end + rows_RS.size]}
        end += rows_RS.size
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(rows.tobytes() for rows in tensors.values()))
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}


def write_sums(path):
    data, sums = path.read_bytes(), path.with_suffix(".crc32.safetensors")
    crc32 = [zlib.crc32(data[first : first + PAGE]) for first in range(0, len(data), PAGE)]
    save_file({"crc32": np.array(crc32, np.uint32)}, sums)
    return sums


def make_table(folder, num_rows=500, row_bytes=84, *, cuts=(), one_file=False, pad=0, sums=True):
    """Random rows in shards that begin at `cuts`, each in a file of its own or all in one."""
    rows_RS = np.random.default_rng(num_rows).integers(0, 256, (num_rows, row_bytes), np.uint8)
    edges = [0, *sorted(cuts), num_rows]
    parts = {f"t.shard_{i}": rows_RS[a:b] for i, (a, b) in enumerate(zip(edges, edges[1:]))}
    files = [list(parts)] if one_file else [[name] for name in parts]
    shards = []
    for number, names in enumerate(files):
        path = Path(folder) / f"t{number}.safetensors"
        starts = write_file(path, {name: parts[name] for name in names}, pad + number)
        crc32 = write_sums(path) if sums else None
        for name in names:
            first = edges[list(parts).index(name)]
            shards.append(
                Shard(
                    path=path, tensor=name, start=starts[name], first_row=first, num_rows=len(parts[name]), crc32=crc32
                )
            )
    table = TableFile(
        layer=1, name="t", num_rows=num_rows, width=row_bytes, encoding="fp8", scale=None, shards=tuple(shards)
    )
    return table, rows_RS


class Tampered(ReadQueue):
    """A queue whose results pass through `fault(slot, result, page) -> result`; None keeps one back for good.

    Its memory is junk at first. A read that was started is done; `stalled` is set once only those kept back are left.
    """

    def __init__(self, num_slots, fault=lambda slot, result, memory: result):
        self.inner, self.fault, self.kept = THREADS(num_slots), fault, 0
        self.results, self.stalled = {}, threading.Event()
        self.memory = self.inner.memory
        self.memory[:] = 0xCD

    @property
    def in_flight(self):
        return len(self.results) + self.kept

    def start(self, descriptor_N, byte_N, slot_N, pages_N):
        self.inner.start(descriptor_N, byte_N, slot_N, pages_N)
        slot_D, result_D = self.inner.collect(self.inner.in_flight)
        self.results |= dict(zip(slot_D.tolist(), result_D.tolist()))

    def collect(self, at_least, seconds=None):
        if self.kept and not self.results:
            self.stalled.set()
            time.sleep(seconds if seconds is not None else 0.01)
        results = {}
        for slot, result in self.results.items():
            changed = self.fault(slot, result, self.memory[slot * PAGE : (slot + 1) * PAGE])
            if changed is None:
                self.kept += 1
            else:
                results[slot] = changed
        self.results.clear()
        return np.array(list(results), np.int64), np.array(list(results.values()), np.int64)

    def release(self):
        self.kept = 0

    def close(self):
        self.inner.close()


@st.composite
def tables_and_rows(draw):
    num_rows, row_bytes = draw(st.integers(1, 60)), draw(st.sampled_from([1, 2, 64, 84, 256, 1000, 4096, 4097, 9000]))
    cuts = draw(st.sets(st.integers(1, max(1, num_rows - 1)), max_size=3)) if num_rows > 1 else set()
    layout = {
        "cuts": cuts,
        "one_file": draw(st.booleans()),
        "pad": draw(st.integers(0, PAGE)),
        "sums": draw(st.booleans()),
    }
    rows = draw(st.lists(st.integers(0, num_rows - 1), max_size=200))
    return num_rows, row_bytes, layout, np.array(rows, np.int64)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables_and_rows())
def test_any_rows_of_any_layout_are_the_bytes_of_the_file(tmp_path_factory, case):
    num_rows, row_bytes, layout, rows_U = case
    table, rows_RS = make_table(tmp_path_factory.mktemp("t"), num_rows, row_bytes, **layout)
    for kind in (None, THREADS, Tampered):
        store = DiskStore(table, depth=9, queues=kind)
        found = store.fetch(rows_U).wait()
        assert found.dtype == np.uint8 and np.array_equal(found, np.take(rows_RS, rows_U, axis=0))
        store.close()


@pytest.mark.parametrize("row_bytes", [84, 256, 5000])
def test_large_fetches_give_the_same_bits_in_any_order_with_repeats(queues, tmp_path, row_bytes):
    table, rows_RS = make_table(tmp_path, 3000, row_bytes, cuts=(7, 1500))
    store = DiskStore(table, depth=40, queues=queues)
    for rows_U in (np.random.default_rng(0).integers(0, 3000, 5001), np.arange(3000)[::-1], np.full(4000, 17)):
        rows_US = store.fetch(rows_U).wait()
        assert np.array_equal(rows_US, rows_RS[rows_U])
        rows_US[:] = 0  # the caller's
    store.close()


def read_bytes():
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def cached_pages(path):
    """Pages of a file in the page cache."""
    libc, size = ctypes.CDLL(None), path.stat().st_size
    libc.mmap.restype = ctypes.c_void_p
    with path.open("rb") as file:
        address = libc.mmap(
            None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0)
        )
    resident = (ctypes.c_ubyte * -(-size // PAGE))()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident) == 0
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(byte & 1 for byte in resident)


@pytest.mark.parametrize("num_rows", [40, 4000])
def test_each_page_is_read_once_and_none_stays_in_the_page_cache(queues, tmp_path, num_rows):
    table, rows_RS = make_table(tmp_path, 40_000, 256, pad=PAGE - 77)
    (path,) = {shard.path for shard in table.shards}
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store = DiskStore(table, queues=queues)
    if not store._source.files.direct:
        pytest.skip("files of this system cannot be read past the page cache")
    rows_U = np.random.default_rng(1).integers(0, 40_000, num_rows)
    first_U = table.shards[0].start + rows_U * 256
    num_pages = len(np.unique([first_U // PAGE, (first_U + 255) // PAGE]))
    before, cached = read_bytes(), cached_pages(path)
    rows_US = store.fetch(rows_U).wait()
    read = (read_bytes() - before) / PAGE
    assert np.array_equal(rows_US, rows_RS[rows_U])
    assert num_pages <= read <= num_pages * 1.05 and cached_pages(path) == cached
    store.close()


@pytest.mark.parametrize("row_numbers", [np.arange(20), np.arange(500)], ids=["small", "large"])
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("fault", ["EIO", "short", "flipped"])
def test_a_fault_that_passes_is_read_again_and_one_that_stays_is_an_error(tmp_path, fault, times, row_numbers):
    table, rows_RS = make_table(tmp_path, pad=123)
    path, left = table.shards[0].path, {0: times}

    def spoil(slot, result, page):
        if not left.get(slot, 0):
            return result
        left[slot] -= 1
        page[-1] ^= fault == "flipped"
        return {"EIO": -errno.EIO, "short": 100, "flipped": result}[fault]

    store = DiskStore(table, depth=16, queues=lambda slots: Tampered(slots, spoil))
    fetch = store.fetch(row_numbers)
    if times < 3:
        assert np.array_equal(fetch.wait(), rows_RS[row_numbers])
    else:
        check_missing(fetch, path, rows_RS[row_numbers])
        assert np.array_equal(store.fetch(row_numbers).wait(), rows_RS[row_numbers])
    assert not left[0]
    store.close()


def check_missing(fetch, path, expected_US):
    """The rows that are missing; the error names the file and the first of them, and brings the others."""
    with pytest.raises(RowsMissing) as caught:
        fetch.wait()
    error = caught.value
    assert error.missing_U.any()
    assert f"Row {error.missing_U.argmax()} of t" in str(error) and str(path) in str(error)
    assert np.array_equal(error.rows_US[~error.missing_U], expected_US[~error.missing_U])
    with pytest.raises(RowsMissing):  # for good
        fetch.wait()
    return error.missing_U


def test_the_first_of_several_missing_rows_is_named(queues, tmp_path):
    table, rows_RS = make_table(tmp_path, 3000, 84)
    path, start = table.shards[0].path, table.shards[0].start
    with path.open("rb+") as file:
        for row in (100, 1500, 2900):
            file.seek(start + row * 84 + 3)
            file.write(bytes([rows_RS[row, 3] ^ 8]))
    store = DiskStore(table, depth=16, queues=queues)
    for rows_U in (np.array([5, 1500, 100]), np.arange(3000)[::-1], np.arange(3000), np.roll(np.arange(3000), 1400)):
        with pytest.raises(RowsMissing) as caught:
            store.fetch(rows_U).wait()
        assert f"Row {rows_U[caught.value.missing_U.argmax()]} of" in str(caught.value)
        assert {100, 1500} <= set(rows_U[caught.value.missing_U].tolist())
    store.close()


def test_every_flipped_bit_is_found_and_rows_elsewhere_are_right(queues, tmp_path):
    table, rows_RS = make_table(tmp_path, 400, 84, pad=50)
    path, start = table.shards[0].path, table.shards[0].start
    good = path.read_bytes()
    for page in range(-(-len(good) // PAGE)):
        bad = bytearray(good)
        byte = min(page * PAGE + 1000 * (page % 4) + page, len(good) - 1)
        bad[byte] ^= 1 << page % 8
        path.write_bytes(bad)
        store = DiskStore(table, queues=queues)
        for rows_U in (np.arange(400), np.array([399, 0])):
            lies_on = [(start + row * 84) // PAGE <= page <= (start + row * 84 + 83) // PAGE for row in rows_U]
            fetch = store.fetch(rows_U)
            if any(lies_on):
                with pytest.raises(RowsMissing, match=f"damaged in bytes {page * PAGE} to") as caught:
                    fetch.wait()
                error = caught.value
                assert error.missing_U.tolist() == lies_on and str(path) in str(error)
                assert f"Row {rows_U[error.missing_U.argmax()]} of" in str(error)
                assert np.array_equal(error.rows_US[~error.missing_U], rows_RS[rows_U][~error.missing_U])
            else:
                assert np.array_equal(fetch.wait(), rows_RS[rows_U])
        store.close()


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("num_rows", [20, 500])
def test_a_file_cut_off_while_open_is_an_error_at_every_boundary(queues, tmp_path, sums, num_rows):
    table, rows_RS = make_table(tmp_path, num_rows, pad=30, sums=sums)
    path, start = table.shards[0].path, table.shards[0].start
    size = path.stat().st_size
    store = DiskStore(table, queues=queues)
    for cut in (size - 1, size - 84, size - 85, size // PAGE * PAGE, start + 3 * 84 + 1, start, 1, 0):
        os.truncate(path, cut)
        missing_U = check_missing(store.fetch(np.arange(num_rows)), path, rows_RS)
        behind = start + 84 * (np.arange(num_rows) + 1) > cut
        assert missing_U[behind].all() and not missing_U[: max(0, (cut // PAGE * PAGE - start) // 84)].any()
    store.close()


def test_a_descriptor_that_somebody_closed_is_an_error(queues, tmp_path):
    table, rows_RS = make_table(tmp_path, sums=False)
    store = DiskStore(table, queues=queues)
    handle = store._source.files._open[0]
    copy = os.dup(handle)
    os.close(handle)
    for num_rows in (20, 500):
        fetch = store.fetch(np.arange(num_rows))
        assert check_missing(fetch, table.shards[0].path, rows_RS[:num_rows]).all()
    os.dup2(copy, handle)  # back, so that it can be closed
    os.close(copy)
    assert np.array_equal(store.fetch(np.arange(20)).wait(), rows_RS[:20])
    store.close()


@pytest.mark.parametrize("num_rows", [20, 500])
def test_rows_that_are_late_are_missing_and_the_next_fetch_is_right(tmp_path, num_rows):
    table, rows_RS = make_table(tmp_path, row_bytes=5000)
    made, hang = [], [True]

    def queues(slots):
        made.append(Tampered(slots, lambda slot, result, page: None if hang[0] and slot in (6, 16) else result))
        return made[-1]

    store = DiskStore(table, depth=16, queues=queues)
    fetch = store.fetch(np.arange(num_rows))
    if num_rows == 500:  # a thread of the store's reads them
        assert made[0].stalled.wait(60)
    with pytest.raises(RowsMissing, match=r"had not delivered bytes .* after 0.2 s") as caught:
        fetch.wait(0.2)
    missing_U, rows_US = caught.value.missing_U, caught.value.rows_US
    assert missing_U.any() and not missing_U[0] and np.array_equal(rows_US[~missing_U], rows_RS[:num_rows][~missing_U])
    copy = rows_US.copy()
    hang[0] = False
    for queue in made:
        queue.release()
    assert np.array_equal(store.fetch(np.arange(num_rows)).wait(), rows_RS[:num_rows])
    assert np.array_equal(rows_US, copy)  # nobody writes to what was handed over
    store.close()


def test_fetches_that_nobody_waits_for_are_harmless(queues, tmp_path):
    table, rows_RS = make_table(tmp_path, 2000)
    store = DiskStore(table, depth=32, queues=queues)
    for turn in range(60):
        rows_U = np.random.default_rng(turn).integers(0, 2000, 600 if turn % 5 == 0 else 30)
        fetch = store.fetch(rows_U)
        if turn % 3 == 0:
            assert np.array_equal(fetch.wait(), rows_RS[rows_U])
        del fetch
    assert store._source.num_lanes <= 2
    store.close()


def test_many_fetches_are_waited_for_in_any_order(queues, tmp_path):
    table, rows_RS = make_table(tmp_path, 2000)
    store = DiskStore(table, depth=32, queues=queues)
    asked = [np.random.default_rng(n).integers(0, 2000, (3, 30, 400)[n % 3]) for n in range(5 * NUM_LANES)]
    fetches = [store.fetch(rows_U) for rows_U in asked]
    assert store._source.num_lanes == NUM_LANES  # staging is bounded
    for rows_U, fetch in reversed(list(zip(asked, fetches))):
        assert np.array_equal(fetch.wait(), rows_RS[rows_U]) and fetch.wait() is fetch.wait()
    store.close()


def test_a_fetch_that_is_lost_in_a_cycle_does_not_give_a_closed_queue_back(tmp_path, queues):
    """As after a pass that failed: its traceback holds the fetch, and Python finalizes a cycle's parts in any order."""
    table, rows_RS = make_table(tmp_path)
    store = DiskStore(table, queues=queues)

    class Cycle:
        pass

    for _ in range(NUM_LANES + 3):
        lost = Cycle()
        lost.itself, lost.fetch = lost, store.fetch(np.arange(7))
        queue = lost.fetch._queue
        del lost
        queue.close()  # first, and then the fetch
        del queue
        gc.collect()
    assert np.array_equal(store.fetch(np.arange(50)).wait(), rows_RS[:50])
    store.close()


def test_threads_may_fetch_and_wait_at_once(queues, tmp_path):
    table, rows_RS = make_table(tmp_path, 2000, cuts=(900,))
    store, wrong = DiskStore(table, depth=32, queues=queues), []

    def work(seed):
        generator = np.random.default_rng(seed)
        for _ in range(25):
            rows_U = generator.integers(0, 2000, generator.integers(1, 300))
            if not np.array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.close()


@pytest.mark.parametrize("num_rows", [20, 500])
def test_after_closing_nothing_is_read_and_nothing_hangs(queues, tmp_path, num_rows):
    table, rows_RS = make_table(tmp_path)
    store = DiskStore(table, depth=8, queues=queues)
    fetch = store.fetch(np.arange(num_rows))
    store.close()
    try:
        assert np.array_equal(fetch.wait(), rows_RS[:num_rows])
    except RowsMissing as error:
        assert "was given up" in str(error) and error.missing_U.any()
    with pytest.raises(ValueError, match="closed"):
        store.fetch(np.arange(num_rows))
    store.close()


def test_closing_gives_back_the_files(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not list open files")
    table, _ = make_table(tmp_path, cuts=(3, 99))

    def num_open() -> int:  # only its own: another test's may be closed at any moment
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.islink(link))

    assert num_open() == 0
    store = DiskStore(table)
    store.fetch(np.arange(500)).wait()
    store.fetch(np.arange(20))
    assert num_open() == 3
    store.close()
    assert num_open() == 0


def test_a_store_that_nobody_holds_gives_back_its_thread_and_files(tmp_path):
    table, _ = make_table(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    store = DiskStore(table)
    store.fetch(np.arange(500)).wait()
    thread = store._source.thread
    del store
    gc.collect()
    thread.join()
    assert not thread.is_alive() and (before is None or len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("num_rows", [20, 500])
def test_a_fork_reads_the_same_rows(queues, tmp_path, num_rows):
    table, rows_RS = make_table(tmp_path)
    store = DiskStore(table, queues=queues if queues is AioQueue else None)
    unfinished, rows_U = store.fetch(np.arange(num_rows)), np.arange(num_rows)
    store.fetch(rows_U).wait()
    child = os.fork()
    if not child:
        same = False
        try:
            same = np.array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U])
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(unfinished.wait(), rows_RS[rows_U])
    store.close()


def test_without_asynchronous_reads_threads_read_the_same(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(aio, "NUMBERS", {})
    table, rows_RS = make_table(tmp_path)
    with caplog.at_level("INFO"):
        store = DiskStore(table)
    assert caplog.messages == ["t: threads read it, since Linux AIO cannot be used here (Function not implemented)."]
    assert np.array_equal(store.fetch(np.arange(500)).wait(), rows_RS) and store._source.queues is not AioQueue
    store.close()


def test_files_that_only_the_page_cache_can_read_are_read(monkeypatch, tmp_path, caplog):
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *more: refuse(flags) or real(path, flags, *more))

    def refuse(flags):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such reads")

    table, rows_RS = make_table(tmp_path, cuts=(100, 300))
    with caplog.at_level("INFO"):
        store = DiskStore(table)
    assert caplog.messages == [f"t: reads go through the page cache, since {tmp_path} allows no others."]
    assert not store._source.files.direct
    assert np.array_equal(store.fetch(np.arange(500)).wait(), rows_RS)
    assert np.array_equal(store.fetch(np.array([499, 3])).wait(), rows_RS[[499, 3]])
    store.close()


@pytest.mark.parametrize("granted", [2, 99])
def test_small_reads_that_find_no_queue_of_their_own_say_so_once(tmp_path, caplog, granted):
    """The store's thread has the first queue; `granted` is how many the system gives in all."""
    table, rows_RS = make_table(tmp_path)
    made = []

    def queues(num_slots):
        if len(made) == granted:
            raise OSError(errno.EAGAIN, "no more of them")
        made.append(THREADS(num_slots))
        return made[-1]

    store = DiskStore(table, queues=queues)
    with caplog.at_level("INFO"):
        fetches = [store.fetch(np.array([row])) for row in range(NUM_LANES + 3)]
    why = (
        "the system gives no more queues: no more of them" if granted == 2 else f"{NUM_LANES} small reads are under way"
    )
    assert caplog.messages == [f"t: small reads wait behind large ones at times ({why})."]
    for row, fetch in enumerate(fetches):
        assert np.array_equal(fetch.wait(), rows_RS[[row]])
    store.close()


def test_rows_outside_are_refused(tmp_path):
    store = DiskStore(make_table(tmp_path)[0])
    for row in (-1, 500, 2**62, -(2**63)):
        with pytest.raises(IndexError, match=f"Row {row} is outside t in"):
            store.fetch(np.array([3, row]))
    store.close()


def test_files_that_do_not_fit_their_table_are_refused(tmp_path):
    table, _ = make_table(tmp_path)
    (shard,) = table.shards
    wrong = [
        (replace(shard, path=tmp_path / "gone"), "gone cannot be opened"),
        (replace(shard, start=shard.start + 1), "bytes, its rows end at"),
        (replace(shard, crc32=tmp_path / "gone"), "gone does not hold the checksums"),
        (replace(shard, crc32=shard.path), "does not hold the checksums"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            DiskStore(replace(table, shards=(bad,)))
    save_file({"crc32": np.zeros(3, np.uint32)}, shard.crc32)
    with pytest.raises(ValueError, match=r"does not hold the checksums .*\(crc32 is U32"):
        DiskStore(table)
    with pytest.raises(ValueError, match="depth is 0"):
        DiskStore(table, depth=0)


def test_an_interrupted_wait_loses_its_fetch_and_no_other(tmp_path, monkeypatch):
    table, rows_RS = make_table(tmp_path)
    store = DiskStore(table)
    fetch = store.fetch(np.arange(10))
    with monkeypatch.context() as patch:
        patch.setattr(disk.time, "monotonic", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fetch.wait(1)
    with pytest.raises(RowsMissing):
        fetch.wait(1)
    assert np.array_equal(store.fetch(np.arange(10)).wait(), rows_RS[:10])
    store.close()
