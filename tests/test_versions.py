"""What older versions of transformers lack is the same as what newer ones have."""

import importlib
import sys
from importlib import metadata

import pytest
import torch
from transformers import cache_utils, modeling_utils

from engrammar import versions


def test_logits_to_keep_mean_what_they_mean_in_transformers():
    hidden = torch.randn(2, 7, 3)
    wanted = {0: hidden, 1: hidden[:, -1:], 4: hidden[:, 3:], 9: hidden}
    for count, expected in wanted.items():
        assert torch.equal(versions._slice_logits_to_keep(hidden, count), expected)
        assert torch.equal(versions.slice_logits_to_keep(hidden, count), expected)
    positions = torch.tensor([5, 0])
    assert torch.equal(versions._slice_logits_to_keep(hidden, positions), hidden[:, positions])
    assert torch.equal(versions.slice_logits_to_keep(hidden, positions), hidden[:, positions])


def test_positions_of_each_row_are_refused_where_transformers_does_not_know_them():
    with pytest.raises(ValueError, match=r"logits_to_keep has 2 dimensions; .* takes one"):
        versions._slice_logits_to_keep(torch.zeros(2, 7, 3), torch.zeros(2, 7, dtype=torch.bool))


@pytest.mark.skipif(not hasattr(cache_utils, "DummyLayer"), reason="this transformers has none to compare with")
def test_a_stand_in_layer_says_what_transformers_own_says():
    own, stand_in = cache_utils.DummyLayer(), versions._DummyLayer()
    for name in ("supports_early_init", "is_compileable", "is_croppable", "is_initialized", "keys", "values"):
        assert getattr(stand_in, name) == getattr(own, name)
    assert stand_in.get_max_length() == own.get_max_length()
    assert versions.DummyLayer is cache_utils.DummyLayer
    assert versions.slice_logits_to_keep is modeling_utils.slice_logits_to_keep


def test_training_is_refused_where_it_was_not_tested():
    with pytest.raises(ValueError, match=r"tested with transformers 5\.23, and 5\.19\.0 is installed"):
        versions.check_can_train("5.19.0")
    versions.check_can_train("5.23.0")


def test_another_torchtitan_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.2")
    monkeypatch.delitem(sys.modules, "engrammar.titan", raising=False)
    with pytest.raises(ImportError, match=r"works with torchtitan 0.3.0, and 0.2.2 is installed: pip install"):
        importlib.import_module("engrammar.titan")
