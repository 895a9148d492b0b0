"""The `split` stage: which photos train, which choose between models, and which judge.

Photos that belong together (near-duplicates, one group) stay on one side. With `method: hash` a photo's subset is a
function of its group and the seed alone, so that new photos move no old one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from touchline.errors import TouchlineError
from touchline.files import read_table, write_json, write_table
from touchline.params import Params, SplitParams
from touchline.paths import Paths
from touchline.progress import say

if TYPE_CHECKING:
    import pandas as pd

SUBSETS = ("train", "validation", "test")
COLUMNS = ("path", "class", "subset", "group", "sha256")
_PAIRS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Conflict:
    """A photo left out because a near-duplicate of it lies in a subset nearer to training."""

    path: str
    subset: str
    other: str
    other_subset: str


def run(paths: Paths, params: Params) -> None:
    """Write `data/split.csv` and `reports/split.json`.

    Raises:
        TouchlineError: a class has no photo in a subset, or the options do not fit the groups there are.
    """
    table = read_table(paths.validated_table, dtype={"group": str, "subset": str, "perceptual_hash": str})
    split, conflicts = assign(table, params.split)
    moved = moved_by_merging(split, params.split)
    write_table(paths.split_table, split.sort_values(["subset", "class", "path"])[list(COLUMNS)])
    counts = {
        subset: {
            label: int(((split["subset"] == subset) & (split["class"] == label)).sum()) for label in params.classes
        }
        for subset in SUBSETS
    }
    report = {
        "photos": len(split),
        "groups": int(split["group"].nunique()),
        "counts": counts,
        "shares": {subset: round(float((split["subset"] == subset).mean()), 4) for subset in SUBSETS},
        "moved_by_merging": moved,
        "left_out": [vars(conflict) for conflict in conflicts],
    }
    write_json(paths.reports / "split.json", report)
    for subset in SUBSETS:
        by_class = ", ".join(f"{label} {count:,}" for label, count in counts[subset].items())
        say(f"{subset:>10}: {report['shares'][subset]:6.1%} ({by_class})")
    say(f"    groups: {report['groups']:,}")
    for path in moved:
        say(f"     moved: {path} out of test, to stay with its near-duplicate")
    for conflict in conflicts:
        say(f"  left out: {conflict.path} ({conflict.subset}) nearly equals {conflict.other} ({conflict.other_subset})")
    empty = [f"{subset} has no {label}" for subset in SUBSETS for label, count in counts[subset].items() if not count]
    if empty:
        raise TouchlineError(
            f"split: {'; '.join(empty)}: add photos, change split.seed, or for few large groups set "
            "split.method: stratified, or split.by_group: false"
        )


def assign(photos: "pd.DataFrame", params: SplitParams) -> tuple["pd.DataFrame", list[Conflict]]:
    """Give each photo its subset.

    Args:
        photos: columns path, class, sha256, perceptual_hash, group, subset (a split given by the source, or empty).
        params: the `split` section.

    Returns:
        The photos with `subset` (one of SUBSETS) and `group` (never empty) filled in, without those left out; and the
        conflicts that left them out.
    """
    pairs = near_duplicates(photos["perceptual_hash"], params.near_duplicate_bits)
    photos = photos.assign(group=_groups(photos, pairs, params.by_group), given=photos["subset"])
    unknown = set(params.test_groups) - set(photos["group"])
    if unknown:
        raise TouchlineError(
            f"split.test_groups: no photo is of group {', '.join(sorted(unknown))}: see data/photos.csv"
        )

    test = photos["given"].eq("test") | photos["group"].isin(params.test_groups)
    # Photos that come with a split, or beside named test groups, have their test subset already.
    if not (photos["given"].ne("").any() or params.test_groups):
        test = _carve(photos, params.test_share, params, salt="test")
    rest = photos[~test]
    if not params.validation_by_group:
        rest = rest.assign(group=_groups(photos, pairs, by_group=False)[rest.index])
    validation = _carve(rest, params.validation_share, params, salt="validation").reindex(
        photos.index, fill_value=False
    )
    photos = photos.assign(subset=np.select([test, validation], ["test", "validation"], "train"))
    return _without_conflicts(photos, pairs)


def near_duplicates(hashes: Sequence[str], bits: int) -> list[tuple[int, int]]:
    """Pairs of positions whose 64-bit hashes differ in at most `bits` bits, the smaller position first.

    Hashes are compared in blocks, so memory does not grow with the square of the photos.
    """
    values = np.array([int(value, 16) for value in hashes], dtype=np.uint64)
    rows = max(1, _PAIRS_AT_ONCE // max(1, len(values)))
    pairs = []
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        near = np.bitwise_count(block[:, None] ^ values[None, start:]) <= bits
        for row, column in np.argwhere(np.triu(near, 1)):
            pairs.append((start + int(row), start + int(column)))
    return pairs


def _groups(photos: "pd.DataFrame", pairs: list[tuple[int, int]], by_group: bool) -> "pd.Series":
    """Each photo's group: its own where it has one, else its near-duplicates' common one.

    Two named groups are not joined by a pair of near-duplicates between them: with few large groups all would soon be
    one. `_without_conflicts` looks after such pairs.
    """
    import pandas as pd
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    named = photos["group"].ne("").to_numpy() & by_group
    free = [(a, b) for a, b in pairs if not (named[a] or named[b])]
    first, second = np.array(free, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(photos), len(photos)))
    _, component = connected_components(graph, directed=False)
    shas = photos["sha256"].to_numpy()
    # A cluster is called after its smallest digest; which subset it gets does not depend on that name, see `_position`.
    names = pd.Series(shas).groupby(component).transform("min").str[:16].to_numpy()
    return pd.Series(np.where(named, photos["group"], names), index=photos.index)


def moved_by_merging(split: "pd.DataFrame", params: SplitParams) -> list[str]:
    """Paths of photos that alone would be test photos and are not, because a near-duplicate keeps them from it."""
    if params.method != "hash" or params.exact or params.test_groups or split.get("given", split["group"]).ne("").all():
        return []
    alone = _position(split.assign(group=split["sha256"].str[:16]), params, "test") < params.test_share
    clustered = split["group"].isin(set(split["sha256"].str[:16]))
    return sorted(split.loc[alone & clustered & split["subset"].ne("test"), "path"])


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
    """A number in [0, 1) for each photo, equal within a group, from its digest or group's name and the seed.

    Of a cluster of near-duplicates the largest number counts: when a new photo joins an old one, the pair can only move
    away from the low end, which is the test subset's, so nothing a model was trained on ever becomes a test photo.
    """
    import pandas as pd

    shas = photos["sha256"].str[:16]
    is_cluster = photos["group"].isin(set(shas))
    keys = np.where(is_cluster, shas, photos["group"])
    numbers = [
        int.from_bytes(hashlib.sha256(f"{params.seed}:{salt}:{key}".encode()).digest()[:8], "big") / 2**64
        for key in keys
    ]
    return pd.Series(numbers, index=photos.index).groupby(photos["group"]).transform("max")


def _stratified(photos: "pd.DataFrame", share: float, seed: int, salt: str) -> "pd.Series":
    import pandas as pd
    from sklearn.model_selection import StratifiedGroupKFold

    folds = max(2, round(1 / share))
    groups = photos["group"].nunique()
    if groups < folds:
        raise TouchlineError(
            f"split: {groups} groups cannot give a {salt} share of {share}: name split.test_groups, or set "
            "split.by_group: false"
        )
    seed = int.from_bytes(hashlib.sha256(f"{seed}:{salt}".encode()).digest()[:4], "big")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    candidates = [chosen for _, chosen in splitter.split(photos, photos["class"], photos["group"])]
    # Folds of few large groups are uneven: take the one nearest to the share asked for, with every class in it.
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
