"""What is said of a model: figures against known ones, tables of one shape for any number of classes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from touchline.core import files
from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.models import engines, inference, scores
from touchline.report import plots
from touchline.stages import evaluate


def sure(predicted: list[int], classes: int = 2, confidence: float = 1.0) -> np.ndarray:
    """Probabilities that give each photo its predicted class with one confidence, the rest evenly."""
    found = np.full((len(predicted), classes), (1 - confidence) / (classes - 1), np.float32)
    found[np.arange(len(predicted)), predicted] = confidence
    return found


@pytest.mark.parametrize(
    "right, photos, interval",
    [
        # Newcombe (1998), Statistics in Medicine 17: table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
    ],
)
def test_wilson_gives_the_published_intervals(right: int, photos: int, interval: tuple[float, float]) -> None:
    assert scores.wilson(right, photos) == pytest.approx(interval, abs=5e-5)


def test_mcnemar_counts_only_photos_on_which_the_models_differ() -> None:
    labels = np.zeros(40, int)
    # 25 both right, 3 both wrong, 2 only the first, 10 only the second.
    first = sure([0] * 25 + [1] * 3 + [0] * 2 + [1] * 10)
    second = sure([0] * 25 + [1] * 3 + [1] * 2 + [0] * 10)
    found = scores.mcnemar(labels, first, second)
    # Two-sided binomial: 2 * (1 + 12 + 66) / 2 ** 12.
    assert found == {"only_first_right": 2, "only_second_right": 10, "p_value": pytest.approx(158 / 4096, abs=1e-6)}
    assert scores.mcnemar(labels, second, first)["p_value"] == found["p_value"]


def test_mcnemar_of_a_model_with_itself_says_nothing() -> None:
    found = sure([0, 1, 1, 0])
    expected = {"only_first_right": 0, "only_second_right": 0, "p_value": 1.0}
    assert scores.mcnemar(np.array([0, 1, 0, 1]), found, found) == expected


def test_calibration_error_of_made_up_confidences() -> None:
    labels = np.zeros(20, int)
    # Ten photos at 0.95, nine right; ten at 0.65, five right: (0.05 + 0.15) / 2.
    found = np.concatenate([sure([0] * 9 + [1], confidence=0.95), sure([0] * 5 + [1] * 5, confidence=0.65)])
    assert scores.calibration_error(labels, found, 10) == pytest.approx(0.10, abs=1e-6)
    # In one bin: 14 of 20 right at a mean confidence of 0.8.
    assert scores.calibration_error(labels, found, 1) == pytest.approx(0.10, abs=1e-6)
    # Sure of everything, right half of the time.
    assert scores.calibration_error(labels, sure([0, 1] * 10), 10) == 0.5


@pytest.mark.parametrize("classes", [2, 3])
def test_a_perfect_model(classes: int) -> None:
    labels = np.arange(30) % classes
    found = scores.of(labels, sure(list(labels), classes, 0.98), bins=10)
    assert (found["accuracy"], found["balanced_accuracy"], found["f1"], found["roc_auc"]) == (1, 1, 1, 1)
    assert found["accuracy_low"] == pytest.approx(0.886, abs=1e-3) and found["accuracy_high"] == 1
    assert found["log_loss"] == pytest.approx(-np.log(0.98), abs=1e-5)
    assert found["calibration_error"] == pytest.approx(0.02, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_model_that_always_says_the_same(classes: int) -> None:
    labels = np.array([0] * 20 + [number % classes for number in range(10)])
    found = scores.of(labels, np.full((30, classes), 1 / classes, np.float32), bins=10)
    assert found["accuracy"] == pytest.approx((labels == 0).mean(), abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(1 / classes, abs=1e-6)
    assert found["roc_auc"] == 0.5
    assert found["log_loss"] == pytest.approx(np.log(classes), abs=1e-5)


def test_a_model_that_is_sure_and_wrong_has_finite_scores() -> None:
    found = scores.of(np.array([0, 1, 2]), sure([1, 2, 0], 3), bins=10)
    assert found["accuracy"] == 0 and found["calibration_error"] == 1
    assert np.isfinite(list(found.values())).all()


CLASSES = ["rugby", "soccer", "hockey"]


@pytest.fixture
def judged() -> tuple[pd.DataFrame, np.ndarray, dict[str, np.ndarray]]:
    """Nine test photos of three classes, two sources and three sizes; one model is right, one says rugby."""
    labels = np.arange(9) % 3
    test = pd.DataFrame(
        {
            "path": [f"data/photos/{number}.jpg" for number in range(9)],
            "class": [CLASSES[label] for label in labels],
            "source": ["folder"] * 6 + ["sample"] * 3,
            "group": "",
            "width": [255, 256, 900] * 3,
            "height": [300, 2000, 512] * 3,
        }
    )
    return test, labels, {"right": sure(list(labels), 3, 0.8), "constant": sure([0] * 9, 3, 0.6)}


def test_predictions_have_a_row_a_model_and_photo(judged: tuple) -> None:
    test, _, probabilities = judged
    table = evaluate._predictions(test, probabilities, CLASSES)
    assert len(table) == 18
    assert list(table.columns) == [
        *("path", "class", "source", "group", "model", "predicted", "confidence"),
        *(f"probability:{label}" for label in CLASSES),
    ]
    right = table[table["model"] == "right"]
    assert (right["predicted"] == right["class"]).all() and (right["confidence"] == 0.8).all()
    assert set(table.loc[table["model"] == "constant", "predicted"]) == {"rugby"}
    assert list(right.iloc[1][[f"probability:{label}" for label in CLASSES]]) == pytest.approx([0.1, 0.8, 0.1])


def test_per_class_has_a_row_a_model_and_class(judged: tuple) -> None:
    _, labels, probabilities = judged
    table = evaluate._per_class(labels, probabilities, CLASSES).set_index(["model", "class"])
    assert list(table.index) == [(model, label) for model in ("right", "constant") for label in CLASSES]
    assert tuple(table.loc[("right", "hockey")]) == (1, 1, 1, 3)
    assert tuple(table.loc[("constant", "rugby")]) == (pytest.approx(1 / 3, abs=1e-6), 1, 0.5, 3)
    # A class that was never predicted has precision 0, not a warning or a gap.
    assert tuple(table.loc[("constant", "soccer")]) == (0, 0, 0, 3)


def test_slices_cut_by_source_class_and_shorter_side(judged: tuple) -> None:
    test, labels, probabilities = judged
    table = evaluate._slices(test, labels, probabilities).set_index(["model", "by", "slice"])
    constant = table.loc["constant"]
    assert constant["photos"].to_dict() == {
        ("source", "folder"): 6,
        ("source", "sample"): 3,
        ("class", "hockey"): 3,
        ("class", "rugby"): 3,
        ("class", "soccer"): 3,
        ("shorter side", "256-511 px"): 3,
        ("shorter side", "< 256 px"): 3,
        ("shorter side", ">= 512 px"): 3,
    }
    assert constant.loc[("class", "rugby"), "accuracy"] == 1 and constant.loc[("class", "hockey"), "accuracy"] == 0
    assert (table.loc["right"]["accuracy"] == 1).all()
    assert (table["accuracy_low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["accuracy_high"]).all()


def test_roc_has_one_curve_for_two_classes_and_one_each_for_more(judged: tuple) -> None:
    _, labels, probabilities = judged
    three = evaluate._roc(labels, probabilities, CLASSES)
    assert set(zip(three["model"], three["class"], strict=True)) == {(m, c) for m in probabilities for c in CLASSES}
    two = evaluate._roc(labels[labels < 2], {"cnn": sure([0, 1, 0, 1, 0, 1])}, CLASSES[:2])
    assert set(two["class"]) == {"soccer"}
    points = list(zip(two["false_positive_rate"], two["true_positive_rate"], strict=True))
    assert (0.0, 1.0) in points and points[0] == (0, 0) and points[-1] == (1, 1)


def test_baselines_learn_from_training_photos_and_are_judged_on_test_photos(
    paths: Paths, params_with: Callable[..., Params]
) -> None:
    import cv2

    random = np.random.default_rng(0)
    rows = []
    for number in range(120):
        label = number % 3
        colour = np.zeros(3)
        colour[label] = 180
        path = paths.workspace / f"data/photos/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), (colour + random.uniform(0, 60, (16, 16, 3))).astype(np.uint8))
        # Every hockey photo came from one camera, so its size gives it away.
        width = 999 if label == 2 else int(random.integers(200, 600))
        subset = ["train", "train", "test", "validation"][number // 3 % 4]
        rows.append((paths.relative(path), CLASSES[label], subset, width, 400))
    split = pd.DataFrame(rows, columns=["path", "class", "subset", "width", "height"])
    # No baseline looks at validation photos.
    for path in split.loc[split["subset"] == "validation", "path"]:
        (paths.workspace / path).unlink()
    found = evaluate.baselines(split, params_with(classes=CLASSES), paths.workspace)
    assert found["majority_class"]["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["colour_histogram"]["accuracy"] == 1
    assert 0.4 < found["size_and_aspect"]["accuracy"] < 0.9
    assert set(found["colour_histogram"]) == {*scores.METRICS, "accuracy_low", "accuracy_high"}


def made_model(paths: Paths, name: str) -> None:
    """The files that `train` leaves of a model, as far as their names and the record go."""
    model = paths.models / f"{name}.keras"
    files.write_text(model, f"the model {name}")
    digests = {"model_sha256": files.sha256(model)}
    for kind, suffix in {"openvino": ".openvino", "reference": ".reference.npz"}.items():
        files.write_text(model.with_suffix(suffix), f"the {kind} of {name}")
        digests[f"{kind}_sha256"] = files.sha256(model.with_suffix(suffix))
    files.write_json(model.with_suffix(".json"), {"model": name, **digests})
    files.write_text(paths.reports / f"history/{name}.csv", "epoch\n0\n")


def there(paths: Paths) -> set[str]:
    return {paths.relative(path) for path in paths.workspace.rglob("*") if path.is_file()}


def test_what_params_no_longer_name_is_deleted(paths: Paths, params_with: Callable[..., Params]) -> None:
    made_model(paths, "cnn")
    files.write_text(paths.models / ".gitignore", "x")
    before = there(paths)
    made_model(paths, "vgg")

    evaluate._forget_removed(paths, params_with())

    assert there(paths) == before


def test_what_no_run_recorded_as_its_own_is_not_deleted(paths: Paths, params_with: Callable[..., Params]) -> None:
    made_model(paths, "cnn")
    own = {
        "models/backup.keras", "models/backup.json", "models/notes.json", "models/list.json", "models/old/cnn.keras",
        "reports/history/mine.csv", "models/vgg.keras",
    }  # fmt: skip
    made_model(paths, "vgg")
    for name in own:
        files.write_text(paths.workspace / name, "a person's")
    # A copy of a model with its record, and JSON of other kinds.
    for ending in (".keras", ".json"):
        shutil.copyfile(paths.models / f"cnn{ending}", paths.models / f"backup{ending}")
    files.write_json(paths.models / "list.json", [1])

    evaluate._forget_removed(paths, params_with())

    assert there(paths) == own | {
        "models/cnn.keras",
        "models/cnn.openvino",
        "models/cnn.reference.npz",
        "models/cnn.json",
        "reports/history/cnn.csv",
    }
    assert (paths.models / "vgg.keras").read_text() == "a person's"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"no zip at all"])
def test_a_torn_model_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cnn.keras"
    path.write_bytes(content)
    with pytest.raises(TouchlineError) as error:
        inference.load_model(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert str(error.value).endswith(files.RENEW)


def test_a_missing_model_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(TouchlineError, match=r"cnn\.keras.*`dvc repro`.*`dvc checkout`"):
        inference.load_model(tmp_path / "cnn.keras")


def test_a_model_that_brings_code_along_is_refused(tmp_path: Path) -> None:
    import keras

    photo = keras.Input((8, 8, 3))
    model = keras.Model(photo, keras.layers.Lambda(lambda pixels: pixels / 255)(photo))
    model.save(tmp_path / "cnn.keras")
    with pytest.raises(TouchlineError, match=r"cnn\.keras"):
        inference.load_model(tmp_path / "cnn.keras")


def test_predicting_reads_the_files_in_their_order_and_scales_them_to_the_model(tmp_path: Path) -> None:
    import cv2
    import keras

    photo = keras.Input((8, 8, 3), dtype="uint8")
    mean = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(photo))
    model = keras.Model(photo, keras.layers.Softmax()(mean * 50))
    colours = np.random.default_rng(0).integers(0, 3, 40)
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for path, colour in zip(paths, colours, strict=True):
        image = np.zeros((20, 30, 3), np.uint8)
        image[..., 2 - colour] = 255  # OpenCV writes blue, green, red
        cv2.imwrite(str(path), image)
    probabilities, seconds = inference.predict(engines.with_tensorflow(model), paths)
    assert (probabilities.shape, probabilities.dtype) == ((40, 3), np.float32)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), colours)
    assert seconds > 0


@pytest.mark.parametrize(
    "rows, kept, label, steps",
    [
        ([0.1, 1.0, None, None, None], 3, "epoch", [3, 4, 5]),
        ([0.1, 1.0, None, None, None], 1, "C (", [0.1, 1.0]),
        ([0.1, 1.0], 0, "C (", [0.1, 1.0]),
        ([None, None], 1, "epoch", [1, 2]),
    ],
    ids=["fine-tuned", "fine-tuning undone", "head", "network"],
)
def test_learning_curves_are_drawn_over_epochs_or_over_strengths_never_over_both(
    paths: Paths,
    params_with: Callable[..., Params],
    rows: list[float | None],
    kept: int,
    label: str,
    steps: list[float],
) -> None:
    from matplotlib.figure import Figure

    metrics = ("train/accuracy", "train/loss", "validation/accuracy", "validation/loss")
    history = [
        {"epoch": epoch, **({"strength": strength} if strength else {}), **dict.fromkeys(metrics, 0.5), "kept": 0}
        for epoch, strength in enumerate(rows)
    ]
    history[kept]["kept"] = 1
    params = params_with()
    params = params.model_copy(update={"models": {"transfer": params.models["transfer"]}})
    files.write_table(paths.reports / "history/transfer.csv", pd.DataFrame(history))
    made = evaluate._curves(paths, params)
    files.write_table(paths.reports / "curves.csv", made)

    # What `evaluate` draws from, for MLflow and Prefect, and what `register` reads for the page.
    for curves in (made, files.read_table(paths.reports / "curves.csv")):
        figure = Figure()
        plots._learning_curves(figure, curves)
        for axes in figure.axes:
            train, _, mark = axes.get_lines()
            assert axes.get_xlabel().startswith(label)
            assert list(train.get_xdata()) == steps
            assert mark.get_xdata()[0] in steps
