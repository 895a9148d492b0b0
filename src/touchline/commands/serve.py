"""`touchline serve`: the bytes of one photo in, its answer out, over HTTP.

The answer is that of `touchline predict`: decoded by `classifier.pixels`, through the same forward pass. Whatever a
client sends, and however slowly, costs the server no more than its `Limits`: what is beyond them is refused.
"""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from touchline.core import guard, ports
from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.models.classifier import Answer, Classifier, pixels, resolve
from touchline.models.inference import BATCH
from touchline.report import html


@dataclass(frozen=True)
class Limits:
    """What a server takes upon itself at most.

    Attributes:
        body: bytes of one photo's file.
        bodies: bytes of all files that are on their way in or in work.
        in_work: photos that are being decoded or wait for the model.
        connections: open ones; twice as many more are told so and heard to their end, and who comes on top waits until
            one of these is gone.
        head_seconds: for the head of a request to come, on a new connection as on a kept one.
        body_seconds: for the body to come.
        request_seconds: for a request as a whole, until its client has taken the answer.
        end_seconds: for what is in work when the server is told to end.
    """

    body: int = 20 * 2**20
    bodies: int = 256 * 2**20
    in_work: int = 2 * BATCH
    connections: int = 256
    head_seconds: float = 10
    body_seconds: float = 20
    request_seconds: float = 60
    end_seconds: float = 5


class Prediction(BaseModel):
    """What the model says of the photo, as touchline predict has it."""

    label: str = Field(description="the guess, or unsure where its confidence is too low")
    guess: str = Field(description="the likeliest class")
    confidence: float = Field(description="the guess's probability")
    probabilities: dict[str, float] = Field(description="of each class")
    model: str = Field(description="whose answer it is")


class Ready(BaseModel):
    """The server answers."""

    model: str


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str


def run(paths: Paths, params: Params, wanted: str, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> None:
    """Serve the model that is asked for (see `classifier.resolve`) until Ctrl-C or SIGTERM.

    Args:
        allowed_hosts: see `guard.Guard`.

    Raises:
        TouchlineError: the port is not free, or there is no such model.
    """
    # What ends a server from outside ends it as Ctrl-C does, also while the model is being loaded.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), ports.bound(host, port) as listening:
        classifier = resolve(paths, params, wanted)
        serving = server(classifier, params, host=host, allowed_hosts=allowed_hosts)
        # Until here a client is turned away, and does not hang.
        listening.listen()
        print(f"{classifier.name}: {ports.url(host, port)} (Ctrl-C ends it)", flush=True)
        serving.run([listening])


def server(
    classifier: Classifier,
    params: Params,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
) -> uvicorn.Server:
    """A server of the model, ready to run on a socket that is bound to `host`."""
    limits = limits or Limits()
    return _Server(
        uvicorn.Config(
            guard.Guard(application(classifier, params, limits), host, allowed_hosts),
            http=partial(_Connection, limits=limits),  # type: ignore[arg-type]  # uvicorn calls what it is given
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
        ),
        most=3 * limits.connections,
    )


def application(classifier: Classifier, params: Params, limits: Limits) -> FastAPI:
    """The HTTP API. What it refuses comes as `Refusal`: 408, 413, 415, 422, 503."""
    desk = _Desk(classifier, params, limits)
    app = FastAPI(
        title="Touchline",
        summary=f"What {classifier.name} says of a photo: {', '.join(classifier.classes)}.",
        version="1",
        # FastAPI's own pages load their scripts from another host.
        docs_url=None,
        redoc_url=None,
        lifespan=desk.open,
    )
    refusals: dict[int | str, dict[str, Any]] = {
        408: {"description": f"The body took more than {limits.body_seconds:g} s."},
        413: {"description": f"The body is larger than {limits.body / 2**20:g} MB."},
        415: {"description": "The photo came in a form, not as the body itself."},
        422: {"description": "The body is no photo, or none that can be judged."},
        503: {"description": "Too much is in work: ask again after as many seconds as Retry-After says."},
    }

    @app.post(
        "/predict",
        summary="Say what is on a photo",
        responses={code: {"model": Refusal, **refusal} for code, refusal in refusals.items()},
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": "the bytes of the photo's file; what it is, is told by its content.",
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/*", "*/*")},
            }
        },
    )
    async def predict(request: Request) -> Prediction:
        answer = await desk.answer(request)
        return Prediction(**vars(answer), model=classifier.name)

    @app.get("/ping", summary="Say whether the model answers, and which it is")
    async def ping() -> Ready:
        return Ready(model=classifier.name)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(html.render("serving.html", api=app.openapi(), address=str(request.base_url)))

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    return app


class _Desk:
    """Takes photos in as far as there is room, and asks the model about all that wait at once."""

    def __init__(self, classifier: Classifier, params: Params, limits: Limits) -> None:
        self._classifier, self._params, self._limits = classifier, params, limits
        self._forward = classifier.network.forward
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self._bytes = self._photos = 0

    @asynccontextmanager
    async def open(self, _: FastAPI) -> AsyncIterator[None]:
        """Answer while the block runs."""
        import cv2

        cv2.setNumThreads(1)  # photos are spread over the cores; OpenCV spreading each one over them too only costs
        with ThreadPoolExecutor(os.cpu_count()) as self._decoders, ThreadPoolExecutor(1) as self._asker:
            asking = asyncio.create_task(self._ask())
            try:
                yield
            finally:
                asking.cancel()

    async def answer(self, request: Request) -> Answer:
        """The answer to the photo in a request's body.

        Raises:
            HTTPException: why there is none.
        """
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "send the photo itself as the body, not in a form: curl --data-binary @photo.jpg")
        self._refuse_if(self._photos >= self._limits.in_work)
        content = bytearray()
        try:
            await self._receive(request, content)
            self._refuse_if(self._photos >= self._limits.in_work)
            self._photos += 1
            try:
                return await self._judge(content)
            finally:
                self._photos -= 1
        finally:
            self._bytes -= len(content)

    async def _receive(self, request: Request, content: bytearray) -> None:
        too_large = HTTPException(413, f"the body is larger than {self._limits.body / 2**20:g} MB")
        if int(request.headers.get("content-length", 0)) > self._limits.body:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    if len(content) + len(chunk) > self._limits.body:
                        raise too_large
                    self._refuse_if(self._bytes + len(chunk) > self._limits.bodies)
                    content += chunk
                    self._bytes += len(chunk)
        except TimeoutError:
            raise HTTPException(408, f"the body took more than {self._limits.body_seconds:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body broke off") from None

    async def _judge(self, content: bytearray) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            pixels = await loop.run_in_executor(self._decoders, self._pixels, content)
        except TouchlineError as error:
            raise HTTPException(422, str(error).removeprefix("photo ")) from None
        probabilities = loop.create_future()
        self._waiting.put_nowait((pixels, probabilities))
        try:
            # Shielded: an answer that nobody waits for any more must not break off the batch it is in.
            found = await asyncio.shield(probabilities)
            return Answer.of(found, self._classifier.classes, self._params.predict.min_confidence)
        except TouchlineError as error:
            raise HTTPException(500, str(error)) from None

    def _pixels(self, content: bytearray) -> np.ndarray:
        return pixels(bytes(content), self._classifier.side, self._params.validate_.max_megapixels)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = np.stack([pixels for pixels, _ in batch])
            try:
                found = await loop.run_in_executor(self._asker, self._forward, images)
            except Exception as error:  # whatever it is, it is the answer to these photos, and the next are asked about
                for _, probabilities in batch:
                    probabilities.set_exception(error)
            else:
                for (_, probabilities), row in zip(batch, found, strict=True):
                    probabilities.set_result(row)

    def _refuse_if(self, full: bool) -> None:
        if full:
            raise HTTPException(503, "too much is in work: ask again in a moment", {"Retry-After": "1"})


_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b'Content-Type: application/json\r\n\r\n{"detail":"too many connections: ask again in a moment"}'
)
_LINGER_SECONDS = 2


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves in the kernel's queue whom it cannot even tell that it is full.

    uvicorn accepts every connection, and would have to cut off what is too many.
    """

    def __init__(self, config: uvicorn.Config, most: int) -> None:
        super().__init__(config)
        self._most = most

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._accepting = [asyncio.create_task(self._accept(listening)) for listening in sockets or []]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for accepting in self._accepting:
            accepting.cancel()
        await super().shutdown(sockets)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        listening.listen(self.config.backlog)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
                await loop.connect_accepted_socket(self._connection, accepted)
            except OSError:  # it is gone already, or the process may open no more files: those open will end
                await asyncio.sleep(0.1)
            while len(self.server_state.connections) >= self._most:
                await asyncio.sleep(0.01)

    def _connection(self) -> asyncio.Protocol:
        build: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return build(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


class _Connection(H11Protocol):
    """uvicorn's connection, with an end to all that a client may be slow at.

    uvicorn waits for the head of a request, and for its answer to be taken, as long as the client likes.
    """

    def __init__(self, *arguments: Any, limits: Limits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._heard_until = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        heard = sum(isinstance(each, _Connection) and not each._refused for each in self.connections)
        self._refused = heard > self._limits.connections
        self._abort_after(_LINGER_SECONDS if self._refused else self._limits.head_seconds)
        if self._refused:
            # What it sends is dropped, not left lying: a client that is still sending would never see the answer.
            self._heard_until = self.loop.time() + self._limits.head_seconds
            transport.write(_FULL)
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
        elif self.loop.time() < self._heard_until:
            self._abort_after(_LINGER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._abort_after(self._limits.request_seconds)

    def send_400_response(self, msg: str) -> None:
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # the nonsense came behind a request that was answered already
            self.transport.abort()
        if self.cycle:
            # Nothing more may be said: uvicorn would let the request that broke off answer as well.
            self.cycle.disconnected = True

    def on_response_complete(self) -> None:
        # What was refused before it was read is read to its end, and dropped: a connection closed in its client's face
        # would take the answer with it.
        if not self.transport.is_closing():
            self._abort_after(self._limits.head_seconds)
        super().on_response_complete()

    def shutdown(self) -> None:
        self._abort_after(self._limits.end_seconds)
        with suppress(h11.LocalProtocolError):
            super().shutdown()

    def _abort_after(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.transport.abort)
