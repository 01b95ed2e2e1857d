"""Copies of a model, as averaging and PEFT make them, read and train their own tables."""

import copy
import gc

import pytest
import torch

from engrammar import EngrammarForCausalLM, build_optimizer
from models import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))


def tables_of(model: EngrammarForCausalLM) -> list[torch.Tensor]:
    return [table.weight for table in model.model.memory.tables.values()]


def train(model: EngrammarForCausalLM, num_steps: int = 2) -> None:
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizer = build_optimizer(model, **settings)
    for _ in range(num_steps):
        model(IDS, labels=IDS).loss.backward()
        assert all(table.grad is None or table.grad.is_sparse for table in tables_of(model))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dialect", ["paper", "qwen_next"])
def test_a_deep_copy_trains_as_the_model_does_and_leaves_it_alone(dialect):
    model = tiny_model(dialect).train()
    before = [table.detach().clone() for table in tables_of(model)]
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IDS).logits, model(IDS).logits)

    train(copied)
    assert all(torch.equal(table, start) for table, start in zip(tables_of(model), before))
    assert not any(torch.equal(table, start) for table, start in zip(tables_of(copied), before))

    train(model)
    for name, value in model.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value), name


@pytest.mark.parametrize("tier", [{"memory": "ram"}, {"memory": "disk"}, {"memory": "disk", "cache_rows": 16}])
@torch.no_grad()
def test_a_deep_copy_of_a_served_model_reads_on_and_so_does_the_model(tier, tmp_path):
    tiny_model("paper").save_pretrained(tmp_path)
    model = EngrammarForCausalLM.from_pretrained(tmp_path, **tier)
    expected = model(IDS).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IDS).logits, expected)
    del copied
    gc.collect()
    assert torch.equal(model(IDS).logits, expected)


def test_a_copied_memory_in_a_frozen_model_is_all_that_trains():
    """As PEFT's `modules_to_save=["memory"]`: the module is copied, everything else is frozen."""
    model = tiny_model("paper").train().requires_grad_(False)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if ".memory." not in name}
    first = model.model.memory
    model.model.memory = copy.deepcopy(first).requires_grad_(True)

    train(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    for layer, table in first.tables.items():
        assert not torch.equal(table.weight, model.model.memory.tables[layer].weight)


def test_a_copy_is_saved_and_loaded_with_its_tables(tmp_path):
    copied = copy.deepcopy(tiny_model("demo"))
    copied.save_pretrained(tmp_path)
    loaded = EngrammarForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, copied(IDS).logits)
    train(loaded)
