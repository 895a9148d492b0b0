"""The connection to MLflow: which store the project uses, and failures as one-line errors.

The store is a SQLite file in the project unless MLFLOW_TRACKING_URI names another. DVC does not track it, so it may be
deleted, or not know the models that DVC brought: `sync` puts back what is missing, from the project's files.
"""

import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout

from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths

_EXPERIMENT_NOTE = """\
No decision yet: `register` has not run.

Photo classifiers: a run for each trained model. The trials of a search (`touchline tune`) are under it: press the plus.

- **Compare**: tick runs, press Compare; params, metrics, figures and tags stand side by side.
- **Who won**: the better run of a pipeline has the decision in its description, and the report among its artifacts.
- **Which were trained together**: group by the tag `touchline.execution`.
- **test/\\***: by `evaluate`, on photos that no model learned from, and that chose none.
- **training/\\***: one step an epoch; the last point is that of the weights that were kept.
- **tried/\\***: of a model that has no epochs, one step a strength that was tried.
- **Dataset**: the split, by digest. Runs with one digest learned from the same photos.
- A run tagged `touchline.restored` was logged from the project's files, not while it trained; the tag has its first id.
"""

# Columns of MLflow's tables (`mlflow/store/{tracking,model_registry}/dbmodels/models.py`) that name a place for files.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)

# What to do where the store fails, by SQLite's and the system's own words.
_REMEDY = "check that MLFLOW_TRACKING_URI names a store that works"
_REMEDIES = {
    "locked": "another program is writing to it: wait until it has ended, or end it, then run again",
    "is full|No space left|disk I/O error": "make room on the disk, then run again",
    "readonly|Read-only|Permission denied|unable to open": "give this user the right to write there, then run again",
}
_TRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Its failures reach us as exceptions; its log would add a traceback to our one line.
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # With MLflow's own figures a server that is down costs four minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    _TRIES: "2",
}


class StoreError(TouchlineError):
    """The store does not answer, refuses, or fails."""


class MissingError(StoreError):
    """The store has no such thing."""


class ExistsError(StoreError):
    """The store has a thing of that name already."""


class Client:
    """An MlflowClient whose failures are TouchlineErrors."""

    def __init__(self, client: Any, place: str) -> None:
        self._client = client
        self._place = place

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            from mlflow.exceptions import MlflowException

            is_create = name.startswith("create_")
            # A lost answer may follow a success; asked again, a server would create a second one.
            with one_line_errors(self._place), _asked_once() if is_create else nullcontext():
                try:
                    return method(*arguments, **options)
                except MlflowException as error:
                    # MLflow looks whether it has a row (a dataset, an alias), then inserts it. If two processes do so
                    # at the same moment, even on two machines, one fails; asked again, it finds the other's row.
                    if is_create or not re.search("unique|duplicate", str(error), re.IGNORECASE):
                        raise
                    return method(*arguments, **options)

        return call


@dataclass(frozen=True)
class Store:
    """A store and one experiment in it. Made by `runs.open_store`.

    MLflow's global state (active run, tracking URI) stays untouched: two stores may be open at once.

    Attributes:
        place: what errors call the store; without its password.
    """

    client: Client
    experiment_id: str
    place: str


def connect(paths: Paths, experiment: str) -> Store:
    """The tracking store, made when missing, with `experiment` in it.

    Raises:
        TouchlineError: the store does not answer, is damaged, or belongs to a project elsewhere.
    """
    uri = tracking_uri(paths)
    place = place_of(uri)
    # MLflow reads these when it is imported.
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    # Two trainings that start on a fresh machine would both create the tables and the experiment.
    with held(_lock(paths)):
        _prepare_database(paths, uri)
        with one_line_errors(place):
            client = Client(MlflowClient(uri, registry_uri(paths)), place)
        experiment_id = _experiment(client, experiment, uri, artifacts_uri(paths, uri))
    return Store(client, experiment_id, place)


def _lock(paths: Paths) -> FileLock:
    lock = FileLock(paths.project / ".dvc/tmp/touchline/store.lock", timeout=120)
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    return lock


@contextmanager
def held(lock: FileLock) -> Iterator[None]:
    """Run the block under the store's lock. Raises StoreError where another process keeps it for too long."""
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(f"{lock.lock_file} is held by another process: end it, or wait, and run again") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_line_errors(place: str) -> Iterator[None]:
    """A failure of MLflow, its database or the system in the block becomes a StoreError that names `place`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
        message = without_password(lines[0] if lines else type(error).__name__)[:500]
        code = getattr(error, "error_code", "")
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise MissingError(f"{place}: {message}: check the name, or run `make run` to log it again") from None
        kind = ExistsError if code == "RESOURCE_ALREADY_EXISTS" else StoreError
        raise kind(f"{place}: {message}: {_remedy(message, _REMEDY)}") from None


def pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Everything that a search of MLflow finds, page by page."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        yield from page
        if not (token := page.token):
            return


def texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def database(paths: Paths) -> Path:
    """The project's own store."""
    return paths.mlflow / "mlflow.db"


def own_uri(paths: Paths) -> str:
    return f"sqlite:///{database(paths).as_posix()}"


def tracking_uri(paths: Paths) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or own_uri(paths)


def registry_uri(paths: Paths) -> str:
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri(paths)


def is_own(paths: Paths) -> bool:
    """Whether runs and registry are both in the project's own store."""
    return {tracking_uri(paths), registry_uri(paths)} == {own_uri(paths)}


def artifacts_uri(paths: Paths, store_uri: str) -> str | None:
    """Where runs keep their files; None where a server decides. A bare database would take the current folder."""
    if store_uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        return (paths.mlflow / "artifacts").as_uri()
    return None


def server_settings(paths: Paths, hosts: Collection[str]) -> dict[str, str]:
    """Variables that make `mlflow server` show this project's store. As options, all users could read a password in it.

    Args:
        hosts: Host headers that it answers to, unless the user's own variable names some; MLflow's list where empty.

    Raises:
        TouchlineError: the store is a server already, or the database cannot be used.
    """
    uri = tracking_uri(paths)
    if uri.startswith("http"):
        raise TouchlineError(f"the store is a server, {place_of(uri)}: open that address, or unset MLFLOW_TRACKING_URI")
    with held(_lock(paths)):
        _prepare_database(paths, uri)
    settings = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_REGISTRY_STORE_URI": registry_uri(paths)}
    # MLflow's own list takes 10.evil.example for a private address.
    if hosts and "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        settings["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(hosts)
    artifacts = artifacts_uri(paths, uri)
    return settings | ({"MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts} if artifacts else {})


def runs_page(paths: Paths, experiment: str) -> str:
    """Path of the UI's page of runs: those of `experiment`, where the project's own store has it."""
    # Without this the UI opens on its pages for language models, which show no runs.
    machine_learning = "workflowType=machine_learning"
    if tracking_uri(paths) == own_uri(paths):
        query = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'active'"
        with suppress(sqlite3.Error), closing(read_only(paths)) as store:
            if found := store.execute(query, (experiment,)).fetchone():
                # Charts show metrics beside the names of the runs; the table shows none until one adds columns.
                return f"/#/experiments/{found[0]}/runs?{machine_learning}&compareRunsMode=CHART"
    return f"/#/experiments?{machine_learning}"


def read_only(paths: Paths) -> sqlite3.Connection:
    """The project's own database; one that is missing is not made."""
    # Not `immutable`: a transaction that is being written must be waited for.
    return sqlite3.connect(f"{database(paths).as_uri()}?mode=ro", uri=True)


def without_password(text: str) -> str:
    # To the last @: a password may hold one, and a slash.
    return re.sub(r"//\S*@", "//***@", text)


def place_of(uri: str) -> str:
    return f"the MLflow store {without_password(uri)}"


def mlflow_command(uri: str, arguments: str) -> str:
    """What to type for MLflow's own command on the store at `uri`."""
    # Without the variable MLflow makes a store of its own in the current folder. A user's own may hold a password.
    named = "" if os.environ.get("MLFLOW_TRACKING_URI") else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "
    return f"{named}mlflow {arguments}"


def _remedy(message: str, otherwise: str) -> str:
    return next((remedy for sign, remedy in _REMEDIES.items() if re.search(sign, message)), otherwise)


@contextmanager
def _asked_once() -> Iterator[None]:
    """MLflow, which reads the variable at each request, asks its server once and not again."""
    before = os.environ[_TRIES]
    os.environ[_TRIES] = "0"
    try:
        yield
    finally:
        os.environ[_TRIES] = before


def _experiment(client: Client, name: str, uri: str, artifacts: str | None) -> str:
    """Id of the experiment, made when missing."""
    place = place_of(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifacts, {"mlflow.note.content": _EXPERIMENT_NOTE})
        except ExistsError:  # another machine made it meanwhile
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        command = mlflow_command(uri, f"experiments restore --experiment-id {experiment.experiment_id}")
        raise TouchlineError(
            f"experiment {name} in {place} was deleted: restore it with `{command}`, or change register.name"
        )
    if artifacts and experiment.artifact_location != artifacts:
        raise TouchlineError(
            f"{place} keeps the artifacts of {name} in {experiment.artifact_location}, not in {artifacts}: "
            "move the project back, name another store in MLFLOW_TRACKING_URI, or change register.name"
        )
    return experiment.experiment_id


def _prepare_database(paths: Paths, uri: str) -> None:
    """Refuse a damaged file, which MLflow would try for minutes; keep a good one from other users of this machine.

    The store of a project that was moved, renamed or copied gets the new places of its files.
    """
    if uri != own_uri(paths):
        return
    file = database(paths)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch(0o600)
        # Another person's file is theirs to guard.
        with suppress(PermissionError):
            file.chmod(0o600)
        # Not read-only: what a killed writer left in the journal has to be undone first.
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=20)) as connection:
            _follow_the_project(connection, (paths.mlflow / "artifacts").as_uri())
    except (OSError, sqlite3.Error) as error:
        otherwise = "close what uses it, or move it away and run `make run` to log everything again"
        raise TouchlineError(f"{file} is not usable ({error}): {_remedy(str(error), otherwise)}") from None


def _follow_the_project(connection: sqlite3.Connection, artifacts: str) -> None:
    """Write the project's folder into the store where another one is named, as MLflow keeps absolute places alone."""
    columns = [
        (table, column)
        for table, column in _PLACES
        if any(row[1] == column for row in connection.execute(f"PRAGMA table_info({table})"))
    ]
    named: dict[str, set[str]] = {}
    for table, column in columns:
        query = f"SELECT DISTINCT {column} FROM {table}"  # noqa: S608 - our own names  # nosec B608
        for (place,) in connection.execute(query):
            if found := re.match(r"(file://.*/mlflow/artifacts)(/|$)", place or ""):
                named.setdefault(found[1], set()).add(place[len(found[1]) :].lstrip("/"))
    for before, places in named.items():
        # Another project may keep its experiments in this store, and its files with itself.
        brought = any(place and _folder(f"{artifacts}/{place}").exists() for place in places)
        left = not _folder(before).exists() and artifacts not in named
        if before == artifacts or not (brought or left):
            continue

        def here(place: str | None, before: str = before) -> str | None:
            return artifacts + place[len(before) :] if place and f"{place}/".startswith(f"{before}/") else place

        connection.create_function("here", 1, here)
        with connection:
            for table, column in columns:
                update = f"UPDATE {table} SET {column} = here({column})"  # noqa: S608 - our own names  # nosec B608
                connection.execute(update)
        line = f"the project was at {_folder(before).parents[1]}: its MLflow store now names the files here"
        print(line, file=sys.stderr)  # what a command writes to stdout may be JSON or CSV


def under_id(store: Store, run_id: str, wanted: str) -> str:
    """Give a new run the id of a lost one, to which reports, links and Prefect refer; return its id.

    MLflow's API does not allow choosing an id, so this is done where the store is a SQLite file and has no such run.
    """
    uri = store.client.tracking_uri
    if not uri.startswith("sqlite:///") or not re.fullmatch("[0-9a-f]{32}", wanted):
        return run_id
    names = {"wanted": wanted, "made": run_id}
    try:
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=20)) as database, database:
            if database.execute("SELECT 1 FROM runs WHERE run_uuid = :wanted", names).fetchone():
                return run_id
            places = "artifact_uri = replace(artifact_uri, :made, :wanted)"
            database.execute(f"UPDATE runs SET run_uuid = :wanted, {places} WHERE run_uuid = :made", names)  # noqa: S608  # nosec B608
            database.execute("UPDATE tags SET run_uuid = :wanted WHERE run_uuid = :made", names)
    except sqlite3.Error as error:
        raise StoreError(f"{store.place}: {error}: {_remedy(str(error), _REMEDY)}") from None
    return wanted


def _folder(uri: str) -> Path:
    return Path(url2pathname(urlsplit(uri).path))
