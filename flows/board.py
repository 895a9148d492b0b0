"""Run Prefect's server and a worker, MLflow's UI and the reports; all of them end together.

`make board` runs it. Everything listens on one address of this machine and keeps its state in the project's .prefect.
"""

import base64
import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError

import psutil
import typer
from filelock import FileLock, Timeout

from flows import BOARD, private_folder
from touchline.core import params, ports
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import write_json
from touchline.core.paths import Paths
from touchline.tracking.client import runs_page

POOL = "touchline"
SERVER, WORKER, MLFLOW = "Prefect's server", "the worker", "MLflow's UI"

_LOGS = {SERVER: "server.log", WORKER: "worker.log", MLFLOW: "mlflow.log"}
_QUIET = {
    # Advertisements for what Prefect sells.
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # A run started in the UI begins sooner than with the worker's default of 10 s.
    "PREFECT_WORKER_QUERY_SECONDS": "3",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Eight processes of 0.2 GB each, for pages about language models.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONUNBUFFERED": "1",
}
# In the environment of every process below a board: the project's path.
_MARK = "TOUCHLINE_BOARD"
# Set by Prefect in the environment of a flow run's process.
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"
# States that take one of the pool's places.
_ACTIVE = ["PENDING", "RUNNING", "CANCELLING"]

_SECONDS_TO_START = 240
# A stage gets 20 s of it to end (see stages.py).
_SECONDS_FOR_FLOW_RUNS = 40
_SECONDS_TO_END = 10
_SECONDS_FOR_BUSY_SERVER = 60
_SECONDS_BETWEEN_STARTS = 5
_LINES_SHOWN = 12
_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@dataclass(frozen=True)
class Board:
    """What is started, and where it is reached.

    Attributes:
        project: absolute path of the project.
        host: address that all of it listens on.
        umask: the user's, for the files that flow runs make.
        auth_string: what Prefect's server asks of every client, new at each start. Without it any web page in the
            user's browser and any other user of this machine could have the worker run commands.
    """

    project: Path
    host: str
    port: int
    mlflow_port: int
    reports_port: int
    umask: int = 0o022
    auth_string: str = field(
        default_factory=lambda: os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or secrets.token_hex(16), repr=False
    )

    @property
    def folder(self) -> Path:
        return self.project / BOARD.parent

    @property
    def file(self) -> Path:
        return self.project / BOARD

    @property
    def url(self) -> str:
        return ports.url(self.host, self.port)

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    @property
    def mlflow_url(self) -> str:
        # Not with its password; to the last @, because one may hold a slash.
        server = re.sub(r"//\S*@", "//", self.mlflow_server or "").rstrip("/")
        return server or ports.url(self.host, self.mlflow_port)

    @property
    def mlflow_server(self) -> str | None:
        """The server that holds the project's store, if one does: it has a UI already."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        return uri if uri.startswith("http") else None

    @property
    def reports_url(self) -> str:
        return ports.url(self.host, self.reports_port)

    def log(self, name: str) -> Path:
        return self.folder / _LOGS[name]

    def environment(self) -> dict[str, str]:
        """The environment of every process that the board starts."""
        kept = {"PREFECT_HOME": str(self.folder), "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": self.url} | _QUIET | os.environ
        return kept | {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_API_AUTH_STRING": self.auth_string,
            "PREFECT_SERVER_API_AUTH_STRING": self.auth_string,
            "TOUCHLINE_PROJECT": str(self.project),
            "TOUCHLINE_MLFLOW_URL": self.mlflow_url,
            "TOUCHLINE_REPORTS_URL": self.reports_url,
            _MARK: str(self.project),
        }

    def command(self, name: str) -> list[str]:
        prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
        return {
            SERVER: [*prefect, "server", "start", "--host", self.host, "--port", str(self.port)],
            WORKER: [
                *prefect, "worker", "start", "--pool", POOL, "--type", "process", "--name", "board",
                "--install-policy", "never", "--no-create-pool-if-not-found",
            ],
            MLFLOW: [
                sys.executable, "-m", "touchline.cli", "mlflow", "--host", self.host, "--port", str(self.mlflow_port),
            ],
        }[name]  # fmt: skip

    def ask(self, method: str, path: str, body: Any = None, *, accepted: Collection[int] = ()) -> Any:
        """One request to Prefect's API; the answer's JSON, None where there is none.

        Args:
            path: after `/api`.
            accepted: statuses besides 2xx that are no error; the answer is None then.

        Raises:
            TouchlineError: it refuses, or does not answer.
        """
        until = time.monotonic() + _SECONDS_FOR_BUSY_SERVER
        login = f"Basic {base64.b64encode(self.auth_string.encode()).decode()}"
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": login}
        request = urllib.request.Request(self.api_url + path, content, headers, method=method)  # noqa: S310 - http
        while True:
            try:
                with _open(request, timeout=30) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except HTTPError as error:
                text = error.read()[:200].decode(errors="replace")
                if error.code in accepted:
                    return None
                # 503: another request has kept the database locked for longer than the server waits.
                if error.code != 503 or time.monotonic() > until:
                    raise TouchlineError(
                        f"{SERVER} answered {error.code} to {method} {path} ({text}): see {self.log(SERVER)}"
                    ) from None
            except (OSError, http.client.HTTPException) as error:
                raise TouchlineError(f"{SERVER} does not answer ({error}): see {self.log(SERVER)}") from None
            time.sleep(0.5)


# Without the proxies that the environment may name: everything asked is on this machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_PORT = {"min": 1, "max": 65535}


@app.command(help=__doc__)
def main(
    host: Annotated[str, typer.Option(help="address that everything listens on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of Prefect's server and UI", **_PORT)] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="port of MLflow's UI", **_PORT)] = 5000,
    reports_port: Annotated[int, typer.Option(help="port that reports/ is served on", **_PORT)] = 4280,
) -> None:
    # The files of the board and its servers are for this user alone.
    run(Board(Paths.here().project, host, port, mlflow_port, reports_port, os.umask(0o077)))


def run(board: Board) -> None:
    """Start everything, keep it going until Ctrl-C (or SIGTERM), and end it.

    Raises:
        TouchlineError: it cannot start, or the server ended by itself.
    """
    if not (board.project / "prefect.yaml").is_file():
        raise TouchlineError(f"{board.project} has no prefect.yaml, which says what to run when: put it back")
    with _alone(board), _ended_by_signals():
        if left := _processes(board):
            _say(f"ending what an earlier board of this project left running ({len(left)} processes)")
            _end_flow_runs(board)
            _end(_processes(board), _SECONDS_TO_END)
        for file in filter(Path.is_file, board.folder.iterdir()):
            file.chmod(0o600)
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            _check_ports(board)
            with _reports(board):
                _start(board, running)
                _tell(board)
                _keep(board, running)
        except KeyboardInterrupt:
            _say("ending: a flow run in progress is given time to end (Ctrl-C again kills it)")
        finally:
            try:
                _end_all(board, running.get(SERVER))
            except KeyboardInterrupt:
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                _kill_all(board)
            board.file.unlink(missing_ok=True)
        _say("ended")


def _tell(board: Board) -> None:
    # A file that the output goes to may be readable by others.
    login = board.auth_string if sys.stdout.isatty() else f"api_auth_string in {board.file}"
    paths = Paths.here()
    page = runs_page(paths, params.load(paths.workspace / "params.yaml").register_.name)
    _say(
        f"""
Prefect UI  {board.url}  (it asks for a password: {login})
MLflow UI   {board.mlflow_url}{page}
Reports     {board.reports_url}

Schedules are kept while this runs. Logs: {board.folder}{os.sep}*.log
Ctrl-C ends all of it; a flow run in progress is ended too, and shown as crashed."""
    )


@contextmanager
def _alone(board: Board) -> Iterator[None]:
    private_folder(board.project)
    lock = FileLock(board.folder / "board.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        where = ""
        with suppress(OSError, ValueError, KeyError, TypeError):
            where = f" at {json.loads(board.file.read_text())['api_url'].removesuffix('/api')}"
        raise TouchlineError(
            f"a board of {board.project} is running already{where}: use that one, or end it with Ctrl-C first"
        ) from None
    try:
        # Left by a board that was killed.
        board.file.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Each signal that asks to end raises KeyboardInterrupt."""
    last = -1.0

    def interrupt(*_: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        # Sent to a whole group, a signal comes twice: once more from `make`.
        if before < 0 or last - before > 1:
            raise KeyboardInterrupt

    handlers = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_ports(board: Board) -> None:
    wanted = {"--port": board.port, "--reports-port": board.reports_port}
    if not board.mlflow_server:
        wanted["--mlflow-port"] = board.mlflow_port
    if len(set(wanted.values())) < len(wanted):
        asked = ", ".join(f"{option} {port}" for option, port in wanted.items())
        raise ParamsError(f"one port is asked for twice: {asked}")
    for option, port in wanted.items():
        ports.bound(board.host, port, option).close()


class _Reports(SimpleHTTPRequestHandler):
    """Serves the files of one folder as they are now; other pages may not embed them."""

    def __init__(self, *arguments: Any, hosts: Collection[str], **options: Any) -> None:
        self._hosts = hosts
        super().__init__(*arguments, **options)

    def send_head(self) -> Any:
        if self._hosts and self.headers.get("Host") not in self._hosts:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "Unknown Host", f"This is {' or '.join(self._hosts)}.")
            return None
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Requests are not logged on the board's terminal."""


class _ReportsServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A browser that closes a connection is not reported either."""


@contextmanager
def _reports(board: Board) -> Iterator[None]:
    """Serve the reports while the block runs. The folder need not exist yet."""
    hosts = ports.trusted_hosts(board.host, board.reports_port)
    handler = partial(_Reports, directory=str(board.project / "reports"), hosts=hosts)
    with _ReportsServer((board.host, board.reports_port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True, name="reports").start()
        try:
            yield
        finally:
            server.shutdown()


def _start(board: Board, running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Start all in the order they need each other; `running` gets the processes by their names."""
    names = [SERVER] if board.mlflow_server else [SERVER, MLFLOW]
    for name in _LOGS:
        board.log(name).unlink(missing_ok=True)
    _say(f"starting {' and '.join(names)} (the first time takes half a minute)")
    for name in names:
        running[name] = _launch(board, name)
    _await(board, running, SERVER, partial(board.ask, "GET", "/health"))
    limit = {"concurrency_limit": 1}
    if not board.ask("POST", "/work_pools/", {"name": POOL, "type": "process", **limit}, accepted=[409]):
        board.ask("PATCH", f"/work_pools/{POOL}", limit)
    _give_up_lost_runs(board, "the board that ran it ended")
    _say("starting the worker and registering the deployments of prefect.yaml")
    running[WORKER] = _launch(board, WORKER)
    _deploy(board, running[SERVER])
    _await(board, running, WORKER, partial(_has_worker, board))
    if MLFLOW in running:
        _await(board, running, MLFLOW, lambda: _open(f"{board.mlflow_url}/health", timeout=30).read())
    told = {name: getattr(board, name) for name in ("api_url", "mlflow_url", "reports_url")}
    write_json(board.file, {"pid": os.getpid(), "api_auth_string": board.auth_string, **told})


def _launch(board: Board, name: str) -> subprocess.Popen[bytes]:
    with board.log(name).open("ab") as log:
        # In a session of its own: Ctrl-C is for this process, which ends the others in their order.
        return subprocess.Popen(
            board.command(name),
            cwd=board.project,
            env=board.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Flow runs make photos, models and DVC's cache, which the user may share.
            umask=board.umask if name == WORKER else -1,
        )


def _deploy(board: Board, server: "subprocess.Popen[bytes]") -> None:
    # Without TOUCHLINE_PROJECT, whose value Prefect would write into the deployments: they hold no path.
    environment = {key: value for key, value in board.environment().items() if key != "TOUCHLINE_PROJECT"}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=board.project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    if done.returncode:
        if (code := server.poll()) is not None:
            raise _ended_by_itself(board, SERVER, code)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise TouchlineError(
            f"`prefect deploy --all` failed (exit code {done.returncode}): mend prefect.yaml, or the flow it names\n"
            + "\n".join(lines[-_LINES_SHOWN:])
        )


def _await(
    board: Board, running: Mapping[str, subprocess.Popen[bytes]], name: str, is_ready: Callable[[], object]
) -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until:
        for needed in (name, SERVER):
            if (code := running[needed].poll()) is not None:
                raise _ended_by_itself(board, needed, code)
        with suppress(
            OSError, http.client.HTTPException, TouchlineError
        ):  # it does not listen yet, or answers with an error page
            if is_ready():
                return
        time.sleep(0.3)
    raise TouchlineError(f"{name} did not answer within {_SECONDS_TO_START} s: see {board.log(name)}")


def _has_worker(board: Board) -> bool:
    return any(worker["status"] == "ONLINE" for worker in board.ask("POST", f"/work_pools/{POOL}/workers/filter", {}))


def _keep(board: Board, running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Start again what ends by itself; without the server there is nothing to keep."""
    while True:
        time.sleep(0.5)
        for name, process in running.items():
            if (code := process.poll()) is None:
                continue
            if name == SERVER:
                raise _ended_by_itself(board, name, code)
            _say(f"{name} ended by itself ({_how(code)}; see {board.log(name)}): starting it again")
            if name == WORKER:
                _end_flow_runs(board)
                _give_up_lost_runs(board, "the worker that ran it ended")
            time.sleep(_SECONDS_BETWEEN_STARTS)
            running[name] = _launch(board, name)


def _ended_by_itself(board: Board, name: str, code: int) -> TouchlineError:
    lines = board.log(name).read_text(errors="replace").splitlines()
    shown = "\n".join([line for line in lines if line.strip()][-_LINES_SHOWN:])
    return TouchlineError(f"{name} ended by itself ({_how(code)}); its last lines, of {board.log(name)}:\n{shown}")


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _give_up_lost_runs(board: Board, why: str) -> None:
    """Mark as crashed the flow runs that are active for the server but have no process.

    Such a run would keep the pool's only place for ever.
    """
    alive = {process.info["environ"][_FLOW_RUN] for process in _flow_runs(board)}
    ours = {"work_pools": {"name": {"any_": [POOL]}}, "flow_runs": {"state": {"type": {"any_": _ACTIVE}}}}
    state = {"type": "CRASHED", "name": "Crashed", "message": why}
    for flow_run in board.ask("POST", "/flow_runs/filter", ours):
        if flow_run["id"] in alive:
            continue
        its_own = {"id": {"any_": [flow_run["id"]]}}
        tasks = {"flow_runs": its_own, "task_runs": {"state": {"type": {"any_": _ACTIVE}}}}
        for task_run in board.ask("POST", "/task_runs/filter", tasks):
            board.ask("POST", f"/task_runs/{task_run['id']}/set_state", {"state": state, "force": True})
        board.ask("POST", f"/flow_runs/{flow_run['id']}/set_state", {"state": state, "force": True})
        _say(f"the run {flow_run['name']} is marked as crashed: {why}")


def _end_all(board: Board, server: "subprocess.Popen[bytes] | None") -> None:
    """End what this board has started: first the flow runs, while their server still answers, then the rest."""
    # Not whether the port answers: another board's server may have it.
    is_up = server is not None and server.poll() is None
    if is_up:
        with suppress(TouchlineError):
            # Else the worker would begin the next run that waits. The next start resets the limit.
            board.ask("PATCH", f"/work_pools/{POOL}", {"concurrency_limit": 0}, accepted=[404])
    _end_flow_runs(board)
    if is_up:
        _end([process for process in _processes(board) if server is None or process.pid != server.pid], _SECONDS_TO_END)
        with suppress(TouchlineError):
            _give_up_lost_runs(board, "the board that ran it ended")
    # A worker whose server is gone would go on trying to reach it.
    _end(_processes(board), _SECONDS_TO_END if is_up else 2)
    _kill_all(board)


def _end_flow_runs(board: Board) -> None:
    """A flow run ends its stages and tells the server; the worker, told to end, would only kill it."""
    until = time.monotonic() + _SECONDS_FOR_FLOW_RUNS
    asked: set[psutil.Process] = set()
    while (found := _flow_runs(board)) and time.monotonic() < until:
        # A flow run ends the processes that it has started.
        first = {process for process in found if process.info["ppid"] not in {each.pid for each in found}}
        for process in first - asked:
            with suppress(psutil.Error):
                process.terminate()
        asked |= first
        time.sleep(0.2)
    _end(found, 0)


def _kill_all(board: Board) -> None:
    # A process that was being started during one look is seen by the next.
    for _ in range(3):
        _end(_processes(board), 0)


def _end(processes: Collection[psutil.Process], seconds: float) -> None:
    """Ask processes to end, wait, and kill those that have not."""
    for process in processes:
        with suppress(psutil.Error):
            process.terminate() if seconds else process.kill()
    _, living = psutil.wait_procs(processes, seconds or _SECONDS_TO_END)
    for process in living:
        with suppress(psutil.Error):
            process.kill()


def _processes(board: Board) -> list[psutil.Process]:
    """Every process below a board of this project, this one or an earlier one, that still runs."""
    us = {psutil.Process(), *psutil.Process().parents()}
    return [
        process
        for process in psutil.process_iter(["environ", "ppid"])
        # No environment where it may not be read.
        if (process.info["environ"] or {}).get(_MARK) == str(board.project) and process not in us
    ]


def _flow_runs(board: Board) -> list[psutil.Process]:
    """Processes of the worker's flow runs, and what those have started."""
    return [process for process in _processes(board) if _FLOW_RUN in process.info["environ"]]


def _say(line: str) -> None:
    # The terminal may be gone; ending must go on.
    with suppress(OSError):
        print(line, flush=True)


if __name__ == "__main__":
    try:
        app()
    except TouchlineError as error:
        print(f"touchline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
