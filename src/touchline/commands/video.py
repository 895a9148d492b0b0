"""`touchline predict` on videos: clips, cameras and streams, with answers for frames or for passages.

A frame is prepared like a photo, by `classifier.pixels`, so a frame and a photo of the same pixels get the same answer.
"""

import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from touchline.commands import predict
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import Params, PredictParams
from touchline.core.paths import Paths
from touchline.core.progress import say, track
from touchline.data import layout
from touchline.data.thumbnails import thumbnail
from touchline.models import explain as explaining
from touchline.models.classifier import UNKNOWN, UNSURE, Answer, Classifier, pixels, resolve
from touchline.models.engines import Explain
from touchline.models.inference import BATCH

if TYPE_CHECKING:
    import cv2

T = TypeVar("T")
_CLIPS = {
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".wmv", ".flv", ".ogv", ".3gp",
}  # fmt: skip
_ADDRESS, _CAMERA = re.compile(r"(rtsps?|rtmp|https?)://", re.IGNORECASE), re.compile(r"\d{1,2}")
# Time limit in milliseconds for a stream to connect, and for each frame.
_PATIENCE = 10_000
# A clip counts as broken off if it ends this much before the length in its header: in seconds, and as a share. Headers
# are rounded.
_MISSING = 1.0, 0.02
# Pictures on a film strip, and pixels of the longer side of each.
_PICTURES, _SIDE = 60, 280
_PROBABILITY = "probability:"


@dataclass(frozen=True)
class Clip:
    """A file, a camera or a stream.

    Attributes:
        source: what OpenCV opens: a path, the number of a camera, or an address.
    """

    source: str

    @property
    def is_camera(self) -> bool:
        return _CAMERA.fullmatch(self.source) is not None and not os.path.lexists(self.source)

    @property
    def is_file(self) -> bool:
        return not (self.is_camera or self.is_address)

    @property
    def is_address(self) -> bool:
        return _ADDRESS.match(self.source) is not None

    @property
    def name(self) -> str:
        """The name for people: of an address, without user name and password."""
        return f"camera {self.source}" if self.is_camera else re.sub(r"(?<=://)[^/?#]*@", "", self.source)

    @property
    def strip(self) -> Path:
        """Path of its film strip: beside a file, else in the current folder."""
        if not self.is_file:
            return Path(re.sub(r"\W+", "-", self.name).strip("-")[:100] + predict.OVERLAY)
        return Path(self.source + predict.OVERLAY)


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are classified.

    Attributes:
        every: seconds from one frame to the next.
        window: odd number of frames that an answer is averaged over: the frame itself, and as many before as after it.
        seconds: how much of the video to read; None for all.
    """

    every: float = 1.0
    window: int = 5
    seconds: float | None = None


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        seconds: since the start.
        pixels: input of the model, uint8 (side, side, 3). picture: for people, uint8 RGB.
    """

    seconds: float
    pixels: np.ndarray
    picture: np.ndarray | None


@dataclass(frozen=True)
class Passage:
    """Consecutive frames with the same label.

    Attributes:
        start, end: seconds since the start of the video.
        confidence: mean probability of the guess, for `unknown` and `unsure` too.
        best: the frame with the highest.
    """

    start: float
    end: float
    label: str
    confidence: float
    frames: int
    best: tuple[Frame, Answer]

    @property
    def row(self) -> dict[str, Any]:
        """The row that is written for it."""
        return {
            "from": round(self.start, 3), "to": round(self.end, 3), "label": self.label,
            "confidence": round(self.confidence, 6), "frames": self.frames,
        }  # fmt: skip


def find(names: Sequence[str]) -> list[Clip]:
    """The videos among `names`; empty if they all name photos.

    Args:
        names: clips, folders with clips and without photos, patterns, addresses and numbers of cameras.

    Raises:
        ParamsError: they name videos and photos.
    """
    clips, photos = [], []
    for name in predict.without_drawn(names):
        if (clip := Clip(name)).is_address or clip.is_camera:
            clips.append(clip)
        elif name != predict.STDIN and (found := _clips_of(name)):
            clips += found
        else:
            photos.append(name)
    if clips and photos:
        raise ParamsError(
            f"{predict.shown(photos[0])} is not a video, but {clips[0].name} is: use a command for photos and one for "
            "videos"
        )
    return clips


def _clips_of(name: str) -> list[Clip]:
    """The clips that a name stands for; none if there is a photo, where reading of a large folder stops."""
    clips = []
    for found in predict.find([name]):
        if found.path.suffix.lower() in _CLIPS:
            clips.append(Clip(str(found.path)))
        elif not found.listed or _is_photo(found.path):
            return []
    return clips


def _is_photo(path: Path) -> bool:
    if path.suffix.lower() in predict.NAMED_AS_PHOTOS:
        return True
    try:
        with path.open("rb") as file:
            return bool(layout.format_of(file.read(64)))
    except OSError:
        return False


def run(
    paths: Paths, params: Params, clips: Sequence[Clip], wanted: str, form: str, sampling: Sampling, *,
    frames: bool, explain: bool,
) -> None:  # fmt: skip
    """Write a model's answers on videos to stdout, one video after the other; everything else goes to stderr.

    After Ctrl-C the answers so far are written; a second Ctrl-C ends the program at once.

    Args:
        wanted: see `classifier.resolve`.
        form: `table`, `json` (an object a line) or `csv`.
        frames: one answer per frame instead of one per passage.
        explain: draw a film strip of each video, one picture per passage; see `Clip.strip`.

    Raises:
        ParamsError: the window is an even number of frames.
        TouchlineError: at the end, if a video could not be read; each was named when its turn came.
    """
    if sampling.window % 2 == 0:
        raise ParamsError(f"--window {sampling.window} is even, so it has no middle frame: give an odd number")
    results, counts, failed = sys.stdout, Counter[str](), 0
    # Names of files are bytes, and are written as they are.
    if isinstance(results, io.TextIOWrapper):
        results.reconfigure(errors="surrogateescape")
    with redirect_stdout(sys.stderr), _ending() as ended:
        classifier = resolve(paths, params, wanted)
        explainer = classifier.explainer() if explain else None
        # On a terminal, lines that are printed meanwhile would break the progress bar.
        with_bar = not (results.isatty() and form != "table")

        def watched(clip: Clip) -> Iterator[dict[str, Any]]:
            nonlocal failed
            video = Video(clip, sampling, params.validate_.max_megapixels, ended)
            strip = _Strip(classifier, explainer) if explainer else None
            seen = video.frames(classifier.side, with_bar=with_bar, pictures=explain)
            for each in passages(answered(seen, classifier, params.predict, sampling.window), lambda: video.end):
                if isinstance(each, Passage):
                    if strip:
                        strip.add(each)
                    if not frames:
                        yield {"clip": clip.name, **each.row}
                    continue
                frame, answer = each
                counts[answer.label] += 1
                if frames:
                    yield {"clip": clip.name, "seconds": round(frame.seconds, 3), **asdict(answer)}
            for error in filter(None, (video.error, strip.save(clip.strip) if strip else "")):
                failed += 1
                say(f"touchline: {predict.shown(clip.name)}: {error}")

        columns = ["clip", "from", "to", "label", "confidence", "frames"]
        if frames:
            probabilities = [_PROBABILITY + name for name in classifier.classes]
            columns = ["clip", "seconds", "label", "guess", "confidence", *probabilities, "similarity", "percentile"]
        _WRITERS[form](results, columns, chain.from_iterable(watched(clip) for clip in clips if not ended()))
        results.flush()
        labels = [label for label in dict.fromkeys([*classifier.classes, UNSURE, UNKNOWN]) if counts[label]]
        say(f"{classifier.name}: " + (", ".join(f"{label} {counts[label]:,}" for label in labels) or "no frames"))
    if failed:
        raise TouchlineError(f"{failed:,} failed, named above")


@contextmanager
def _ending() -> Iterator[Callable[[], bool]]:
    """Gives a function that returns whether Ctrl-C was pressed. A second Ctrl-C has its usual effect."""
    pressed = threading.Event()

    def end(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class Video:
    """A clip to be watched.

    Attributes:
        error: once it has been read, what was wrong with it; else empty.
        end: seconds read so far.
    """

    def __init__(self, clip: Clip, sampling: Sampling, max_megapixels: float, ended: Callable[[], bool]) -> None:
        self._clip, self._sampling, self._max_megapixels, self._ended = clip, sampling, max_megapixels, ended
        self.error, self.end = "", 0.0

    def frames(self, side: int, *, with_bar: bool, pictures: bool) -> Iterator[Frame]:
        """Its frames at the times that `Sampling` asks for.

        Args:
            side: height and width in pixels of the model's input.
            pictures: also give pictures for people.
        """
        import cv2

        if self._clip.is_file and not os.path.lexists(self._clip.source):
            self.error = os.strerror(errno.ENOENT)
            return
        capture, length = _opened(self._clip), 0.0
        try:
            if not capture.isOpened():
                why = "cut off or" if self._clip.is_file else "it does not answer, or is"
                self.error = f"{why} not a video that OpenCV can decode"
                return
            rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
            length = count / rate if rate > 0 and count > 0 else 0.0
            live = not length and not self._clip.is_file
            limit = self._sampling.seconds or math.inf
            images = self._images(capture, limit, 1 / rate if rate > 0 else 0.0, live=live)
            number = int(min(length, limit) / self._sampling.every)
            for seconds, image in track(images, number, "frames") if with_bar and number > BATCH else images:
                # Lossless, so that it is decoded as a photo of these pixels would be.
                content = cv2.imencode(".bmp", image)[1].tobytes()
                picture = thumbnail(content, _SIDE) if pictures else None
                yield Frame(seconds, pixels(content, side, self._max_megapixels), picture)
            if (
                not self.error
                and min(length, limit) - self.end > max(_MISSING[0], _MISSING[1] * length)
                and not self._ended()
            ):
                self.error = f"breaks off after {self.end:.1f} of {length:.1f} s"
        except TouchlineError as error:
            self.error = str(error).removeprefix("photo ")
        finally:
            capture.release()

    def _images(
        self, capture: "cv2.VideoCapture", limit: float, last: float, *, live: bool
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Seconds and BGR image of each frame asked for. All frames are read: seeking is inexact in many formats.

        Args:
            last: how many seconds the last frame is shown.
        """
        import cv2

        began, due = None, 0.0
        while not self._ended() and capture.grab():
            # A camera gives no time, and a stream's time may start anywhere.
            now = time.monotonic() if live else capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            began = now if began is None else began
            seconds = now - began
            if seconds >= limit:
                self.end = limit
                return
            self.end = seconds + last
            if seconds >= due - 0.001:
                due += self._sampling.every * (1 + max(0, (seconds - due) // self._sampling.every))
                found, image = capture.retrieve()
                if found:
                    yield seconds, image
        if began is None and not self._ended():
            self.error = "no frames"


def _opened(clip: Clip) -> "cv2.VideoCapture":
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    # Silences FFmpeg too. A clip may be a list of other files and addresses: only those of the same kind may be opened.
    kinds = "file" if clip.is_file else "rtsp,rtmp,rtp,udp,tcp,tls,http,https,httpproxy,crypto"
    options = {"LOGLEVEL": "-8", "CAPTURE_OPTIONS": f"protocol_whitelist;{kinds}|rtsp_transport;tcp"}
    for name, value in options.items():
        os.environ[f"OPENCV_FFMPEG_{name}"] = value
    if clip.is_camera:
        return cv2.VideoCapture(int(clip.source))
    patience = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _PATIENCE]
    # The absolute path, because a name may look like one of FFmpeg's protocols.
    source = str(Path(clip.source).absolute()) if clip.is_file else clip.source
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG, [] if clip.is_file else patience)


def answered(
    frames: Iterable[Frame], classifier: Classifier, params: PredictParams, window: int
) -> Iterator[tuple[Frame, Answer]]:
    """The answer for each frame, averaged over the outputs of `window` frames around it."""

    def rows() -> Iterator[tuple[Frame, np.ndarray, float | None]]:
        for frame in frames:
            found = classifier.forward(frame.pixels[None])
            yield frame, found[0], classifier.similarities(found)[0]

    for middle, around in centred(rows(), window // 2):
        similar = [each for _, _, each in around if each is not None]
        row = np.mean([each for _, each, _ in around], axis=0)
        yield middle[0], classifier.answer(row, float(np.mean(similar)) if similar else None, params)


def centred(items: Iterable[T], beside: int) -> Iterator[tuple[T, list[T]]]:
    """Each item, with the list of items from `beside` before it to `beside` after it, as far as they exist."""
    window: deque[T | None] = deque(maxlen=2 * beside + 1)
    for item in chain(items, repeat(None, beside)):
        window.append(item)
        if len(window) > beside and (middle := window[-1 - beside]) is not None:
            yield middle, [each for each in window if each is not None]


def passages(
    answers: Iterable[tuple[Frame, Answer]], end: Callable[[], float]
) -> Iterator[tuple[Frame, Answer] | Passage]:
    """The answers as they come, and each passage once it is over.

    Args:
        end: returns where the video ends, in seconds; called when the answers have ended.
    """
    passage: Passage | None = None
    for frame, answer in answers:
        if passage and passage.label != answer.label:
            yield replace(passage, end=frame.seconds)
            passage = None
        passage = _joined(passage, frame, answer)
        yield frame, answer
    if passage:
        yield replace(passage, end=end())


def _joined(before: Passage | None, frame: Frame, answer: Answer) -> Passage:
    if before is None:
        return Passage(frame.seconds, frame.seconds, answer.label, answer.confidence, 1, (frame, answer))
    frames = before.frames + 1
    confidence = before.confidence + (answer.confidence - before.confidence) / frames
    best = (frame, answer) if answer.confidence > before.best[1].confidence else before.best
    return replace(before, frames=frames, confidence=confidence, best=best)


class _Strip:
    """The film strip of a video: each passage's most confident frame, with a heat map of what the model looked at. If
    there are very many passages, only the longest are shown.
    """

    def __init__(self, classifier: Classifier, explainer: Explain) -> None:
        self._classifier, self._explainer = classifier, explainer
        self._pictures: list[tuple[float, np.ndarray, str]] = []

    def add(self, passage: Passage) -> None:
        frame, answer = passage.best
        assert frame.picture is not None
        heat = self._explainer(frame.pixels[None], np.array([self._classifier.classes.index(answer.guess)]))[0]
        guess = f"{answer.guess} {passage.confidence:.0%}"
        said = guess if passage.label == answer.guess else f"{passage.label} ({guess})"
        caption = f"{_clock(passage.start)} to {_clock(passage.end)} {said}"
        self._pictures.append((passage.end - passage.start, explaining.warmed(frame.picture, heat), caption))
        if len(self._pictures) > _PICTURES:
            self._pictures.remove(min(self._pictures, key=lambda picture: picture[0]))

    def save(self, target: Path) -> str:
        """Write it, unless it is empty. Returns why that failed, else an empty string."""
        if not self._pictures:
            return ""
        return predict.save_overlay(target, explaining.strip([picture[1:] for picture in self._pictures]))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes:.0f}:{seconds:04.1f}"


def _write_table(results: IO[str], columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in columns:
        left = name in ("clip", "label", "guess")
        table.add_column(Text(name.removeprefix(_PROBABILITY)), justify="left" if left else "right", overflow="fold")
    for row in rows:
        label = row["label"]
        texts = [Text(_cell(name, value)) for name, value in zip(columns, _values(columns, row), strict=True)]
        texts[columns.index("label")].stylize("yellow" if label in (UNSURE, UNKNOWN) else "bold")
        table.add_row(*texts)
    if table.row_count:
        Console(file=results, width=None if results.isatty() else 10_000).print(table)


def _cell(column: str, value: object) -> str:
    if column in ("from", "to", "seconds"):
        return _clock(float(str(value)))
    return f"{value:.3f}" if isinstance(value, float) else predict.shown("" if value is None else str(value))


def _write_json(results: IO[str], _: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        results.write(json.dumps(row, allow_nan=False) + "\n")
        results.flush()  # answers about a stream are wanted at once


def _write_csv(results: IO[str], columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    results.write(predict.csv_line(columns))
    for row in rows:
        results.write(predict.csv_line(_values(columns, row)))
        results.flush()


def _values(columns: Sequence[str], row: dict[str, Any]) -> list[Any]:
    flat = row | {_PROBABILITY + name: value for name, value in row.get("probabilities", {}).items()}
    return [flat[name] for name in columns]


_WRITERS = {"table": _write_table, "json": _write_json, "csv": _write_csv}
