"""The `ingest` stage: photos from the sources into `data/photos`, and a table that says where each came from.

A photo's file is named by the digest of its bytes. So fetching again what is already there costs nothing, a killed
run resumes, and nothing can be overwritten by something else.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline import sources
from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, remove_partials, write_bytes, write_json, write_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say, track
from touchline.data import forgotten, rights
from touchline.data.forgotten import Forgotten
from touchline.sources import Candidate, Planned, Source, fetch
from touchline.sources.permission import Permissions

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
# How far the share of a source may lie apart from class to class before a person is told.
_TELLING = 0.2
# Counts that add up over the passes over a source.
_SPENT = {"fetched", "megabytes", "seconds"}
# The class and subset of photos that fill one place each.
_Place = tuple[str, str]


def run(paths: Paths, params: Params) -> str:
    """Fill `data/photos`; write the tables photos.csv and ATTRIBUTION.csv, and the reports ingest.json and rights.json.

    Returns:
        How many photos there are of each class.

    Raises:
        TouchlineError: a source cannot be read or offers nothing, a class stays below `ingest.min_per_class`, or a
            photo may not be pushed to where DVC would push it.
    """
    import pandas as pd

    remove_partials(paths.photos)
    remove_partials(paths.spare, below=False)
    rejected = _rejected_before(paths.ledger)
    taken: Counter[_Place] = Counter()
    rows: list[Sequence[object]] = []
    report: dict[str, Any] = {}
    # A copy of the project may be of a commit from before.
    gone = forgotten.read(paths.forgotten) | forgotten.read(paths.project / "data/forgotten.csv")
    chosen, permissions = [_without(source, gone) for source in sources.chosen(params)], Permissions(params.rights)
    for source in chosen:
        before = {known for known in rejected if known[1] == source.name}
        found, counts, taken = _permitted(paths, params, source, taken, before, permissions)
        rows += found
        if gone and source.network:  # a list or archive that was fetched again may contain it again
            source.forget(paths, params, gone)
        report[source.name] = counts | source.facts(paths, params)
    # The same bytes may come from another origin, which is known only after reading them.
    offered = pd.DataFrame(rows, columns=list(COLUMNS)).loc[lambda table: ~table["sha256"].isin(gone.photos)]
    permissions.tell()
    if offered.empty:
        allowed = " that `rights` allows" if permissions.refused else ""
        raise TouchlineError(
            f"no photos{allowed} from {', '.join(params.ingest.sources)}: see `ingest.sources` in params.yaml"
        )
    table = _corrected(offered, [source.name for source in chosen if source.corrects])
    _check_remote(table, params)
    _remove_unwanted(paths, set(table["path"]), {digest[:16] for digest in gone.photos})
    write_table(paths.photos_table, table)
    write_table(paths.photos_table.with_name("ATTRIBUTION.csv"), _attribution(table))
    photos = {label: int((table["class"] == label).sum()) for label in params.classes}
    network = any(source.network for source in chosen)
    notes = _notes(table, params, photos) if network else []
    write_json(
        paths.reports / "ingest.json",
        {"per_class": params.ingest.per_class, "photos": photos, "notes": notes, "sources": report},
    )
    write_json(paths.reports / "rights.json", permissions.report())
    for note in notes:
        say(f"note: {note}")
    short = {label: count for label, count in photos.items() if count < params.ingest.min_per_class}
    if short and network:
        raise TouchlineError(
            "too few photos: "
            + ", ".join(f"{label} {count:,}" for label, count in short.items())
            + f"; ingest.min_per_class is {params.ingest.min_per_class}: add sources, classes of theirs or subsets"
        )
    return f"{len(table):,} photos: " + ", ".join(f"{label} {count:,}" for label, count in photos.items())


def plan(paths: Paths, params: Params) -> list[Planned]:
    """What `run` would fetch, without fetching it: see `touchline ingest --dry-run`."""
    return [planned for source in sources.chosen(params) for planned in source.plan(paths, params)]


def _without(source: Source, gone: Forgotten) -> Source:
    """The source without the offers that `data/forgotten.csv` lists."""

    def offers(paths: Paths, params: Params) -> Iterator[Candidate]:
        for each in source.offers(paths, params):
            if not gone.has(each.source, each.origin, each.author, each.author_page):
                yield each

    return replace(source, offers=offers) if gone else source


def _permitted(
    paths: Paths,
    params: Params,
    source: Source,
    taken: Counter[_Place],
    rejected: Set[tuple[str, str, str]],
    permissions: Permissions,
) -> tuple[list[Sequence[object]], dict[str, Any], Counter[_Place]]:
    """Rows of the photos that may be used for training, figures about the source, and the places taken after it.

    Whether a file forbids it is known once it is here. Another pass then gives its place to another photo, unless that
    would read all of a remote source again.
    """
    fill = _by_url if source.by_url else _by_reading
    earlier: dict[str, Any] = {}
    while True:
        places = taken.copy()
        rows, counts = fill(paths, params, permissions.filtered(source), places, rejected)
        # These figures are of all passes, the others of the last one.
        counts |= {key: round(counts[key] + earlier.get(key, 0), 2) for key in _SPENT & counts.keys()}
        of_rows = [(str(row[1]), str(row[2]), str(row[9])) for row in rows]
        refused = permissions.check_files(
            [(each, paths.workspace / str(row[0])) for each, row in zip(of_rows, rows, strict=True)]
        )
        if not refused or (source.network and not source.by_url):
            break
        earlier = counts
    if left_out := permissions.left_out(source.name):
        counts["left_out"] = counts.get("left_out", {}) | left_out
    kept = [row for each, row in zip(of_rows, rows, strict=True) if each not in refused]
    return kept, counts | {"photos": len(kept)}, places


def _check_remote(table: "pd.DataFrame", params: Params) -> None:
    """Raise TouchlineError if `dvc push` would send photos to a remote although `rights.push` does not allow it."""
    if params.ingest.remote:
        return
    closed = table.drop(rights.allowed(table, "push", params).index)
    if not closed.empty:
        counts = ", ".join(f"{count:,} under {name}" for name, count in rights.counted(closed).items())
        raise TouchlineError(
            f"photos that `rights.push` does not let go to the default remote: {counts}: name a DVC remote of your own "
            "in `ingest.remote` (`dvc remote add private /a/folder`), or their licences in `rights.push`"
        )


def _by_reading(
    paths: Paths,
    params: Params,
    source: Source,
    taken: Counter[_Place],
    rejected: Set[tuple[str, str, str]],
) -> tuple[list[Sequence[object]], dict[str, Any]]:
    """Rows of the offers there is room for, and what to report of the source."""
    chosen = _chosen(paths, params, source, taken, rejected)
    # What a network offers may be fetched while it is offered; the others' offers cost nothing, and can be counted.
    counted = None if source.network else list(chosen)
    offered = chosen if counted is None else counted
    # A photo's thread waits for the disk until it is safe, and for the process that draws a scene.
    kept = parallel.in_order(lambda numbered: (numbered[0], _keep(paths, numbered[1])), offered, threads=2)
    rows = [row for _, row in sorted(track(kept, None if counted is None else len(counted), "taking photos"))]
    return rows, {"photos": len(rows)}


def _chosen(
    paths: Paths, params: Params, source: Source, taken: Counter[_Place], rejected: Set[tuple[str, str, str]]
) -> Iterator[tuple[int, Candidate]]:
    """At most `ingest.per_class` numbered offers a class (and subset, where the source brings a split of its own).

    What validation rejected before comes last: it takes no place from a photo that may be better. What corrects
    others is taken even where there is no room.
    """
    limit = inf if params.ingest.per_class is None or source.corrects else params.ingest.per_class
    held: list[tuple[int, Candidate]] = []

    def full() -> bool:
        # Which subsets a source brings is known only from what it offers, and without a network that costs nothing.
        return source.network and all(taken[label, ""] >= limit for label in params.classes)

    offers = enumerate(source.offers(paths, params))
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


def _by_url(
    paths: Paths,
    params: Params,
    source: Source,
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
            (candidate for candidate in source.offers(paths, params) if _identity(candidate) not in rejected),
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
    # A name tells the content's true type; what is not an image keeps a neutral one, and validation rejects it.
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


def _corrected(table: "pd.DataFrame", correcting: Sequence[str]) -> "pd.DataFrame":
    """The table with a photo that another source has too under the class that one of the `correcting` gives it.

    The other source's row is the one that stays: it knows licence, author, group and subset.
    """
    given = table["source"].isin(correcting)
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


def _remove_unwanted(paths: Paths, wanted: Set[str], forgotten: Set[str]) -> None:
    """What is there and no longer offered would go on being hashed, tracked and pushed.

    Fetched photos are put aside, for the next time they are offered; those that validation rejected, or whose names are
    in `forgotten`, are deleted, since somebody may have asked for that. Only files named as `_keep` names them are ours
    to delete; what a person put there is named, and stays.
    """
    foreign = []
    rejected = _rejected_names(paths.ledger) | forgotten
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


def _notes(table: "pd.DataFrame", params: Params, counts: dict[str, int]) -> list[str]:
    """What a person should know of the set before anything is trained on it."""
    notes = []
    limit = params.ingest.per_class
    if limit and (short := {label: n for label, n in counts.items() if n < limit}):
        found = ", ".join(f"{label} {count:,}" for label, count in short.items())
        notes.append(f"fewer photos than ingest.per_class ({limit:,}): {found}")
    shares = table.groupby("class")["source"].value_counts(normalize=True).unstack(fill_value=0.0)
    spread = shares.max() - shares.min()
    if spread.max() > _TELLING:
        share = shares[spread.idxmax()]
        notes.append(
            f"the source tells something of the class: {spread.idxmax()} gives {share.max():.0%} of {share.idxmax()} "
            f"and {share.min():.0%} of {share.idxmin()}"
        )
    return notes
