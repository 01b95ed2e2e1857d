"""The process that uses Mooncake Store's library for `store.py`: the library may block for a minute, or abort.

It is run by path, so it imports nothing of this package. It reads JSON messages from a pipe; rows go through shared
memory.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any


class Served:
    """One connection to a pool. Each method serves one kind of message and returns what the answer carries."""

    def __init__(self, memory: mmap.mmap, settings: dict[str, Any]) -> None:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self.looking_up = threading.Lock()
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.pinned = ReplicateConfig()
        self.pinned.with_hard_pin = True  # otherwise the pool may drop values, but a table must stay whole
        self.store = MooncakeDistributedStore()
        code = self.store.setup(
            settings["host"],
            settings["metadata"],
            0,  # gives no memory to the pool
            settings["buffer_bytes"],
            settings["protocol"],
            settings["devices"],
            settings["address"],
        )
        if code == 0:
            code = self.store.register_buffer(self.base, len(memory))
        if code != 0:
            raise RuntimeError(f"setup answered {code}")

    def read(self, keys: list[str], to: list[list[int]], start: list[list[int]], size: list[list[int]]) -> Any:
        """Reads ranges of values into the shared memory; returns the bytes read of each value, or an error below 0.

        While the lease of a value lasts, the library knows where the value is and does not ask the master. Values that
        it does not know are looked up here, and all are then read again.
        """
        addresses = [[self.base + place for place in places] for places in to]
        got = self.store.batch_get_into_multi_buffer_ranges(keys, addresses, size, start)
        unknown = [key for key, answer in zip(keys, got) if answer < 0]
        if unknown:
            with self.looking_up:
                self.store.batch_get_session_start(unknown)
            got = self.store.batch_get_into_multi_buffer_ranges(keys, addresses, size, start)
        return got

    def put(self, key: str, start: int, size: int) -> int:
        """Writes a value from the shared memory; returns 0 or an error number."""
        return self.store.batch_put_from([key], [self.base + start], [size], self.pinned)[0]

    def note(self, key: str, text: str) -> int:
        """Writes a small text in place of an earlier one; returns 0 or an error number."""
        self.store.remove(key, True)
        return self.store.put(key, text.encode(), self.pinned)

    def text(self, key: str) -> str:
        """Reads a small text; it is empty if there is none."""
        return self.store.get(key).decode()

    def exist(self, keys: list[str]) -> list[int]:
        """Returns for each key 1 if it has a value, 0 if not, and a number below 0 if that is not known."""
        return self.store.batch_is_exist(keys)

    def remove(self, keys: list[str]) -> list[int]:
        return self.store.batch_remove(keys, True)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    memory = mmap.mmap(int(sys.argv[2]), 0)
    settings = json.loads(connection.recv_bytes())
    reading, writing = threading.Lock(), threading.Lock()

    def answer(**message: Any) -> None:
        with writing:
            connection.send_bytes(json.dumps(message).encode())

    def serve() -> None:
        while True:
            reading.acquire()
            try:
                message = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the client is gone; another thread may be inside the library and cannot be stopped
            if not message["alone"]:
                reading.release()
            try:
                answer(number=message["number"], result=getattr(served, message["name"])(**message["arguments"]))
            except Exception as error:
                answer(number=message["number"], error=str(error))
            if message["alone"]:  # only now, since no request may be taken before this answer
                reading.release()

    try:
        served = Served(memory, settings)
        answer(number=0, result=None)
    except ImportError as error:
        answer(number=0, absent=str(error))
        return
    except RuntimeError as error:
        answer(number=0, error=str(error))
        os._exit(1)
    for _ in range(settings["in_flight"] - 1):
        threading.Thread(target=serve, daemon=True).start()
    serve()


if __name__ == "__main__":
    main()
