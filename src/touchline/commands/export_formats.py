"""The formats of `touchline export`: an entry in FORMATS is all that a further one needs.

In every format uint8 RGB photos, shape (n, side, side, 3), go in, for any n, and probabilities, float32, shape
(n, classes), come out. What else a program must know lies inside:

- `tflite`: `touchline.json` in a zip archive behind the model, where TFLite's metadata keeps its files too;
- `onnx`: the model's `metadata_props`, each value JSON;
- `saved_model`: `assets.extra/touchline.json`;
- `openvino`: `touchline.json`, beside `network.xml` and `network.bin`. Compile it with `INFERENCE_PRECISION_HINT: f32`:
  without that, a processor that computes in bfloat16 differs by up to 0.002 in a probability.

The command line reads the names whenever it starts, so nothing heavy is imported here.
"""

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core.files import write_json

if TYPE_CHECKING:
    import keras

    from touchline.models.engines import Forward

RECORD = "touchline.json"
# What tf2onnx writes by itself; ONNX Runtime reads it since 1.10, and our layers gain nothing from later ones.
_OPSET = 15


@dataclass(frozen=True)
class Format:
    """A format to export to.

    Attributes:
        ending: of the name.
        folder: whether it is a folder.
        engine: what runs it.
        needs: packages that the plain installation lacks.
        write: puts a Keras model into a file of that name.
        describe: puts the record into it.
        load: what makes it ready to run.
    """

    ending: str
    engine: str
    write: Callable[["keras.Model", Path], None]
    describe: Callable[[Path, dict[str, Any]], None]
    load: Callable[[Path], "Forward"]
    needs: tuple[str, ...] = ()
    folder: bool = False


def _write_tflite(model: "keras.Model", draft: Path) -> None:
    import tensorflow as tf

    # Built-in operations alone: Keras allows TensorFlow's too, which no plain interpreter has.
    operations = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    model.export(str(draft), format="litert", verbose=False, target_spec=operations)


def _describe_tflite(draft: Path, about: dict[str, Any]) -> None:
    with zipfile.ZipFile(draft, "a") as archive:
        archive.writestr(RECORD, json.dumps(about, ensure_ascii=False))


def _load_tflite(draft: Path) -> "Forward":
    import tensorflow as tf

    with warnings.catch_warnings():
        # It says that its place will be a package of its own, ai_edge_litert; TensorFlow 2.21 still has it.
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")
        interpreter = tf.lite.Interpreter(model_path=str(draft), num_threads=os.cpu_count())
    asked = interpreter.get_signature_runner()
    [photo], [probabilities] = asked.get_input_details(), asked.get_output_details()
    return lambda images: asked(**{photo: images})[probabilities]


def _write_onnx(model: "keras.Model", draft: Path) -> None:
    model.export(str(draft), format="onnx", verbose=False, opset_version=_OPSET)


def _describe_onnx(draft: Path, about: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(draft)
    # tf2onnx names both after its own bookkeeping.
    [photo], [output] = model.graph.input, model.graph.output
    for node in model.graph.node:
        node.output[:] = ["probabilities" if name == output.name else name for name in node.output]
    output.name = "probabilities"
    for value in (photo, output):
        value.type.tensor_type.shape.dim[0].dim_param = "photos"
    onnx.helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()})
    onnx.checker.check_model(model)
    onnx.save(model, draft)


def _load_onnx(draft: Path) -> "Forward":
    import onnxruntime

    session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
    [photo] = session.get_inputs()
    return lambda images: session.run(None, {photo.name: images})[0]


def _write_openvino(model: "keras.Model", draft: Path) -> None:
    from touchline.models import engines

    draft.mkdir()
    engines.serialize(model, draft / "network.xml")


def _describe_openvino(draft: Path, about: dict[str, Any]) -> None:
    write_json(draft / RECORD, about)


def _load_openvino(draft: Path) -> "Forward":
    from touchline.models import engines

    return engines.with_openvino_files(draft / "network.xml").forward


def _write_saved_model(model: "keras.Model", draft: Path) -> None:
    from touchline.models import engines

    engines.save(model, draft)


def _describe_saved_model(draft: Path, about: dict[str, Any]) -> None:
    write_json(draft / "assets.extra" / RECORD, about)


def _load_saved_model(draft: Path) -> "Forward":
    import tensorflow as tf

    loaded = tf.saved_model.load(str(draft))
    return lambda images: loaded.serve(tf.constant(images)).numpy()


FORMATS = {
    "tflite": Format(".tflite", "TFLite", _write_tflite, _describe_tflite, _load_tflite),
    "onnx": Format(".onnx", "ONNX Runtime", _write_onnx, _describe_onnx, _load_onnx, needs=("tf2onnx", "onnxruntime")),
    "saved_model": Format("", "SavedModel", _write_saved_model, _describe_saved_model, _load_saved_model, folder=True),
    "openvino": Format("-openvino", "OpenVINO", _write_openvino, _describe_openvino, _load_openvino, folder=True),
}
