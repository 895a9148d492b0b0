"""The servers of a team on loopback, on real engines: PostgreSQL, S3 (moto's server), MLflow and Prefect on both.

with team.Team() as servers:
    servers.start_mlflow()
    project.dvc("repro", **servers.environment())

`python tests/team.py` starts all of them until Ctrl-C. State lies in a temporary folder, and goes with it.
"""

import base64
import http.client
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from boards import free_ports, wait_for

BUCKET = "touchline"
_PASSWORD, _LOGIN = "of-postgresql", "of:prefect"
_KEYS = {"AWS_ACCESS_KEY_ID": "team", "AWS_SECRET_ACCESS_KEY": "of-the-s3-server", "AWS_DEFAULT_REGION": "us-east-1"}
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}


def why_not() -> str:
    """What the servers want and this machine has not; empty where it has all."""
    missing = [name for name in ("moto", "flask", "boto3", "dvc_s3", "psycopg2", "asyncpg") if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if _postgres_programs() is None:
        return "PostgreSQL's initdb and postgres are neither on the PATH nor in /usr/lib/postgresql"
    if os.getuid() == 0 and _postgres_user() is None:
        return "PostgreSQL does not run as root, and there is no user `postgres` to run it as"
    return ""


class Team:
    """What a team shares. Made empty; each `start_*` starts what it needs; the end of the block ends all.

    Attributes:
        folder: logs, and PostgreSQL's data.
        mlflow_url: of the tracking server, once it was started.
        prefect_url: of Prefect's server, once it was started; its API is below `/api`.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._ports = dict(zip(("postgres", "s3", "mlflow", "prefect"), free_ports(4), strict=True))
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Team":
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="touchline-team-")))
        # PostgreSQL's user goes through it.
        self.folder.chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._running)):
            self.kill(name, signal.SIGINT if name == "postgres" else signal.SIGKILL)
        self._stack.close()

    @property
    def mlflow_url(self) -> str:
        return self._url("mlflow")

    @property
    def prefect_url(self) -> str:
        return self._url("prefect")

    @property
    def s3_url(self) -> str:
        return self._url("s3")

    def environment(self) -> dict[str, str]:
        """What a person of the team has in the environment."""
        named = {"mlflow": {"MLFLOW_TRACKING_URI": self.mlflow_url},
                 "prefect": {"PREFECT_API_URL": f"{self.prefect_url}/api",
                             "PREFECT_API_AUTH_STRING": _LOGIN}}  # fmt: skip
        return _KEYS | {key: value for name in self._running for key, value in named.get(name, {}).items()}

    def database(self, name: str, driver: str) -> str:
        """URI of one of PostgreSQL's databases, password and all."""
        return f"postgresql+{driver}://team:{_PASSWORD}@127.0.0.1:{self._ports['postgres']}/{name}"

    def rows(self, name: str, statement: str) -> list[tuple]:
        """What one of PostgreSQL's databases answers to a statement of SQL."""
        import psycopg2

        with closing(psycopg2.connect(self.database(name, "x").replace("+x", ""))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []

    def add_remote(self, dvc: Callable[..., object], folder: str) -> None:
        """Make a folder of the bucket the default remote of the project whose `dvc` this is; no secret is written."""
        dvc("remote", "add", "--default", "team", f"s3://{BUCKET}/{folder}")
        dvc("remote", "modify", "team", "endpointurl", self.s3_url)

    def start_postgres(self) -> None:
        programs, user = _postgres_programs(), _postgres_user() if os.getuid() == 0 else None
        data, secret = self.folder / "postgres", self.folder / "postgres-password"
        data.mkdir()
        secret.write_text(_PASSWORD)
        secret.chmod(0o600)
        if user:
            for path in (data, secret):
                shutil.chown(path, user, pwd.getpwnam(user).pw_gid)
        subprocess.run(
            [programs / "initdb", "--pgdata", data, "--username", "team", "--pwfile", secret, "--auth", "scram-sha-256",
             "--encoding", "UTF8", "--no-sync"],
            **_as(user), check=True, capture_output=True,
        )  # fmt: skip
        # Nothing here outlives the machine, so nothing waits for the disk.
        command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", self._port("postgres"), "-k", data,
                   "-c", "fsync=off", "-c", "max_connections=200"]  # fmt: skip
        self._start("postgres", command, **_as(user))
        import psycopg2

        def ready() -> bool:
            with suppress(psycopg2.OperationalError):
                return self.rows("postgres", "SELECT 1") == [(1,)]
            return False

        self._await("postgres", ready)
        for name in ("mlflow", "prefect"):
            self.rows("postgres", f"CREATE DATABASE {name}")

    def start_s3(self) -> None:
        self._start("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self._port("s3")])
        import boto3

        self._await("s3", lambda: _status(self.s3_url, "/moto-api/") == 200)
        keys = {key.lower(): value for key, value in _KEYS.items() if key != "AWS_DEFAULT_REGION"}
        boto3.client("s3", endpoint_url=self.s3_url, region_name="us-east-1", **keys).create_bucket(Bucket=BUCKET)

    def start_mlflow(self) -> None:
        """Start the tracking server, again where it was killed; it keeps all in PostgreSQL and S3."""
        for needed in ("postgres", "s3"):
            if needed not in self._running:
                getattr(self, f"start_{needed}")()
        # The database's password is in the environment: a command line is there for all to read.
        environment = _KEYS | {
            "MLFLOW_BACKEND_STORE_URI": self.database("mlflow", "psycopg2"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
            "MLFLOW_S3_ENDPOINT_URL": self.s3_url,
        }
        command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts", "--workers", "2",
                   "--host", "127.0.0.1", "--port", self._port("mlflow"),
                   "--gunicorn-opts", "--threads 8 --timeout 0"]  # fmt: skip
        self._start("mlflow", command, environment)
        self._await("mlflow", lambda: _status(self.mlflow_url, "/health") == 200)

    def start_prefect(self) -> None:
        if "postgres" not in self._running:
            self.start_postgres()
        environment = {
            "PREFECT_API_DATABASE_CONNECTION_URL": self.database("prefect", "asyncpg"),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": _LOGIN,
        }
        command = [sys.executable, "-m", "prefect", "--no-prompt", "server", "start",
                   "--host", "127.0.0.1", "--port", self._port("prefect")]  # fmt: skip
        self._start("prefect", command, environment)
        self._await("prefect", lambda: _status(self.prefect_url, "/api/health") == 200)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a server and all that it started."""
        process = self._running.pop(name)
        with suppress(psutil.NoSuchProcess):
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            # PostgreSQL's own processes are its affair, as long as it ends in an orderly way.
            for each in tree if number != signal.SIGINT else tree[:1]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(number)
            _, alive = psutil.wait_procs(tree, timeout=20)
            for each in alive:
                each.kill()
        process.wait(20)

    def log(self, name: str) -> str:
        """What a server has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _port(self, name: str) -> str:
        return str(self._ports[name])

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._port(name)}"

    def _start(self, name: str, command: list, environment: dict[str, str] | None = None, **options: object) -> None:
        others = ("MLFLOW_", "PREFECT_", "AWS_", "DVC_")
        own = {key: value for key, value in os.environ.items() if not key.startswith(others)}
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=own | _QUIET | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    def _await(self, name: str, is_so: Callable[[], bool]) -> None:
        process = self._running[name]
        with suppress(AssertionError):
            wait_for(lambda: process.poll() is not None or is_so(), 240)
            if process.poll() is None:
                return
        raise AssertionError(f"{name} did not start:\n{self.log(name)}")


class Gate:
    """A server before a tracking server: it asks for a name and a password, and lets a test meddle with calls.

    Attributes:
        url: where it listens.
        before: asked about each call ("POST /api/2.0/mlflow/runs/create"), which waits for it; True hangs up on it.
        after: likewise, once the server behind has done it.
    """

    def __init__(self, behind: str, user: str = "", password: str = "") -> None:
        self.before: Callable[[str], bool] = lambda call: False
        self.after: Callable[[str], bool] = lambda call: False
        self._address = behind.removeprefix("http://")
        self._wanted = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}" if user else None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Passing, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Gate":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> tuple[int, str, bytes] | None:
        """Status, content type and content for a request; None to hang up."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if self._wanted and request.headers.get("Authorization") != self._wanted:
            return 401, "application/json", b'{"error_code": "PERMISSION_DENIED", "message": "who are you?"}'
        call = f"{request.command} {request.path.partition('?')[0]}"
        if self.before(call):
            return None
        skipped = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}
        headers = {key: value for key, value in request.headers.items() if key.lower() not in skipped}
        connection = http.client.HTTPConnection(self._address, timeout=60)
        try:
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            found = answer.status, answer.getheader("Content-Type", ""), answer.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return None if self.after(call) else found


class _Passing(BaseHTTPRequestHandler):
    """The requests of a gate."""

    protocol_version = "HTTP/1.1"

    def __init__(self, gate: Gate, *arguments: Any) -> None:
        self._gate = gate
        super().__init__(*arguments)

    def pass_on(self) -> None:
        found = self._gate.answer(self)
        if found is None:
            self.close_connection = True
            return
        status, kind, content = found
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815

    def log_message(self, *_: object) -> None:
        """The test knows what it asked for."""


def _status(url: str, path: str) -> int:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except http.client.HTTPException:
        return 0
    finally:
        connection.close()


def _postgres_programs() -> Path | None:
    """The folder with PostgreSQL's server programs, which Debian keeps off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if all((each / name).exists() for name in ("initdb", "postgres"))), None)


def _postgres_user() -> str | None:
    with suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return None


def _as(user: str | None) -> dict[str, object]:
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def main() -> None:
    """Start everything, say how to use it, and wait for Ctrl-C."""
    if why := why_not():
        sys.exit(f"team: {why}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Team() as team:
        print("starting PostgreSQL, S3, MLflow and Prefect (half a minute)", flush=True)
        team.start_mlflow()
        team.start_prefect()
        for key, value in team.environment().items():
            print(f"export {key}={value}")
        print(f"dvc remote add --local --default team s3://{BUCKET}/dvc")
        print(f"dvc remote modify --local team endpointurl {team.s3_url}")
        print(f"Logs: {team.folder}. Ctrl-C ends all of it.", flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)


if __name__ == "__main__":
    main()
