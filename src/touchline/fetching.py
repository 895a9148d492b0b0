"""Photos from the network into `data/photos`: many at once, each class filled in the order its source offers.

What was fetched, and what is not there at all, is kept in a journal, so a run that was killed goes on where it was and
the next one asks the network only for what is new.
"""

import asyncio
import hashlib
import itertools
import json
import os
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline import photos
from touchline.download import Broken, HttpError, Unavailable, WrongContent, get, network, repeated, session
from touchline.files import write_bytes
from touchline.params import DownloadParams
from touchline.progress import filling
from touchline.sources import Candidate

if TYPE_CHECKING:
    import aiohttp

    from touchline.progress import Filling

# Not there, and not coming back.
_ABSENT = {404, 410}


@dataclass(frozen=True)
class Entry:
    """What the journal says of one URL: the photo it gave, or the status that said there is none.

    Attributes:
        absent: 404 or 410; 0 where there is a photo.
        sha256, extension, bytes, width, height: of the file as it is kept.
        retrieved: ISO 8601, UTC.
    """

    url: str
    retrieved: str
    absent: int = 0
    sha256: str = ""
    extension: str = ""
    bytes: int = 0
    width: int = 0
    height: int = 0

    @property
    def name(self) -> str:
        """Of the photo's file, by its content."""
        return f"{self.sha256[:16]}.{self.extension or 'bin'}"


class Journal:
    """A file of JSON lines, only ever added to: one `Entry` a line, the last of a URL counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            # A line that a killed process did not finish is no entry; what it was about is fetched again.
            with suppress(ValueError, TypeError):
                entry = Entry(**json.loads(line))
                self._entries[entry.url] = entry
        self._file = path.open("ab")
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    def get(self, url: str) -> Entry | None:
        return self._entries.get(url)

    def add(self, entry: Entry) -> None:
        line = json.dumps({key: value for key, value in asdict(entry).items() if value}) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
            self._entries[entry.url] = entry


@dataclass(frozen=True)
class Kept:
    """A photo that is in its place."""

    candidate: Candidate
    path: Path
    entry: Entry


@dataclass
class Outcome:
    """What came of filling the classes.

    Attributes:
        kept: in the order of the offers.
        fetched: how many of them came over the network this time.
        megabytes: of those.
        left_out: how many offers gave no photo, by reason; what the journal knew to be absent is counted as such.
        tried_again: how many answers were worth another try, by reason.
    """

    kept: list[Kept] = field(default_factory=list)
    fetched: int = 0
    megabytes: float = 0.0
    seconds: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)
    tried_again: Counter[str] = field(default_factory=Counter)


def fill(
    offers: Iterator[Candidate],
    room: Mapping[str, int],
    folder_of: Callable[[Candidate], Path],
    whole: Set[Path],
    journal: Journal,
    settings: DownloadParams,
) -> Outcome:
    """Fetch offers until each class has as many photos as there is room for, or nothing more is offered.

    A class gets the first photos offered that there are, whatever order they come in: it never has more photos and
    requests together than room. An offer is drawn only when some class wants one, so a source may fetch what it needs
    for more only then.

    Args:
        room: photos wanted, by class.
        folder_of: where a candidate's file goes.
        whole: files that are there and hold what their names say.

    Raises:
        Unavailable: one request after another failed; what was fetched is kept.
        OSError: a photo cannot be written.
    """
    work = _Filling(offers, room, folder_of, whole, journal, settings)
    began = time.monotonic()
    with filling(room, "fetching photos") as shown:
        network(work.run(shown))
    work.outcome.kept = [kept for _, kept in sorted(work.kept, key=lambda numbered: numbered[0])]
    work.outcome.seconds = round(time.monotonic() - began, 2)
    return work.outcome


class _Filling:
    """One `fill` at work. Everything but `_store` runs on the network's thread."""

    def __init__(
        self,
        offers: Iterator[Candidate],
        room: Mapping[str, int],
        folder_of: Callable[[Candidate], Path],
        whole: Set[Path],
        journal: Journal,
        settings: DownloadParams,
    ) -> None:
        self._offers, self._room, self._folder_of = enumerate(offers), room, folder_of
        self._whole, self._journal, self._settings = whole, journal, settings
        self._waiting: dict[str, deque[tuple[int, Candidate]]] = defaultdict(deque)
        self._taken: Counter[str] = Counter()
        self._failed_in_a_row = 0
        self.kept: list[tuple[int, Kept]] = []
        self.outcome = Outcome()

    async def run(self, shown: "Filling") -> None:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Future[Any]] = set()
        drawing: asyncio.Future[Any] | None = None
        exhausted = False
        with ThreadPoolExecutor(1) as drawer, ThreadPoolExecutor(8) as writers:
            async with session(self._settings.connections) as client:
                try:
                    while True:
                        while len(tasks) < self._settings.connections and (offer := self._next()):
                            tasks.add(asyncio.ensure_future(self._offer(*offer, client, writers, shown)))
                        if not exhausted and drawing is None and (count := self._wanted()):
                            drawing = loop.run_in_executor(drawer, list, itertools.islice(self._offers, count))
                        if not tasks and drawing is None:
                            return
                        done, _ = await asyncio.wait(
                            tasks | ({drawing} if drawing else set()), return_when=asyncio.FIRST_COMPLETED
                        )
                        if drawing in done:
                            drawn, drawing = drawing.result(), None
                            exhausted = not drawn
                            for offer in drawn:
                                self._waiting[offer[1].label].append(offer)
                        for task in done & tasks:
                            task.result()
                        tasks -= done
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    def _wanted(self) -> int:
        """How many offers to draw at once: never more than the class that lacks most needs at least."""
        lacking = (room - self._taken[label] - len(self._waiting[label]) for label, room in self._room.items())
        return min(max(lacking), self._settings.connections) if not any(map(self._ready, self._room)) else 0

    def _ready(self, label: str) -> bool:
        return bool(self._waiting[label]) and self._taken[label] < self._room[label]

    def _next(self) -> tuple[int, Candidate] | None:
        ready = [label for label in self._room if self._ready(label)]
        if not ready:
            return None
        label = min(ready, key=lambda name: self._taken[name] / self._room[name])
        self._taken[label] += 1
        return self._waiting[label].popleft()

    async def _offer(
        self,
        number: int,
        candidate: Candidate,
        client: "aiohttp.ClientSession",
        writers: ThreadPoolExecutor,
        shown: "Filling",
    ) -> None:
        """Keep one offer's photo, or give its room back."""
        try:
            kept = await self._keep(candidate, client, writers)
        except (HttpError, Unavailable, WrongContent) as error:
            self._taken[candidate.label] -= 1
            reason = _reason(error)
            self.outcome.left_out[reason] += 1
            shown.left_out(reason)
            absent = isinstance(error, HttpError) and error.status in _ABSENT
            self._failed_in_a_row = 0 if absent else self._failed_in_a_row + 1
            # Photos fail one by one; if all do, it is the network or the address.
            if self._failed_in_a_row >= max(8, self._settings.connections):
                raise Unavailable(
                    f"{self._failed_in_a_row} photos in a row failed, the last one: {error}; what was fetched is kept"
                ) from None
        else:
            self._failed_in_a_row = 0
            self.kept.append((number, kept))
            shown.done(candidate.label, self.outcome.megabytes)

    async def _keep(self, candidate: Candidate, client: "aiohttp.ClientSession", writers: ThreadPoolExecutor) -> Kept:
        known = self._journal.get(candidate.url)
        if known and known.absent:
            raise HttpError(candidate.url, known.absent)
        if known and (path := self._folder_of(candidate) / known.name) in self._whole:
            return Kept(candidate, path, known)
        try:
            content = await self._fetch(candidate, client)
        except HttpError as error:
            if error.status in _ABSENT:
                self._journal.add(Entry(candidate.url, _now(), absent=error.status))
            raise
        kept = await asyncio.get_running_loop().run_in_executor(writers, self._store, candidate, content)
        self.outcome.fetched += 1
        self.outcome.megabytes += len(content) / 1e6
        return kept

    async def _fetch(self, candidate: Candidate, client: "aiohttp.ClientSession") -> bytes:
        url, settings = candidate.url, self._settings

        def count(error: Broken) -> None:
            self.outcome.tried_again[error.kind] += 1

        async def ask() -> bytes:
            async with asyncio.timeout(settings.total_timeout), get(client, url, settings) as response:
                content = await _body(response, int(settings.max_megabytes * 1e6))
            if flaw := photos.flaw(content):
                raise Broken(flaw)
            # A photo that was taken down may come back as a picture that says so.
            if url.endswith(".jpg") and not content.startswith(b"\xff\xd8"):
                raise WrongContent(url, "another picture in its place")
            return content

        return await repeated(ask, url, settings, count)

    def _store(self, candidate: Candidate, content: bytes) -> Kept:
        content = photos.turned(content, candidate.rotation)
        entry = described(candidate, content)
        path = self._folder_of(candidate) / entry.name
        write_bytes(path, content)
        self._journal.add(entry)
        return Kept(candidate, path, entry)


def described(candidate: Candidate, content: bytes) -> Entry:
    """The entry of a candidate whose file's bytes are these."""
    found = photos.header(content)
    digest = hashlib.sha256(content).hexdigest()
    return Entry(candidate.url, _now(), 0, digest, found.extension, len(content), found.width, found.height)


async def _body(response: "aiohttp.ClientResponse", limit: int) -> bytes:
    """The whole body, if it is not longer than `limit` bytes."""
    if (response.content_length or 0) > limit:
        raise WrongContent(str(response.url), "too large")
    if response.content_length is not None:
        return await response.read()
    content = bytearray()
    async for block in response.content.iter_any():
        content += block
        if len(content) > limit:
            raise WrongContent(str(response.url), "too large")
    return bytes(content)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _reason(error: HttpError | Unavailable | WrongContent) -> str:
    match error:
        case HttpError():
            return f"{'not there' if error.status in _ABSENT else 'refused'} ({error.status})"
        case Unavailable():
            return f"{error.kind}, after all tries"
        case _:
            return error.why
