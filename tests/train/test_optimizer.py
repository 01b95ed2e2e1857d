import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from engrammar.table import SparseTable
from engrammar.train.optimizer import Muon, OptimizerSettings, build_optimizer, clip_grad_norm, orthogonalize
from engrammar.train.row_optimizers import LazyAdam, RowAdam, Sinkhorn
from models import tiny_model


def sparse_rows(rows, values, num_rows):
    """An uncoalesced gradient, as backward leaves it."""
    size = (num_rows, values.shape[1])
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, size, check_invariants=True)


class Table(SparseTable):
    def __init__(self, num_rows, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, 7).to(dtype))


class Memory(nn.Module):
    """Table rows into a hidden state; its parameter names are those that build_optimizer sorts by."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = Table(11, dtype)
        self.value = nn.Linear(7, 5)
        self.conv = nn.Conv1d(5, 5, 4, groups=5, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(3, 5))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(5, 3, bias=False)
        self.gate_proj = nn.Linear(5, 9, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 9, 5))


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 5)
        self.memory = Memory(dtype)
        self.mlp = Mlp()
        self.attn_hc = nn.Module()
        self.attn_hc.fn = nn.Parameter(torch.randn(3, 10))
        self.hc_fn = nn.Parameter(torch.randn(2, 10))
        self.scale = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(5, 13, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


EXPECTED_GROUPS = {
    "muon": {"memory.value.weight", "mlp.gate_proj.weight", "mlp.experts"},
    "adamw_decay": {"embed_tokens.weight", "memory.conv.weight", "mlp.gate.weight", "attn_hc.fn", "hc_fn"},
    "adamw_no_decay": {"memory.value.bias", "memory.norm_weight", "scale"},
    "memory": {"memory.table.weight"},
}


def build(model, *, lr=0.004, weight_decay=0.1, **choices):
    settings = OptimizerSettings(**choices)
    return build_optimizer(model, settings, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), eps=1e-8)


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    table = model.memory.table.weight
    values = torch.randn(4, 7, generator=generator).to(table.dtype)
    table.grad = sparse_rows([seed % 11, 2, 2, 10], values, 11)


def names_by_group(model, optimizer):
    names = {id(param): name for name, param in model.named_parameters()}
    return {group["name"]: {names[id(param)] for param in group["params"]} for group in optimizer.param_groups}


def displacement(optimizer_class, start, gradients, **settings):
    param = nn.Parameter(start.clone())
    optimizer = optimizer_class([param], lr=0.02, weight_decay=0.1, momentum=0.9, **settings)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach() - start


@pytest.mark.parametrize("shape", [(17, 33), (33, 17), (7, 7), (1, 5)])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.02)])
def test_muon_equals_torch_muon(shape, precision, tolerance, monkeypatch):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ours = displacement(Muon, start, gradients)
    if precision == "fp32":  # torch's iterates in bf16; without that cast the two agree closely
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    theirs = displacement(torch.optim.Muon, start, gradients, adjust_lr_fn="match_rms_adamw")
    assert (ours - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("shape", [(3, 9, 5), (5, 6, 13)])
def test_muon_on_a_stack_equals_its_matrices_one_by_one(shape):
    torch.manual_seed(1)
    start, gradients = torch.randn(shape), torch.randn(3, *shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    stack = displacement(Muon, start, gradients)
    for expert in range(shape[0]):
        alone = displacement(Muon, start[expert], gradients[:, expert])
        torch.testing.assert_close(stack[expert], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(17, 33), (3, 33, 17), (1, 9, 31)])
def test_orthogonalized_update_has_singular_values_near_one(shape):
    torch.manual_seed(2)
    singular_values = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e3))
    assert singular_values.min() > 0.65 and singular_values.max() < 1.25


def test_orthogonalizing_keeps_directions_and_leaves_zero_matrices_zero():
    torch.manual_seed(3)
    matrix = torch.randn(9, 5)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    update = orthogonalize(torch.stack([matrix, torch.zeros(9, 5)]))
    singular_values = left.mT @ update[0] @ right.mT
    torch.testing.assert_close(singular_values, singular_values.diagonal().diag(), rtol=0, atol=1e-5)
    assert (singular_values.diagonal() > 0.65).all()
    assert (update[1] == 0).all()


def test_muon_refuses_vectors_and_sparse_gradients():
    with pytest.raises(ValueError, match=r"shape \[5\]"):
        Muon([nn.Parameter(torch.ones(5))], lr=0.1)
    param = nn.Parameter(torch.ones(7, 3))
    param.grad = sparse_rows([1], torch.ones(1, 3), 7)
    with pytest.raises(ValueError, match="sparse; allowed in Muon: dense"):
        Muon([param], lr=0.1).step()


def test_parameters_are_sorted_by_what_they_are():
    model = Model()
    optimizer = build(model)
    assert names_by_group(model, optimizer) == EXPECTED_GROUPS
    settings = {group["name"]: (group["lr"], group.get("weight_decay")) for group in optimizer.param_groups}
    assert settings == {
        "muon": (0.004, 0.1),
        "adamw_decay": (0.004, 0.1),
        "adamw_no_decay": (0.004, 0.0),
        "memory": (0.02, None),
    }
    num_grouped = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    assert num_grouped == sum(param.numel() for param in model.parameters())


def test_an_untied_head_joins_the_embeddings_and_matrices_can_too():
    model = Model()
    model.lm_head.weight = nn.Parameter(torch.randn(13, 5))
    expected = EXPECTED_GROUPS["adamw_decay"] | {"lm_head.weight"}
    assert names_by_group(model, build(model))["adamw_decay"] == expected
    groups = names_by_group(model, build(model, matrices="adamw"))
    assert groups["adamw_decay"] == expected | EXPECTED_GROUPS["muon"]
    assert list(groups) == ["adamw_decay", "adamw_no_decay", "memory"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(model)
    model.memory.table.requires_grad_(True)
    assert names_by_group(model, build(model)) == {"memory": {"memory.table.weight"}}


def test_a_step_moves_every_parameter_with_a_gradient():
    torch.manual_seed(7)
    model = Model()
    optimizer = build(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    fill_gradients(model, 0)
    assert optimizer.step(lambda: 1.5) == 1.5
    assert all((param != before[name]).any() for name, param in model.named_parameters())
    assert set(optimizer.state) == set(model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_scheduler_scales_every_group_from_its_own_lr():
    model = Model()
    optimizer = build(model)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    fill_gradients(model, 0)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.002, 0.002, 0.002, 0.01]
    assert [group["lr"] for inner in optimizer.inner for group in inner.param_groups] == [0.002, 0.002, 0.002, 0.01]


@pytest.mark.parametrize("memory", ["adam", "row_adam", "sinkhorn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_an_uninterrupted_one(dtype, memory, tmp_path):
    torch.manual_seed(8)
    model, resumed_model = Model(dtype), Model(dtype)
    optimizer = build(model, memory=memory)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(3):
        fill_gradients(model, step)
        optimizer.step()
        scheduler.step()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed_model.load_state_dict(saved[0])
    resumed = build(resumed_model, lr=7.0, memory=memory)
    resumed_scheduler = LambdaLR(resumed, lambda step: 0.9**step)
    resumed.load_state_dict(saved[1])
    resumed_scheduler.load_state_dict(saved[2])
    for step in range(3, 6):
        for one_model, one_optimizer, one_scheduler in (
            (model, optimizer, scheduler),
            (resumed_model, resumed, resumed_scheduler),
        ):
            fill_gradients(one_model, step)
            one_optimizer.step()
            one_scheduler.step()
    for param, resumed_param in zip(model.parameters(), resumed_model.parameters()):
        assert torch.equal(param, resumed_param)
        for key, value in optimizer.state[param].items():
            assert value.dtype == resumed.state[resumed_param][key].dtype
            assert torch.equal(value, resumed.state[resumed_param][key])
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in resumed.param_groups]


def test_group_dicts_stay_shared_after_a_load():
    torch.manual_seed(9)
    model = Model()
    optimizer = build(model)
    scheduler = LambdaLR(optimizer, lambda step: float(step == 0))
    fill_gradients(model, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    inner_groups = [group for inner in optimizer.inner for group in inner.param_groups]
    assert [id(group) for group in optimizer.param_groups] == [id(group) for group in inner_groups]
    scheduler.step()  # every lr is 0 from here
    before = [param.detach().clone() for param in model.parameters()]
    fill_gradients(model, 1)
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before))


def test_accelerate_wraps_and_steps_it():
    torch.manual_seed(10)
    model, plain_model = Model(), Model()
    plain_model.load_state_dict(model.state_dict())
    wrapped, plain = Accelerator(cpu=True).prepare(build(model)), build(plain_model)
    scheduler, plain_scheduler = (LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in (wrapped, plain))
    for step in range(3):
        fill_gradients(model, step)
        fill_gradients(plain_model, step)
        wrapped.step()
        plain.step()
        scheduler.step()
        plain_scheduler.step()
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate's own globals
    GradientState._reset_state()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain_model.parameters()))


def test_groups_are_fixed_and_their_matrices_go_to_muon_or_adamw():
    with pytest.raises(ValueError, match=r"matrices is 'sgd'; allowed: muon, adamw\."):
        build(Model(), matrices="sgd")
    optimizer = build(Model())
    with pytest.raises(ValueError, match="fixed groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 4


def test_tables_go_to_the_row_optimizer_of_that_name():
    for memory, expected in (("adam", LazyAdam), ("row_adam", RowAdam), ("sinkhorn", Sinkhorn)):
        inner = build(Model(torch.bfloat16), memory=memory, memory_rounding="stochastic").inner[-1]
        assert type(inner) is expected
        (group,) = inner.param_groups
        assert (group["name"], group["lr"], group["rounding"]) == ("memory", 0.02, "stochastic")
        assert group.get("betas", (0.9, group.get("beta2", 0.95))) == (0.9, 0.95)
    with pytest.raises(ValueError, match=r"memory is 'sgd'; allowed: adam, row_adam, sinkhorn, dense_adam\."):
        build(Model(), memory="sgd")
    with pytest.raises(ValueError, match=r"memory_rounding is 'up'; allowed: nearest, stochastic\."):
        build(Model(), memory_rounding="up")


def test_a_copied_model_keeps_its_tables():
    """`copy.deepcopy` makes new parameters without the attributes of the old ones: averaging and PEFT copy models."""
    model = tiny_model("paper")
    for copied in (copy.deepcopy(model), copy.copy(model)):
        optimizer = build(copied)
        (rows,) = (group["params"] for group in optimizer.param_groups if group["name"] == "memory")
        assert [id(row) for row in rows] == [id(table.weight) for table in copied.model.memory.tables.values()]
        assert optimizer.rows is not None and len(rows) == 2


def test_a_number_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"memory_lr_scale is -1; allowed: 0 or more\."):
        OptimizerSettings(memory_lr_scale=-1)
    with pytest.raises(ValueError, match=r"max_grad_norm is 0; allowed: over 0"):
        OptimizerSettings(max_grad_norm=0)


def test_state_of_other_groups_or_another_table_is_refused():
    model = Model()
    optimizer = build(model, memory="adam")
    fill_gradients(model, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="saved groups"):
        build(Model(), matrices="adamw", memory="adam").load_state_dict(saved)
    wider = Model()
    wider.memory.table = Table(12, torch.float32)
    with pytest.raises(ValueError, match=r"shape \(11, 7\); this table.s is \(12, 7\)"):
        build(wider, memory="adam").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"holds \['exp_avg', .*Sinkhorn needs \['momentum_buffer'\]: check `memory`"):
        build(Model(), memory="sinkhorn").load_state_dict(saved)


def gradients_twice():
    """Equal gradients on two sets of parameters: one with sparse tables, one all dense."""
    torch.manual_seed(11)
    shapes = [(3, 5), (7,), (11, 3), (13, 5)]
    params, dense_params = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    params[0].grad, params[1].grad = torch.randn(3, 5), torch.randn(7)
    params[2].grad = sparse_rows([4, 4, 0, 4], torch.randn(4, 3), 11)
    params[3].grad = sparse_rows([12], torch.randn(1, 5), 13)
    for param, dense in zip(params, dense_params):
        dense.grad = param.grad.to_dense() if param.grad.is_sparse else param.grad.clone()
    return [*params, nn.Parameter(torch.zeros(2))], dense_params  # the last has no gradient


@pytest.mark.parametrize("max_norm", [0.3, 2.0, 1e3, math.inf])
def test_clipping_equals_torch_on_densified_gradients(max_norm):
    params, dense_params = gradients_twice()
    norm = clip_grad_norm(iter(params), max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(dense_params, max_norm))
    tolerance = {"rtol": 0, "atol": 0} if max_norm > norm else {}  # bits stay when the norm is under the limit
    for param, dense in zip(params, dense_params):
        gradient = param.grad.to_dense() if param.grad.is_sparse else param.grad
        torch.testing.assert_close(gradient, dense.grad, **tolerance)
    assert params[2].grad.is_coalesced() and params[2].grad.values().shape == (2, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_gradients_alone(bad):
    params, dense_params = gradients_twice()
    params[1].grad[3] = bad
    assert not clip_grad_norm(params, 0.1).isfinite()
    assert torch.equal(params[0].grad, dense_params[0].grad)
    assert torch.equal(params[2].grad.to_dense(), dense_params[2].grad)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_limit_that_is_not_positive_is_refused(max_norm):
    with pytest.raises(ValueError, match="max_grad_norm is .*; allowed: over 0"):
        clip_grad_norm([], max_norm)
