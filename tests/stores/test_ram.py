import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_shared import Worker

from engrammar.stores import shared
from engrammar.stores.ram import PIECE, RamStore
from engrammar.tables.folder import Shard, TableFile
from engrammar.tables.headers import PAGE

NUM_ROWS, WIDTH, SPLIT = 5_003, 132, 3_001  # 264 bytes a row, in two shards
WORKER = """
from types import SimpleNamespace
plain = types.ModuleType("engrammar.tables.folder")  # the real one imports torch, which takes seconds
plain.Shard, plain.TableFile = None, None
sys.modules["engrammar.tables.folder"] = plain
from engrammar.stores.ram import RamStore
folder, num_rows, row_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
shard = SimpleNamespace(path=folder / "one-copy.bin", start=0, first_row=0, num_rows=num_rows, crc32=None)
table = SimpleNamespace(name="one copy", num_rows=num_rows, row_bytes=row_bytes, shards=(shard,))
store = RamStore(table, shared=True)
rows = np.random.default_rng(os.getpid()).integers(0, num_rows, 1_000)
store.fetch(np.arange(num_rows)).wait()
say(store._segment.path)
say("all right" if (store.fetch(rows).wait() == rows[:, None] % 251).all() else "wrong")
hear()
say(sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Pss_Shmem:")))
hear()
store.close()
"""


def write_table(folder: Path, rows_RS: np.ndarray, *, crc32: bool = True) -> TableFile:
    """Two shards, whose rows begin somewhere amid a page and are followed by something else."""
    shards = []
    for index, (first, last) in enumerate(((0, SPLIT), (SPLIT, len(rows_RS)))):
        path, start = folder / f"shard-{index}.bin", 1_000 + 5_000 * index
        content = os.urandom(start) + rows_RS[first:last].tobytes() + os.urandom(9_000)
        path.write_bytes(content)
        sums = [zlib.crc32(content[at : at + PAGE]) for at in range(0, len(content), PAGE)]
        sidecar = folder / f"shard-{index}.crc32.safetensors"
        save_file({"crc32": np.array(sums, np.uint32)}, sidecar)
        kept = sidecar if crc32 else None
        shard = Shard(path=path, tensor="t", start=start, first_row=first, num_rows=last - first, crc32=kept)
        shards.append(shard)
    return TableFile(
        layer=1, name="t", num_rows=len(rows_RS), width=WIDTH, encoding="bf16", scale=None, shards=tuple(shards)
    )


@pytest.fixture(scope="module")
def rows_RS() -> np.ndarray:
    rows_RS = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 2 * WIDTH), np.uint8)
    assert rows_RS.nbytes > PIECE  # several reads
    return rows_RS


@pytest.fixture
def segments(monkeypatch, tmp_path) -> Path:
    """Where segments lie instead of /dev/shm."""
    (tmp_path / "shm").mkdir()
    real = shared.segment_path
    monkeypatch.setattr(shared, "segment_path", lambda name, folder: real(name, tmp_path / "shm"))
    return tmp_path / "shm"


@pytest.fixture(scope="module")
def stores(rows_RS, tmp_path_factory):
    table = write_table(tmp_path_factory.mktemp("table"), rows_RS)
    opened = [RamStore(table), RamStore(table, shared=True)]
    yield opened
    for store in opened:
        store.close()


@given(rows=st.lists(st.integers(0, NUM_ROWS - 1), max_size=50))
def test_any_order_and_repeats_give_the_same_bits(rows, stores, rows_RS):
    rows_U = np.array(rows, np.int64)
    for store in stores:
        np.testing.assert_array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U])


def test_all_rows_of_all_shards_are_right_and_belong_to_the_caller(stores, rows_RS):
    for store in stores:
        everything = store.fetch(np.arange(NUM_ROWS)).wait()
        np.testing.assert_array_equal(everything, rows_RS)
        everything[:] = 0
        np.testing.assert_array_equal(store.fetch(np.array([7])).wait(), rows_RS[[7]])


@pytest.mark.parametrize("row", [-1, NUM_ROWS, 2**62, -(2**63)])
def test_rows_outside_are_an_error(row, stores):
    for store in stores:
        with pytest.raises(IndexError, match=f"Row {row} is outside .* rows 0 to {NUM_ROWS - 1}"):
            store.fetch(np.array([0, row]))


def test_files_may_be_cut_or_gone_once_they_are_read(tmp_path, rows_RS):
    table = write_table(tmp_path, rows_RS)
    store = RamStore(table)
    os.truncate(table.shards[0].path, 0)
    table.shards[1].path.unlink()
    np.testing.assert_array_equal(store.fetch(np.arange(NUM_ROWS)).wait(), rows_RS)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.fetch(np.array([0]))


@pytest.mark.parametrize("shard, row", [(0, 0), (0, 1_234), (1, SPLIT), (1, NUM_ROWS - 1)])
def test_a_flipped_bit_names_the_file_and_the_first_row_of_its_page(shard, row, tmp_path, rows_RS, segments):
    table = write_table(tmp_path, rows_RS)
    where = table.shards[shard]
    at = where.start + (row - where.first_row) * table.row_bytes + 3
    content = bytearray(where.path.read_bytes())
    content[at] ^= 16
    where.path.write_bytes(content)
    first = where.first_row + max(at // PAGE * PAGE - where.start, 0) // table.row_bytes
    for shared_ in (False, True):
        with pytest.raises(
            ValueError, match=rf"{where.path.name} is damaged at byte {at // PAGE * PAGE}, row {first} "
        ):
            RamStore(table, shared=shared_)
    assert not list(segments.iterdir())
    RamStore(table, verify=False).close()


def test_bytes_beside_the_rows_do_not_matter(tmp_path, rows_RS):
    table = write_table(tmp_path, rows_RS)
    content = bytearray(table.shards[0].path.read_bytes())
    content[-1] ^= 16
    table.shards[0].path.write_bytes(content)
    np.testing.assert_array_equal(RamStore(table).fetch(np.arange(NUM_ROWS)).wait(), rows_RS)


def test_files_that_do_not_fit_are_errors_that_name_them(tmp_path, rows_RS):
    table = write_table(tmp_path, rows_RS)
    first, second = table.shards
    save_file({"crc32": np.zeros(3, np.uint32)}, first.crc32)
    wrong = r"crc32.safetensors does not hold the checksums of shard-0.bin: .*\(crc32 is U32 \[3\], not U32 \[196\]\)"
    with pytest.raises(ValueError, match=wrong):
        RamStore(table)
    first.crc32.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"shard-0.crc32.safetensors does not hold the checksums of shard-0.bin"):
        RamStore(table)
    os.truncate(second.path, second.start + 100)
    with pytest.raises(ValueError, match=r"shard-1.bin has 6100 bytes, its rows end at"):
        RamStore(table, verify=False)
    first.path.unlink()
    with pytest.raises(ValueError, match=r"shard-0.bin cannot be opened"):
        RamStore(table)


def test_tables_without_checksums_are_read(tmp_path, rows_RS):
    store = RamStore(write_table(tmp_path, rows_RS, crc32=False))
    np.testing.assert_array_equal(store.fetch(np.arange(NUM_ROWS)).wait(), rows_RS)


def test_a_changed_file_is_another_segment(tmp_path, rows_RS, segments):
    table = write_table(tmp_path, rows_RS)
    old = RamStore(table, shared=True)
    same = RamStore(table, shared=True)
    assert old.identity == same.identity and len(list(segments.iterdir())) == 2
    new = RamStore(write_table(tmp_path, rows_RS[::-1]), shared=True)
    assert new.identity != old.identity and len(list(segments.iterdir())) == 4
    np.testing.assert_array_equal(new.fetch(np.array([1])).wait(), rows_RS[[-2]])
    np.testing.assert_array_equal(old.fetch(np.array([1])).wait(), rows_RS[[1]])
    for store in (old, same, new):
        store.close()
    assert not list(segments.iterdir())


def test_opening_and_closing_leaks_nothing(tmp_path, rows_RS):
    table = write_table(tmp_path, rows_RS)
    for shared_ in (False, True):
        RamStore(table, shared=shared_).close()
        before = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
        for _ in range(5):
            RamStore(table, shared=shared_).close()
        after = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
        assert after[0] == before[0] and after[1] <= before[1] + 2


def test_processes_hold_one_copy_and_outlive_each_other(tmp_path):
    num_rows, row_bytes = 40_000, 512
    rows_RS = np.repeat((np.arange(num_rows) % 251).astype(np.uint8)[:, None], row_bytes, 1)
    (tmp_path / "one-copy.bin").write_bytes(rows_RS.tobytes())
    workers = [Worker(WORKER, tmp_path, num_rows, row_bytes) for _ in range(4)]
    (path,) = {worker.hear() for worker in workers}
    assert [worker.hear() for worker in workers] == ["all right"] * 4
    for worker in workers:
        worker.say()
    pss_kib = [int(worker.hear()) for worker in workers]
    copy_kib = rows_RS.nbytes // 1024
    assert copy_kib * 0.95 < sum(pss_kib) < copy_kib * 1.1 + 1_024
    workers[0].process.kill()
    assert workers[0].end() == -signal.SIGKILL
    assert Path(path).exists()
    assert [worker.end() for worker in workers[1:]] == [0] * 3
    assert not Path(path).exists()
