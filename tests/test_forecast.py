"""The forecast: what it says of photos without labels, and how wrong it knows itself to be."""

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest

from touchline.core.params import HeadParams, Params
from touchline.models import forecast, heads
from touchline.models.forecast import METHODS, Forecaster


@pytest.fixture
def params(params_with: Callable[..., Params]) -> HeadParams:
    return next(model for model in params_with().models.values() if isinstance(model, HeadParams))


def made(groups: int, seed: int, *, harder: float = 0.0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows of two classes, 60 a group, each group moved by itself; `harder` brings the classes closer."""
    random = np.random.default_rng(seed)
    names = np.repeat(np.arange(groups), 60)
    labels = random.integers(0, 2, len(names))
    rows = random.normal(size=(len(names), 16)) + 0.4 * random.normal(size=(groups, 16))[names]
    rows[:, 0] += (1.2 - harder) * (2 * labels - 1)
    return rows.astype(np.float32), labels, [f"source-{name}" for name in names]


def test_it_is_near_the_accuracy_that_it_does_not_see_and_falls_with_it(params: HeadParams) -> None:
    rows, labels, groups = made(8, 0)
    forecaster = forecast.of_head(rows, labels, groups, 0.1, params)
    head = next(heads.path(rows, labels, heads.balance(labels, groups, "group"), [0.1]))
    said, true = [], []
    for harder in (0.0, 0.5, 0.9):
        new, truth, _ = made(6, 9, harder=harder)
        found = head.probabilities(new)
        said.append(forecaster.accuracy(found))
        true.append(float((found.argmax(axis=1) == truth).mean()))
    assert set(said[0]) >= {*METHODS, "give_or_take"} and 0 < said[0]["give_or_take"] < 0.1
    assert abs(said[0]["accuracy"] - true[0]) < 2 * said[0]["give_or_take"]
    # It falls by less than the accuracy does: a model knows only in part that photos are hard.
    assert said[0]["accuracy"] - 0.03 > said[1]["accuracy"] > said[2]["accuracy"] > true[2]


def test_its_margin_is_how_wrong_it_was_on_groups_that_were_left_out(params: HeadParams) -> None:
    rows, labels, groups = made(8, 0)
    forecaster = forecast.of_head(rows, labels, groups, 0.1, params)
    assert [part["photos"] for part in forecaster.left_out] == [60] * 8
    for method in METHODS:
        errors = [part[method] - part["accuracy"] for part in forecaster.left_out]
        assert forecaster.error(method) == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    # One source with its labels exchanged, that no other knows: it was wrong there, and says so.
    turned = np.where(np.array(groups) == "source-3", 1 - labels, labels)
    worse = forecast.of_head(rows, turned, groups, 0.1, params)
    assert worse.accuracy(np.full((5, 2), 0.5))["give_or_take"] > 0.2


def test_with_too_few_groups_to_know_how_wrong_it_is_there_is_none(params: HeadParams) -> None:
    for groups, expected in ((1, False), (2, False), (3, True)):
        rows, labels, names = made(groups, 1)
        assert (forecast.of_head(rows, labels, names, 0.1, params) is not None) == expected


def test_a_version_carries_it_in_a_tag_and_unknown_photos_are_no_part_of_it(params: HeadParams) -> None:
    rows, labels, groups = made(6, 3)
    forecaster = forecast.of_head(rows, labels, groups, 0.1, params)
    tags = {forecast.TAG: json.dumps(asdict(forecaster))}
    assert Forecaster.load(json.loads(json.dumps(tags))) == forecaster
    probabilities = np.array([[0.99, 0.01]] * 30 + [[0.5, 0.5]] * 10)
    unknown = np.arange(40) >= 30
    told = forecast.for_version(tags, probabilities, unknown)
    assert told["photos"] == 30 and told["unknown"] == 0.25
    assert told["accuracy"] == forecaster.accuracy(probabilities[:30])["accuracy"]
    assert f"{told['accuracy']:.2f}" in told["says"] and "25 %" in told["says"]
    for none in ({}, {forecast.TAG: "null"}):
        assert forecast.for_version(none, probabilities, unknown) is None
    assert forecast.for_version(tags, probabilities, np.ones(40, bool)) is None
