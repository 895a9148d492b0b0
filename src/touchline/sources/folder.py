"""Photos of one's own: `<folder>/<class>/**` or `<folder>/{train,test}/<class>/**`.

An optional `manifest.csv` in the folder gives `group`, `licence` and `author` by `file` (path within the folder).
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from touchline.core.errors import ParamsError, TouchlineError, one_line
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.sources import Candidate, Planned, Source, at_most
from touchline.sources.received import Received, say_left_out, shown

_SUBSETS = ("train", "test")
_MANIFEST_COLUMNS = ("group", "licence", "author")


def candidates(received: Received, classes: Sequence[str]) -> Iterator[Candidate]:
    """Every image under the classes' folders, in the order of their paths.

    Files are taken whatever their names; what `received` refuses is named and left out. Hidden files are left out.

    Raises:
        ParamsError: the folder, or the folder of a class, is missing.
        TouchlineError: the manifest is not readable or lacks its `file` column.
    """
    folder = received.folder
    if not folder.is_dir():
        raise ParamsError(
            f"ingest.folder: {folder} is no folder: put photos into {folder}/<class>/ or name another one"
        )
    subsets = [name for name in _SUBSETS if (folder / name).is_dir() and name not in classes] or [""]
    if subsets in (["train"], ["test"]):
        missing = "test" if subsets == ["train"] else "train"
        raise ParamsError(f"ingest.folder: {folder} has {subsets[0]}/ but no {missing}/: add it, or put classes on top")
    for label in classes:
        if not any((folder / subset / label).is_dir() for subset in subsets):
            there = ", ".join(sorted(path.name for path in (folder / subsets[0]).iterdir() if path.is_dir())) or "none"
            raise ParamsError(
                f"ingest.folder: class '{label}' has no folder in {folder / subsets[0]} (there: {there}): "
                "add it, or change `classes`"
            )
    facts = _manifest(received)
    left_out = []
    for subset in subsets:
        for label in classes:
            for path in sorted((folder / subset / label).rglob("*")):
                relative = path.relative_to(folder)
                if any(part.startswith(".") for part in relative.parts) or (path.is_dir() and not path.is_symlink()):
                    continue
                origin = relative.as_posix()
                if reason := received.refusal(path):
                    left_out.append(f"{shown(origin)} ({reason})")
                else:
                    read = partial(received.read, path)
                    yield Candidate(label, "folder", origin, read, subset=subset, **facts.get(origin, {}))
    say_left_out("folder", folder, left_out)


def _manifest(received: Received) -> dict[str, dict[str, Any]]:
    path = received.folder / "manifest.csv"
    if not os.path.lexists(path):
        return {}
    if reason := received.refusal(path, image=False):
        raise TouchlineError(f"{path} is not taken ({reason}): put a file there or take it away")
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("its rows have more values than its header has columns")
    except (ValueError, UnicodeDecodeError) as error:
        raise TouchlineError(f"{path} is not a readable table ({one_line(error)}): mend it or take it away") from None
    if "file" not in table:
        raise TouchlineError(f"{path} has no column `file` (path within the folder): add it or take the manifest away")
    known = [column for column in _MANIFEST_COLUMNS if column in table]
    return {row["file"]: {column: row[column] for column in known} for row in table.to_dict("records")}


def _offers(paths: Paths, params: Params) -> Iterator[Candidate]:
    return candidates(Received.of(paths.project / params.ingest.folder, params), params.classes)


def _plan(paths: Paths, params: Params) -> list[Planned]:
    # Looked through here too: DVC reads all of the folder, before `ingest` can tell what is wrong with it.
    what = f"{sum(1 for _ in _offers(paths, params)):,} photos of your own, {at_most(params)}"
    return [Planned(what, str(paths.project / params.ingest.folder), 0.0, "there already", "yours")]


SOURCE = Source("folder", _offers, _plan)
