"""`touchline ingest` from Open Images on a loopback server, undisturbed and disturbed: the same photos in the end."""

import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import SHIPPED
from openimages_files import BOXES, CLASS_LIST, INFO, LABELS, RUGBY, SOCCER, Shot, publish
from PIL import Image
from ruamel.yaml import YAML
from servers import Fault, Host

from touchline.core.files import read_table

PER_CLASS = 100
OFFERED = 125
CLASSES = {"rugby": RUGBY, "soccer": SOCCER}
# What happens to every so manieth photo; the numbers have no common factor, so that all pairs occur.
ABSENT, HUGE = 11, 37


def jpeg(number: int) -> bytes:
    pixels = random.Random(number).randbytes(12 * 9 * 3)
    file = io.BytesIO()
    small = Image.frombytes("RGB", (12, 9), pixels)
    photo = small.resize((48 + number % 40, 36 + number % 30), Image.Resampling.BICUBIC)
    photo.save(file, "JPEG", quality=85)
    return file.getvalue()


def once(number: int, size: int) -> list[Fault]:
    """What goes wrong with a photo's first answer."""
    faults = {
        5: Fault.status(500, retry_after=0),
        7: Fault.status(429, retry_after=0.2),
        13: Fault.cut(after=size // 2),
        17: Fault.html(),
        19: Fault.reset(),
        23: Fault.slow(bytes_per_second=5_000),
    }
    return [fault for every, fault in faults.items() if number % every == every - 1]


def image(label: str, number: int) -> str:
    return hashlib.sha256(f"{label} {number}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Published:
    """What a host offers: the path of each photo, the photos a run is to end with, and those it has to leave out."""

    paths: list[str]
    absent: set[str]
    huge: set[str]


def published(host: Host, *, faults: bool, offered: int = OFFERED) -> Published:
    """Put label files and photos of both classes on the host, half of them in `validation` and half in `test`."""
    shots: dict[str, list[Shot]] = {"validation": [], "test": []}
    found = Published([], set(), set())
    for shift, (label, mid) in enumerate(CLASSES.items()):
        for number in range(offered):
            subset = "validation" if number % 2 else "test"
            shot = Shot(
                image(label, number),
                {mid: "1"},
                author=f"Author {number % 50}",
                page=f"https://www.flickr.com/people/{number % 50}/",
                title="=HYPERLINK(1)" if number % 10 == 0 else f"Match {number}",
                rotation="90.0" if number % 6 == 0 else "0.0",
            )
            shots[subset].append(shot)
            path = f"/photos/{subset}/{shot.image}.jpg"
            found.paths.append(path)
            content = jpeg(2 * number + shift)
            if number % ABSENT == 3:
                found.absent.add(path)
            elif number % HUGE == 8:
                found.huge.add(path)
                host.put(path, content + bytes(300_000), content_type="image/jpeg")
            else:
                host.put(path, content, content_type="image/jpeg", faults=once(number, len(content)) if faults else ())
    publish(host, **shots)
    return found


@dataclass(frozen=True)
class Project:
    """A folder with a params.yaml, in which the command is run."""

    root: Path

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [Path(sys.executable).with_name("touchline"), "ingest", *arguments],
            cwd=self.root,
            env={name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ingest(self, *arguments: str, exit_code: int = 0) -> tuple[str, str]:
        """Standard output and standard error of a run."""
        process = self.command(*arguments)
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == exit_code, output + errors
        return output, errors

    @property
    def table(self) -> pd.DataFrame:
        return read_table(self.root / "data/photos.csv")

    @property
    def journal(self) -> dict[str, dict[str, Any]]:
        """What was fetched or found absent, by URL."""
        path = self.root / "data/fetched.jsonl"
        # A killed run may have left half a line.
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return {entry["url"]: entry for entry in entries}

    def files(self) -> dict[str, bytes]:
        paths = self.root.glob("data/photos/*/*")
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in paths}

    def report(self) -> dict[str, Any]:
        return json.loads((self.root / "reports/ingest.json").read_text())


def project(root: Path, host: Host, **changes: Any) -> Project:
    """The shipped params.yaml, with `ingest` pointed at the host and, by dotted name, what else a test wants."""
    root.mkdir()
    yaml = YAML()
    values = yaml.load(SHIPPED)
    settings = {
        "sources": ["openimages"],
        "per_class": PER_CLASS,
        "min_per_class": 40,
        "download.connections": 12,
        "download.max_megabytes": 0.2,
        "openimages.url": host.url,
        "openimages.photos_url": f"{host.url}/photos",
        "openimages.subsets": ["validation", "test"],
        "openimages.classes": {label: [mid] for label, mid in CLASSES.items()},
        "openimages.exclude": [],
    }
    for name, value in (settings | changes).items():
        *sections, key = name.split(".")
        reduce(getitem, sections, values["ingest"])[key] = value
    with (root / "params.yaml").open("w") as file:
        yaml.dump(values, file)
    return Project(root)


def url_path(url: str) -> str:
    return "/" + url.split("/", 3)[3]


def one_line(errors: str) -> str:
    assert errors.startswith("touchline: ") and errors.count("\n") == 1, errors
    return errors


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.005)


def without_times(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="retrieved")


@dataclass(frozen=True)
class Run:
    """One run that nothing disturbed, though the server's answers are as bad as they get."""

    project: Project
    host: Host
    published: Published
    output: str


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with Host() as host:
        there = published(host, faults=True)
        made = project(tmp_path_factory.mktemp("undisturbed") / "a project", host)
        output, _ = made.ingest()
        yield Run(made, host, there, output)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def assert_same_as(undisturbed: Run, other: Project) -> None:
    pd.testing.assert_frame_equal(without_times(other.table), without_times(undisturbed.project.table))
    assert other.files() == undisturbed.project.files()
    assert list(other.root.rglob(".partial-*")) == []


def test_the_first_photos_of_each_class_come_with_all_that_is_known_of_them(undisturbed: Run) -> None:
    table = undisturbed.project.table
    assert table.groupby("class").size().to_dict() == {"rugby": PER_CLASS, "soccer": PER_CLASS}
    for shift, label in enumerate(CLASSES):
        # First those of `validation`, in the order of their ids, then those of `test`.
        there = [
            (subset, name, number)
            for subset, first in (("validation", 1), ("test", 0))
            for name, number in sorted((image(label, number), number) for number in range(first, OFFERED, 2))
            if number % ABSENT != 3 and number % HUGE != 8
        ][:PER_CLASS]
        of_class = table[table["class"] == label].set_index("origin")
        assert list(of_class.index) == [f"{subset}/{name}" for subset, name, _ in there]
        for subset, name, number in there:
            row, turned = of_class.loc[f"{subset}/{name}"], number % 6 == 0
            content = (undisturbed.project.root / row["path"]).read_bytes()
            assert row["sha256"] == hashlib.sha256(content).hexdigest() and row["bytes"] == len(content)
            assert row["path"] == f"data/photos/{label}/{row['sha256'][:16]}.jpg"
            original = jpeg(2 * number + shift)
            assert content == original if not turned else len(content) > len(original)
            width, height = Image.open(io.BytesIO(original)).size
            assert (row["width"], row["height"]) == ((height, width) if turned else (width, height))
            assert row["group"] == row["author_page"] == f"https://www.flickr.com/people/{number % 50}/"
            assert row["author"] == f"Author {number % 50}" and row["licence"].endswith("/by/2.0/")
            assert row["landing_page"] == f"https://www.flickr.com/photos/{name}"
            assert row["title"] == ("=HYPERLINK(1)" if number % 10 == 0 else f"Match {number}")
            assert row["retrieved"].endswith("+00:00") and row["source"] == "openimages" and row["subset"] == ""
    # Nothing lies there that is not in the table.
    assert set(undisturbed.project.files()) == set(table["path"])


def test_an_author_finds_his_photos_and_a_spreadsheet_no_formula(undisturbed: Run) -> None:
    table = undisturbed.project.table
    # As a spreadsheet reads it: `read_table` takes the guards against formulas out again.
    shown = pd.read_csv(undisturbed.project.root / "data/ATTRIBUTION.csv", dtype=str, keep_default_na=False)
    assert list(shown["photo"]) == list(table["path"]) and list(shown["author page"]) == list(table["author_page"])
    formulas = table["title"].str.startswith("=")
    assert formulas.any() and not formulas.all()
    assert list(shown["title"]) == [f"'{title}" if title.startswith("=") else title for title in table["title"]]


def test_the_report_says_what_came_and_what_did_not(undisturbed: Run) -> None:
    report = undisturbed.project.report()
    assert report["photos"] == {"rugby": PER_CLASS, "soccer": PER_CLASS} and report["notes"] == []
    source = report["sources"]["openimages"]
    asked = {request.path for request in undisturbed.host.requests}
    assert source["photos"] == source["fetched"] == 2 * PER_CLASS
    assert source["left_out"] == {
        "not there (404)": len(asked & undisturbed.published.absent),
        "too large": len(asked & undisturbed.published.huge),
    }
    assert min(source["left_out"].values()) > 0
    # A reset connection may be asked again by the client itself, unseen.
    assert set(source["tried_again"]) - {"no answer"} == {"answers 500", "answers 429", "cut off", "a web page"}
    assert set(source["labels"]) == {"validation", "test"}
    assert f"photos: rugby {PER_CLASS}, soccer {PER_CLASS}" in undisturbed.output


def test_a_second_run_asks_only_for_what_was_refused(undisturbed: Run) -> None:
    asked, before = len(undisturbed.host.requests), undisturbed.project.table
    written = {path: path.stat().st_mtime_ns for path in undisturbed.project.root.glob("data/photos/*/*")}
    undisturbed.project.ingest()
    pd.testing.assert_frame_equal(undisturbed.project.table, before)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.project.root.glob("data/photos/*/*")} == written
    # A limit of one's own is no property of the photo: what was too large may be asked for again.
    again = {request.path for request in undisturbed.host.requests[asked:]}
    assert again <= undisturbed.published.huge
    assert undisturbed.project.report()["sources"]["openimages"]["fetched"] == 0


def test_a_photo_damaged_since_is_fetched_again_and_no_other(tmp_path: Path, undisturbed: Run) -> None:
    copied = Project(shutil.copytree(undisturbed.project.root, tmp_path / "copied"))
    row, asked = copied.table.iloc[20], len(undisturbed.host.requests)
    path = copied.root / row["path"]
    path.write_bytes(path.read_bytes()[:-50] + bytes(50))
    copied.ingest()
    assert_same_as(undisturbed, copied)
    again = {request.path for request in undisturbed.host.requests[asked:]} - undisturbed.published.huge
    # Nor would it be: a dry run counts what is there.
    assert "to fetch: 0 MB" in copied.ingest("--dry-run")[0]
    assert again == {f"/photos/{row['origin']}.jpg"}


def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_photos(
    host: Host, tmp_path: Path, undisturbed: Run
) -> None:
    published(host, faults=True)
    host.latency = 0.02
    attacked = project(tmp_path / "attacked", host)
    chance = random.Random(7)
    labels = [CLASS_LIST, *(files[subset] for files in (LABELS, INFO, BOXES) for subset in ("validation", "test"))]
    for attempt in range(8):
        known, asked = attacked.journal, len(host.requests)
        # Some of the moments lie in the reading of labels, most among the photos.
        further = chance.randrange(1, 6) if attempt < 3 else chance.randrange(1, 40)
        process = attacked.command()
        try:
            wait_until(
                lambda: process.poll() is not None or len(host.requests) >= asked + further,  # noqa: B023
                "requests",
            )
            time.sleep(chance.uniform(0, 0.05))
        finally:
            process.kill()
            process.communicate()
        again = {request.path for request in host.requests[asked:]}
        assert not again & {url_path(url) for url in known}
    known, asked = attacked.journal, len(host.requests)
    assert 20 < len(known) < 2 * PER_CLASS
    attacked.ingest()
    assert not {request.path for request in host.requests[asked:]} & {url_path(url) for url in known}
    assert_same_as(undisturbed, attacked)
    # Labels that were read in full are not read again.
    assert all(host.served(path) <= 4 for path in labels)


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path: Path, undisturbed: Run) -> None:
    copied = Project(shutil.copytree(undisturbed.project.root, tmp_path / "copied"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for folder in ("data", "data/photos", "data/photos/rugby", "data/openimages", "data/spare", "reports"):
        (copied.root / folder).mkdir(exist_ok=True)
        (copied.root / folder / f".partial-{gone.pid}-abc").write_bytes(b"half")
    copied.ingest()
    assert list(copied.root.rglob(".partial-*")) == []


def test_a_server_away_for_seconds_costs_no_photo(host: Host, tmp_path: Path, undisturbed: Run) -> None:
    published(host, faults=False)
    host.latency = 0.05
    patient = project(tmp_path / "patient", host)
    process = patient.command()
    wait_until(lambda: sum("/photos/" in request.path for request in host.requests) >= 60, "photos")
    host.down()
    time.sleep(1.5)
    host.up()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same_as(undisturbed, patient)
    assert patient.report()["sources"]["openimages"]["tried_again"]["no connection"] > 0


def test_a_server_that_stays_away_is_one_line_and_the_next_run_goes_on(
    host: Host, tmp_path: Path, undisturbed: Run
) -> None:
    published(host, faults=False)
    host.latency = 0.05
    left_alone = project(tmp_path / "left alone", host, **{"download.tries": 2})
    process = left_alone.command()
    wait_until(lambda: sum("/photos/" in request.path for request in host.requests) >= 60, "photos")
    host.down()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert one_line(errors)
    known = left_alone.journal
    assert len(known) >= 40
    assert not (left_alone.root / "data/photos.csv").exists()
    host.up()
    asked = len(host.requests)
    left_alone.ingest()
    assert not {request.path for request in host.requests[asked:]} & {url_path(url) for url in known}
    assert_same_as(undisturbed, left_alone)


def test_a_server_that_was_never_there_is_one_line(host: Host, tmp_path: Path) -> None:
    away = project(tmp_path / "away", host, **{"download.tries": 1, "openimages.url": "http://127.0.0.1:9/openimages"})
    _, errors = away.ingest(exit_code=1)
    assert "http://127.0.0.1:9/openimages/v7/oidv7-class-descriptions.csv" in one_line(errors)


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("where", ["labels", "photos"])
def test_control_c_ends_the_command_at_once(host: Host, tmp_path: Path, where: str) -> None:
    published(host, faults=False)
    if where == "labels":
        path = LABELS["validation"]
        host.put(path, host._stored[path].content, faults=[Fault.stall(after=1_000, seconds=300).always()])
    else:
        host.latency = 0.15
    stopped = project(tmp_path / "stopped", host, **{"download.read_timeout": 200})
    process = stopped.command()
    waited_for = path if where == "labels" else "/photos/"
    some = 1 if where == "labels" else 40
    wait_until(lambda: sum(waited_for in request.path for request in host.requests) >= some, "the requests")
    time.sleep(0.1)
    code, errors = interrupted(process)
    assert code not in (0, -signal.SIGKILL) and "Traceback" not in errors
    # What was being written was put away first.
    noted = {entry["sha256"][:16] for entry in stopped.journal.values() if "sha256" in entry}
    assert {Path(name).stem for name in stopped.files()} == noted
    assert where == "labels" or noted
    host.latency = 0
    published(host, faults=False)
    stopped.ingest()
    assert len(stopped.table) == 2 * PER_CLASS


# A disk of so many KiB at `data`, in a namespace of the command's own where one may mount there.
SMALL_DISK = """
set -e
mkdir -p data
mount -t tmpfs -o size={size}k tmpfs data
set +e
{command}; echo "exit $?" >> codes
mount -o remount,size=64m data
{command}; echo "exit $?" >> codes
cp -r data kept
"""


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    try_out = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(try_out, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="a small disk needs a namespace of one's own to be mounted in")
def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(host: Host, tmp_path: Path, undisturbed: Run) -> None:
    published(host, faults=False)
    small = project(tmp_path / "small", host)
    command = shlex.join([str(Path(sys.executable).with_name("touchline")), "ingest"])
    script = SMALL_DISK.format(size=400, command=f"{command} 2>>errors")
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(namespace, cwd=small.root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (small.root / "codes").read_text() == "exit 1\nexit 0\n", (small.root / "errors").read_text()
    said = one_line((small.root / "errors").read_text())
    assert "No space left on device" in said and "make room" in said
    (small.root / "data").rmdir()
    (small.root / "kept").rename(small.root / "data")
    assert_same_as(undisturbed, small)
    # What had found its place before the disk was full was not asked for again.
    assert small.report()["sources"]["openimages"]["fetched"] < 2 * PER_CLASS


def test_fewer_photos_than_wished_for_are_worth_a_note(host: Host, tmp_path: Path) -> None:
    published(host, faults=False, offered=60)
    short = project(tmp_path / "short", host, per_class=80)
    output, _ = short.ingest()
    # What is over is not said to take any longer.
    assert " s left" not in output
    there = len(short.table) // 2
    note = f"fewer photos than ingest.per_class (80): rugby {there}, soccer {there}"
    assert 40 <= there < 60 and short.report()["notes"] == [note]
    assert f"note: {note}\n" in output


def test_too_few_photos_stop_the_run_in_one_line(host: Host, tmp_path: Path) -> None:
    published(host, faults=False, offered=30)
    few = project(tmp_path / "few", host)
    _, errors = few.ingest(exit_code=1)
    there = len(few.table) // 2
    assert all(word in one_line(errors) for word in (f"rugby {there}", f"soccer {there}", "ingest.min_per_class"))


def test_photos_stay_when_the_wish_changes_and_comes_back_unless_they_were_rejected(host: Host, tmp_path: Path) -> None:
    there = published(host, faults=False, offered=20)
    wishes = {"min_per_class": 1, "download.connections": 4}
    made = project(tmp_path / "made", host, per_class=12, **wishes)
    made.ingest()
    table, asked = made.table, len(host.requests)
    fewer = project(tmp_path / "fewer", host, per_class=2, **wishes)
    other = project(tmp_path / "other", host, sources=["sample"], per_class=2, **{"sample.per_class": 10, **wishes})
    back = (made.root / "params.yaml").read_bytes()
    for wish in (fewer, other):
        shutil.copy(wish.root / "params.yaml", made.root)
        made.ingest()
        assert len(made.files()) == 4
    (made.root / "params.yaml").write_bytes(back)
    made.ingest()
    pd.testing.assert_frame_equal(made.table, table)
    # What was too large may be asked for again.
    assert {request.path for request in host.requests[asked:]} <= there.huge
    assert not list(made.root.glob("data/spare/*"))
    # A photo that somebody asked to have removed is gone from everywhere.
    gone = table.iloc[0]
    ledger = (
        f"sha256,class,source,origin,reason\n{gone['sha256']},{gone['class']},openimages,{gone['origin']},dropped\n"
    )
    (made.root / "data/ledger.csv").write_text(ledger)
    made.ingest()
    assert gone["path"] not in set(made.table["path"])
    assert not list(made.root.rglob(f"{gone['sha256'][:16]}.*"))


def test_all_that_there_are_may_be_wished_for(host: Host, tmp_path: Path) -> None:
    published(host, faults=False, offered=60)
    everything = project(tmp_path / "everything", host, per_class=None)
    output, _ = everything.ingest()
    there = len(everything.table) // 2
    assert 40 <= there < 60 and f"fetching photos: rugby {there}, soccer {there}; " in output


def test_a_dry_run_says_what_would_be_fetched_and_fetches_no_photo(host: Host, tmp_path: Path) -> None:
    published(host, faults=False)
    dry = project(tmp_path / "dry", host)
    output, _ = dry.ingest("--dry-run")
    assert "would be fetched" in output and "Open Images" in output
    assert [request.path for request in host.requests if request.method == "GET"] == [CLASS_LIST]
    sizes = {request.path for request in host.requests if request.method == "HEAD"}
    assert sizes == {files[subset] for files in (LABELS, INFO, BOXES) for subset in ("validation", "test")}
    assert not (dry.root / "data/photos").exists() and not (dry.root / "data/photos.csv").exists()
    assert f"to fetch: {0.3 * 2 * PER_CLASS:.0f} MB at most" in output
    # Each address is whole on a line of its own.
    assert {host.url + path for path in sizes} <= set(output.split())
