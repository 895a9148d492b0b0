"""A real board of a little project, on free ports of its own: started as a program, asked through its API.

board = boards.Board(projects.make(tmp_path / "project"))
board.up()
board.ask("POST", "/deployments/filter", {})
board.down()
"""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
from projects import Project


class Board:
    """One board; it may be ended and started again, and keeps its ports.

    Attributes:
        project: whose it is.
        ports: of Prefect's server, MLflow's UI and the reports.
        process: the board's own, once it was started.
    """

    def __init__(self, project: Project):
        self.project = project
        self.ports = free_ports(3)
        self.process: subprocess.Popen[bytes] | None = None
        self._log = project.root.parent / "board.txt"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    @property
    def reports_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[2]}"

    @property
    def auth_string(self) -> str:
        """What Prefect's server asks for: known once the board is up."""
        return self.project.json(".prefect/board.json")["api_auth_string"]

    @property
    def is_up(self) -> bool:
        """Whether it has started everything: only then it writes the file by which others find it."""
        file = self.project.root / ".prefect/board.json"
        return file.exists() and self.project.json(".prefect/board.json")["pid"] == self.process.pid

    @property
    def output(self) -> str:
        """What the board has printed since it was last started."""
        return self._log.read_text()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "flows.board", *options(self.ports)]

    def launch(self) -> None:
        """Start it, and do not wait."""
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.project.root,
                env=self.project.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # As a terminal's job is: what it starts must not need our group to end.
                start_new_session=True,
                # What is a secret is nobody else's, whatever the umask.
                umask=0,
            )

    def up(self) -> None:
        """Start it unless it runs, and wait until all of it runs."""
        if self.process is None or self.process.poll() is not None:
            self.launch()
        wait_for(lambda: self.is_up or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.output

    def down(self, number: int = signal.SIGINT) -> int | None:
        """End it with a signal; its exit code, None where it did not run."""
        if self.process is None or self.process.poll() is not None:
            return None
        self.process.send_signal(number)
        return self.process.wait(120)

    def processes(self) -> dict[str, psutil.Process]:
        """What it has started, by the words of their command lines."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        return {" ".join(process.cmdline()): process for process in started}

    def process_of(self, words: str) -> psutil.Process:
        (found,) = [process for command, process in self.processes().items() if words in command]
        return found

    def at_work(self) -> dict[str, psutil.Process]:
        """DVC and stages at work in the project, or below it, by their command lines."""
        found = {}
        for process in psutil.process_iter():
            try:
                command = " ".join(process.cmdline())
                inside = Path(process.cwd()).is_relative_to(self.project.root)
                if inside and process.status() != psutil.STATUS_ZOMBIE and re.search("/(dvc|touchline) ", command):
                    found[command] = process
            except (psutil.Error, OSError):
                continue
        return found

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request to Prefect's API; the answer's JSON."""
        content = None if body is None else json.dumps(body).encode()
        login = f"Basic {base64.b64encode(self.auth_string.encode()).decode()}"
        headers = {"Content-Type": "application/json", "Authorization": login}
        request = urllib.request.Request(self.api_url + path, content, headers)
        request.method = method
        for _ in range(60):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                # Its database is busy; Prefect's own client asks again too.
                if error.code != 503:
                    raise
            time.sleep(0.5)
        raise AssertionError(f"{self.api_url}{path} is not available")

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {found["name"]: found for found in self.ask("POST", "/deployments/filter", {})}

    def scheduled(self, deployment: str) -> list[dict[str, Any]]:
        """The runs that are planned for a deployment, soonest first."""
        return self.ask(
            "POST",
            "/flow_runs/filter",
            {
                "deployments": {"name": {"any_": [deployment]}},
                "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
                "sort": "EXPECTED_START_TIME_ASC",
            },
        )

    def start_run(self, deployment: str, parameters: dict[str, Any] | None = None, **others: Any) -> str:
        """Ask for a run as the UI does; its id."""
        path = f"/deployments/{self.deployments()[deployment]['id']}/create_flow_run"
        return self.ask("POST", path, {"parameters": parameters or {}, **others})["id"]

    def state(self, flow_run: str) -> dict[str, Any]:
        return self.ask("GET", f"/flow_runs/{flow_run}")["state"]

    def finished(self, flow_run: str, seconds: float = 300) -> dict[str, Any]:
        """The state a run ends in, once it has."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}
        wait_for(lambda: self.state(flow_run)["type"] in ends, seconds)
        return self.state(flow_run)


def options(ports: list[int]) -> list[str]:
    """The board's command-line options for these ports."""
    names = ["--port", "--mlflow-port", "--reports-port"]
    return [word for name, port in zip(names, ports, strict=True) for word in (name, str(port))]


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(is_so: Callable[[], object], seconds: float) -> None:
    """Wait until something is so; what does not answer yet is not so yet."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if is_so():
                return
        time.sleep(0.2)
    raise AssertionError(f"not so within {seconds} s")
