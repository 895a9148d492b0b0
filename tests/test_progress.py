"""What people see of long work: lines now and then in a log, bars on a terminal."""

import io
import math
import re
import sys
import time

import pytest

from touchline import progress


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
    assert capsys.readouterr().out.splitlines() == [
        "reading photos: 3 of 10, 14 s left",
        "reading photos: 6 of 10, 8 s left",
        "reading photos: 9 of 10, 2 s left",
        "reading photos: 10 in 20.0 s",
    ]


def test_where_nobody_knows_how_many_there_are_only_what_is_done_is_said(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        sum(1 for _ in progress.track(iter(range(4)), None, "taking photos") if clock.append(0) or advance(clock)) == 4
    )
    assert capsys.readouterr().out.splitlines() == [
        "taking photos: 2",
        "taking photos: 4",
        "taking photos: 4 in 12.0 s",
    ]


def advance(clock: list[float]) -> bool:
    clock[0] += 3
    return True


def test_items_come_through_as_they_are_and_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def items():
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
        assert capsys.readouterr().out == (
            "fetching photos: rugby 1 of 1,500, soccer 1 of 4; 0 photos/s, 0.5 MB/s; not there (404) 1; 3755 s left\n"
        )
        # No more often than that.
        clock[0] += 4
        shown.left_out("too large")
        assert capsys.readouterr().out == ""
        clock[0] += 1
        shown.left_out("too large")
        assert "; too large 2, not there (404) 1; " in capsys.readouterr().out
    # It is over, though no class is full.
    assert capsys.readouterr().out == (
        "fetching photos: rugby 1 of 1,500, soccer 1 of 4; 0 photos/s, 0.2 MB/s; too large 2, not there (404) 1\n"
    )


def test_where_there_is_room_for_all_no_end_is_foretold(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.filling({"rugby": math.inf}, "fetching photos") as shown:
        clock[0] += 5
        shown.done("rugby", 1.0)
        assert capsys.readouterr().out == "fetching photos: rugby 1; 0 photos/s, 0.2 MB/s\n"


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
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return written


def shown_on(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


@pytest.mark.parametrize("total", [5, None])
def test_a_terminal_gets_a_bar(terminal: Terminal, total: int | None) -> None:
    assert list(progress.track(iter(range(5)), total, "reading photos")) == list(range(5))
    assert re.search(r"reading photos .*5/5" if total else r"reading photos .*5/\?", shown_on(terminal))


@pytest.mark.parametrize("room", [7, math.inf])
def test_a_terminal_gets_a_bar_for_each_class(terminal: Terminal, room: float) -> None:
    with progress.filling({"rugby": room, "soccer [indoors]": 4}, "fetching photos") as shown:
        shown.done("rugby", 0.5)
        shown.done("soccer [indoors]", 1.0)
        shown.left_out("too large")
        time.sleep(0.3)
    seen = shown_on(terminal)
    assert re.search(r"rugby +.* 1/" + ("7" if room == 7 else r"\?"), seen) and re.search(
        r"soccer \[indoors\] .* 1/4", seen
    )
    assert "too large 1" in seen
