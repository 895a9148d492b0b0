"""What lies round a stage's work: its lock, its end with the process that ran it, its cost, the commit it ran from.

DVC that is killed leaves the stage's process alive, and that would write into the outputs of the next run.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from touchline.core.errors import TouchlineError
from touchline.core.files import abandon, read_json, remove_partials, write_json
from touchline.core.paths import Paths

_SECONDS_BETWEEN_LOOKS = 0.3
_SECONDS_FOR_LOCK = 20.0
SHELLS = {"sh", "dash", "bash", "zsh", "ksh", "fish"}


@contextmanager
def running(paths: Paths, name: str) -> Iterator[None]:
    """Run the block as the stage `name`, alone in this workspace.

    Raises:
        TouchlineError: another process is still running the stage.
    """
    from filelock import FileLock, Timeout

    if os.environ.get("DVC_STAGE"):
        _end_with_parent()
    paths.locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(paths.locks / f"{name}.lock")
    try:
        # A process whose DVC was killed ends by itself within a moment; so wait a little before complaining.
        with lock.acquire(timeout=_SECONDS_FOR_LOCK):
            began = time.monotonic()
            # What a writer killed with -9 left. Photos and features are looked through by the stages that write them.
            remove_partials(paths.photos_table.parent, below=False)
            remove_partials(paths.models)
            remove_partials(paths.reports)
            yield
            # Not an output: what a stage cost differs from run to run, and is no reason to run what follows it.
            write_json(paths.locks / f"{name}.json", {"seconds": round(time.monotonic() - began, 2), **_memory()})
    except Timeout:
        raise TouchlineError(
            f"stage {name} is already running in {paths.workspace}: wait until it has ended, then run again"
        ) from None


def costs(paths: Paths) -> dict[str, dict[str, float]]:
    """What each stage's last run cost here, by the stage's name: `seconds` and `peak_megabytes`."""
    return {
        path.stem: read_json(path) for path in sorted(paths.locks.glob("*.json"), key=lambda path: path.stat().st_mtime)
    }


def code(paths: Paths) -> dict[str, Any]:
    """The git commit in the workspace and the files that differ from it; no commit where there is no git."""
    git = partial(subprocess.run, cwd=paths.workspace, capture_output=True, text=True, check=False)
    commit = git(["git", "rev-parse", "HEAD"])
    if commit.returncode:
        return {"commit": "", "changed": []}
    # DVC writes dvc.lock between the stages, so it always differs while they run.
    changed = git(["git", "status", "--porcelain", "-z", "--no-renames", "--", ".", ":(exclude)dvc.lock"]).stdout
    return {"commit": commit.stdout.strip(), "changed": [entry[3:] for entry in changed.split("\0") if entry]}


def _memory() -> dict[str, float]:
    try:
        import resource
    except ImportError:  # Windows has no such count
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_megabytes": round(peak / (2**20 if sys.platform == "darwin" else 2**10))}


def _end_with_parent() -> None:
    """End this process at once when DVC, which started it through a shell, is gone."""
    import psutil

    watched = [psutil.Process(os.getppid())]
    if watched[0].name() in SHELLS and (grandparent := watched[0].parent()):
        watched.append(grandparent)
    # A flow that was killed leaves its DVC alive, and with it the stage.
    with suppress(ValueError, psutil.NoSuchProcess):
        watched.append(psutil.Process(int(os.environ.get("TOUCHLINE_PARENT", ""))))

    def watch() -> None:
        pause = threading.Event()
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            pause.wait(_SECONDS_BETWEEN_LOOKS)
        # Nobody waits for the result, and what was half done lies under temporary names.
        abandon()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
