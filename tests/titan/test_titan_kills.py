"""Ranks are killed at random while torchtitan trains: it goes on from the last whole checkpoint, to the bit.

`ENGRAMMAR_KILLS=10 .venv-titan/bin/pytest tests/titan/test_titan_kills.py` kills ten times.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip(
    "torchtitan", reason="torchtitan is not installed here: `make test-titan` makes an environment with it"
)

from launching import command, from_seed, launch, noted

from processes import environment

pytestmark = [pytest.mark.titan, pytest.mark.timeout(1800)]
KILLS = int(os.environ.get("ENGRAMMAR_KILLS", "2"))
LAYOUT = "FSDP2 on 2"


def ranks_of(torchrun: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            is_rank = parent == torchrun and b"titan_cpu.py" in (stat.parent / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if is_rank:
            found.add(int(stat.parent.name))
    return found


def kill_at_random(process: subprocess.Popen, folder: Path, name: str) -> list[int]:
    """Kills a rank `KILLS` times, each time after one more step; returns how many steps had been noted then."""
    generator, killed = random.Random(0), []
    while process.poll() is None and len(killed) < KILLS:
        seen, ranks = len(noted(folder, name)), ranks_of(process.pid)
        while process.poll() is None and len(noted(folder, name)) <= seen:
            time.sleep(0.05)
            ranks = ranks_of(process.pid)
        time.sleep(generator.uniform(0, 1))  # in any part of a step, or while its checkpoint is written
        if process.poll() is None and ranks:
            os.kill(generator.choice(sorted(ranks)), signal.SIGKILL)
            killed.append(len(noted(folder, name)))
        while process.poll() is None and ranks & ranks_of(process.pid):
            time.sleep(0.05)
    return killed


def test_a_run_whose_ranks_are_killed_ends_as_one_that_is_left_alone(titan_folder):
    settings = (*from_seed(titan_folder, interval=1), f"--training.steps={4 * KILLS + 2}")
    straight = {step["step"]: step for step in launch(titan_folder, "left-alone", LAYOUT, *settings)}
    restarts = (f"--max-restarts={KILLS}",)
    started, log = command(titan_folder, "killed", LAYOUT, *settings, torchrun=restarts), titan_folder / "killed.log"
    surroundings = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # docs/titan.md
    with log.open("w") as out, subprocess.Popen(started, env=surroundings, stdout=out, stderr=out) as process:
        try:
            killed = kill_at_random(process, titan_folder, "killed")
            process.wait()
        except BaseException:
            process.terminate()
            raise
    assert process.returncode == 0, log.read_text()[-4000:]
    run = noted(titan_folder, "killed")
    print(f"killed after {killed} of {len(run)} steps: {[step['step'] for step in run]}")
    assert len(killed) == KILLS and run[-1]["step"] == len(straight)
    for before, after in zip([{"step": 0}, *run], run):
        assert after["step"] <= before["step"] + 1  # no step is left out
        assert after == straight[after["step"]]
    assert run[0] != run[1]  # the control: steps differ
