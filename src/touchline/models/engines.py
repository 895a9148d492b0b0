"""Two engines that run a network on photos: OpenVINO on processors, TensorFlow where a GPU is visible.

TensorFlow trains networks and saves them as `.keras` files. Its start takes most of the time of a short command, so a
network has a second file for OpenVINO, `<name>.openvino`: a zip archive of `network.xml` and `network.bin`, which are
OpenVINO's own format. Its outputs:

- `rows`: what the network makes of photos, float32, shape (n, width).
- `features`, of networks that end in one dense layer with softmax: what that layer is given, shape (n, channels).
- `logits` and `evidence`, of networks that end in a mean over all places and one dense layer with softmax: the logits,
  shape (n, classes), and what each place of the last feature map adds to them, shape (n, height, width, classes). The
  mean of the evidence over all places, plus the bias, is the logits: the class activation map of Zhou et al. (2016).
  Where ImageNet's classes stand behind the mean, the evidence is each place times the slope of the logits there.
"""

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError, one_line
from touchline.core.files import replacing
from touchline.core.progress import say

if TYPE_CHECKING:
    import keras
    import openvino

Forward = Callable[[np.ndarray], np.ndarray]
# Photos uint8 (n, side, side, 3) and their classes (n,) to heat, float32 (n, height, width), 0 to 1.
Explain = Callable[[np.ndarray, np.ndarray], np.ndarray]

OPENVINO, TENSORFLOW = "openvino", "tensorflow"
# How far the engines may differ in a number of a row: sums in another order differ by less than a tenth of it.
TOLERANCE = 1e-5
SUFFIX = ".openvino"
# The layer that tells ImageNet's classes in networks that look at them.
IMAGENET = "imagenet_classes"
_XML, _BIN = "network.xml", "network.bin"
# Part of the names of files in the cache: raise it when the outputs of a network file change.
_FORMAT = 3


@dataclass(frozen=True)
class Network:
    """A network that is ready to run.

    Attributes:
        engine: what runs it, and its version: `openvino 2026.4.1`.
        input_shape: of photos, None for any number: (None, side, side, 3).
        output_shape: of rows: (None, width).
        forward: photos, uint8 RGB, to rows, float32.
        described: photos to rows with the features behind them, float32, shape (n, width + channels); None where the
            network has no such features, or its file is from before there were any.
        heat: where in photos the network found a class, as `explain.explainer` tells it; None where it takes gradients.
    """

    engine: str
    input_shape: tuple[int | None, ...]
    output_shape: tuple[int | None, ...]
    forward: Forward
    heat: Explain | None = None
    described: Forward | None = None

    @property
    def side(self) -> int:
        return int(self.input_shape[1] or 0)


def chosen(wanted: str) -> str:
    """The engine that `compute.engine` asks for; `auto` is TensorFlow where a GPU is visible, else OpenVINO."""
    if wanted != "auto":
        return wanted
    return TENSORFLOW if _visible_gpus() else OPENVINO


def named(engine: str) -> str:
    """An engine and its version: `openvino 2026.4.1`."""
    return f"{engine} {version(engine)}"


def _visible_gpus() -> int:
    """How many GPUs NVIDIA's driver offers this process; asked without TensorFlow, whose start takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def with_tensorflow(model: "keras.Model", photos_first: int = 1) -> Network:
    """A Keras model, run by TensorFlow.

    Args:
        photos_first: how many it is tried on, so that the first batch of so many waits for nothing.
    """
    import keras
    import tensorflow as tf

    def runner(model: "keras.Model") -> Forward:
        # One signature for all batches: TensorFlow would build its graph anew for the last, smaller one.
        signature = [_photo(model)]
        run = tf.function(lambda images: model(images, training=False), input_signature=signature)
        return lambda images: run(tf.constant(images)).numpy()

    forward, described = runner(model), None
    forward(np.zeros((photos_first, *model.input_shape[1:]), np.uint8))
    if head := _head(model):
        described = runner(keras.Model(model.inputs, keras.layers.Concatenate()([model.output, head.input])))
    return Network(named(TENSORFLOW), model.input_shape, model.output_shape, forward, described=described)


def with_openvino(path: Path) -> Network:
    """A network file, run by OpenVINO on this machine's processors.

    Raises:
        TouchlineError: it is torn, or not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            xml, weights = archive.read(_XML), archive.read(_BIN)
        return _compiled(xml, weights)
    except Exception as error:  # OpenVINO raises RuntimeError for whatever is wrong
        raise TouchlineError(f"{path} is not a readable OpenVINO network ({one_line(error)}): make it again") from None


def with_openvino_files(xml: Path) -> Network:
    """As `with_openvino`, of the two files that `serialize` writes."""
    return _compiled(xml.read_bytes(), xml.with_suffix(".bin").read_bytes())


def _compiled(xml: bytes, weights: bytes) -> Network:
    openvino = import_openvino()

    core = openvino.Core()
    network = core.read_model(xml, weights)
    turn = threading.Lock()  # requests are shared by all threads that ask

    @functools.cache
    def requests(hint: str) -> list[Any]:
        # OpenVINO's cache of compiled networks (CACHE_DIR) is left off: it saves 0.07 s of processor time a start and
        # takes 19 MB for each network.
        # Pinned to cores, as OpenVINO would have them, threads wait for theirs where other programs work: beside 20
        # busy programs a photo took 562 ms instead of 462.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": hint, "ENABLE_CPU_PINNING": False}
        if parallel.at_worker():
            settings["INFERENCE_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"]
        compiled = core.compile_model(network, "CPU", settings)
        # No AsyncInferQueue: its destructor holds Python's lock while it waits for a thread that may need that lock,
        # and the program hangs.
        count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        return [compiled.create_infer_request() for _ in range(count)]

    def ask(images: np.ndarray, *names: str) -> list[np.ndarray]:
        # One photo: all cores work on it. Several: a photo a request and a request a core, which on idle cores gives as
        # many photos a second as batches of 32, twice as many where other programs take a part of them, and takes a
        # third of the memory.
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}

        def finish(request: Any) -> None:
            request.wait()
            for name in names:
                found[name].append(request.get_tensor(name).data.copy())

        with turn:
            free = requests("LATENCY" if len(images) == 1 else "THROUGHPUT")
            at_work: deque[Any] = deque()
            for number in range(len(images)):
                if len(at_work) == len(free):
                    finish(at_work.popleft())
                at_work.append(free[number % len(free)])
                at_work[-1].start_async({0: images[number : number + 1]})
            for request in at_work:
                finish(request)
        return [np.concatenate(found[name]) for name in names]

    def heat(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        logits, evidence = ask(images, "logits", "evidence")
        return class_activation(logits, evidence, labels)

    names = {name for output in network.outputs for name in output.names}
    shapes = (network.input(0).partial_shape, network.output("rows").partial_shape)
    taken, given = (tuple(None if side.is_dynamic else side.get_length() for side in shape) for shape in shapes)
    return Network(
        named(OPENVINO),
        taken,
        given,
        lambda images: ask(images, "rows")[0],
        heat if "evidence" in names else None,
        (lambda images: np.hstack(ask(images, "rows", "features"))) if "features" in names else None,
    )


def import_openvino() -> ModuleType:
    # Where the package openvino-telemetry is installed, the import of OpenVINO would report itself over the network.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    import openvino

    return openvino


def class_activation(logits: np.ndarray, evidence: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What speaks for the log of the odds of a class, place by place, as `explain.explainer` has it, without gradients.

    Args:
        logits: shape (n, classes). evidence: shape (n, height, width, classes). labels: int, shape (n,).

    Returns:
        float32, shape (n, height, width), 0 to 1.
    """
    chosen = np.eye(logits.shape[1], dtype=bool)[labels]
    others = np.where(chosen, -np.inf, logits.astype(np.float64))
    others = np.exp(others - others.max(axis=1, keepdims=True))
    weights = chosen - others / others.sum(axis=1, keepdims=True)
    raised = np.maximum(np.einsum("nhwc,nc->nhw", evidence, weights), 0)
    largest = raised.max(axis=(1, 2), keepdims=True)
    return np.divide(raised, largest, out=np.zeros_like(raised), where=largest > 0).astype(np.float32)


def convert(model: "keras.Model", path: Path) -> None:
    """Write a Keras model as a network file for OpenVINO.

    Raises:
        TouchlineError: OpenVINO cannot read one of its layers.
    """
    _pack(lambda xml: serialize(model, xml), path)


def write(network: "openvino.Model", path: Path) -> None:
    """Write a network of OpenVINO's own as a network file."""
    _pack(lambda xml: import_openvino().serialize(network, str(xml), str(xml.with_suffix(".bin"))), path)


def _pack(make: Callable[[Path], None], path: Path) -> None:
    """The network file of what `make` writes as `.xml` and `.bin`."""
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder, _XML), Path(folder, _BIN)
        make(xml)
        with zipfile.ZipFile(path, "w") as archive:
            for part in (xml, weights):
                archive.write(part, part.name)


def serialize(model: "keras.Model", xml: Path) -> None:
    """Write a Keras model in OpenVINO's format: `xml`, and the weights beside it in a `.bin`."""
    openvino = import_openvino()

    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), _outputs(model))
        try:
            network = openvino.Core().read_model(folder)
            openvino.serialize(network, str(xml), str(xml.with_suffix(".bin")))
        except RuntimeError as error:
            raise TouchlineError(
                f"OpenVINO cannot read the network {model.name} ({one_line(error)}): set compute.engine: tensorflow"
            ) from None


def save(model: "keras.Model", folder: Path, outputs: "Callable[[Any], Any] | None" = None) -> None:
    """Write a Keras model as a SavedModel. `model.export` would store every weight twice.

    Args:
        outputs: what a photo's tensor comes to; None for what the model makes of it.
    """
    import tensorflow as tf

    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    forward = outputs or (lambda photo: model(photo, training=False))
    module.serve = tf.function(forward, input_signature=[_photo(model)], autograph=False)
    tf.saved_model.save(module, str(folder), signatures=module.serve)


def _photo(model: "keras.Model") -> Any:
    """The signature of photos that a model takes."""
    import tensorflow as tf

    shape = model.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise TouchlineError(f"the network {model.name} takes {shape}: not photos")
    return tf.TensorSpec(shape, tf.uint8, name="photo")


def _outputs(model: "keras.Model") -> Callable[[Any], Mapping[str, Any]]:
    """What makes the outputs of a network file (see above) of photos."""
    import keras
    import tensorflow as tf

    head = _head(model)
    if head is None:
        return lambda photo: {"rows": model(photo, training=False)}
    mean, classes = _mean_and_classes(model, head)
    maps = _averaged_map(mean)
    if maps is None:
        both = keras.Model(model.inputs, [model.output, head.input])
        return lambda photo: dict(zip(("rows", "features"), both(photo, training=False), strict=True))
    whole = keras.Model(model.inputs, [head.input, maps])

    def outputs(photo: Any) -> Mapping[str, Any]:
        features, last = whole(photo, training=False)
        logits = tf.matmul(features, head.kernel) + (head.bias if head.use_bias else 0.0)
        if classes is None:
            evidence = tf.tensordot(last, head.kernel, 1)
        else:
            height, width, channels = last.shape[1:]
            places = tf.reshape(last, (-1, height * width, channels))
            evidence = tf.matmul(places, _slopes(head.kernel, classes.kernel, features))
            evidence = tf.reshape(evidence, (-1, height, width, head.units))
        return {"rows": tf.nn.softmax(logits), "features": features, "logits": logits, "evidence": evidence}

    return outputs


def _slopes(kernel: Any, of_classes: Any, features: Any) -> Any:
    """How much each feature raises each logit: the derivative, shape (n, features, classes).

    A feature counts twice: by itself, and through ImageNet's classes. Of these the network sees k p / |p|, where p is
    the softmax of the features times `of_classes`, and k a constant. The derivative is written out because OpenVINO
    cannot read the one that TensorFlow makes.

    Args:
        kernel: of the last layer, shape (features + ImageNet's classes, classes).
        of_classes: of the layer that tells ImageNet's classes, shape (features, ImageNet's classes).
        features: what the last layer is given, shape (n, features + ImageNet's classes).
    """
    import tensorflow as tf

    channels = of_classes.shape[0]
    direct, behind = kernel[:channels], kernel[channels:]
    scaled = features[:, channels:]
    raised = tf.matmul(scaled, behind) / tf.reduce_sum(scaled**2, axis=1, keepdims=True)
    by_classes = scaled[:, :, None] * behind - (scaled**2)[:, :, None] * raised[:, None, :]
    return direct + tf.matmul(of_classes[None], by_classes)


def _head(model: "keras.Model") -> "keras.layers.Dense | None":
    """The dense layer with softmax that a network ends in; None where it ends otherwise."""
    import keras

    head = model.layers[-1]
    ends_so = isinstance(head, keras.layers.Dense) and head.activation is keras.activations.softmax
    return head if ends_so else None


def _mean_and_classes(model: "keras.Model", head: "keras.layers.Dense") -> "tuple[Any, keras.layers.Dense | None]":
    """What a network's last layer is given (a symbolic tensor), and None. Where `backbones.pooled` has put ImageNet's
    classes behind the features: the features alone, and the layer that tells the classes.
    """
    classes = next((layer for layer in model.layers if layer.name == IMAGENET), None)
    return (head.input, None) if classes is None else (classes.input, classes)


def _averaged_map(tensor: Any) -> Any:
    """The feature map whose mean over all places a tensor is, of several views the first (symbolic tensors); None where
    it is something else.
    """
    from keras import layers

    while True:
        layer, node, _ = tensor._keras_history
        before = layer._inbound_nodes[node].input_tensors
        if isinstance(layer, layers.GlobalAveragePooling2D):
            return before[0]
        if not isinstance(layer, layers.Dropout | layers.Average):
            return None
        tensor = before[0]


def cached(name: str, make: Callable[[Path], None], what: str) -> Path:
    """A network file in this user's cache, made when missing.

    Args:
        name: what the network depends on.
        make: writes the file.
        what: what people call it.
    """
    path = _place(name)
    if not path.is_file():
        say(f"making the network file of {what} for OpenVINO, once on this machine: {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, SUFFIX) as draft:
            make(draft)
    with suppress(OSError):  # a cache that this user may only read
        path.touch()  # `touchline clean` goes by this time
    return path


def discard(name: str) -> None:
    """Delete the network file of that name from this user's cache."""
    _place(name).unlink(missing_ok=True)


def _place(name: str) -> Path:
    key = hashlib.sha256(f"{name} {version(OPENVINO)} {_FORMAT}".encode()).hexdigest()
    return cache() / f"{key}{SUFFIX}"


def cached_files() -> list[Path]:
    """The network files in this user's cache."""
    return sorted(cache().glob(f"*{SUFFIX}"))


def cache() -> Path:
    """The user's folder for files that can be made again: $TOUCHLINE_CACHE, or by the rule for $XDG_CACHE_HOME."""
    own = os.environ.get("TOUCHLINE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "touchline")
