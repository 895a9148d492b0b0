"""Where in a photo a model found its class: Grad-CAM heat maps, and photos with the heat drawn over them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core.errors import TouchlineError
from touchline.data.thumbnails import thumbnail
from touchline.models.engines import Explain

if TYPE_CHECKING:
    import keras

# Pixels: of the photo's longer side in an overlay, of the caption's height, and of the width it wants.
_LONGER_SIDE = 720
_CAPTION, _CAPTION_WIDTH = 40, 280
# Of the longer side of a similar training photo, and the space beside it.
_SIMILAR = 160
# A JPEG comment (ISO/IEC 10918-1, B.2.4.5) right after the start tells our overlays from anybody's photos.
_NOTE = b"Touchline: what the model looked at"
_START = b"\xff\xd8\xff\xfe" + (len(_NOTE) + 2).to_bytes(2, "big") + _NOTE


def explainer(model: "keras.Model") -> Explain:
    """What tells where in photos a model found a class: Grad-CAM (Selvaraju et al., 2017).

    The feature map is the one that enters the last pooling over all places, or Flatten. Each of its channels is
    weighted with how much it raises the class, and what speaks against the class is cut off; the largest heat of a
    photo is 1. Where nothing speaks for the class all is 0.

    Weights are the gradients place by place. After a mean over all places those are the same everywhere, which is
    Grad-CAM; after Flatten a mean of them would light up places that the dense layer does not look at (HiResCAM,
    Draelos and Carin, 2020).

    What is derived is the log of the odds, out of the logits: a sure model's softmax has no gradient left in float32,
    and one logit alone may rise without the class getting likelier.

    Args:
        model: any functional or sequential one; with several views the first, the photo as it is, is explained.

    Raises:
        TouchlineError: no layer of it turns a feature map into a vector.
    """
    import keras
    import tensorflow as tf

    graph = keras.Model(model.inputs, model.outputs, name=model.name)
    maps = _pooled_maps(graph)
    before, logits_of = _logits(graph)
    # In two parts, because only what a tape watches has gradients, and a frozen backbone is not watched.
    body, rest = keras.Model(graph.inputs, maps), keras.Model(maps, before)
    size = model.input_shape[1]

    taken = [tf.TensorSpec((None, size, size, 3), tf.uint8), tf.TensorSpec((None,), tf.int64)]

    @tf.function(input_signature=taken)  # type: ignore[untyped-decorator]  # TensorFlow brings no types
    def heat(images: Any, labels: Any) -> Any:
        found = tf.nest.flatten(body(images, training=False))
        with tf.GradientTape() as tape:
            tape.watch(found)
            logits = logits_of(rest(found if len(found) > 1 else found[0], training=False))
            chosen = tf.one_hot(labels, logits.shape[-1], on_value=True, off_value=False)
            others = tf.reduce_logsumexp(tf.where(chosen, -np.inf, logits), axis=1)
            odds = tf.reduce_sum(tf.where(chosen, logits, 0.0), axis=1) - others
        raised = tf.nn.relu(tf.reduce_sum(tape.gradient(odds, found)[0] * found[0], axis=-1))
        return tf.math.divide_no_nan(raised, tf.reduce_max(raised, axis=(1, 2), keepdims=True))

    return lambda images, labels: heat(tf.constant(images), tf.constant(labels, tf.int64)).numpy()


def overlay(content: bytes, heat: np.ndarray, caption: str, similar: Sequence[tuple[Path, str]] = ()) -> bytes:
    """A photo with the heat over it and a caption under it, as a JPEG that `is_overlay` knows.

    Args:
        content: bytes of the photo's file.
        heat: float32 (height, width), 0 to 1, of the whole photo, whatever its aspect.
        similar: training photos to draw under it, and their classes.

    Raises:
        TouchlineError: the bytes are not a readable image.
    """
    import cv2

    photo = thumbnail(content, _LONGER_SIDE)
    height, width = photo.shape[:2]
    below = _SIMILAR + _CAPTION if similar else 0
    canvas = np.full((height + _CAPTION + below, max(width, _CAPTION_WIDTH, len(similar) * _SIMILAR), 3), 255, np.uint8)
    canvas[:height, :width] = warmed(photo, heat)
    cv2.putText(canvas, caption, (8, height + 28), (30, 30, 30), cv2.FontFace("sans"), 20)
    for number, (path, label) in enumerate(similar):
        small, left, top = thumbnail(path, _SIMILAR - 8), number * _SIMILAR, height + _CAPTION
        canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
        cv2.putText(canvas, label, (left + 8, top + _SIMILAR + 20), (30, 30, 30), cv2.FontFace("sans"), 16)
    return _encoded(canvas)


def strip(pictures: Sequence[tuple[np.ndarray, str]], columns: int = 6) -> bytes:
    """Pictures in rows, each over its caption, as a JPEG that `is_overlay` knows.

    Args:
        pictures: RGB, uint8, (height, width, 3), all of one size, and captions; at least one.
    """
    import cv2

    height, width = pictures[0][0].shape[:2]
    cell = (height + _CAPTION, max(width, _CAPTION_WIDTH) + 8)
    across = min(columns, len(pictures))
    canvas = np.full((-(-len(pictures) // across) * cell[0], across * cell[1], 3), 255, np.uint8)
    for number, (picture, caption) in enumerate(pictures):
        top, left = number // across * cell[0], number % across * cell[1]
        canvas[top : top + height, left : left + width] = picture
        cv2.putText(canvas, caption, (left + 4, top + height + 26), (30, 30, 30), cv2.FontFace("sans"), 16)
    return _encoded(canvas)


def _encoded(canvas: np.ndarray) -> bytes:
    import cv2

    image = cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR)
    return _START + cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()[2:]


def warmed(photo: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A photo in grey with the heat over it in colours: RGB, uint8, shape (height, width, 3).

    Args:
        photo: RGB, uint8, shape (height, width, 3).
        heat: float32, 0 to 1, of the whole photo, in any size.
    """
    import cv2

    height, width = photo.shape[:2]
    warm = np.clip(cv2.resize(heat, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)[..., None]
    colours = cv2.cvtColor(cv2.applyColorMap((255 * warm).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    # Without its colours a photo stays readable, and green grass is not taken for heat or the lack of it.
    grey = cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return ((1 - 0.6 * warm) * grey + 0.6 * warm * colours).astype(np.uint8)


def is_overlay(start: bytes) -> bool:
    """Whether a file that begins so was drawn by `overlay`."""
    return start.startswith(_START)


def _pooled_maps(graph: "keras.Model") -> list[Any]:
    """The feature maps (symbolic tensors) that the last pooling over all places is given, one a view."""
    from keras import layers

    kinds = (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D, layers.Flatten)
    own = {id(node) for nodes in graph._nodes_by_depth.values() for node in nodes}
    for layer in reversed(graph.layers):
        if isinstance(layer, kinds):
            # A layer that was called more than once has no one `input`; its nodes know each call, of other graphs too.
            maps = [node.input_tensors[0] for node in layer._inbound_nodes if id(node) in own]
            if len(maps[0].shape) == 4:
                return maps
    raise TouchlineError(f"model {graph.name} cannot be explained: none of its layers pools or flattens a feature map")


def _logits(graph: "keras.Model") -> tuple[Any, Callable[[Any], Any]]:
    """A symbolic tensor of the model, and what makes logits of its values."""
    import keras
    from keras import layers

    last = graph.layers[-1]
    is_softmax = getattr(last, "activation", None) is keras.activations.softmax
    if isinstance(last, layers.Dense) and is_softmax:
        return last.input, lambda values: keras.ops.matmul(values, last.kernel) + (last.bias if last.use_bias else 0.0)
    if isinstance(last, layers.Softmax) or is_softmax:
        return last.input, lambda values: values
    return graph.output, lambda values: keras.ops.log(keras.ops.maximum(values, keras.backend.epsilon()))
