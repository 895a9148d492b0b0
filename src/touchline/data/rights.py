"""Which photos may be used for training, shown, pushed and served, by their licences and `rights` in params.yaml."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from touchline.core import extensions, licences
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table
from touchline.core.licences import USES, Licence, Use
from touchline.core.params import Kind, Params
from touchline.core.paths import Paths

if TYPE_CHECKING:
    import pandas as pd


def licence(words: str, source: str) -> Licence:
    """The licence of a photo.

    Args:
        words: the column `licence` of data/photos.csv.
        source: its name. Its own licence applies if the words are not a licence that is recognised.
    """
    found = licences.named(words)
    if found.use is None and (origin := extensions.source(source)) and origin.licence:
        return origin.licence
    return found


def of_rows(rows: "pd.DataFrame") -> list[Licence]:
    """The licence of each row of a table with the columns `licence` and `source`."""
    pairs = list(zip(rows["licence"], rows["source"], strict=True))
    known = {pair: licence(*pair) for pair in set(pairs)}
    return [known[pair] for pair in pairs]


def allowed(rows: "pd.DataFrame", kind: Kind, params: Params) -> "pd.DataFrame":
    """The rows whose photos `rights.<kind>` in params.yaml allows."""
    return rows[np.array([params.rights.allows(kind, each) for each in of_rows(rows)], dtype=bool)]


def shown(rows: "pd.DataFrame", params: Params) -> "pd.DataFrame":
    """The rows whose photos may be shown: figures are passed on, which some licences do not allow."""
    return allowed(rows, "show", params)


def files(paths: Paths, params: Params) -> dict[str, Path]:
    """The photos on this disk that may be shown, by their sha256."""
    if not paths.photos_table.is_file():
        return {}
    table = shown(read_table(paths.photos_table), params)
    found = ((row.sha256, paths.workspace / row.path) for row in table[["sha256", "path"]].itertuples())
    return {digest: path for digest, path in found if path.is_file()}


def hidden(paths: Paths, params: Params) -> set[str]:
    """The sha256 of the project's photos that may not be seen by others, wherever a copy of one comes from."""
    if not paths.photos_table.is_file():
        return set()
    table = read_table(paths.photos_table)
    return set(table["sha256"]) - set(shown(table, params)["sha256"])


def in_words(found: Licence, words: str) -> str:
    """The name of a photo's licence in messages."""
    return found.name or words.strip() or "no licence"


def counted(rows: "pd.DataFrame") -> dict[str, int]:
    """How many rows have each licence, by its name in messages, the most frequent first."""
    return dict(Counter(map(in_words, of_rows(rows), rows["licence"])).most_common())


def unfit(rows: "pd.DataFrame", use: Use, params: Params) -> "pd.DataFrame":
    """The rows whose licences do not allow a use of a model that learned from them."""

    def closed(found: Licence) -> bool:
        if found.use is None:
            return params.rights.unknown == "refuse"
        return USES.index(found.use) < USES.index(use)

    return rows[np.array([closed(each) for each in of_rows(rows)], dtype=bool)]


def learned_from(paths: Paths, digests: Collection[str]) -> "pd.DataFrame":
    """The rows of data/split.csv of the photos that a model learned from.

    Args:
        digests: their sha256.
    """
    table = read_table(paths.split_table)
    return table[table["sha256"].isin(digests)]


def by_author(rows: "pd.DataFrame") -> "pd.DataFrame":
    """How many photos there are of each source, licence and author, the most first.

    Returns:
        Columns source, licence, spdx (its name), use (the widest allowed; empty if unknown), author, photos.
    """
    found = of_rows(rows)
    named = rows.assign(spdx=[each.name for each in found], use=[each.use or "" for each in found])
    counts = named.groupby(["source", "licence", "spdx", "use", "author"]).size().reset_index(name="photos")
    return counts.sort_values("photos", ascending=False, kind="stable")


def names(rows: "pd.DataFrame") -> dict[str, int]:
    """How many rows have each licence, by its SPDX name; `""`: a licence that is not known, or none."""
    return dict(Counter(each.name for each in of_rows(rows)).most_common())


def check_served(model: str, licences: Collection[str] | None, params: Params) -> None:
    """Refuse to serve a model that learned from photos under licences that `rights.serve` does not allow.

    Args:
        model: its name for people.
        licences: of the photos it learned from, as in `names`; None if they are unknown.

    Raises:
        TouchlineError: it names the licences.
    """
    stated = [Licence(name, "product" if name else None) for name in ([""] if licences is None else licences)]
    if closed := [each.name or "not recognised" for each in stated if not params.rights.allows("serve", each)]:
        raise TouchlineError(
            f"{model} learned from photos whose licence `rights.serve` in params.yaml does not allow "
            f"({', '.join(sorted(closed))}): name another model with --model"
        )


def check_use(model: str, rows: "pd.DataFrame", params: Params) -> None:
    """Refuse a model if the photos it learned from do not allow the use that `register.use` names.

    Args:
        rows: those of `learned_from`.

    Raises:
        TouchlineError: it counts the photos by licence.
    """
    use = params.register_.use
    if not (closed := unfit(rows, use, params)).empty:
        counts = ", ".join(f"{count:,} under {name}" for name, count in counted(closed).items())
        raise TouchlineError(
            f"register.use is {use}, which photos that {model} learned from do not allow: {counts}, the first "
            f"{closed['path'].iloc[0]}: leave them out with `rights.train`, or change register.use"
        )
