"""Rows are counted by tier; caches tell their hits; what is read is the same, and the model is left as it was."""

import pytest
import torch

from attached_models import attached_model, base_model, tokenizer
from engrammar.attach import load_attached, save_attached
from engrammar.attach.attaching import attachment_of
from engrammar_explore.looking import see
from engrammar_explore.traffic import Traffic

TEXT = "w3 w4 w5 w6 w3 w4 w7"
ROWS = 7 * 4  # tokens, and two heads of two orders


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "one"
    save_attached(attached_model("llama"), folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "tier"),
    [
        ({"memory": "ram"}, "RAM"),
        ({"memory": "disk"}, "disk"),
        ({"memory": "disk", "cache_rows": 64}, "cache in front of disk"),
    ],
)
def test_each_tier_counts_its_rows_and_gives_the_same(adapter, settings, tier):
    model = load_attached(base_model("llama"), adapter, tokenizer(), **settings).requires_grad_(False)
    ids = tokenizer()(TEXT, return_tensors="pt").input_ids
    plain = model(ids).logits
    stores = dict(attachment_of(model)["default"].memory.source.stores)
    traffic = Traffic(model)
    assert torch.equal(model(ids).logits, plain)
    first, second = traffic.take(), traffic.take()
    assert [(one["layer"], one["tier"], one["rows"]) for one in first] == [(1, tier, ROWS), (2, tier, ROWS)]
    assert [one["rows"] for one in second] == [0, 0] and all(one["microseconds"] > 0 for one in first)
    if "cache_rows" in settings:
        for _ in range(3):
            model(ids)
        last = traffic.take()
        assert all(one["hits"] + one["misses"] == 3 * ROWS and one["hits"] > 0 for one in last)
    else:
        assert "hits" not in first[0]
    traffic.close()
    assert attachment_of(model)["default"].memory.source.stores == stores


@torch.no_grad()
def test_rows_that_are_weights_are_counted_too():
    model = attached_model("llama")
    seen = see(model, tokenizer(), TEXT)
    assert [(one["tier"], one["rows"]) for one in seen.traffic] == [("weights of the model", ROWS)] * 2
    assert not attachment_of(model)["default"].memory.table(1)._forward_hooks
