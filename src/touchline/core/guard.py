"""ASGI middleware for the servers that people open in a browser: keeps foreign pages out and limits bodies.

A web page open in the user's browser can reach loopback in two ways. It can send cross-origin requests: it cannot read
the answers, but the requests may change things. Or its host name resolves to 127.0.0.1 (DNS rebinding), and the browser
lets it read the answers too. Headers that no page can forge reveal both: `Origin` and `Sec-Fetch-Site` the first,
`Host` the second.
"""

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from touchline.core.errors import ParamsError

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"\[[0-9a-f:.]+\]|[^:/\s]+")
_EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


def check_allowed(names: Sequence[str]) -> None:
    """Raise ParamsError where one of the names is an address with `http://` or a port, which no request would match."""
    if wrong := [name for name in names if not _HOST.fullmatch(_bracketed(name.lower()))]:
        raise ParamsError(f"--allowed-host {wrong[0]}: give the name alone, without http:// and port")


class Guard:
    """Answers only requests to this server's own names, and none from other pages.

    Starlette's TrustedHostMiddleware checks only names. It cannot allow every IP address, as a server on all addresses
    needs (safe, because a rebound page always has a name), and does not check Origin.

    Args:
        host: the address that the server listens on.
        allowed: further host names, without port: a forwarded connection has another one.

    Raises:
        ParamsError: as `check_allowed`.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Sequence[str] = ()) -> None:
        check_allowed(allowed)
        self._app = app
        self._names = {*_LOOPBACK, *(_bracketed(name.lower()) for name in (host, *allowed))}
        self._any_address = host in _EVERY_ADDRESS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 (a WebSocket is not accepted) or pass the request on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.append("Content-Security-Policy", "frame-ancestors 'none'")
            await send(message)

        reason = self._refusal(scope.get("method", ""), Headers(scope=scope))
        if not reason:
            await self._app(scope, receive, send_guarded)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await JSONResponse({"detail": reason}, 403)(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> str:
        """Why a request is refused, or nothing."""
        host = headers.get("host", "").lower()
        parts = re.fullmatch(rf"({_HOST.pattern})(:\d+)?", host)
        if not parts or not (parts[1] in self._names or (self._any_address and _is_address(parts[1]))):
            return "this server does not answer to that name: use localhost, or start it with --allowed-host NAME"
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            return "a page of another origin may not ask this server"
        # Sent without Origin: what a page embeds. A link to this server is neither.
        fetched = [headers.get(f"sec-fetch-{name}") for name in ("site", "mode", "dest")]
        if fetched[0] in ("cross-site", "same-site") and (method != "GET" or fetched[1:] != ["navigate", "document"]):
            return "another page may not embed or ask this server"
        return ""


class Bodies:
    """Bodies of requests, within limits: 413 and 408 say which was exceeded, 503 that all bodies together are too many.

    Where a request is answered before its body has come, the rest is received and dropped until the time is up: a
    connection that is closed while its client still sends is reset, and the answer may be lost with it.

    Args:
        most: bytes of one body.
        most_in_form: bytes of a body that is a form, which may hold several files; as `most` unless given.
        together: bytes of all bodies whose requests are being answered.
        seconds: for a body to come.
    """

    def __init__(self, app: ASGIApp, most: int, together: int, seconds: float, most_in_form: int | None = None) -> None:
        self._app, self._most, self._most_in_form = app, most, most if most_in_form is None else most_in_form
        self._together, self._seconds = together, seconds
        self._held = 0  # bytes of all bodies now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its body counted."""
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        length = headers.get("content-length", "0")
        if length == "0" and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        # uvicorn passes a request on before it has parsed the body, and answers a malformed one itself. After this
        # pause the connection is closed in that case, and we send nothing more on it.
        await asyncio.sleep(0)
        deadline = asyncio.get_running_loop().time() + self._seconds
        in_form = headers.get("content-type", "").lower().startswith("multipart/")
        most = self._most_in_form if in_form else self._most
        too_large = HTTPException(413, f"the body is larger than {most / 2**20:g} MB")
        held, whole = 0, False

        async def next_message() -> Message:
            nonlocal whole
            async with asyncio.timeout_at(None if whole else deadline):
                message = await receive()
            whole = not message.get("more_body")
            return message

        async def receive_counted() -> Message:
            nonlocal held, deadline
            if int(length) > most:
                raise too_large
            try:
                message = await next_message()
            except TimeoutError:
                raise HTTPException(408, f"the body took more than {self._seconds:g} s") from None
            except asyncio.CancelledError:
                deadline = 0
                raise HTTPException(503, "the server is shutting down", {"Retry-After": "1"}) from None
            size = len(message.get("body", b""))
            if held + size > most:
                raise too_large
            if self._held + size > self._together:
                raise HTTPException(503, "too many requests at once: try again in a moment", {"Retry-After": "1"})
            held += size
            self._held += size
            return message

        async def send_and_hear(message: Message) -> None:
            if message["type"] == "http.response.start" and not whole:
                MutableHeaders(scope=message)["Connection"] = "close"
            elif message["type"] == "http.response.body" and not message.get("more_body") and not whole:
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    while not whole:
                        await next_message()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, receive_counted, send_and_hear)
        finally:
            self._held -= held


def _bracketed(name: str) -> str:
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def _is_address(name: str) -> bool:
    try:
        return bool(ip_address(name.strip("[]")))
    except ValueError:
        return False
