import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engrammar.addressing import derive_geometry
from engrammar.config import MemoryConfig
from engrammar.table import MemoryTable
from engrammar.train.row_optimizers import (
    MAX_COUNT,
    ROW_OPTIMIZERS,
    LazyAdam,
    RowAdam,
    Sinkhorn,
    balance_,
    round_stochastically,
    state_bytes_per_row,
    sum_by_row,
)

ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
KINDS = list(ROW_OPTIMIZERS)


def sparse_rows(rows, values, num_rows):
    """An uncoalesced gradient, as backward leaves it."""
    size = (num_rows, values.shape[1])
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, size, check_invariants=True)


def random_touches(num_steps, num_rows, row_width, seed=5):
    """(rows, gradients) of each step; row r of num_rows is touched in about r / num_rows of the steps, some twice."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        touched = [row for row in range(num_rows) if torch.rand((), generator=generator) < row / num_rows]
        rows = touched + touched[::3]
        scale = torch.logspace(-2, 2, num_rows)[rows, None]
        yield rows, torch.randn(len(rows), row_width, generator=generator) * scale


def summed(rows, gradients):
    """Plain twin of `sum_by_row`: {row: its gradients summed}, in fp64."""
    sums = {}
    for row, gradient in zip(rows, gradients.double()):
        sums[row] = sums.get(row, 0) + gradient
    return sums


class PlainLazyAdam:
    """Row by row, in fp64."""

    def __init__(self, start):
        self.table, self.count = start.double(), torch.zeros(len(start))
        self.first, self.second = torch.zeros_like(self.table), torch.zeros_like(self.table)

    def step(self, rows, gradients, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8):
        for row, gradient in summed(rows, gradients).items():
            self.count[row] += 1
            count = self.count[row].item()
            self.first[row] = beta1 * self.first[row] + (1 - beta1) * gradient
            self.second[row] = beta2 * self.second[row] + (1 - beta2) * gradient**2
            corrected = self.first[row] / (1 - beta1**count)
            self.table[row] -= lr * corrected / ((self.second[row] / (1 - beta2**count)).sqrt() + eps)


class PlainRowAdam:
    """The corrected moment is kept to 16 significant bits."""

    def __init__(self, start):
        self.table, self.moment, self.count = start.double(), torch.zeros(len(start)).double(), torch.zeros(len(start))

    def step(self, rows, gradients, lr=0.01, beta2=0.99, eps=1e-8):
        for row, gradient in summed(rows, gradients).items():
            uncorrected = beta2 * self.moment[row] * (1 - beta2 ** self.count[row].item())
            self.count[row] += 1
            uncorrected += (1 - beta2) * (gradient**2).mean()
            moment = uncorrected / (1 - beta2 ** self.count[row].item())
            self.table[row] -= lr * gradient / (moment.sqrt() + eps)
            fraction, exponent = torch.frexp(moment)
            self.moment[row] = torch.ldexp((fraction * 2**16).round(), exponent - 16)


def plain_balance(update):
    """11 normalizations one after another, of the rows that are not small."""
    update, kept = update.clone(), update.norm(dim=1) > 1e-3 * update.norm(dim=1).mean()
    balanced = update[kept]
    for turn in range(11):
        balanced = balanced / balanced.norm(dim=1 - turn % 2, keepdim=True)
    update[kept], update[~kept] = balanced * math.sqrt(update.shape[1]), 0
    return update


class PlainSinkhorn:
    def __init__(self, start):
        self.table, self.momentum = start.double(), torch.zeros_like(start).double()

    def step(self, rows, gradients, lr=0.01):
        sums = summed(rows, gradients)
        updates = {}
        for row, gradient in sums.items():
            self.momentum[row] = 0.95 * self.momentum[row] + 0.05 * gradient
            updates[row] = 0.95 * self.momentum[row] + 0.05 * gradient  # Nesterov
        if updates:
            for row, update in zip(updates, plain_balance(torch.stack(list(updates.values())))):
                self.table[row] -= lr * update


@pytest.mark.parametrize(
    "optimizer_class, settings, twin_class",
    [
        (LazyAdam, ADAM, PlainLazyAdam),
        (RowAdam, {"lr": 0.01, "beta2": 0.99, "eps": 1e-8}, PlainRowAdam),
        (Sinkhorn, {"lr": 0.01}, PlainSinkhorn),
    ],
)
@pytest.mark.parametrize("num_rows, row_width", [(23, 5), (2, 7), (9, 1)])
def test_equals_a_plain_twin_and_leaves_untouched_rows_alone(
    optimizer_class, settings, twin_class, num_rows, row_width
):
    torch.manual_seed(4)
    start = torch.randn(num_rows, row_width)
    table, twin = nn.Parameter(start.clone()), twin_class(start)
    optimizer = optimizer_class([table], **settings)
    for rows, gradients in random_touches(40, num_rows, row_width):
        table.grad = sparse_rows(rows, gradients, num_rows)
        before = table.detach().clone()
        state_before = {key: value.clone() for key, value in optimizer.state[table].items()}
        optimizer.step()
        twin.step(rows, gradients)
        untouched = [row for row in range(num_rows) if row not in rows]
        assert torch.equal(table[untouched], before[untouched])
        for key, value in state_before.items():
            assert torch.equal(optimizer.state[table][key][untouched], value[untouched])
        torch.testing.assert_close(table.double(), twin.table, rtol=0, atol=1e-6)
    often = slice(num_rows // 2, None)
    assert torch.equal(table[0], start[0]) and (table[often] != start[often]).any(dim=1).all()


def test_rows_touched_at_every_step_follow_torch_adam():
    torch.manual_seed(4)
    table, dense = (nn.Parameter(torch.arange(91.0).view(13, 7) / 40) for _ in range(2))
    ours, theirs = LazyAdam([table], **ADAM), torch.optim.Adam([dense], **ADAM)
    for _ in range(25):
        rows = torch.cat([torch.randperm(13), torch.randint(13, (8,))]).tolist()  # some rows twice
        table.grad = sparse_rows(rows, torch.randn(21, 7), 13)
        dense.grad = table.grad.to_dense()
        ours.step()
        theirs.step()
        torch.testing.assert_close(table, dense, rtol=0, atol=1e-6)


def test_each_row_follows_an_adam_that_saw_its_touches_alone():
    torch.manual_seed(5)
    start = torch.randn(9, 5)
    table = nn.Parameter(start.clone())
    lone_rows = [nn.Parameter(start[row].clone()) for row in range(9)]
    ours, lone_adams = LazyAdam([table], **ADAM), [torch.optim.Adam([row], **ADAM) for row in lone_rows]
    for step in range(30):
        touched = [row for row in range(8) if torch.rand(()) < row / 8 and (row != 3 or step > 20)]
        table.grad = sparse_rows(touched, torch.randn(len(touched), 5), 9)
        ours.step()
        for row, gradient in zip(touched, table.grad.coalesce().values()):
            lone_rows[row].grad = gradient
            lone_adams[row].step()
    torch.testing.assert_close(table, torch.stack(lone_rows), rtol=0, atol=1e-6)
    assert ours.state[table]["step"][3] < 9 < ours.state[table]["step"][7]


def test_a_row_of_one_element_in_row_adam_follows_an_adam_without_momentum():
    torch.manual_seed(6)
    table, lone = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(1))
    ours = RowAdam([table], lr=0.01, beta2=0.97, eps=1e-8)
    theirs = torch.optim.Adam([lone], lr=0.01, betas=(0.0, 0.97), eps=1e-8)
    for _ in range(MAX_COUNT + 200):
        table.grad = sparse_rows([1], torch.randn(1, 1), 3)
        lone.grad = table.grad.coalesce().values()[0]
        ours.step()
        theirs.step()
    # The count stopped at 255, where the bias correction of beta2 = 0.97 is 1 - 0.0004. Errors add up over 455 steps.
    torch.testing.assert_close(table[1], lone, rtol=0, atol=1e-4)
    assert ours.state[table]["moment_and_count"][1] & MAX_COUNT == MAX_COUNT


@pytest.mark.parametrize("num_rows, row_width", [(301, 7), (7, 33), (3, 2)])
def test_balanced_rows_have_rms_one_and_columns_nearly_so(num_rows, row_width):
    torch.manual_seed(7)
    update = (
        torch.randn(num_rows, row_width) * torch.logspace(0, 2, row_width) * torch.logspace(-1, 0, num_rows)[:, None]
    )
    balanced = balance_(update.clone())
    torch.testing.assert_close(balanced, plain_balance(update.double()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(balanced.square().mean(1), torch.ones(num_rows))
    if num_rows == 301:  # a few rows and columns of chance zeros converge more slowly
        assert (balanced.square().mean(0).sqrt() - 1).abs().max() < 0.01
    assert torch.equal(balanced.sign(), update.sign())


def test_small_rows_zero_rows_and_zero_columns_get_no_update_and_do_not_count():
    torch.manual_seed(8)
    update = torch.randn(11, 5)
    update[:, 3] = 0
    small = torch.cat([update, 1e-4 * torch.randn(2, 5), torch.zeros(1, 5)])
    balanced = balance_(small.clone())
    torch.testing.assert_close(balanced[:11], balance_(update.clone()))
    assert (balanced[11:] == 0).all() and (balanced[:, 3] == 0).all()
    assert (balance_(torch.zeros(3, 5)) == 0).all()


@pytest.mark.parametrize("scale", [1e-12, 1e9])
@pytest.mark.parametrize("kind", ["row_adam", "sinkhorn"])
def test_the_first_update_has_rms_lr_whatever_the_size_of_the_gradient(kind, scale):
    torch.manual_seed(9)
    table = nn.Parameter(torch.zeros(11, 5))
    table.grad = sparse_rows([3, 9], torch.randn(2, 5) * scale, 11)
    settings = {} if kind == "sinkhorn" else {"eps": 0.0}
    ROW_OPTIMIZERS[kind]([table], lr=0.5, **settings).step()
    rms = table[[3, 9]].square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.full((2,), 0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_table_is_updated_in_fp32_and_rounded_once(kind):
    torch.manual_seed(6)
    table = nn.Parameter(torch.randn(9, 5).bfloat16())
    wide = nn.Parameter(table.detach().float())
    table.grad = sparse_rows([3, 7], torch.randn(2, 5).bfloat16(), 9)
    wide.grad = table.grad.float()
    for param in (table, wide):
        ROW_OPTIMIZERS[kind]([param], lr=0.5).step()
    assert table.dtype == torch.bfloat16 and torch.equal(table, wide.bfloat16())


def test_stochastic_rounding_keeps_the_mean_and_goes_to_a_neighbour():
    torch.manual_seed(10)
    values = torch.randn(7, 3) * torch.logspace(-3, 3, 7)[:, None]
    draws = torch.stack([round_stochastically(values, seed) for seed in range(20_000)])
    assert draws.dtype == torch.bfloat16
    spacing = torch.exp2(torch.floor(torch.log2(values.abs())) - 7)  # of bf16 numbers around each value
    assert ((draws.float() - values).abs() < spacing).all()
    assert ((draws.float().mean(0) - values).abs() < 4 * 0.5 * spacing / math.sqrt(20_000)).all()
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf])
    assert torch.equal(round_stochastically(exact, 0).float(), exact)
    assert round_stochastically(torch.tensor([math.nan]), 0).isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_moves_what_nearest_loses(kind):
    torch.manual_seed(11)
    moved = {}
    for rounding in ("nearest", "stochastic"):
        table = nn.Parameter(torch.ones(9, 64, dtype=torch.bfloat16))
        optimizer = ROW_OPTIMIZERS[kind]([table], lr=1e-4, rounding=rounding)
        for _ in range(100):
            table.grad = sparse_rows([4], torch.ones(1, 64).bfloat16(), 9)
            optimizer.step()
        moved[rounding] = (1 - table[4].float()).mean().item()
    assert moved["nearest"] == 0 and moved["stochastic"] == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(kind, rounding, tmp_path):
    torch.manual_seed(12)
    touches = [(rows, gradients.bfloat16()) for rows, gradients in random_touches(12, 23, 5)]

    def run(table, optimizer, steps):
        for rows, gradients in touches[steps]:
            table.grad = sparse_rows(rows, gradients, 23)
            optimizer.step()

    table = nn.Parameter(torch.randn(23, 5).bfloat16())
    optimizer = ROW_OPTIMIZERS[kind]([table], lr=0.01, rounding=rounding)
    run(table, optimizer, slice(0, 6))
    torch.save([table, optimizer.state_dict(), torch.get_rng_state()], tmp_path / "run.pt")
    run(table, optimizer, slice(6, 12))
    saved_table, saved_state, rng_state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed_table = nn.Parameter(saved_table.detach())
    resumed = ROW_OPTIMIZERS[kind]([resumed_table], lr=7.0, rounding=rounding)
    resumed.load_state_dict(saved_state)
    torch.set_rng_state(rng_state)
    run(resumed_table, resumed, slice(6, 12))
    assert torch.equal(table, resumed_table)
    for key, value in optimizer.state[table].items():
        found = resumed.state[resumed_table][key]
        assert value.dtype == found.dtype and torch.equal(value, found)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_gradients_and_state_of_another_shape_are_refused(kind):
    table = nn.Parameter(torch.ones(9, 5))
    table.grad = torch.ones(9, 5)
    optimizer = ROW_OPTIMIZERS[kind]([table], lr=0.1)
    with pytest.raises(ValueError, match=r"table \[9, 5\] is dense; allowed in \w+: sparse ones"):
        optimizer.step()
    table.grad = sparse_rows([], torch.ones(0, 5), 9)
    optimizer.step()  # nothing touched
    assert (table == 1).all() and optimizer.state_dict()["state"] == {}
    table.grad = sparse_rows([2], torch.ones(1, 5), 9)
    optimizer.step()
    with pytest.raises(ValueError, match=r"shape \(9, ?5?\); this table's is \(10, ?5?\)"):
        ROW_OPTIMIZERS[kind]([nn.Parameter(torch.ones(10, 5))], lr=0.1).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="rounding is 'stochastic' for a table of torch.float32; allowed: bfloat16"):
        ROW_OPTIMIZERS[kind]([table], lr=0.1, rounding="stochastic")


def test_rows_are_summed_once():
    torch.manual_seed(13)
    repeated = sparse_rows([4, 4, 0, 4], torch.randn(4, 3), 11)
    torch.testing.assert_close(sum_by_row(repeated), repeated.coalesce())
    distinct = sparse_rows([0, 4, 7], torch.randn(3, 3), 11)
    assert not distinct.is_coalesced()
    assert sum_by_row(distinct).is_coalesced() and torch.equal(sum_by_row(distinct).to_dense(), distinct.to_dense())
    assert sum_by_row(distinct)._values().data_ptr() == distinct._values().data_ptr()
    assert sum_by_row(sparse_rows([7, 0], torch.randn(2, 3), 11)).indices().tolist() == [[0, 7]]


@pytest.mark.parametrize("kind, bytes_64, bytes_80", [("adam", 516, 644), ("row_adam", 4, 4), ("sinkhorn", 256, 320)])
def test_bytes_of_state_per_row(kind, bytes_64, bytes_80):
    for row_width, expected in ((64, bytes_64), (80, bytes_80)):
        table = nn.Parameter(torch.zeros(11, row_width))
        table.grad = sparse_rows([3], torch.ones(1, row_width), 11)
        optimizer = ROW_OPTIMIZERS[kind]([table], lr=0.1)
        optimizer.step()
        assert sum(value.nbytes for value in optimizer.state[table].values()) == 11 * expected
        assert state_bytes_per_row(kind, row_width) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_state_takes_memory_for_touched_rows_only(kind):
    def resident_mib():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    num_rows = 1_000_003
    table = nn.Parameter(torch.empty(num_rows, 64))  # a state of one number an element is 244 MiB if written whole
    table.grad = sparse_rows(list(range(0, num_rows, 10_000)), torch.ones(101, 64), num_rows)
    optimizer = ROW_OPTIMIZERS[kind]([table], lr=0.1)
    before = resident_mib()
    optimizer.step()
    assert resident_mib() - before < 60
    for value in optimizer.state[table].values():
        assert value.shape[0] == num_rows and (value != 0).view(num_rows, -1).any(1).sum() == 101


class WholeTableCalls(TorchDispatchMode):
    """The operators that are given, or give, a dense tensor of `num_rows` rows."""

    def __init__(self, num_rows):
        super().__init__()
        self.num_rows, self.names = num_rows, set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and self.num_rows in tensor.shape:
                self.names.add(str(operator))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_only_picks_rows_of_the_table_and_puts_them_back(kind):
    """So that its work does not grow with the table: any other operator on it reads or writes every row."""
    num_rows = 10_007
    table = nn.Parameter(torch.zeros(num_rows, 16))
    table.grad = sparse_rows(list(range(0, 10_000, 5)), torch.ones(2000, 16), num_rows)
    optimizer = ROW_OPTIMIZERS[kind]([table], lr=0.1)
    optimizer.step()  # makes the state
    with WholeTableCalls(num_rows) as calls:
        optimizer.step()
    assert calls.names == {"aten.index_select.default", "aten.index_copy_.default"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_table_learns_its_targets(kind):
    config = MemoryConfig(layers=(0,), rows_per_head=(17, 23), num_heads=3, head_dim=5)
    table = MemoryTable(config, derive_geometry(config, num_classes=50, fill_class=0), 0)
    generator = torch.Generator().manual_seed(14)
    nn.init.normal_(table.weight, generator=generator)
    rows_BTH = torch.randint(17, (30, 7, 6), generator=generator)
    target_BTE = torch.randn(table.weight.shape, generator=generator)[rows_BTH].flatten(-2)
    optimizer = ROW_OPTIMIZERS[kind]([table.weight], lr=0.1)
    losses = []
    for step in range(150):
        seen = slice(step % 3, None, 3)  # a third of the rows at a time
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        loss = (table(rows_BTH[seen]) - target_BTE[seen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
