"""The store beside the project's files: what it lacks is put back, and what nothing needs any more is deleted."""

import os
import re
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from touchline.core.errors import TouchlineError
from touchline.core.files import model_record, read_json
from touchline.core.paths import Paths
from touchline.tracking import client, registry, runs
from touchline.tracking.client import Store, StoreError, is_own, one_line_errors, own_uri, pages, place_of
from touchline.tracking.registry import CHAMPION, PROMOTED_AT, REPLACED
from touchline.tracking.runs import REASON


def sync(paths: Paths, registered_name: str) -> list[str]:
    """Put into the store what the project's files hold and the store lacks; return a line for each thing put back.

    Each `models/*.json` gets its run, under its old id where the store lets us, with its test metrics from
    reports/metrics.json and its figures; the better one of reports/registration.json gets the decision and the report;
    the version there gets registered. An alias that another version holds stays there.

    Raises:
        TouchlineError: the store does not answer, or a model file is missing or not the one described.
    """
    expected, file = _expected_runs(paths), paths.reports / "registration.json"
    outcome = read_json(file) if file.is_file() else {}
    registered = outcome.get("registered")
    if not expected and registered is None:
        return []
    store = runs.open_store(paths, registered_name)
    lines, logged = [], {}
    for record, metrics in expected:
        model, digest = record["model"], record["model_sha256"]
        known = runs.find(store, record)
        logged[digest] = run_id = known or runs.ensure(store, record, paths.models / f"{model}.keras")
        if known is None:
            lines.append(f"{model}: logged again as run {run_id}")
        if not runs.test_metrics(metrics).items() <= runs.logged_metrics(store, run_id).items():
            runs.log_evaluation(store, run_id, metrics, paths.reports / "figures" / model)
            lines.append(f"{model}: test metrics logged again")
        decided = outcome.get("better_model") == model and "decision" in outcome and metrics
        if decided and (paths.reports / "report.html").is_file() and not runs.has_report(store, run_id):
            runs.conclude(store, run_id, outcome["decision"], "" if outcome["experiment"] else outcome["headline"])
            runs.log_report(store, run_id, paths.reports)
            lines.append(f"{model}: decision and report logged again")
    if registered is None:
        return lines
    digest = registered["model_sha256"]
    if digest in {version.model_sha256 for version in registry.versions(store, registered_name)}:
        return lines
    if digest not in logged:
        raise TouchlineError(f"{file} names a model that {paths.models} no longer holds: run `dvc repro register`")
    for file in (paths.reports / name for name in ("licences.csv", "model-card.md")):
        if file.is_file():
            runs.log_file(store, logged[digest], file)
    return lines + _register_again(store, registered_name, registered, logged[digest])


def _register_again(store: Store, name: str, registered: Mapping[str, Any], run_id: str) -> list[str]:
    # A fresh registry counts from 1 again: a version number in an old tag would mean another version.
    tags = {key: value for key, value in registered["tags"].items() if key not in {REPLACED, PROMOTED_AT}}
    # Its reason and description may name versions of the old registry.
    restored = f"restored; originally version {registered['version']}"
    tags[REASON] = f"{restored}: {registered['tags'].get(REASON, 'reason unknown')}"
    description = f"R{restored[1:]}.\n\n{registered['description']}"
    version = registry.register(store, name, run_id, tags, description)
    lines = [f"{registered['model']}: registered again as version {version} of {name}"]
    for alias in registered["aliases"]:
        holder = registry.alias(store, name, alias)
        if holder:
            lines.append(f"{registered['model']}: {alias} stays with version {holder.number}")
        elif alias == CHAMPION:
            registry.promote(store, name, version)
        else:
            registry.set_alias(store, name, alias, version)
    return lines


def _expected_runs(paths: Paths) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Each model's record with its test metrics, which are empty where `evaluate` has not seen this very model."""
    metrics_file, judged_file = paths.reports / "metrics.json", paths.reports / "evaluation.json"
    there = metrics_file.is_file() and judged_file.is_file()
    metrics, judged = (read_json(metrics_file)["models"], read_json(judged_file)) if there else ({}, {})
    expected = []
    for record in filter(None, map(model_record, sorted(paths.models.glob("*.json")))):
        same = judged.get(record["model"], {}).get("model_sha256") == record["model_sha256"]
        expected.append((record, metrics[record["model"]] if same else {}))
    return expected


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

    if not is_own(paths):
        raise StoreError(
            f"{place_of(client.tracking_uri(paths))} is not part of this project: run `mlflow gc` where it is kept"
        )
    if not client.database(paths).exists():
        return Garbage()
    store = runs.open_store(paths, experiment)
    mlflow, here = store.client, [store.experiment_id]
    active = {run.info.run_id: run for run in pages(mlflow.search_runs, here)}
    deleted = {run.info.run_id: run for run in pages(mlflow.search_runs, here, run_view_type=ViewType.DELETED_ONLY)}
    models = [model for model in pages(mlflow.search_logged_models, here) if model.source_run_id]
    run_of = {model.model_id: model.source_run_id for model in models}
    workspaces = [paths, Paths(paths.project / ".prefect/clone", paths.project)]
    records = [record for workspace in workspaces for record, _ in _expected_runs(workspace)]
    ids, digests = ({record[key] for record in records} for key in ("run_id", "model_sha256"))
    for version in pages(mlflow.search_model_versions):
        of_version = {version.run_id, *re.findall(r"(?<![\w-])[0-9a-f]{32}(?!\w)", version.source or "")}
        for model_id in re.findall(r"(?<!\w)m-[0-9a-f]{32}(?!\w)", version.source or ""):
            of_version.add(run_of.get(model_id) or mlflow.get_logged_model(model_id).source_run_id)
        if gone := of_version & deleted.keys():
            run_id = gone.pop()
            command = client.mlflow_command(own_uri(paths), f"runs restore --run-id {run_id}")
            raise StoreError(
                f"version {version.version} of {version.name} needs the run {run_id}, which was deleted: restore it "
                f"with `{command}`, or delete the version too"
            )
        ids |= of_version
    stays = {
        run_id
        for run_id, run in active.items()
        if run_id in ids
        or run.data.tags.get(runs.MODEL_SHA256) in digests
        or run.data.tags.get("touchline.dvc_experiment") in dvc_experiments
        or not any(key.startswith("touchline.") for key in run.data.tags)
        or not run.info.end_time
        or run.info.end_time >= before.timestamp() * 1000
    }
    for run_id in list(stays):
        while (run_id := active[run_id].data.tags.get(runs.PARENT, "")) in active:
            stays.add(run_id)
    going = {run_id: run for run_id, run in (active | deleted).items() if run_id not in stays}
    theirs = [model for model in models if model.source_run_id in going]
    places = [run.info.artifact_uri for run in going.values()] + [model.artifact_location for model in theirs]
    return Garbage(
        tuple(sorted(active.keys() - stays)),
        len(deleted),
        tuple(model.model_id for model in theirs),
        tuple(Path(url2pathname(urlsplit(place).path)) for place in places),
    )


def collect_garbage(paths: Paths, experiment: str, found: Garbage) -> None:
    """Delete for good what `garbage` found, with `mlflow gc`. Interrupted, it can be run again.

    Raises:
        TouchlineError: the store fails.
    """
    store = runs.open_store(paths, experiment)
    # Runs first: a deleted run's model can still be found, while a run without its model would look whole.
    for run_id in found.old:
        store.client.delete_run(run_id)
    for model_id in found.models:
        store.client.delete_logged_model(model_id)
    import mlflow
    from mlflow.cli import gc

    uri, before = own_uri(paths), os.environ.get("MLFLOW_TRACKING_URI")
    try:
        with one_line_errors(place_of(uri)), redirect_stdout(StringIO()):
            gc.main(["--backend-store-uri", uri, "--tracking-uri", uri], standalone_mode=False)
    finally:
        # It sets the variable, which would name this process's store from now on; None takes it out again.
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]
