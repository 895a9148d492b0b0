"""Architectures. A model is whole: an RGB photo of uint8 goes in, class probabilities come out; scaling is inside."""

from pathlib import Path
from typing import TYPE_CHECKING

from touchline.core.params import ArticleParams, BackboneFeatures, CnnParams
from touchline.models.heads import Head

if TYPE_CHECKING:
    import keras


def cnn(params: CnnParams, image_size: int, classes: int) -> "keras.Model":
    """The simple network: VGG16's blocks of two 3x3 convolutions, with BatchNorm, and a mean over all places last.

    Args:
        params: `filters` are the widths of the blocks, each of which works at half the side of the one before.
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
        # At full side a block would take half of all the time, so the first convolution halves it.
        for strides in (1 if block else 2, 1):
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
