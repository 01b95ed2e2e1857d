"""The bench of stores reads the same rows in every way, and its verdicts follow from the numbers."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from engrammar.stores.aio import AioQueue
from engrammar.stores.disk import DiskStore
from engrammar.tables.headers import PAGE
from engrammar_lab.bench import cold, footprint, store
from engrammar_lab.bench.files import FOLDER
from engrammar_lab.bench.large_file import START, draw_rows, first_rows, large_table
from engrammar_lab.bench.readers import (
    CACHED,
    DISK,
    ENGRAMDB,
    ENGRAMDB_PAGES,
    RAM,
    READERS,
    TAKE,
    pages_of,
    why_no_engramdb,
)
from engrammar_lab.bench.report import run

GIB = 2.0**-8  # 4 MiB


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "bench"))
    return large_table(GIB)


@pytest.mark.parametrize("row_bytes", [64, 256, 1024])
@pytest.mark.parametrize("way", READERS)
def test_every_way_reads_the_bytes_of_the_file(table, way, row_bytes):
    if way in (ENGRAMDB, ENGRAMDB_PAGES) and why_no_engramdb() is not None:
        pytest.skip("engramdb is not installed")
    path = table.shards[0].path
    part = first_rows(path, 2**20, row_bytes)
    rows_RS = np.frombuffer(path.read_bytes()[START:][: 2**20], np.uint8).reshape(-1, row_bytes)
    rows_U = draw_rows(part, 999, seed=3)
    assert np.array_equal(READERS[way](part)(rows_U), rows_RS[rows_U])


def test_the_file_is_kept_and_made_anew_where_it_is_not_whole(table):
    path = table.shards[0].path
    first, written = path.read_bytes(), path.stat().st_mtime_ns
    assert large_table(GIB) == table and path.stat().st_mtime_ns == written
    os.truncate(path, 100_000)
    assert large_table(GIB) == table and path.read_bytes() == first
    rows_U = np.arange(table.num_rows)
    assert len(DiskStore(table).fetch(rows_U).wait()) == table.num_rows  # every checksum is right


def test_a_folder_without_room_is_an_error_that_names_the_setting(table, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(ValueError, match=f"name another folder in {FOLDER}"):
        large_table(2)


def test_pages_of_rows_are_counted_once(table):
    assert len(pages_of(table, np.array([0, 15, 16, 0]))) == 2
    assert len(pages_of(first_rows(table.shards[0].path, 2**20, 3000), np.array([1]))) == 2


@pytest.mark.parametrize("way", [TAKE, DISK])
def test_a_cold_read_comes_from_the_disk(table, way):
    if not DiskStore(table)._source.files.direct:
        pytest.skip("files of this system cannot be read past the page cache")
    run = cold.measure_cold(table, way, 50, seed=0)
    assert run["pages"] == len(pages_of(table, draw_rows(table, 50, 0))) and run["seconds"] > 0
    assert run["bytes"] >= run["pages"] * PAGE
    if way == DISK:
        assert run["bytes"] == run["pages"] * PAGE


def test_the_limit_is_measured_by_all_kinds_of_reads(table):
    try:
        AioQueue(1)
    except OSError:
        pytest.skip("this system has no asynchronous reads")
    rates = cold.measure_limit(table, 300, seed=0)
    assert len(rates) == len(cold.THREADS) + len(cold.DEPTHS) and min(rates.values()) > 0


def test_a_long_run_counts_what_it_holds(table):
    run = footprint.measure_long_run(table, num_tokens=4096, tokens_per_call=512)
    assert 0.1 < run["hit_rate"] < 1 and 0 < run["memory"] < run["bytes"] and run["tokens"] == 4096


WARM = {"rows_per_second": 9e6, "best_rows_per_second": 1e7, "share": 0.95, "microseconds_of_few": 8.0}
COLD = {"rows_per_second": 9e4, "pages_per_second": 9e4, "share": 0.9, "bytes": 1.0}
SHARED = [
    {"processes": n, "rows_per_second": 1e7 * n, "memory": 2**30 + n, "own": n, "bytes": 2**30} for n in (1, 2, 4)
]


def result(**changed):
    ways = {TAKE: WARM, ENGRAMDB: WARM | {"rows_per_second": 1e6}, RAM: WARM, CACHED: WARM, DISK: WARM}
    slow = {"rows_per_second": 3e4}
    return {
        "row_bytes": {"64": ways, "256": {**ways, RAM: WARM | changed.get("ram", {})}},
        "engramdb": None,
        "cold": {
            "limit": {"AIO, depth 64": 1e5, "threads 16": 2e4},
            "ways": {TAKE: COLD | slow, ENGRAMDB: COLD | slow, DISK: COLD | changed.get("disk", {})},
        },
        "footprint": {
            "shared": {RAM: [*SHARED[:2], SHARED[2] | changed.get("four", {})], CACHED: SHARED},
            "long": {"rows_per_second": 1e5, "memory": 5e8, "bytes": 6e8, "hit_rate": 0.8, "tokens": 1000}
            | changed.get("long", {}),
        },
    }


def test_verdicts_follow_from_the_numbers():
    good = result()
    assert "misses" not in store.verdict(good) + cold.verdict(good["cold"])
    said = footprint.verdict(good["footprint"])
    assert "MORE" not in said and "stays under the bound" in said
    assert "misses the target of 0.9" in store.verdict(result(ram={"share": 0.8}))
    assert "misses the target of 20 us" in store.verdict(result(ram={"microseconds_of_few": 21.0}))
    assert "misses the target of 5" in store.verdict(result(ram={"rows_per_second": 4e6}))
    assert "misses the target of 0.85" in cold.verdict(result(disk={"share": 0.8})["cold"])
    assert "misses the target of at most 1.05" in cold.verdict(result(disk={"bytes": 1.1})["cold"])
    assert "misses the target of 1.5" in cold.verdict(result(disk={"rows_per_second": 4e4})["cold"])
    assert "MORE THAN ONE COPY" in footprint.verdict(result(four={"memory": 2**31})["footprint"])
    assert "BREAKS the bound" in footprint.verdict(result(long={"memory": 7e8})["footprint"])
    assert "engramdb was not measured: gone" in store.verdict(good | {"engramdb": "gone"})


def check_tables(found):
    for module, part in ((store, found), (cold, found["cold"]), (footprint, found["footprint"])):
        header, lines = module.table(part)
        assert lines and {len(line) for line in lines} == {len(header)}
        assert module.verdict(part)


def test_tables_have_a_cell_for_each_column():
    check_tables(result())


@pytest.mark.slow
def test_the_quick_bench_says_that_it_is_smaller(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    found = json.loads(json.dumps(run("store", True)))
    check_tables(found)
    assert found["quick"] and "smaller" in found["shapes"] and "smaller" in found["cold"]["shapes"]
    assert {"cold", "footprint", "remote"} < set(found) and found["cold"]["ways"][DISK]["bytes"] <= 1.05
