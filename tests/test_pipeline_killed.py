"""DVC killed in the middle of a stage: nothing goes on behind its back, and the next `dvc repro` makes it good.

`TOUCHLINE_KILLS` is how many kills at random moments each stage gets by each signal; without it one stage gets one.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest
from losses import champion, lost, torn, unmake
from projects import STAGES, Project, built, copy, runs, versions

from touchline.core.paths import Paths
from touchline.core.stage import costs

# What a stage says once it is at work; one that is not here says nothing before it is done.
AT_WORK = {"validate": "reading photos", "train@cnn": "epoch 0", "evaluate": "predicting with cnn"}

KILLS = int(os.environ.get("TOUCHLINE_KILLS", "0"))
# As many may pile up what they leave before the next `dvc repro` that nobody disturbs.
IN_A_ROW = 5
SECONDS_OF_DVC = 3.0  # between a stage's beginning or end and DVC's own


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy(built(tmp_path_factory).project, tmp_path_factory.mktemp("attacked") / "the project")


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return built(tmp_path_factory).project


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.01)


def is_over(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def kill_in_the_middle(project: Project, stage: str, *, both: bool) -> None:
    """Force `stage`; once it is at work, kill -9 DVC, and with `both` the stage's own process too."""
    lock = project.root / f".dvc/tmp/touchline/{stage}.lock"
    lock.unlink(missing_ok=True)
    output = project.root.parent / f"{stage}.txt"
    with output.open("w") as file:
        dvc = psutil.Popen(
            ["dvc", "repro", "--force", "--single-item", stage],
            cwd=project.root,
            env=project.environment(),
            stdout=file,
            stderr=file,
        )
    wait_until(lock.exists, f"{stage} to take its lock")
    wait_until(lambda: AT_WORK.get(stage, "") in output.read_text(), f"{stage} to be at work")
    started = dvc.children(recursive=True)
    [process] = [child for child in started if any(part.endswith("/touchline") for part in child.cmdline())]
    # Held still while DVC dies, so that the quickest stage too is caught in its middle.
    process.suspend()
    dvc.kill()
    dvc.wait()
    if both:
        process.kill()
    else:
        process.resume()
    wait_until(lambda: is_over(process), f"the process of {stage} to end")


# `make test` kills one; the others are killed by `make test-all`, each in another way.
KILLED = [
    pytest.param(stage, marks=() if stage == "split" else pytest.mark.slow)
    for stage in STAGES if stage != "train@transfer"
]  # fmt: skip


@pytest.mark.parametrize("stage", KILLED)
def test_a_killed_stage_is_made_good_by_the_next_repro(attacked: Project, undisturbed: Project, stage: str) -> None:
    both = stage in {"split", "features@pooled", "evaluate"}
    kill_in_the_middle(attacked, stage, both=both)
    attacked.dvc("repro")
    for name in ("data/photos.csv", "data/validated.csv", "data/split.csv"):
        assert (attacked.root / name).read_bytes() == (undisturbed.root / name).read_bytes()
    found, expected = (project.json("reports/metrics.json")["models"] for project in (attacked, undisturbed))
    for model in ("cnn", "transfer"):
        for metric in ("accuracy", "balanced_accuracy", "log_loss"):
            assert found[model][metric] == pytest.approx(expected[model][metric], abs=1e-3)
    assert attacked.json("reports/registration.json")["promoted"]
    # A stage that ends itself leaves nothing; what was killed itself leaves a file that the next stage sweeps away.
    left = [path for name in ("data", "models", "reports") for path in (attacked.root / name).rglob(".partial-*")]
    assert both or not left


@pytest.mark.slow
def test_the_run_of_a_killed_training_is_closed_by_the_next_process_that_opens_the_store(attacked: Project) -> None:
    kill_in_the_middle(attacked, "train@cnn", both=True)
    left = {run.info.run_id for run in runs(attacked, "attributes.status = 'RUNNING'")}
    assert len(left) == 1
    versions(attacked)
    assert not runs(attacked, "attributes.status = 'RUNNING'")
    killed = {run.info.run_id for run in runs(attacked, "attributes.status = 'KILLED'")}
    assert killed >= left


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a store of its own, for kills at random moments."""
    return copy(built(tmp_path_factory).project, tmp_path_factory.mktemp("besieged") / "the project")


def kill_at_random(project: Project, stage: str, number: signal.Signals, chance: random.Random) -> bool:
    """Send the signal to DVC, to the stage it runs or to both, at any moment of the stage; False if that had ended."""
    output = project.root.parent / "killed.txt"
    with output.open("w") as file:
        dvc = psutil.Popen(
            ["dvc", "repro", stage],
            cwd=project.root,
            env=project.environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        # What hangs on a stage that was killed before is what it was, so nothing else runs.
        wait_until(
            lambda: f"Running stage '{stage}'" in output.read_text() or is_over(dvc), f"{stage} to begin", seconds=120
        )
        time.sleep(chance.uniform(0, costs(Paths(project.root, project.root))[stage]["seconds"] + SECONDS_OF_DVC))
        at_work = [] if is_over(dvc) else dvc.children(recursive=True)
        stages = [child for child in at_work if any(part.endswith("/touchline") for part in command_of(child))]
        hit = [[dvc], stages or [dvc], [dvc, *stages]][chance.randrange(3)]
        alive = not is_over(dvc)
        for process in hit:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        for process in [dvc, *at_work]:
            wait_until(lambda process=process: is_over(process), f"{stage} to end: {output.read_text()}")
        return alive
    finally:
        with suppress(ProcessLookupError):
            os.killpg(dvc.pid, signal.SIGKILL)
        dvc.wait()


def command_of(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES if KILLS else ["validate"])
def test_killed_at_random_moments_nothing_is_lost(
    besieged: Project, undisturbed: Project, stage: str, record_property: Callable[[str, Any], None]
) -> None:
    unmake(besieged, stage)
    began = time.monotonic()
    besieged.dvc("repro")
    not_disturbed = time.monotonic() - began
    assert not lost(besieged, undisturbed)
    for name in ("SIGKILL", "SIGTERM"):
        chance, wanted = random.Random(f"{stage} {name}"), KILLS or 1
        kills, losses, recovered = 0, [], []
        unmake(besieged, stage)
        for _ in range(3 * wanted):
            if not kill_at_random(besieged, stage, signal.Signals[name], chance):
                unmake(besieged, stage)  # it had ended before
                continue
            kills += 1
            losses += [f"{file} is torn" for file in torn(besieged)]
            if (found := champion(besieged)) is None or not found[1]:
                losses.append("no champion between a kill and the next run")
            if kills % IN_A_ROW == 0 or kills == wanted:
                began = time.monotonic()
                said = besieged.dvc("repro", exit_code=None)
                recovered.append(round(time.monotonic() - began, 1))
                losses += [said[-2000:]] if "ERROR" in said else lost(besieged, undisturbed)
                if kills == wanted:
                    break
                unmake(besieged, stage)
        seconds = {"undisturbed": round(not_disturbed, 1), "recovered": recovered}
        told = {"stage": stage, "signal": name, "kills": kills, "losses": len(losses), **seconds}
        record_property("kills", json.dumps(told))
        assert not losses
        assert kills == wanted
