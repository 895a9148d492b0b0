"""Progress of long work: a bar on a terminal, a plain line now and then otherwise (a log, a scheduler, CI)."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5.0


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done and how long the rest will take.

    Args:
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
            # The first item carries the start-up; an estimate from it alone would be far off.
            left = f", {(total - done) * (now - began) / done:.0f} s left" if done > 1 else ""
            say(f"{what}: {done:,} of {total:,}{left}")
    say(f"{what}: {done:,} in {time.monotonic() - began:.1f} s")


def say(line: str) -> None:
    """One line of progress, at once: DVC and Prefect show a stage's output as it comes."""
    print(line, flush=True)


def _bar(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=what)
