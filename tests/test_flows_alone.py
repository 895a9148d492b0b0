"""What the flows do that needs no board: params given to a run, the branch, the clone, and a flow started by hand."""

import http.client
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from uuid import uuid4

import boards
import projects
import psutil
import pytest
from conftest import names
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.states import Cancelled, Failed

from flows import project as flow_project
from flows import stages
from flows.overrides import overridden
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.paths import Paths
from touchline.tracking import registry
from touchline.tracking.runs import open_store


@pytest.fixture
def project(tmp_path):
    """A project in which nothing has run."""
    return projects.make(tmp_path / "a project; $(id)")


@pytest.fixture
def built_copy(tmp_path_factory, tmp_path):
    """A project of one's own that has run once, with an empty MLflow store."""
    return projects.copy(projects.built(tmp_path_factory).project, tmp_path / "a project; $(id)")


@pytest.fixture
def with_identity(project, monkeypatch):
    """This process has the environment that the project's programs get."""
    for name in ("PATH", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, project.environment()[name])
    for name, value in project.environment().items():
        if name.startswith("GIT_"):
            monkeypatch.setenv(name, value)


def given(project: projects.Project, *overrides: str, model="transfer", backbone=None, epochs=None) -> list[str]:
    return overridden(project.root, model, backbone, epochs, list(overrides))


def test_nothing_given_is_no_experiment(project):
    assert given(project) == []


def test_backbone_and_epochs_are_written_to_where_the_model_has_them(project):
    assert given(project, "split.seed=43", backbone="mobilenet_v2") == [
        "split.seed=43", "features.pooled.backbone=mobilenet_v2",
    ]  # fmt: skip
    assert given(project, model="cnn", epochs=1) == ["models.cnn.epochs=1"]


def test_params_are_read_and_never_written(project):
    before = (project.root / "params.yaml").read_bytes()
    given(project, "models.cnn.dropout=0.1", "models.cnn.augmentation.flip=false", model="cnn", epochs=7)
    assert (project.root / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "overrides, others, named",
    [
        (["models.cnn.dropout=2"], {}, ["models.cnn.dropout", "2"]),
        (["models.cnn.dropuot=0.2"], {}, ["'models.cnn.dropuot=0.2'"]),
        (["models.cnn.dropout"], {}, ["'models.cnn.dropout'"]),
        (["models.cnn.dropout.of=1"], {}, ["'models.cnn.dropout.of=1'"]),
        (["+models.cnn.dropout=0.2"], {}, ["'+models.cnn.dropout=0.2'"]),
        (["models.cnn.dropout=[0.1"], {}, ["'models.cnn.dropout=[0.1'"]),
        (["models.cnn.dropout=0.1,0.2"], {}, ["models.cnn.dropout", "'0.1,0.2'"]),
        ([], {"model": "cnnn", "epochs": 1}, ["'cnnn'", "cnn, transfer"]),
        ([], {"model": "cnnn", "backbone": "mobilenet_v2"}, ["'cnnn'", "cnn, transfer"]),
        ([], {"model": "cnnn"}, ["'cnnn'", "cnn, transfer"]),
        ([], {"model": "cnn", "backbone": "mobilenet_v2"}, ["models.cnn", "pixels"]),
        ([], {"model": "cnn", "epochs": 0}, ["models.cnn.epochs", "0"]),
        ([], {"epochs": 3}, ["models.transfer", "epochs"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(project, overrides, others, named):
    with pytest.raises(ParamsError) as raised:
        given(project, *overrides, **others)
    line = str(raised.value)
    assert all(word in line for word in named) and "\n" not in line, line


def test_a_wrong_value_is_told_in_the_words_of_the_command_line(project):
    with pytest.raises(ParamsError) as raised:
        given(project, "models.cnn.dropout=2")
    project.change({"models.cnn.dropout": 2})
    told = project.call("train", "cnn", exit_code=2).err.partition("params.yaml: ")[2].strip()
    assert told and str(raised.value).endswith(told)


@pytest.mark.parametrize(
    "text",
    ["a | b", "`code`", "[link](http://example.com)", "<img onerror=alert(1)>", "two\nlines", "two\rlines"],
)
def test_anybodys_text_stays_one_cell_of_a_table_without_links_or_tags(text):
    found = flow_project.escaped(text)
    assert not set("|`[<\n\r") & set(found), found


def test_plain_words_and_numbers_are_left_as_they_are():
    assert flow_project.escaped("class_a of 3 photos") == "class_a of 3 photos"
    assert flow_project.escaped(0.25) == "0.25"


def test_links_lead_to_the_board_where_there_is_one_and_else_name_the_file(monkeypatch):
    monkeypatch.delenv("TOUCHLINE_REPORTS_URL", raising=False)
    monkeypatch.delenv("TOUCHLINE_MLFLOW_URL", raising=False)
    assert flow_project.report_link("report.html", "The report") == "The report: `reports/report.html`"
    assert flow_project.mlflow_link("models/m", "m") == "`m`"
    monkeypatch.setenv("TOUCHLINE_REPORTS_URL", "http://127.0.0.1:4280")
    monkeypatch.setenv("TOUCHLINE_MLFLOW_URL", "http://127.0.0.1:5000")
    assert flow_project.report_link("report.html", "The report") == "[The report](http://127.0.0.1:4280/report.html)"
    assert flow_project.mlflow_link("models/m", "m") == "[m](http://127.0.0.1:5000/#/models/m)"


def late(seconds: float, **others):
    """What a flow run ends in that begins so many seconds after its time; None where it goes on."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.context import FlowRunContext

    expected = datetime.now(UTC) - timedelta(seconds=seconds)
    values = {"auto_scheduled": True, "run_count": 1, "expected_start_time": expected} | others
    with FlowRunContext.model_construct(flow_run=FlowRun(flow_id=uuid4(), **values)):
        return flow_project.late()


def test_a_scheduled_run_that_comes_too_late_is_cancelled_and_says_why():
    state = late(3600)
    assert state.is_cancelled()
    assert "UTC" in state.message


def test_a_scheduled_run_in_time_goes_on():
    assert late(30) is None


def test_what_a_person_asks_for_waits_its_turn_however_long():
    assert late(3600, auto_scheduled=False) is None


def test_a_scheduled_run_that_a_person_starts_again_is_not_late():
    assert late(3600, run_count=2) is None


def test_without_a_flow_run_nothing_is_late():
    assert flow_project.late() is None


def heads(project: projects.Project) -> tuple[str, ...]:
    """What a person has checked out, staged and not staged."""
    return (
        project.git("rev-parse", "HEAD"),
        project.git("symbolic-ref", "HEAD"),
        project.git("ls-files", "--stage"),
        project.git("status", "--porcelain"),
    )


@pytest.fixture
def locked(project, with_identity):
    """A project with a dvc.lock that is new, a staged change and one that is not staged."""
    (project.root / "dvc.lock").write_text("schema: '2.0'\n")
    (project.root / "README.md").write_text("mine\n")
    project.git("add", "README.md")
    project.change({"split.seed": 43})
    return project


def test_dvc_lock_goes_to_the_branch_and_nothing_else_moves(locked):
    before = heads(locked)
    flow_project._commit(locked.root, locked.root, "results/nightly")
    assert heads(locked) == before
    assert locked.git("show", "results/nightly:dvc.lock") == "schema: '2.0'\n"
    assert locked.git("diff", "--name-only", "main", "results/nightly").split() == ["dvc.lock"]
    assert locked.git("rev-parse", "results/nightly~1") == locked.git("rev-parse", "main")


def test_the_branch_grows_by_a_commit_only_where_dvc_lock_has_changed(locked):
    for _ in range(2):
        flow_project._commit(locked.root, locked.root, "results")
    (locked.root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    flow_project._commit(locked.root, locked.root, "results")
    assert locked.git("rev-list", "--count", "main..results").strip() == "2"
    assert locked.git("show", "results:dvc.lock").endswith("stages: {}\n")


def test_a_clones_dvc_lock_goes_to_the_projects_branch(locked, tmp_path):
    clone = tmp_path / "clone"
    locked.git("clone", "--quiet", str(locked.root), str(clone))
    for number in range(2):
        (clone / "dvc.lock").write_text(f"number: {number}\n")
        before = heads(locked)
        flow_project._commit(locked.root, clone, "results")
        assert heads(locked) == before
        assert locked.git("show", "results:dvc.lock") == f"number: {number}\n"
        # Somebody else goes on with the branch.
        locked.git("branch", "--force", "results", locked.git("commit-tree", "results^{tree}", "-p", "results",
                                                              "-m", "theirs").strip())  # fmt: skip
    assert locked.git("log", "--format=%s", "main..results").split("\n")[::2] == ["theirs", "theirs", ""]


@pytest.mark.parametrize("branch", ["main", "a..b", "-delete", "no spaces", ""])
def test_a_branch_that_cannot_be_committed_to_is_one_line_before_anything_runs(locked, branch):
    with pytest.raises(TouchlineError) as raised:
        flow_project._check_branch(locked.root, branch)
    assert "\n" not in str(raised.value) and (branch in str(raised.value))


def test_a_project_without_git_cannot_commit_and_says_so(tmp_path, with_identity):
    archive = projects.make(tmp_path / "archive", git=False)
    with pytest.raises(TouchlineError, match="git"):
        flow_project._check_branch(archive.root, "results")


@pytest.fixture
def remote(project):
    """A remote beside the project, named in dvc's config by a relative path."""
    folder = project.root.parent / "remote"
    folder.mkdir()
    project.dvc("remote", "add", "--default", "storage", "../remote")
    project.commit("a remote")
    return folder


def fetched(project: projects.Project) -> projects.Project:
    folder = project.root / ".prefect/clone"
    flow_project._fetch_clone(project.root, folder)
    return projects.Project(folder)


def test_without_a_remote_a_clone_is_one_line_that_says_what_to_do(project, with_identity):
    with pytest.raises(TouchlineError, match="dvc remote add --default"):
        fetched(project)
    assert not (project.root / ".prefect/clone").exists()


@pytest.mark.parametrize("where", ["committed", "known to this machine alone"])
def test_a_clone_reaches_the_remote_that_the_project_names_by_a_relative_path(project, remote, with_identity, where):
    if where != "committed":
        project.dvc("remote", "remove", "storage")
        project.dvc("remote", "add", "--local", "--default", "storage", "../remote")
        project.commit("no remote for others")
    for _ in range(2):
        clone = fetched(project)
        # DVC breaks long lines by the width of a terminal.
        assert "".join(f"storage{remote}".split()) in "".join(clone.dvc("remote", "list").split())
    assert clone.git("status", "--porcelain") == ""


def test_a_clone_is_what_is_committed_and_the_checkout_keeps_its_edits(project, remote, with_identity):
    project.change({"split.seed": 43})
    (project.root / "dvc.yaml").open("a").write("# half an edit\n")
    before = heads(project)
    clone = fetched(project)
    assert heads(project) == before
    assert "half an edit" not in (clone.root / "dvc.yaml").read_text()
    assert "seed: 42" in (clone.root / "params.yaml").read_text()
    project.commit("the edit is done")
    assert "half an edit" in (fetched(project).root / "dvc.yaml").read_text()


def test_a_clone_keeps_its_own_dvc_lock_until_the_project_commits_another(project, remote, with_identity):
    (project.root / "dvc.lock").write_text("schema: '2.0'\n")
    project.commit("a lock")
    clone = fetched(project)
    (clone.root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    project.change({"split.seed": 43})
    project.commit("a param")
    assert (fetched(project).root / "dvc.lock").read_text().endswith("stages: {}\n")
    (project.root / "dvc.lock").write_text("schema: '2.0'\n# newer\n")
    project.commit("another lock")
    assert (fetched(project).root / "dvc.lock").read_text().endswith("# newer\n")


def test_the_graph_is_dvcs_and_up_to_takes_all_that_a_stage_needs(project):
    graph = stages.read_graph(project.root)
    assert set(graph.needs) == set(projects.STAGES) == set(graph.changed)
    order = list(graph.needs)
    assert all(order.index(needed) < order.index(stage) for stage in order for needed in graph.needs[stage])
    assert set(graph.needs["evaluate"]) == {"train@cnn", "train@transfer"} and set(graph.needs["register"]) == {
        "evaluate"
    }
    assert graph.up_to("split") == {"ingest", "validate", "split"}
    assert graph.up_to("features") == {"ingest", "validate", "features@pixels", "features@pooled"}
    assert graph.up_to("register") == set(projects.STAGES)


@pytest.mark.parametrize(
    "line, code",
    [
        ("ERROR: failed to reproduce 'ingest': failed to run: touchline ingest, exited with 2", 2),
        ("ERROR: failed to reproduce 'train@cnn': failed to run: touchline train cnn, exited with -9", -9),
        ("ERROR: failed to reproduce 'train@cnn': failed to run: touchline train cnn, exited with 137", 137),
        ("ERROR: unexpected error - 'Repo' object has no attribute 'x'", 255),
    ],
)
def test_the_exit_code_of_a_stage_is_read_from_dvcs_words(line, code):
    assert stages._exit_code_of_stage(["before", line, "after"], 255) == code


def by_hand(project: projects.Project, flow: str) -> subprocess.Popen[str]:
    """`python -m flows.<flow>` with a server of its own, its output in a file."""
    beside = project.root.parent
    environment = project.environment() | {"PREFECT_HOME": str(beside / "prefect")}
    with (beside / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", f"flows.{flow}"],
            cwd=project.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def working_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder, or below it."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def asked_by_a_stranger(process: subprocess.Popen[str]) -> int:
    """What the temporary server of a flow started by hand answers to a client without its password."""
    [server] = [
        words for child in psutil.Process(process.pid).children()
        if "prefect.server.api.server:create_app" in (words := child.cmdline())
    ]  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", int(server[server.index("--port") + 1]), timeout=60)
    connection.request("POST", "/api/flows/", '{"name": "evil"}', {"Origin": "http://evil.example"})
    with closing(connection):
        return connection.getresponse().status


def test_a_flow_runs_by_hand_where_there_is_no_board(built_copy):
    process = by_hand(built_copy, "pipeline")
    assert process.wait(300) == 0, (built_copy.root.parent / "output.txt").read_text()
    output = (built_copy.root.parent / "output.txt").read_text()
    assert output.count("Finished in state Cached(") == len(projects.STAGES), output
    assert "Finished in state Completed(" in output and "Traceback" not in output
    assert not (built_copy.root / ".prefect/prefect.db").exists()
    boards.wait_for(lambda: working_in(built_copy.root) == [], 60)


def test_the_champion_named_after_a_run_is_the_one_of_now(built_copy, monkeypatch):
    store = open_store(Paths(built_copy.root, built_copy.root), projects.REGISTERED)
    monkeypatch.chdir(built_copy.root)
    last = [line for line in built_copy.call("summary").out.splitlines() if line.startswith("champion ")]
    number = registry.alias(store, projects.REGISTERED, "champion").number
    assert names(last[0], str(number)) and names(flow_project._champion_now(built_copy.root), str(number))
    # By hand, so the decision in reports/registration.json still says otherwise.
    store.client.delete_registered_model_alias(projects.REGISTERED, "champion")
    last = [line for line in built_copy.call("summary").out.splitlines() if line.startswith("champion ")]
    assert not names(last[0], str(number)) and not names(flow_project._champion_now(built_copy.root), str(number))


@pytest.mark.slow
def test_ctrl_c_ends_a_flow_started_by_hand_and_the_stage_it_was_at(built_copy):
    # Long enough to be caught at it; ingest is what would be tried again.
    built_copy.change({"ingest.sample.per_class": 100_000})
    process = by_hand(built_copy, "pipeline")
    boards.wait_for(lambda: any("touchline ingest" in line for line in working_in(built_copy.root)), 300)
    assert asked_by_a_stranger(process) == 401
    process.send_signal(signal.SIGINT)
    # Ten tries of a minute and more would take longer.
    assert process.wait(55) not in (0, None)
    output = (built_copy.root.parent / "output.txt").read_text()
    assert "AwaitingRetry" not in output, output
    boards.wait_for(lambda: working_in(built_copy.root) == [], 60)
    built_copy.dvc("status", "split")


SENT = []


class Pager(NotificationBlock):
    def notify(self, body, subject=None):
        SENT.append((subject, body))


class AsynchronousPager(NotificationBlock):
    async def notify(self, body, subject=None):
        SENT.append((subject, body))


@pytest.mark.parametrize("pager", [Pager, AsynchronousPager])
def test_a_new_champion_is_told_with_the_block_that_the_person_names(monkeypatch, pager):
    SENT.clear()
    monkeypatch.setattr(Block, "load", {"pager/club": pager()}.__getitem__)
    flow_project.notify("nobody is named", "so nothing is sent")
    monkeypatch.setenv("TOUCHLINE_NOTIFY", "pager/club")
    flow_project.notify("version 2 is champion", "it beats version 1")
    assert SENT == [("version 2 is champion", "it beats version 1")]


def test_a_message_that_cannot_be_sent_spoils_no_run(monkeypatch, caplog):
    monkeypatch.setenv("TOUCHLINE_NOTIFY", "pager/gone")
    monkeypatch.setattr(flow_project, "get_run_logger", lambda: logging.getLogger("a run"))

    def gone(name):
        raise ValueError(f"Unable to find block document named {name}")

    monkeypatch.setattr(Block, "load", gone)
    flow_project.notify("version 2 is champion", "it beats version 1")
    assert "pager/gone" in caplog.text


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/api", "http://user:secret@127.0.0.1:1/api", "localhost/api"])
def test_a_prefect_server_that_does_not_answer_is_one_line_that_names_it(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.pipeline"], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env=os.environ | {"PREFECT_API_URL": address}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "PREFECT_API_URL" in done.stderr and "secret" not in done.stderr
    assert address.rpartition("@")[2].removeprefix("http://") in done.stderr


@pytest.mark.parametrize(
    "line, instead, code, named",
    [("epochs: 16\n", "epochs: twenty\n", 2, ("models.cnn.epochs", "twenty")), (None, "", 1, ("dvc.yaml",))],
)
def test_a_flow_by_hand_that_cannot_begin_is_one_line(tmp_path, line, instead, code, named):
    root = Path(__file__).parents[1]
    if line:
        (tmp_path / "dvc.yaml").write_bytes((root / "dvc.yaml").read_bytes())
        shipped = (root / "params.yaml").read_text()
        assert line in shipped
        (tmp_path / "params.yaml").write_text(shipped.replace(line, instead))
    done = subprocess.run(
        [sys.executable, "-m", "flows.pipeline"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == code and done.stderr.count("\n") == 1 and names(done.stderr, *named), done.stderr


@pytest.mark.parametrize("state", [Failed(message="ingest: no folder"), Cancelled(message="300 s late")])
def test_a_flow_by_hand_that_fails_ends_with_the_reason_in_a_line(monkeypatch, capsys, state):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as ended:
        flow_project.by_hand(lambda return_state: state)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and names(said, state.message)


@pytest.mark.parametrize("status", [200, 401])
def test_a_prefect_server_that_answers_is_used_and_without_an_address_none_is_asked(status: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert flow_project.no_answer(f"http://127.0.0.1:{server.server_port}/api") == ""
    assert flow_project.no_answer(None) == ""
