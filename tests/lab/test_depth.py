"""Depth instruments: HSIC and CKA against closed forms, LogitLens on models whose layers are known."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from engrammar_lab.depth import cka as cka_of
from engrammar_lab.depth import compare_depth, hsic, layer_streams, logit_lens, soft_alignment, validation_batches
from models import VOCABULARY, tiny_model
from token_sets import token_set


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 60)
    return token_set(tmp_path_factory.mktemp("tokens"), vocab_size=VOCABULARY, train=ids, validation=ids)


def song(x_nD, y_nD):
    """HSIC_1 as Song et al. (2012) write it, equation 5."""
    n = len(x_nD)
    k_nn, l_nn = ((z.double() @ z.double().T).fill_diagonal_(0) for z in (x_nD, y_nD))
    traced = float((k_nn @ l_nn).trace() - 2 / (n - 2) * (k_nn @ l_nn).sum())
    whole = traced + float(k_nn.sum() * l_nn.sum()) / ((n - 1) * (n - 2))
    return whole / (n * (n - 3))


def ratio(hsic_SS):
    own_S = hsic_SS.diagonal().sqrt()
    return hsic_SS / own_S / own_S[:, None]


def test_hsic_is_exact_on_matrices_small_enough_for_a_hand():
    first, last, cross = (torch.tensor([row]).T.float() for row in ([1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]))
    assert torch.allclose(
        hsic([first, last, cross]),
        torch.tensor([[1 / 6, 1 / 6, -1 / 12], [1 / 6, 1 / 6, -1 / 12], [-1 / 12, -1 / 12, 1 / 6]]).double(),
    )


def test_hsic_equals_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(7, width, generator=generator) + 1 for width in (1, 3, 11)]
    expected = [[song(x, y) for y in layers] for x in layers]
    assert torch.allclose(hsic(layers), torch.tensor(expected, dtype=torch.float64), rtol=1e-10)


def test_hsic_of_independent_activations_is_zero_in_expectation():
    generator = torch.Generator().manual_seed(1)
    draws, n = 3000, 6
    pairs = [[torch.randn(n, 3, generator=generator) + 1 for _ in range(2)] for _ in range(draws)]
    values = torch.stack([hsic(pair)[0, 1] for pair in pairs])
    error = float(values.std() / draws**0.5)
    assert abs(values.mean()) < 4 * error
    centred = [[x - x.mean(0) for x in pair] for pair in pairs]
    biased = torch.stack([((x @ x.T) * (y @ y.T)).sum() / (n - 1) ** 2 for x, y in centred])
    assert biased.mean() > 20 * error  # the estimator that this one replaces sees similarity here


def test_cka_does_not_see_rotation_scale_or_shift():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    other = torch.randn(9, 5, generator=generator)
    similarity = ratio(hsic([x, x.double() @ rotation.double() * 3, x, other]))
    assert torch.allclose(similarity[:3, :3], torch.ones(3, 3).double(), rtol=1e-5)
    assert similarity[0, 3] < 0.9
    widely = torch.randn(400, 5, generator=generator)
    assert ratio(hsic([widely, widely + 7]))[0, 1] > 0.95  # only in the limit: the diagonal is left out


def test_under_four_examples_are_refused():
    with pytest.raises(ValueError, match="4 or more"):
        hsic([torch.ones(3, 2)])


@pytest.mark.parametrize("num_branches", [1, 2])
def test_cka_of_minibatches_is_the_ratio_of_their_mean_hsics(tokens, num_branches):
    model, other = tiny_model("paper", num_branches), tiny_model(None, num_branches, seed=1, num_hidden_layers=2)
    found = torch.tensor(cka_of(model, other, tokens, length=8, batch_size=3), dtype=torch.float64)
    hsics = []
    for ids_BT, real_BT in validation_batches(tokens, length=8, batch_size=3):
        both = [s.mean(2)[real_BT] for each in (model, other) for s in layer_streams(each, ids_BT)]
        hsics.append([[song(x, y) for y in both] for x in both])
    assert len(hsics) == 3
    assert torch.allclose(found, ratio(torch.tensor(hsics, dtype=torch.float64).mean(0))[:5, 5:], rtol=1e-8)
    itself = torch.tensor(cka_of(model, model, tokens, length=8))
    assert torch.allclose(itself.diagonal(), torch.ones(5), atol=1e-6)
    assert torch.allclose(itself, itself.T, atol=1e-9)


@pytest.mark.parametrize("num_branches", [1, 3])
def test_the_last_lens_is_the_models_own_end(num_branches):
    model = tiny_model("paper", num_branches)
    ids = torch.arange(3, 17).view(2, 7)
    streams = layer_streams(model, ids)
    assert [tuple(s.shape) for s in streams] == [(2, 7, num_branches, 32)] * 5
    assert torch.equal(streams[0][:, :, 0], model.model.embed_tokens(ids))
    logits = model.lm_head(model.model.norm(model.model.collapse(streams[-1])))
    assert torch.equal(logits, model(ids, use_cache=False).logits)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)


class Adds(nn.Module):
    """A block that adds one vector at every token."""

    def __init__(self, vector):
        super().__init__()
        self.vector = vector

    def forward(self, streams, *args, **kwargs):
        return streams + self.vector


def planted(*vectors):
    model = tiny_model(None, num_hidden_layers=len(vectors))
    model.model.layers = nn.ModuleList(map(Adds, vectors))
    return model


def test_blocks_that_do_nothing_leave_no_distance(tokens):
    assert logit_lens(planted(0.0, 0.0, 0.0), tokens, length=8, batch_size=3) == [0.0] * 4


def test_the_distance_falls_where_a_block_sets_the_logits(tokens):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    model = planted(0.0, vector, 0.0)
    model.model.norm = nn.Identity()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()  # before the block, all ids are equally likely
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(4))
    chances = torch.softmax(model.lm_head.weight.detach().double() @ vector.double(), 0)
    from_uniform = math.log(VOCABULARY) + float((chances * chances.log()).sum())
    assert from_uniform > 0.5
    assert logit_lens(model, tokens, length=8) == pytest.approx([from_uniform] * 2 + [0, 0], rel=1e-4)


def test_padding_is_not_looked_at(tokens):
    model = tiny_model("paper")
    ids, distances = torch.from_numpy(tokens.read("validation", 0, 60)), []
    for start in range(0, 59, 7):
        first, *_, last = layer_streams(model, ids[None, start : start + 8])  # the last block is short, not padded
        final, lens = (model.lm_head(model.model.norm(s[0, :, 0])).log_softmax(-1).detach() for s in (last, first))
        distances += (final.exp() * (final - lens)).sum(-1).tolist()
    assert logit_lens(model, tokens, length=8, batch_size=4)[0] == pytest.approx(np.mean(distances), rel=1e-5)
    real = sum(int(real_BT.sum()) for _, real_BT in validation_batches(tokens, length=8, batch_size=2))
    assert real == 60 + 8  # nine blocks, each from the last token of the one before
    some = list(validation_batches(tokens, length=8, batch_size=2, num_tokens=17))
    assert [len(ids_BT) for ids_BT, _ in some] == [2, 1]


def test_the_index_is_the_shift_of_a_shifted_similarity():
    shift, num = 2, 9
    similarity = [[max(0.1, 1 - 0.3 * abs(j - i - shift)) for j in range(num)] for i in range(num - shift - 1)]
    assert soft_alignment(similarity, 3) == pytest.approx([i + shift for i in range(num - shift - 1)])
    assert soft_alignment([[0.1, 0.2, 0.7]]) == pytest.approx([(0.2 + 1.4) / 1.0])  # all three, being under five
    assert soft_alignment([[-5.0, 0.5, 0.5]], 3) == pytest.approx([1.5])


def test_a_layer_that_resembles_none_and_a_wrong_k_are_refused():
    with pytest.raises(ValueError, match="resembles none"):
        soft_alignment([[-0.1, 0.0]])
    for k in (0, 3):
        with pytest.raises(ValueError, match="allowed: 1 to the 2"):
            soft_alignment([[0.5, 0.5]], k)


def test_models_of_two_vocabularies_are_refused(tokens):
    with pytest.raises(ValueError, match="one tokenizer"):
        cka_of(tiny_model(None), tiny_model(None, vocab_size=60), tokens, length=8)


def test_a_pair_of_models_is_compared_in_plain_data(tokens):
    found = compare_depth(tiny_model("paper"), tiny_model(None, seed=1), tokens, length=8, k=2)
    assert json.loads(json.dumps(found)) == found
    assert [len(found["logit_lens"][name]) for name in ("memory", "plain")] == [5, 5]
    assert found["alignment"]["index"] == soft_alignment(found["cka"], 2)
    assert all(row[near] == max(row) for row, near in zip(found["cka"], found["alignment"]["nearest"]))
