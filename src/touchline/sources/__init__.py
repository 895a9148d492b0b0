"""Where photos come from: one module a source, each with one function `candidates`.

A source yields `Candidate`s in a stable order and reads a photo's bytes only when asked. Fetching, hashing, naming and
recording are the work of `touchline.ingestion`.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One photo that a source offers.

    Attributes:
        label: the class it is filed under.
        source: name of the source.
        origin: where it came from, unique within the source (a relative path, a URL).
        read: returns the file's bytes.
        licence: licence name or URL; empty where the source states none.
        author: who made it; empty where unknown.
        group: photos of one group are kept on one side of the split; empty where unknown.
        subset: `train` or `test` where the source comes with a split that is to be kept, else empty.
    """

    label: str
    source: str
    origin: str
    read: Callable[[], bytes]
    licence: str = ""
    author: str = ""
    group: str = ""
    subset: str = ""
