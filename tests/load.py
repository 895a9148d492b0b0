"""Clients of `touchline serve` on loopback, far more of them than it can answer, some slow and some rude.

Each client's end is one word of what became of it: the status it was told, or `reset`, `closed`, `left` (it gave up by
itself) or `hung`. Clients are coroutines of one thread: a thousand threads would be slower than the server, and measure
themselves.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
PATIENCE = 90  # seconds; every limit of the server ends before
A_WHILE = 5  # seconds of a client that does not wait for an answer


def post(photo: bytes) -> bytes:
    """A whole request."""
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(photo) + photo


class Clients:
    """Clients of one server, and what became of them.

    Attributes:
        outcomes: how often each (kind of client, end) came.
        answers: of those that were answered, what was said of which photo: (number of the photo, the answer's JSON).
    """

    def __init__(self, port: int, photos: Sequence[bytes]) -> None:
        self._port, self._photos = port, photos
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.answers: list[tuple[int, Any]] = []

    def capacity(self, seconds: float, at_once: int = 32) -> float:
        """Photos a second that the server answers if each client asks again as soon as it was answered."""
        return asyncio.run(self._capacity(seconds, at_once))

    def forget(self) -> None:
        """Begin to count anew."""
        self.outcomes.clear()
        self.answers.clear()

    def one(self, number: int) -> None:
        """One good client, and nobody else."""
        asyncio.run(self._good(number))

    def storm(self, rate: float, seconds: float, slow: int, rude: int) -> None:
        """`rate` good clients a second whatever becomes of them, beside `slow` and `rude` ones all the time."""
        asyncio.run(self._storm(rate, seconds, slow, rude))

    def crowd(self, at_once: int, seconds: float) -> None:
        """As many clients at once, who ask again as soon as they were answered or refused."""
        asyncio.run(self._capacity(seconds, at_once))

    async def _capacity(self, seconds: float, at_once: int) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def again_and_again(number: int) -> int:
            asked = 0
            while loop.time() - began < seconds:
                await self._good(number + asked)
                asked += 1
            return asked

        answered = sum(await asyncio.gather(*map(again_and_again, range(at_once))))
        return answered / (loop.time() - began)

    async def _storm(self, rate: float, seconds: float, slow: int, rude: int) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds

        async def all_the_time(client: Callable[[int], Coroutine[Any, Any, None]], number: int) -> None:
            while loop.time() < end:
                await client(number)

        kinds = (self._half_a_head, self._half_a_body, self._dripping)
        busy = [asyncio.create_task(all_the_time(kinds[number % 3], number)) for number in range(slow)]
        rudes = (self._oversize, self._broken_off)
        busy += [asyncio.create_task(all_the_time(rudes[number % 2], number)) for number in range(rude)]
        good = []
        began = loop.time()
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0, began + number / rate - loop.time()))
            good.append(asyncio.create_task(self._good(number)))
        await asyncio.gather(*good, *busy)

    async def _good(self, number: int) -> None:
        number %= len(self._photos)
        status, body = await self._ask("good", [post(self._photos[number])])
        if status == "200":
            self.answers.append((number, json.loads(body)))

    async def _half_a_head(self, _: int) -> None:
        await self._ask("half a head", [HEAD], patience=A_WHILE)

    async def _half_a_body(self, number: int) -> None:
        await self._ask("half a body", [HEAD + b"Content-Length: 9000000\r\n\r\n" + bytes(1000 * (number % 1000))])

    async def _dripping(self, _: int) -> None:
        await self._ask("dripping", [HEAD + b"Content-Length: 9000000\r\n\r\n", *[b"\0"] * 200], pause=0.5)

    async def _oversize(self, number: int) -> None:
        known = b"Content-Length: 50000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
        piece = bytes(500_000) if number % 4 < 2 else b"7a120\r\n" + bytes(500_000) + b"\r\n"
        await self._ask("oversize", [HEAD + known[number % 4 >= 2], *[piece] * 100])

    async def _broken_off(self, _: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(HEAD + b"Content-Length: 9000000\r\n\r\n" + bytes(200_000))
        await asyncio.sleep(0.1)
        writer.transport.abort()
        self.outcomes["broken off", "-"] += 1

    async def _ask(
        self, kind: str, pieces: Sequence[bytes], pause: float = 0, patience: float = PATIENCE
    ) -> tuple[str, bytes]:
        said = b""
        try:
            async with asyncio.timeout(patience):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                try:
                    sending = asyncio.create_task(_send(writer, pieces, pause))
                    try:
                        while chunk := await reader.read(65536):
                            said += chunk
                        end = "closed"
                    finally:
                        sending.cancel()
                        await asyncio.gather(sending, return_exceptions=True)
                finally:
                    writer.transport.abort()
        except TimeoutError:
            end = "hung" if patience == PATIENCE else "left"
        except ConnectionError:
            end = "reset"
        head, _, body = said.partition(b"\r\n\r\n")
        status = head[9:12].decode() or end
        if status == "503" and b"\r\nretry-after: 1" not in head.lower():
            status = "503 without Retry-After"
        self.outcomes[kind, status] += 1
        return status, body


async def _send(writer: asyncio.StreamWriter, pieces: Sequence[bytes], pause: float) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)
