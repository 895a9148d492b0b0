"""`touchline export`: a model in a format that other programs run, checked against Keras before it counts as done.

In every format uint8 RGB photos, shape (n, side, side, 3), go in, for any n, and probabilities, float32, shape
(n, classes), come out. What else a program must know lies inside (see `_about`):

- `tflite`: `touchline.json` in a zip archive behind the model, where TFLite's metadata keeps its files too;
- `onnx`: the model's `metadata_props`, each value JSON;
- `saved_model`: `assets.extra/touchline.json`.
"""

import hashlib
import importlib.util
import json
import os
import re
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.commands.predict import Classifier, resolve
from touchline.core import parallel
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_table, replacing, write_json
from touchline.core.params import Params, SampleParams
from touchline.core.paths import Paths
from touchline.data import photos
from touchline.models.inference import BATCH, Forward, forward_pass
from touchline.sources import sample

if TYPE_CHECKING:
    import keras

# Of a probability. Sums in another order differ by about 1e-6; a layer that was converted wrongly, by far more.
TOLERANCE = 1e-4
PHOTOS = 64
RECORD = "touchline.json"
# What tf2onnx writes by itself; ONNX Runtime reads it since 1.10, and our layers gain nothing from later ones.
_OPSET = 15
_TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class _Format:
    """A format to export to.

    Attributes:
        ending: of the file; empty where it is a folder.
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
    load: Callable[[Path], Forward]
    needs: tuple[str, ...] = ()


def run(paths: Paths, params: Params, wanted: str, form: str, output: Path | None) -> None:
    """Write a model in a format, and print how it compares with Keras.

    Args:
        wanted: see `predicting.resolve`.
        form: `tflite`, `onnx` or `saved_model`.
        output: the file (of `saved_model` the folder) to make; None for `exports/<name of the model>`.

    Raises:
        ParamsError: there is something at `output`.
        TouchlineError: a package is missing, the model cannot be had or converted, or the result answers differently
            from Keras; then nothing is left at `output`.
    """
    target = _FORMATS[form]
    missing = [name for name in target.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise TouchlineError(
            f"--format {form} needs {' and '.join(missing)}, not installed here: run `pip install 'touchline[{form}]'`"
        )
    if output is not None:
        _refuse_existing(output, paths)
    classifier = resolve(paths, params, wanted)
    if output is None:
        # Not in models/: DVC tells by that folder whether to judge the models again.
        output = paths.exports / (_file_name(classifier) + target.ending)
        _refuse_existing(output, paths)
        paths.exports.mkdir(exist_ok=True)
    images, what = _photos(paths, classifier.side)
    keras_forward = forward_pass(classifier.model, 1)
    expected = _answers(keras_forward, images)
    if not np.isfinite(expected).all():
        raise TouchlineError(f"{classifier.name} answers with no numbers: train it anew, or name another with --model")

    try:
        with replacing(output, target.ending) if target.ending else _new_folder(output) as draft:
            _write(target, classifier, draft, form)
            forward = target.load(draft)
            found = _answers(forward, images)
            difference = float(np.abs(found - expected).max())
            # Written so that NaN is refused too.
            if not difference <= TOLERANCE:
                raise TouchlineError(
                    f"the {form} export of {classifier.name} differs from Keras by {difference:.2g} in a probability, "
                    f"over {what}; {TOLERANCE:g} is allowed: nothing was written"
                )
            rows = {
                "Keras": (_keras_megabytes(classifier.model), keras_forward),
                target.engine: (_megabytes(draft), forward),
            }
            timed = {
                engine: (size, *(_milliseconds(each, images, batch) for batch in (1, BATCH)))
                for engine, (size, each) in rows.items()
            }
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise TouchlineError(f"{output} cannot be written ({error.strerror}): name another --output") from None
    _show(f"{classifier.name} as {form}", timed)
    equal = int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
    print(f"{what}: largest difference of a probability {difference:.1e}, equal labels {equal} of {len(images)}")
    print(f"written: {paths.relative(output.absolute())}")


def _refuse_existing(output: Path, paths: Paths) -> None:
    if os.path.lexists(output):
        shown = paths.relative(output.absolute())
        raise ParamsError(f"{shown} exists: delete it, or name another file with --output")


def _file_name(classifier: Classifier) -> str:
    name = classifier.name.removesuffix(".keras")
    return re.sub(r"[^\w.-]+", "-", re.split(r"[/\\]", name)[-1])


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """As `files.replacing`, for a folder that is not there yet: a name in a temporary folder, moved when all went well.

    Its name is not that of a partial file: whoever sweeps those away expects no folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        draft = Path(folder, path.name)
        yield draft
        draft.rename(path)


def _photos(paths: Paths, side: int) -> tuple[np.ndarray, str]:
    """Photos to compare on, uint8 (n, side, side, 3), and what they are.

    Test photos of the project; drawn scenes where it has none.
    """
    if paths.split_table.is_file():
        split = read_table(paths.split_table)
        files = (paths.workspace / path for path in split.loc[split["subset"] == "test", "path"])
        # Named by digest: in this order classes are mixed, and a second export is held against the same ones.
        found = sorted((file for file in files if file.is_file()), key=lambda file: file.name)[:PHOTOS]
        if found:
            read = parallel.in_order(lambda file: photos.read(file, side), found)
            return np.stack(list(read)), f"{len(found)} test photos of {paths.relative(paths.split_table)}"
    scenes = islice(sample.candidates(SampleParams(per_class=PHOTOS, seed=0), ["rugby", "soccer"]), PHOTOS)
    drawn = (scene.read for scene in scenes if scene.read)
    read = parallel.in_order(lambda draw: photos.decode(draw(), side), drawn)
    return np.stack(list(read)), f"{PHOTOS} drawn scenes (the project has no test photos)"


def _answers(forward: Forward, images: np.ndarray) -> np.ndarray:
    """Probabilities, shape (n, classes): the first photo alone, the others in batches, the last of which is smaller."""
    return np.concatenate([forward(batch) for batch in np.split(images, range(1, len(images), BATCH))])


def _milliseconds(forward: Forward, images: np.ndarray, batch: int) -> float:
    """Of a photo, when so many are asked about at once: the median of a second's runs, and of at least three."""
    images = np.resize(images, (batch, *images.shape[1:]))
    forward(images)
    took: list[float] = []
    while len(took) < 3 or sum(took) < _TIMED_SECONDS:
        began = time.perf_counter()
        forward(images)
        took.append(time.perf_counter() - began)
    return 1000 * float(np.median(took)) / batch


def _megabytes(path: Path) -> float:
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def _keras_megabytes(model: "keras.Model") -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        return _megabytes(Path(folder))


def _show(title: str, rows: dict[str, tuple[float, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", title=Text(title), title_justify="left")
    for heading in ("MB", "ms a photo, alone", f"ms a photo, {BATCH} at once"):
        table.add_column(heading, justify="right")
    for engine, numbers in rows.items():
        table.add_row(engine, *(f"{number:,.1f}" for number in numbers))
    Console().print(table)


def _about(classifier: Classifier) -> dict[str, Any]:
    """What a program must know to use the model, and which one it is.

    `weights_sha256` is the same for the same weights, whatever the format.
    """
    digest = hashlib.sha256()
    for weight in classifier.model.weights:
        digest.update(weight.numpy().tobytes())
    side = classifier.side
    return {
        "classes": classifier.classes,
        "image_size": side,
        "input": f"uint8 RGB, turned upright, the whole photo squashed to {side} x {side}",
        "model": classifier.name,
        "weights_sha256": digest.hexdigest(),
    }


def _write(target: _Format, classifier: Classifier, draft: Path, form: str) -> None:
    try:
        with warnings.catch_warnings():
            # Keras asks NumPy for a name that is no more, for the sake of tf2onnx.
            warnings.filterwarnings("ignore", category=FutureWarning, module="keras")
            target.write(classifier.model, draft)
    except OSError:
        raise
    except Exception as error:  # the converters raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TouchlineError(
            f"{classifier.name} cannot be converted to {form} ({reason}): try another --format"
        ) from None
    target.describe(draft, _about(classifier))


def _write_tflite(model: "keras.Model", draft: Path) -> None:
    import tensorflow as tf

    # Built-in operations alone: Keras allows TensorFlow's too, which no plain interpreter has.
    operations = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    model.export(str(draft), format="litert", verbose=False, target_spec=operations)


def _describe_tflite(draft: Path, about: dict[str, Any]) -> None:
    with zipfile.ZipFile(draft, "a") as archive:
        archive.writestr(RECORD, json.dumps(about, ensure_ascii=False))


def _load_tflite(draft: Path) -> Forward:
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


def _load_onnx(draft: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
    [photo] = session.get_inputs()
    return lambda images: session.run(None, {photo.name: images})[0]


def _write_saved_model(model: "keras.Model", draft: Path) -> None:
    import tensorflow as tf

    # As `model.export` names things; that stores every weight twice.
    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    photo = tf.TensorSpec(model.input_shape, tf.uint8, name="photo")
    module.serve = tf.function(lambda photo: model(photo, training=False), input_signature=[photo])
    tf.saved_model.save(module, str(draft), signatures=module.serve)


def _describe_saved_model(draft: Path, about: dict[str, Any]) -> None:
    write_json(draft / "assets.extra" / RECORD, about)


def _load_saved_model(draft: Path) -> Forward:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(draft))
    return lambda images: loaded.serve(tf.constant(images)).numpy()


_FORMATS = {
    "tflite": _Format(".tflite", "TFLite", _write_tflite, _describe_tflite, _load_tflite),
    "onnx": _Format(".onnx", "ONNX Runtime", _write_onnx, _describe_onnx, _load_onnx, needs=("tf2onnx", "onnxruntime")),
    "saved_model": _Format("", "SavedModel", _write_saved_model, _describe_saved_model, _load_saved_model),
}
