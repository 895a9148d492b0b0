"""params.yaml: what is shipped loads; what is not allowed is one line with the key, the value and the rule."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SHIPPED, names

from touchline.core import params
from touchline.core.errors import ParamsError
from touchline.core.params import ArticleParams, BackboneFeatures, CnnParams, HeadParams, PixelFeatures
from touchline.data import decisions, forgotten

GONE = object()


def changed(content: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """`content` with the value at a dotted key replaced, added or, if GONE, taken away."""
    *sections, last = key.split(".")
    place = content
    for section in sections:
        place = place[section]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return content


def message_of(content: object) -> str:
    with pytest.raises(ParamsError) as error:
        params.check(content)
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_shipped_file_loads_into_typed_values() -> None:
    shipped = params.load(SHIPPED)
    assert shipped.classes == ["rugby", "soccer"]
    assert {name: type(entry) for name, entry in shipped.features.items()} == {
        "pixels": PixelFeatures,
        "pooled": BackboneFeatures,
    }
    assert {name: type(entry) for name, entry in shipped.models.items()} == {"cnn": CnnParams, "transfer": HeadParams}


def test_the_articles_network_can_be_a_model_and_works_on_pixels(shipped: dict[str, Any]) -> None:
    entry = shipped["models"]["cnn"] | {"architecture": "article", "dense_units": 128}
    del entry["filters"], entry["convolutions"], entry["weight_decay"]
    assert type(params.check(changed(shipped, "models.old", entry)).models["old"]) is ArticleParams
    said = message_of(changed(shipped, "models.old", entry | {"input": "pooled"}))
    assert names(said, "models.old.input", "'pooled'", "article", "pixels"), said


def test_a_backbone_is_a_name_or_several(shipped: dict[str, Any]) -> None:
    for value, several in (("vgg16", ["vgg16"]), (["vgg16", "resnet50"], ["vgg16", "resnet50"])):
        assert params.check(changed(shipped, "features.pooled.backbone", value)).features["pooled"].backbone == several


@pytest.mark.parametrize("key, value", [("alpha", 0.5), ("weights", "own.h5"), ("weights_sha256", "0" * 64)])
def test_what_is_meant_for_one_backbone_is_refused_for_several(
    shipped: dict[str, Any], key: str, value: object
) -> None:
    shipped["features"]["pooled"] |= {"backbone": ["vgg16", "resnet50"], key: value}
    assert names(message_of(shipped), "features.pooled", "alpha", "weights")


def test_several_backbones_cannot_be_tuned(shipped: dict[str, Any]) -> None:
    shipped["models"]["transfer"]["fine_tune"]["blocks"] = 2
    params.check(shipped)
    shipped["features"]["pooled"]["backbone"] = ["vgg16", "resnet50"]
    assert names(message_of(shipped), "models.transfer.fine_tune.blocks")


def test_a_whole_number_is_good_where_a_fraction_is_meant(shipped: dict[str, Any]) -> None:
    found = params.check(changed(shipped, "validate.max_aspect", 4)).validate_.max_aspect
    assert (found, type(found)) == (4.0, float)


def test_any_number_of_classes_and_any_names(shipped: dict[str, Any]) -> None:
    names = ["; rm -rf x", "Étoile", "soccer (women)", "3"]
    assert params.check(changed(shipped, "classes", names)).classes == names


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("split.test_share", 1.2, ["split.test_share", "1.2", "0", "1"]),
        ("split.test_share", 0, ["split.test_share", "0", "1"]),
        ("split.test_share", float("nan"), ["split.test_share", "nan", "0", "1"]),
        ("split.test_share", True, ["split.test_share", "True"]),
        ("split.test_share", "0.2", ["split.test_share", "'0.2'"]),
        ("split.seed", True, ["split.seed", "True"]),
        ("split.seed", 42.0, ["split.seed", "42.0"]),
        ("split.seed", "42", ["split.seed", "'42'"]),
        ("split.by_group", "yes", ["split.by_group", "'yes'"]),
        ("split.method", "random", ["split.method", "'random'", "'hash'", "'stratified'"]),
        ("split.seed", GONE, ["split.seed"]),
        ("evaluate", GONE, ["evaluate"]),
        ("split.sed", 42, ["split.sed"]),
        ("colours", 3, ["colours"]),
        ("models.cnn.augmentation.shear", 5, ["models.cnn.augmentation.shear"]),
        ("classes", ["rugby"], ["classes", "['rugby']", "2"]),
        ("classes", ["rugby", "Rugby"], ["classes", "['rugby', 'Rugby']", "'rugby'"]),
        ("classes", ["rugby", "field/hockey"], ["classes.1", "'field/hockey'"]),
        ("classes", ["rugby", 7], ["classes.1", "7", "quotes"]),
        ("models.cnn.architecture", "rnn", ["models.cnn.architecture", "'rnn'", "'cnn'", "'article'", "'head'"]),
        ("models.cnn.architecture", GONE, ["models.cnn.architecture"]),
        ("models.cnn.input", "pixel", ["models.cnn.input", "'pixel'", "pixels"]),
        ("models.cnn.input", "pooled", ["models.cnn.input", "'pooled'", "pixels"]),
        ("models.transfer.input", "pixels", ["models.transfer.input", "'pixels'", "pooled"]),
        ("models.cnn.dense_units", 8, ["models.cnn.dense_units"]),
        ("models.cnn.filters", [], ["models.cnn.filters", "[]", "1"]),
        ("models.cnn.filters", [16, 0], ["models.cnn.filters.1", "0", "1"]),
        ("models.cnn.filters", [8] * 6, ["models.cnn.filters", "[8, 8, 8, 8, 8, 8]", "5"]),
        ("models.cnn.weight_decay", -0.1, ["models.cnn.weight_decay", "-0.1", "0"]),
        ("models.cnn.dropout", 1.0, ["models.cnn.dropout", "1.0", "0", "1"]),
        ("models.transfer.strengths", [], ["models.transfer.strengths", "[]", "1"]),
        ("models.transfer.strengths", [0.1, 0.0], ["models.transfer.strengths.1", "0.0", "0"]),
        ("models.transfer.strengths", 0.1, ["models.transfer.strengths", "0.1"]),
        ("models.transfer.strengths", [1.0, 0.1], ["models.transfer.strengths"]),
        ("models.transfer.strengths", [0.1, 0.1], ["models.transfer.strengths"]),
        ("models.transfer.folds", 1, ["models.transfer.folds", "1", "2"]),
        ("models.transfer.balance", "author", ["models.transfer.balance", "'author'", "'none'", "'class'", "'group'"]),
        ("models.transfer.epochs", 3, ["models.transfer.epochs"]),
        ("features.pooled.backbone", [], ["features.pooled.backbone", "[]", "1"]),
        ("features.pooled.backbone", ["vgg16", "vgg16"], ["features.pooled.backbone", "['vgg16', 'vgg16']", "'vgg16'"]),
        ("features.pooled.views", 3, ["features.pooled.views", "3", "1", "2"]),
        ("features.pixels.image_size", 16, ["features.pixels.image_size", "16", "32"]),
        ("features.pixels", 64, ["features.pixels", "64"]),
        ("models.cnn", None, ["models.cnn", "None"]),
        (
            "ingest.sources",
            ["web"],
            ["ingest.sources.0", "'web'", "sample", "folder", "openimages", "imagenet"],
        ),
        ("ingest.sources", ["imagenet"], ["ingest", "imagenet"]),
        ("ingest.openimages.url", "storage.googleapis.com", ["ingest.openimages.url", "'storage.googleapis.com'"]),
        ("ingest.openimages.url", "ftp://host", ["ingest.openimages.url", "'ftp://host'"]),
        (
            "ingest.openimages.url",
            "https://someone:s3cret@host/photos",
            ["ingest.openimages.url", "'https://***@host/photos'"],
        ),
        (
            "ingest.imagenet.archive",
            "https://someone:s3cret@host/all.tar",
            ["ingest.imagenet.archive", "'https://***@host/all.tar'"],
        ),
        ("split.see\nd", 42, ["split.'see\\nd'"]),
        ("ingest.imagenet.classes.rugby", ["n123"], ["ingest.imagenet.classes.rugby.0", "'n123'"]),
        ("split.exact", "maybe" * 30, ["split.exact"]),
    ],
)
def test_what_is_not_allowed_is_one_line(shipped: dict[str, Any], key: str, value: object, named: list[str]) -> None:
    message = message_of(changed(shipped, key, value))
    assert names(message, "params.yaml", *named), message
    assert "\n" not in message and len(message) < 200
    assert "more)" not in message


@pytest.mark.parametrize(
    "options, named",
    [
        ({"exact": True, "method": "stratified"}, ["exact: true", "method: hash"]),
        ({"test_groups": ["2019"], "by_group": False}, ["test_groups", "by_group: true"]),
    ],
)
def test_options_that_contradict_each_other(shipped: dict[str, Any], options: dict[str, Any], named: list[str]) -> None:
    shipped["split"] |= options
    assert names(message_of(shipped), "split", *named)


def test_a_slash_at_the_end_of_an_address_is_taken_off(shipped: dict[str, Any]) -> None:
    for key in ("openimages.url", "openimages.photos_url", "imagenet.url"):
        shipped = changed(shipped, f"ingest.{key}", "https://host/photos/")
    loaded = params.check(shipped).ingest
    assert {loaded.openimages.url, loaded.openimages.photos_url, loaded.imagenet.url} == {"https://host/photos"}


@pytest.mark.parametrize(
    "sources, allowed", [(["openimages"], False), (["sample", "openimages"], False), (["openimages", "feedback"], True),
                         (["folder"], True), (["sample"], True)],
)  # fmt: skip
def test_fewer_photos_than_must_come_cannot_be_asked_of_a_remote_source(
    shipped: dict[str, Any], sources: list[str], allowed: bool
) -> None:
    wish = changed(changed(shipped, "ingest.sources", sources), "ingest.per_class", 20)
    if allowed:
        assert params.check(wish)
    else:
        assert all(word in message_of(wish) for word in ("per_class", "20", "min_per_class", "40"))


def test_the_first_fault_is_told_and_the_others_are_counted(shipped: dict[str, Any]) -> None:
    changed(changed(shipped, "split.seed", -1), "split.colour", "red")
    said = message_of(shipped)
    assert names(said, "split.seed", "-1", "0", "1") and "split.colour" not in said


@pytest.mark.parametrize(
    "content, named",
    [
        (b"classes: [a, b\nsplit: {seed: 1}\n", ["YAML", "line 2"]),
        (b"classes: [a, b]\nclasses: [c, d]\n", ["classes"]),
        (b"classes: !!python/object/apply:os.system [exit]\n", ["YAML", "os.system"]),
        (b"classes: [a, \xff]\n", ["YAML"]),
        (b"", ["None"]),
        (b"- rugby\n- soccer\n", ["['rugby', 'soccer']"]),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, content: bytes, named: list[str]) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ParamsError) as error:
        params.load(tmp_path / "params.yaml")
    assert names(str(error.value), "params.yaml", *named) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "line, instead, arguments, named",
    [
        ("test_share: 0.2", "test_share: 1.2", ["split"], ["split.test_share", "1.2"]),
        ("", "", ["train", "resnet"], ["models", "'resnet'", "cnn", "transfer"]),
    ],
)
def test_the_command_line_says_it_on_stderr_and_exits_2(
    tmp_path: Path, line: str, instead: str, arguments: list[str], named: list[str]
) -> None:
    assert line in SHIPPED.read_text()
    (tmp_path / "params.yaml").write_text(SHIPPED.read_text().replace(line, instead))
    done = touchline(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert names(done.stderr, "touchline", "params.yaml", *named) and done.stderr.count("\n") == 1


def test_a_project_of_an_earlier_version_is_told_what_to_add(tmp_path: Path) -> None:
    text = SHIPPED.read_text()
    (tmp_path / "params.yaml").write_text(text[: text.index("\nrights:")] + text[text.index("\nvalidate:") :])
    done = touchline(tmp_path, "ingest", "--check")
    assert done.returncode == 2 and names(done.stderr, "params.yaml", "rights") and done.stderr.count("\n") == 1
    # DVC would say only that there is no such file.
    (tmp_path / "params.yaml").write_text(text)
    for name in ("forgotten", "decisions"):
        done = touchline(tmp_path, "ingest", "--check")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert names(done.stderr, f"data/{name}.csv")
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{name}.csv").write_text(done.stderr.split()[-1] + "\n")
    assert touchline(tmp_path, "ingest", "--check").returncode == 0
    assert not forgotten.read(tmp_path / "data/forgotten.csv") and not decisions.read(
        tmp_path / "data/decisions.csv", []
    )


def test_outside_a_project_the_command_line_says_where_to_run_it(tmp_path: Path) -> None:
    done = touchline(tmp_path, "split")
    assert done.returncode == 2
    assert names(done.stderr, "params.yaml", str(tmp_path)) and done.stderr.count("\n") == 1


def touchline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "touchline.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)
