"""What people do with a model works on a device, and gives what it gives on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attached_models import attached_model, base_model, memory_config, random_ids, randomize, tokenizer
from edited_models import OURS, WITH_MEMORY, model_of_kind, spoken_ids
from engrammar.attach import attach, detach, disabled, fill_rows, keep_prefix, load_attached, save_attached
from engrammar.attach.attaching import attachment_of
from engrammar.edit import Fact, VectorSettings, apply_patch, gated, learn, undo_patch
from engrammar.off import memory_off
from engrammar.released import Qwen4ExpForCausalLM
from engrammar.stores.serving import stored_tables_of
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar_cli.main import main
from engrammar_explore.looking import look
from models import tiny_model
from named_device import DEVICE
from released_models import qwen_model, qwen_release
from row_patches import row_patch
from steerable_models import FACTS as ROW_FACTS
from steerable_models import SETTINGS, steerable
from taught_facts import FACTS, strong_model

NEAR = {"rtol": 0.0, "atol": 1e-4}
TIMES = {"milliseconds", "microseconds", "seconds"}
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits.cpu()


def both(make) -> tuple[nn.Module, nn.Module]:
    """A model on the CPU, and one on the device."""
    return make(), make().to(DEVICE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_memory_is_attached_saved_loaded_and_detached(family, tmp_path):
    here, there = both(lambda: base_model(family))
    ids, plain = random_ids(2, 13), logits_of(base_model(family), random_ids(2, 13))
    for model in (here, there):
        attach(model, memory_config(), tokenizer())
        randomize(model)
    torch.testing.assert_close(logits_of(there, ids), logits_of(here, ids), **NEAR)
    save_attached(there, tmp_path)
    again = load_attached(base_model(family).to(DEVICE), tmp_path)
    assert torch.equal(logits_of(again, ids), logits_of(there, ids))
    for memory in ("ram", "disk"):
        served = load_attached(base_model(family).to(DEVICE), tmp_path, memory=memory)
        assert torch.equal(logits_of(served, ids), logits_of(there, ids))
    with disabled(there):
        torch.testing.assert_close(logits_of(there, ids), plain, **NEAR)
    detach(there)
    torch.testing.assert_close(logits_of(there, ids), plain, **NEAR)


# The imitation cannot make `squeeze_` change a tensor's shape, which torch's product with a vector needs.
@pytest.mark.parametrize("memory", ["adam", "row_adam", *(["sinkhorn"] if DEVICE.type != "imitated" else [])])
@pytest.mark.parametrize("kind", ["ours", "attached"])
def test_steps_of_training_are_the_cpus(kind, memory):
    def trained(device: torch.device) -> tuple[list[float], dict[str, Tensor]]:
        model = tiny_model("paper", 2).train() if kind == "ours" else attached_model("llama").train()
        model.to(device)
        optimizer, losses = build_optimizer(model, OptimizerSettings(max_grad_norm=1.0, memory=memory), **ADAM), []
        for seed in range(2):
            ids = (spoken_ids(4, 11, seed) % 50 + 3).to(device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, {name: x.cpu() for name, x in model.state_dict().items()}

    (losses, weights), (found_losses, found) = trained(torch.device("cpu")), trained(DEVICE)
    assert found_losses == pytest.approx(losses, abs=1e-3)
    for name, weight in weights.items():  # rounding can turn the sign of a gradient near zero, and Adam's step with it
        if weight.is_floating_point():
            assert float((found[name] - weight).abs().mean()) < 5e-3


@pytest.mark.parametrize("kind", [OURS, WITH_MEMORY])
def test_rows_are_replaced(kind):
    here, there = both(lambda: model_of_kind(kind))
    ids, found = spoken_ids(2, 21), []
    for model in (here, there):
        memory = model.model.memory if kind == OURS else attachment_of(model)["default"].memory
        before, patch = logits_of(model, ids), row_patch(model, memory)
        apply_patch(model, patch, tokenizer())
        found.append(logits_of(model, ids))
        undo_patch(model)
        assert torch.equal(logits_of(model, ids), before) and not torch.equal(found[-1], before)
    torch.testing.assert_close(found[1], found[0], **NEAR)


@pytest.mark.parametrize("kind", ["llama", WITH_MEMORY])
def test_facts_are_learned(kind, monkeypatch):
    """With fewer prompts for a probe than elsewhere, and fewer words that the model goes on with."""
    for name, fewer in (("NUM_SUBJECTS", 4), ("NUM_ASKS", 2), ("NUM_OTHERS", 3)):
        assert getattr(gated, name) > fewer
        monkeypatch.setattr(gated, name, fewer)
    asked = [("w3 w4", "w20"), ("w5 w6", "w21")]
    facts = [Fact(subject=subject, prompt=f"w9 {subject} w10", object=words) for subject, words in asked]
    check_learned(
        lambda: model_of_kind(kind) if kind == "llama" else steerable(kind),
        facts,
        "gated",
        gated.GatedSettings(num_worded=2),
    )


def test_facts_are_learned_as_vectors():
    settings = VectorSettings(depth=1.0, most=40.0, steps=8, num_contexts=1, num_paraphrases=0, num_others=2)
    check_learned(lambda: strong_model().requires_grad_(False), FACTS[:2], "vector", settings)


def check_learned(make, facts, method, settings) -> None:
    found = []
    for model in both(make):
        patch, refused = learn(model, tokenizer(), facts, method=method, settings=settings)
        apply_patch(model, patch, tokenizer())
        found.append((len(refused), logits_of(model, spoken_ids(2, 21))))
    assert found[0][0] == found[1][0] < len(facts)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.0, atol=1e-2)


@pytest.mark.parametrize("by", ["solve", "gradient"])
def test_facts_are_learned_in_rows(by):
    found = []
    for model in both(lambda: steerable(WITH_MEMORY)):
        patch, _ = learn(
            model, tokenizer(), ROW_FACTS[:1], method="rows", settings=replace(SETTINGS, by=by, rounds=2, steps=20)
        )
        found.append({layer: delta.rows_U.tolist() for layer, delta in patch.deltas.items()})
    assert found[0] == found[1] and found[0]


class Items:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = random_ids(4, 12)[index]
        return {"input_ids": ids, "labels": ids.clone()}


def test_rows_are_filled_and_a_prefix_is_kept(tmp_path):
    here, there = both(lambda: base_model("llama"))
    for model in (here, there):
        torch.manual_seed(0)
        attach(model, memory_config(layers=(2, 3)), tokenizer())
        fill_rows(model, Items())
    torch.testing.assert_close(logits_of(there, random_ids(2, 13)), logits_of(here, random_ids(2, 13)), **NEAR)
    kept = [keep_prefix(model, Items(), folder=tmp_path / str(n)) for n, model in enumerate((here, there))]
    for one, other in zip(*([k[index] for index in range(4)] for k in kept), strict=True):
        for name in one:
            torch.testing.assert_close(other[name].cpu(), one[name], **NEAR)


def test_a_memory_is_switched_off():
    here, there = both(lambda: copy.deepcopy(model_of_kind(OURS)))
    with memory_off(here), memory_off(there):
        torch.testing.assert_close(logits_of(there, spoken_ids(2, 13)), logits_of(here, spoken_ids(2, 13)), **NEAR)


@pytest.mark.parametrize("kind", [OURS, WITH_MEMORY, "llama"])
def test_a_text_is_looked_at(kind):
    here, there = both(lambda: model_of_kind(kind))
    one, other = (look(model, tokenizer(), "w3 w4 w5 w6 w3 w4 w7") for model in (here, there))
    assert_alike(other, one)


def assert_alike(found: object, expected: object) -> None:
    """Compares what was looked up, number by number."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - TIMES:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3, nan_ok=True)
    else:
        assert found == expected


def test_a_released_model_reads_its_table_through_our_stores(tmp_path):
    model = qwen_model(torch.float32)
    folder = qwen_release(model, tmp_path / "release")
    main(["table", "import", str(folder), str(tmp_path / "tables")])
    served = Qwen4ExpForCausalLM.from_pretrained(folder, tables=tmp_path / "tables", memory="ram").eval().to(DEVICE)
    served.set_experts_implementation("eager")  # the other one wants a histogram that the CPU has not
    ids = random_ids(2, 13) % 40 + 3
    torch.testing.assert_close(logits_of(served, ids), logits_of(model.eval(), ids), **NEAR)
    stored_tables_of(served).close()
