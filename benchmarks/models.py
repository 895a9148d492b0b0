"""What the models cost and can do, beside what a user would pick instead: same photos, same splits, same machine.

    python benchmarks/models.py table --photos DIR      the table; DIR holds manifest.csv (file, class, group)
    python benchmarks/models.py predict --photos DIR    photos a second from files, against Keras `predict`
    python benchmarks/models.py grow --photos DIR       seconds and memory of `fast` at 1,000, 3,000 and 10,000 photos

Rows: the article this project began from, as it printed its two recipes; Keras's transfer-learning guide; ours. Each
row runs in a process of its own. Random splits are stratified 80/20; `--test-groups a,b` adds a split whose test photos
are those groups, `--test-groups ^a,b` one whose test photos are all others. Validation is cut out of the 80.

Changed in the article's recipes, and nothing else: photos that TensorFlow cannot read are copied as PNG; labels are
one-hot where it gives two outputs to BinaryCrossentropy, which would stop; MobileNetV2 has the width of the weights at
hand (`--mobilenet`); and it runs `--article-epochs` of its 500 epochs, whose time is extrapolated. Changed in the
guide: its base is EfficientNet-Lite0 at 224 pixels, whose weights pip brings, in place of Xception at 150.

fastai and AutoGluon have no row: pip does not bring their weights, which come from download.pytorch.org and
huggingface.co.
"""

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SIZE = 224
BINS = 10
ROWS = ("control", "article_cnn", "article_mobilenet", "keras_guide", "fast_cnn", "fast", "best_cnn", "best")


@dataclass(frozen=True)
class Photos:
    """Real photos with their classes, as numbers, and groups."""

    folder: Path
    files: list[Path]
    labels: np.ndarray
    groups: np.ndarray
    classes: list[str]

    @classmethod
    def of(cls, folder: Path) -> "Photos":
        with (folder / "manifest.csv").open(newline="") as table:
            rows = list(csv.DictReader(table))
        classes = sorted({row["class"] for row in rows})
        return cls(
            folder,
            [folder / row["file"] for row in rows],
            np.array([classes.index(row["class"]) for row in rows]),
            np.array([row["group"] for row in rows]),
            classes,
        )


@dataclass(frozen=True)
class Split:
    """Positions of photos; `by_group` if the test photos are of groups that training does not see."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    by_group: bool


def splits(photos: Photos, seeds: int, test_groups: list[str]) -> Iterator[Split]:
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(photos.labels))

    def cut(rest: np.ndarray, share: float, seed: int) -> list[np.ndarray]:
        return train_test_split(rest, test_size=share, random_state=seed, stratify=photos.labels[rest])

    for seed in range(seeds):
        rest, test = cut(everything, 0.2, seed)
        yield Split(*cut(rest, 0.2, seed), test, by_group=False)
    for names in test_groups:
        held = np.isin(photos.groups, names.lstrip("^").split(",")) ^ names.startswith("^")
        yield Split(*cut(everything[~held], 0.2, 0), everything[held], by_group=True)


# Of one split: probabilities of the test photos, seconds of training, milliseconds a photo predicted.
Result = tuple[np.ndarray, float, float]


class Ours:
    """A model of a preset: features of all photos once, then for each split a training and a saved file."""

    def __init__(self, photos: Photos, folder: Path, preset: str, model: str) -> None:
        from ruamel.yaml import YAML

        from touchline.commands import presets
        from touchline.core import params
        from touchline.data import feature_store
        from touchline.stages import features as stage

        self.photos, self.folder = photos, folder
        content = params_content()
        for key, source in presets.changes(preset).items():
            content[key.partition(".")[0]].update(YAML().load(source))
        self.params = params.check(content, preset)
        self.model = self.params.models[model]
        self.features = self.params.features[self.model.input]
        self.digests = [str(number) for number in range(len(photos.files))]
        began = time.perf_counter()

        def compute(digests: list[str]) -> Iterator[np.ndarray]:
            rows = stage.pixels([photos.files[int(digest)] for digest in digests], self.features.image_size)
            return stage.pooled(rows, self.features, folder) if model == "transfer" else rows

        feature_store.update(folder / "features", {}, self.digests, compute)
        self.seconds_features = time.perf_counter() - began
        self.arrays = feature_store.Arrays(folder / "features")

    def trained(self, split: Split, registered: bool = False) -> tuple[Path, float]:
        """The saved model, and seconds."""
        from touchline.core.paths import Paths
        from touchline.stages import train as training
        from touchline.tracking import registry, runs

        def subset(chosen: np.ndarray) -> training.Labelled:
            return training.Labelled(
                [self.digests[number] for number in chosen],
                [self.photos.files[number] for number in chosen],
                self.photos.labels[chosen],
                list(self.photos.groups[chosen]),
            )

        began = time.perf_counter()
        train, validation = subset(split.train), subset(split.validation)
        trained = training.fit(self.model, self.features, self.arrays, train, validation, self.folder, lambda _: None)
        path = self.folder / "model.keras"
        trained.model.save(path)
        if registered:
            store = runs.open_store(Paths(self.folder, self.folder), "benchmark")
            run_id = runs.start(
                store, "benchmark", {}, {}, {"name": "split", "digest": "0", "source": "-", "counts": {}}
            )
            runs.finish(store, run_id, model_path=path, image_size=self.features.image_size,
                        classes=self.photos.classes,
                         training_photos=[], metrics=trained.history[trained.kept])  # fmt: skip
            registry.register(store, "benchmark", run_id, {}, "")
        return path, time.perf_counter() - began

    def __call__(self, split: Split, first: bool) -> Result:
        from touchline.models import inference

        path, seconds = self.trained(split, registered=first)
        files = [self.photos.files[number] for number in split.test]
        probabilities, spent = inference.predict(inference.ModelFiles.at(path).network("auto"), files)
        return probabilities, seconds, 1000 * spent / len(files)


class WithKeras:
    """What the article and the guide share: folders that `image_dataset_from_directory` reads."""

    def __init__(self, photos: Photos, folder: Path) -> None:
        self.photos, self.folder = photos, folder
        self.seconds_features = 0.0

    @cached_property
    def readable(self) -> list[Path]:
        """The photos, those that TensorFlow does not read copied as PNG."""
        from touchline.data import photos

        (self.folder / "readable").mkdir()
        found = []
        for number, file in enumerate(self.photos.files):
            content = file.read_bytes()
            extension = photos.header(content).extension
            target = self.folder / "readable" / f"{number:06}.{extension if extension in ('jpg', 'png') else 'png'}"
            if target.suffix == f".{extension}":
                target.symlink_to(file)
            else:
                import cv2

                cv2.imwrite(str(target), cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR))
            found.append(target)
        return found

    def datasets(self, split: Split, **options: Any) -> list[Any]:
        import keras

        found = []
        for name in ("train", "validation", "test"):
            root = self.folder / name
            shutil.rmtree(root, ignore_errors=True)
            for label in self.photos.classes:
                (root / label).mkdir(parents=True)
            for number in getattr(split, name):
                file = self.readable[number]
                (root / self.photos.classes[self.photos.labels[number]] / file.name).symlink_to(file.resolve())
            shuffle = {"shuffle": name != "test"} | ({"seed": 0} if name != "test" else {})
            size = (IMAGE_SIZE, IMAGE_SIZE)
            found.append(
                keras.utils.image_dataset_from_directory(root, image_size=size, verbose=False, **shuffle, **options)
            )
        return found

    def judged(self, model: Any, test: Any, split: Split, began: float) -> Result:
        seconds = time.perf_counter() - began
        model.predict(test.take(1), verbose=0)
        start = time.perf_counter()
        found = model.predict(test, verbose=0)
        spent = 1000 * (time.perf_counter() - start) / len(split.test)
        # The folders are read class by class, in the order of the names, which are numbers.
        order = np.concatenate([split.test[self.photos.labels[split.test] == label] for label in (0, 1)])
        order = np.concatenate([np.sort(order[self.photos.labels[order] == label]) for label in (0, 1)])
        place = {number: row for row, number in enumerate(order)}
        return found[[place[number] for number in split.test]], seconds, spent


class Article(WithKeras):
    """The article's recipe: photos divided by 255, Adam at a constant rate, its losses on a softmax, 500 epochs."""

    def __init__(self, photos: Photos, folder: Path, network: str, epochs: int, mobilenet: Path | None) -> None:
        super().__init__(photos, folder)
        self.network, self.epochs, self.mobilenet = network, epochs, mobilenet
        self.seconds_of_500: list[float] = []

    def __call__(self, split: Split, first: bool) -> Result:  # noqa: ARG002
        import keras
        from keras import layers

        keras.utils.set_random_seed(0)
        began = time.perf_counter()
        cnn = self.network == "cnn"
        train, validation, test = (
            part.map(lambda images, labels: (images / 255, labels)).cache().prefetch(2)
            for part in self.datasets(split, label_mode="int" if cnn else "categorical")
        )
        if cnn:
            model = keras.Sequential([layers.Input((IMAGE_SIZE, IMAGE_SIZE, 3))])
            for filters in (32, 32, 64):
                model.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
                model.add(layers.MaxPooling2D())
            for layer in (layers.Dropout(0.4), layers.Flatten(), layers.Dense(128, "relu"), layers.Dense(2, "softmax")):
                model.add(layer)
            rate, loss = 1e-6, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        else:
            base = keras.applications.MobileNetV2(
                (IMAGE_SIZE, IMAGE_SIZE, 3), alpha=0.35, include_top=False, weights=str(self.mobilenet)
            )
            base.trainable = False
            model = keras.Sequential(
                [base, layers.GlobalAveragePooling2D(), layers.Dropout(0.2), layers.Dense(2, "softmax")]
            )
            rate, loss = 1e-5, keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
        ready, ends = time.perf_counter(), []
        model.fit(train, validation_data=validation, epochs=self.epochs, verbose=0, callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))])  # fmt: skip
        # The first epoch also builds the graph and reads the photos.
        later = (ends[-1] - ends[0]) / (len(ends) - 1)
        self.seconds_of_500.append(ready - began + (ends[0] - ready) + 499 * later)
        return self.judged(model, test, split, began)


class Guide(WithKeras):
    """https://keras.io/guides/transfer_learning: augmentation, frozen base, 20 epochs, then fine-tuning the whole."""

    def __init__(self, photos: Photos, folder: Path, epochs: int, tuning_epochs: int) -> None:
        super().__init__(photos, folder)
        self.epochs, self.tuning_epochs = epochs, tuning_epochs

    def __call__(self, split: Split, first: bool) -> Result:  # noqa: ARG002
        import keras
        import tensorflow as tf
        from keras import layers

        from touchline.core.params import BackboneFeatures
        from touchline.models import backbones

        keras.utils.set_random_seed(0)
        began = time.perf_counter()
        train, validation, test = (part.prefetch(2) for part in self.datasets(split, label_mode="binary"))
        augmentation = [layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)]

        def augmented(images: Any, labels: Any) -> tuple[Any, Any]:
            for layer in augmentation:
                images = layer(images)
            return images, labels

        train = train.map(augmented, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)
        features = BackboneFeatures(backbone="efficientnet_lite0", image_size=IMAGE_SIZE, views=1)
        base = backbones.build(features, self.folder)
        photo = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
        x = layers.GlobalAveragePooling2D()(base(photo, training=False))
        model = keras.Model(photo, layers.Dense(1)(layers.Dropout(0.2)(x)))
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(), loss, metrics=[keras.metrics.BinaryAccuracy()])
        model.fit(train, validation_data=validation, epochs=self.epochs, verbose=0)
        base.trainable = True
        model.compile(keras.optimizers.Adam(1e-5), loss, metrics=[keras.metrics.BinaryAccuracy()])
        if self.tuning_epochs:
            model.fit(train, validation_data=validation, epochs=self.tuning_epochs, verbose=0)
        model.save(self.folder / "guide.keras")
        logits, seconds, spent = self.judged(model, test, split, began)
        second = 1 / (1 + np.exp(-logits.astype(np.float64)))
        return np.concatenate([1 - second, second], axis=1), seconds, spent


class Control:
    """A random forest that sees width, height and aspect alone."""

    seconds_features = 0.0

    def __init__(self, photos: Photos, folder: Path) -> None:  # noqa: ARG002
        from touchline.data.photos import header

        self.labels = photos.labels
        sizes = np.array(
            [(found.width, found.height) for file in photos.files for found in [header(file.read_bytes())]]
        )
        self.rows = np.column_stack([sizes, sizes[:, 0] / sizes[:, 1]])

    def __call__(self, split: Split, first: bool) -> Result:  # noqa: ARG002
        from sklearn.ensemble import RandomForestClassifier

        forest = RandomForestClassifier(300, min_samples_leaf=2, random_state=0)
        learned = np.concatenate([split.train, split.validation])
        began = time.perf_counter()
        forest.fit(self.rows[learned], self.labels[learned])
        return forest.predict_proba(self.rows[split.test]), time.perf_counter() - began, 0.0


def method(name: str, photos: Photos, folder: Path, options: argparse.Namespace) -> Callable[[Split, bool], Result]:
    if name == "control":
        return Control(photos, folder)
    if name.startswith("article_"):
        return Article(photos, folder, name.removeprefix("article_"), options.article_epochs, options.mobilenet)
    if name == "keras_guide":
        return Guide(photos, folder, options.guide_epochs, options.guide_tuning_epochs)
    preset, _, model = name.partition("_")
    return Ours(photos, folder, preset, model or "transfer")


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row: run in a process of its own, so that its memory and its start-up are its own."""
    from sklearn.metrics import balanced_accuracy_score

    began = time.perf_counter()
    if name != "control":
        from touchline.core.tensorflow import import_tensorflow

        import_tensorflow()
        import mlflow  # noqa: F401
    startup = time.perf_counter() - began
    from touchline.models.heads import log_loss
    from touchline.models.scores import calibration_error

    photos = Photos.of(options.photos)
    wanted = list(splits(photos, options.seeds, options.test_groups))
    if name.startswith("article"):
        wanted = wanted[:1]
    elif name == "keras_guide":
        wanted = wanted[: options.guide_splits]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = method(name, photos, Path(folder), options)
        for number, split in enumerate(wanted):
            found, seconds, milliseconds = made(split, number == 0)
            labels = photos.labels[split.test]
            rows.append({
                "by_group": split.by_group,
                "accuracy": float((found.argmax(axis=1) == labels).mean()),
                "balanced": float(balanced_accuracy_score(labels, found.argmax(axis=1))),
                "log_loss": log_loss(labels, found),
                "calibration_error": calibration_error(labels, found, BINS),
                "seconds": seconds + made.seconds_features,
                "milliseconds": milliseconds,
            })  # fmt: skip
            print(f"{name} {number}: {rows[-1]}", file=sys.stderr, flush=True)
    return {
        "name": name,
        "startup": startup,
        "splits": rows,
        "seconds_of_500": getattr(made, "seconds_of_500", []),
        "peak_megabytes": peak(),
    }


def table(options: argparse.Namespace) -> None:
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    columns = (
        "accuracy",
        "balanced",
        "by group",
        "log loss",
        "calib. error",
        "seconds",
        "start-up",
        "MB",
        "ms a photo",
    )
    print(f"{'row':18}{'splits':>7}" + "".join(f"{column:>17}" for column in columns))
    for name in options.rows:
        if name == "article_mobilenet" and options.mobilenet is None:
            print(f"{name:18} left out: no --mobilenet, a file of MobileNetV2 0.35 weights without top")
            continue
        command = [sys.executable, __file__, "one", "--row", name, *sys.argv[2:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        at_random = [split for split in row["splits"] if not split["by_group"]]
        by_group = [split for split in row["splits"] if split["by_group"]]

        def mean(key: str, chosen: list[dict[str, float]], digits: int = 3) -> str:
            if not chosen:
                return "-"
            values = [split[key] for split in chosen]
            spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.{digits}f}{spread}"

        cells = (
            mean("accuracy", at_random), mean("balanced", at_random), mean("balanced", by_group),
            mean("log_loss", at_random), mean("calibration_error", at_random), mean("seconds", row["splits"], 0),
            f"{row['startup']:.0f}", f"{row['peak_megabytes']:.0f}", mean("milliseconds", at_random[:1], 1),
        )  # fmt: skip
        print(f"{name:18}{len(row['splits']):>7}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
        if row["seconds_of_500"]:
            hours = statistics.fmean(row["seconds_of_500"]) / 3600
            print(f"{'':18}{options.article_epochs} of 500 epochs; all 500 would take {hours:.1f} h (extrapolated)")
    print(
        "by group: balanced accuracy. seconds: files to a registered model, without TensorFlow's and MLflow's start-up."
    )


def predict(options: argparse.Namespace) -> None:
    """From files to probabilities with one model: ours, and Keras `predict` on `image_dataset_from_directory`."""
    from touchline.core.tensorflow import import_tensorflow

    import_tensorflow()
    from touchline.core.params import BackboneFeatures
    from touchline.models import architectures, engines, heads, inference

    photos = Photos.of(options.photos)
    features = BackboneFeatures(backbone="efficientnet_lite0", image_size=IMAGE_SIZE, views=1)
    random = np.random.default_rng(0).normal(size=(1280, 2)).astype(np.float32)
    everything = np.arange(len(photos.files))
    with tempfile.TemporaryDirectory() as folder:
        model = architectures.transfer(heads.Head(random, np.zeros(2, np.float32)), features, Path(folder))
        keras_way = WithKeras(photos, Path(folder))
        test = keras_way.datasets(Split(everything[:2], everything[:2], everything, by_group=False))[2].prefetch(2)
        rates: dict[str, list[float]] = {"ours": [], "keras": []}
        for _ in range(options.seeds):
            rates["ours"].append(len(everything) / inference.predict(engines.with_tensorflow(model), photos.files)[1])
            model.predict(test.take(1), verbose=0)
            began = time.perf_counter()
            model.predict(test, verbose=0)
            rates["keras"].append(len(everything) / (time.perf_counter() - began))
        for name, values in rates.items():
            print(f"{name:6} {statistics.median(values):6.1f} photos/s, median of {len(values)}: "
                  + ", ".join(f"{value:.1f}" for value in values))  # fmt: skip
        print(f"ratio {statistics.median(rates['ours']) / statistics.median(rates['keras']):.2f} (goal: 2)")


def grow(options: argparse.Namespace) -> None:
    """Features, training and a saved model as photos grow; the photos are taken again and again to make so many."""
    print(f"{'photos':>8}{'features, s':>14}{'training, s':>14}{'peak MB':>10}")
    for count in options.counts:
        command = [sys.executable, __file__, "grown", "--count", str(count), *sys.argv[2:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = f"{found['features']:14.1f}{found['training']:14.1f}{found['peak_megabytes']:10.0f}"
        print(f"{count:8,}{cells}", flush=True)


def grown(options: argparse.Namespace) -> dict[str, float]:
    from touchline.core.tensorflow import import_tensorflow

    import_tensorflow()
    few = Photos.of(options.photos)
    chosen = np.arange(options.count) % len(few.files)
    files = [few.files[number] for number in chosen]
    photos = Photos(few.folder, files, few.labels[chosen], few.groups[chosen], few.classes)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(photos, Path(folder), "fast", "transfer")
        [split] = list(splits(photos, 1, []))
        seconds = ours.trained(split)[1]
    return {"features": ours.seconds_features, "training": seconds, "peak_megabytes": peak()}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def params_content() -> dict[str, Any]:
    from ruamel.yaml import YAML

    return YAML().load(Path(__file__).resolve().parent.parent / "params.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "one", "predict", "grow", "grown"])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test-groups", action="append", default=[])
    parser.add_argument("--mobilenet", type=Path, help="MobileNetV2 0.35 weights without top, a file of Keras")
    parser.add_argument("--article-epochs", type=int, default=3)
    parser.add_argument("--guide-epochs", type=int, default=20)
    parser.add_argument("--guide-tuning-epochs", type=int, default=10)
    parser.add_argument("--guide-splits", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--count", type=int)
    options = parser.parse_args()
    options.photos = options.photos.resolve()
    if options.what in ("one", "grown"):
        print(json.dumps(one(options.row, options) if options.what == "one" else grown(options)))
    else:
        {"table": table, "predict": predict, "grow": grow}[options.what](options)


if __name__ == "__main__":
    main()
