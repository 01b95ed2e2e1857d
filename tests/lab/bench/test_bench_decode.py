"""The decode bench feeds every variant the same text, and its verdict follows from its figures."""

import copy
import itertools
import json
import time

import pytest
import torch

from committed import RESULTS
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores.serving import stored_tables_of
from engrammar_lab.bench import decode
from engrammar_lab.bench.decode import COLD, RAM, VARIANTS, WARM, Plan, Steps, Texts, Timed, table, verdict
from engrammar_lab.bench.models import random_model, with_rows
from engrammar_lab.bench.report import run

TINY = Plan(preset="micro", rows_per_head=2003, batches=(1, 2), rounds=1, steps=2, corpus="pocket:stdlib")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("ENGRAMMAR_BENCH_FOLDER", str(tmp_path_factory.mktemp("bench")))
    fed = []
    steps = Steps(seconds=0.01, still=0.001, num_bytes=64.0)
    patch.setattr(decode, "_decode", lambda model, source, ids: fed.append((source, ids)) or steps)
    result = run("decode", True, TINY)
    patch.undo()
    return result, fed


def test_every_variant_gets_the_same_text_once_a_round(result):
    _, fed = result
    assert len(fed) == len(VARIANTS) * len(TINY.batches) * (TINY.rounds + 1)
    for first in range(0, len(fed), len(VARIANTS)):
        turn = fed[first : first + len(VARIANTS)]
        assert all(torch.equal(ids, turn[0][1]) for _, ids in turn)
        assert len({id(source) for source, _ in turn}) == len(VARIANTS)
    firsts = [ids for _, ids in fed[:: len(VARIANTS)]]
    assert not any(torch.equal(one[0], two[0]) for one, two in zip(firsts, firsts[1:]))


def test_the_table_has_a_line_for_each_batch_and_variant(result):
    header, lines = table(result[0])
    assert [line[:2] for line in lines] == [[str(batch), kind] for batch in TINY.batches for kind in VARIANTS]
    assert all(len(line) == len(header) for line in lines) and "Quick" in verdict(result[0])


def test_the_verdict_follows_from_the_figures():
    committed = json.loads((RESULTS / "bench" / "decode.json").read_text())
    assert not committed["quick"] and committed["table_bytes"] >= 2**34
    assert [part["batch"] for part in committed["batches"]] == [1, 16]
    assert all(part["variants"][WARM]["misses"] == 0 for part in committed["batches"])
    slow = copy.deepcopy(committed)
    for part in slow["batches"]:
        part["variants"][COLD]["share"] = 0.5
    assert "50.0% at batch 1" in verdict(slow) and "the target of 90% is missed" in verdict(slow)
    assert "the target of 90% is met" in verdict(committed)


def test_text_is_handed_out_once_and_its_end_is_said():
    texts = Texts(torch.arange(10))
    assert texts.take(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]] and texts.take(1, 4).tolist() == [[6, 7, 8, 9]]
    with pytest.raises(ValueError, match="has 10 tokens"):
        texts.take(1, 1)


def test_bytes_and_standing_still_are_counted_while_asking_and_waiting(tmp_path, monkeypatch):
    model = random_model(with_rows("micro", 101))
    model.save_pretrained(tmp_path)
    served = EngrammarForCausalLM.from_pretrained(tmp_path, memory="ram").eval()
    memory, source, now = served.model.memory, stored_tables_of(served), itertools.count()
    ids, timed = torch.arange(20).view(2, 10), Timed(source)
    decode._give(served, timed)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))  # a second passes from one look to the next
    assert torch.equal(served(ids).logits, model.eval()(ids).logits)
    assert timed.seconds == 1 + len(memory.config.layers)
    assert timed.num_bytes == sum(
        rows.numel() * source.stores[memory.table(layer).name].row_bytes
        for layer, rows in memory.addresses(ids).items()
    )
    source.close()


@pytest.mark.slow
def test_the_quick_bench_takes_ram_as_its_baseline(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAMMAR_BENCH_FOLDER", str(tmp_path))
    result = run("decode", True)
    assert all(part["variants"][RAM]["share"] == 1 for part in result["batches"])
