"""The board as a person uses it: started in a project, looked at in a browser, ended with Ctrl-C or worse."""

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import boards
import projects
import psutil
import pytest

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
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
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
    ):
        assert address in board.output
    assert "Ctrl-C" in board.output and "Traceback" not in board.output


def test_other_programs_find_it_by_a_file(board):
    assert board.project.json(".prefect/board.json") == {
        "pid": board.process.pid,
        "api_url": board.api_url,
        "mlflow_url": board.mlflow_url,
        "reports_url": board.reports_url,
    }


def test_the_flows_are_deployed_with_a_description_and_a_tag_and_without_anybodys_path(board):
    deployments = board.deployments()
    assert set(deployments) == {"ingestion", "training", "pipeline", "drift"}
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
    assert "running already" in line and board.url in line and str(board.project.root) in line
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
    assert f"127.0.0.1:{ports[place]} is not free" in line and line.rstrip().endswith(f" {option}")
    assert [path.name for path in (other.root / ".prefect").iterdir() if path.suffix == ".log"] == []


def test_a_board_that_finds_another_projects_on_its_port_leaves_that_one_as_it_is(board, other):
    line = run_board(other, [board.ports[0], *boards.free_ports(2)], exit_code=1)
    assert f"127.0.0.1:{board.ports[0]} is not free" in line
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
    boards.wait_for(lambda: "the worker ended by itself (signal 9" in board.output, 60)
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
    assert "an earlier board of this project left running" in board.output
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
    # Of the same program, and by the same hand.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=board.project.root) as unrelated:
        try:
            assert board.down(signal.SIGINT) == 0
            assert unrelated.poll() is None
            assert alive(started.values()) == []
            assert [process.pid for process in alive(working_in(board.project.root))] == [unrelated.pid]
        finally:
            unrelated.kill()
    assert board.output.rstrip().endswith("ended") and "Traceback" not in board.output
    assert not (board.project.root / ".prefect/board.json").exists()
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
    assert "touchline: Prefect's server ended by itself (signal 9)" in board.output
    assert f"Check out the dashboard at {board.url}" in board.output and "Traceback" not in board.output
    assert alive(started.values()) == []
    assert not (board.project.root / ".prefect/board.json").exists()
