"""Files that are either complete or absent: everything is written under a temporary name and then renamed."""

import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core.errors import TouchlineError, one_line

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


# Names are text even where they look like numbers: a class may be called 1, a group 007.
_TEXT = dict.fromkeys(
    (
        "path", "class", "subset", "source", "group", "sha256", "perceptual_hash", "licence", "author", "origin",
        "title", "author_page", "spdx", "use", "landing_page", "retrieved", "model", "predicted", "slice", "suggested",
        "near_to", "guess", "label", "photo",
    ),
    str,
)  # fmt: skip

# Numbers that only some rows have: an empty cell would make the whole column text.
_SPARSE = {"strength": [""], "cross_validation/loss": [""]}

# The columns that readers of a table rely on, by the name of the file or of its folder.
_NEEDED = {
    "validated.csv": ("path", "sha256"),
    "ledger.csv": ("sha256", "class", "source", "origin", "reason"),
    "split.csv": ("path", "subset"),
    "forgotten.csv": ("kind", "sha256"),
    "history": ("epoch", "train/accuracy", "train/loss", "validation/accuracy", "validation/loss", "kept"),
    "predictions.csv": ("path", "class", "model", "predicted", "confidence"),
    "per_class.csv": ("model", "class", "precision", "recall", "f1", "photos"),
    "slices.csv": ("model", "by", "slice", "photos", "accuracy", "accuracy_low", "accuracy_high"),
    "roc.csv": ("model", "class", "false_positive_rate", "true_positive_rate"),
    "curves.csv": ("model", "subset", "epoch", "strength", "accuracy", "loss", "kept"),
    "gallery.csv": ("model", "path", "class", "predicted", "confidence"),
}


# DVC assumes that read-only files, such as all in its cache, are unchanged: a damaged one comes back from there, even
# in place of what a stage has just made.
RENEW = "delete it and run `dvc repro`; if the same comes back, `chmod -R u+w .dvc/cache` and `dvc repro --force`"

# A spreadsheet runs a cell that starts with one of these signs, also after blanks and quotes; full-width signs count
# too. Depending on its import settings, a cell may start after any of these separators.
_CELL, _FORMULA = r"[,;|\t\n\v\f\r]", r"(?=[\"'\s]*[=+\-@\uff1d\uff0b\uff0d\uff20])"
_RUN, _GUARDED = re.compile(_CELL + _FORMULA), re.compile(f"({_CELL})'{_FORMULA}")

# Temporary files that this process is writing, and their lock.
_unfinished: set[Path] = set()
_guard = threading.Lock()


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, flush it to disk and rename it over `path`.

    Args:
        path: the file to make or replace; its folder is made if missing.
        suffix: ending of the temporary name, for writers that look at it (Keras wants `.keras`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, handle = _new_temporary(path, suffix)
    try:
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        _forget(temporary)


class Unsafe:
    """A file written under a temporary name; `flush` and `settle`, or `give_up`, end it. Many cost less together."""

    def __init__(self, path: Path, content: bytes) -> None:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._temporary, self._handle = _new_temporary(path)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except BaseException:
            self.give_up()
            raise

    def flush(self) -> None:
        """Make it safe on disk, whatever happens to the machine."""
        os.fsync(self._handle)

    def settle(self) -> None:
        """Give it its name, once it is flushed."""
        try:
            os.close(self._handle)
            self._temporary.replace(self._path)
        finally:
            _forget(self._temporary)

    def give_up(self) -> None:
        """Delete it."""
        os.close(self._handle)
        _forget(self._temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file as `replacing` does."""
    file = Unsafe(path, content)
    try:
        file.flush()
    except BaseException:
        file.give_up()
        raise
    file.settle()


def _new_temporary(path: Path, suffix: str = "") -> tuple[Path, int]:
    """A new file beside `path`, and its descriptor, open for writing."""
    with _guard:
        temporary = path.parent / f".partial-{os.getpid()}-{secrets.token_hex(6)}{suffix}"
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        _unfinished.add(temporary)
    return temporary, handle


def _forget(temporary: Path) -> None:
    temporary.unlink(missing_ok=True)
    _unfinished.discard(temporary)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises TouchlineError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise TouchlineError(f"{path} is missing: run `dvc repro` to make it") from None
    except (ValueError, RecursionError) as error:
        raise TouchlineError(f"{path} is not readable JSON ({error}): {RENEW}") from None


def model_record(path: Path) -> dict[str, Any] | None:
    """`models/<name>.json` as `train` wrote it; None for JSON of another kind or of another model, such as a copy.

    Raises:
        TouchlineError: the file is missing or is not JSON.
    """
    record = read_json(path)
    ours = isinstance(record, dict) and record.get("model") == path.stem and "model_sha256" in record
    return record if ours else None


def model_records(folder: Path, names: Iterable[str], split_table: Path) -> dict[str, dict[str, Any]]:
    """`models/<name>.json` by name, of models that were trained on the split at hand.

    Raises:
        TouchlineError: a file is missing or is not JSON, or the split is another one.
    """
    records = {}
    for name in names:
        file = folder / f"{name}.json"
        records[name] = read_json(file)
        check_digest(split_table, records[name]["tags"]["touchline.split_sha256"], file)
    return records


def check_digest(path: Path, digest: str, recorded: Path) -> None:
    """Raise TouchlineError unless `path` is the file with this SHA-256, which the file `recorded` names."""
    if not path.is_file():
        raise TouchlineError(f"{path} is missing: run `dvc repro` to make it")
    if sha256(path) != digest:
        raise TouchlineError(f"{path} is not the file that {recorded} was made with: {RENEW}")


def no_formula(text: str) -> str:
    """`text` with a `'` before whatever a spreadsheet would run."""
    return _RUN.sub(r"\g<0>'", f"\n{text}")[1:]


def _as_written(text: str) -> str:
    """Undo `no_formula`."""
    return _GUARDED.sub(r"\1", f"\n{text}")[1:]


def _each_text(table: "pd.DataFrame", change: Callable[[str], str], wanted: re.Pattern[str]) -> "pd.DataFrame":
    """`table` with `change` done to its texts and names of columns, where `wanted` is found."""
    changed = {}
    for name, column in table.select_dtypes(exclude=["number", "bool"]).items():
        values = column.tolist()
        # One search of all is far quicker than one of each, and nearly always finds nothing.
        if wanted.search("\n" + "\n".join(value for value in values if isinstance(value, str))):
            changed[name] = [change(value) if isinstance(value, str) else value for value in values]
    return table.assign(**changed).rename(columns=change)


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a frame as CSV that a spreadsheet may open: see `no_formula`. `read_table` gives back what `table` has."""
    with replacing(path) as temporary:
        _each_text(table, no_formula, _RUN).to_csv(temporary, index=False, lineterminator="\n")


def read_table(path: Path, **options: Any) -> "pd.DataFrame":
    """A CSV of `write_table` as a frame; names are text whatever they look like, and empty cells of text stay empty
    strings, those of numbers are NaN.

    Raises:
        TouchlineError: the file is missing, empty, cut off, not a table, or lacks a column that its readers need.
    """
    import pandas as pd

    try:
        table = pd.read_csv(
            path, keep_default_na=False, na_values=_SPARSE, lineterminator="\n", **{"dtype": _TEXT, **options}
        )
        table = _each_text(table, _as_written, _GUARDED)
        if not isinstance(table.index, pd.RangeIndex):
            # pandas would take the first column for row names and shift all others by one.
            raise ValueError("its rows have more values than its header has columns")
        needed = _NEEDED.get(path.name) or _NEEDED.get(path.parent.name, ())
        if missing := [column for column in needed if column not in table.columns]:
            raise ValueError(f"it lacks the column {', '.join(missing)}")
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            # pandas would read the missing end of the last row as empty cells.
            if file.read() != b"\n":
                raise ValueError("its last line is cut off")
        return table
    except FileNotFoundError:
        raise TouchlineError(f"{path} is missing: run `dvc repro` to make it") from None
    except ValueError as error:
        raise TouchlineError(f"{path} is not a readable table ({one_line(error)}): {RENEW}") from None


def positions(labels: "pd.Series", classes: Sequence[str]) -> "np.ndarray":
    """The place in `classes` of each label, all of which are among them: int64, shape (n,)."""
    return labels.map({label: number for number, label in enumerate(classes)}).to_numpy("int64")


def remove_partials(folder: Path, *, below: bool = True) -> None:
    """Delete what killed writers left in `folder` (and `below` it); files that a living process is writing stay."""
    for path in abandoned(folder, below=below):
        path.unlink(missing_ok=True)


def abandoned(folder: Path, *, below: bool = True) -> list[Path]:
    """Half-written files in `folder` (and `below` it) whose writer is gone."""
    import psutil

    found = []
    for path in folder.rglob(".partial-*") if below else folder.glob(".partial-*"):
        writer = path.name.split("-")[1]
        # Our process id may be that of an earlier writer.
        ours = writer == str(os.getpid())
        at_work = path in _unfinished if ours else writer.isdecimal() and psutil.pid_exists(int(writer))
        if not at_work:
            found.append(path)
    return found


def abandon() -> None:
    """Delete what this process is writing, and block further writes. Call it just before the process exits."""
    _guard.acquire()
    for path in list(_unfinished):
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
