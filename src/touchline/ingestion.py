"""The `ingest` stage: photos from the sources into `data/photos`, and a table that says where each came from.

A photo's file is named by the digest of its bytes. So fetching again what is already there costs nothing, a killed
run resumes, and nothing can be overwritten by something else.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from touchline import photos
from touchline.errors import TouchlineError
from touchline.files import read_table, remove_partials, write_bytes, write_table
from touchline.params import Params
from touchline.paths import Paths
from touchline.progress import say, track
from touchline.sources import Candidate, folder, sample

COLUMNS = (
    "path", "class", "source", "sha256", "bytes", "width", "height", "licence", "author", "origin", "group", "subset"
)  # fmt: skip


def run(paths: Paths, params: Params) -> None:
    """Fill `data/photos` and write `data/photos.csv`.

    Raises:
        TouchlineError: a source cannot be read, or offers nothing.
    """
    import pandas as pd

    remove_partials(paths.photos)
    rejected = _rejected_before(paths.ledger)
    offered = list(_limited(_offers(paths, params), params.ingest.per_class, rejected))
    if not offered:
        raise TouchlineError(
            f"the sources {', '.join(params.ingest.sources)} offer no photo: see `ingest` in params.yaml"
        )
    done = track(photos.in_order(lambda candidate: _keep(paths, candidate), offered), len(offered), "fetching photos")
    table = pd.DataFrame(list(done), columns=list(COLUMNS))
    # What is there and no longer offered would go on being hashed, tracked and pushed.
    wanted = set(table["path"])
    for path in paths.photos.glob("*/*"):
        if paths.relative(path) not in wanted:
            path.unlink()
    for path in paths.photos.glob("*"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    write_table(paths.photos_table, table)
    counts = Counter(table["class"])
    say("photos: " + ", ".join(f"{label} {counts[label]:,}" for label in params.classes))


def _offers(paths: Paths, params: Params) -> Iterator[Candidate]:
    sources: dict[str, Callable[[], Iterator[Candidate]]] = {
        "sample": lambda: sample.candidates(params.ingest.sample, params.classes),
        "folder": lambda: folder.candidates(paths.project / params.ingest.folder, params.classes),
    }
    for name in params.ingest.sources:
        yield from sources[name]()


def _limited(
    offers: Iterator[Candidate], per_class: int | None, rejected: set[tuple[str, str, str]]
) -> Iterator[Candidate]:
    """At most `per_class` offers a class (and subset, where the source brings a split of its own).

    What validation rejected before fills no place.
    """
    if per_class is None:
        yield from offers
        return
    taken: Counter[tuple[str, str]] = Counter()
    for candidate in offers:
        known_bad = (candidate.label, candidate.source, candidate.origin) in rejected
        place = (candidate.label, candidate.subset)
        if taken[place] < per_class and not known_bad:
            taken[place] += 1
            yield candidate


def _keep(paths: Paths, candidate: Candidate) -> Sequence[object]:
    """Store a candidate's bytes; its row of the table."""
    try:
        content = candidate.read()
    except OSError as error:
        raise TouchlineError(f"{candidate.source}: {candidate.origin} cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(content).hexdigest()
    found = photos.header(content)
    # A name tells the content's true type; what is no photo keeps a neutral one and is validation's to reject.
    path = paths.photos / candidate.label / f"{digest[:16]}.{found.extension or 'bin'}"
    if not (path.exists() and path.stat().st_size == len(content)):
        write_bytes(path, content)
    return (
        paths.relative(path), candidate.label, candidate.source, digest, len(content), found.width, found.height,
        candidate.licence, candidate.author, candidate.origin, candidate.group, candidate.subset,
    )  # fmt: skip


def _rejected_before(ledger: Path) -> set[tuple[str, str, str]]:
    """(class, source, origin) of each photo in the ledger of what validation rejected."""
    if not ledger.exists():
        return set()
    table = read_table(ledger, dtype=str)
    return set(zip(table["class"], table["source"], table["origin"], strict=True))
