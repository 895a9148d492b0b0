"""The heat falls where the model looks: on planted networks whose answer hangs on one corner of the photo."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from touchline.core.errors import TouchlineError
from touchline.core.params import ArticleParams, BackboneFeatures, CnnParams
from touchline.models import architectures, explain, heads, inference

if TYPE_CHECKING:
    import keras

SIDE = 64
AUGMENTATION = {"rotation": 0.0, "zoom": 0.0, "shift": 0.0, "flip": False}
TRAINING = {
    "input": "pixels", "dropout": 0.2, "learning_rate": 0.1, "batch_size": 8, "epochs": 1, "patience": 1, "seed": 0,
    "augmentation": AUGMENTATION,
}  # fmt: skip


def heat_map(model: "keras.Model", photo: np.ndarray, label: int) -> np.ndarray:
    """The heat of one photo and one class."""
    return explain.explainer(model)(photo[None], np.array([label]))[0]


def with_a_patch(row: int, column: int) -> np.ndarray:
    """Grey noise with a red square of a quarter of the side; row and column are its corner."""
    photo = np.repeat(np.random.default_rng(0).integers(90, 110, (SIDE, SIDE, 1)), 3, axis=2).astype(np.uint8)
    photo[row : row + SIDE // 4, column : column + SIDE // 4] = (255, 0, 0)
    return photo


def centre(heat: np.ndarray) -> tuple[float, float]:
    """Where the heat lies on average, as shares of height and width."""
    rows, columns = ((np.arange(length) + 0.5) / length for length in heat.shape)
    return float((heat.sum(axis=1) * rows).sum() / heat.sum()), float((heat.sum(axis=0) * columns).sum() / heat.sum())


def only_red(model: "keras.Model") -> None:
    """Make every convolution say how much redder than green a place is; BatchNorm and ReLU pass it on."""
    import keras

    first = True
    for layer in model.layers:
        if not isinstance(layer, keras.layers.Conv2D):
            continue
        kernel = np.zeros(layer.kernel.shape, np.float32)
        middle = kernel.shape[0] // 2
        kernel[middle, middle, 0, 0] = 1
        if first:
            kernel[middle, middle, 1, 0] = -1
        first = False
        layer.set_weights([kernel, *(np.zeros(weight.shape, np.float32) for weight in layer.weights[1:])])


def cnn() -> "keras.Model":
    """Red is class 1."""
    model = architectures.cnn(
        CnnParams(architecture="cnn", filters=[4, 8], weight_decay=0.0, **TRAINING), SIDE, classes=2
    )
    only_red(model)
    kernel = np.zeros(model.layers[-1].kernel.shape, np.float32)
    kernel[0] = (-40, 40)
    model.layers[-1].set_weights([kernel, np.zeros(2, np.float32)])
    return model


def article() -> "keras.Model":
    """Red in the upper left quarter is class 1; the dense layer has no weight for any other place."""
    model = architectures.article(ArticleParams(architecture="article", dense_units=4, **TRAINING), SIDE, classes=2)
    only_red(model)
    dense, last = model.layers[-2:]
    kernel = np.zeros((SIDE // 8, SIDE // 8, 64, 4), np.float32)
    kernel[: SIDE // 16, : SIDE // 16, 0, 0] = 1
    dense.set_weights([kernel.reshape(-1, 4), np.zeros(4, np.float32)])
    kernel = np.zeros((4, 2), np.float32)
    kernel[0] = (-20, 20)
    last.set_weights([kernel, np.zeros(2, np.float32)])
    return model


def planted_backbone(features: BackboneFeatures, _: Path) -> "keras.Model":
    """A frozen network, or several side by side, whose map says how red, and how green, 8 x 8 pixels are."""
    import keras

    from touchline.models import backbones

    def one(name: str, side: int) -> keras.Model:
        photo = keras.Input((SIDE, SIDE, 3), dtype="uint8")
        x = keras.layers.Rescaling(1 / 255)(photo)
        convolution = keras.layers.Conv2D(2, side, strides=side, activation="relu", name=f"{name}_conv")
        model = keras.Model(photo, convolution(x), name=name)
        kernel = np.zeros((side, side, 3, 2), np.float32)
        kernel[:, :, 0, 0] = kernel[:, :, 1, 1] = 1 / side**2
        kernel[:, :, 1, 0] = kernel[:, :, 0, 1] = -1 / side**2
        convolution.set_weights([kernel, np.zeros(2, np.float32)])
        return model

    built = [one(name, 8) for name in features.backbone]
    model = built[0] if len(built) == 1 else backbones._side_by_side(built)
    model.trainable = False
    return model


def transfer(backbone: Any, views: int) -> Callable[[pytest.MonkeyPatch], "keras.Model"]:
    def build(monkeypatch: pytest.MonkeyPatch) -> "keras.Model":
        monkeypatch.setattr("touchline.models.backbones.build", planted_backbone)
        features = BackboneFeatures(image_size=SIDE, backbone=backbone, views=views)
        weights = np.tile(np.array([[-50, 50], [50, -50]], np.float32), (len(features.backbone), 1))
        return architectures.transfer(heads.Head(weights, np.zeros(2, np.float32)), features, Path())

    return build


MODELS = {
    "cnn": lambda _: cnn(),
    "article": lambda _: article(),
    "transfer": transfer("one", 1),
    "two views": transfer("one", 2),
    "two backbones": transfer(["one", "two"], 1),
    "two backbones, two views": transfer(["one", "two"], 2),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "keras.Model":
    """A planted model as it comes out of its file, where nothing is left of how it was built."""
    MODELS[request.param](monkeypatch).save(tmp_path / "model.keras")
    return inference.load_model(tmp_path / "model.keras")


def test_the_heat_lies_on_what_speaks_for_the_class(model: "keras.Model") -> None:
    photo = with_a_patch(0, 0)
    [probabilities] = model.predict(photo[None], verbose=0)
    assert probabilities[1] > 0.9
    heat = heat_map(model, photo, 1)
    assert heat.dtype == np.float32 and heat.ndim == 2 and (heat.min(), heat.max()) == (0, 1)
    row, column = centre(heat)
    assert 0.05 < row < 0.25 and 0.05 < column < 0.25, (row, column)
    # Nothing in it speaks for the other class.
    assert not heat_map(model, photo, 0).any() or model.name == "transfer"


@pytest.mark.parametrize("name", [name for name in MODELS if name != "article"])
def test_the_heat_moves_with_the_patch_and_is_not_mirrored(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    MODELS[name](monkeypatch).save(tmp_path / "model.keras")
    explainer = explain.explainer(inference.load_model(tmp_path / "model.keras"))
    corners = [(0, 0), (0, 48), (48, 0), (48, 48)]
    heats = explainer(np.stack([with_a_patch(*corner) for corner in corners]), np.ones(4, np.int64))
    found = [tuple(round(share) for share in centre(heat)) for heat in heats]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_place_the_dense_layer_does_not_look_at_stays_cold() -> None:
    """A mean of the gradients over all places, as Grad-CAM has it, would light up the lower right corner as well."""
    photo = np.maximum(with_a_patch(0, 0), with_a_patch(48, 48))
    photo[48:, 48:] = (255, 0, 0)
    photo[:16, :16] = (255, 0, 0)
    heat = heat_map(article(), photo, 1)
    assert heat[:4, :4].max() == 1 and not heat[4:, 4:].any()


def test_a_model_that_is_surer_than_float32_can_say_has_heat(model: "keras.Model") -> None:
    last = model.layers[-1]
    last.set_weights([1000 * last.kernel.numpy(), last.bias.numpy()])
    photo = with_a_patch(0, 0)
    assert model.predict(photo[None], verbose=0)[0, 1] == 1
    assert heat_map(model, photo, 1).max() == 1


def test_what_lifts_both_classes_alike_is_no_heat() -> None:
    model = cnn()
    kernel = np.zeros(model.layers[-1].kernel.shape, np.float32)
    kernel[0] = (40, 40)
    model.layers[-1].set_weights([kernel, np.zeros(2, np.float32)])
    assert not heat_map(model, with_a_patch(0, 0), 1).any()


def test_a_model_without_a_feature_map_says_so() -> None:
    import keras

    photo = keras.Input((8, 8, 3), dtype="uint8", name="photo")
    flat = keras.layers.Reshape((192,))(keras.layers.Rescaling(1 / 255)(photo))
    model = keras.Model(photo, keras.layers.Dense(2, activation="softmax")(flat), name="odd")
    with pytest.raises(TouchlineError, match="odd"):
        explain.explainer(model)


@pytest.mark.parametrize("size", [(1500, 1000), (100, 300), (64, 64)])
def test_an_overlay_has_the_aspect_of_its_photo_and_the_heat_in_its_place(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size, (90, 120, 90)).save(tmp_path / "photo.jpg")
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1
    content = explain.overlay((tmp_path / "photo.jpg").read_bytes(), heat, "Rugby, Fußball 93 %")
    assert explain.is_overlay(content) and not explain.is_overlay((tmp_path / "photo.jpg").read_bytes())
    (tmp_path / "drawn.jpg").write_bytes(content)
    with Image.open(tmp_path / "drawn.jpg") as drawn:
        drawn.load()
        height = drawn.height - explain._CAPTION
        width = round(height * size[0] / size[1])
        assert max(width, height) == 720 and drawn.width == max(width, explain._CAPTION_WIDTH)
        colours = np.asarray(drawn)[:height, :width].astype(int)
        caption = np.asarray(drawn)[height:]
    warmth = colours[..., 0] - colours[..., 2]
    assert warmth[: height // 6, -width // 6 :].mean() > 50 and abs(warmth[height // 2 :, : width // 2]).mean() < 5
    assert caption.min() < 100 and caption[:, -20:].min() > 240
