"""Training on planted data: what the article got wrong stays right, and what cannot be trained on is an error."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from touchline import arrays, features, files, training
from touchline.arrays import Arrays
from touchline.errors import TouchlineError
from touchline.params import BackboneFeatures, CnnParams, HeadParams, Params, PixelFeatures
from touchline.paths import Paths
from touchline.training import Labelled, Trained

SIDE = 32
CHANNELS = 256  # of the backbone that the heads here stand on
RED, BLUE, GREEN = (200, 40, 40), (40, 40, 200), (40, 200, 40)
PIXELS = PixelFeatures(image_size=SIDE)
CNN = CnnParams(
    architecture="cnn",
    input="pixels",
    dropout=0.1,
    dense_units=8,
    augmentation={"rotation": 20, "zoom": 0.1, "shift": 0.1, "flip": True},
    learning_rate=0.003,
    batch_size=16,
    epochs=5,
    patience=5,
    seed=1,
)
HEAD = HeadParams(
    architecture="head",
    input="lite0",
    dropout=0.1,
    learning_rate=0.05,
    batch_size=16,
    epochs=8,
    patience=8,
    seed=1,
    fine_tune={"blocks": 0, "learning_rate": 0.001, "epochs": 2},
)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def coloured(labels: Sequence[int], seed: int, side: int = SIDE) -> np.ndarray:
    """Noisy photos, the first class red, then blue, then green: uint8, shape (n, side, side, 3)."""
    noise = np.random.default_rng(seed).normal(0, 40, (len(labels), side, side, 3))
    return (
        (np.array([(RED, BLUE, GREEN)[label] for label in labels])[:, None, None] + noise).clip(0, 255).astype(np.uint8)
    )


def keep(folder: Path, digests: Sequence[str], rows: np.ndarray) -> Arrays:
    place = {name: number for number, name in enumerate(digests)}

    def compute(wanted: Sequence[str]) -> Iterator[np.ndarray]:
        return (rows[place[name]] for name in wanted)

    arrays.update(folder, {}, digests, compute)
    return Arrays(folder)


def labelled(name: str, count: int, classes: int = 2, folder: Path = Path()) -> Labelled:
    digests = [digest(f"{name} {number}") for number in range(count)]
    return Labelled(digests, [folder / f"{one}.png" for one in digests], np.arange(count) % classes)


class Planted:
    """Photos that anything can tell apart, in arrays, for training and validation."""

    def __init__(self, folder: Path, classes: int = 2) -> None:
        self.train, self.validation = labelled("train", 96, classes), labelled("validation", 32, classes)
        self.photos = np.concatenate([coloured(self.train.labels, 1), coloured(self.validation.labels, 2)])
        self.arrays = keep(folder, [*self.train.digests, *self.validation.digests], self.photos)

    def fit(self, params: CnnParams = CNN) -> Trained:
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


@pytest.fixture(scope="module")
def planted_features(tmp_path_factory: pytest.TempPathFactory) -> tuple[Arrays, Labelled, Labelled]:
    """Two views of each photo in many channels, of which one tells the class."""
    train, validation = labelled("train", 96), labelled("validation", 32)
    rows = np.random.default_rng(0).normal(0, 0.1, (128, 2, CHANNELS)).astype(np.float32)
    rows[:, :, 7] += 3 * np.concatenate([train.labels, validation.labels])[:, None]
    return keep(tmp_path_factory.mktemp("vectors"), [*train.digests, *validation.digests], rows), train, validation


@pytest.fixture(scope="module")
def trained_head(backbone: BackboneFeatures, planted_features: tuple[Arrays, Labelled, Labelled]) -> Trained:
    return training.fit(HEAD, backbone, *planted_features, Path(), lambda row: None)


def accuracy(model: keras.Model, rows: np.ndarray, labels: np.ndarray) -> float:
    return float((model.predict(rows, verbose=0).argmax(axis=1) == labels).mean())


def test_the_simple_network_learns_red_from_blue(planted: Planted, trained_cnn: Trained) -> None:
    fresh = np.arange(40) % 2
    assert accuracy(trained_cnn.model, coloured(fresh, 9), fresh) > 0.95
    assert [row["epoch"] for row in trained_cnn.history] == list(range(len(trained_cnn.history)))
    assert set(trained_cnn.history[0]) == {"epoch", *training.METRICS.values()}


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


def test_the_loss_is_given_probabilities_and_class_numbers_and_knows_it(
    trained_cnn: Trained, trained_head: Trained
) -> None:
    for model in (trained_cnn.model, trained_head.model.get_layer("head")):
        # The article said from_logits=True of a softmax, and took BinaryCrossentropy for two softmax units.
        assert isinstance(model.loss, keras.losses.SparseCategoricalCrossentropy)
        assert model.loss.get_config()["from_logits"] is False


def test_the_loss_that_is_told_is_the_cross_entropy_of_the_right_class(planted: Planted, trained_cnn: Trained) -> None:
    probabilities = trained_cnn.model.predict(planted.photos[96:], verbose=0)
    expected = -np.log(probabilities[np.arange(32), planted.validation.labels]).mean()
    told = min(row["validation/loss"] for row in trained_cnn.history)
    # The model that is handed back is that of the best epoch, not of the last.
    assert expected == pytest.approx(told, rel=1e-3, abs=1e-5)


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

    monkeypatch.setattr(training, "augment", recording)
    planted.fit(CNN.model_copy(update={"epochs": 3}))
    # One photo is asked for once more, to learn the shape of a row.
    assert sorted(seen) == sorted([0, *list(range(96)) * 3])


def test_what_augmentation_makes_is_what_is_learned(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    # The article made an augmentation generator and gave `fit` the photos as they were. Here red and blue change
    # places in training photos alone, so a model that learned from these gets every validation photo wrong.
    monkeypatch.setattr(training, "augment", lambda photo, params, random: photo[..., ::-1])
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
        dataset = training._dataset(jittered, labels, 4, seed)
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
    dataset = training._dataset(lambda chosen, _: rows[chosen], planted.validation.labels, 12)
    for _ in range(2):
        parts = batches(dataset)
        np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), rows)
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), planted.validation.labels)


def test_a_loss_that_is_no_number_stops_training_with_a_hint(planted: Planted) -> None:
    with pytest.raises(TouchlineError, match="training cnn: the loss is no number any more: lower its learning_rate"):
        planted.fit(CNN.model_copy(update={"learning_rate": 1e30}))


def test_a_photo_without_a_row_is_an_error_not_left_out(planted: Planted) -> None:
    stranger = replace(planted.train, digests=[*planted.train.digests[:-1], digest("never seen")])
    with pytest.raises(TouchlineError, match=f"has no row for photo {digest('never seen')[:16]}"):
        training.fit(CNN, PIXELS, planted.arrays, stranger, planted.validation, Path(), lambda row: None)


def test_a_head_on_features_learns_and_comes_out_on_its_backbone(
    trained_head: Trained, backbone: BackboneFeatures, planted_features: tuple[Arrays, Labelled, Labelled]
) -> None:
    stored, _, validation = planted_features
    assert trained_head.history[-1]["validation/accuracy"] == 1.0

    model = trained_head.model
    assert (model.input_shape, model.inputs[0].dtype) == ((None, SIDE, SIDE, 3), "uint8")
    assert model.get_layer("mobilenet").trainable_weights == []
    # What is judged is the photo as it is, which is the first of the two views.
    head = model.get_layer("head")
    assert accuracy(head, stored[validation.digests][:, 0], validation.labels) == 1.0
    photo = coloured([0, 1], 3)
    pooled = next(features.pooled(iter(photo), backbone, Path()))[0]
    np.testing.assert_allclose(model(photo[:1]), head(pooled[None]), atol=1e-5)


def test_training_sees_either_view_and_validation_the_photo_as_it_is(
    backbone: BackboneFeatures, tmp_path: Path
) -> None:
    # The mirror images say the opposite of the photos: who sees both cannot learn, who is judged by them is wrong.
    train, validation = labelled("train", 96), labelled("validation", 32)
    rows = np.zeros((128, 2, CHANNELS), np.float32)
    sign = 2.0 * np.concatenate([train.labels, validation.labels]) - 1
    rows[:, 0, 0], rows[:, 1, 0] = sign, -sign
    stored = keep(tmp_path, [*train.digests, *validation.digests], rows)
    views = [training._one_view(stored[train.digests], np.random.default_rng(seed)) for seed in range(20)]
    as_it_is = np.mean([view[:, 0] == sign[:96] for view in views], axis=0)
    assert 0.4 < as_it_is.mean() < 0.6 and (as_it_is > 0).all() and (as_it_is < 1).all()

    trained = training.fit(HEAD, backbone, stored, train, validation, Path(), lambda row: None)
    assert all(row["train/accuracy"] < 0.8 for row in trained.history)
    # Validation would be as unsure if it were shown either view.
    assert trained.history[-1]["validation/accuracy"] in (0.0, 1.0)


class Tunable:
    """Real files, and a head that has hardly learned, so that fine-tuning has something left to gain."""

    def __init__(self, folder: Path, backbone: BackboneFeatures) -> None:
        self.backbone = backbone
        self.subsets = [labelled(name, count, folder=folder) for name, count in (("train", 48), ("validation", 16))]
        photos = np.concatenate([coloured(subset.labels, seed) for seed, subset in enumerate(self.subsets)])
        self.files = [path for subset in self.subsets for path in subset.files]
        for path, photo in zip(self.files, photos, strict=True):
            cv2.imwrite(str(path), photo[..., ::-1])
        rows = np.stack(list(features.pooled(iter(photos), backbone, Path())))
        self.arrays = keep(folder / "vectors", [digest for subset in self.subsets for digest in subset.digests], rows)
        self.frozen = self.fit(blocks=0, learning_rate=1.0)

    def fit(self, blocks: int, learning_rate: float) -> Trained:
        tuning = HEAD.fine_tune.model_copy(update={"blocks": blocks, "learning_rate": learning_rate})
        params = HEAD.model_copy(update={"epochs": 1, "learning_rate": 1e-6, "dropout": 0.0, "fine_tune": tuning})
        return training.fit(params, self.backbone, self.arrays, *self.subsets, Path(), lambda row: None)

    def changed_by(self, tuned: Trained) -> set[str]:
        """Names of the weights that are not what they were."""
        pairs = zip(self.frozen.model.weights, tuned.model.weights, strict=True)
        return {after.path for before, after in pairs if (before.numpy() != after.numpy()).any()}


@pytest.fixture(scope="module")
def tunable(backbone: BackboneFeatures, tmp_path_factory: pytest.TempPathFactory) -> Tunable:
    return Tunable(tmp_path_factory.mktemp("tunable"), backbone)


def test_fine_tuning_changes_the_last_blocks_and_no_batch_normalisation(tunable: Tunable) -> None:
    tuned = tunable.fit(blocks=2, learning_rate=0.001)
    assert [row["epoch"] for row in tuned.history] == [0, 1, 2]
    assert tuned.history[-1]["validation/loss"] < tuned.history[0]["validation/loss"]
    changed = {path for path in tunable.changed_by(tuned) if "probabilities" not in path}
    assert {path.split("/")[-2] for path in changed} == {"conv_dw_13", "conv_pw_13"}
    layers = tuned.model.get_layer("mobilenet").layers
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) == 27 and not any(layer.trainable for layer in norms)


def test_fine_tuning_that_does_not_help_is_undone(tunable: Tunable, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tunable.fit(blocks=2, learning_rate=50.0)
    assert tunable.changed_by(tuned) == set()
    assert "fine-tuning did not help" in capsys.readouterr().out


def test_fine_tuning_without_one_of_its_photos_is_an_error(tunable: Tunable) -> None:
    path = tunable.files[-1]
    content = path.read_bytes()
    path.write_bytes(content[:20])
    try:
        with pytest.raises(TouchlineError, match=f"{path.name} does not decode"):
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
    with pytest.raises(TouchlineError, match=r"1\.png does not decode"):
        features.run(paths, params, "pixels")


class Project:
    """A project as it is when `train` begins: a split and stored pixels, and no photo at all."""

    def __init__(self, root: Path, params_with: Callable[..., Params]) -> None:
        self.paths = Paths(root, root)
        cnn = CNN.model_copy(update={"epochs": 2}).model_dump()
        wild = cnn | {"learning_rate": 1e30}
        self.params = params_with(features={"pixels": {"image_size": SIDE}}, models={"cnn": cnn, "wild": wild})
        self.labels = np.arange(96) % 2
        self.split = pd.DataFrame(
            {
                "path": [f"data/photos/{number}.png" for number in range(96)],
                "class": [self.params.classes[label] for label in self.labels],
                "subset": ["train"] * 64 + ["validation"] * 16 + ["test"] * 16,
                "group": "",
                "sha256": [digest(str(number)) for number in range(96)],
            }
        )

    def give(self, subsets: Sequence[str]) -> None:
        """Store the pixels of some subsets, and those alone."""
        files.write_table(self.paths.split_table, self.split)
        there = self.split["subset"].isin(subsets).to_numpy()
        pixels = coloured(self.labels, 1)[there]
        keep(self.paths.features / "pixels", list(self.split.loc[there, "sha256"]), pixels)

    def train(self, name: str = "cnn") -> tuple[dict, pd.DataFrame]:
        training.run(self.paths, self.params, name)
        return files.read_json(self.paths.models / f"{name}.json"), files.read_table(
            self.paths.reports / f"history/{name}.csv"
        )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, params_with: Callable[..., Params]) -> Project:
    return Project(tmp_path_factory.mktemp("a project"), params_with)


def test_training_reads_no_test_photo_and_goes_the_same_without_any(project: Project) -> None:
    # The article stopped by its test photos.
    project.give(["train", "validation", "test"])
    _, history = project.train()
    project.give(["train", "validation"])
    record, without = project.train()
    pd.testing.assert_frame_equal(without, history)

    assert record["training_photos"] == sorted(project.split.loc[project.split["subset"] == "train", "sha256"])
    assert record["classes"] == project.params.classes and record["image_size"] == SIDE
    assert record["history"] == history.to_dict("records")
    saved = project.paths.models / "cnn.keras"
    assert record["model_sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert keras.saving.load_model(saved, safe_mode=True).input_shape == (None, SIDE, SIDE, 3)


def test_a_training_that_fails_leaves_no_model_and_no_half_file(project: Project) -> None:
    project.give(["train", "validation"])
    with pytest.raises(TouchlineError, match="lower its learning_rate"):
        project.train("wild")
    assert not [path for path in project.paths.workspace.rglob("*") if path.name.startswith((".partial", "wild"))]


def test_a_split_without_validation_photos_is_an_error(project: Project) -> None:
    only_train = project.split.assign(subset="train")
    with pytest.raises(TouchlineError, match=r"data/split\.csv has no photo in validation: run `dvc repro`"):
        Labelled.of(only_train, "validation", project.params.classes, project.paths.workspace)
