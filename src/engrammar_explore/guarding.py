"""Who may talk to the server: this machine's browser, on the page that the server itself has sent, with its token."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, final

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

Message = MutableMapping[str, Any]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


@final
class Guard:
    """Refuses, before anything is read: foreign hosts and origins, calls without the token, other methods.

    Args:
        hosts: the values of the Host header that are allowed, such as "127.0.0.1:8765".
        token: what a POST must carry in its URL, as `?token=`.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], token: str) -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket
            await send({"type": "websocket.close", "code": 1008})
            return
        reason = self._refuses(scope)
        if reason is None:
            await self.app(scope, receive, _with_headers(send))
        else:
            refusal = JSONResponse({"error": reason[1]}, status_code=reason[0])
            await refusal(scope, receive, _with_headers(send))

    def _refuses(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421, "This server answers to its own address only: open the link that the command printed."
        origins = {f"http://{host}" for host in self.hosts}
        if any(origin.lower() not in origins for origin in headers.getlist("origin")):
            return 403, "Another page may not talk to this server."
        if any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
            return 403, "Another page may not talk to this server."
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "Only GET, HEAD and POST are answered."
        if scope["method"] == "POST":
            tokens = QueryParams(scope["query_string"]).getlist("token")
            if len(tokens) != 1 or not hmac.compare_digest(tokens[0].encode(), self.token.encode()):
                return 403, "The token is missing or wrong: open the link that the command printed."
        return None


def _with_headers(send: Send) -> Callable[[Message], Awaitable[None]]:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
