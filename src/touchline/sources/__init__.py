"""Where photos come from: one module a source, each with one function `candidates`.

A source yields `Candidate`s in a stable order and reads a photo's bytes only when asked, or names the URL where they
are. Fetching, hashing, naming and recording are the work of `touchline.stages.ingest`.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One photo that a source offers.

    Attributes:
        label: the class it is filed under.
        source: name of the source.
        origin: where it came from, unique within the source (a relative path, an id).
        read: returns the file's bytes; None where they are to be fetched from `url`.
        url: where the bytes are, if not here.
        licence: licence name or URL; empty where the source states none.
        author, author_page: who made it; empty where unknown.
        title, landing_page: what its author calls it, and the page to look at; empty where unknown.
        group: photos of one group are kept on one side of the split; empty where unknown.
        subset: `train` or `test` where the source comes with a split that is to be kept, else empty.
        rotation: degrees counter-clockwise (0, 90, 180, 270) that turn the photo upright.
    """

    label: str
    source: str
    origin: str
    read: Callable[[], bytes] | None = None
    url: str = ""
    licence: str = ""
    author: str = ""
    author_page: str = ""
    title: str = ""
    landing_page: str = ""
    group: str = ""
    subset: str = ""
    rotation: int = 0


@dataclass(frozen=True)
class Planned:
    """What a source would fetch, for `touchline ingest --dry-run`.

    Attributes:
        what: in plain words.
        where: URL or path.
        megabytes: None where the server does not tell.
        state: `to fetch` or `there already`.
        licence: of what is in it.
    """

    what: str
    where: str
    megabytes: float | None
    state: str
    licence: str
