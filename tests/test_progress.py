"""What people see of long work: lines now and then in a log, bars on a terminal."""

import io
import math
import re
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import names

from touchline.core import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which only the test moves on."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress.track(range(10), 10, "reading photos"):
        clock[0] += 2
    told = capsys.readouterr().out.splitlines()
    expected = [("3", "10", "14 s"), ("6", "10", "8 s"), ("9", "10", "2 s"), ("10", "20.0 s")]
    assert [names(line, "reading photos", *parts) for line, parts in zip(told, expected, strict=True)] == [True] * 4


def test_where_nobody_knows_how_many_there_are_only_what_is_done_is_said(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress.track(iter(range(4)), None, "taking photos"):
        clock[0] += 3
    told = capsys.readouterr().out.splitlines()
    expected = [("2",), ("4",), ("4", "12.0 s")]
    assert [names(line, "taking photos", *parts) for line, parts in zip(told, expected, strict=True)] == [True] * 3


def test_items_come_through_as_they_are_and_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            asked.append(number)
            yield number

    tracked = progress.track(items(), None, "counting")
    assert next(tracked) == 0 and asked == [0]
    assert list(tracked) == [1, 2, 3, 4]


def test_classes_that_fill_up_are_counted_with_their_rate_and_what_was_left_out(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.filling({"rugby": 1_500, "soccer": 4}, "fetching photos") as shown:
        shown.done("rugby", 0.5)
        shown.left_out("not there (404)")
        assert capsys.readouterr().out == ""
        clock[0] += 5
        shown.done("soccer", 2.5)
        [told] = capsys.readouterr().out.splitlines()
        assert names(told, "fetching photos", "rugby 1", "1,500", "soccer 1", "4", "0.5 MB/s", "3755 s"), told
        assert "not there (404) 1" in told
        # No more often than that.
        clock[0] += 4
        shown.left_out("too large")
        assert capsys.readouterr().out == ""
        clock[0] += 1
        shown.left_out("too large")
        assert names(capsys.readouterr().out, "too large 2", "not there (404) 1")
    # It is over, though no class is full.
    [told] = capsys.readouterr().out.splitlines()
    assert names(told, "fetching photos", "rugby 1", "soccer 1", "0.2 MB/s", "too large 2", "not there (404) 1"), told


def test_where_there_is_room_for_all_no_end_is_foretold(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.filling({"rugby": math.inf}, "fetching photos") as shown:
        clock[0] += 5
        shown.done("rugby", 1.0)
        [told] = capsys.readouterr().out.splitlines()
        assert names(told, "fetching photos", "rugby 1", "0.2 MB/s") and "inf" not in told and " of " not in told


def test_where_there_is_no_room_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.filling({"rugby": 0, "soccer": 0}, "fetching photos"):
        pass
    assert capsys.readouterr().out == ""


def test_what_breaks_off_is_not_said_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress.filling({"rugby": 3}, "fetching photos"):
        raise RuntimeError
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Makes standard error a terminal; to be called in the test, for pytest has its own way with it before."""

    def made() -> Terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "stderr", written := Terminal())
        return written

    return made


def shown_on(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


@pytest.mark.parametrize("total", [5, None])
def test_a_terminal_gets_a_bar(terminal: Callable[[], Terminal], total: int | None) -> None:
    written = terminal()
    assert list(progress.track((number for number in range(5)), total, "reading photos")) == list(range(5))
    assert re.search(r"reading photos .*5/5" if total else r"reading photos .*5/\?", shown_on(written))


@pytest.mark.parametrize("room, of", [(7, "7"), (math.inf, r"\?")])
def test_a_terminal_gets_a_bar_for_each_class(terminal: Callable[[], Terminal], room: float, of: str) -> None:
    written = terminal()
    with progress.filling({"rugby": room, "soccer [indoors]": 4}, "fetching photos") as shown:
        shown.done("rugby", 0.5)
        shown.done("soccer [indoors]", 1.0)
        shown.left_out("too large")
    seen = shown_on(written)
    assert re.search(rf"rugby .* 1/{of}", seen) and re.search(r"soccer \[indoors\] .* 1/4", seen)
    assert "too large 1" in seen
