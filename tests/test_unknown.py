"""A photo of something else is called `unknown`: on planted models whose features are the mean colours of a photo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SHIPPED
from PIL import Image
from test_predict import CLASSES, SIDE, Said, planted

from touchline.commands import app
from touchline.core import files, params
from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths
from touchline.data import rights
from touchline.models import classifier, engines, unknown
from touchline.models.reference import NEIGHBOURS, ImageNet, Reference
from touchline.stages import train
from touchline.tracking import registered, registry, runs

NAME = "rugby-soccer"
COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}
GREEN = (10, 240, 10)


def photo(path: Path, colour: Sequence[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 40), tuple(map(int, colour))).save(path)
    return path


def training_photos(folder: Path, each: int = 20) -> train.Labelled:
    """Reds and blues, no two alike."""
    random = np.random.default_rng(0)
    labels = [number % 2 for number in range(2 * each)]
    paths = [
        photo(folder / f"{number}.png", np.clip(random.normal(COLOURS[CLASSES[label]], 8), 0, 255))
        for number, label in enumerate(labels)
    ]
    digests = [files.sha256(path) for path in paths]
    return train.Labelled(digests, paths, np.array(labels), digests)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A project whose model `cnn` was written by training, its training photos, and the table of their sources."""
    root = tmp_path_factory.mktemp("project")
    (root / "models").mkdir()
    (root / "params.yaml").write_text(SHIPPED.read_text())
    paths = Paths(root, root)
    learned_from = training_photos(paths.photos)
    written = train._write(train.Trained(planted, [], 0, learned_from), root / "models/cnn.keras", CLASSES)
    files.write_json(root / "models/cnn.json", {"classes": CLASSES, **written})
    sources = ["imagenet" if number % 4 < 2 else "folder" for number in range(len(learned_from.files))]
    table = {"path": map(paths.relative, learned_from.files), "sha256": learned_from.digests, "source": sources}
    table["licence"] = ""
    files.write_table(paths.photos_table, pd.DataFrame(table))
    return paths


@pytest.fixture
def ask(project: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`touchline predict`, in a folder with a red and a green photo."""
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "green.png", GREEN)
    photo(tmp_path / "red.png", COLOURS["red"])

    def asked(*names: str, form: str = "json", paths: Paths = project, **changes: Any) -> Said:
        return Said(paths, list(names), form, b"", "cnn", **changes)

    return asked


def copied(project: Paths, root: Path) -> Paths:
    (root / "models").mkdir(parents=True)
    for file in (project.workspace / "params.yaml", *project.models.iterdir()):
        (root / file.relative_to(project.workspace)).write_bytes(file.read_bytes())
    return Paths(root, root)


def test_a_photo_of_something_else_is_unknown_and_its_guess_stands_beside_it(ask: Any) -> None:
    green, red = ask("green.png", "red.png").rows
    assert (green["label"], red["label"]) == ("unknown", "red")
    assert green["guess"] in CLASSES and sum(green["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert green["similarity"] < red["similarity"] <= 1
    assert green["percentile"] == 0 < red["percentile"] <= 100


def test_unknown_goes_before_unsure(ask: Any) -> None:
    assert ask("green.png", min_confidence=1.01).labels == {"green.png": "unknown"}
    assert ask("red.png", min_confidence=1.01).labels == {"red.png": "unsure"}


def test_null_switches_it_off(ask: Any) -> None:
    [row] = ask("green.png", unknown_share=None).rows
    assert row["label"] != "unknown" and row["similarity"] is None and row["percentile"] is None


def test_the_share_is_what_own_photos_one_is_ready_to_lose(project: Paths, ask: Any) -> None:
    photos = [str(path) for path in sorted(project.photos.glob("*.png"))]
    lost = [list(ask(*photos, unknown_share=share).labels.values()).count("unknown") for share in (0.05, 0.5)]
    assert lost[0] <= 0.15 * len(photos) < lost[1]


def test_every_form_of_answer_has_the_similarity(ask: Any) -> None:
    table = ask("green.png", form="table").bytes.decode()
    assert "similarity" in table and "unknown" in table
    head, row = ask("green.png", form="csv").bytes.decode().splitlines()
    found = dict(zip(head.split(","), row.split(","), strict=True))
    assert found["label"] == "unknown" and float(found["similarity"]) < 0.9 and float(found["percentile"]) == 0


def test_a_model_from_before_is_asked_without_and_says_so(ask: Any, project: Paths, tmp_path: Path) -> None:
    paths = copied(project, tmp_path / "older")
    record = files.read_json(paths.models / "cnn.json")
    files.write_json(paths.models / "cnn.json", {key: record[key] for key in record if "reference" not in key})
    said = ask("green.png", paths=paths)
    assert said.rows[0]["similarity"] is None and said.rows[0]["label"] != "unknown"
    assert "reference" in said.notes and "models/cnn.keras" in said.notes
    assert "reference" not in ask("green.png", paths=paths, unknown_share=None).notes


@pytest.mark.parametrize("fault", ["another digest", "torn"])
def test_a_reference_that_is_not_the_models_is_refused(ask: Any, project: Paths, tmp_path: Path, fault: str) -> None:
    paths = copied(project, tmp_path / "changed")
    file = paths.models / "cnn.reference.npz"
    file.write_bytes(file.read_bytes()[:-100])
    if fault == "torn":
        record = files.read_json(paths.models / "cnn.json")
        files.write_json(paths.models / "cnn.json", record | {"reference_sha256": files.sha256(file)})
    said = ask("green.png", paths=paths)
    assert said.error and str(file) in str(said.error) and said.rows == []


def test_explain_draws_similar_training_photos_that_may_be_shown(ask: Any, project: Paths, tmp_path: Path) -> None:
    def height() -> int:
        with Image.open(tmp_path / "red.png.touchline.jpg") as drawn:
            return drawn.height

    ask("red.png", explain=True, unknown_share=None)
    alone = height()
    ask("red.png", explain=True)
    assert height() > alone


def test_similar_photos_are_of_their_class_and_may_be_shown(project: Paths, tmp_path: Path) -> None:
    shipped = params.load(project.workspace / "params.yaml")
    found = classifier.resolve(project, shipped, "cnn")
    red = np.full((1, SIDE, SIDE, 3), COLOURS["red"], np.uint8)
    may = rights.files(project, shipped)
    nearest = found.nearest(found.forward(red)[0], may)
    assert [each.label for each in nearest] == ["red"] * 3 and {each.sha256 for each in nearest} <= set(may)
    assert [each.similarity for each in nearest] == sorted((each.similarity for each in nearest), reverse=True)
    table = files.read_table(project.photos_table)
    assert set(may) == set(table.loc[table["source"] == "folder", "sha256"])
    said = app.Models(project, shipped, "cnn")
    said._offered["cnn"] = "cnn"
    answered = said.ask("cnn", (tmp_path / photo(tmp_path / "a.png", GREEN).name).read_bytes())
    assert answered.answer.label == "unknown" and len(answered.similar) == 3
    card = app._card(answered)
    assert "unknown" in card and card.count("data:image/jpeg") == 4


def test_a_registered_version_brings_its_reference(project: Paths, tmp_path: Path) -> None:
    store = runs.open_store(Paths(tmp_path, tmp_path), NAME)
    run_id = runs.start(store, "cnn", {}, {}, {"name": "split", "digest": "0", "source": "-", "counts": {}})
    path = project.models / "cnn.keras"
    runs.finish(store, run_id, model_path=path, image_size=SIDE, classes=CLASSES, training_photos=[], metrics={})
    registry.register(store, NAME, run_id, {}, "")
    [version] = registered.versions(Paths(tmp_path, tmp_path), NAME)
    for stored in (registered.model(Paths(tmp_path, tmp_path), version), runs.model(store, run_id)):
        found = classifier.with_reference(classifier.from_stored(stored, "version 1", "openvino"))
        assert found.reference and len(found.reference.digests) == 40
    stored.reference.write_bytes(b"something else")
    with pytest.raises(TouchlineError, match="reference"):
        classifier.with_reference(classifier.from_stored(stored, "version 1", "openvino"))


def test_both_engines_describe_a_photo_alike(project: Paths) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    rows = [
        network.described(images)
        for network in (engines.with_tensorflow(planted()), engines.with_openvino(project.models / "cnn.openvino"))
    ]
    np.testing.assert_allclose(*rows, atol=engines.TOLERANCE)
    np.testing.assert_allclose(rows[0][:, 2:], images.mean(axis=(1, 2)) / 255, atol=1e-5)


def test_a_reference_keeps_what_is_rare_and_the_same_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows = np.abs(random.normal([1, 0, 0], 0.01, (200, 3)))
    rows[7] = [0, 0, 1]
    names = [f"{number:03}" for number in range(200)]
    reference = Reference.of(rows, ["a"] * 200, names, most=20)
    assert "007" in reference.digests and reference.rows.shape == (20, 3) and len(reference.own) == 20
    for name in ("first.npz", "second.npz"):
        reference.save(tmp_path / name)
    assert files.sha256(tmp_path / "first.npz") == files.sha256(tmp_path / "second.npz")
    loaded = Reference.load(tmp_path / "first.npz")
    assert loaded.digests == reference.digests and loaded.threshold(0.05) == reference.threshold(0.05)


def test_a_class_of_few_photos_is_not_unknown() -> None:
    rows = np.array([[1.0, 0.0]] * 100 + [[0.0, 1.0]] * 8)
    names = [str(number) for number in range(108)]
    reference = Reference.of(rows, ["many"] * 100 + ["few"] * 8, names)
    assert reference.similarity(np.array([[0.0, 1.0]]))[0] == pytest.approx(1)


def test_imagenets_classes_count_beside_the_features(tmp_path: Path) -> None:
    """Two photos of nearly the same features, of which ImageNet's layer says different things."""
    weights = np.array([[0, 0], [-400, 400], [0, 0]], np.float32)
    imagenet = ImageNet(weights, np.zeros((1, 2), np.float32))
    rows = np.tile([1.0, 0.0, 0.5], (10, 1))
    rows[:, 1] = 0.25
    asked = np.array([[1.0, 0.25, 0.5], [1.0, 0.2, 0.5]])
    names = [str(number) for number in range(10)]
    tilted = ImageNet(weights, np.array([[45.0, -45.0]], np.float32) * 2)
    plain, both = (Reference.of(rows, ["a"] * 10, names, known) for known in (None, tilted))
    assert plain.similarity(asked)[1] > 0.99 and both.similarity(asked)[1] < 0.7 < both.similarity(asked)[0]
    assert imagenet.probabilities(asked.astype(np.float32)).sum(axis=1) == pytest.approx(1)
    # What a model has behind its backbone's channels is not looked at.
    np.testing.assert_array_equal(both.similarity(np.hstack([asked, np.eye(2)])), both.similarity(asked))
    both.save(tmp_path / "cnn.reference.npz")
    np.testing.assert_allclose(
        Reference.load(tmp_path / "cnn.reference.npz").similarity(asked), both.similarity(asked), atol=1e-6
    )


@pytest.mark.parametrize("photos", [1, NEIGHBOURS])
def test_a_handful_of_photos_is_enough(photos: int) -> None:
    names = [str(number) for number in range(photos)]
    reference = Reference.of(np.eye(5, dtype=np.float32)[:photos], ["a"] * photos, names)
    assert np.isfinite(reference.own).all() and np.isfinite(reference.similarity(np.ones((1, 5)))).all()


def judged(project: Paths, folder: Path) -> tuple[Any, Any]:
    """The model, and its similarities of two test photos, a red and a green one, and of the photos in a folder."""
    model = classifier.resolve(project, params.load(project.workspace / "params.yaml"), "cnn")
    test = pd.DataFrame({"path": ["red.png", "green.png"], "class": CLASSES})
    images = np.array([np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in (COLOURS["red"], GREEN)])
    others = unknown.foreign(folder, model, 60)
    return model, unknown.similarities("cnn", model, test, model.forward(images), others)


def test_what_a_reference_is_worth(project: Paths, tmp_path: Path) -> None:
    photo(tmp_path / "others/a/green.png", GREEN)
    photo(tmp_path / "others/blue.png", COLOURS["blue"])
    files.write_text(tmp_path / "others/README.md", "not an image")
    model, table = judged(project, tmp_path / "others")
    assert table["subset"].value_counts().to_dict() == {"training": 40, "test": 2, "something else": 2}
    found = unknown.worth(table, model.reference.threshold(0.05), CLASSES)
    assert found["unknown"] == {"red": 0, "blue": 1} and found["photos"] == {"red": 1, "blue": 1}
    assert (found["others"], found["caught"]) == (2, 0.5) and 0 < found["roc_auc"] < 1
    assert "caught" not in unknown.worth(table[table["subset"] != "something else"], 0.9, CLASSES)


def test_a_folder_that_holds_no_photo_is_named(project: Paths, tmp_path: Path) -> None:
    files.write_text(tmp_path / "others/README.md", "not an image")
    with pytest.raises(TouchlineError, match="others"):
        judged(project, tmp_path / "others")


def test_files_none_of_which_is_an_image_are_named(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("hello")
    said = ask("x.jpg")
    assert said.rows == [] and said.error and "x.jpg" in said.notes
