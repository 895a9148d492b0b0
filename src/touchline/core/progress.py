"""Progress of long work: a bar on a terminal, a plain line now and then otherwise (a log, a scheduler, CI)."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5.0


def track(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done and how long the rest will take.

    Args:
        total: None if unknown.
        what: what is being done, for example `reading photos`.
    """
    if sys.stderr.isatty():
        yield from _bar(items, total, what)
        return
    began = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            # The first item includes the start-up; an estimate from it alone would be far off.
            left = f" of {total:,}, {(total - done) * (now - began) / done:.0f} s left" if done > 1 and total else ""
            say(f"{what}: {done:,}{left}")
    say(f"{what}: {done:,} in {time.monotonic() - began:.1f} s")


class Filling:
    """Progress of classes being filled, with photos left out on the way; see `filling`."""

    def __init__(self, room: Mapping[str, float], what: str) -> None:
        self._room, self._what = room, what
        self._done: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._megabytes = 0.0
        self._reading = False
        self._began = self._said = time.monotonic()

    def done(self, label: str, megabytes: float) -> None:
        """Count one more photo of a class; `megabytes` is the network traffic so far."""
        self._done[label] += 1
        self._megabytes = megabytes
        self._show(label)

    def reading(self, is_reading: bool) -> None:
        """Whether the source reads files of its own: meanwhile no estimate of the photos' time holds."""
        if self._reading != is_reading:
            self._reading = is_reading
            self._show()

    def left_out(self, reason: str) -> None:
        self._left_out[reason] += 1
        self._show()

    def line(self, *, over: bool = False) -> str:
        """Counts, rate, what was left out and, unless it is over, the time left at this rate."""
        seconds, done = time.monotonic() - self._began, self._done.total()
        counts = ", ".join(
            f"{label} {self._done[label]:,}" + (f" of {room:,}" if isfinite(room) else "")
            for label, room in self._room.items()
        )
        rate = f"{done / seconds:.0f} photos/s, {self._megabytes / seconds:.1f} MB/s" if seconds > 0 else ""
        rest = sum(self._room.values()) - done
        left = f"{rest * seconds / done:.0f} s left" if done and isfinite(rest) and not over else ""
        left = "waiting for the source's own files" if self._reading and not over else left
        out = ", ".join(f"{reason} {count:,}" for reason, count in self._left_out.most_common())
        return "; ".join(part for part in (f"{self._what}: {counts}", rate, out, left) if part)

    def _show(self, _: str = "") -> None:
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            say(self.line())


class _FillingBars(Filling):
    """The same on a terminal: a bar per class, and a line of numbers below."""

    def __init__(self, room: Mapping[str, float], what: str, stack: ExitStack) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        super().__init__(room, what)
        self._bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        totals = {label: count if isfinite(count) else None for label, count in room.items()}
        self._tasks = {label: self._bars.add_task(label, total=total) for label, total in totals.items()}
        self._numbers = Text(what)
        stack.enter_context(Live(Group(self._bars, self._numbers), console=Console(stderr=True), transient=True))

    def _show(self, label: str = "") -> None:
        if label:
            self._bars.advance(self._tasks[label])
        self._numbers.plain = self.line()


@contextmanager
def filling(room: Mapping[str, float], what: str) -> Iterator[Filling]:
    """Show how classes fill up; report each photo to the object yielded.

    Args:
        room: how many photos each class should have; infinite: all.
        what: what is being done, for example `fetching photos`.
    """
    with ExitStack() as stack:
        shown = _FillingBars(room, what, stack) if sys.stderr.isatty() else Filling(room, what)
        yield shown
    if any(room.values()):
        say(shown.line(over=True))


def say(line: str) -> None:
    """Print one line of progress at once, so that DVC and Prefect show it live."""
    print(line, flush=True)


def _bar(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=what)
