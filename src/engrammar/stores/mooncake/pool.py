"""A connection to a Mooncake Store pool, in its own process, which can be killed if it hangs (`process.py`)."""

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from engrammar.config import check_setting

BUFFER_BYTES = 2**24  # the library's own buffer, for small texts
IN_FLIGHT = 4  # messages that are served at the same time


@dataclass(frozen=True, kw_only=True)
class PoolServer:
    """Where a pool is, and how long to wait for it."""

    address: str = "127.0.0.1:50051"  # the address of `mooncake_master`
    # Where the two ends of a transfer find each other; `P2PHANDSHAKE` needs no server for that.
    metadata: str = "P2PHANDSHAKE"
    protocol: str = "tcp"  # `tcp`, or `rdma` with `devices`
    devices: str = ""  # RDMA devices, separated by commas
    host: str = "127.0.0.1"  # the name of this machine in the pool
    # How long to wait for an answer, a second try over a new connection included, before rows are missing.
    seconds: float = 10.0


class PoolLost(OSError):
    """The pool or the process connected to it did not answer in time, refused, or died; the message says which."""


class Pool:
    """One connection. After a `PoolLost` it cannot be used again: close it and open another."""

    def __init__(self, server: PoolServer, num_bytes: int, seconds: float) -> None:
        """Connects.

        Raises:
            PoolLost: there was no answer within `seconds`.
            ValueError: the package is not installed, or a system library that it needs is missing.
        """
        _check_port(server.address, seconds)
        handle = os.memfd_create("engrammar-pool")
        os.ftruncate(handle, num_bytes)
        # The bytes shared with the process, uint8: the request `read` writes to them, `put` reads them.
        self.memory = np.frombuffer(mmap.mmap(handle, num_bytes), dtype=np.uint8)
        self._connection, theirs = Pipe()
        program = Path(__file__).with_name("process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", program, str(theirs.fileno()), str(handle)],
            pass_fds=(theirs.fileno(), handle),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the library logs its every step
        )
        theirs.close()
        os.close(handle)
        self._owner = os.getpid()
        self._last, self._answers = 0, dict[int, dict[str, Any]]()
        try:
            settings: dict[str, str | int] = {
                name: getattr(server, name) for name in ("address", "metadata", "protocol", "devices", "host")
            }
            settings |= {"buffer_bytes": BUFFER_BYTES, "in_flight": IN_FLIGHT}
            self._connection.send_bytes(json.dumps(settings).encode())
            self.receive(0, seconds)
        except BaseException:
            self.close()
            raise

    def send(self, name: str, *, alone: bool = False, **arguments: Any) -> int:
        """Sends a request and returns the number of its answer.

        Args:
            name: the method of `process.Served` to call, with `arguments`.
            alone: the process takes no other request before it has answered this one.
        """
        self._last += 1
        message = {"number": self._last, "name": name, "alone": alone, "arguments": arguments}
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise PoolLost(self._death()) from error
        return self._last

    def receive(self, number: int, seconds: float) -> Any:
        """Waits for the answer with that number, at most `seconds`."""
        until = time.monotonic() + seconds
        while number not in self._answers:
            try:
                if not self._connection.poll(max(0.0, until - time.monotonic())):
                    raise PoolLost(f"no answer within {seconds:.3g} s")
                answer = json.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionError) as error:
                raise PoolLost(self._death()) from error
            self._answers[answer["number"]] = answer
        answer = self._answers.pop(number)
        if "absent" in answer:
            raise ValueError(
                f"Remote tables need the Mooncake client, which cannot be loaded ({answer['absent']}): pip install "
                "'engrammar[remote]', and on Debian apt-get install libibverbs1 libnuma1 libcurl4."
            )
        if "error" in answer:
            raise PoolLost(answer["error"])
        return answer["result"]

    def ask(self, name: str, seconds: float, **arguments: Any) -> Any:
        """Sends a request and waits for the answer."""
        return self.receive(self.send(name, alone=True, **arguments), seconds)

    def close(self) -> None:
        """Kills the process, whatever it is doing. A fork only closes its pipe: the process belongs to its parent."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        return f"its client process ended (exit status {self._process.poll()})"


def _check_port(address: str, seconds: float) -> None:
    """Raises at once if nothing listens on the port; the library would try forever."""
    if "://" in address:
        return
    host, _, port = address.rpartition(":")
    check_setting("The pool's address", address, bool(host) and port.isdecimal(), "HOST:PORT of mooncake_master")
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except OSError as error:
        raise PoolLost(f"no connection ({error.strerror or error})") from error
