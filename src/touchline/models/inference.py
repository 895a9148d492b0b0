"""Photos through a network, batch by batch: for features, for judging models and for predictions alike."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import keras

T = TypeVar("T")
Row = tuple[T, np.ndarray | None]
Forward = Callable[[np.ndarray], np.ndarray]
BATCH = 32


def forward_pass(model: "keras.Model", photos_first: int = BATCH) -> Forward:
    """What makes a network's rows of uint8 RGB photos, shape (n, side, side, 3), ready to run.

    Args:
        photos_first: how many it is tried on, so that the first batch of so many waits for nothing.
    """
    import tensorflow as tf

    size = model.input_shape[1]
    # One signature for all batches: TensorFlow would build its graph anew for the last, smaller one.
    signature = [tf.TensorSpec((None, size, size, 3), tf.uint8)]
    forward = tf.function(lambda images: model(images, training=False), input_signature=signature)
    forward(tf.zeros((photos_first, size, size, 3), tf.uint8))
    return lambda images: forward(tf.constant(images)).numpy()


def answers(forward: Forward, rows: Iterable[Row[T]]) -> Iterator[tuple[list[Row[T]], np.ndarray]]:
    """Rows as many at a time as `BATCH`, in their order; the next are asked for when these have been dealt with.

    Args:
        rows: whatever tells a photo, and its pixels, uint8 (side, side, 3); None where it has none.

    Yields:
        The rows of a batch, and what the network makes of those that have pixels, float32, shape (n, outputs).
    """
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        images = [pixels for _, pixels in batch if pixels is not None]
        yield batch, forward(np.stack(images)) if images else np.empty((0, 0), np.float32)
