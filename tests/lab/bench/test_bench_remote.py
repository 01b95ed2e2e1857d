"""The remote bench reads the same rows both ways, and says so where it cannot run."""

import pytest

from engrammar_lab.bench import remote
from engrammar_lab.bench.loopback import why_no_pool


def result_with(store: float, theirs: float) -> dict:
    rates = {
        f"{way}, {call} a call": rate
        for call in remote.CALLS
        for way, rate in (("store", store), ("get_batch", theirs))
    }
    variants = {
        name: {"rows_per_second": rate, "mb_per_second": rate * 256 / 1e6, "share": rate / theirs}
        for name, rate in rates.items()
    }
    return {"absent": None, "variants": variants}


def test_the_verdict_gives_the_measured_share():
    result = result_with(30_000, 40_000)
    assert "reaches 0.75 and 0.75 of get_batch" in remote.verdict(result)
    header, lines = remote.table(result)
    assert all(len(line) == len(header) for line in lines)
    assert ["store, 16 a call", "30,000", "7.7", "0.75"] in lines


def test_a_machine_without_mooncake_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(remote, "why_no_pool", lambda: "Mooncake is not installed")
    result = remote.bench_remote(quick=True)
    assert remote.table(result)[1] == []
    assert remote.verdict(result) == "Not measured: Mooncake is not installed."


@pytest.mark.slow
@pytest.mark.skipif(why_no_pool() is not None, reason=why_no_pool() or "")
def test_all_ways_read_the_right_rows():
    variants = remote._measure(num_rows=5000, num_read=600, rounds=1)
    assert all(variant["rows_per_second"] > 0 for variant in variants.values())
    for call in remote.CALLS:
        assert variants[f"get_batch, {call} a call"]["share"] == 1
        assert variants[f"store, {call} a call"]["share"] > 0
    assert {"EngramStore, 512 a call", "store, all in one call", "upload"} <= variants.keys()
