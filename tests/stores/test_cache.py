import signal
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shared import Worker

from engrammar.stores import cache as cache_file
from engrammar.stores.base import Arrived, Fetch, RowsMissing, RowStore
from engrammar.stores.cache import SLICE, WAYS, CachedStore

NUM_ROWS, ROW_BYTES = 2_000, 24
STORE = """
from engrammar.stores.base import Arrived, Fetch, RowsMissing, RowStore

def row_bytes_of(rows_U, row_bytes):
    value_U1 = rows_U[:, None] * 2_654_435_761
    return (value_U1 >> np.arange(row_bytes) % 31).astype(np.uint8)

class Formula(RowStore):
    def __init__(self, num_rows, row_bytes, identity="formula"):
        self.name = self.identity = identity
        self.num_rows, self.row_bytes = num_rows, row_bytes
    def _fetch(self, rows_U):
        return Arrived(row_bytes_of(rows_U, self.row_bytes))
    def close(self):
        pass
"""
WORKER = (
    STORE
    + """
from engrammar.stores.cache import CachedStore
from engrammar.stores import cache as cache_file
name, seed, task = sys.argv[1], int(sys.argv[2]), sys.argv[3]
cache = CachedStore(Formula(100_000, 256, name), 4_000, shared=True)
def check():
    with cache._lock.reading:
        sets = cache._sets
        kept = sets.tags_P >= 0
        return np.array_equal(sets.rows_PS[kept], row_bytes_of(sets.tags_P[kept], 256)), int((~kept).sum())
if task == "dies":
    write, count = cache_file._Sets._write, [0]
    class Dying:
        def __init__(self, rows): self.rows = rows
        def __setitem__(self, places, values):
            self.rows[places[: len(places) // 2]] = values[: len(places) // 2]
            self.rows[places[len(places) // 2], :100] = 255
            die()
    def dying(sets, *arguments):
        count[0] += 1
        if count[0] > 100 and sets.tags_P.min() >= 0: sets.rows_PS = Dying(sets.rows_PS)  # there are rows to tear
        write(sets, *arguments)
    cache_file._Sets._write = dying
say(cache._segment.path)
hear()
say(*check())
generator = np.random.default_rng(seed)
for _ in range(200):
    rows = np.minimum(generator.zipf(1.1, 400) - 1, 99_999)
    if not np.array_equal(cache.fetch(rows).wait(), row_bytes_of(rows, 256)):
        say("wrong")
        break
cache.fetch(np.arange(100_000)).wait()
say("all right", cache.hits > 20_000, *check())
hear()
say(sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Pss_Shmem:")))
hear()
cache.close()
"""
)


class FakeStore(RowStore):
    """Rows in memory that count what is read, and may be missing."""

    def __init__(self, num_rows: int = NUM_ROWS, row_bytes: int = ROW_BYTES) -> None:
        self.name = self.identity = "a fake store"
        self.num_rows, self.row_bytes = num_rows, row_bytes
        self.rows_RS = np.random.default_rng(1).integers(0, 256, (num_rows, row_bytes), np.uint8)
        self.missing: set[int] = set()
        self.asked: list[int] = []
        self.closed = False

    def _fetch(self, rows_U: np.ndarray) -> Fetch:
        assert len(np.unique(rows_U)) == len(rows_U), "asked for a row twice"
        self.asked += rows_U.tolist()
        return FakeFetch(self, rows_U)

    def close(self) -> None:
        self.closed = True


class FakeFetch(Fetch):
    def __init__(self, store: FakeStore, rows_U: np.ndarray) -> None:
        self.store, self.rows_U = store, rows_U.copy()

    def wait(self, seconds: float | None = None) -> np.ndarray:
        rows_US = self.store.rows_RS[self.rows_U]
        missing_U = np.isin(self.rows_U, list(self.store.missing))
        if missing_U.any():
            rows_US[missing_U] = 0xEE  # junk
            raise RowsMissing(f"Row {self.rows_U[missing_U][0]} of {self.store.name} is lost.", missing_U, rows_US)
        return rows_US


class Memory(RowStore):
    """Each row is its own number: for streams of which only the hit rate matters."""

    def __init__(self, num_rows: int) -> None:
        self.name = self.identity = "numbers"
        self.num_rows, self.row_bytes = num_rows, 8

    def _fetch(self, rows_U: np.ndarray) -> Fetch:
        return Arrived(rows_U.view(np.uint8).reshape(-1, 8).copy())

    def close(self) -> None:
        pass


some_rows = st.lists(st.integers(0, NUM_ROWS - 1) | st.integers(0, 20), max_size=60)


def as_array(rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def zipf(num_rows: int, exponent: float, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A stream of rows, and all rows from the likeliest on."""
    generator = np.random.default_rng(3)
    share = np.cumsum(np.arange(1, num_rows + 1) ** -exponent)
    by_rank = generator.permutation(num_rows)
    return by_rank[np.searchsorted(share / share[-1], generator.random(length))], by_rank


def rate(store: CachedStore, stream: np.ndarray, at_once: int = 256) -> float:
    """Hit rate over the second half."""
    for start in range(0, len(stream), at_once):
        if start - at_once < len(stream) // 2 <= start:
            store.reset_counts()
        rows = stream[start : start + at_once]
        np.testing.assert_array_equal(store.fetch(rows).wait().view(np.int64)[:, 0], rows)
    return store.hit_rate


def lru_rate(stream: np.ndarray, cache_rows: int) -> float:
    kept, hits = OrderedDict(), 0
    for index, row in enumerate(stream.tolist()):
        if row in kept:
            kept.move_to_end(row)
            hits += index >= len(stream) // 2
        else:
            kept[row] = None
            if len(kept) > cache_rows:
                kept.popitem(last=False)
    return hits / (len(stream) // 2)


@settings(deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from(["fetch", "pin", "late"]), some_rows), max_size=25),
    cache_rows=st.integers(8, 100),
)
def test_any_sequence_of_fetches_and_pins_gives_the_same_bits(calls, cache_rows):
    inner = FakeStore()
    store, late = CachedStore(inner, cache_rows), []
    for call, rows in calls:
        if call == "pin":
            assert store.pin(as_array(rows)) <= min(len(set(rows)), cache_rows // WAYS * (WAYS - 1))
        else:
            late.append((store.fetch(as_array(rows)), rows))
        if call == "fetch":
            fetch, rows = late.pop()
            np.testing.assert_array_equal(fetch.wait(), inner.rows_RS[as_array(rows)])
    for fetch, rows in late:
        rows_US = fetch.wait()
        np.testing.assert_array_equal(rows_US, inner.rows_RS[as_array(rows)])
        rows_US[:] = 0  # the caller may
    tags_P = store._sets.tags_P
    kept = tags_P[tags_P >= 0]
    assert len(np.unique(kept)) == len(kept) and store._sets.pinned_AW.sum(1).max() < WAYS
    np.testing.assert_array_equal(store._sets.rows_PS[tags_P >= 0], inner.rows_RS[kept])


def test_fetches_longer_than_a_slice_are_right():
    inner = FakeStore()
    store = CachedStore(inner, 800)
    rows = np.random.default_rng(0).integers(0, NUM_ROWS, 2 * SLICE + 77)
    for _ in range(2):
        np.testing.assert_array_equal(store.fetch(rows).wait(), inner.rows_RS[rows])
    assert store.hits + store.misses == 2 * len(rows) and store.hits > 700


def test_distinct_misses_are_read_once_and_at_the_fetch():
    inner = FakeStore()
    store = CachedStore(inner, 64)
    fetch = store.fetch(as_array([5, 9, 5, 5]))
    assert sorted(inner.asked) == [5, 9]
    fetch.wait()
    assert (store.hits, store.misses) == (0, 4)
    store.fetch(as_array([9, 5, 7])).wait()
    assert sorted(inner.asked) == [5, 7, 9] and (store.hits, store.misses) == (2, 5)
    assert store.hit_rate == 2 / 7
    store.reset_counts()
    assert store.hit_rate == 0


@pytest.mark.parametrize("row", [-1, NUM_ROWS, -(2**63)])
def test_rows_outside_are_an_error(row):
    store = CachedStore(FakeStore(), 64)
    with pytest.raises(IndexError, match=f"Row {row} is outside a fake store"):
        store.fetch(as_array([0, row]))
    with pytest.raises(IndexError, match=f"Row {row} is outside a fake store"):
        store.pin(as_array([0, row]))


def test_too_few_rows_and_closed_caches_are_errors():
    with pytest.raises(ValueError, match="cache_rows is 7; allowed: 8 or more"):
        CachedStore(FakeStore(), 7)
    inner = FakeStore()
    store = CachedStore(inner, 8)
    fetch = store.fetch(as_array([3]))
    store.close()
    assert inner.closed
    np.testing.assert_array_equal(fetch.wait(), inner.rows_RS[[3]])  # read, not kept
    with pytest.raises(ValueError, match="closed"):
        store.fetch(as_array([3]))


def test_missing_rows_come_in_the_callers_order_and_are_never_kept():
    inner = FakeStore()
    store = CachedStore(inner, 64)
    store.fetch(as_array([1, 2])).wait()
    inner.missing = {7, 2}
    rows = as_array([7, 1, 8, 7, 2, 9])
    with pytest.raises(RowsMissing, match="Row 7 of a fake store is lost") as caught:
        store.fetch(rows).wait()
    assert caught.value.missing_U.tolist() == [True, False, False, True, False, False]
    there = ~caught.value.missing_U
    np.testing.assert_array_equal(caught.value.rows_US[there], inner.rows_RS[rows[there]])
    assert 7 not in store._sets.tags_P
    inner.asked.clear()
    np.testing.assert_array_equal(store.fetch(as_array([8, 9])).wait(), inner.rows_RS[[8, 9]])
    assert not inner.asked
    inner.missing = set()
    np.testing.assert_array_equal(store.fetch(rows).wait(), inner.rows_RS[rows])
    assert inner.asked == [7]


def test_rows_missing_while_pinning_are_an_error():
    inner = FakeStore()
    inner.missing = {7}
    store = CachedStore(inner, 64)
    with pytest.raises(OSError, match="Row 7"):
        store.pin(as_array([5, 7]))
    assert store.pin(as_array([5])) == 1


def test_pinned_rows_stay_whatever_comes(monkeypatch):
    monkeypatch.setattr(cache_file, "PIN_BYTES", 10 * ROW_BYTES)  # several slices
    inner = FakeStore()
    store = CachedStore(inner, 400)
    hot = np.random.default_rng(0).permutation(NUM_ROWS)[:300]
    store.fetch(hot[:50]).wait()  # some are there, young
    num_pinned = store.pin(hot)
    assert 250 <= num_pinned <= 300 and store.pin(hot) == num_pinned
    pinned = store._sets.tags_P[store._sets.pinned_P].copy()
    assert len(pinned) == num_pinned
    for start in range(0, NUM_ROWS, 100):
        for _ in range(5):
            store.fetch(np.arange(start, start + 100)).wait()
    inner.asked.clear()
    store.fetch(pinned).wait()
    assert not inner.asked


def test_the_first_rows_find_room_before_the_others():
    store = CachedStore(FakeStore(), 80)
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    assert store.pin(order) == 70  # 7 of each set
    kept = set(store._sets.tags_P[store._sets.pinned_P].tolist())
    assert {int(row) for row in order[:20]} <= kept


def test_a_scan_pushes_out_nothing_that_came_often():
    store = CachedStore(Memory(1_000_000), 4_000)
    hot = np.random.default_rng(0).permutation(1_000_000)[:2_000]
    for _ in range(10):
        store.fetch(hot).wait()
    kept = np.isin(hot, store._sets.tags_P).mean()
    for start in range(0, 40_000, 500):  # ten times the cache
        store.fetch(np.arange(start, start + 500)).wait()
    assert kept > 0.97 and np.isin(hot, store._sets.tags_P).mean() > 0.95 * kept
    assert lru_rate(np.concatenate([*[hot] * 10, np.arange(40_000), hot]), 4_000) < 0.5


@pytest.mark.parametrize("exponent, share", [(0.8, 0.02), (1.0, 0.02), (1.0, 0.1)])
def test_hit_rate_beats_lru_and_comes_near_the_best_static_set(exponent, share):
    num_rows = 50_000
    stream, by_rank = zipf(num_rows, exponent, 300_000)
    cache_rows = int(num_rows * share)
    ours = rate(CachedStore(Memory(num_rows), cache_rows), stream)
    best = np.isin(stream[len(stream) // 2 :], by_rank[:cache_rows]).mean()
    assert ours > lru_rate(stream, cache_rows) + 0.02
    assert ours > (0.85 if exponent < 1 else 0.92) * best
    pinned = CachedStore(Memory(num_rows), cache_rows)
    pinned.pin(by_rank[: cache_rows // 2])
    assert rate(pinned, stream) > ours


def test_hit_rate_follows_when_other_rows_become_hot():
    stream, _ = zipf(50_000, 1.0, 200_000)
    store = CachedStore(Memory(50_000), 1_000)
    before = rate(store, stream)
    assert rate(store, 49_999 - stream) > 0.97 * before


def test_rows_that_repeat_within_a_text_hit_as_with_lru():
    generator = np.random.default_rng(0)
    texts = [generator.choice(generator.integers(0, 1_000_000, 100), 400) for _ in range(400)]
    stream = np.concatenate(texts)  # each text has its own rows
    store = CachedStore(Memory(1_000_000), 2_000)
    assert rate(store, stream, at_once=16) > 0.9 * lru_rate(stream, 2_000)


def test_memory_is_fixed():
    store = CachedStore(Memory(1_000_000), 1_000)
    fields = {name: value for name, value in vars(store._sets).items() if isinstance(value, np.ndarray)}
    assert sum(len(value.reshape(-1)) * value.itemsize for value in fields.values()) < 4 * 1_000 * (8 + 8 + 16)
    ends = [value.__array_interface__["data"][0] for value in fields.values()]
    for start in range(0, 200_000, 1_000):
        store.fetch(np.arange(start, start + 1_000)).wait()
    assert ends == [getattr(store._sets, name).__array_interface__["data"][0] for name in fields]
    assert len(vars(store)) == len(vars(CachedStore(Memory(10), 8)))


def test_threads_get_the_same_bits():
    inner = FakeStore(NUM_ROWS, 64)
    store, wrong = CachedStore(inner, 400), []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(200):
            rows = np.minimum(generator.zipf(1.2, 50), NUM_ROWS) - 1
            if not np.array_equal(store.fetch(rows).wait(), inner.rows_RS[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store.hits + store.misses == 4 * 200 * 50


def test_processes_share_one_cache_and_survive_one_that_dies_while_admitting(tmp_path):
    workers = [Worker(WORKER, tmp_path, seed, "dies" if seed == 0 else "lives") for seed in range(4)]
    (path,) = {worker.hear() for worker in workers}
    workers[0].say()
    assert workers[0].hear() == "True 4000"
    assert workers[0].end() == -signal.SIGKILL
    for worker in workers[1:]:
        worker.say()
    assert {worker.hear() for worker in workers[1:]} <= {f"True {num_empty}" for num_empty in range(1, 4_000)}
    assert [worker.hear() for worker in workers[1:]] == ["all right True True 0"] * 3
    for worker in workers[1:]:
        worker.say()
    pss_kib = [int(worker.hear()) for worker in workers[1:]]
    copy_kib = Path(path).stat().st_size // 1024
    assert sum(pss_kib) < copy_kib * 1.1 + 1_024
    assert [worker.end() for worker in workers[1:]] == [0] * 3
    assert not Path(path).exists()


def test_who_joins_sees_what_others_read_and_pinned(tmp_path):
    first, second = FakeStore(), FakeStore()
    for inner in (first, second):
        inner.identity = str(tmp_path)
    one, two = (CachedStore(inner, 80, shared=True) for inner in (first, second))
    one.fetch(as_array([1, 2])).wait()
    one.pin(as_array([3]))
    assert two.pin(as_array([3])) == 1
    np.testing.assert_array_equal(two.fetch(as_array([3, 2, 1])).wait(), first.rows_RS[[3, 2, 1]])
    assert not second.asked and (two.hits, one.hits) == (3, 0)
    one.close()
    np.testing.assert_array_equal(two.fetch(as_array([3, 4])).wait(), first.rows_RS[[3, 4]])
    two.close()


@pytest.mark.parametrize("row_bytes, cache_rows, identity", [(16, 80, ""), (24, 88, ""), (24, 80, "another")])
def test_caches_of_another_size_or_table_are_apart(row_bytes, cache_rows, identity, tmp_path):
    stores = [FakeStore(2_000, 24), FakeStore(2_000, row_bytes)]
    for store, ending in zip(stores, ("", identity)):
        store.identity = str(tmp_path) + ending
    one, other = CachedStore(stores[0], 80, shared=True), CachedStore(stores[1], cache_rows, shared=True)
    one.fetch(as_array([1])).wait()
    np.testing.assert_array_equal(other.fetch(as_array([1])).wait(), stores[1].rows_RS[[1]])
    assert other.misses == 1
    one.close()
    other.close()
