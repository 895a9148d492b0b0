"""Heads fitted in passes over stored rows are scikit-learn's, whatever the number of classes, folds and weights."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from touchline.data import feature_store
from touchline.data.feature_store import Stream
from touchline.models import heads

STRENGTHS = [0.003, 0.1, 1.0]


def stored(folder: Path, rows: np.ndarray) -> Stream:
    names = [sha256(str(number).encode()).hexdigest() for number in range(len(rows))]
    place = {name: number for number, name in enumerate(names)}

    def compute(wanted: Sequence[str]):
        # Another order than that of the photos asked for.
        return (rows[place[name]] for name in wanted)

    feature_store.update(folder, {}, names[::-1], compute)
    return feature_store.Arrays(folder).stream(names)


def features(classes: int, count: int = 1500, channels: int = 60) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows some of whose channels vary a hundred times as much as others, labels that they tell in part, and groups."""
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, count)
    rows = 2 + random.normal(0, 1, (count, channels)) * np.geomspace(3, 0.03, channels)
    rows += random.normal(0, 0.5, (classes, channels))[labels]
    return rows.astype(np.float32), labels, [f"author {number}" for number in random.integers(0, 90, count)]


@pytest.mark.parametrize("classes", [2, 4])
def test_its_weights_are_scikit_learns(classes: int, tmp_path: Path) -> None:
    rows, labels, groups = features(classes)
    weights = heads.balance(labels, groups, "group")
    found = heads.path(stored(tmp_path, rows), labels, weights, STRENGTHS)
    mean, scale = rows.mean(axis=0, dtype=np.float64), rows.std(dtype=np.float64) * np.sqrt(60 / 1280)
    for strength, head in zip(STRENGTHS, found, strict=True):
        # Its own tolerance, 1e-4, leaves more than 0.001 where rows are many and strengths large.
        exact = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10)
        exact.fit((rows - mean) / scale, labels, sample_weight=weights)
        coefficients, intercepts = heads._of_every_class(exact)
        np.testing.assert_allclose(head.weights * scale, coefficients.T, atol=1e-3)
        # A number added to the bias of every class changes no probability.
        bias = head.bias + mean @ head.weights
        np.testing.assert_allclose(bias - bias.mean(), intercepts - intercepts.mean(), atol=1e-3)


def test_what_was_left_out_is_judged_as_with_rows_in_memory(tmp_path: Path) -> None:
    rows, labels, groups = features(3)
    weights = heads.balance(labels, groups, "group")
    judged = [
        heads.out_of_fold(each, labels, groups, weights, STRENGTHS, 4, 0) for each in (rows, stored(tmp_path, rows))
    ]
    np.testing.assert_allclose(*judged, atol=2e-3)
    assert np.abs(judged[0][0] - judged[0][-1]).max() > 0.1


def test_features_that_never_vary_say_how_common_a_class_is(tmp_path: Path) -> None:
    labels = np.array([0, 0, 0, 1])
    rows = stored(tmp_path, np.full((4, 3), 5, np.float32))
    [head] = heads.path(rows, labels, np.ones(4), [1.0])
    np.testing.assert_allclose(head.probabilities(rows), [[0.75, 0.25]] * 4, atol=1e-3)
