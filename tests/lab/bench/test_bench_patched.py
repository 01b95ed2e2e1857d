"""The bench of patches: its keys occur in the text, its contenders say the same, its verdict follows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from base_folder import write_base
from engrammar.edit import apply_patch
from engrammar.edit.checking import check_patch
from engrammar.edit.files import refuse
from engrammar_lab.bench.attached import BASE, load_bases
from engrammar_lab.bench.patched import (
    QUICK,
    bench_patched,
    find_table,
    find_verdict,
    patch_of,
    random_keys,
    table,
    verdict,
)
from texts import WORDS


@pytest.fixture
def place(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "words.txt").write_text(" ".join(f"{WORDS[i % 12]} {WORDS[i * i % 11]}" for i in range(1500)))
    plan = replace(QUICK, num_blocks=0, keys=(10, 400), prompt=4, steps=3, finds=3, corpus=str(text))
    return plan, write_base(tmp_path / "base")


def test_a_small_run_has_a_line_for_every_number_of_keys(place):
    plan, folder = place
    result = bench_patched(True, plan, folder)
    _, lines = table(result)
    assert [line[:2] for line in lines] == [[str(b), name] for b in plan.batches for name in (BASE, "10", "400")]
    assert len(find_table(result["find"])[1]) == len(plan.keys) * len(plan.batches)
    assert "a dictionary takes" in find_verdict(result["find"]) and "400 keys are found" in find_verdict(result["find"])
    result["decode"] = [line | {"over": 0.01 * place} for place, line in enumerate(result["decode"])]
    assert "at batch 1 +1.0% with 10 keys, +2.0% with 400" in verdict(result)


def test_keys_are_distinct_and_some_are_the_texts_own(place):
    classes = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(0))
    keys = random_keys(classes, 200, 5, 1000)
    assert keys.shape == (200, 4) and len(np.unique(keys, axis=0)) == 200
    pairs = {tuple(pair) for pair in classes.unfold(0, 2, 1).tolist()}
    assert [tuple(key[-2:].tolist()) in pairs for key in keys[:5]] == [True] * 5 and (keys[:5, :2] == -1).all()


def test_its_patch_is_right_and_would_write_if_its_probes_opened(place):
    bases = load_bases(place[1], 0)
    keys = random_keys(torch.arange(40) % 7 + 40, 12, 6, 250)
    patch = patch_of(keys, "keys", bases)
    check_patch(patch, refuse("keys"))
    ids = torch.arange(40)[None] % 7 + 40
    base = bases.new().eval()
    with torch.no_grad():
        said = base(ids).logits
        assert torch.equal(apply_patch(bases.new().eval(), patch, bases.tokenizer)(ids).logits, said)
        opened = replace(patch, name="opened", thresholds=np.full_like(patch.thresholds, -2.0))
        keyed = apply_patch(bases.new().eval(), opened, bases.tokenizer)(ids).logits
    assert not torch.equal(keyed, said)
