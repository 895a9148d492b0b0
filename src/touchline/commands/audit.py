"""`touchline audit`: find faults in the data, from existing features.

Likely wrong labels, outliers and near-duplicates, as a table and as a page to look through. The audit changes nothing:
what a person makes of it goes into data/decisions.csv, which `validate` honours.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.files import positions, read_table, write_table, write_text
from touchline.core.params import BackboneFeatures, Params
from touchline.core.paths import Paths
from touchline.core.progress import track
from touchline.data import decisions, rights, similarity
from touchline.data.feature_store import Arrays
from touchline.data.thumbnails import jpeg, thumbnail
from touchline.models import heads
from touchline.report import html

if TYPE_CHECKING:
    import pandas as pd

WRONG_LABEL, OUTLIER, NEAR_DUPLICATE = "wrong label", "outlier", "near-duplicate"
# What each problem is, for the page; and the decision its ready line makes.
PROBLEMS = {
    WRONG_LABEL: "A classifier that never saw the photo gives it another class. The score is 1 minus the "
    "probability of the class it is filed under.",
    NEAR_DUPLICATE: "Two photos that look nearly the same. Pairs filed under two classes come first: one of them is "
    "wrong. The score is their similarity.",
    OUTLIER: "A photo unlike all others: often it shows none of the classes. The score is its distance from its "
    "neighbours.",
}
FOLDS = 5
_SEED = 42
# A prior of the logit's standard deviation, 2. Of a tenth to thirty times as much, this finds planted labels best on
# real photos.
_STRENGTH = 4 / 1280
# A group with a larger share of all photos is a source of them rather than an author or a match. Left out of training
# as a whole, it turns the audit into a test of how sources differ: on 1,205 photos of 12 sources, average precision of
# finding planted labels fell from 0.9 to 0.4.
_LARGEST_GROUP = 0.1
# Cosine of centred features from which two photos show the same thing in the same way.
_ALIKE = 0.9
_NEIGHBOURS = 10
# Probability of a photo's own class below which its label is doubted whatever the others are.
_UNLIKELY = 0.2
# Tukey's rule with cleanlab's own width (Datalab): so many interquartile ranges above the third quartile.
_FAR = 1.7
_THUMBNAIL = 240


@dataclass(frozen=True)
class Finding:
    """One photo with one problem; photos are positions in the tables they were found in.

    Attributes:
        problem: a key of PROBLEMS.
        score: 0 to 1, the surest near 1.
        suggested: position of the class it looks like; None unless its label is doubted.
        near: the other photo of a pair of near-duplicates.
    """

    problem: str
    photo: int
    score: float
    suggested: int | None = None
    near: int | None = None


def run(paths: Paths, params: Params, top: int, who: str = "") -> None:
    """Write `reports/audit.csv` (all that is found) and `reports/audit.html` (the surest `top` of each problem).

    A photo that data/decisions.csv decides of is not listed again.

    Args:
        who: name for the page's ready-made lines of data/decisions.csv.

    Raises:
        TouchlineError: no features of a backbone, or too few photos to learn from.
    """
    name = next((key for key, kind in params.features.items() if isinstance(kind, BackboneFeatures)), None)
    if name is None:
        raise TouchlineError("params.yaml: audit needs a backbone in `features`, and there is none: add an entry")
    table = read_table(paths.validated_table)
    classes = [label for label in params.classes if (table["class"] == label).any()]
    labels = positions(table["class"], classes)
    features = Arrays(paths.features / name)[list(table["sha256"])]

    alike = similarity.near_duplicates(table["perceptual_hash"], params.split.near_duplicate_bits)
    probabilities = out_of_fold(features, labels, groups(paths, table, alike))
    found = [
        *wrong_labels(labels, probabilities),
        *near_duplicates(features, labels, probabilities, alike),
        *outliers(features),
    ]
    decided, _ = decisions.match(decisions.read(paths.decisions, params.classes), table)
    found = list(_undecided(found, decided))

    listed = _listed(found, table, classes)
    write_table(paths.reports / "audit.csv", listed)
    shown = [part for problem in PROBLEMS for part in [row for row in found if row.problem == problem][:top]]
    page = render_page(shown, _counts(found), table, classes, params, _thumbnails(paths, params, table, shown), who)
    write_text(paths.reports / "audit.html", page)
    _print(listed, paths)


def scaled(features: np.ndarray) -> np.ndarray:
    """Centred, and divided by one number for all channels: each by its own would make noise as loud as what matters."""
    centred = features - features.mean(axis=0)
    return centred / max(float(centred.std()), 1e-12)


def groups(paths: Paths, table: "pd.DataFrame", alike: Sequence[tuple[int, int]]) -> np.ndarray:
    """What belongs together: a photo's group, or where it has none or a very large one, its near-duplicates.

    Args:
        table: columns path and group.
        alike: pairs of rows with nearly equal perceptual hashes.

    Returns:
        Names, shape (len(table),).
    """
    group = table["group"]
    if paths.split_table.exists():
        split = read_table(paths.split_table)
        # The split gives near-duplicates a common group, and leaves some photos out.
        group = table["path"].map(dict(zip(split["path"], split["group"], strict=True))).fillna(group)
    small = group.ne("") & (group.map(group.value_counts()) <= _LARGEST_GROUP * len(table))
    # A line break, which no CSV cell of ours holds, keeps the two kinds of names apart.
    return np.where(small, group, [f"\n{number}" for number in similarity.components(len(table), alike)])


def out_of_fold(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int = _SEED) -> np.ndarray:
    """Class probabilities of each photo from a classifier that saw neither it nor any photo of its group.

    Where whole groups would leave a fold without a class, photos are divided singly.

    Args:
        features: shape (n, channels).
        labels: 0 to classes - 1, each of them there, shape (n,).
        groups: shape (n,).

    Returns:
        Shape (n, classes).

    Raises:
        TouchlineError: one class only, or a class of one photo.
    """
    counts = np.bincount(labels)
    if len(counts) < 2 or counts.min() < 2:
        raise TouchlineError(
            "audit needs two or more classes with two or more photos each: add photos, run `dvc repro`"
        )
    weights = heads.balance(labels, groups, "class")
    return heads.out_of_fold(features, labels, groups, weights, [_STRENGTH], FOLDS, seed)[0]


def wrong_labels(labels: np.ndarray, probabilities: np.ndarray) -> list[Finding]:
    """Photos whose label confident learning doubts (Northcutt et al., 2021), the surest first.

    Args:
        labels, probabilities: as of `out_of_fold`.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    quality = get_label_quality_scores(labels, probabilities)
    # One process: others would each start Python anew for a second's work.
    doubted = find_label_issues(labels, probabilities, n_jobs=1)
    # It estimates how many are wrong first, and where few are, the estimate may be none.
    doubted = np.flatnonzero(doubted | (quality < _UNLIKELY))
    others = probabilities.copy()
    others[np.arange(len(labels)), labels] = -1
    return [
        Finding(WRONG_LABEL, int(photo), float(1 - quality[photo]), suggested=int(others[photo].argmax()))
        for photo in sorted(doubted, key=lambda photo: quality[photo])
    ]


def outliers(features: np.ndarray) -> list[Finding]:
    """Photos unusually far from their nearest neighbours (Kuan and Mueller, 2022), the farthest first.

    Args:
        features: shape (n, channels).
    """
    from cleanlab.outlier import OutOfDistribution

    neighbours = min(_NEIGHBOURS, len(features) - 1)
    typical = OutOfDistribution({"k": neighbours}).fit_score(features=features, verbose=False)
    # The score is exp(-distance), and the rule is one of distances.
    distances = -np.log(np.maximum(typical, 1e-12))
    lower, upper = np.percentile(distances, [25, 75])
    far = np.flatnonzero(distances > upper + _FAR * (upper - lower))
    return [
        Finding(OUTLIER, int(photo), float(1 - typical[photo])) for photo in sorted(far, key=lambda row: typical[row])
    ]


def near_duplicates(
    features: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, alike: Sequence[tuple[int, int]] = ()
) -> list[Finding]:
    """Pairs whose features hardly differ, or that are `alike` already; pairs of two classes first, then the closest.

    Of a pair the photo whose label is less likely is listed, with the other as what it is near to. A pair of one class
    is left out when both its photos stand in pairs before it, so a series of n photos is n - 1 pairs.

    Args:
        features: shape (n, channels).
        labels, probabilities: as of `out_of_fold`.
        alike: pairs with nearly equal perceptual hashes.
    """
    from sklearn.neighbors import NearestNeighbors

    inputs = scaled(features)
    neighbours = min(_NEIGHBOURS, len(inputs) - 1)
    distances, nearest = NearestNeighbors(n_neighbors=neighbours, metric="cosine").fit(inputs).kneighbors()
    close = [(int(row), int(nearest[row, place])) for row, place in np.argwhere(distances <= 1 - _ALIKE)]
    pairs = {(min(pair), max(pair)) for pair in [*close, *alike]}
    lengths = np.maximum(np.linalg.norm(inputs, axis=1), 1e-12)
    cosine = {(a, b): float(np.clip(inputs[a] @ inputs[b] / lengths[a] / lengths[b], 0, 1)) for a, b in pairs}

    own = probabilities[np.arange(len(labels)), labels]
    found, seen = [], set[int]()
    for pair in sorted(pairs, key=lambda pair: (labels[pair[0]] == labels[pair[1]], -cosine[pair], pair)):
        a, b = sorted(pair, key=lambda row: own[row])
        if labels[a] != labels[b] or not seen.issuperset(pair):
            seen.update(pair)
            found.append(Finding(NEAR_DUPLICATE, a, cosine[pair], near=b))
    return found


def render_page(
    shown: Sequence[Finding],
    counts: Mapping[str, int],
    table: "pd.DataFrame",
    classes: Sequence[str],
    params: Params,
    thumbnails: Mapping[int, str],
    who: str,
) -> str:
    """reports/audit.html: one file that needs nothing but itself; every value in it is escaped.

    Args:
        shown: what the page lists.
        counts: how many were found, by problem.
        thumbnails: JPEGs in base64 by position in `table`; a photo without one may not be shown.
    """
    rows = table.to_dict("records")

    def entry(photo: int, kind: str, label: str = "", why: str = "") -> dict[str, Any]:
        row = rows[photo]
        lines = [decisions.line(row["path"], kind, label, who, why), decisions.line(row["path"], "keep", "", who)]
        return {**row, "thumbnail": thumbnails.get(photo, ""), "lines": lines}

    cards: dict[str, list[dict[str, Any]]] = {problem: [] for problem in PROBLEMS}
    for found in shown:
        suggested = "" if found.suggested is None else classes[found.suggested]
        if found.problem == WRONG_LABEL:
            members = [entry(found.photo, "relabel", suggested, f"looks like {suggested}")]
        elif found.near is None:
            members = [entry(found.photo, "drop", why=found.problem)]
        else:
            members = []
            for one, other in ((found.photo, found.near), (found.near, found.photo)):
                # Of two classes one is wrong, and the page cannot know which.
                label = rows[other]["class"] if rows[other]["class"] != rows[one]["class"] else ""
                why = f"near-duplicate of {rows[other]['path']}"
                members.append(entry(one, "relabel" if label else "drop", label, why))
        cards[found.problem].append({"score": found.score, "suggested": suggested, "members": members})
    return html.render(
        "audit.html",
        problems=PROBLEMS, cards=cards, counts=counts, photos=len(table), classes=params.classes,
        header=",".join(decisions.COLUMNS),
    )  # fmt: skip


def _undecided(found: Sequence[Finding], decided: Sequence[decisions.Decision | None]) -> Iterator[Finding]:
    """Findings without a decision. A pair stays while one of its photos is undecided and neither is dropped."""
    for each in found:
        if each.near is None:
            if not decided[each.photo]:
                yield each
            continue
        ends = [(each.photo, each.near), (each.near, each.photo)]
        dropped = any(decision and decision.kind == "drop" for one, _ in ends if (decision := decided[one]))
        open_ends = [(one, other) for one, other in ends if not decided[one]]
        if open_ends and not dropped:
            photo, near = open_ends[0]
            yield Finding(each.problem, photo, each.score, near=near)


def _counts(found: Sequence[Finding]) -> dict[str, int]:
    return {problem: sum(each.problem == problem for each in found) for problem in PROBLEMS}


def _listed(found: Sequence[Finding], table: "pd.DataFrame", classes: Sequence[str]) -> "pd.DataFrame":
    """reports/audit.csv."""
    import pandas as pd

    paths, digests, labels = (table[column].to_numpy() for column in ("path", "sha256", "class"))
    rows = [
        (
            paths[each.photo], digests[each.photo], labels[each.photo], each.problem, round(each.score, 4),
            "" if each.suggested is None else classes[each.suggested], "" if each.near is None else paths[each.near],
        )
        for each in found
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["path", "sha256", "class", "problem", "score", "suggested", "near_to"])


def _thumbnails(paths: Paths, params: Params, table: "pd.DataFrame", shown: Sequence[Finding]) -> dict[int, str]:
    """JPEGs in base64 of the photos on the page that may be seen by others, by position."""
    allowed = set(rights.shown(table.reset_index(drop=True), params).index)
    wanted = dict.fromkeys(row for each in shown for row in (each.photo, each.near) if row is not None)
    chosen = [row for row in wanted if row in allowed]
    files = [paths.workspace / table["path"].iloc[row] for row in chosen]
    drawn = parallel.in_order(lambda file: jpeg(thumbnail(file, _THUMBNAIL)), files)
    return dict(zip(chosen, track(drawn, len(chosen), "thumbnails"), strict=True))


def _print(listed: "pd.DataFrame", paths: Paths) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table("problem", title="what the audit found", title_justify="left")
    shown.add_column("photos", justify="right")
    shown.add_column("score", justify="right")
    shown.add_column("the surest", overflow="fold")
    for problem in PROBLEMS:
        rows = listed[listed["problem"] == problem]
        first = rows.iloc[0] if len(rows) else None
        words = ("", "none") if first is None else (f"{first['score']:.2f}", f"{first['class']}: {first['path']}")
        more = "" if first is None or not first["suggested"] else f" looks like {first['suggested']}"
        shown.add_row(problem, f"{len(rows):,}", words[0], escape(words[1] + more))
    console = Console()
    console.print(shown)
    print(f"look through {paths.relative(paths.reports / 'audit.html')}, decide in {paths.relative(paths.decisions)}, "
          "then run `dvc repro`; all rows: reports/audit.csv")  # fmt: skip
