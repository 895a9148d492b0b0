"""Many photos at once from a server that is slow, wrong and gone by turns: what is kept, and what is asked for."""

import asyncio
import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from servers import Fault, Host, settings

from touchline.core import progress
from touchline.core.errors import TouchlineError
from touchline.sources import Candidate, fetch, http
from touchline.sources.fetch import Entry, Journal, Outcome
from touchline.sources.http import Unavailable


def jpeg(number: int, width: int = 24, height: int = 16) -> bytes:
    file = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number % 256)
    Image.new("RGB", (width, height), colour).save(file, "JPEG", comment=f"photo {number}".encode())
    return file.getvalue()


def offer(host: Host, label: str, number: int, ending: str = "jpg", **changes: Any) -> Candidate:
    candidate = Candidate(
        label, "openimages", f"test/{label}{number}", url=f"{host.url}/{label}{number}.{ending}", licence="CC BY"
    )
    return replace(candidate, **changes)


def put(host: Host, candidate: Candidate, content: bytes | None = None, **how: Any) -> bytes:
    """Let the host have what the candidate names; its bytes."""
    content = jpeg(hash_of(candidate.url)) if content is None else content
    host.put(path_of(candidate), content, **how)
    return content


def hash_of(text: str) -> int:
    # Of the path alone: the host's port differs from test to test.
    return int(hashlib.sha256(text.rsplit("/", 1)[1].encode()).hexdigest()[:6], 16)


def path_of(candidate: Candidate) -> str:
    return "/" + candidate.url.split("/", 3)[3]


def stocked(host: Host, counts: dict[str, int]) -> list[Candidate]:
    """So many photos of each class, all on the host; the classes take turns."""
    numbered = [(number, label) for label, count in counts.items() for number in range(count)]
    offers = [offer(host, label, number) for number, label in sorted(numbered)]
    for candidate in offers:
        put(host, candidate)
    return offers


def filled(
    folder: Path, offers: Sequence[Candidate] | Iterator[Candidate], room: dict[str, int], **changes: Any
) -> Outcome:
    """Fill classes as a run of `ingest` does: a fresh look at the folder, and the journal beside it."""
    photos = folder / "photos"
    whole = {path for path in photos.glob("*/*") if path.stem == hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
    with Journal(folder / "fetched.jsonl") as journal:
        return fetch.fill(
            iter(offers),
            room,
            lambda candidate: photos / candidate.label,
            whole,
            folder / "spare",
            journal,
            settings(**changes),
        )


def origins(outcome: Outcome) -> list[str]:
    return [kept.candidate.origin for kept in outcome.kept]


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.01)


def test_a_photo_is_kept_by_its_content_and_noted_in_the_journal(host: Host, tmp_path: Path) -> None:
    candidate = offer(host, "rugby", 1)
    content = put(host, candidate)
    outcome = filled(tmp_path, [candidate], {"rugby": 5})
    digest = hashlib.sha256(content).hexdigest()
    [kept] = outcome.kept
    assert kept.path == tmp_path / f"photos/rugby/{digest[:16]}.jpg" and kept.path.read_bytes() == content
    assert kept.candidate == candidate
    entry = kept.entry
    assert (entry.url, entry.absent, entry.sha256, entry.extension) == (candidate.url, 0, digest, "jpg")
    assert (entry.bytes, entry.width, entry.height) == (len(content), 24, 16)
    assert json.loads((tmp_path / "fetched.jsonl").read_text())["sha256"] == digest
    assert (outcome.fetched, outcome.megabytes) == (1, len(content) / 1e6)
    assert not outcome.left_out and not outcome.tried_again


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    missing=st.sets(st.integers(0, 59), max_size=7),  # more might be a wrong address
    slow=st.dictionaries(st.integers(0, 59), st.sampled_from([0.01, 0.03, 0.08]), max_size=20),
    broken=st.sets(st.integers(0, 59), max_size=5),
    room=st.tuples(st.integers(0, 25), st.integers(0, 25)),
    connections=st.sampled_from([1, 3, 8, 40]),
    order=st.randoms(use_true_random=False),
)
def test_a_class_gets_the_first_photos_there_are_whatever_the_order_of_the_answers(
    host: Host,
    tmp_path_factory: pytest.TempPathFactory,
    missing: set[int],
    slow: dict[int, float],
    broken: set[int],
    room: tuple[int, int],
    connections: int,
    order: random.Random,
) -> None:
    labels = [order.choice(["rugby", "soccer"]) for _ in range(60)]
    offers = [offer(host, label, number) for number, label in enumerate(labels)]
    host._stored.clear()
    for number, candidate in enumerate(offers):
        if number not in missing:
            again = [Fault.status(503, retry_after=0)] if number in broken else []
            late = [Fault.stall(after=10, seconds=slow[number])] if number in slow else []
            put(host, candidate, faults=again + late)
    rooms = dict(zip(("rugby", "soccer"), room, strict=True))
    there = [candidate for number, candidate in enumerate(offers) if number not in missing]
    assume(not missing or any(rooms[candidate.label] for candidate in there))
    outcome = filled(tmp_path_factory.mktemp("filled"), offers, rooms, connections=connections)

    expected = {label: [c.origin for c in there if c.label == label][:count] for label, count in rooms.items()}
    for label in rooms:
        assert [kept.candidate.origin for kept in outcome.kept if kept.candidate.label == label] == expected[label]
    # In the order of the offers, across the classes too.
    numbers = [offers.index(kept.candidate) for kept in outcome.kept]
    assert numbers == sorted(numbers)


def test_never_more_requests_at_once_than_connections(host: Host, tmp_path: Path) -> None:
    host.latency = 0.03
    offers = stocked(host, {"rugby": 40, "soccer": 40})
    outcome = filled(tmp_path, offers, {"rugby": 40, "soccer": 40}, connections=5)
    assert len(outcome.kept) == 80
    assert host.max_open == 5


def test_nothing_is_asked_for_that_there_is_no_room_for(host: Host, tmp_path: Path) -> None:
    host.latency = 0.01
    offers = stocked(host, {"rugby": 50, "soccer": 50})
    filled(tmp_path, offers, {"rugby": 7, "soccer": 3}, connections=40)
    assert len(host.requests) == 10


def drawn_from(offers: Sequence[Candidate], drawn: list[Candidate]) -> Iterator[Candidate]:
    for candidate in offers:
        drawn.append(candidate)
        yield candidate


def test_offers_are_drawn_only_as_far_as_they_are_wanted(host: Host, tmp_path: Path) -> None:
    offers = stocked(host, {"rugby": 200, "soccer": 200})
    drawn: list[Candidate] = []
    filled(tmp_path, drawn_from(offers, drawn), {"rugby": 20, "soccer": 20}, connections=8)
    # The classes take turns, so no class can be short of more than half of what is drawn at once.
    assert 40 <= len(drawn) <= 48
    drawn.clear()
    filled(tmp_path, drawn_from(offers, drawn), {"rugby": 20, "soccer": 20}, connections=8)
    assert 40 <= len(drawn) <= 48
    drawn.clear()
    filled(tmp_path, drawn_from(offers, drawn), {"rugby": 0, "soccer": 0})
    assert drawn == []


def test_what_a_source_must_fetch_for_more_is_not_fetched_where_the_journal_fills_the_classes(
    host: Host, tmp_path: Path
) -> None:
    offers = stocked(host, {"rugby": 10, "soccer": 10})
    filled(tmp_path, offers, {"rugby": 10, "soccer": 10})

    def with_a_dear_end() -> Iterator[Candidate]:
        yield from offers
        raise AssertionError("the next subset would have been fetched")

    asked = len(host.requests)
    outcome = filled(tmp_path, with_a_dear_end(), {"rugby": 10, "soccer": 10})
    assert len(outcome.kept) == 20 and outcome.fetched == 0
    assert len(host.requests) == asked


def test_one_class_may_be_at_the_far_end_of_the_offers(host: Host, tmp_path: Path) -> None:
    offers = [offer(host, "rugby", number) for number in range(100)] + [offer(host, "soccer", n) for n in range(5)]
    for candidate in offers:
        put(host, candidate)
    outcome = filled(tmp_path, offers, {"rugby": 3, "soccer": 5})
    assert Counter(kept.candidate.label for kept in outcome.kept) == {"rugby": 3, "soccer": 5}
    assert len(host.requests) == 8


def test_no_time_is_foretold_while_a_source_reads_files_of_its_own(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "_SECONDS_TO_OFFER", 0.05)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    offers = stocked(host, {"rugby": 4})
    lines: list[str] = []

    def is_said() -> bool:
        lines.extend(capsys.readouterr().out.splitlines())
        return any("waiting for" in line for line in lines)

    def reading() -> Iterator[Candidate]:
        yield from offers[:2]
        wait_until(is_said, "the line")
        yield from offers[2:]

    filled(tmp_path, reading(), {"rugby": 4}, connections=2)
    is_said()
    assert not any("waiting for" in line and "s left" in line for line in lines)
    assert "waiting for" not in lines[-1]


def test_fewer_offers_than_room_are_all_taken(host: Host, tmp_path: Path) -> None:
    assert len(filled(tmp_path, stocked(host, {"rugby": 3, "soccer": 2}), {"rugby": 10, "soccer": 10}).kept) == 5


def test_an_error_of_the_source_comes_out_and_what_was_fetched_is_kept(host: Host, tmp_path: Path) -> None:
    offers = stocked(host, {"rugby": 8})

    def breaking() -> Iterator[Candidate]:
        yield from offers
        raise TouchlineError("the label file is no table")

    with pytest.raises(TouchlineError, match="the label file is no table"):
        filled(tmp_path, breaking(), {"rugby": 20}, connections=2)
    before = len(host.requests)
    assert before >= 6
    assert filled(tmp_path, offers, {"rugby": 20}).fetched == 8 - before


def test_a_second_run_asks_for_nothing(host: Host, tmp_path: Path) -> None:
    offers = stocked(host, {"rugby": 20})
    host._stored.pop(path_of(offers[3]))
    put(host, offers[4], faults=[Fault.status(410).always()])
    first = filled(tmp_path, offers, {"rugby": 18})
    asked = len(host.requests)
    second = filled(tmp_path, offers, {"rugby": 18})
    assert len(host.requests) == asked == 20
    assert second.kept == first.kept and len(first.kept) == 18
    assert (second.fetched, second.megabytes) == (0, 0)
    assert second.left_out == first.left_out == {"not there (404)": 1, "not there (410)": 1}


def test_more_room_asks_only_for_what_is_new(host: Host, tmp_path: Path) -> None:
    offers = stocked(host, {"rugby": 20})
    filled(tmp_path, offers, {"rugby": 5})
    outcome = filled(tmp_path, offers, {"rugby": 12})
    assert len(outcome.kept) == 12 and outcome.fetched == 7 and len(host.requests) == 12


@pytest.mark.parametrize("where", ["spare", "photos/soccer"])
def test_a_photo_that_was_taken_out_or_is_another_class_now_is_put_back(host: Host, tmp_path: Path, where: str) -> None:
    offers = stocked(host, {"rugby": 5})
    kept = filled(tmp_path, offers, {"rugby": 5}).kept
    (tmp_path / where).mkdir()
    for one in kept[:2]:
        one.path.rename(tmp_path / where / one.path.name)
    (tmp_path / where / kept[0].path.name).write_bytes(b"damaged since")
    again = filled(tmp_path, offers, {"rugby": 5})
    assert again.fetched == 1 and [one.path for one in again.kept] == [one.path for one in kept]
    assert all(hashlib.sha256(one.path.read_bytes()).hexdigest() == one.entry.sha256 for one in again.kept)
    # It is not there twice for good.
    assert not (tmp_path / "spare" / kept[1].path.name).exists()


@pytest.mark.parametrize("damage", ["torn", "other bytes", "deleted"])
def test_a_photo_damaged_on_disk_is_fetched_again(host: Host, tmp_path: Path, damage: str) -> None:
    offers = stocked(host, {"rugby": 5})
    kept = filled(tmp_path, offers, {"rugby": 5}).kept
    path, content = kept[2].path, kept[2].path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(content[:100] if damage == "torn" else content[:-20] + bytes(20))
    again = filled(tmp_path, offers, {"rugby": 5})
    assert path.read_bytes() == content
    assert again.fetched == 1 and [host.count(path_of(candidate)) for candidate in offers] == [1, 1, 2, 1, 1]
    assert [one.path for one in again.kept] == [one.path for one in kept]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"url": "http://x/1.jpg", "retri',
        b"\xff\xfe\x00",
        b"[]\n",
        b"17\n",
        b'{"url": "u", "colour": "red"}\n',
        b"\n\n",
    ],
)
def test_a_line_of_the_journal_that_cannot_be_read_costs_only_itself(host: Host, tmp_path: Path, tail: bytes) -> None:
    offers = stocked(host, {"rugby": 4})
    filled(tmp_path, offers[:2], {"rugby": 4})
    with (tmp_path / "fetched.jsonl").open("ab") as file:
        file.write(tail)
    assert filled(tmp_path, offers, {"rugby": 4}).fetched == 2
    # What was added after the unreadable line is on lines of its own.
    assert filled(tmp_path, offers, {"rugby": 4}).fetched == 0
    assert len(host.requests) == 4


def test_the_last_line_of_a_url_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep/fetched.jsonl"
    with Journal(path) as journal:
        journal.add(*(Entry(url, "2026-01-01T00:00:00+00:00", absent=404) for url in "uv"))
        journal.add(Entry("u", "2026-01-02T00:00:00+00:00", 0, "ab" * 32, "jpg", 10, 3, 2))
    with Journal(path) as journal:
        assert journal.get("u") == Entry("u", "2026-01-02T00:00:00+00:00", 0, "ab" * 32, "jpg", 10, 3, 2)
        assert journal.get("v").absent == 404 and journal.get("w") is None


def test_a_photo_too_large_is_refused(host: Host, tmp_path: Path) -> None:
    small, large = offer(host, "rugby", 1), offer(host, "rugby", 2)
    put(host, small)
    put(host, large, jpeg(2) + bytes(30_000_000))
    outcome = filled(tmp_path, [large, small], {"rugby": 5}, max_megabytes=1.0)
    assert origins(outcome) == [small.origin]
    assert outcome.left_out == {"too large": 1} and not outcome.tried_again
    assert host.served(path_of(large)) == 0


class Chunked:
    """A server whose answers do not say how long they are, as one that makes them on the way; `stops` is cut off."""

    def __init__(self, content: bytes, stops: bool = False) -> None:
        self.content, self.stops, self.sent, self.asked = content, stops, 0, 0

    def __enter__(self) -> str:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        return asyncio.run_coroutine_threadsafe(self.up(), self.loop).result(10)

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.server.shutdown(1), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def up(self) -> str:
        self.server = web.Server(self.answer)
        listening = await self.loop.create_server(self.server, "127.0.0.1", 0)
        return f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for start in range(0, len(self.content), 65_536):
            if self.stops and start:
                request.transport.abort()
                break
            await response.write(self.content[start : start + 65_536])
            self.sent = start + 65_536
            await asyncio.sleep(0)
        return response


@pytest.mark.parametrize("length", [2_000, 200_000])
def test_a_photo_may_come_without_its_length(tmp_path: Path, length: int) -> None:
    content = jpeg(1)[:-2] + bytes(length) + b"\xff\xd9"
    with Chunked(content) as url:
        [kept] = filled(tmp_path, [Candidate("rugby", "s", "o", url=f"{url}/a.jpg")], {"rugby": 1}).kept
    assert kept.path.read_bytes() == content


def test_a_photo_without_end_is_left_at_the_limit(tmp_path: Path) -> None:
    server = Chunked(jpeg(1) + bytes(50_000_000))
    with server as url:
        outcome = filled(tmp_path, [Candidate("rugby", "s", "o", url=f"{url}/a.jpg")], {"rugby": 1}, max_megabytes=0.5)
        wait_until(lambda: server.sent < 40_000_000, "the server to stop")
    assert outcome.left_out == {"too large": 1} and (server.asked, outcome.kept) == (1, [])
    assert server.sent < 40_000_000


def test_a_photo_without_length_that_breaks_off_is_no_photo(tmp_path: Path) -> None:
    server = Chunked(jpeg(1) + bytes(200_000), stops=True)
    with server as url:
        outcome = filled(tmp_path, [Candidate("rugby", "s", "o", url=f"{url}/a.jpg")], {"rugby": 1})
    assert outcome.left_out == {"cut off, after all tries": 1} and server.asked == 2
    assert outcome.tried_again == {"cut off": 1}


@pytest.mark.parametrize(
    "fault, kind",
    [
        (Fault.html(), "a web page"),
        (Fault.cut(after=100), "cut off"),
        (Fault.status(500, retry_after=0), "answers 500"),
        (Fault.status(429, retry_after=0), "answers 429"),
        (Fault.reset(), "no answer"),
        (Fault.stall(after=100, seconds=60), "timed out"),
        (Fault.changed(b""), "empty file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_went_wrong_once_is_tried_again_and_counted(host: Host, tmp_path: Path, fault: Fault, kind: str) -> None:
    candidate = offer(host, "rugby", 1)
    # The client itself asks once more on a new connection where one is reset.
    content = put(host, candidate, faults=[fault] * (2 if fault.kind == "reset" else 1))
    if fault.kind == "changed":
        # An empty answer, and then the photo.
        host.put(path_of(candidate), b"", faults=[Fault("none"), Fault.changed(content)])
    outcome = filled(tmp_path, [candidate], {"rugby": 1}, read_timeout=0.3)
    [kept] = outcome.kept
    assert kept.path.read_bytes() == content
    assert outcome.tried_again == {kind: 1} and not outcome.left_out


@pytest.mark.parametrize(
    "content, reason",
    [
        (jpeg(1, 200, 200)[:-300], "cut off"),  # with the right Content-Length
        (b"", "empty file"),
        (b"<html>gone</html>", "a web page"),
    ],
)
def test_what_stays_no_photo_is_left_out_and_named(host: Host, tmp_path: Path, content: bytes, reason: str) -> None:
    bad, good = offer(host, "rugby", 1), offer(host, "rugby", 2)
    put(host, bad, content)
    put(host, good)
    outcome = filled(tmp_path, [bad, good], {"rugby": 1}, tries=2)
    assert origins(outcome) == [good.origin]
    assert outcome.left_out == {f"{reason}, after all tries": 1} and outcome.tried_again == {reason: 1}
    # The next run may find it mended: what fails so is not noted as absent.
    put(host, bad)
    assert origins(filled(tmp_path, [bad, good], {"rugby": 1})) == [bad.origin]


def test_a_total_time_out_ends_a_photo_that_drips(host: Host, tmp_path: Path) -> None:
    candidate = offer(host, "rugby", 1)
    put(host, candidate, jpeg(1, 600, 600), faults=[Fault.slow(bytes_per_second=500).always()])
    outcome = filled(tmp_path, [candidate], {"rugby": 1}, tries=1, total_timeout=0.4)
    assert outcome.left_out == {"timed out, after all tries": 1}


def test_a_picture_that_says_the_photo_is_gone_is_not_the_photo(host: Host, tmp_path: Path) -> None:
    """Flickr answers for a photo that was taken down with a redirect to `photo_unavailable.png`."""
    file = io.BytesIO()
    Image.new("RGB", (500, 374), "white").save(file, "PNG")
    host.put("/photo_unavailable.png", file.getvalue(), content_type="image/png")
    gone, good = offer(host, "rugby", 1), offer(host, "rugby", 2)
    put(host, gone, faults=[Fault.redirect(f"{host.url}/photo_unavailable.png").always()])
    put(host, good)
    outcome = filled(tmp_path, [gone, good], {"rugby": 2})
    assert origins(outcome) == [good.origin]
    assert outcome.left_out == {"another picture in its place": 1} and host.count("/photo_unavailable.png") == 1
    # Where the address promises no JPEG, a PNG is as good as any.
    png = offer(host, "rugby", 3, ending="png")
    put(host, png, file.getvalue())
    [kept] = filled(tmp_path / "other", [png], {"rugby": 2}).kept
    assert kept.path.suffix == ".png"


def test_a_photo_that_lies_on_its_side_is_kept_upright(host: Host, tmp_path: Path) -> None:
    sideways = offer(host, "rugby", 1, rotation=90)
    content = put(host, sideways, jpeg(1, 24, 16))
    [kept] = filled(tmp_path, [sideways], {"rugby": 1}).kept
    assert (kept.entry.width, kept.entry.height) == (16, 24)
    assert kept.entry.sha256 == hashlib.sha256(kept.path.read_bytes()).hexdigest()
    assert len(kept.path.read_bytes()) > len(content) == host._stored[path_of(sideways)].size
    # The journal knows it by the bytes that are kept.
    assert filled(tmp_path, [sideways], {"rugby": 1}).fetched == 0


def test_one_picture_at_two_addresses_is_one_file_and_two_photos(host: Host, tmp_path: Path) -> None:
    offers = [offer(host, "rugby", 1), offer(host, "rugby", 2)]
    for candidate in offers:
        put(host, candidate, jpeg(1))
    outcome = filled(tmp_path, offers, {"rugby": 2})
    assert origins(outcome) == [candidate.origin for candidate in offers]
    assert len({kept.path for kept in outcome.kept}) == len(list(tmp_path.glob("photos/*/*"))) == 1


def test_what_is_left_out_is_counted_by_reason(host: Host, tmp_path: Path) -> None:
    offers = stocked(host, {"rugby": 12})
    for candidate in offers[:3]:
        host._stored.pop(path_of(candidate))
    put(host, offers[3], faults=[Fault.status(403).always()])
    put(host, offers[4], bytes(2_000_000))
    put(host, offers[5], faults=[Fault.status(503, retry_after=0).always()])
    outcome = filled(tmp_path, offers, {"rugby": 20}, tries=3)
    assert outcome.left_out == {
        "not there (404)": 3,
        "refused (403)": 1,
        "too large": 1,
        "answers 503, after all tries": 1,
    }
    assert outcome.tried_again == {"answers 503": 2} and len(outcome.kept) == 6


def test_a_host_that_died_is_one_line_and_what_was_fetched_is_kept(host: Host, tmp_path: Path) -> None:
    offers = stocked(host, {"rugby": 60})

    def dying() -> Iterator[Candidate]:
        yield from offers[:20]
        # By now the first of them are being fetched.
        wait_until(lambda: len(host.requests) >= 16, "some photos")
        host.down()
        yield from offers[20:]

    with pytest.raises(Unavailable) as caught:
        filled(tmp_path, dying(), {"rugby": 60}, tries=1)
    assert re.search(r"\b8\b.*Connection refused", one_line(caught.value))
    there = len(list(tmp_path.glob("photos/rugby/*.jpg")))
    assert there >= 8
    host.up()
    outcome = filled(tmp_path, offers, {"rugby": 60})
    assert (len(outcome.kept), outcome.fetched) == (60, 60 - there)


def test_a_host_that_is_away_for_a_moment_costs_only_time(host: Host, tmp_path: Path) -> None:
    host.latency = 0.02
    offers = stocked(host, {"rugby": 60})
    back = threading.Timer(1.5, host.up)

    def interrupted() -> Iterator[Candidate]:
        yield from offers[:24]
        wait_until(lambda: len(host.requests) >= 16, "some photos")
        host.down()
        back.start()
        yield from offers[24:]

    outcome = filled(tmp_path, interrupted(), {"rugby": 60}, tries=5)
    back.join()
    assert origins(outcome) == [candidate.origin for candidate in offers]
    assert not outcome.left_out and outcome.tried_again["no connection"] > 0


def test_some_photos_that_are_not_there_are_no_sign_of_a_wrong_address(host: Host, tmp_path: Path) -> None:
    offers = [offer(host, "rugby", number) for number in range(100)]
    for candidate in offers[::3]:
        put(host, candidate)
    for candidate in offers[1::3]:
        put(host, candidate)
    outcome = filled(tmp_path, offers, {"rugby": 100})
    assert len(outcome.kept) == 67 and outcome.left_out == {"not there (404)": 33}


@pytest.mark.parametrize("count", [3, 300])
def test_photos_that_all_are_not_there_stop_the_run_and_are_not_remembered(
    host: Host, tmp_path: Path, count: int
) -> None:
    offers = [offer(host, "rugby", number) for number in range(count)]
    with pytest.raises(Unavailable) as caught:
        filled(tmp_path, offers, {"rugby": count})
    assert f"{host.url}/rugby" in one_line(caught.value) and "404" in str(caught.value)
    assert len(host.requests) <= 24
    for candidate in offers:
        put(host, candidate)
    assert len(filled(tmp_path, offers, {"rugby": count}).kept) == count


def test_a_photo_that_was_not_there_is_asked_for_again_after_some_days(host: Host, tmp_path: Path) -> None:
    offers = stocked(host, {"rugby": 3})
    host._stored.pop(path_of(offers[0]))
    filled(tmp_path, offers, {"rugby": 3})
    put(host, offers[0])
    path = tmp_path / "fetched.jsonl"
    with Journal(path, absent_days=1) as journal:
        assert journal.get(offers[0].url).absent == 404
    with Journal(path, absent_days=0) as journal:
        assert journal.get(offers[0].url) is None and journal.get(offers[1].url)
    before = (datetime.now(UTC) - timedelta(days=2)).isoformat()
    path.write_text(re.sub(r'("retrieved": )"[^"]*"(, "absent")', rf'\1"{before}"\2', path.read_text()))
    with Journal(path, absent_days=1) as journal:
        assert journal.get(offers[0].url) is None


def test_an_address_that_is_none_stops_the_run_in_one_line(host: Host, tmp_path: Path) -> None:
    with pytest.raises(TouchlineError, match=r"http://\[") as caught:
        filled(tmp_path, [Candidate("rugby", "s", "o", url="http://[/a.jpg")], {"rugby": 1})
    assert one_line(caught.value)


def test_a_host_that_fails_while_a_source_reads_from_the_network_does_not_hang(host: Host, tmp_path: Path) -> None:
    """The source waits for a label file, on a thread that must not keep the failure from being told."""
    offers = [offer(host, "rugby", number) for number in range(40)]
    for candidate in offers:
        put(host, candidate, faults=[Fault.status(403).always()])
    # The eighth fails once the source is at it.
    put(host, offers[7], faults=[Fault.stall(after=10, seconds=60).always()])
    host.put("/labels.csv", bytes(10_000_000), faults=[Fault.stall(after=3_000_000, seconds=60).always()])
    seen: list[object] = []

    def reading() -> Iterator[Candidate]:
        yield from offers[:8]
        try:
            http.to_file(f"{host.url}/labels.csv", tmp_path / "labels.csv", settings(read_timeout=60.0))
            seen.append("all of it")
        except Exception as error:
            seen.append(error)
            raise
        yield from offers[8:]

    with pytest.raises(Unavailable, match=r"\b8\b"):
        filled(tmp_path, reading(), {"rugby": 40}, tries=1, read_timeout=1.0)
    wait_until(lambda: bool(seen), "the source to be told")
    # What is cut off like this must not look like a file that has come to its end.
    assert isinstance(seen[0], Exception)


def test_a_full_disk_stops_the_run_and_what_was_fetched_is_kept(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = stocked(host, {"rugby": 30})
    synced: list[int] = []
    real = os.fsync

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        filled(tmp_path, offers, {"rugby": 30})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    photos = list((tmp_path / "photos/rugby").iterdir())
    assert len(photos) == 10 and not [path for path in photos if path.name.startswith(".partial")]
    outcome = filled(tmp_path, offers, {"rugby": 30})
    assert (len(outcome.kept), outcome.fetched) == (30, 20)


INTERRUPTED = """
import sys
from pathlib import Path
from touchline.sources import http, fetch
from touchline.core.params import DownloadParams
from touchline.sources import Candidate

url, folder, settings = sys.argv[1], Path(sys.argv[2]), DownloadParams.model_validate_json(sys.argv[3])

def offers():
    yield Candidate("rugby", "s", "1", url=f"{url}/slow.jpg")
    yield Candidate("rugby", "s", "2", url=f"{url}/none.jpg")
    http.to_file(f"{url}/labels.csv", folder / "labels.csv", settings)

with fetch.Journal(folder / "fetched.jsonl") as journal:
    fetch.fill(offers(), {"rugby": 5}, lambda _: folder, set(), folder / "spare", journal, settings)
"""


def test_control_c_ends_it_whatever_it_is_waiting_for(host: Host, tmp_path: Path) -> None:
    stall = Fault.stall(after=100, seconds=120).always()
    host.put("/slow.jpg", jpeg(1), faults=[stall])
    host.put("/labels.csv", bytes(1_000_000), faults=[stall])
    patient = settings(connections=2, read_timeout=100.0, total_timeout=100.0)
    given_to = [host.url, tmp_path, patient.model_dump_json()]
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, *given_to], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: host.count("/slow.jpg") and host.count("/labels.csv"), "both requests")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode != 0 and said.rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.glob("*.jpg")) == []
