"""The table reads rows, and its gradient is the touched rows: never a dense one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrammar.addressing import derive_geometry
from engrammar.config import MemoryConfig
from engrammar.reference import lookup_reference
from engrammar.table import MemoryTable


def make_table(num_heads: int = 3, head_dim: int = 5, rows_multiple: int = 64) -> MemoryTable:
    config = MemoryConfig(
        layers=(0, 4), rows_per_head=(17, 23), num_heads=num_heads, head_dim=head_dim, rows_multiple=rows_multiple
    )
    geometry = derive_geometry(config, num_classes=50, fill_class=0)
    table = MemoryTable(config, geometry, 1)
    torch.nn.init.normal_(table.weight, generator=torch.manual_seed(0))
    return table


def random_rows(table: MemoryTable, shape: tuple[int, int], seed: int = 1) -> torch.Tensor:
    """Rows in range, many of them repeated."""
    return torch.randint(0, table.shape[0], (*shape, table.num_heads), generator=torch.manual_seed(seed))


def dense_gradient(table: MemoryTable, rows_BTH: torch.Tensor, scale_BTE: torch.Tensor) -> torch.Tensor:
    weight_RC = table.weight.detach().clone().requires_grad_()
    (lookup_reference(weight_RC, rows_BTH) * scale_BTE).sum().backward()
    return weight_RC.grad


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no grad"])
def test_lookup_equals_the_plain_twin_to_the_bit(grad):
    table = make_table()
    rows_BTH = random_rows(table, (3, 7))
    with torch.set_grad_enabled(grad):
        embedding_BTE = table(rows_BTH)
    assert embedding_BTE.shape == (3, 7, 30) and embedding_BTE.requires_grad == grad
    assert torch.equal(embedding_BTE, lookup_reference(table.weight, rows_BTH))


def test_the_rows_of_a_token_lie_side_by_side_in_the_order_of_the_columns():
    table = make_table(num_heads=2, head_dim=1)
    with torch.no_grad():
        table.weight[:, 0] = torch.arange(len(table.weight))
    rows_BTH = torch.tensor([[[0, 33, 61, 42]]])
    assert table(rows_BTH).flatten().tolist() == [0, 33, 61, 42]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_gradient_is_sparse_and_equals_the_dense_twins(batch, num_tokens, num_heads, seed):
    table = make_table(num_heads=num_heads)
    rows_BTH = random_rows(table, (batch, num_tokens), seed)
    scale_BTE = torch.randn(batch, num_tokens, 2 * num_heads * 5, generator=torch.manual_seed(seed))
    handed_back = []
    table.weight.register_hook(handed_back.append)
    (table(rows_BTH) * scale_BTE).sum().backward()
    assert [gradient.is_coalesced() for gradient in handed_back] == [True]
    gradient = table.weight.grad
    assert gradient.layout == torch.sparse_coo and gradient.shape == table.weight.shape
    torch.testing.assert_close(gradient.to_dense(), dense_gradient(table, rows_BTH, scale_BTE), rtol=1e-6, atol=1e-6)


def test_only_touched_rows_are_in_the_gradient_each_once_and_in_order():
    table = make_table()
    rows_BTH = random_rows(table, (3, 41))
    table(rows_BTH).sum().backward()
    touched = rows_BTH.flatten().tolist()
    assert len(set(touched)) < len(touched) and len(set(touched)) < table.shape[0]
    # torch forgets that a gradient is coalesced when it stores it in .grad, so the raw indices are looked at.
    gradient = table.weight.grad
    assert gradient._indices()[0].tolist() == sorted(set(touched))
    counts = torch.bincount(torch.tensor(touched), minlength=len(table.weight))
    expected = counts[gradient._indices()[0], None].expand(-1, 5).float()
    assert torch.equal(gradient._values(), expected)
    # What torch checks of a coalesced tensor is skipped where ours is made, so it is checked here.
    torch.sparse_coo_tensor(
        gradient._indices(), gradient._values(), gradient.shape, is_coalesced=True, check_invariants=True
    )


def test_gradients_of_two_backward_passes_add_up_and_stay_sparse():
    table = make_table()
    first, second = random_rows(table, (2, 5), seed=1), random_rows(table, (3, 4), seed=2)
    for rows_BTH in (first, second):
        table(rows_BTH).square().sum().backward()
    assert table.weight.grad.layout == torch.sparse_coo
    expected = sum(dense_gradient(table, rows, 2 * table(rows).detach()) for rows in (first, second))
    torch.testing.assert_close(table.weight.grad.coalesce().to_dense(), expected, rtol=1e-6, atol=1e-6)


def test_two_lookups_in_one_graph_add_up_and_stay_sparse():
    table = make_table()
    first, second = random_rows(table, (2, 5), seed=1), random_rows(table, (3, 4), seed=2)
    (table(first).sum() + 3 * table(second).sum()).backward()
    assert table.weight.grad.layout == torch.sparse_coo
    ones = [torch.ones(*rows.shape[:2], 30) for rows in (first, second)]
    expected = dense_gradient(table, first, ones[0]) + 3 * dense_gradient(table, second, ones[1])
    torch.testing.assert_close(table.weight.grad.coalesce().to_dense(), expected)


def test_no_tensor_of_the_tables_size_is_made_by_a_training_step():
    """A dense gradient of this table is 256 MB; a step may allocate what it touches, which is some kilobytes."""
    config = MemoryConfig(layers=(0,), rows_per_head=(500_000, 500_000), num_heads=1, head_dim=64)
    table = MemoryTable(config, derive_geometry(config, num_classes=50, fill_class=0), 0)
    rows_BTH = torch.randint(0, 500_000, (2, 9, 2), generator=torch.manual_seed(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        table(rows_BTH).sum().backward()
    assert table.weight.grad._values().shape == (len(rows_BTH.flatten()), 64)
    assert max(event.cpu_memory_usage for event in profile.events()) < 1_000_000


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no grad"])
@pytest.mark.parametrize("row", ["past the end", "negative"])
def test_a_row_out_of_range_is_an_index_error(row, grad):
    table = make_table()
    rows_BTH = random_rows(table, (2, 3))
    if row == "negative":
        rows_BTH[0, 1, 0] = -1
    else:
        rows_BTH[1, 2, 1] = table.shape[0]
    message = f"Row {-1 if row == 'negative' else table.shape[0]} is outside this table of {table.shape[0]} rows"
    with torch.set_grad_enabled(grad), pytest.raises(IndexError, match=message):
        table(rows_BTH)


def test_rows_of_another_number_of_heads_are_refused():
    with pytest.raises(ValueError, match="Rows have 1 columns; this table has"):
        make_table()(torch.zeros(1, 1, 1, dtype=torch.int64))


def test_a_frozen_table_gets_no_gradient():
    table = make_table()
    table.weight.requires_grad_(False)
    assert not table(random_rows(table, (2, 3))).requires_grad


@pytest.mark.parametrize("index", [0, 1])
def test_each_layer_has_its_own_offsets_and_rows(index):
    config = MemoryConfig(layers=(0, 4), rows_per_head=(17, 23), num_heads=3)
    geometry = derive_geometry(config, num_classes=50, fill_class=0)
    sizes_H = [size for order in geometry.table_sizes[index] for size in order]
    assert geometry.head_offsets(index) == tuple(sum(sizes_H[:column]) for column in range(len(sizes_H)))
    assert len(MemoryTable(config, geometry, index).weight) == sum(sizes_H)


def test_the_parameter_is_padded():
    table = make_table(rows_multiple=64)
    assert len(table.weight) == table.shape[0] and table.shape[0] % 64 == 0


def test_rows_keep_the_tables_dtype_and_so_does_their_gradient():
    table = make_table().to(torch.bfloat16)
    embedding_BTE = table(random_rows(table, (2, 3)))
    embedding_BTE.sum().backward()
    assert embedding_BTE.dtype == table.weight.grad.dtype == torch.bfloat16
