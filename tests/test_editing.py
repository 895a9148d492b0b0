"""Values of params.yaml changed in place: what is asked for changes, and not one character besides."""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from touchline.commands import presets
from touchline.core import params
from touchline.core.editing import as_yaml, change, remove_entries, set_values
from touchline.core.errors import ParamsError

SHIPPED = (Path(__file__).parents[1] / "params.yaml").read_text()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED)
    return path


def edited(file: Path, text: str, changes: dict[str, Any]) -> str:
    """The file after changes, `text` being what it holds before."""
    assert text != SHIPPED
    file.write_bytes(text.encode())
    set_values(file, changes)
    return file.read_bytes().decode()


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("models.cnn.dropout", 0.35, "    dropout: 0.35\n"),
        ("models.cnn.filters", [8, 16], "    filters: [8, 16]  # blocks of"),
        ("models.cnn.augmentation.zoom", 0.00001, "rotation: 30, zoom: 0.00001, shift: 0.1"),
        ("drift.train", True, "  train: true                  # true:"),
        ("drift.folder", "photos #2: new", '  folder: "photos #2: new"                    # '),
    ],
)
def test_a_value_changes_and_nothing_else(file: Path, key: str, value: object, line: str) -> None:
    set_values(file, {key: value})
    changed = [new for old, new in zip(SHIPPED.splitlines(), file.read_text().splitlines(), strict=True) if old != new]
    assert len(changed) == 1 and line in f"{changed[0]}\n"
    content = params.load(file).model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        content = content[part]
    assert content == value


def test_the_present_values_leave_the_file_as_it_is(file: Path) -> None:
    set_values(file, {"models.cnn.augmentation.rotation": 30.0, "models.cnn.epochs": 16})
    assert file.read_text() == SHIPPED


@pytest.mark.parametrize("name,other", [("cnn", "transfer"), ("transfer", "cnn")])
def test_an_entry_goes_with_its_lines_and_nothing_else(file: Path, name: str, other: str) -> None:
    for _ in range(2):
        remove_entries(file, [f"models.{name}"])
        left = file.read_text()
        assert list(params.load(file).models) == [other]
        lines = SHIPPED.splitlines()
        gone = [line for line in lines if line not in left.splitlines()]
        assert gone[0].startswith(f"  {name}:") and all(line.startswith("    ") for line in gone[1:])
        assert len(lines) - len(left.splitlines()) >= len(gone)


def test_the_last_model_is_not_taken_out(file: Path) -> None:
    with pytest.raises(ParamsError, match="models"):
        remove_entries(file, ["models.cnn", "models.transfer"])
    assert file.read_text() == SHIPPED


MERGED = SHIPPED.replace("  transfer:  ", "  other: {<<: *cnn, seed: 7}\n  transfer:  ").replace(
    "  cnn:  ", "  cnn: &cnn  "
)


@pytest.mark.parametrize(
    "text, changes",
    [
        (MERGED, {"models.other.dropout": 0.35}),
        (MERGED.replace("{<<: *cnn, seed: 7}", "*cnn"), {"models.other.dropout": 0.35}),
        (MERGED, {"models.cnn.dropout": 0.35}),
        (MERGED, presets.changes("article")),
        (SHIPPED.replace("dropout: 0.2\n", "dropout: &a 0.2\n").replace("train: false", "train: false\n  _: *a"), None),
    ],
    ids=["merged", "alias", "merged elsewhere", "preset over an anchor", "not allowed"],
)
def test_values_that_are_shared_are_one_line_and_stay(file: Path, text: str, changes: dict[str, Any] | None) -> None:
    file.write_text(text)
    with pytest.raises(ParamsError) as error:
        set_values(file, changes or {"models.cnn.dropout": 0.35})
    assert "\n" not in str(error.value)
    assert file.read_text() == text


def test_a_merged_file_can_be_changed_where_nothing_is_shared(file: Path) -> None:
    assert edited(file, MERGED, {"models.other.seed": 8}) == MERGED.replace("seed: 7}", "seed: 8}")


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_preset_is_written_whatever_the_keys_look_like(file: Path, quote: str, newline: str) -> None:
    text = SHIPPED.replace("\nmodels:", f"\n{quote}models{quote}:")
    text = text.replace("\nevaluate:", f"\n{quote}evaluate{quote} :").replace("\n", newline)
    best = edited(file, text, presets.changes("best"))
    assert best.partition("features:")[0] == text.partition("features:")[0]
    assert best.partition(f"{quote}evaluate")[2] == text.partition(f"{quote}evaluate")[2]
    assert best.count("\n") == best.count(newline)
    set_values(file, presets.changes("fast"))
    assert file.read_bytes().decode() == text


def test_a_preset_adds_an_entry_that_is_gone_and_keeps_the_indentation_of_the_others(file: Path) -> None:
    # The head works on `other`, so that the file is allowed without `pooled`.
    text = SHIPPED.replace("  pooled:", "  other:").replace("input: pooled", "input: other")
    start, end = text.index("  pixels:"), text.index("\nmodels:")
    found = edited(file, text[:start] + textwrap.indent(text[start:end], "    ") + text[end:], presets.changes("fast"))
    assert "\n      pooled:" in found and "\n        views: 1" in found.partition("pooled:")[2]
    assert {"pixels", "other", "pooled"} == set(params.load(file).features)


def test_a_section_on_one_line_is_one_line(file: Path) -> None:
    text = SHIPPED[: SHIPPED.index("features:")] + "features: {pixels: {image_size: 96}}\n"
    text += SHIPPED[SHIPPED.index("models:") : SHIPPED.index("  transfer:")] + SHIPPED[SHIPPED.index("\nevaluate:") :]
    file.write_text(text)
    with pytest.raises(ParamsError, match="by hand"):
        set_values(file, presets.changes("best"))
    assert file.read_text() == text


def test_plain_content_is_changed_where_it_has_the_key() -> None:
    content = {"models": {"cnn": {"dropout": 0.2}}}
    assert change(content, "models.cnn.dropout", 0.3)
    for key in ("models.cnn.dropuot", "models.vgg.dropout", "models.cnn.dropout.x"):
        assert not change(content, key, 1)
    assert content == {"models": {"cnn": {"dropout": 0.3}}}


@pytest.mark.parametrize(
    "value, text",
    [(1e-5, "0.00001"), (2.0, "2.0"), ([0.5, 3], "[0.5, 3]"), (True, "true"), (None, "null"), ("none", "none"),
     ("yes", "yes"), ("1", '"1"'), ("", '""'), ("a: b", '"a: b"')],
)  # fmt: skip
def test_values_as_yaml(value: object, text: str) -> None:
    assert as_yaml(value) == text
