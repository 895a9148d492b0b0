"""The registered model: its versions, and which of them is champion and which challenger."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core.errors import TouchlineError
from touchline.core.files import read_json
from touchline.tracking import runs
from touchline.tracking.client import ExistsError, MissingError, Store, StoreError, pages, texts
from touchline.tracking.runs import DIGESTS, MODEL_SHA256, StoredModel

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
CHALLENGER = "challenger"
REPLACED, PROMOTED_AT = "touchline.replaced", "touchline.promoted_at"
_ROLLED_BACK, _PROMOTING = "touchline.rolled_back", "touchline.promoting"
_LONGEST_PROMOTION = timedelta(minutes=1)
_MODEL_VERSIONS = "mlflow.modelVersions"
_NOTE = """\
Classifies photos. `@champion` is the version in use, `@challenger` the last one registered.

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/{name}@champion")
model.metadata.metadata  # the names of the classes, in order, and the side of the photos in pixels
model.predict([open("photo.jpg", "rb").read()])  # -> probabilities, shape (1, classes)
```

Each version says which photos it learned from, what it reached, and why it became champion or not. The tag
`touchline.replaced` names the version that a champion took over from: `touchline rollback` goes there. The tag
`touchline.rolled_back` says when a version was rolled back: only `touchline promote` makes it champion again.
"""


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
        return self.tags.get(MODEL_SHA256, "")

    @property
    def rolled_back(self) -> str:
        """When a person rolled it back, in ISO 8601; empty if that did not happen, or it was promoted again since."""
        return self.tags.get(_ROLLED_BACK, "")


def register(store: Store, name: str, run_id: str, tags: Mapping[str, Any], description: str) -> int:
    """Register the model of a run as a new version of `name` and return its number. No alias moves.

    The version also gets the run's tags with the digests of the model's files.
    """
    model_id = runs.logged_model(store, run_id)
    if model_id is None:
        raise TouchlineError(f"run {run_id} in {store.place} has no model to register: train it again")
    if _registered(store, name) is None:
        with suppress(ExistsError):  # another machine made it meanwhile
            store.client.create_registered_model(name, description=_NOTE.format(name=name))
    model = store.client.get_logged_model(model_id)
    known = store.client.get_run(run_id).data.tags
    version = store.client.create_model_version(
        name,
        # Not `models:/<id>`: a SQL registry looks that up in MLflow's global store, which need not be this one.
        model.artifact_location,
        run_id,
        tags=texts(tags) | {key: known[key] for key in DIGESTS if key in known},
        description=description,
        model_id=model.model_id,
    )
    # The page of the run's model links to its versions by this tag, which only a server would set.
    linked = json.loads(model.tags.get(_MODEL_VERSIONS, "[]"))
    linked.append({"name": name, "version": int(version.version)})
    store.client.set_logged_model_tags(model.model_id, {_MODEL_VERSIONS: json.dumps(linked)})
    return int(version.version)


def versions(store: Store, name: str) -> list[Version]:
    """Every version of `name`, oldest first; none where nothing was ever registered."""
    registered = _registered(store, name)
    if registered is None:
        return []
    found = [
        _version(version, registered.aliases)
        for version in pages(store.client.search_model_versions, f"name = '{name}'")
    ]
    return sorted(found, key=lambda version: version.number)


def alias(store: Store, name: str, alias: str) -> Version | None:
    """The version of `name` that `alias` points at, or None."""
    registered = _registered(store, name)
    if registered is None or alias not in registered.aliases:
        return None
    return _version(store.client.get_model_version(name, registered.aliases[alias]), registered.aliases)


def set_alias(store: Store, name: str, alias: str, version: int) -> None:
    store.client.set_registered_model_alias(name, alias, str(version))


def describe_version(store: Store, name: str, version: int, tags: Mapping[str, Any], description: str) -> None:
    """Write a version's tags and description anew."""
    set_version_tags(store, name, version, tags)
    store.client.update_model_version(name, str(version), description)


def set_version_tags(store: Store, name: str, version: int, tags: Mapping[str, Any]) -> None:
    for key, value in texts(tags).items():
        store.client.set_model_version_tag(name, str(version), key, value)


def promote(store: Store, name: str, version: int) -> None:
    """Make `version` the champion, whichever version is now; see `replace`."""
    while not replace(store, name, alias(store, name, CHAMPION), version):
        pass


def replace(store: Store, name: str, champion: Version | None, version: int) -> bool:
    """Make `version` the champion in place of `champion`, and note on it which version it replaced, and when.

    Args:
        champion: as `alias` gave it; None if there was none.

    Returns:
        False if another became champion since; then nothing was changed.
    """
    if champion and champion.number == version:
        return True
    before = champion.number if champion else None
    with _alone_at_the_champion(store, name, version):
        current = alias(store, name, CHAMPION)
        if (current.number if current else None) != before:
            return False
        tags = {REPLACED: before or "none", PROMOTED_AT: datetime.now(UTC).isoformat(timespec="seconds")}
        # The alias moves last: a promotion that breaks off leaves the old champion in place.
        set_version_tags(store, name, version, tags)
        _crown(store, name, version)
        return True


def rolled_back(store: Store, name: str, model_sha256: str) -> Version | None:
    """The version of `name` with this very model, where a person rolled it back and did not promote it since."""
    return next((v for v in versions(store, name) if v.model_sha256 == model_sha256 and v.rolled_back), None)


def _crown(store: Store, name: str, version: int) -> None:
    set_alias(store, name, CHAMPION, version)
    with suppress(MissingError):  # it was never rolled back
        store.client.delete_model_version_tag(name, str(version), _ROLLED_BACK)


@contextmanager
def _alone_at_the_champion(store: Store, name: str, version: int) -> Iterator[None]:
    """Run the block while no other process, on any machine, is in such a block for another version.

    MLflow cannot compare and set in one step. So a process tags its version first and then looks for others' tags; if
    it sees one, it removes its own and tries again later. A tag older than a minute is from a process that died.
    """

    def busy(other: Version) -> bool:
        if not (since := other.tags.get(_PROMOTING)):
            return False
        return abs(datetime.now(UTC) - datetime.fromisoformat(since)) < _LONGEST_PROMOTION

    while True:
        set_version_tags(store, name, version, {_PROMOTING: datetime.now(UTC).isoformat()})
        try:
            if not any(busy(other) for other in versions(store, name) if other.number != version):
                yield
                return
        finally:
            with suppress(StoreError):
                store.client.delete_model_version_tag(name, str(version), _PROMOTING)
        # Random, so that two that gave way to each other do not meet again.
        time.sleep(random.uniform(0.2, 2))


def rollback(store: Store, name: str) -> int:
    """Give the alias `champion` back to the version that the champion replaced, and return that version.

    The version that loses it is tagged, so that `register` does not make it champion again.

    Raises:
        TouchlineError: there is no champion, it replaced none, or the one it replaced was deleted.
    """
    champion = alias(store, name, CHAMPION)
    if champion is None:
        raise TouchlineError(f"{name} in {store.place} has no champion to roll back: promote a version first")
    replaced = champion.tags.get(REPLACED, "none")
    if replaced == "none":
        raise TouchlineError(
            f"version {champion.number} of {name} replaced no other, so there is none to go back to: "
            "promote another version instead"
        )
    if int(replaced) not in {version.number for version in versions(store, name)}:
        raise TouchlineError(
            f"version {replaced} of {name}, which version {champion.number} replaced, was deleted: "
            "promote another version instead"
        )
    set_version_tags(store, name, champion.number, {_ROLLED_BACK: datetime.now(UTC).isoformat(timespec="seconds")})
    _crown(store, name, int(replaced))
    return int(replaced)


def model(store: Store, version: Version) -> StoredModel:
    """The model of a version.

    Raises:
        TouchlineError: the store has no such model, or another tool logged it, without its classes.
    """
    folder, tags = _download(store, version.name, version.number), version.tags
    if not version.model_sha256 and version.run_id:  # another tool registered it, perhaps a model without a run
        tags = store.client.get_run(version.run_id).data.tags
    return StoredModel.of(folder, tags)


def training_photos(store: Store, name: str, version: int) -> set[str]:
    """SHA-256 of each photo that a version learned from."""
    return set(read_json(_download(store, name, version, StoredModel.PHOTOS)))


def _download(store: Store, name: str, version: int, file: str = "") -> Path:
    location = store.client.get_model_version_download_uri(name, str(version))
    return runs.fetch(store, f"{location.rstrip('/')}/{file}", f"version {version} of {name}")


def _registered(store: Store, name: str) -> Any:
    try:
        return store.client.get_registered_model(name)
    except MissingError:
        return None


def _version(version: "ModelVersion", aliases: Mapping[str, str]) -> Version:
    number = int(version.version)
    held = tuple(sorted(alias for alias, holder in aliases.items() if int(holder) == number))
    run_id, source, description = version.run_id or "", version.source or "", version.description or ""
    return Version(version.name, number, run_id, source, description, dict(version.tags), held)
