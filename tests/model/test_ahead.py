"""Rows that are retrieved before the pass that reads them: the pass and what follows it are as without."""

import pytest
import torch
from transformers import DynamicCache

from engrammar.config import DIALECTS
from models import END, PAD, VOCABULARY, tiny_model


def random_ids() -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))
    ids[0, 4] = END
    return ids


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("cached", ["by the model", "by the caller"])
@torch.no_grad()
def test_decoding_goes_on_from_a_pass_whose_rows_were_retrieved_ahead(dialect, cached):
    model, ids = tiny_model(dialect, 3), random_ids()
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = PAD, 0
    cache = DynamicCache(config=model.config) if cached == "by the caller" else None
    asked = {"attention_mask": mask[:, :6], "past_key_values": cache}
    out = model(ids[:, :6], retrieved=model.retrieve(ids[:, :6], **asked), **asked)
    assert cache is None or out.past_key_values is cache
    rest = model(ids[:, 6:], attention_mask=mask, past_key_values=out.past_key_values).logits
    torch.testing.assert_close(rest, model(ids, attention_mask=mask).logits[:, 6:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_another_cache_are_refused():
    model, ids = tiny_model("paper"), random_ids()
    first = model(ids[:, :6]).past_key_values
    new = DynamicCache(config=model.config)
    for made, given in ((None, first), (new, first), (new, None)):
        retrieved = model.retrieve(ids[:, 6:], past_key_values=made)
        with pytest.raises(ValueError, match="made with another cache"):
            model(ids[:, 6:], retrieved=retrieved, past_key_values=given)
