"""`touchline serve` and `mlflow models serve`: what they answer, what they refuse, and how they end."""

import csv
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import boards
import numpy as np
import projects
import psutil
import pytest
from conftest import names
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from touchline.commands import serve as serving
from touchline.commands.serve import Limits
from touchline.commands.serve_batches import Batches
from touchline.core import ports
from touchline.core.errors import TouchlineError
from touchline.data import photos
from touchline.models.classifier import Classifier
from touchline.models.engines import Network
from touchline.models.inference import BATCH, ModelFiles

# As the README has them; 320 is the side of the photos that the shipped champion takes.
SERVE = "touchline serve"
ASK = "curl --data-binary @photo.jpg http://127.0.0.1:8000/predict"
ASK_IN_A_FORM = "curl -F file=@photo.jpg http://127.0.0.1:8000/predict"
ASK_OF_SEVERAL = "curl -F file=@photo.jpg -F file=@photo.jpg http://127.0.0.1:8000/predict"
MLFLOW_SERVE = (
    "MLFLOW_TRACKING_URI=sqlite:///mlflow/mlflow.db "
    "mlflow models serve -m models:/rugby-soccer@champion --env-manager local --port 5001"
)
MLFLOW_ASK = (
    """(printf '{"inputs": ["'; base64 < photo.jpg; printf '"]}') | """
    "curl -H 'Content-Type: application/json' -d @- http://127.0.0.1:5001/invocations"
)

SIDE = 32
CLASSES = ["red", "blue"]
MB = 2**20


def jpeg(colour: tuple[int, int, int] = (250, 0, 0), size: tuple[int, int] = (48, 40)) -> bytes:
    content = BytesIO()
    Image.new("RGB", size, colour).save(content, "JPEG", quality=95)
    return content.getvalue()


def png(width: int, height: int, *, damaged: bool = False) -> bytes:
    """A black PNG that is small as a file; `damaged` has a chunk over which Pillow gives up and OpenCV does not."""

    def chunk(kind: bytes, data: bytes, wrong: int = 0) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width * 3)) for _ in range(height)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + (chunk(b"tEXt", b"a\0b", wrong=1) if damaged else b"")
        + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )  # fmt: skip


class Model:
    """In a network's place: red or blue by the mean colour, at the moment a test lets it.

    Attributes:
        may_answer: without it the model is at work for as long as a test likes.
        batches: how many photos it was asked about at a time.
    """

    input_shape = (None, SIDE, SIDE, 3)

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.batches: list[int] = []
        self.seconds = 0.0
        self.fault: Exception | None = None
        self.says: list[float] | None = None

    def forward(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(len(images))
        time.sleep(self.seconds)
        assert self.may_answer.wait(60)
        if self.fault:
            raise self.fault
        red, blue = (images[..., channel].mean(axis=(1, 2)) for channel in (0, 2))
        answers = np.stack([red, blue], axis=1).astype(np.float32) / (red + blue + 1e-6)[:, None]
        return np.broadcast_to(self.says, answers.shape) if self.says else answers


def classifier(forward: Callable[[np.ndarray], np.ndarray]) -> Classifier:
    network = Network("planted", (None, SIDE, SIDE, 3), (None, len(CLASSES)), forward)
    return Classifier(network, CLASSES, "a planted model", ModelFiles(Path("planted.keras")))


class Served:
    """A server in this process, and what a client may do to it."""

    def __init__(self, params: Any, model: Model, limits: Limits, **options: Any) -> None:
        self.model, self.limits = model, limits
        self.server = serving.server(classifier(model.forward), params, limits, **options)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listening.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self._listening],), daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.model.may_answer.set()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers
        finally:
            connection.close()

    def predict(self, body: Any, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
        return self.ask("POST", "/predict", body, **headers)

    def is_well(self) -> bool:
        status, said, _ = self.predict(jpeg())
        return (status, said.get("label")) == (200, "red")

    def is_deaf(self) -> bool:
        """Whether nobody can reach it any more."""
        try:
            self.open().close()
        except ConnectionRefusedError:
            return True
        return False

    def open(self, sent: bytes = b"") -> socket.socket:
        """A connection on which `sent` was sent, as a slow client does it."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(sent)
        return connection

    def working(self, photos: int) -> None:
        """Wait until as many requests are in progress."""
        boards.wait_for(lambda: len(self.server.server_state.tasks) >= photos, 60)


STATUSES = ("200", "405", "413", "422", "500", "503")
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    said = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            said += chunk
    return said


@pytest.fixture
def serve(params_with: Callable) -> Iterator[Callable[..., Served]]:
    """`serve(photo=1000)`: a server with that limit; the others are ample."""
    with ExitStack() as started:

        def start(**limits: Any) -> Served:
            ample = {"body_seconds": 60} | limits
            served = Served(params_with(), Model(), Limits(**ample))
            started.callback(served.end)
            return served

        yield start


def test_a_photo_is_answered_whatever_its_content_type(serve: Callable[..., Served]) -> None:
    served = serve()
    for kind in ("image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", "text/plain"):
        status, said, headers = served.predict(jpeg(), Content_Type=kind)
        assert status == 200 and headers["content-type"] == "application/json"
        assert list(said) == ["label", "guess", "confidence", "probabilities", "similarity", "percentile", "model"]
        assert (said["label"], said["guess"], said["model"]) == ("red", "red", "a planted model")
        assert list(said["probabilities"]) == CLASSES and said["confidence"] == said["probabilities"]["red"] > 0.9
    _, said, _ = served.predict(jpeg((120, 120, 120)))
    assert (said["label"], said["guess"], said["confidence"]) == ("unsure", "red", 0.5)
    assert served.ask("GET", "/ping")[:2] == (200, {"model": "a planted model"})
    assert served.ask("GET", "/predict")[0] == 405


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"", "empty file"),
        (b"<!doctype html><title>403</title>", "a web page"),
        (b'{"photo": "photo.jpg"}', "not an image"),
        (b"a text" * 1000, "not an image"),
        (jpeg(size=(300, 300))[:-200], "cut off"),
        (b"\xff\xd8\xff" + bytes(5000) + b"\xff\xd9", "does not decode: "),
        (png(9000, 7000), "9000 x 7000 pixels are more than validate.max_megapixels"),
        (png(9000, 7000, damaged=True), "9000 x 7000 pixels are more than validate.max_megapixels"),
    ],
    ids=["empty", "html", "json", "text", "cut", "nonsense", "bomb", "bomb with a damaged header"],
)  # fmt: skip
def test_what_is_no_photo_is_refused_in_a_line(serve: Callable[..., Served], body: bytes, line: str) -> None:
    served = serve()
    before = psutil.Process().memory_info().rss
    status, said, _ = served.predict(body)
    assert status == 422 and said["detail"].startswith(line) and "\n" not in said["detail"], said
    assert psutil.Process().memory_info().rss - before < 100 * MB
    assert not served.model.batches
    assert served.is_well()


def form(*files: tuple[str, bytes], field: str = "file") -> dict[str, Any]:
    """Body and type of a form as `curl -F file=@a.jpg -F file=@b.jpg` sends it."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in files
    ]
    return {"body": b"".join([*parts, b"--x--\r\n"]), "Content_Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize("field", ["file", "image", "photos[]"])
def test_a_form_with_one_photo_is_answered_as_the_photo_itself(serve: Callable[..., Served], field: str) -> None:
    served = serve()
    alone = served.predict(jpeg())[:2]
    assert served.predict(**form(("a.jpg", jpeg()), field=field))[:2] == alone
    status, said, _ = served.predict(**form(("a.jpg", b"<!doctype html>")))
    assert status == 422 and said["detail"].startswith("a web page")


def test_several_photos_are_answered_in_their_order_each_with_its_own_error(serve: Callable[..., Served]) -> None:
    served = serve(photo=100_000)
    files = [
        ("a red one.jpg", jpeg()), ("page.jpg", b"<!doctype html>"), ("blau \u00fc.jpg", jpeg((0, 0, 250))),
        ("cut.jpg", jpeg(size=(300, 300))[:-200]), ("large.jpg", jpeg() + bytes(100_000)), ("same.jpg", jpeg()),
        ("same.jpg", jpeg((0, 0, 250))), ("", b""),
    ]  # fmt: skip
    status, said, _ = served.predict(**form(*files))
    assert status == 200 and [each["photo"] for each in said] == [name for name, _ in files]
    assert [each.get("label") for each in said] == ["red", None, "blue", None, None, "red", "blue", None]
    refusals = [each["detail"].split()[:2] for each in said if "detail" in each]
    assert refusals == [["a", "web"], ["cut", "off"], ["the", "photo"], ["empty", "file"]]
    alone = served.predict(jpeg())[1]
    assert {key: value for key, value in said[0].items() if key != "photo"} == alone


def test_photos_of_one_request_are_judged_together(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Batches] = []

    def kept(*arguments: Any) -> Batches:
        made.append(Batches(*arguments))
        return made[-1]

    monkeypatch.setattr(serving, "Batches", kept)
    served = serve()
    served.model.may_answer.clear()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(served.predict, jpeg())
        boards.wait_for(lambda: served.model.batches == [1], 60)
        several = clients.submit(served.predict, **form(*[("a.jpg", jpeg())] * 8))
        # In progress counts photos still being decoded; the model is to find all of them waiting.
        boards.wait_for(lambda: made[0]._waiting.qsize() == 8, 60)
        assert sample(served, "touchline_photos_in_progress") == 9
        served.model.may_answer.set()
        assert first.result()[0] == 200 and len(several.result()[1]) == 8
    assert served.model.batches == [1, 8]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (form(), 422),
        ({"body": b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\na.jpg\r\n--x--\r\n',
          "Content_Type": "multipart/form-data; boundary=x"}, 422),
        ({"body": jpeg(), "Content_Type": "multipart/form-data"}, 400),
        ({"body": jpeg(), "Content_Type": "multipart/form-data; boundary=x"}, 400),
        ({"body": form(("a.jpg", jpeg()))["body"], "Content_Type": "multipart/mixed; boundary=x"}, 422),
        (form(*[("a.jpg", jpeg())] * (BATCH + 1)), 400),
        (form(("a.jpg", bytes(MB)), ("b.jpg", bytes(MB)), ("c.jpg", bytes(MB))), 413),
        (form(*[("a.jpg", jpeg())] * 5), 503),
    ],
    ids=["empty", "a name", "no boundary", "no form", "mixed", "too many", "too large", "more than there is room for"],
)  # fmt: skip
def test_a_form_that_cannot_be_taken_is_refused_in_a_line(
    serve: Callable[..., Served], sent: dict[str, Any], status: int
) -> None:
    served = serve(form=2 * MB, photos=4)
    refused, said, _ = served.predict(**sent)
    assert refused == status and len(said["detail"].splitlines()) == 1
    assert not served.model.batches
    assert served.is_well()


def sample(served: Served, metric: str, /, **labels: str) -> float | None:
    """What a server's /metrics says of one thing."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(answer.read().decode())
    found = [
        each.value for family in families for each in family.samples if (each.name, each.labels) == (metric, labels)
    ]
    return found[0] if found else None


def test_an_orchestrator_and_prometheus_are_told_how_it_is(serve: Callable[..., Served]) -> None:
    served = serve(photos=3)
    assert served.ask("GET", "/healthz")[:2] == (200, {"status": "ok"})
    for path in ("/readyz", "/ping"):
        assert served.ask("GET", path)[:2] == (200, {"model": "a planted model"})
    assert sample(served, "touchline_model_info", name="a planted model") == 1
    assert sample(served, "touchline_requests_total", status="200") is None

    served.predict(jpeg())
    served.predict(**form(("a.jpg", jpeg()), ("b.jpg", b"no photo")))
    served.predict(b"no photo")
    served.predict(**form(*[("a.jpg", jpeg())] * 4))
    served.predict(bytes(21 * MB))
    served.model.fault = MemoryError("the model's")
    served.predict(jpeg())
    served.ask("GET", "/predict")
    requests = {status: sample(served, "touchline_requests_total", status=status) for status in STATUSES}
    assert requests == {"200": 2, "405": 1, "413": 1, "422": 1, "500": 1, "503": 1}
    photos = {status: sample(served, "touchline_photos_total", status=status) for status in STATUSES}
    assert photos == {"200": 2, "405": None, "413": None, "422": 2, "500": 1, "503": None}
    assert sample(served, "touchline_request_seconds_count") == 7
    assert sample(served, "touchline_photos_in_progress") == 0
    assert sample(served, "process_resident_memory_bytes") > MB


def test_a_body_that_is_too_large_is_refused_by_its_length(serve: Callable[..., Served]) -> None:
    served = serve()
    status, said, _ = served.predict(bytes(50 * MB))
    assert status == 413 and names(said["detail"], "20 MB")
    # Told so before it has sent any of it.
    with served.open(POST + b"Content-Length: 99999999999\r\n\r\n") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert served.predict(jpeg() + bytes(served.limits.photo - len(jpeg())))[0] == 422  # cut off: read as a whole
    assert served.is_well()


def test_a_body_of_unknown_length_is_refused_while_it_comes(serve: Callable[..., Served]) -> None:
    served = serve(photo=MB)
    before = psutil.Process().memory_info().rss
    with served.open(POST + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        chunk, sent = b"10000\r\n" + bytes(0x10000) + b"\r\n", 0
        connection.setblocking(False)
        said = b""
        while not said:
            assert sent < 100 * MB
            with suppress(BlockingIOError):
                sent += connection.send(chunk[sent % len(chunk) :])
            with suppress(BlockingIOError):
                said = connection.recv(65536)
        assert said.startswith(b"HTTP/1.1 413 ")
    assert psutil.Process().memory_info().rss - before < 100 * MB
    assert served.predict(iter([jpeg()[:100], jpeg()[100:]]))[0] == 200
    assert served.is_well()


def test_a_slow_body_is_not_waited_for(serve: Callable[..., Served]) -> None:
    served = serve(body_seconds=1)
    length = b"Content-Length: %d\r\n\r\n" % len(jpeg())
    with (
        served.open(POST + length + jpeg()[:50]) as half_a_body,
        served.open(POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc") as half_a_chunk,
        served.open(POST + b"Content-Length: 99999999999\r\n\r\n") as refused,
    ):
        assert b" 408 " in all_of(half_a_body) and b" 408 " in all_of(half_a_chunk)
        # Told at once, and cut off when the time for a body is up.
        assert b" 413 " in all_of(refused)
    boards.wait_for(lambda: not served.server.server_state.connections, 60)
    assert served.is_well()


def test_a_kept_connection_is_closed_after_a_while_and_answers_until_then(serve: Callable[..., Served]) -> None:
    served = serve(keep_seconds=1)
    kept = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    kept.connect()
    first = kept.sock
    for _ in range(3):
        kept.request("POST", "/predict", jpeg())
        assert json.loads(kept.getresponse().read())["label"] == "red"
    assert kept.sock is first and all_of(first) == b""
    kept.close()


def test_clients_that_never_end_a_request_or_take_an_answer_do_not_stop_others(serve: Callable[..., Served]) -> None:
    served = serve()
    with ExitStack() as held:
        for sent in (b"", POST, POST + b"X: ") * 30:
            held.enter_context(served.open(sent))
        deaf = held.enter_context(served.open())
        deaf.settimeout(1)
        with suppress(OSError):
            while True:
                deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        before = psutil.Process().memory_info().rss
        assert all(served.is_well() for _ in range(20))
        assert psutil.Process().memory_info().rss - before < 20 * MB
    boards.wait_for(lambda: not served.server.server_state.connections, 60)


def test_nonsense_is_answered_in_a_line_and_ends_its_connection(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(photo=1000)
    for sent, answer in (
        (b"\x16\x03\x01\x02\x00\x01\x00", b" 400 "),
        (POST + b"Content-Length: ten\r\n\r\n", b" 400 "),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n", b" 400 "),
        (POST + b"Content-Length: 2000\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + bytes(2000) + b"!!\r\n", b" 4"),
        (POST + b"X: " + b"x" * 100_000, b" 400 "),
    ):
        with served.open(sent) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert answer in all_of(connection)
    # A client that hangs up in the middle is no news.
    served.open(POST + b"Content-Length: 500\r\n\r\nabc").close()
    assert served.is_well()
    assert not caplog.text


def test_with_more_connections_than_allowed_each_request_is_told_503(serve: Callable[..., Served]) -> None:
    served = serve(connections=5)
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(served.open())
        boards.wait_for(lambda: len(served.server.server_state.connections) == 5, 60)
        for _ in range(5):
            with served.open(POST + b"Content-Length: %d\r\n\r\n" % len(jpeg()) + jpeg()) as connection:
                assert b" 503 " in all_of(connection)
    boards.wait_for(lambda: not served.server.server_state.connections, 60)
    assert served.is_well()


def test_a_refused_client_that_is_still_sending_reads_why(serve: Callable[..., Served]) -> None:
    served = serve(photos=1, photo=4 * MB)

    def told(size: int, headers: bytes) -> bytes:
        """What a client reads that sends everything before it listens."""
        with served.open(POST + headers + b"Content-Length: %d\r\n\r\n" % size + bytes(size)) as connection:
            return all_of(connection).lower()

    served.model.may_answer.clear()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(served.predict, jpeg())
        boards.wait_for(lambda: served.model.batches == [1], 60)
        for headers in (b"", b"Connection: close\r\n"):
            for size in (3 * MB, 20 * MB):
                assert b" 503 " in (said := told(size, headers)) and b"\r\nretry-after: 1\r\n" in said
        served.model.may_answer.set()
        assert first.result()[0] == 200
    for headers in (b"", b"Connection: close\r\n"):
        assert b" 413 " in told(20 * MB, headers)
    assert served.is_well()


def test_photos_that_wait_are_asked_about_together_and_no_more_are_taken_in(serve: Callable[..., Served]) -> None:
    served = serve(photos=2 * BATCH)
    served.model.may_answer.clear()
    with ThreadPoolExecutor(4 * BATCH) as clients:
        first = clients.submit(served.predict, jpeg())
        boards.wait_for(lambda: served.model.batches == [1], 60)
        others = [clients.submit(served.predict, jpeg((0, 0, 250))) for _ in range(2 * BATCH - 1)]
        served.working(2 * BATCH)
        boards.wait_for(lambda: served.predict(jpeg())[0] == 503, 60)
        for body in (jpeg(), b"", iter([jpeg()])):
            status, said, headers = served.predict(body)
            assert (status, headers["retry-after"]) == (503, "1") and "in a moment" in said["detail"]
        # Who looks after the server still hears from it.
        assert served.ask("GET", "/ping")[0] == 200
        served.model.may_answer.set()
        assert first.result()[:2][1]["label"] == "red"
        assert Counter((status, said["label"]) for status, said, _ in (each.result() for each in others)) == {
            (200, "blue"): 2 * BATCH - 1
        }
    assert sum(served.model.batches) == 2 * BATCH and max(served.model.batches) == BATCH
    assert served.is_well()


def test_bodies_that_are_on_their_way_take_no_more_memory_than_allowed(serve: Callable[..., Served]) -> None:
    served = serve(bodies=MB)
    with ExitStack() as held:
        sent = POST + b"Content-Length: 1000000\r\n\r\n" + bytes(300_000)
        slow = [held.enter_context(served.open(sent)) for _ in range(3)]
        served.working(3)
        boards.wait_for(lambda: served.predict(jpeg() + bytes(200_000))[0] == 503, 60)
        # There is room for a small one.
        assert served.is_well()
        slow[0].close()
        boards.wait_for(lambda: served.predict(jpeg() + bytes(200_000))[0] == 422, 60)
    boards.wait_for(lambda: served.predict(jpeg() + bytes(900_000))[0] == 422, 60)


def test_a_model_that_fails_does_so_for_its_batch_alone(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()
    served.model.says = [float("nan"), 0.0]
    status, said, _ = served.predict(jpeg())
    assert status == 500 and len(said["detail"].splitlines()) == 1
    served.model.says, served.model.fault = None, MemoryError("the model's")
    with served.open(POST + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(jpeg()) + jpeg()) as connection:
        assert b" 500 " in all_of(connection)
    assert "the model's" in caplog.text
    served.model.fault = None
    assert served.is_well()


def test_told_to_end_it_answers_what_is_in_progress_and_waits_for_nobody_else(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(end_seconds=2)
    served.model.may_answer.clear()
    with (
        served.open(),
        served.open(POST),
        served.open(POST + b"Content-Length: 1000\r\n\r\nabc") as half,
        ThreadPoolExecutor(4) as clients,
    ):
        in_progress = [clients.submit(served.predict, jpeg()) for _ in range(4)]
        served.working(5)
        boards.wait_for(lambda: served.model.batches, 60)
        served.server.should_exit = True
        boards.wait_for(served.is_deaf, 60)
        served.model.may_answer.set()
        assert [each.result()[0] for each in in_progress] == [200] * 4
        assert b" 503 " in all_of(half)
        served.thread.join(60)
        assert not served.thread.is_alive()
    # One line of uvicorn's, and no traceback.
    assert [line.split()[0] for line in caplog.messages] == ["Cancel"]


def test_the_page_of_the_api_needs_no_other_host(serve: Callable[..., Served]) -> None:
    served = serve()
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/") as answer:
        page = answer.read().decode()
        assert answer.url.endswith("/docs")
    assert f"curl --data-binary @photo.jpg http://127.0.0.1:{served.port}/predict" in page
    assert page.count("://") == page.count(f"http://127.0.0.1:{served.port}/")
    paths = ("/predict", "/ping", "/healthz", "/readyz", "/metrics")
    for words in (*paths, "a planted model", "400", "408", "413", "422", "503", "probabilities"):
        assert words in page
    described = served.ask("GET", "/openapi.json")[1]
    assert set(described["paths"]) == set(paths)
    taken = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(taken) == {"image/*", "*/*", "multipart/form-data"} and "binary" in json.dumps(taken)
    # A host's name that is markup stays text.
    with served.open(
        b"GET /docs HTTP/1.1\r\nHost: <script>alert(1)</script>\r\nConnection: close\r\n\r\n"
    ) as connection:
        assert b"<script>alert" not in all_of(connection)


def test_a_photo_tried_on_the_page_is_answered_there(serve: Callable[..., Served], tmp_path: Path) -> None:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no Chromium with its chromedriver here")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    served = serve()
    (tmp_path / "a.jpg").write_bytes(jpeg((0, 0, 250)))
    (tmp_path / "b.jpg").write_bytes(b"<html>")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        f"user-data-dir={tmp_path}/c",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        browser.get(f"http://127.0.0.1:{served.port}/docs")
        photo, answer = (browser.find_element(By.ID, name) for name in ("photo", "answer"))
        assert not photo.is_displayed() and not answer.is_displayed()
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "a.jpg"))
        WebDriverWait(browser, 60).until(lambda _: answer.text.startswith("200"))
        assert (
            '"label": "blue"' in answer.text and photo.is_displayed() and int(photo.get_property("naturalWidth")) == 48
        )
        assert not browser.get_log("browser")
        file = browser.find_element(By.ID, "file")
        file.send_keys(str(tmp_path / "b.jpg"))  # beside the first
        WebDriverWait(browser, 60).until(lambda _: '"photo": "b.jpg"' in answer.text)
        assert '"photo": "a.jpg"' in answer.text and "a web page" in answer.text and not photo.is_displayed()
        browser.execute_script("arguments[0].value = ''", file)
        file.send_keys(str(tmp_path / "b.jpg"))
        WebDriverWait(browser, 60).until(lambda _: answer.text.startswith("422"))
        assert "a web page" in answer.text and photo.is_displayed()
    finally:
        browser.quit()


@contextmanager
def running(project: projects.Project, line: str, log: Path) -> Iterator[subprocess.Popen]:
    """A server started by a line for a shell, until the block ends; what it prints is in `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", line], cwd=project.root, env=project.environment(), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def is_up(process: subprocess.Popen, port: int, log: Path) -> None:
    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=10).status == 200

    boards.wait_for(answers, 300)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> projects.Project:
    return projects.built(tmp_path_factory).project


def test_one_photo_has_one_answer_wherever_it_is_asked(project: projects.Project, tmp_path: Path) -> None:
    model = project.json("reports/registration.json")["better_model"]
    side = project.json(f"models/{model}.json")["image_size"]
    with (project.root / "reports/predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    there = [row["path"] for row in rows]
    stored = [[float(row[f"probability:{name}"]) for name in ("rugby", "soccer")] for row in rows]
    (tmp_path / "photo.jpg").write_bytes((project.root / there[0]).read_bytes())
    elsewhere = projects.Project(tmp_path)

    predicted = [json.loads(line) for line in project.call("predict", *there, "--format", "json").out.splitlines()]
    ports = boards.free_ports(2)
    serve = f"exec {SERVE} --port {ports[0]}"
    mlflow_serve = MLFLOW_SERVE.replace("5001", str(ports[1]))
    with (
        running(project, serve, tmp_path / "serve.txt") as ours,
        running(project, mlflow_serve, tmp_path / "mlflow.txt") as mlflows,
    ):
        is_up(ours, ports[0], tmp_path / "serve.txt")
        served = []
        for path in there:
            request = urllib.request.Request(f"http://127.0.0.1:{ports[0]}/predict", (project.root / path).read_bytes())
            with urllib.request.urlopen(request) as answer:
                served.append(json.load(answer))
        asked, in_a_form, of_several = (
            json.loads(elsewhere.run("bash", "-c", ask.replace("curl", "curl -s").replace("8000", str(ports[0]))))
            for ask in (ASK, ASK_IN_A_FORM, ASK_OF_SEVERAL)
        )
        assert asked == in_a_form and [{**asked, "photo": "photo.jpg"}] * 2 == of_several

        is_up(mlflows, ports[1], tmp_path / "mlflow.txt")
        inputs = [photos.decode((project.root / path).read_bytes(), side).tolist() for path in there]
        request = urllib.request.Request(
            f"http://127.0.0.1:{ports[1]}/invocations", json.dumps({"inputs": inputs}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request) as answer:
            invoked = json.load(answer)["predictions"]
        command = MLFLOW_ASK.replace("curl", "curl -s")
        alone = json.loads(elsewhere.run("bash", "-c", command.replace("5001", str(ports[1]))))["predictions"]

        # A second server on the same port is refused in a line that names the port and the option.
        refused = project.call("serve", "--port", str(ports[0]), exit_code=1).err
        assert f"127.0.0.1:{ports[0]}" in refused and "--port" in refused and refused.count("\n") == 1
        ours.send_signal(signal.SIGINT)
        assert ours.wait(60) == 0
    [said] = (tmp_path / "serve.txt").read_text().splitlines()
    assert asked["model"] in said and f"http://127.0.0.1:{ports[0]}" in said

    assert len(there) >= 8
    for ours_said, theirs in zip(served, predicted, strict=True):
        assert theirs.pop("photo") in there and list(ours_said) == [*theirs, "model"]
        assert (ours_said["label"], ours_said["guess"]) == (theirs["label"], theirs["guess"])
    for answers in (served, predicted):
        found = [list(each["probabilities"].values()) for each in answers]
        np.testing.assert_allclose(found, stored, atol=1e-5)
    np.testing.assert_allclose(invoked, stored, atol=1e-5)
    np.testing.assert_allclose([list(asked["probabilities"].values()), alone[0]], [stored[0]] * 2, atol=1e-5)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-machine.invalid"])
def test_a_host_that_is_not_this_machine_is_no_question_of_the_port(host: str) -> None:
    with pytest.raises(TouchlineError) as raised:
        ports.bound(host, 0)
    assert host in str(raised.value) and "--host" in str(raised.value) and "--port" not in str(raised.value)


def test_a_server_without_a_champion_says_so_and_ends(tmp_path: Path) -> None:
    project = projects.make(tmp_path / "project", git=False)
    for arguments, exit_code, named in (((), 1, projects.REGISTERED), (("--model", "7"), 2, "7")):
        said = project.call("serve", *arguments, exit_code=exit_code).err
        assert named in said and said.count("\n") == 1
