"""The paper's ablation of per-branch keys: one key projection for all branches, beside one for each."""

import pytest
import torch

from engrammar.config import MemoryConfig
from engrammar.fusion import Fusion
from engrammar.reference import fuse_reference


def fusion_with(keys: str, branches: int) -> Fusion:
    torch.manual_seed(0)
    config = MemoryConfig(layers=(0,), rows_per_head=(11, 13), num_heads=1, head_dim=5, branch_keys=keys)
    fusion = Fusion(config, hidden_size=7, num_branches=branches)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_()
    return fusion


@pytest.mark.parametrize("keys", ["each", "shared"])
@pytest.mark.parametrize("branches", [1, 3])
def test_any_branch_keys_fuse_as_the_reference_does(keys, branches):
    fusion = fusion_with(keys, branches)
    hidden, embedding = torch.randn(2, 6, branches, 7), torch.randn(2, 6, 10)
    torch.testing.assert_close(fusion(hidden, embedding), fuse_reference(fusion, hidden, embedding))


def test_a_shared_key_is_every_branch_with_the_same_key():
    shared, each = fusion_with("shared", 3), fusion_with("each", 3)
    assert shared.projection.weight.shape == (2 * 7, 10) and shared.key_norm.shape == (1, 7)
    value, key = shared.projection.weight.detach().split(7)
    with torch.no_grad():
        each.projection.weight.copy_(torch.cat([value, key, key, key]))
        each.key_norm.copy_(shared.key_norm.expand(3, 7))
        for name in ("query_norm", "conv_norm", "conv_weight"):
            getattr(each, name).copy_(getattr(shared, name))
    hidden, embedding = torch.randn(2, 6, 3, 7), torch.randn(2, 6, 10)
    torch.testing.assert_close(shared(hidden, embedding), each(hidden, embedding))


def test_one_branch_has_the_same_weights_either_way():
    assert torch.equal(fusion_with("each", 1).projection.weight, fusion_with("shared", 1).projection.weight)
