"""One job on any number of ranks: checkpoints, kills, launchers and evaluation.

The same sums are added in another order on another number of ranks. That moves the last bit of a gradient, and training
moves it on from there: curves of different numbers of ranks are compared over few steps, those of equal ones to the
bit.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from fsdp_worker import compare_shardings
from process_worker import train_and_note
from safetensors.torch import load_file
from test_training import tiny_recipe
from transformers import AutoModelForCausalLM

from engrammar.tables.sealed import last_good
from engrammar.tables.shards import table_shard
from engrammar.tables.verify import verify_tables
from engrammar.train.recipe import Recipe, to_yaml
from engrammar.train.run import prepare_tokens
from engrammar.train.trainer import sum_cross_entropy
from engrammar_cli.main import main as command_line
from processes import COMMANDS, environment, run_ranks, succeed, succeed_on_ranks, torchrun

SETTINGS = ("trainer.max_steps=8", "trainer.save_steps=2", "trainer.save_total_limit=9", "data.batch_size=12")
DEATH = 5  # steps made; the last checkpoint is then that of step 4

pytestmark = pytest.mark.slow


def write_recipe(folder: Path, *settings: str) -> tuple[Recipe, Path]:
    recipe = tiny_recipe(folder, *SETTINGS, *settings)
    path = folder / f"{Path(recipe.out).name}.yaml"
    path.write_text(to_yaml(recipe))
    return recipe, path


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((out / "result.json").read_text())["curve"] if "loss" in entry]


def noted(notes: Path, what: str) -> dict[str, dict[str, torch.Tensor]]:
    """The rows and their state that all ranks wrote down, whole tables."""
    parts = [torch.load(notes / f"{what}-{rank}.pt") for rank in range(len(list(notes.glob(f"{what}-*.pt"))))]
    return {
        name: {key: torch.cat([part[name][key] for part in parts]) for key in entry} for name, entry in parts[0].items()
    }


def assert_same_rows(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert found.keys() == expected.keys() and found
    for name, entry in expected.items():
        assert found[name].keys() == entry.keys() and len(entry) > 1
        for key, values in entry.items():
            assert torch.equal(found[name][key], values), (name, key)
            assert values.any(), (name, key)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with the run that nobody interrupts, on 4 ranks."""
    folder = tmp_path_factory.mktemp("straight")
    _, path = write_recipe(folder)
    succeed_on_ranks(4, folder, train_and_note, path, folder / "notes")
    return folder


def killed(folder: Path, straight: Path, num_ranks: int) -> Path:
    """A run of `straight`'s recipe all of whose ranks died."""
    shutil.copy(straight / "licence.jsonl", folder)
    shutil.copytree(straight / "data", folder / "data")
    _, path = write_recipe(folder)
    codes = run_ranks(num_ranks, folder, train_and_note, path, folder / "notes", DEATH)
    assert set(codes) == {-signal.SIGKILL} and last_good(folder / "run") == folder / "run" / "checkpoint-4"
    return path


@pytest.mark.parametrize(("first", "then"), [(4, (1, 2, 3)), (1, (4,))])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, straight, first, then):
    """Rows and their state to the bit as they were when saved, and the curve of a run with 4 ranks throughout."""
    killed(tmp_path, straight, first)
    saved = noted(tmp_path / "notes", "saved-4")
    if first == 4:
        assert_same_rows(saved, noted(straight / "notes", "saved-4"))
    for name, entry in saved.items():
        shards = [tmp_path / "run" / "checkpoint-4" / table_shard(name + suffix) for suffix in ("", ".optimizer")]
        in_files = {key.rpartition(".")[2]: values for shard in shards for key, values in load_file(shard).items()}
        assert_same_rows({name: in_files}, {name: entry})
    for num_ranks in then:
        out = tmp_path / f"on-{num_ranks}"
        shutil.copytree(tmp_path / "run", out)
        _, path = write_recipe(tmp_path, f"out={out}")
        notes = tmp_path / f"notes-{num_ranks}"
        succeed_on_ranks(num_ranks, tmp_path, train_and_note, path, notes)
        assert len(list(notes.glob("loaded-*"))) == num_ranks
        assert_same_rows(noted(notes, "loaded"), saved)
        assert losses(out) == pytest.approx(losses(straight / "run"), abs=1e-4)
        for folder in (tmp_path / "run" / "checkpoint-4", out):  # each file was written by all ranks
            assert verify_tables(folder) > 0


def test_evaluation_on_any_number_of_ranks_counts_every_token_once(tmp_path, straight):
    """The validation set fills no round of batches, so that the last one is padded with sequences seen before."""
    recipe, _ = write_recipe(straight)
    blocks = prepare_tokens(recipe.data).blocks("validation", recipe.data.sequence_length)
    model = AutoModelForCausalLM.from_pretrained(straight / "run")
    rows = [{key: value[None] for key, value in block.items()} for block in blocks]
    with torch.no_grad():
        nats, tokens = sum(
            sum_cross_entropy(model(row["input_ids"], row.get("attention_mask")).logits, row["labels"]).sum(0)
            for row in rows
        ).tolist()
    for num_ranks in (1, 2, 4):
        assert len(blocks) % (8 * num_ranks)
        out = tmp_path / f"on-{num_ranks}"
        shutil.copytree(straight / "run", out)
        (out / "result.json").unlink()  # trained, and killed before this was written: evaluated again
        _, path = write_recipe(straight, f"out={out}")
        succeed_on_ranks(num_ranks, tmp_path, command_line, ["train", str(path)])
        result = json.loads((out / "result.json").read_text())
        assert result["tokens_per_second"] is None and result["steps"] == 8
        assert result["validation_loss"] == pytest.approx(nats / tokens, rel=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_dense_part_in_shards_trains_like_one_process(tmp_path, num_ranks):
    """FSDP2 beside placed tables. Muon lifts small singular values, and what rounding put there with them."""
    succeed_on_ranks(num_ranks, tmp_path, compare_shardings, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {f"{matrices} {how}" for matrices in ("adamw", "muon") for how in ("replicated", "sharded")}
    for run_name, found in report.items():
        assert found["largest_loss_difference"] < 1e-5, run_name
        assert found["largest_weight_difference"] < (1e-5 if "adamw" in run_name else 1e-3), run_name


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_job_with_a_killed_rank_goes_on_by_itself(tmp_path):
    """From its last checkpoint, to the same bits: between equal numbers of ranks every sum has one order."""
    straight = tmp_path / "straight"
    straight.mkdir()
    _, path = write_recipe(straight)
    succeed_on_ranks(2, straight, command_line, ["train", str(path)])
    _, path = write_recipe(tmp_path)
    command = ["--max-restarts=3", "--no-python", str(COMMANDS / "engrammar"), "train", str(path)]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            torchrun(2, *command), env=environment(LOGLEVEL="INFO"), stdout=log, stderr=log
        )  # torchrun tells of restarts at that level
        try:
            while not (tmp_path / "run" / "checkpoint-4").exists():
                assert job.poll() is None, (tmp_path / "log").read_text()[-4000:]
                time.sleep(0.002)
            victim = children(job.pid)[-1]
            os.kill(victim, signal.SIGKILL)
            assert not (tmp_path / "run" / "result.json").exists()
            assert job.wait() == 0, (tmp_path / "log").read_text()[-4000:]
        finally:
            job.terminate()  # hands it on to its ranks
    told = (tmp_path / "log").read_text()
    assert f"(pid: {victim})" in told and "terminate called" not in told
    assert "3/3 attempts left" in told and "2/3 attempts left" not in told, "it came back at the first attempt"
    assert losses(tmp_path / "run") == losses(straight / "run")
    found, expected = (AutoModelForCausalLM.from_pretrained(out / "run").state_dict() for out in (tmp_path, straight))
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_accelerate_launch_trains_like_other_ranks(tmp_path):
    launch = [
        *(str(COMMANDS / "accelerate"), "launch", "--cpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--no_python", str(COMMANDS / "engrammar")),
    ]
    ranks, launched = tmp_path / "ranks", tmp_path / "launched"
    for out in (ranks, launched):
        _, path = write_recipe(tmp_path, f"out={out}", "trainer.max_steps=3", "trainer.save_strategy=no")
        if out == ranks:
            succeed_on_ranks(2, tmp_path, command_line, ["train", str(path)])
        else:
            succeed([*launch, "train", str(path)])
    assert losses(launched) == pytest.approx(losses(ranks), abs=1e-5)
    results = [json.loads((out / "result.json").read_text()) for out in (ranks, launched)]
    assert results[0]["validation_loss"] == pytest.approx(results[1]["validation_loss"], abs=1e-5)
