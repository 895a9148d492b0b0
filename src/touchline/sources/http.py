"""Fetching over HTTP: big files that resume, ranges, and the client that `fetching` takes photos with.

One client (aiohttp: asynchronous, and in the tree through DVC already) and one rule of what is tried again: no
connection, a time-out, a broken body, 408, 429 and 5xx are, with growing pauses or those the server asks for; every
other answer is final. The rule is a loop of our own: aiohttp-retry does not see a body that breaks, and tenacity took
0.5 ms of processor time a photo where the whole of a photo takes 2.
"""

import asyncio
import atexit
import base64
import binascii
import errno
import hashlib
import itertools
import math
import os
import random
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from touchline.core.errors import TouchlineError, one_line
from touchline.core.files import read_json, write_json
from touchline.core.params import DownloadParams
from touchline.core.progress import say

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
_BLOCK = 2**20
_LONGEST_PAUSE = 60.0
# Of a file: each may be gigabytes, and a login page stays one.
_TRIES_OF_WRONG = 3
_TRIED_AGAIN = {408, 429, 500, 502, 503, 504}
_WORDS = {
    401: "it wants a login",
    403: "forbidden: a wrong path, or a proxy or firewall on the way",
    404: "not there",
    407: "the proxy wants a login: put it into https_proxy",
    410: "gone",
}
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_WAITS = 60.0
_SECONDS_TO_PUT_AWAY = 30.0


# When a wait for each host was last reported, by time.monotonic.
_waits_said: dict[str, float] = {}


class HttpError(TouchlineError):
    """A final answer that is no success: 401, 403, 404, 410 and the like."""

    def __init__(self, url: str, status: int) -> None:
        super().__init__(f"{url} answers {status} ({_WORDS.get(status, 'refused')})")
        self.url, self.status = url, status


class Unavailable(TouchlineError):
    """No whole answer after all tries; `kind` says in words to count by what was wrong with the last one."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class WrongContent(TouchlineError):
    """What came is not what was promised or asked for."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"{url}: {why}")
        self.url, self.why = url, why


class Broken(Exception):
    """An answer that is worth another try.

    Attributes:
        kind: what was wrong, in words to count by.
        pause: seconds its server asks to wait; None where it does not.
    """

    def __init__(self, kind: str, detail: str = "", pause: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.pause = kind, pause


class _Wrong(Broken):
    """An answer that is whole and not the file: a few tries are enough to tell an accident from a login page."""


def head(url: str, settings: DownloadParams) -> int | None:
    """Size of a remote file in bytes; None where the server does not tell or cannot be reached.

    Raises:
        HttpError: the file is refused or not there.
    """
    with suppress(Broken):
        return network(_size(url, settings))
    return None


async def _size(url: str, settings: DownloadParams) -> int | None:
    with as_broken():
        async with _shared_session().head(url, timeout=_timeout(settings), allow_redirects=True) as response:
            # 405: it answers no HEAD, which says nothing of the file.
            if response.status in {*_TRIED_AGAIN, 405}:
                return None
            if response.status != 200:
                raise HttpError(url, response.status)
            return response.content_length


def read_range(url: str, offset: int, size: int, settings: DownloadParams) -> tuple[bytes, int]:
    """`size` bytes from `offset`, fewer only where the file ends, and the size of the whole remote file.

    Raises:
        HttpError, Unavailable: no such answer.
        WrongContent: the server does not answer with the range asked for.
    """

    async def ask() -> tuple[bytes, int]:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
        async with get(_shared_session(), url, settings, headers) as response:
            start, total = _range_of(response)
            content = await response.read()
            if start != offset or len(content) != min(size, total - offset):
                raise WrongContent(url, "the server does not keep to the range of bytes asked for")
            return content, total

    return network(repeated(ask, url, settings))


def to_file(
    url: str,
    path: Path,
    settings: DownloadParams,
    *,
    offset: int = 0,
    size: int | None = None,
    is_right: Callable[[bytes], bool] = lambda _: True,
    what: str = "",
    then: Sequence[str] = (),
) -> None:
    """Download a file, or `size` bytes of it from `offset`, to `path`.

    It grows as `<path>.part`, from which the next process goes on too; checked, flushed to disk and renamed at the end.

    Args:
        is_right: is given the first bytes (512 or more where there are so many) and says whether this is the kind of
            file asked for. A web page never is.
        what: names the file in lines of progress; empty for none.
        then: URLs of the files that are downloaded after it, for the time that all of them take.

    Raises:
        HttpError: a final answer that is no success.
        Unavailable: no whole answer after all tries.
        WrongContent: the content is not what its server promised, or not what `is_right` wants.
    """
    part, facts = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    remote = _Remote(url, settings, is_right, offset=offset, size=size, what=what, then=then)
    place = {"url": url, "offset": offset, "size": size}
    if part.exists() and facts.exists():
        with suppress(TouchlineError, KeyError, TypeError):
            known = read_json(facts)
            # Without an ETag there is no telling whether the rest is the rest of the same file.
            if known["place"] == place and known["etag"]:
                remote.resume(part, known["etag"], known["total"], known["md5"])

    async def write() -> None:
        with part.open("ab") as file:

            def answered() -> None:
                file.truncate(remote.position)
                # Said before gigabytes have come for nothing.
                if shutil.disk_usage(part.parent).free < (remote.total or 0) - remote.position:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
                write_json(facts, {"place": place, "etag": remote.etag, "total": remote.total, "md5": remote.md5})

            async for block in remote.blocks(answered):
                file.write(block)
            file.flush()
            # On a thread: gigabytes take seconds, in which photos are fetched.
            await asyncio.to_thread(os.fsync, file.fileno())

    try:
        network(write())
    except WrongContent:
        # Bytes that are not of the file are no beginning; a web page in place of the rest says nothing of them.
        if not remote.position:
            part.unlink(missing_ok=True)
            facts.unlink(missing_ok=True)
        raise
    part.replace(path)
    facts.unlink(missing_ok=True)


@dataclass
class _Remote:
    """A remote file, or `size` bytes of it from `offset`, read once from front to back.

    Attributes:
        is_right, what, then: as in `to_file`.
        position: bytes read so far.
        total: bytes there are to read; known once the server has answered.
        etag: of the answer; empty where the server gives none.
        md5: of the whole file as its server promises it, in base64; empty where it does not.
    """

    url: str
    settings: DownloadParams
    is_right: Callable[[bytes], bool]
    offset: int = 0
    size: int | None = None
    what: str = ""
    then: Sequence[str] = ()
    position: int = 0
    total: int | None = None
    etag: str = ""
    md5: str = ""
    _digest: Any = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))

    def resume(self, part: Path, etag: str, total: int | None, md5: str) -> None:
        """Go on after the bytes of `part`, which may be all there are; one that is longer than the file is no use."""
        if total is not None and part.stat().st_size > total:
            return
        with part.open("rb") as file:
            while block := file.read(_BLOCK):
                self._digest.update(block)
                self.position += len(block)
        if self.position:
            self.etag, self.total, self.md5 = etag, total, md5

    async def blocks(self, answered: Callable[[], object]) -> AsyncGenerator[bytes, None]:
        """The bytes from `position` on, or from the first where the server does not go on.

        Args:
            answered: called once each answer is understood; the bytes that follow belong at `position`.
        """
        began, said, first, furthest = time.monotonic(), time.monotonic(), self.position, self.position
        tries = wrong = 0
        following: list[int | None] | None = None
        while True:
            try:
                if self.total is None or self.position < self.total:
                    async for block in self._answer():
                        if not block:
                            answered()
                            first = min(first, self.position)
                            continue
                        yield block
                        now = time.monotonic()
                        if self.what and now - said >= _SECONDS_BETWEEN_LINES:
                            said = now
                            rate = (self.position - first) / (now - began)
                            # Asked late: most files are here before anyone wants to know.
                            following = await self._following() if following is None else following
                            say(self._line(rate, following))
                if self.md5 and self.md5 != base64.b64encode(self._digest.digest()).decode():
                    self._forget()
                    raise _Wrong("what came does not have the MD5 its server promised")
                return
            except Broken as error:
                if isinstance(error, _Wrong):
                    wrong += 1
                    if wrong >= min(_TRIES_OF_WRONG, self.settings.tries):
                        raise WrongContent(self.url, f"{error} ({wrong} tries)") from None
                # Tries are counted anew after each new byte that came: a long file may break many times.
                tries = 0 if self.position > furthest else tries + 1
                furthest = max(furthest, self.position)
                if tries:
                    await _pause(error, tries, self.url, self.settings)

    async def _answer(self) -> AsyncGenerator[bytes, None]:
        """An empty block once the answer is understood, then its bytes; `position` is 0 again where it starts over."""
        headers = {}
        start, end = self.offset + self.position, "" if self.size is None else self.offset + self.size - 1
        if start or end != "":
            headers["Range"] = f"bytes={start}-{end}"
        # RFC 9110, 13.1.5: to a weak ETag the answer would always be the whole file.
        if self.position and self.etag.startswith('"'):
            headers["If-Range"] = self.etag
        with as_broken():
            async with get(_shared_session(), self.url, self.settings, headers) as response:
                whole = response.status == 200
                block = b""
                if whole or not self.position:
                    block = await _start_of(response)
                    # Looked at before what came earlier is given up for it.
                    if re.search(rb"<!doctype html|<html", block[:1024], re.IGNORECASE):
                        raise _Wrong("a web page came in its place")
                    if not self.is_right(block):
                        raise _Wrong("something else came in its place")
                self._understand(response, asked_for=start if headers else None)
                # What is done with it is out of reach of `as_broken`: a full disk is no broken answer.
                yield b""
                while block or (block := await response.content.read(_BLOCK)):
                    self._digest.update(block)
                    self.position += len(block)
                    yield block
                    block = b""
                if self.total is None:
                    self.total = self.position
                if self.position < self.total:
                    raise Broken("cut off", f"{self.position:,} of {self.total:,} bytes")

    def _understand(self, response: "aiohttp.ClientResponse", asked_for: int | None) -> None:
        etag = response.headers.get("ETag", "")
        if response.status == 200:
            if self.offset or self.size is not None:
                raise WrongContent(self.url, "the server answers a range of bytes with the whole file")
            if self.position:
                why = "the file has changed" if etag and etag != self.etag else "the server cannot resume"
                say(f"{self.what or self.url}: starts over after {self.position / 1e6:,.0f} MB, because {why}")
                self._forget()
            self.total = response.content_length
        elif asked_for is not None:
            start, whole = _range_of(response)
            if start != asked_for:
                raise WrongContent(self.url, "the server does not keep to the range of bytes asked for")
            total = (whole - self.offset) if self.size is None else min(self.size, whole - self.offset)
            # Not every server looks at If-Range.
            etag = etag or self.etag
            if self.position and (etag != (self.etag or etag) or self.total not in {None, total}):
                self._forget()
                raise Broken("the file has changed while it was read")
            self.total = total
        self.etag = etag
        if not self.offset and self.size is None:
            self.md5 = _goog_md5(response)

    def _forget(self) -> None:
        """Begin at the first byte again."""
        self.position, self.total, self.etag, self.md5 = 0, None, "", ""
        self._digest = hashlib.md5(usedforsecurity=False)

    async def _following(self) -> list[int | None]:
        """Bytes of each file that is downloaded after this one; None where its server does not tell."""
        sizes: list[int | None] = []
        for url in self.then:
            try:
                sizes.append(await _size(url, self.settings))
            except (Broken, HttpError):  # said when it is that file's turn
                sizes.append(None)
        return sizes

    def _line(self, rate: float, following: Sequence[int | None]) -> str:
        done = f"{self.what}: {self.position / 1e6:,.0f} MB"
        if self.total is None:
            return f"{done}, {rate / 1e6:.1f} MB/s"
        left = f"{(self.total - self.position) / rate:.0f} s left"
        known = [size for size in following if size is not None]
        if known and len(known) == len(following):
            left += f", {(self.total - self.position + sum(known)) / rate:.0f} s with the files after it"
        return f"{done} of {self.total / 1e6:,.0f}, {rate / 1e6:.1f} MB/s, {left}"


async def _start_of(response: "aiohttp.ClientResponse") -> bytes:
    """The first 512 bytes or more of an answer, fewer only where it ends."""
    start = b""
    while len(start) < 512 and (block := await response.content.read(_BLOCK)):
        start += block
    return start


def _range_of(response: "aiohttp.ClientResponse") -> tuple[int, int]:
    """First byte and size of the whole file, as a 206 says."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status != 206 or not found:
        raise WrongContent(str(response.url), "the server does not answer with the range of bytes asked for")
    return int(found[1]), int(found[2])


def _goog_md5(response: "aiohttp.ClientResponse") -> str:
    """Base64 MD5 of Google Cloud Storage's `x-goog-hash`, which comes as one header or as two."""
    given = ",".join(response.headers.getall("x-goog-hash", []))
    found = re.search(r"(?:^|,)\s*md5=([A-Za-z0-9+/=]+)", given)
    with suppress(binascii.Error):
        if found and len(base64.b64decode(found[1], validate=True)) == 16:
            return found[1]
    return ""


@asynccontextmanager
async def get(
    session: "aiohttp.ClientSession", url: str, settings: DownloadParams, headers: dict[str, str] | None = None
) -> AsyncIterator["aiohttp.ClientResponse"]:
    """A GET whose answer is a success; any other is raised as final or as worth another try."""
    async with session.get(url, headers=headers, timeout=_timeout(settings)) as response:
        if response.status in _TRIED_AGAIN:
            pause = _retry_after(response.headers.get("Retry-After", ""))
            raise Broken(f"answers {response.status}", pause=pause)
        if response.status not in {200, 206}:
            raise HttpError(url, response.status)
        yield response


@contextmanager
def as_broken() -> Iterator[None]:
    """Turn what the client raises of a failing network into `Broken`."""
    import aiohttp

    try:
        yield
    except TimeoutError as error:
        raise Broken("timed out") from error
    except aiohttp.InvalidURL as error:
        raise TouchlineError(f"{error} is no URL: see `ingest` in params.yaml") from None
    except aiohttp.ClientConnectorCertificateError as error:
        reason = getattr(error.certificate_error, "verify_message", "") or one_line(error.certificate_error)
        raise TouchlineError(
            f"the certificate of {error.host}:{error.port} is not trusted ({reason}): where a proxy of your own "
            "signs it, set SSL_CERT_FILE to a file with its certificate authority"
        ) from None
    except aiohttp.ClientSSLError as error:
        raise TouchlineError(
            f"{error.host}:{error.port} does not speak TLS ({one_line(error.os_error, 100)}): if it is a plain HTTP "
            "server or proxy, write http:// in its address"
        ) from None
    except aiohttp.ClientConnectorError as error:
        number, words = error.os_error.errno, error.os_error.strerror or str(error.os_error)
        # What asyncio writes there is its own and not the system's; a failed look-up of a name has a negative number.
        raise Broken("no connection", os.strerror(number) if number and number > 0 else words) from error
    except aiohttp.ClientPayloadError as error:
        raise Broken("cut off") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Broken("no answer", one_line(error)) from error


async def repeated(
    ask: Callable[[], Awaitable[T]],
    url: str,
    settings: DownloadParams,
    on_retry: Callable[[Broken], object] = lambda _: None,
) -> T:
    """What `ask` returns, which is called again for as long as it ends in `Broken` and there are tries left.

    Args:
        on_retry: called with what was wrong before each pause.

    Raises:
        Unavailable: no try was left.
    """
    for tries in itertools.count(1):
        try:
            with as_broken():
                return await ask()
        except Broken as error:
            await _pause(error, tries, url, settings)
            on_retry(error)
    raise AssertionError  # the loop returns or raises


async def _pause(error: Broken, tries: int, url: str, settings: DownloadParams) -> None:
    """Wait before the next try. Raises Unavailable where `tries` were all there are."""
    if tries >= settings.tries:
        message = f"{url} cannot be read ({error}; {tries} tries): look at the network, then run again"
        raise Unavailable(message, error.kind) from None
    # Jitter, so that many that failed together do not come back together.
    growing = 2.0 ** (tries - 1) * random.uniform(0.75, 1.25)
    asked_for = growing if error.pause is None else error.pause + random.uniform(0, 0.1)
    pause = min(asked_for, _LONGEST_PAUSE)
    host, now = urlsplit(url).netloc, time.monotonic()
    # Not of the first second, which many a photo waits for; and many photos wait for one host.
    if pause > 1.5 and now - _waits_said.get(host, -math.inf) >= _SECONDS_BETWEEN_WAITS:
        _waits_said[host] = now
        less = f", not after the {asked_for:,.0f} s it asks for" if asked_for > pause else ""
        say(f"{host}: {error}; waiting: try {tries + 1} of {settings.tries} in {pause:.0f} s{less}")
    await asyncio.sleep(pause)


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None where it is neither."""
    with suppress(ValueError):
        return max(0.0, float(value))  # in this order, for `nan` is no more than 0
    with suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


def _timeout(settings: DownloadParams) -> "aiohttp.ClientTimeout":
    import aiohttp

    return aiohttp.ClientTimeout(sock_connect=settings.connect_timeout, sock_read=settings.read_timeout)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process's network, on a thread of its own: callers are ordinary functions."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="network").start()
    return loop


@cache
def _shared_session() -> "aiohttp.ClientSession":
    """Connections are kept from call to call. To be called on the network's thread."""
    shared = session(connections=8)
    atexit.register(lambda: asyncio.run_coroutine_threadsafe(shared.close(), _loop()).result(5))
    return shared


def session(connections: int) -> "aiohttp.ClientSession":
    """A client with at most `connections` to one host. To be called on the network's thread."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, limit_per_host=connections, ttl_dns_cache=300)
    return aiohttp.ClientSession(
        connector=connector,
        trust_env=bool(urllib.request.getproxies()),  # not always: it reads ~/.netrc for each request
        auto_decompress=False,
        headers={"User-Agent": "touchline", "Accept-Encoding": "identity"},
    )


def network(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the network's thread and wait for its result.

    An interruption (Ctrl-C) cancels it and waits until it has put its things away: it may still be writing.

    Raises:
        CancelledError: it was cancelled from the network's thread.
    """
    loop, over = _loop(), threading.Event()
    task: asyncio.Task[T]

    def start() -> None:
        nonlocal task
        task = loop.create_task(work)
        # Not a `finally` inside a coroutine: one that is cancelled before its first step runs none of its own code.
        task.add_done_callback(lambda _: over.set())

    def stop() -> None:
        task.cancel()

    loop.call_soon_threadsafe(start)
    try:
        over.wait()
    except BaseException:
        loop.call_soon_threadsafe(stop)
        over.wait(_SECONDS_TO_PUT_AWAY)
        raise
    if task.cancelled():
        raise CancelledError
    return task.result()
