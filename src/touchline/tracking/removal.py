"""Removes from the store the models that learned from given photos, and pictures that may show them."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core.errors import TouchlineError
from touchline.core.files import read_json, sha256
from touchline.core.paths import Paths
from touchline.tracking import sync
from touchline.tracking.client import MissingError, Store, is_own, one_line_errors, pages
from touchline.tracking.runs import MODEL_SHA256, StoredModel, fetch, report_alone
from touchline.tracking.sync import Garbage

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

# Figures with photos are JPEG files or parts of pages; all other figures are PNG.
_PICTURES = (".jpg", ".jpeg", ".html")
# Files of a model's run that name the authors of its photos.
_NAMING_AUTHORS = ("licences.csv", "model-card.md")


@dataclass(frozen=True)
class Learned:
    """A model in the store that learned from one of the photos.

    Attributes:
        versions: (name, number) of each of its registered versions.
        aliases: those of its versions.
    """

    model_id: str
    run_id: str
    model: str
    model_sha256: str
    place: str
    versions: Sequence[tuple[str, int]]
    aliases: Sequence[str]


def learned_from(store: Store, photos: Collection[str]) -> list[Learned]:
    """Every model in the store that learned from one of `photos` (sha256), registered or not, the oldest first.

    Models that other programs logged do not list their photos, and are left out.

    Raises:
        TouchlineError: the list of one of our own models cannot be read, so it may have learned from them.
    """
    versions = list(pages(store.client.search_model_versions))
    holders: dict[tuple[str, int], list[str]] = {}
    for registered in pages(store.client.search_registered_models):
        for alias, number in registered.aliases.items():
            holders.setdefault((registered.name, int(number)), []).append(alias)
    found = []
    for model in sorted(_models(store), key=lambda model: model.creation_timestamp):
        tags: dict[str, str] = {}
        with suppress(MissingError):  # its run was deleted for good
            tags = store.client.get_run(model.source_run_id).data.tags if model.source_run_id else {}
        try:
            file = fetch(store, f"{model.artifact_location}/{StoredModel.PHOTOS}", f"model {model.model_id}")
            known = read_json(file)
        except TouchlineError:
            if MODEL_SHA256 in tags:
                raise
            continue  # another program's
        if set(photos).isdisjoint(known):
            continue
        own = [(version.name, int(version.version)) for version in versions if _is_of(version, model)]
        found.append(
            Learned(
                model.model_id, model.source_run_id or "", model.name, tags.get(MODEL_SHA256, ""),
                model.artifact_location, own, sorted(alias for key in own for alias in holders.get(key, [])),
            )
        )  # fmt: skip
    return found


def remove(paths: Paths, store: Store, experiment: str, models: Collection[Learned]) -> None:
    """Delete models: their versions with all aliases, their files, and the tags and files of their runs that name them.

    The runs stay, with their params and metrics. After an interruption, call it again.
    """
    for model in models:
        for name, number in model.versions:
            with suppress(MissingError):
                store.client.delete_model_version(name, str(number))
        with suppress(MissingError):  # before the files: by this tag `learned_from` expects them
            store.client.delete_tag(model.run_id, MODEL_SHA256)
        if not is_own(paths):  # in the project's own store `mlflow gc` deletes them
            _artifacts(store, model.place).delete_artifacts()
        with suppress(MissingError):
            _delete_files(store, store.client.get_run(model.run_id), lambda path: path in _NAMING_AUTHORS)
        with suppress(MissingError):
            store.client.delete_logged_model(model.model_id)
    if is_own(paths):
        sync.collect_garbage(paths, experiment, Garbage())


def remove_pictures(store: Store, reports: Path) -> None:
    """Delete the pictures and pages of all runs, since any may show a photo, except those that `reports` has now."""
    current = {sha256(file) for file in (reports / "figures").rglob("*") if file.is_file()}
    if (reports / "report.html").is_file():
        current.add(hashlib.sha256(report_alone(reports)).hexdigest())
    for run in _runs(store):

        def old(path: str, run: "Run" = run) -> bool:
            if not path.lower().endswith(_PICTURES):
                return False
            return sha256(fetch(store, f"{run.info.artifact_uri}/{path}", f"run {run.info.run_id}")) not in current

        _delete_files(store, run, old)


def _delete_files(store: Store, run: "Run", wanted: Callable[[str], bool]) -> None:
    """Delete the files at the root of a run's artifacts for whose paths `wanted` returns True."""
    repository = _artifacts(store, run.info.artifact_uri)
    with one_line_errors(store.place):
        for file in repository.list_artifacts():
            if not file.is_dir and wanted(file.path):
                repository.delete_artifacts(file.path)


def _artifacts(store: Store, place: str) -> "ArtifactRepository":
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(place, tracking_uri=store.client.tracking_uri)


def _experiments(store: Store) -> list[str]:
    from mlflow.entities import ViewType

    return [each.experiment_id for each in pages(store.client.search_experiments, view_type=ViewType.ALL)]


def _models(store: Store) -> Iterator[Any]:
    return pages(store.client.search_logged_models, _experiments(store))


def _runs(store: Store) -> Iterator[Any]:
    from mlflow.entities import ViewType

    return pages(store.client.search_runs, _experiments(store), run_view_type=ViewType.ALL)


def _is_of(version: Any, model: Any) -> bool:
    return version.source in {model.artifact_location, f"models:/{model.model_id}"} or (
        getattr(version, "model_id", None) == model.model_id
    )
