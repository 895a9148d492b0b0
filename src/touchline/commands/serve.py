"""`touchline serve`: photos in, their answers out, over HTTP.

An answer is that of `touchline predict`: decoded by `classifier.pixels`, through the same forward pass. `Limits` bound
what clients cost. Connections are left to uvicorn, which waits for the head of a request as long as a client likes: on
a network, a reverse proxy stands in front (docs/serving.md).
"""

import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from touchline.commands import serve_beside
from touchline.commands.serve_batches import Batches
from touchline.commands.serve_beside import Beside, Canary, Shadow
from touchline.commands.serve_metrics import Measured, Metrics
from touchline.core import guard, ports
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data.served import CANARY, Recorder
from touchline.models.classifier import Answer, Classifier, resolve_to_serve
from touchline.models.inference import BATCH
from touchline.report import html


@dataclass(frozen=True)
class Limits:
    """What a server accepts at most; what is beyond is answered with 413, 408 or 503.

    Attributes:
        photo: bytes of one photo's file.
        form: bytes of a form, which may hold several photos.
        photos_in_form: photos in a form.
        bodies: bytes of all bodies that are being received or answered.
        body_seconds: for a body to arrive.
        photos: photos that are being decoded or wait for the model.
        connections: open connections, among them those whose request has not come yet.
        keep_seconds: for the next request on a connection to begin.
        end_seconds: for requests in progress when the server is told to end.
    """

    photo: int = 20 * 2**20
    form: int = 100 * 2**20
    photos_in_form: int = BATCH
    bodies: int = 256 * 2**20
    body_seconds: float = 20
    photos: int = 2 * BATCH
    connections: int = 4096
    keep_seconds: int = 10
    end_seconds: int = 5


class Prediction(BaseModel):
    """What the model says of the photo, as touchline predict has it."""

    label: str = Field(
        description="the guess, unsure where its confidence is too low, or unknown where the photo is of something else"
    )
    guess: str = Field(description="the likeliest class")
    confidence: float = Field(description="the guess's probability")
    probabilities: dict[str, float] = Field(description="of each class")
    similarity: float | None = Field(description="to the training photos, -1 to 1; null where the model cannot tell")
    percentile: float | None = Field(description="how many of a hundred training photos are less similar to the others")
    model: str = Field(description="whose answer it is")


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str


class PredictionOfOne(Prediction):
    """What the model says of one of several photos."""

    photo: str = Field(description="the name of its file")


class RefusalOfOne(Refusal):
    """Why there is no answer to one of several photos."""

    photo: str = Field(description="the name of its file")


class Alive(BaseModel):
    """The server answers."""

    status: str = "ok"


class Ready(BaseModel):
    """The model is loaded."""

    model: str


def run(
    paths: Paths,
    params: Params,
    wanted: str,
    host: str,
    port: int,
    allowed_hosts: Sequence[str] = (),
    *,
    record: bool = False,
    record_photos: bool = False,
    shadow: str = "",
    canary: float = 0.0,
) -> None:
    """Serve the model that is asked for (see `classifier.resolve_to_serve`) until Ctrl-C or SIGTERM.

    Args:
        allowed_hosts: see `guard.Guard`.
        record: keep a row of each photo; `record_photos`: and a thumbnail.
        shadow, canary: see `serve_beside.found`; both keep a record.

    Raises:
        TouchlineError: the port is not free, there is no such model, or the record cannot be written.
    """
    ports.allow_open_files(Limits.connections + 512)
    # What ends a server from outside ends it as Ctrl-C does, also while the model is being loaded.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), ports.bound(host, port) as listening, ExitStack() as recording:
        classifier = resolve_to_serve(paths, params, wanted)
        beside = serve_beside.found(paths, params, classifier, shadow, canary) if shadow or canary else None
        recorder = None
        if record or record_photos or shadow or canary:
            model = classifier.name, classifier.files.model_sha256
            recorder = recording.enter_context(
                Recorder(paths.served, params.monitor, *model, keep_photos=record_photos)
            )
        # Asked for the first time, the engine gets ready: 0.2 s for one photo at a time, 0.4 s for several.
        for each in (classifier, beside.classifier) if beside else (classifier,):
            for count in (1, 2):
                each.network.forward(np.zeros((count, each.side, each.side, 3), np.uint8))
        serving = server(classifier, params, host=host, allowed_hosts=allowed_hosts, recorder=recorder, beside=beside)
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
    recorder: Recorder | None = None,
    beside: Beside | None = None,
) -> uvicorn.Server:
    """A server of the model, ready to run on a socket that is bound to `host`."""
    limits = limits or Limits()
    return uvicorn.Server(
        uvicorn.Config(
            guard.Guard(application(classifier, params, limits, recorder, beside), host, allowed_hosts),
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


def application(
    classifier: Classifier,
    params: Params,
    limits: Limits,
    recorder: Recorder | None = None,
    beside: Beside | None = None,
) -> FastAPI:
    """The HTTP API. What it refuses comes as `Refusal`: 400, 408, 413, 422, 503."""
    metrics = Metrics(classifier.name)
    most = params, limits.photos, limits.photo, recorder
    shadow = canary = None
    if recorder:
        recorder.on_lost = metrics.unrecorded.inc
    if recorder and beside and beside.is_shadow:
        shadow = Shadow(beside.classifier, params, recorder)
        shadow.on_photo = lambda outcome: metrics.shadow.labels(outcome).inc()
    if beside and beside.canary_share:
        canary = Canary(Batches(beside.classifier, *most, role=CANARY), beside.canary_share)
    batches = Batches(classifier, *most, shadow, canary)
    metrics.in_progress.set_function(lambda: batches.photos)
    app = FastAPI(
        title="Touchline",
        summary=f"What {classifier.name} says of a photo: {', '.join(classifier.classes)}.",
        version="1",
        # FastAPI's own pages load their scripts from another host.
        docs_url=None,
        redoc_url=None,
        lifespan=batches.open,
    )
    app.add_middleware(
        guard.Bodies,
        most=limits.photo,
        most_in_form=limits.form,
        together=limits.bodies,
        seconds=limits.body_seconds,
    )
    app.add_middleware(Measured, metrics=metrics)

    @app.post("/predict", summary="Say what is on a photo, or on several", **_described(limits))
    async def predict(request: Request) -> Prediction | list[PredictionOfOne | RefusalOfOne]:
        batches.refuse_if_full()
        photos = await _photos(request, limits)
        answers = await batches.answers(content for _, content in photos)
        for answer, _ in answers:
            metrics.photos.labels(answer.status_code if isinstance(answer, HTTPException) else 200).inc()
        if len(photos) > 1:
            return [_of_several(name, *answer) for (name, _), answer in zip(photos, answers, strict=True)]
        [(answer, model)] = answers
        if isinstance(answer, HTTPException):
            raise answer
        return Prediction(**vars(answer), model=model)

    @app.get("/healthz", summary="Say that the server runs", response_description="It runs.")
    async def healthz() -> Alive:
        return Alive()

    @app.get("/readyz", summary="Say which model answers", response_description="It is loaded.")
    @app.get("/ping", summary="The same as /readyz", response_description="It is loaded.")
    async def readyz() -> Ready:
        return Ready(model=classifier.name)

    @app.get(
        "/metrics",
        summary="Count requests, errors and seconds",
        response_description="Prometheus' text format.",
        response_class=PlainTextResponse,
    )
    async def measured() -> Response:
        return metrics.page()

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(html.render("serving.html", api=app.openapi(), address=str(request.base_url)))

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    return app


def _of_several(name: str, answer: Answer | HTTPException, model: str) -> PredictionOfOne | RefusalOfOne:
    if isinstance(answer, HTTPException):
        return RefusalOfOne(photo=name, detail=answer.detail)
    return PredictionOfOne(photo=name, **vars(answer), model=model)


async def _photos(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """Name and content of each photo in a request: the body itself, which has no name, or the files of a form.

    Raises:
        HTTPException: there is none, there are too many, or the body breaks off.
    """
    try:
        if not request.headers.get("content-type", "").lower().startswith("multipart/"):
            return [("", await request.body())]
        async with request.form(max_files=limits.photos_in_form) as form:
            files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
            photos = [(file.filename or "", await file.read()) for file in files]
    except ClientDisconnect:
        raise HTTPException(400, "the body broke off") from None
    if not photos:
        raise HTTPException(422, "the form has no file: curl -F file=@photo.jpg")
    return photos


def _described(limits: Limits) -> dict[str, Any]:
    """What /predict takes and refuses, for OpenAPI."""
    refusals = {
        400: "The body broke off, or the form cannot be read or has too many files.",
        408: f"The body took more than {limits.body_seconds:g} s.",
        413: f"A photo is larger than {limits.photo / 2**20:g} MB, or a form larger than {limits.form / 2**20:g} MB.",
        422: "The only photo is not an image, or cannot be judged.",
        503: "Too many requests at once: try again after as many seconds as Retry-After says.",
    }
    photo = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"file": {"type": "array", "items": photo}}}
    return {
        "responses": {code: {"model": Refusal, "description": words} for code, words in refusals.items()},
        "response_description": "One photo: the answer. Several: a list of answers or refusals, in their order.",
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "description": f"the bytes of the photo's file, or a form with up to {limits.photos_in_form} files.",
                "content": {
                    **{kind: {"schema": photo} for kind in ("image/*", "*/*")},
                    "multipart/form-data": {"schema": form},
                },
            }
        },
    }
