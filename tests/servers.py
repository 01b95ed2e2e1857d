"""A server of a tiny model on a port of its own, in a thread, and what asks it."""

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import uvicorn

from engrammar.serve.openai.asked import Limits
from engrammar.serve.openai.engine import Engine
from engrammar.serve.openai.server import Server

NAME, TOKEN = "tiny", "the token of the tests"
NEW = 10  # tokens of an answer


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


def client_of(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(server, text, **settings):
    extra = {"ignore_eos": True, "return_token_ids": True}
    chosen = {"max_tokens": NEW, "temperature": 0, "extra_body": extra, **settings}
    return client_of(server).completions.create(model=NAME, prompt=text, **chosen)


def ask(server, path: str, body: bytes | None = None, method: str | None = None, token: str = ""):
    """Status and JSON (or text) of a plain request."""
    request = urllib.request.Request(server.url + path, body, {"Authorization": f"Bearer {token}"}, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    return status, json.loads(content) if content.startswith(b"{") else content.decode()
