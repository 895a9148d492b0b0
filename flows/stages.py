"""DVC's graph as Prefect tasks: a node a stage, DVC's dependencies between them, and no order of our own.

A stage is run as a person would run it, `dvc repro --single-item`, in a process of its own: what it prints is in the
run's log, and ending the flow ends it.
"""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, State
from prefect.utilities.annotations import quote

from touchline.core.errors import TouchlineError, one_line

if TYPE_CHECKING:
    from prefect.futures import PrefectFuture

# Where a second try can help: the network. A wrong param or a failed validation fails again.
RETRIED: dict[str, list[float]] = {"ingest": [60, 300, 900]}
_TIMEOUT_HOURS = 12
_LINES_SHOWN = 15
_SECONDS_TO_END = 20
_BAD_PARAMS = 2
# What DVC says to a person at a terminal.
_HINTS = (
    "To track the changes with git", "git add", "To enable auto staging", "dvc config core.autostage",
    "Use `dvc push` to send",
)  # fmt: skip
# What `touchline` prints before the line that says why it failed.
_OURS = "touchline: "
# Makes an artifact of a stage's results: called with the workspace and the stage's name.
Show = Callable[[Path, str], None]


class StageError(Exception):
    """A stage, or DVC itself, failed; the message ends in the last lines it printed.

    Attributes:
        exit_code: of the stage's command where DVC names it, else of DVC.
        line: the one that says why.
    """

    def __init__(self, message: str, exit_code: int, line: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.line = line


@dataclass(frozen=True)
class Graph:
    """What DVC says of a project.

    Attributes:
        needs: the stages each stage needs, in an order in which they can run; without those that one of them needs.
        changed: what `dvc status` says has to run. It names only stages that are changed as they stand: what depends
            on them is known once they have run.
    """

    needs: Mapping[str, Sequence[str]]
    changed: Collection[str]

    def up_to(self, *names: str) -> set[str]:
        """Stages called so (or `<name>@...`), with all they need."""
        wanted = [stage for stage in self.needs if {stage, stage.partition("@")[0]} & set(names)]
        found: set[str] = set()
        while wanted:
            stage = wanted.pop()
            found.add(stage)
            wanted += [needed for needed in self.needs[stage] if needed not in found]
        return found


def read_graph(workspace: Path) -> Graph:
    import networkx
    from dvc.repo import Repo

    with Repo(str(workspace), _wait_for_lock=True) as repo:
        graph = repo.index.graph
        # DVC's own names begin with a path where the workspace is not the current folder, as in a clone.
        names = {stage.addressing: getattr(stage, "name", None) or stage.path_in_repo for stage in graph}
        needs = {
            names[stage.addressing]: sorted(names[needed.addressing] for needed in graph.successors(stage))
            for stage in networkx.dfs_postorder_nodes(graph)
        }
        return Graph(needs, {names[address] for address in repo.status()})


def run(
    workspace: Path,
    names: Collection[str],
    graph: Graph,
    shown: Mapping[str, Show],
    forced: Collection[str] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, State]:
    """Run stages, each as soon as what it needs has run; the final state of each.

    A stage is `Cached` without a process where it has not changed and nothing it needs has run, and where DVC finds,
    looking closer, that what it needs came out the same or that it has run like this before.

    Args:
        names: of the stages; what they need and is not among them is taken as it is.
        shown: what to show of a stage's result once it is there, by the stage's name (or what stands before its @).
        forced: run even where nothing has changed.
        environment: variables the stages get besides those of this process.
    """
    futures: dict[str, PrefectFuture[bool]] = {}
    for name in (name for name in graph.needs if name in names):
        delays = RETRIED.get(name, [])
        stage = run_stage.with_options(
            name=name,
            task_run_name=name,
            retries=len(delays),
            retry_delay_seconds=delays,
            retry_condition_fn=_may_help,
        )
        needed = [futures[other] for other in graph.needs[name] if other in futures]
        futures[name] = stage.submit(  # type: ignore[call-overload]  # Prefect takes a quoted argument out of its quote
            str(workspace),
            name,
            # Results of what failed are looked for before a task has its name, what is waited for after.
            quote(needed),
            name in graph.changed,
            name in forced,
            dict(environment or {}),
            wait_for=needed,
        )
    # Here and not in the tasks, so that what waits for a stage does not wait for its picture.
    name_of = {future.task_run_id: name for name, future in futures.items()}
    for future in as_completed(list(futures.values())):
        future.wait()  # done is not yet known to be final
        _show(workspace, name_of[future.task_run_id], future.state, shown)
    return {name: future.state for name, future in futures.items()}


@task(cache_policy=NO_CACHE, persist_result=False)
def run_stage(
    workspace: str,
    name: str,
    needed: "list[PrefectFuture[bool]]",
    changed: bool,
    forced: bool,
    environment: Mapping[str, str],
) -> State:
    """Run one stage; the result is whether it, or something it needs, ran in this flow."""
    before = any(future.result() for future in needed)
    if not (changed or forced or before):
        return Completed(name="Cached", message="nothing it depends on has changed", data=False)
    options = ["--single-item", *(["--force"] if forced else [])]
    began = time.monotonic()
    lines = dvc(Path(workspace), "repro", *options, name, environment=environment)
    if any(line.startswith(f"Stage '{name}' didn't change, skipping") for line in lines):
        return Completed(name="Cached", message="what it depends on came out the same", data=before)
    if any(line.startswith(f"Stage '{name}' is cached") for line in lines):
        return Completed(name="Cached", message="its result was there, of an earlier run like this one", data=True)
    return Completed(message=f"{name} ran in {time.monotonic() - began:.2f} s", data=True)


def _show(workspace: Path, name: str, state: State, shown: Mapping[str, Show]) -> None:
    show = shown.get(name.partition("@")[0])
    if not show or state.is_pending():  # something it needs has failed
        return
    try:
        show(workspace, name)
    except (TouchlineError, OSError, KeyError) as error:
        # Where a stage failed, what it shows may be there (a validation has written its report) or not. Otherwise it is
        # worth a word, and no reason to end the stages that are running.
        if state.is_completed():
            get_run_logger().warning("nothing to show of %s: %s", name, error)


def dvc(workspace: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Run `dvc` until it ends, its output in the run's log as it comes; the last lines of it.

    Raises:
        StageError: it failed, or took longer than `_TIMEOUT_HOURS`.
    """
    logger = get_run_logger()
    # In a group of its own, so that all it starts can be ended with it.
    process = subprocess.Popen(
        ["dvc", "--wait-for-lock", *arguments],
        cwd=workspace,
        env=os.environ | _environment() | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _processes.add(process)
    too_long = threading.Event()

    def give_up() -> None:
        too_long.set()
        _end([process])

    timer = threading.Timer(_TIMEOUT_HOURS * 3600, give_up)
    timer.start()
    last: deque[str] = deque(maxlen=200)
    try:
        if _ending.is_set():
            line = f"`dvc {' '.join(arguments)}` was not begun: the run is ending"
            raise StageError(line, -signal.SIGTERM, line)
        assert process.stdout
        for line in map(str.rstrip, process.stdout):
            if line and not line.lstrip().startswith(_HINTS):
                last.append(line)
                logger.info("%s", line)
        exit_code = process.wait()
    except BaseException:
        _end([process])
        raise
    finally:
        timer.cancel()
        _processes.discard(process)
    if exit_code:
        shown = "\n".join(list(last)[-_LINES_SHOWN:])
        why = f"took more than {_TIMEOUT_HOURS} hours" if too_long.is_set() else f"exit code {exit_code}"
        told = [line.removeprefix(_OURS) for line in last if line.startswith(_OURS)]
        raise StageError(
            f"`dvc {' '.join(arguments)}` failed ({why}):\n{shown}",
            _exit_code_of_stage(last, exit_code),
            told[-1] if told and not too_long.is_set() else last[-1] if last else why,
        )
    return list(last)


def why_failed(states: Mapping[str, State]) -> str:
    """One line that names what failed and says why; empty where nothing did."""
    errors = {
        name: state.result(raise_on_failure=False)
        for name, state in states.items()
        if state.is_failed() or state.is_crashed()
    }
    return "; ".join(
        f"{name}: {error.line if isinstance(error, StageError) else one_line(error, 1000)}"
        for name, error in errors.items()
    )


# The dvc processes of this flow run, and whether it is ending: then none is begun, and none tried again.
_processes: set["subprocess.Popen[str]"] = set()
_ending = threading.Event()


@contextmanager
def ending_with_this() -> Iterator[None]:
    """Whatever ends the block early (cancellation comes as an exception) ends what `dvc` has running."""
    _ending.clear()
    try:
        yield
    except BaseException:
        _ending.set()
        _end(list(_processes))
        raise


def _end(processes: Collection["subprocess.Popen[str]"]) -> None:
    """Ask each dvc and all it started to end, as Ctrl-C does: so DVC gives its lock back; then insist."""
    started = {child for process in processes for child in _children(process.pid)}
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
    # All at once: Prefect kills a run that takes more than 30 s to end.
    until = time.monotonic() + _SECONDS_TO_END
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
    for child in started.union(*(_children(process.pid) for process in processes)):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    for process in processes:
        process.kill()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _environment() -> dict[str, str]:
    # A stage ends by itself when the process of this number is gone, even where that was killed with -9.
    return {
        "TOUCHLINE_PARENT": str(os.getpid()),
        "TOUCHLINE_FLOW_RUN": str(flow_run.id or ""),
        "PYTHONUNBUFFERED": "1",
    }


def _exit_code_of_stage(lines: Collection[str], otherwise: int) -> int:
    for line in reversed(list(lines)):
        if "exited with " in line:
            number = line.rpartition("exited with ")[2].strip(" '.")
            return int(number) if number.lstrip("-").isdigit() else otherwise
    return otherwise


def _may_help(_: Any, __: Any, state: State) -> bool:
    """A wrong param is wrong again, and a run that is ending is not to begin anew."""
    if _ending.is_set():
        return False
    error = state.result(raise_on_failure=False)
    return not (isinstance(error, StageError) and error.exit_code == _BAD_PARAMS)
