"""The placement bench trains the same steps wherever the rows are, and says what it cannot say without a GPU."""

import json
from dataclasses import replace

import pytest
import torch

from committed import RESULTS
from engrammar_lab.bench.models import with_rows
from engrammar_lab.bench.placement import (
    BASELINE,
    ON_CPU,
    STALE,
    VARIANTS,
    Variant,
    table,
    verdict,
)
from engrammar_lab.bench.report import run
from engrammar_lab.bench.rows import build_backbone, draw_ids
from engrammar_lab.machine import accelerator

TINY = replace(ON_CPU, preset="micro", rows_per_head=1009, batch=1)


def train(kind, batches, folder, num_steps):
    """A backbone of its own with that variant of memory after some steps: its weights and rows, and the variant."""
    model, backbone = build_backbone(with_rows(TINY.preset, TINY.rows_per_head))
    variant = Variant(model, backbone, kind, folder)
    for _ in range(num_steps):
        variant.step(batches)
    variant.placement.flush()
    return variant, [*model.parameters(), *variant.placement.tables.values()]


@pytest.fixture(scope="module")
def batches():
    return [draw_ids(1024, 1, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind != BASELINE])
def test_every_place_trains_the_same_weights_but_for_stale_reads(kind, batches, tmp_path):
    _, expected = train(BASELINE, batches, tmp_path, 3)
    _, found = train(kind, batches, tmp_path, 3)
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same == (kind != STALE)


def test_bytes_moved_are_the_distinct_rows_of_a_step(batches, tmp_path):
    variant, _ = train("RAM", batches, tmp_path, 3)
    num_distinct = sum(len(rows.unique()) for ids in batches for rows in variant.memory.addresses(ids).values())
    assert variant.bytes_moved() == pytest.approx(num_distinct / 3 * (8 + 2 * 16 * 4))
    assert train(BASELINE, batches, tmp_path, 1)[0].bytes_moved() == 0


def test_variants_share_a_backbone_and_only_the_running_ones_rows_change(batches, tmp_path):
    model, backbone = build_backbone(with_rows(TINY.preset, TINY.rows_per_head))
    first, second = (Variant(model, backbone, kind, tmp_path) for kind in (BASELINE, "RAM, exact"))
    (before,) = [table.detach().clone() for table in first.placement.tables.values()]
    (other,) = [table.detach().clone() for table in second.placement.tables.values()]
    assert torch.equal(before, other)  # they start alike
    assert first.run(batches, 2) > 0 and first.next == 3
    (after,) = first.placement.tables.values()
    assert not torch.equal(after, before) and torch.equal(next(iter(second.placement.tables.values())), other)


@pytest.mark.slow
def test_quick_placement_bench_says_whether_it_used_an_accelerator():
    result = json.loads(json.dumps(run("placement", True)))
    assert result["quick"] and result["device"] == accelerator().type
    check(result)


def check(result):
    variants = result["variants"]
    assert list(variants) == list(VARIANTS)
    assert variants[BASELINE]["share"] == 1 and variants[BASELINE]["bytes_moved"] == 0
    for variant in variants.values():
        assert 0 < variant["tokens_per_second"] <= variant["best_tokens_per_second"]
    assert all(variant["bytes_moved"] > 0 for kind, variant in variants.items() if kind != BASELINE)
    header, lines = table(result)
    assert {len(line) for line in lines} == {len(header)}
    assert ("No accelerator here: says nothing about offload" in verdict(result)) == (result["device"] == "cpu")


def test_the_committed_run_is_a_full_one_and_honest_about_its_device():
    result = json.loads((RESULTS / "bench" / "placement.json").read_text())
    assert not result["quick"]
    check(result)
    on_gpu = result | {"device": "cuda", "machine": result["machine"] | {"accelerator": "NVIDIA H100"}}
    assert "On NVIDIA H100, tables in RAM cost" in verdict(on_gpu)
