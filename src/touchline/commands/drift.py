"""`touchline drift`: do these photos still look like the champion's training photos?

Every comparison is a permutation test of one distance between two sets of photos, so its p-value is exact for any
distribution, with ties or few photos. Only one photo of a group of near-duplicates is compared: the others add no
information but would count as evidence. All photos of an author or album count, since new photos name no author.

A model is more confident on photos it was trained on. So its answers on new photos are compared with those on the test
photos, which it never saw; everything else (the frozen backbone's features, size, quality) with the training photos.
"""

import hashlib
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.commands import predict
from touchline.core import parallel
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_table, write_json, write_text
from touchline.core.params import BackboneFeatures, DriftParams, Params
from touchline.core.paths import Paths
from touchline.core.progress import track
from touchline.data import photos, similarity
from touchline.data.feature_store import Arrays
from touchline.data.thumbnails import jpeg, thumbnail
from touchline.models import forecast, inference
from touchline.models.classifier import UNKNOWN, Classifier, from_stored, with_reference
from touchline.report import html, plots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from touchline.tracking.registry import Version

# What a comparison comes to, and the exit code of the command line.
SILENT, DRIFT, TOO_FEW = "silent", "drift", "too few"
EXIT_CODES = {SILENT: 0, DRIFT: 3, TOO_FEW: 4}
FEWEST = 20
CONTENT, CLASSES, CONFIDENCE = "content", "predicted classes", "confidence"
QUALITY_SIDE = 256
# What is measured of a photo itself, and its unit.
MEASURES = {
    "width": "pixels",
    "height": "pixels",
    "aspect": "width / height",
    "contrast": "standard deviation of the grey levels (0 to 255)",
    "brightness": "mean grey level (0 to 255)",
    "sharpness": f"variance of the Laplacian at {QUALITY_SIDE} pixels",
}
TRAINING, HELD_OUT = "training", "test"
# This many photos on each side are enough to detect relevant differences; memory grows with their square.
_MOST = 1500
_PERMUTATIONS = 1999
_FOLDS = 5
# Of the classifier's ridge regression, on photos whose features have a length of 1 on average. On real photos tenfold
# more or less tells darkened photos and photos of another source from the rest a little worse.
_RIDGE = 1.0
_SEED = 42
_NEIGHBOURS = 5
_SHOWN = 12
_NAMED = 3
_THUMBNAIL = 240


@dataclass(frozen=True)
class Side:
    """Photos on one side of a comparison.

    Attributes:
        values: by what is compared, a row a photo: CONTENT float (n, channels); CLASSES int (n,); anything else
            float (n,).
        hashes: perceptual hashes, 16 hexadecimal digits each, n of them.
    """

    values: Mapping[str, np.ndarray]
    hashes: Sequence[str]

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass(frozen=True)
class Comparison:
    """One way in which new photos may differ from others.

    Attributes:
        what: CONTENT, CLASSES, CONFIDENCE or a key of MEASURES.
        against: TRAINING or HELD_OUT.
        statistic: what `value` is.
        value: what was found; of CONTENT the area under the ROC curve of a classifier that tells new from old.
        by_chance: 99 of 100 permutations come to no more.
        distance: 0 to 1, the share of photos that lie elsewhere: the largest gap between the two cumulative
            distributions (of CONTENT those of the classifier's scores), or the total variation of shares.
        p_value: share of permutations that come to as much.
        corrected: for all comparisons made, as Holm (1979).
    """

    what: str
    against: str
    statistic: str
    value: float
    by_chance: float
    distance: float
    p_value: float
    corrected: float = 1.0

    def warns(self, params: DriftParams) -> bool:
        """Whether it is more than chance, and large enough to matter."""
        return self.corrected <= params.significance and self.distance >= params.threshold


@dataclass(frozen=True)
class _Read:
    """A new photo as it lies there.

    Attributes:
        measured: as MEASURES.
        images: RGB uint8 squares, for the model and for the backbone.
    """

    path: Path
    sha256: str
    perceptual_hash: str
    measured: tuple[float, ...]
    images: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Champion:
    """The champion, its version, and the sha256 of each photo that it learned from."""

    classifier: Classifier
    version: "Version"
    learned_from: set[str]


@dataclass
class _New:
    """The new photos, those alone that the project does not have, and what became of the others."""

    paths: list[Path] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    measured: list[tuple[float, ...]] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    unknown: list[bool] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    known: int = 0
    left_out: int = 0


def run(paths: Paths, params: Params, names: Sequence[str] = ()) -> str:
    """Compare photos with those the champion learned from; write `reports/drift.json` and `reports/drift.html`.

    Args:
        names: see `predict.find`; none for the folder that `drift.folder` names.

    Returns:
        SILENT, DRIFT or TOO_FEW.

    Raises:
        ParamsError: nothing is named.
        TouchlineError: there is no photo, no champion, or nothing left of what it learned from.
    """
    if not names and not params.drift.folder:
        raise ParamsError("name the photos, `touchline drift FOLDER`, or a folder in params.yaml under drift.folder")
    folder = paths.project / params.drift.folder
    if not names and not folder.is_dir():
        raise TouchlineError(f"drift.folder in params.yaml: {folder} is not a folder: create it, or name another")
    names = list(names) or [str(folder)]
    found = list(predict.find(names))
    if not found:
        raise TouchlineError(f"no photo in {', '.join(names)}")
    champion = find_champion(paths, params)
    name, backbone = _backbone(params, champion.version)
    _check_features(paths, name, backbone)
    table, split = read_table(paths.validated_table), read_table(paths.split_table)
    table = table.merge(split[["path", "subset"]].rename(columns={"subset": "part"}), on="path")
    learned = table["sha256"].isin(champion.learned_from)
    training, held_out = table[learned], table[~learned & (table["part"] == "test")]
    if len(training) < FEWEST:
        raise TouchlineError(
            f"data/split.csv has {len(training)} of the photos that {champion.classifier.name} learned from: run "
            "`dvc repro`, or `dvc checkout` in the commit that it was trained in"
        )
    new = _look(sample(found), champion, backbone, paths, params, set(split["sha256"]))
    for path, why in new.unreadable:
        print(f"touchline: {predict.shown(path)}: {why}", file=sys.stderr)
    if not new.paths and not new.known:
        raise TouchlineError(f"no readable photo in {', '.join(names)}")

    bits = params.split.near_duplicate_bits
    alike = belonging(new.hashes, bits) if new.hashes else np.zeros(0)
    counts = {
        "new": len(new.paths), "different": len(np.unique(alike)), "known": new.known,
        "unreadable": len(new.unreadable), "left_out": new.left_out, "not_looked_at": max(0, len(found) - _MOST),
        TRAINING: len(training), HELD_OUT: len(held_out),
    }  # fmt: skip
    comparisons: list[Comparison] = []
    unlike: list[dict[str, Any]] = []
    figures: list[str] = []
    pictures: list[str] = []
    if counts["different"] >= FEWEST:
        sides = (
            _side_of_new(new),
            _training_side(paths, sample(training), name),
            _held_out_side(paths, sample(held_out), champion.classifier),
        )
        comparisons = compare(*sides, bits)
        rows, beyond = _most_unlike(sides[0].values[CONTENT], sides[1].values[CONTENT])
        unlike = [
            {"photo": predict.shown(new.paths[row]), "farther_than": round(share, 1)}
            for row, share in zip(rows, beyond, strict=True)
        ]
        pictures = [jpeg(thumbnail(new.paths[row], _THUMBNAIL)) for row in rows]
        figures = _figures(sides, comparisons, champion.classifier.classes)
    estimate = None
    if new.paths:
        estimate = forecast.for_version(champion.version.tags, np.stack(new.probabilities), np.array(new.unknown))
    report: dict[str, Any] = {
        "model": champion.classifier.name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        **verdict(comparisons, counts, champion.classifier.name, params.drift),
        "photos": counts,
        "comparisons": [vars(each) | {"warns": each.warns(params.drift)} for each in comparisons],
        "forecast": estimate,
        "most_unlike": unlike,
        "unreadable": [{"photo": predict.shown(path), "why": why} for path, why in new.unreadable],
    }
    _write(paths, params, report, figures, pictures)
    _print(report, paths)
    return report["outcome"]


def compare(new: Side, training: Side, held_out: Side, near_duplicate_bits: int) -> list[Comparison]:
    """Every comparison that two sides have values for, corrected for being several; none where photos are too few.

    Args:
        near_duplicate_bits: of photos whose hashes differ by no more one is compared.
    """
    found = []
    new = _without_near_duplicates(new, near_duplicate_bits)
    for against, other in ((TRAINING, training), (HELD_OUT, held_out)):
        side = _without_near_duplicates(other, near_duplicate_bits)
        if min(len(new), len(side)) < FEWEST:
            continue
        is_new = np.arange(len(new) + len(side)) < len(new)
        dealt = np.vstack([is_new, np.random.default_rng(_SEED).permuted(np.tile(is_new, (_PERMUTATIONS, 1)), axis=1)])
        together = belonging([*new.hashes, *side.hashes], near_duplicate_bits)
        for what in (what for what in new.values if what in side.values):
            values = np.concatenate([new.values[what], side.values[what]])
            found.append(_compare(what, against, values, dealt, together))
    return _corrected(found)


def belonging(hashes: Sequence[str], bits: int) -> np.ndarray:
    """Numbers, shape (n,), equal for near-duplicates, also for those that others link."""
    return similarity.components(len(hashes), similarity.near_duplicates(hashes, bits))


def _without_near_duplicates(side: Side, bits: int) -> Side:
    if not len(side):
        return side
    _, rows = np.unique(belonging(side.hashes, bits), return_index=True)
    return Side({what: values[rows] for what, values in side.values.items()}, [side.hashes[row] for row in rows])


def _compare(what: str, against: str, values: np.ndarray, dealt: np.ndarray, together: np.ndarray) -> Comparison:
    if what == CONTENT:
        scores = _scores(values, dealt, together)
        statistic, found = "AUC", _areas(scores, dealt)
        distance = float(_largest_gaps(scores[0], dealt[:1])[0])
    else:
        statistic = "total variation" if what == CLASSES else "KS distance"
        found = (_total_variations if what == CLASSES else _largest_gaps)(values, dealt)
        distance = float(found[0])
    # Sums in another order differ in the last digits, and what is equal counts.
    p_value = float(np.mean(found >= found[0] - 1e-9))
    return Comparison(
        what, against, statistic, round(float(found[0]), 4), round(float(np.quantile(found[1:], 0.99)), 4),
        round(distance, 4), p_value,
    )  # fmt: skip


def _scores(features: np.ndarray, dealt: np.ndarray, together: np.ndarray) -> np.ndarray:
    """How new each photo looks to a classifier that saw neither it nor what belongs to it, for each row of `dealt`.

    The classifier is ridge regression, whose cross-validation has a closed form, e = (I - H_ff)^-1 (y - Hy)_f for a
    fold f and the hat matrix H: all permutations cost one product. Folds know nothing of what is new.

    Returns:
        float32, shape as `dealt`.
    """
    from sklearn.model_selection import GroupKFold

    centred = (features - features.mean(axis=0)).astype(np.float64)
    # One scale for all channels: those that vary little say little.
    kernel = centred @ centred.T / max(float(np.square(centred).sum(axis=1).mean()), 1e-12)
    hat = np.linalg.solve(kernel + _RIDGE * np.eye(len(kernel)), kernel).T
    targets = dealt.T.astype(np.float32)
    targets -= targets.mean(axis=0)
    residuals = targets - hat.astype(np.float32) @ targets
    found = np.empty_like(targets)
    folds = GroupKFold(min(_FOLDS, len(np.unique(together))), shuffle=True, random_state=_SEED)
    for _, fold in folds.split(features, groups=together):
        left = np.linalg.inv(np.eye(len(fold)) - hat[np.ix_(fold, fold)])
        found[fold] = targets[fold] - left.astype(np.float32) @ residuals[fold]
    return found.T


def _areas(scores: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Areas under the ROC curve, shape (rows,), from the sum of the new photos' ranks."""
    count, new = dealt.shape[1], dealt.sum(axis=1)
    ranks = np.take_along_axis(dealt, np.argsort(scores, axis=1, kind="stable"), axis=1) @ np.arange(1.0, count + 1)
    return (ranks - new * (new + 1) / 2) / (new * (count - new))


def _largest_gaps(values: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Kolmogorov and Smirnov's distance between new and other photos, shape (rows,)."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order]))
    if not len(ends):
        return np.zeros(len(dealt))
    gaps = []
    # Some rows at a time, so that what is made of them stays small.
    for part in np.array_split(dealt, 10):
        new = part.sum(axis=1, keepdims=True)
        counts = np.cumsum(part[:, order], axis=1, dtype=np.int32)[:, ends]
        gaps.append(np.abs(counts / new - (ends + 1 - counts) / (len(values) - new)).max(axis=1))
    return np.concatenate(gaps)


def _total_variations(labels: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Half the sum of the differences between the shares of each class, shape (rows,)."""
    of_class = np.eye(labels.max() + 1)[labels]
    new = dealt.sum(axis=1, keepdims=True)
    counts = dealt.astype(np.float64) @ of_class
    others = (of_class.sum(axis=0) - counts) / (len(labels) - new)
    return np.abs(counts / new - others).sum(axis=1) / 2


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With the p-values that Holm (1979) makes of several."""
    # By place: the same thing may be compared against the training photos and against those of the test.
    corrected, highest = [0.0] * len(comparisons), 0.0
    for rank, place in enumerate(sorted(range(len(comparisons)), key=lambda place: comparisons[place].p_value)):
        highest = max(highest, min(1.0, (len(comparisons) - rank) * comparisons[place].p_value))
        corrected[place] = highest
    return [replace(each, corrected=value) for each, value in zip(comparisons, corrected, strict=True)]


def verdict(
    comparisons: Sequence[Comparison], counts: Mapping[str, int], model: str, params: DriftParams
) -> dict[str, str]:
    """`outcome` (SILENT, DRIFT or TOO_FEW) and `verdict`, one sentence."""
    new = f"{counts['new']:,} new photo{'s' if counts['new'] != 1 else ''}"
    if counts["different"] < FEWEST:
        alike = f", {counts['different']} without near-duplicates" if counts["different"] < counts["new"] else ""
        known = f" ({counts['known']:,} more are known to it already)" if counts["known"] else ""
        return {
            "outcome": TOO_FEW,
            "verdict": f"Too few to tell: {new}{alike}{known}, and {FEWEST} are the least to compare with what "
            f"{model} learned from.",
        }
    if differing := [each for each in comparisons if each.warns(params)]:
        named = [f"{each.what} ({each.statistic} {each.value:.2f})" for each in differing[:_NAMED]]
        more = [f"{len(differing) - _NAMED} more"] if len(differing) > _NAMED else []
        verb = "differs" if len(differing) == 1 else "differ"
        return {
            "outcome": DRIFT,
            "verdict": f"Drift: {_listed(named + more)} of {len(comparisons)} comparisons of {new} {verb} from what "
            f"{model} knows.",
        }
    smaller = [each.what for each in comparisons if each.corrected <= params.significance]
    less = f"; {_listed(smaller)} differ{'s' if len(smaller) == 1 else ''} a little" if smaller else ""
    return {
        "outcome": SILENT,
        "verdict": f"No drift: in {len(comparisons)} comparisons {new} are like those that {model} learned from{less}.",
    }


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _backbone(params: Params, champion: "Version") -> tuple[str, BackboneFeatures]:
    """The features that compare the photos' content: the champion's own, or of one that works on pixels the first.

    A network that learned from the photos itself would not do: it takes those it learned from otherwise than new ones.
    """
    of_backbone = {name: kind for name, kind in params.features.items() if isinstance(kind, BackboneFeatures)}
    if not of_backbone:
        raise TouchlineError("params.yaml: drift needs a backbone in `features`, and there is none: add an entry")
    model = params.models.get(champion.tags.get("touchline.model", ""))
    name = model.input if model and model.input in of_backbone else next(iter(of_backbone))
    return name, of_backbone[name]


def _check_features(paths: Paths, name: str, features: BackboneFeatures) -> None:
    """Raise where the stored features are not what the new photos will get."""
    from touchline.stages.features import settings_of

    wanted = settings_of(features, paths.project)
    stored = Arrays(paths.features / name).settings
    if differing := [key for key in wanted if stored.get(key) != wanted[key]]:
        raise TouchlineError(f"data/features/{name} was made with another {_listed(differing)}: run `dvc repro`")


def find_champion(paths: Paths, params: Params) -> Champion:
    """The champion; TouchlineError if there is none."""
    from touchline.tracking import registered

    name = params.register_.name
    known = registered.versions(paths, name)
    if not (version := registered.champion(known)):
        raise registered.no_champion(name, known, option=False)
    stored = registered.model(paths, version)
    found = from_stored(stored, f"{name} version {version.number}", params.compute.engine)
    if params.predict.unknown_share is not None:
        found = with_reference(found)
    return Champion(found, version, stored.training_photos)


def sample(rows: Any) -> Any:
    """At most `_MOST` of a list or of the rows of a table, drawn at random and always the same, in their order."""
    if len(rows) <= _MOST:
        return rows
    chosen = np.sort(np.random.default_rng(_SEED).choice(len(rows), _MOST, replace=False))
    return [rows[position] for position in chosen] if isinstance(rows, list) else rows.iloc[chosen]


def _look(
    found: Sequence[predict.Found],
    champion: Champion,
    backbone: BackboneFeatures,
    paths: Paths,
    params: Params,
    known: Collection[str],
) -> _New:
    """Read the photos, and put each that is new through the model and the backbone."""
    from touchline.models import backbones

    classifier = champion.classifier
    frozen = backbones.network(backbone, paths.project, params.compute.engine).forward
    work = partial(
        _read, sides=(champion.classifier.side, backbone.image_size), max_megapixels=params.validate_.max_megapixels
    )
    new = _New()
    rows = track(parallel.in_order(work, found), len(found), "looking at photos")
    while batch := list(islice(rows, inference.BATCH)):
        fresh: list[_Read] = []
        for path, outcome in batch:
            match outcome:
                case _Read(sha256=digest) if digest in champion.learned_from or digest in known:
                    new.known += 1
                case _Read():
                    fresh.append(outcome)
                case str():
                    new.unreadable.append((path, outcome))
                case None:
                    new.left_out += 1
        if fresh:
            new.paths += [each.path for each in fresh]
            new.hashes += [each.perceptual_hash for each in fresh]
            new.measured += [each.measured for each in fresh]
            judged = classifier.forward(np.stack([each.images[0] for each in fresh]))
            new.probabilities += list(judged[:, : len(classifier.classes)])
            similar = classifier.similarities(judged)
            answers = (classifier.answer(*each, params.predict) for each in zip(judged, similar, strict=True))
            new.unknown += [answer.label == UNKNOWN for answer in answers]
            new.embeddings += list(frozen(np.stack([each.images[1] for each in fresh])))
    return new


def _read(found: predict.Found, sides: tuple[int, int], max_megapixels: float) -> tuple[Path, _Read | str | None]:
    """A photo, why it cannot be read, or None for another file that lies in a folder."""
    path = found.path
    if found.error:
        return path, found.error
    try:
        content = photos.content_of(path)
        flaw = photos.flaw(content)
        if flaw not in {"", "cut off"}:
            return path, None if predict.is_other(found) else flaw
        measured = photos.measure(path, max_megapixels)
        if measured.error or measured.bomb:
            return path, measured.error or f"more than {max_megapixels:g} megapixels (validate.max_megapixels)"
        size = (measured.width, measured.height, measured.width / measured.height)
        images = (photos.decode(content, sides[0]), photos.decode(content, sides[1]))
        digest = hashlib.sha256(content).hexdigest()
        look = (*size, measured.contrast, *quality(content))
        return path, _Read(path, digest, measured.perceptual_hash, look, images)
    except TouchlineError as error:
        return path, str(error)
    except OSError as error:
        return path, error.strerror or "cannot be read"


def quality(content: bytes) -> tuple[float, float]:
    """Brightness and sharpness of a photo, in the units of MEASURES."""
    import cv2

    grey = photos.decode(content, QUALITY_SIDE).mean(axis=2, dtype=np.float32)
    return float(grey.mean()), float(cv2.Laplacian(grey, cv2.CV_32F).var())


def _side_of_new(new: _New) -> Side:
    probabilities = np.stack(new.probabilities)
    measured = dict(zip(MEASURES, np.array(new.measured).T, strict=True))
    values = {CONTENT: np.stack(new.embeddings), **predicted(probabilities), **measured}
    return Side(values, new.hashes)


def predicted(probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared of probabilities, shape (n, classes)."""
    return {CLASSES: probabilities.argmax(axis=1), CONFIDENCE: probabilities.max(axis=1)}


def _training_side(paths: Paths, table: "pd.DataFrame", name: str) -> Side:
    files = [paths.workspace / path for path in table["path"]]
    rows = parallel.in_order(lambda path: quality(read_photo(path)), files)
    looks = np.array(list(track(rows, len(files), "measuring training photos")))
    sizes = table[["width", "height"]].to_numpy(float)
    measured = (*sizes.T, sizes[:, 0] / sizes[:, 1], table["contrast"].to_numpy(float), *looks.T)
    embeddings = Arrays(paths.features / name)[list(table["sha256"])]
    values = {CONTENT: embeddings, **dict(zip(MEASURES, measured, strict=True))}
    return Side(values, list(table["perceptual_hash"]))


def read_photo(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TouchlineError(f"{path} cannot be read ({error.strerror}): run `dvc checkout` or `dvc repro`") from None


def _held_out_side(paths: Paths, table: "pd.DataFrame", classifier: Classifier) -> Side:
    values = {}
    if len(table) >= FEWEST:
        files = [paths.workspace / path for path in table["path"]]
        values = predicted(inference.predict(classifier.network, files, "test photos")[0])
    return Side(values, list(table["perceptual_hash"]))


def _most_unlike(new: np.ndarray, training: np.ndarray) -> tuple[list[int], list[float]]:
    """Which rows of `new` lie farthest from the training photos nearest to them, and than how many training photos (in
    100) they lie farther out.
    """
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=_NEIGHBOURS).fit(training)
    distances = nearest.kneighbors(new)[0].mean(axis=1)
    usual = nearest.kneighbors()[0].mean(axis=1)
    rows = np.argsort(-distances, kind="stable")[:_SHOWN]
    return rows.tolist(), [float(100 * (usual < distances[row]).mean()) for row in rows]


def _figures(sides: tuple[Side, Side, Side], comparisons: Sequence[Comparison], classes: Sequence[str]) -> list[str]:
    """Inline SVG of what was compared, new photos beside others; content has no axis to stand on."""
    new, *others = sides
    side_of = dict(zip((TRAINING, HELD_OUT), others, strict=True))
    return [
        plots.svg(
            partial(
                partial(_shares, classes=classes) if each.what == CLASSES else _distributions,
                each=each,
                values={"new": new.values[each.what], each.against: side_of[each.against].values[each.what]},
            ),
            f"drift-{number}",
        )
        for number, each in enumerate(comparisons)
        if each.what != CONTENT
    ]


def _distributions(axes: "Axes", each: Comparison, values: Mapping[str, np.ndarray]) -> None:
    for colour, style, (name, found) in zip(plots.COLOURS, ("-", "--"), values.items(), strict=False):
        axes.step(
            np.sort(found), np.arange(1, len(found) + 1) / len(found), style, color=colour, label=f"{name} photos"
        )
    unit = MEASURES.get(each.what, "probability of the likeliest class")
    axes.set(title=each.what, xlabel=unit, ylabel="share of photos up to here", ylim=(0, 1.02))
    if each.what == "sharpness" and all((found > 0).all() for found in values.values()):
        axes.set_xscale("log")
    axes.legend(frameon=False)


def _shares(axes: "Axes", each: Comparison, values: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    for place, (colour, (name, found)) in enumerate(zip(plots.COLOURS, values.items(), strict=False)):
        shares = np.bincount(found, minlength=len(classes)) / len(found)
        axes.barh(np.arange(len(classes)) + 0.4 * place, shares, 0.38, color=colour, label=f"{name} photos")
    axes.set_yticks(np.arange(len(classes)) + 0.2, classes)
    axes.set(title=each.what, xlabel="share of photos", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(frameon=False)


def _write(
    paths: Paths, params: Params, report: Mapping[str, Any], figures: Sequence[str], thumbnails: Sequence[str]
) -> None:
    captions = [
        f"{each['what']}: new photos beside {each['against']} photos, {each['statistic']} {each['value']:.3f}"
        for each in report["comparisons"]
        if each["what"] != CONTENT
    ]
    write_json(paths.reports / "drift.json", report)
    page = html.render(
        "drift.html", report=report, figures=figures, captions=captions, thumbnails=thumbnails, drift=params.drift,
        fewest=FEWEST, most=_MOST,
    )  # fmt: skip
    write_text(paths.reports / "drift.html", page)


def _print(report: Mapping[str, Any], paths: Paths) -> None:
    from rich.console import Console
    from rich.table import Table

    if report["comparisons"]:
        shown = Table("compared", "with", "found", "by chance", "distance", "p, corrected", "")
        for each in report["comparisons"]:
            numbers = (f"{each[key]:.3f}" for key in ("value", "by_chance", "distance"))
            warning = "drift" if each["warns"] else ""
            shown.add_row(each["what"], each["against"], *numbers, f"{each['corrected']:.4f}", warning)
        Console().print(shown)
    print(report["verdict"])
    if report["forecast"]:
        print(report["forecast"]["says"])
    print(f"look through {paths.relative(paths.reports / 'drift.html')}; all figures: reports/drift.json")
