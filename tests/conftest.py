"""What the tests share: the shipped params, changed where a test wants it, an empty project to work in, a server."""

import atexit
import json
import os
import re
import shutil
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boards
import projects
import pytest
from servers import Host

from touchline.core.params import Params, check, load
from touchline.core.paths import Paths

# How many cases test_fuzz.py tries, how often test_pipeline_killed.py kills; whether a table ends the tests.
FUZZED, KILLS, FAULTS = "TOUCHLINE_FUZZ_CASES", "TOUCHLINE_KILLS", "TOUCHLINE_FAULTS"
# The tests may themselves run inside a DVC stage, a flow or beside a tracking server; their projects are their own.
for variable in list(os.environ):
    others = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "MLFLOW_", "PREFECT_", "TOUCHLINE_", "DASK_")
    cache = variable == "TOUCHLINE_CACHE" and "PYTEST_XDIST_WORKER" in os.environ
    if variable.startswith(others) and variable not in {FUZZED, KILLS, FAULTS} and not cache:
        del os.environ[variable]
# Network files made on first use are those of this run of the tests; its workers share them.
if not os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["TOUCHLINE_CACHE"] = tempfile.mkdtemp(prefix="touchline-tests-")
    atexit.register(shutil.rmtree, os.environ["TOUCHLINE_CACHE"], ignore_errors=True)
# Who starts the tests in the background of a shell has them, and all they start, deaf to Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As the command line and the Makefile set it: nothing calls home, and TensorFlow's start-up notes are no news.
os.environ |= {
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Groups of tests that take long, in the order in which they begin; the three after the board need no shared project.
FIRST = (
    "board", "test_train", "test_tune", "test_backbones", "test_readme", "test_export", "test_serve", "test_app",
    "test_faults", "test_security", "test_parallel", "test_tracking", "test_flows_alone", "test_pipeline",
    "test_pipeline_elsewhere", "test_team", "test_report", "test_audit", "test_load", "test_mlflow_page", "test_clean",
)  # fmt: skip

SHIPPED = Path(__file__).parents[1] / "params.yaml"


def names(message: str, *things: str) -> bool:
    """Whether a message holds each of these keys, files, numbers and the like, as whole words; its wording is free."""
    return all(re.search(rf"(?<![\w.]){re.escape(thing)}(?!\w|\.\d)", message) for thing in things)


def shipped_values() -> dict[str, Any]:
    return load(SHIPPED).model_dump(mode="json", by_alias=True, exclude_unset=True)


@pytest.fixture
def shipped() -> dict[str, Any]:
    """The shipped params.yaml as plain values, a test's own to change."""
    return shipped_values()


@pytest.fixture(scope="session")
def params_with() -> Callable[..., Params]:
    """The shipped params with some values changed: `params_with(split={"seed": 7})`.

    Of `features` and `models` the entries given are the only ones; of any other section the rest stays as shipped.
    """

    def changed(**sections: Any) -> Params:
        values = shipped_values()
        for name, value in sections.items():
            whole = name in {"classes", "features", "models"}
            values[name] = value if whole else {**values[name], **value}
        return check(values)

    return changed


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """An empty project, in a folder whose name a shell would tear apart."""
    root = tmp_path / "a project; $(id)"
    root.mkdir()
    return Paths(root, root)


@pytest.fixture(scope="session")
def shared_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[boards.Board]:
    """The board of all tests that need a Prefect server, of a project that has run once; `up` starts it.

    Tests that use it are of the group `board`, so that one worker has it.
    """
    root = tmp_path_factory.mktemp("a board; $(id)") / "the project"
    board = boards.Board(projects.copy(projects.built(tmp_path_factory).project, root))
    # As a board from before has left them: for all to read.
    for name in ("prefect.db", "old.log"):
        file = root / ".prefect" / name
        file.parent.mkdir(exist_ok=True)
        file.touch(0o666)
    yield board
    board.down()


@pytest.fixture
def host() -> Iterator[Host]:
    """A server on loopback, empty."""
    with Host() as host:
        yield host


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): known without pytest-xdist too (`-p no:xdist`)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, the tests of a file go to one, for its fixtures, unless a mark puts them with others.

    Groups are handed out in this order: one worker builds the shared project for the board's tests while another one
    does without it; then comes what is long, and what is short evens out the end.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    ranks = {group: rank for rank, group in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.get_closest_marker("xdist_group").args[0], len(FIRST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tried and what came of it, told by the tests with `record_property`, where `make faults` runs them."""
    if not {FUZZED, FAULTS} & set(os.environ):
        return
    # Of the end of each test, when fixtures have told theirs as well; how the test itself ended is another report's.
    reports = [report for kind in ("", "error") for report in terminalreporter.getreports(kind)]
    told = [
        (report, key, value) for report in reports if report.when == "teardown" for key, value in report.user_properties
    ]
    failed = {report.nodeid for kind in ("failed", "error") for report in terminalreporter.getreports(kind)}
    kills = [json.loads(value) for _, key, value in told if key == "kills"]
    if kills:
        # Medians of the seconds of a `dvc repro` (or flow run) that has a stage to make: after kills, and where nothing
        # disturbed it, which flow runs are not timed for.
        rows = [("kills", "by signal", "losses", "seconds after", "undisturbed")]
        for stage in dict.fromkeys(kill["stage"] for kill in kills):
            of_stage = [kill for kill in kills if kill["stage"] == stage]
            number = ", ".join(f"{kill['signal']} {kill['kills']}" for kill in of_stage)
            after = median(seconds for kill in of_stage for seconds in kill["recovered"])
            before = median(kill["undisturbed"] for kill in of_stage if "undisturbed" in kill)
            rows.append((stage, number, str(sum(kill["losses"] for kill in of_stage)), after, before))
        rows.append(("all", *(str(sum(kill[key] for kill in kills)) for key in ("kills", "losses")), "", ""))
        write_rows(terminalreporter, rows)
    faults = [
        (*value.split(": ", 1), "failed" if report.nodeid in failed else "passed")
        for report, key, value in told
        if key == "fault"
    ]
    if faults:
        write_rows(terminalreporter, [("fault", "what happened", "test"), *sorted(faults)])
    if cases := [
        (report.nodeid.rpartition("::")[2].removesuffix("@test_fuzz"), str(value))
        for report, key, value in told
        if key == "fuzz"
    ]:
        write_rows(terminalreporter, [("hostile bytes", "cases"), *cases])


def median(seconds: Iterable[float]) -> str:
    known = list(seconds)
    return f"{statistics.median(known):.1f}" if known else "-"


def write_rows(reporter: pytest.TerminalReporter, rows: list[tuple[str, ...]]) -> None:
    """A table, its first row the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    reporter.write_line("")
    for row in rows:
        reporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
