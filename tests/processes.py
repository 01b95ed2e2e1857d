"""Processes that tests start, with one thread each: commands, torchrun, and ranks that are forks of one server."""

import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent
COMMANDS = Path(sys.executable).parent  # of this environment: engrammar, accelerate
LOADED = ("engrammar.train.run", "engrammar.train.trainer", "engrammar.train.data", "torch.distributed.fsdp")


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


def fork_server() -> ForkServerContext:
    """Starts processes as forks of one that has loaded torch and transformers, which takes a process seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    return context


def run_ranks(num_ranks: int, folder: Path, work: Callable[..., None], *arguments: object) -> list[int]:
    """Runs `work(*arguments)` in so many processes, which find each other as those of torchrun do.

    Returns their exit codes; what rank R prints is in `folder`/rank-R.log.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
    }  # fmt: skip
    processes = []
    for rank in range(num_ranks):
        settings = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = folder / f"rank-{rank}.log"
        processes.append(fork_server().Process(target=_rank, args=(settings, log, work, arguments), daemon=True))
        processes[-1].start()
    try:
        running = {process.sentinel: process for process in processes}
        while running and not any(process.exitcode for process in processes):
            for sentinel in multiprocessing.connection.wait(list(running)):
                running.pop(sentinel).join()
    finally:  # like torchrun: one that fails ends all
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _rank(settings: dict[str, str], log: Path, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(settings)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        raise


def succeed_on_ranks(num_ranks: int, folder: Path, work: Callable[..., None], *arguments: object) -> None:
    codes = run_ranks(num_ranks, folder, work, *arguments)
    logs = [(folder / f"rank-{rank}.log").read_text()[-2000:] for rank, code in enumerate(codes) if code]
    assert not any(codes), "\n".join(logs)
