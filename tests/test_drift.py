"""`touchline drift` is silent where nothing has changed, names what has, and says where photos are too few to tell."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import names
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from test_predict import CLASSES, planted
from typer.testing import CliRunner

from touchline import cli
from touchline.commands import drift, predict
from touchline.commands.drift import CONFIDENCE, CONTENT, DRIFT, FEWEST, SILENT, TOO_FEW, Side
from touchline.core import files
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import BackboneFeatures, DriftParams, Params
from touchline.core.paths import Paths
from touchline.data import feature_store, photos
from touchline.models import backbones, forecast
from touchline.stages.features import settings_of
from touchline.tracking import registered
from touchline.tracking.registry import Version
from touchline.tracking.runs import StoredModel

STRICT = DriftParams(folder="", significance=0.01, threshold=0.15, train=False)
NOTHING = Side({}, [])


def made_up(random: np.random.Generator, count: int, **shifts: float) -> Side:
    """Photos whose values are noise, moved by as many standard deviations as `shifts` says."""
    values = {what: random.normal(shifts.get(what, 0), size=count) for what in ("width", "brightness")}
    values[CONTENT] = random.normal(size=(count, 16)) + shifts.get(CONTENT, 0) * (np.arange(16) == 0)
    return Side(values, hashes(random, count))


def answers(random: np.random.Generator, count: int, first: float = 0.5, confidence: float = 0.0) -> Side:
    values = {
        drift.CLASSES: (random.random(count) > first).astype(int),
        CONFIDENCE: random.normal(confidence, size=count),
    }
    return Side(values, hashes(random, count))


def both(one: Side, other: Side) -> Side:
    return Side({**one.values, **other.values}, one.hashes)


def hashes(random: np.random.Generator, count: int) -> list[str]:
    return [f"{value:016x}" for value in random.integers(0, 2**63, count)]


def warned(found: list[drift.Comparison], params: DriftParams = STRICT) -> set[str]:
    return {each.what for each in found if each.warns(params)}


def test_photos_of_the_same_kind_raise_no_alarm() -> None:
    for seed in range(15):
        random = np.random.default_rng(seed)
        new = both(made_up(random, 60), answers(random, 60))
        found = drift.compare(new, made_up(random, 120), answers(random, 50), 6)
        assert len(found) == 5 and warned(found) == set(), (seed, found)


@pytest.mark.parametrize("what", [CONTENT, "width", "brightness", drift.CLASSES, CONFIDENCE])
def test_what_has_shifted_is_named_and_nothing_else(what: str) -> None:
    random = np.random.default_rng(1)
    said = {drift.CLASSES: {"first": 0.9}, CONFIDENCE: {"confidence": -1.5}}.get(what, {})
    new = both(made_up(random, 80, **({} if said else {what: 2.0})), answers(random, 80, **said))
    found = drift.compare(new, made_up(random, 160), answers(random, 80), 6)
    assert warned(found) == {what}
    (shifted,) = [each for each in found if each.what == what]
    assert shifted.value > shifted.by_chance and shifted.corrected <= 0.01
    assert shifted.against == ("test" if said else "training")


def test_a_difference_too_small_to_matter_is_told_and_no_warning() -> None:
    random = np.random.default_rng(2)
    found = drift.compare(made_up(random, 700, width=0.5), made_up(random, 700), NOTHING, 6)
    params = STRICT.model_copy(update={"threshold": 0.4})
    assert warned(found) == {"width"} and warned(found, params) == set()
    said = drift.verdict(found, {"new": 700, "different": 700, "known": 0}, "m version 1", params)
    assert said["outcome"] == SILENT and names(said["verdict"], "width")


def test_a_series_of_one_scene_is_one_observation() -> None:
    """Four scenes, twenty near-duplicates of each: taken singly, any four scenes look like another world."""
    alarms = {"together": 0, "singly": 0}
    for seed in range(6):
        random = np.random.default_rng(seed)
        training = made_up(random, 120)
        scenes = made_up(random, 24)
        # Twenty scenes alone, and four of which there are twenty photos each.
        rows = np.concatenate([np.arange(20), np.repeat(np.arange(20, 24), 20)])
        values = {what: found[rows] for what, found in scenes.values.items()}
        together = Side(values, [scenes.hashes[row] for row in rows])
        singly = Side(values, hashes(random, len(rows)))
        alarms["together"] += bool(warned(drift.compare(together, training, NOTHING, 6)))
        alarms["singly"] += bool(warned(drift.compare(singly, training, NOTHING, 6)))
    assert alarms["together"] == 0 and alarms["singly"] >= 4, alarms


def test_too_few_to_compare_answers_with_leaves_them_out() -> None:
    random = np.random.default_rng(3)
    new = both(made_up(random, 30), answers(random, 30))
    found = drift.compare(new, made_up(random, 60), answers(random, FEWEST - 1), 6)
    assert {each.against for each in found} == {"training"}


def test_the_statistics_are_those_of_scipy_and_scikit_learn() -> None:
    random = np.random.default_rng(4)
    new = random.random((3, 50)) < 0.4
    values = random.integers(0, 8, 50).astype(float)  # with ties
    for row, gap in zip(new, drift._largest_gaps(values, new), strict=True):
        assert gap == pytest.approx(ks_2samp(values[row], values[~row]).statistic)
    scores = random.normal(size=(3, 50))
    for row, score, area in zip(new, scores, drift._areas(scores, new), strict=True):
        assert area == pytest.approx(roc_auc_score(row, score))


def test_the_closed_form_is_the_classifier_fitted_without_the_fold() -> None:
    random = np.random.default_rng(5)
    features, new = random.normal(size=(40, 60)), random.random((2, 40)) < 0.5
    together = np.arange(40) // 2
    centred = features - features.mean(axis=0)
    scaled = centred / np.sqrt(np.square(centred).sum(axis=1).mean())
    for row, found in zip(new, drift._scores(features, new, together), strict=True):
        targets = row - row.mean()
        folds = GroupKFold(5, shuffle=True, random_state=42)
        for train, fold in folds.split(features, groups=together):
            fitted = Ridge(alpha=drift._RIDGE, fit_intercept=False).fit(scaled[train], targets[train])
            assert found[fold] == pytest.approx(fitted.predict(scaled[fold]), abs=1e-4)


def test_p_values_are_corrected_as_holm_does() -> None:
    made = [
        drift.Comparison(name, "training", "KS distance", 0.5, 0.2, 0.5, p)
        for name, p in (("a", 0.01), ("b", 0.04), ("c", 0.03), ("d", 0.005))
    ]
    assert [each.corrected for each in drift._corrected(made)] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_same_thing_compared_against_two_sides_keeps_two_p_values() -> None:
    made = [drift.Comparison("width", against, "KS distance", 0.5, 0.2, 0.5, p)
            for against, p in ((drift.TRAINING, 0.001), (drift.HELD_OUT, 0.5))]  # fmt: skip
    assert [each.corrected for each in drift._corrected(made)] == pytest.approx([0.002, 0.5])


@pytest.mark.parametrize("listed", [True, False], ids=["in a folder", "named"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("drawing.svg", b'<?xml version="1.0"?><svg/>'),
        ("icon.ico", b"\0\0\1\0"),
        ("notes.txt", b"no photo"),
        ("empty", b""),
        ("empty.png", b""),
        ("page.jpg", b"<!doctype html>"),
        ("new.heic", b"no photo"),
    ],
)
def test_drift_and_predict_leave_out_the_same_files(tmp_path: Path, name: str, content: bytes, listed: bool) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = predict.Found(path, listed=listed)
    _, by_drift = drift._read(found, (8, 8), 60)
    (_, by_predict, _), _ = predict._read(found, tmp_path, 8, 60)
    assert by_drift == by_predict
    assert (by_drift is None) == (listed and path.suffix in {".svg", ".ico", ".txt", ""})


SIDE = 32


def draw(path: Path, random: np.random.Generator, light: float = 1.0) -> str:
    """A photo of few large patches, reddish or bluish; its digest."""
    patches = random.integers(60, 200, (6, 6, 3))
    patches[..., int(random.integers(2)) * 2] += 50
    size = (int(random.integers(60, 90)), int(random.integers(60, 90)))
    image = Image.fromarray((patches * light).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Made:
    """A project as `evaluate` leaves it, with a planted champion and a planted backbone: patches of the photo."""

    def __init__(self, root: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
        import keras

        self.paths, self.params = Paths(root, root), params
        random = np.random.default_rng(7)
        rows = []
        for number in range(130):
            path = f"data/photos/{number}.png"
            digest = draw(root / path, random)
            found = photos.measure(root / path, 60)
            rows.append((path, digest, found.width, found.height, found.contrast, found.perceptual_hash, ""))
        columns = ["path", "sha256", "width", "height", "contrast", "perceptual_hash", "group"]
        table = pd.DataFrame(rows, columns=columns)
        table.to_csv(self.paths.validated_table, index=False)
        subsets = np.where(np.arange(130) < 80, "train", "test")
        means = [photos.read(root / path, 8).mean(axis=(0, 1)) for path in table["path"]]
        labels = ["red" if red > blue else "blue" for red, _, blue in means]
        table.assign(subset=subsets, **{"class": labels, "group": table["sha256"].str[:16]}).to_csv(
            self.paths.split_table, index=False
        )
        self.learned_from = set(table["sha256"][:80])

        (self.name,) = [key for key, kind in params.features.items() if isinstance(kind, BackboneFeatures)]
        kind = params.features[self.name]
        photo = keras.Input((kind.image_size, kind.image_size, 3), dtype="uint8")
        pooled = keras.layers.AveragePooling2D(kind.image_size // 4)(keras.layers.Rescaling(1 / 255)(photo))
        self.backbone = keras.Model(photo, keras.layers.Flatten()(pooled))
        monkeypatch.setattr(backbones, "pooled", lambda features, project: self.backbone)
        monkeypatch.setattr(backbones, "without_tensorflow", lambda features, project: None)
        monkeypatch.setattr(backbones, "identity", lambda features, project: "planted")
        self.settings = settings_of(kind, root)
        images = [photos.read(root / path, kind.image_size) for path in table["path"]]
        self.features = dict(zip(table["sha256"], self.backbone.predict(np.stack(images), verbose=0), strict=True))
        self.store(weights="planted")

        folder = root / "champion"
        (folder / "data").mkdir(parents=True)
        planted(steepness=6).save(folder / StoredModel.KERAS)
        digest = files.sha256(folder / StoredModel.KERAS)
        version = Version("rugby-soccer", 3, "0" * 32, "", "", {}, ("champion",))
        self.versions = [version]
        made = self

        class Stored(StoredModel):
            training_photos = property(lambda _: made.learned_from)

        monkeypatch.setattr(registered, "versions", lambda paths, name: self.versions)
        monkeypatch.setattr(registered, "model", lambda paths, version: Stored(folder, CLASSES, digest, "", ""))

    def store(self, **settings: object) -> None:
        folder = self.paths.features / self.name
        feature_store.update(folder, self.settings | settings, list(self.features),
                      lambda wanted: (self.features[digest] for digest in wanted))  # fmt: skip

    def drift(self, *names: object) -> str:
        return drift.run(self.paths, self.params, [str(name) for name in names])

    @property
    def report(self) -> dict:
        return json.loads((self.paths.reports / "drift.json").read_text())

    @property
    def page(self) -> str:
        return (self.paths.reports / "drift.html").read_text()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, params_with: Callable[..., Params]) -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Made(tmp_path_factory.mktemp("project"), params_with(), monkeypatch)


@pytest.fixture
def made(shared: Made) -> Iterator[Made]:
    """The project, as it was after the test."""
    before = shared.params, set(shared.learned_from), shared.versions
    yield shared
    shared.params, shared.learned_from, shared.versions = before
    if feature_store.Arrays(shared.paths.features / shared.name).settings["weights"] != "planted":
        shared.store(weights="planted")


def album(folder: Path, count: int, light: float = 1.0, seed: int = 8) -> Path:
    random = np.random.default_rng(seed)
    for number in range(count):
        draw(folder / f"{number}.png", random, light)
    return folder


def test_new_photos_like_the_old_are_no_drift(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made.drift(album(tmp_path / "album", 40)) == SILENT
    report = made.report
    assert names(report["verdict"], "9", "40", "rugby-soccer version 3")
    assert report["photos"] | {"new": 40, "known": 0, "training": 80, "test": 50} == report["photos"]
    assert {each["what"]: each["against"] for each in report["comparisons"]} == {
        "content": "training", "width": "training", "height": "training", "aspect": "training",
        "contrast": "training", "brightness": "training", "sharpness": "training",
        "predicted classes": "test", "confidence": "test",
    }  # fmt: skip
    out = capsys.readouterr().out
    assert report["verdict"] in out and "reports/drift.html" in out
    assert report["verdict"] in made.page and "drift.significance" in made.page
    assert len(re.findall(r'<img src="data:image/jpeg;base64,[^"]{99,}"', made.page)) == 12
    assert made.page.count("<svg") == 8 and "mean grey level (0 to 255)" in made.page


def test_the_forecast_of_the_champion_is_told_where_it_has_one(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.drift(album(tmp_path / "album", 40))
    assert made.report["forecast"] is None
    part = {"photos": 40, "accuracy": 0.9, **dict.fromkeys(forecast.METHODS, 0.94)}
    [version] = made.versions
    made.versions = [
        Version(
            **(vars(version) | {"tags": {forecast.TAG: json.dumps(vars(forecast.Forecaster(0.8, 1.0, [part] * 3)))}})
        )
    ]
    made.drift(tmp_path / "album")
    found = made.report["forecast"]
    assert found["give_or_take"] == 0.04 and found["photos"] == 40
    assert found["says"] in capsys.readouterr().out and f"about {found['accuracy']:.2f}" in made.page


def test_darker_photos_are_drift_and_the_most_unlike_is_the_strangest(made: Made, tmp_path: Path) -> None:
    folder = album(tmp_path / "album", 40, light=0.5)
    Image.new("RGB", (70, 80), (255, 255, 0)).save(folder / "strange.png")
    assert made.drift(folder) == DRIFT
    warns = {each["what"] for each in made.report["comparisons"] if each["warns"]}
    assert {"content", "brightness", "contrast"} <= warns and not warns & {"width", "height", "aspect"}
    told = made.report["verdict"]
    assert re.search(r"\bcontent\b.*\b(1\.00|0\.9\d)\b", told) and names(told, "9", "41")
    first = made.report["most_unlike"][0]
    assert first["photo"] == str(folder / "strange.png") and first["farther_than"] == 100


def test_photos_the_project_has_already_are_left_out(made: Made, tmp_path: Path) -> None:
    folder = album(tmp_path / "album", 25)
    for number in (3, 100):
        (folder / f"old-{number}.png").write_bytes((made.paths.photos / f"{number}.png").read_bytes())
    made.drift(folder)
    assert (made.report["photos"]["new"], made.report["photos"]["known"]) == (25, 2)
    assert made.drift(made.paths.photos) == TOO_FEW
    assert names(made.report["verdict"], "0", "130")


@pytest.mark.parametrize("copies", [1, 30])
def test_too_few_photos_are_said_to_be_too_few(made: Made, tmp_path: Path, copies: int) -> None:
    folder = album(tmp_path / "album", FEWEST - 1, light=0.4)
    for number in range(copies - 1):
        image = Image.open(folder / "0.png")
        image.putpixel((0, number), (0, 0, 0))
        image.save(folder / f"copy {number}.png")
    assert made.drift(folder) == TOO_FEW
    numbers = {FEWEST - 2 + copies, FEWEST - 1, FEWEST}  # photos, those that are no near-duplicates, those needed
    assert names(made.report["verdict"], *map(str, numbers))
    assert made.report["comparisons"] == [] and made.report["verdict"] in made.page


def test_what_cannot_be_read_is_named_and_the_rest_compared(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = album(tmp_path / "album", 25)
    whole = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html><script>alert(1)</script></html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not one of them")
    assert made.drift(folder, tmp_path / "gone.png") == SILENT
    assert {Path(each["photo"]).name for each in made.report["unreadable"]} == {
        "half.png", "page.jpg", "empty.png", "gone.png",
    }  # fmt: skip
    assert made.report["photos"]["left_out"] == 1
    err = capsys.readouterr().err
    assert names(err, "page.jpg", "half.png", "empty.png", "gone.png") and "notes.txt" not in err
    assert names(made.page, "page.jpg", "half.png", "empty.png", "gone.png")


def test_where_no_photo_can_be_read_nothing_is_compared(made: Made, tmp_path: Path) -> None:
    with pytest.raises(TouchlineError, match="gone"):
        made.drift(tmp_path / "gone")


def test_a_script_in_a_name_stays_text(made: Made, tmp_path: Path) -> None:
    folder = album(tmp_path / "album", 25, light=0.5)
    (folder / "0.png").rename(folder / '<script>alert("1")<.png')
    (folder / "<img src=x onerror=alert(2)>.png").write_bytes(b"")
    Image.new("RGB", (70, 80), (255, 255, 0)).save(folder / "<script>alert(3)<.png")
    made.drift(folder)
    page = made.page
    assert "<script" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(3)" in page and "&lt;img src=x onerror=alert(2)&gt;.png" in page
    assert "default-src 'none'" in page
    plain = re.sub(r'base64,[^"]*|xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?:|@import|<(link|script|iframe)\b", plain)


def test_a_name_that_is_no_text_spoils_nothing(made: Made, tmp_path: Path) -> None:
    folder = album(tmp_path / "album", 25)
    Image.new("RGB", (70, 80), (255, 255, 0)).save(folder / os.fsdecode(b"caf\xe9\x1b[31m.png"))
    assert made.drift(folder) == SILENT
    assert made.report["most_unlike"][0]["photo"].endswith(
        "caf\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31m.png"
    )


def test_confidence_is_held_against_photos_the_champion_never_saw(made: Made, tmp_path: Path) -> None:
    """With all test photos learned from there is nothing to hold it against."""
    made.learned_from |= set(made.features)
    made.drift(album(tmp_path / "album", 25))
    assert {each["against"] for each in made.report["comparisons"]} == {"training"}


def test_without_a_champion_it_is_one_line(made: Made, tmp_path: Path) -> None:
    made.versions = []
    with pytest.raises(TouchlineError, match=r"rugby-soccer.*`make run`"):
        made.drift(album(tmp_path / "album", 1))


def test_a_champion_of_other_photos_is_one_line(made: Made, tmp_path: Path) -> None:
    made.learned_from = {"f" * 64}
    with pytest.raises(TouchlineError, match=r"data/split\.csv.*rugby-soccer.*\b3\b"):
        made.drift(album(tmp_path / "album", 1))


def test_features_of_another_network_are_one_line(made: Made, tmp_path: Path) -> None:
    made.store(weights="others")
    with pytest.raises(TouchlineError, match=r"weights.*`dvc repro`"):
        made.drift(album(tmp_path / "album", 1))


def test_without_a_name_the_folder_of_the_params_is_taken(made: Made, params_with: Callable[..., Params]) -> None:
    with pytest.raises(ParamsError, match=r"touchline drift FOLDER.*drift\.folder"):
        made.drift()
    made.params = params_with(drift={"folder": "data/seen"})
    with pytest.raises(TouchlineError, match="data/seen"):
        made.drift()
    album(made.paths.workspace / "data/seen", 25)
    assert made.drift() == SILENT


@pytest.mark.parametrize("light, code", [(1.0, 0), (0.5, 3), (None, 4)])
def test_the_exit_code_says_what_came_out(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: float | None, code: int
) -> None:
    (made.paths.workspace / "params.yaml").write_bytes((Path(__file__).parents[1] / "params.yaml").read_bytes())
    monkeypatch.chdir(made.paths.workspace)
    folder = album(tmp_path / "album", 25 if light else 3, light or 1.0)
    done = CliRunner().invoke(cli.app, ["drift", str(folder)])
    assert done.exit_code == code, done.output
