"""Where photos come from: one module a source, each with one object `SOURCE`.

A source yields `Candidate`s in a stable order and reads a photo's bytes only when asked, or names the URL where they
are. Fetching, hashing, naming and recording are the work of `touchline.stages.ingest`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from touchline.core import extensions
from touchline.core.licences import Licence

if TYPE_CHECKING:
    from touchline.core.params import Params, Section
    from touchline.core.paths import Paths
    from touchline.data.forgotten import Forgotten


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
        subset: `train`, `validation` or `test` where the source comes with a split that is to be kept, else empty.
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


@dataclass(frozen=True)
class Source:
    """Where photos come from, and what is to be known of it.

    Attributes:
        name: in `ingest.sources` of params.yaml, and in the column `source` of photos.csv.
        offers: the photos it has, in a stable order. Of a network they are asked for as long as there is room.
        plan: what `offers` and its photos would fetch, without fetching it.
        params: its section of params.yaml, `ingest.<name>`; None where it has none, or `IngestParams` states it.
        licence: of its photos, where their own words name none that SPDX knows. One with `share=False` keeps them from
            reports, MLflow, pages and the default remote, unless `rights` in params.yaml names it.
        network: it needs the network, and has more photos than somebody put there: too few are an error.
        by_url: its candidates have a `url`, not `read`.
        licensed: it states a licence for each photo, so one without is a fault.
        corrects: people gave its photos to correct others. They are taken beyond `ingest.per_class`, and their classes
            win.
        collected, labelled: how its photos and their labels came about, in a sentence each.
        facts: what reports/ingest.json says of it besides how many photos were taken.
        forget: deletes what the source itself keeps of forgotten photos in the project, files and rows, and returns how
            many; it may be asked again at any time.
    """

    name: str
    offers: "Callable[[Paths, Params], Iterator[Candidate]]"
    plan: "Callable[[Paths, Params], list[Planned]]"
    params: "type[Section] | None" = None
    licence: Licence | None = None
    network: bool = False
    by_url: bool = False
    licensed: bool = False
    corrects: bool = False
    collected: str = ""
    labelled: str = ""
    facts: "Callable[[Paths, Params], dict[str, Any]]" = lambda *_: {}
    forget: "Callable[[Paths, Params, Forgotten], int]" = lambda *_: 0


def named(name: str) -> Source | None:
    """The source of this name, of this package or another; None if there is none."""
    return cast("Source | None", extensions.source(name))


def chosen(params: "Params") -> list[Source]:
    """The sources that params.yaml names, in its order."""
    return [source for name in params.ingest.sources if (source := named(name))]


def at_most(params: "Params") -> str:
    """How many photos are taken, in words."""
    return f"{params.ingest.per_class:,} a class at most" if params.ingest.per_class else "all"
