"""The flows as a board runs them: asked for through Prefect's API, looked at through it, cancelled and killed.

One board for all tests, on a project that has run once. What a test changes in params.yaml is put back after it.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import boards
import networkx
import projects
import pytest
from dvc.repo import Repo
from projects import REGISTERED, STAGES

LONG = {"models.cnn.epochs": 1_000_000, "models.cnn.patience": 1_000_000}


pytestmark = pytest.mark.xdist_group("board")


@pytest.fixture
def board(shared_board):
    """A board that runs."""
    shared_board.up()
    yield shared_board
    put_params_back(shared_board)


def put_params_back(board: boards.Board) -> None:
    board.project.git("checkout", "--quiet", "--", "params.yaml")


def run_to_the_end(board: boards.Board, deployment: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask for a run and wait for its end; the flow run as the API has it."""
    flow_run = board.start_run(deployment, parameters)
    board.finished(flow_run)
    return board.ask("GET", f"/flow_runs/{flow_run}")


def tasks(board: boards.Board, flow_run: dict[str, Any], expected: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The task runs of a flow run, by the names of what they ran; the expected ones are waited for."""
    wanted = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
    found: list[dict[str, Any]] = []

    def all_told() -> bool:
        found[:] = board.ask("POST", "/task_runs/filter", wanted)
        there = {run["name"] for run in found}
        return there >= set(expected) and all(run["state"]["type"] != "RUNNING" for run in found)

    # Task runs reach the server as events, some of them after the flow run's end.
    boards.wait_for(all_told, 60)
    return {run["name"]: run for run in found}


def state_names(board: boards.Board, flow_run: dict[str, Any], expected: Collection[str] = STAGES) -> dict[str, str]:
    return {name: run["state"]["name"] for name, run in tasks(board, flow_run, expected).items()}


def artifacts(board: boards.Board, flow_run: dict[str, Any]) -> dict[str, Any]:
    wanted = {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}}
    return {found["key"]: found["data"] for found in board.ask("POST", "/artifacts/filter", wanted)}


def log_of(board: boards.Board, flow_run: dict[str, Any]) -> str:
    lines: list[str] = []
    while True:
        wanted = {"logs": {"flow_run_id": {"any_": [flow_run["id"]]}}, "offset": len(lines), "limit": 200,
                  "sort": "TIMESTAMP_ASC"}  # fmt: skip
        page = board.ask("POST", "/logs/filter", wanted)
        lines += [record["message"] for record in page]
        if len(page) < 200:
            return "\n".join(lines)


def dvcs_graph(root: Path) -> networkx.DiGraph:
    """Each stage's name, with an edge to each that it depends on."""
    with Repo(str(root)) as repo:
        return networkx.relabel_nodes(repo.index.graph, {stage: stage.name for stage in repo.index.graph})


def wait_until_at_work(board: boards.Board, stage: str) -> None:
    boards.wait_for(lambda: any(f"touchline {stage}" in command for command in board.at_work()), 180)


def cancel(board: boards.Board, flow_run: str) -> None:
    """As the UI does it."""
    board.ask("POST", f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})


def assert_is_free_and_runs(board: boards.Board) -> None:
    """Nothing is left at work, no lock is held, and the next run goes well."""
    boards.wait_for(lambda: not board.at_work(), 60)
    put_params_back(board)
    board.project.dvc("status", "ingest")
    flow_run = run_to_the_end(board, "pipeline")
    assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]


def answers(url: str) -> bool:
    with urlopen(url, timeout=60) as answer:
        return answer.status == 200


def test_with_nothing_to_do_every_stage_is_a_cached_task_with_dvcs_edges_and_the_results_are_shown(board):
    flow_run = run_to_the_end(board, "pipeline")
    assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]
    found = tasks(board, flow_run, STAGES)
    assert {name: (run["state"]["name"], run["state"]["type"]) for name, run in found.items()} == dict.fromkeys(
        STAGES, ("Cached", "COMPLETED")
    )
    names = {run["id"]: name for name, run in found.items()}
    drawn = networkx.DiGraph(
        (name, names[given["id"]])
        for name, run in found.items()
        for given in run["task_inputs"].get("wait_for", [])
        if given["input_type"] == "task_run"
    )
    graph = dvcs_graph(board.project.root)
    assert set(drawn.edges) == set(graph.edges)
    # What follows from other edges is not drawn.
    assert not [edge for edge in drawn.edges if len(list(networkx.all_simple_paths(drawn, *edge))) > 1]

    shown = artifacts(board, flow_run)
    assert set(shown) == {"photos", "validation", "learning-curves", "decision"}
    report, metrics = board.project.json("reports/validation.json"), board.project.json("reports/metrics.json")
    rows = json.loads(shown["photos"])
    counted = len((board.project.root / "data/photos.csv").read_text().splitlines()) - 1
    assert sum(row["photos"] for row in rows) == counted
    assert {row["subset"] for row in rows} >= {"train", "validation", "test"}
    assert shown["validation"].startswith("# Validation passed")
    assert all(f"| {found['name']} | {found['level']} |" in shown["validation"] for found in report["expectations"])
    assert f"({board.reports_url}/figures/learning_curves.png)" in shown["learning-curves"]
    assert (
        flow_run["name"].endswith(flow_run["state"]["message"])
        and f"{len(STAGES)} of {len(STAGES)}" in flow_run["name"]
    )
    for name, scores in metrics["models"].items():
        assert f"{name} {scores['accuracy']:.3f}" in flow_run["name"]
        assert f"| {name} | validation |" in shown["learning-curves"]
        record = board.project.json(f"models/{name}.json")
        row = rf"\| {record['run_name']} \| {scores['accuracy']:.3f} \[.*/runs/{record['run_id']}"
        assert re.search(row, shown["decision"])
    assert board.project.json("reports/registration.json")["reason"] in shown["decision"]

    pages = shown["validation"] + shown["learning-curves"] + shown["decision"]
    links = re.findall(r"\]\((http[^)]+)\)", pages)
    assert len(links) == len(metrics["models"]) + 4
    assert {link.split("/")[2] for link in links} == {
        board.mlflow_url.split("/")[2], board.reports_url.split("/")[2],
    }  # fmt: skip
    assert all(answers(link) for link in links)


@pytest.mark.slow
def test_changed_models_train_at_the_same_time_and_each_side_finds_the_other(board):
    from mlflow import MlflowClient

    project = board.project
    # Without a champion the better of the two becomes one, whatever it learned.
    MlflowClient(f"sqlite:///{project.root}/mlflow/mlflow.db").delete_registered_model_alias(REGISTERED, "champion")
    project.change({"models.cnn.dropout": 0.35, "models.transfer.strengths": [0.02]})
    project.commit("another dropout, another strength")
    flow_run = run_to_the_end(board, "pipeline", {"push": False})
    assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]

    found = tasks(board, flow_run, STAGES)
    ran = {name for name, run in found.items() if run["state"]["name"] == "Completed"}
    assert ran == {"train@cnn", "train@transfer", "evaluate", "register"}
    assert {run["state"]["name"] for name, run in found.items() if name not in ran} == {"Cached"}
    trainings = [found["train@cnn"], found["train@transfer"]]
    assert max(run["start_time"] for run in trainings) < min(run["end_time"] for run in trainings)
    assert found["evaluate"]["start_time"] > max(run["end_time"] for run in trainings)

    boards.wait_for(lambda: "epoch 1" in log_of(board, flow_run).lower(), 60)
    of_this_flow = projects.runs(project, f"tags.`touchline.prefect_flow_run` = '{flow_run['id']}'")
    run_ids = {name: project.json(f"models/{name}.json")["run_id"] for name in ("cnn", "transfer")}
    assert {run.info.run_id for run in of_this_flow} == set(run_ids.values())
    assert set(flow_run["tags"]) == {"touchline", *(f"mlflow:{name}:{run_id}" for name, run_id in run_ids.items())}

    decision = project.json("reports/registration.json")
    assert decision["promoted"] and projects.aliases(project)["champion"]

    def told() -> list[dict[str, Any]]:
        wanted = {"filter": {"event": {"name": ["touchline.champion.changed"]}}}
        return board.ask("POST", "/events/filter", wanted)["events"]

    boards.wait_for(told, 60)
    [event] = told()
    assert event["payload"]["version"] == decision["registered"]["version"]
    assert event["payload"]["model"] == decision["better_model"]
    assert flow_run["id"] in json.dumps(event["related"])
    project.commit("dvc.lock of the flow run")


@pytest.mark.slow
def test_a_validation_that_fails_is_named_nothing_after_it_runs_and_the_next_run_goes_well(board):
    board.project.change({"validate.min_per_class": 100_000})
    flow_run = run_to_the_end(board, "pipeline", {"look_for_photos": True})
    assert flow_run["state"]["type"] == "FAILED"
    found = tasks(board, flow_run, STAGES)
    assert "validate.min_per_class" in found["validate"]["state"]["message"]
    assert flow_run["state"]["message"].startswith("validate: ")
    assert "\n" not in flow_run["state"]["message"]
    assert found["ingest"]["state"]["type"] == "COMPLETED" and found["ingest"]["run_count"] == 1
    after = {name for name in STAGES if name not in ("ingest", "validate")}
    assert {found[name]["state"]["name"] for name in after} == {"NotReady"}
    assert "# Validation FAILED" in artifacts(board, flow_run)["validation"]

    assert_is_free_and_runs(board)


@pytest.mark.slow
def test_a_wrong_param_is_not_tried_again(board):
    board.project.change({"ingest.sample.per_class": -1})
    flow_run = run_to_the_end(board, "ingestion")
    assert flow_run["state"]["type"] == "FAILED"
    assert tasks(board, flow_run, ["ingest"])["ingest"]["run_count"] == 1
    assert flow_run["state"]["message"].startswith("ingest: params.yaml: ingest.sample.per_class")


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters, named",
    [
        ({"overrides": ["models.cnn.dropout=2"]}, ["models.cnn.dropout", "2"]),
        ({"model": "cnnn", "backbone": "mobilenet_v2"}, ["'cnnn'", "cnn, transfer"]),
    ],
)
def test_a_training_with_wrong_params_fails_in_one_line_before_any_task(board, parameters, named):
    flow_run = run_to_the_end(board, "training", parameters)
    assert flow_run["state"]["type"] == "FAILED"
    assert all(word in flow_run["state"]["message"] for word in named)
    assert "\n" not in flow_run["state"]["message"] and tasks(board, flow_run) == {}


def test_a_training_with_other_params_is_an_experiment_that_changes_nothing(board):
    project = board.project
    before = projects.aliases(project), (project.root / "params.yaml").read_bytes()
    flow_run = run_to_the_end(board, "training", {"model": "cnn", "epochs": 1})
    assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]
    assert state_names(board, flow_run, ["experiment"]) == {"experiment": "Completed"}
    assert flow_run["name"].startswith("training model=cnn epochs=1, 20")
    [run] = projects.runs(project, f"tags.`touchline.prefect_flow_run` = '{flow_run['id']}'")
    assert run.data.params["epochs"] == "1" and run.data.tags["touchline.dvc_experiment"]
    assert (projects.aliases(project), (project.root / "params.yaml").read_bytes()) == before
    assert project.git("status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage, changes", [("ingest", {"ingest.sample.per_class": 100_000}), ("train cnn", LONG)])
def test_cancelling_ends_the_stage_and_its_dvc_and_gives_the_locks_back(board, stage, changes):
    board.project.change(changes)
    flow_run = board.start_run("pipeline")
    wait_until_at_work(board, stage)
    cancel(board, flow_run)
    assert board.finished(flow_run)["type"] == "CANCELLED"
    assert not [run for run in tasks(board, {"id": flow_run}).values() if run["state"]["name"] == "AwaitingRetry"]
    assert_is_free_and_runs(board)


@pytest.fixture(scope="module")
def queue(shared_board):
    """What became of a long run, of a scheduled one and of two that a person asked for meanwhile, in this order."""
    board = shared_board
    board.up()
    board.project.change(LONG)
    deployment = board.deployments()["ingestion"]["id"]
    path = f"/deployments/{deployment}"
    try:
        long = board.start_run("training")
        wait_until_at_work(board, "train cnn")
        board.ask("PATCH", path, {"job_variables": {"env": {"TOUCHLINE_LATE_AFTER": "1"}}})
        soon = datetime.now(UTC) + timedelta(seconds=2)
        (planned,) = board.ask(
            "POST",
            f"{path}/schedules",
            [{"active": True, "schedule": {"interval": 7 * 86_400, "anchor_date": soon.isoformat()}}],
        )
        board.ask("POST", f"{path}/schedule", {})
        scheduled = board.scheduled("ingestion")[0]["id"]
        asked = [board.start_run("ingestion"), board.start_run("pipeline")]
        boards.wait_for(lambda: datetime.now(UTC) > soon + timedelta(seconds=5), 60)
        assert {board.state(waiting)["type"] for waiting in (scheduled, *asked)} <= {"SCHEDULED", "PENDING"}
        put_params_back(board)
        cancel(board, long)
        everything = [long, scheduled, *asked]
        for flow_run in everything:
            board.finished(flow_run)
        board.ask("DELETE", f"{path}/schedules/{planned['id']}")
        yield [board.ask("GET", f"/flow_runs/{flow_run}") for flow_run in everything]
    finally:
        board.ask("PATCH", path, {"job_variables": {}})
        put_params_back(board)


@pytest.mark.slow
def test_a_scheduled_run_that_comes_upon_another_is_cancelled_with_its_reason(queue):
    _, scheduled, *_ = queue
    assert scheduled["auto_scheduled"] and scheduled["state"]["type"] == "CANCELLED"
    assert scheduled["state"]["message"]


@pytest.mark.slow
def test_runs_that_a_person_asks_for_wait_their_turn_and_go_well(queue):
    assert [run["state"]["type"] for run in queue[2:]] == ["COMPLETED"] * 2


@pytest.mark.slow
def test_one_flow_runs_at_a_time(queue):
    in_order = sorted(queue, key=lambda run: run["start_time"])
    assert in_order[0] == queue[0]
    # Prefect counts a run no longer once it is being cancelled, so the first of the others may begin while it ends.
    for first, second in pairwise(in_order[1:]):
        assert first["end_time"] <= second["start_time"]


@pytest.mark.slow
def test_a_late_run_that_a_person_starts_again_goes_on(board, queue):
    _, scheduled, *_ = queue
    # As the UI's `Retry` does it.
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    board.ask("POST", f"/flow_runs/{scheduled['id']}/set_state", {"state": state, "force": True})
    assert board.finished(scheduled["id"])["type"] == "COMPLETED"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_run_is_given_up(board):
    board.project.change(LONG)
    flow_run = board.start_run("training")
    wait_until_at_work(board, "train cnn")
    board.process_of("worker start").kill()
    assert board.finished(flow_run)["type"] == "CRASHED"
    boards.wait_for(lambda: any("worker start" in command for command in board.processes()), 60)
    assert_is_free_and_runs(board)


@pytest.mark.slow
def test_a_flow_run_that_is_killed_takes_its_dvc_and_its_stage_with_it(board):
    board.project.change(LONG)
    flow_run = board.start_run("training")
    wait_until_at_work(board, "train cnn")
    [dvc] = [process for command, process in board.at_work().items() if "dvc --wait-for-lock repro" in command
             and "train@cnn" in command]  # fmt: skip
    dvc.parent().kill()
    assert board.finished(flow_run)["type"] == "CRASHED"
    assert_is_free_and_runs(board)


@pytest.mark.slow
def test_a_stage_that_is_killed_fails_its_run_in_one_line_and_the_next_run_goes_well(board):
    board.project.change(LONG)
    flow_run = board.start_run("training")
    wait_until_at_work(board, "train cnn")
    [stage] = [process for command, process in board.at_work().items() if "touchline train cnn" in command]
    stage.kill()
    state = board.finished(flow_run)
    assert state["type"] == "FAILED" and "\n" not in state["message"]
    # DVC hands a stage to the person's shell: bash becomes the stage, others stay above it and say 128 + 9.
    assert state["message"].startswith("train@cnn: ") and re.search(r"exited with (-9|137)$", state["message"])
    assert_is_free_and_runs(board)


@pytest.mark.slow
def test_a_flow_can_be_served_without_a_work_pool(board):
    project = board.project
    script = project.root / "serve.py"
    script.write_text(
        "from flows.pipeline import pipeline\n\n"
        "if __name__ == '__main__':\n    pipeline.serve(name='served', parameters={'push': False})\n"
    )
    # Where the board's server is, the flows read from its file.
    with subprocess.Popen([sys.executable, script.name], cwd=project.root, env=project.environment()) as served:
        try:
            boards.wait_for(lambda: "served" in board.deployments(), 120)
            flow_run = run_to_the_end(board, "served")
        finally:
            served.send_signal(signal.SIGINT)
            served.wait(60)
            script.unlink()
    assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]
    assert set(state_names(board, flow_run).values()) == {"Cached"}


@pytest.mark.slow
def test_without_a_remote_a_run_in_a_clone_is_one_line(board):
    flow_run = run_to_the_end(board, "pipeline", {"clone": True})
    assert flow_run["state"]["type"] == "FAILED"
    assert "dvc remote add" in flow_run["state"]["message"] and "\n" not in flow_run["state"]["message"]


@pytest.mark.slow
def test_a_branch_that_is_checked_out_is_refused_before_anything_runs(board):
    flow_run = run_to_the_end(board, "pipeline", {"commit_to": "main"})
    assert flow_run["state"]["type"] == "FAILED" and tasks(board, flow_run) == {}
    assert "main" in flow_run["state"]["message"]


@pytest.mark.slow
def test_a_run_in_a_clone_leaves_the_checkout_alone_and_its_results_are_where_others_find_them(board):
    project, clone = board.project, projects.Project(board.project.root / ".prefect/clone")
    project.root.parent.joinpath("remote").mkdir()
    project.dvc("remote", "add", "--default", "storage", "../remote")
    project.change({"models.transfer.strengths": [0.05]})
    project.commit("a remote, and one strength")
    project.dvc("push")
    # Somebody is in the middle of an edit.
    project.change({"split.seed": 44})
    (project.root / "README.md").write_text("half done\n")
    project.git("add", "README.md")

    def checkout() -> tuple[Any, ...]:
        files = [path for name in ("data", "models", "reports", "dvc.lock", "params.yaml")
                 for path in (project.root / name, *(project.root / name).rglob("*")) if path.is_file()]  # fmt: skip
        times = {str(path): path.stat().st_mtime_ns for path in files}
        return times, project.git("status", "--porcelain"), project.git("rev-parse", "HEAD"), project.git("branch")

    before = checkout()
    flow_run = run_to_the_end(board, "pipeline", {"clone": True, "commit_to": "results"})
    assert flow_run["state"]["type"] == "COMPLETED", flow_run["state"]
    assert state_names(board, flow_run) == dict.fromkeys(STAGES, "Cached") | {
        "train@transfer": "Completed", "evaluate": "Completed", "register": "Completed", "push": "Completed",
    }  # fmt: skip
    times, status, head, branches = checkout()
    assert (times, status, head) == before[:3]
    assert branches == before[3] + "  results\n"

    lock = (clone.root / "dvc.lock").read_text()
    assert project.git("show", "results:dvc.lock") == lock != (project.root / "dvc.lock").read_text()
    assert project.git("diff", "--name-only", "main", "results").split() == ["dvc.lock"]
    assert "up to date" in clone.dvc("push").lower()
    [run] = projects.runs(project, f"tags.`touchline.prefect_flow_run` = '{flow_run['id']}'")
    assert run.info.run_id == clone.json("models/transfer.json")["run_id"] and run.data.params["strengths"] == "0.05"
    assert not list(clone.root.glob("mlflow/*.db"))
    project.git("reset", "--quiet", "--", "README.md")
    (project.root / "README.md").unlink()
