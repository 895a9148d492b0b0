"""Forecasts: a classifier's accuracy on photos without labels, estimated from its probabilities.

There are three estimates: the mean confidence; the same after temperature scaling (Guo et al., 2017); and average
thresholded confidence (Garg et al., 2022, https://arxiv.org/abs/2201.04234), the share of photos whose confidence
reaches a threshold, chosen so that on labelled photos this share equals the accuracy. Temperature and threshold come
from cross-validation. The error of each estimate on new sources is measured by leaving out groups of training photos.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from touchline.core.params import HeadParams
from touchline.models import heads

# The tag of a registered version that holds it.
TAG = "touchline.forecast"
THRESHOLDED, CALIBRATED, CONFIDENCE = "thresholded confidence", "calibrated confidence", "mean confidence"
METHODS = (THRESHOLDED, CALIBRATED, CONFIDENCE)
# The most parts in which groups are left out, and the most photos that are used.
_PARTS, _MOST = 10, 10_000
# Smaller parts are ignored: their accuracy is too uncertain.
FEWEST = 20
_LEAST_PARTS = 3


@dataclass(frozen=True)
class Forecaster:
    """Estimates accuracy.

    Attributes:
        threshold: of the confidence. temperature: of the probabilities.
        left_out: for each part of the training photos that was left out: photos, accuracy, and each estimate of it.
    """

    threshold: float
    temperature: float
    left_out: Sequence[Mapping[str, float]]

    @classmethod
    def of(cls, labels: np.ndarray, validated: np.ndarray, left_out: np.ndarray, parts: np.ndarray) -> Self | None:
        """Fit to probabilities for photos that the model giving them was not fitted to.

        Args:
            labels: int64, shape (n,).
            validated: probabilities from cross-validation, shape (n, classes).
            left_out: the same, from models fitted without the photo's whole part.
            parts: number of the part of each photo, shape (n,); -1 if there is no such model.

        Returns:
            None if fewer than three parts have 20 photos: too few to measure the error of an estimate.
        """
        found = []
        for part in np.unique(parts[parts >= 0]):
            out = parts == part
            if out.sum() >= FEWEST and not out.all():
                learned = _threshold(validated[~out], labels[~out]), _temperature(validated[~out], labels[~out])
                right = float((left_out[out].argmax(axis=1) == labels[out]).mean())
                found.append({"photos": int(out.sum()), "accuracy": right, **_each(left_out[out], *learned)})
        if len(found) < _LEAST_PARTS:
            return None
        rounded = [{name: round(value, 4) for name, value in each.items()} for each in found]
        return cls(round(_threshold(validated, labels), 6), round(_temperature(validated, labels), 4), rounded)

    @classmethod
    def load(cls, tags: Mapping[str, str]) -> Self | None:
        """From the tags of a registered version; None if it has no forecaster."""
        found = json.loads(tags.get(TAG) or "null")
        return cls(**found) if found else None

    def error(self, method: str) -> float:
        """Root mean square error of an estimate on the parts that were left out."""
        errors = [part[method] - part["accuracy"] for part in self.left_out]
        return float(np.sqrt(np.mean(np.square(errors))))

    def accuracy(self, probabilities: np.ndarray) -> dict[str, Any]:
        """The accuracy on photos, by the estimate with the smallest error on the parts that were left out.

        Args:
            probabilities: of the model's answers, shape (n, classes), n at least 1.

        Returns:
            `accuracy`, `give_or_take` (its root mean square error), `method`, and each estimate by name.
        """
        each = _each(probabilities, self.threshold, self.temperature)
        method = min(each, key=self.error)
        return {
            "accuracy": round(each[method], 4), "give_or_take": round(self.error(method), 4), "method": method,
            **{name: round(value, 4) for name, value in each.items()},
        }  # fmt: skip


def of_head(
    rows: np.ndarray, labels: np.ndarray, groups: Sequence[str], strength: float, params: HeadParams
) -> Forecaster | None:
    """The forecaster of a head, from heads of the same strength that were fitted without some of the photos.

    Args:
        rows, labels, strength: as `heads.path`. groups: as `heads.out_of_fold`.
    """
    chosen = np.sort(np.random.default_rng(params.seed).permutation(len(labels))[:_MOST])
    held, truth, names = rows[chosen], labels[chosen], np.asarray(groups, dtype=str)[chosen]
    if len(np.unique(truth)) <= labels.max():
        return None
    weights = heads.balance(truth, names, params.balance)
    [validated] = heads.out_of_fold(held, truth, names, weights, [strength], params.folds, params.seed)
    left_out, parts = np.zeros_like(validated), np.full(len(chosen), -1)
    for number, (train, out) in enumerate(_parts(names)):
        if len(np.unique(truth[train])) > labels.max():
            weights = heads.balance(truth[train], names[train], params.balance)
            head = next(heads.path(held[train], truth[train], weights, [strength], rough=True))
            left_out[out], parts[out] = head.probabilities(held[out]), number
    return Forecaster.of(truth, validated, left_out, parts)


def for_version(tags: Mapping[str, str], probabilities: np.ndarray, unknown: np.ndarray) -> dict[str, Any] | None:
    """A registered version's forecast for photos, with a sentence in `says`; None if it has no forecaster.

    Args:
        tags: of the version.
        probabilities: of its answers, shape (n, classes).
        unknown: whether it calls each photo unknown, bool, shape (n,); these are left out of the forecast.
    """
    forecaster = Forecaster.load(tags)
    if forecaster is None or unknown.all():
        return None
    found = forecaster.accuracy(probabilities[~unknown])
    share = float(unknown.mean())
    says = f"about {found['accuracy']:.2f} of the answers are right, give or take {found['give_or_take']:.2f}"
    left = f"; the {100 * share:.0f} % that are unknown are not counted" if unknown.any() else ""
    return found | {"photos": int((~unknown).sum()), "unknown": round(share, 4), "says": f"forecast: {says}{left}"}


def _parts(groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import GroupKFold

    if (count := len(np.unique(groups))) >= 2:
        yield from GroupKFold(min(_PARTS, count)).split(groups, groups=groups)


def _threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    right = (probabilities.argmax(axis=1) == labels).mean()
    return float(np.quantile(probabilities.max(axis=1), 1 - right))


def _temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    from scipy.optimize import minimize_scalar

    def loss(logarithm: float) -> float:
        return heads.log_loss(labels, _scaled(probabilities, float(np.exp(logarithm))))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def _scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    from scipy.special import softmax

    return softmax(np.log(np.maximum(probabilities, 1e-12)) / temperature, axis=1)


def _each(probabilities: np.ndarray, threshold: float, temperature: float) -> dict[str, float]:
    return {
        THRESHOLDED: float((probabilities.max(axis=1) >= threshold).mean()),
        CALIBRATED: float(_scaled(probabilities, temperature).max(axis=1).mean()),
        CONFIDENCE: float(probabilities.max(axis=1).mean()),
    }
