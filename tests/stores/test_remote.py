import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrammar.config import Geometry
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores.base import RowsMissing
from engrammar.stores.mooncake import store as remote
from engrammar.stores.mooncake.pool import Pool, PoolServer
from engrammar.stores.mooncake.store import Note, RemoteFetch, RemoteStore, cut_slices
from engrammar.stores.mooncake.upload import upload
from engrammar.tables.checksums import write_page_sums
from engrammar.tables.folder import Shard, TableFile
from engrammar_cli.main import main
from engrammar_lab.bench.loopback import LoopbackPool, why_no_pool
from models import save_micro, tiny_model

needs_pool = pytest.mark.skipif(why_no_pool() is not None, reason=why_no_pool() or "")
ROWS, WIDTH, ROW_BYTES = 3001, 33, 66
GEOMETRY = Geometry(num_classes=50, fill_class=0, multipliers=((3, 5, 7),), table_sizes=(((1499,), (1502,)),))
SECONDS, FEW_SECONDS = 20.0, 2.0  # of a store that should read on a busy machine, and of one that should give up


@pytest.fixture(scope="module")
def rows_RS():
    return np.random.default_rng(3).integers(0, 256, (ROWS, ROW_BYTES), dtype=np.uint8)


@pytest.fixture(scope="module")
def table(rows_RS, tmp_path_factory):
    """The table in three shards, rows at odd offsets."""
    folder, shards = tmp_path_factory.mktemp("table"), []
    for index, (first, last) in enumerate([(0, 1000), (1000, 1001), (1001, ROWS)]):
        path = folder / f"{index}.bin"
        path.write_bytes(b"junk" * (index + 3) + rows_RS[first:last].tobytes())
        start = 4 * (index + 3)
        shards.append(Shard(path=path, tensor="t", start=start, first_row=first, num_rows=last - first, crc32=None))
    return TableFile(
        layer=1, name="model.memory.tables.1.weight", num_rows=ROWS, width=WIDTH, encoding="bf16", scale=None,
        shards=tuple(shards),
    )  # fmt: skip


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("engrammar.stores.mooncake.upload.PIECE_BYTES", 70 * 100)


@pytest.fixture
def pool(small_pieces, table):
    """A pool of this test's own, the table in it."""
    with LoopbackPool(seconds=SECONDS) as running:
        upload(table, "t", running.server, geometry=GEOMETRY)
        yield running


@pytest.fixture
def store(pool):
    opened = open_store(pool)
    yield opened
    opened.close()


@pytest.fixture
def hasty(pool):
    """A store that gives up soon."""
    opened = open_store(pool, FEW_SECONDS)
    yield opened
    opened.close()


def open_store(pool, seconds=SECONDS, **changed):
    shape = {"num_rows": ROWS, "row_bytes": ROW_BYTES, "encoding": "bf16", "geometry": GEOMETRY}
    return RemoteStore("t", replace(pool.server, seconds=seconds), **(shape | changed))


def note_of(row_bytes=66, piece_rows=100, num_rows=ROWS):
    return Note(num_rows=num_rows, row_bytes=row_bytes, encoding="bf16", geometry="", piece_rows=piece_rows, upload="u")


def error_of(fetch):
    with pytest.raises(RowsMissing) as caught:
        fetch.wait()
    return caught.value


def stop(process):
    """Stops all threads of a process: those that run go on for a moment after the signal is sent."""
    os.kill(process.pid, signal.SIGSTOP)
    while any(status.read_text().rpartition(")")[2].split()[0] != "T" for status in thread_statuses(process)):
        time.sleep(0.001)


def thread_statuses(process):
    return list(Path(f"/proc/{process.pid}/task").glob("*/stat"))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.sets(st.integers(0, 200_000), min_size=1, max_size=1500),
    row_bytes=st.sampled_from([1, 66, 1024, 70_000]),
    piece_rows=st.sampled_from([1, 7, 1000, 300_000]),
)
def test_slices_hold_each_row_once_where_the_pool_puts_it(rows, row_bytes, piece_rows):
    note = note_of(row_bytes, piece_rows, 200_001)
    rows_D = np.array(sorted(rows))
    width, first = row_bytes + 4, 0
    for cut in cut_slices(rows_D, note):
        assert cut.first == first < cut.last
        assert len(cut.size_G) <= remote.SLICE_RANGES
        assert cut.size_G.sum() <= remote.SLICE_BYTES + remote.RANGE_BYTES + width  # what a slot of the store has
        assert (cut.start_G + cut.size_G <= piece_rows * width).all()
        arriving = [
            piece * piece_rows + byte // width
            for piece, start, size in zip(cut.piece_G.tolist(), cut.start_G.tolist(), cut.size_G.tolist())
            for byte in range(start, start + size, width)
        ]
        assert np.array_equal(np.array(arriving)[cut.place_D], rows_D[cut.first : cut.last])
        first = cut.last
    assert first == len(rows_D)


def test_lone_rows_cost_their_own_bytes():
    rows_D = np.arange(0, ROWS, 99)
    note = note_of(row_bytes=1024, piece_rows=5000)
    assert sum(cut.size_G.sum() for cut in cut_slices(rows_D, note)) == len(rows_D) * 1028


def test_a_pool_without_its_client_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("raise ImportError('libibverbs.so.1: not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = PoolServer(address=f"127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"libibverbs.so.1.*engrammar\[remote\].*libibverbs1"):
            RemoteStore("t", server, num_rows=1, row_bytes=1, encoding="bf16")


def test_a_wrong_address_is_a_sentence():
    with pytest.raises(ValueError, match="'somewhere'.*HOST:PORT"):
        RemoteStore("t", PoolServer(address="somewhere"), num_rows=1, row_bytes=1, encoding="bf16")


def test_no_server_is_an_error_that_says_what_to_start():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(OSError, match=f"'t'.*{address}.*refused.*mooncake_master"):
        RemoteStore("t", PoolServer(address=address), num_rows=1, row_bytes=1, encoding="bf16")


@needs_pool
def test_any_order_and_repeats_give_the_same_bits(store, rows_RS):
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, ROWS - 1), max_size=300))
    def holds(rows):
        rows_U = np.array(rows, dtype=np.int64)
        assert np.array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U])

    holds()
    everything = np.random.default_rng(0).permutation(np.repeat(np.arange(ROWS), 3))
    fetches = [store.fetch(everything[::step]) for step in (1, 2, -1)]
    for fetch, step in zip(fetches, (1, 2, -1)):
        assert np.array_equal(fetch.wait(), rows_RS[everything[::step]])


@needs_pool
def test_a_call_of_many_lone_rows_arrives(monkeypatch, store, rows_RS):
    monkeypatch.setattr(remote, "GAP_BYTES", -1)
    rows_U = np.arange(ROWS)[::-1]
    assert np.array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U])


@needs_pool
@pytest.mark.parametrize("row", [-1, ROWS, 2**62])
def test_rows_outside_the_table_are_an_error(store, row):
    with pytest.raises(IndexError, match=f"Row {row} .*'t' in the Mooncake pool.*0 to {ROWS - 1}"):
        store.fetch(np.array([0, row]))


@needs_pool
def test_another_table_than_the_models_is_refused(pool):
    other = replace(GEOMETRY, multipliers=((3, 5, 9),))
    for changed, named in (
        ({"num_rows": ROWS + 1}, f"num_rows {ROWS}.*{ROWS + 1}"),
        ({"row_bytes": 64}, "row_bytes 66.*64"),
        ({"encoding": "int8"}, "encoding 'bf16'.*'int8'"),
        ({"geometry": other}, "geometry"),
    ):
        with pytest.raises(ValueError, match=f"'t' in the Mooncake pool at {pool.server.address}.*{named}"):
            open_store(pool, **changed)
    with pytest.raises(ValueError, match="There is no table 'u'.*upload"):
        RemoteStore("u", pool.server, num_rows=1, row_bytes=1, encoding="bf16")


@needs_pool
@pytest.mark.slow
def test_a_mutated_note_is_a_sentence(pool, store):
    breaking, good = Pool(pool.server, 4096, SECONDS), asdict(store._note)
    notes = ["{", "[]", "7", "{}", "null", json.dumps(good | {"more": 1})]
    notes += [json.dumps(good | {"piece_rows": wrong}) for wrong in (0, -1, None, "9", 2.5, 1, 10**30)]
    notes += [json.dumps(good | {"upload": wrong}) for wrong in (None, "x", [])]
    notes += [json.dumps(good | {"num_rows": wrong}) for wrong in (ROWS + 1, "x", None, 0)]
    for text in notes:
        assert breaking.ask("note", SECONDS, key="t/table.json", text=text) == 0
        with pytest.raises(ValueError, match="'t' in the Mooncake pool|t/table.json in the pool"):
            open_store(pool)
    breaking.close()


@needs_pool
def test_a_damaged_row_is_missing_and_its_neighbours_are_not(pool, store, rows_RS):
    key, width = store._keys[1], ROW_BYTES + 4
    breaking = Pool(pool.server, 100 * width, SECONDS)
    breaking.memory[:] = 7
    read = {"keys": [key], "to": [[0]], "start": [[0]], "size": [[100 * width]]}
    assert breaking.ask("read", SECONDS, **read) == [100 * width]
    breaking.ask("remove", SECONDS, keys=[key])
    breaking.memory[4 * width + 5] ^= 16  # row 104
    breaking.memory[7 * width : 8 * width] = breaking.memory[8 * width : 9 * width].copy()  # 108 in the place of 107
    assert breaking.ask("put", SECONDS, key=key, start=0, size=100 * width) == 0
    breaking.close()
    rows_U = np.array([108, 104, 99, 107, 2000, 104])
    error = error_of(store.fetch(rows_U))
    assert f"Row 104 and 1 more of table 't' in the Mooncake pool at {pool.server.address}" in str(error)
    assert "checksum" in str(error)
    assert error.missing_U.tolist() == [False, True, False, True, False, True]
    assert np.array_equal(error.rows_US[~error.missing_U], rows_RS[[108, 99, 2000]])


@needs_pool
def test_a_missing_piece_is_an_error_and_its_upload_sends_only_that(pool, store, table, rows_RS):
    breaking = Pool(pool.server, 4096, SECONDS)
    breaking.ask("remove", SECONDS, keys=[store._keys[3]])
    breaking.close()
    error = error_of(store.fetch(np.array([299, 300, 399, 400])))
    assert "Row 300 and 1 more" in str(error) and store._keys[3] in str(error)
    assert error.missing_U.tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match=f"lacks 1 of 31 pieces.*{store._keys[3]}"):
        open_store(pool)
    assert upload(table, "t", pool.server, geometry=GEOMETRY) == 1
    assert np.array_equal(store.fetch(np.arange(ROWS)).wait(), rows_RS)


@needs_pool
@pytest.mark.slow
def test_leases_that_end_are_renewed(small_pieces, monkeypatch, table, rows_RS):
    monkeypatch.setattr(remote, "GAP_BYTES", -1)
    with LoopbackPool(seconds=SECONDS, lease_ms=1500) as pool:
        upload(table, "t", pool.server, geometry=GEOMETRY)
        store = open_store(pool)
        for seconds in (1.2, 1.6, 0.8):  # some leases end between reads, some within them
            assert np.array_equal(store.fetch(np.arange(ROWS)).wait(), rows_RS)
            time.sleep(seconds)
            assert np.array_equal(store.fetch(np.array([5])).wait(), rows_RS[[5]])
        store.close()


@needs_pool
def test_a_killed_client_process_costs_one_retry(store, rows_RS):
    store._pool._process.kill()
    assert np.array_equal(store.fetch(np.arange(ROWS)).wait(), rows_RS)


@needs_pool
def test_a_fork_reads_over_a_connection_of_its_own(store, rows_RS):
    rows_U = np.arange(0, ROWS, 7)
    store.fetch(rows_U).wait()

    def read():
        right = np.array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U])
        store.close()
        os._exit(0 if right else 1)

    forks = [multiprocessing.get_context("fork").Process(target=read) for _ in range(2)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join()
        assert fork.exitcode == 0
    connected = store._pool
    assert np.array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U])
    assert store._pool is connected  # the forks left it alone


@needs_pool
def test_a_checkpoint_is_served_from_a_pool(tmp_path):
    model, ids_BT = tiny_model("paper").eval(), torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    opened = []

    def connect(table):
        shape = {"num_rows": table.num_rows, "row_bytes": table.row_bytes, "encoding": table.encoding}
        opened.append(RemoteStore(f"m/{table.layer}", pool.server, geometry=model.config.memory_geometry, **shape))
        return opened[-1]

    with LoopbackPool() as pool, torch.no_grad():
        main(["table", "upload", str(tmp_path), "m", "--address", pool.server.address])
        served = EngrammarForCausalLM.from_pretrained(tmp_path, memory=connect).eval()
        assert torch.equal(served(ids_BT).logits, model(ids_BT).logits)
        assert len(opened) == len(model.model.memory.config.layers)
        for store in opened:
            store.close()


@needs_pool
def test_a_prompt_is_continued_with_tables_in_a_pool(tmp_path, capsys):
    save_micro(tmp_path)
    command = ["generate", str(tmp_path), "To be", "--max-new-tokens", "4"]
    main(command)
    expected = capsys.readouterr().out
    with LoopbackPool() as pool:
        main(["table", "upload", str(tmp_path), "m", "--address", pool.server.address])
        capsys.readouterr()
        main([*command, "--memory", "remote", "--name", "m", "--address", pool.server.address])
    assert capsys.readouterr().out == expected


def read_until_killed(store, rows_RS, kill):
    """Reads without pause while `kill` runs in another thread; the error that ends it. What arrives must be right."""
    killer = threading.Timer(0.1, kill)
    killer.start()
    rows_U = np.random.default_rng(1).permutation(ROWS)
    while True:
        try:
            assert np.array_equal(store.fetch(rows_U).wait(), rows_RS[rows_U])
        except RowsMissing as error:
            assert np.array_equal(error.rows_US[~error.missing_U], rows_RS[rows_U[~error.missing_U]])
            killer.join()
            return error


@needs_pool
@pytest.mark.parametrize("dying", ["storage", "master"])
def test_a_server_killed_while_reading_is_an_error_and_works_once_it_is_back(
    monkeypatch, pool, store, hasty, table, rows_RS, dying
):
    monkeypatch.setattr(remote, "GAP_BYTES", -1)  # many ranges: the kill comes in the middle of them
    error = read_until_killed(hasty, rows_RS, getattr(pool, dying).kill)
    assert pool.server.address in str(error) and "Row " in str(error)
    error_of(hasty.fetch(np.arange(5)))
    pool.stop()
    pool.start()
    upload(table, "t", pool.server, geometry=GEOMETRY)
    assert np.array_equal(store.fetch(np.arange(ROWS)).wait(), rows_RS)


@needs_pool
def test_a_server_that_hangs_is_an_error(pool, store, hasty, rows_RS):
    stop(pool.storage)
    error = error_of(hasty.fetch(np.array([5, 6])))
    assert "Row 5 and 1 more" in str(error)
    os.kill(pool.storage.pid, signal.SIGCONT)
    assert np.array_equal(store.fetch(np.array([5, 6])).wait(), rows_RS[[5, 6]])


@needs_pool
def test_waiting_ends_when_the_caller_says(pool, store, rows_RS):
    stop(pool.storage)
    fetches = [store.fetch(np.array([5, 6])) for _ in range(50)]
    for fetch in fetches:
        with pytest.raises(RowsMissing, match="Row 5 and 1 more .* did not arrive within 0.01 s") as caught:
            fetch.wait(0.01)
        assert caught.value.missing_U.all()
    os.kill(pool.storage.pid, signal.SIGCONT)
    assert np.array_equal(store.fetch(np.array([7])).wait(), rows_RS[[7]])  # the 49 never started


def test_rows_that_were_given_up_are_missing_at_every_wait():
    """A wait that runs out of time cancels a read that has not started, and closing cancels all of them."""
    store = SimpleNamespace(name="table 't'", row_bytes=ROW_BYTES)
    fetch = RemoteFetch(store, np.array([5, 6]), Future())
    with pytest.raises(RowsMissing, match=r"Row 5 and 1 more of table 't' did not arrive within 0\.01 s"):
        fetch.wait(0.01)
    for seconds in (0.01, None):
        with pytest.raises(
            RowsMissing, match="Row 5 and 1 more of table 't' were given up, .*: ask for them again"
        ) as caught:
            fetch.wait(seconds)
        assert caught.value.missing_U.all() and caught.value.rows_US.shape == (2, ROW_BYTES)


@needs_pool
def test_a_closed_store_says_so(pool):
    opened = open_store(pool)
    stop(pool.storage)
    fetches = [opened.fetch(np.array([5, 6])) for _ in range(3)]
    os.kill(pool.storage.pid, signal.SIGCONT)
    opened.close()
    with pytest.raises(RowsMissing, match="given up"):
        fetches[-1].wait()
    with pytest.raises(ValueError, match="is closed: open it again"):
        opened.fetch(np.array([5]))


@needs_pool
def test_a_pool_without_room_says_how_far_it_came(small_pieces, table, tmp_path):
    shard = replace(table.shards[0], path=tmp_path / "big", start=0, num_rows=400_000)
    shard.path.write_bytes(bytes(400_000 * ROW_BYTES))
    big = replace(table, num_rows=400_000, shards=(shard,))
    with LoopbackPool("16MB", SECONDS) as pool, pytest.MonkeyPatch.context() as patched:
        patched.setattr("engrammar.stores.mooncake.upload.PIECE_BYTES", 2**22)
        with pytest.raises(OSError, match=r"no room.*; 4 of 7 pieces \(0.028 GB in all\).*global_segment_size"):
            upload(big, "big", pool.server)
        with pytest.raises(ValueError, match="There is no table 'big'"):  # half a table cannot be opened
            RemoteStore("big", pool.server, num_rows=400_000, row_bytes=ROW_BYTES, encoding="bf16")


@needs_pool
def test_another_table_under_the_name_replaces_it_whole(pool, store, table, rows_RS, tmp_path):
    shard = replace(table.shards[0], path=tmp_path / "other", start=0, num_rows=ROWS)
    shard.path.write_bytes((255 - rows_RS).tobytes())
    upload(replace(table, shards=(shard,)), "t", pool.server, geometry=GEOMETRY)
    assert error_of(store.fetch(np.array([1]))).missing_U.all()  # never the other table's row
    again = open_store(pool)
    assert again.identity != store.identity
    assert np.array_equal(again.fetch(np.arange(ROWS)).wait(), 255 - rows_RS)
    again.close()


@needs_pool
def test_a_truncated_shard_is_not_uploaded(pool, table, tmp_path):
    short = replace(table.shards[2], path=tmp_path / "short")
    short.path.write_bytes(table.shards[2].path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{short.path} has .* its rows end at .*: copy it again"):
        upload(replace(table, shards=(*table.shards[:2], short)), "v", pool.server)


@needs_pool
def test_a_damaged_page_is_not_uploaded(pool, table, tmp_path):
    path, content = tmp_path / "damaged.safetensors", bytearray(table.shards[2].path.read_bytes())
    path.write_bytes(content)
    damaged = replace(table.shards[2], path=path, crc32=write_page_sums(path))
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"damaged\.safetensors is damaged in bytes"):
        upload(replace(table, shards=(*table.shards[:2], damaged)), "w", pool.server)


@needs_pool
@pytest.mark.slow
def test_a_program_that_ends_while_reading_ends(pool):
    """Neither a thread in the library nor its process keeps the interpreter, or crashes it."""
    program = (
        "import numpy as np, os, signal\n"
        "from engrammar.stores.mooncake.pool import PoolServer\n"
        "from engrammar.stores.mooncake.store import RemoteStore\n"
        f"store = RemoteStore('t', PoolServer(address={pool.server.address!r}, seconds=8), num_rows={ROWS},"
        f" row_bytes={ROW_BYTES}, encoding='bf16')\n"
        f"os.kill({pool.storage.pid}, signal.SIGSTOP)\nstore.fetch(np.arange(100))\n"
        "print(store._pool._process.pid)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and not ended.stderr
    while os.path.exists(f"/proc/{ended.stdout.strip()}"):
        time.sleep(0.05)
