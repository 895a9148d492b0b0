"""Architectures: for each its params, how it is built and how it is trained.

A model is whole: an RGB photo of uint8 goes in, class probabilities come out; scaling is inside.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from touchline.core import extensions
from touchline.core.errors import Diverged
from touchline.core.params import (
    ArticleParams,
    BackboneFeatures,
    CnnParams,
    FeaturesParams,
    HeadParams,
    ModelParams,
)
from touchline.core.progress import say
from touchline.data import photos
from touchline.data.feature_store import Arrays, Stream
from touchline.models import forecast, heads, training
from touchline.models.engines import Network
from touchline.models.forecast import Forecaster
from touchline.models.heads import Head
from touchline.models.training import Labelled, OnEpoch, Task, Trained

if TYPE_CHECKING:
    import keras

# Numbers of features that a head is fitted to in memory, where scikit-learn takes several copies: 26,000 rows of 1,280.
_HELD = 2**25


def cnn(params: CnnParams, image_size: int, classes: int) -> "keras.Model":
    """The simple network: blocks of 3x3 convolutions, as in VGG16, with BatchNorm, and a mean over all places last.

    Args:
        params: `filters` are the widths of the blocks, each of which works at half the side of the one before;
            `convolutions` is how many each has.
        image_size: side of the photos in pixels.
        classes: number of classes.

    Returns:
        uint8 (None, image_size, image_size, 3) to float32 probabilities (None, classes).
    """
    import keras
    import tensorflow as tf
    from keras import layers

    # Statistics of a part of the batch would make the result hang on how many devices share it.
    shared = tf.distribute.get_strategy().num_replicas_in_sync > 1
    photo = keras.Input((image_size, image_size, 3), dtype="uint8", name="photo")
    x = layers.Rescaling(1 / 127.5, offset=-1)(photo)
    for block, filters in enumerate(params.filters):
        if block:
            x = layers.MaxPooling2D()(x)
        for number in range(params.convolutions):
            # At full side a block would take half of all the time, so the first convolution halves it.
            strides = 1 if block or number else 2
            x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
            # Few photos are few steps: with Keras's 0.99 the statistics would lag behind the weights by epochs.
            x = layers.BatchNormalization(momentum=0.9, synchronized=shared)(x)
            x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(params.dropout)(x)
    return keras.Model(photo, _probabilities(classes)(x), name="cnn")


def article(params: ArticleParams, image_size: int, classes: int) -> "keras.Model":
    """The network of the article this project began from: three convolutions, Flatten and a dense layer.

    Returns:
        uint8 (None, image_size, image_size, 3) to float32 probabilities (None, classes).
    """
    import keras
    from keras import layers

    photo = keras.Input((image_size, image_size, 3), dtype="uint8", name="photo")
    x = layers.Rescaling(1 / 255)(photo)
    for filters in (32, 32, 64):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dropout(params.dropout)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(params.dense_units, activation="relu")(x)
    return keras.Model(photo, _probabilities(classes)(x), name="article")


def transfer(head: Head, features: BackboneFeatures, project: Path) -> "keras.Model":
    """A head on its frozen backbone: a whole model.

    Returns:
        uint8 (None, image_size, image_size, 3) to float32 probabilities (None, classes).
    """
    import keras

    from touchline.models import backbones

    body = backbones.pooled(features, project)
    probabilities = _probabilities(len(head.bias))
    model = keras.Model(body.input, probabilities(body.output), name="transfer")
    probabilities.set_weights([head.weights, head.bias])
    return model


def unfreeze(model: "keras.Model", blocks: int) -> int:
    """Make the last `blocks` blocks of a whole model's backbone trainable, except their BatchNorm layers.

    Returns:
        The number of parameters that were made trainable.
    """
    import keras

    from touchline.models import backbones

    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    backbone.trainable = True
    last = {id(layer) for block in backbones.blocks(backbone)[-blocks:] for layer in block}
    for layer in backbone.layers:
        layer.trainable = id(layer) in last and not isinstance(layer, keras.layers.BatchNormalization)
    return sum(int(weight.shape.num_elements() or 0) for weight in backbone.trainable_variables)


def _probabilities(classes: int) -> "keras.layers.Layer":
    from keras import layers

    # In float32 whatever the layers before it compute in: a softmax in float16 says 0 and 1 too soon.
    return layers.Dense(classes, activation="softmax", dtype="float32", name="probabilities")


def _adam(params: ArticleParams, _: int) -> "keras.optimizers.Optimizer":
    from keras import optimizers

    return optimizers.Adam(params.learning_rate)


def _train_head(params: HeadParams, task: Task) -> Trained:
    """A head on a frozen backbone, and, if so set, the backbone's last blocks with it."""
    assert isinstance(task.features, BackboneFeatures)  # params lets a head have no other
    from touchline.models import backbones

    both = Labelled.together(task.train, task.validation)
    imagenet = partial(backbones.imagenet, task.features, task.project)
    head, kept, whole_head, forecasts = _fit_head(params, task, both)
    if params.fine_tune.blocks:
        build = partial(transfer, head, task.features, task.project)
        model = training.built(build, params.fine_tune.batch_size, task.devices)
        tuned = _fine_tune(model, params, task)
        if tuned is not None:
            return Trained(lambda: training.finished(model, build), task.history, tuned, task.train, None, imagenet)
    whole = partial(transfer, whole_head, task.features, task.project)

    def seen(_: Network, chosen: np.ndarray) -> np.ndarray:
        return task.arrays[training.pick(both.digests, chosen)].astype(np.float32)

    last = whole_head.weights, whole_head.bias
    for_openvino = partial(backbones.without_tensorflow, task.features, task.project, last)
    return Trained(whole, task.history, kept, both, seen, imagenet, forecasts, for_openvino)


def _fit_head(
    params: HeadParams, task: Task, both: Labelled
) -> tuple[Head, int, Head, Callable[[], Forecaster | None]]:
    """The head of the strength that cross-validation of the training photos finds best.

    Args:
        both: the training photos, then those of validation.

    Returns:
        The head fitted to the training photos, which is what validation judges; the number of its row of the history;
        the head fitted, with the same strength, to both, since nothing is left to be chosen by validation; and what
        gives the forecast of its accuracy.
    """
    train, first = task.train, len(task.train.labels)
    rows, learned, judged = _rows_of_head(task.arrays, both.digests, first)
    chosen, stand_for = np.arange(first), np.ones(first)
    if isinstance(rows, Stream):
        chosen, stand_for = heads.sample(train.labels, _held(task.arrays))
        say(f"the strength is chosen on {len(chosen):,} of {first:,} training photos; the head is fitted to all")
    sample = learned if isinstance(learned, np.ndarray) else task.arrays[training.pick(train.digests, chosen)]
    labels, groups = train.labels[chosen], training.pick(train.groups, chosen)
    weights = heads.balance(labels, groups, params.balance)
    losses = heads.cross_validated(sample, labels, groups, weights, params.strengths, params.folds, params.seed)
    kept = int(np.argmin(losses))
    strength = params.strengths[kept]
    # For streamed rows, heads fitted to the sample only choose the strength and the starting point.
    streamed = isinstance(rows, Stream)
    fitted = list(heads.path(sample, labels, weights, params.strengths, rough=streamed))
    of_both = heads.balance(both.labels, both.groups, params.balance)
    if isinstance(rows, Stream):
        of_train = heads.balance(train.labels, train.groups, params.balance)
        counts = of_train[chosen] * stand_for
        refined = partial(heads.refined, strength=strength, sample=sample, sample_weights=counts)
        near = next(heads.path(sample, labels, counts, [strength], rough=True))
        fitted[kept] = refined(near, cast("Stream", learned), train.labels, of_train)
        whole = refined(fitted[kept], rows, both.labels, of_both)
    else:
        whole = next(heads.path(rows, both.labels, of_both, [strength]))
    scores = zip(
        heads.judged(fitted, learned, train.labels), heads.judged(fitted, judged, both.labels[first:]), strict=True
    )
    for value, loss, (on_train, on_validation) in zip(params.strengths, losses, scores, strict=True):
        row = {"strength": value, "cross_validation/loss": round(loss, 6)}
        for subset, (of_subset, accuracy) in (("train", on_train), ("validation", on_validation)):
            row |= {f"{subset}/loss": round(of_subset, 6), f"{subset}/accuracy": round(accuracy, 6)}
        task.remember(row)
    return fitted[kept], kept, whole, partial(forecast.of_head, sample, labels, groups, strength, params)


def _held(arrays: Arrays) -> int:
    """How many rows of an array are held in memory at most."""
    return _HELD // max(1, math.prod(arrays.row_shape))


def _rows_of_head(arrays: Arrays, digests: Sequence[str], first: int) -> list[np.ndarray | Stream]:
    """All rows, the `first` of them, and the others: in memory, or read piece by piece if there are many.

    Raises:
        Diverged: some of their numbers are not finite.
    """
    parts = (slice(None), slice(first), slice(first, None))
    if len(digests) > _held(arrays):
        rows: list[np.ndarray | Stream] = [arrays.stream(digests[part]) for part in parts]
        finite = all(np.isfinite(batch).all() for _, batch in rows[0])
    else:
        held = arrays[digests]
        rows = [held[part] for part in parts]
        finite = bool(np.isfinite(held).all())
    if not finite:
        raise Diverged(f"{arrays.folder} holds numbers that are none: delete it and run `dvc repro`")
    return rows


def _fine_tune(model: "keras.Model", params: HeadParams, task: Task) -> int | None:
    """Train the last blocks of the backbone with the head, from the photos.

    Returns:
        The number of the row of the history whose weights are kept; None if validation is not the better for it.
    """
    unfreeze(model, params.fine_tune.blocks)

    def read(files: Sequence[Path], chosen: np.ndarray) -> np.ndarray:
        return np.stack([photos.read(path, task.features.image_size) for path in training.pick(files, chosen)])

    def mirrored(chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
        images = read(task.train.files, chosen)
        return np.where(random.random((len(images), 1, 1, 1)) < 0.5, images, images[:, :, ::-1])

    rows = training.Rows(mirrored, partial(read, task.validation.files))
    size, replicas = params.fine_tune.batch_size, model.distribute_strategy.num_replicas_in_sync
    with model.distribute_strategy.scope():
        model.compile(loss="sparse_categorical_crossentropy")
    labels = task.validation.labels
    with training.errors_of_rows() as telling:
        judged = training.dataset(telling(lambda chosen, _: rows.validation(chosen)), labels, size, replicas=replicas)
        before = model.evaluate(judged, verbose=0)
    start = len(task.history)
    training.fit(model, rows, params.fine_tune, task, params.seed)
    best = start + training.least_loss(task.history[start:])
    loss = task.history[best]["validation/loss"]
    if loss < before:
        return best
    say(f"fine-tuning did not help: validation loss {loss:.4f}, frozen {before:.4f}; undone")
    return None


@dataclass(frozen=True)
class Architecture:
    """A kind of model that `architecture` in params.yaml may name.

    Attributes:
        params: its entry of `models`; its `takes` says which features it learns from.
        train: gives the trained model; `training.network` makes it of a function that builds a network.
        says: what it is, for the report and MLflow, followed by "of 96 x 96 pixels"; `{backbone}` is filled in.
    """

    params: type[ModelParams]
    train: Callable[[Any, Task], Trained]
    says: str

    def described(self, features: FeaturesParams) -> str:
        backbone = " and ".join(features.backbone) if isinstance(features, BackboneFeatures) else ""
        return self.says.format(backbone=backbone)


ARCHITECTURES = {
    "cnn": Architecture(
        CnnParams, training.network(cnn), "A simple convolutional network, trained from scratch on photos"
    ),
    "article": Architecture(
        ArticleParams,
        training.network(article, _adam),
        "The article's convolutional network, trained from scratch on photos",
    ),
    "head": Architecture(
        HeadParams,
        _train_head,
        "Regularised logistic regression on the features that the frozen ImageNet backbone {backbone} finds in photos",
    ),
}


def of(params: ModelParams) -> Architecture:
    """The architecture of an entry of `models`."""
    return cast("Architecture", extensions.architecture(params.architecture))


def train(
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
        project: what relative paths of weights are relative to.
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
    return of(params).train(params, Task(features, arrays, train, validation, project, on_epoch, devices))
