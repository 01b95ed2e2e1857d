"""The rows bench trains the same model whatever holds the rows, and reports what it measured and what it did not."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from committed import RESULTS
from engrammar_lab.bench import rows
from engrammar_lab.bench.rivals import why_no_fbgemm
from engrammar_lab.bench.rows import (
    DENSE_ADAM,
    FBGEMM,
    SPARSE_ADAM,
    bench_rows,
    build_backbone,
    build_contender,
    draw_ids,
    limit_step,
    new_memory,
    table_step,
    train_step,
)

OURS = ("adam", "row_adam", "sinkhorn")
fbgemm = pytest.param(FBGEMM, marks=pytest.mark.skipif(why_no_fbgemm() is not None, reason=str(why_no_fbgemm())))
CONTENDERS = [*OURS, DENSE_ADAM, SPARSE_ADAM, fbgemm]
ROWS_PER_HEAD = 1009


def contender_and_table(name, model):
    memory = new_memory(model, ROWS_PER_HEAD)
    (table,) = memory.tables.values()
    weight_RC = torch.empty(table.shape).normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    return build_contender(name, memory, weight_RC), weight_RC


def touched(contender, ids_BT):
    (rows_BTH,) = contender.memory.addresses(ids_BT).values()
    return set(rows_BTH.unique().tolist())


@pytest.fixture(scope="module")
def first_loss():
    model, optimizer = build_backbone()
    contender, _ = contender_and_table("adam", model)
    return train_step(model, optimizer, contender, draw_ids(model.config.vocab_size, 1, seed=5))[1]


@pytest.mark.parametrize("name", CONTENDERS)
def test_the_loss_before_training_is_the_same_whatever_holds_the_rows(name, first_loss):
    model, optimizer = build_backbone()
    contender, weight_RC = contender_and_table(name, model)
    before_RC = weight_RC.clone()
    ids_BT = draw_ids(model.config.vocab_size, 1, seed=5)
    assert train_step(model, optimizer, contender, ids_BT)[1] == first_loss
    changed = set((weight_RC != before_RC).any(1).nonzero().flatten().tolist())
    assert changed and changed <= touched(contender, ids_BT)  # the storage that all share is what is trained


@pytest.mark.parametrize("name", CONTENDERS)
def test_only_a_dense_adam_moves_rows_that_a_step_does_not_touch(name):
    model, _ = build_backbone()
    contender, weight_RC = contender_and_table(name, model)
    first, second = (draw_ids(model.config.vocab_size, 1, seed=seed) for seed in (1, 2))
    table_step(contender, first)
    before_RC = weight_RC.clone()
    table_step(contender, second)
    changed = set((weight_RC != before_RC).any(1).nonzero().flatten().tolist())
    expected = touched(contender, second)
    assert changed == (expected | touched(contender, first) if name == DENSE_ADAM else expected)


@pytest.mark.parametrize("name", [DENSE_ADAM, SPARSE_ADAM])
def test_nn_embedding_gets_the_gradient_of_our_table(name):
    model, _ = build_backbone()
    ids_BT = draw_ids(model.config.vocab_size, 1, seed=1)
    gradients = []
    for kind in ("adam", name):
        contender, _ = contender_and_table(kind, model)
        (rows_BTH,) = contender.memory.addresses(ids_BT).values()
        contender.table(rows_BTH).square().sum().backward()
        source = contender.table.source
        (weight,) = source.tables.values() if source else [contender.table.weight]
        gradients.append(weight.grad.to_dense())
    torch.testing.assert_close(*gradients)


def test_the_limit_changes_nothing_and_is_for_ours_alone():
    model, _ = build_backbone()
    ids_BT = draw_ids(model.config.vocab_size, 1, seed=1)
    for name in ("adam", SPARSE_ADAM):
        contender, weight_RC = contender_and_table(name, model)
        table_step(contender, ids_BT)
        before_RC = weight_RC.clone()
        seconds = limit_step(contender, ids_BT)
        assert torch.equal(weight_RC, before_RC)
        assert (seconds is None) == (name == SPARSE_ADAM)


def test_batches_follow_from_their_seed():
    assert torch.equal(draw_ids(4096, 2, seed=7), draw_ids(4096, 2, seed=7))
    assert not torch.equal(draw_ids(4096, 2, seed=7), draw_ids(4096, 2, seed=8))


@pytest.mark.skipif(not (rows.PROCESS / "clear_refs").exists(), reason="resident memory is read from /proc")
def test_memory_is_that_at_its_highest():
    def allocate_and_free() -> None:
        torch.ones(64 * 2**20, dtype=torch.uint8)

    assert 63 * 2**20 < rows._memory_of(allocate_and_free) < 80 * 2**20  # the kernel counts pages in batches


def test_why_fbgemm_is_missing_is_said_in_its_own_words(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "fbgemm_gpu"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text("raise OSError('x.so: undefined symbol: y')")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_no_fbgemm() == "OSError: x.so: undefined symbol: y"
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "fbgemm_gpu").exists()])
    assert why_no_fbgemm() == "fbgemm-gpu-cpu is not installed"


@pytest.mark.slow
def test_every_cell_is_measured_or_said_not_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "why_no_fbgemm", lambda: "it went missing")
    plan = replace(rows.QUICK, sizes=(101, 1009), batch=1, num_batches=2, repeats=2, num_fresh=1, max_dense_rows=101)
    result = json.loads(json.dumps(bench_rows(plan)))
    assert {name: len(cells) for name, cells in result["contenders"].items()} == {
        **dict.fromkeys((*OURS, SPARSE_ADAM), 2),
        DENSE_ADAM: 1,
    }
    for name, cells in result["contenders"].items():
        assert [cell["rows_per_head"] for cell in cells] == [101, 1009][: len(cells)]
        assert cells[0]["ratio"] == 1 and cells[-1]["table_bytes"] == 64 * cells[-1]["num_rows"]
        for cell in cells:
            times = cell["milliseconds"]
            assert cell["best_milliseconds"] <= times["step"] and times["fresh_step"] > times["fresh_table"] > 0
            assert (times["limit"] is not None) == (name in OURS)
    header, lines = rows.table(result)
    assert {len(line) for line in lines} == {len(header)}
    assert [line[:3] for line in lines if not line[3]] == [
        [DENSE_ADAM, "1,009", "not run"],
        [FBGEMM, "", "missing"],
    ]
    assert "FBGEMM is missing: it went missing." in rows.verdict(result)
    rows.draw(result, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_in_the_committed_run_ten_million_rows_cost_our_step_within_five_percent():
    result = json.loads((RESULTS / "bench" / "step.json").read_text())["rows"]
    for name in OURS:
        first, *_, last = result["contenders"][name]
        assert (first["rows_per_head"], last["rows_per_head"]) == (10_000, 10_000_000)
        assert last["ratio"] <= 1.05
