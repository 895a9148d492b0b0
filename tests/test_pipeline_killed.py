"""DVC killed in the middle of a stage: nothing goes on behind its back, and the next `dvc repro` makes it good."""

import time
from collections.abc import Callable

import psutil
import pytest
from projects import STAGES, Project, built, copy, runs, versions

# What a stage says once it is at work; one that is not here says nothing before it is done.
AT_WORK = {"validate": "reading photos", "train@cnn": "epoch 0", "evaluate": "predicting with cnn"}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy(built(tmp_path_factory).untouched, tmp_path_factory.mktemp("attacked") / "the project")


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return built(tmp_path_factory).untouched


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


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "train@transfer"])
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


def test_the_run_of_a_killed_training_is_closed_by_the_next_process_that_opens_the_store(attacked: Project) -> None:
    kill_in_the_middle(attacked, "train@cnn", both=True)
    left = {run.info.run_id: run for run in runs(attacked, "attributes.status = 'RUNNING'")}
    [model] = [run for run in left.values() if "mlflow.parentRunId" in run.data.tags]
    assert set(left) == {model.info.run_id, model.data.tags["mlflow.parentRunId"]}
    versions(attacked)
    assert not runs(attacked, "attributes.status = 'RUNNING'")
    killed = {run.info.run_id for run in runs(attacked, "attributes.status = 'KILLED'")}
    assert killed >= set(left)
