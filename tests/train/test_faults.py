"""Kills and full disks cost time, never a checkpoint and never a bit."""

import itertools
import json
import logging
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import tiny_recipe, weights

import engrammar.train.trainer as trainer_module
from engrammar.tables.checksums import MANIFEST
from engrammar.tables.encodings import decode
from engrammar.tables.folder import open_tables
from engrammar.tables.sealed import last_good, verify
from engrammar.tables.verify import read_table, verify_tables
from engrammar.train import run as run_module
from engrammar.train.recipe import Recipe
from engrammar.train.run import train
from engrammar.train.trainer import EngrammarTrainer
from processes import fork_server

PAGE = os.sysconf("SC_PAGE_SIZE")
SAVES = ("trainer.max_steps=8", "trainer.save_steps=2")
KEEP_ALL = "trainer.save_total_limit=9"


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


CLOCKED = ("_per_second", "_runtime", "_preparation_time")


def leftovers(out: Path) -> list[str]:
    return [name for name in os.listdir(out) if name.startswith(".")]


def assert_same_run(found: Path, expected: Path) -> None:
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name
    results = [json.loads((out / "result.json").read_text()) for out in (found, expected)]
    for part in ("curve", "validation_loss", "steps"):
        kept = [
            [{k: v for k, v in entry.items() if not k.endswith(CLOCKED)} for entry in result["curve"]]
            if part == "curve"
            else result[part]
            for result in results
        ]
        assert kept[0] == kept[1], part
    assert not leftovers(found)


# Kills.


def attempt(recipe: Recipe, log: Path) -> None:
    """One process's life: trains as the command line does, and writes down from where."""
    torch.set_num_threads(1)
    original = EngrammarTrainer.train

    def logged(self, resume_from_checkpoint=None):
        with log.open("a") as file:
            file.write(f"{resume_from_checkpoint}\n")
        return original(self, resume_from_checkpoint)

    EngrammarTrainer.train = logged
    train(recipe)


def kill(process, out: Path, rng: random.Random, *, in_save: bool, seconds: float) -> None:
    """Kills at a random moment of the next `seconds`, or, `in_save`, of one of the next saves."""
    if in_save:
        seen, wanted = set(), rng.randint(1, 3)
        while process.is_alive() and len(seen) < wanted:
            seen |= (
                {name for name in leftovers(out) if name.startswith(".partial-checkpoint")} if out.exists() else set()
            )
            time.sleep(0.001)  # leave the processor to the run
        seconds = 0.03  # about what a save of this model takes, from its first byte to the rename
    process.join(rng.uniform(0, seconds))
    process.kill()
    process.join()


def kill_until_finished(recipe: Recipe, rng: random.Random, in_save: list[bool], seconds: float) -> tuple[int, int]:
    """Runs a recipe, killed once per entry of `in_save`; the kills that hit, and those of them inside a save."""
    out, log = Path(recipe.out), Path(f"{recipe.out}.log")
    log.touch()
    kills = kills_in_save = reached = 0
    context, plan = fork_server(), iter(in_save)
    while not (out / "result.json").exists():
        good, lives = last_good(out), len(log.read_text().splitlines())
        assert step_of(good) >= reached
        reached = step_of(good)
        if good is not None:
            verify(good)
        process = context.Process(target=attempt, args=(recipe, log))
        process.start()
        moment = next(plan, None)
        if moment is None:
            process.join()
        else:
            kill(process, out, rng, in_save=moment, seconds=seconds)
        started = log.read_text().splitlines()[lives:]
        assert started in ([], [str(good)]), "the run went on from something else than its last good checkpoint"
        assert process.exitcode in (0, -9)
        if process.exitcode:
            kills += 1
            kills_in_save += out.exists() and bool(leftovers(out))
    return kills, kills_in_save


def run_straight(recipe: Recipe) -> float:
    """The run that nobody interrupts, in a process of the same kind; the seconds from its first step on."""
    log = Path(f"{recipe.out}.log")
    process = fork_server().Process(target=attempt, args=(recipe, log))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.time() - log.stat().st_mtime


@pytest.mark.slow
def test_runs_killed_thirty_times_end_in_the_same_bits(tmp_path):
    """Runs of one recipe, each killed over and over, until there were enough kills, enough of them in a save."""
    num_kills, num_in_save, rng = 30, 10, random.Random(0)
    settings = ("trainer.max_steps=20", "trainer.save_steps=2")
    straight = tiny_recipe(tmp_path, *settings)
    seconds = run_straight(straight)
    kills = kills_in_save = rounds = 0
    while kills < num_kills or kills_in_save < num_in_save:
        rounds += 1
        assert rounds <= 2 * num_kills, f"{kills} kills, {kills_in_save} in a save, after {rounds} runs"
        keep = f"trainer.save_total_limit={1 + rounds % 3}"
        killed = tiny_recipe(tmp_path, *settings, keep, f"out={tmp_path / f'killed-{rounds}'}")
        left = max(num_kills - kills, num_in_save - kills_in_save)
        plan = [rng.random() < 0.6 or kills_in_save < num_in_save <= num_kills - kills for _ in range(min(left, 10))]
        hit, hit_in_save = kill_until_finished(killed, rng, plan, seconds)
        kills, kills_in_save = kills + hit, kills_in_save + hit_in_save
        assert_same_run(Path(killed.out), tmp_path / "run")
    print(f"{kills} kills, {kills_in_save} of them in a save, over {rounds} runs; one trains for {seconds:.1f} s")


# Full disks.


def pages(path: Path) -> int:
    return -(-path.stat().st_size // PAGE)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nobody interrupts, every checkpoint kept."""
    folder = tmp_path_factory.mktemp("straight")
    train(tiny_recipe(folder, *SAVES, KEEP_ALL))
    return folder / "run"


LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("config.json", "tokenizer.json", "rng_state.pth")]


@pytest.mark.parametrize("file", ["safetensors", "optimizer.pt", MANIFEST, *LATER])
def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(tmp_path, mount, straight, file):
    """The disk has room for one checkpoint and for the next one up to (not including) the end of `file`."""
    written = [path for path in (straight / "checkpoint-2").iterdir() if path.is_file()]
    written.sort(key=lambda path: path.stat().st_mtime_ns)
    victim = next(index for index, path in enumerate(written) if path.name.endswith(file))
    num_pages = sum(map(pages, [*written, *written[: victim + 1]])) - 1
    out = mount((num_pages + pages(straight / "recipe.yaml")) * PAGE) / "run"
    recipe = tiny_recipe(straight.parent, *SAVES, KEEP_ALL, f"out={out}")
    for _ in range(2):  # the same command again meets the same disk
        with pytest.raises(OSError) as caught:
            train(recipe)
        assert str(caught.value) == (
            f"checkpoint-4 could not be written to {out} (No space left on device); "
            f"the last good checkpoint is {out / 'checkpoint-2'}. "
            "Free space there, or put that right, and run the same command again."
        )
        assert not leftovers(out) and not (out / "checkpoint-4").exists()
        assert last_good(out) == out / "checkpoint-2"
        verify(out / "checkpoint-2")
    mount(64 * 2**20)
    assert train(recipe)["steps"] == 8
    assert_same_run(out, straight)


def test_a_disk_too_small_for_any_checkpoint_says_so(tmp_path, mount):
    out = mount(64 * PAGE) / "run"
    recipe = tiny_recipe(tmp_path, *SAVES, f"out={out}")
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*there is no earlier checkpoint"):
        train(recipe)
    assert not leftovers(out)


# Saving and resuming.


@pytest.mark.parametrize("name", ["checkpoint-2", "."])
def test_what_training_writes_is_a_folder_of_table_files(straight, name):
    folder, state = straight / name, weights(straight / name)
    opened = open_tables(folder)
    assert verify_tables(folder) > 0
    for table in opened.tables.values():
        rows = np.concatenate(list(read_table(opened, table)))
        assert table.shards[0].start % 4096 == 0 and torch.equal(
            decode(torch.from_numpy(rows), table.width, table.encoding, torch.float32), state[table.name]
        )
    if name != ".":
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert {"memory.json", *(table.shards[0].crc32.name for table in opened.tables.values())} <= listed.keys()


def trainer_of(recipe: Recipe) -> EngrammarTrainer:
    arguments = run_module.training_arguments(recipe)
    return run_module._trainer(recipe, arguments, None, run_module.build_config)[0]


def test_training_goes_on_while_one_checkpoint_at_a_time_is_flushed(tmp_path, monkeypatch):
    steps, ended, stepped = itertools.count(1), [], threading.Condition()
    seal, step = trainer_module.seal, EngrammarTrainer.training_step
    begun = [0]

    def slow_seal(partial, final):
        """Lasts until the two steps up to the next save have begun, and a little longer."""
        with stepped:
            assert stepped.wait_for(lambda: begun[-1] >= min(int(final.name.rpartition("-")[2]) + 2, 8), timeout=60)
        time.sleep(0.1)
        seal(partial, final)
        ended.append(begun[-1])

    def counted(self, *args, **kwargs):
        with stepped:
            begun.append(next(steps))
            stepped.notify_all()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "seal", slow_seal)
    monkeypatch.setattr(EngrammarTrainer, "training_step", counted)
    trainer_of(tiny_recipe(tmp_path, *SAVES)).train()
    assert ended == [4, 6, 8, 8]  # the next save, two steps on, waits for the flush
    assert last_good(tmp_path / "run").name == "checkpoint-8"
    verify(tmp_path / "run" / "checkpoint-8")


def test_a_failed_flush_reaches_the_user_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    seal = trainer_module.seal

    def fails_at_the_last(partial, final):
        if final.name == "checkpoint-8":
            raise OSError(5, "Input/output error", str(partial))
        seal(partial, final)

    monkeypatch.setattr(trainer_module, "seal", fails_at_the_last)
    with pytest.raises(OSError, match=r"checkpoint-8 could not be written .*Input/output error.*checkpoint-6"):
        train(tiny_recipe(tmp_path, *SAVES))
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-6"]


def test_an_error_in_training_waits_for_the_flush(tmp_path, monkeypatch):
    seal, step, calls = trainer_module.seal, EngrammarTrainer.training_step, []

    def slow_seal(partial, final):
        time.sleep(0.3)
        seal(partial, final)

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "seal", slow_seal)
    monkeypatch.setattr(EngrammarTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe(tmp_path, *SAVES))
    verify(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize(
    ("greater", "best", "keep"), [("true", 2, 1), ("true", 2, 2), ("false", 8, 1), ("false", 8, 9)]
)
def test_the_best_model_is_kept_and_loaded_at_the_end(tmp_path, greater, best, keep):
    """The loss falls, so that the best by "greater is better" is the first, by the opposite the last."""
    settings = (
        *SAVES,
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=2",
        "trainer.load_best_model_at_end=true",
        "trainer.metric_for_best_model=eval_loss",
        f"trainer.greater_is_better={greater}",
        f"trainer.save_total_limit={keep}",
    )
    out = tmp_path / "run"
    train(tiny_recipe(tmp_path, *settings))
    left = {path.name for path in out.glob("checkpoint-*")}
    assert left == {
        f"checkpoint-{step}" for step in {1: {best}, 2: {best, 8 if best == 2 else 6}, 9: {2, 4, 6, 8}}[keep]
    }
    for name in left:
        verify(out / name)
        state = json.loads((out / name / "trainer_state.json").read_text())
        seen = 2 if best == 2 else step_of(out / name)
        assert state["best_model_checkpoint"] == str(out / f"checkpoint-{seen}")
    expected, found = weights(out / f"checkpoint-{best}"), weights(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    result = json.loads((out / "result.json").read_text())
    (out / "result.json").unlink()  # as if it was killed after its last step
    again = train(tiny_recipe(tmp_path, *settings))
    assert again["validation_loss"] == result["validation_loss"]
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in expected.items())


def test_damage_is_named_before_anything_is_loaded(tmp_path):
    out, recipe = tmp_path / "run", tiny_recipe(tmp_path, *SAVES)
    train(recipe)
    (out / "result.json").unlink()
    kept = {name: (out / "checkpoint-8" / name).read_bytes() for name in ("trainer_state.json", "optimizer.pt")}
    for name, content in kept.items():
        (out / "checkpoint-8" / name).write_bytes(content[:50] + b"~" + content[51:])
        with pytest.raises(ValueError, match=f"{name} is damaged in bytes 0 to .*delete .*checkpoint-8"):
            train(recipe)
        with pytest.raises(ValueError, match=f"{name} is damaged in bytes 0 to .*delete .*checkpoint-8"):
            trainer_of(recipe).train(resume_from_checkpoint=True)
        (out / "checkpoint-8" / name).write_bytes(content)
    train(recipe)


def test_resuming_takes_the_last_good_checkpoint_and_older_folders_with_a_warning(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, "trainer.max_steps=4", "trainer.save_steps=2", KEEP_ALL)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        trainer_of(recipe).train(resume_from_checkpoint=True)
    straight = trainer_of(recipe)
    straight.train()
    (out / "checkpoint-4" / MANIFEST).unlink()
    resumed = trainer_of(recipe)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert any("checkpoint-4 has no manifest.json" in record.getMessage() for record in caplog.records)
    verify(out / "checkpoint-4")  # made again
    for (name, one), other in zip(straight.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(one, other), name
    (out / "checkpoint-2" / MANIFEST).unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer_of(recipe).train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert any("so damage would not be noticed" in record.getMessage() for record in caplog.records)


def test_a_folder_of_unsealed_checkpoints_of_another_recipe_is_refused(tmp_path):
    train(tiny_recipe(tmp_path, *SAVES))
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint-8" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        train(tiny_recipe(tmp_path, *SAVES, "seed=5"))
