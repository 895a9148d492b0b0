"""What the project tells MLflow and asks of it: runs, datasets, models, the registry. Nothing else imports `mlflow`.

The store is a SQLite file in the project unless MLFLOW_TRACKING_URI names another. DVC does not see it, so it may be
deleted, or be a stranger to models that DVC brought: `sync` puts back, out of the project's files, what is missing.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from touchline.errors import TouchlineError
from touchline.files import read_json
from touchline.paths import Paths
from touchline.quiet import import_tensorflow

if TYPE_CHECKING:
    import keras
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
CHALLENGER = "challenger"

_SHA256 = "touchline.model_sha256"
_REPLACED = "touchline.replaced"
_PROMOTED_AT = "touchline.promoted_at"
_HOST, _PID, _PROCESS_STARTED = "touchline.host", "touchline.pid", "touchline.process_started"
_MODEL_VERSIONS = "mlflow.modelVersions"
_TRAINING_PHOTOS = "training_photos.json"
_LONGEST_DIGEST = 36  # characters of a dataset digest that MLflow takes

_EXPERIMENT_NOTE = """\
Photo classifiers of this project, one run a training.

- **Curves**: `train/*` and `validation/*`, one step an epoch. `test/*` come from `evaluate`, once, on unseen photos.
- **Datasets used**: the split, by digest: runs with one digest learned from the same photos.
- A run tagged `touchline.restored` was logged from the project's files, not while it trained.
"""
_REGISTERED_MODEL_NOTE = """\
uint8 RGB photos in (`N x side x side x 3`), class probabilities out (`N x classes`, in the order of the metadata).

- `@champion` is the version in use, `@challenger` the last one registered.
- The tag `touchline.replaced` names the version that a champion took over from: a rollback goes there.
"""


class _MissingError(TouchlineError):
    """The store has no such thing."""


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
    try:
        # Two trainings that start on a fresh machine would both create the tables and the experiment.
        with lock:
            _check_database(paths, uri)
            with _one_line_errors(where):
                client = _Client(MlflowClient(uri, _registry_uri(paths)), where)
            experiment_id = _experiment(client, experiment, _artifacts_uri(paths, uri), where)
    except Timeout:
        raise TouchlineError(f"{lock.lock_file} is held by another process: end it, or wait, and run again") from None
    store = Store(client, experiment_id, where, lock)
    store.close_killed()
    return store


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
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

        under = {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
        run = self._client.create_run(
            self.experiment_id, _milliseconds(started), {**_texts(tags), **under, **this_process()}, name
        )
        run_id = run.info.run_id
        self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        split = Dataset(
            name=dataset["name"],
            digest=dataset["digest"][:_LONGEST_DIGEST],
            source_type="local",
            source=json.dumps({"uri": str(dataset["source"])}),
            profile=json.dumps(dataset["counts"]),
        )
        # MLflow looks whether it knows the dataset, then inserts it: two runs that start together would both insert.
        with self._lock:
            self._client.log_inputs(run_id, [DatasetInput(split, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])])
        return run_id

    def log_epoch(self, run_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one epoch (`train/loss`, `validation/accuracy`, ...) at step `epoch`."""
        self._log_metrics(run_id, metrics, step=epoch)

    def finish(
        self,
        run_id: str,
        *,
        model_path: Path,
        image_size: int,
        classes: Sequence[str],
        training_photos: Collection[str],
        metrics: Mapping[str, float],
        ended: datetime | None = None,
    ) -> None:
        """Log the model of a run, then its closing metrics, and end the run (FINISHED).

        Args:
            model_path: a .keras file, uint8 `(N, image_size, image_size, 3)` in, float32 `(N, len(classes))` out.
            training_photos: SHA-256 of each photo the model learned from; kept with the model.
            ended: now when not given.
        """
        model_id = self._log_model(run_id, model_path, image_size, classes, training_photos)
        self._log_metrics(run_id, metrics, model_id=model_id)
        # Last, so that whoever finds a run by this tag finds a whole one.
        self.set_tags(run_id, {_SHA256: _sha256(model_path)})
        self._client.set_terminated(run_id, "FINISHED", _milliseconds(ended))

    def end(self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, Any] | None = None) -> None:
        """End a run that has no model (FINISHED), with closing metrics and tags."""
        self._log_metrics(run_id, metrics)
        self.set_tags(run_id, tags or {})
        self._client.set_terminated(run_id, "FINISHED")

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
        self._client.set_terminated(run_id, "FAILED")

    def close_killed(self) -> list[str]:
        """End as KILLED the RUNNING runs of this experiment whose process, on this machine, is gone.

        Returns:
            Their ids.
        """
        running = self._search(f"attributes.status = 'RUNNING' AND tags.`{_HOST}` = '{platform.node()}'")
        killed = [run.info.run_id for run in running if not is_alive(run.data.tags)]
        for run_id in killed:
            self.set_tags(run_id, {"touchline.reason": "the process of this run is gone"})
            self._client.set_terminated(run_id, "KILLED")
        return killed

    def log_evaluation(self, run_id: str, metrics: Mapping[str, float], figures: Mapping[str, Path]) -> None:
        """Log `test/<metric>` on a run and its model, and each figure as the artifact `figures/<name><suffix>`."""
        models = self._models(run_id)
        self._log_metrics(run_id, _test_metrics(metrics), model_id=models[-1] if models else None)
        with tempfile.TemporaryDirectory() as folder:
            for name, path in figures.items():
                named = Path(folder, name + path.suffix)
                shutil.copyfile(path, named)
                self._client.log_artifact(run_id, str(named), "figures")

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
            record: what `models/<name>.json` holds: `run_id`, `run_name`, `model_sha256`, `image_size`, `classes`,
                `params`, `tags`, `history` (a dict an epoch), `metrics`, `dataset`, `training_photos`, `started`,
                `ended` (ISO 8601).
            model_path: the .keras file it describes.

        Raises:
            TouchlineError: the file is missing or is not the one the record describes.
        """
        return self.find(record) or self._restore(record, model_path)

    def _restore(self, record: Mapping[str, Any], model_path: Path) -> str:
        if not model_path.is_file():
            raise TouchlineError(f"{model_path} is missing: run `dvc repro` or `dvc pull` to bring it")
        if _sha256(model_path) != record["model_sha256"]:
            raise TouchlineError(f"{model_path} is not the file its .json describes: run `dvc repro` to renew both")
        started, ended = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
        tags = {**record["tags"], "touchline.restored": "true"}
        run_id = self.start(record["run_name"], tags, record["params"], record["dataset"], started)
        for row in record["history"]:
            metrics = {key: value for key, value in row.items() if key != "epoch"}
            self._log_metrics(run_id, metrics, step=row["epoch"], when=ended)
        self.finish(
            run_id,
            model_path=model_path,
            image_size=record["image_size"],
            classes=record["classes"],
            training_photos=record["training_photos"],
            metrics=record["metrics"],
            ended=ended,
        )
        return run_id

    def register(self, name: str, run_id: str, tags: Mapping[str, Any], description: str) -> int:
        """Register the model of a run as a new version of `name` and return its number. No alias moves.

        The version also gets the tag `touchline.model_sha256`.
        """
        models = self._models(run_id)
        if not models:
            raise TouchlineError(f"run {run_id} in {self._where} has no model to register: train it again")
        if self._registered(name) is None:
            self._client.create_registered_model(name, description=_REGISTERED_MODEL_NOTE)
        model = self._client.get_logged_model(models[-1])
        version = self._client.create_model_version(
            name,
            # Not `models:/<id>`: a SQL registry looks that up in MLflow's global store, which need not be this one.
            model.artifact_location,
            run_id,
            tags={**_texts(tags), _SHA256: self._client.get_run(run_id).data.tags[_SHA256]},
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
        found, token = [], None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [_version(version, registered.aliases) for version in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.number)

    def alias(self, name: str, alias: str) -> Version | None:
        """The version of `name` that `alias` points at, or None."""
        registered = self._registered(name)
        if registered is None or alias not in registered.aliases:
            return None
        return _version(self._client.get_model_version(name, registered.aliases[alias]), registered.aliases)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        self._client.set_registered_model_alias(name, alias, str(version))

    def set_version_tags(self, name: str, version: int, tags: Mapping[str, Any]) -> None:
        for key, value in _texts(tags).items():
            self._client.set_model_version_tag(name, str(version), key, value)

    def promote(self, name: str, version: int) -> None:
        """Make `version` the champion and note on it whom it replaced, and when. Nothing to do where it already is."""
        champion = self.alias(name, CHAMPION)
        if champion and champion.number == version:
            return
        replaced = champion.number if champion else "none"
        # The alias moves last: a promotion that breaks off leaves the old champion in place.
        self.set_version_tags(name, version, {_REPLACED: replaced, _PROMOTED_AT: _now().isoformat(timespec="seconds")})
        self.set_alias(name, CHAMPION, version)

    def rollback(self, name: str) -> int:
        """Give the alias `champion` back to the version that the champion replaced, and return that version.

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
        self.set_alias(name, CHAMPION, int(replaced))
        return int(replaced)

    def load(self, name: str, version: int) -> "keras.Model":
        """The Keras model of a version, out of the store."""
        return self._keras_model(self._download(name, version))

    def load_with_classes(self, source: Version | str) -> tuple["keras.Model", list[str]]:
        """The Keras model of a version, or of the run with that id, and the names of its classes.

        Raises:
            TouchlineError: the store has no such model, or it was logged by another tool, without its classes.
        """
        from mlflow.models import Model

        if isinstance(source, Version):
            what, folder = f"version {source.number} of {source.name}", self._download(source.name, source.number)
        else:
            what, models = f"run {source}", self._models(source)
            if not models:
                raise TouchlineError(f"run {source} in {self._where} has no model: name another run")
            folder = self._fetch(self._client.get_logged_model(models[-1]).artifact_location, what)
        with _one_line_errors(self._where):
            classes = (Model.load(str(folder)).metadata or {}).get("classes")
        if not classes:
            raise TouchlineError(
                f"the model of {what} in {self._where} does not name its classes: Touchline logged it not"
            )
        return self._keras_model(folder), list(classes)

    def training_photos(self, name: str, version: int) -> set[str]:
        """SHA-256 of each photo that a version learned from."""
        return set(read_json(self._download(name, version, _TRAINING_PHOTOS)))

    def _keras_model(self, folder: Path) -> "keras.Model":
        import_tensorflow()
        with _one_line_errors(self._where):
            import mlflow.keras

            return mlflow.keras.load_model(str(folder))

    def _download(self, name: str, version: int, file: str = "") -> Path:
        location = self._client.get_model_version_download_uri(name, str(version))
        return self._fetch(f"{location.rstrip('/')}/{file}", f"version {version} of {name}")

    def _fetch(self, uri: str, what: str) -> Path:
        with _one_line_errors(f"{what} in {self._where}"):
            import mlflow.artifacts

            # What lies on this disk is not copied: its own path comes back.
            return Path(mlflow.artifacts.download_artifacts(uri, tracking_uri=self._client.tracking_uri))

    def _log_model(
        self, run_id: str, path: Path, image_size: int, classes: Sequence[str], training_photos: Collection[str]
    ) -> str:
        import_tensorflow()
        import mlflow.keras
        import numpy as np
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        params = self._client.get_run(run_id).data.params
        logged = self._client.create_logged_model(self.experiment_id, "model", run_id, params=params)
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
                Path(folder, _TRAINING_PHOTOS).write_text(json.dumps(sorted(training_photos)))
                self._client.log_model_artifacts(logged.model_id, str(folder))
        except BaseException:
            self._client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return logged.model_id

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
        return list(self._client.search_runs([self.experiment_id], filter_string))

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


def _expected_runs(paths: Paths) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Each model's record with its test metrics, which are empty where `evaluate` has not seen this very model."""
    metrics_file, judged_file = paths.reports / "metrics.json", paths.reports / "evaluation.json"
    there = metrics_file.is_file() and judged_file.is_file()
    metrics, judged = (read_json(metrics_file)["models"], read_json(judged_file)) if there else ({}, {})
    expected = []
    for record in [read_json(path) for path in sorted(paths.models.glob("*.json"))]:
        same = judged.get(record["model"], {}).get("model_sha256") == record["model_sha256"]
        expected.append((record, _test_metrics(metrics[record["model"]]) if same else {}))
    return expected


def _expected_version(paths: Paths) -> dict[str, Any] | None:
    registration = paths.reports / "registration.json"
    return read_json(registration).get("registered") if registration.is_file() else None


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
            with _one_line_errors(self._where):
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


@contextmanager
def _one_line_errors(where: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        said = _without_password(str(error).strip().partition("\n")[0])[:500]
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise _MissingError(f"{where}: {said}: check the name, or run `make run` to log it again") from None
        raise TouchlineError(f"{where}: {said}: check that MLFLOW_TRACKING_URI names a store that works") from None


def _experiment(client: _Client, name: str, artifacts: str | None, where: str) -> str:
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifacts, {MLFLOW_RUN_NOTE: _EXPERIMENT_NOTE})
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
    return experiment.experiment_id


def _database(paths: Paths) -> Path:
    return paths.mlflow / "mlflow.db"


def _own_uri(paths: Paths) -> str:
    return f"sqlite:///{_database(paths).as_posix()}"


def server_options(paths: Paths) -> list[str]:
    """Options of `mlflow server` that make it show this project's store.

    Raises:
        TouchlineError: the store is a server already.
    """
    uri = _tracking_uri(paths)
    if uri.startswith("http"):
        raise TouchlineError(f"the store is a server, {_where(uri)}: open that address, or unset MLFLOW_TRACKING_URI")
    options = ["--backend-store-uri", uri, "--registry-store-uri", _registry_uri(paths)]
    artifacts = _artifacts_uri(paths, uri)
    return [*options, "--default-artifact-root", artifacts] if artifacts else options


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
    database = _database(paths)
    if uri != _own_uri(paths) or not database.exists():
        return
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise TouchlineError(
            f"{database} is not usable ({error}): close what uses it, or move it away and run `make run` "
            "to log everything again"
        ) from None


def _where(uri: str) -> str:
    return f"the MLflow store {_without_password(uri)}"


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", text)


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
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }.items():
        os.environ.setdefault(key, value)


def this_process() -> dict[str, str]:
    """What `is_alive` knows this process by."""
    process = psutil.Process()
    return {_HOST: platform.node(), _PID: str(process.pid), _PROCESS_STARTED: repr(process.create_time())}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that `this_process` described is there; of another machine's nobody knows, so it is."""
    if _PID not in tags:
        return False
    if tags[_HOST] != platform.node():
        return True
    try:
        process = psutil.Process(int(tags[_PID]))
        # Linux tells it from the time of boot, which shifts a little when the clock is set.
        same = abs(process.create_time() - float(tags[_PROCESS_STARTED])) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _version(version: "ModelVersion", aliases: Mapping[str, str]) -> Version:
    number = int(version.version)
    held = tuple(sorted(alias for alias, holder in aliases.items() if int(holder) == number))
    return Version(
        version.name, number, version.run_id, version.source, version.description or "", dict(version.tags), held
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def _now() -> datetime:
    return datetime.now(UTC)


def _milliseconds(moment: datetime | None) -> int | None:
    return int(moment.timestamp() * 1000) if moment else None
