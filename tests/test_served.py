"""The record of what was asked: what is kept, what a kill and a full disk cost, and what cannot be read."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boards
import pytest
from conftest import names
from test_predict import Ask, ask, draw, project, somewhere  # noqa: F401 - fixtures
from test_serve import Model, Served, form, jpeg, sample

from touchline.commands.serve import Limits
from touchline.core.errors import TouchlineError
from touchline.core.params import MonitorParams, Params
from touchline.core.paths import Paths
from touchline.data import photos, served
from touchline.data.served import CHAMPION, SUFFIX, Asked, Recorder

ANSWER = {
    "label": "red", "guess": "red", "confidence": 0.9, "probabilities": {"red": 0.9, "blue": 0.1}, "similarity": None,
    "percentile": None,
}  # fmt: skip
MODEL = ("a model version 3", "a digest")


@pytest.fixture
def keep(params_with: Callable[..., Params]) -> MonitorParams:
    return params_with().monitor


def asked(number: int) -> Asked:
    return Asked(f"{number:064x}", 1000)


def kept(folder: Path, count: int, *arguments: Any) -> Path:
    """A file with as many rows."""
    with Recorder(folder, *arguments, *MODEL) as recorder:
        for number in range(count):
            recorder.add(asked(number), ANSWER)
    return recorder._file


@pytest.fixture
def serve(params_with: Callable[..., Params], tmp_path: Path) -> Iterator[Callable[..., tuple[Served, Recorder]]]:
    """A server that keeps a record; the record is complete once the server was ended."""
    with ExitStack() as started:

        def start(*, photo: int = 2**20, keep_photos: bool = False) -> tuple[Served, Recorder]:
            params = params_with()
            recorder = started.enter_context(Recorder(tmp_path, params.monitor, *MODEL, keep_photos=keep_photos))
            one = Served(params, Model(), Limits(photo=photo), recorder=recorder)
            started.callback(one.end)
            return one, recorder

        yield start


def rows_of(folder: Path, count: int) -> list[dict[str, Any]]:
    boards.wait_for(lambda: len(served.read(folder)) >= count, 30)
    return served.read(folder).to_dict("records")


def test_a_server_keeps_a_row_of_each_photo_also_of_those_it_cannot_judge(serve: Callable, tmp_path: Path) -> None:
    server, _ = serve(photo=100_000)
    before = datetime.now(UTC).timestamp()
    server.predict(jpeg())
    server.predict(**form(("a.jpg", jpeg((120, 120, 120))), ("b.jpg", b"<!doctype html>"), ("c.jpg", bytes(100_001))))
    rows = rows_of(tmp_path, 4)
    first, *others = rows
    assert [row["photo"] for row in rows if row["photo"] == hashlib.sha256(jpeg()).hexdigest()] == [first["photo"]]
    assert (first["label"], first["guess"], first["size"], first["error"]) == ("red", "red", len(jpeg()), "")
    assert (first["model"], first["model_sha256"], first["role"]) == (*MODEL, CHAMPION)
    assert json.loads(first["probabilities"])["red"] == first["confidence"] > 0.9
    assert before <= first["time"] <= time.time() and 0 < first["milliseconds"] < 60_000
    assert {row["label"] for row in others if not row["error"]} == {"unsure"}
    assert sum("web page" in row["error"] for row in others) == 1 and sum("MB" in row["error"] for row in others) == 1
    assert served.thumbnails(tmp_path, {row["photo"] for row in rows}) == {}


def test_small_copies_are_kept_only_where_they_are_asked_for(serve: Callable, tmp_path: Path) -> None:
    server, _ = serve(keep_photos=True)
    for _ in range(2):
        server.predict(jpeg(size=(480, 400)))
    rows = rows_of(tmp_path, 2)
    [(photo, copy)] = served.thumbnails(tmp_path, {row["photo"] for row in rows}).items()
    assert photo == rows[0]["photo"] == rows[1]["photo"]
    assert (header := photos.header(copy)) and (header.width, header.height) == (240, 200)


def test_predict_keeps_rows_and_counts_no_milliseconds_of_one_photo(
    ask: Ask, somewhere: Path, project: Paths  # noqa: F811 - fixtures
) -> None:  # fmt: skip
    content = draw(somewhere / "a.jpg", "red").read_bytes()
    (somewhere / "b.jpg").write_bytes(b"no photo")
    assert ask("a.jpg").error is None and not project.served.exists()
    said = ask(".", record=True)
    assert names(str(said.error), "1")
    good, bad = sorted(served.read(project.served).to_dict("records"), key=lambda row: row["error"])
    assert (good["photo"], good["label"]) == (hashlib.sha256(content).hexdigest(), "red") and bad["error"]
    assert good["milliseconds"] != good["milliseconds"]  # NaN
    assert good["model"] == "models/cnn.keras"


def test_a_killed_process_loses_less_than_a_second_and_tears_nothing(
    keep: MonitorParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = f"""
import itertools, time
from pathlib import Path
from touchline.core.params import MonitorParams
from touchline.data.served import Asked, Recorder
keep = MonitorParams.model_construct(**{keep.model_dump()!r})
with Recorder(Path({str(tmp_path)!r}), keep, *{MODEL!r}) as recorder:
    for number in itertools.count():
        recorder.add(Asked(f"{{number:064x}}", 1000), {ANSWER!r})
        print(number, time.time(), flush=True)
        time.sleep(0.002)
"""
    for _ in range(2):
        before = datetime.now(UTC)
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            lines = [process.stdout.readline() for _ in range(500)]
            os.kill(process.pid, signal.SIGKILL)
            lines += process.stdout.readlines()
        asked_at = [float(line.split()[1]) for line in lines if line.endswith("\n") and len(line.split()) == 2]
        found = served.read(tmp_path, before)
        assert list(found["photo"]) == [asked(number).photo for number in range(len(found))]
        assert found["time"].iloc[-1] > asked_at[-1] - 2
        for file in served.files(tmp_path):
            with sqlite3.connect(file) as database:
                assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert "left out" not in capsys.readouterr().out


def test_what_cannot_be_read_is_named_and_stays_and_the_rest_is_read(
    keep: MonitorParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        kept(tmp_path, 3, keep)
    torn = kept(tmp_path, 2000, keep)
    torn.write_bytes(torn.read_bytes()[:20_000] + b"torn" * 100)
    other = kept(tmp_path, 3, keep)
    with sqlite3.connect(other) as database:
        database.execute("PRAGMA user_version = 99")
    (tmp_path / f"{datetime.now(UTC):%Y-%m-%d}-text{SUFFIX}").write_bytes(b"no database at all" * 100)
    assert len(served.read(tmp_path)) == 6
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and torn.exists() and other.exists()
    assert any(torn.name in line for line in lines) and any(other.name in line and "99" in line for line in lines)


def test_on_a_full_disk_photos_are_answered_one_line_says_so_and_the_lost_are_counted(
    serve: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, recorder = serve()
    # As many pages as the file has: SQLite then says what it says of a full disk.
    [pages] = recorder._database.execute("PRAGMA page_count").fetchone()
    recorder._database.execute(f"PRAGMA max_page_count = {pages}")
    answered = 0

    def is_full() -> bool:
        nonlocal answered
        assert server.is_well()
        answered += 1
        return (sample(server, "touchline_unrecorded_total") or 0) >= 1

    boards.wait_for(is_full, 60)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and str(tmp_path) in said[0] and "full" in said[0]
    recorder._database.execute("PRAGMA max_page_count = 1000000")
    lost = sample(server, "touchline_unrecorded_total")
    assert server.is_well()
    boards.wait_for(
        lambda: len(served.read(tmp_path)) + (sample(server, "touchline_unrecorded_total") or 0) > answered, 30
    )
    assert sample(server, "touchline_unrecorded_total") >= lost


def test_a_folder_that_cannot_be_written_is_one_line_at_the_start(keep: MonitorParams, tmp_path: Path) -> None:
    (tmp_path / "served").write_text("a file")
    with pytest.raises(TouchlineError) as raised:
        Recorder(tmp_path / "served", keep, *MODEL)
    assert names(str(raised.value), str(tmp_path / "served"))


def test_a_new_day_and_a_deleted_or_torn_file_begin_a_new_one(
    keep: MonitorParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    with Recorder(tmp_path, keep, *MODEL) as recorder:

        def row(number: int) -> Path:
            recorder.add(asked(number), ANSWER)
            boards.wait_for(lambda: asked(number).photo in set(served.read(tmp_path)["photo"]), 30)
            return recorder._file

        first = row(0)
        for part in served._parts(first):
            part.unlink()
        second = row(1)
        monkeypatch.setattr(served, "_today", lambda: f"{tomorrow:%Y-%m-%d}")
        third = row(2)
        assert len({first, second, third}) == 3 and not first.exists()
        assert third.name.startswith(f"{tomorrow:%Y-%m-%d}-{os.getpid()}-")
        # What is read from a day on leaves out files of the days before.
        assert list(served.read(tmp_path, tomorrow)["photo"]) == []


def test_days_and_megabytes_have_limits_that_spare_what_is_written_to(
    params_with: Callable[..., Params], tmp_path: Path
) -> None:
    keep = params_with(monitor={"keep_days": 3, "keep_megabytes": 1}).monitor
    today = datetime.now(UTC)

    def file(days: int, name: str, megabytes: float = 0.001) -> Path:
        path = tmp_path / f"{today - timedelta(days=days):%Y-%m-%d}-{name}{SUFFIX}"
        path.write_bytes(bytes(round(1e6 * megabytes)))
        return path

    # One of this process, and one of an earlier process that had its id.
    old, earlier = file(5, "99999999-a"), file(5, f"{os.getpid()}-a")
    large, young, open_one = file(2, "99999999-b", 0.9), file(1, "99999999-c", 0.05), file(0, f"{os.getpid()}-b", 0.9)
    assert set(served.expired(tmp_path, keep)) == {old, earlier, large}
    kept(tmp_path, 1, keep)
    assert [path.exists() for path in (old, earlier, large, young, open_one)] == [False, False, False, True, True]
    # One process alone, which asks for more than there is room for in a day.
    with Recorder(tmp_path, keep, *MODEL) as recorder:
        for number in range(8_000):
            recorder.add(asked(number), ANSWER, wait=True)
            if number % 1000 == 999:
                time.sleep(0.3)
    used = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert used < 2e6, used
    assert asked(7_999).photo in set(served.read(tmp_path)["photo"])
