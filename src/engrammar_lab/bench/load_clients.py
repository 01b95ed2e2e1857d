"""Clients of a server under load: what each request got, beside what `generate` says to the same prompt."""

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlparse

NUM_NEW = (4, 12, 32)  # tokens of answers
LEAVES = 0.1  # of the clients, the share that goes away after the first tokens
RIGHT, CANCELLED, WRONG, LOST = "right", "cancelled", "wrong tokens", "the connection broke"
SECONDS = 60.0  # after which a client gives up


class Prompt(NamedTuple):
    """A prompt, and the answers that are right: one for each state of the memory that a request may find."""

    ids: list[int]
    says: Sequence[list[int]]

    def allows(self, said: Sequence[int]) -> bool:
        return any(one[: len(said)] == list(said) for one in self.says)


class Got(NamedTuple):
    """What a request got: how it ended, in seconds, with how many tokens."""

    how: str
    seconds: float
    num_tokens: int


def count(got: Sequence[Got], seconds: float) -> dict[str, Any]:
    """Counts of what all clients got, and the seconds that half and 99 in a hundred of the right answers took."""
    counts = Counter(one.how for one in got)
    took = sorted(one.seconds for one in got if one.how == RIGHT)
    return {
        "seconds": seconds,
        "requests": len(got),
        **{how: counts[how] for how in (RIGHT, CANCELLED, WRONG)},
        "errors": {how: number for how, number in sorted(counts.items()) if how not in (RIGHT, CANCELLED, WRONG)},
        "tokens_per_second": sum(one.num_tokens for one in got) / seconds,
        "median_seconds": took[len(took) // 2] if took else None,
        "p99_seconds": took[len(took) * 99 // 100] if took else None,
    }


class Clients:
    """Threads that ask again and again until the `with` block ends. `got` may be exchanged meanwhile."""

    def __init__(self, url: str, name: str, prompts: Sequence[Prompt], *, number: int, pause: float) -> None:
        self.address, self.name, self.prompts, self.pause = urlparse(url).netloc, name, prompts, pause
        self.got: list[Got] = []
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self._ask_again, args=(seed,)) for seed in range(number)]

    def _ask_again(self, seed: int) -> None:
        drawn = random.Random(seed)
        while not self.ending.wait(drawn.expovariate(1 / self.pause)):
            prompt, num_new = drawn.choice(self.prompts), drawn.choice(NUM_NEW)
            leaves = drawn.random() < LEAVES
            streams = leaves or drawn.random() < 0.5
            started = time.monotonic()
            how, said = ask(self.address, self.name, prompt.ids, num_new, streams=streams, leaves=leaves)
            if not prompt.allows(said) or (how == RIGHT and len(said) != num_new):
                how = WRONG
            self.got.append(Got(how, time.monotonic() - started, len(said)))

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        for thread in self.threads:
            thread.join()


def ask(
    address: str, name: str, ids: list[int], num_new: int, *, streams: bool, leaves: bool = False
) -> tuple[str, list[int]]:
    """Asks HOST:PORT for greedy tokens after a prompt; returns how it ended, and the tokens that came.

    The answer comes in pieces if it `streams`; a client that `leaves` goes away after the first one.
    """
    body = {"model": name, "prompt": ids, "max_tokens": num_new, "temperature": 0, "stream": streams}
    raw = json.dumps(body | {"ignore_eos": True, "return_token_ids": True})
    said: list[int] = []
    connection = http.client.HTTPConnection(address, timeout=SECONDS)
    try:
        connection.request("POST", "/v1/completions", raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return _why(response.status, json.loads(response.read())), said
        if not streams:
            return RIGHT, json.loads(response.read())["choices"][0]["token_ids"]
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line.removeprefix(b"data: "))
            if "error" in piece:
                return _why(200, piece), said
            said += piece["choices"][0]["token_ids"]
            if leaves and said:
                return CANCELLED, said
        return RIGHT, said
    except (OSError, http.client.HTTPException):
        return LOST, said
    finally:
        connection.close()


def _why(status: int, content: dict[str, Any]) -> str:
    return f"{status} {content['error']['code'] or content['error']['type']}"
