"""What the tests share: the shipped params, changed where a test wants it, an empty project to work in, a server."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Host

from touchline.params import Params, check, load
from touchline.paths import Paths

FUZZED = "TOUCHLINE_FUZZ_CASES"  # how many cases, for test_fuzz.py
# The tests may themselves run inside a DVC stage, a flow or beside a tracking server; their projects are their own.
for variable in list(os.environ):
    others = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "MLFLOW_", "PREFECT_", "TOUCHLINE_", "DASK_")
    if variable.startswith(others) and variable != FUZZED:
        del os.environ[variable]
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

SHIPPED = Path(__file__).parents[1] / "params.yaml"


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


@pytest.fixture
def host() -> Iterator[Host]:
    """A server on loopback, empty."""
    with Host() as host:
        yield host


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests with hostile bytes tried, where they were told how much."""
    if FUZZED in os.environ:
        for outcome in ("passed", "failed"):
            for report in terminalreporter.getreports(outcome):
                if told := dict(report.user_properties).get("fuzz"):
                    terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {told}")
