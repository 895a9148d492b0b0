"""The whole path, driven by DVC: photos to a registered champion, and what runs again after which change.

Each test leaves the project as it found it.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from projects import (
    GONE,
    REGISTERED,
    REPOSITORY,
    STAGES,
    UP_TO_DATE,
    Project,
    aliases,
    built,
    copy,
    ran,
    runs,
    versions,
)

from touchline.core.paths import Paths
from touchline.data import photos
from touchline.tracking.runs import open_store


@pytest.fixture(scope="module")
def attempted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy(built(tmp_path_factory).project, tmp_path_factory.mktemp("pipeline") / "the project")


@pytest.fixture
def project(attempted: Project) -> Iterator[Project]:
    project = attempted
    yield project
    if project.git("status", "--porcelain"):
        project.git("checkout", "--quiet", "--", ".")
        project.dvc("checkout")


def test_dvc_repro_takes_photos_to_a_registered_champion(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = built(tmp_path_factory).output
    assert sorted(ran(output)) == sorted(STAGES)
    for stage in STAGES:
        # Each says at its end what came of it, before DVC goes on.
        said = re.split("(?:Gener|Upd)ating lock file", output.partition(f"Running stage '{stage}':")[2])[0]
        assert said.strip().splitlines()[-1].startswith(f"{stage.replace('@', ' ')}: "), stage
    assert set(project.json("reports/metrics.json")["models"]) == {"cnn", "transfer"}
    registration = project.json("reports/registration.json")
    better = registration["better_model"]
    assert registration["promoted"] and registration["registered"]["version"] == 1
    [version] = versions(project)
    assert version.aliases == ("challenger", "champion")
    assert version.model_sha256 == project.json(f"models/{better}.json")["model_sha256"]
    assert version.run_id == registration["run_ids"][better]
    forecasts = {name: project.json(f"models/{name}.json")["forecast"] for name in ("cnn", "transfer")}
    assert forecasts["cnn"] is None
    assert json.loads(version.tags["touchline.forecast"]) == forecasts[better]


@pytest.mark.slow
def test_the_champion_predicts_as_its_file_does_where_touchline_is_not_installed(
    project: Project, tmp_path: Path
) -> None:
    better = project.json("reports/registration.json")["better_model"]
    predictions = pd.read_csv(project.root / "reports/predictions.csv")
    rows = predictions[predictions["model"] == better].head(3)
    size = project.json(f"models/{better}.json")["image_size"]
    np.save(tmp_path / "photos.npy", np.stack([photos.read(project.root / path, size) for path in rows["path"]]))
    script = f"""
import json, sys
from importlib.util import find_spec
assert find_spec("touchline") is None
import keras, mlflow, numpy, pandas
mlflow.set_tracking_uri({f"sqlite:///{project.root}/mlflow/mlflow.db"!r})
photos = numpy.load("photos.npy")
model = mlflow.pyfunc.load_model("models:/{REGISTERED}@champion")
contents = [open(path, "rb").read() for path in {[str(project.root / path) for path in rows["path"]]!r}]
found = [model.predict(given).tolist() for given in (photos, contents, pandas.DataFrame({{"photo": contents}}))]
found.append(mlflow.tensorflow.load_model("models:/{REGISTERED}@champion").predict(photos, verbose=0).tolist())
file = keras.models.load_model({str(project.root / "models" / f"{better}.keras")!r}).predict(photos, verbose=0)
json.dump([*found, file.tolist()], open("found.json", "w"))
"""
    # -S leaves out site-packages' .pth files, by which an editable install would bring touchline in.
    there = [path for path in sys.path if path.endswith("site-packages")]
    environment = {key: value for key, value in project.environment().items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", f"import sys; sys.path += {there!r}{script}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    for found in np.array(json.loads((tmp_path / "found.json").read_text())):
        assert found.shape == (3, 2)
        np.testing.assert_allclose(found, rows[["probability:rugby", "probability:soccer"]], atol=1e-4)


def test_a_second_repro_runs_nothing(project: Project) -> None:
    output = project.dvc("repro")
    assert UP_TO_DATE in output
    assert ran(output) == []


def test_a_comment_in_the_plumbing_runs_nothing(project: Project) -> None:
    for name in ("cli", "core/params", "core/stage", "core/files"):
        file = project.root / f"src/touchline/{name}.py"
        file.write_text(file.read_text() + "# a comment\n")
    assert UP_TO_DATE in project.dvc("repro")


def test_another_seed_of_the_split_computes_no_features(project: Project) -> None:
    project.change({"split.seed": 43})
    assert ran(project.dvc("repro", "split", "features@pixels", "features@pooled")) == ["split"]


@pytest.mark.slow
def test_another_strength_trains_that_model_alone(project: Project) -> None:
    before = project.json("reports/metrics.json")["models"]
    project.change({"models.transfer.strengths": [0.001]})
    assert ran(project.dvc("repro")) == ["train@transfer", "evaluate", "register"]
    after = project.json("reports/metrics.json")["models"]
    assert after["cnn"] == before["cnn"]
    assert after["transfer"]["log_loss"] != before["transfer"]["log_loss"]


@pytest.mark.slow
def test_a_third_model_joins_and_leaves_without_training_the_others(project: Project) -> None:
    entry = {
        "architecture": "cnn", "input": "pixels", "filters": [4], "dropout": 0.1, "learning_rate": 0.001,
        "weight_decay": 0.0,
        "augmentation": {"rotation": 0, "zoom": 0.0, "shift": 0.0, "flip": False},
        "batch_size": 64, "epochs": 1, "patience": 1, "seed": 1,
    }  # fmt: skip

    def models_known() -> list[set[str]]:
        metrics, registration = project.json("reports/metrics.json"), project.json("reports/registration.json")
        return [set(metrics["models"]), set(registration["run_ids"])]

    project.change({"models.small": entry})
    assert ran(project.dvc("repro")) == ["train@small", "evaluate", "register"]
    assert models_known() == [{"cnn", "transfer", "small"}] * 2
    assert "small" in (project.root / "reports/report.html").read_text()

    project.change({"models.small": GONE})
    output = project.dvc("repro")
    assert not [stage for stage in ran(output) if stage.startswith("train")]
    assert models_known() == [{"cnn", "transfer"}] * 2
    assert not list(project.root.glob("models/small.*")) + list(project.root.glob("reports/*/small.*"))
    assert "small" not in (project.root / "reports/predictions.csv").read_text()
    assert UP_TO_DATE in project.dvc("repro")


@pytest.mark.slow
def test_training_again_with_the_same_seed_gives_the_same_metrics(project: Project) -> None:
    history = project.root / "reports/history/cnn.csv"
    first, run_id = pd.read_csv(history), project.json("models/cnn.json")["run_id"]
    assert ran(project.dvc("repro", "--force", "--single-item", "train@cnn")) == ["train@cnn"]
    assert project.json("models/cnn.json")["run_id"] != run_id
    pd.testing.assert_frame_equal(pd.read_csv(history), first, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strength", "where"),
    [(0.01, []), (0.02, ["--temp"])],
    ids=["in the workspace", "in a copy of it"],
)
def test_an_experiment_logs_to_the_projects_store_and_moves_no_alias(
    project: Project, strength: float, where: list[str]
) -> None:
    before, params = aliases(project), (project.root / "params.yaml").read_text()
    name = f"strength-{strength}".replace(".", "-")
    output = project.dvc("exp", "run", *where, "--name", name, "--set-param", f"models.transfer.strengths=[{strength}]")
    assert ran(output) == ["train@transfer", "evaluate", "register"]

    [run] = runs(project, f"tags.`touchline.dvc_experiment` = '{name}'")
    assert run.data.params["strengths"] == str(strength)
    assert "test/accuracy" in run.data.metrics
    assert not list((project.root / ".dvc/tmp").rglob("mlflow.db"))
    assert aliases(project) == before

    [command] = re.findall(r"^\t@(dvc exp show .*)", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    listed = project.run("sh", "-c", command.replace("$$", "$")).splitlines()
    assert listed[1].split() == ["Experiment", "test.cnn", "test.transfer", "models.transfer.strengths"]
    [row] = [line for line in listed if f"[{name}]" in line]
    assert str(strength) in row.split()[-1]
    if where:
        assert (project.root / "params.yaml").read_text() == params
        assert UP_TO_DATE in project.dvc("status")
    else:
        assert not project.json("reports/registration.json")["promoted"]


@pytest.mark.slow
def test_an_experiment_that_is_applied_is_registered_by_the_command_that_the_summary_names(
    project: Project, tmp_path: Path
) -> None:
    mine = copy(project, tmp_path / "the project")
    store = open_store(Paths(mine.root, mine.root), REGISTERED)
    store.client.delete_registered_model(REGISTERED)
    mine.dvc("exp", "run", "--temp", "--name", "good", "--set-param", "register.min_shared_photos=5")
    mine.dvc("exp", "apply", "good")
    assert UP_TO_DATE in mine.dvc("repro")
    assert mine.json("reports/registration.json")["registered"] is None
    [command] = re.findall("`dvc (.+?)`", mine.call("summary").out)
    assert ran(mine.dvc(*command.split())) == ["register"]

    outcome = mine.json("reports/registration.json")
    [version] = versions(mine)
    assert outcome["registered"]["version"] == version.number
    assert version.model_sha256 == mine.json(f"models/{outcome['better_model']}.json")["model_sha256"]
    assert "dvc" not in mine.call("summary").out
    assert UP_TO_DATE in mine.dvc("repro")


@pytest.mark.slow
def test_a_deleted_store_is_put_back_from_the_files(project: Project) -> None:
    before = aliases(project)
    (project.root / "mlflow/mlflow.db").unlink()
    shutil.rmtree(project.root / "mlflow/artifacts")
    project.touchline("registry", "sync")
    assert aliases(project) == before
    assert project.call("registry", "sync").out == ""
    assert UP_TO_DATE in project.dvc("repro")
