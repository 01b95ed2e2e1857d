"""A server of a tiny model on a port of its own, in a thread, and a client."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from engrammar.serve.openai.asked import Limits
from engrammar.serve.openai.engine import Engine
from engrammar.serve.openai.server import Server

NAME, TOKEN = "tiny", "the token of the tests"


class Running:
    """A server that runs: `url`, and its `engine`."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self.engine = url, engine


@contextmanager
def serving(model, tokenizer, token: str | None = TOKEN, **limits) -> Iterator[Running]:
    chosen = {"max_length": 256, "max_requests": 24, "cache_tokens": 1024, "batch_tokens": 64, **limits}
    ready, ends, found = threading.Event(), [], []

    async def run() -> None:
        engine = Engine(model, tokenizer, Limits(**chosen))
        server = uvicorn.Server(uvicorn.Config(Server(engine, NAME, token).app(), log_level="error"))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            found.append(Running(f"http://127.0.0.1:{listening.getsockname()[1]}", engine))
            ends.append(server)
            asyncio.get_running_loop().call_soon(ready.set)
            await server.serve([listening])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield found[0]
    finally:
        ends[0].should_exit = True
        thread.join(60)
