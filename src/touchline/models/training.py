"""How a network is trained: batches made from photos, on one device or several, until validation is the judge.

What is trained, and how it is put together, is in `architectures`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from touchline.core import parallel
from touchline.core.errors import Diverged, TouchlineError
from touchline.core.files import positions
from touchline.core.params import FeaturesParams, FineTuneParams, NetworkParams
from touchline.data.feature_store import Arrays
from touchline.models import inference
from touchline.models.augmentation import augment
from touchline.models.engines import Network
from touchline.models.forecast import Forecaster
from touchline.models.reference import ImageNet

if TYPE_CHECKING:
    import keras
    import openvino
    import pandas as pd
    import tensorflow as tf

T = TypeVar("T")
OnEpoch = Callable[[dict[str, float]], None]
# The rows of chosen photos, given their positions; what is random in them comes from the generator.
MakeRows = Callable[[np.ndarray, np.random.Generator], np.ndarray]
# Of params and the number of photos that make an epoch.
Optimizer = Callable[[Any, int], "keras.optimizers.Optimizer"]
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
        labels = positions(chosen["class"], classes)
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
        seen: gives some of these, by their positions, as the last layer of the finished network is given them; see
            `seen`. None: by their files.
        imagenet: gives what tells ImageNet's classes by these, if the backbone's weights have it.
        forecast: gives what estimates its accuracy on photos without labels, where that can be learned cheaply.
        for_openvino: gives the same network for OpenVINO, where that is quicker than to convert it.
    """

    make: Callable[[], "keras.Model"]
    history: list[dict[str, float]]
    kept: int
    learned_from: Labelled
    seen: Callable[[Network, np.ndarray], np.ndarray] | None = None
    imagenet: Callable[[], ImageNet | None] = lambda: None
    forecast: Callable[[], Forecaster | None] = lambda: None
    for_openvino: Callable[[], "openvino.Model | None"] = lambda: None

    @cached_property
    def model(self) -> "keras.Model":
        return self.make()


@dataclass(frozen=True)
class Task:
    """What a model is trained on, and where.

    Attributes:
        features: the entry of `features` that the model's `input` names; `arrays` are its rows.
        project: what relative paths of weights are relative to.
        on_epoch: called with each row of the history as it comes.
        devices: `all` shares each batch among the GPUs of this machine.
        history: the rows so far.
    """

    features: FeaturesParams
    arrays: Arrays
    train: Labelled
    validation: Labelled
    project: Path
    on_epoch: OnEpoch
    devices: str = "one"
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def classes(self) -> int:
        return int(max(self.train.labels.max(), self.validation.labels.max())) + 1

    def remember(self, row: dict[str, float]) -> None:
        self.history.append({"epoch": len(self.history), **row})
        self.on_epoch(self.history[-1])


@dataclass(frozen=True)
class Rows:
    """How the rows of chosen photos are made: at random for training, always the same for validation."""

    train: MakeRows
    validation: Callable[[np.ndarray], np.ndarray]


def adam_w(params: NetworkParams | FineTuneParams, photos: int) -> "keras.optimizers.Optimizer":
    """AdamW whose rate rises over the first fifth of the steps, then falls to nothing along half a cosine.

    Args:
        photos: how many make an epoch.
    """
    from keras import optimizers

    steps = params.epochs * -(-photos // params.batch_size)
    # Few epochs need a high rate, which the first steps, from random weights, do not bear.
    rising = steps // 5
    low, high = params.learning_rate / 20, params.learning_rate
    rate = optimizers.schedules.CosineDecay(low, steps - rising, warmup_target=high, warmup_steps=rising)
    return optimizers.AdamW(rate, weight_decay=getattr(params, "weight_decay", 0.0))


def network(
    build: "Callable[[Any, int, int], keras.Model]", optimizer: Optimizer = adam_w
) -> Callable[[Any, Task], Trained]:
    """A way to train a network from scratch, on stored photos that are augmented.

    Args:
        build: gives the network from its `NetworkParams`, the photos' side in pixels and the number of classes: uint8
            (None, side, side, 3) to float32 probabilities (None, classes).
    """

    def trained(params: NetworkParams, task: Task) -> Trained:
        make = partial(build, params, task.features.image_size, task.classes)
        model = built(make, params.batch_size, task.devices, params.precision)

        def augmented(chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
            photos = task.arrays[pick(task.train.digests, chosen)]
            return np.stack([augment(photo, params.augmentation, random) for photo in photos])

        rows = Rows(augmented, lambda chosen: task.arrays[pick(task.validation.digests, chosen)])
        fit(model, rows, params, task, params.seed, optimizer)
        kept = least_loss(task.history) if params.patience else len(task.history) - 1

        def seen_by(network: Network, chosen: np.ndarray) -> np.ndarray:
            return seen(network, (task.arrays[[digest]][0] for digest in pick(task.train.digests, chosen)))

        return Trained(lambda: finished(model, make), task.history, kept, task.train, seen_by)

    return trained


def seen(network: Network, images: Iterable[np.ndarray]) -> np.ndarray:
    """Photos as the last layer of a network is given them.

    Args:
        images: uint8 RGB, shape (side, side, 3).

    Returns:
        float32, shape (photos, channels); without channels where the network does not tell.
    """
    if network.described is None:
        return np.zeros((sum(1 for _ in images), 0), np.float32)
    rows = inference.answers(network.described, ((None, image) for image in images))
    return np.concatenate([found for _, found in rows])[:, network.output_shape[1] :]


def built(
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


def finished(model: "keras.Model", build: Callable[[], "keras.Model"]) -> "keras.Model":
    """A trained network as one that computes in float32 on one device, so that every machine runs the same."""
    if model.distribute_strategy.num_replicas_in_sync == 1 and model.dtype_policy.name == "float32":
        return model
    plain = build()
    plain.set_weights(model.get_weights())
    return plain


def fit(
    model: "keras.Model",
    rows: Rows,
    params: NetworkParams | FineTuneParams,
    task: Task,
    seed: int,
    optimizer: Optimizer = adam_w,
) -> None:
    """Fit until validation loss stops falling, and keep the best weights; without patience, all epochs and the last."""
    import keras

    with model.distribute_strategy.scope():
        # The last layer is a softmax: the loss is given probabilities, and says so.
        model.compile(
            optimizer=optimizer(params, len(task.train.labels)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=False),
            metrics=["accuracy"],
        )

    def at_epoch_end(_: int, logs: dict[str, float]) -> None:
        row = {METRICS[key]: round(float(logs[key]), 6) for key in METRICS}
        if not np.isfinite(list(row.values())).all():
            raise Diverged(f"training {model.name}: the loss is no number any more: lower its learning_rate")
        task.remember(row)

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=at_epoch_end)]
    if params.patience:
        callbacks.append(keras.callbacks.EarlyStopping("val_loss", patience=params.patience, restore_best_weights=True))
    size, replicas = params.batch_size, model.distribute_strategy.num_replicas_in_sync
    with errors_of_rows() as telling:
        model.fit(
            dataset(telling(rows.train), task.train.labels, size, seed, replicas),
            epochs=params.epochs,
            validation_data=dataset(
                telling(lambda chosen, _: rows.validation(chosen)), task.validation.labels, size, replicas=replicas
            ),
            verbose=0,
            shuffle=False,  # `dataset` does it
            callbacks=callbacks,
        )


def least_loss(history: Sequence[dict[str, float]]) -> int:
    return min(range(len(history)), key=lambda number: history[number]["validation/loss"])


@contextmanager
def errors_of_rows() -> Iterator[Callable[[MakeRows], MakeRows]]:
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


def dataset(
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
    batches_of = tf.data.Dataset.from_generator(one_epoch, output_signature=signature)
    return batches_of.apply(tf.data.experimental.assert_cardinality(len(cuts) + 1)).prefetch(2)


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


def pick(items: Sequence[T], chosen: np.ndarray) -> list[T]:
    return [items[position] for position in chosen]
