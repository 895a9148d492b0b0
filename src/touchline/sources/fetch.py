"""Photos from the network into `data/photos`: many at once, each class filled in the order its source offers.

What was fetched, and for some days what was not there, is kept in a journal, so a run that was killed goes on where it
was and the next one asks the network only for what is new.
"""

import asyncio
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core.files import Unsafe, write_bytes
from touchline.core.params import DownloadParams
from touchline.core.progress import filling
from touchline.data import photos
from touchline.sources import Candidate
from touchline.sources.http import Broken, HttpError, Unavailable, WrongContent, get, network, repeated, session

if TYPE_CHECKING:
    import aiohttp

    from touchline.core.progress import Filling

_ABSENT = {404, 410}
# Sources offer what their lists say exists: if so many, and most of those asked for, do not, the address is wrong.
_ABSENT_AT_LEAST, _ABSENT_SHARE = 8, 0.5
# A source that takes longer to offer more is reading files of its own.
_SECONDS_TO_OFFER = 2.0
# Photos written and not yet safe on disk, each with an open file.
_UNSAFE_AT_MOST = 64
# A photo's file; the journal is a file like any other, and must not name one elsewhere.
# What `Entry.name` gives.
NAME = re.compile(r"[0-9a-f]{16}\.[a-z]+")


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
    """A file of JSON lines, only ever added to: one `Entry` a line, the last of a URL counts.

    Args:
        absent_days: how long a photo that was not there is remembered as such.
    """

    def __init__(self, path: Path, absent_days: float = math.inf) -> None:
        self._entries: dict[str, Entry] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            # A line that a killed process did not finish is no entry; what it was about is fetched again.
            with suppress(ValueError, TypeError, RecursionError):
                entry = Entry(**json.loads(line))
                if entry.absent and _days_since(entry.retrieved) >= absent_days:
                    self._entries.pop(entry.url, None)
                elif entry.absent or NAME.fullmatch(entry.name):
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

    def names(self) -> set[str]:
        """Of the files of all photos fetched."""
        return {entry.name for entry in self._entries.values() if not entry.absent}

    def add(self, *entries: Entry) -> None:
        lines = [json.dumps({key: value for key, value in asdict(entry).items() if value}) + "\n" for entry in entries]
        self._file.write("".join(lines).encode())
        self._file.flush()
        self._entries.update((entry.url, entry) for entry in entries)


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
    room: Mapping[str, float],
    folder_of: Callable[[Candidate], Path],
    whole: Set[Path],
    spare: Path,
    journal: Journal,
    settings: DownloadParams,
) -> Outcome:
    """Fetch offers until each class has as many photos as there is room for, or nothing more is offered.

    A class gets the first photos offered that there are, whatever order they come in: it never has more photos and
    requests together than room. An offer is drawn only when some class wants one, so a source may fetch what it needs
    for more only then.

    Args:
        room: photos wanted, by class; infinite where all that there are.
        folder_of: where a candidate's file goes.
        whole: files that are there and hold what their names say.
        spare: folder of photos that were fetched and taken out of the set; one that is offered again is put back.

    Raises:
        Unavailable: one request after another failed, or most photos are not there; what was fetched is kept.
        OSError: a photo cannot be written.
    """
    work = _Filling(offers, room, folder_of, whole, spare, journal, settings)
    began = time.monotonic()
    with filling(room, "fetching photos") as shown:
        network(work.run(shown))
    work.outcome.kept = [kept for _, kept in sorted(work.kept, key=lambda numbered: numbered[0])]
    work.outcome.seconds = round(time.monotonic() - began, 2)
    return work.outcome


class _Filling:
    """One `fill` at work, on the network's thread."""

    def __init__(
        self,
        offers: Iterator[Candidate],
        room: Mapping[str, float],
        folder_of: Callable[[Candidate], Path],
        whole: Set[Path],
        spare: Path,
        journal: Journal,
        settings: DownloadParams,
    ) -> None:
        self._offers, self._room, self._folder_of = enumerate(offers), room, folder_of
        self._whole, self._spare, self._journal, self._settings = whole, spare, journal, settings
        # A photo may be offered under another class than before.
        self._place_of = {path.name: path for path in whole}
        self._waiting: dict[str, deque[tuple[int, Candidate]]] = defaultdict(deque)
        # Photos that exist already, and offers that were not tried yet: together they fill the room.
        self._taken: Counter[str] = Counter()
        self._undecided = 0
        self._exhausted = False
        self._changed = asyncio.Event()
        self._drawing: asyncio.Future[Any] | None = None
        self._failure: BaseException | None = None
        self._written: list[_Written] = []
        self._settling: asyncio.Task[None] | None = None
        self._failed_in_a_row = 0
        self._asked = 0
        # Photos that earlier runs fetched from where this one asks: their addresses were right.
        self._there = 0
        # Noted in the journal at the end, unless they turn out to be a wrong address.
        self._absent: list[Entry] = []
        self.kept: list[tuple[int, Kept]] = []
        self.outcome = Outcome()

    async def run(self, shown: "Filling") -> None:
        drawer = ThreadPoolExecutor(1)
        async with session(self._settings.connections) as client:
            fetchers = [
                asyncio.create_task(self._offers_in_turn(drawer, client, shown))
                for _ in range(self._settings.connections)
            ]
            try:
                await asyncio.gather(*fetchers)
                if not self.kept and not self.outcome.fetched:
                    self._check_absences(1)
            finally:
                for fetcher in fetchers:
                    fetcher.cancel()
                await asyncio.gather(*fetchers, return_exceptions=True)
                # The drawing thread may be blocked on this one, or on gigabytes of other work, so do not wait for it.
                drawer.shutdown(wait=False, cancel_futures=True)
                if self._drawing is not None:
                    for task in asyncio.all_tasks() - {asyncio.current_task(), self._settling}:
                        task.cancel()
                try:
                    if self._settling:
                        await self._settling
                finally:
                    for written in self._written:
                        written.file.give_up()
                    self._journal.add(*self._absent)

    async def _offers_in_turn(
        self, drawer: ThreadPoolExecutor, client: "aiohttp.ClientSession", shown: "Filling"
    ) -> None:
        """Take offer after offer until there is no more room, or nothing more to fill it with."""
        while offer := await self._next(drawer, shown):
            number, candidate = offer
            try:
                await self._keep(number, candidate, client, shown)
            except (HttpError, Unavailable, WrongContent) as error:
                self._taken[candidate.label] -= 1
                self._left_out(error, shown)
            finally:
                self._undecided -= 1
                self._changed.set()

    async def _next(self, drawer: ThreadPoolExecutor, shown: "Filling") -> tuple[int, Candidate] | None:
        while True:
            if self._failure:
                raise self._failure
            if ready := [label for label, room in self._room.items() if self._waiting[label] and self._lacks(label)]:
                label = min(ready, key=lambda name: (self._taken[name] / self._room[name], self._taken[name]))
                self._taken[label] += 1
                self._undecided += 1
                return self._waiting[label].popleft()
            lacking = max((self._lacks(label) for label in self._room), default=0)
            if lacking and not self._exhausted:
                if self._drawing is None:
                    self._draw(drawer, int(min(lacking, self._settings.connections)), shown)
            elif not self._undecided:
                return None
            self._changed.clear()
            await self._changed.wait()

    def _lacks(self, label: str) -> float:
        return self._room[label] - self._taken[label]

    def _draw(self, drawer: ThreadPoolExecutor, count: int, shown: "Filling") -> None:
        """Draw offers, never more than the class that lacks most needs at least."""

        def drawn(drawing: asyncio.Future[list[tuple[int, Candidate]]]) -> None:
            self._drawing = None
            late.cancel()
            shown.reading(False)
            self._changed.set()
            if drawing.cancelled():
                return
            self._failure = drawing.exception()
            if not self._failure:
                self._exhausted = not drawing.result()
                for number, candidate in drawing.result():
                    self._waiting[candidate.label].append((number, candidate))

        loop = asyncio.get_running_loop()
        late = loop.call_later(_SECONDS_TO_OFFER, shown.reading, True)
        self._drawing = loop.run_in_executor(drawer, list, itertools.islice(self._offers, count))
        self._drawing.add_done_callback(drawn)

    def _left_out(self, error: HttpError | Unavailable | WrongContent, shown: "Filling") -> None:
        reason = _reason(error)
        self.outcome.left_out[reason] += 1
        shown.left_out(reason)
        absent = isinstance(error, HttpError) and error.status in _ABSENT
        self._check_absences(_ABSENT_AT_LEAST)
        self._failed_in_a_row = 0 if absent else self._failed_in_a_row + 1
        # Photos fail one by one; if all do, it is the network or the address.
        if self._failed_in_a_row >= max(8, self._settings.connections):
            raise Unavailable(
                f"{self._failed_in_a_row} photos in a row failed, the last one: {error}; what was fetched is kept"
            ) from None

    def _check_absences(self, at_least: int) -> None:
        """Raise Unavailable where what was asked for in this run is, for the most part, not there."""
        absent = self._absent
        # Those on the way count as there: the answer that something is not comes before a photo does.
        if len(absent) >= at_least and len(absent) > _ABSENT_SHARE * (self._asked + self._there):
            self._absent = []
            raise Unavailable(
                f"{len(absent)} of {self._asked} photos asked for are not there, though their source lists them; the "
                f"first: {absent[0].url} answers {absent[0].absent}: see `photos_url` in params.yaml"
            ) from None

    async def _keep(self, number: int, candidate: Candidate, client: "aiohttp.ClientSession", shown: "Filling") -> None:
        known = self._journal.get(candidate.url)
        if known and known.absent:
            raise HttpError(candidate.url, known.absent)
        if known and self._put_back(path := self._folder_of(candidate) / known.name):
            self._there += 1
            self._done(number, Kept(candidate, path, known), shown)
            return
        self._asked += 1
        try:
            content = await self._fetch(candidate, client)
        except HttpError as error:
            if error.status in _ABSENT:
                self._absent.append(Entry(candidate.url, _now(), absent=error.status))
            raise
        content = photos.turned(content, candidate.rotation)
        entry = described(candidate, content)
        kept = Kept(candidate, self._folder_of(candidate) / entry.name, entry)
        # Written here and now, into memory; made safe on disk in batches, on a thread of its own: a hand-over for each
        # step of each photo cost more than the photo.
        self._written.append(_Written(number, kept, Unsafe(kept.path, content)))
        self.outcome.fetched += 1
        self.outcome.megabytes += len(content) / 1e6
        self._failed_in_a_row = 0
        if self._settling is None or self._settling.done():
            if self._settling:
                self._settling.result()
            self._settling = asyncio.create_task(self._settle(shown))
        if len(self._written) >= _UNSAFE_AT_MOST:
            await asyncio.shield(self._settling)

    def _put_back(self, path: Path) -> bool:
        """Whether a photo is in its place, or could be put there from where else it is."""
        if path in self._whole:
            return True
        spare = self._spare / path.name
        with suppress(FileNotFoundError):
            content = (self._place_of.get(path.name) or spare).read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem:
                write_bytes(path, content)
                spare.unlink(missing_ok=True)
                return True
        return False

    async def _settle(self, shown: "Filling") -> None:
        while self._written:
            batch, self._written = self._written, []
            flushed: list[_Written] = []

            def flush(batch: Sequence[_Written] = batch, flushed: list[_Written] = flushed) -> None:
                for written in batch:
                    written.file.flush()
                    flushed.append(written)

            try:
                await asyncio.to_thread(flush)
            finally:
                # On a full disk the first of them have found room all the same. Names are given here, on the thread
                # that makes the files: two threads in one folder wait for each other.
                for written in flushed:
                    written.file.settle()
                for written in batch[len(flushed) :]:
                    written.file.give_up()
                self._journal.add(*(written.kept.entry for written in flushed))
            for written in batch:
                self._done(written.number, written.kept, shown)

    def _done(self, number: int, kept: Kept, shown: "Filling") -> None:
        self.kept.append((number, kept))
        shown.done(kept.candidate.label, self.outcome.megabytes)

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


@dataclass(frozen=True)
class _Written:
    """A photo that waits to be made safe; `number` is its offer's."""

    number: int
    kept: Kept
    file: Unsafe


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


def _days_since(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)) / timedelta(days=1)


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
