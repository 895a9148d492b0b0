"""Several devices and other precisions: the same training, and a finished model that knows nothing of either.

There is no GPU here; a CPU divided into two devices takes the same way through TensorFlow.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import Params, check
from touchline.core.paths import Paths
from touchline.models import training as fitting
from touchline.stages import train

# Trains on one device, on both, and in another precision; in a process of its own, since
# devices are divided before TensorFlow first uses them.
PROGRAM = """
import json, sys
from pathlib import Path

import keras, numpy as np, tensorflow as tf

sys.path.insert(0, sys.argv[1])
half = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [half, half])

import test_train as given
from touchline.stages import train as training
from touchline.core.errors import TouchlineError

folder, found = Path(sys.argv[2]), {}
planted = given.Planted(folder / "pixels")
plain = given.CNN.model_copy(update={"dropout": 0.0, "epochs": 2})


def fit(name, devices, train=planted.train, validation=planted.validation, **changes):
    params = plain.model_copy(update=changes)
    trained = training.fit(
        params, given.PIXELS, planted.arrays, train, validation, Path(), lambda row: None, devices
    )
    found[name] = trained.history
    trained.model.save(folder / f"{name}.keras")
    np.save(folder / f"{name}.npy", trained.model.predict(planted.photos[:8], verbose=0))


def part(photos, count):
    return training.Labelled(*(items[:count] for items in (photos.digests, photos.files, photos.labels, photos.groups)))


fit("one", "one")
fit("all", "all")
# 17 photos are one more than a batch, so one device would be left without any.
fit("odd one", "one", validation=part(planted.validation, 17))
fit("odd all", "all", train=part(planted.train, 81), validation=part(planted.validation, 17))
fit("half", "all", precision="mixed_float16")
try:
    fit("uneven", "all", batch_size=15)
except TouchlineError as error:
    found["refused"] = str(error)
found["policy"] = keras.config.dtype_policy().name
print(json.dumps(found))
"""
LOSSES = ("train/loss", "validation/loss")


class Ran:
    """What PROGRAM said, and the files it left."""

    def __init__(self, folder: Path) -> None:
        program = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(folder)]
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        done = subprocess.run(program, capture_output=True, text=True, env=environment | {"CUDA_VISIBLE_DEVICES": "-1"})
        assert done.returncode == 0, done.stderr[-3000:]
        self.folder, self.said = folder, json.loads(done.stdout.splitlines()[-1])

    def losses(self, name: str) -> np.ndarray:
        return np.array([[row[key] for key in LOSSES] for row in self.said[name]])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("two devices"))


@pytest.mark.slow
def test_two_devices_have_the_losses_of_one(ran: Ran) -> None:
    one, both = ran.losses("one"), ran.losses("all")
    assert one.shape == (2, 2) and one[0, 0] > one[1, 0]
    np.testing.assert_allclose(both, one, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_photos_that_two_devices_cannot_share_evenly_still_train_and_all_of_validation_counts(ran: Ran) -> None:
    one, both = ran.losses("odd one"), ran.losses("odd all")
    assert np.isfinite(both).all()
    shares = [row["validation/accuracy"] * 17 for row in ran.said["odd all"]]
    np.testing.assert_allclose(shares, np.round(shares), atol=1e-4)
    assert one.shape == both.shape


@pytest.mark.slow
def test_half_precision_has_nearly_the_losses_of_full(ran: Ran) -> None:
    one, half = ran.losses("one"), ran.losses("half")
    np.testing.assert_allclose(half, one, rtol=0.1, atol=0.01)
    assert (half != one).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "all", "half"])
def test_the_finished_model_is_of_one_device_and_of_float32(ran: Ran, name: str) -> None:
    model = keras.saving.load_model(ran.folder / f"{name}.keras", safe_mode=True)
    assert {layer.dtype_policy.name for layer in model.layers} <= {"float32", "uint8"}
    assert (model.inputs[0].dtype, model.outputs[0].dtype) == ("uint8", "float32")
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert norms and not any(layer.synchronized for layer in norms)

    import test_train as given

    photos = given.coloured(np.arange(96) % 2, 1)[:8]  # what Planted trains on
    expected = np.load(ran.folder / f"{name}.npy")
    np.testing.assert_allclose(model.predict(photos, verbose=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_batches_that_cannot_be_shared_evenly_are_refused_in_one_line(ran: Ran) -> None:
    assert all(word in ran.said["refused"] for word in ("batch_size", "15", "compute.devices"))


@pytest.mark.slow
def test_the_precision_of_other_models_stays_as_it_was(ran: Ran) -> None:
    assert ran.said["policy"] == "float32"


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("photos", [19, 64, 73, 97, 200])
def test_no_replica_is_left_without_a_photo(photos: int, replicas: int) -> None:
    edges = [0, *fitting._cuts(photos, 24, replicas), photos]
    sizes = np.diff(edges)
    assert sizes.sum() == photos and (sizes[:-1] % replicas == 0).all() and sizes[:-2].max(initial=24) == 24
    # As TensorFlow shares a batch: the same number for each, rounded up, while there are any.
    assert all(rows > -(-rows // replicas) * (replicas - 1) for rows in sizes)
    if replicas == 1:
        assert edges == [*range(0, photos, 24), photos]


def test_too_few_photos_for_so_many_devices_are_one_line() -> None:
    with pytest.raises(TouchlineError, match=r"\b5\b.*\b4\b"):
        fitting._cuts(5, 24, 4)


@pytest.mark.parametrize("tasks", [{"worker": ["a:1", "b:1"]}, {"chief": ["a:1"], "worker": ["b:1"]}])
def test_several_machines_are_refused_before_anything_is_done(
    tasks: dict, paths: Paths, params_with: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": tasks, "task": {"type": "worker", "index": 0}}))
    with pytest.raises(TouchlineError, match=r"TF_CONFIG.*\b2\b"):
        train.run(paths, params_with(), "cnn")
    assert list(paths.workspace.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"cluster": 3}'])
def test_a_tf_config_that_is_none_is_one_line(
    content: str, paths: Paths, params_with: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_CONFIG", content)
    with pytest.raises(TouchlineError, match="TF_CONFIG"):
        train.run(paths, params_with(), "cnn")


@pytest.mark.parametrize("content", ["", "{}", '{"cluster": {"worker": ["a:1"]}}'])
def test_one_machine_is_not_refused(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", content)
    train._refuse_more_machines()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_a_gpu_that_is_named_and_absent_is_one_line(
    paths: Paths, params_with: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(TouchlineError, match=r"CUDA_VISIBLE_DEVICES.*'0,1'.*\b0\b"):
        train.run(paths, params_with(), "cnn")
    for hidden in ("", "-1", "-1,0", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        train._refuse_absent_gpus()


def test_a_precision_or_devices_that_are_not_known_name_the_key(shipped: dict) -> None:
    shipped["models"]["cnn"]["precision"] = "float16"
    with pytest.raises(ParamsError, match=r"models\.cnn\.precision.*'float16'.*'float32', 'mixed_float16'"):
        check(shipped)
    shipped["models"]["cnn"]["precision"] = "mixed_bfloat16"
    shipped["compute"]["devices"] = "two"
    with pytest.raises(ParamsError, match=r"compute\.devices.*'two'.*'one' or 'all'"):
        check(shipped)


@pytest.mark.slow
def test_tensorflow_takes_a_gpus_memory_as_it_needs_it() -> None:
    program = "import os; from touchline.core.tensorflow import import_tensorflow as go; go();"
    program += "print(os.environ['TF_FORCE_GPU_ALLOW_GROWTH'])"
    environment = {name: value for name, value in os.environ.items() if name != "TF_FORCE_GPU_ALLOW_GROWTH"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "true"


def test_keras_is_set_as_the_models_need_it_whatever_the_user_s_own_settings_are(tmp_path: Path) -> None:
    """What a person who works with PyTorch beside has in the environment and in ~/.keras."""
    settings = {"backend": "torch", "image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.01}
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras/keras.json").write_text(json.dumps(settings))
    program = "from touchline.core.tensorflow import import_tensorflow as go; go(); import keras; c = keras.config;"
    program += "print(c.backend(), c.image_data_format(), c.floatx(), c.epsilon())"
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_HOME"}
    environment |= {"HOME": str(tmp_path), "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["tensorflow", "channels_last", "float32", "1e-07"], done.stderr
