"""The MLflow store, real: SQLite and artifacts in a folder whose name has a space, a tiny Keras model, no mocks."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths
from touchline.models import inference
from touchline.tracking import client, registered, registry, runs, sync
from touchline.tracking.client import Store, StoreError

EXPERIMENT = "rugby-soccer"
CLASSES = ["rugby", "soccer"]
PHOTOS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(3)]
DATASET = {
    "name": "split",
    "digest": hashlib.sha256(b"split").hexdigest(),
    "source": "data/split.csv",
    "counts": {"train": 3, "test": 1},
}
HISTORY = [{"epoch": epoch, "train/loss": 1 / (epoch + 1), "validation/accuracy": epoch / 4} for epoch in range(4)]
SOURCES = Path(runs.__file__).parents[2]


@pytest.fixture(autouse=True)
def no_server_is_named(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory) -> Path:
    import keras

    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    path = tmp_path_factory.mktemp("keras") / "cnn.keras"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> Paths:
    return _project(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def store(paths) -> Store:
    return runs.open_store(paths, EXPERIMENT)


@pytest.fixture(scope="module")
def run_id(store, keras_file) -> str:
    run_id = _start(store)
    for row in HISTORY:
        runs.log_row(store, run_id, row)
    _finish(store, run_id, keras_file)
    return run_id


def _project(folder: Path) -> Paths:
    root = folder / "a project"
    (root / "models").mkdir(parents=True)
    return Paths(root, root)


def _start(store: Store) -> str:
    return runs.start(store, "cnn", {"git": "abc"}, {"learning_rate": 0.001}, DATASET)


def _finish(store: Store, run_id: str, model_path: Path) -> None:
    runs.finish(
        store,
        run_id,
        model_path=model_path,
        image_size=8,
        classes=CLASSES,
        training_photos=PHOTOS,
        metrics={"seconds/train": 1.5, "train/loss": 0.5},
        history=HISTORY,
    )


def _record(run_id: str, model_path: Path) -> dict:
    return {
        "model": "cnn",
        "run_id": run_id,
        "run_name": "cnn",
        "description": "A simple network.",
        "model_sha256": hashlib.sha256(model_path.read_bytes()).hexdigest(),
        "image_size": 8,
        "classes": CLASSES,
        "params": {"learning_rate": 0.001},
        "tags": {"git": "abc"},
        "history": HISTORY,
        "metrics": {"seconds/train": 1.5},
        "dataset": DATASET,
        "training_photos": PHOTOS,
        "started": "2026-01-02T03:04:05+00:00",
        "ended": "2026-01-02T03:14:05+00:00",
    }


def _client(paths: Paths):
    from mlflow import MlflowClient

    uri = f"sqlite:///{paths.mlflow}/mlflow.db"
    return MlflowClient(uri, uri)


def test_a_run_keeps_its_epochs_its_params_its_dataset_and_its_model(paths, store, run_id, keras_file):
    mlflow = _client(paths)
    run = mlflow.get_run(run_id)
    dataset = run.inputs.dataset_inputs[0]
    model = mlflow.get_logged_model(run.outputs.model_outputs[0].model_id)

    assert run.info.status == "FINISHED"
    assert run.data.params == {"learning_rate": "0.001"}
    # One more point: what is shown of a run is that of the weights that were kept, not that of the last epoch.
    assert [(m.step, m.value) for m in mlflow.get_metric_history(run_id, "training/loss_train")] == [
        *((row["epoch"], row["train/loss"]) for row in HISTORY),
        (4, 0.5),
    ]
    assert runs.logged_metrics(store, run_id) == {
        "training/loss_train": 0.5, "training/accuracy_validation": 0.75, "training/seconds": 1.5
    }  # fmt: skip
    assert (dataset.dataset.name, dataset.dataset.digest) == ("split", DATASET["digest"][:36])
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    assert model.status == "READY"
    assert model.artifact_location.startswith((paths.mlflow / "artifacts").as_uri())


def test_the_logged_model_file_is_the_one_that_was_given(paths, store, run_id, keras_file):
    from mlflow.models import Model

    [logged] = (paths.mlflow / "artifacts").rglob(f"{_model_id(paths, run_id)}/**/model.keras")

    assert logged.read_bytes() == keras_file.read_bytes()
    assert {"python_function", "tensorflow"} <= Model.load(logged.parents[1]).flavors.keys()


def _model_id(paths: Paths, run_id: str) -> str:
    return _client(paths).get_run(run_id).outputs.model_outputs[0].model_id


def test_the_store_depends_neither_on_the_current_folder_nor_leaves_anything_there(store, keras_file, tmp_path):
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        _finish(store, _start(store), keras_file)
    finally:
        os.chdir(before)

    assert list(tmp_path.iterdir()) == []
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_evaluation_adds_test_metrics_and_figures(paths, store, run_id, tmp_path):
    (tmp_path / "confusion.png").write_bytes(b"a picture")

    runs.describe(store, run_id, "A simple network.")
    for _ in range(2):  # a second time changes nothing
        runs.log_evaluation(store, run_id, {"accuracy": 0.9, "note": "text is left out"}, tmp_path)

    mlflow = _client(paths)
    [metric] = [m for m in mlflow.get_logged_model(_model_id(paths, run_id)).metrics if m.key == "test/accuracy"]
    assert (runs.logged_metrics(store, run_id)["test/accuracy"], metric.value) == (0.9, 0.9)
    assert [file.path for file in mlflow.list_artifacts(run_id)] == ["confusion.png"]
    note = mlflow.get_run(run_id).data.tags["mlflow.note.content"]
    assert note == "A simple network.\n\n**On the test photos**: accuracy 0.900"


def test_what_a_head_tried_is_kept_apart_from_the_curves_of_trainings(paths, store, keras_file):
    run_id = _start(store)
    tried = [{"epoch": n, "strength": strength, "train/loss": 0.1} for n, strength in enumerate((0.3, 1.0))]
    for row in tried:
        runs.log_row(store, run_id, row)
    runs.end(store, run_id, {"strength": 0.3, "train/loss": 0.2}, history=tried)

    mlflow = _client(paths)
    assert [(m.step, m.value) for m in mlflow.get_metric_history(run_id, "tried/strength")] == [(0, 0.3), (1, 1.0)]
    assert [(m.step, m.value) for m in mlflow.get_metric_history(run_id, "training/loss_train")] == [(0, 0.2)]


def test_a_run_that_has_ended_says_nothing_of_its_process(paths, store):
    run_id = _start(store)
    assert "touchline.pid" in _client(paths).get_run(run_id).data.tags
    runs.end(store, run_id, {})
    runs.end(store, run_id, {})  # as two processes of one search do with their common run

    assert (
        not {"touchline.pid", "touchline.host", "touchline.process_started"}
        & _client(paths).get_run(run_id).data.tags.keys()
    )


def test_models_that_one_flow_run_trains_have_a_tag_in_common_and_no_run_above_them(monkeypatch):
    assert runs.execution() == {}
    monkeypatch.setenv("TOUCHLINE_FLOW_RUN", "a1")
    assert runs.execution() == {"touchline.execution": "flow run a1"}


def test_the_decision_stands_on_the_better_run_and_above_the_list_of_runs(paths, store):
    run_id = _start(store)
    runs.describe(store, run_id, "A simple network.")
    for decision in ("It is the champion.", "It stays the champion."):
        runs.conclude(store, run_id, decision, f"Headline: {decision}")
    mlflow = _client(paths)
    assert mlflow.get_run(run_id).data.tags["mlflow.note.content"] == (
        "**Decision**: It stays the champion.\n\nA simple network."
    )
    mlflow.set_experiment_tag(store.experiment_id, "mlflow.note.content", "Headline: old\n\nMine.\n\nAlso mine.")
    runs.conclude(store, run_id, "An experiment's.")
    runs.conclude(store, run_id, "It stays.", "Headline: new")
    note = mlflow.get_experiment(store.experiment_id).tags["mlflow.note.content"]
    assert note == "Headline: new\n\nMine.\n\nAlso mine."


def test_the_first_metric_that_runs_share_is_their_test_accuracy(paths, store):
    """MLflow's page that compares runs begins with the metric they logged first."""
    run_id = _start(store)
    runs.expect_test(store, run_id)
    for row in HISTORY:
        runs.log_row(store, run_id, row)
    assert math.isnan(runs.logged_metrics(store, run_id)["test/accuracy"])
    runs.log_evaluation(store, run_id, {"accuracy": 0.5, "accuracy_low": 0.25}, paths.reports)
    assert next(iter(runs.logged_metrics(store, run_id))) == "test/accuracy"
    assert runs.logged_metrics(store, run_id)["test/accuracy"] == 0.5
    assert "test/accuracy_low" not in runs.logged_metrics(store, run_id)


def test_the_report_in_the_store_links_to_nothing_that_it_lacks(paths, store, tmp_path):
    run_id = _start(store)
    links = (
        '<a href="#models">Models</a> <a href="https://example.com/">a page</a> <a href="validation.html">photos</a>'
    )
    (tmp_path / "report.html").write_text(links)
    (tmp_path / "figures/cnn").mkdir(parents=True)
    for name in ("roc.png", "cnn/confusion.png"):
        (tmp_path / "figures" / name).write_bytes(b"a picture")
    assert not runs.has_report(store, run_id)
    runs.log_report(store, run_id, tmp_path)

    assert runs.has_report(store, run_id)
    logged = {file.path for file in _client(paths).list_artifacts(run_id)}
    assert logged == {"report.html", "roc.png"}
    html = Path(_client(paths).download_artifacts(run_id, "report.html")).read_text()
    assert re.findall('href="(.*?)"', html) == ["#models", "https://example.com/"] and "photos" in html
    assert (tmp_path / "report.html").read_text() == links


def test_the_stages_of_one_dvc_are_one_execution_and_another_dvc_is_another(tmp_path):
    """Two stages at once under a process that stands for DVC, and one under another, each through a shell."""
    stage = tmp_path / "stage.py"
    stage.write_text(
        """
from touchline.tracking import runs
print(runs.execution()["touchline.execution"])
"""
    )
    dvc = f"""
import subprocess, sys
commands = [["/bin/sh", "-c", f"{{sys.executable}} '{stage}'; true"]] * int(sys.argv[1])
stages = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
print(*(stage.communicate()[0].strip() for stage in stages), sep="\\n")
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "DVC_STAGE": "train"}
    said = [
        subprocess.check_output([sys.executable, "-c", dvc, stages], env=environment, text=True).splitlines()
        for stages in ("2", "1")
    ]

    assert len(said[0]) == 2 and len({*said[0]}) == 1 and said[1][0] not in said[0]


def test_a_failed_run_says_why(paths, store):
    run_id = _start(store)
    runs.fail(store, run_id, "the loss is not a number")

    run = _client(paths).get_run(run_id)
    assert (run.info.status, run.data.tags["touchline.reason"]) == ("FAILED", "the loss is not a number")


def test_only_runs_whose_process_is_gone_are_closed(paths, store):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive, killed, pid_taken_by_another, elsewhere = (_start(store) for _ in range(4))
    runs.set_tags(store, killed, {"touchline.pid": ended.pid})
    runs.set_tags(store, pid_taken_by_another, {"touchline.process_started": 1.0})
    runs.set_tags(store, elsewhere, {"touchline.pid": ended.pid, "touchline.host": "another-machine"})

    # Opening the store is what closes them: the next training does it for one that was killed.
    runs.open_store(paths, EXPERIMENT)

    status = {run: _client(paths).get_run(run).info.status for run in (alive, killed, pid_taken_by_another, elsewhere)}
    assert status == {alive: "RUNNING", killed: "KILLED", pid_taken_by_another: "KILLED", elsewhere: "RUNNING"}
    assert runs.close_killed(store) == []


def test_a_lock_that_another_process_keeps_is_one_line(paths, store, monkeypatch):
    lock = paths.project / ".dvc/tmp/touchline/store.lock"
    monkeypatch.setattr(client, "_lock", lambda paths: FileLock(lock, timeout=0.05))
    with FileLock(lock), pytest.raises(StoreError, match=r"store\.lock is held by another process"):
        runs.open_store(paths, EXPERIMENT)
    assert runs.open_store(paths, EXPERIMENT).experiment_id == store.experiment_id


def test_versions_promotion_and_rollback(store, run_id):
    name = "ladder"
    assert (registry.versions(store, name), registry.alias(store, name, "champion")) == ([], None)
    with pytest.raises(TouchlineError):
        registry.rollback(store, name)

    first = registry.register(store, name, run_id, {"why": "it is the first"}, "The first one.")
    registry.promote(store, name, first)
    with pytest.raises(TouchlineError, match=r"\b1\b.*ladder"):
        registry.rollback(store, name)

    second = registry.register(store, name, run_id, {}, "")
    registry.set_alias(store, name, "challenger", second)
    registry.promote(store, name, second)
    registry.promote(store, name, second)

    assert [(v.number, v.aliases) for v in registry.versions(store, name)] == [(1, ()), (2, ("challenger", "champion"))]
    assert registry.versions(store, name)[0].tags["why"] == "it is the first"
    champion = registry.alias(store, name, "champion")
    assert (champion.run_id, champion.tags["touchline.replaced"]) == (run_id, "1")
    assert "touchline.promoted_at" in champion.tags

    assert registry.rollback(store, name) == 1
    assert registry.alias(store, name, "champion").number == 1

    # It is remembered until a person promotes that version again, or a rollback goes there.
    digest = champion.model_sha256
    assert registry.rolled_back(store, name, digest).number == 2
    assert registry.rolled_back(store, name, "0" * 64) is None
    registry.promote(store, name, second)
    assert registry.rolled_back(store, name, digest) is None
    registry.promote(store, name, first)
    registry.rollback(store, name)
    assert (registry.alias(store, name, "champion").number, registry.rolled_back(store, name, digest).number) == (2, 1)
    registry.rollback(store, name)
    assert (registry.alias(store, name, "champion").number, registry.rolled_back(store, name, digest).number) == (1, 2)


def test_a_version_gives_back_its_model_and_the_photos_it_learned_from(store, run_id):
    import numpy as np

    version = registry.register(store, "whole", run_id, {}, "")
    model = registry.model(store, registry.versions(store, "whole")[0])
    probabilities = inference.load_model(model.file).predict(np.zeros((2, 8, 8, 3), "uint8"), verbose=0)

    assert probabilities.shape == (2, 2) and model.classes == ["rugby", "soccer"]
    assert registry.training_photos(store, "whole", version) == set(PHOTOS)
    with pytest.raises(TouchlineError, match="version=99"):
        registry.training_photos(store, "whole", 99)


def test_a_known_model_is_not_logged_again(store, run_id, keras_file):
    assert runs.ensure(store, _record(run_id, keras_file), keras_file) == run_id


@pytest.fixture(scope="module")
def pulled(tmp_path_factory, keras_file) -> SimpleNamespace:
    """A project whose models and reports came from elsewhere, synced with its own store, which knew nothing of them."""
    paths = _project(tmp_path_factory.mktemp("other machine"))
    record = _record("0123456789abcdef" * 2, keras_file)
    shutil.copyfile(keras_file, paths.models / "cnn.keras")
    (paths.models / "cnn.json").write_text(json.dumps(record))
    paths.reports.mkdir()
    (paths.reports / "metrics.json").write_text(json.dumps({"models": {"cnn": {"accuracy": 0.875}}}))
    judged = {"cnn": {"model_sha256": record["model_sha256"], "milliseconds_a_photo": 9.5}}
    (paths.reports / "evaluation.json").write_text(json.dumps(judged))
    outcome = {
        "model": "cnn",
        "model_sha256": record["model_sha256"],
        "version": 7,
        "aliases": ["challenger", "champion"],
        "tags": {
            "why": "better",
            "touchline.replaced": "1",
            "touchline.reason": "cnn already is the champion, version 6",
        },
        "description": "The seventh.",
    }
    decided = {
        "better_model": "cnn",
        "experiment": None,
        "decision": "It is the champion.",
        "headline": "cnn 0.875",
        "registered": outcome,
    }
    (paths.reports / "registration.json").write_text(json.dumps(decided))
    (paths.reports / "report.html").write_text("<h1>The report</h1>")
    for name in ("roc.png", "cnn/confusion.png"):
        (paths.reports / "figures" / name).parent.mkdir(parents=True, exist_ok=True)
        (paths.reports / "figures" / name).write_bytes(b"a picture")
    lines = sync.sync(paths, EXPERIMENT)
    return SimpleNamespace(paths=paths, record=record, lines=lines)


def test_sync_puts_back_run_metrics_and_version(pulled):
    store = runs.open_store(pulled.paths, EXPERIMENT)
    [version] = registry.versions(store, EXPERIMENT)
    run = _client(pulled.paths).get_run(version.run_id)

    assert [line.split(" as run ")[0] for line in pulled.lines] == [
        "cnn: logged again",
        "cnn: test metrics logged again",
        "cnn: decision and report logged again",
        f"cnn: registered again as version 1 of {EXPERIMENT}",
    ]
    # What named it before (reports, Prefect) names it still.
    assert run.info.run_id == run.data.tags["touchline.restored"] == pulled.record["run_id"]
    assert run.data.tags["mlflow.note.content"].startswith(
        "**Decision**: It is the champion.\n\nA simple network.\n\n**On the test photos**: accuracy 0.875"
    )
    artifacts = {file.path for file in _client(pulled.paths).list_artifacts(run.info.run_id)}
    assert artifacts == {"confusion.png", "report.html", "roc.png"}
    assert run.info.run_id in run.info.artifact_uri
    experiment = _client(pulled.paths).get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.note.content"].startswith("cnn 0.875\n\nPhoto classifiers")
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.info.end_time - run.info.start_time == 600_000
    assert run.data.metrics["test/accuracy"] == 0.875
    assert run.data.metrics["training/accuracy_validation"] == 0.75
    assert version.description.endswith("\n\nThe seventh.")
    assert "version 7" in version.description.partition("\n")[0]
    assert "version 7" in version.tags["touchline.reason"]
    assert "cnn already is the champion, version 6" in version.tags["touchline.reason"]
    assert version.aliases == ("challenger", "champion")
    assert version.tags["why"] == "better"
    # Version 1 of the old registry is not version 1 of this one.
    assert version.tags["touchline.replaced"] == "none"


def test_sync_twice_puts_back_nothing(pulled):
    assert sync.sync(pulled.paths, EXPERIMENT) == []


@pytest.mark.parametrize("changed", ["a retrained model", "a new metric", "another version"])
def test_what_is_missing_in_the_store_is_noticed(pulled, changed, tmp_path):
    # The reports of another workspace over the same store, as in an experiment.
    paths = Paths(tmp_path, pulled.paths.project)
    shutil.copytree(pulled.paths.models, paths.models)
    shutil.copytree(pulled.paths.reports, paths.reports)
    assert sync.sync(paths, EXPERIMENT) == []

    if changed == "a new metric":
        found = {"accuracy": 0.875, "log_loss": 0.5}
        (paths.reports / "metrics.json").write_text(json.dumps({"models": {"cnn": found}}))
        assert sync.sync(paths, EXPERIMENT) == ["cnn: test metrics logged again"]
        assert sync.sync(paths, EXPERIMENT) == []
        return
    if changed == "a retrained model":
        (paths.models / "cnn.json").write_text(json.dumps({**pulled.record, "model_sha256": "0" * 64}))
        named = "cnn.keras"
    else:
        (paths.reports / "registration.json").write_text(json.dumps({"registered": {"model_sha256": "0" * 64}}))
        named = "registration.json"
    with pytest.raises(TouchlineError, match=re.escape(named)):
        sync.sync(paths, EXPERIMENT)


def test_sync_leaves_an_alias_with_the_version_that_holds_it(paths, store, run_id, keras_file, pulled, tmp_path):
    holder = registry.register(store, EXPERIMENT, run_id, {}, "")
    _client(paths).set_model_version_tag(EXPERIMENT, str(holder), "touchline.model_sha256", "of another model")
    registry.promote(store, EXPERIMENT, holder)
    workspace = Paths(tmp_path, paths.project)
    shutil.copytree(pulled.paths.models, workspace.models)
    shutil.copytree(pulled.paths.reports, workspace.reports)

    lines = sync.sync(workspace, EXPERIMENT)

    assert "cnn" in lines[-1] and str(holder) in lines[-1]
    assert registry.alias(store, EXPERIMENT, "champion").number == holder
    assert registry.alias(store, EXPERIMENT, "challenger").number == holder + 1


def test_a_file_that_is_not_the_one_described_is_not_logged(store, keras_file, tmp_path):
    other = tmp_path / "cnn.keras"
    other.write_bytes(b"something else")
    record = {**_record("unknown", keras_file), "model_sha256": "1" * 64}

    with pytest.raises(TouchlineError, match=r"cnn\.keras.*`dvc repro`"):
        runs.ensure(store, record, other)
    with pytest.raises(TouchlineError, match=r"gone\.keras"):
        runs.ensure(store, record, tmp_path / "gone.keras")


@pytest.mark.slow
def test_two_trainings_may_start_at_once_on_a_fresh_store(tmp_path, keras_file):
    paths = _project(tmp_path)
    script = """
import sys
from pathlib import Path
from touchline.core.paths import Paths
from touchline.tracking import registry, runs
root, model, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
store = runs.open_store(Paths(root, root), "both")
dataset = {"name": "split", "digest": "same", "source": "data/split.csv", "counts": {}}
run_id = runs.start(store, name, {}, {"model": name}, dataset)
for epoch in range(20):
    runs.log_row(store, run_id, {"epoch": epoch, "train/loss": 1 / (epoch + 1)})
runs.finish(store, run_id, model_path=model, image_size=8, classes=["a", "b"], training_photos=[], metrics={})
registry.register(store, "both", run_id, {}, "")
print(run_id)
"""
    command = [sys.executable, "-c", script, str(paths.project), str(keras_file)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    trainings = [
        subprocess.Popen(
            [*command, name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for name in ("cnn", "transfer")
    ]
    said = [training.communicate() for training in trainings]

    assert [training.returncode for training in trainings] == [0, 0], said
    assert not any(" mlflow" in errors or "alembic" in errors for _, errors in said), said
    mlflow = _client(paths)
    for output, _ in said:
        run = mlflow.get_run(output.split()[-1])
        assert run.info.status == "FINISHED"
        assert len(mlflow.get_metric_history(run.info.run_id, "training/loss_train")) == 20
    assert [version.number for version in registry.versions(runs.open_store(paths, "both"), "both")] == [1, 2]


def test_a_server_that_is_down_is_one_clear_line(tmp_path, monkeypatch, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

    with pytest.raises(TouchlineError) as raised:
        runs.open_store(_project(tmp_path), EXPERIMENT)

    message = str(raised.value)
    assert f"http://***@127.0.0.1:{port}" in message and "MLFLOW_TRACKING_URI" in message
    assert "\n" not in message and "secret" not in message
    assert capfd.readouterr().err == ""


def test_a_damaged_store_is_one_clear_line(tmp_path):
    paths = _project(tmp_path)
    paths.mlflow.mkdir()
    (paths.mlflow / "mlflow.db").write_text("not a database, but long enough to be taken for one" * 50)

    with pytest.raises(TouchlineError, match=r"mlflow\.db.*make run"):
        runs.open_store(paths, EXPERIMENT)


def test_the_database_is_for_its_owner_alone_also_where_it_was_not(paths, store):
    database = paths.mlflow / "mlflow.db"
    assert database.stat().st_mode & 0o777 == 0o600
    for open_again in (lambda: client.server_settings(paths, []), lambda: runs.open_store(paths, EXPERIMENT)):
        database.chmod(0o666)
        open_again()
        assert database.stat().st_mode & 0o777 == 0o600


def test_mlflows_server_answers_to_the_hosts_that_are_given_unless_the_user_says_otherwise(paths, monkeypatch):
    name = "MLFLOW_SERVER_ALLOWED_HOSTS"
    monkeypatch.delenv(name, raising=False)
    assert client.server_settings(paths, ["127.0.0.1:5000", "[::1]:5000"])[name] == "127.0.0.1:5000,[::1]:5000"
    assert name not in client.server_settings(paths, [])
    monkeypatch.setenv(name, "mlflow.example.com")
    assert name not in client.server_settings(paths, ["127.0.0.1:5000"])


def _places(paths: Paths) -> set[str]:
    """Every place that the store names."""
    with closing(sqlite3.connect(client.database(paths))) as database:
        texts = "\n".join(database.iterdump())
    return set(re.findall(r"file://[^']*?(?=/mlflow/artifacts)", texts))


@pytest.mark.parametrize("gone", [True, False], ids=["moved", "copied"])
def test_a_project_that_was_moved_or_copied_goes_on(keras_file, tmp_path, capsys, gone):
    before = _project(tmp_path / "before")
    store = runs.open_store(before, EXPERIMENT)
    run_id = _start(store)
    _finish(store, run_id, keras_file)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/roc.png").write_bytes(b"a figure")
    runs.log_evaluation(store, run_id, {"accuracy": 0.5}, tmp_path / "figures")
    registry.promote(store, EXPERIMENT, registry.register(store, EXPERIMENT, run_id, {}, ""))
    _client(before).create_experiment("of another program", (tmp_path / "theirs").as_uri())
    after = Paths(tmp_path / "it's 100 % ours", tmp_path / "it's 100 % ours")
    shutil.copytree(before.project, after.project)
    if gone:
        shutil.rmtree(before.project)
    capsys.readouterr()

    [version] = registered.versions(after, EXPERIMENT)
    said = capsys.readouterr()
    assert str(before.project) in said.err and said.out == ""
    store = runs.open_store(after, EXPERIMENT)
    assert capsys.readouterr().err == ""
    assert version == registry.alias(store, EXPERIMENT, "champion")
    for model in (runs.model(store, run_id), registry.model(store, version), registered.model(after, version)):
        assert model.folder.is_relative_to(after.mlflow)
        assert model.file.read_bytes() == keras_file.read_bytes()
    assert Path(_client(after).download_artifacts(run_id, "roc.png")).read_bytes() == b"a figure"
    assert _places(after) == {after.project.as_uri()}
    assert _client(after).get_experiment_by_name("of another program").artifact_location.endswith("/theirs")
    _finish(store, _start(store), keras_file)
    if not gone:
        assert _places(before) == {before.project.as_uri()}
        [original] = registry.versions(runs.open_store(before, EXPERIMENT), EXPERIMENT)
        assert registry.model(runs.open_store(before, EXPERIMENT), original).folder.is_relative_to(before.mlflow)


def test_two_processes_may_find_a_moved_project_at_once(paths, store, run_id, tmp_path):
    moved = _project(tmp_path)
    shutil.copytree(paths.mlflow, moved.mlflow)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: runs.open_store(moved, EXPERIMENT).experiment_id, range(2)))

    assert found == [store.experiment_id] * 2
    assert _places(moved) == {moved.project.as_uri()}


def test_the_files_of_another_project_in_this_store_stay_its_own(paths, store, run_id, tmp_path, monkeypatch):
    guest = _project(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.own_uri(paths))
    runs.open_store(guest, "the guest's")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    runs.open_store(paths, EXPERIMENT)

    assert guest.project.as_uri() in _client(paths).get_experiment_by_name("the guest's").artifact_location
    with pytest.raises(TouchlineError, match=re.escape(guest.project.as_uri())):
        runs.open_store(paths, "the guest's")


def test_a_deleted_experiment_names_the_command_that_restores_it(tmp_path):
    paths = _project(tmp_path)
    store = runs.open_store(paths, EXPERIMENT)
    _client(paths).delete_experiment(store.experiment_id)
    with pytest.raises(TouchlineError, match=EXPERIMENT) as caught:
        runs.open_store(paths, EXPERIMENT)
    [command] = re.findall("`(.*mlflow experiments .*)`", str(caught.value))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, cwd=paths.project, env={**os.environ, "PATH": path}, check=True)

    assert runs.open_store(paths, EXPERIMENT).experiment_id == store.experiment_id
    assert [file for file in paths.project.rglob("*.db") if file != client.database(paths)] == []
