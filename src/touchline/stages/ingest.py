"""The `ingest` stage: photos from the sources into `data/photos`, and a table that says where each came from.

A photo's file is named by the digest of its bytes. So fetching again what is already there costs nothing, a killed
run resumes, and nothing can be overwritten by something else.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from glob import escape
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, remove_partials, write_bytes, write_json, write_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say, track
from touchline.sources import Candidate, Planned, feedback, fetch, folder, imagenet, openimages, sample
from touchline.sources.received import Received

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "path", "class", "source", "sha256", "bytes", "width", "height", "licence", "author", "origin", "group", "subset",
    "title", "author_page", "landing_page", "retrieved",
)  # fmt: skip
_ATTRIBUTION = {
    "path": "photo", "class": "class", "title": "title", "author": "author", "author_page": "author page",
    "landing_page": "landing page", "licence": "licence", "source": "source", "origin": "origin",
    "retrieved": "retrieved",
}  # fmt: skip
# Sources that offer more than a person put there: with them, fewer photos than asked for are worth a word.
_REMOTE = ("openimages", "imagenet")
# How far the share of a source may lie apart from class to class before a person is told.
_TELLING = 0.2
# The class and subset of photos that fill one place each.
_Place = tuple[str, str]


def run(paths: Paths, params: Params) -> None:
    """Fill `data/photos`; write `data/photos.csv`, `data/ATTRIBUTION.csv` and `reports/ingest.json`.

    Raises:
        TouchlineError: a source cannot be read or offers nothing, or a class stays below `ingest.min_per_class`.
    """
    import pandas as pd

    remove_partials(paths.photos)
    remove_partials(paths.openimages)
    remove_partials(paths.spare, below=False)
    remove_partials(paths.feedback)
    remove_partials(paths.project / params.ingest.imagenet.folder, below=False)
    rejected = _rejected_before(paths.ledger)
    taken: Counter[_Place] = Counter()
    rows: list[Sequence[object]] = []
    report: dict[str, Any] = {}
    for name in params.ingest.sources:
        fill = _from_network if name == "openimages" else _from_disk
        found, report[name] = fill(paths, params, name, taken, {known for known in rejected if known[1] == name})
        rows += found
    if not rows:
        raise TouchlineError(
            f"the sources {', '.join(params.ingest.sources)} offer no photo: see `ingest` in params.yaml"
        )
    table = _corrected(pd.DataFrame(rows, columns=list(COLUMNS)))
    _remove_unwanted(paths, set(table["path"]))
    write_table(paths.photos_table, table)
    write_table(paths.photos_table.with_name("ATTRIBUTION.csv"), _attribution(table))
    if "openimages" in report:
        report["openimages"]["labels"] = openimages.facts(params.ingest.openimages, params.classes, paths.openimages)
    counts = {label: int((table["class"] == label).sum()) for label in params.classes}
    notes = _notes(table, params, counts)
    write_json(
        paths.reports / "ingest.json",
        {"per_class": params.ingest.per_class, "photos": counts, "notes": notes, "sources": report},
    )
    say("photos: " + ", ".join(f"{label} {count:,}" for label, count in counts.items()))
    for note in notes:
        say(f"note: {note}")
    short = {label: count for label, count in counts.items() if count < params.ingest.min_per_class}
    if short and _remote(params):
        raise TouchlineError(
            "too few photos: "
            + ", ".join(f"{label} {count:,}" for label, count in short.items())
            + f"; ingest.min_per_class is {params.ingest.min_per_class}: add sources, classes of theirs or subsets"
        )


def plan(paths: Paths, params: Params) -> list[Planned]:
    """What `run` would fetch, without fetching it: see `touchline ingest --dry-run`."""
    planned: list[Planned] = []
    each = f"{params.ingest.per_class:,} a class at most" if params.ingest.per_class else "all"
    for name in params.ingest.sources:
        match name:
            case "sample":
                drawn = params.ingest.sample.per_class * len(params.classes)
                planned.append(Planned(f"{drawn:,} drawn scenes", "this program", 0.0, "to draw", "CC0-1.0"))
            case "folder":
                where = str(paths.project / params.ingest.folder)
                # Looked through here too: DVC reads all of the folder, before `run` can tell what is wrong with it.
                found = sum(1 for _ in _offers(paths, params, name))
                planned.append(Planned(f"{found:,} photos of your own, {each}", where, 0.0, "there already", "yours"))
            case "feedback":
                given = sum(1 for _ in _offers(paths, params, name))
                planned.append(
                    Planned(f"{given:,} photos given at the page", str(paths.feedback), 0.0, "there already",
                            feedback.LICENCE)
                )  # fmt: skip
            case "openimages":
                settings = params.ingest.openimages
                planned += openimages.plan(settings, params.ingest.download, params.classes, paths.openimages)
                planned += _planned_photos(paths, params, each)
            case _:
                planned += imagenet.plan(params.ingest.imagenet, params.ingest.download, params.classes, paths.project)
    return planned


def _planned_photos(paths: Paths, params: Params, each: str) -> Iterator[Planned]:
    """The photos of Open Images that are there, and those to fetch for as many as are wished for."""
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
        what = f"photos, {each}, about 0.3 MB each"
        where = params.ingest.openimages.photos_url
        yield Planned(what, where, None if lacking is None else 0.3 * lacking, "to fetch", licence)


def _offers(paths: Paths, params: Params, name: str) -> Iterator[Candidate]:
    settings, classes = params.ingest, params.classes
    received = partial(Received, max_megabytes=settings.download.max_megabytes, follow_links=settings.follow_links)
    sources: dict[str, Callable[[], Iterator[Candidate]]] = {
        "sample": lambda: sample.candidates(settings.sample, classes),
        "folder": lambda: folder.candidates(received(paths.project / settings.folder), classes),
        "feedback": lambda: feedback.candidates(received(paths.feedback), classes),
        "openimages": lambda: openimages.candidates(settings.openimages, settings.download, classes, paths.openimages),
        "imagenet": lambda: imagenet.candidates(
            settings.imagenet, settings.download, classes, paths.project, follow_links=settings.follow_links
        ),
    }
    return sources[name]()


def _from_disk(
    paths: Paths,
    params: Params,
    name: str,
    taken: Counter[_Place],
    rejected: Set[tuple[str, str, str]],
) -> tuple[list[Sequence[object]], dict[str, Any]]:
    """Rows of the offers there is room for, and what to report of the source."""
    chosen = _chosen(paths, params, name, taken, rejected)
    # What Hugging Face offers is fetched while it is offered; the others' offers cost nothing, and can be counted.
    counted = None if params.ingest.imagenet.origin == "huggingface" else list(chosen)
    offered = chosen if counted is None else counted
    kept = parallel.in_order(lambda numbered: (numbered[0], _keep(paths, numbered[1])), offered)
    rows = [row for _, row in sorted(track(kept, None if counted is None else len(counted), "taking photos"))]
    return rows, {"photos": len(rows)}


def _chosen(
    paths: Paths, params: Params, name: str, taken: Counter[_Place], rejected: Set[tuple[str, str, str]]
) -> Iterator[tuple[int, Candidate]]:
    """At most `ingest.per_class` numbered offers a class (and subset, where the source brings a split of its own).

    What validation rejected before comes last: it takes no place from a photo that may be better. What a person gave
    at the page is taken even where there is no room.
    """
    limit = inf if params.ingest.per_class is None or name == "feedback" else params.ingest.per_class
    held: list[tuple[int, Candidate]] = []

    def full() -> bool:
        # Which subsets a folder brings is known only from what it offers, and that costs nothing.
        return name != "folder" and all(taken[label, ""] >= limit for label in params.classes)

    offers = enumerate(_offers(paths, params, name))
    # An offer may cost gigabytes to draw: none is, once there is no room for it.
    while not full() and (numbered := next(offers, None)):
        number, candidate = numbered
        if _identity(candidate) in rejected:
            held.append((number, candidate))
        elif taken[place := (candidate.label, candidate.subset)] < limit:
            taken[place] += 1
            yield number, candidate
    for number, candidate in held:
        if taken[place := (candidate.label, candidate.subset)] < limit:
            taken[place] += 1
            yield number, candidate


def _from_network(
    paths: Paths,
    params: Params,
    name: str,
    taken: Counter[_Place],
    rejected: Set[tuple[str, str, str]],
) -> tuple[list[Sequence[object]], dict[str, Any]]:
    """The same for a source whose photos are fetched by URL."""
    limit = params.ingest.per_class
    room = {label: inf if limit is None else limit - taken[label, ""] for label in params.classes}
    # `make refresh` asks for what was not there too.
    absent_days = 0.0 if os.environ.get("TOUCHLINE_REFRESH") else params.ingest.download.absent_days
    with fetch.Journal(paths.journal, absent_days) as journal:
        outcome = fetch.fill(
            (candidate for candidate in _offers(paths, params, name) if _identity(candidate) not in rejected),
            room,
            lambda candidate: paths.photos / candidate.label,
            _whole(paths.photos),
            paths.spare,
            journal,
            params.ingest.download,
        )
    for kept in outcome.kept:
        taken[kept.candidate.label, ""] += 1
    return [_row(paths, kept.candidate, kept.path, kept.entry) for kept in outcome.kept], {
        "photos": len(outcome.kept),
        "fetched": outcome.fetched,
        "megabytes": round(outcome.megabytes, 1),
        "seconds": outcome.seconds,
        "photos_per_second": round(outcome.fetched / outcome.seconds, 1) if outcome.seconds else None,
        "left_out": dict(outcome.left_out.most_common()),
        "tried_again": dict(outcome.tried_again.most_common()),
    }


def _whole(folder: Path) -> set[Path]:
    """The photos whose content is what their names say; anything may have happened to a file since it was fetched."""

    def check(path: Path) -> tuple[Path, bool]:
        return path, path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()[:16] == path.stem

    return {path for path, right in parallel.in_order(check, sorted(folder.glob("*/*"))) if right}


def _keep(paths: Paths, candidate: Candidate) -> Sequence[object]:
    """Store a candidate's bytes; its row of the table."""
    assert candidate.read
    try:
        content = candidate.read()
    except OSError as error:
        raise TouchlineError(f"{candidate.source}: {candidate.origin} cannot be read ({error.strerror})") from None
    # A name tells the content's true type; what is no photo keeps a neutral one and is validation's to reject.
    entry = fetch.described(candidate, content)
    path = paths.photos / candidate.label / entry.name
    # Not the size alone: a damaged disk, or a person's editor, leaves other bytes under the same name.
    if not (path.is_file() and path.read_bytes() == content):
        write_bytes(path, content)
    return _row(paths, candidate, path, entry)


def _row(paths: Paths, candidate: Candidate, path: Path, entry: fetch.Entry) -> Sequence[object]:
    return (
        paths.relative(path), candidate.label, candidate.source, entry.sha256, entry.bytes, entry.width, entry.height,
        candidate.licence, candidate.author, candidate.origin, candidate.group, candidate.subset, candidate.title,
        candidate.author_page, candidate.landing_page, entry.retrieved if candidate.url else "",
    )  # fmt: skip


def _corrected(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with a photo that another source has too under the class that a person gave it at the page.

    The other source's row is the one that stays: it knows licence, author, group and subset.
    """
    given = table["source"] == "feedback"
    label_of = dict(zip(table.loc[given, "sha256"], table.loc[given, "class"], strict=True))
    both = ~given & table["sha256"].isin(label_of)
    labels = table["class"].mask(both, table["sha256"].map(label_of))
    return table.assign(**{"class": labels})[~given | ~table["sha256"].isin(table.loc[both, "sha256"])]


def _identity(candidate: Candidate) -> tuple[str, str, str]:
    return candidate.label, candidate.source, candidate.origin


def _rejected_before(ledger: Path) -> set[tuple[str, str, str]]:
    """(class, source, origin) of each photo in the ledger of what validation rejected."""
    if not ledger.exists():
        return set()
    table = read_table(ledger, dtype=str)
    return set(zip(table["class"], table["source"], table["origin"], strict=True))


def _rejected_names(ledger: Path) -> set[str]:
    """Names, without their endings, of the files of photos that validation rejected."""
    return {digest[:16] for digest in read_table(ledger, dtype=str)["sha256"]} if ledger.exists() else set()


def _remove_unwanted(paths: Paths, wanted: Set[str]) -> None:
    """What is there and no longer offered would go on being hashed, tracked and pushed.

    Fetched photos are put aside, for the next time they are offered; those that validation rejected are not, since
    somebody may have asked for that. Only files named as `_keep` names them are ours to delete; what a person put there
    is named, and stays.
    """
    foreign = []
    rejected = _rejected_names(paths.ledger)
    fetched: Set[str] = set()
    if paths.journal.exists():
        with fetch.Journal(paths.journal) as journal:
            fetched = journal.names()
    for path in sorted(paths.photos.glob("*/*")):
        if not (path.is_file() and fetch.NAME.fullmatch(path.name)):
            foreign.append(paths.relative(path))
        elif paths.relative(path) not in wanted:
            if path.name in fetched:
                paths.spare.mkdir(parents=True, exist_ok=True)
                shutil.move(path, paths.spare / path.name)
            else:
                path.unlink()
    for path in paths.spare.glob("*"):
        if path.stem in rejected:
            path.unlink()
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        say(
            f"{', '.join(foreign[:3])}{more}: not from a source, so not used; photos of your own go into the folder "
            "that `ingest.folder` in params.yaml names"
        )
    for path in paths.photos.glob("*"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _attribution(table: "pd.DataFrame") -> "pd.DataFrame":
    """Who made each photo and under which licence: what has to be shown wherever a photo is shown."""
    known = table[(table["licence"] != "") | (table["author"] != "")]
    return known[list(_ATTRIBUTION)].rename(columns=_ATTRIBUTION)


def _remote(params: Params) -> bool:
    return any(name in _REMOTE for name in params.ingest.sources)


def _notes(table: "pd.DataFrame", params: Params, counts: dict[str, int]) -> list[str]:
    """What a person should know of the set before anything is trained on it."""
    notes = []
    limit = params.ingest.per_class
    if limit and _remote(params) and (short := {label: n for label, n in counts.items() if n < limit}):
        found = ", ".join(f"{label} {count:,}" for label, count in short.items())
        notes.append(f"fewer photos than ingest.per_class ({limit:,}): {found}")
    shares = table.groupby("class")["source"].value_counts(normalize=True).unstack(fill_value=0.0)
    spread = shares.max() - shares.min()
    if _remote(params) and spread.max() > _TELLING:
        share = shares[spread.idxmax()]
        notes.append(
            f"the source tells something of the class: {spread.idxmax()} gives {share.max():.0%} of {share.idxmax()} "
            f"and {share.min():.0%} of {share.idxmin()}"
        )
    return notes
