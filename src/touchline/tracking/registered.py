"""Versions of the registered model, read without importing MLflow, which takes seconds.

The tables of the project's own SQLite store are read (`mlflow/store/model_registry/dbmodels/models.py`), or a server is
asked over its REST API. Both are the store itself, so a promotion made in MLflow's UI counts at once. Everything else
is left to MLflow: other kinds of store, a store that needs repair, files neither on this disk nor with the server.
"""

import json
import os
import sqlite3
import tempfile
import urllib.request
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import url2pathname

from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths
from touchline.tracking import registry
from touchline.tracking.client import artifacts_uri, database, is_own, own_uri, read_only, registry_uri, tracking_uri
from touchline.tracking.registry import Version
from touchline.tracking.runs import StoredModel, open_store

_SECONDS = 30
# Settings that MLflow's own client follows and this one does not.
_OTHER_WAYS = (
    "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH", "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_AUTH", "MLFLOW_WORKSPACE",
)  # fmt: skip


class _AskMlflow(Exception):
    """MLflow has to be imported for this."""


def versions(paths: Paths, name: str) -> list[Version]:
    """Every version of `name`, oldest first; none where nothing was ever registered.

    Raises:
        TouchlineError: as `open_store`.
    """
    try:
        return _from_tables(paths, name) if is_own(paths) else _from_server(_server(paths), name)
    except _AskMlflow:
        return registry.versions(open_store(paths, name), name)


def champion(known: Sequence[Version]) -> Version | None:
    """The champion among the versions of a model."""
    return next((each for each in known if registry.CHAMPION in each.aliases), None)


def no_champion(name: str, known: Sequence[Version], *, option: bool) -> TouchlineError:
    """The error that none of the known versions of `name` is champion, with what to do.

    Args:
        option: the command has `--model`.
    """
    instead = ", or name a model with --model" if option else ""
    if not known:
        return TouchlineError(f"{name} has no champion yet: `make run` trains one{instead}")
    return TouchlineError(
        f"none of the {len(known):,} versions of {name} is champion: `touchline registry list` shows why; use "
        f"`touchline promote`{instead}"
    )


def model(paths: Paths, version: Version) -> StoredModel:
    """The model of a version.

    Raises:
        TouchlineError: the store has no such model, or another tool logged it, without its classes.
    """
    try:
        if not version.model_sha256:  # another tool registered it: the digest is a tag of its run
            raise _AskMlflow
        folder = _local(version.source) if is_own(paths) else _fetched(_server(paths), version)
        return StoredModel.of(folder, version.tags)
    except _AskMlflow:
        return registry.model(open_store(paths, version.name), version)


def _from_tables(paths: Paths, name: str) -> list[Version]:
    if not database(paths).is_file():
        return []
    try:
        with closing(read_only(paths)) as store:
            place = store.execute(
                "SELECT artifact_location FROM experiments WHERE name = ? AND lifecycle_stage = 'active'", (name,)
            ).fetchone()
            if place != (artifacts_uri(paths, own_uri(paths)),):
                raise _AskMlflow  # the project was moved, or its experiment deleted: `open_store` sees to it
            rows = store.execute(
                "SELECT version, COALESCE(run_id, ''), COALESCE(storage_location, source), COALESCE(description, '') "
                "FROM model_versions WHERE name = ? AND current_stage IS NOT 'Deleted_Internal' ORDER BY version",
                (name,),
            ).fetchall()
            tags: dict[int, dict[str, str]] = {number: {} for number, *_ in rows}
            aliases: dict[int, list[str]] = {number: [] for number in tags}
            for number, key, value in store.execute(
                "SELECT version, key, value FROM model_version_tags WHERE name = ?", (name,)
            ):
                tags.get(number, {})[key] = value
            for number, alias in store.execute(
                "SELECT version, alias FROM registered_model_aliases WHERE name = ? ORDER BY alias", (name,)
            ):
                aliases.get(number, []).append(alias)
    except sqlite3.Error:
        raise _AskMlflow from None
    return [
        Version(name, number, run_id, source, description, tags[number], tuple(aliases[number]))
        for number, run_id, source, description in rows
    ]


def _local(uri: str) -> Path:
    parts = urlsplit(uri)
    folder = Path(url2pathname(parts.path))
    if parts.scheme != "file" or not folder.is_dir():
        raise _AskMlflow
    return folder


def _server(paths: Paths) -> str:
    uri = tracking_uri(paths)
    if urlsplit(uri).scheme not in {"http", "https"} or registry_uri(paths) != uri:
        raise _AskMlflow
    if any(os.environ.get(name) for name in _OTHER_WAYS):
        raise _AskMlflow
    return uri.rstrip("/")


def _get(server: str, path: str, **query: str) -> bytes:
    """A server's answer; `_AskMlflow` where it refuses or cannot be reached, for MLflow's client to explain."""
    parts = urlsplit(server)
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    request = urllib.request.Request(f"{address}{path}?{urlencode(query)}")  # noqa: S310 - http and https alone
    if user or password:
        request.add_header("Authorization", f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310  # nosec B310
            return answer.read()
    except HTTPError as error:
        if error.code == 404 and b"RESOURCE_DOES_NOT_EXIST" in error.read():
            raise FileNotFoundError(path) from None
        raise _AskMlflow from None
    except OSError:
        raise _AskMlflow from None


def _json(server: str, path: str, **query: str) -> Any:
    try:
        return json.loads(_get(server, path, **query))
    except ValueError:
        raise _AskMlflow from None


def _from_server(server: str, name: str) -> list[Version]:
    try:
        registered = _json(server, "/api/2.0/mlflow/registered-models/get", name=name)["registered_model"]
    except FileNotFoundError:
        return []
    holders = {each["alias"]: int(each["version"]) for each in registered.get("aliases", [])}
    found: list[Version] = []
    query = {"filter": f"name = '{name}'"}
    while True:
        page = _json(server, "/api/2.0/mlflow/model-versions/search", **query)
        found += [_version(each, holders) for each in page.get("model_versions", [])]
        if not page.get("next_page_token"):
            return sorted(found, key=lambda version: version.number)
        query["page_token"] = page["next_page_token"]


def _version(each: Mapping[str, Any], holders: Mapping[str, int]) -> Version:
    number = int(each["version"])
    return Version(
        each["name"], number, each.get("run_id", ""), each["source"], each.get("description", ""),
        {tag["key"]: tag["value"] for tag in each.get("tags", [])},
        tuple(sorted(alias for alias, holder in holders.items() if holder == number)),
    )  # fmt: skip


def _fetched(server: str, version: Version) -> Path:
    """The files of a version, from the server's own artifacts; they are deleted when the process ends."""
    try:
        uri = _json(
            server, "/api/2.0/mlflow/model-versions/get-download-uri", name=version.name, version=str(version.number)
        )["artifact_uri"]
    except FileNotFoundError:
        raise _AskMlflow from None
    parts = urlsplit(uri)
    if parts.scheme != "mlflow-artifacts" or parts.netloc:
        raise _AskMlflow
    place = parts.path.strip("/")
    folder = tempfile.TemporaryDirectory(prefix="touchline-model-")
    _kept.append(folder)
    try:
        for name in StoredModel.names(version.tags):
            target = Path(folder.name, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_get(server, f"/api/2.0/mlflow-artifacts/artifacts/{quote(f'{place}/{name}')}"))
    except FileNotFoundError:
        raise _AskMlflow from None
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []
