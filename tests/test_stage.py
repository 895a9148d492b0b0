"""One process a stage, and none that outlives the DVC that started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import psutil
import pytest
from conftest import names

from touchline.core import stage
from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths

# A stage that says who it is and then works for longer than any test waits.
STAGE = """
import os, sys, time
from pathlib import Path
from touchline.core import stage
from touchline.core.paths import Paths
root = Path(sys.argv[1])
with stage.running(Paths(root, root), "train@cnn"):
    (root / "pid").write_text(str(os.getpid()))
    (root / "pid").rename(root / "started")
    time.sleep(60)
"""
# As DVC does it: a shell runs the stage's command. The `;` keeps the shell from becoming the command.
DVC = """
import subprocess, sys
subprocess.run(["/bin/sh", "-c", f'"{sys.executable}" "$0" "$1"; true', *sys.argv[1:]])
"""


def wait_for(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def start_stage(root: Path, *, by_dvc: bool) -> tuple[subprocess.Popen, psutil.Process]:
    """The process that the test started, and the stage's own."""
    (root / "stage.py").write_text(STAGE)
    (root / "dvc.py").write_text(DVC)
    script = ["dvc.py", "stage.py"] if by_dvc else ["stage.py"]
    environment = os.environ | ({"DVC_STAGE": "train@cnn"} if by_dvc else {})
    outer = subprocess.Popen([sys.executable, *(str(root / name) for name in script), str(root)], env=environment)
    assert wait_for((root / "started").exists), "the stage did not start"
    return outer, psutil.Process(int((root / "started").read_text()))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_stage_ends_when_the_dvc_that_started_it_is_killed(paths: Paths) -> None:
    dvc, child = start_stage(paths.workspace, by_dvc=True)
    try:
        shell = child.parent()
        assert shell.parent().pid == dvc.pid and child.pid not in {dvc.pid, shell.pid}

        dvc.send_signal(signal.SIGKILL)
        dvc.wait()

        assert wait_for(lambda: not is_alive(child), 10), "the stage goes on without its DVC"
    finally:
        dvc.kill()
        if is_alive(child):
            child.kill()
    # Its lock went with it, so the next run need not wait.
    with stage.running(paths, "train@cnn"):
        pass


def test_a_stage_started_by_hand_outlives_nobody_and_watches_nobody(paths: Paths) -> None:
    by_hand, child = start_stage(paths.workspace, by_dvc=False)
    try:
        assert by_hand.pid == child.pid
        assert [thread.id for thread in child.threads()] == [child.pid]
    finally:
        by_hand.kill()
        by_hand.wait()


def test_the_lock_keeps_two_apart(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_SECONDS_FOR_LOCK", 0.2)
    other, _ = start_stage(paths.workspace, by_dvc=False)
    try:
        with pytest.raises(TouchlineError) as error, stage.running(paths, "train@cnn"):
            pytest.fail("two processes run one stage")
        assert "train@cnn" in str(error.value) and str(paths.workspace) in str(error.value)
        with stage.running(paths, "train@transfer"):
            pass  # another stage is free
    finally:
        other.kill()
        other.wait()


def test_what_a_stage_cost_is_written_when_it_has_ended_well(paths: Paths) -> None:
    with stage.running(paths, "split"):
        assert stage.costs(paths) == {}
    costs = stage.costs(paths)
    assert costs["split"]["seconds"] >= 0 and costs["split"]["peak_megabytes"] > 1
    assert json.loads((paths.locks / "split.json").read_text()) == costs["split"]

    def fail() -> None:
        with stage.running(paths, "evaluate"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(stage.costs(paths)) == ["split"]


def run_costing(paths: Paths, seconds: float, megabytes: int) -> dict[str, Any]:
    """Run a stage of nothing, as if it had taken that long and that much, and return what is kept of it."""
    clock = iter([0.0, seconds])
    measured = {"time": Mock(monotonic=lambda: next(clock)), "_memory": lambda: {"peak_megabytes": megabytes}}
    with patch.multiple(stage, **measured), stage.running(paths, "train@cnn"):
        pass
    return stage.costs(paths)["train@cnn"]


def test_a_stage_slower_than_all_earlier_runs_on_the_same_input_is_named(paths: Paths) -> None:
    settings = paths.workspace / "params.yaml"
    settings.write_text("seed: 1")

    def named(cost: dict[str, Any]) -> list[str]:
        return stage.slower({"train@cnn": cost}, limit=2.0)

    assert named(run_costing(paths, 20, 900)) == []
    # A quick one between, as where everything is in place, hides no later slowdown and causes none.
    assert named(run_costing(paths, 1, 900)) == []
    assert named(run_costing(paths, 40, 900)) == []
    [line] = named(run_costing(paths, 81, 900))
    assert names(line, "train@cnn", "81", "40")
    [line] = named(run_costing(paths, 81, 1801))
    assert names(line, "train@cnn", "1801", "900")
    settings.write_text("seed: 2")
    assert named(run_costing(paths, 9000, 9000)) == []
    # Twice almost nothing is noise.
    assert stage.slower({"split": {"seconds": 5.0, "earlier": {"seconds": 0.5}}}, 2.0) == []


def test_a_stage_sweeps_away_what_killed_ones_left(paths: Paths) -> None:
    for folder in (paths.photos_table.parent, paths.models, paths.reports / "figures"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".partial-killed.png").write_text("half")
    with stage.running(paths, "register"):
        assert not list(paths.workspace.rglob(".partial-*"))
