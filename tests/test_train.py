"""Training on planted data: what the article got wrong stays right, and what cannot be trained on is an error."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from touchline.core import files
from touchline.core.errors import TouchlineError
from touchline.core.params import ArticleParams, BackboneFeatures, CnnParams, HeadParams, Params, PixelFeatures
from touchline.core.paths import Paths
from touchline.data import feature_store
from touchline.data.feature_store import Arrays
from touchline.models import architectures, engines
from touchline.models import training as fitting
from touchline.models.heads import Head, log_loss
from touchline.models.training import Labelled, Trained
from touchline.stages import features
from touchline.stages import train as training

SIDE = 32
CHANNELS = 256  # of the backbone that the heads here stand on
RED, BLUE, GREEN = (200, 40, 40), (40, 40, 200), (40, 200, 40)
PIXELS = PixelFeatures(image_size=SIDE)
CNN = CnnParams(
    architecture="cnn",
    input="pixels",
    filters=[8, 16],
    dropout=0.1,
    augmentation={"rotation": 20, "zoom": 0.1, "shift": 0.1, "flip": True},
    learning_rate=0.01,
    weight_decay=0.01,
    batch_size=16,
    epochs=5,
    patience=5,
    seed=1,
)
ARTICLE = ArticleParams(
    **CNN.model_dump(exclude={"architecture", "filters", "convolutions", "weight_decay", "learning_rate"}),
    architecture="article",
    dense_units=8,
    learning_rate=0.003,
)
HEAD = HeadParams(
    architecture="head",
    input="pooled",
    strengths=[0.01, 0.1, 1.0],
    folds=4,
    balance="group",
    seed=1,
    fine_tune={"blocks": 0, "learning_rate": 0.001, "batch_size": 16, "epochs": 2, "patience": 2},
)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def coloured(labels: Sequence[int], seed: int, side: int = SIDE, noise: float = 40) -> np.ndarray:
    """Noisy photos, the first class red, then blue, then green: uint8, shape (n, side, side, 3)."""
    grain = np.random.default_rng(seed).normal(0, noise, (len(labels), side, side, 3))
    colours = np.array([(RED, BLUE, GREEN)[label] for label in labels])
    return (colours[:, None, None] + grain).clip(0, 255).astype(np.uint8)


def keep(folder: Path, digests: Sequence[str], rows: np.ndarray) -> Arrays:
    place = {name: number for number, name in enumerate(digests)}

    def compute(wanted: Sequence[str]) -> Iterator[np.ndarray]:
        return (rows[place[name]] for name in wanted)

    feature_store.update(folder, {}, digests, compute)
    return Arrays(folder)


def labelled(name: str, count: int, classes: int = 2, folder: Path = Path()) -> Labelled:
    """Photos of authors who took two of each class."""
    digests = [digest(f"{name} {number}") for number in range(count)]
    authors = [f"author {number // (2 * classes)} of {name}" for number in range(count)]
    return Labelled(digests, [folder / f"{one}.png" for one in digests], np.arange(count) % classes, authors)


class Planted:
    """Photos that anything can tell apart, in arrays, for training and validation."""

    def __init__(self, folder: Path, classes: int = 2) -> None:
        self.train, self.validation = labelled("train", 96, classes), labelled("validation", 32, classes)
        self.photos = np.concatenate([coloured(self.train.labels, 1), coloured(self.validation.labels, 2)])
        self.arrays = keep(folder, [*self.train.digests, *self.validation.digests], self.photos)

    def fit(self, params: CnnParams | ArticleParams = CNN) -> Trained:
        return training.fit(params, PIXELS, self.arrays, self.train, self.validation, Path(), lambda row: None)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("pixels"))


@pytest.fixture(scope="module")
def trained_cnn(planted: Planted) -> Trained:
    return planted.fit()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> BackboneFeatures:
    """The smallest MobileNet with weights of one's own, as a file gives them."""
    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNet((SIDE, SIDE, 3), alpha=0.25, include_top=False, weights=None)
    # Statistics of some photos, as training would have left them: without any, all features come out alike.
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    network(coloured([0, 1] * 16, 5) / 127.5 - 1, training=True)
    file = tmp_path_factory.mktemp("weights") / "own.weights.h5"
    network.save_weights(file)
    return BackboneFeatures(image_size=SIDE, backbone="mobilenet", alpha=0.25, views=2, weights=str(file))


class PlantedFeatures:
    """Features in many channels, of which one tells the class of training photos, and one that of validation photos."""

    def __init__(self, folder: Path, backbone: BackboneFeatures, train_channel: int, validation_channel: int) -> None:
        self.backbone = backbone
        self.train, self.validation = labelled("train", 96), labelled("validation", 32)
        rows = np.random.default_rng(0).normal(0, 0.1, (128, CHANNELS)).astype(np.float32)
        rows[:96, train_channel] += 3 * self.train.labels
        rows[96:, validation_channel] += 3 * self.validation.labels
        self.arrays = keep(folder, [*self.train.digests, *self.validation.digests], rows)

    def fit(self, params: HeadParams = HEAD, **others: Labelled) -> Trained:
        subsets = {"train": self.train, "validation": self.validation} | others
        return training.fit(params, self.backbone, self.arrays, **subsets, project=Path(), on_epoch=lambda row: None)


@pytest.fixture(scope="module")
def planted_features(tmp_path_factory: pytest.TempPathFactory, backbone: BackboneFeatures) -> PlantedFeatures:
    return PlantedFeatures(tmp_path_factory.mktemp("vectors"), backbone, train_channel=7, validation_channel=7)


@pytest.fixture(scope="module")
def trained_head(planted_features: PlantedFeatures) -> Trained:
    return planted_features.fit()


def head_of(trained: Trained) -> Head:
    return Head(*trained.model.get_layer("probabilities").get_weights())


def accuracy(model: keras.Model, rows: np.ndarray, labels: np.ndarray) -> float:
    return float((model.predict(rows, verbose=0).argmax(axis=1) == labels).mean())


def test_the_simple_network_learns_red_from_blue(planted: Planted, trained_cnn: Trained) -> None:
    fresh = np.arange(40) % 2
    assert accuracy(trained_cnn.model, coloured(fresh, 9), fresh) > 0.95
    assert [row["epoch"] for row in trained_cnn.history] == list(range(len(trained_cnn.history)))
    assert set(trained_cnn.history[0]) == {"epoch", *fitting.METRICS.values()}


@pytest.mark.parametrize("each", [1, 2])
def test_the_simple_network_halves_the_side_for_each_width_and_ends_in_a_mean(each: int) -> None:
    network = architectures.cnn(CNN.model_copy(update={"filters": [8, 16, 24], "convolutions": each}), 96, 3)
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    sides = [(layer.output.shape[1], layer.output.shape[-1]) for layer in convolutions]
    assert sides == [width for width in ((48, 8), (24, 16), (12, 24)) for _ in range(each)]
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in network.layers) == 3 * each
    assert not any(isinstance(layer, keras.layers.Flatten) for layer in network.layers)
    assert (network.input_shape, network.output_shape) == ((None, 96, 96, 3), (None, 3))


def test_the_deepest_network_takes_the_smallest_photos() -> None:
    assert architectures.cnn(CNN.model_copy(update={"filters": [4] * 5}), 32, 2).output_shape == (None, 2)


def test_a_saved_model_gives_the_same_probabilities_in_another_process(
    planted: Planted, trained_cnn: Trained, tmp_path: Path
) -> None:
    rows = planted.photos[96:]
    trained_cnn.model.save(tmp_path / "cnn.keras")
    np.save(tmp_path / "rows.npy", rows)
    program = (
        "import keras, numpy; model = keras.saving.load_model('cnn.keras', safe_mode=True);"
        "numpy.save('found.npy', model.predict(numpy.load('rows.npy'), verbose=0))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    expected = trained_cnn.model.predict(rows, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, rtol=1e-5, atol=1e-6)


def test_the_rate_ends_at_nothing_with_the_last_epoch_and_weight_decay_is_no_part_of_the_loss(
    trained_cnn: Trained,
) -> None:
    optimizer = trained_cnn.model.optimizer
    assert len(trained_cnn.history) == CNN.epochs and int(optimizer.iterations) == CNN.epochs * 6
    assert float(optimizer.learning_rate) == pytest.approx(0, abs=1e-8)
    assert isinstance(optimizer, keras.optimizers.AdamW) and optimizer.weight_decay == CNN.weight_decay
    assert not trained_cnn.model.losses


def test_the_rate_rises_for_a_fifth_of_the_steps_and_then_falls_to_nothing() -> None:
    optimizer = fitting.adam_w(CNN, 96)  # 5 epochs of 6 steps

    def rate(step: int) -> float:
        optimizer.iterations.assign(step)
        return float(optimizer.learning_rate)

    rates = [rate(step) for step in range(31)]
    assert 0 < rates[0] < CNN.learning_rate / 10 and rates[6] == pytest.approx(CNN.learning_rate)
    assert rates[:7] == sorted(rates[:7]) and rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[30] == pytest.approx(0, abs=1e-8)
    few = fitting.adam_w(CNN.model_copy(update={"epochs": 1}), 16)  # one step: none to rise over
    assert float(few.learning_rate) == pytest.approx(CNN.learning_rate)


def test_the_articles_network_is_still_there_with_its_constant_rate(planted: Planted) -> None:
    trained = planted.fit(ARTICLE)
    layers = [type(layer).__name__ for layer in trained.model.layers[2:]]
    assert layers == ["Conv2D", "MaxPooling2D"] * 3 + ["Dropout", "Flatten", "Dense", "Dense"]
    assert type(trained.model.optimizer) is keras.optimizers.Adam
    assert float(trained.model.optimizer.learning_rate) == pytest.approx(ARTICLE.learning_rate)
    fresh = np.arange(40) % 2
    assert accuracy(trained.model, coloured(fresh, 9), fresh) > 0.95


def test_three_classes_are_learned_as_well(tmp_path: Path) -> None:
    planted = Planted(tmp_path, classes=3)
    trained = planted.fit(CNN.model_copy(update={"epochs": 6}))
    assert trained.model.output_shape == (None, 3)
    fresh = np.arange(60) % 3
    assert accuracy(trained.model, coloured(fresh, 9), fresh) > 0.95


def test_a_model_takes_photos_as_they_are_stored_and_gives_probabilities(
    planted: Planted, trained_cnn: Trained
) -> None:
    # The article reshaped its photos and threw the result away.
    stored = planted.arrays[planted.train.digests[:5]]
    assert trained_cnn.model.input_shape == (None, *stored.shape[1:])
    assert (trained_cnn.model.inputs[0].dtype, stored.dtype) == ("uint8", np.uint8)
    probabilities = trained_cnn.model(stored).numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert trained_cnn.model.layers[-1].activation is keras.activations.softmax


def test_the_loss_is_given_probabilities_and_class_numbers_and_knows_it(trained_cnn: Trained, tuned: Trained) -> None:
    for model in (trained_cnn.model, tuned.model):
        # The article said from_logits=True of a softmax, and took BinaryCrossentropy for two softmax units.
        assert isinstance(model.loss, keras.losses.SparseCategoricalCrossentropy)
        assert model.loss.get_config()["from_logits"] is False


def test_the_loss_that_is_told_is_the_cross_entropy_of_the_right_class(planted: Planted, trained_cnn: Trained) -> None:
    probabilities = trained_cnn.model.predict(planted.photos[96:], verbose=0)
    expected = -np.log(probabilities[np.arange(32), planted.validation.labels]).mean()
    told = [row["validation/loss"] for row in trained_cnn.history]
    # The model that is handed back is that of the best epoch, not of the last.
    assert expected == pytest.approx(min(told), rel=1e-3, abs=1e-5)
    assert told[trained_cnn.kept] == min(told)
    assert trained_cnn.learned_from is planted.train


def test_without_patience_all_epochs_run_and_the_last_weights_stay(planted: Planted) -> None:
    # Validation that is labelled the other way round likes the first epoch best, and stops a training with patience.
    contrary = replace(planted.validation, labels=1 - planted.validation.labels)
    settings = ARTICLE.model_copy(update={"patience": 1})
    stopped, whole = (
        training.fit(params, PIXELS, planted.arrays, planted.train, contrary, Path(), lambda row: None)
        for params in (settings, settings.model_copy(update={"patience": 0}))
    )
    assert len(stopped.history) < len(whole.history) == ARTICLE.epochs
    told = [row["validation/loss"] for row in whole.history]
    assert whole.kept == ARTICLE.epochs - 1 and told[-1] > min(told)
    probabilities = whole.model.predict(planted.photos[96:], verbose=0)
    expected = -np.log(probabilities[np.arange(32), contrary.labels]).mean()
    assert expected == pytest.approx(told[-1], rel=1e-3)


def test_the_same_seed_gives_the_same_history(planted: Planted, trained_cnn: Trained) -> None:
    again, other = planted.fit(), planted.fit(CNN.model_copy(update={"seed": 2, "epochs": 1}))
    assert again.history == trained_cnn.history
    assert other.history[0] != trained_cnn.history[0]


def test_every_training_photo_is_augmented_each_epoch_and_no_validation_photo_ever(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {photo.tobytes(): number for number, photo in enumerate(planted.photos)}
    seen: list[int] = []

    def recording(photo: np.ndarray, params: object, random: np.random.Generator) -> np.ndarray:
        seen.append(numbers[photo.tobytes()])
        return photo

    monkeypatch.setattr(fitting, "augment", recording)
    planted.fit(CNN.model_copy(update={"epochs": 3}))
    # One photo is asked for once more, to learn the shape of a row.
    assert sorted(seen) == sorted([0, *list(range(96)) * 3])


def test_what_augmentation_makes_is_what_is_learned(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    # The article made an augmentation generator and gave `fit` the photos as they were. Here red and blue change
    # places in training photos alone, so a model that learned from these gets every validation photo wrong.
    monkeypatch.setattr(fitting, "augment", lambda photo, params, random: photo[..., ::-1])
    trained = planted.fit(CNN.model_copy(update={"epochs": 3}))
    assert trained.history[-1]["train/accuracy"] > 0.95
    assert trained.history[-1]["validation/accuracy"] < 0.05


def batches(dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(rows.numpy(), labels.numpy()) for rows, labels in dataset]


def test_training_rows_are_shuffled_and_changed_anew_each_epoch_by_the_seed_alone() -> None:
    labels = np.arange(10)

    def jittered(chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return chosen[:, None] + random.random((len(chosen), 1))

    def two_epochs(seed: int) -> list[np.ndarray]:
        dataset = fitting.dataset(jittered, labels, 4, seed)
        assert int(dataset.cardinality()) == 3
        epochs = []
        for _ in range(2):
            parts = batches(dataset)
            rows, found = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
            np.testing.assert_array_equal(rows[:, 0].astype(int), found)  # a label stays with its row
            np.testing.assert_array_equal(np.sort(found), labels)
            epochs.append(rows)
        return epochs

    first, again, other = two_epochs(1), two_epochs(1), two_epochs(2)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and (first[0] != other[0]).any()
    assert (np.sort(first[0], axis=0) != np.sort(first[1], axis=0)).all()


def test_validation_rows_are_the_same_each_epoch_in_their_order(planted: Planted) -> None:
    rows = planted.photos[96:]
    dataset = fitting.dataset(lambda chosen, _: rows[chosen], planted.validation.labels, 12)
    for _ in range(2):
        parts = batches(dataset)
        np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), rows)
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), planted.validation.labels)


def test_a_loss_that_is_no_number_stops_training_with_a_hint(planted: Planted) -> None:
    with pytest.raises(TouchlineError, match=r"cnn.*learning_rate"):
        planted.fit(CNN.model_copy(update={"learning_rate": 1e30}))


def test_features_that_are_no_numbers_stop_a_head_with_a_hint(
    planted_features: PlantedFeatures, tmp_path: Path
) -> None:
    train, validation = planted_features.train, planted_features.validation
    digests = [*train.digests, *validation.digests]
    rows = planted_features.arrays[digests]
    rows[3, 7] = np.nan
    stored = keep(tmp_path, digests, rows)
    with pytest.raises(TouchlineError, match="`dvc repro`"):
        training.fit(HEAD, planted_features.backbone, stored, train, validation, Path(), lambda row: None)


def test_a_photo_without_a_row_is_an_error_not_left_out(planted: Planted) -> None:
    stranger = replace(planted.train, digests=[*planted.train.digests[:-1], digest("never seen")])
    with pytest.raises(TouchlineError, match=digest("never seen")[:16]):
        training.fit(CNN, PIXELS, planted.arrays, stranger, planted.validation, Path(), lambda row: None)


def test_a_head_on_features_learns_and_comes_out_on_its_backbone(
    trained_head: Trained, planted_features: PlantedFeatures
) -> None:
    validation = planted_features.validation
    assert trained_head.history[trained_head.kept]["validation/accuracy"] == 1.0
    rows = planted_features.arrays[validation.digests]
    assert (head_of(trained_head).probabilities(rows).argmax(axis=1) == validation.labels).all()

    model = trained_head.model
    assert (model.input_shape, model.inputs[0].dtype) == ((None, SIDE, SIDE, 3), "uint8")
    assert model.output_shape == (None, 2)
    assert model.get_layer("mobilenet").trainable_weights == []


def test_the_whole_model_gives_the_heads_probabilities_on_what_the_features_stage_stores(
    trained_head: Trained, backbone: BackboneFeatures
) -> None:
    photos = coloured([0, 1, 0], 3)
    stored = np.stack(list(features.pooled(iter(photos), backbone, Path())))
    assert (stored.shape, stored.dtype) == ((3, CHANNELS), np.float32)
    expected = head_of(trained_head).probabilities(stored)
    np.testing.assert_allclose(trained_head.model(photos), expected, atol=1e-5)


def test_with_two_views_a_row_is_the_mean_and_a_mirror_image_is_judged_as_its_photo(
    trained_head: Trained, backbone: BackboneFeatures
) -> None:
    photos = coloured([0, 1, 0], 3)

    def rows(images: np.ndarray, views: int) -> np.ndarray:
        return np.stack(list(features.pooled(iter(images), backbone.model_copy(update={"views": views}), Path())))

    as_they_are, mirrored = rows(photos, 1), rows(photos[:, :, ::-1], 1)
    assert np.abs(as_they_are - mirrored).max() > 1e-3
    np.testing.assert_allclose(rows(photos, 2), (as_they_are + mirrored) / 2, atol=1e-5)
    model = trained_head.model
    np.testing.assert_allclose(model(photos), model(photos[:, :, ::-1]), atol=1e-5)


def test_each_strength_is_a_row_of_the_history(trained_head: Trained) -> None:
    names = {"epoch", "strength", "cross_validation/loss", *fitting.METRICS.values()}
    assert [set(row) for row in trained_head.history] == [names] * 3
    assert [(row["epoch"], row["strength"]) for row in trained_head.history] == [(0, 0.01), (1, 0.1), (2, 1.0)]
    losses = [row["train/loss"] for row in trained_head.history]
    assert losses == sorted(losses, reverse=True)


def test_the_strength_is_chosen_by_the_training_photos_alone(
    trained_head: Trained, planted_features: PlantedFeatures
) -> None:
    # Validation that is labelled the other way round likes the weakest strength best, since it errs least.
    validation = planted_features.validation
    contrary = planted_features.fit(validation=replace(validation, labels=1 - validation.labels))
    by_validation = [row["validation/loss"] for row in contrary.history]
    assert by_validation.index(min(by_validation)) == 0
    by_cross_validation = [row["cross_validation/loss"] for row in contrary.history]
    assert contrary.kept == trained_head.kept == by_cross_validation.index(min(by_cross_validation)) == 2


def test_validation_judges_the_head_of_the_training_photos_and_the_head_that_is_saved_knows_both(
    backbone: BackboneFeatures, tmp_path: Path
) -> None:
    # What tells the class of a validation photo is nothing that training photos show.
    planted = PlantedFeatures(tmp_path, backbone, train_channel=7, validation_channel=3)
    trained = planted.fit()
    assert trained.history[trained.kept]["train/accuracy"] == 1.0
    assert trained.history[trained.kept]["validation/accuracy"] < 0.8

    rows = planted.arrays[planted.validation.digests]
    assert (head_of(trained).probabilities(rows).argmax(axis=1) == planted.validation.labels).all()
    both = trained.learned_from
    assert both.digests == [*planted.train.digests, *planted.validation.digests]
    assert both.files == [*planted.train.files, *planted.validation.files]
    assert both.groups == [*planted.train.groups, *planted.validation.groups]
    assert both.labels.tolist() == [*planted.train.labels, *planted.validation.labels]


def test_a_head_is_the_same_each_time(trained_head: Trained, planted_features: PlantedFeatures) -> None:
    again = planted_features.fit()
    assert again.history == trained_head.history
    np.testing.assert_array_equal(head_of(again).weights, head_of(trained_head).weights)


def test_a_head_brings_what_forecasts_its_accuracy_and_a_network_does_not(
    planted_features: PlantedFeatures, trained_cnn: Trained
) -> None:
    of_four = replace(planted_features.train, groups=[f"source-{number // 24}" for number in range(96)])
    forecaster = planted_features.fit(train=of_four).forecast()
    assert forecaster and [part["photos"] for part in forecaster.left_out] == [24] * 4
    assert trained_cnn.forecast() is None


def test_a_head_of_more_rows_than_are_held_is_the_same(
    trained_head: Trained, planted_features: PlantedFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = len(planted_features.train.labels) // 2
    monkeypatch.setattr(architectures, "_HELD", held * planted_features.arrays.row_shape[0])
    strength = trained_head.history[trained_head.kept]["strength"]
    streamed = planted_features.fit(HEAD.model_copy(update={"strengths": [strength]}))
    rows = planted_features.arrays[planted_features.validation.digests]
    found, expected = (head_of(each).probabilities(rows) for each in (streamed, trained_head))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (head_of(streamed).weights != head_of(trained_head).weights).any()  # another solver made them
    after, before = streamed.history[0], trained_head.history[trained_head.kept]
    for name in ("train/loss", "validation/loss", "train/accuracy", "validation/accuracy"):
        assert after[name] == pytest.approx(before[name], abs=2e-3), name
    assert after["cross_validation/loss"] != pytest.approx(before["cross_validation/loss"], abs=1e-5)  # of a sample


def test_balance_changes_what_a_head_learns(trained_head: Trained, planted_features: PlantedFeatures) -> None:
    # Of the first class, one in four is left.
    chosen = [number for number, label in enumerate(planted_features.train.labels) if label == 1 or number % 8 == 0]
    train = planted_features.train
    few = Labelled(
        *([part[number] for number in chosen] for part in (train.digests, train.files)),
        train.labels[chosen],
        [train.groups[number] for number in chosen],
    )

    def mean_of_the_first_class(balance: str) -> float:
        trained = planted_features.fit(HEAD.model_copy(update={"balance": balance, "strengths": [1e-4]}), train=few)
        rows = planted_features.arrays[planted_features.validation.digests]
        return float(head_of(trained).probabilities(rows)[:, 0].mean())

    assert mean_of_the_first_class("none") < 0.4 < mean_of_the_first_class("class")


class Tunable:
    """Real files, and a head that has hardly learned, so that fine-tuning has something left to gain."""

    def __init__(self, folder: Path, backbone: BackboneFeatures) -> None:
        self.backbone = backbone
        self.subsets = [labelled(name, count, folder=folder) for name, count in (("train", 48), ("validation", 16))]
        photos = np.concatenate([coloured(subset.labels, seed, noise=5) for seed, subset in enumerate(self.subsets)])
        self.files = [path for subset in self.subsets for path in subset.files]
        for path, photo in zip(self.files, photos, strict=True):
            cv2.imwrite(str(path), photo[..., ::-1])
        rows = np.stack(list(features.pooled(iter(photos), backbone, Path())))
        self.arrays = keep(folder / "vectors", [digest for subset in self.subsets for digest in subset.digests], rows)
        self.frozen = self.fit(blocks=0, learning_rate=1.0)

    def fit(self, blocks: int, learning_rate: float) -> Trained:
        tuning = HEAD.fine_tune.model_copy(update={"blocks": blocks, "learning_rate": learning_rate})
        params = HEAD.model_copy(update={"strengths": [1e-4], "fine_tune": tuning})
        return training.fit(params, self.backbone, self.arrays, *self.subsets, Path(), lambda row: None)

    def changed_by(self, tuned: Trained) -> set[str]:
        """Names of the weights that are not what they were."""
        pairs = zip(self.frozen.model.weights, tuned.model.weights, strict=True)
        return {after.path for before, after in pairs if (before.numpy() != after.numpy()).any()}


@pytest.fixture(scope="module")
def tunable(backbone: BackboneFeatures, tmp_path_factory: pytest.TempPathFactory) -> Tunable:
    return Tunable(tmp_path_factory.mktemp("tunable"), backbone)


@pytest.fixture(scope="module")
def tuned(tunable: Tunable) -> Trained:
    return tunable.fit(blocks=2, learning_rate=0.001)


def test_fine_tuning_changes_the_last_blocks_and_no_batch_normalisation(tunable: Tunable, tuned: Trained) -> None:
    changed = {path for path in tunable.changed_by(tuned) if "probabilities" not in path}
    assert {path.split("/")[-2] for path in changed} == {"conv_dw_13", "conv_pw_13"}
    layers = tuned.model.get_layer("mobilenet").layers
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) == 27 and not any(layer.trainable for layer in norms)


def test_fine_tuning_that_helps_is_kept_with_its_best_epoch(tunable: Tunable, tuned: Trained) -> None:
    assert [row["epoch"] for row in tuned.history] == [0, 1, 2]
    frozen, *epochs = tuned.history
    assert frozen == tunable.frozen.history[0] and "strength" in frozen
    assert [set(row) for row in epochs] == [{"epoch", *fitting.METRICS.values()}] * 2
    least = min(row["validation/loss"] for row in tuned.history)
    assert tuned.kept > 0 and tuned.history[tuned.kept]["validation/loss"] == least < frozen["validation/loss"]
    # Validation has stopped it, so it is not learned from as well.
    assert tuned.learned_from is tunable.subsets[0]

    validation = tunable.subsets[1]
    photos = coloured(validation.labels, 1, noise=5)
    assert log_loss(validation.labels, tuned.model.predict(photos, verbose=0)) == pytest.approx(least, rel=1e-3)


@dataclass(frozen=True)
class Undone:
    """A fine-tuning that did not help.

    Attributes:
        heads: those that a model was built with, in turn.
        note: the line about it.
    """

    trained: Trained
    heads: list[Head]
    note: str


@pytest.fixture(scope="module")
def undone(tunable: Tunable) -> Undone:
    heads: list[Head] = []
    build = architectures.transfer

    def recording(head: Head, *others: object) -> keras.Model:
        heads.append(head)
        return build(head, *others)

    with patch.object(architectures, "transfer", recording), redirect_stdout(StringIO()) as out:
        trained = tunable.fit(blocks=2, learning_rate=50.0)
        assert trained.model  # it is built when it is asked for
    [note] = [line for line in out.getvalue().splitlines() if "fine-tuning" in line]
    return Undone(trained, heads, note)


def test_fine_tuning_that_does_not_help_is_undone(tunable: Tunable, undone: Undone) -> None:
    trained = undone.trained
    # The head as well is that which is taken where nothing is tuned: fitted to validation photos too.
    assert tunable.changed_by(trained) == set()
    assert len(trained.history) > 1 and trained.kept == 0
    assert trained.learned_from.digests == tunable.frozen.learned_from.digests
    assert set(tunable.subsets[1].digests) < set(trained.learned_from.digests)
    frozen, *epochs = (row["validation/loss"] for row in trained.history)
    told = sorted(float(number) for number in re.findall(r"\d+\.\d{4}\b", undone.note))
    assert told == pytest.approx([frozen, min(epochs)], rel=1e-3, abs=1e-3)


def test_fine_tuning_starts_from_the_head_that_has_seen_no_validation_photo(tunable: Tunable, undone: Undone) -> None:
    finished = head_of(undone.trained)
    first, last = undone.heads
    validation = tunable.subsets[1]
    rows = tunable.arrays[validation.digests]
    told = undone.trained.history[0]["validation/loss"]
    assert log_loss(validation.labels, first.probabilities(rows)) == pytest.approx(told, abs=1e-6)
    assert (first.weights != last.weights).any()
    np.testing.assert_array_equal(last.weights, finished.weights)


def test_fine_tuning_without_one_of_its_photos_is_an_error(tunable: Tunable) -> None:
    path = tunable.files[-1]
    content = path.read_bytes()
    path.write_bytes(content[:20])
    try:
        with pytest.raises(TouchlineError, match=re.escape(path.name)):
            tunable.fit(blocks=1, learning_rate=0.001)
    finally:
        path.write_bytes(content)


def test_a_photo_that_does_not_read_is_an_error_not_dropped(paths: Paths, params_with: Callable[..., Params]) -> None:
    rows = []
    for number, photo in enumerate(coloured([0, 1, 0], 1)):
        path = paths.photos / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), photo)
        rows.append((paths.relative(path), digest(str(number))))
    files.write_table(paths.validated_table, pd.DataFrame(rows, columns=["path", "sha256"]))
    (paths.photos / "1.png").write_bytes(b"torn")
    params = params_with(features={"pixels": {"image_size": SIDE}}, models={"cnn": CNN.model_dump()})
    with pytest.raises(TouchlineError, match=r"1\.png"):
        features.run(paths, params, "pixels")


class Project:
    """A project as it is when `train` begins: a split, stored pixels and features, and photos of one colour."""

    def __init__(self, root: Path, params_with: Callable[..., Params], backbone: BackboneFeatures) -> None:
        self.paths = Paths(root, root)
        cnn = CNN.model_copy(update={"epochs": 2}).model_dump()
        wild = cnn | {"learning_rate": 1e30}
        self.params = params_with(
            features={"pixels": {"image_size": SIDE}, "pooled": backbone.model_dump()},
            models={"cnn": cnn, "wild": wild, "transfer": HEAD.model_dump()},
        )
        self.labels = np.arange(96) % 2
        self.split = pd.DataFrame(
            {
                "path": [f"data/photos/{number}.png" for number in range(96)],
                "class": [self.params.classes[label] for label in self.labels],
                "subset": ["train"] * 64 + ["validation"] * 16 + ["test"] * 16,
                "group": [f"author {number // 4}" for number in range(96)],
                "sha256": [digest(str(number)) for number in range(96)],
            }
        )

    def give(self, subsets: Sequence[str]) -> None:
        """Store the pixels and the features of some subsets, and those alone."""
        files.write_table(self.paths.split_table, self.split)
        for name, image in zip(self.split["path"], coloured(self.labels, 1), strict=True):
            (self.paths.workspace / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(self.paths.workspace / name), image)
        there = self.split["subset"].isin(subsets).to_numpy()
        vectors = np.random.default_rng(0).normal(0, 0.1, (96, CHANNELS)).astype(np.float32)
        vectors[:, 7] += self.labels
        for name, rows in (("pixels", coloured(self.labels, 1)), ("pooled", vectors)):
            keep(self.paths.features / name, list(self.split.loc[there, "sha256"]), rows[there])

    def train(self, name: str = "cnn") -> tuple[dict, pd.DataFrame]:
        # The planted head reads one channel with a large weight, so the last digits of the two engines' features show.
        with patch.object(engines, "TOLERANCE", 1e-3):
            training.run(self.paths, self.params, name)
        return files.read_json(self.paths.models / f"{name}.json"), files.read_table(
            self.paths.reports / f"history/{name}.csv"
        )


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, params_with: Callable[..., Params], backbone: BackboneFeatures
) -> Project:
    return Project(tmp_path_factory.mktemp("a project"), params_with, backbone)


@pytest.fixture(scope="module")
def trainings(project: Project) -> dict[str, tuple[dict, pd.DataFrame]]:
    """Record and history of each model, trained where there is no test photo."""
    project.give(["train", "validation"])
    return {name: project.train(name) for name in ("cnn", "transfer")}


@pytest.mark.parametrize("name, learned_from", [("cnn", ["train"]), ("transfer", ["train", "validation"])])
def test_training_reads_no_test_photo_and_goes_the_same_without_any(
    project: Project, trainings: dict[str, tuple[dict, pd.DataFrame]], name: str, learned_from: list[str]
) -> None:
    _, without = trainings[name]
    # The article stopped by its test photos.
    project.give(["train", "validation", "test"])
    record, history = project.train(name)
    pd.testing.assert_frame_equal(without, history)

    assert record["training_photos"] == sorted(project.split.loc[project.split["subset"].isin(learned_from), "sha256"])
    assert record["classes"] == project.params.classes and record["image_size"] == SIDE
    assert record["history"] == history.drop(columns="kept").to_dict("records")
    saved = project.paths.models / f"{name}.keras"
    assert record["model_sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert keras.saving.load_model(saved, safe_mode=True).input_shape == (None, SIDE, SIDE, 3)


@pytest.mark.parametrize("name, by", [("cnn", "validation/loss"), ("transfer", "cross_validation/loss")])
def test_one_row_of_the_history_is_marked_as_kept_and_its_metrics_are_the_models(
    trainings: dict[str, tuple[dict, pd.DataFrame]], name: str, by: str
) -> None:
    record, history = trainings[name]
    assert sorted(history["kept"]) == [0] * (len(history) - 1) + [1]
    [kept] = history[history["kept"] == 1].to_dict("records")
    assert kept[by] == history[by].min()
    metrics = {metric: value for metric, value in kept.items() if metric not in ("epoch", "kept")}
    others = {"seconds/train", "epochs"} if name == "cnn" else {"seconds/train"}
    assert {metric: record["metrics"][metric] for metric in metrics} == metrics
    assert set(record["metrics"]) == set(metrics) | others


def test_a_tuned_models_epochs_are_those_of_the_tuning(
    project: Project, trained_cnn: Trained, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"epoch": number, **dict.fromkeys(fitting.METRICS.values(), 0.5)} for number in range(3)]
    project.give(["train", "validation"])
    photos = [project.paths.workspace / name for name in project.split["path"][: len(planted.train.files)]]
    learned_from = replace(planted.train, files=photos)
    tuned = Trained(lambda: trained_cnn.model, [rows[0] | {"strength": 0.1}, *rows[1:]], 2, learned_from)
    monkeypatch.setattr(training, "fit", lambda *_: tuned)
    record, history = project.train("transfer")
    assert record["metrics"]["epochs"] == 2 and "strength" not in record["metrics"]
    assert history["kept"].tolist() == [0, 0, 1]


def test_a_training_that_fails_leaves_no_model_and_no_half_file(project: Project) -> None:
    project.give(["train", "validation"])
    with pytest.raises(TouchlineError, match="learning_rate"):
        project.train("wild")
    assert not [path for path in project.paths.workspace.rglob("*") if path.name.startswith((".partial", "wild"))]


def test_a_split_without_validation_photos_is_an_error(project: Project) -> None:
    only_train = project.split.assign(subset="train")
    with pytest.raises(TouchlineError, match=r"data/split\.csv.*validation.*`dvc repro`"):
        Labelled.of(only_train, "validation", project.params.classes, project.paths.workspace)
