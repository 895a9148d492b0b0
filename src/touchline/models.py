"""Architectures. A model is whole: an RGB photo of uint8 goes in, class probabilities come out; scaling is inside."""

from pathlib import Path
from typing import TYPE_CHECKING

from touchline.params import BackboneFeatures, CnnParams, HeadParams

if TYPE_CHECKING:
    import keras


def cnn(params: CnnParams, image_size: int, classes: int) -> "keras.Model":
    """The simple network: three 3x3 convolutions, each with max pooling, then one dense layer.

    Args:
        image_size: side of the photos in pixels.
        classes: number of classes.

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
    return keras.Model(photo, layers.Dense(classes, activation="softmax", name="probabilities")(x), name="cnn")


def head(params: HeadParams, channels: int, classes: int) -> "keras.Model":
    """Dropout and a softmax layer, on pooled features of a backbone.

    Returns:
        float32 (None, channels) to float32 probabilities (None, classes).
    """
    import keras
    from keras import layers

    features = keras.Input((channels,), name="features")
    x = layers.Dropout(params.dropout)(features)
    return keras.Model(features, layers.Dense(classes, activation="softmax", name="probabilities")(x), name="head")


def with_backbone(head: "keras.Model", features: BackboneFeatures, project: Path) -> "keras.Model":
    """The head on its backbone: a whole model, sharing the head's weights, the backbone frozen.

    Returns:
        uint8 (None, image_size, image_size, 3) to float32 probabilities (None, classes).
    """
    import keras
    from keras import layers

    from touchline import backbones

    photo = keras.Input((features.image_size, features.image_size, 3), dtype="uint8", name="photo")
    # training=False keeps BatchNorm in inference mode whatever is unfrozen later.
    x = backbones.build(features, project)(photo, training=False)
    x = layers.GlobalAveragePooling2D(name="pooling")(x)
    return keras.Model(photo, head(x), name="transfer")


def unfreeze(model: "keras.Model", blocks: int) -> int:
    """Make the last `blocks` blocks of a whole model's backbone trainable, except their BatchNorm layers.

    Returns:
        The number of parameters that were made trainable.
    """
    import keras

    from touchline import backbones

    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model) and layer.name != "head")
    backbone.trainable = True
    last = {id(layer) for block in backbones.blocks(backbone)[-blocks:] for layer in block}
    for layer in backbone.layers:
        layer.trainable = id(layer) in last and not isinstance(layer, keras.layers.BatchNormalization)
    return sum(int(weight.shape.num_elements() or 0) for weight in backbone.trainable_variables)
