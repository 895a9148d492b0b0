"""`touchline serve`: photos in, their answers out, over HTTP.

An answer is that of `touchline predict`: decoded by `classifier.pixels`, through the same forward pass. `Limits` bound
what clients cost. Connections are left to uvicorn, which waits for the head of a request as long as a client likes: on
a network, a reverse proxy stands in front (docs/serving.md).
"""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from touchline.core import guard, ports
from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.models.classifier import Answer, Classifier, pixels, resolve
from touchline.models.inference import BATCH
from touchline.report import html

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server accepts at most; what is beyond is answered with 413, 408 or 503.

    Attributes:
        body: bytes of one photo's file.
        bodies: bytes of all bodies that are being received or answered.
        body_seconds: for a body to arrive.
        photos: photos that are being decoded or wait for the model.
        connections: open connections, among them those whose request has not come yet.
        keep_seconds: for the next request on a connection to begin.
        end_seconds: for requests in progress when the server is told to end.
    """

    body: int = 20 * 2**20
    bodies: int = 256 * 2**20
    body_seconds: float = 20
    photos: int = 2 * BATCH
    connections: int = 4096
    keep_seconds: int = 10
    end_seconds: int = 5


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
    _allow_open_files(Limits.connections + 512)
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
    return uvicorn.Server(
        uvicorn.Config(
            guard.Guard(application(classifier, params, limits), host, allowed_hosts),
            http="h11",
            ws="none",
            lifespan="on",
            limit_concurrency=limits.connections,
            timeout_keep_alive=limits.keep_seconds,
            timeout_graceful_shutdown=limits.end_seconds,
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
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
    app.add_middleware(guard.Bodies, most=limits.body, together=limits.bodies, seconds=limits.body_seconds)
    refusals: dict[int | str, dict[str, Any]] = {
        408: {"description": f"The body took more than {limits.body_seconds:g} s."},
        413: {"description": f"The body is larger than {limits.body / 2**20:g} MB."},
        415: {"description": "The photo came in a form, not as the body itself."},
        422: {"description": "The body is not an image, or none that can be judged."},
        503: {"description": "Too many requests at once: try again after as many seconds as Retry-After says."},
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
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "send the photo itself as the body, not in a form: curl --data-binary @photo.jpg")
        desk.refuse_if_full(1)
        try:
            content = await request.body()
        except ClientDisconnect:
            raise HTTPException(400, "the body broke off") from None
        answer = await desk.answer(content)
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


def _allow_open_files(needed: int) -> None:
    """Raise this process's limit of open files, often 1,024, as far as is needed and allowed."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < needed:  # a negative number is no limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))


class _Desk:
    """Takes photos in as far as there is room, and asks the model about all that wait at once."""

    def __init__(self, classifier: Classifier, params: Params, limits: Limits) -> None:
        self._classifier, self._params, self._limits = classifier, params, limits
        self._forward = classifier.network.forward
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self._photos = 0

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

    def refuse_if_full(self, photos: int) -> None:
        """Raise HTTPException where there is no room for as many more photos."""
        if self._photos + photos > self._limits.photos:
            raise HTTPException(503, "too many requests at once: try again in a moment", {"Retry-After": "1"})

    async def answer(self, content: bytes) -> Answer:
        """The answer to a photo.

        Raises:
            HTTPException: why there is none.
        """
        self.refuse_if_full(1)
        self._photos += 1
        try:
            return await self._judge(content)
        finally:
            self._photos -= 1

    async def _judge(self, content: bytes) -> Answer:
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

    def _pixels(self, content: bytes) -> np.ndarray:
        return pixels(content, self._classifier.side, self._params.validate_.max_megapixels)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = np.stack([pixels for pixels, _ in batch])
            try:
                found = await loop.run_in_executor(self._asker, self._forward, images)
            except Exception:  # whatever it is, it is the answer to these photos, and the next are asked about
                _log.exception("the model failed")
                for _, probabilities in batch:
                    probabilities.set_exception(TouchlineError("the model failed; the server's log says how"))
            else:
                for (_, probabilities), row in zip(batch, found, strict=True):
                    probabilities.set_result(row)
