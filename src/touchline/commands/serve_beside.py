"""A challenger beside the champion: a shadow's answers are only recorded; a canary answers a share of the photos."""

import hashlib
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Self

from touchline.core.errors import TouchlineError, one_line
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data.served import SHADOW, Asked, Recorder
from touchline.models.classifier import Classifier, pixels, resolve_to_serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from touchline.commands.serve_batches import Batches

CHALLENGER = "challenger"
ANSWERED, FAILED, DROPPED = "answered", "failed", "dropped"
_MOST_WAITING = 64
_MOST_BYTES = 64 * 2**20
_SECONDS = 0.02


class Shadow:
    """Runs a model on photos that another one has answered, in a thread of its own, while its `with` block runs.

    It runs only while the other model is idle. Photos wait in a queue, and are dropped if it is full. A model that
    fails or hangs affects nothing else.

    Args:
        recorder: records its answers.

    Attributes:
        is_busy: whether the other model has photos now.
        on_photo: called with ANSWERED, FAILED or DROPPED for each photo.
    """

    def __init__(self, classifier: Classifier, params: Params, recorder: Recorder) -> None:
        self._classifier, self._params, self._recorder = classifier, params, recorder
        self._waiting: Queue[tuple[bytes, Asked]] = Queue(_MOST_WAITING)
        self._bytes = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._failing = False
        self.is_busy: Callable[[], bool] = lambda: False
        self.on_photo: Callable[[str], None] = lambda _: None

    def __enter__(self) -> Self:
        # A daemon, and not waited for: a model that hangs must not keep the server from ending.
        threading.Thread(target=self._work, name="shadow", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()

    def offer(self, photo: bytes, asked: Asked) -> None:
        """Queue a photo if there is room; returns at once."""
        with self._lock:
            room = self._bytes + len(photo) <= _MOST_BYTES
            self._bytes += len(photo) if room else 0
        try:
            if not room:
                raise Full
            self._waiting.put_nowait((photo, asked))
        except Full:
            self._release(photo if room else b"")
            self.on_photo(DROPPED)

    def _release(self, photo: bytes) -> None:
        with self._lock:
            self._bytes -= len(photo)

    def _work(self) -> None:
        while not self._closing.is_set():
            if self.is_busy():
                time.sleep(_SECONDS)
                continue
            try:
                photo, asked = self._waiting.get(timeout=_SECONDS)
            except Empty:
                continue
            self._ask(photo, asked)
            self._release(photo)

    def _ask(self, photo: bytes, asked: Asked) -> None:
        model = self._classifier
        add = partial(self._recorder.add, asked, role=SHADOW, model=(model.name, model.files.model_sha256))
        began = time.perf_counter()
        try:
            square = pixels(photo, model.side, self._params.validate_.max_megapixels)
            rows = model.forward(square[None])
            answer = model.answer(rows[0], model.similarities(rows)[0], self._params.predict)
        except Exception as error:  # no failure of the shadow may stop the server
            self.on_photo(FAILED)
            add(one_line(error))
            if not self._failing:
                print(f"touchline: the shadow, {model.name}, failed: {one_line(error)}", file=sys.stderr, flush=True)
            self._failing = True
            return
        self._failing = False
        add(vars(answer), 1000 * (time.perf_counter() - began))
        self.on_photo(ANSWERED)


@dataclass(frozen=True)
class Canary:
    """A model that answers a share of the photos in place of the champion.

    Attributes:
        batches: run the model.
        share: of the photos, chosen by digest, so that one photo always goes to the same model.
    """

    batches: "Batches"
    share: float

    def takes(self, photo: bytes) -> bool:
        """Whether this photo goes to the canary, by the digest of its file."""
        return int.from_bytes(hashlib.sha256(photo).digest()[:8]) < self.share * 2**64


@dataclass(frozen=True)
class Beside:
    """A challenger and its roles.

    Attributes:
        canary_share: share of the photos that it answers.
        is_shadow: whether it also classifies the others as a shadow.
    """

    classifier: Classifier
    canary_share: float = 0.0
    is_shadow: bool = True


def found(paths: Paths, params: Params, champion: Classifier, shadow: str, canary: float) -> Beside | None:
    """The challenger asked for; None, after printing a line, if it is the model that answers already.

    Args:
        shadow: as `wanted` of `classifier.resolve`; empty: there is only a canary, and it is the alias `challenger`.
        canary: share of the photos that it answers.

    Raises:
        TouchlineError: there is no such model, or its classes differ.
    """
    challenger = resolve_to_serve(paths, params, shadow or CHALLENGER)
    if challenger.classes != champion.classes:
        raise TouchlineError(
            f"{challenger.name} has other classes ({', '.join(challenger.classes)}) than {champion.name}: "
            "name another model with --shadow"
        )
    digest = challenger.files.model_sha256
    if challenger.name == champion.name or (digest and digest == champion.files.model_sha256):
        print(f"{challenger.name} is the model that answers already: no other model runs beside it", flush=True)
        return None
    return Beside(challenger, canary, bool(shadow))
