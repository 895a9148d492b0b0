"""The two engines that run a network on photos give the same numbers, and what only looks at photos starts one."""

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from conftest import SHIPPED
from test_predict import CLASSES, SIDE, draw, planted

from touchline.core import files
from touchline.core.errors import TouchlineError
from touchline.core.params import ArticleParams, CnnParams
from touchline.core.paths import Paths
from touchline.models import architectures, backbones, engines, explain
from touchline.models.heads import Head
from touchline.models.inference import ModelFiles
from touchline.stages import train
from touchline.tracking import registered, registry, runs
from touchline.tracking.runs import open_store

if TYPE_CHECKING:
    import keras

NAME = "rugby-soccer"
AUGMENTATION = {"rotation": 0, "zoom": 0.0, "shift": 0.0, "flip": False}


def cnn() -> "keras.Model":
    settings = {"architecture": "cnn", "input": "pixels", "filters": [4, 8], "dropout": 0.2, "learning_rate": 0.01}
    rest = {"weight_decay": 0.0, "batch_size": 8, "epochs": 1, "patience": 0, "seed": 0, "precision": "float32"}
    return architectures.cnn(CnnParams(**settings, **rest, augmentation=AUGMENTATION), SIDE, 3)


def two_views(with_classes: bool = False) -> "keras.Model":
    """A backbone whose map is averaged over the places of a photo and of its mirror image, and a head; between them,
    if so asked, probabilities of other classes behind the mean.
    """
    import keras
    from keras import layers

    photo = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    backbone = keras.Model(photo, layers.Conv2D(5, 3, 4, activation="relu")(layers.Rescaling(1 / 255)(photo)))
    pooling = layers.GlobalAveragePooling2D()
    views = [pooling(backbone(view, training=False)) for view in (photo, keras.ops.flip(photo, 2))]
    mean = layers.Average()(views)
    if with_classes:
        classes = layers.UnitNormalization()(layers.Dense(7, activation="softmax", name=engines.IMAGENET)(mean))
        mean = layers.Concatenate()([mean, layers.Rescaling(4.0)(classes)])
    return keras.Model(photo, layers.Dense(3, activation="softmax")(mean))


def article() -> "keras.Model":
    settings = {"architecture": "article", "input": "pixels", "dense_units": 4, "dropout": 0.2, "learning_rate": 0.01}
    rest = {"batch_size": 8, "epochs": 1, "patience": 0, "seed": 0, "precision": "float32"}
    return architectures.article(ArticleParams(**settings, **rest, augmentation=AUGMENTATION), SIDE, 3)


MODELS = {
    "cnn": cnn,
    "two views": two_views,
    "classes behind the mean": partial(two_views, with_classes=True),
    "article": article,
    "planted": planted,
}


def photographs(count: int) -> np.ndarray:
    patches = np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return patches.repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)


@pytest.fixture(scope="module", params=MODELS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A Keras model and what OpenVINO makes of its network file."""
    import keras

    keras.utils.set_random_seed(1)
    model = MODELS[request.param]()
    file = tmp_path_factory.mktemp("network") / "network.openvino"
    engines.convert(model, file)
    return SimpleNamespace(name=request.param, model=model, openvino=engines.with_openvino(file))


@pytest.mark.parametrize("count", [1, 2, 33])
def test_both_engines_give_the_same_probabilities(network: SimpleNamespace, count: int) -> None:
    images = photographs(count)
    expected = engines.with_tensorflow(network.model).forward(images)
    found = network.openvino.forward(images)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=engines.TOLERANCE)
    assert network.openvino.input_shape == network.model.input_shape
    assert network.openvino.output_shape == network.model.output_shape


def test_a_network_is_asked_by_many_threads_and_ends_at_once(tmp_path: Path) -> None:
    engines.convert(cnn(), tmp_path / "cnn.openvino")
    batches = [photographs(count) for count in (1, 2, 7, 33)]
    expected = None
    for _ in range(20):
        network = engines.with_openvino(tmp_path / "cnn.openvino")
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(network.forward, batches))
        del network
        expected = expected or found
        for rows, first in zip(found, expected, strict=True):
            np.testing.assert_allclose(rows, first, atol=engines.TOLERANCE)


def test_the_class_activation_map_is_the_map_of_the_gradients(network: SimpleNamespace) -> None:
    if network.name == "article":  # it flattens its map, so it takes gradients
        assert network.openvino.heat is None
        return
    images = photographs(12)
    labels = np.arange(12) % network.model.output_shape[1]
    found = network.openvino.heat(images, labels)
    np.testing.assert_allclose(found, explain.explainer(network.model)(images, labels), atol=1e-4)
    assert found.max() == 1


@pytest.mark.parametrize("gpus, engine", [(0, engines.OPENVINO), (1, engines.TENSORFLOW)])
def test_the_engine_is_tensorflow_where_a_gpu_is_visible_unless_params_say_otherwise(
    gpus: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_visible_gpus", lambda: gpus)
    assert engines.chosen("auto") == engine
    assert [engines.chosen(each) for each in ("openvino", "tensorflow")] == ["openvino", "tensorflow"]


def test_a_machine_without_nvidias_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert engines._visible_gpus() == 0


def test_a_map_in_which_nothing_speaks_for_the_class_is_cold_and_a_sure_model_has_heat() -> None:
    evidence = np.zeros((2, 2, 2, 2), np.float32)
    evidence[:, 0, 0, 0] = 5000.0
    heat = engines.class_activation(np.array([[1250.0, 0.0]] * 2, np.float32), evidence, np.array([0, 1]))
    assert heat[0].tolist() == [[1, 0], [0, 0]] and not heat[1].any()


def test_the_network_file_is_openvinos_own_format_in_a_zip_archive(tmp_path: Path) -> None:
    import openvino

    engines.convert(planted(), tmp_path / "planted.openvino")
    with zipfile.ZipFile(tmp_path / "planted.openvino") as archive:
        archive.extractall(tmp_path)
    compiled = openvino.Core().compile_model(tmp_path / "network.xml", "CPU")
    assert compiled(photographs(3))["rows"].shape == (3, 2)


def test_a_network_file_is_made_on_first_use_and_then_no_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOUCHLINE_CACHE", str(tmp_path / "cache"))
    planted().save(tmp_path / "cnn.keras")
    first = ModelFiles.at(tmp_path / "cnn.keras").network("openvino")
    assert "cnn.keras" in capsys.readouterr().out
    monkeypatch.setattr(ModelFiles, "load", None)
    second = ModelFiles.at(tmp_path / "cnn.keras").network("openvino")
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(first.forward(photographs(2)), second.forward(photographs(2)))


@pytest.mark.parametrize("views", [1, 2])
def test_the_network_of_a_backbone_is_made_once(
    views: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params_with: Callable
) -> None:
    monkeypatch.setenv("TOUCHLINE_CACHE", str(tmp_path))
    features = params_with().features["pooled"].model_copy(update={"image_size": SIDE, "views": views})
    expected = backbones.network(features, tmp_path, "tensorflow").forward(photographs(2))
    if views == 1:  # of one EfficientNet-Lite TensorFlow is not needed
        monkeypatch.setattr(backbones, "import_tensorflow", None)
    found = [backbones.network(features, tmp_path, "openvino").forward(photographs(2))]
    monkeypatch.setattr(backbones, "without_tensorflow", None)
    found.append(backbones.network(features, tmp_path, "openvino").forward(photographs(2)))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=engines.TOLERANCE)
    other = features.model_copy(update={"image_size": 2 * SIDE})
    with pytest.raises(TypeError):  # of another size it is another network
        backbones.network(other, tmp_path, "openvino")


def test_a_whole_model_for_openvino_is_the_same_put_together_or_converted(
    tmp_path: Path, params_with: Callable
) -> None:
    features = params_with().features["pooled"].model_copy(update={"image_size": SIDE})
    random = np.random.default_rng(0)
    last = random.normal(0, 0.03, (1280, 2)).astype(np.float32), random.normal(0, 1, 2).astype(np.float32)
    engines.convert(architectures.transfer(Head(*last), features, tmp_path), tmp_path / "converted.openvino")
    engines.write(backbones.without_tensorflow(features, tmp_path, last), tmp_path / "put-together.openvino")
    asked = []
    for path in sorted(tmp_path.glob("*.openvino")):
        network, images = engines.with_openvino(path), photographs(2)
        asked.append((network.input_shape, network.described(images), network.heat(images, np.array([0, 1]))))
    assert asked[0][0] == asked[1][0]
    for one, other in zip(*(each[1:] for each in asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=engines.TOLERANCE)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its network file and its record, as training writes them."""
    path = tmp_path_factory.mktemp("models") / "cnn.keras"
    draw(path.parent / "photo.png", "red")
    trained = train.Trained(planted, [], 0, train.Labelled(["a"], [path.parent / "photo.png"], np.zeros(1, int), ["a"]))
    files.write_json(path.with_suffix(".json"), {"classes": CLASSES, **train._write(trained, path, CLASSES)})
    return path


def test_training_refuses_a_network_file_that_answers_otherwise(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.with_openvino

    def off(path: Path) -> engines.Network:
        network = real(path)
        forward = lambda images: network.forward(images) + np.float32([2e-5, -2e-5])  # noqa: E731
        return engines.Network(network.engine, network.input_shape, network.output_shape, forward)

    monkeypatch.setattr(engines, "with_openvino", off)
    trained = train.Trained(
        planted,
        [],
        0,
        SimpleNamespace(files=[model_file.parent / "photo.png"], labels=[0], digests=["a"], groups=["a"]),
    )
    with pytest.raises(TouchlineError, match="OpenVINO"):
        train._write(trained, tmp_path / "cnn.keras", CLASSES)
    assert list(tmp_path.glob("*.openvino")) == []


def test_files_that_the_record_does_not_describe_are_not_loaded(model_file: Path, tmp_path: Path) -> None:
    for suffix in (".keras", ".openvino"):
        folder = tmp_path / suffix
        folder.mkdir()
        for each in (".keras", ".openvino", ".json"):
            content = model_file.with_suffix(each).read_bytes()
            (folder / f"cnn{each}").write_bytes(content + b"." if each == suffix else content)
        with pytest.raises(TouchlineError, match=rf"cnn\{suffix}"):
            ModelFiles.at(folder / "cnn.keras").network("openvino")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", None])
def test_a_torn_network_file_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cnn.openvino"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("network.xml", "<net")
            archive.writestr("network.bin", b"")
    else:
        path.write_bytes(content)
    with pytest.raises(TouchlineError) as error:
        engines.with_openvino(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value).splitlines()) == 1


def test_a_network_that_goes_right_after_its_answer_holds_nothing_up(model_file: Path) -> None:
    """With a callback in Python, OpenVINO's threads and the one that drops the network waited for each other."""
    script = f"""
import pathlib, threading, numpy
from touchline.models import engines
def busy():
    while True:
        sum(range(1000))
for _ in range(2):
    threading.Thread(target=busy, daemon=True).start()
for _ in range(20):
    network = engines.with_openvino(pathlib.Path({str(model_file.with_suffix(".openvino"))!r}))
    network.forward(numpy.zeros((1, {SIDE}, {SIDE}, 3), numpy.uint8))
    del network
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.fixture(scope="module")
def project(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A project whose registry has a champion, version 1, and a version 2."""
    root = tmp_path_factory.mktemp("machine") / "a project"
    (root / "models").mkdir(parents=True)
    (root / "params.yaml").write_bytes(SHIPPED.read_bytes())
    paths = Paths(root, root)
    store = open_store(paths, NAME)
    for _ in range(2):
        run_id = runs.start(store, "a run", {}, {}, {"name": "photos", "digest": "0", "source": "-", "counts": {}})
        runs.finish(store, run_id, model_path=model_file, image_size=SIDE, classes=CLASSES, training_photos=["f" * 64],
                     metrics={})  # fmt: skip
        registry.register(store, NAME, run_id, {"why": "a test"}, "of a test")
    registry.promote(store, NAME, 1)
    return paths


def test_versions_are_read_as_mlflow_has_them(project: Paths) -> None:
    assert registered.versions(project, NAME) == registry.versions(open_store(project, NAME), NAME)
    assert registered.versions(project, "another") == []
    stored = registered.model(project, registered.versions(project, NAME)[0])
    assert (stored.classes, stored.training_photos) == (CLASSES, {"f" * 64})
    assert files.sha256(stored.openvino) == stored.openvino_sha256


def test_a_promotion_made_with_mlflow_itself_counts_at_once(project: Paths) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.mlflow / 'mlflow.db'}", f"sqlite:///{project.mlflow / 'mlflow.db'}")
    for number in (2, 1):
        client.set_registered_model_alias(NAME, "champion", str(number))
        holders = [each.number for each in registered.versions(project, NAME) if "champion" in each.aliases]
        assert holders == [number]


PREDICT = """
import sys
from touchline.cli import main
sys.argv = ["touchline", "predict", "--format", "json", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"tensorflow", "keras", "mlflow", "pandas", "pyarrow", "sklearn", "scipy", "matplotlib", "sqlalchemy"}
    print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("options", [[], ["--model", "2"], ["--explain"]], ids=" ".join)
def test_predict_with_a_local_champion_imports_no_heavy_package(
    project: Paths, tmp_path: Path, options: list[str]
) -> None:
    photo = draw(tmp_path / "photo.jpg", "blue")
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(photo), *options], cwd=project.workspace, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] == "blue"
    assert done.stderr.splitlines()[-1] == "[]"


TELEMETRY = """
import sys
from pathlib import Path
import numpy as np
connected = []
sys.addaudithook(lambda event, arguments: connected.append(arguments) if event == "socket.connect" else None)
from touchline.models import engines
engines.with_openvino(Path(sys.argv[1])).forward(np.zeros((2, 32, 32, 3), np.uint8))
print("openvino" in sys.modules, connected)
"""


@pytest.mark.parametrize("program", ["import openvino", TELEMETRY], ids=["OpenVINO alone", "Touchline"])
def test_openvino_reports_nothing_where_its_telemetry_is_installed(
    model_file: Path, tmp_path: Path, program: str
) -> None:
    mark = tmp_path / "imported"
    (tmp_path / "openvino_telemetry").mkdir()
    (tmp_path / "openvino_telemetry" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_file.with_suffix(".openvino"))], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    # By itself OpenVINO takes it up, so the second case can fail.
    assert mark.exists() == (program != TELEMETRY)
    if program == TELEMETRY:
        assert done.stdout.split(maxsplit=1) == ["True", "[]\n"], done.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A tracking server of MLflow's on loopback, with artifacts of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--serve-artifacts",
               "--artifacts-destination", str(tmp_path / "artifacts")]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_a_server_is_asked_over_http(
    server: str, paths: Paths, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert registered.versions(paths, NAME) == []
    store = open_store(paths, NAME)
    run_id = runs.start(store, "a run", {}, {}, {"name": "photos", "digest": "0", "source": "-", "counts": {}})
    runs.finish(store, run_id, model_path=model_file, image_size=SIDE, classes=CLASSES, training_photos=["f" * 64],
                 metrics={})  # fmt: skip
    registry.promote(store, NAME, registry.register(store, NAME, run_id, {"why": "a test"}, "of a test"))
    known = registry.versions(store, NAME)

    monkeypatch.setattr(registered, "open_store", None)
    [version] = found = registered.versions(paths, NAME)
    assert found == known and version.aliases == ("champion",)
    stored = registered.model(paths, version)
    assert (stored.classes, stored.training_photos) == (CLASSES, {"f" * 64})
    assert files.sha256(stored.openvino) == stored.openvino_sha256
    assert files.sha256(stored.file) == stored.model_sha256
