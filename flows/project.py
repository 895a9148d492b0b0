"""What every flow does round the stages: where it works, when it gives way, what it tells and leaves behind."""

import html
import inspect
import os
import re
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, refresh_global_settings_context
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed, State
from prefect.utilities.asyncutils import run_coro_as_sync

from flows import private_folder, stages
from touchline.core import params
from touchline.core.errors import ParamsError, TouchlineError, one_line
from touchline.core.files import read_json
from touchline.core.paths import Paths
from touchline.sources.received import check_for_dvc
from touchline.tracking import registered

# A scheduled run that could not begin in time came upon another one, or the board was off: it is not made up for.
_LATE_AFTER_SECONDS = float(os.environ.get("TOUCHLINE_LATE_AFTER", "120"))
# A user's name and password in an address.
_USER = r"//[^/@]*@"

if not PREFECT_API_URL.value():
    # Prefect starts a temporary server, which would answer any web page and any other user of this machine.
    os.environ |= dict.fromkeys(("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"), secrets.token_hex(16))
    refresh_global_settings_context()


def run(
    choose: Callable[[stages.Graph], Collection[str]],
    shown: Mapping[str, stages.Show],
    *,
    forced: Collection[str] = (),
    clone: bool = False,
    changes: Callable[[Path], list[str]] = lambda _: [],
    push: bool = False,
    commit_to: str | None = None,
) -> State | list[State]:
    """Run stages of this project; the states a flow is to return.

    Args:
        choose: which stages, given DVC's graph.
        shown: see `stages.run`.
        forced: stages that run even where nothing has changed.
        clone: work in a clone of the project's own.
        changes: given the workspace, params to change for this run alone, as `dvc exp run -S` takes them.
        push: `dvc push` afterwards, where a remote is configured.
        commit_to: commit dvc.lock on this branch afterwards.
    """
    if too_late := late():
        return too_late
    if commit_to:
        _check_branch(Path.cwd(), commit_to)
    # Prefect's limit lets the next run begin while one that is cancelled ends, and knows nothing of runs by hand.
    with alone(), stages.ending_with_this(), _workspace(clone) as (workspace, environment):
        if overrides := changes(workspace):
            experiment = {"experiment": _experiment(workspace, overrides, environment)}
            return _ended(experiment, "an experiment, to be compared in MLflow")
        before = _champion(workspace)
        check_for_dvc(workspace / params.load(workspace / "params.yaml").ingest.folder)
        graph = stages.read_graph(workspace)
        found = stages.run(workspace, choose(graph), graph, shown, forced, environment)
        _tell(
            workspace,
            {name for name, state in found.items() if state.is_completed() and state.name != "Cached"},
            before,
        )
        done = all(state.is_completed() for state in found.values())
        if done and (push or clone) and _has_remote(workspace):
            found["push"] = _dvc_task("push", workspace, ["push"], environment)
        if done and commit_to:
            _commit(Path.cwd(), workspace, commit_to)
        return _ended(found, _result(workspace, found))


def run_alone(*command: str) -> tuple[int, str]:
    """Run a command of `touchline` while no other flow is at work; its exit code, and why it failed if it did.

    What it says goes to the run's log.
    """
    with alone():
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    for line in (done.stdout + done.stderr).splitlines():
        get_run_logger().info("%s", line)
    why = done.stderr.strip().rpartition("\n")[2].removeprefix("touchline: ")
    return done.returncode, why or f"`{' '.join(command[:2])}` ended with exit code {done.returncode}"


def warn(event: str, verdict: str, payload: Mapping[str, Any], page: str) -> None:
    """Tell of a warning about the registered model: in the log, as an event for Automations, and as a message.

    Args:
        event: `touchline.` and its name is the event; the resource is the model.
        page: the file of reports/ that shows it.
    """
    get_run_logger().warning("%s", verdict)
    name = params.load(Path.cwd() / "params.yaml").register_.name
    emit_event(
        event=f"touchline.{event}",
        resource={"prefect.resource.id": f"touchline.registered-model.{name}", "prefect.resource.name": name},
        payload={"verdict": verdict, **payload},
    )
    notify(f"{name}: {event}", f"{verdict} {report_link(page, 'Report')}")


def run_name() -> str:
    """What a flow run is called: its flow, what was asked for, and when: `training dropout=0.3, 2026-11-26 05:21`."""
    context = FlowRunContext.get()
    assert context
    assert context.flow
    given = context.parameters or {}
    asked = []
    for name, parameter in inspect.signature(context.flow.fn).parameters.items():
        value = given.get(name, parameter.default)
        if isinstance(value, list):
            asked += [_short(change) for change in value]
        elif value != parameter.default:
            asked.append(name if value is True else f"{name}={value}")
    when = f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"
    return f"{context.flow.name} {' '.join(asked)}, {when}" if asked else f"{context.flow.name} {when}"


def _short(change: str) -> str:
    """`dropout=0.3` of `models.cnn.dropout=0.3`."""
    key, equals, value = change.partition("=")
    return key.rpartition(".")[2] + equals + value


def by_hand(flow: Callable[..., State[Any]]) -> None:
    """Run a flow from the command line; a line says why it failed, or that there is no project or no Prefect server.

    Prefect would end with a traceback of its own code.
    """
    try:
        _check_project(Path.cwd())
        params.load(Path.cwd() / "params.yaml")
        if why := no_answer(PREFECT_API_URL.value()):
            raise TouchlineError(why)
        state = flow(return_state=True)
        if not state.is_completed():
            raise TouchlineError(state.message or str(state.name))
    except TouchlineError as error:
        print(f"touchline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def no_answer(address: str | None) -> str:
    """Why a Prefect server cannot be asked, and how to run without it; empty where it answers or none is named."""
    if not address:
        return ""
    try:
        if not address.startswith(("http://", "https://")):
            raise ValueError("neither http nor https")
        urllib.request.urlopen(f"{re.sub(_USER, '//', address).rstrip('/')}/health", timeout=5).close()  # noqa: S310  # nosec B310
    except urllib.error.HTTPError:  # it answers, if only that it wants a password
        return ""
    except (OSError, ValueError) as error:
        named, without = "PREFECT_API_URL in the environment", "unset PREFECT_API_URL"
        if "PREFECT_API_URL" not in os.environ:
            named, without = "the profile of Prefect", "`prefect config unset PREFECT_API_URL`"
        shown = re.sub(_USER, "//***@", address)
        return f"no Prefect server answers at {shown}, which {named} names ({one_line(error)}): start it, or {without}"
    return ""


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other flow is at work in this project."""
    lock = FileLock(private_folder(Path.cwd()) / "flow.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        get_run_logger().info("waiting for another flow of this project to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _ended(states: Mapping[str, State], result: str) -> State | list[State]:
    """What the flow is to return: of states alone Prefect would only say how many have failed."""
    if why := stages.why_failed(states):
        return Failed(message=why)
    if not all(state.is_completed() for state in states.values()):
        return list(states.values())
    # The name is what the page of a run and the list of runs show first.
    _update_flow_run(lambda known: {"name": f"{known.name}: {result}"})
    return Completed(message=result)


def _result(workspace: Path, states: Mapping[str, State]) -> str:
    """What came of a run in a line: the champion, each model's test accuracy, and what ran."""
    found = []
    if "register" in states and states["register"].is_completed():
        models = read_json(workspace / "reports/metrics.json")["models"]
        found = [
            _champion_now(workspace),
            "test accuracy " + ", ".join(f"{name} {scores['accuracy']:.3f}" for name, scores in models.items()),
        ]
    ran = [name for name, state in states.items() if state.name != "Cached"]
    cached = len(states) - len(ran)
    return "; ".join([*found, f"ran {', '.join(ran)}" if ran else "nothing ran", f"{cached} of {len(states)} cached"])


def _update_flow_run(changes: Callable[[FlowRun], dict[str, Any]]) -> None:
    """Change what Prefect shows of this run; nothing where there is no run."""
    context = FlowRunContext.get()
    if context and context.flow_run:
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, **changes(context.flow_run))


def late() -> State | None:
    """A state to end in where a scheduled run comes too late. Runs that a person asked for wait their turn."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if not (flow_run and flow_run.auto_scheduled and flow_run.expected_start_time):
        return None
    # What has begun before was told to begin again by a person, and keeps the time of its first beginning.
    if flow_run.run_count > 1:
        return None
    late = (datetime.now(UTC) - flow_run.expected_start_time).total_seconds()
    if late <= _LATE_AFTER_SECONDS:
        return None
    return Cancelled(
        message=f"scheduled for {flow_run.expected_start_time:%Y-%m-%d %H:%M} UTC and {late:.0f} s late: another run "
        "was at work or the board was off. The next one comes by its schedule."
    )


def _experiment(workspace: Path, overrides: list[str], environment: Mapping[str, str]) -> State:
    options = [option for override in overrides for option in ("--set-param", override)]
    return _dvc_task("experiment", workspace, ["exp", "run", "--temp", *options], environment)


def _dvc_task(name: str, workspace: Path, arguments: list[str], environment: Mapping[str, str]) -> State:
    future = _run_dvc.with_options(name=name, task_run_name=name).submit(str(workspace), arguments, dict(environment))
    future.wait()
    return future.state


@task(cache_policy=NO_CACHE, persist_result=False)
def _run_dvc(workspace: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    stages.dvc(Path(workspace), *arguments, environment=environment)


def _tell(workspace: Path, ran: Collection[str], champion_before: int | None) -> None:
    """Make the flow run findable from MLflow and the other way round, and tell of a new champion."""
    trained = [name.partition("@")[2] for name in ran if name.startswith("train@")]
    tags = {f"mlflow:{name}:{read_json(workspace / f'models/{name}.json')['run_id']}" for name in trained}
    if tags:
        _update_flow_run(lambda known: {"tags": {*known.tags, *tags}})
    decision = _decision(workspace)
    if "register" in ran and decision and decision["promoted"] and _champion(workspace) != champion_before:
        _tell_of_champion(workspace, decision)


def _tell_of_champion(workspace: Path, decision: Mapping[str, Any]) -> None:
    name, version = params.load(workspace / "params.yaml").register_.name, decision["registered"]["version"]
    emit_event(
        event="touchline.champion.changed",
        resource={"prefect.resource.id": f"touchline.registered-model.{name}", "prefect.resource.name": name},
        payload={"version": version, "model": decision["better_model"], "reason": decision["reason"],
                 "before": decision["champion_before"]},
    )  # fmt: skip
    notify(f"{name}: version {version} is champion", f"{decision['reason']}. {report_link('report.html', 'Report')}")


def notify(subject: str, body: str) -> None:
    """Send a message with the Prefect block that TOUCHLINE_NOTIFY names, `slack-webhook/<name>` for example.

    A message that cannot be sent is a warning in the log: the run itself went well.
    """
    block = os.environ.get("TOUCHLINE_NOTIFY")
    if not block:
        return
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    try:
        loaded = Block.load(block)
        if not isinstance(loaded, NotificationBlock):
            raise TypeError(f"{block} is no block that sends messages")
        sent: object = loaded.notify(body, subject)
        if inspect.iscoroutine(sent):  # Prefect's own blocks send at once, but the base class is asynchronous
            run_coro_as_sync(sent)
    except Exception as error:  # each kind of block has errors of its own
        get_run_logger().warning("no message was sent with %s: %s", block, error)


def report_link(name: str, text: str) -> str:
    """Markdown: a link to a file of reports/ where the board serves it, else where it lies."""
    base = os.environ.get("TOUCHLINE_REPORTS_URL")
    return f"[{text}]({base}/{name})" if base else f"{text}: `reports/{name}`"


def mlflow_link(place: str, text: str) -> str:
    """Markdown: a link into the MLflow UI of the board, else the text alone."""
    base = os.environ.get("TOUCHLINE_MLFLOW_URL")
    return f"[{text}]({base}/#/{place})" if base else f"`{text}`"


def escaped(text: str) -> str:
    """Text of anybody's as text in Markdown, also in a table."""
    return html.escape(" ".join(str(text).split())).replace("|", "&#124;").replace("`", "&#96;").replace("[", "&#91;")


def _decision(workspace: Path) -> dict[str, Any] | None:
    path = workspace / "reports/registration.json"
    return read_json(path) if path.exists() else None


def _champion(workspace: Path) -> int | None:
    """The version that the last decision made, or left, champion."""
    decision = _decision(workspace)
    if not decision:
        return None
    return decision["registered"]["version"] if decision["promoted"] else decision["champion_before"]


def _champion_now(workspace: Path) -> str:
    """Which version is champion, in words; it may have been promoted by hand since the last decision."""
    try:
        name = params.load(workspace / "params.yaml").register_.name
        champion = registered.champion(registered.versions(Paths(workspace, Path.cwd()), name))
    except TouchlineError as error:
        return f"which version is champion is not known ({error})"
    return f"champion is version {champion.number}" if champion else "no champion"


def _has_remote(workspace: Path) -> bool:
    asked = subprocess.run(["dvc", "config", "core.remote"], cwd=workspace, capture_output=True, text=True)
    return bool(asked.stdout.strip())


def _check_project(folder: Path) -> None:
    if not (folder / "dvc.yaml").exists():
        raise TouchlineError(f"{folder} has no dvc.yaml: run flows in the project's folder")


@contextmanager
def _workspace(clone: bool) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder to work in, and what the stages there need in their environment."""
    _check_project(here := Path.cwd())
    if not clone:
        yield here, {}
        return
    folder = here / ".prefect/clone"
    _fetch_clone(here, folder)
    environment = {
        "TOUCHLINE_PROJECT": str(here),  # its MLflow store, ledger and journal are the project's
        "PYTHONPATH": str(folder / "src"),
    }
    stages.dvc(folder, "pull", "--allow-missing", environment=environment)
    yield folder, environment


def _fetch_clone(project: Path, folder: Path) -> None:
    """Bring the clone to what is committed in the project; its own dvc.lock stays until the project has another."""
    if not _has_remote(project):
        raise TouchlineError("`clone: true` needs a DVC remote to feed it: `dvc remote add --default storage <place>`")
    if not (folder / ".git").exists():
        git(project, "clone", "--quiet", str(project), str(folder))
    lock = folder / "dvc.lock"
    own = lock.read_bytes() if lock.exists() else None
    before = git(folder, "rev-parse", "HEAD")
    git(folder, "fetch", "--quiet", str(project), "HEAD")
    git(folder, "checkout", "--quiet", "--force", "--detach", "FETCH_HEAD")
    same = subprocess.run(["git", "diff", "--quiet", before, "HEAD", "--", "dvc.lock"], cwd=folder).returncode == 0
    if own is not None and same:
        lock.write_bytes(own)
    _share_config(project, folder)


def _share_config(project: Path, folder: Path) -> None:
    """Give the clone the project's remotes, also those that only this machine knows; a relative path stays right."""
    from dvc.config import Config, merge

    shared = Config(str(project / ".dvc"))
    (folder / ".dvc/config.local").unlink(missing_ok=True)
    with Config(str(folder / ".dvc")).edit("local") as local:
        for level in ("repo", "local"):
            merge(local, shared.load_one(level))


def _check_branch(project: Path, branch: str) -> None:
    """Raise what would make `_commit` fail, before hours of work."""
    git(project, "check-ref-format", "--branch", branch)
    git(project, "var", "GIT_COMMITTER_IDENT")
    if git(project, "rev-parse", "--symbolic-full-name", "HEAD") == f"refs/heads/{branch}":
        raise ParamsError(f"commit_to: {branch} is checked out in {project}: name another branch")


def _commit(project: Path, workspace: Path, branch: str) -> None:
    """Commit the workspace's dvc.lock on a branch of the project, without touching what is checked out or staged."""
    reference = f"refs/heads/{branch}"
    tip = git(project, "for-each-ref", "--format=%(objectname)", reference)
    parent = tip or git(workspace, "rev-parse", "HEAD")
    blob = git(project, "hash-object", "-w", "--", str(workspace / "dvc.lock"))
    with TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        git(project, "read-tree", parent, environment=index)
        git(project, "update-index", "--add", "--cacheinfo", f"100644,{blob},dvc.lock", environment=index)
        tree = git(project, "write-tree", environment=index)
    if tree != git(project, "rev-parse", f"{parent}^{{tree}}"):
        commit = git(project, "commit-tree", tree, "-p", parent, "-m", "dvc.lock of a flow run")
        # Refused where somebody else has moved the branch meanwhile.
        git(project, "update-ref", reference, commit, tip)


def git(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run git; its output. Raises TouchlineError with git's own words where it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | dict(environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        raise TouchlineError(f"`git {' '.join(arguments)}` in {folder} failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
