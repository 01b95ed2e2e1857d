"""The explorer's server: a page and JSON on loopback.

A POST that takes long answers with lines of JSON: `{"progress": [done, total, what]}` and at the end `{"result": ...}`
or `{"error": sentence}`. One thread uses the model, a few requests may wait for it, and one whose page has gone away is
dropped.
"""

import base64
import contextlib
import json
import secrets
import socket
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from typing import Any, final

import anyio
import uvicorn
from anyio import CapacityLimiter, to_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engrammar.edit import Fact
from engrammar.serve.openai.asked import Refused, body_of, whole_characters
from engrammar_explore.export import page_of
from engrammar_explore.guarding import Guard
from engrammar_explore.session import Session
from engrammar_explore.trying import Progress

SCRIPT = "text/javascript"
STATIC = {"page.css": "text/css", "icon.svg": "image/svg+xml", "draw.js": SCRIPT, "edit.js": SCRIPT, "page.js": SCRIPT}
MOST_JSON, MOST_FILE = 256 * 1024, 16 * 1024 * 1024  # bytes of a request
MOST_LINES, MOST_LINE = 20, 2000  # of prompts, and characters of one
MOST_WAITING = 4  # requests that wait for the model
Job = Callable[[Mapping[str, Any], Progress], Any]


@final
class Desk:
    """The routes: what a page may ask of a session."""

    def __init__(self, session: Session) -> None:
        self.session, self.waiting = session, 0
        self.one_thread = CapacityLimiter(1)  # uses the model at a time

    def routes(self) -> list[Route]:
        """All that is served; nothing else is, and no path of the page names a file."""
        asked: dict[str, Job] = {
            "about": lambda given, progress: self.session.about(),
            "look": lambda given, progress: self.session.look(_text(given), given.get("compare", "first")),
            "token": lambda given, progress: self.session.closer(
                _text(given), given.get("compare", "first"), _whole_number(given, "position")
            ),
            "learn": self._learn,
            "apply": lambda given, progress: self._change(self.session.apply, given),
            "undo": lambda given, progress: self._change(self.session.undo, given),
            "forget": lambda given, progress: self._change(self.session.forget, given),
            "compare": lambda given, progress: self.session.compare(_line(given, "one"), _line(given, "other")),
            "export": lambda given, progress: page_of(
                self.session.whole(_text(given), given.get("compare", "first"), progress)
            ),
        }
        return [
            Route("/", self._page, methods=["GET"]),
            Route("/{name}", self._static, methods=["GET"]),
            *(Route(f"/api/{name}", partial(self._json, job), methods=["POST"]) for name, job in asked.items()),
            Route("/api/save", self._save, methods=["POST"]),
            Route("/api/load", self._load, methods=["POST"]),
        ]

    async def _page(self, request: Request) -> Response:
        return Response(_file("page.html"), media_type="text/html")

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            return JSONResponse({"error": "There is no such page."}, status_code=404)
        return Response(_file(name), media_type=STATIC[name])

    def _learn(self, given: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        told = {name: _line(given, name).strip() for name in ("subject", "prompt", "object")}
        paraphrases, keep = (_lines(given, name) for name in ("paraphrases", "keep"))
        return self.session.learn(Fact(**told, paraphrases=tuple(paraphrases)), keep, progress)

    def _change(self, change: Callable[[str], None], given: Mapping[str, Any]) -> dict[str, Any]:
        change(_line(given, "name"))
        return self.session.about()

    async def _json(self, job: Job, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused("The request is no JSON.", 415)
        body = await body_of(request.stream(), MOST_JSON)
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused("The request is no JSON.") from error
        if not isinstance(given, dict):
            raise Refused("The request is no JSON object.")
        return self._answer(partial(job, given))

    def _answer(self, job: Callable[[Progress], Any]) -> Response:
        """Runs a job in the model's thread; what it reports is streamed."""
        if self.waiting >= MOST_WAITING:
            raise Refused("The model is busy with other requests: wait a moment.", 503)
        return JobResponse(self, job)

    async def _save(self, request: Request) -> Response:
        name = request.query_params.get("name", "")
        return self._answer(
            lambda progress: {"name": name, "base64": base64.b64encode(self.session.save(name)).decode()}
        )

    async def _load(self, request: Request) -> Response:
        if request.headers.get("content-type") != "application/octet-stream":
            raise Refused("The request is no file.", 415)
        data = await body_of(request.stream(), MOST_FILE)
        return self._answer(lambda progress: {"name": self.session.load(data), "about": self.session.about()})


@final
class JobResponse(Response):
    """Answers with what a job in the model's thread reports. A job whose page has gone away ends at its next report."""

    def __init__(self, desk: Desk, job: Callable[[Progress], Any]) -> None:
        self.desk, self.job, self.is_gone = desk, job, False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.desk.waiting += 1
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, group.cancel_scope, receive)
                put, get = anyio.create_memory_object_stream[dict[str, Any]](100)
                group.start_soon(self._work, put)
                await self._send(send, get)
                group.cancel_scope.cancel()
        finally:
            self.desk.waiting -= 1

    async def _watch(self, scope: anyio.CancelScope, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        scope.cancel()

    async def _work(self, put: MemoryObjectSendStream[dict[str, Any]]) -> None:
        async with put:
            try:
                result = await to_thread.run_sync(partial(self._run, put), limiter=self.desk.one_thread)
                await put.send({"result": result})
            except ValueError as error:
                await put.send({"error": str(error)})
            except ClientDisconnect:
                pass
            except Exception as error:  # of the model: the page is told, and whoever started the command sees where
                traceback.print_exc()
                await put.send({"error": f"The model failed ({type(error).__name__}: {error})."})

    def _run(self, put: MemoryObjectSendStream[dict[str, Any]]) -> Any:
        def progress(done: int, total: int, what: str) -> None:
            if self.is_gone:
                raise ClientDisconnect
            with contextlib.suppress(anyio.WouldBlock):  # a page that reads slowly misses some
                anyio.from_thread.run_sync(put.send_nowait, {"progress": [done, total, what[:80]]})

        return self.job(progress)

    async def _send(self, send: Send, get: MemoryObjectReceiveStream[dict[str, Any]]) -> None:
        """The status is that of the first report: a request that cannot be answered is refused at once."""
        started = False
        async with get:
            async for line in get:
                if not started:
                    headers = [(b"content-type", b"application/x-ndjson")]
                    status = 400 if "error" in line else 200
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                    started = True
                body = (json.dumps(line) + "\n").encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _text(given: Mapping[str, Any]) -> str:
    text = given.get("text")
    if not isinstance(text, str):
        raise ValueError("There is no text.")
    return whole_characters(text)


def _line(given: Mapping[str, Any], name: str) -> str:
    line = given.get(name)
    if not isinstance(line, str) or len(line) > MOST_LINE:
        raise ValueError(f"{name} is no text of up to {MOST_LINE:,} characters.")
    return whole_characters(line)


def _lines(given: Mapping[str, Any], name: str) -> list[str]:
    lines = given.get(name, [])
    if not isinstance(lines, list) or len(lines) > MOST_LINES:
        raise ValueError(f"{name} are no list of up to {MOST_LINES} lines.")
    return [line.strip() for line in (_line({name: one}, name) for one in lines) if line.strip()]


def _whole_number(given: Mapping[str, Any], name: str) -> int:
    number = given.get(name)
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{name} is no whole number.")
    return number


def _file(name: str) -> bytes:
    return files("engrammar_explore").joinpath("page", name).read_bytes()


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"error": str(error)}, status_code=error.status, headers={"connection": "close"})


@final
class Server:
    """A server that listens; `run` answers until it is told to end."""

    def __init__(self, session: Session, host: str = "127.0.0.1", port: int = 8765) -> None:
        """Listens.

        Args:
            port: 0 takes a free one.

        Raises:
            ValueError: the port is taken, or the host is every address of the machine, none of which is its name then.
        """
        if host in ("", "0.0.0.0", "::"):
            raise ValueError(
                f"host is {host!r}, every address of this machine, so a request's own host could not be "
                "checked: give the one address or name by which others call this machine."
            )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ValueError(
                f"Port {port} of {host} cannot be listened on ({error.strerror}): give another one, or "
                "0 for one that is free."
            ) from error
        port = self.socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        names = {shown, "localhost"} if host in ("127.0.0.1", "::1") else {shown}
        self.session, self.token = session, secrets.token_urlsafe(24)
        self.url = f"http://{shown}:{port}/?token={self.token}"  # the link to open
        app = Starlette(routes=Desk(session).routes(), exception_handlers={Refused: _refuse})
        guard = Guard(app, hosts=frozenset(f"{name}:{port}" for name in names), token=self.token)
        config = uvicorn.Config(
            guard, log_level="warning", access_log=False, lifespan="off", limit_concurrency=32, server_header=False,
            h11_max_incomplete_event_size=64 * 1024, timeout_keep_alive=20, ws="none", timeout_graceful_shutdown=2,
        )  # fmt: skip
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        """Answers until the process is interrupted, or `stop` is called."""
        self.server.run(sockets=[self.socket])

    def stop(self) -> None:
        self.server.should_exit = True
