"""`touchline serve` as a process of its own, asked far more than it can answer."""

import os
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import boards
import projects
import psutil
import pytest
from load import Clients

MB = 2**20
LONG = "TOUCHLINE_FAULTS" in os.environ
SECONDS = 10 if LONG else 3  # of each storm
TIMES = (2, 4, 8) if LONG else (8,)  # what the server can do
MINUTE_AFTER = 60 if LONG else 0
# What may become of a client of each kind. One that sends on and on without listening is cut off in the end.
ALLOWED = {
    *(("good", status) for status in ("200", "503")),
    ("half a head", "left"),
    *(("half a body", end) for end in ("408", "503")),
    *(("dripping", end) for end in ("408", "503")),
    *(("oversize", end) for end in ("413", "503", "reset")),
    ("broken off", "-"),
}


@contextmanager
def served(project: projects.Project, log: Path) -> Iterator[tuple[psutil.Process, int]]:
    """The better model of a project as a user serves it: the process and its port."""
    (port,) = boards.free_ports(1)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["touchline", "serve", "--port", str(port)], cwd=project.root, env=project.environment(), stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=10).status == 200

        boards.wait_for(answers, 300)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def peak(process: psutil.Process) -> Iterator[Callable[[], int]]:
    """The most memory, in bytes, that a process took while the block ran."""
    most, over = [process.memory_info().rss], threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            most[0] = max(most[0], process.memory_info().rss)

    watching = threading.Thread(target=look)
    watching.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        watching.join()


@pytest.mark.timeout(1200)
def test_asked_far_too_much_it_answers_or_refuses_and_is_well_after(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    project = projects.built(tmp_path_factory).project
    photos = [file.read_bytes() for file in projects.accepted(project)[:16]]

    with served(project, tmp_path / "serve.txt") as (process, port):
        open_to = {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
        assert open_to == {"127.0.0.1"}
        clients = Clients(port, photos)

        def judged() -> set[tuple[int, str]]:
            """What was said of each photo, in the order of the photos."""
            return {(number, answer["guess"]) for number, answer in clients.answers}

        def ask_alone(requests: int) -> None:
            clients.forget()
            for number in range(requests):
                clients.one(number)
            assert clients.outcomes == {("good", "200"): requests}

        ask_alone(len(photos))
        alone = judged()
        capacity = clients.capacity(SECONDS)
        before = process.memory_info().rss
        told, most = Counter(), []
        storms = [(f"{times} times", partial(clients.storm, times * capacity, SECONDS, 96, 8)) for times in TIMES]
        for name, storm in [*storms, ("a crowd of 1,200", partial(clients.crowd, 1200, SECONDS))]:
            clients.forget()
            with peak(process) as memory:
                storm()
            most.append(memory())
            assert set(clients.outcomes) <= ALLOWED, clients.outcomes
            assert clients.outcomes["good", "200"] and clients.outcomes["good", "503"], clients.outcomes
            assert judged() <= alone
            told += clients.outcomes
            good = [clients.outcomes["good", status] for status in ("200", "503")]
            record_property(
                "fault", f"load, {name}: {good[0]:,} answered, {good[1]:,} told 503, {most[-1] / MB:,.0f} MB at most"
            )
        expected = {("oversize", "413"), ("half a body", "408"), ("dripping", "408"), ("half a head", "left")}
        assert expected | {("broken off", "-")} <= set(told)
        # The first storm fills the room that the limits leave, and nothing is added to it.
        assert most[-1] < most[0] + 64 * MB and most[0] < before + 320 * MB

        for pause in (0, MINUTE_AFTER):
            time.sleep(pause)
            ask_alone(100)
            assert judged() == alone
        after = process.memory_info().rss
    others = sum(told.values()) - told["good", "200"] - told["good", "503"]
    record_property(
        "fault",
        f"load, as a whole: {capacity:,.0f} photos a second are 1 time; {others:,} slow and rude clients beside; "
        f"memory {before / MB:,.0f} MB before, {after / MB:,.0f} MB after; then 100 of 100 answered",
    )
