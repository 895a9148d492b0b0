"""How good a model is on photos whose class is known: the metrics, their intervals, and two models compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Answers:
    """A model's answers on photos whose class is known.

    Attributes:
        labels: the true classes, int64, shape (n,).
        probabilities: shape (n, classes).
        bins: of the calibration error.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    bins: int

    @cached_property
    def predicted(self) -> np.ndarray:
        """The most probable classes, int64, shape (n,)."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def exact(self) -> np.ndarray:
        """The probabilities as float64; scikit-learn wants rows that sum to one more exactly than float32 does."""
        exact = self.probabilities.astype(np.float64)
        return exact / exact.sum(axis=1, keepdims=True)

    @property
    def classes(self) -> list[int]:
        return list(range(self.probabilities.shape[1]))


def _accuracy(answers: Answers) -> float:
    return float((answers.predicted == answers.labels).mean())


def _balanced_accuracy(answers: Answers) -> float:
    from sklearn.metrics import balanced_accuracy_score

    return balanced_accuracy_score(answers.labels, answers.predicted)


def _f1(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    return f1_score(answers.labels, answers.predicted, average="macro")


def _roc_auc(answers: Answers) -> float:
    """One class against the rest, averaged over classes."""
    from sklearn.metrics import roc_auc_score

    found = answers.exact[:, 1] if len(answers.classes) == 2 else answers.exact
    return roc_auc_score(answers.labels, found, multi_class="ovr", labels=answers.classes)


def _log_loss(answers: Answers) -> float:
    from sklearn.metrics import log_loss

    return log_loss(answers.labels, answers.exact, labels=answers.classes)


def _calibration_error(answers: Answers) -> float:
    return calibration_error(answers.labels, answers.probabilities, answers.bins)


class Metric(NamedTuple):
    """How people call a metric, with its unit, and the function that computes it."""

    title: str
    of: Callable[[Answers], float]


# Every metric of a model on the test photos, by its name in reports/metrics.json and, after `test/`, in MLflow. The
# report, the tables and the registry's descriptions show all of them in this order; accuracy with its interval.
METRICS = {
    "accuracy": Metric("accuracy [95 % interval]", _accuracy),
    "balanced_accuracy": Metric("balanced accuracy", _balanced_accuracy),
    "f1": Metric("macro F1", _f1),
    "roc_auc": Metric("ROC-AUC", _roc_auc),
    "log_loss": Metric("log loss (nats)", _log_loss),
    "calibration_error": Metric("calibration error", _calibration_error),
}


def of(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> dict[str, float]:
    """Every metric of one model on one set of photos, and `accuracy_low` and `accuracy_high`, its Wilson interval.

    Args:
        labels: int64, shape (n,). probabilities: shape (n, classes). bins: of the calibration error.
    """
    answers = Answers(labels, probabilities, bins)
    found = {name: metric.of(answers) for name, metric in METRICS.items()}
    low, high = wilson(int((answers.predicted == labels).sum()), len(labels))
    found |= {"accuracy_low": low, "accuracy_high": high}
    return {name: round(float(value), 6) for name, value in found.items()}


def titles() -> list[str]:
    """The heads of the columns that `cells` fills."""
    return [metric.title for metric in METRICS.values()]


def cells(found: Mapping[str, float]) -> list[str]:
    """The metrics of one model (see `of`) as a row of a table."""
    # A run from before a metric was added lacks it.
    texts = {name: f"{found[name]:.3f}" if name in found else "" for name in METRICS}
    texts["accuracy"] += f" [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]"
    return list(texts.values())


def wilson(right: int, photos: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927), which stays within 0 and 1 for few photos too."""
    from scipy.stats import binomtest

    interval = binomtest(right, photos).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Share:
    """A count of photos, its share of `photos`, and Wilson's 95 % interval of the share."""

    count: int
    photos: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, photos: int) -> "Share":
        low, high = wilson(count, photos)
        return cls(count, photos, round(count / photos, 6), round(low, 6), round(high, 6))

    def __str__(self) -> str:
        return f"{self.share:.3f} [{self.low:.3f}, {self.high:.3f}] on {self.photos:,} photos"


def mcnemar(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """McNemar's exact test (1947): do two models differ on the same photos?

    Args:
        first, second: probabilities, shape (n, classes).

    Returns:
        photos that only the first, and only the second, got right; the two-sided p-value of so uneven a division.
    """
    from scipy.stats import binomtest

    first_right, second_right = (found.argmax(axis=1) == labels for found in (first, second))
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    differing = only_first + only_second
    p_value = binomtest(only_first, differing).pvalue if differing else 1.0
    return {"only_first_right": only_first, "only_second_right": only_second, "p_value": round(float(p_value), 6)}


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> float:
    """Expected calibration error (Guo et al., 2017): how far confidence and accuracy lie apart, over equal bins."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    number = np.clip((confidence * bins).astype(int), 0, bins - 1)
    gaps = [abs(right[number == each].mean() - confidence[number == each].mean()) * (number == each).mean()
            for each in np.unique(number)]  # fmt: skip
    return float(sum(gaps))
