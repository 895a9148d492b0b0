"""The downloader against a server that breaks off, stalls, refuses, changes its files and sends login pages."""

import asyncio
import base64
import errno
import hashlib
import io
import ipaddress
import json
import os
import random
import re
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import names
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from servers import Fault, Host, Stored

from touchline.core.errors import TouchlineError
from touchline.sources import http
from touchline.sources.http import HttpError, Unavailable, WrongContent

CONTENT = random.Random(7).randbytes(3_000_000)
OTHER = random.Random(8).randbytes(2_500_000)
NOWHERE = "http://127.0.0.1:9"  # the port of `discard`, where nothing listens


settings = partial(servers.settings, tries=3)


def downloaded(url: str, **changes: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        http.to_file(url, path, settings(**changes))
        assert list(path.parent.iterdir()) == [path]
        return path.read_bytes()


def ranges(host: Host, path: str = "/x") -> list[str]:
    return [request.range for request in host.requests if request.path == path]


def statuses(host: Host, path: str = "/x") -> list[int]:
    return [request.status for request in host.requests if request.path == path]


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


@contextmanager
def refused(url: str, *named: str) -> Iterator[None]:
    """The block ends in a line about wrong content of `url` that names what was wrong with it."""
    with pytest.raises(WrongContent) as caught:
        yield
    assert caught.value.url == url and names(one_line(caught.value), url, *named), caught.value


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.01)


@dataclass(frozen=True)
class WeaklyTagged(Stored):
    """A file whose server promises only that another version means much the same."""

    @property
    def etag(self) -> str:
        return f'W/"{hashlib.md5(self.content).hexdigest()}"'


@pytest.mark.parametrize("hashed", [False, True, "two"])
def test_a_file_comes_whole_in_one_request(host: Host, hashed: Any) -> None:
    host.put("/x", CONTENT, hash=hashed)
    assert downloaded(f"{host.url}/x") == CONTENT
    assert ranges(host) == [""]


@pytest.mark.parametrize(
    "fault", [Fault.cut(after=1_000_000), Fault.stall(after=1_000_000, seconds=60)], ids=["cut off", "stalled"]
)
def test_a_file_goes_on_where_it_broke_or_stalled(host: Host, fault: Fault) -> None:
    host.put("/x", CONTENT, hash=True, faults=[fault, fault])
    assert downloaded(f"{host.url}/x", read_timeout=0.3) == CONTENT
    assert ranges(host) == ["", "bytes=1000000-", "bytes=2000000-"]
    conditions = [request.headers.get("If-Range") for request in host.requests]
    assert conditions[0] is None and conditions[1] == conditions[2] != ""


@pytest.mark.parametrize("told", [True, False])
def test_the_time_for_the_files_that_follow_is_told_where_their_sizes_are_known(
    host: Host, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http, "_SECONDS_BETWEEN_LINES", 0)
    host.put("/x", CONTENT)
    host.put("/y", CONTENT, faults=[] if told else [Fault.status(403).always()])
    http.to_file(f"{host.url}/x", tmp_path / "x", settings(), what="file 1 of 2", then=[f"{host.url}/y"])
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(len(re.findall(r"\d+ s\b", line)) == 1 + told for line in lines)
    assert [request.path for request in host.requests if request.method == "HEAD"] == ["/y"]
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(host: Host) -> None:
    busy = Fault.status(503, retry_after=0)
    host.put("/x", CONTENT, hash=True, faults=[busy, Fault.cut(after=1_000_000), busy, Fault.status(429, 0)])
    assert downloaded(f"{host.url}/x", tries=3) == CONTENT
    assert statuses(host) == [503, 200, 503, 429, 206]
    assert ranges(host)[2:] == ["bytes=1000000-"] * 3


def test_tries_are_counted_anew_after_each_byte_that_came(host: Host) -> None:
    host.put("/x", CONTENT, hash=True, faults=[Fault.cut(after=250_000)] * 11)
    assert downloaded(f"{host.url}/x", tries=2) == CONTENT
    assert ranges(host) == ["", *(f"bytes={250_000 * number}-" for number in range(1, 12))]


def test_no_more_tries_than_allowed_where_nothing_comes(host: Host) -> None:
    host.put("/x", CONTENT, faults=[Fault.cut(after=1_000_000), Fault.status(500, retry_after=0).always()])
    with pytest.raises(Unavailable) as caught:
        downloaded(f"{host.url}/x", tries=3)
    assert all(word in one_line(caught.value) for word in (f"{host.url}/x", "500", "3"))
    assert statuses(host) == [200, 500, 500, 500]


@pytest.mark.parametrize("hashed", ["wrong", "two"])
def test_a_file_that_is_not_what_its_server_promised_is_an_error(host: Host, hashed: Any) -> None:
    host.put("/x", CONTENT, hash=hashed)
    if hashed == "two":
        # The hash of one file and the bytes of another.
        host._stored["/x"] = replace(host._stored["/x"], content=OTHER[:1] + CONTENT[1:])
    with refused(f"{host.url}/x", "MD5"):
        downloaded(f"{host.url}/x", tries=2)
    assert statuses(host) == [200, 200]


def test_a_file_that_changes_on_the_way_comes_from_its_start(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.put("/x", CONTENT, hash=True, faults=[Fault.cut(after=1_000_000), Fault.changed(OTHER)])
    assert downloaded(f"{host.url}/x") == OTHER
    assert "has changed" in capsys.readouterr().out and statuses(host) == [200, 200]


def test_a_change_shows_too_where_the_server_does_not_look_at_if_range(host: Host, tmp_path: Path) -> None:
    left_behind(tmp_path / "x", f"{host.url}/x", CONTENT[:1_000_000], etag='W/"of the older file"')
    host.put("/x", OTHER)
    # A weak tag goes into no If-Range: what is left is to compare the answers.
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == OTHER
    assert statuses(host) == [206, 200]


def test_a_weak_etag_is_no_obstacle_to_going_on(host: Host) -> None:
    host.put("/x", CONTENT)
    stored, cut = host._stored["/x"], Fault.cut(after=1_000_000)
    host._stored["/x"] = WeaklyTagged(CONTENT, stored.size, stored.md5, False, stored.content_type, deque([cut, cut]))
    assert downloaded(f"{host.url}/x") == CONTENT
    assert ranges(host) == ["", "bytes=1000000-", "bytes=2000000-"]
    assert not any("If-Range" in request.headers for request in host.requests)


def test_a_server_that_sends_another_range_is_not_believed(host: Host) -> None:
    host.put("/x", CONTENT, faults=[Fault.cut(after=1_000_000), Fault.other_range()])
    with refused(f"{host.url}/x", "range"):
        downloaded(f"{host.url}/x")


def test_a_file_is_kept_whole_under_its_own_name(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, hash=True)
    path = tmp_path / "new/folder/x.tar"
    http.to_file(f"{host.url}/x", path, settings())
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_file_is_kept(host: Host, tmp_path: Path) -> None:
    host.put("/x", b"", hash=True)
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == b""
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_file_goes_on_where_it_broke(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, hash=True, faults=[Fault.cut(after=1_000_000), Fault.status(503, 0), Fault.cut(after=10)])
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert ranges(host) == ["", "bytes=1000000-", "bytes=1000000-", "bytes=1000010-"]


FETCH = """
import sys
from pathlib import Path
from touchline.sources import http
from touchline.core.params import DownloadParams

place = {"offset": int(sys.argv[4]), "size": int(sys.argv[5]) or None}
http.to_file(sys.argv[1], Path(sys.argv[2]), DownloadParams.model_validate_json(sys.argv[3]), **place)
"""


def killed_in_the_middle(host: Host, path: Path, offset: int = 0, size: int = 0) -> int:
    """Download `/x` in a process that is killed -9 once the server has stalled; bytes of the part it leaves."""
    part = path.with_name(path.name + ".part")
    place = [str(offset), str(size)]
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, f"{host.url}/x", path, settings().model_dump_json(), *place]
    )
    try:
        wait_until(lambda: part.exists() and part.stat().st_size >= 500_000, "the file to grow")
    finally:
        process.kill()
        process.wait()
    assert not path.exists()
    return part.stat().st_size


@pytest.mark.parametrize("offset, size", [(0, 0), (100_000, 2_500_000)], ids=["whole", "a range"])
def test_the_next_process_asks_only_for_the_rest(host: Host, tmp_path: Path, offset: int, size: int) -> None:
    host.put("/x", CONTENT, hash=True, faults=[Fault.stall(after=2_000_000, seconds=60)])
    there = killed_in_the_middle(host, tmp_path / "x", offset, size)
    http.to_file(f"{host.url}/x", tmp_path / "x", settings(), offset=offset, size=size or None)
    end = offset + size if size else len(CONTENT)
    assert (tmp_path / "x").read_bytes() == CONTENT[offset:end]
    assert ranges(host)[1:] == [f"bytes={offset + there}-{end - 1 if size else ''}"]
    assert statuses(host)[1:] == [206]
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_file_that_has_changed_since_the_kill_is_fetched_from_its_start(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, hash=True, faults=[Fault.stall(after=2_000_000, seconds=60)])
    killed_in_the_middle(host, tmp_path / "x")
    host.put("/x", OTHER, hash=True)
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == OTHER
    assert statuses(host)[1:] == [200]


def test_the_part_of_another_place_is_no_beginning(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, faults=[Fault.stall(after=2_000_000, seconds=60)])
    killed_in_the_middle(host, tmp_path / "x")
    http.to_file(f"{host.url}/x", tmp_path / "x", settings(), offset=1_000, size=5_000)
    assert (tmp_path / "x").read_bytes() == CONTENT[1_000:6_000]


def left_behind(path: Path, url: str, content: bytes, **changes: Any) -> None:
    """What a killed download of CONTENT leaves."""
    facts = {
        "place": {"url": url, "offset": 0, "size": None},
        "etag": f'"{hashlib.md5(CONTENT).hexdigest()}"',
        "total": len(CONTENT),
        "md5": base64.b64encode(hashlib.md5(CONTENT).digest()).decode(),
    }
    path.with_name(path.name + ".part").write_bytes(content)
    path.with_name(path.name + ".part.json").write_text(json.dumps(facts | changes))


def test_a_process_killed_after_the_last_byte_leaves_nothing_to_ask_for(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, hash=True)
    left_behind(tmp_path / "x", f"{host.url}/x", CONTENT)
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert host.requests == []
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize(
    "content, changes",
    [
        (CONTENT + b"more", {}),  # longer than the file
        (CONTENT[:1000], {"etag": ""}),  # nobody can say of which file it is
        (b"", {}),
    ],
)
def test_a_part_of_no_use_is_thrown_away(host: Host, tmp_path: Path, content: bytes, changes: dict[str, str]) -> None:
    host.put("/x", CONTENT, hash=True)
    left_behind(tmp_path / "x", f"{host.url}/x", content, **changes)
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert ranges(host) == [""]


@pytest.mark.parametrize("facts", ["", "[]", "null", '{"place": 1}', '{"etag": "x"}'])
def test_facts_torn_by_a_crash_mean_from_the_start(host: Host, tmp_path: Path, facts: str) -> None:
    host.put("/x", CONTENT)
    left_behind(tmp_path / "x", f"{host.url}/x", CONTENT[:100])
    (tmp_path / "x.part.json").write_text(facts)
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_part_with_damaged_bytes_is_found_out_by_its_hash_and_fetched_anew(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, hash=True)
    left_behind(tmp_path / "x", f"{host.url}/x", bytes(1000))
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert ranges(host) == ["bytes=1000-", ""]


@pytest.mark.parametrize("fault", [Fault.html(), Fault.changed(b"something else")], ids=["a page", "something else"])
def test_one_answer_that_is_not_the_file_is_tried_again(host: Host, tmp_path: Path, fault: Fault) -> None:
    back = [Fault.changed(CONTENT)] if fault.kind == "changed" else []
    host.put("/x", CONTENT, faults=[fault, *back])
    asked = []

    def is_right(start: bytes) -> bool:
        asked.append(len(start))
        return start.startswith(CONTENT[:20])

    http.to_file(f"{host.url}/x", tmp_path / "x", settings(), is_right=is_right)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(host.requests) == 2 and asked[-1] >= 512


@pytest.mark.parametrize("begun", [0, 1_000_000])
def test_a_login_page_that_stays_is_an_error_and_no_reason_to_throw_away_what_came(
    host: Host, tmp_path: Path, begun: int
) -> None:
    """If the session a file was begun with has ended since, 200 and a page come, as if the file had changed."""
    host.put("/x", CONTENT, faults=[Fault.html(), Fault.html()])
    if begun:
        left_behind(tmp_path / "x", f"{host.url}/x", CONTENT[:begun])
    with refused(f"{host.url}/x", "web page"):
        http.to_file(f"{host.url}/x", tmp_path / "x", settings(tries=2))
    assert len(host.requests) == 2
    assert not (tmp_path / "x").exists()
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert ranges(host)[-1] == (f"bytes={begun}-" if begun else "")


def test_the_first_bytes_are_looked_at_where_they_come_in_drops_and_from_two_files(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, faults=[Fault.cut(after=100), Fault.changed(OTHER)])
    http.to_file(f"{host.url}/x", tmp_path / "x", settings(), is_right=OTHER.startswith)
    assert (tmp_path / "x").read_bytes() == OTHER


@pytest.mark.parametrize(
    "offset, size, expected",
    [(0, 10, CONTENT[:10]), (7, None, CONTENT[7:]), (2_999_990, 100, CONTENT[-10:]), (5, 1, CONTENT[5:6])],
)
def test_a_piece_of_a_file(host: Host, tmp_path: Path, offset: int, size: int | None, expected: bytes) -> None:
    # The hash is that of the whole file, and says nothing of a piece.
    host.put("/x", CONTENT, hash=True, faults=[Fault.cut(after=1)])
    http.to_file(f"{host.url}/x", tmp_path / "x", settings(), offset=offset, size=size)
    assert (tmp_path / "x").read_bytes() == expected


def test_a_server_without_ranges_sends_the_file_again(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host.put("/x", CONTENT, hash=True, faults=[Fault.cut(after=1_000_000), Fault.no_ranges()])
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert statuses(host) == [200, 200]
    assert "starts over" in capsys.readouterr().out


def test_a_server_without_ranges_that_breaks_each_time_is_given_up(host: Host, tmp_path: Path) -> None:
    class NoRanges(Stored):
        def open(self) -> Any:
            return io.BytesIO(CONTENT[:-1])  # a byte less than promised

    host.put("/x", CONTENT)
    stored = host._stored["/x"]
    host._stored["/x"] = NoRanges(
        CONTENT, stored.size, stored.md5, False, stored.content_type, deque([Fault.no_ranges().always()])
    )
    with pytest.raises(Unavailable):
        http.to_file(f"{host.url}/x", tmp_path / "x", settings(tries=2, read_timeout=0.2))


def test_a_server_without_ranges_cannot_send_a_piece(host: Host, tmp_path: Path) -> None:
    host.put("/x", CONTENT, faults=[Fault.no_ranges().always()])
    with refused(f"{host.url}/x", "range"):
        http.to_file(f"{host.url}/x", tmp_path / "x", settings(), offset=10, size=10)
    with refused(f"{host.url}/x", "range"):
        http.read_range(f"{host.url}/x", 10, 10, settings())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["the facts", "the bytes"])
def test_a_full_disk_is_said_at_once_and_what_came_is_kept(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    host.put("/x", CONTENT)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "the facts":
        monkeypatch.setattr(http, "write_json", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert caught.value.errno == errno.ENOSPC
    assert len(host.requests) == 1 and not (tmp_path / "x").exists()
    monkeypatch.undo()
    http.to_file(f"{host.url}/x", tmp_path / "x", settings())
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_range_and_the_size_of_all(host: Host) -> None:
    host.put("/x", CONTENT, faults=[Fault.status(503, retry_after=0), Fault.reset()])
    assert http.read_range(f"{host.url}/x", 500, 1_000, settings()) == (CONTENT[500:1_500], len(CONTENT))
    assert http.read_range(f"{host.url}/x", 2_999_999, 1_000, settings()) == (CONTENT[-1:], len(CONTENT))
    assert ranges(host) == ["bytes=500-1499"] * 3 + ["bytes=2999999-3000998"]


def test_a_range_that_is_not_the_one_asked_for_is_refused(host: Host) -> None:
    host.put("/x", CONTENT, faults=[Fault.other_range()])
    with refused(f"{host.url}/x", "range"):
        http.read_range(f"{host.url}/x", 500, 1_000, settings())
    with pytest.raises(HttpError) as caught:
        http.read_range(f"{host.url}/x", 3_000_000, 1, settings())
    assert caught.value.status == 416


def test_the_size_of_a_file_where_the_server_tells(host: Host) -> None:
    host.put("/x", CONTENT)
    assert http.head(f"{host.url}/x", settings()) == len(CONTENT)
    host.put("/busy", CONTENT, faults=[Fault.status(503), Fault.status(405)])
    assert http.head(f"{host.url}/busy", settings()) is http.head(f"{host.url}/busy", settings()) is None
    assert http.head(f"{NOWHERE}/x", settings()) is None
    with pytest.raises(HttpError, match="/none"):
        http.head(f"{host.url}/none", settings())
    with pytest.raises(TouchlineError, match=r"http://\["):
        http.head("http://[", settings())
    assert {request.method for request in host.requests} == {"HEAD"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_final_answer_is_asked_for_once(host: Host, tmp_path: Path, status: int) -> None:
    host.put("/x", CONTENT, faults=[Fault.status(status).always()])
    for fetch in (
        lambda: downloaded(f"{host.url}/x"),
        lambda: http.to_file(f"{host.url}/x", tmp_path / "x", settings()),
        lambda: http.read_range(f"{host.url}/x", 0, 10, settings()),
    ):
        before = len(host.requests)
        with pytest.raises(HttpError) as caught:
            fetch()
        assert (caught.value.status, caught.value.url) == (status, f"{host.url}/x")
        assert names(one_line(caught.value), f"{host.url}/x", str(status))
        assert len(host.requests) == before + 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_an_answer_that_may_change_is_asked_for_again(host: Host, status: int) -> None:
    host.put("/x", CONTENT, faults=[Fault.status(status, retry_after=0)])
    assert downloaded(f"{host.url}/x") == CONTENT
    assert statuses(host) == [status, 200]


def seconds_between(host: Host) -> float:
    first, second = host.requests
    return second.time - first.time


@pytest.mark.parametrize("in_seconds", [True, False], ids=["seconds", "a date"])
def test_a_server_says_when_to_come_again(host: Host, in_seconds: bool) -> None:
    # Both are far from the first pause of its own, 1 s; a date has whole seconds.
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=4), usegmt=True)
    host.put("/x", CONTENT, faults=[Fault.status(429, retry_after=2 if in_seconds else moment)])
    assert downloaded(f"{host.url}/x") == CONTENT
    assert seconds_between(host) >= 2


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("0", 0),
        ("2.5", 2.5),
        ("-3", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("", None),
        ("soon", None),
        ("nan", 0),
    ],
)
def test_what_retry_after_may_say(value: str, seconds: float | None) -> None:
    assert http._retry_after(value) == seconds


def test_a_pause_asked_for_has_an_end() -> None:
    """Nobody waits for a day because a server says so."""
    slept = []

    async def pause() -> None:
        async def note(seconds: float) -> None:
            slept.append(seconds)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(http.asyncio, "sleep", note)
            await http._pause(http.Broken("answers 503", pause=86_400.0), 1, "http://x", settings(tries=9))
            for tries in range(1, 9):
                await http._pause(http.Broken("timed out"), tries, "http://x", settings(tries=9))

    asyncio.run(pause())
    asked, *own = slept
    assert asked == 60
    assert all(0.75 * 2**k <= seconds <= 1.25 * 2**k for k, seconds in enumerate(own[:6]))
    assert own[7] == 60


def test_a_server_that_says_nothing_is_given_up(host: Host) -> None:
    host.put("/x", CONTENT, faults=[Fault.stall(after=0, seconds=60).always()])
    with pytest.raises(Unavailable) as caught:
        downloaded(f"{host.url}/x", read_timeout=0.2, tries=1)
    assert caught.value.kind == "timed out" and names(one_line(caught.value), f"{host.url}/x", "timed out", "1")


def test_a_reset_connection_is_another_try(host: Host) -> None:
    host.put("/x", CONTENT, hash=True, faults=[Fault.reset()])
    assert downloaded(f"{host.url}/x") == CONTENT
    assert statuses(host) == [0, 200]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        http.to_file(f"{NOWHERE}/x", tmp_path / "x", settings(tries=1))
    assert caught.value.kind == "no connection"
    assert names(one_line(caught.value), f"{NOWHERE}/x", os.strerror(errno.ECONNREFUSED), "1")


@pytest.mark.parametrize("url", ["http://[", "http://", "no-scheme/x"])
def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    with pytest.raises(TouchlineError, match=re.escape(url)) as caught:
        downloaded(url)
    assert one_line(caught.value) and not isinstance(caught.value, Unavailable)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "of a proxy of our own")])
    now, address = datetime.now(UTC), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *form)
        + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    return path


@contextmanager
def tls_server(certificate: Path) -> Iterator[tuple[str, list[int]]]:
    """URL of an https server, and how many bytes were written to each connection whose handshake was made."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    connections: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(len(await reader.readuntil(b"\r\n\r\n")))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nhere")
        await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    start = asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    server = asyncio.run_coroutine_threadsafe(start, loop).result(10)
    yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)


def test_a_certificate_that_is_not_trusted_is_named_at_once(certificate: Path) -> None:
    # With seven tries this would take two minutes.
    with tls_server(certificate) as (url, connections), pytest.raises(TouchlineError) as caught:
        downloaded(f"{url}/x", tries=7)
    assert all(
        word in one_line(caught.value) for word in (url.removeprefix("https://"), "certificate", "SSL_CERT_FILE")
    )
    assert connections == []


def test_an_authority_named_in_the_environment_is_trusted(certificate: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from touchline.sources import http; from touchline.core.params import DownloadParams\n"
        "settings = DownloadParams.model_validate_json(sys.argv[3])\n"
        "http.to_file(sys.argv[1], pathlib.Path(sys.argv[2]), settings)"
    )
    with tls_server(certificate) as (url, _):
        given = [f"{url}/x", str(tmp_path / "x"), settings().model_dump_json()]
        environment = os.environ | {"SSL_CERT_FILE": str(certificate)}
        subprocess.run([sys.executable, "-c", code, *given], env=environment, check=True, timeout=60)
    assert (tmp_path / "x").read_bytes() == b"here"


def test_plain_http_at_an_https_address_is_named_at_once(host: Host) -> None:
    address = host.url.removeprefix("http://")
    with pytest.raises(TouchlineError) as caught:
        downloaded(f"https://{address}/x", tries=7)
    assert all(word in one_line(caught.value) for word in (address, "TLS", "http://"))


def test_a_proxy_named_in_the_environment_is_used(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, host.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    host.put("/x", CONTENT)

    async def ask() -> bytes:
        async with http.session(1) as client, http.get(client, "http://labels.example/x", settings()) as response:
            return await response.read()

    assert http.network(ask()) == CONTENT
    [request] = host.requests
    assert request.headers["Host"] == "labels.example"


@pytest.mark.parametrize("asked_for", [1.6, 3_600])
def test_a_wait_is_reported_when_it_begins_and_once_for_a_host(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked_for: float
) -> None:
    async def at_once(_: float) -> None: ...

    real = asyncio.sleep
    monkeypatch.setattr(http.asyncio, "sleep", lambda seconds: at_once(seconds) if seconds > 1 else real(seconds))
    for name in ("x", "y"):
        host.put(f"/{name}", CONTENT, faults=[Fault.status(503, retry_after=asked_for)] * 2)
        assert downloaded(f"{host.url}/{name}") == CONTENT
    [line] = capsys.readouterr().out.splitlines()
    assert host.url.removeprefix("http://") in line and "503" in line
    assert ("3,600" in line and " 60 s" in line) == (asked_for > 60)


def test_a_redirect_is_followed(host: Host) -> None:
    host.put("/x", b"", faults=[Fault.redirect(f"{host.url}/y").always()])
    host.put("/y", CONTENT, hash=True, faults=[Fault.cut(after=1_000_000)])
    assert downloaded(f"{host.url}/x") == CONTENT
    assert ranges(host, "/y") == ["", "bytes=1000000-"]


def test_what_is_cancelled_before_it_has_begun_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_SECONDS_TO_PUT_AWAY", 300)
    loop, held, free, ended = http._loop(), threading.Event(), threading.Event(), threading.Event()

    def ask() -> None:
        with pytest.raises(CancelledError):
            http.network(asyncio.sleep(300))
        ended.set()

    # While the network's thread is held up, a request and its cancellation come in one after the other.
    loop.call_soon_threadsafe(lambda: (held.set(), free.wait()))
    assert held.wait(60)
    before = len(loop._ready)
    threading.Thread(target=ask, daemon=True).start()
    wait_until(lambda: len(loop._ready) > before, "the request")
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    free.set()
    assert ended.wait(60)
