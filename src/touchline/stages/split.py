"""The `split` stage: which photos train, which choose between models, and which judge.

Photos that belong together (near-duplicates, one group) stay on one side. With `method: hash` a photo's subset is a
function of its group and the seed alone, so that new photos move no old one.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, write_json, write_table
from touchline.core.params import SUBSETS, Params, SplitParams
from touchline.core.paths import Paths
from touchline.data import similarity
from touchline.report import croissant

if TYPE_CHECKING:
    import pandas as pd

# What later stages need of a photo: they read no other table. `given` is the subset that its source assigned.
COLUMNS = (
    "path", "class", "subset", "group", "sha256", "given", "source", "width", "height", "licence", "author", "origin",
    "title", "landing_page",
)  # fmt: skip
# Cross-validation leaves one out and learns from the other.
FEWEST_TO_LEARN_FROM = 2
_MOST_FOLDS = 100
# How far a stratified share may lie from what was asked for, as a part of the smaller side.
_TOLERATED = 0.2


@dataclass(frozen=True)
class Move:
    """A photo that its near-duplicates keep out of the subset it would be in alone."""

    path: str
    alone: str
    subset: str


@dataclass(frozen=True)
class Conflict:
    """A photo left out because a near-duplicate of it lies in a subset nearer to training."""

    path: str
    subset: str
    other: str
    other_subset: str


def run(paths: Paths, params: Params) -> str:
    """Write `data/split.csv`, its description in `data/croissant.json`, and `reports/split.json`.

    The report lists the photos that were moved or left out.

    Returns:
        How many photos each subset has, and how many were moved or left out.

    Raises:
        TouchlineError: a class has no photo in a subset or too few to learn from, or the options do not fit the groups.
    """
    photos = read_table(paths.validated_table, dtype=str)
    if missing := {*COLUMNS, "perceptual_hash"} - {*photos.columns, "given"}:
        raise TouchlineError(
            f"{paths.validated_table} lacks the column {', '.join(sorted(missing))}: run `dvc repro -f -s validate`"
        )
    if not photos["perceptual_hash"].str.fullmatch("[0-9a-f]{16}").all():
        raise TouchlineError(
            f"{paths.validated_table} holds no perceptual hash in a row: run `dvc repro -f -s validate`"
        )
    split, moves, conflicts = assign(photos.assign(given=photos["subset"]), params.split)
    table = split.sort_values(["subset", "class", "path"])[list(COLUMNS)]
    write_table(paths.split_table, table)
    counts = {
        subset: {
            label: int(((split["subset"] == subset) & (split["class"] == label)).sum()) for label in params.classes
        }
        for subset in SUBSETS
    }
    shares = {subset: round(float((split["subset"] == subset).mean()), 4) for subset in SUBSETS}
    report = {
        "photos": len(split),
        "groups": int(split["group"].nunique()),
        "counts": counts,
        "shares": shares,
        "moved_by_merging": [vars(move) for move in moves],
        "left_out": [vars(conflict) for conflict in conflicts],
    }
    write_json(paths.reports / "split.json", report)
    empty = [f"{subset} has no {label}" for subset in SUBSETS for label, count in counts[subset].items() if not count]
    if empty:
        raise TouchlineError(
            f"split: {'; '.join(empty)}: add photos, change split.seed, or for few large groups set "
            "split.method: stratified, or split.by_group: false"
        )
    if few := [label for label, count in counts["train"].items() if count < FEWEST_TO_LEARN_FROM]:
        raise TouchlineError(
            f"split: train has fewer than {FEWEST_TO_LEARN_FROM} photos of {', '.join(few)}, and cross-validation "
            f"needs {FEWEST_TO_LEARN_FROM} of each class: add photos, change split.seed, or make split.test_share or "
            "split.validation_share smaller"
        )
    write_json(croissant.place(paths), croissant.metadata(paths, params, table))
    sizes = ", ".join(f"{subset} {sum(counts[subset].values()):,} ({shares[subset]:.1%})" for subset in SUBSETS)
    near = f"; near-duplicates: {len(moves):,} moved, {len(conflicts):,} left out, see reports/split.json"
    return sizes + (near if moves or conflicts else "")


def assign(photos: "pd.DataFrame", params: SplitParams) -> tuple["pd.DataFrame", list[Move], list[Conflict]]:
    """Give each photo its subset.

    Args:
        photos: columns path, class, sha256, perceptual_hash, group, subset (a split given by the source, or empty).
        params: the `split` section.

    Returns:
        The photos with `subset` (one of SUBSETS) and `group` (never empty) filled in, without those left out; what
        near-duplicates moved (with `method: hash` no other photo can be elsewhere than before photos were added); and
        the conflicts that left photos out.
    """
    unknown = set(params.test_groups) - set(photos["group"])
    if unknown:
        raise TouchlineError(
            f"split.test_groups: no photo is of group {', '.join(sorted(unknown))}: see data/photos.csv"
        )
    pairs = similarity.near_duplicates(photos["perceptual_hash"], params.near_duplicate_bits)
    split, conflicts = _without_conflicts(_with_subsets(photos, pairs, params), pairs)
    if params.method != "hash" or params.exact:
        return split, [], conflicts
    alone = _with_subsets(photos, [], params)["subset"][split.index]
    rows = zip(split["path"], alone, split["subset"], strict=True)
    return split, [Move(path, before, now) for path, before, now in rows if before != now], conflicts


def _with_subsets(photos: "pd.DataFrame", pairs: list[tuple[int, int]], params: SplitParams) -> "pd.DataFrame":
    """The photos with `group` and `subset` filled in."""
    given = photos["subset"]
    grouped = _grouped(photos, pairs, params.by_group)
    test = given.eq("test") | grouped["group"].isin(params.test_groups)
    # Photos that come with a split, or beside named test groups, have their test subset already.
    if not (given.ne("").any() or params.test_groups):
        test = _carve(grouped, params.test_share, params, salt="test")
    validation = given.eq("validation") & ~test
    if not validation.any():
        rest = grouped if params.validation_by_group else _grouped(photos, pairs, by_group=False)
        validation = _carve(rest[~test], params.validation_share, params, salt="validation")
        validation = validation.reindex(photos.index, fill_value=False)
    return grouped.assign(subset=np.select([test, validation], ["test", "validation"], "train"))


def _grouped(photos: "pd.DataFrame", pairs: list[tuple[int, int]], by_group: bool) -> "pd.DataFrame":
    """The photos with `group`, their own where they have one, else their near-duplicates' common one, and with `key`.

    Two named groups are not joined by a pair of near-duplicates between them: with few large groups all would soon be
    one. `_without_conflicts` looks after such pairs.
    """
    named = photos["group"].ne("").to_numpy() & by_group
    free = [(a, b) for a, b in pairs if not (named[a] or named[b])]
    shas = photos["sha256"].str[:16]
    # A cluster is called after its smallest digest; which subset it gets depends on its photos' keys, not on that name.
    names = shas.groupby(similarity.components(len(photos), free)).transform("min")
    return photos.assign(group=np.where(named, photos["group"], names), key=np.where(named, photos["group"], shas))


def _carve(photos: "pd.DataFrame", share: float, params: SplitParams, salt: str) -> "pd.Series":
    """True for the photos that make up `share` of `photos`, by whole groups."""
    import pandas as pd

    if params.method == "stratified":
        return _stratified(photos, share, params.seed, salt)
    position = _position(photos, params, salt)
    if not params.exact:
        return position < share
    chosen = pd.Series(False, index=photos.index)
    for _, members in photos.groupby("class"):
        ranked = position[members.index].sort_values(kind="stable")
        # Whole groups go in while the class has room, so that the cut is exact wherever groups are single photos.
        room = round(share * len(members))
        for _, group in members.loc[ranked.index].groupby("group", sort=False):
            if len(group) <= room:
                chosen[group.index] = True
                room -= len(group)
    # A group with photos of two classes goes where the first class put it.
    return chosen.groupby(photos["group"]).transform("any")


def _position(photos: "pd.DataFrame", params: SplitParams, salt: str) -> "pd.Series":
    """A number in [0, 1) for each photo, equal within a group, from its key and the seed.

    Of a cluster of near-duplicates the largest number counts: when a new photo joins an old one, the pair can only move
    away from the low end, which is the test subset's, so nothing a model was trained on ever becomes a test photo.
    """
    import pandas as pd

    numbers = [
        int.from_bytes(hashlib.sha256(f"{params.seed}:{salt}:{key}".encode()).digest()[:8], "big") / 2**64
        for key in photos["key"]
    ]
    return pd.Series(numbers, index=photos.index).groupby(photos["group"]).transform("max")


def _stratified(photos: "pd.DataFrame", share: float, seed: int, salt: str) -> "pd.Series":
    import pandas as pd
    from sklearn.model_selection import StratifiedGroupKFold

    groups, most = photos["group"].nunique(), int(photos["class"].value_counts().max())
    # So many of so many folds: 0.2 is one of five, 0.7 seven of ten, or two of three where there are fewer groups.
    part = Fraction(share).limit_denominator(max(1, min(groups, most, _MOST_FOLDS)))
    taken, folds = part.numerator, part.denominator
    if abs(taken / folds - share) > min(share, 1 - share) * _TOLERATED:
        raise TouchlineError(
            f"split: {groups} groups with at most {most} photos a class cannot give a {salt} share of {share}: "
            "add photos, name split.test_groups, or set split.by_group: false"
        )
    seed = int.from_bytes(hashlib.sha256(f"{seed}:{salt}".encode()).digest()[:4], "big")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    divided = [chosen for _, chosen in splitter.split(photos, photos["class"], photos["group"])]
    candidates = [np.concatenate([*divided, *divided][first : first + taken]) for first in range(folds)]
    # Folds of few large groups are uneven: take those nearest to the share asked for, with every class in them.
    classes = photos["class"].to_numpy()

    def unevenness(chosen: np.ndarray) -> float:
        shares = [np.isin(np.flatnonzero(classes == label), chosen).mean() for label in np.unique(classes)]
        return max(abs(found - share) for found in shares) + sum(found in (0.0, 1.0) for found in shares)

    best = min(candidates, key=unevenness)
    mask = np.zeros(len(photos), bool)
    mask[best] = True
    return pd.Series(mask, index=photos.index)


def _without_conflicts(photos: "pd.DataFrame", pairs: list[tuple[int, int]]) -> tuple["pd.DataFrame", list[Conflict]]:
    """Leave out, of near-duplicates in different subsets, the one farther from training."""
    subsets = photos["subset"].to_numpy()
    names = photos["path"].to_numpy()
    conflicts: dict[int, Conflict] = {}
    for pair in pairs:
        kept, dropped = sorted(pair, key=lambda position: SUBSETS.index(subsets[position]))
        if subsets[kept] != subsets[dropped]:
            conflicts.setdefault(dropped, Conflict(names[dropped], subsets[dropped], names[kept], subsets[kept]))
    keep = ~np.isin(np.arange(len(photos)), list(conflicts))
    return photos[keep], [conflicts[position] for position in sorted(conflicts)]
