"""`touchline clean`: deletes what the project no longer needs.

Files that this package made are deleted here. What DVC and MLflow keep is deleted by their own commands: this module
only decides which of it may go. docs/housekeeping.md says what is left to which tool.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from touchline.commands.export_formats import FORMATS, RECORD
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import abandoned
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data import feature_store, served
from touchline.models import engines
from touchline.tracking import sync


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        why: the reason it goes, or stays.
        remove: deletes it; None for what stays.
    """

    what: str
    count: int
    megabytes: float
    why: str
    remove: Callable[[], object] | None = None


def run(paths: Paths, params: Params, days: int, *, dry_run: bool, yes: bool) -> None:
    """Show what goes and why, ask, and delete. Interrupted, it can be run again.

    Args:
        days: runs and exports older than this many days may go.
        dry_run: show, and delete nothing.
        yes: do not ask.

    Raises:
        TouchlineError: a stage, a flow, a board, DVC or `touchline tune` is running, or a tool fails.
    """
    import typer

    if paths.workspace != paths.project:
        raise TouchlineError(f"{paths.workspace} is a copy that belongs to {paths.project}: run this there")
    if not (dry_run or yes or sys.stdin.isatty()):
        raise ParamsError("cannot ask without a terminal: look with --dry-run, then give --yes")
    before = datetime.now(UTC) - timedelta(days=days)
    with nullcontext() if dry_run else alone(paths):
        found = [*_ours(paths, params, before, days), *_cache(paths.project), *_runs(paths, params, before, days)]
        rows = [row for row in found if row.count]
        if not rows:
            say("nothing to delete")
            return
        _show(rows, "would go" if dry_run else "goes")
        going = [(row, row.remove) for row in rows if row.remove]
        if dry_run or not going or not (yes or typer.confirm("Delete this for good?")):
            say("nothing was deleted")
            return
        for row, remove in going:
            remove()
            say(f"deleted: {row.what}")
        say(f"{sum(row.megabytes for row, _ in going):,.0f} MB freed")


def _ours(paths: Paths, params: Params, before: datetime, days: int) -> Iterator[Row]:
    """Files that this package made."""
    folders = (paths.photos_table.parent, paths.models, paths.reports, paths.locks)
    left = [path for folder in folders for path in abandoned(folder)]
    for folder in (paths.workspace, paths.project / ".prefect"):
        left += abandoned(folder, below=False)
    yield _files("half-written files", left, "the processes that wrote them are gone", delete)

    features = [folder for folder in sorted(paths.features.glob("*")) if feature_store.there(folder)]
    unnamed = [folder for folder in features if folder.name not in params.features]
    why = f"params.yaml does not name {', '.join(folder.name for folder in unnamed)}"
    yield _files("folders of features", unnamed, why, feature_store.remove)

    old = [path for path in exported(paths) if path.stat().st_mtime < before.timestamp()]
    why = f"written more than {days} days ago; `touchline export` writes them again"
    yield _files("exported models", old, why, delete)

    beyond = served.expired(paths.served, params.monitor)
    why = f"over {params.monitor.keep_days} days or {params.monitor.keep_megabytes} MB (`monitor` in params.yaml)"
    yield _files("records of answers", beyond, why, served.delete)

    networks = [path for path in engines.cached_files() if path.stat().st_mtime < before.timestamp()]
    why = f"in {engines.cache()}, not used for {days} days; made again on the next use"
    yield _files("network files in your cache", networks, why, delete)

    experiments = paths.project / ".dvc/tmp/exps"
    copies = [*experiments.glob("tmp*"), *experiments.glob("standalone/tmp*")]
    yield _files("copies of the project", copies, "experiments that were killed worked there", delete)


def exported(paths: Paths) -> list[Path]:
    """What `touchline export` wrote into the project."""
    endings = {target.ending for target in FORMATS.values() if target.ending}
    return [
        path
        for path in sorted(paths.exports.glob("*"))
        if path.suffix in endings or any((path / place / RECORD).is_file() for place in (".", "assets.extra"))
    ]


def _cache(project: Path) -> Iterator[Row]:
    """Objects in DVC's cache that no commit, branch, tag, experiment or workspace names."""
    cache, clone = project / ".dvc/cache", project / ".prefect/clone"
    if not cache.is_dir():
        return
    options = ["--workspace", *(["--all-commits", "--all-experiments"] if in_git(project) else [])]
    options += ["--projects", str(clone)] if (clone / "dvc.yaml").exists() else []
    said = dvc(project, "gc", *options, "--dry")
    unused = [Path(path) for path in re.findall(r"^Removing (.+)$", said, flags=re.MULTILINE)]
    why = "no workspace, commit or experiment needs them"
    remove: Callable[[], object] | None = partial(dvc, project, "gc", *options, "--force")
    if not all(path.is_relative_to(cache) for path in unused):
        why = f"this cache is not in {project}, and other projects may need them: see `dvc gc --projects`"
        remove = None
    yield Row("objects in DVC's cache", len(unused), _megabytes(unused), why, remove)


def _runs(paths: Paths, params: Params, before: datetime, days: int) -> Iterator[Row]:
    """Runs in MLflow that were deleted, or that ended long ago and nothing needs."""
    experiments = dvc(paths.project, "exp", "list", "--all-commits", "--name-only") if in_git(paths.project) else ""
    try:
        found = sync.garbage(paths, params.register_.name, before, experiments.split())
    except TouchlineError as error:
        yield Row("runs in MLflow", 1, 0, str(error))
        return
    count = found.deleted + len(found.old)
    why = f"{found.deleted} deleted by you; {len(found.old)} ended more than {days} days ago, and nothing needs them"
    remove = partial(sync.collect_garbage, paths, params.register_.name, found)
    yield Row("runs in MLflow", count, _megabytes(found.folders), why, remove)


@contextmanager
def alone(paths: Paths) -> Iterator[None]:
    """Hold the locks of all that may be running in the project.

    Raises:
        TouchlineError: one of them is held, or DVC or `touchline tune` is running.
    """
    import psutil
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
        # DVC holds no lock between two stages, nor tune between two trials.
        for process in psutil.process_iter(["cmdline", "cwd"]):
            words, place = [Path(word).name for word in process.info["cmdline"] or []], process.info["cwd"]
            running = "dvc" in words[:3] or ("touchline" in words[:3] and "tune" in words)
            if running and place and Path(place).is_relative_to(paths.project):
                raise _busy(f"`{' '.join(words)[:80]}` (process {process.pid})")
        yield


def _busy(name: str) -> TouchlineError:
    return TouchlineError(f"{name} is running: wait until it has ended, or end it, then run again; nothing was deleted")


def in_git(folder: Path) -> bool:
    """Whether DVC finds commits here; not where `core.no_scm` says so, as for an unpacked archive in a repository."""
    configured = [folder / ".dvc/config", folder / ".dvc/config.local"]
    if any(re.search(r"no_scm\s*=\s*true", path.read_text(), re.IGNORECASE) for path in configured if path.exists()):
        return False
    return subprocess.run(["git", "rev-parse", "--git-dir"], cwd=folder, capture_output=True).returncode == 0


def dvc(folder: Path, *arguments: str) -> str:
    """What a command of DVC prints. Raises TouchlineError with its error where it fails."""
    # The root of an experiment that this may run in is not meant.
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])[:300]
        raise TouchlineError(f"`dvc {arguments[0]}` in {folder} failed: {reason}: resolve that, then run again")
    return done.stdout


def _files(what: str, places: Sequence[Path], why: str, delete: Callable[[Path], object]) -> Row:
    def remove() -> None:
        for place in places:
            delete(place)

    return Row(what, len(places), _megabytes(places), why, remove)


def _megabytes(places: Iterable[Path]) -> float:
    files = (path for place in places for path in (place, *place.rglob("*")) if path.is_symlink() or path.is_file())
    return sum(path.lstat().st_size for path in files) / 1e6


def delete(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _show(rows: Iterable[Row], goes: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", title="what nothing needs any more, and what has to stay", title_justify="left")
    table.add_column("how many", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("")
    table.add_column("why", overflow="fold")
    for row in rows:
        verdict = f"[bold]{goes}[/bold]" if row.remove else "stays"
        table.add_row(row.what, f"{row.count:,}", f"{row.megabytes:,.1f}", verdict, escape(row.why))
    Console().print(table)
