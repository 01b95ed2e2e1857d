"""A Mooncake Store pool on this machine, for measurements and tests, started as docs/remote-tables.md says."""

import importlib.util
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from engrammar.stores.mooncake.pool import PoolServer

START_SECONDS = 20.0


def why_no_pool() -> str | None:
    """Why no pool can be started here; None if one can."""
    folder = _programs()
    if folder is None:
        return "Mooncake is not installed: pip install 'engrammar[remote]'"
    found = subprocess.run([folder / "mooncake_master", "--version"], capture_output=True, text=True, check=False)
    if "error while loading" in found.stderr:
        return f"Mooncake lacks a library of the system ({found.stderr.strip().rsplit(': ', 1)[0]}): " + (
            "apt-get install libibverbs1 libnuma1 libcurl4"
        )
    return None


def _programs() -> Path | None:
    package = importlib.util.find_spec("mooncake")
    return Path(package.submodule_search_locations[0]) if package and package.submodule_search_locations else None


class LoopbackPool:
    """`mooncake_master` and one `mooncake_client` that gives memory, both on 127.0.0.1; they end with the `with` block.

    The two processes are `master` and `storage`; tests kill them and start them again.
    """

    def __init__(self, segment: str = "64MB", seconds: float = 10.0, *, lease_ms: int = 5000) -> None:
        self.server = PoolServer(address=f"127.0.0.1:{free_port()}", seconds=seconds)  # how the pool is reached
        self.segment, self.lease_ms = segment, lease_ms
        self.start()

    def start(self) -> None:
        """Starts both processes, at first or after `stop`; rows uploaded earlier are lost."""
        folder = _programs()
        assert folder is not None, why_no_pool()
        port = int(self.server.address.rpartition(":")[2])
        self.master = _run(
            folder / "mooncake_master", "--rpc_address=127.0.0.1", f"--rpc_port={port}", "--metrics_host=127.0.0.1",
            f"--metrics_port={free_port()}", f"--default_kv_lease_ttl={self.lease_ms}",
        )  # fmt: skip
        wait_for_port(port, self.master)
        storage_port = free_port()
        self.storage = _run(
            folder / "mooncake_client", "--host=127.0.0.1", f"--port={storage_port}", "--metadata_server=P2PHANDSHAKE",
            f"--master_server_address={self.server.address}", f"--global_segment_size={self.segment}",
        )  # fmt: skip
        wait_for_port(storage_port, self.storage)

    def stop(self) -> None:
        for process in (self.storage, self.master):
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _run(program: Path, *arguments: str) -> subprocess.Popen[bytes]:
    only_here = {"MC_TCP_BIND_ADDRESS": "127.0.0.1"}
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        [program, *arguments], stdin=nothing, stdout=nothing, stderr=nothing, env=os.environ | only_here
    )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float = START_SECONDS) -> None:
    """Waits until a process listens at a port of this machine.

    Raises:
        OSError: it does not in time, or has ended.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise OSError(f"{process.args!r} does not listen on port {port} (exit status {process.poll()}).")
