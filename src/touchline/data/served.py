"""Records of answers: one row for each photo, kept by `serve --record` and `predict --record`, read by `monitor`.

`data/served/` has SQLite files, `<day>-<process>-<random>.sqlite`. Each has one writer, which starts a new file each
day (UTC) and when the file has grown large. A thread commits four times a second, so a killed process loses at most a
quarter of a second, and no answer waits for the disk. Other programs may read the files at any time.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from touchline.core.errors import TouchlineError, one_line
from touchline.core.params import MonitorParams
from touchline.core.progress import say
from touchline.data import photos
from touchline.data.thumbnails import at_its_aspect, jpeg_file

if TYPE_CHECKING:
    import pandas as pd

# A model's role in an answer: CHAMPION, the model that normally answers (or the one given by --model); SHADOW,
# a challenger that was run beside it; CANARY, a challenger that answered in its place.
CHAMPION, SHADOW, CANARY = "champion", "shadow", "canary"
SUFFIX = ".sqlite"
_VERSION = 1
_TABLES = f"""
CREATE TABLE answers (
    time REAL, model TEXT, model_sha256 TEXT, role TEXT, photo TEXT, size INTEGER, label TEXT, guess TEXT,
    confidence REAL, probabilities TEXT, similarity REAL, milliseconds REAL, error TEXT
);
CREATE TABLE thumbnails (photo TEXT PRIMARY KEY, jpeg BLOB);
PRAGMA user_version = {_VERSION};
"""
_SECONDS = 0.25
_MOST_WAITING = 4096
_THUMBNAIL = 240
# At this share of `monitor.keep_megabytes` a new file is started, so that old ones can be deleted.
_SHARE = 0.1


@dataclass(frozen=True)
class Asked:
    """What is recorded of a photo itself.

    Attributes:
        photo: sha256 of its file. size: bytes of its file.
        thumbnail: a JPEG of 240 pixels; None if none is kept.
    """

    photo: str
    size: int
    thumbnail: bytes | None = None

    @classmethod
    def of(cls, content: bytes, square: np.ndarray | None, *, keep_photo: bool) -> Self:
        """From a photo's file and its pixels, uint8 RGB (side, side, 3); None if it could not be decoded."""
        thumbnail = None
        if keep_photo and square is not None:
            thumbnail = jpeg_file(at_its_aspect(square, photos.header(content), _THUMBNAIL))
        return cls(hashlib.sha256(content).hexdigest(), len(content), thumbnail)


@dataclass(frozen=True)
class Row:
    """An answer, or the reason why there was none.

    Attributes:
        time: seconds since 1970, UTC.
        model: its name for people, with its version. model_sha256: of its `.keras` file; empty if unknown.
        role: CHAMPION, SHADOW or CANARY.
        photo, size: as in Asked.
        label, guess, confidence, similarity: as in `classifier.Answer`; None if there was no answer.
        probabilities: a JSON object, the probability of each class.
        milliseconds: from the photo's arrival to its answer; None for answers that `predict` gives in batches.
        error: why there was no answer; else empty.
    """

    time: float
    model: str
    model_sha256: str
    role: str
    photo: str
    size: int
    label: str | None = None
    guess: str | None = None
    confidence: float | None = None
    probabilities: str | None = None
    similarity: float | None = None
    milliseconds: float | None = None
    error: str = ""


COLUMNS = tuple(field.name for field in fields(Row))
_INSERT = f"INSERT INTO answers VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608  # nosec B608 - nothing but marks


class Recorder:
    """Writes rows in a thread of its own, as long as its `with` block runs.

    Args:
        folder: of the records; created if missing.
        model, model_sha256: of the model that answers, as in `Row`.
        keep_photos: keep a thumbnail of each photo.

    Attributes:
        asked: makes an `Asked` of a photo; the workers of a cluster may call it too.
        on_lost: called with the number of rows that could not be written, for example because the disk is full.

    Raises:
        TouchlineError: the folder cannot be written to.
    """

    def __init__(
        self, folder: Path, params: MonitorParams, model: str, model_sha256: str, *, keep_photos: bool = False
    ) -> None:
        self._folder, self._params = folder, params
        self.asked = partial(Asked.of, keep_photo=keep_photos)
        self._model = (model, model_sha256)
        self._waiting: Queue[tuple[Row, bytes | None]] = Queue(_MOST_WAITING)
        self._closing = threading.Event()
        self._failing = self._torn = False
        self.on_lost: Callable[[int], None] = lambda _: None
        try:
            self._file, self._database = self._opened()
        except (sqlite3.Error, OSError) as error:
            raise TouchlineError(
                f"{folder} cannot be written ({one_line(error)}): make room, allow writing there, or leave out --record"
            ) from None
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._database.close()

    def add(
        self,
        asked: Asked,
        said: Mapping[str, Any] | str,
        milliseconds: float | None = None,
        *,
        role: str = CHAMPION,
        model: tuple[str, str] | None = None,
        wait: bool = False,
    ) -> None:
        """Record an answer.

        Args:
            said: the fields of a `classifier.Answer`, or why there is none.
            model: name and sha256, if it is not the recorder's own model.
            wait: wait if the writer is behind; otherwise the row is lost, and counted.
        """
        answer: dict[str, Any] = {"error": said} if isinstance(said, str) else {
            **{name: said[name] for name in ("label", "guess", "confidence", "similarity")},
            "probabilities": json.dumps(said["probabilities"]),
        }  # fmt: skip
        row = Row(
            time.time(), *(model or self._model), role, asked.photo, asked.size, milliseconds=milliseconds, **answer
        )
        try:
            self._waiting.put((row, asked.thumbnail), block=wait)
        except Full:
            self.on_lost(1)

    def _work(self) -> None:
        ending = False
        while not ending:
            ending = self._closing.wait(_SECONDS)
            if rows := [self._waiting.get() for _ in range(self._waiting.qsize())]:
                self._write(rows)

    def _write(self, rows: Sequence[tuple[Row, bytes | None]]) -> None:
        try:
            if self._is_over():
                self._database.close()
                self._file, self._database = self._opened()
                self._torn = False
            with self._database:
                self._database.executemany(_INSERT, [astuple(row) for row, _ in rows])
                kept = [(row.photo, thumbnail) for row, thumbnail in rows if thumbnail]
                self._database.executemany("INSERT OR IGNORE INTO thumbnails VALUES (?, ?)", kept)
            self._failing = False
        except (sqlite3.Error, OSError) as error:
            self.on_lost(len(rows))
            # Operational errors (a full disk, a lock) may pass; others mean that the file is damaged.
            self._torn = not isinstance(error, sqlite3.OperationalError)
            if not self._failing:
                print(
                    f"touchline: {self._folder} cannot be written ({one_line(error)}): make room there; until then "
                    "answers are not recorded",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            self._failing = True

    def _is_over(self) -> bool:
        """Whether a new file is needed: this one is of another day, large, damaged or deleted."""
        if self._torn or _day(self._file) != _today() or not self._file.exists():
            return True
        return _size(self._file) > _SHARE * 1e6 * self._params.keep_megabytes

    def _opened(self) -> tuple[Path, sqlite3.Connection]:
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in expired(self._folder, self._params):
            delete(file)
        file = self._folder / f"{_today()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        # Opened in one thread and used in another, one after the other.
        database = sqlite3.connect(file, check_same_thread=False, timeout=30)
        try:
            # Readers and the writer do not block each other, and a commit does not wait for the disk.
            database.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; BEGIN; {_TABLES} COMMIT;")
        except BaseException:
            database.close()
            delete(file)
            raise
        return file, database


def read(folder: Path, since: datetime | None = None, columns: Collection[str] = COLUMNS) -> "pd.DataFrame":
    """The recorded rows, by time. A file that cannot be read is named, and the others are read.

    Args:
        since: leave out earlier rows.
        columns: those of `Row` to read; `time` is always included.
    """
    import pandas as pd

    since = since or datetime.fromtimestamp(0, UTC)
    names = [name for name in COLUMNS if name in columns or name == "time"]
    query = f"SELECT {', '.join(names)} FROM answers WHERE time >= ?"  # noqa: S608  # nosec B608 - our own columns
    rows: list[tuple[Any, ...]] = []
    for file in files(folder):
        if _day(file) >= f"{since:%Y-%m-%d}":
            with _naming(file), _reading(file) as database:
                rows += database.execute(query, [since.timestamp()]).fetchall()
    table = pd.DataFrame(rows, columns=names).astype({name: float for name in names if name in _NUMBERS})
    return table.sort_values("time", kind="stable", ignore_index=True)


def thumbnails(folder: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The thumbnails, as JPEG files, that were kept of the `wanted` photos, by sha256."""
    found: dict[str, bytes] = {}
    for file in files(folder):
        with _naming(file), _reading(file) as database:
            for photo in set(wanted) - found.keys():
                found |= database.execute("SELECT photo, jpeg FROM thumbnails WHERE photo = ?", [photo]).fetchall()
    return found


def files(folder: Path) -> list[Path]:
    """The files with records, the oldest first."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def expired(folder: Path, params: MonitorParams) -> list[Path]:
    """Files to delete: those beyond `monitor.keep_days`, and the oldest beyond `monitor.keep_megabytes`.

    Never one that a running process writes to.
    """
    first = f"{datetime.now(UTC) - timedelta(days=params.keep_days):%Y-%m-%d}"
    room = 1e6 * params.keep_megabytes
    gone, newest = [], set[str]()
    for file in sorted(files(folder), key=lambda file: (_day(file), file.stat().st_mtime), reverse=True):
        room -= _size(file)
        # The newest file of a running process is open.
        process = file.stem.split("-")[-2] if file.stem.count("-") >= 2 else ""
        is_open = process not in newest and _began(process) <= _day(file)
        newest.add(process)
        if not is_open and (room < 0 or _day(file) < first):
            gone.append(file)
    return gone[::-1]


def _began(process: str) -> str:
    """The day on which the process with this id started; later than any day if there is none."""
    import psutil

    try:
        return f"{datetime.fromtimestamp(psutil.Process(int(process)).create_time(), UTC):%Y-%m-%d}"
    except (psutil.Error, ValueError):
        return "9999"


def delete(file: Path) -> None:
    """Delete a file with records, and the files that SQLite keeps beside it."""
    for part in _parts(file):
        part.unlink(missing_ok=True)


_NUMBERS = {"time", "size", "confidence", "similarity", "milliseconds"}


def _parts(file: Path) -> list[Path]:
    beside = (file.with_name(f"{file.name}{end}") for end in ("", "-wal", "-shm", "-journal"))
    return [part for part in beside if part.exists()]


def _size(file: Path) -> int:
    return sum(part.stat().st_size for part in _parts(file))


def _day(file: Path) -> str:
    return file.name[:10]


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Report a file that cannot be read, and continue."""
    try:
        yield
    except (sqlite3.Error, TouchlineError) as error:
        say(f"{file} is left out ({one_line(error)}): read it with the Touchline that wrote it, or delete it")


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as database:
        [version] = database.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            raise TouchlineError(f"its format is version {version}, and this Touchline reads {_VERSION}")
        yield database
