"""What is said of a model on photos whose class is known: shares with their intervals, and the difference of two."""

import numpy as np

CONFIDENCE = 0.95


def of(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> dict[str, float]:
    """What is said of one model on one set of photos.

    Args:
        labels: int64, shape (n,). probabilities: shape (n, classes).

    Returns:
        accuracy with its Wilson interval at 95 %, balanced accuracy, macro F1, ROC-AUC (one class against the rest,
        averaged over classes), log loss (nats) and expected calibration error.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score

    predicted = probabilities.argmax(axis=1)
    every = list(range(probabilities.shape[1]))
    low, high = wilson(int((predicted == labels).sum()), len(labels))
    # scikit-learn wants rows that sum to one more exactly than float32 does.
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    auc = roc_auc_score(labels, exact[:, 1] if len(every) == 2 else exact, multi_class="ovr", labels=every)
    found = {
        "accuracy": (predicted == labels).mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, average="macro"),
        "roc_auc": auc,
        "log_loss": log_loss(labels, exact, labels=every),
        "calibration_error": calibration_error(labels, probabilities, bins),
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def wilson(right: int, photos: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927), which stays within 0 and 1 for few photos too."""
    from scipy.stats import binomtest

    interval = binomtest(right, photos).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


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
