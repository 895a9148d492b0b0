"""What the project tells MLflow and asks of it: runs, datasets, models, the registry. Nothing else imports `mlflow`.

The store is a SQLite file in the project unless MLFLOW_TRACKING_URI names another. DVC does not see it, so it may be
deleted, or be a stranger to models that DVC brought: `sync` puts back, out of the project's files, what is missing.
"""

import json
import os
import platform
import random
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil
from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from touchline.core.errors import TouchlineError
from touchline.core.files import model_record, read_json, sha256
from touchline.core.paths import Paths
from touchline.core.stage import SHELLS
from touchline.core.tensorflow import import_tensorflow

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
CHALLENGER = "challenger"

_SHA256, _OPENVINO_SHA256 = "touchline.model_sha256", "touchline.openvino_sha256"
_REPLACED = "touchline.replaced"
_PROMOTED_AT = "touchline.promoted_at"
_ROLLED_BACK = "touchline.rolled_back"
_PROMOTING = "touchline.promoting"
_SECONDS_TO_PROMOTE = 60
_HOST, _PID, _PROCESS_STARTED = "touchline.host", "touchline.pid", "touchline.process_started"
_EXECUTION = "touchline.execution"
_NOTE = "mlflow.note.content"
_PARENT = "mlflow.parentRunId"
_MODEL_VERSIONS = "mlflow.modelVersions"
_LONGEST_DIGEST = 36  # characters of a dataset digest that MLflow takes

_EXPERIMENT_NOTE = """\
Photo classifiers. A row "pipeline" is one run of the pipeline: its decision, and the metrics of the model it chose.

- **Its models** stand under it: press the plus.
- **Compare**: tick the runs of models, press Compare; params, metrics, figures and tags stand side by side.
- **train/\\***, **validation/\\***: one step an epoch; the last point is that of the weights that were kept.
- **tried/\\***: of a model that has no epochs, one step a strength that was tried.
- **test/\\***: by `evaluate`, on photos that no model learned from, and that chose none.
- **Dataset**: the split, by digest. Runs with one digest learned from the same photos.
- A run tagged `touchline.restored` was logged from the project's files, not while it trained.
"""
_REGISTERED_MODEL_NOTE = """\
Classifies photos. `@champion` is the version in use, `@challenger` the last one registered.

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/{name}@champion")
model.metadata.metadata  # the names of the classes, in order, and the side of the photos in pixels
model.predict(photos)  # uint8 RGB, shape (n, side, side, 3) -> probabilities, shape (n, classes)
```

Each version says which photos it learned from, what it reached, and why it became champion or not. The tag
`touchline.replaced` names the version that a champion took over from: `touchline rollback` goes there. The tag
`touchline.rolled_back` says when a version was rolled back: only `touchline promote` makes it champion again.
"""
# What the page of runs opens with: MLflow's own "Share view", under a key that is always the same.
_VIEW = "touchline"
_CONCLUDED = ("test/accuracy", "test/log_loss", "validation/accuracy")
_COLUMNS = ["attributes.`Description`", *(f"metrics.`{key}`" for key in _CONCLUDED)]
_VIEW_TAG, _VIEW_STATE = f"mlflow.sharedViewState.{_VIEW}", json.dumps({"selectedColumns": _COLUMNS})
_ON_TEST = "\n\n**On the test photos**: "


class StoreError(TouchlineError):
    """The store did not do what it was asked for: it does not answer, refuses, or fails."""


class _MissingError(StoreError):
    """The store has no such thing."""


class _ExistsError(StoreError):
    """The store has a thing of that name already."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model.

    Attributes:
        source: URI of the logged model that the version points at.
        aliases: names that point at this version, sorted.
    """

    name: str
    number: int
    run_id: str
    source: str
    description: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def model_sha256(self) -> str:
        """SHA-256 of the .keras file; empty for a version that another tool registered."""
        return self.tags.get(_SHA256, "")

    @property
    def rolled_back(self) -> str:
        """When a person rolled it back, in ISO 8601; empty if that did not happen, or it was promoted again since."""
        return self.tags.get(_ROLLED_BACK, "")


@dataclass(frozen=True)
class StoredModel:
    """A model in the store. Its files are not looked at here: digests are checked by what loads them.

    Attributes:
        folder: where MLflow keeps it.
        classes: their names, in order.
        model_sha256: SHA-256 of the .keras file.
        openvino_sha256: SHA-256 of the network file for OpenVINO; empty for a model that has none.
    """

    folder: Path
    classes: list[str]
    model_sha256: str
    openvino_sha256: str

    KERAS, OPENVINO, ABOUT, PHOTOS = "data/model.keras", "model.openvino", "MLmodel", "training_photos.json"
    NAMES = (ABOUT, KERAS, OPENVINO, PHOTOS)

    @classmethod
    def of(cls, folder: Path, model_sha256: str, tags: Mapping[str, str]) -> "StoredModel":
        """The one in a folder of MLflow's.

        Args:
            model_sha256: as the store has it beside the files.
            tags: of its version or its run.

        Raises:
            TouchlineError: the folder has no such model, or it does not name its classes.
        """
        if not (folder / cls.KERAS).is_file() or not model_sha256:
            raise TouchlineError(
                f"{folder / cls.KERAS} is missing, or Touchline did not log it: `make run` logs a model again"
            )
        classes = (YAML(typ="safe").load(folder / cls.ABOUT).get("metadata") or {}).get("classes")
        if not classes:
            raise TouchlineError(f"the model in {folder} does not name its classes: Touchline did not log it")
        return cls(folder, list(classes), model_sha256, tags.get(_OPENVINO_SHA256, ""))

    @property
    def file(self) -> Path:
        return self.folder / self.KERAS

    @property
    def openvino(self) -> Path | None:
        return self.folder / self.OPENVINO if self.openvino_sha256 else None

    @property
    def training_photos(self) -> set[str]:
        """SHA-256 of each photo that the model learned from."""
        return set(read_json(self.folder / self.PHOTOS))


def open_store(paths: Paths, experiment: str) -> "Store":
    """The tracking store, made when missing, with `experiment` in it; runs whose process died are closed as KILLED.

    Raises:
        TouchlineError: the store does not answer, is damaged, or belongs to a project elsewhere.
    """
    uri = _tracking_uri(paths)
    _quiet_mlflow()
    from mlflow import MlflowClient

    lock = FileLock(paths.project / ".dvc/tmp/touchline/store.lock", timeout=120)
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    where = _where(uri)
    # Two trainings that start on a fresh machine would both create the tables and the experiment.
    with _held(lock):
        _check_database(paths, uri)
        with _one_line_errors(where):
            client = _Client(MlflowClient(uri, _registry_uri(paths)), where)
        experiment_id = _experiment(client, experiment, _artifacts_uri(paths, uri), where)
    store = Store(client, experiment_id, where, lock)
    store.close_killed()
    return store


@contextmanager
def _held(lock: FileLock) -> Iterator[None]:
    """Run the block under the store's lock. Raises StoreError where another process keeps it for too long."""
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(f"{lock.lock_file} is held by another process: end it, or wait, and run again") from None
    try:
        yield
    finally:
        lock.release()


class Store:
    """Runs of one experiment, and the registry. Made by `open_store`; every failure of MLflow is a TouchlineError.

    It names runs, not an active one, and leaves MLflow's global state alone: two stores may be open at once.
    """

    def __init__(self, client: "_Client", experiment_id: str, where: str, lock: FileLock) -> None:
        self._client = client
        self.experiment_id = experiment_id
        self._where = where
        self._lock = lock

    def start(
        self,
        name: str,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        dataset: Mapping[str, Any],
        started: datetime | None = None,
        parent: str | None = None,
    ) -> str:
        """Open a run (RUNNING) and return its id.

        Args:
            name: what a person calls the run.
            params: flat; values are logged as text.
            dataset: `name`, `digest` (cut to 36 characters), `source` (a path or URI) and `counts` (JSON).
            started: now when not given.
            parent: id of the run that this one is shown under.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_USER

        own = {MLFLOW_USER: psutil.Process().username(), **({_PARENT: parent} if parent else {}), **this_process()}
        # A run that ends meanwhile would end the parent of both.
        with _held(self._lock):
            run = self._client.create_run(self.experiment_id, _milliseconds(started), {**_texts(tags), **own}, name)
            if parent:
                self._client.update_run(parent, "RUNNING")
        run_id = run.info.run_id
        self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        split = Dataset(
            name=dataset["name"],
            digest=dataset["digest"][:_LONGEST_DIGEST],
            source_type="local",
            source=json.dumps({"uri": str(dataset["source"])}),
            profile=json.dumps(dataset["counts"]),
        )
        self._client.log_inputs(run_id, [DatasetInput(split, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])])
        return run_id

    def execution(self, tags: Mapping[str, Any]) -> str | None:
        """Id of the run that stands for this execution of the pipeline, made with `tags` when there is none.

        What one Prefect flow run, or one process of DVC (`dvc repro`, an experiment), trains is shown under it. It is
        RUNNING while one of those runs is, and has no model.

        Returns:
            None for a stage that was started by hand: its run stands for itself.
        """
        from mlflow.utils.mlflow_tags import MLFLOW_USER

        key, since = _execution()
        if not key:
            return None
        with _held(self._lock):
            known = self._search(f"tags.`{_EXECUTION}` = '{key}' AND attributes.start_time >= {since}")
            if known:
                return known[0].info.run_id
            experiment = os.environ.get("DVC_EXP_NAME")
            # The list of runs has room for some twenty letters.
            named = f"exp {experiment}" if experiment else f"pipeline {datetime.now():%m-%d %H:%M}"
            own = {
                MLFLOW_USER: psutil.Process().username(),
                _EXECUTION: key,
                _NOTE: "No decision yet: `register` has not run since these models were trained.",
                "mlflow.source.name": "dvc exp run" if experiment else "dvc repro",
            }
            run = self._client.create_run(self.experiment_id, None, {**_texts(tags), **own}, named)
            self._client.set_terminated(run.info.run_id, "FINISHED")
            return run.info.run_id

    def conclude(self, run_ids: Collection[str], better: str, description: str) -> None:
        """Write what came of an execution of the pipeline on the run that stands for it (see `execution`).

        The page of runs begins with those alone, in its list and in its charts: they get the better model's metrics.

        Args:
            run_ids: the runs that were decided among; of several executions the last one's is meant.
            better: the run of the model that was chosen.
        """
        runs = [self._client.get_run(run_id) for run_id in run_ids]
        last = max(runs, key=lambda run: run.info.start_time)
        if parent := last.data.tags.get(_PARENT):
            found = self.metrics(better)
            self._log_metrics(parent, {key: found[key] for key in _CONCLUDED if key in found})
            self.describe(parent, description)

    def describe(self, run_id: str, description: str) -> None:
        """Write a run's description, in Markdown."""
        self.set_tags(run_id, {_NOTE: description})

    def log_row(self, run_id: str, row: Mapping[str, float], when: datetime | None = None) -> None:
        """Log a row of a training's history: at step `epoch` its metrics (`train/loss`, `validation/accuracy`, ...).

        What a head reached with each `strength` is no course of a training, so it is kept apart from the curves, under
        `tried/`.
        """
        metrics = {key: value for key, value in row.items() if key != "epoch"}
        if "strength" in row:
            metrics = {f"tried/{key.replace('/', '_')}": value for key, value in metrics.items()}
        self._log_metrics(run_id, metrics, step=int(row["epoch"]), when=when)

    def finish(
        self,
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
            model_path: a .keras file, uint8 `(N, image_size, image_size, 3)` in, float32 `(N, len(classes))` out; the
                network file for OpenVINO beside it, if there is one, goes with it.
            training_photos: SHA-256 of each photo the model learned from; kept with the model.
            metrics: `train/*` and `validation/*` are those of the weights that were kept.
            history: the rows that were logged before (see `log_row`).
            ended: now when not given.
        """
        model_id = self._log_model(run_id, model_path, image_size, classes, training_photos)
        self._log_closing(run_id, metrics, history, model_id)
        # Last, so that whoever finds a run by this tag finds a whole one.
        openvino = model_path.with_suffix(".openvino")
        self.set_tags(
            run_id,
            ({_OPENVINO_SHA256: sha256(openvino)} if openvino.is_file() else {}) | {_SHA256: sha256(model_path)},
        )
        self._terminate(run_id, "FINISHED", _milliseconds(ended))

    def end(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, Any] | None = None,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """End a run that has no model (FINISHED), with closing metrics (see `finish`) and tags."""
        self._log_closing(run_id, metrics, history)
        self.set_tags(run_id, tags or {})
        self._terminate(run_id, "FINISHED")

    def resume(self, run_id: str) -> bool:
        """Make an ended run RUNNING again, as this process's; False if the store does not have it (any more)."""
        try:
            run = self._client.get_run(run_id)
        except _MissingError:
            return False
        if run.info.lifecycle_stage != "active" or run.info.experiment_id != self.experiment_id:
            return False
        self.set_tags(run_id, this_process())
        self._client.update_run(run_id, "RUNNING")
        return True

    def fail(self, run_id: str, reason: str) -> None:
        """End a run as FAILED; the tag `touchline.reason` says why."""
        self.set_tags(run_id, {"touchline.reason": reason})
        self._terminate(run_id, "FAILED")

    def close_killed(self) -> list[str]:
        """End as KILLED the RUNNING runs of this experiment whose process, on this machine, is gone.

        Returns:
            Their ids.
        """
        running = self._search(f"attributes.status = 'RUNNING' AND tags.`{_HOST}` = '{platform.node()}'")
        killed = [run.info.run_id for run in running if not is_alive(run.data.tags)]
        for run_id in killed:
            self.set_tags(run_id, {"touchline.reason": "the process of this run is gone"})
            self._terminate(run_id, "KILLED")
        # A process may have ended between its run's end and that of the parent.
        for run in self._search(f"attributes.status = 'RUNNING' AND tags.`{_EXECUTION}` LIKE '%'"):
            self._settle(run.info.run_id)
        return killed

    def _terminate(self, run_id: str, status: str, ended: int | None = None) -> None:
        self._client.set_terminated(run_id, status, ended)
        # They say whether a RUNNING run is alive; of one that has ended they tell a reader nothing.
        for key in this_process():
            with suppress(_MissingError):
                self._client.delete_tag(run_id, key)
        if parent := self._client.get_run(run_id).data.tags.get(_PARENT):
            self._settle(parent)

    def _settle(self, execution: str) -> None:
        """End the run of an execution of the pipeline, as its runs have ended, unless one of them is RUNNING."""
        with _held(self._lock):
            if _EXECUTION not in self._client.get_run(execution).data.tags:
                return  # of another kind: who began it ends it
            ended = {run.info.status for run in self._search(f"tags.`{_PARENT}` = '{execution}'")}
            if "RUNNING" not in ended:
                status = next((bad for bad in ("KILLED", "FAILED") if bad in ended), "FINISHED")
                self._client.set_terminated(execution, status)

    def log_evaluation(self, run_id: str, metrics: Mapping[str, float], figures: Mapping[str, Path]) -> None:
        """Log `test/<metric>` on a run and its model, say them in its description, and log each figure.

        The figures lie at the root of the run's artifacts, where the page that compares runs finds them.
        """
        models = self._models(run_id)
        logged = _test_metrics(metrics)
        known = self.metrics(run_id)
        # The page of a model has a line for each time a value was logged.
        news = {key: value for key, value in logged.items() if known.get(key) != value}
        self._log_metrics(run_id, news, model_id=models[-1] if models else None)
        before = self._client.get_run(run_id).data.tags.get(_NOTE, "").partition(_ON_TEST)[0]
        self.describe(run_id, before + _ON_TEST + _said(logged))
        with tempfile.TemporaryDirectory() as folder:
            for name, path in figures.items():
                named = Path(folder, name + path.suffix)
                shutil.copyfile(path, named)
                self._client.log_artifact(run_id, str(named))

    def log_report(self, run_id: str, page: Path) -> None:
        """Log an HTML page as an artifact of a run, which the UI shows as a page."""
        self._client.log_artifact(run_id, str(page))

    def metrics(self, run_id: str) -> dict[str, float]:
        """The last logged value of each metric of a run."""
        return self._client.get_run(run_id).data.metrics

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _texts(tags).items()])

    def find(self, record: Mapping[str, Any]) -> str | None:
        """Id of the whole, undeleted run that logged the model of `record` (see `ensure`), or None."""
        try:
            run = self._client.get_run(record["run_id"])
        except _MissingError:
            run = None
        if run and run.info.lifecycle_stage == "active" and run.data.tags.get(_SHA256) == record["model_sha256"]:
            return run.info.run_id
        alike = self._search(f"tags.`{_SHA256}` = '{record['model_sha256']}'")
        return alike[0].info.run_id if alike else None

    def ensure(self, record: Mapping[str, Any], model_path: Path) -> str:
        """Id of the run that logged this model; where the store has none, log it whole from the files.

        Args:
            record: what `models/<name>.json` holds: `run_id`, `run_name`, `description`, `model_sha256`, `image_size`,
                `classes`, `params`, `tags`, `history` (a dict an epoch), `metrics`, `dataset`, `training_photos`,
                `started`, `ended` (ISO 8601).
            model_path: the .keras file it describes.

        Raises:
            TouchlineError: the file is missing or is not the one the record describes.
        """
        return self.find(record) or self._restore(record, model_path)

    def _restore(self, record: Mapping[str, Any], model_path: Path) -> str:
        if not model_path.is_file():
            raise TouchlineError(f"{model_path} is missing: run `dvc repro` or `dvc pull` to bring it")
        if sha256(model_path) != record["model_sha256"]:
            raise TouchlineError(f"{model_path} is not the file its .json describes: run `dvc repro` to renew both")
        openvino = model_path.with_suffix(".openvino")
        if openvino.is_file() and sha256(openvino) != record.get("openvino_sha256"):
            raise TouchlineError(f"{openvino} is not the file its .json describes: run `dvc repro` to renew both")
        started, ended = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
        tags = {**record["tags"], "touchline.restored": "true"}
        parent = self._parent(record["run_id"])
        run_id = self.start(record["run_name"], tags, record["params"], record["dataset"], started, parent)
        self.describe(run_id, record["description"])
        for row in record["history"]:
            self.log_row(run_id, row, when=ended)
        self.finish(
            run_id,
            model_path=model_path,
            image_size=record["image_size"],
            classes=record["classes"],
            training_photos=record["training_photos"],
            metrics=record["metrics"],
            history=record["history"],
            ended=ended,
        )
        return run_id

    def _parent(self, run_id: str) -> str | None:
        """Id of the run that one which broke off, or was deleted, is shown under; None where the store has not both."""
        try:
            parent = self._client.get_run(run_id).data.tags.get(_PARENT)
            found = self._client.get_run(parent).info if parent else None
        except _MissingError:
            return None
        there = found and found.lifecycle_stage == "active" and found.experiment_id == self.experiment_id
        return parent if there else None

    def register(self, name: str, run_id: str, tags: Mapping[str, Any], description: str) -> int:
        """Register the model of a run as a new version of `name` and return its number. No alias moves.

        The version also gets the run's tags `touchline.model_sha256` and `touchline.openvino_sha256`.
        """
        models = self._models(run_id)
        if not models:
            raise TouchlineError(f"run {run_id} in {self._where} has no model to register: train it again")
        if self._registered(name) is None:
            with suppress(_ExistsError):  # another machine made it meanwhile
                self._client.create_registered_model(name, description=_REGISTERED_MODEL_NOTE.format(name=name))
        model = self._client.get_logged_model(models[-1])
        known = self._client.get_run(run_id).data.tags
        version = self._client.create_model_version(
            name,
            # Not `models:/<id>`: a SQL registry looks that up in MLflow's global store, which need not be this one.
            model.artifact_location,
            run_id,
            tags=_texts(tags) | {key: known[key] for key in (_SHA256, _OPENVINO_SHA256) if key in known},
            description=description,
            model_id=model.model_id,
        )
        # The page of the run's model links to its versions by this tag, which only a server would set.
        linked = json.loads(model.tags.get(_MODEL_VERSIONS, "[]"))
        linked.append({"name": name, "version": int(version.version)})
        self._client.set_logged_model_tags(model.model_id, {_MODEL_VERSIONS: json.dumps(linked)})
        return int(version.version)

    def versions(self, name: str) -> list[Version]:
        """Every version of `name`, oldest first; none where nothing was ever registered."""
        registered = self._registered(name)
        if registered is None:
            return []
        found = [
            _version(version, registered.aliases)
            for version in _pages(self._client.search_model_versions, f"name = '{name}'")
        ]
        return sorted(found, key=lambda version: version.number)

    def alias(self, name: str, alias: str) -> Version | None:
        """The version of `name` that `alias` points at, or None."""
        registered = self._registered(name)
        if registered is None or alias not in registered.aliases:
            return None
        return _version(self._client.get_model_version(name, registered.aliases[alias]), registered.aliases)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        self._client.set_registered_model_alias(name, alias, str(version))

    def describe_version(self, name: str, version: int, tags: Mapping[str, Any], description: str) -> None:
        """Write a version's tags and description anew."""
        self.set_version_tags(name, version, tags)
        self._client.update_model_version(name, str(version), description)

    def set_version_tags(self, name: str, version: int, tags: Mapping[str, Any]) -> None:
        for key, value in _texts(tags).items():
            self._client.set_model_version_tag(name, str(version), key, value)

    def promote(self, name: str, version: int) -> None:
        """Make `version` the champion, whoever is; see `replace`."""
        while not self.replace(name, self.alias(name, CHAMPION), version):
            pass

    def replace(self, name: str, champion: Version | None, version: int) -> bool:
        """Make `version` the champion in place of `champion`, and note on it whom it replaced, and when.

        Nothing to do where it already is the champion.

        Args:
            champion: as `alias` gave it; None where nobody was.

        Returns:
            False if another became champion since; then all is as it was.
        """
        if champion and champion.number == version:
            return True
        before = champion.number if champion else None
        with self._alone_at_the_champion(name, version):
            now = self.alias(name, CHAMPION)
            if (now.number if now else None) != before:
                return False
            tags = {_REPLACED: before or "none", _PROMOTED_AT: _now().isoformat(timespec="seconds")}
            # The alias moves last: a promotion that breaks off leaves the old champion in place.
            self.set_version_tags(name, version, tags)
            self._crown(name, version)
            return True

    def rolled_back(self, name: str, model_sha256: str) -> Version | None:
        """The version of `name` with this very model, where a person rolled it back and did not promote it since."""
        return next((v for v in self.versions(name) if v.model_sha256 == model_sha256 and v.rolled_back), None)

    def _crown(self, name: str, version: int) -> None:
        self.set_alias(name, CHAMPION, version)
        with suppress(_MissingError):  # it was never rolled back
            self._client.delete_model_version_tag(name, str(version), _ROLLED_BACK)

    @contextmanager
    def _alone_at_the_champion(self, name: str, version: int) -> Iterator[None]:
        """Run the block while nobody else, on whichever machine, is in one of another version.

        MLflow cannot compare and set in one step. So each tags its version first and then looks for others' tags; who
        sees one takes its own away and tries again later. A tag a minute old is of a process that died.
        """

        def busy(other: Version) -> bool:
            since = other.tags.get(_PROMOTING)
            if not since:
                return False
            return abs((_now() - datetime.fromisoformat(since)).total_seconds()) < _SECONDS_TO_PROMOTE

        while True:
            self.set_version_tags(name, version, {_PROMOTING: _now().isoformat()})
            try:
                if not any(busy(other) for other in self.versions(name) if other.number != version):
                    yield
                    return
            finally:
                with suppress(StoreError):
                    self._client.delete_model_version_tag(name, str(version), _PROMOTING)
            # Two that give way to each other must not meet again.
            time.sleep(random.uniform(0.2, 2))

    def rollback(self, name: str) -> int:
        """Give the alias `champion` back to the version that the champion replaced, and return that version.

        The one that loses it is tagged, so that `register` does not make it champion again.

        Raises:
            TouchlineError: there is no champion, it replaced none, or the one it replaced was deleted.
        """
        champion = self.alias(name, CHAMPION)
        if champion is None:
            raise TouchlineError(f"{name} in {self._where} has no champion to roll back: promote a version first")
        replaced = champion.tags.get(_REPLACED, "none")
        if replaced == "none":
            raise TouchlineError(
                f"version {champion.number} of {name} replaced no other, so there is none to go back to: "
                "promote another version instead"
            )
        if int(replaced) not in {version.number for version in self.versions(name)}:
            raise TouchlineError(
                f"version {replaced} of {name}, which version {champion.number} replaced, was deleted: "
                "promote another version instead"
            )
        self.set_version_tags(name, champion.number, {_ROLLED_BACK: _now().isoformat(timespec="seconds")})
        self._crown(name, int(replaced))
        return int(replaced)

    def delete(self, run_ids: Collection[str], model_ids: Collection[str]) -> None:
        """Delete runs and logged models as a person does in the UI: they can be brought back until `mlflow gc`."""
        # Runs first: of a deleted run the model is found again, a run without its model would look whole.
        for run_id in run_ids:
            self._client.delete_run(run_id)
        for model_id in model_ids:
            self._client.delete_logged_model(model_id)

    def model(self, source: Version | str) -> StoredModel:
        """The model of a version, or of the run with that id.

        Raises:
            TouchlineError: the store has no such model, or another tool logged it, without its classes.
        """
        if isinstance(source, Version):
            tags, run_id = source.tags, source.run_id
            folder = self._download(source.name, source.number)
        else:
            tags, run_id, models = {}, source, self._models(source)
            if not models:
                raise TouchlineError(f"run {source} in {self._where} has no model: name another run")
            folder = self._fetch(self._client.get_logged_model(models[-1]).artifact_location, f"run {source}")
        if not tags.get(_SHA256) and run_id:  # a version that another tool registered may have no run
            tags = self._client.get_run(run_id).data.tags
        return StoredModel.of(folder, tags.get(_SHA256, ""), tags)

    def training_photos(self, name: str, version: int) -> set[str]:
        """SHA-256 of each photo that a version learned from."""
        return set(read_json(self._download(name, version, StoredModel.PHOTOS)))

    def _download(self, name: str, version: int, file: str = "") -> Path:
        location = self._client.get_model_version_download_uri(name, str(version))
        return self._fetch(f"{location.rstrip('/')}/{file}", f"version {version} of {name}")

    def _fetch(self, uri: str, what: str) -> Path:
        with _one_line_errors(f"{what} in {self._where}"):
            import mlflow.artifacts
            from mlflow.utils.file_utils import get_or_create_tmp_dir
            from mlflow.utils.uri import is_local_uri

            # What lies on this disk is not copied: its own path comes back. What is fetched goes when the process ends.
            target = None if is_local_uri(uri) else tempfile.mkdtemp(dir=get_or_create_tmp_dir())
            return Path(mlflow.artifacts.download_artifacts(uri, None, None, target, self._client.tracking_uri))

    def _log_model(
        self, run_id: str, path: Path, image_size: int, classes: Sequence[str], training_photos: Collection[str]
    ) -> str:
        import_tensorflow()
        import mlflow.keras
        import numpy as np
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        run = self._client.get_run(run_id)
        # MLflow takes no name with one of these.
        name = re.sub(r"[/:.%\"']", "-", run.info.run_name)
        logged = self._client.create_logged_model(self.experiment_id, name, run_id, params=run.data.params)
        try:
            with tempfile.TemporaryDirectory() as parent, _one_line_errors(self._where):
                folder = Path(parent, "model")
                mlflow.keras.save_model(
                    _SavedModel(path),
                    str(folder),
                    mlflow_model=Model(logged.artifact_location, run_id, model_id=logged.model_id),
                    # Unnamed: MLflow hands a named tensor over in a dict, which a model of one input refuses.
                    signature=ModelSignature(
                        Schema([TensorSpec(np.dtype("uint8"), (-1, image_size, image_size, 3))]),
                        Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)))]),
                    ),
                    # Without a list MLflow finds it by loading the model in a new process, which takes 24 s.
                    pip_requirements=[f"{name}=={installed_version(name)}" for name in _REQUIREMENTS],
                    metadata={"classes": list(classes), "image_size": image_size},
                )
                if (openvino := path.with_suffix(".openvino")).is_file():
                    shutil.copyfile(openvino, folder / StoredModel.OPENVINO)
                Path(folder, StoredModel.PHOTOS).write_text(json.dumps(sorted(training_photos)))
                self._client.log_model_artifacts(logged.model_id, str(folder))
        except BaseException:
            self._client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return logged.model_id

    def _log_closing(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, float]],
        model_id: str | None = None,
    ) -> None:
        # MLflow shows the value of the last step: one more point says that not the last epoch's weights were kept.
        after = len(history) if history and "strength" not in history[-1] else 0
        curves = {key: value for key, value in metrics.items() if key.startswith(("train/", "validation/"))}
        self._log_metrics(run_id, curves, step=after, model_id=model_id)
        others = {key: value for key, value in metrics.items() if key not in curves}
        self._log_metrics(run_id, others, model_id=model_id)

    def _log_metrics(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        step: int = 0,
        when: datetime | None = None,
        model_id: str | None = None,
    ) -> None:
        from mlflow.entities import Metric

        timestamp = _milliseconds(when) or int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, float(value), timestamp, step, model_id) for key, value in metrics.items()],
        )

    def _models(self, run_id: str) -> list[str]:
        outputs = self._client.get_run(run_id).outputs
        return [output.model_id for output in outputs.model_outputs] if outputs else []

    def _search(self, filter_string: str) -> "list[Run]":
        return list(_pages(self._client.search_runs, [self.experiment_id], filter_string))

    def _registered(self, name: str) -> Any:
        try:
            return self._client.get_registered_model(name)
        except _MissingError:
            return None


def sync(paths: Paths, registered_name: str) -> list[str]:
    """Put into the store what the project's files hold and the store lacks; return a line for each thing put back.

    Each `models/*.json` gets its run, with its test metrics from reports/metrics.json; the version in
    reports/registration.json gets registered. An alias that another version holds stays there.

    Raises:
        TouchlineError: the store does not answer, or a model file is missing or not the one described.
    """
    store = open_store(paths, registered_name)
    lines, runs = [], {}
    for record, test_metrics in _expected_runs(paths):
        model = record["model"]
        known = store.find(record)
        runs[record["model_sha256"]] = run_id = store.ensure(record, paths.models / f"{model}.keras")
        if known is None:
            lines.append(f"{model}: logged again as run {run_id}")
        if not test_metrics.items() <= store.metrics(run_id).items():
            store.log_evaluation(run_id, test_metrics, {})
            lines.append(f"{model}: test metrics logged again")
    registered = _expected_version(paths)
    if registered is None or registered["model_sha256"] in {v.model_sha256 for v in store.versions(registered_name)}:
        return lines
    if registered["model_sha256"] not in runs:
        raise TouchlineError(
            f"{paths.reports / 'registration.json'} names a model that {paths.models} no longer holds: "
            "run `dvc repro register`"
        )
    return lines + _register_again(store, registered_name, registered, runs[registered["model_sha256"]])


def _register_again(store: Store, name: str, registered: Mapping[str, Any], run_id: str) -> list[str]:
    # A fresh registry counts from 1 again: a version number in an old tag would name a stranger.
    tags = {key: value for key, value in registered["tags"].items() if key not in {_REPLACED, _PROMOTED_AT}}
    version = store.register(name, run_id, tags, registered["description"])
    lines = [f"{registered['model']}: registered again as version {version} of {name}"]
    for alias in registered["aliases"]:
        holder = store.alias(name, alias)
        if holder:
            lines.append(f"{registered['model']}: {alias} stays with version {holder.number}")
        elif alias == CHAMPION:
            store.promote(name, version)
        else:
            store.set_alias(name, alias, version)
    return lines


def in_sync(paths: Paths, registered_name: str) -> bool:
    """Whether `sync` would find nothing to do, told without importing MLflow; False where only it can tell.

    Reads MLflow's own tables (`mlflow/store/tracking/dbmodels/models.py`) of the project's SQLite store.
    """
    runs, registered = _expected_runs(paths), _expected_version(paths)
    if not runs and registered is None:
        return True
    own = _own_uri(paths)
    if {_tracking_uri(paths), _registry_uri(paths)} != {own}:
        return False
    try:
        with closing(sqlite3.connect(f"{_database(paths).as_uri()}?mode=ro", uri=True)) as database:
            return all(
                _holds_run(database, registered_name, _artifacts_uri(paths, own), record, metrics)
                for record, metrics in runs
            ) and (registered is None or _holds_version(database, registered_name, registered["model_sha256"]))
    except sqlite3.Error:
        return False


def _holds_run(
    database: sqlite3.Connection,
    experiment: str,
    artifacts: str | None,
    record: Mapping[str, Any],
    test_metrics: Mapping[str, float],
) -> bool:
    found = database.execute(
        """
        SELECT runs.run_uuid FROM runs JOIN tags USING (run_uuid) JOIN experiments USING (experiment_id)
        WHERE runs.lifecycle_stage = 'active' AND tags.key = ? AND tags.value = ?
        AND (runs.run_uuid = ? OR experiments.name = ?) AND experiments.artifact_location = ?
        ORDER BY runs.run_uuid = ? DESC, runs.start_time DESC
        """,
        (_SHA256, record["model_sha256"], record["run_id"], experiment, artifacts, record["run_id"]),
    ).fetchone()
    if not found:
        return False
    logged = dict(database.execute("SELECT key, value FROM latest_metrics WHERE run_uuid = ?", found))
    return test_metrics.items() <= logged.items()


def _holds_version(database: sqlite3.Connection, name: str, sha256: str) -> bool:
    found = database.execute(
        """
        SELECT 1 FROM model_version_tags JOIN model_versions USING (name, version)
        WHERE name = ? AND key = ? AND value = ? AND current_stage != 'Deleted_Internal'
        """,
        (name, _SHA256, sha256),
    ).fetchone()
    return found is not None


@dataclass(frozen=True)
class Garbage:
    """Runs that may be deleted for good; see `garbage`.

    Attributes:
        old: ids of runs that ended long ago and that nothing needs.
        deleted: how many runs a person deleted.
        models: ids of the logged models of both.
        folders: where the artifacts of runs and models lie.
    """

    old: tuple[str, ...] = ()
    deleted: int = 0
    models: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()


def garbage(paths: Paths, experiment: str, before: datetime, dvc_experiments: Collection[str]) -> Garbage:
    """Runs of `experiment`, in the project's own store, that were deleted or that nothing needs.

    A run is needed, with the runs it is shown under, by a registered version (with or without an alias: a rollback
    goes to one without), by a model in `models/`, also that of the flows' clone, or by a DVC experiment. Runs that
    other programs logged stay too.

    Args:
        before: runs that ended before it are old.
        dvc_experiments: names of the DVC experiments that exist.

    Raises:
        TouchlineError: the store is a server or belongs to a project elsewhere, or a registered version needs what was
            deleted: `mlflow gc` would delete that too.
    """
    from mlflow.entities import ViewType

    uri = _tracking_uri(paths)
    if {uri, _registry_uri(paths)} != {_own_uri(paths)}:
        raise StoreError(f"{_where(uri)} is not part of this project: run `mlflow gc` where it is kept")
    if not _database(paths).exists():
        return Garbage()
    store = open_store(paths, experiment)
    client, here = store._client, [store.experiment_id]
    runs = {run.info.run_id: run for run in _pages(client.search_runs, here)}
    deleted = {run.info.run_id: run for run in _pages(client.search_runs, here, run_view_type=ViewType.DELETED_ONLY)}
    models = [model for model in _pages(client.search_logged_models, here) if model.source_run_id]
    run_of = {model.model_id: model.source_run_id for model in models}
    workspaces = [paths, Paths(paths.project / ".prefect/clone", paths.project)]
    records = [record for workspace in workspaces for record, _ in _expected_runs(workspace)]
    ids, digests = ({record[key] for record in records} for key in ("run_id", "model_sha256"))
    for version in _pages(client.search_model_versions):
        of_version = {version.run_id, *re.findall(r"(?<![\w-])[0-9a-f]{32}(?!\w)", version.source or "")}
        for model_id in re.findall(r"(?<!\w)m-[0-9a-f]{32}(?!\w)", version.source or ""):
            of_version.add(run_of.get(model_id) or client.get_logged_model(model_id).source_run_id)
        if gone := of_version & deleted.keys():
            raise StoreError(
                f"version {version.version} of {version.name} needs the run {gone.pop()}, which was deleted: restore "
                "it with `mlflow runs restore`, or delete the version too"
            )
        ids |= of_version
    stays = {
        run_id
        for run_id, run in runs.items()
        if run_id in ids
        or run.data.tags.get(_SHA256) in digests
        or run.data.tags.get("touchline.dvc_experiment") in dvc_experiments
        or not any(key.startswith("touchline.") for key in run.data.tags)
        or not run.info.end_time
        or run.info.end_time >= before.timestamp() * 1000
    }
    for run_id in list(stays):
        while (run_id := runs[run_id].data.tags.get(_PARENT, "")) in runs:
            stays.add(run_id)
    going = {run_id: run for run_id, run in (runs | deleted).items() if run_id not in stays}
    theirs = [model for model in models if model.source_run_id in going]
    places = [run.info.artifact_uri for run in going.values()] + [model.artifact_location for model in theirs]
    return Garbage(
        tuple(sorted(runs.keys() - stays)),
        len(deleted),
        tuple(model.model_id for model in theirs),
        tuple(Path(url2pathname(urlsplit(place).path)) for place in places),
    )


def collect_garbage(paths: Paths, experiment: str, found: Garbage) -> None:
    """Delete for good what `garbage` found, with `mlflow gc`. Interrupted, it can be run again.

    Raises:
        TouchlineError: the store fails.
    """
    open_store(paths, experiment).delete(found.old, found.models)
    from mlflow.cli import gc

    uri = _own_uri(paths)
    with _one_line_errors(_where(uri)), redirect_stdout(StringIO()):
        gc.main(["--backend-store-uri", uri, "--tracking-uri", uri], standalone_mode=False)


def _pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Everything that a search of MLflow finds, page by page."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        yield from page
        if not (token := page.token):
            return


def _expected_runs(paths: Paths) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Each model's record with its test metrics, which are empty where `evaluate` has not seen this very model."""
    metrics_file, judged_file = paths.reports / "metrics.json", paths.reports / "evaluation.json"
    there = metrics_file.is_file() and judged_file.is_file()
    metrics, judged = (read_json(metrics_file)["models"], read_json(judged_file)) if there else ({}, {})
    expected = []
    for record in filter(None, map(model_record, sorted(paths.models.glob("*.json")))):
        same = judged.get(record["model"], {}).get("model_sha256") == record["model_sha256"]
        expected.append((record, _test_metrics(metrics[record["model"]]) if same else {}))
    return expected


def _expected_version(paths: Paths) -> dict[str, Any] | None:
    registration = paths.reports / "registration.json"
    return read_json(registration).get("registered") if registration.is_file() else None


def _said(test_metrics: Mapping[str, float]) -> str:
    """`test/*` in a sentence."""
    accuracy, low, high, loss = (
        test_metrics.get(f"test/{key}") for key in ("accuracy", "accuracy_low", "accuracy_high", "log_loss")
    )
    said = [f"accuracy {accuracy:.3f}"] if accuracy is not None else []
    said += [f"95 % interval {low:.3f} to {high:.3f}"] if low is not None and high is not None else []
    said += [f"log loss {loss:.3f}"] if loss is not None else []
    return ", ".join(said) or "judged"


def _test_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"test/{key.removeprefix('test/')}": float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class _Client:
    """An MlflowClient whose failures are TouchlineErrors."""

    def __init__(self, client: Any, where: str) -> None:
        self._client = client
        self._where = where

    @property
    def tracking_uri(self) -> str:
        return self._client.tracking_uri

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            from mlflow.exceptions import MlflowException

            with _one_line_errors(self._where):
                if name.startswith("create_"):
                    # An answer lost on its way does not say that nothing was made; asked again, a server makes another.
                    with _asked_once():
                        return method(*arguments, **options)
                try:
                    return method(*arguments, **options)
                except MlflowException as error:
                    # MLflow looks whether it has a row (a dataset, an alias), then inserts it: of two who do so at the
                    # same moment, be it on two machines, one fails. Asked again, it finds the other's row.
                    if not re.search("unique|duplicate", str(error), re.IGNORECASE):
                        raise
                    return method(*arguments, **options)

        return call


@dataclass(frozen=True)
class _SavedModel:
    """What `mlflow.keras.save_model` asks of a model: to save itself.

    Copying the file, rather than loading and saving it, keeps it byte for byte the one that DVC tracks.
    """

    path: Path

    def save(self, path: str) -> None:
        shutil.copyfile(self.path, path)


_REQUIREMENTS = ("tensorflow", "keras", "numpy")
# What to do where the store fails, by SQLite's and the system's own words.
_REMEDY = "check that MLFLOW_TRACKING_URI names a store that works"
_REMEDIES = {
    "locked": "another program is writing to it: wait until it has ended, or end it, then run again",
    "is full|No space left|disk I/O error": "make room on the disk, then run again",
    "readonly|Read-only|Permission denied|unable to open": "give this user the right to write there, then run again",
}
_TRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@contextmanager
def _asked_once() -> Iterator[None]:
    """MLflow, which reads the variable at each request, asks its server once and not again."""
    before = os.environ[_TRIES]
    os.environ[_TRIES] = "0"
    try:
        yield
    finally:
        os.environ[_TRIES] = before


@contextmanager
def _one_line_errors(where: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
        said = _without_password(lines[0] if lines else type(error).__name__)[:500]
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise _MissingError(f"{where}: {said}: check the name, or run `make run` to log it again") from None
        kind = _ExistsError if getattr(error, "error_code", "") == "RESOURCE_ALREADY_EXISTS" else StoreError
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if re.search(sign, said)), _REMEDY)
        raise kind(f"{where}: {said}: {remedy}") from None


def _experiment(client: _Client, name: str, artifacts: str | None, where: str) -> str:
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        tags = {MLFLOW_RUN_NOTE: _EXPERIMENT_NOTE, _VIEW_TAG: _VIEW_STATE}
        try:
            return client.create_experiment(name, artifacts, tags)
        except _ExistsError:  # another machine made it meanwhile
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise TouchlineError(
            f"experiment {name} in {where} was deleted: restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, or change register.name"
        )
    if artifacts and experiment.artifact_location != artifacts:
        raise TouchlineError(
            f"{where} keeps the artifacts of {name} in {experiment.artifact_location}, not in {artifacts}: "
            "move the project back, or move the store away and run `make run` to log everything again"
        )
    if experiment.tags.get(_VIEW_TAG) != _VIEW_STATE:
        client.set_experiment_tag(experiment.experiment_id, _VIEW_TAG, _VIEW_STATE)
    return experiment.experiment_id


def _database(paths: Paths) -> Path:
    return paths.mlflow / "mlflow.db"


def _own_uri(paths: Paths) -> str:
    return f"sqlite:///{_database(paths).as_posix()}"


def server_settings(paths: Paths, hosts: Collection[str]) -> dict[str, str]:
    """Variables of `mlflow server` that make it show this project's store; all could read a password among its options.

    Args:
        hosts: Host headers that it answers to, unless the user's own variable says so; MLflow's list where empty.

    Raises:
        TouchlineError: the store is a server already, or the database cannot be used.
    """
    uri = _tracking_uri(paths)
    if uri.startswith("http"):
        raise TouchlineError(f"the store is a server, {_where(uri)}: open that address, or unset MLFLOW_TRACKING_URI")
    _check_database(paths, uri)
    settings = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_REGISTRY_STORE_URI": _registry_uri(paths)}
    # MLflow's own list takes 10.evil.example for a private address.
    if hosts and "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        settings["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(hosts)
    artifacts = _artifacts_uri(paths, uri)
    return settings | ({"MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts} if artifacts else {})


def page(paths: Paths, experiment: str) -> str:
    """The page that the UI is best opened at: the runs of `experiment`, where the project's own store has it."""
    # Asked for nothing else, the UI opens on its pages for language models, where no run is to be seen.
    machine_learning = "workflowType=machine_learning"
    if _tracking_uri(paths) == _own_uri(paths):
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(f"{_database(paths).as_uri()}?mode=ro", uri=True)) as known,
        ):
            found = known.execute(
                "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'active'", (experiment,)
            ).fetchone()
            if found:
                return f"/#/experiments/{found[0]}/runs?{machine_learning}&viewStateShareKey={_VIEW}"
    return f"/#/experiments?{machine_learning}"


def _tracking_uri(paths: Paths) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or _own_uri(paths)


def _registry_uri(paths: Paths) -> str:
    return os.environ.get("MLFLOW_REGISTRY_URI") or _tracking_uri(paths)


def _artifacts_uri(paths: Paths, tracking_uri: str) -> str | None:
    # A server knows where its artifacts go; a bare database would put them under the current folder.
    if tracking_uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        return (paths.mlflow / "artifacts").as_uri()
    return None


def _check_database(paths: Paths, uri: str) -> None:
    # MLflow tries a damaged file again and again for minutes before it says so.
    if uri != _own_uri(paths):
        return
    database = _database(paths)
    try:
        _guard(database)
        # Not read-only: what a writer killed half-way left in the journal has to be undone first.
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=20)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (OSError, sqlite3.Error) as error:
        otherwise = "close what uses it, or move it away and run `make run` to log everything again"
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if re.search(sign, str(error))), otherwise)
        raise TouchlineError(f"{database} is not usable ({error}): {remedy}") from None


def _guard(database: Path) -> None:
    """Keep the database from other users of this machine; made if missing, because MLflow's own would be for all."""
    database.parent.mkdir(parents=True, exist_ok=True)
    if not database.exists():
        database.touch(0o600)
    # Another person's file is theirs to guard.
    with suppress(PermissionError):
        database.chmod(0o600)


def _where(uri: str) -> str:
    return f"the MLflow store {_without_password(uri)}"


def _without_password(text: str) -> str:
    # To the last @: a password may hold one, and a slash.
    return re.sub(r"//\S*@", "//***@", text)


def _quiet_mlflow() -> None:
    """Settings that MLflow reads from the environment when it is imported; what a person has set stays."""
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # Its failures reach us as exceptions; its log would add a traceback to our one line.
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # With MLflow's own figures a server that is down costs four minutes.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        _TRIES: "2",
    }.items():
        os.environ.setdefault(key, value)


def this_process() -> dict[str, str]:
    """What `is_alive` knows this process by."""
    process = psutil.Process()
    return {_HOST: platform.node(), _PID: str(process.pid), _PROCESS_STARTED: repr(_since_boot(process))}


def _execution() -> tuple[str, int]:
    """What runs this stage, and since when (milliseconds): a flow, or DVC; ("", 0) where a person does."""
    if flow_run := os.environ.get("TOUCHLINE_FLOW_RUN"):
        return f"flow run {flow_run}", 0
    if not os.environ.get("DVC_STAGE"):
        return "", 0
    # DVC starts a stage through a shell. Its number is taken again one day, so what began before it is not its own;
    # the time a process began at shifts a little when the clock is set.
    dvc = next(process for process in psutil.Process().parents() if process.name() not in SHELLS)
    return f"dvc {platform.node()} {dvc.pid}", int((dvc.create_time() - 2) * 1000)


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that `this_process` described is there; of another machine's nobody knows, so it is."""
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
    """Seconds from the machine's start to the process's: setting the clock changes the times of both, and not this."""
    return process.create_time() - psutil.boot_time()


def _version(version: "ModelVersion", aliases: Mapping[str, str]) -> Version:
    number = int(version.version)
    held = tuple(sorted(alias for alias, holder in aliases.items() if int(holder) == number))
    return Version(
        version.name,
        number,
        version.run_id or "",
        version.source or "",
        version.description or "",
        dict(version.tags),
        held,
    )


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def _now() -> datetime:
    return datetime.now(UTC)


def _milliseconds(moment: datetime | None) -> int | None:
    return int(moment.timestamp() * 1000) if moment else None
