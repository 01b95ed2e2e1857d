"""The HTTP server: OpenAI's completions, chat and models; health, metrics; patches, for whoever has the token."""

import asyncio
import hmac
import json
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from engrammar.serve.openai.asked import Asked, Ids, Kind, Refused, body_of, read_asked
from engrammar.serve.openai.engine import Engine
from engrammar.serve.openai.metrics import render
from engrammar.serve.openai.text import TextStream

MOST_BYTES = 8 * 2**20  # of a request
MOST_PATCH_BYTES = 256 * 2**20
OBJECT: dict[Kind, str] = {"completions": "text_completion", "chat": "chat.completion"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one answer, or its end: then `finish` says why."""

    index: int
    text: str
    ids: Ids
    finish: str | None = None


@final
class Server:
    """The routes of one engine. `token` allows to change patches; without one nobody may."""

    def __init__(self, engine: Engine, name: str, token: str | None) -> None:
        self.engine, self.name, self.token = engine, name, token
        config = engine.model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else engine.tokenizer.eos_token_id
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    async def one(self, index: int, ids: Ids, asked: Asked) -> AsyncIterator[Piece]:
        """One answer. Answers to one prompt are drawn by seeds that follow each other."""
        text = TextStream(self.engine.tokenizer, ids, asked.stop)
        seed = None if asked.seed is None else asked.seed + index
        ends, last = [] if asked.ignore_eos else self.ends, -1
        async with aclosing(self.engine.tokens(ids, asked, seed, ends)) as tokens:
            async for new in tokens:
                said, taken = "", []
                for last in new:
                    said += text.put(last)
                    taken.append(last)
                    if text.stopped:
                        with suppress(StopAsyncIteration):
                            await tokens.asend(True)
                        yield Piece(index=index, text=said, ids=taken, finish="stop")
                        return
                yield Piece(index=index, text=said, ids=taken)
        yield Piece(index=index, text=text.end(), ids=[], finish="stop" if last in ends else "length")

    async def pieces(self, asked: Asked) -> AsyncIterator[Piece]:
        """The pieces of all answers of a request, as they come."""
        came: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def run(index: int, ids: Ids) -> None:
            try:
                async with aclosing(self.one(index, ids, asked)) as answer:  # type: ignore[type-var]
                    async for piece in answer:
                        await came.put(piece)
            except Exception as error:
                await came.put(error)

        async with self.engine.turn():
            tasks = [asyncio.create_task(run(index, ids)) for index, ids in enumerate(asked.sequences)]
            try:
                left = len(tasks)
                while left:
                    piece = await came.get()
                    if isinstance(piece, Exception):
                        raise piece
                    left -= piece.finish is not None
                    yield piece
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self, request: Request, kind: Kind) -> Response:
        """Answers a request for completions or a chat."""
        body = await body_of(request.stream(), MOST_BYTES)
        asked = read_asked(body, kind, self.name, self.engine.tokenizer, self.engine.limits)
        self.engine.check_ids(asked.prompts)
        self.engine.choice(asked.patches)  # refused before a stream begins
        self.engine.reserve(len(asked.sequences))
        about = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": OBJECT[kind],
            "created": int(time.time()),
            "model": self.name,
        }
        if asked.stream:
            return Stream(self.engine, len(asked.sequences), self.events(asked, kind, about))
        try:
            return JSONResponse(about | await unless_gone(request, self.whole(asked, kind)))
        finally:
            self.engine.release(len(asked.sequences))

    async def whole(self, asked: Asked, kind: Kind) -> dict[str, Any]:
        """All of a request's answers."""
        texts: list[str] = [""] * len(asked.sequences)
        ids: list[Ids] = [[] for _ in texts]
        ended: list[str | None] = [None] * len(texts)
        async with aclosing(self.pieces(asked)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                texts[piece.index] += piece.text
                ids[piece.index] += piece.ids
                ended[piece.index] = piece.finish
        choices = []
        for index, text in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
            choice = {"index": index, **said, "logprobs": None, "finish_reason": ended[index]}
            choices.append(choice | ({"token_ids": ids[index]} if asked.token_ids else {}))
        return {"choices": choices, "usage": usage(asked, sum(map(len, ids)))}

    async def events(self, asked: Asked, kind: Kind, about: dict[str, Any]) -> AsyncIterator[str]:
        """A request's answers as server-sent events."""
        about |= {"object": "chat.completion.chunk"} if kind == "chat" else {}
        num_new = 0
        try:
            if kind == "chat":
                for index in range(len(asked.sequences)):
                    delta = {"role": "assistant", "content": ""}
                    yield event(about | {"choices": [{"index": index, "delta": delta, "finish_reason": None}]})
            async with aclosing(self.pieces(asked)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    num_new += len(piece.ids)
                    if not piece.text and piece.finish is None and not asked.token_ids:
                        continue
                    said: dict[str, Any] = {"text": piece.text}
                    if kind == "chat":
                        said = {"delta": {"content": piece.text} if piece.text else {}}
                    said |= {"token_ids": piece.ids} if asked.token_ids else {}
                    choice = {"index": piece.index, **said, "logprobs": None, "finish_reason": piece.finish}
                    yield event(about | {"choices": [choice]})
            if asked.usage:
                yield event(about | {"choices": [], "usage": usage(asked, num_new)})
        except Refused as refused:
            yield event(refused.body())
        yield "data: [DONE]\n\n"

    async def models(self, request: Request) -> Response:
        about = {"id": self.name, "object": "model", "created": 0, "owned_by": "engrammar"}
        return JSONResponse({"object": "list", "data": [about | {"max_model_len": self.engine.limits.max_length}]})

    async def health(self, request: Request) -> Response:
        failure = self.engine.failure
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(render(self.engine))

    async def patches(self, request: Request) -> Response:
        """Lists (GET), adds (POST, the file is the body) or removes (DELETE /NAME) patches.

        They are for all requests; with ?on_request=true for those that choose them.
        """
        if self.token is None:
            raise Refused("This server was started without a token, so patches cannot be changed.", 403)
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Refused("Patches are changed with the server's token: Authorization: Bearer TOKEN.", 401)
        if request.method == "POST":
            said = request.query_params.get("on_request", "false")
            if said not in ("true", "false"):
                raise Refused(f"on_request is {said!r}; allowed: true or false.")
            content = await body_of(request.stream(), MOST_PATCH_BYTES)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "patch.safetensors"
                path.write_bytes(content)
                await self.engine.add(str(path), on_request=said == "true")
        elif request.method == "DELETE":
            await self.engine.remove(request.path_params["name"])
        data = [{"id": name, "on_request": False} for name in self.engine.patches()]
        data += [{"id": name, "on_request": True} for name in self.engine.offered()]
        return JSONResponse({"object": "list", "data": data})

    def app(self) -> Starlette:
        """The application; it closes the engine when it ends."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.engine.close)

        routes = [
            Route("/v1/completions", partial(self.answer, kind="completions"), methods=["POST"]),
            Route("/v1/chat/completions", partial(self.answer, kind="chat"), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/patches", self.patches, methods=["GET", "POST"]),
            Route("/v1/patches/{name}", self.patches, methods=["DELETE"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]

        async def refuse(request: Request, error: Exception) -> Response:
            refused = error if isinstance(error, Refused) else Refused(" ".join(str(error).split()))
            self.engine.counts["refused"] += 1
            return JSONResponse(refused.body(), refused.status)

        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={ValueError: refuse})


def run(server: Server, host: str, port: int) -> None:
    """Serves until the process is told to end."""
    print(f"Serving {server.name} at http://{host}:{port}/v1", flush=True)
    uvicorn.run(server.app(), host=host, port=port, log_level="warning")


class Stream(StreamingResponse):
    """Server-sent events that give their places back, however they end."""

    def __init__(self, engine: Engine, num_answers: int, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.engine, self.num_answers, self.events = engine, num_answers, events

    async def __call__(self, *given: Any) -> None:
        try:
            await super().__call__(*given)
        finally:
            await self.events.aclose()  # type: ignore[attr-defined]
            self.engine.release(self.num_answers)


async def unless_gone(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives; it is cancelled if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused("The client has gone away.", 499)
        return working.result()
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def usage(asked: Asked, num_new: int) -> dict[str, int]:
    """Tokens of a request, as OpenAI counts them: each prompt once."""
    prompts = sum(map(len, asked.prompts))
    return {"prompt_tokens": prompts, "completion_tokens": num_new, "total_tokens": prompts + num_new}


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
