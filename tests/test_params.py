"""params.yaml: what is shipped loads; what is not allowed is one line with the key, the value and the rule."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SHIPPED

from touchline.core import params
from touchline.core.errors import ParamsError
from touchline.core.params import ArticleParams, BackboneFeatures, CnnParams, HeadParams, PixelFeatures

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
    del entry["filters"], entry["weight_decay"]
    assert type(params.check(changed(shipped, "models.old", entry)).models["old"]) is ArticleParams
    assert message_of(changed(shipped, "models.old", entry | {"input": "pooled"})).endswith(
        "models.old.input is 'pooled'; allowed for article: one of `features` (pixels)"
    )


def test_a_backbone_is_a_name_or_several(shipped: dict[str, Any]) -> None:
    for value, names in (("vgg16", ["vgg16"]), (["vgg16", "resnet50"], ["vgg16", "resnet50"])):
        assert params.check(changed(shipped, "features.pooled.backbone", value)).features["pooled"].backbone == names


@pytest.mark.parametrize("key, value", [("alpha", 0.5), ("weights", "own.h5"), ("weights_sha256", "0" * 64)])
def test_what_is_meant_for_one_backbone_is_refused_for_several(
    shipped: dict[str, Any], key: str, value: object
) -> None:
    shipped["features"]["pooled"] |= {"backbone": ["vgg16", "resnet50"], key: value}
    says = "params.yaml: features.pooled allows `alpha` and `weights` only with one backbone"
    assert message_of(shipped) == says


def test_several_backbones_cannot_be_tuned(shipped: dict[str, Any]) -> None:
    shipped["models"]["transfer"]["fine_tune"]["blocks"] = 2
    params.check(shipped)
    shipped["features"]["pooled"]["backbone"] = ["vgg16", "resnet50"]
    says = "params.yaml: models.transfer.fine_tune.blocks is above 0; allowed: with one backbone"
    assert message_of(shipped) == says


def test_a_whole_number_is_good_where_a_fraction_is_meant(shipped: dict[str, Any]) -> None:
    found = params.check(changed(shipped, "validate.max_aspect", 4)).validate_.max_aspect
    assert (found, type(found)) == (4.0, float)


def test_any_number_of_classes_and_any_names(shipped: dict[str, Any]) -> None:
    names = ["; rm -rf x", "Étoile", "soccer (women)", "3"]
    assert params.check(changed(shipped, "classes", names)).classes == names


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("split.test_share", 1.2, "split.test_share is 1.2; allowed: a number greater than 0 and less than 1"),
        ("split.test_share", 0, "split.test_share is 0; allowed: a number greater than 0 and less than 1"),
        ("split.test_share", float("nan"), "split.test_share is nan; allowed: a number greater than 0 and less than 1"),
        ("split.test_share", True, "split.test_share is True; allowed: a valid number"),
        ("split.test_share", "0.2", "split.test_share is '0.2'; allowed: a valid number"),
        ("split.seed", True, "split.seed is True; allowed: a valid integer"),
        ("split.seed", 42.0, "split.seed is 42.0; allowed: a valid integer"),
        ("split.seed", "42", "split.seed is '42'; allowed: a valid integer"),
        ("split.by_group", "yes", "split.by_group is 'yes'; allowed: a valid boolean"),
        ("split.method", "random", "split.method is 'random'; allowed: 'hash' or 'stratified'"),
        ("split.seed", GONE, "split.seed is missing"),
        ("evaluate", GONE, "evaluate is missing"),
        ("split.sed", 42, "split.sed is not a known key"),
        ("colours", 3, "colours is not a known key"),
        ("models.cnn.augmentation.shear", 5, "models.cnn.augmentation.shear is not a known key"),
        ("classes", ["rugby"], "classes is ['rugby']; allowed: at least 2 of them"),
        (
            "classes",
            ["rugby", "Rugby"],  # one folder where capitals do not count
            "classes is ['rugby', 'Rugby']; allowed: each name once ('rugby' stands twice)",
        ),
        (
            "classes",
            ["rugby", "field/hockey"],
            "classes.1 is 'field/hockey'; allowed: a name without slashes, line breaks, a leading dot or outer spaces",
        ),
        ("classes", ["rugby", 7], "classes.1 is 7; allowed: a valid string"),
        ("models.cnn.architecture", "rnn", "models.cnn.architecture is 'rnn'; allowed: 'cnn', 'article', 'head'"),
        ("models.cnn.architecture", GONE, "models.cnn.architecture is missing"),
        (
            "models.cnn.input",
            "pixel",
            "models.cnn.input is 'pixel'; allowed for cnn: one of `features` (pixels)",
        ),
        (
            "models.cnn.input",
            "pooled",
            "models.cnn.input is 'pooled'; allowed for cnn: one of `features` (pixels)",
        ),
        (
            "models.transfer.input",
            "pixels",
            "models.transfer.input is 'pixels'; allowed for head: one of `features` (pooled)",
        ),
        ("models.cnn.dense_units", 8, "models.cnn.dense_units is not a known key"),
        ("models.cnn.filters", [], "models.cnn.filters is []; allowed: at least 1 of them"),
        ("models.cnn.filters", [16, 0], "models.cnn.filters.1 is 0; allowed: greater than or equal to 1"),
        ("models.cnn.filters", [8] * 6, "models.cnn.filters is [8, 8, 8, 8, 8, 8]; allowed: at most 5 of them"),
        ("models.cnn.weight_decay", -0.1, "models.cnn.weight_decay is -0.1; allowed: a number at least 0"),
        ("models.cnn.dropout", 1.0, "models.cnn.dropout is 1.0; allowed: a number at least 0 and less than 1"),
        ("models.transfer.strengths", [], "models.transfer.strengths is []; allowed: at least 1 of them"),
        (
            "models.transfer.strengths",
            [0.1, 0.0],
            "models.transfer.strengths.1 is 0.0; allowed: a number greater than 0",
        ),
        ("models.transfer.strengths", 0.1, "models.transfer.strengths is 0.1; allowed: a valid list"),
        (
            "models.transfer.strengths",
            [1.0, 0.1],
            "models.transfer.strengths allows numbers from the smallest to the largest, each once",
        ),
        (
            "models.transfer.strengths",
            [0.1, 0.1],
            "models.transfer.strengths allows numbers from the smallest to the largest, each once",
        ),
        ("models.transfer.folds", 1, "models.transfer.folds is 1; allowed: greater than or equal to 2"),
        (
            "models.transfer.balance",
            "author",
            "models.transfer.balance is 'author'; allowed: 'none', 'class' or 'group'",
        ),
        ("models.transfer.epochs", 3, "models.transfer.epochs is not a known key"),
        ("features.pooled.backbone", [], "features.pooled.backbone is []; allowed: at least 1 of them"),
        (
            "features.pooled.backbone",
            ["vgg16", "vgg16"],
            "features.pooled.backbone is ['vgg16', 'vgg16']; allowed: each name once ('vgg16' stands twice)",
        ),
        ("features.pooled.views", 3, "features.pooled.views is 3; allowed: 1 or 2"),
        ("features.pixels.image_size", 16, "features.pixels.image_size is 16; allowed: greater than or equal to 32"),
        ("features.pixels", 64, "features.pixels is 64; allowed: keys with their values"),
        ("models.cnn", None, "models.cnn is None; allowed: keys with their values"),
        ("ingest.sources", ["web"], "ingest.sources.0 is 'web'; allowed: 'sample', 'folder', 'openimages', 'imagenet'"),
        (
            "ingest.sources",
            ["imagenet"],
            "ingest allows imagenet, whose photos may not be passed on",
        ),
        (
            "ingest.openimages.url",
            "storage.googleapis.com",
            "ingest.openimages.url is 'storage.googleapis.com'; allowed",
        ),
        (
            "ingest.openimages.url",
            "ftp://host",
            "ingest.openimages.url is 'ftp://host'; allowed: an address that begins",
        ),
        (
            "ingest.openimages.url",
            "https://someone:s3cret@host/photos",
            "ingest.openimages.url is 'https://***@host/photos'; allowed: an address that begins",
        ),
        (
            "ingest.imagenet.archive",
            "https://someone:s3cret@host/all.tar",
            "ingest.imagenet.archive is 'https://***@host/all.tar'; allowed: an address without a user's name and",
        ),
        ("split.see\nd", 42, r"split.'see\nd' is not a known key"),
        ("ingest.imagenet.classes.rugby", ["n123"], "ingest.imagenet.classes.rugby.0 is 'n123'; allowed: what matches"),
        ("split.exact", "maybe" * 30, "split.exact is 'maybemaybe"),
    ],
)
def test_what_is_not_allowed_is_one_line(shipped: dict[str, Any], key: str, value: object, says: str) -> None:
    message = message_of(changed(shipped, key, value))
    assert message.startswith(f"params.yaml: {says}")
    assert "\n" not in message and len(message) < 200
    assert "more)" not in message


@pytest.mark.parametrize(
    "options, says",
    [
        ({"exact": True, "method": "stratified"}, "split allows `exact: true` only with `method: hash`"),
        ({"test_groups": ["2019"], "by_group": False}, "split allows `test_groups` only with `by_group: true`"),
    ],
)
def test_options_that_contradict_each_other(shipped: dict[str, Any], options: dict[str, Any], says: str) -> None:
    shipped["split"] |= options
    assert message_of(shipped) == f"params.yaml: {says}"


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
    assert message_of(shipped) == "params.yaml: split.seed is -1; allowed: greater than or equal to 0 (and 1 more)"


@pytest.mark.parametrize(
    "content, says",
    [
        (b"classes: [a, b\nsplit: {seed: 1}\n", "is not readable YAML"),
        (b"classes: [a, b]\nclasses: [c, d]\n", 'found duplicate key "classes"'),
        (b"classes: !!python/object/apply:os.system [exit]\n", "is not readable YAML"),
        (b"classes: [a, \xff]\n", "is not readable YAML"),
        (b"", "the file is None; allowed: keys with their values"),
        (b"- rugby\n- soccer\n", "the file is ['rugby', 'soccer']; allowed: keys with their values"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ParamsError) as error:
        params.load(tmp_path / "params.yaml")
    assert str(error.value).startswith("params.yaml") and says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "line, instead, arguments, says",
    [
        ("test_share: 0.2", "test_share: 1.2", ["split"], "params.yaml: split.test_share is 1.2; allowed: "),
        ("", "", ["train", "resnet"], "params.yaml: models has no entry 'resnet'; allowed: cnn, transfer"),
    ],
)
def test_the_command_line_says_it_on_stderr_and_exits_2(
    tmp_path: Path, line: str, instead: str, arguments: list[str], says: str
) -> None:
    assert line in SHIPPED.read_text()
    (tmp_path / "params.yaml").write_text(SHIPPED.read_text().replace(line, instead))
    done = touchline(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"touchline: {says}") and done.stderr.count("\n") == 1


def test_outside_a_project_the_command_line_says_where_to_run_it(tmp_path: Path) -> None:
    done = touchline(tmp_path, "split")
    assert done.returncode == 2
    assert done.stderr == f"touchline: no params.yaml in {tmp_path} or above it: run this inside a Touchline project\n"


def touchline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "touchline.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)
