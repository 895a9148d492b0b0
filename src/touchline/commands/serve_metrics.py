"""What `touchline serve` counts, for Prometheus."""

from time import perf_counter

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)  # fmt: skip
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The counts of one server.

    Attributes:
        requests: requests to /predict, by status.
        seconds: from the head of such a request to the head of its answer.
        photos: photos in them, by status; a request may have several.
        in_progress: photos being decoded or waiting for the model.
        shadow: photos that were offered to a shadow, by what came of it.
        unrecorded: answers that `--record` could not keep.

    Args:
        model: what people call it, with its version.
    """

    def __init__(self, model: str) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("touchline_model", "The model that answers.", registry=registry).info({"name": model})
        self.requests = Counter("touchline_requests", "Requests to /predict.", ["status"], registry=registry)
        self.seconds = Histogram(
            "touchline_request_seconds", "Seconds until the answer to /predict.", buckets=_SECONDS, registry=registry
        )
        self.photos = Counter("touchline_photos", "Photos in requests to /predict.", ["status"], registry=registry)
        self.shadow = Counter("touchline_shadow", "Photos offered to the shadow.", ["outcome"], registry=registry)
        self.unrecorded = Counter("touchline_unrecorded", "Answers that the record has lost.", registry=registry)
        self.in_progress = Gauge("touchline_photos_in_progress", "Photos being judged.", registry=registry)

    def page(self) -> Response:
        """All of them in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Measured:
    """ASGI middleware: counts requests to /predict, whatever they are answered with."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count it once its answer begins."""
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self._app(scope, receive, send)
            return
        began = perf_counter()

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(message["status"]).inc()
                self._metrics.seconds.observe(perf_counter() - began)
            await send(message)

        await self._app(scope, receive, send_counted)
