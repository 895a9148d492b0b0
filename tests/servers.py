"""A real HTTP server on loopback that answers as Google Cloud Storage and S3 do, and fails as they do.

with Host() as host:
    host.put("/train/ab.jpg", photo, faults=[Fault.status(503, retry_after=0.1), Fault.cut(after=1000)])
    download(f"{host.url}/train/ab.jpg")
    assert host.count("/train/ab.jpg") == 3
"""

import asyncio
import base64
import hashlib
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from aiohttp import web

from touchline.core.params import DownloadParams

CHUNK = 64 * 1024
LOGIN_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><h1>Sign in</h1></body></html>\n"
XML_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
XML_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    405: "MethodNotAllowed",
    416: "InvalidRange",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


def settings(**changes: Any) -> DownloadParams:
    """Settings of a download that soon gives up."""
    values = {
        "connections": 8,
        "tries": 2,
        "connect_timeout": 5.0,
        "read_timeout": 5.0,
        "total_timeout": 10.0,
        "max_megabytes": 1.0,
    }
    return DownloadParams(**(values | changes))


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer, or with each of them (`always`)."""

    kind: str
    code: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    after: int = 0
    seconds: float = 0
    bytes_per_second: float = 0
    content: bytes = b""
    permanent: bool = False

    @classmethod
    def status(cls, code: int, retry_after: float | str | None = None) -> Self:
        """An error with a body in XML; `retry_after` in seconds, or an HTTP date."""
        return cls("status", code, () if retry_after is None else (("Retry-After", str(retry_after)),))

    @classmethod
    def redirect(cls, url: str, code: int = 302) -> Self:
        return cls("status", code, (("Location", url),))

    @classmethod
    def cut(cls, after: int) -> Self:
        """The connection is closed after so many bytes of the body, as if it were complete."""
        return cls("cut", after=after)

    @classmethod
    def stall(cls, after: int, seconds: float) -> Self:
        """Nothing comes for some seconds after so many bytes of the body; then the rest."""
        return cls("stall", after=after, seconds=seconds)

    @classmethod
    def slow(cls, bytes_per_second: float) -> Self:
        return cls("slow", bytes_per_second=bytes_per_second)

    @classmethod
    def reset(cls) -> Self:
        """The connection is reset before a byte of the answer."""
        return cls("reset")

    @classmethod
    def html(cls) -> Self:
        """Status 200 and a login page in place of the file."""
        return cls("html")

    @classmethod
    def no_ranges(cls) -> Self:
        """The whole file with status 200, also where a range was asked for."""
        return cls("no_ranges")

    @classmethod
    def other_range(cls) -> Self:
        """Status 206 with another range than the one asked for: it begins at 0."""
        return cls("other_range")

    @classmethod
    def changed(cls, content: bytes) -> Self:
        """From this request on the path holds other bytes, under another ETag."""
        return cls("changed", content=content)

    def always(self) -> Self:
        return replace(self, permanent=True)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str  # "" where the whole file was asked for
    status: int  # 0 where the connection was reset in place of an answer
    time: float  # of its arrival, by time.monotonic
    headers: Mapping[str, str]  # found by a name in any case


@dataclass(frozen=True)
class Stored:
    content: bytes | Path
    size: int
    md5: bytes
    hash: bool | Literal["wrong", "two"]
    content_type: str
    faults: deque[Fault] = field(default_factory=deque)

    def open(self) -> BinaryIO:
        return self.content.open("rb") if isinstance(self.content, Path) else BytesIO(self.content)

    @property
    def etag(self) -> str:
        return f'"{self.md5.hex()}"'

    def headers(self) -> list[tuple[str, str]]:
        headers = [("ETag", self.etag), ("Accept-Ranges", "bytes"), ("Content-Type", self.content_type)]
        if self.hash:
            md5 = self.md5[::-1] if self.hash == "wrong" else self.md5
            # The CRC is a placeholder: the standard library has no CRC-32C.
            hashes = ["crc32c=AAAAAA==", f"md5={base64.b64encode(md5).decode()}"]
            joined = hashes if self.hash == "two" else [",".join(hashes)]
            headers += [("x-goog-hash", value) for value in joined]
        return headers


class Host:
    """One server in a thread of its own, on a free port of 127.0.0.1, until the end of the `with` block.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        latency: Seconds before each answer; may be changed at any time.
        requests: All requests so far, in the order of their answers.
        max_open: The greatest number of requests that waited for their last byte at once.
    """

    def __init__(self, latency: float = 0):
        self.latency = latency
        self.requests: list[Request] = []
        self.max_open = 0
        self.port = 0
        self._stored: dict[str, Stored] = {}
        self._served: dict[str, int] = {}
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: web.Server | None = None
        self._listening: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(
        self,
        path: str,
        content: bytes | Path,
        *,
        hash: bool | Literal["wrong", "two"] = False,  # noqa: A002
        faults: Iterable[Fault] = (),
        content_type: str = "application/octet-stream",
    ) -> None:
        """Serve `content` at `path`: bytes, or a file that is read from disk for each answer.

        Args:
            hash: Whether answers have GCS's `x-goog-hash`: True joins CRC and MD5 by a comma in one header, "two" sends
                two headers, "wrong" has the MD5 of other bytes.
            faults: Used up in this order, one a request (HEAD too); after the last one answers are right. One that is
                permanent is never used up.
        """
        if isinstance(content, Path):
            with content.open("rb") as file:
                md5 = hashlib.file_digest(file, "md5").digest()
            size = content.stat().st_size
        else:
            md5, size = hashlib.md5(content).digest(), len(content)
        self._stored[path] = Stored(content, size, md5, hash, content_type, deque(faults))

    def count(self, path: str) -> int:
        """How many GETs of the path were answered, or reset."""
        return sum(request.path == path and request.method == "GET" for request in list(self.requests))

    def served(self, path: str) -> int:
        """How many GETs got the file as far as its last byte."""
        return self._served.get(path, 0)

    def down(self) -> None:
        """No more listening, and each open connection is dropped."""
        self._run(self._down())

    def up(self) -> None:
        """Listen, on the same port as before."""
        self._run(self._up())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _up(self) -> None:
        if self._listening is None:
            # A handler that stalls must end with its connection, or it would count as open.
            self._server = web.Server(self._answer, handler_cancellation=True, access_log=None)
            self._listening = await self._loop.create_server(self._server, "127.0.0.1", self.port, backlog=1024)
            self.port = self._listening.sockets[0].getsockname()[1]

    async def _down(self) -> None:
        if self._listening is not None and self._server is not None:
            self._listening.close()
            for connection in list(self._server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await self._server.shutdown(timeout=0)
            self._listening = self._server = None

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        arrived = time.monotonic()
        waiting = _Waiting(self)
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            return await self._answer_or_fail(request, arrived, waiting)
        finally:
            waiting.end()

    async def _answer_or_fail(
        self, request: web.BaseRequest, arrived: float, waiting: "_Waiting"
    ) -> web.StreamResponse:
        def log(status: int) -> None:
            asked = request.headers.get("Range", "")
            self.requests.append(Request(request.method, request.path, asked, status, arrived, request.headers))

        def error(status: int, headers: Iterable[tuple[str, str]] = ()) -> web.Response:
            log(status)
            code = XML_CODES.get(status, "Error")
            body = (
                f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Key>{request.path}</Key></Error>'
            )
            response = web.Response(status=status, text=body, content_type="application/xml")
            response.headers.extend(headers)
            return response

        if request.method not in {"GET", "HEAD"}:
            return error(405)
        stored = self._stored.get(request.path)
        if stored is None:
            return error(404)
        fault = Fault("none")
        if stored.faults:
            fault = stored.faults[0] if stored.faults[0].permanent else stored.faults.popleft()

        if fault.kind == "status":
            return error(fault.code, fault.headers)
        if fault.kind == "html":
            log(200)
            return web.Response(body=LOGIN_PAGE, content_type="text/html", charset="utf-8")
        if fault.kind == "reset":
            log(0)
            _reset(request)
            # aiohttp wants an answer; it goes nowhere.
            return web.Response(status=500)
        if fault.kind == "changed":
            self.put(
                request.path,
                fault.content,
                hash=stored.hash,
                faults=stored.faults,
                content_type=stored.content_type,
            )
            stored = self._stored[request.path]

        headers = stored.headers()
        wanted = _range(request, stored)
        if fault.kind == "no_ranges":
            wanted = None
            headers.remove(("Accept-Ranges", "bytes"))
        elif wanted is not None and wanted.start >= stored.size:
            return error(416, [("Content-Range", f"bytes */{stored.size}")])
        elif wanted is not None and fault.kind == "other_range":
            wanted = range(len(wanted))
        response = web.StreamResponse(status=200 if wanted is None else 206)
        response.headers.extend(headers)
        if wanted is None:
            wanted = range(stored.size)
        else:
            response.headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{stored.size}"
        response.content_length = len(wanted)
        log(response.status)
        if request.method == "GET":
            await self._send(request, response, stored, wanted, fault, waiting)
        return response

    async def _send(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        stored: Stored,
        wanted: range,
        fault: Fault,
        waiting: "_Waiting",
    ) -> None:
        if not stored.size:
            # Its headers alone are the whole answer, so it is counted before they go out.
            waiting.end()
            self._served[request.path] = self._served.get(request.path, 0) + 1
            return
        await response.prepare(request)
        sent = 0
        for chunk in _chunks(stored, wanted, fault):
            if fault.kind == "cut" and sent == fault.after:
                if request.transport is not None:
                    request.transport.close()
                return
            if fault.kind == "stall" and sent == fault.after:
                await asyncio.sleep(fault.seconds)
            elif fault.kind == "slow":
                await asyncio.sleep(len(chunk) / fault.bytes_per_second)
            sent += len(chunk)
            if sent < len(wanted):
                await response.write(chunk)
                continue
            # Counted before the last bytes go out: who has them may look at the counts at once.
            waiting.end()
            whole = wanted.stop == stored.size
            self._served[request.path] = self._served.get(request.path, 0) + whole
            try:
                await response.write_eof(chunk)
            except BaseException:
                self._served[request.path] -= whole
                raise


class _Waiting:
    """One request in the count of open ones, until `end` is first called."""

    def __init__(self, host: Host):
        self.host: Host | None = host
        host._open += 1
        host.max_open = max(host.max_open, host._open)

    def end(self) -> None:
        if self.host is not None:
            self.host._open -= 1
            self.host = None


def _range(request: web.BaseRequest, stored: Stored) -> range | None:
    """The bytes asked for; None is the whole file, which is also the answer to a range of a file that has changed."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if match is None or request.headers.get("If-Range", stored.etag) != stored.etag:
        return None
    first = int(match[1])
    last = min(int(match[2] or stored.size), stored.size - 1)
    return range(first, last + 1) if first <= last or first >= stored.size else None


def _chunks(stored: Stored, wanted: range, fault: Fault) -> Iterator[bytes]:
    """The bytes wanted; one chunk ends where the fault is to happen."""
    largest = CHUNK if fault.kind != "slow" else max(1, min(CHUNK, int(fault.bytes_per_second / 20)))
    with closing(stored.open()) as file:
        file.seek(wanted.start)
        left, until_fault = len(wanted), fault.after
        while True:
            chunk = file.read(min(largest, left, until_fault or largest))
            left -= len(chunk)
            until_fault = max(0, until_fault - len(chunk))
            yield chunk
            if not left or not chunk:
                return


def _reset(request: web.BaseRequest) -> None:
    if request.transport is not None:
        # A linger of 0 seconds makes the kernel send RST in place of FIN.
        connection: socket.socket = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
