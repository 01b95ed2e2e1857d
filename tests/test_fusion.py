"""Fusion equals its plain twin, and a row in pieces equals the row at once."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engrammar.config import MemoryConfig
from engrammar.fusion import Fusion, rms_norm
from engrammar.reference import fuse_reference

BASE = MemoryConfig(layers=(0,), rows_per_head=(31, 37), num_heads=2, head_dim=3)


def make(config: MemoryConfig, num_branches: int, hidden_size: int = 11) -> Fusion:
    """Every weight random and of order one, so that none is silent."""
    fusion = Fusion(config, hidden_size=hidden_size, num_branches=num_branches)
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("norm"):
                parameter.mul_(0.3).add_(1)
    return fusion


def make_inputs(fusion: Fusion, batch: int = 2, num_tokens: int = 19) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(1)
    hidden_BTMD = torch.randn(batch, num_tokens, fusion.num_branches, fusion.hidden_size, generator=generator)
    return hidden_BTMD, torch.randn(batch, num_tokens, fusion.config.memory_dim, generator=generator)


def of_order(max_ngram_size: int, **settings) -> MemoryConfig:
    rows = tuple(31 + order for order in range(max_ngram_size - 1))
    return replace(BASE, max_ngram_size=max_ngram_size, rows_per_head=rows, **settings)


@pytest.mark.parametrize("num_branches", [1, 2, 3, 4])
@pytest.mark.parametrize("max_ngram_size", [2, 3, 4, 5])
@pytest.mark.parametrize("conv_kernel", [0, 4])
@pytest.mark.parametrize("gate", ["signed_root", "sigmoid"])
@pytest.mark.parametrize("bias", ["none", "learned"])
def test_values_and_gradients_equal_the_plain_twins(num_branches, max_ngram_size, conv_kernel, gate, bias):
    fusion = make(of_order(max_ngram_size, conv_kernel=conv_kernel, gate=gate, bias=bias), num_branches)
    inputs = make_inputs(fusion)
    torch.testing.assert_close(fusion(*inputs), fuse_reference(fusion, *inputs), rtol=1e-5, atol=1e-5)
    # The signed root's slope, 1/(2 sqrt|s|), magnifies fp32's rounding of a score near 0: gradients are of fp64.
    fusion.double()
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    wanted = [*inputs, *fusion.parameters()]
    fast, plain = fusion(*inputs), fuse_reference(fusion, *inputs)
    assert fast.shape == inputs[0].shape
    weights = torch.randn(fast.shape, generator=torch.manual_seed(2))
    gradients = [torch.autograd.grad((output * weights).mean(), wanted) for output in (fast, plain)]
    for ours, theirs in zip(*gradients):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("conv_kernel", "num_tokens"), [(2, 1), (2, 2), (3, 5), (7, 3), (4, 9), (4, 10)])
def test_rows_shorter_than_the_window_equal_the_plain_twin(conv_kernel, num_tokens):
    fusion = make(of_order(3, conv_kernel=conv_kernel), 2)
    inputs = make_inputs(fusion, num_tokens=num_tokens)
    torch.testing.assert_close(fusion(*inputs), fuse_reference(fusion, *inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_norm_eps", [None, 1e-6, 1e-2])
def test_every_epsilon_reaches_its_norm(key_norm_eps):
    fusion = make(replace(BASE, key_norm_eps=key_norm_eps, conv_norm_eps=3e-3), 2)
    hidden_BTMD, embedding_BTE = make_inputs(fusion)
    inputs = hidden_BTMD * 1e-2, embedding_BTE * 1e-2  # small enough for epsilon to matter
    torch.testing.assert_close(fusion(*inputs), fuse_reference(fusion, *inputs), rtol=1e-5, atol=1e-5)
    other = make(replace(BASE, key_norm_eps=0.1, conv_norm_eps=3e-3), 2)
    assert (fusion(*inputs) - other(*inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("cuts", [[1], [18], [9], [5, 6, 7], list(range(1, 19))], ids=str)
@pytest.mark.parametrize("max_ngram_size", [2, 4])
def test_chunks_with_a_carried_window_equal_the_whole(cuts, max_ngram_size):
    fusion = make(of_order(max_ngram_size, bias="learned"), 3)
    hidden_BTMD, embedding_BTE = make_inputs(fusion)
    whole = fusion(hidden_BTMD, embedding_BTE)
    edges = [0, *cuts, hidden_BTMD.shape[1]]
    window_BCS = torch.zeros(2, 3 * fusion.hidden_size, 0)
    parts = []
    for begin, end in zip(edges, edges[1:]):
        value_BTMD = fusion.gated_value(hidden_BTMD[:, begin:end], embedding_BTE[:, begin:end])
        normed_BCS = torch.cat([window_BCS, fusion.normed_value(value_BTMD)], dim=-1)
        parts.append(value_BTMD + fusion.convolve(normed_BCS, end - begin))
        window_BCS = normed_BCS[..., -fusion.config.conv_window :]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_no_position_sees_a_later_one():
    fusion = make(BASE, 2)
    hidden_BTMD, embedding_BTE = make_inputs(fusion)
    before = fusion(hidden_BTMD, embedding_BTE)
    changed = embedding_BTE.clone()
    changed[:, 7] += 1
    moved = (fusion(hidden_BTMD, changed) - before).abs().amax(dim=(0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == [7, 10, 13, 16]  # itself, and dilated by N=3 up to the fourth tap


def test_dead_positions_are_exactly_zero_and_feed_nothing_into_the_convolution():
    fusion = make(replace(BASE, bias="learned"), 2)
    hidden_BTMD, embedding_BTE = make_inputs(fusion)
    dead_BT = torch.zeros(2, 19, dtype=torch.bool)
    dead_BT[0, :6] = dead_BT[1, 4] = dead_BT[1, 18] = True
    value_BTMD = fusion.gated_value(hidden_BTMD, embedding_BTE, dead_BT)
    assert (value_BTMD[dead_BT] == 0).all() and (value_BTMD[~dead_BT] != 0).any(dim=(-1, -2)).all()
    normed_BTC = fusion.normed_value(value_BTMD).transpose(1, 2)
    assert (normed_BTC[dead_BT] == 0).all()
    output_BTMD = fusion(hidden_BTMD, embedding_BTE, dead_BT)
    assert (output_BTMD[0, :6] == 0).all()  # padding at the left stays silent through the convolution too
    alone = fusion(hidden_BTMD[:1, 6:], embedding_BTE[:1, 6:])
    torch.testing.assert_close(output_BTMD[:1, 6:], alone, rtol=1e-5, atol=1e-5)


def test_without_a_convolution_dead_outputs_are_exactly_zero_anywhere():
    fusion = make(replace(BASE, conv_kernel=0, bias="learned"), 2)
    dead_BT = torch.rand(2, 19, generator=torch.manual_seed(3)) < 0.4
    output_BTMD = fusion(*make_inputs(fusion), dead_BT)
    assert (output_BTMD[dead_BT] == 0).all()


def test_a_new_convolution_is_silent_and_the_demos_is_not():
    for conv_init, silent in (("zero", True), ("default", False)):
        fusion = Fusion(replace(BASE, conv_init=conv_init), hidden_size=11, num_branches=2)
        inputs = make_inputs(fusion)
        assert torch.equal(fusion(*inputs), fusion.gated_value(*inputs)) == silent


def test_the_gate_is_the_papers_equation():
    """One branch by hand: keys and queries of unit root mean square, score s, gate sigmoid(sign(s) sqrt(|s|))."""
    config = replace(BASE, head_dim=1, num_heads=1, conv_kernel=0, key_norm_eps=0.0)
    for gate, expected in (("signed_root", [2.0**0.5, -(2.0**0.5), 0.0]), ("sigmoid", [2.0, -2.0, 0.0])):
        fusion = Fusion(replace(config, gate=gate), hidden_size=4, num_branches=1)
        with torch.no_grad():
            fusion.projection.weight.zero_()
            fusion.projection.weight[:4, 1] = 1.0  # value: all ones times the second feature
            fusion.projection.weight[4:, 0] = 1.0  # key: all ones times the first
        queries = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1]])
        gate_BTM, value_BTD = fusion.gate(queries[None, :, None], torch.tensor([[[5.0, 7.0]]]).expand(1, 3, 2))
        torch.testing.assert_close(gate_BTM.flatten(), torch.sigmoid(torch.tensor(expected)))
        assert (value_BTD == 7).all()


@pytest.mark.parametrize("conv_kernel", [0, 4])
def test_without_a_gate_the_value_is_added_as_it_is_and_there_are_no_keys(conv_kernel):
    fusion = make(replace(BASE, gate="none", conv_kernel=conv_kernel, bias="learned"), 2)
    hidden_BTMD, embedding_BTE = make_inputs(fusion)
    value_BTD = fusion.projection(embedding_BTE)
    assert value_BTD.shape[-1] == fusion.hidden_size and not any("key" in name for name in fusion.state_dict())
    expected_BTMD = value_BTD[:, :, None].expand_as(hidden_BTMD)
    torch.testing.assert_close(fusion.gated_value(hidden_BTMD, embedding_BTE), expected_BTMD)
    output_BTMD = fusion(hidden_BTMD, embedding_BTE)
    torch.testing.assert_close(output_BTMD, fuse_reference(fusion, hidden_BTMD, embedding_BTE), rtol=1e-5, atol=1e-5)
    assert torch.equal(output_BTMD, fusion(hidden_BTMD + 1, embedding_BTE))
    dead_BT = torch.zeros(2, 19, dtype=torch.bool)
    dead_BT[1, 3] = True
    assert (fusion.gated_value(hidden_BTMD, embedding_BTE, dead_BT)[1, 3] == 0).all()


def test_every_branch_has_its_own_key_and_shares_the_value():
    fusion = make(replace(BASE, conv_kernel=0), 3)
    hidden_BTMD, embedding_BTE = make_inputs(fusion)
    alike = hidden_BTMD[:, :, :1].expand_as(hidden_BTMD)
    gate_BTM, value_BTD = fusion.gate(alike, embedding_BTE)
    assert (gate_BTM[..., 0] != gate_BTM[..., 1]).all()
    output_BTMD = fusion(alike, embedding_BTE)
    torch.testing.assert_close(output_BTMD, gate_BTM[..., None] * value_BTD[:, :, None])


def test_rms_norm_weighs_each_branch_apart():
    x = torch.randn(2, 3, 2, 5, generator=torch.manual_seed(0))
    weight = torch.randn(2, 5, generator=torch.manual_seed(1))
    ours = rms_norm(x, weight, 1e-6)
    for m in range(2):
        torch.testing.assert_close(ours[:, :, m], F.rms_norm(x[:, :, m], (5,), weight[m], 1e-6))


def test_bf16_fusion_takes_rows_of_any_dtype():
    fusion = make(BASE, 2).to(torch.bfloat16)
    hidden_BTMD, embedding_BTE = make_inputs(fusion)
    output_BTMD = fusion(hidden_BTMD.to(torch.bfloat16), embedding_BTE)
    assert output_BTMD.dtype == torch.bfloat16
