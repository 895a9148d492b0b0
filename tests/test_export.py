"""`touchline export`: what other programs get answers as Keras does; what answers otherwise is not written."""

import hashlib
import json
import math
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import layers
from projects import built, copy
from typer.testing import CliRunner

from touchline import cli
from touchline.commands import export as exporting
from touchline.commands.export_formats import FORMATS
from touchline.core import files, params
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import BackboneFeatures, Params
from touchline.core.paths import Paths
from touchline.data import photos
from touchline.models import architectures, backbones
from touchline.models.heads import Head
from touchline.sources.sample import encode

EXPORT = "touchline export --format tflite"  # as docs/serving.md has it
SIDE, CLASSES, CHANNELS = 32, ["rugby", "Fußball", "<b>"], 6
KINDS = ["cnn", "one view", "two views", "two backbones"]


def some(pairs: set[tuple[Any, str]], *others: Any) -> list[Any]:
    """Each of `others` with each format: those in `pairs` in every run of the tests, the rest in `make test-all`."""
    return [
        pytest.param(other, form, marks=() if (other, form) in pairs else pytest.mark.slow)
        for other in others
        for form in FORMATS
    ]


def little_backbone(name: str, features: BackboneFeatures, project: Path) -> keras.Model:
    """A network of the layers that EfficientNet-Lite has, too small to know anything."""
    photo = keras.Input((features.image_size, features.image_size, 3), dtype="uint8", name="photo")
    x = layers.Rescaling(1 / 128, offset=-127 / 128)(photo)
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = layers.Conv2D(CHANNELS, 3, 2, use_bias=False)(x)
    x = layers.ReLU(6)(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.Add()([x, layers.BatchNormalization()(y)])
    return keras.Model(photo, x, name=name)


def unlike_new(model: keras.Model) -> keras.Model:
    """With weights, and statistics of BatchNorm, that no layer begins with; the answers are neither 0 nor 1."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) > 1:
            weight.assign(rng.normal(0, (2 / np.prod(weight.shape[:-1])) ** 0.5, weight.shape))
        elif weight.path.endswith(("gamma", "moving_variance")):
            weight.assign(rng.uniform(0.5, 2, weight.shape))
        else:
            weight.assign(rng.normal(0, 0.2, weight.shape))
    return model


@pytest.fixture
def model_of(monkeypatch: pytest.MonkeyPatch, params_with: Callable[..., Params]) -> Callable[[str], keras.Model]:
    monkeypatch.setattr(backbones, "_efficientnet_lite", little_backbone)

    def made(kind: str) -> keras.Model:
        if kind == "cnn":
            shipped = params_with().models["cnn"].model_copy(update={"filters": [4, 8]})
            return unlike_new(architectures.cnn(shipped, SIDE, len(CLASSES)))
        names = ["efficientnet_lite0", "efficientnet_lite2"][: 2 if kind == "two backbones" else 1]
        features = BackboneFeatures(image_size=SIDE, backbone=names, views=2 if kind == "two views" else 1)
        head = Head(np.zeros((CHANNELS * len(names), len(CLASSES)), np.float32), np.zeros(len(CLASSES), np.float32))
        return unlike_new(architectures.transfer(head, features, Path()))

    return made


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_TIMED_SECONDS", 0.0)


@pytest.fixture
def export(
    paths: Paths, model_of: Callable[[str], keras.Model], params_with: Callable[..., Params]
) -> Callable[..., keras.Model]:
    """Export a little model; its Keras model is the answer."""
    made: dict[str, keras.Model] = {}

    def exported(form: str, output: Path | None, kind: str = "cnn", model: keras.Model | None = None) -> keras.Model:
        if model is None:
            model = made.get(kind) or made.setdefault(kind, model_of(kind))
        file = paths.models / "little.keras"
        file.parent.mkdir(exist_ok=True)
        model.save(file)
        files.write_json(file.with_suffix(".json"), {"classes": CLASSES})
        exporting.run(paths, params_with(), str(file), form, output)
        return model

    return exported


def noise(photos: int) -> np.ndarray:
    patches = np.random.default_rng(photos).integers(0, 256, (photos, 4, 4, 3), dtype=np.uint8)
    return patches.repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)


def answers_of(form: str, file: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """What a program without this package and without Keras would do with an export, and what it reads in it."""
    if form == "tflite":
        interpreter = tf.lite.Interpreter(str(file))
        [photo], [output] = interpreter.get_input_details(), interpreter.get_output_details()

        def ask(images: np.ndarray) -> np.ndarray:
            interpreter.resize_tensor_input(photo["index"], images.shape)
            interpreter.allocate_tensors()
            interpreter.set_tensor(photo["index"], images)
            interpreter.invoke()
            return interpreter.get_tensor(output["index"])

        with zipfile.ZipFile(file) as archive:
            return ask, json.loads(archive.read("touchline.json"))
    if form == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(file)
        properties = session.get_modelmeta().custom_metadata_map
        about = {key: json.loads(value) for key, value in properties.items()}
        return lambda images: session.run(["probabilities"], {"photo": images})[0], about
    if form == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(file / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: compiled(images)["rows"], json.loads((file / "touchline.json").read_text())
    loaded = tf.saved_model.load(file)
    about = json.loads((file / "assets.extra/touchline.json").read_text())
    return lambda images: loaded.signatures["serving_default"](photo=tf.constant(images))["output_0"].numpy(), about


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize(
    ("kind", "form"),
    some({("one view", "onnx"), ("two views", "saved_model"), ("two backbones", "openvino"),
          *(("cnn", form) for form in FORMATS)}, *KINDS),
)  # fmt: skip
def test_an_export_answers_as_keras_does_for_any_number_of_photos(
    kind: str, form: str, export: Callable[..., keras.Model], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "a model"
    model = export(form, output, kind)
    ask, about = answers_of(form, output)
    expected = model(noise(40), training=False).numpy()
    assert np.ptp(expected, axis=0).max() > 0.01  # else anything would agree
    np.testing.assert_allclose(ask(noise(40)), expected, atol=1e-5)
    np.testing.assert_allclose(ask(noise(1)), model(noise(1), training=False), atol=1e-5)
    assert about["classes"] == CLASSES and about["image_size"] == SIDE and about["model"] == "models/little.keras"
    weights = b"".join(weight.numpy().tobytes() for weight in model.weights)
    assert about["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert sorted(output.parent.iterdir()) == [output]


@pytest.mark.slow
def test_it_says_how_the_export_compares_and_on_what(
    export: Callable[..., keras.Model], paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = export("tflite", tmp_path / "a.tflite")
    shown = capsys.readouterr().out
    assert "64 drawn scenes" in shown
    assert "64 of 64" in shown and str(tmp_path / "a.tflite") in shown
    cells = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if "│" in line]
    sizes = {row[1]: float(row[2]) for row in cells}
    model.save(tmp_path / "a.keras")
    assert sizes["Keras"] == pytest.approx((tmp_path / "a.keras").stat().st_size / 1e6, abs=0.051)
    assert sizes["TFLite"] == pytest.approx((tmp_path / "a.tflite").stat().st_size / 1e6, abs=0.051)

    names = [f"{number}.png" for number in range(3)]
    for number, name in enumerate(names[:2]):
        files.write_bytes(paths.photos / name, encode(noise(number + 1)[0], "png"))
    subsets = ["test", "train", "test"]  # of the two test photos, one is not on disk
    table = pd.DataFrame({"path": [f"data/photos/{name}" for name in names], "subset": subsets})
    files.write_table(paths.split_table, table)
    export("tflite", tmp_path / "b.tflite")
    assert "1 test photos of data/split.csv" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "form"), some({(0.05, "tflite"), (math.nan, "openvino")}, 0.05, math.nan))
def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(
    change: float, form: str, export: Callable[..., keras.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = FORMATS[form].write

    def tampering(model: keras.Model, draft: Path) -> None:
        bias = model.weights[-1].numpy()
        model.weights[-1].assign(bias + np.float32([change, 0, 0]))
        convert(model, draft)
        model.weights[-1].assign(bias)

    monkeypatch.setitem(FORMATS, form, replace(FORMATS[form], write=tampering))
    output = tmp_path / "out/model"
    with pytest.raises(TouchlineError, match=rf"{form}.*models/little\.keras") as e:
        export(form, output)
    assert e.value.exit_code == 1
    assert list(output.parent.iterdir()) == []


NO_SUCH = RuntimeError("no such\noperation")
BROKEN_OFF = KeyboardInterrupt()


@pytest.mark.parametrize(
    "failure, form",
    some({(NO_SUCH, "tflite"), (NO_SUCH, "saved_model"), (BROKEN_OFF, "openvino")}, NO_SUCH, BROKEN_OFF),
)
def test_a_conversion_that_breaks_off_leaves_nothing(
    form: str,
    failure: BaseException,
    export: Callable[..., keras.Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaking(model: keras.Model, draft: Path) -> None:
        half = draft / "half" if FORMATS[form].folder else draft
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        raise failure

    monkeypatch.setitem(FORMATS, form, replace(FORMATS[form], write=breaking))
    output = tmp_path / "out/model"
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else TouchlineError
    with pytest.raises(expected) as error:
        export(form, output)
    if expected is TouchlineError:
        assert all(word in str(error.value) for word in (form, "no such operation"))
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=() if form in ("tflite", "saved_model") else pytest.mark.slow) for form in FORMATS],
)
def test_what_is_there_stays(form: str, export: Callable[..., keras.Model], paths: Paths, tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    for output in (file, folder):
        with pytest.raises(ParamsError, match=rf"{output.name}.*--output"):
            export(form, output)
    assert file.read_text() == "mine" and list(folder.iterdir()) == []
    there = paths.exports / f"little{ ({'saved_model': '', 'openvino': '-openvino'}.get(form, '.' + form)) }"
    files.write_text(there, "mine")
    with pytest.raises(ParamsError, match=rf"exports/{there.name}"):
        export(form, None)
    assert there.read_text() == "mine"
    with pytest.raises(TouchlineError, match=r"below.*--output"):
        export(form, file / "below")


def test_a_model_whose_answers_are_no_numbers_is_not_exported(
    export: Callable[..., keras.Model], model_of: Callable[[str], keras.Model], tmp_path: Path
) -> None:
    model = model_of("cnn")
    model.weights[-1].assign([np.nan, 0, 0])
    with pytest.raises(TouchlineError):
        export("tflite", tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["tf2onnx", "onnxruntime"])
def test_without_the_extra_it_says_how_to_install_it(
    package: str, paths: Paths, params_with: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    with pytest.raises(TouchlineError, match=rf"{package}.*pip install 'touchline\[onnx\]'"):
        exporting.run(paths, params_with(), "", "onnx", None)


def test_an_unknown_format_is_an_error_of_use() -> None:
    outcome = CliRunner().invoke(cli.app, ["export", "--format", "coreml"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2 and all(form in outcome.output for form in FORMATS)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory):
    project = copy(built(tmp_path_factory).project, tmp_path_factory.mktemp("exporting") / "the project")
    said = project.call(*EXPORT.split()[1:]).out
    return SimpleNamespace(project=project, output=project.root / "exports/rugby-soccer-version-1.tflite", said=said)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_the_champion_is_exported_by_default_and_answers_as_evaluate_found(project: SimpleNamespace) -> None:
    root = project.project.root
    ask, about = answers_of("tflite", project.output)
    better = project.project.json("reports/registration.json")["better_model"]
    found = pd.read_csv(root / "reports/predictions.csv")
    found = found[found["model"] == better]
    assert f"{len(found)} test photos of data/split.csv" in project.said
    assert "exports/rugby-soccer-version-1.tflite" in project.said
    assert about["classes"] == params.load(root / "params.yaml").classes
    assert about["model"] == "rugby-soccer version 1"
    pixels = np.stack([photos.read(root / path, about["image_size"]) for path in found["path"]])
    expected = found[[f"probability:{name}" for name in about["classes"]]].to_numpy()
    np.testing.assert_allclose(ask(pixels), expected, atol=1e-5)
