"""`touchline clean`: what the project's folder holds that nothing needs any more, and its end.

Each tool looks after its own: `dvc gc`, `dvc queue remove`, `mlflow gc`, Optuna and Prefect's vacuum delete what is
theirs. What is here decides what may go, and deletes only files that are this package's. Each step may be broken off:
what is left of it is found by the next run.
"""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from touchline import tracking
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data import feature_store

# Nothing that a commit, a branch, a tag or an experiment names is deleted from DVC's cache.
_NEEDED_BY_GIT = ["--all-commits", "--all-experiments"]
# `dvc gc --dry` without DVC's lock, which would write a number into its file and wait for others.
_DVC_WITHOUT_LOCK = """
import sys
from dvc import lock
from dvc.cli import main
lock.make_lock = lambda *_, **__: lock.LockNoop()
sys.exit(main(sys.argv[1:]))
"""
# What Prefect's server does by itself where PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED is true; no server is started.
_PREFECT_VACUUM = """
import asyncio
from prefect.server.database import provide_database_interface
from prefect.server.services import db_vacuum as vacuum

async def main():
    database = provide_database_interface()
    for task in (
        vacuum.vacuum_old_flow_runs, vacuum.vacuum_orphaned_logs, vacuum.vacuum_orphaned_artifacts,
        vacuum.vacuum_stale_artifact_collections,
    ):
        await task(db=database)

asyncio.run(main())
"""
# As Prefect's vacuum picks them.
_OLD_FLOW_RUNS = """
    SELECT count(*) FROM flow_run WHERE parent_task_run_id IS NULL AND end_time < ?
    AND state_type IN ('CANCELLED', 'COMPLETED', 'CRASHED', 'FAILED')
"""
_OLD_STUDIES = """
    SELECT study_name FROM studies JOIN trials USING (study_id)
    GROUP BY study_id HAVING max(coalesce(datetime_complete, datetime_start)) < ?
"""
_WORTH_WHILE = 2**20  # bytes that a database must give back for it to be a line of the table


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        megabytes: None where nobody can tell beforehand.
        why: it goes, or stays.
        remove: deletes it; None for what stays.
    """

    what: str
    count: int
    megabytes: float | None
    why: str
    remove: Callable[[], object] | None = None


def run(paths: Paths, params: Params, days: int, *, dry_run: bool, yes: bool) -> None:
    """Show what goes and what stays and why, ask, and delete.

    Args:
        days: runs, studies and flow runs that ended longer ago are old.
        dry_run: show, and change nothing.
        yes: do not ask.

    Raises:
        TouchlineError: a stage, a flow, a board, DVC or a training is at work, or a tool fails.
    """
    if paths.workspace != paths.project:
        raise TouchlineError(f"{paths.workspace} is a copy that {paths.project} looks after: run this there")
    before = datetime.now(UTC) - timedelta(days=days)
    if dry_run:
        _show(survey(paths, params, before, days), "would go")
        return
    if not (yes or sys.stdin.isatty()):
        raise ParamsError("there is nobody to ask: look with --dry-run, then say --yes")
    with _alone(paths):
        for database in _databases(paths):
            # Writing, so that what a killed process left half-way is undone before anything is read.
            _ask(database, "SELECT 1 FROM sqlite_master")
        rows = survey(paths, params, before, days)
        _show(rows, "goes")
        going = [row for row in rows if row.remove]
        if not going:
            say("nothing to delete")
            return
        if not (yes or _confirmed()):
            say("nothing was deleted")
            return
        for row in going:
            assert row.remove
            row.remove()
            say(f"deleted: {row.what}")
        for database in _databases(paths):
            if _free(database):
                _ask(database, "VACUUM")
        say(f"{sum(row.megabytes or 0 for row in going):,.0f} MB freed")


def survey(paths: Paths, params: Params, before: datetime, days: int) -> list[Row]:
    """What there is: first what goes, then what stays. Nothing is changed."""
    clone = paths.project / ".prefect/clone"
    places = [paths, *([Paths(clone, paths.project)] if (clone / "dvc.yaml").exists() else [])]
    experiments = _experiments(paths.project)
    parts = (
        _cache(paths.project, [place.workspace for place in places[1:]]),
        *(_cache(place.workspace, [], " of .prefect/clone") for place in places[1:]),
        _left_by_experiments(paths),
        _runs(paths, params, before, days, experiments, places),
        _studies(paths, before, days),
        _flow_runs(paths, before, days),
        _features(paths, params),
        _partials(paths),
        _free_pages(paths),
        _kept(paths, experiments, clone),
    )
    return sorted((row for part in parts for row in part), key=lambda row: row.remove is None)


def _cache(folder: Path, sharing: Collection[Path], of: str = "") -> Iterator[Row]:
    """Objects of DVC's cache; `sharing` are further repositories that may use the same one."""
    cache, what = folder / ".dvc/cache", f"objects in DVC's cache{of}"
    if not cache.is_dir():
        return
    # An unpacked archive has no commits to look through.
    needed = ["--workspace", *(_NEEDED_BY_GIT if _in_git(folder) else [])]
    options = [*needed, *(["--projects", *map(str, sharing)] if sharing else [])]
    said = _call("`dvc gc --dry`", ["-c", _DVC_WITHOUT_LOCK, "gc", *options, "--dry"], folder)
    unused = [Path(path) for path in re.findall(r"^Removing (.+)$", said, flags=re.MULTILINE)]
    elsewhere = [path for path in unused if not path.is_relative_to(cache)]
    if elsewhere:
        why = f"this cache is not in {folder}, and others may need these: see `dvc gc --projects`"
        yield Row(what, len(unused), _megabytes(unused), why)
        return
    if unused:
        why = f"no {'commit, experiment or workspace' if len(needed) > 1 else 'workspace'} needs these objects"
        remove = partial(_call, "`dvc gc`", ["-m", "dvc", "gc", *options, "--force"], folder)
        yield Row(what, len(unused), _megabytes(unused), why, remove)
    kept = len(list((cache / "files").rglob("*/??/*"))) - len(unused)
    why = "outputs of the workspace, of commits and of experiments"
    yield Row(f"{what}, the rest", kept, _megabytes([cache]) - _megabytes(unused), why)


def _left_by_experiments(paths: Paths) -> Iterator[Row]:
    """Copies that killed experiments worked in, and what the queue remembers of those that have ended."""
    folder = paths.project / ".dvc/tmp/exps"
    left = [
        *folder.glob("tmp*"),
        *folder.glob("standalone/tmp*"),
        *folder.glob("run/*"),
        *folder.glob("standalone/run/*"),
    ]
    ended = list(folder.glob("celery/broker/processed/*.msg"))
    if not (left or ended):
        return

    def remove() -> None:
        if ended:
            _call("`dvc queue remove`", ["-m", "dvc", "queue", "remove", "--success", "--failed"], paths.project)
            _call("`dvc exp clean`", ["-m", "dvc", "exp", "clean"], paths.project)
        _delete(left)

    why = "experiments that have ended: their copies, logs and queue entries; the experiments themselves stay"
    yield Row("leftovers of experiments", len(left) or len(ended), _megabytes([*left, *ended]), why, remove)


def _runs(
    paths: Paths, params: Params, before: datetime, days: int, experiments: Collection[str], places: list[Paths]
) -> Iterator[Row]:
    found = tracking.garbage(paths, before, experiments, places)
    count = len(found.deleted) + len(found.old) or len(found.folders)
    why = f"{len(found.deleted)} that you deleted; {len(found.old)} that ended more than {days} days ago, unneeded"
    if count and not found.why_not:
        remove = partial(tracking.collect_garbage, paths, params.register_.name, found)
        yield Row("runs in MLflow", count, _megabytes(found.folders), why, remove)
    elif found.why_not:
        yield Row("runs in MLflow", count, _megabytes(found.folders), found.why_not)
    if found.kept:
        megabytes = _megabytes([paths.mlflow / "artifacts"]) - (0 if found.why_not else _megabytes(found.folders))
        why = f"{found.versions} registered versions, models/ or an experiment need them, or they are not old"
        yield Row("runs in MLflow, the rest", found.kept, megabytes, why)


def _studies(paths: Paths, before: datetime, days: int) -> Iterator[Row]:
    database = paths.mlflow / "tuning.db"
    # Optuna writes the time of the clock on the wall.
    names = [name for (name,) in _read(database, _OLD_STUDIES, str(before.astimezone().replace(tzinfo=None)))]

    def remove() -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for name in names:
            optuna.delete_study(study_name=name, storage=f"sqlite:///{database.as_posix()}")

    if names:
        yield Row("studies of tune", len(names), None, f"studies whose last trial is more than {days} days old", remove)


def _flow_runs(paths: Paths, before: datetime, days: int) -> Iterator[Row]:
    home = paths.project / ".prefect"
    count = sum(number for (number,) in _read(home / "prefect.db", _OLD_FLOW_RUNS, str(before.replace(tzinfo=None))))
    if not count:
        return
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(days * 86400),
    }
    remove = partial(_call, "Prefect's vacuum", ["-c", _PREFECT_VACUUM], paths.project, settings)
    why = f"flow runs that ended more than {days} days ago, with their logs and artifacts"
    yield Row("flow runs of the board", count, None, why, remove)


def _features(paths: Paths, params: Params) -> Iterator[Row]:
    folders = [path for path in sorted(paths.features.glob("*")) if path.is_dir()]
    unnamed = [path for path in folders if path.name not in params.features and feature_store.there(path)]
    if unnamed:
        why = f"params.yaml does not name {', '.join(path.name for path in unnamed)}"
        yield Row("folders of features", len(unnamed), _megabytes(unnamed), why, partial(_remove_arrays, unnamed))
    named = [path for path in folders if path.name in params.features]
    if not named:
        return
    rows = [digest for path in named for piece in path.glob("*.txt") for digest in piece.read_text().split()]
    valid = set(read_table(paths.validated_table)["sha256"]) if paths.validated_table.exists() else set(rows)
    # DVC holds these folders against dvc.lock: a row taken out here would be a change there.
    stale = sum(digest not in valid for digest in rows)
    why = f"{stale:,} rows are of photos that are not valid any more; the next `dvc repro` drops them"
    yield Row(
        "folders of features, the rest", len(named), _megabytes(named), why if stale else "params.yaml names them"
    )


def _remove_arrays(folders: Iterable[Path]) -> None:
    for folder in folders:
        feature_store.remove(folder)


def _partials(paths: Paths) -> Iterator[Row]:
    """What killed writers left; names as `files` gives them."""
    import psutil

    folders = [paths.photos_table.parent, paths.models, paths.reports, paths.locks]
    found = [path for folder in folders for path in folder.rglob(".partial-*")]
    found += [path for folder in (paths.workspace, paths.project / ".prefect") for path in folder.glob(".partial-*")]
    left = [
        path
        for path in found
        if not ((writer := path.name.split("-")[1]).isdecimal() and psutil.pid_exists(int(writer)))
    ]
    if left:
        yield Row(
            "half-written files",
            len(left),
            _megabytes(left),
            "half-written by processes that are gone",
            partial(_delete, left),
        )


def _free_pages(paths: Paths) -> Iterator[Row]:
    for database in _databases(paths):
        if (free := _free(database)) >= _WORTH_WHILE:
            name = database.relative_to(paths.project).as_posix()
            # All databases are looked through at the end.
            yield Row(f"empty pages of {name}", 1, free / 1e6, "given back to the disk", lambda: None)


def _kept(paths: Paths, experiments: Collection[str], clone: Path) -> Iterator[Row]:
    data = paths.photos_table.parent
    own = [path for path in data.iterdir() if path != paths.features] if data.is_dir() else []
    yield Row(
        "the rest of data/", len(own), _megabytes(own), "photos, tables, decisions, downloads: never deleted here"
    )
    if experiments:
        yield Row(
            "experiments of DVC",
            len(experiments),
            None,
            "`dvc exp remove` deletes them; what only they needed goes then",
        )
    if clone.is_dir():
        yield Row("the clone .prefect/clone", 1, _megabytes([clone]), "flows with `clone: true` work there")


@contextmanager
def _alone(paths: Paths) -> Iterator[None]:
    """Hold the locks of all that could be at work here.

    Raises:
        TouchlineError: one is held, or a process of DVC or a training is at work.
    """
    from filelock import FileLock, Timeout

    locks = {path: f"stage {path.stem}" for path in sorted(paths.locks.glob("*.lock")) if path.stem != "store"}
    if (home := paths.project / ".prefect").is_dir():
        locks |= {home / "board.lock": "the board", home / "flow.lock": "a flow"}
    with ExitStack() as held:
        for path, name in locks.items():
            try:
                held.enter_context(FileLock(path).acquire(timeout=0))
            except Timeout:
                raise _busy(name) from None
        for name in _at_work(paths):
            raise _busy(name)
        yield


def _at_work(paths: Paths) -> Iterator[str]:
    """What is at work and holds no lock: DVC between two stages, `touchline tune` between two trials."""
    import psutil

    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, place = process.info["cmdline"] or [], process.info["cwd"]
        # `dvc`, `python .../dvc` or `python -m dvc`
        begins = next((number for number, word in enumerate(command[:3]) if Path(word).name == "dvc"), None)
        if begins is not None and place and Path(place).is_relative_to(paths.project):
            yield f"`{' '.join(['dvc', *command[begins + 1 :]])[:80]}` (process {process.pid})"
    for name in tracking.garbage(paths, datetime.now(UTC), [], []).running:
        yield f"the MLflow run {name}"


def _busy(name: str) -> TouchlineError:
    return TouchlineError(f"{name} is at work: wait until it has ended, or end it, then run again; nothing was deleted")


def _in_git(folder: Path) -> bool:
    """Whether DVC finds commits here; not where an unpacked archive, told so by `core.no_scm`, lies in a repository."""
    if (folder / ".git").exists():
        return True
    configured = [folder / ".dvc/config", folder / ".dvc/config.local"]
    if any(re.search(r"no_scm\s*=\s*true", path.read_text(), re.IGNORECASE) for path in configured if path.exists()):
        return False
    return subprocess.run(["git", "rev-parse", "--git-dir"], cwd=folder, capture_output=True).returncode == 0


def _experiments(project: Path) -> list[str]:
    """Names of the DVC experiments there are: refs/exps/<2 digits>/<38 digits>/<name>."""
    if not _in_git(project):
        return []
    listed = subprocess.run(
        ["git", "for-each-ref", "--format=%(refname)", "refs/exps"], cwd=project, capture_output=True, text=True
    ).stdout
    return re.findall(r"^refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)$", listed, flags=re.MULTILINE)


def _call(name: str, arguments: list[str], folder: Path, settings: dict[str, str] | None = None) -> str:
    """Run Python in a process of its own; what it printed. Raises TouchlineError with its last words where it fails."""
    # A board's addresses and an experiment's root are not for this.
    inherited = {
        key: value for key, value in os.environ.items() if key != "DVC_ROOT" and not key.startswith("PREFECT_")
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=inherited | (settings or {}), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it does not say why"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise TouchlineError(
            f"{name} in {folder} failed: {said[:300]}: mend that, then run again; what is done is done"
        )
    return done.stdout


def _databases(paths: Paths) -> list[Path]:
    there = [paths.mlflow / "mlflow.db", paths.mlflow / "tuning.db", paths.project / ".prefect/prefect.db"]
    return [path for path in there if path.exists()]


def _read(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    """The rows of a query, without a change to any file; none where there is no such database or table."""
    if not database.exists():
        return []
    with ExitStack() as held:
        log = database.with_name(f"{database.name}-wal")
        if log.exists() and log.stat().st_size:
            # Even who only reads such a database writes beside it.
            folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
            for path in (database, log):
                shutil.copyfile(path, folder / path.name)
            return _ask(folder / database.name, query, *values)
        return _ask(database, query, *values, options="?immutable=1")


def _ask(database: Path, query: str, *values: str, options: str = "?mode=rw") -> list[tuple[Any, ...]]:
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}{options}", uri=True, timeout=20)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        if "no such table" in str(error):
            return []
        raise TouchlineError(f"{database}: {error}: close what uses it, or make room, then run again") from None


def _free(database: Path) -> int:
    """Bytes of pages that hold nothing."""
    ((pages,),) = _read(database, "PRAGMA freelist_count")
    ((size,),) = _read(database, "PRAGMA page_size")
    return pages * size


def _megabytes(places: Iterable[Path]) -> float:
    """What files and folders hold."""
    total = 0
    for place in places:
        for path in (place, *place.rglob("*")):
            if path.is_symlink() or path.is_file():
                total += path.lstat().st_size
    return total / 1e6


def _delete(places: Iterable[Path]) -> None:
    for place in places:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _show(rows: list[Row], goes: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", title="what nothing needs any more, and what stays", title_justify="left")
    table.add_column("how many", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("")
    table.add_column("why", overflow="fold")
    for row in rows:
        size = "?" if row.megabytes is None else f"{row.megabytes:,.1f}"
        verdict = f"[bold]{goes}[/bold]" if row.remove else "stays"
        table.add_row(escape(row.what), f"{row.count:,}", size, verdict, escape(row.why))
    Console().print(table)


def _confirmed() -> bool:
    import typer

    return typer.confirm("Delete this for good?")
