"""What `repeat_gain` says of a model that copies, and of one that does not."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from engrammar_lab.copying import repeat_gain
from token_sets import token_set

VOCABULARY, LENGTH = 50, 24


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    ids = torch.randint(VOCABULARY, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    return token_set(tmp_path_factory.mktemp("set"), vocab_size=VOCABULARY, train=ids, validation=ids)


def copier(input_ids, use_cache):
    """Two thirds on what followed the two ids when they last stood together; the rest on all ids alike."""
    probability = torch.full((*input_ids.shape, VOCABULARY), 1 / VOCABULARY)
    for row, ids in enumerate(input_ids.tolist()):
        for place in range(1, len(ids)):
            before = [back for back in range(1, place) if ids[back - 1 : back + 1] == ids[place - 1 : place + 1]]
            if before:
                follows = F.one_hot(torch.tensor(ids[before[-1] + 1]), VOCABULARY)
                probability[row, place] = 2 / 3 * follows + 1 / 3 / VOCABULARY
    return SimpleNamespace(logits=probability.log())


def test_a_copier_gains_what_its_probabilities_say(tokens):
    gain = torch.tensor(2 / 3 * VOCABULARY + 1 / 3).log()  # of a token whose two before have stood together
    found = repeat_gain(copier, tokens, LENGTH)
    assert gain * (LENGTH // 2 - 2) / (LENGTH // 2 - 1) == pytest.approx(found, rel=0.03)


def test_a_model_that_looks_at_one_token_gains_nothing(tokens):
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    found = repeat_gain(lambda input_ids, use_cache: SimpleNamespace(logits=table[input_ids]), tokens, LENGTH)
    assert found == pytest.approx(0.0, abs=1e-5)
