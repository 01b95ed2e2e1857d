"""Models count as the paper prints them, and memory takes experts' place at equal total and active parameters."""

import pytest
import torch

from engrammar.config import MemoryConfig
from engrammar.model.budget import count_parameters, solve_budget
from engrammar.model.presets import PRESETS, preset
from models import tiny_config, tiny_memory, tiny_model


def billions(count: int, digits: int = 1) -> float:
    return round(count / 1e9, digits)


@pytest.mark.parametrize(
    ("name", "total", "active", "memory"),
    [
        ("engram-27b", 26.7, 3.8, 5.79),
        ("engram-40b", 39.5, 3.8, 18.53),
        ("moe-27b", 26.7, 3.8, 0.0),
        ("dense-4b", 4.1, 3.8, 0.0),
    ],
)
def test_the_papers_models_have_the_papers_parameters(name, total, active, memory):
    counts = count_parameters(preset(name))
    assert (billions(counts.total_parameters), billions(counts.active_parameters)) == (total, active)
    assert billions(counts.memory_parameters, 2) == memory
    parts = counts.active_parameters + counts.inactive_parameters + counts.input_embedding_parameters
    assert parts == counts.total_parameters


def test_the_papers_27b_pair_is_at_the_papers_rho():
    assert round(count_parameters(preset("engram-27b")).rho, 3) == 0.743


def test_counts_are_those_of_the_built_model():
    model = tiny_model("paper", 2)
    counts = count_parameters(model.config)
    assert counts.total_parameters == sum(p.numel() for p in model.parameters())
    assert counts.memory_parameters == sum(t.weight.numel() for t in model.model.memory.tables.values())
    idle = 3 * 2 * 3 * 32 * 16  # 3 layers of experts, 2 of 4 idle, 3 matrices of 32 x 16
    assert counts.inactive_parameters == counts.memory_parameters + idle


def test_active_parameters_are_the_ones_that_get_a_gradient_from_one_token():
    model = tiny_model("paper").train()
    model(torch.tensor([[7, 8]]), labels=torch.tensor([[7, 8]]), use_cache=False).loss.backward()
    dense = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.grad is not None and not p.grad.is_sparse and "experts" not in n
    )
    counts = count_parameters(model.config)
    per_token_experts = 3 * 2 * 3 * 32 * 16
    shared = 3 * 1 * 3 * 32 * 16
    assert dense - counts.input_embedding_parameters + per_token_experts + shared == counts.active_parameters


@pytest.mark.parametrize("name", ["micro", "nano", "100m", "moe-27b"])
@pytest.mark.parametrize("rho", [0.5, 0.75, 0.9])
def test_the_solver_keeps_total_and_active_parameters(name, rho):
    plain = preset(name, memory=None, **({} if name == "moe-27b" else {"num_classes": 999, "fill_class": 0}))
    memory = preset("engram-27b" if name == "moe-27b" else name).memory_config
    solved = solve_budget(plain, memory, rho=rho)
    before, after = count_parameters(plain), count_parameters(solved)
    assert after.total_parameters == pytest.approx(before.total_parameters, rel=1e-3)
    assert after.active_parameters == pytest.approx(before.active_parameters, rel=1e-3)
    one_expert = 1 / (plain.n_routed_experts - plain.num_experts_per_tok)
    assert after.rho == pytest.approx(rho, abs=one_expert)
    assert solved.memory_config.layers == memory.layers


def test_the_solver_refuses_what_cannot_be_met():
    memory = MemoryConfig.from_json({"dialect": "paper", "layers": [1]})
    plain = tiny_config(None)
    assert solve_budget(plain, memory, rho=1) is plain
    for rho in (0, -1, 1.5):
        with pytest.raises(ValueError, match="rho"):
            solve_budget(plain, memory, rho=rho)
    with pytest.raises(ValueError, match="without memory"):
        solve_budget(tiny_config("paper"), memory, rho=0.8)
    with pytest.raises(ValueError, match="narrower memory"):
        solve_budget(plain, memory, rho=0.8)
    with pytest.raises(ValueError, match="leading dense layer"):
        solve_budget(tiny_config(None, first_k_dense_replace=0), memory, rho=0.8)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="known: " + ", ".join(PRESETS)):
        preset("mega")


def test_contradictory_model_settings_are_refused():
    with pytest.raises(ValueError, match=r"memory.layers is \[1, 14\], but the model has blocks 0 to 3"):
        tiny_config("paper", memory={"dialect": "paper"})
    for name, ids in (("fill_id", 53), ("end_ids", [53])):
        settings = tiny_memory("qwen_next") | {name: ids}
        with pytest.raises(ValueError, match=rf"memory.{name} is .*ids of the tokenizer, 0 to 52"):
            tiny_config("qwen_next", memory=settings)
    with pytest.raises(ValueError, match="addresses depend on the tokenizer"):
        tiny_config("paper", num_classes=None)
