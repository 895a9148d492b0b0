"""Run Prefect's server and a worker, MLflow's UI and the reports; all of them end together.

`make board` runs it. Everything listens on one address of this machine and keeps its state in the project's .prefect.
"""

import base64
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import psutil
import typer
from filelock import FileLock, Timeout

from flows import BOARD, private_folder
from touchline import tracking
from touchline.core import params, ports
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import write_json
from touchline.core.paths import Paths

POOL = "touchline"
SERVER, WORKER, MLFLOW = "Prefect's server", "the worker", "MLflow's UI"

_LOGS = {SERVER: "server.log", WORKER: "worker.log", MLFLOW: "mlflow.log"}
_QUIET = {
    # What is sold beside Prefect is no news to who runs this.
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # A run asked for in the UI begins sooner than with the worker's 10 s.
    "PREFECT_WORKER_QUERY_SECONDS": "3",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Eight processes of 0.2 GB each, for pages about language models.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONUNBUFFERED": "1",
}
# In the environment of all that a board starts, and of what that starts: whose it is, by the project's path.
_MARK = "TOUCHLINE_BOARD"
# Prefect's own, in the environment of a flow run's process.
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"
# States that take one of the pool's places.
_AT_WORK = ["PENDING", "RUNNING", "CANCELLING"]

_SECONDS_TO_START = 240
# A stage gets 20 s of it to end (see stages.py).
_SECONDS_FOR_FLOW_RUNS = 40
_SECONDS_TO_END = 10
_SECONDS_FOR_BUSY_SERVER = 60
_LONGEST_PAUSE = 60
_LINES_SHOWN = 12
# A umask: nothing for others.
_PRIVATE = 0o077
_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@dataclass(frozen=True)
class Board:
    """What is started, and where it is reached.

    Attributes:
        project: absolute path of the project.
        host: address that all of it listens on.
        auth_string: what Prefect's server asks of every client, new at each start. Without it any web page in the
            user's browser and any other user of this machine could have the worker run commands.
    """

    project: Path
    host: str
    port: int
    mlflow_port: int
    reports_port: int
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
        return self._url(self.port)

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    @property
    def mlflow_url(self) -> str:
        return _without_password(self.mlflow_server) if self.mlflow_server else self._url(self.mlflow_port)

    @property
    def mlflow_server(self) -> str | None:
        """The server that holds the project's store, where it is not in the project: its UI is there already."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        return uri if uri.startswith("http") else None

    @property
    def reports_url(self) -> str:
        return self._url(self.reports_port)

    def log(self, name: str) -> Path:
        return self.folder / _LOGS[name]

    def _url(self, port: int) -> str:
        # Who listens on every address is reached on this one.
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{port}"  # noqa: S104

    def environment(self) -> dict[str, str]:
        """Variables of all that is started here."""
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
            TouchlineError: it refused.
            OSError, http.client.HTTPException: nothing answers as HTTP.
        """
        until = time.monotonic() + _SECONDS_FOR_BUSY_SERVER
        login = {"Authorization": f"Basic {base64.b64encode(self.auth_string.encode()).decode()}"}
        while True:
            status, text = _request(urlsplit(self.api_url + path), method, body, login)
            # Its database was locked by another request for longer than it waits.
            if status != 503 or time.monotonic() > until:
                break
            time.sleep(0.5)
        if status in accepted:
            return None
        if not 200 <= status < 300:
            raise TouchlineError(
                f"{SERVER} answered {status} to {method} {path} ({text[:200].decode(errors='replace')}): "
                f"see {self.log(SERVER)}"
            )
        return json.loads(text) if text else None


def _request(
    url: SplitResult, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, url.path, content, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_PORT = {"min": 1, "max": 65535}


@app.command(help=__doc__)
def main(
    host: Annotated[str, typer.Option(help="address that everything listens on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of Prefect's server and UI", **_PORT)] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="port of MLflow's UI", **_PORT)] = 5000,
    reports_port: Annotated[int, typer.Option(help="port that reports/ is served on", **_PORT)] = 4280,
) -> None:
    run(Board(Paths.here().project, host, port, mlflow_port, reports_port))


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
            _say("ending: a flow run that is at work is given time to end (Ctrl-C again kills it)")
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
    _say(
        f"""
Prefect UI  {board.url}  (it asks for a password: {login})
MLflow UI   {board.mlflow_url}{_runs_page()}
Reports     {board.reports_url}

Schedules are kept while this runs. Logs: {board.folder}{os.sep}*.log
Ctrl-C ends all of it; a flow run that is at work is ended too, and shown as crashed."""
    )


def _runs_page() -> str:
    paths = Paths.here()
    return tracking.page(paths, params.load(paths.workspace / "params.yaml").register_.name)


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
        # One that was killed could not.
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
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((board.host, port))
            except OSError as error:
                raise TouchlineError(
                    f"{board.host}:{port} is not free ({error.strerror}): end what listens there, or choose another "
                    f"with {option}"
                ) from None


class _Reports(SimpleHTTPRequestHandler):
    """Files of one folder, as they are now; to be looked at, and not to be shown inside another page."""

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
        """A board's terminal is for what matters."""


class _ReportsServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A browser that hangs up is no news either."""


@contextmanager
def _reports(board: Board) -> Iterator[None]:
    """Serve the reports while the block runs. The folder need not be there yet."""
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
        _await(board, running, MLFLOW, lambda: _request(urlsplit(f"{board.mlflow_url}/health"))[0] == 200)
    told = {name: getattr(board, name) for name in ("api_url", "mlflow_url", "reports_url")}
    with _private_files():
        write_json(board.file, {"pid": os.getpid(), "api_auth_string": board.auth_string, **told})


@contextmanager
def _private_files() -> Iterator[None]:
    """Files made in this block are for this user alone."""
    before = os.umask(_PRIVATE)
    try:
        yield
    finally:
        os.umask(before)


def _launch(board: Board, name: str) -> subprocess.Popen[bytes]:
    with _private_files():
        log = board.log(name).open("ab")
    with log:
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
            umask=-1 if name == WORKER else _PRIVATE,
        )


def _deploy(board: Board, server: "subprocess.Popen[bytes]") -> None:
    # Without TOUCHLINE_PROJECT: Prefect would write its value into the deployments, and they are to hold no path.
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
        # Nobody listens yet, or the answer is an error page.
        with suppress(OSError, http.client.HTTPException, TouchlineError):
            if is_ready():
                return
        time.sleep(0.3)
    raise TouchlineError(f"{name} did not answer within {_SECONDS_TO_START} s: see {board.log(name)}")


def _has_worker(board: Board) -> bool:
    return any(worker["status"] == "ONLINE" for worker in board.ask("POST", f"/work_pools/{POOL}/workers/filter", {}))


def _keep(board: Board, running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Start again what ends by itself; without the server there is nothing to keep."""
    pauses = dict.fromkeys(running, 1.0)
    began = dict.fromkeys(running, time.monotonic())
    due: dict[str, float] = {}
    while True:
        time.sleep(0.5)
        now = time.monotonic()
        for name in list(running):
            if name in due:
                if now >= due[name]:
                    running[name], began[name] = _launch(board, name), now
                    del due[name]
            elif (code := running[name].poll()) is not None:
                if name == SERVER:
                    raise _ended_by_itself(board, name, code)
                pauses[name] = 1.0 if now - began[name] > _LONGEST_PAUSE else min(2 * pauses[name], _LONGEST_PAUSE)
                _say(
                    f"{name} ended by itself ({_how(code)}; see {board.log(name)}): starting it again in "
                    f"{pauses[name]:.0f} s"
                )
                if name == WORKER:
                    _end_flow_runs(board)
                    _give_up_lost_runs(board, "the worker that ran it ended")
                due[name] = now + pauses[name]


def _ended_by_itself(board: Board, name: str, code: int) -> TouchlineError:
    lines = board.log(name).read_text(errors="replace").splitlines()
    shown = "\n".join([line for line in lines if line.strip()][-_LINES_SHOWN:])
    return TouchlineError(f"{name} ended by itself ({_how(code)}); its last lines, of {board.log(name)}:\n{shown}")


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _give_up_lost_runs(board: Board, why: str) -> None:
    """Mark as crashed what the server takes to be at work on our pool though no process works on it.

    Such a run would keep the pool's only place for ever.
    """
    alive = {_variable(process, _FLOW_RUN) for process in _flow_runs(board)}
    ours = {"work_pools": {"name": {"any_": [POOL]}}, "flow_runs": {"state": {"type": {"any_": _AT_WORK}}}}
    state = {"type": "CRASHED", "name": "Crashed", "message": why}
    for flow_run in board.ask("POST", "/flow_runs/filter", ours):
        if flow_run["id"] in alive:
            continue
        its_own = {"id": {"any_": [flow_run["id"]]}}
        tasks = {"flow_runs": its_own, "task_runs": {"state": {"type": {"any_": _AT_WORK}}}}
        for task_run in board.ask("POST", "/task_runs/filter", tasks):
            board.ask("POST", f"/task_runs/{task_run['id']}/set_state", {"state": state, "force": True})
        board.ask("POST", f"/flow_runs/{flow_run['id']}/set_state", {"state": state, "force": True})
        _say(f"the run {flow_run['name']} is marked as crashed: {why}")


def _end_all(board: Board, server: "subprocess.Popen[bytes] | None") -> None:
    """End what this board has started: first the flow runs, while the server still hears them, then the rest."""
    # Another one's server may listen where ours was to.
    is_heard = server is not None and server.poll() is None
    if is_heard:
        with suppress(OSError, http.client.HTTPException, TouchlineError):
            # Else the worker would begin the next run that waits. The next start gives the place back.
            board.ask("PATCH", f"/work_pools/{POOL}", {"concurrency_limit": 0}, accepted=[404])
    _end_flow_runs(board)
    if is_heard:
        _end([process for process in _processes(board) if server is None or process.pid != server.pid], _SECONDS_TO_END)
        with suppress(OSError, http.client.HTTPException, TouchlineError):
            _give_up_lost_runs(board, "the board that ran it ended")
    # A worker without its server would try to reach it for long.
    _end(_processes(board), _SECONDS_TO_END if is_heard else 2)
    _kill_all(board)


def _end_flow_runs(board: Board) -> None:
    """A flow run ends its stages and tells the server; the worker, told to end, would only kill it."""
    until = time.monotonic() + _SECONDS_FOR_FLOW_RUNS
    asked: set[psutil.Process] = set()
    while (found := _flow_runs(board)) and time.monotonic() < until:
        # What a flow run has started is its own to end.
        first = {process for process in found if not set(_parents(process)) & set(found)}
        for process in first - asked:
            with suppress(psutil.Error):
                process.terminate()
        asked |= first
        time.sleep(0.2)
    _end(found, 0)


def _kill_all(board: Board) -> None:
    # One that was being started during the first look is there at the second.
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
    """All that a board of this project has started, directly or not, and that still runs."""
    mark = str(board.project)
    us = {psutil.Process(), *psutil.Process().parents()}
    return [process for process in psutil.process_iter() if _variable(process, _MARK) == mark and process not in us]


def _flow_runs(board: Board) -> list[psutil.Process]:
    """Processes of the worker's flow runs, and what those have started."""
    return [process for process in _processes(board) if _variable(process, _FLOW_RUN)]


def _parents(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.parents()
    return []


def _variable(process: psutil.Process, name: str) -> str | None:
    """A variable of the environment that a process was started with; None where it may not be read."""
    with suppress(psutil.Error, OSError):
        return process.environ().get(name)
    return None


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def _say(line: str) -> None:
    # The terminal may be gone; what is to be ended is ended all the same.
    with suppress(OSError):
        print(line, flush=True)


if __name__ == "__main__":
    try:
        app()
    except TouchlineError as error:
        print(f"touchline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
