"""`data/forgotten.csv`: photos and authors that were removed permanently; `ingest` takes them from no source again.

The file is committed to git, so that it applies on every machine. It has no names: its lines are SHA-256 digests of a
photo's file, of a source with one of its origins, or of an author's name or page. If you know a name, you can check
whether it is listed, but you cannot read names from the file.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, write_table

COLUMNS = ("kind", "sha256")
KINDS = ("photo", "origin", "author")


@dataclass(frozen=True)
class Forgotten:
    """What must not come back.

    Attributes:
        photos: sha256 of each photo's file.
        origins, authors: digests as `origin_digest` and `author_digest` make them.
    """

    photos: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    authors: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.photos or self.origins or self.authors)

    def has(self, source: str, origin: str, *authors: str) -> bool:
        """Whether a photo of this origin in a source, or by one of these authors (names or pages), is forgotten."""
        return origin_digest(source, origin) in self.origins or any(
            author_digest(author) in self.authors for author in authors if author
        )

    def __or__(self, other: "Forgotten") -> "Forgotten":
        return Forgotten(self.photos | other.photos, self.origins | other.origins, self.authors | other.authors)


def origin_digest(source: str, origin: str) -> str:
    return _digest(f"{source} {origin}")


def author_digest(author: str) -> str:
    """Of a name or a page, regardless of capitals and spaces."""
    return _digest(same_author(author))


def same_author(author: str) -> str:
    """An author's name in one spelling, regardless of capitals and spaces."""
    return " ".join(author.split()).casefold()


def read(path: Path) -> Forgotten:
    """The content of `path`; empty if the file does not exist.

    Raises:
        TouchlineError: the file is not a table of digests.
    """
    if not path.exists():
        return Forgotten()
    table = read_table(path, dtype=str)
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for number, (kind, digest) in enumerate(zip(table["kind"], table["sha256"], strict=True), 2):
        if kind not in found or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise TouchlineError(
                f"data/{path.name}, line {number}, is not `kind,sha256` with one of {', '.join(KINDS)}: "
                "bring the line back from git"
            )
        found[kind].add(digest)
    return Forgotten(*(frozenset(found[kind]) for kind in KINDS))


def add(path: Path, more: Forgotten) -> None:
    """Add what is to be forgotten to `path`."""
    import pandas as pd

    known = read(path) | more
    kinds = zip(KINDS, (known.photos, known.origins, known.authors), strict=True)
    rows = [(kind, digest) for kind, digests in kinds for digest in sorted(digests)]
    write_table(path, pd.DataFrame(rows, columns=list(COLUMNS)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
