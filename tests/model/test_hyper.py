"""The multi-branch residual: one branch is the plain residual; more are mixed without gain or loss."""

import pytest
import torch
from torch import nn

from engrammar.model.hyper import Collapse, Residual
from models import tiny_config, tiny_model


def random_residual(num_branches: int) -> Residual:
    torch.manual_seed(0)
    residual = Residual(tiny_config(None, num_branches), nn.RMSNorm(32))
    for parameter in residual.parameters():
        nn.init.normal_(parameter, std=0.3)
    return residual


def test_one_branch_is_the_plain_residual():
    residual, streams_BT1D = random_residual(1), torch.randn(2, 5, 1, 32)
    layer = nn.Linear(32, 32)
    expected = streams_BT1D[:, :, 0] + layer(residual.norm(streams_BT1D[:, :, 0]))
    assert torch.equal(residual(streams_BT1D, layer)[:, :, 0], expected)
    assert torch.equal(Collapse(tiny_config(None, 1))(streams_BT1D), streams_BT1D[:, :, 0])


@pytest.mark.parametrize("num_branches", [2, 3, 4])
def test_mixing_keeps_the_sum_of_the_streams(num_branches):
    """A doubly stochastic mix moves what the branches hold, and adds nothing: with f = 0 their sum stays."""
    residual, streams_BTMD = random_residual(num_branches), torch.randn(2, 5, num_branches, 32)
    mixed = residual(streams_BTMD, torch.zeros_like)
    torch.testing.assert_close(mixed.sum(2), streams_BTMD.sum(2), atol=1e-4, rtol=1e-4)
    assert (mixed - streams_BTMD).abs().max() > 1e-2


def test_the_sublayer_reads_a_mix_and_writes_to_every_branch():
    residual, streams_BTMD = random_residual(3), torch.randn(2, 5, 3, 32)
    silent = residual(streams_BTMD, torch.zeros_like)
    spoken = residual(streams_BTMD, torch.ones_like) - silent  # the weight of each branch, the same for all widths
    assert spoken.shape == (2, 5, 3, 32) and (spoken > 0).all() and (spoken < 2).all()
    torch.testing.assert_close(spoken, spoken[..., :1].expand_as(spoken))


def test_branches_that_start_equal_come_apart_through_memory():
    model = tiny_model("paper", 3)
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5, 6]]))
    (streams_BTMD,) = seen
    assert (streams_BTMD[:, :, 0] - streams_BTMD[:, :, 1]).abs().max() > 1e-4
