"""Runs in the store: started, logged, ended, and found again; and the models that they logged."""

import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from ruamel.yaml import YAML

import touchline
from touchline.core.errors import TouchlineError
from touchline.core.files import read_json, sha256
from touchline.core.paths import Paths
from touchline.core.stage import SHELLS
from touchline.tracking.client import MissingError, Store, connect, one_line_errors, pages, texts, under_id

if TYPE_CHECKING:
    from mlflow.entities import Run

# Of a run and of a version: the digests of a model's files, under the names that `models/<name>.json` has too.
MODEL_SHA256, _OPENVINO_SHA256, _REFERENCE_SHA256 = DIGESTS = (
    "touchline.model_sha256", "touchline.openvino_sha256", "touchline.reference_sha256"
)  # fmt: skip
PARENT, REASON = "mlflow.parentRunId", "touchline.reason"
# Of a version: how many of the photos it learned from have which licence.
LICENCES = "touchline.licences"
_HOST, _PID, _PROCESS_STARTED = "touchline.host", "touchline.pid", "touchline.process_started"
_EXECUTION = "touchline.execution"
_NOTE = "mlflow.note.content"
_DECISION, _ON_TEST = "**Decision**: ", "\n\n**On the test photos**: "
PACKAGE = Path(touchline.__file__).parent
_SUBSETS = ("train/", "validation/", "cross_validation/")
_OF_TRAINING = ("seconds/train", "epochs", "strength")
_REPORT = "report.html"
# The interval is in the description; as metrics, its bounds would crowd out others.
_NOT_LOGGED = ("accuracy_low", "accuracy_high")
_LONGEST_DIGEST = 36  # characters of a dataset digest that MLflow takes
# Packages that a logged model needs if this package is not installed, and the modules of this package logged with it.
_REQUIREMENTS = ("tensorflow", "keras", "numpy", "opencv-python-headless", "pillow")
CODE = (
    "__init__", "core/__init__", "core/budget", "core/errors", "data/__init__", "data/layout", "data/photos",
    "models/__init__", "models/photo_model",
)  # fmt: skip


@dataclass(frozen=True)
class StoredModel:
    """A model in the store. Its files are not read here: the code that loads them checks their digests.

    Attributes:
        folder: where MLflow keeps it.
        classes: their names, in order.
        model_sha256: SHA-256 of the .keras file.
        openvino_sha256: SHA-256 of the network file for OpenVINO; empty for a model that has none.
        reference_sha256: SHA-256 of its reference to training photos; empty for a model that has none.
    """

    folder: Path
    classes: list[str]
    model_sha256: str
    openvino_sha256: str
    reference_sha256: str

    KERAS, OPENVINO, REFERENCE = "data/model.keras", "model.openvino", "reference.npz"
    ABOUT, PHOTOS = "MLmodel", "training_photos.json"
    # What goes with a .keras file: how its name ends beside that file, its name here, and the tag that has its digest.
    BESIDE = ((".openvino", OPENVINO, _OPENVINO_SHA256), (".reference.npz", REFERENCE, _REFERENCE_SHA256))

    @classmethod
    def of(cls, folder: Path, tags: Mapping[str, str]) -> "StoredModel":
        """The model in a folder of MLflow's.

        Args:
            tags: of its version or its run; they hold its digests.

        Raises:
            TouchlineError: the folder has no such model, or it does not name its classes.
        """
        model_sha256 = tags.get(MODEL_SHA256, "")
        if not (folder / cls.KERAS).is_file() or not model_sha256:
            raise TouchlineError(
                f"{folder / cls.KERAS} is missing, or Touchline did not log it: `make run` logs a model again"
            )
        classes = (YAML(typ="safe").load(folder / cls.ABOUT).get("metadata") or {}).get("classes")
        if not classes:
            raise TouchlineError(f"the model in {folder} does not name its classes: Touchline did not log it")
        return cls(folder, list(classes), model_sha256, *(tags.get(tag, "") for _, _, tag in cls.BESIDE))

    @classmethod
    def names(cls, tags: Mapping[str, str]) -> list[str]:
        """Its files in the folder, by the tags of its version."""
        return [cls.ABOUT, cls.KERAS, cls.PHOTOS, *(name for _, name, tag in cls.BESIDE if tags.get(tag))]

    @property
    def file(self) -> Path:
        return self.folder / self.KERAS

    @property
    def openvino(self) -> Path | None:
        return self.folder / self.OPENVINO if self.openvino_sha256 else None

    @property
    def reference(self) -> Path | None:
        return self.folder / self.REFERENCE if self.reference_sha256 else None

    @property
    def training_photos(self) -> set[str]:
        """SHA-256 of each photo that the model learned from."""
        return set(read_json(self.folder / self.PHOTOS))


def open_store(paths: Paths, experiment: str) -> Store:
    """The tracking store, made when missing, with `experiment` in it; runs whose process died are closed as KILLED.

    Raises:
        TouchlineError: the store does not answer, is damaged, or belongs to a project elsewhere.
    """
    store = connect(paths, experiment)
    close_killed(store)
    return store


def start(
    store: Store,
    name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    dataset: Mapping[str, Any],
    started: datetime | None = None,
    parent: str | None = None,
    run_id_before: str | None = None,
) -> str:
    """Open a run (RUNNING) and return its id.

    Args:
        name: shown in the list of runs.
        params: flat; values are logged as text.
        dataset: `name`, `digest` (cut to 36 characters), `source` (a path or URI) and `counts` (JSON).
        started: now when not given.
        parent: id of the run that this one is shown under.
        run_id_before: id of the lost run that this one replaces; it is kept where the store lets us (see `under_id`).
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_USER

    own = {MLFLOW_USER: psutil.Process().username(), **({PARENT: parent} if parent else {}), **this_process()}
    run = store.client.create_run(
        store.experiment_id, _milliseconds(started or datetime.now(UTC)), {**texts(tags), **own}, name
    )
    run_id = run.info.run_id
    if parent:
        store.client.update_run(parent, "RUNNING")
    if run_id_before:
        run_id = under_id(store, run_id, run_id_before)
    store.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
    split = Dataset(
        name=dataset["name"],
        digest=dataset["digest"][:_LONGEST_DIGEST],
        source_type="local",
        source=json.dumps({"uri": str(dataset["source"])}),
        profile=json.dumps(dataset["counts"]),
    )
    store.client.log_inputs(run_id, [DatasetInput(split, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])])
    return run_id


def execution() -> dict[str, str]:
    """The tag that the models trained by one process of DVC, or by one Prefect flow run, have in common.

    Returns:
        No tag for a stage that was started by hand.
    """
    if flow_run := os.environ.get("TOUCHLINE_FLOW_RUN"):
        return {_EXECUTION: f"flow run {flow_run}"}
    if not os.environ.get("DVC_STAGE"):
        return {}
    # DVC starts a stage through a shell.
    dvc = next(process for process in psutil.Process().parents() if process.name() not in SHELLS)
    experiment = os.environ.get("DVC_EXP_NAME")
    what = f"experiment {experiment}" if experiment else "dvc repro"
    # Process ids are reused.
    since = datetime.fromtimestamp(dvc.create_time())
    return {_EXECUTION: f"{what}, {since:%Y-%m-%d %H:%M} ({platform.node()} {dvc.pid})"}


def expect_test(store: Store, run_id: str) -> None:
    """Log `test/accuracy` as not known yet, before any other metric of a run.

    The first chart of MLflow's page that compares runs shows the metric that they logged first.
    """
    _log_metrics(store, run_id, {"test/accuracy": math.nan})


def conclude(store: Store, run_id: str, decision: str, headline: str = "") -> None:
    """Write what was decided on the run of the better model, above its description.

    Args:
        decision: a sentence.
        headline: one line for the experiment, shown above its list of runs; empty leaves what stands there.
    """
    described = store.client.get_run(run_id).data.tags.get(_NOTE, "")
    if described.startswith(_DECISION):
        described = described.partition("\n\n")[2]
    describe(store, run_id, f"{_DECISION}{decision}\n\n{described}")
    if headline:
        before = store.client.get_experiment(store.experiment_id).tags.get(_NOTE, "")
        # The first paragraph alone is ours to replace: people may have written below it.
        note = "\n\n".join([headline, *before.split("\n\n")[1:]])
        store.client.set_experiment_tag(store.experiment_id, _NOTE, note)


def describe(store: Store, run_id: str, description: str) -> None:
    """Write a run's description, in Markdown."""
    set_tags(store, run_id, {_NOTE: description})


def log_row(store: Store, run_id: str, row: Mapping[str, float], when: datetime | None = None) -> None:
    """Log a row of a training's history: at step `epoch` its metrics (`train/loss`, `validation/accuracy`, ...).

    MLflow makes a chart a metric, and groups and sorts them by name: see `_chart`.

    What a head reached with each `strength` is no training curve: it goes under `tried/`.
    """
    metrics = {key: value for key, value in row.items() if key != "epoch"}
    if "strength" in row:
        metrics = {f"tried/{_chart(key).removeprefix('training/')}": value for key, value in metrics.items()}
    _log_metrics(store, run_id, metrics, step=int(row["epoch"]), when=when)


def finish(
    store: Store,
    run_id: str,
    *,
    model_path: Path,
    image_size: int,
    classes: Sequence[str],
    training_photos: Collection[str],
    metrics: Mapping[str, float],
    history: Sequence[Mapping[str, float]] = (),
    ended: datetime | None = None,
) -> None:
    """Log the model of a run, then its closing metrics, and end the run (FINISHED).

    Args:
        model_path: a .keras file, uint8 `(N, image_size, image_size, 3)` in, float32 `(N, len(classes))` out; what
            lies beside it (`StoredModel.BESIDE`) goes with it.
        training_photos: SHA-256 of each photo the model learned from; kept with the model.
        metrics: `train/*` and `validation/*` are those of the weights that were kept.
        history: the rows that were logged before (see `log_row`).
        ended: now when not given.
    """
    model_id = _log_model(store, run_id, model_path, image_size, classes, training_photos)
    _log_closing(store, run_id, metrics, history, model_id)
    beside = {tag: model_path.with_suffix(suffix) for suffix, _, tag in StoredModel.BESIDE}
    digests = {tag: sha256(file) for tag, file in beside.items() if file.is_file()}
    # Last, so that a run found by this tag is whole.
    set_tags(store, run_id, digests | {MODEL_SHA256: sha256(model_path)})
    _terminate(store, run_id, "FINISHED", ended)


def end(
    store: Store,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, float]] = (),
) -> None:
    """End a run that has no model (FINISHED), with closing metrics (see `finish`) and tags."""
    _log_closing(store, run_id, metrics, history)
    set_tags(store, run_id, tags or {})
    _terminate(store, run_id, "FINISHED")


def resume(store: Store, run_id: str) -> bool:
    """Make an ended run RUNNING again, as this process's; False if the store does not have it (any more)."""
    try:
        run = store.client.get_run(run_id)
    except MissingError:
        return False
    if run.info.lifecycle_stage != "active" or run.info.experiment_id != store.experiment_id:
        return False
    set_tags(store, run_id, this_process())
    store.client.update_run(run_id, "RUNNING")
    return True


def fail(store: Store, run_id: str, reason: str) -> None:
    """End a run as FAILED; the tag `touchline.reason` says why."""
    set_tags(store, run_id, {REASON: reason})
    _terminate(store, run_id, "FAILED")


def close_killed(store: Store) -> list[str]:
    """End as KILLED the RUNNING runs of this experiment whose process, on this machine, is gone.

    Returns:
        Their ids.
    """
    running = search(store, f"attributes.status = 'RUNNING' AND tags.`{_HOST}` = '{platform.node()}'")
    killed = [run.info.run_id for run in running if not is_alive(run.data.tags)]
    for run_id in killed:
        set_tags(store, run_id, {REASON: "the process of this run is gone"})
        _terminate(store, run_id, "KILLED")
    return killed


def _terminate(store: Store, run_id: str, status: str, ended: datetime | None = None) -> None:
    store.client.set_terminated(run_id, status, _milliseconds(ended or datetime.now(UTC)))
    # These tags show whether a RUNNING run is alive; on one that has ended they are noise.
    for key in this_process():
        with suppress(MissingError):
            store.client.delete_tag(run_id, key)


def log_evaluation(store: Store, run_id: str, metrics: Mapping[str, float], figures: Path) -> None:
    """Log `test/<metric>` on a run and its model, add them to its description, and log each figure of it.

    Args:
        figures: the folder of those about this model; they lie at the root of the run's artifacts, where the page that
            compares runs finds them.
    """
    logged = test_metrics(metrics)
    known = logged_metrics(store, run_id)
    # The page of a model has a line for each time a value was logged.
    news = {key: value for key, value in logged.items() if known.get(key) != value}
    _log_metrics(store, run_id, news, model_id=logged_model(store, run_id))
    before = store.client.get_run(run_id).data.tags.get(_NOTE, "").partition(_ON_TEST)[0]
    describe(store, run_id, before + _ON_TEST + _in_words(metrics))
    _log_files(store, run_id, figures)


def log_report(store: Store, run_id: str, reports: Path) -> None:
    """Log `report.html` and the figures about several models, for the run of the better one."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, _REPORT)
        page.write_bytes(report_alone(reports))
        store.client.log_artifact(run_id, str(page))
    _log_files(store, run_id, reports / "figures")


def report_alone(reports: Path) -> bytes:
    """`report.html` as MLflow shows it, without the files beside it: links to those are text."""
    html = (reports / _REPORT).read_text(encoding="utf-8")
    return re.sub(r'<a href="(?!#|https?:)[^"]*">(.*?)</a>', r"\1", html).encode()


def log_use(store: Store, run_id: str, metrics: Mapping[str, float], when: datetime) -> None:
    """Log `use/<metric>`, the figures of a model in use; the step is the number of days since 1970."""
    named = {f"use/{name}": value for name, value in metrics.items()}
    _log_metrics(store, run_id, named, step=int(when.timestamp()) // (24 * 60 * 60), when=when)


def has_report(store: Store, run_id: str) -> bool:
    return any(file.path == _REPORT for file in store.client.list_artifacts(run_id))


def _log_files(store: Store, run_id: str, folder: Path) -> None:
    for file in sorted(path for path in folder.glob("*") if path.is_file()):
        store.client.log_artifact(run_id, str(file))


def log_file(store: Store, run_id: str, file: Path) -> None:
    """Log a page or a table as an artifact of a run; the UI shows it as one."""
    store.client.log_artifact(run_id, str(file))


def logged_metrics(store: Store, run_id: str) -> dict[str, float]:
    """The last logged value of each metric of a run."""
    return store.client.get_run(run_id).data.metrics


def set_tags(store: Store, run_id: str, tags: Mapping[str, Any]) -> None:
    from mlflow.entities import RunTag

    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in texts(tags).items()])


def find(store: Store, record: Mapping[str, Any]) -> str | None:
    """Id of the whole, undeleted run that logged the model of `record` (see `ensure`), or None."""
    try:
        run = store.client.get_run(record["run_id"])
    except MissingError:
        run = None
    if run and run.info.lifecycle_stage == "active" and run.data.tags.get(MODEL_SHA256) == record["model_sha256"]:
        return run.info.run_id
    alike = search(store, f"tags.`{MODEL_SHA256}` = '{record['model_sha256']}'")
    return alike[0].info.run_id if alike else None


def ensure(store: Store, record: Mapping[str, Any], model_path: Path) -> str:
    """Id of the run that logged this model; where the store has none, log it whole from the files.

    Args:
        record: what `models/<name>.json` holds: `run_id`, `run_name`, `description`, `model_sha256`, `image_size`,
            `classes`, `params`, `tags`, `history` (a dict an epoch), `metrics`, `dataset`, `training_photos`,
            `started`, `ended` (ISO 8601).
        model_path: the .keras file it describes.

    Raises:
        TouchlineError: the file is missing or is not the one the record describes.
    """
    return find(store, record) or _restore(store, record, model_path)


def _restore(store: Store, record: Mapping[str, Any], model_path: Path) -> str:
    if not model_path.is_file():
        raise TouchlineError(f"{model_path} is missing: run `dvc repro` or `dvc pull` to bring it")
    beside = {tag: model_path.with_suffix(suffix) for suffix, _, tag in StoredModel.BESIDE}
    for tag, file in {MODEL_SHA256: model_path, **beside}.items():
        if file.is_file() and sha256(file) != record.get(tag.removeprefix("touchline.")):
            raise TouchlineError(f"{file} is not the file its .json describes: run `dvc repro` to renew both")
    started, ended = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
    tags = {**record["tags"], "touchline.restored": record["run_id"]}
    arguments = record["run_name"], tags, record["params"], record["dataset"], started
    run_id = start(store, *arguments, run_id_before=record["run_id"])
    expect_test(store, run_id)
    describe(store, run_id, record["description"])
    for row in record["history"]:
        log_row(store, run_id, row, when=ended)
    results = {key: record[key] for key in ("image_size", "classes", "training_photos", "metrics", "history")}
    finish(store, run_id, model_path=model_path, **results, ended=ended)
    return run_id


def model(store: Store, run_id: str) -> StoredModel:
    """The model of a run.

    Raises:
        TouchlineError: the run has no model, or another tool logged it, without its classes.
    """
    model_id = logged_model(store, run_id)
    if model_id is None:
        raise TouchlineError(f"run {run_id} in {store.place} has no model: name another run")
    folder = fetch(store, store.client.get_logged_model(model_id).artifact_location, f"run {run_id}")
    return StoredModel.of(folder, store.client.get_run(run_id).data.tags)


def fetch(store: Store, uri: str, what: str) -> Path:
    """Path of a model's files or of one of them, downloaded if they are elsewhere; `what` names it in errors."""
    with one_line_errors(f"{what} in {store.place}"):
        import mlflow.artifacts
        from mlflow.utils.file_utils import get_or_create_tmp_dir
        from mlflow.utils.uri import is_local_uri

        # What lies on this disk is not copied; what is fetched is deleted when the process ends.
        target = None if is_local_uri(uri) else tempfile.mkdtemp(dir=get_or_create_tmp_dir())
        return Path(mlflow.artifacts.download_artifacts(uri, None, None, target, store.client.tracking_uri))


def artifact(store: Store, run_id: str, name: str) -> Path:
    """Path of a file that was logged with a run, downloaded if it is elsewhere. Raises StoreError if there is none."""
    return fetch(store, f"{store.client.get_run(run_id).info.artifact_uri}/{name}", name)


def _log_model(
    store: Store, run_id: str, path: Path, image_size: int, classes: Sequence[str], training_photos: Collection[str]
) -> str:
    import mlflow.pyfunc
    import numpy as np
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    run = store.client.get_run(run_id)
    # MLflow takes no name with one of these.
    name = re.sub(r"[/:.%\"']", "-", run.info.run_name)
    logged = store.client.create_logged_model(store.experiment_id, name, run_id, params=run.data.params)
    try:
        with tempfile.TemporaryDirectory() as parent, one_line_errors(store.place):
            package, folder = Path(parent, "touchline"), Path(parent, "model")
            for module in CODE:
                carried = package / f"{module}.py"
                carried.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(PACKAGE / f"{module}.py", carried)
            about = Model(
                logged.artifact_location,
                run_id,
                # A signature of the input would allow one kind alone; as an argument of `save_model` it would warn.
                signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)))])),
                model_id=logged.model_id,
            )
            # `mlflow.tensorflow.load_model` gives the Keras model itself.
            keras_model = {"model_type": "keras", "keras_version": installed_version("keras"), "save_format": "tf"}
            about.add_flavor("tensorflow", data=str(Path(StoredModel.KERAS).parent), **keras_model)
            mlflow.pyfunc.save_model(
                str(folder),
                loader_module="touchline.models.photo_model",
                data_path=str(shutil.copyfile(path, Path(parent, Path(StoredModel.KERAS).name))),
                code_paths=[str(package)],
                mlflow_model=about,
                # Without a list MLflow finds it by loading the model in a new process, which takes 24 s.
                pip_requirements=[f"{name}=={installed_version(name)}" for name in _REQUIREMENTS],
                metadata={"classes": list(classes), "image_size": image_size},
            )
            for suffix, name_there, _ in StoredModel.BESIDE:
                if path.with_suffix(suffix).is_file():
                    shutil.copyfile(path.with_suffix(suffix), folder / name_there)
            Path(folder, StoredModel.PHOTOS).write_text(json.dumps(sorted(training_photos)))
            store.client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        store.client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    store.client.finalize_logged_model(logged.model_id, "READY")
    store.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id


def _log_closing(
    store: Store,
    run_id: str,
    metrics: Mapping[str, float],
    history: Sequence[Mapping[str, float]],
    model_id: str | None = None,
) -> None:
    # MLflow shows the value of the last step: one more point shows those of the weights that were kept.
    after = len(history) if history and "strength" not in history[-1] else 0
    curves = {key: value for key, value in metrics.items() if key.startswith(_SUBSETS)}
    _log_metrics(store, run_id, curves, step=after, model_id=model_id)
    others = {key: value for key, value in metrics.items() if key not in curves}
    _log_metrics(store, run_id, others, model_id=model_id)


def _log_metrics(
    store: Store,
    run_id: str,
    metrics: Mapping[str, float],
    step: int = 0,
    when: datetime | None = None,
    model_id: str | None = None,
) -> None:
    from mlflow.entities import Metric

    timestamp = _milliseconds(when or datetime.now(UTC))
    logged = [Metric(_chart(key), float(value), timestamp, step, model_id) for key, value in metrics.items()]
    store.client.log_batch(run_id, metrics=logged)


def _chart(key: str) -> str:
    """The name of a metric in MLflow, where `train/loss` and `validation/loss` are neighbours in one group of charts.

    `training/` follows `test/`, so that what was reached on the test photos stands first.
    """
    subset, _, metric = key.partition("/")
    if f"{subset}/" in _SUBSETS:
        return f"training/{metric}_{subset}"
    return f"training/{subset}" if key in _OF_TRAINING else key


def logged_model(store: Store, run_id: str) -> str | None:
    """Id of the model that a run logged last."""
    outputs = store.client.get_run(run_id).outputs
    return outputs.model_outputs[-1].model_id if outputs and outputs.model_outputs else None


def search(store: Store, filter_string: str) -> "list[Run]":
    return list(pages(store.client.search_runs, [store.experiment_id], filter_string))


def _in_words(metrics: Mapping[str, Any]) -> str:
    """The numbers of a model in reports/metrics.json in a sentence."""
    accuracy, low, high, loss = map(metrics.get, ("accuracy", "accuracy_low", "accuracy_high", "log_loss"))
    words = [f"accuracy {accuracy:.3f}"] if accuracy is not None else []
    words += [f"95 % interval {low:.3f} to {high:.3f}"] if low is not None and high is not None else []
    words += [f"log loss {loss:.3f}"] if loss is not None else []
    return ", ".join(words) or "judged"


def test_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a model in reports/metrics.json, by the names they are logged under."""
    return {
        f"test/{key}": float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _NOT_LOGGED
    }


def this_process() -> dict[str, str]:
    """Tags by which `is_alive` knows this process."""
    process = psutil.Process()
    return {_HOST: platform.node(), _PID: str(process.pid), _PROCESS_STARTED: repr(_since_boot(process))}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that `this_process` described runs; processes on other machines are assumed to."""
    if _PID not in tags:
        return False
    if tags[_HOST] != platform.node():
        return True
    try:
        process = psutil.Process(int(tags[_PID]))
        same = abs(_since_boot(process) - float(tags[_PROCESS_STARTED])) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _since_boot(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's, which setting the clock does not change."""
    return process.create_time() - psutil.boot_time()


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
