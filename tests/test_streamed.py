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


@pytest.mark.parametrize(("classes", "strength"), [(2, 0.003), (2, 1.0), (4, 0.1), (4, 1.0)])
def test_its_weights_are_scikit_learns(classes: int, strength: float, tmp_path: Path) -> None:
    rows, labels, groups = features(classes)
    weights = heads.balance(labels, groups, "group")
    chosen, stand_for = heads.sample(labels, 400)
    assert 4 * classes < len(chosen) <= 400
    sample = rows[chosen], weights[chosen] * stand_for
    near = next(heads.path(sample[0], labels[chosen], sample[1], [strength]))
    head = heads.refined(near, stored(tmp_path, rows), labels, weights, strength, *sample)
    mean, scale = rows.mean(axis=0, dtype=np.float64), rows.std(dtype=np.float64) * np.sqrt(60 / 1280)
    # Its own tolerance, 1e-4, leaves more than 0.001 where rows are many and strengths large.
    exact = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10)
    exact.fit((rows - mean) / scale, labels, sample_weight=weights)
    coefficients, intercepts = heads._of_every_class(exact)
    np.testing.assert_allclose(head.weights * scale, coefficients.T, atol=1e-3)
    # A number added to the bias of every class changes no probability.
    bias = head.bias + mean @ head.weights
    np.testing.assert_allclose(bias - bias.mean(), intercepts - intercepts.mean(), atol=1e-3)
    assert np.abs((near.weights - head.weights) * scale).max() > 0.005  # a sample alone gives others


def test_a_sample_has_as_many_of_each_class_and_says_what_they_stand_for() -> None:
    labels = np.repeat([0, 1, 2], [1000, 100, 5])
    chosen, stand_for = heads.sample(labels, 300)
    assert np.bincount(labels[chosen]).tolist() == [100, 100, 5]
    assert [stand_for[labels[chosen] == label].sum() for label in range(3)] == [1000, 100, 5]
    everything, alone = heads.sample(labels, len(labels))
    assert (everything == np.arange(len(labels))).all()
    assert (alone == 1).all()


def test_features_that_never_vary_say_how_common_a_class_is(tmp_path: Path) -> None:
    labels, rows = np.array([0, 0, 0, 1]), np.full((4, 3), 5, np.float32)
    near = heads.Head(np.zeros((3, 2), np.float32), np.zeros(2, np.float32))
    head = heads.refined(near, stored(tmp_path, rows), labels, np.ones(4), 1.0, rows, np.ones(4))
    np.testing.assert_allclose(head.probabilities(rows), [[0.75, 0.25]] * 4, atol=1e-3)
