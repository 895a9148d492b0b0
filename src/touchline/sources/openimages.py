"""Photos of Open Images V7, chosen by labels that people verified.

Three kinds of CSV files are read for each subset: labels (which photo shows what), image info (author, licence,
rotation) and boxes (which photos are drawings). They are downloaded to a cache folder, so that a killed run goes on in
the middle of one, and filtered a block at a time, so memory does not grow with them. What is found is kept there, the
files themselves only if so set, and a run with the same settings asks the network for nothing.

Formats and places of the files: https://storage.googleapis.com/openimages/web/download_v7.html
"""

import csv
import difflib
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from glob import escape
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import remove_partials, write_json
from touchline.core.params import DownloadParams, OpenImagesParams, Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data.forgotten import Forgotten
from touchline.sources import Candidate, Planned, Source, at_most, fetch, http
from touchline.sources.http import HttpError, WrongContent

LICENCE = "labels CC BY 4.0 (Google LLC); photos listed as CC BY 2.0, each with its author"
BLOCK = 2**20  # bytes of a CSV file parsed at a time; no row may be longer

_CLASSES = "v7/oidv7-class-descriptions.csv"
# `val` in one name and `validation` in the others is how they are published.
_LABELS = {
    "validation": "v7/oidv7-val-annotations-human-imagelabels.csv",
    "test": "v7/oidv7-test-annotations-human-imagelabels.csv",
    "train": "v7/oidv7-train-annotations-human-imagelabels.csv",
}
# Of train, the photos that have boxes: no others lie on the server.
_INFO = {
    "validation": "2018_04/validation/validation-images-with-rotation.csv",
    "test": "2018_04/test/test-images-with-rotation.csv",
    "train": "2018_04/train/train-images-boxable-with-rotation.csv",
}
_BOXES = {
    "validation": "v5/validation-annotations-bbox.csv",
    "test": "v5/test-annotations-bbox.csv",
    "train": "v6/oidv6-train-annotations-bbox.csv",
}
_INFO_COLUMNS = ("ImageID", "License", "Author", "AuthorProfileURL", "Title", "OriginalLandingURL", "Rotation")
# Empty and `nan` stand for "not known", which is as good as upright for all but a few.
_ROTATIONS = {"90": 90, "180": 180, "270": 270}
# Part of what a cached subset depends on: to be raised where the meaning of what is kept changes.
_FORMAT = 2

_Row = tuple[str, ...]


class _WrongTable(TouchlineError):
    """A file that came whole and is not what it should be."""


@dataclass(frozen=True)
class _Photo:
    label: str
    image: str
    licence: str
    author: str
    author_page: str
    title: str
    landing_page: str
    rotation: int


@dataclass(frozen=True)
class _Facts:
    """What the files of one subset say of all photos positive for one of `mids`: enough for other wishes too.

    Attributes:
        labels: all that a photo is positive for, by its id.
        info: its `_INFO_COLUMNS`; a photo without them is not on the server.
        drawn: photos with a box marked as a drawing; None where the boxes were not read.
    """

    mids: list[str]
    labels: dict[str, list[str]]
    info: dict[str, list[str]]
    drawn: list[str] | None


@dataclass(frozen=True)
class _Found:
    """The photos of one subset that fit, in the order of their ids, and how many there were and were left out."""

    photos: tuple[_Photo, ...]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Wanted:
    """Params with names resolved: class of each wanted MID (Open Images' key of a class), and the excluded MIDs."""

    labels: dict[str, str]
    excluded: frozenset[str]


def candidates(
    params: OpenImagesParams, settings: DownloadParams, classes: Sequence[str], cache: Path
) -> Iterator[Candidate]:
    """Photos positive for exactly one of `classes`, subset by subset: the files of one are read when it is reached.

    Within a subset the classes take turns, each in the order of its photos' ids. Left out are photos that are positive
    for an excluded class, that are not on the server, that state no licence, that hold a drawing (if so set), and
    those of an author beyond `params.max_per_author` a class.

    Args:
        cache: folder for what was found, and for the files it is found in; made if missing.

    Raises:
        ParamsError: a class without entries, an entry that is no class of Open Images, or one that stands for two.
        TouchlineError: a file cannot be fetched or is not what it should be.
    """
    wanted = _resolved(params, classes, _class_names(params, settings, cache))
    taken: Counter[tuple[str, str]] = Counter()
    for subset in params.subsets:
        found = _found(params, wanted, subset, cache)
        if found is None:
            found = _fetched(params, settings, wanted, subset, cache)
        for photo in _in_turn(_within_limit(found.photos, params.max_per_author, taken), classes):
            yield Candidate(
                label=photo.label,
                source="openimages",
                origin=f"{subset}/{photo.image}",
                url=_photo_url(params, subset, photo.image),
                licence=photo.licence,
                author=photo.author,
                author_page=photo.author_page,
                title=photo.title,
                landing_page=photo.landing_page,
                # Two people may have one name, but not one page.
                group=photo.author_page or photo.author,
                rotation=photo.rotation,
            )


def facts(params: OpenImagesParams, classes: Sequence[str], cache: Path) -> dict[str, dict[str, int]]:
    """What is known of each subset that was read: photos offered by class, positives, and why photos were left out.

    Asks the network for nothing; empty where nothing was read with these params.
    """
    names = _kept(_classes_path(params, cache))
    if names is None:
        return {}
    wanted = _resolved(params, classes, names)
    taken: Counter[tuple[str, str]] = Counter()
    known: dict[str, dict[str, int]] = {}
    for subset in params.subsets:
        found = _found(params, wanted, subset, cache)
        if found is not None:
            offered = _within_limit(found.photos, params.max_per_author, taken)
            by_class = Counter(photo.label for photo in offered)
            beyond = len(found.photos) - len(offered)
            known[subset] = {label: by_class[label] for label in classes} | found.counts
            known[subset][f"left out: beyond {params.max_per_author} of an author"] = beyond
    return known


def plan(params: OpenImagesParams, settings: DownloadParams, classes: Sequence[str], cache: Path) -> list[Planned]:
    """What `candidates` would read if every subset were needed, without reading it; the photos themselves come on top.

    Only the list of classes (0.5 MB) is fetched, which tells whether the params name classes that exist.

    Raises:
        ParamsError: as `candidates` does.
        TouchlineError: the list of classes cannot be fetched.
    """
    wanted = _resolved(params, classes, _class_names(params, settings, cache))
    files = []
    for subset in params.subsets:
        path = _subset_path(params, subset, cache)
        if _found(params, wanted, subset, cache) is not None:
            what = f"Open Images {subset}: photos found before"
            files.append(Planned(what, str(path), path.stat().st_size / 1e6, "there already", LICENCE))
            continue
        for kind, names in (("labels", _LABELS), ("image info", _INFO), ("boxes", _BOXES)):
            if kind == "boxes" and subset not in params.leave_out_drawings:
                continue
            url, local = _url(params, names[subset]), _local(params, names[subset], cache)
            why = ", read only to find drawings (leave_out_drawings)" if kind == "boxes" else ""
            what = f"Open Images {subset}: {kind}{why}"
            if local.exists():
                files.append(Planned(what, str(local), local.stat().st_size / 1e6, "there already", LICENCE))
            else:
                with _explained():
                    size = http.head(url, settings)
                files.append(Planned(what, url, None if size is None else size / 1e6, "to fetch", LICENCE))
    return files


def rows_where(
    file: BinaryIO, column: str, wanted: Collection[str], columns: Sequence[str], where: str
) -> Iterator[_Row]:
    """The cells `columns` of those rows of a CSV file with a header whose `column` holds one of `wanted`.

    A few blocks of the file are in memory at a time.

    Args:
        where: the file's URL or path, for the message.

    Raises:
        TouchlineError: the file is no CSV with these columns.
    """
    import pyarrow
    from pyarrow import compute
    from pyarrow import csv as arrow_csv

    values = pyarrow.array([value.encode() for value in wanted], pyarrow.binary())
    read = arrow_csv.ReadOptions(block_size=BLOCK)
    parse = arrow_csv.ParseOptions(newlines_in_values=True)
    # As bytes, for speed, and because one title in a broken encoding is no reason to stop.
    types = dict.fromkeys(columns, pyarrow.binary())
    convert = arrow_csv.ConvertOptions(include_columns=list(columns), column_types=types)
    try:
        with arrow_csv.open_csv(file, read, parse, convert) as batches:
            for batch in batches:
                found = batch.filter(compute.is_in(batch.column(column), value_set=values))
                cells = ([cell.decode(errors="replace") for cell in part.to_pylist()] for part in found.columns)
                yield from zip(*cells, strict=True)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as error:
        raise _WrongTable(
            f"{where} is not the table expected ({shorten(str(error), 200)}): take it away if it is a copy, "
            "or see `ingest.openimages.url`"
        ) from None


def _fetched(params: OpenImagesParams, settings: DownloadParams, wanted: _Wanted, subset: str, cache: Path) -> _Found:
    """Read the files of `subset`, keep what was found, and say how much that is."""
    known = _kept_facts(_subset_path(params, subset, cache))
    if known and not wanted.labels.keys() <= {*known.mids}:
        # What earlier wishes needed is read again with it, or each change of mind would read all files.
        wanted_mids, known = {*wanted.labels, *known.mids}, None
    else:
        wanted_mids = {*wanted.labels}
    kinds = {} if known else {"labels": _LABELS[subset], "image info": _INFO[subset]}
    if subset in params.leave_out_drawings:
        kinds["boxes"] = _BOXES[subset]
    files = {kind: _local(params, name, cache) for kind, name in kinds.items()}

    def rows(kind: str, column: str, values: Collection[str], columns: Sequence[str]) -> Iterator[_Row]:
        number = [*kinds].index(kind) + 1
        what = f"Open Images {subset}, file {number} of {len(kinds)} ({kind})"
        url, local = _url(params, kinds[kind]), files[kind]
        then = [_url(params, kinds[later]) for later in [*kinds][number:] if not files[later].exists()]
        _download(url, local, settings, _has_header, what, then)
        with local.open("rb") as file:
            yield from rows_where(file, column, values, columns, str(local) if params.keep_label_files else url)

    if subset == "train" and "labels" in files and not files["labels"].exists():
        _try_photos(params, settings, subset)
    try:
        facts = known or _read(sorted(wanted_mids), rows)
        if "boxes" in kinds:
            facts = replace(facts, drawn=_drawn(facts, rows))
    except _WrongTable:
        _put_away(params, files.values())  # the next run is to fetch them again
        raise
    _keep(_subset_path(params, subset, cache), asdict(facts))
    _put_away(params, files.values())
    found = _fitting_of(facts, wanted, drawings="boxes" in kinds)
    say(f"Open Images {subset}: {_summary(found, wanted)}")
    return found


def _try_photos(params: OpenImagesParams, settings: DownloadParams, subset: str) -> None:
    """Raise TouchlineError where the first photos listed are refused, before gigabytes are read for nothing."""
    with _explained():
        try:
            start, _ = http.read_range(_url(params, _INFO[subset]), 0, 4096, settings)
        except WrongContent:  # no ranges here: it will show when photos are fetched
            return
    refusal = None
    for image in re.findall(r"^([0-9a-f]{16}),", start.decode(errors="replace"), re.MULTILINE)[:3]:
        try:
            http.read_range(_photo_url(params, subset, image), 0, 1, settings)
        except WrongContent:
            return
        except HttpError as error:
            refusal = error
        else:
            return
    if refusal:
        with _explained("photos_url"):
            raise refusal


def _put_away(params: OpenImagesParams, files: Iterable[Path]) -> None:
    if not params.keep_label_files:
        for local in files:
            local.unlink(missing_ok=True)


def _read(mids: list[str], rows: Callable[..., Iterator[_Row]]) -> _Facts:
    """The facts of a subset, without its drawings, from the rows of its files; a file not needed is not read."""
    columns = ("ImageID", "LabelName", "Confidence")
    images = {image for image, _ in _positive(rows("labels", "LabelName", mids, columns))}
    if not images:
        return _Facts(mids, {}, {}, None)
    # What else they show: so that another `exclude` needs no file.
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for image, mid in _positive(rows("labels", "ImageID", images, columns)):
        labels[image].add(mid)
    info = {row[0]: list(row) for row in rows("image info", "ImageID", images, _INFO_COLUMNS)}
    return _Facts(mids, {image: sorted(found) for image, found in labels.items()}, info, None)


def _drawn(facts: _Facts, rows: Callable[..., Iterator[_Row]]) -> list[str]:
    flags = rows("boxes", "ImageID", facts.info, ("ImageID", "IsDepiction")) if facts.info else iter(())
    return sorted({image for image, flag in flags if flag.removesuffix(".0") == "1"})


def _positive(rows: Iterator[_Row]) -> Iterator[tuple[str, str]]:
    """Image and MID of the rows that say a class is there.

    Args:
        rows: ImageID, LabelName and Confidence.

    Raises:
        _WrongTable: a confidence is no number.
    """
    for image, mid, confidence in rows:
        try:
            positive = float(confidence) > 0.5
        except ValueError:
            raise _WrongTable(
                f"the Open Images label of photo {image} has Confidence {confidence!r}, which is no number: "
                "see `ingest.openimages.url`"
            ) from None
        if positive:
            yield image, mid


def _fitting_of(facts: _Facts, wanted: _Wanted, *, drawings: bool) -> _Found:
    """The photos that fit what is wanted; with `drawings`, drawings do not."""
    positives = {
        image: labels
        for image, mids in facts.labels.items()
        if (labels := {wanted.labels[mid] for mid in mids if mid in wanted.labels})
    }
    excluded = {image for image in positives if not wanted.excluded.isdisjoint(facts.labels[image])}
    label_of, counts = _of_one_class(positives, excluded, wanted)
    drawn = set(facts.drawn or ()) if drawings else set()
    return _Found(tuple(_fitting(label_of, facts.info, drawn, counts)), dict(counts))


def _of_one_class(
    positives: Mapping[str, Collection[str]], excluded: Collection[str], wanted: _Wanted
) -> tuple[dict[str, str], Counter[str]]:
    """Class of each image that shows one class and nothing excluded, and the counts so far."""
    counts = Counter(dict.fromkeys((f"positive: {label}" for label in wanted.labels.values()), 0))
    counts.update(f"positive: {label}" for labels in positives.values() for label in labels)
    label_of = {}
    for image, labels in positives.items():
        if len(labels) > 1:
            counts["left out: two classes"] += 1
        elif image in excluded:
            counts["left out: an excluded class"] += 1
        else:
            label_of[image] = next(iter(labels))
    return label_of, counts


def _fitting(
    label_of: Mapping[str, str], info: Mapping[str, Sequence[str]], drawings: Collection[str], counts: Counter[str]
) -> Iterator[_Photo]:
    """The images that are on the server, under a licence and no drawings; the others are added to `counts`."""
    for image, label in sorted(label_of.items()):
        if image not in info:
            counts["left out: not on the server"] += 1
            continue
        # Free text may hold line breaks; it goes into tables and onto pages.
        texts = [" ".join(cell.split()) for cell in info[image]]
        _, licence, author, author_page, title, landing_page, rotation = texts
        if not licence:
            counts["left out: no licence"] += 1
        elif image in drawings:
            counts["left out: a drawing"] += 1
        else:
            turn = _ROTATIONS.get(rotation.removesuffix(".0"), 0)
            yield _Photo(label, image, licence, author, author_page, title, landing_page, turn)


def _summary(found: _Found, wanted: _Wanted) -> str:
    fitting = Counter(photo.label for photo in found.photos)
    labels = dict.fromkeys(wanted.labels.values())
    fit = ", ".join(f"{label} {fitting[label]:,} of {found.counts[f'positive: {label}']:,}" for label in labels)
    reasons = [
        f"{key.removeprefix('left out: ')} {count:,}"
        for key, count in sorted(found.counts.items())
        if key.startswith("left out: ")
    ]
    return f"{fit} photos fit; left out: {', '.join(reasons) or 'none'}"


def _within_limit(photos: Sequence[_Photo], limit: int, taken: Counter[tuple[str, str]]) -> list[_Photo]:
    """The photos without those beyond `limit` of one author and class; `taken` counts on from subset to subset."""
    kept = []
    for photo in photos:
        author = photo.author_page or photo.author
        if not author or taken[photo.label, author] < limit:
            taken[photo.label, author] += 1
            kept.append(photo)
    return kept


def _in_turn(photos: Sequence[_Photo], classes: Sequence[str]) -> Iterator[_Photo]:
    """One photo of each class after another, so that a caller that stops early has photos of every class."""
    by_class = [[photo for photo in photos if photo.label == label] for label in classes]
    for row in zip_longest(*by_class):
        yield from (photo for photo in row if photo is not None)


def _resolved(params: OpenImagesParams, classes: Sequence[str], names: Mapping[str, str]) -> _Wanted:
    """Params with MIDs and display names looked up in `names` (name by MID).

    Raises:
        ParamsError: see `candidates`.
    """
    labels: dict[str, str] = {}
    for label in classes:
        where = f"ingest.openimages.classes.{label}"
        if label not in params.classes:
            raise ParamsError(f"{where} is missing: list the Open Images classes that show '{label}'")
        for entry in params.classes[label]:
            mid = _mid(entry, names, where, params)
            if labels.setdefault(mid, label) != label:
                raise ParamsError(f"{where}: '{entry}' also stands for '{labels[mid]}': keep it for one of them")
    excluded = frozenset(_mid(entry, names, "ingest.openimages.exclude", params) for entry in params.exclude)
    for mid in sorted(excluded & labels.keys()):
        raise ParamsError(f"ingest.openimages.exclude: {mid} ({names[mid]}) is also listed for '{labels[mid]}'")
    return _Wanted(labels, excluded)


def _mid(entry: str, names: Mapping[str, str], where: str, params: OpenImagesParams) -> str:
    if entry in names:
        return entry
    if entry.startswith(("/m/", "/g/")):
        raise ParamsError(
            f"{where}: {entry} is no class of Open Images: write the name of one, such as Rugby, or an id of the list "
            f"{_url(params, _CLASSES)}"
        )
    mids = [mid for mid, name in names.items() if name == entry]
    if len(mids) == 1:
        return mids[0]
    if mids:
        raise ParamsError(f"{where}: '{entry}' is the name of {' and '.join(mids)}: write one of these")
    folded = {name.casefold(): (name, mid) for mid, name in names.items()}
    near = [folded[text] for text in difflib.get_close_matches(entry.casefold(), folded, n=4)]
    hint = (
        "near it: " + ", ".join(f"{name} ({mid})" for name, mid in near)
        if near
        else f"see the list {_url(params, _CLASSES)}"
    )
    raise ParamsError(f"{where}: '{entry}' is no class of Open Images; {hint}")


def _class_names(params: OpenImagesParams, settings: DownloadParams, cache: Path) -> dict[str, str]:
    """Display name of each MID."""
    path = _classes_path(params, cache)
    names = _kept(path)
    if names is None:
        url, local = _url(params, _CLASSES), _local(params, _CLASSES, cache)
        _download(url, local, settings, lambda start: b"," in start)
        content = local.read_bytes()
        local.unlink()
        try:
            rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
            # Older lists have no header.
            names = {mid: name for mid, name in rows if mid != "LabelName"}
        except (UnicodeDecodeError, ValueError, csv.Error):
            names = {}
        if not names:
            raise TouchlineError(f"{url} is no list of MIDs and names: see `ingest.openimages.url`")
        _keep(path, names)
    return names


def _download(
    url: str,
    local: Path,
    settings: DownloadParams,
    is_right: Callable[[bytes], bool],
    what: str = "",
    then: Sequence[str] = (),
) -> None:
    """Download a file unless it is there; a refusal names the key to look at."""
    if not local.exists():
        with _explained():
            http.to_file(url, local, settings, is_right=is_right, what=what, then=then)


@contextmanager
def _explained(param: str = "url") -> Iterator[None]:
    """A refusal, or something else in place of the file, with the key to look at."""
    try:
        yield
    except (HttpError, WrongContent) as error:
        raise TouchlineError(f"{error}: see `ingest.openimages.{param}` in params.yaml") from None


def _has_header(start: bytes) -> bool:
    return b"ImageID" in start.split(b"\n", 1)[0]


def _url(params: OpenImagesParams, name: str) -> str:
    return f"{params.url.rstrip('/')}/{name}"


def _photo_url(params: OpenImagesParams, subset: str, image: str) -> str:
    return f"{params.photos_url.rstrip('/')}/{subset}/{image}.jpg"


def _local(params: OpenImagesParams, name: str, cache: Path) -> Path:
    """Where a whole file is kept: under its server's name, so that no other server's file is taken for it."""
    parts = urlsplit(_url(params, name))
    return cache / "files" / parts.netloc.replace(":", "_") / parts.path.lstrip("/")


def _classes_path(params: OpenImagesParams, cache: Path) -> Path:
    return cache / f"classes-{_digest([_FORMAT, _url(params, _CLASSES)])[:16]}.json"


def _subset_path(params: OpenImagesParams, subset: str, cache: Path) -> Path:
    return cache / f"{subset}-{_digest([_FORMAT, _url(params, _LABELS[subset])])[:16]}.json"


def _found(params: OpenImagesParams, wanted: _Wanted, subset: str, cache: Path) -> _Found | None:
    """What is wanted of a subset, from what is kept of it; None where files must be read for it."""
    facts, drawings = _kept_facts(_subset_path(params, subset, cache)), subset in params.leave_out_drawings
    if facts is None or not wanted.labels.keys() <= {*facts.mids} or (drawings and facts.drawn is None):
        return None
    return _fitting_of(facts, wanted, drawings=drawings)


def _kept_facts(path: Path) -> _Facts | None:
    kept = _kept(path)
    return kept and _Facts(**kept)


def _keep(path: Path, value: Any) -> None:
    write_json(path, {"sha256": _digest(value), "value": value})


def _kept(path: Path) -> Any:
    """What `_keep` wrote; None where there is nothing, or something that is not what was written."""
    try:
        content = json.loads(path.read_bytes())
        if _digest(content["value"]) == content["sha256"]:
            return content["value"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    say(f"{path} is damaged: it will be fetched again")
    path.unlink()
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _offers(paths: Paths, params: Params) -> Iterator[Candidate]:
    remove_partials(paths.openimages)
    return candidates(params.ingest.openimages, params.ingest.download, params.classes, paths.openimages)


def _plan(paths: Paths, params: Params) -> list[Planned]:
    files = plan(params.ingest.openimages, params.ingest.download, params.classes, paths.openimages)
    return [*files, *_planned_photos(paths, params)]


def _planned_photos(paths: Paths, params: Params) -> Iterator[Planned]:
    """The photos that are there, and those to fetch for as many as are wished for."""
    licence = "of each photo, CC BY 2.0 as a rule; in data/ATTRIBUTION.csv"
    names: Set[str] = set()
    if paths.journal.exists():
        with fetch.Journal(paths.journal) as journal:
            names = journal.names()
    found = {label: [p for p in paths.photos.glob(f"{escape(label)}/*") if p.name in names] for label in params.classes}
    if there := [path for of_class in found.values() for path in of_class]:
        megabytes = sum(path.stat().st_size for path in there) / 1e6
        yield Planned(f"{len(there):,} photos fetched before", str(paths.photos), megabytes, "there already", licence)
    limit = params.ingest.per_class
    lacking = None if limit is None else sum(max(0, limit - len(of_class)) for of_class in found.values())
    if lacking != 0:
        what, where = f"photos, {at_most(params)}, about 0.3 MB each", params.ingest.openimages.photos_url
        yield Planned(what, where, None if lacking is None else 0.3 * lacking, "to fetch", licence)


def _forget(paths: Paths, _: Params, gone: Forgotten) -> int:
    """Delete photos from the filtered labels, and delete whole label files that name one of them."""
    count = 0
    for path in paths.openimages.glob("*-*.json"):
        subset = path.stem.rpartition("-")[0]
        if subset not in _LABELS or not (facts := _kept_facts(path)):
            continue
        going = {
            image
            for image in facts.labels.keys() | facts.info.keys()
            if gone.has("openimages", f"{subset}/{image}", *facts.info.get(image, [""] * 4)[2:4])
        }
        if not going:
            continue
        for file in paths.openimages.rglob("*.csv"):
            file.unlink()
        labels, info = (
            {image: value for image, value in known.items() if image not in going}
            for known in (facts.labels, facts.info)
        )
        drawn = facts.drawn and [image for image in facts.drawn if image not in going]
        _keep(path, asdict(replace(facts, labels=labels, info=info, drawn=drawn)))
        count += len(going)
    return count


def _facts(paths: Paths, params: Params) -> dict[str, Any]:
    return {"labels": facts(params.ingest.openimages, params.classes, paths.openimages)}


SOURCE = Source(
    "openimages",
    _offers,
    _plan,
    network=True,
    by_url=True,
    licensed=True,
    facts=_facts,
    collected="Photos of Open Images V7, published on Flickr under CC BY 2.0, with a limit for each author.",
    labelled="Image-level labels that people verified; photos of two classes or of excluded ones are left out.",
    forget=_forget,
)
