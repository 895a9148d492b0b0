"""The `train` stage: one model of params.yaml, trained on the training photos and followed on the validation photos.

The test photos are not looked at here.
"""

import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from touchline.core import parallel, stage
from touchline.core.errors import Diverged, TouchlineError, one_line
from touchline.core.files import read_table, replacing, sha256, write_json, write_table
from touchline.core.params import (
    ArticleParams,
    BackboneFeatures,
    CnnParams,
    FeaturesParams,
    FineTuneParams,
    HeadParams,
    ModelParams,
    Params,
)
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.core.tensorflow import import_tensorflow
from touchline.data import photos
from touchline.data.feature_store import Arrays, Stream
from touchline.models import architectures, engines, heads
from touchline.models.augmentation import augment

if TYPE_CHECKING:
    import keras
    import pandas as pd
    import tensorflow as tf

    from touchline.tracking import Store

T = TypeVar("T")
OnEpoch = Callable[[dict[str, float]], None]
# The rows of chosen photos, given their positions; what is random in them comes from the generator.
MakeRows = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_DVC_EXPERIMENT, _PREFECT_FLOW_RUN = "touchline.dvc_experiment", "touchline.prefect_flow_run"
# Numbers of features that a head is fitted to in memory, where scikit-learn takes several copies: 26,000 rows of 1,280.
_HELD = 2**25
# Training photos on which OpenVINO is held against Keras.
_COMPARED = 32
METRICS = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "val_loss": "validation/loss",
    "val_accuracy": "validation/accuracy",
}


@dataclass(frozen=True)
class Labelled:
    """Photos of one subset.

    Attributes:
        digests: sha256 of each photo.
        files: its path.
        labels: its class as a position in `classes`, int64, shape (n,).
        groups: what it belongs to: an author, an album, a source.
    """

    digests: Sequence[str]
    files: Sequence[Path]
    labels: np.ndarray
    groups: Sequence[str]

    @classmethod
    def of(cls, split: "pd.DataFrame", subset: str, classes: Sequence[str], workspace: Path) -> "Labelled":
        if missing := {"class", "group", "sha256"} - set(split.columns):
            raise TouchlineError(
                f"data/split.csv lacks the column {', '.join(sorted(missing))}: run `dvc repro -f -s split`"
            )
        chosen = split[split["subset"] == subset]
        if chosen.empty:
            raise TouchlineError(f"data/split.csv has no photo in {subset}: run `dvc repro`")
        if unknown := sorted(set(chosen["class"]) - set(classes)):
            raise TouchlineError(
                f"data/split.csv has photos of {', '.join(unknown[:5])}, no class of params.yaml: `dvc repro`"
            )
        labels = chosen["class"].map({label: number for number, label in enumerate(classes)}).to_numpy(np.int64)
        files = [workspace / path for path in chosen["path"]]
        return cls(list(chosen["sha256"]), files, labels, list(chosen["group"]))

    @classmethod
    def together(cls, first: "Labelled", second: "Labelled") -> "Labelled":
        return cls(
            [*first.digests, *second.digests],
            [*first.files, *second.files],
            np.concatenate([first.labels, second.labels]),
            [*first.groups, *second.groups],
        )


@dataclass(frozen=True)
class Trained:
    """A fitted model.

    Attributes:
        make: gives the model. A search looks at the history alone, and a head on its backbone takes seconds to build.
        history: one dict an epoch, of the names in METRICS' values and `epoch`; of a head one a `strength`, with its
            `cross_validation/loss`.
        kept: the number of the row whose weights were kept; its validation metrics are the model's.
        learned_from: the photos it was fitted to.
    """

    make: Callable[[], "keras.Model"]
    history: list[dict[str, float]]
    kept: int
    learned_from: Labelled

    @cached_property
    def model(self) -> "keras.Model":
        return self.make()


def run(paths: Paths, params: Params, name: str) -> None:
    """Write `models/<name>.keras`, `.openvino` and `.json` and `reports/history/<name>.csv`, and log the run."""
    import pandas as pd

    from touchline.tracking import open_store

    _refuse_more_machines()
    import_tensorflow()
    _refuse_absent_gpus()
    began = time.monotonic()
    started = _now()
    chosen, features = params.models[name], params.features[params.models[name].input]
    split = read_table(paths.split_table)
    train, validation = (
        Labelled.of(split, subset, params.classes, paths.workspace) for subset in ("train", "validation")
    )
    record = facts(paths, params, name, split) | {"started": started}
    store = open_store(paths, params.register_.name)
    # Who searches for an experiment or a flow run wants the runs of its models alone.
    shared = {key: tag for key, tag in record["tags"].items() if key not in {_DVC_EXPERIMENT, _PREFECT_FLOW_RUN}}
    parent = store.execution(shared)
    run_id = store.start(record["run_name"], record["tags"], record["params"], record["dataset"], parent=parent)
    logged = _Logged(store, run_id, name)
    logged.log(store.describe, record["description"])
    try:
        stored, devices = Arrays(paths.features / chosen.input), params.compute.devices
        on_epoch = partial(_report, logged)
        trained = fit(chosen, features, stored, train, validation, paths.project, on_epoch, devices)
        path = paths.models / f"{name}.keras"
        record |= _write(trained, path)
        record |= _results(trained, time.monotonic() - began)
        record["description"] += f"\n\n{_kept(trained.history, trained.kept)}"
        logged.log(store.describe, record["description"])
        record["ended"] = _now()
        results = {key: record[key] for key in ("image_size", "classes", "training_photos", "metrics", "history")}
        logged.log(store.finish, model_path=path, **results)
    except BaseException as error:
        logged.log(store.fail, one_line(error, 1000))
        raise
    history = pd.DataFrame(trained.history)
    history["kept"] = (history["epoch"] == trained.kept).astype(int)
    write_table(paths.reports / "history" / f"{name}.csv", history)
    write_json(paths.models / f"{name}.json", {"run_id": run_id, "experiment_id": store.experiment_id, **record})
    best, metrics = trained.history[trained.kept], record["metrics"]
    steps = f"strength {best['strength']:g}" if "strength" in best else f"{metrics['epochs']} epochs"
    say(f"{name}: {steps}, {metrics['seconds/train']:.0f} s, validation accuracy {best['validation/accuracy']:.3f}")


@dataclass
class _Logged:
    """The run of a training in the store, for as long as the store answers.

    Hours of training are not lost with a store that went away: all that is logged is in models/ as well, and `evaluate`
    and `touchline registry sync` log a run that the store lacks.
    """

    store: "Store"
    run_id: str
    name: str
    answers: bool = True

    def log(self, ask: Callable[..., None], *arguments: Any, **options: Any) -> None:
        from touchline.tracking import StoreError

        if not self.answers:
            return
        try:
            ask(self.run_id, *arguments, **options)
        except StoreError as error:
            self.answers = False
            say(f"{self.name}: {error}; the training goes on, and `evaluate` will log it from models/{self.name}.json")
            with suppress(StoreError):
                self.store.fail(self.run_id, str(error))


def _report(logged: _Logged, row: dict[str, float]) -> None:
    """Log a row of the history, and print it."""
    logged.log(logged.store.log_row, row)
    shown = ", ".join(f"{metric} {value:.3f}" for metric, value in row.items() if metric != "epoch")
    say(f"{logged.name}: {shown}" if "strength" in row else f"{logged.name}: epoch {row['epoch']:.0f}, {shown}")


def _results(trained: Trained, seconds: float) -> dict[str, Any]:
    """What is known of a run once it has trained, under the names of `models/<name>.json`."""
    best = trained.history[trained.kept]
    metrics = {"seconds/train": round(seconds, 2), **{key: value for key, value in best.items() if key != "epoch"}}
    if "strength" not in best:
        metrics["epochs"] = sum("strength" not in row for row in trained.history)
    return {
        "training_photos": sorted(trained.learned_from.digests),
        "history": trained.history,
        "metrics": metrics,
    }


def _write(trained: Trained, path: Path) -> dict[str, str]:
    """Write a model's files, and return their digests under the names of `models/<name>.json`.

    Raises:
        TouchlineError: OpenVINO answers otherwise than Keras on the first photos that the model learned from.
    """
    # The saved model is what is judged from here on, by the validation photos as well.
    with replacing(path, ".keras") as temporary:
        trained.model.save(temporary)
    openvino = path.with_suffix(engines.SUFFIX)
    with replacing(openvino, engines.SUFFIX) as temporary:
        engines.convert(trained.model, temporary)
        side = trained.model.input_shape[1]
        images = np.stack([photos.read(file, side) for file in trained.learned_from.files[:_COMPARED]])
        networks = engines.with_tensorflow(trained.model), engines.with_openvino(temporary)
        rows = [each.forward(images) for each in networks]
        difference = float(np.abs(rows[0] - rows[1]).max())
        # Written so that NaN is refused too.
        if not difference <= engines.TOLERANCE:
            raise TouchlineError(
                f"{path.stem}: OpenVINO's probabilities differ from Keras's by {difference:.2g} on {len(images)} "
                f"training photos, and {engines.TOLERANCE:g} is allowed: another precision or architecture may help"
            )
    return {"model_sha256": sha256(path), "openvino_sha256": sha256(openvino)}


def facts(paths: Paths, params: Params, name: str, split: "pd.DataFrame") -> dict[str, Any]:
    """What is known of a run before it trains, under the names of `models/<name>.json`."""
    chosen, features = params.models[name], params.features[params.models[name].input]
    return {
        "model": name,
        "run_name": _run_name(name, features),
        "image_size": features.image_size,
        "classes": list(params.classes),
        "description": _description(chosen, features, split, params.classes),
        "params": _flat_params(chosen, features, params),
        "tags": {**_tags(paths), "mlflow.source.name": f"touchline train {name}", "mlflow.source.type": "LOCAL"},
        "dataset": _dataset_facts(paths, split),
    }


def fit(
    params: ModelParams,
    features: FeaturesParams,
    arrays: Arrays,
    train: Labelled,
    validation: Labelled,
    project: Path,
    on_epoch: OnEpoch,
    devices: str = "one",
) -> Trained:
    """Train one model from stored features.

    Args:
        params: an entry of `models`.
        features: the entry of `features` that the model's `input` names; `arrays` are its rows.
        project: what relative paths of weights hang on.
        on_epoch: called with each row of the history as it comes.
        devices: `all` shares each batch among the GPUs of this machine. Losses are those of one, but for rounding and
            what dropout draws. A head without fine-tuning is scikit-learn's work, on the CPU.

    Returns:
        The model in float32 and of one device, whatever it was trained in and on.

    Raises:
        Diverged: the loss became NaN or infinite.
        TouchlineError: batches cannot be shared evenly among the devices.
    """
    import keras

    keras.utils.set_random_seed(params.seed)
    classes = int(max(train.labels.max(), validation.labels.max())) + 1
    history: list[dict[str, float]] = []

    def remember(row: dict[str, float]) -> None:
        history.append({"epoch": len(history), **row})
        on_epoch(history[-1])

    if isinstance(params, CnnParams | ArticleParams):
        if isinstance(params, CnnParams):
            build = partial(architectures.cnn, params, features.image_size, classes)
        else:
            build = partial(architectures.article, params, features.image_size, classes)
        model = _built(build, params.batch_size, devices, params.precision)
        rows = Rows(
            lambda chosen, random: np.stack(
                [augment(photo, params.augmentation, random) for photo in arrays[_pick(train.digests, chosen)]]
            ),
            lambda chosen: arrays[_pick(validation.digests, chosen)],
        )
        _fit(model, rows, train, validation, params, remember, params.seed)
        kept = _least_loss(history) if params.patience else len(history) - 1
        return Trained(lambda: _finished(model, build), history, kept, train)

    assert isinstance(features, BackboneFeatures)  # params lets a head have no other
    both = Labelled.together(train, validation)
    head, kept, whole_head = _fit_head(params, arrays, train, both, remember)
    if params.fine_tune.blocks:
        build = partial(architectures.transfer, head, features, project)
        model = _built(build, params.fine_tune.batch_size, devices)
        tuned = _fine_tune(model, params, features.image_size, train, validation, history, remember)
        if tuned is not None:
            return Trained(lambda: _finished(model, build), history, tuned, train)
    return Trained(lambda: architectures.transfer(whole_head, features, project), history, kept, both)


def _built(
    build: Callable[[], "keras.Model"], batch_size: int, devices: str, precision: str = "float32"
) -> "keras.Model":
    """The network as it is trained: on one device or, mirrored, on several, and in `precision`."""
    import keras
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    # Without a GPU the CPU is the device; it is one, unless it was divided into several.
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if devices == "all" and len(found) > 1:
        if batch_size % len(found):
            raise TouchlineError(
                f"batch_size {batch_size} cannot be shared evenly among {len(found)} devices: "
                f"make it a multiple of {len(found)}, or set compute.devices: one"
            )
        strategy = tf.distribute.MirroredStrategy([device.name for device in found])
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        with strategy.scope():
            return build()
    finally:
        keras.config.set_dtype_policy(before)


def _finished(model: "keras.Model", build: Callable[[], "keras.Model"]) -> "keras.Model":
    """A trained network as one that computes in float32 on one device, so that every machine runs the same."""
    if model.distribute_strategy.num_replicas_in_sync == 1 and model.dtype_policy.name == "float32":
        return model
    plain = build()
    plain.set_weights(model.get_weights())
    return plain


def _fit_head(
    params: HeadParams, arrays: Arrays, train: Labelled, both: Labelled, remember: OnEpoch
) -> tuple[heads.Head, int, heads.Head]:
    """The head of the strength that cross-validation of the training photos finds best.

    Args:
        both: the training photos, then those of validation.

    Returns:
        The head fitted to the training photos, which is what validation judges; the number of its row of the history;
        and the head fitted, with the same strength, to both, since nothing is left to be chosen by validation.
    """
    first = len(train.labels)
    rows, training, validating = _rows_of_head(arrays, both.digests, first)
    weights = heads.balance(train.labels, train.groups, params.balance)
    losses = heads.cross_validated(
        training, train.labels, train.groups, weights, params.strengths, params.folds, params.seed
    )
    kept = int(np.argmin(losses))
    fitted = list(heads.path(training, train.labels, weights, params.strengths))
    for strength, loss, head in zip(params.strengths, losses, fitted, strict=True):
        row = {"strength": strength, "cross_validation/loss": round(loss, 6)}
        for subset, part, labels in (
            ("train", training, train.labels),
            ("validation", validating, both.labels[first:]),
        ):
            probabilities = head.probabilities(part)
            right = probabilities.argmax(axis=1) == labels
            row[f"{subset}/loss"] = round(heads.log_loss(labels, probabilities), 6)
            row[f"{subset}/accuracy"] = round(float(right.mean()), 6)
        remember(row)
    weights = heads.balance(both.labels, both.groups, params.balance)
    return fitted[kept], kept, next(heads.path(rows, both.labels, weights, [params.strengths[kept]]))


def _rows_of_head(arrays: Arrays, digests: Sequence[str], first: int) -> list[np.ndarray | Stream]:
    """All rows, the `first` of them, and the others: in memory, or read piece by piece where they are many.

    Raises:
        Diverged: they hold numbers that are none.
    """
    parts = (slice(None), slice(first), slice(first, None))
    if len(digests) * math.prod(arrays.row_shape) > _HELD:
        rows: list[np.ndarray | Stream] = [arrays.stream(digests[part]) for part in parts]
        finite = all(np.isfinite(batch).all() for _, batch in rows[0])
    else:
        held = arrays[digests]
        rows = [held[part] for part in parts]
        finite = bool(np.isfinite(held).all())
    if not finite:
        raise Diverged(f"{arrays.folder} holds numbers that are none: delete it and run `dvc repro`")
    return rows


@dataclass(frozen=True)
class Rows:
    """How the rows of chosen photos are made: at random for training, always the same for validation."""

    train: MakeRows
    validation: Callable[[np.ndarray], np.ndarray]


def _fit(
    model: "keras.Model",
    rows: Rows,
    train: Labelled,
    validation: Labelled,
    params: CnnParams | ArticleParams | FineTuneParams,
    remember: OnEpoch,
    seed: int,
) -> None:
    """Fit until validation loss stops falling, and keep the best weights; without patience, all epochs and the last."""
    import keras

    with model.distribute_strategy.scope():
        # The last layer is a softmax: the loss is given probabilities, and says so.
        model.compile(
            optimizer=_optimizer(params, len(train.labels)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=False),
            metrics=["accuracy"],
        )

    def at_epoch_end(_: int, logs: dict[str, float]) -> None:
        row = {METRICS[key]: round(float(logs[key]), 6) for key in METRICS}
        if not np.isfinite(list(row.values())).all():
            raise Diverged(f"training {model.name}: the loss is no number any more: lower its learning_rate")
        remember(row)

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=at_epoch_end)]
    if params.patience:
        callbacks.append(keras.callbacks.EarlyStopping("val_loss", patience=params.patience, restore_best_weights=True))
    size, replicas = params.batch_size, model.distribute_strategy.num_replicas_in_sync
    with _errors_of_rows() as telling:
        model.fit(
            _dataset(telling(rows.train), train.labels, size, seed, replicas),
            epochs=params.epochs,
            validation_data=_dataset(
                telling(lambda chosen, _: rows.validation(chosen)), validation.labels, size, replicas=replicas
            ),
            verbose=0,
            shuffle=False,  # `_dataset` does it
            callbacks=callbacks,
        )


def _optimizer(params: CnnParams | ArticleParams | FineTuneParams, photos: int) -> "keras.optimizers.Optimizer":
    """AdamW whose rate falls to nothing along half a cosine; for the article's network its Adam at a constant rate.

    Args:
        photos: how many make an epoch.
    """
    from keras import optimizers

    if isinstance(params, ArticleParams):
        return optimizers.Adam(params.learning_rate)
    rate = optimizers.schedules.CosineDecay(params.learning_rate, params.epochs * -(-photos // params.batch_size))
    return optimizers.AdamW(rate, weight_decay=params.weight_decay if isinstance(params, CnnParams) else 0.0)


def _fine_tune(
    model: "keras.Model",
    params: HeadParams,
    image_size: int,
    train: Labelled,
    validation: Labelled,
    history: Sequence[dict[str, float]],
    remember: OnEpoch,
) -> int | None:
    """Train the last blocks of the backbone with the head, from the photos.

    Returns:
        The number of the row of the history whose weights are kept; None if validation is not the better for it.
    """
    architectures.unfreeze(model, params.fine_tune.blocks)

    def mirrored(chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
        images = np.stack([photos.read(path, image_size) for path in _pick(train.files, chosen)])
        return np.where(random.random((len(images), 1, 1, 1)) < 0.5, images, images[:, :, ::-1])

    rows = Rows(
        mirrored, lambda chosen: np.stack([photos.read(path, image_size) for path in _pick(validation.files, chosen)])
    )
    size, replicas = params.fine_tune.batch_size, model.distribute_strategy.num_replicas_in_sync
    with model.distribute_strategy.scope():
        model.compile(loss="sparse_categorical_crossentropy")
    with _errors_of_rows() as telling:
        before = model.evaluate(
            _dataset(telling(lambda chosen, _: rows.validation(chosen)), validation.labels, size, replicas=replicas),
            verbose=0,
        )
    start = len(history)
    _fit(model, rows, train, validation, params.fine_tune, remember, params.seed)
    best = start + _least_loss(history[start:])
    if history[best]["validation/loss"] < before:
        return best
    say(
        f"fine-tuning did not help: validation loss {history[best]['validation/loss']:.4f}, frozen {before:.4f}; undone"
    )
    return None


def _least_loss(history: Sequence[dict[str, float]]) -> int:
    return min(range(len(history)), key=lambda number: history[number]["validation/loss"])


@contextmanager
def _errors_of_rows() -> Iterator[Callable[[MakeRows], MakeRows]]:
    """Yield what to wrap a maker of rows in, so that its TouchlineError comes out of the block as it is.

    TensorFlow would give what a dataset raises as the text of an error of its own.
    """
    errors: list[TouchlineError] = []

    def telling(make: MakeRows) -> MakeRows:
        def rows(chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
            try:
                return make(chosen, random)
            except TouchlineError as error:
                errors.append(error)
                raise

        return rows

    try:
        yield telling
    except Exception:
        if errors:
            raise errors[0] from None
        raise


def _dataset(
    rows: MakeRows,
    labels: np.ndarray,
    batch_size: int,
    shuffle_seed: int | None = None,
    replicas: int = 1,
) -> "tf.data.Dataset":
    """One pass an epoch over all photos, in batches made on every core, a few ahead of the training.

    Args:
        rows: makes the rows of a batch from positions in `labels`; what is random in it comes from the generator given,
            so that the order of the threads changes nothing.
        shuffle_seed: a new order each epoch if given, else always the order of `labels`.
        replicas: how many devices share a batch. An epoch in a new order leaves out what they cannot share evenly:
            fewer photos than there are replicas, others each time. In a fixed order none is left out.
    """
    import tensorflow as tf

    epochs = itertools.count()
    used = len(labels) - (len(labels) % replicas if shuffle_seed is not None else 0)
    cuts = _cuts(used, batch_size, replicas)

    def one_epoch() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Before training on several devices Keras takes a batch to look at: that is no epoch.
        epoch = max(0, next(epochs) - 1) if replicas > 1 else next(epochs)
        order = np.arange(len(labels))
        if shuffle_seed is not None:
            np.random.default_rng([shuffle_seed, epoch]).shuffle(order)
        batches = np.split(order[:used], cuts)

        def make(numbered: tuple[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            number, chosen = numbered
            return rows(chosen, np.random.default_rng([shuffle_seed or 0, epoch, number])), labels[chosen]

        yield from parallel.in_order(make, enumerate(batches), ahead=4)

    example = rows(np.arange(1), np.random.default_rng(0))
    signature = (tf.TensorSpec((None, *example.shape[1:]), example.dtype), tf.TensorSpec((None,), tf.int64))
    dataset = tf.data.Dataset.from_generator(one_epoch, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(cuts) + 1)).prefetch(2)


def _cuts(photos: int, batch_size: int, replicas: int) -> list[int]:
    """Where batches begin, but for the first.

    TensorFlow gives each replica the same number of rows, rounded up, until none are left, and fails where one gets
    none. So the last batch grows by the one before it until it is enough for all; and the first, which Keras looks at,
    can be shared evenly.
    """
    cuts = list(range(batch_size, photos, batch_size))

    def too_few(rows: int) -> bool:
        return -(-rows // replicas) * (replicas - 1) >= rows

    while cuts and too_few(photos - cuts[-1]):
        cuts.pop()
    if not cuts and photos % replicas:
        cuts = [cut for cut in range(replicas, photos, replicas) if not too_few(photos - cut)][-1:]
        if not cuts:
            raise TouchlineError(f"{photos} photos cannot be shared among {replicas} devices: set compute.devices: one")
    return cuts


def _refuse_more_machines() -> None:
    """Raise TouchlineError if TF_CONFIG makes this one of several workers: Keras's `fit` fails on them."""
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
        tasks = sum(len(addresses) for addresses in cluster.values())
    except (ValueError, AttributeError, TypeError):
        raise TouchlineError("TF_CONFIG is not what TensorFlow expects: unset it") from None
    if tasks > 1:
        raise TouchlineError(
            f"TF_CONFIG names {tasks} tasks, but a model is trained on one machine: unset it; compute.devices: all "
            "takes all GPUs of this one, and docs/scale.md says what several machines are for"
        )


def _refuse_absent_gpus() -> None:
    """Raise TouchlineError if CUDA_VISIBLE_DEVICES names more GPUs than TensorFlow finds, which would take the CPU."""
    import tensorflow as tf

    variable = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # -1 hides itself and what comes after it, as CUDA has it.
    named = list(itertools.takewhile(lambda name: name not in {"", "-1", "NoDevFiles"}, variable.split(",")))
    found = len(tf.config.list_physical_devices("GPU"))
    if found < len(named):
        raise TouchlineError(
            f"CUDA_VISIBLE_DEVICES is {variable!r}, but TensorFlow finds {found} GPUs: name those that `nvidia-smi -L` "
            "lists, install `tensorflow[and-cuda]`, or set it to -1 for the CPU"
        )


def _pick(items: Sequence[T], chosen: np.ndarray) -> list[T]:
    return [items[position] for position in chosen]


def _flat_params(model: ModelParams, features: FeaturesParams, params: Params) -> dict[str, Any]:
    """What a person compares between runs: no nested values, no names of files, nothing that changes nothing."""
    flat: dict[str, Any] = {}
    chosen = model.model_dump()
    if isinstance(model, HeadParams) and not model.fine_tune.blocks:
        chosen["fine_tune"] = {"blocks": 0}
    for key, value in (chosen | {"features": features.model_dump(exclude_none=True, exclude={"weights"})}).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            flat[key] = value
    flat = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in flat.items()}
    return flat | {"split.seed": params.split.seed}


def _description(model: ModelParams, features: FeaturesParams, split: "pd.DataFrame", classes: Sequence[str]) -> str:
    """What a run trains, and on what, for a reader of its page."""
    side = f"{features.image_size} x {features.image_size} pixels"
    if isinstance(features, BackboneFeatures):
        backbones = " and ".join(features.backbone)
        what = f"Regularised logistic regression on what the frozen ImageNet backbone {backbones} says of photos"
        if isinstance(model, HeadParams) and model.fine_tune.blocks:
            what += f" (its last blocks, {model.fine_tune.blocks}, are trained too, at a low rate)"
    else:
        what = {"cnn": "A simple convolutional network", "article": "The article's convolutional network"}[
            model.architecture
        ] + ", trained from nothing on photos"
    counts = split.groupby(["subset", "class"]).size()
    learned = ", ".join(f"{counts.get(('train', label), 0):,} {label}" for label in classes)
    sizes = split.groupby("subset").size()
    return (
        f"{what} of {side}.\n\n**Photos**: {sizes.get('train', 0):,} for training ({learned}), "
        f"{sizes.get('validation', 0):,} for validation, {sizes.get('test', 0):,} for the test."
    )


def _kept(history: Sequence[dict[str, float]], kept: int) -> str:
    best = history[kept]
    if "strength" in best:
        tried = sum("strength" in row for row in history)
        which = f"strength {best['strength']:g}, the best of {tried} in cross-validation"
    else:
        first = next(row["epoch"] for row in history if "strength" not in row)
        which = f"the weights of epoch {kept}, of epochs {first} to {len(history) - 1}"
    return (
        f"**Kept**: {which}; validation accuracy {best['validation/accuracy']:.3f}, loss {best['validation/loss']:.3f}."
    )


def _run_name(name: str, features: FeaturesParams) -> str:
    return f"{name} {'+'.join(features.backbone)}" if isinstance(features, BackboneFeatures) else name


def _tags(paths: Paths) -> dict[str, str]:
    """Which code, which data, which pipeline run, which machine."""
    tags = {
        "touchline.split_sha256": sha256(paths.split_table),
        "touchline.hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags[_DVC_EXPERIMENT] = experiment
    if flow_run := os.environ.get("TOUCHLINE_FLOW_RUN"):
        tags[_PREFECT_FLOW_RUN] = flow_run
    code = stage.code(paths)
    if code["commit"]:
        tags["mlflow.source.git.commit"] = code["commit"]
        tags["touchline.git_dirty"] = str(bool(code["changed"])).lower()
    return tags


def _dataset_facts(paths: Paths, split: "pd.DataFrame") -> dict[str, Any]:
    counts = split.groupby(["subset", "class"]).size()
    return {
        "name": "split",
        "digest": sha256(paths.split_table)[:16],
        "source": "data/split.csv",
        "counts": {f"{subset}/{label}": int(count) for (subset, label), count in counts.items()},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
