"""`touchline predict` on planted models whose answer is known: what is read, what is written, what is named."""

import csv
import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import SHIPPED, names
from PIL import Image
from ruamel.yaml import YAML

from touchline.commands import predict
from touchline.core import files, params
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.paths import Paths
from touchline.models import classifier, explain, inference
from touchline.models.inference import BATCH
from touchline.sources.received import Received
from touchline.tracking import registry, runs

if TYPE_CHECKING:
    import keras

SIDE = 32
CLASSES = ["red", "blue"]
COLOURS = {"red": (250, 0, 0), "blue": (0, 0, 250), "neither": (120, 120, 120)}
NAME = "rugby-soccer"


def planted(steepness: float = 20.0, *, turned: bool = False) -> "keras.Model":
    """Red or blue by the mean colour of a photo, through a feature map; `turned` has them the other way round."""
    import keras

    photo = keras.Input((SIDE, SIDE, 3), dtype="uint8", name="photo")
    x = keras.layers.Conv2D(3, 4, strides=4, activation="relu", use_bias=False, name="mean")(
        keras.layers.Rescaling(1 / 255)(photo)
    )
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(photo, keras.layers.Dense(2, activation="softmax", name="probabilities")(x), name="planted")
    kernel = np.zeros((4, 4, 3, 3), np.float32)
    for channel in range(3):
        kernel[:, :, channel, channel] = 1 / 16
    model.get_layer("mean").set_weights([kernel])
    slope = -steepness if turned else steepness
    weights = np.array([[slope, -slope], [0, 0], [-slope, slope]], np.float32)
    model.get_layer("probabilities").set_weights([weights, np.zeros(2, np.float32)])
    return model


def draw(path: Path, colour: str, size: tuple[int, int] = (48, 40), form: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path, format=form, quality=95)
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A project whose `models/cnn.keras` is the planted one; nothing is registered."""
    root = tmp_path_factory.mktemp("machine") / "a project; $(id)"
    (root / "models").mkdir(parents=True)
    content = YAML().load(SHIPPED)
    with (root / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    planted().save(root / "models/cnn.keras")
    files.write_json(root / "models/cnn.json", {"classes": CLASSES})
    return Paths(root, root)


@pytest.fixture(autouse=True)
def somewhere(project: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Said:
    """What one run wrote, and what it raised."""

    def __init__(self, project: Paths, names: list[str], form: str, stdin: bytes, model: str, **changes: Any) -> None:
        options = {name: changes.pop(name, False) for name in ("explain", "record", "record_photos")}
        content = params.load(project.workspace / "params.yaml")
        content = content.model_copy(update={"predict": content.predict.model_copy(update=changes)})
        self.error: TouchlineError | None = None
        output, notes = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        before = sys.stdout, sys.stderr, sys.stdin
        sys.stdout, sys.stderr, sys.stdin = output, notes, io.TextIOWrapper(io.BytesIO(stdin))
        try:
            predict.run(project, content, names, model, form, **options)
        except TouchlineError as error:
            self.error = error
        finally:
            sys.stdout, sys.stderr, sys.stdin = before
        output.flush()
        self.bytes, self.notes = output.buffer.getvalue(), notes.getvalue()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.bytes.splitlines()]

    @property
    def labels(self) -> dict[str, str]:
        return {row["photo"]: row["label"] for row in self.rows}


Ask = Callable[..., Said]


@pytest.fixture
def ask(project: Paths) -> Ask:
    """`touchline predict` with the planted model, answers as JSON."""

    def asked(*names: object, form: str = "json", stdin: bytes = b"", model: str = "cnn", **changes: Any) -> Said:
        return Said(project, [str(name) for name in names], form, stdin, model, **changes)

    return asked


def test_photos_are_answered_in_the_order_they_are_named(ask: Ask, somewhere: Path) -> None:
    draw(somewhere / "b.png", "blue")
    draw(somewhere / "a.jpg", "red")
    said = ask("b.png", "a.jpg", "b.png")
    assert said.error is None
    assert [(row["photo"], row["label"]) for row in said.rows] == [
        ("b.png", "blue"),
        ("a.jpg", "red"),
        ("b.png", "blue"),
    ]
    first = said.rows[0]
    assert first["guess"] == "blue" and first["confidence"] == first["probabilities"]["blue"] > 0.99
    assert list(first["probabilities"]) == CLASSES and sum(first["probabilities"].values()) == pytest.approx(
        1, abs=1e-5
    )
    assert names(said.notes, "models/cnn.keras", "red 1", "blue 2")


def test_a_folder_is_read_by_content_down_to_its_last_folder(ask: Ask, somewhere: Path) -> None:
    folder = somewhere / "album"
    for name, colour, form in (
        ("2.jpg", "red", None), ("1 of 2", "blue", "JPEG"), ("below/deep/3.TXT", "red", "PNG"),
        ("4.jpg", "blue", "WEBP"), (".hidden.jpg", "red", None), (".git/5.jpg", "red", None),
        ("6.jpg.touchline.jpg", "red", None),
    ):  # fmt: skip
        draw(folder / name, colour, form=form)
    (folder / "notes.txt").write_text("no photo")
    (folder / "empty").touch()
    said = ask(folder)
    assert said.error is None
    expected = {"1 of 2": "blue", "2.jpg": "red", "4.jpg": "blue", "below/deep/3.TXT": "red"}
    assert said.labels == {str(folder / name): label for name, label in expected.items()}
    assert names(said.notes.splitlines()[-1], "red 2", "blue 2", "2")


def test_what_cannot_be_read_is_named_and_the_rest_is_done(ask: Ask, somewhere: Path) -> None:
    whole = draw(somewhere / "album/whole.jpg", "red", (400, 300))
    (somewhere / "album/torn.jpg").write_bytes(whole.read_bytes()[:-40])
    (somewhere / "album/page.jpg").write_bytes(b"<html>not found</html>")
    (somewhere / "album/torn.txt").write_bytes(whole.read_bytes()[:600])
    (somewhere / "readme.txt").write_text("named, so it is meant")
    (somewhere / "empty.png").touch()
    said = ask("album", "readme.txt", "empty.png", "missing.jpg", "no/*.jpg", "\0")
    assert said.labels == {"album/whole.jpg": "red"}
    reasons = dict(re.findall(r"^touchline: (.+?): (.+)$", said.notes, flags=re.MULTILINE))
    assert list(reasons) == [
        "album/page.jpg", "album/torn.jpg", "album/torn.txt", "readme.txt", "empty.png", "missing.jpg", "no/*.jpg",
        "\N{REPLACEMENT CHARACTER}",
    ]  # fmt: skip
    # What is wrong differs, but for the two that were torn.
    assert len(set(reasons.values())) == 7 and reasons["album/torn.jpg"] == reasons["album/torn.txt"]
    assert reasons["missing.jpg"] == os.strerror(errno.ENOENT)
    assert said.error.exit_code == 1 and names(str(said.error), "8")


def test_without_an_answer_there_is_no_table_and_a_folder_of_other_files_is_named(ask: Ask, somewhere: Path) -> None:
    said = ask("missing.jpg", form="table")
    assert said.bytes == b"" and names(said.notes, "missing.jpg") and said.error.exit_code == 1
    (somewhere / "papers").mkdir()
    for count in (1, 2):
        (somewhere / f"papers/{count}.pdf").write_bytes(b"%PDF-1.4")
        said = ask("papers", form="table")
        assert said.bytes == b"" and said.error.exit_code == 1 and names(str(said.error), "papers", str(count))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"# A text", "not an image"),
        (b"\0\0\0\x18ftypheic", "a HEIC photo"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
    ],
)
def test_without_a_photo_there_is_no_table_and_predict_says_what_ingest_does(
    ask: Ask, somewhere: Path, content: bytes, reason: str
) -> None:
    path = somewhere / "other"
    path.write_bytes(content)
    said = ask("other", form="table")
    assert said.bytes == b"" and said.error.exit_code == 1
    assert names(said.notes, "other", reason) and Received(somewhere, 1, False).refusal(path) in said.notes


def test_a_batch_without_a_single_photo_does_no_harm(ask: Ask, somewhere: Path) -> None:
    for number in range(2 * BATCH):
        (somewhere / f"{number:03}.jpg").write_bytes(b"nothing")
    draw(somewhere / "999.jpg", "blue")
    said = ask(somewhere)
    assert list(said.labels.values()) == ["blue"] and names(str(said.error), "64")


def test_a_photo_larger_than_validate_takes_is_not_decoded(ask: Ask, somewhere: Path, monkeypatch: Any) -> None:
    draw(somewhere / "bomb.png", "red", (10_000, 6_001))
    monkeypatch.setattr("touchline.data.photos.decode", None)
    said = ask("bomb.png")
    assert names(said.notes, "bomb.png", "10000", "6001", "validate.max_megapixels")


def test_a_pattern_is_filled_in_where_no_shell_did(ask: Ask, somewhere: Path) -> None:
    for name in ("a/1.jpg", "a/b/2.jpg", "a/b/3.png", "[x].jpg"):
        draw(somewhere / name, "red")
    assert list(ask("a/**/*.jpg").labels) == ["a/1.jpg", "a/b/2.jpg"]
    assert list(ask("a/*").labels) == ["a/1.jpg", "a/b/2.jpg", "a/b/3.png"]
    # A file that is called like a pattern is that file.
    assert list(ask("[x].jpg").labels) == ["[x].jpg"]


def test_what_explain_drew_is_not_classified_in_the_next_run(ask: Ask, somewhere: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "a/1.jpg.touchline.jpg"):
        draw(somewhere / name, "red")
    listed = sorted(f"a/{path.name}" for path in (somewhere / "a").iterdir())  # as a shell fills in a/*
    for given, stdin in ((["a/*"], b""), (listed, b""), (["-"], "\n".join(listed).encode())):
        assert list(ask(*given, stdin=stdin).labels) == ["a/1.jpg", "a/2.jpg"]
    assert list(ask("a/1.jpg.touchline.jpg").labels) == ["a/1.jpg.touchline.jpg"]


def test_names_come_from_stdin(ask: Ask, somewhere: Path) -> None:
    for name in ("a b.jpg", "album/c.jpg"):
        draw(somewhere / name, "blue")
    said = ask("-", stdin=b"a b.jpg\r\n\nalbum\nmissing.jpg")
    assert list(said.labels) == ["a b.jpg", "album/c.jpg"]
    assert names(said.notes, "missing.jpg", os.strerror(errno.ENOENT)) and said.error.exit_code == 1
    assert (ask("-").bytes, ask("-").error) == (b"", None)
    said = ask("-", stdin=(somewhere / "a b.jpg").read_bytes())
    assert isinstance(said.error, ParamsError) and names(str(said.error), "stdin")


ODD = [
    "two  spaces.jpg", "it's \"quoted\".jpg", "$(id).jpg", "`id`.jpg", "; rm -rf x.jpg", "-rf.jpg", "=cmd().jpg",
    "+1.jpg", "@x.jpg", "a,b.jpg", "[red]bold.jpg", "Fußball 足球.jpg", "%s{0}.jpg", "line\nbreak.jpg",
    "\x1b[31mred.jpg", os.fsdecode(b"latin-\xe9.jpg"),
]  # fmt: skip


def test_an_odd_name_is_a_name(ask: Ask, somewhere: Path) -> None:
    for name in ODD:
        draw(somewhere / "plain", "red", form="JPEG").rename(somewhere / name)
    assert ask(*ODD).labels == dict.fromkeys(ODD, "red")
    raw = ask(*ODD, form="csv").bytes.decode(errors="surrogateescape")
    rows = csv.DictReader(io.StringIO(raw, newline=""))
    assert [row["photo"] for row in rows] == ["'" + name if name[0] in "=+-@" else name for name in ODD]
    table = ask(*ODD, form="table").bytes.decode()
    assert "\x1b" not in table
    for name in ODD:
        assert name.translate({ord(each): "\N{REPLACEMENT CHARACTER}" for each in "\n\x1b\udce9"}) in table


def test_a_table_shows_each_class_and_json_and_csv_agree_with_it(ask: Ask, somewhere: Path) -> None:
    draw(somewhere / "a.jpg", "red")
    draw(somewhere / "neither.jpg", "neither")
    table = ask(somewhere, form="table").bytes.decode()
    assert all(text in table for text in ("photo", "label", "confidence", *CLASSES, "unsure", str(somewhere / "a.jpg")))
    rows = list(csv.DictReader(io.StringIO(ask(somewhere, form="csv").bytes.decode())))
    probabilities = ["probability:red", "probability:blue"]
    assert list(rows[0]) == ["photo", "label", "guess", "confidence", *probabilities, "similarity", "percentile"]
    for row, found in zip(rows, ask(somewhere).rows, strict=True):
        assert [row["photo"], row["label"], row["guess"]] == [found["photo"], found["label"], found["guess"]]
        assert float(row["confidence"]) == found["confidence"]
        assert [float(row[f"probability:{name}"]) for name in CLASSES] == list(found["probabilities"].values())


def test_low_confidence_is_unsure_and_keeps_its_guess(ask: Ask, somewhere: Path) -> None:
    draw(somewhere / "neither.png", "neither")
    [row] = ask("neither.png").rows
    assert (row["label"], row["guess"], row["confidence"]) == ("unsure", "red", 0.5)
    # At the bound it is sure enough.
    assert ask("neither.png", min_confidence=0.5).labels == {"neither.png": "red"}
    draw(somewhere / "sure.png", "red")
    assert ask("sure.png").labels == {"sure.png": "red"}


@pytest.mark.parametrize("value", [-0.1, 1.1, "high", None])
def test_a_confidence_is_a_share(shipped: dict[str, Any], value: object) -> None:
    shipped["predict"]["min_confidence"] = value
    with pytest.raises(ParamsError, match=r"params\.yaml.*predict\.min_confidence"):
        params.check(shipped)


def test_a_photo_has_the_answer_that_evaluation_has(ask: Ask, project: Paths, somewhere: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(40):
        noise = random.integers(0, 255, (60 + number, 300 - number, 3)).astype(np.uint8)
        noise[: number + 10, :, number % 3] = 250
        Image.fromarray(noise).save(somewhere / f"{number:02}.{'jpg' if number % 2 else 'png'}")
    there = sorted(somewhere.iterdir())
    expected, _ = inference.predict(inference.ModelFiles.at(project.models / "cnn.keras").network("auto"), there)
    rows = ask(somewhere).rows
    assert [row["photo"] for row in rows] == [str(path) for path in there]
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], expected, atol=2e-6)
    # Alone or among others, and as the features that training reads.
    from touchline.stages import features

    assert ask(there[7]).rows[0]["probabilities"]["red"] == pytest.approx(expected[7, 0], abs=2e-6)
    pixels = np.stack(list(features.pixels(there, SIDE)))
    trained = inference.load_model(project.models / "cnn.keras").predict(pixels, verbose=0)
    np.testing.assert_allclose(trained, expected, atol=2e-6)


def test_answers_come_while_photos_are_still_to_be_read(ask: Ask, somewhere: Path, monkeypatch: Any) -> None:
    for number in range(400):
        draw(somewhere / f"{number:03}.png", "red", (8, 8))
    read_at_answer: list[int] = []
    read, of = classifier.pixels, classifier.Classifier.answer
    count = iter(range(10_000))
    done = [0]

    def reading(*arguments: Any) -> np.ndarray:
        done[0] = next(count) + 1
        return read(*arguments)

    def answering(*arguments: Any) -> classifier.Answer:
        read_at_answer.append(done[0])
        return of(*arguments)

    monkeypatch.setattr(predict, "pixels", reading)
    monkeypatch.setattr(classifier.Classifier, "answer", answering)
    assert len(ask(somewhere).rows) == 400
    # A batch, and what waits decoded: never all.
    assert max(had - number for number, had in enumerate(read_at_answer)) <= 3 * BATCH
    assert "predicting: 400 in" in ask(somewhere).notes


def test_an_overlay_lies_beside_each_photo(ask: Ask, somewhere: Path) -> None:
    for name, colour in (("a.jpg", "red"), ("a.png", "blue"), ("n.png", "neither")):
        draw(somewhere / name, colour)
    (somewhere / "torn.jpg").write_bytes((somewhere / "a.jpg").read_bytes()[:-30])
    said = ask(somewhere, explain=True)
    assert names(str(said.error), "1") and names(said.notes, "torn.jpg")
    drawn = sorted(somewhere.glob("*.touchline.jpg"))
    assert [path.name for path in drawn] == ["a.jpg.touchline.jpg", "a.png.touchline.jpg", "n.png.touchline.jpg"]
    assert all(explain.is_overlay(path.read_bytes()) for path in drawn)
    # Drawn again over what we drew, but never over another's file; and never taken for photos.
    drawn[0].write_bytes(drawn[0].read_bytes()[:100])
    drawn[1].write_bytes(b"somebody's")
    said = ask(somewhere, explain=True)
    assert len(said.rows) == 3 and len(drawn[0].read_bytes()) > 1000
    assert drawn[1].read_bytes() == b"somebody's"
    assert names(said.notes, drawn[1].name) and not names(said.notes, drawn[0].name)


def test_a_folder_that_takes_no_overlay_costs_no_answer(ask: Ask, somewhere: Path, monkeypatch: Any) -> None:
    draw(somewhere / "a.jpg", "red")

    def refuse(path: Path, _: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(predict, "write_bytes", refuse)
    said = ask("a.jpg", explain=True)
    assert said.labels == {"a.jpg": "red"}
    assert names(said.notes, "a.jpg", "Permission denied") and said.error.exit_code == 1


def test_models_that_cannot_be_asked_are_one_line(ask: Ask, somewhere: Path) -> None:
    import keras

    draw(somewhere / "a.jpg", "red")
    planted().save(somewhere / "nameless.keras")
    planted().save(somewhere / "three.keras")
    files.write_json(somewhere / "three.json", {"classes": ["a", "b", "c"]})
    photo = keras.Input((8, 12, 3), dtype="uint8")
    keras.Model(photo, keras.layers.Dense(2)(keras.layers.Flatten()(photo))).save(somewhere / "oblong.keras")
    files.write_json(somewhere / "oblong.json", {"classes": CLASSES})
    for model, code, named in (
        ("", 1, ("rugby-soccer", "make run")),
        ("7", 2, ("7", "rugby-soccer")),
        ("vgg", 2, ("vgg", "params.yaml", "cnn", "transfer", ".keras")),
        ("0" * 32, 1, ("0" * 32,)),
        ("transfer", 1, ("transfer.keras",)),
        ("nameless.keras", 1, ("nameless.keras", "nameless.json")),
        ("three.keras", 1, ("three.keras", "3")),
        ("oblong.keras", 1, ("oblong.keras",)),
    ):
        said = ask("a.jpg", model=model)
        assert said.bytes == b"" and said.error.exit_code == code, model
        assert names(str(said.error), *named) and "\n" not in str(said.error), said.error


def test_a_model_whose_answers_are_no_numbers_says_so(ask: Ask, somewhere: Path) -> None:
    draw(somewhere / "a.jpg", "red")
    model = planted()
    model.layers[-1].set_weights([np.full((3, 2), np.nan, np.float32), np.zeros(2, np.float32)])
    model.save(somewhere / "broken.keras")
    files.write_json(somewhere / "broken.json", {"classes": CLASSES})
    said = ask("a.jpg", model="broken.keras")
    assert said.bytes == b"" and names(str(said.error), "--model")


@pytest.fixture
def registered(project: Paths, tmp_path: Path) -> tuple[Paths, list[str]]:
    """A project of its own with two versions, the second with red and blue the other way round; and the runs."""
    root = tmp_path / "another project"
    (root / "models").mkdir(parents=True)
    (root / "params.yaml").write_bytes((project.workspace / "params.yaml").read_bytes())
    paths = Paths(root, root)
    store, logged = runs.open_store(paths, NAME), []
    for turned in (False, True):
        planted(turned=turned).save(root / "model.keras")
        dataset = {"name": "split", "digest": "0", "source": "-", "counts": {}}
        logged.append(runs.start(store, "cnn", {}, {}, dataset))
        runs.finish(
            store,
            logged[-1],
            model_path=root / "model.keras",
            image_size=SIDE,
            classes=CLASSES,
            training_photos=[],
            metrics={},
        )
        registry.register(store, NAME, logged[-1], {}, "")
    registry.promote(store, NAME, 1)
    registry.set_alias(store, NAME, "challenger", 2)
    return paths, [*logged, runs.start(store, "cnn", {}, {}, dataset)]


def test_a_model_of_the_store_is_the_champion_a_version_an_alias_or_a_run(
    registered: tuple[Paths, list[str]], somewhere: Path
) -> None:
    paths, (first, second, modelless) = registered
    draw(somewhere / "a.jpg", "red")
    for model, label in (
        ("", "red"), ("champion", "red"), ("1", "red"), (first, "red"), ("2", "blue"), ("challenger", "blue"),
        (second, "blue"),
    ):  # fmt: skip
        said = Said(paths, ["a.jpg"], "json", b"", model)
        assert said.labels == {"a.jpg": label}, (model, said.error)
    said = Said(paths, ["a.jpg"], "json", b"", modelless)
    assert names(str(said.error), modelless)
    runs.open_store(paths, NAME).client.delete_registered_model_alias(NAME, "champion")
    said = Said(paths, ["a.jpg"], "json", b"", "")
    assert names(str(said.error), NAME, "2", "touchline promote", "--model") and said.error.exit_code == 1


def command(project: Paths, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "touchline.cli", "predict", *arguments], cwd=project.workspace,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_writes_results_alone_to_stdout_and_tells_by_its_exit_code(project: Paths, somewhere: Path) -> None:
    red = draw(somewhere / "a.jpg", "red")
    (somewhere / "torn.jpg").write_bytes(red.read_bytes()[:-30])
    done = command(project, str(somewhere), "--model", "cnn", "--format", "csv", "--explain")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[0].startswith("photo,label") and len(done.stdout.splitlines()) == 2
    assert names(done.stderr.splitlines()[-1], "touchline", "1")
    assert f"touchline: {somewhere}/torn.jpg: " in done.stderr and "Traceback" not in done.stderr
    assert (somewhere / "a.jpg.touchline.jpg").is_file()


def test_the_command_refuses_what_it_does_not_know(project: Paths) -> None:
    assert command(project).returncode == 2
    assert command(project, "x.jpg", "--format", "xml").returncode == 2


def test_a_reader_that_has_seen_enough_is_no_error(project: Paths, somewhere: Path) -> None:
    draw(somewhere / "a.jpg", "red")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "touchline.cli", "predict", str(somewhere), "--model", "cnn", "--format", "csv"],
        cwd=project.workspace, stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Broken" not in done.stderr, done.stderr
