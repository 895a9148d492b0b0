"""What surrounds a stage's work: its lock, its end when its parent process ends, its cost, and its git commit.

When DVC is killed, the stage's process lives on, and would write into the outputs of the next run.
"""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from touchline.core.errors import TouchlineError
from touchline.core.files import abandon, read_json, remove_partials, write_json
from touchline.core.paths import Paths

_SECONDS_BETWEEN_LOOKS = 0.3
_SECONDS_FOR_LOCK = 20.0
# Smaller differences in a stage's cost are noise, however large in proportion.
_LEAST = {"seconds": 5.0, "peak_megabytes": 200.0}
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
        # A process whose DVC was killed ends within a moment, so wait a little before failing.
        with lock.acquire(timeout=_SECONDS_FOR_LOCK):
            began = time.monotonic()
            # Left by writers killed with -9. The stages that write photos and features clean up those themselves.
            remove_partials(paths.photos_table.parent, below=False)
            remove_partials(paths.models)
            remove_partials(paths.reports)
            yield
            # Not an output: the cost differs from run to run, and must not cause later stages to run again.
            spent = {"seconds": round(time.monotonic() - began, 2), **_memory()}
            write_json(paths.locks / f"{name}.json", spent | _earlier(paths, name))
    except Timeout:
        raise TouchlineError(
            f"stage {name} is already running in {paths.workspace}: wait until it has ended, then run again"
        ) from None


def costs(paths: Paths) -> dict[str, dict[str, Any]]:
    """What each stage's last run cost here, by the stage's name.

    These are `seconds` and `peak_megabytes`; a digest of its `input`; and `earlier`, the most that each of the two was
    in earlier runs with that input. The most, because a run that finds photos or features in place does less.
    """
    return {
        path.stem: read_json(path) for path in sorted(paths.locks.glob("*.json"), key=lambda path: path.stat().st_mtime)
    }


def slower(costs: Mapping[str, Mapping[str, Any]], limit: float) -> list[str]:
    """The stages whose last run took more than `limit` times what any earlier one took on the same input.

    Args:
        costs: as the function of that name gives them.
    """
    found = []
    for name, cost in costs.items():
        for key, before in cost.get("earlier", {}).items():
            now, unit = cost.get(key, 0), "s" if key == "seconds" else "MB"
            if now > limit * before and now - before >= _LEAST[key]:
                found.append(f"{name} {now:.0f} {unit}, at most {before:.0f} in earlier runs on the same input")
    return found


def _earlier(paths: Paths, name: str) -> dict[str, Any]:
    """The `input` of a run that has ended, and `earlier`; see `costs`."""
    digest = hashlib.sha256()
    # Every stage's input follows from these two files; code is left out, since its cost is what is compared.
    for path in (paths.workspace / "params.yaml", paths.photos_table):
        digest.update(path.read_bytes() if path.exists() else b"")
    found = {"input": digest.hexdigest()}
    last: dict[str, Any] = {}
    with suppress(TouchlineError):  # missing or damaged, which is no reason to fail
        last = read_json(paths.locks / f"{name}.json")
    if last.get("input") != found["input"]:
        return found
    most = last.get("earlier", {})
    return found | {
        "earlier": {key: max(last[key], most.get(key, 0)) for key in ("seconds", "peak_megabytes") if key in last}
    }


def code(paths: Paths) -> dict[str, Any]:
    """The git commit in the workspace and the files that differ from it; no commit without git."""
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
    except ImportError:  # not on Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_megabytes": round(peak / (2**20 if sys.platform == "darwin" else 2**10))}


def _end_with_parent() -> None:
    """End this process as soon as DVC, which started it through a shell, is gone."""
    import psutil

    watched = [psutil.Process(os.getppid())]
    if watched[0].name() in SHELLS and (grandparent := watched[0].parent()):
        watched.append(grandparent)
    # When a flow is killed, its DVC lives on, and so does the stage.
    with suppress(ValueError, psutil.NoSuchProcess):
        watched.append(psutil.Process(int(os.environ.get("TOUCHLINE_PARENT", ""))))

    def watch() -> None:
        pause = threading.Event()
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            pause.wait(_SECONDS_BETWEEN_LOOKS)
        # The result is no longer wanted, and unfinished files still have temporary names.
        abandon()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
