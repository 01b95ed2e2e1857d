"""Processes that tests start: one thread each, with the modules that lie beside the tests, ended with their test."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
COMMANDS = Path(sys.executable).parent  # of this environment: engrammar, accelerate


def environment(**added: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **added}


def torchrun(num_ranks: int, *command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *command]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; if the test is given up, SIGTERM, which torchrun hands on to its ranks."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            out, errors = process.communicate()
        except BaseException:
            process.terminate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def succeed(command: list[str]) -> None:
    done = run(command)
    assert done.returncode == 0, done.stderr[-4000:]
