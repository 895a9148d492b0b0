"""The head of a transfer model: logistic regression as scikit-learn has it, and cross-validation that leaks nothing."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from touchline.core.errors import TouchlineError
from touchline.models import heads
from touchline.models.heads import Head

EVEN = np.arange(60) % 2
ONE_GROUP_EACH = [str(number) for number in range(60)]


def separable(labels: np.ndarray, seed: int = 0, channels: int = 40) -> np.ndarray:
    """Features of which some tell the class, clearly: float32, shape (n, channels)."""
    random = np.random.default_rng(seed)
    rows = random.normal(3, 0.5, (len(labels), channels))
    rows[np.arange(len(labels)), labels] += 3
    return rows.astype(np.float32)


def head_of(rows: np.ndarray, labels: np.ndarray, strength: float, weights: np.ndarray | None = None) -> Head:
    [head] = heads.path(rows, labels, np.ones(len(labels)) if weights is None else weights, [strength])
    return head


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_that_features_tell_apart_are_learned(classes: int) -> None:
    labels = np.arange(60) % classes
    head = head_of(separable(labels), labels, 1.0)
    assert (head.weights.shape, head.bias.shape) == ((40, classes), (classes,))
    assert (head.weights.dtype, head.bias.dtype) == (np.float32, np.float32)
    probabilities = head.probabilities(separable(labels, seed=1))
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == labels).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_at_every_strength_weights_are_those_of_scikit_learn_on_rows_of_one_scale(classes: int) -> None:
    random, channels = np.random.default_rng(0), 40
    labels, spread = random.integers(0, classes, 2000), np.geomspace(1, 0.01, channels)
    told = random.normal(0, 0.1, (classes, channels))[labels]
    rows = np.maximum((random.standard_normal((2000, channels)) + told) * spread, 0).astype(np.float32)
    weights = np.where(labels == 0, 1.5, 0.75)
    # Strengths are meant for rows of variance 1 in 1,280 channels.
    scale = rows.std(dtype=np.float64) * np.sqrt(channels / 1280)
    scaled = (rows - rows.mean(axis=0, dtype=np.float64)) / scale
    strengths = [0.003, 0.1, 1.0]
    for strength, head in zip(strengths, heads.path(rows, labels, weights, strengths), strict=True):
        exact = LogisticRegression(C=strength, tol=1e-10, solver="newton-cholesky")
        exact.fit(scaled, labels, sample_weight=weights)
        expected = heads._of_every_class(exact)[0].T
        assert np.abs(head.weights * scale - expected).max() < 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(head.probabilities(rows), exact.predict_proba(scaled), atol=1e-5)


def test_the_unit_of_the_features_and_where_their_zero_lies_change_nothing() -> None:
    rows = separable(EVEN)
    first, second = (head_of(each, EVEN, 0.1).probabilities(each) for each in (rows, 8 * rows + 100))
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_a_channel_that_varies_little_is_not_made_to_shout() -> None:
    rows = separable(EVEN)
    quiet = rows.copy()
    quiet[:, :2] *= 0.001  # the two channels that tell the classes
    assert (head_of(rows, EVEN, 0.01).probabilities(rows).argmax(axis=1) == EVEN).all()
    unsure = head_of(quiet, EVEN, 0.01).probabilities(quiet)
    assert heads.log_loss(EVEN, unsure) > 10 * heads.log_loss(EVEN, head_of(rows, EVEN, 0.01).probabilities(rows))


def test_features_that_never_vary_say_how_common_a_class_is() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = head_of(np.full((4, 3), 5, np.float32), labels, 1.0).probabilities(np.full((2, 3), 5, np.float32))
    np.testing.assert_allclose(probabilities, [[0.75, 0.25]] * 2, atol=1e-3)


def test_what_counts_more_is_fitted_better() -> None:
    labels = np.arange(60) // 30
    rows = np.random.default_rng(0).normal(0, 1, (60, 4)).astype(np.float32)  # tell nothing
    weights = np.where(labels == 0, 1.8, 0.2)
    assert (head_of(rows, labels, 1e-4, weights).probabilities(rows)[:, 0] > 0.85).all()


def test_the_stronger_the_strength_the_closer_the_fit() -> None:
    rows = separable(EVEN)
    fitted = heads.path(rows, EVEN, np.ones(60), [0.001, 0.01, 0.1, 1.0])
    losses = [heads.log_loss(EVEN, head.probabilities(rows)) for head in fitted]
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]


def test_a_strength_gives_the_same_head_alone_and_after_others() -> None:
    rows = separable(EVEN)
    *_, after = heads.path(rows, EVEN, np.ones(60), [0.001, 0.01, 0.1])
    np.testing.assert_allclose(after.probabilities(rows), head_of(rows, EVEN, 0.1).probabilities(rows), atol=1e-3)


def of_groups() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Twelve groups of ten photos, all of one class, which features give away; the class itself nothing does."""
    number = np.repeat(np.arange(12), 10)
    rows = np.random.default_rng(0).normal(0, 0.1, (120, 12)).astype(np.float32)
    rows[np.arange(120), number] += 3
    return rows, number % 2, [f"author {one}" for one in number]


def test_cross_validation_keeps_a_group_together_so_that_knowing_it_is_no_help() -> None:
    rows, labels, groups = of_groups()

    def loss(told: list[str]) -> float:
        return heads.cross_validated(rows, labels, told, np.ones(120), [10.0], 3, 1)[0]

    # Each photo by itself: others of its author are learned from, and give it away.
    assert loss([str(number) for number in range(120)]) < 0.01
    # A guess is 0.69.
    assert loss(groups) > 0.6


def test_every_photo_is_left_out_once_and_no_group_stands_on_both_sides() -> None:
    _, labels, groups = of_groups()
    folds = list(heads._folds(labels, groups, 3, 1))
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(120))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(120))
        assert not {groups[place] for place in train} & {groups[place] for place in test}
        assert set(labels[train]) == set(labels[test]) == {0, 1}


@pytest.mark.parametrize("groups", [["all"] * 60, [f"of class {label}" for label in EVEN]], ids=["one", "one a class"])
def test_where_groups_are_too_few_photos_are_left_out_one_by_one(groups: list[str]) -> None:
    folds = list(heads._folds(EVEN, groups, 5, 1))
    assert len(folds) == 5 and all(set(EVEN[train]) == {0, 1} for train, _ in folds)
    [loss] = heads.cross_validated(separable(EVEN), EVEN, groups, np.ones(60), [1.0], 5, 1)
    assert loss < 0.1


def test_a_class_of_few_photos_makes_fewer_folds() -> None:
    labels = np.array([0] * 20 + [1] * 3)
    assert len(list(heads._folds(labels, [str(number) for number in range(23)], 5, 1))) == 3


def test_photos_that_are_left_out_are_judged_by_what_was_not_fitted_to_them() -> None:
    labels = np.random.default_rng(1).permutation(EVEN)
    rows = np.random.default_rng(0).normal(0, 1, (60, 200)).astype(np.float32)  # tell nothing, and can be learned
    weights = np.ones(60)
    [loss] = heads.cross_validated(rows, labels, ONE_GROUP_EACH, weights, [1.0], 5, 1)
    assert heads.log_loss(labels, head_of(rows, labels, 1.0).probabilities(rows)) < 0.01 and loss > 0.6


def test_each_strength_has_its_loss_and_the_seed_alone_decides_it() -> None:
    rows, labels, groups = of_groups()

    def losses(seed: int) -> list[float]:
        return heads.cross_validated(rows, labels, groups, np.ones(120), [0.001, 0.1, 10.0], 3, seed)

    first = losses(1)
    assert len(first) == 3 and first == losses(1) and first != losses(2)
    # Nothing can be known of the class here, so the more a head trusts its features, the worse.
    assert first == sorted(first)


def test_none_counts_all_photos_alike() -> None:
    np.testing.assert_array_equal(heads.balance(np.array([0, 0, 0, 1]), list("aabb"), "none"), [1, 1, 1, 1])


def test_class_counts_the_classes_alike() -> None:
    found = heads.balance(np.array([0, 0, 0, 1]), list("aabb"), "class")
    np.testing.assert_allclose(found, [2 / 3, 2 / 3, 2 / 3, 2])


def test_group_counts_the_classes_alike_and_a_group_as_the_root_of_its_photos() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    found = heads.balance(labels, list("aaaabaaa"), "group")
    # Four photos of author a count as two of author b's one, so all five as three; class 1 has one author.
    np.testing.assert_allclose(found, [2 / 3, 2 / 3, 2 / 3, 2 / 3, 4 / 3, 4 / 3, 4 / 3, 4 / 3])
    assert found.mean() == pytest.approx(1)
    assert found[labels == 0].sum() == pytest.approx(found[labels == 1].sum())


def test_log_loss_is_the_mean_of_minus_log_of_what_the_true_class_was_given() -> None:
    probabilities = np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    assert heads.log_loss(np.array([0, 1, 1]), probabilities) == pytest.approx(-np.log(0.5 * 0.8 * 0.1) / 3)
    assert heads.log_loss(np.array([0]), np.array([[0.0, 1.0]])) == pytest.approx(-np.log(1e-12))


def test_the_strength_that_is_chosen_states_its_confidence_better_than_the_largest() -> None:
    from touchline.models.scores import calibration_error

    random = np.random.default_rng(0)
    labels = np.arange(400) % 2
    # A tenth of the labels is wrong, so who is sure of all is wrong of his sureness.
    rows = random.normal(0, 1, (400, 100)).astype(np.float32)
    rows[:, 0] += 2 * labels
    given = np.where(random.random(400) < 0.1, 1 - labels, labels)
    learn, judge = slice(200), slice(200, None)
    strengths = [0.0001, 0.001, 0.01, 0.1, 10.0]
    groups = [str(number) for number in range(200)]
    losses = heads.cross_validated(rows[learn], given[learn], groups, np.ones(200), strengths, 5, 0)
    chosen, largest = (head_of(rows[learn], given[learn], strengths[n]) for n in (int(np.argmin(losses)), -1))
    errors = [calibration_error(given[judge], head.probabilities(rows[judge]), 10) for head in (chosen, largest)]
    assert errors[0] < errors[1] / 2


def test_a_class_of_one_photo_cannot_be_cross_validated() -> None:
    labels = np.array([0, 0, 0, 1])
    with pytest.raises(TouchlineError, match="needs 2 of each"):
        heads.cross_validated(np.eye(4, dtype=np.float32), labels, list("abcd"), np.ones(4), [0.1], 5, 0)
