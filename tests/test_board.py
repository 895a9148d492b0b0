"""The board as a person uses it: started in a project, asked by strangers, ended with Ctrl-C or worse."""

import base64
import http.client
import json
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import boards
import projects
import psutil
import pytest
from conftest import names
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

EVIL = "http://evil.example"
# Another site's page, a page whose name was pointed at this machine, and another user's program.
STRANGERS = {
    "a page": {"Origin": EVIL},
    "a rebound page": {"Origin": "http://10.evil.example:{port}", "Host": "10.evil.example:{port}"},
    "a rebound page that only reads": {"Host": "10.evil.example:{port}"},
    "another user": {},
}

pytestmark = pytest.mark.xdist_group("board")


@pytest.fixture
def board(shared_board):
    """A board that runs. A test may end it: the next one gets it started again."""
    shared_board.up()
    return shared_board


@pytest.fixture
def other(tmp_path):
    """Another project, with no board of its own."""
    return projects.make(tmp_path / "another project", git=False)


def run_board(project: projects.Project, ports: list[int], exit_code: int) -> str:
    """Run a board that cannot start; the one line it prints."""
    output = project.run(sys.executable, "-m", "flows.board", *boards.options(ports), exit_code=exit_code)
    assert output.startswith("touchline: ") and output.count("\n") == 1, output
    return output


def get(url: str, path: str = "/") -> tuple[int, str]:
    answer, text = send("GET", url, path)
    return answer.status, text


def send(
    method: str, url: str, path: str, headers: Mapping[str, str] | None = None, body: str | None = None
) -> tuple[http.client.HTTPResponse, str]:
    """One request; without a Content-Type among its headers it is one that a page may send to any server."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        headers = {name: value.format(port=connection.port) for name, value in (headers or {}).items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


def working_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def lost_run(board: boards.Board) -> str:
    """A run that the server takes to be running, and that no process works on."""
    return board.start_run("ingestion", state={"type": "RUNNING"})


def test_it_prints_where_prefect_mlflow_and_the_reports_are_and_how_it_ends(board):
    for address in (
        board.url,
        f"{board.mlflow_url}/#/experiments/",
        board.reports_url,
        f"{board.project.root}/.prefect",
        "Ctrl-C",
    ):
        boards.wait_for(lambda address=address: address in board.output, 30)
    assert "Traceback" not in board.output


def test_other_programs_find_it_by_a_file(board):
    assert board.project.json(".prefect/board.json") == {
        "pid": board.process.pid,
        "api_auth_string": board.auth_string,
        "api_url": board.api_url,
        "mlflow_url": board.mlflow_url,
        "reports_url": board.reports_url,
    }


def test_the_flows_are_deployed_with_a_description_and_a_tag_and_without_anybodys_path(board):
    deployments = board.deployments()
    assert set(deployments) == {"ingestion", "training", "pipeline", "drift", "monitor"}
    for name, deployment in deployments.items():
        assert deployment["entrypoint"] == f"flows/{name}.py:{name}"
        assert deployment["tags"] == ["touchline"] and deployment["work_pool_name"] == "touchline"
        assert deployment["description"] and not deployment["paused"]
        (step,) = deployment["pull_steps"]
        assert step == {
            "prefect.deployments.steps.set_working_directory": {"directory": "{{ $TOUCHLINE_PROJECT }}"},
        }
        assert str(board.project.root) not in json.dumps(deployment)
    assert deployments["training"]["schedules"] == []


def test_photos_are_looked_for_every_night_at_two_and_everything_runs_on_sundays_at_three(board):
    deployments = board.deployments()
    for name in ("ingestion", "pipeline"):
        (schedule,) = deployments[name]["schedules"]
        assert schedule["active"] and schedule["schedule"]["timezone"] == "UTC"
    boards.wait_for(lambda: len(board.scheduled("ingestion")) >= 2 and len(board.scheduled("pipeline")) >= 2, 120)

    nights = [datetime.fromisoformat(run["expected_start_time"]) for run in board.scheduled("ingestion")]
    assert {(night.hour, night.minute, night.utcoffset()) for night in nights} == {(2, 0, timedelta(0))}
    assert {later - earlier for earlier, later in pairwise(nights)} == {timedelta(days=1)}

    sundays = [datetime.fromisoformat(run["expected_start_time"]) for run in board.scheduled("pipeline")]
    assert {(day.strftime("%A"), day.hour, day.minute, day.utcoffset()) for day in sundays} == {
        ("Sunday", 3, 0, timedelta(0)),
    }
    assert {later - earlier for earlier, later in pairwise(sundays)} == {timedelta(weeks=1)}
    assert board.scheduled("training") == []


def test_one_flow_runs_at_a_time_and_a_worker_waits_for_it(board):
    pool = board.ask("GET", "/work_pools/touchline")
    assert pool["concurrency_limit"] == 1 and pool["type"] == "process" and not pool["is_paused"]
    assert "working_dir" in pool["base_job_template"]["variables"]["properties"]
    (worker,) = board.ask("POST", "/work_pools/touchline/workers/filter", {})
    assert worker["status"] == "ONLINE"


def test_mlflow_shows_the_projects_own_store(board):
    assert get(board.mlflow_url, "/health") == (200, "OK")
    asked = f"{board.mlflow_url}/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name={projects.REGISTERED}"
    with urlopen(asked, timeout=60) as answer:
        location = json.load(answer)["experiment"]["artifact_location"]
    assert location == (board.project.root / "mlflow/artifacts").as_uri()


def test_reports_are_served_as_they_are_now_and_nothing_outside_their_folder(board):
    page = board.project.root / "reports/a page.html"
    assert get(board.reports_url, "/a%20page.html")[0] == 404
    page.write_text("first")
    assert get(board.reports_url, "/a%20page.html") == (200, "first")
    page.write_text("second")
    assert get(board.reports_url, "/a%20page.html") == (200, "second")
    page.unlink()
    for path in ("/../params.yaml", "/..%2fparams.yaml", "/%2e%2e/params.yaml", f"/{board.project.root}/params.yaml"):
        assert get(board.reports_url, path.replace(" ", "%20").replace(";", "%3B"))[0] == 404


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("content_type", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}])
def test_prefects_server_does_nothing_for_a_stranger(board, stranger, content_type):
    headers = STRANGERS[stranger] | content_type
    for method, path, body in (
        ("POST", "/api/flows/", '{"name": "evil"}'),
        ("POST", "/api/deployments/", '{"name": "evil", "job_variables": {"command": "id"}}'),
        ("POST", f"/api/deployments/{board.deployments()['drift']['id']}/create_flow_run", "{}"),
        ("POST", "/api/block_documents/filter", '{"include_secrets": true}'),
        ("GET", "/api/admin/settings", None),
        ("GET", "/api/admin/version?/api/health", None),
    ):
        answer, text = send(method, board.url, path, headers, body)
        assert answer.status == 401 and "Access-Control-Allow-Origin" not in answer.headers, (path, text)
        login = {"Authorization": f"Basic {base64.b64encode(b'admin:pass').decode()}"}
        assert send(method, board.url, path, headers | login, body)[0].status == 401
    assert "evil" not in {flow["name"] for flow in board.ask("POST", "/flows/filter", {})}


def test_a_page_may_not_ask_whether_it_may_send_a_login(board):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, is_allowed in {EVIL: False, "null": False, "http://localhost:1": False, board.url: True}.items():
        answer, _ = send("OPTIONS", board.url, "/api/flows/", asks | {"Origin": origin})
        assert answer.getheader("Access-Control-Allow-Origin") == (origin if is_allowed else None)


@pytest.mark.parametrize(
    "path",
    [
        "events/in",
        "events/out",
        "logs/out",
        "task_runs/subscriptions/scheduled",
        "work_pools/touchline/workers/connect",
    ],
)
@pytest.mark.parametrize("stranger", [{"origin": EVIL}, {"origin": None}])
def test_prefects_websockets_refuse_clients_without_the_password(board, path, stranger):
    socket_url = f"ws://127.0.0.1:{board.ports[0]}/api/{path}"
    rebound = {"uri": f"ws://evil.example:{board.ports[0]}/api/{path}", "sock": socket.create_connection(
        ("127.0.0.1", board.ports[0]))}  # fmt: skip
    for address in ({"uri": socket_url}, rebound):
        with pytest.raises(InvalidStatus), connect(**address, **stranger, proxy=None):
            pass
    for token in (None, "admin:pass"):
        with connect(socket_url, **stranger, subprotocols=["prefect"], proxy=None) as refused:
            refused.send(json.dumps({"type": "auth", "token": token}))
            with pytest.raises(ConnectionClosed) as closed:
                refused.recv(30)
            assert closed.value.rcvd.code == 1008
    with connect(socket_url, subprotocols=["prefect"], proxy=None) as ours:
        ours.send(json.dumps({"type": "auth", "token": board.auth_string}))
        assert json.loads(ours.recv(30)) == {"type": "auth_success"}


def test_a_rebound_page_reads_nothing_of_mlflow(board):
    path = "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0"
    for host in ("10.evil.example:{port}", "192.168.evil.example", "localhost:1.evil.example", "evil.example:{port}"):
        assert send("GET", board.mlflow_url, path, {"Host": host})[0].status == 403
    for host in ("localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}"):
        assert send("GET", board.mlflow_url, path, {"Host": host})[0].status == 200


@pytest.mark.parametrize("stranger", ["a page", "a rebound page"])
@pytest.mark.parametrize("content_type", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}])
def test_a_page_changes_nothing_in_mlflow(board, stranger, content_type):
    headers = STRANGERS[stranger] | content_type
    path = "/ajax-api/2.0/mlflow/experiments/"
    assert send("POST", board.mlflow_url, f"{path}create", headers, '{"name": "evil"}')[0].status == 403
    assert send("GET", board.mlflow_url, f"{path}get-by-name?experiment_name=evil")[0].status == 404


@pytest.mark.parametrize("origin", [{}, {"Origin": "http://localhost:1"}])
def test_mlflow_has_no_assistant_that_runs_commands_and_takes_no_files(board, origin):
    assistant = "/ajax-api/3.0/mlflow/assistant"
    settings = json.dumps({"providers": {"ollama": {"selected": True, "base_url": EVIL}}})
    json_headers = origin | {"Content-Type": "application/json"}
    for method, path, body in (
        ("GET", "/config", None),
        ("PUT", "/config", settings),
        ("POST", "/message", '{"message": "hello"}'),
    ):
        assert send(method, board.mlflow_url, assistant + path, json_headers, body)[0].status == 404
    assert send("PUT", board.mlflow_url, "/api/2.0/mlflow-artifacts/artifacts/x", origin, "x")[0].status == 503
    assert not (board.project.root / "mlartifacts").exists()


def test_reports_are_shown_to_no_rebound_page_and_in_no_other_page_and_nothing_changes_them(board):
    page = board.project.root / "reports/kept.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text("kept")
    for host in ("evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""):
        answer, text = send("GET", board.reports_url, "/kept.html", {"Host": host})
        assert answer.status == 421 and "kept" not in text
    for host in ("127.0.0.1:{port}", "localhost:{port}", "[::1]:{port}"):
        answer, text = send("GET", board.reports_url, "/kept.html", {"Host": host, "Origin": EVIL})
        assert (answer.status, text) == (200, "kept")
        assert answer.getheader("Content-Security-Policy") == "frame-ancestors 'none'"
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Cross-Origin-Resource-Policy") == "same-origin"
        assert "Access-Control-Allow-Origin" not in answer.headers
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert send(method, board.reports_url, "/kept.html", STRANGERS["a page"], "evil")[0].status == 501
    assert page.read_text() == "kept"


def test_other_users_of_the_machine_cannot_read_its_files(board):
    folder = board.project.root / ".prefect"
    assert folder.stat().st_mode & 0o777 == 0o700
    rights = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.suffix != ".lock"}
    assert {"board.json", "prefect.db", "old.log", "server.log", "worker.log", "mlflow.log"} <= rights.keys()
    assert {name: mode for name, mode in rights.items() if mode != 0o600 and (folder / name).is_file()} == {}
    assert (board.project.root / "mlflow/mlflow.db").stat().st_mode & 0o777 == 0o600


def test_flow_runs_keep_the_users_umask(board):
    status = Path(f"/proc/{board.process_of('worker start').pid}/status")
    if not status.exists():
        pytest.skip("only Linux tells a process's umask")
    assert "Umask:\t0000" in status.read_text()


def test_the_password_is_shown_on_a_terminal_and_in_no_file_that_output_goes_to(board, monkeypatch):
    import flows.board

    assert board.auth_string not in board.output and ".prefect/board.json" in board.output
    monkeypatch.chdir(board.project.root)
    ours, terminals = pty.openpty()
    with open(terminals, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        told = flows.board.Board(board.project.root, "127.0.0.1", *board.ports, auth_string="the password")
        flows.board._tell(told)
    shown = b""
    with suppress(OSError), open(ours, "rb", buffering=0) as terminal:
        while b"Ctrl-C" not in shown:
            shown += terminal.read(1000)
    assert b"the password" in shown


def test_each_start_has_another_password_and_a_user_may_choose_it(monkeypatch, tmp_path):
    from flows.board import Board

    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    first, second = (Board(tmp_path, "127.0.0.1", 1, 2, 3).auth_string for _ in range(2))
    assert first != second and len(first) == 32
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:pass")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "of another server")
    environment = Board(tmp_path, "127.0.0.1", 1, 2, 3).environment()
    assert environment["PREFECT_API_AUTH_STRING"] == environment["PREFECT_SERVER_API_AUTH_STRING"] == "admin:pass"


def test_programs_beside_the_board_log_in_by_themselves(board):
    assert "drift/drift" in board.project.run(sys.executable, "-m", "flows", "deployment", "ls")


def test_elsewhere_flows_log_in_to_the_server_that_the_user_names(board, other):
    count = (
        "import flows.project; from prefect import get_client\n"
        "with get_client(sync_client=True) as client: print(len(client.read_deployments()), 'deployments')"
    )
    login = {"PREFECT_API_URL": board.api_url, "PREFECT_API_AUTH_STRING": board.auth_string}
    assert "5 deployments" in other.run(sys.executable, "-c", count, **login)


def test_beside_a_board_the_server_that_the_user_names_keeps_its_password(board):
    login = "import os, flows; print(*(os.environ.get(f'PREFECT_API_{name}') for name in ('URL', 'AUTH_STRING')))"
    ours, theirs = f"{board.api_url} {board.auth_string}", "https://prefect.example.com/api of:theirs"
    for named, expected in (
        ({}, ours),
        ({"PREFECT_API_URL": board.api_url}, ours),
        ({"PREFECT_API_URL": board.api_url, "PREFECT_API_AUTH_STRING": "of another board"}, ours),
        (dict(zip(("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"), theirs.split(), strict=True)), theirs),
    ):
        assert board.project.run(sys.executable, "-c", login, **named).strip() == expected


def test_it_listens_on_loopback_alone(board):
    everything = [psutil.Process(board.process.pid), *board.processes().values()]
    addresses = {
        (connection.laddr.ip, connection.laddr.port)
        for process in everything
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert {("127.0.0.1", port) for port in board.ports} <= addresses
    assert {ip for ip, _ in addresses} == {"127.0.0.1"}


def test_its_database_and_logs_lie_in_a_folder_that_git_leaves_alone(board):
    made = {path.name for path in (board.project.root / ".prefect").iterdir()}
    assert {"prefect.db", "server.log", "worker.log", "mlflow.log"} <= made
    assert ".prefect" not in board.project.git("status", "--porcelain")


def test_a_second_board_of_the_same_project_says_where_the_first_one_is(board):
    line = run_board(board.project, boards.free_ports(3), exit_code=1)
    assert board.url in line and str(board.project.root) in line
    assert board.process.poll() is None and (board.project.root / ".prefect/board.json").exists()


@pytest.mark.parametrize(
    "place, option",
    [
        (0, "--port"),
        pytest.param(1, "--mlflow-port", marks=pytest.mark.slow),
        pytest.param(2, "--reports-port", marks=pytest.mark.slow),
    ],
)
def test_a_port_that_is_taken_is_one_line_and_nothing_is_started(other, place, option):
    ports = boards.free_ports(3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[place]))
        taken.listen()
        line = run_board(other, ports, exit_code=1)
    assert names(line, f"127.0.0.1:{ports[place]}", option)
    assert [path.name for path in (other.root / ".prefect").iterdir() if path.suffix == ".log"] == []


def test_a_board_that_finds_another_projects_on_its_port_leaves_that_one_as_it_is(board, other):
    line = run_board(other, [board.ports[0], *boards.free_ports(2)], exit_code=1)
    assert names(line, f"127.0.0.1:{board.ports[0]}", "--port")
    assert board.ask("GET", "/work_pools/touchline")["concurrency_limit"] == 1
    assert board.process.poll() is None


def test_one_port_for_two_things_is_one_line(other):
    port, third = boards.free_ports(2)
    assert f"--port {port}" in run_board(other, [port, port, third], exit_code=2)


def test_a_project_without_prefect_yaml_is_one_line(other):
    (other.root / "prefect.yaml").unlink()
    assert "prefect.yaml" in run_board(other, boards.free_ports(3), exit_code=1)


def test_a_store_on_a_server_is_shown_where_it_is_and_without_its_password(monkeypatch, tmp_path):
    from flows.board import Board

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.com:8443/")
    board = Board(tmp_path, "127.0.0.1", 1, 2, 3)
    assert board.mlflow_url == board.environment()["TOUCHLINE_MLFLOW_URL"] == "https://mlflow.example.com:8443"


def test_whoever_has_chosen_a_place_for_prefects_files_keeps_it(monkeypatch, tmp_path):
    from flows.board import Board

    board = Board(tmp_path, "127.0.0.1", 1, 2, 3)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    assert board.environment()["PREFECT_HOME"] == str(tmp_path / ".prefect")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    assert board.environment()["PREFECT_HOME"] == str(tmp_path / "elsewhere")
    assert board.environment()["PREFECT_API_URL"] == board.api_url


@pytest.mark.slow
def test_a_worker_that_ends_by_itself_is_started_again_and_the_run_it_had_is_given_up(board):
    run, worker = lost_run(board), board.process_of("worker start")
    worker.kill()
    boards.wait_for(lambda: re.search(r"\bworker\b.*\bsignal 9\b", board.output), 60)
    boards.wait_for(lambda: any("worker start" in command for command in board.processes()), 60)
    assert board.process_of("worker start") != worker
    state = board.finished(run, 60)
    assert (state["type"], state["message"]) == ("CRASHED", "the worker that ran it ended")


@pytest.mark.slow
def test_after_a_board_that_was_killed_the_next_one_ends_what_it_left_and_gives_its_run_up(board):
    run, left = lost_run(board), list(board.processes().values())
    board.process.kill()
    board.process.wait()
    assert len(alive(left)) == len(left) > 2
    board.up()
    assert alive(left) == []
    state = board.state(run)
    assert (state["type"], state["message"]) == ("CRASHED", "the board that ran it ended")
    assert board.ask("GET", "/work_pools/touchline")["concurrency_limit"] == 1


@pytest.mark.slow
def test_ctrl_c_ends_all_it_has_started_and_nothing_else(board):
    # A run at work is ended too, and the server is told.
    run = board.start_run("ingestion")
    boards.wait_for(lambda: board.state(run)["type"] == "RUNNING", 120)
    started = board.processes()
    assert any("prefect.engine" in command or "_workspace_supervisor" in command for command in started)
    password = board.auth_string
    assert not any(password in command for command in started)
    # Of the same program, and by the same hand.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=board.project.root) as unrelated:
        try:
            assert board.down(signal.SIGINT) == 0
            assert unrelated.poll() is None
            assert alive(started.values()) == []
            assert [process.pid for process in alive(working_in(board.project.root))] == [unrelated.pid]
        finally:
            unrelated.kill()
    assert "Traceback" not in board.output
    assert not (board.project.root / ".prefect/board.json").exists()
    written = [path for path in board.project.root.rglob("*") if path.is_file()]
    assert [path for path in written if password.encode() in path.read_bytes()] == []
    # The ports are free again.
    for port in board.ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_without_its_server_the_board_ends_and_shows_the_servers_last_lines(board):
    # The run that Ctrl-C ended is not left as running.
    ended = board.ask("POST", "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["CRASHED"]}}}})
    assert any("termination signal" in run["state"]["message"] for run in ended)
    started = board.processes()
    board.process_of("server start").kill()
    assert board.process.wait(120) == 1
    [why] = [line for line in board.output.splitlines() if line.startswith("touchline: ")]
    assert names(why, "server", "signal 9")
    # The last lines of the server's own log are shown.
    last = (board.project.root / ".prefect/server.log").read_text().split("\n")
    assert [line for line in last if line.strip()][-1] in board.output and "Traceback" not in board.output
    assert alive(started.values()) == []
    assert not (board.project.root / ".prefect/board.json").exists()
