"""Photos of one's own: `<folder>/<class>/**` or `<folder>/{train,validation,test}/<class>/**`.

An optional `manifest.csv` in the folder gives `group`, `licence` and `author` by `file` (path within the folder).
"""

import csv
import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from touchline.core.errors import ParamsError, TouchlineError, one_line
from touchline.core.files import sha256, write_text
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data.forgotten import Forgotten
from touchline.sources import Candidate, Planned, Source, at_most
from touchline.sources.received import Received, entries, say_left_out, shown

# What people call the folders of a split, case ignored; without a validation folder, split cuts it out of train.
_SUBSETS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_MANIFEST = "manifest.csv"
_MANIFEST_COLUMNS = ("group", "licence", "author")


def candidates(received: Received, classes: Sequence[str]) -> Iterator[Candidate]:
    """Every image under the classes' folders, in the order of their paths.

    Files are taken whatever their names; what `received` refuses is named and left out, and so is what lies beside the
    folders that are used. Hidden files and those of the operating system are passed over.

    Raises:
        ParamsError: the folder, or the folder of a class, is missing.
        TouchlineError: the manifest is not readable or lacks its `file` column, or a name is not UTF-8.
    """
    folder = received.folder
    if not folder.is_dir():
        raise ParamsError(
            f"ingest.folder: {folder} is not a folder: put photos into {folder}/<class>/ or name another one"
        )
    parents = _parents(folder, classes)
    for label in classes:
        if not any((parent / label).is_dir() for parent in parents):
            first = next(iter(parents))
            there = ", ".join(path.name for path in entries(first) if path.is_dir()) or "none"
            raise ParamsError(
                f"ingest.folder: class '{label}' has no folder in {first} (there: {there}): add it, or change `classes`"
            )
    found: list[tuple[str, str, Path]] = []
    left_out: list[str] = []
    say_left_out("folder", folder, _beside(received, classes, parents), most=10)
    for parent, subset in parents.items():
        for label in classes:
            for path, reason in received.below(parent / label) if (parent / label).is_dir() else ():
                if reason:
                    left_out.append(f"{shown(path.relative_to(folder).as_posix())} ({reason})")
                else:
                    found.append((label, subset, path))
    facts = _manifest(received, [path.relative_to(folder).as_posix() for _, _, path in found])
    for label, subset, path in found:
        origin = path.relative_to(folder).as_posix()
        read = partial(received.read, path)
        yield Candidate(label, "folder", origin, read, subset=subset, **facts.get(origin, {}))
    say_left_out("folder", folder, left_out)


def _parents(folder: Path, classes: Sequence[str]) -> dict[Path, str]:
    """The folders that hold the classes' folders, and the subset that each is for: one without, or those of a split."""
    parents = {
        path: _SUBSETS[path.name.casefold()]
        for path in entries(folder)
        if path.name.casefold() in _SUBSETS and path.name not in classes and path.is_dir()
    }
    if not parents:
        return {folder: ""}
    if missing := [subset for subset in ("train", "test") if subset not in parents.values()]:
        there = " and ".join(f"{path.name}/" for path in parents)
        raise ParamsError(f"ingest.folder: {folder} has {there} but no {missing[0]}/: add it, or put classes on top")
    return dict(sorted(parents.items(), key=lambda parent: (list(_SUBSETS.values()).index(parent[1]), parent[0])))


def _beside(received: Received, classes: Sequence[str], parents: dict[Path, str]) -> list[str]:
    """What lies beside the folders that are used, each with its reason, the most photos first."""
    folder = received.folder
    used = {*parents, *(parent / label for parent in parents for label in classes)}
    used |= {folder / _MANIFEST, folder / "README.md"}  # data/incoming has a README.md of this project's own
    unused = []
    for path in (path for parent in {folder: "", **parents} for path in entries(parent) if path not in used):
        name = shown(path.relative_to(folder).as_posix())
        if not path.is_dir():
            unused.append((0, f"{name} ({received.refusal(path) or 'not in the folder of a class'})"))
            continue
        count = sum(not reason for _, reason in received.below(path))
        unused.append((count, f"{name}/ ({count:,} photo{'s' * (count != 1)}, not in `classes`)"))
    return [words for _, words in sorted(unused, key=lambda each: -each[0])]


def _manifest(received: Received, origins: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the manifest says, by origin. Rows of no photo and photos of no row are counted, and the first is named."""
    path = received.folder / _MANIFEST
    if not os.path.lexists(path):
        return {}
    if reason := received.refusal(path, image=False):
        raise TouchlineError(f"{path} is not taken ({reason}): put a file there or take it away")
    import pandas as pd

    try:
        with path.open(encoding="utf-8-sig") as file:
            heading = file.readline()
        table = pd.read_csv(
            path, sep=_separator(heading), dtype=str, keep_default_na=False, skipinitialspace=True,
            encoding="utf-8-sig",
        )  # fmt: skip
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("its rows have more values than its header has columns")
    except (ValueError, UnicodeDecodeError) as error:
        raise TouchlineError(f"{path} is not a readable table ({one_line(error)}): mend it or take it away") from None
    table.columns = [str(column).strip().casefold() for column in table.columns]
    if "file" not in table:
        raise TouchlineError(f"{path} has no column `file` (path within the folder): add it or take the manifest away")
    known = [column for column in _MANIFEST_COLUMNS if column in table]
    if unread := [shown(column) for column in table.columns if column not in (*known, "file")]:
        # A misspelt `group` would let photos of one group onto both sides of the split.
        say(f"folder: {_MANIFEST}: not read: {', '.join(unread)}; read: {', '.join(['file', *known])}")
    find = _Finder(origins, received.folder)
    facts: dict[str, dict[str, Any]] = {}
    unmatched = []
    for row in table.to_dict("records"):
        if origin := find(row["file"]):
            facts[origin] = {column: row[column] for column in known}
        else:
            unmatched.append(shown(row["file"]))
    bare = [shown(origin) for origin in origins if origin not in facts]
    if unmatched:
        say(f"folder: {_MANIFEST}: {len(unmatched):,} of {len(table):,} rows match no photo, the first: {unmatched[0]}")
    if bare:
        say(f"folder: {_MANIFEST}: {len(bare):,} of {len(origins):,} photos have no row, the first: {bare[0]}")
    return facts


def _separator(heading: str) -> str:
    # Spreadsheets write a semicolon where the comma is the decimal sign.
    return max(",;\t", key=heading.count)


class _Finder:
    """Finds the photo that a person means by a path: case, slashes and folders before it may differ, if one fits."""

    def __init__(self, origins: Sequence[str], folder: Path) -> None:
        self._origins = set(origins)
        self._start = folder.resolve().as_posix() + "/"
        # By each end of each path, folded; None where several photos have it.
        self._by_end: dict[str, str | None] = {}
        for origin in origins:
            parts = _folded(origin).split("/")
            for first in range(len(parts)):
                end = "/".join(parts[first:])
                self._by_end[end] = None if end in self._by_end else origin

    def __call__(self, written: str) -> str | None:
        path = os.path.normpath(written.strip().replace("\\", "/").removeprefix(self._start)).replace("\\", "/")
        return next((each for each in (written, path) if each in self._origins), self._by_end.get(_folded(path)))


def _folded(path: str) -> str:
    # macOS takes accents apart.
    return unicodedata.normalize("NFC", path).casefold()


def _offers(paths: Paths, params: Params) -> Iterator[Candidate]:
    return candidates(Received.of(paths.project / params.ingest.folder, params), params.classes)


def _plan(paths: Paths, params: Params) -> list[Planned]:
    # Looked through here too: DVC reads all of the folder, before `ingest` can tell what is wrong with it.
    what = f"{sum(1 for _ in _offers(paths, params)):,} photos of your own, {at_most(params)}"
    return [Planned(what, str(paths.project / params.ingest.folder), 0.0, "there already", "yours")]


def _forget(paths: Paths, params: Params, gone: Forgotten) -> int:
    """Delete files, and rows of the manifest. Nothing is changed in a folder outside the project."""
    folder = (paths.project / params.ingest.folder).resolve()
    if not folder.is_relative_to(paths.project.resolve()):
        return 0
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _MANIFEST)
    origins = {file.relative_to(folder).as_posix(): file for file in files}
    going = {origin for origin, file in origins.items() if gone.has("folder", origin) or sha256(file) in gone.photos}
    separator, head, rows = _rows(folder / _MANIFEST)
    column, find = {name.strip().casefold(): number for number, name in enumerate(head)}, _Finder(list(origins), folder)

    def value(row: Sequence[str], name: str) -> str:
        number = column.get(name, len(row))
        return row[number] if number < len(row) else ""

    theirs = [row for row in rows if gone.has("folder", value(row, "file"), value(row, "author"))]
    of_authors = {origin for row in theirs if (origin := find(value(row, "file")))}
    # Interrupted, another run must find the rest: an author's files by their rows, and the rows of others by the files.
    for origin in of_authors:
        origins[origin].unlink()
    left = [row for row in rows if row not in theirs and find(value(row, "file")) not in going]
    if len(left) < len(rows):
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=separator, lineterminator="\n").writerows([head, *left])
        write_text(folder / _MANIFEST, out.getvalue())
    for origin in going - of_authors:
        origins[origin].unlink()
    return len(going | of_authors) + len(rows) - len(left)


def _rows(manifest: Path) -> tuple[str, list[str], list[list[str]]]:
    """Separator, header and rows of a manifest; nothing where there is none."""
    if not manifest.is_file():
        return ",", [], []
    text = manifest.read_text(encoding="utf-8-sig")
    separator = _separator(text.partition("\n")[0])
    head, *rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)) or [[]]
    return separator, head, rows


SOURCE = Source(
    "folder",
    _offers,
    _plan,
    collected="A folder of photos that the people who run the project put there.",
    labelled="By the name of the folder; trusted.",
    forget=_forget,
)
