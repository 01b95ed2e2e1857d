"""EngrammarTrainer with FSDP2: the curve of DDP, checkpoints of any number of ranks, and a model that loads."""

import json
import shutil
import signal

import pytest
import torch
from fsdp_trainer_worker import train_in_shards
from process_worker import train_and_note
from test_processes import assert_same_rows, losses, noted, write_recipe
from transformers import AutoModelForCausalLM

from engrammar.tables.sealed import last_good, verify
from engrammar.train.sharded import OPTIMIZER
from processes import run_ranks, succeed_on_ranks

pytestmark = pytest.mark.slow
STEPS = ("trainer.max_steps=6", "trainer.logging_steps=1")
SHARDS = ("trainer.fsdp=true",)


def recipe_in(folder, name, *settings):
    return write_recipe(folder, f"out={folder / name}", *STEPS, *settings)[1]


def train_both_ways(folder, matrices):
    """The same recipe as replicas (`ddp`) and in shards (`fsdp`), on two ranks."""
    chosen = f"optimizer.matrices={matrices}"
    succeed_on_ranks(2, folder, train_and_note, recipe_in(folder, "ddp", chosen), folder / "ddp-notes")
    succeed_on_ranks(2, folder, train_in_shards, recipe_in(folder, "fsdp", chosen, *SHARDS), folder / "notes")
    return folder


@pytest.fixture(scope="module")
def muon(tmp_path_factory):
    return train_both_ways(tmp_path_factory.mktemp("muon"), "muon")


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    return train_both_ways(tmp_path_factory.mktemp("adamw"), "adamw")


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_shards_train_as_replicas_do(request, matrices):
    folder = request.getfixturevalue(matrices)
    assert losses(folder / "fsdp") == pytest.approx(losses(folder / "ddp"), abs=1e-4)
    found, expected = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("fsdp", "ddp"))
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, expected(ids).logits, atol=2e-3)
    for saved in (folder / "fsdp" / "checkpoint-4", folder / "fsdp"):
        verify(saved)


def test_a_trained_run_without_its_result_is_evaluated_again(adamw):
    result = adamw / "fsdp" / "result.json"
    before = json.loads(result.read_text())
    result.unlink()
    succeed_on_ranks(2, adamw, train_in_shards, adamw / "fsdp.yaml", adamw / "notes-again")
    again = json.loads(result.read_text())
    assert again["validation_loss"] == pytest.approx(before["validation_loss"], abs=1e-5) and again["steps"] == 6


def test_a_killed_run_goes_on_with_any_number_of_ranks(tmp_path, muon):
    """On two ranks to the bit; on three the sums have another order."""
    killed, notes = tmp_path / "killed", tmp_path / "notes"
    for shared in ("licence.jsonl", "data"):
        (shutil.copytree if (muon / shared).is_dir() else shutil.copy)(muon / shared, tmp_path / shared)
    codes = run_ranks(2, tmp_path, train_in_shards, recipe_in(tmp_path, "killed", *SHARDS), notes, 5)
    assert set(codes) == {-signal.SIGKILL} and last_good(killed) == killed / "checkpoint-4"
    for num_ranks in (2, 3):
        out = f"on-{num_ranks}"
        shutil.copytree(killed, tmp_path / out)
        path = recipe_in(tmp_path, out, *SHARDS)
        succeed_on_ranks(num_ranks, tmp_path, train_in_shards, path, tmp_path / f"notes-{num_ranks}")
        assert_same_rows(noted(tmp_path / f"notes-{num_ranks}", "loaded"), noted(notes, "saved-4"))
        assert losses(tmp_path / out) == pytest.approx(losses(muon / "fsdp"), abs=0 if num_ranks == 2 else 1e-4)
    assert_same_weights(tmp_path / "on-2", muon / "fsdp")


def assert_same_weights(found, expected):
    weights, others = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (found, expected))
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        assert torch.equal(weights[name], tensor), name


def test_what_cannot_be_sharded_is_refused(tmp_path):
    path = recipe_in(tmp_path, "run", *SHARDS)
    assert set(run_ranks(2, tmp_path, train_and_note, path, tmp_path / "notes")) & {1}
    logs = "".join((tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))
    assert "accelerate shards models on accelerators only" in logs  # and not DDP in silence
    path = recipe_in(tmp_path, "run", *SHARDS, "optimizer.memory=dense_adam")
    assert set(run_ranks(2, tmp_path, train_in_shards, path, tmp_path / "notes")) & {1}
    logs = "".join((tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))
    assert "'dense_adam', which needs whole tables" in logs


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path):
    from engrammar.train.optimizer import OptimizerSettings, build_optimizer
    from engrammar.train.sharded import load_optimizer, save_optimizer
    from models import tiny_model

    model = tiny_model(None).train()
    optimizer = build_optimizer(model, OptimizerSettings(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    ids = torch.arange(3, 19)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=f"has no {OPTIMIZER}: it was written without fsdp"):
        load_optimizer(tmp_path, optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.125
    save_optimizer(tmp_path, optimizer, model)
    other = tiny_model(None).train()
    again = build_optimizer(other, OptimizerSettings(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    load_optimizer(tmp_path, again, other)
    assert again.param_groups[0]["lr"] == 0.125 and again.inner[0].param_groups[0]["lr"] == 0.125
    theirs = {name: optimizer.state[param] for name, param in model.named_parameters() if param in optimizer.state}
    mine = {name: again.state[param] for name, param in other.named_parameters() if again.state.get(param)}
    assert mine.keys() == theirs.keys()
    for name, state in theirs.items():
        assert mine[name].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(mine[name][key], value) and mine[name][key].shape == value.shape, (name, key)
    unlike = build_optimizer(
        other, OptimizerSettings(matrices="adamw"), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
    )
    with pytest.raises(ValueError, match="The saved groups are"):
        load_optimizer(tmp_path, unlike, other)
