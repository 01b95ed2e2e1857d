"""The bench of attached memories: its contenders compute the same, and its verdict follows from its figures."""

import json
from dataclasses import replace

import pytest
import torch

from base_folder import write_base
from committed import RESULTS
from engrammar_lab.bench.attached import (
    BASE,
    DISK,
    LORA,
    PARAMETERS,
    QUICK,
    RAM,
    WHOLE,
    _decoders,
    load_bases,
    table,
    train_table,
    train_verdict,
    verdict,
)
from engrammar_lab.bench.report import run
from texts import WORDS

MEMORY = {"rows_per_head": [211, 223], "num_heads": 2, "head_dim": 8, "conv_kernel": 4}


@pytest.fixture
def place(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "words.txt").write_text(" ".join(f"{WORDS[i % 12]} {WORDS[i * i % 11]}" for i in range(900)))
    plan = replace(QUICK, num_blocks=0, memory=MEMORY, prompt=4, steps=3, warm_tokens=64, cache_rows=64)
    return replace(plan, length=8, train_steps=1, corpus=str(text)), write_base(tmp_path / "base")


def test_every_contender_reads_the_same_rows(place, tmp_path):
    plan, folder = place
    models = _decoders(load_bases(folder, 0), plan, tmp_path / "adapter")
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        logits = {name: model(ids).logits for name, model in models.items()}
    torch.testing.assert_close(logits[RAM], logits[PARAMETERS], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[DISK], logits[PARAMETERS], rtol=0, atol=1e-5)
    assert (logits[BASE] - logits[PARAMETERS]).abs().max() > 1e-3
    weights = [next(model.parameters()).data_ptr() for model in models.values()]
    assert len(set(weights)) == 1  # of the base, which all share


def test_a_small_run_has_a_line_for_every_contender(place):
    plan, folder = place
    result = run("attach", True, plan, folder)
    _, lines = table(result)
    assert [line[:2] for line in lines] == [
        [str(batch), name] for batch in plan.batches for name in (BASE, PARAMETERS, RAM, DISK)
    ]
    assert [line[-1] != "" for line in lines] == 2 * [False, False, False, True]  # misses of the cache
    names = [line[0] for line in train_table(result["train"])[1]]
    assert names == [LORA, WHOLE, "memory, prefix kept, block 2 of 3"] and "--quick" in result["command"]


def test_the_verdicts_follow_from_the_committed_figures():
    committed = json.loads((RESULTS / "bench" / "attach.json").read_text())
    assert not committed["quick"] and {line["batch"] for line in committed["decode"]} == {1, 16}
    for line in committed["decode"]:
        assert line["variant"] in (BASE, PARAMETERS) or f"{line['over']:+.1%} ({line['variant']})" in verdict(committed)
    kept = [line for line in committed["train"]["lines"] if "kept" in line["variant"]]
    assert len(kept) == 2 and all(f"{line['times']:.1f} times" in train_verdict(committed["train"]) for line in kept)
