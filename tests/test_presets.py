"""Presets and the editing of params.yaml: what is asked for changes, and nothing else does."""

from copy import deepcopy
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from touchline.commands import presets
from touchline.core import params
from touchline.core.editing import set_values
from touchline.core.errors import ParamsError
from touchline.core.params import ArticleParams, CnnParams

SHIPPED = Path(__file__).parents[1] / "params.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    return path


def write(file: Path, name: str) -> params.Params:
    set_values(file, presets.changes(name))
    return params.load(file)


def test_there_are_three() -> None:
    assert presets.names() == ["article", "best", "fast"]


def test_params_are_shipped_with_the_fast_one(file: Path) -> None:
    assert write(file, "fast") == params.load(SHIPPED)
    assert file.read_bytes() == SHIPPED.read_bytes()


def test_best_costs_more_and_fast_brings_back_what_was(file: Path) -> None:
    best, fast = write(file, "best"), params.load(SHIPPED)
    assert best.features["pooled"].views > fast.features["pooled"].views
    assert best.features["pixels"].image_size > fast.features["pixels"].image_size
    write(file, "fast")
    assert file.read_bytes() == SHIPPED.read_bytes()


def test_the_articles_network_replaces_the_simple_one_and_leaves_the_other(file: Path) -> None:
    article = write(file, "article")
    assert isinstance(article.models["cnn"], ArticleParams) and article.models["cnn"].epochs == 500
    assert article.models["transfer"] == params.load(SHIPPED).models["transfer"]
    assert isinstance(write(file, "fast").models["cnn"], CnnParams)


def test_a_model_of_ones_own_and_every_other_section_stay(file: Path) -> None:
    content = YAML().load(file)
    content["models"]["mine"] = deepcopy(content["models"]["transfer"]) | {"seed": 7}
    with file.open("w") as stream:
        YAML().dump(content, stream)
    before = file.read_text()
    assert write(file, "best").models["mine"].seed == 7
    assert file.read_text().partition("features:")[0] == before.partition("features:")[0]
    assert file.read_text().partition("evaluate:")[2] == before.partition("evaluate:")[2]


def test_an_unknown_preset_is_one_line_and_changes_nothing(file: Path) -> None:
    with pytest.raises(ParamsError, match=r"'bets'.*\barticle\b.*\bbest\b.*\bfast\b"):
        write(file, "bets")
    assert file.read_bytes() == SHIPPED.read_bytes()


def test_a_change_that_is_not_allowed_is_not_written(file: Path) -> None:
    with pytest.raises(ParamsError, match=r"models\.cnn\.dropout.*\b2\b"):
        set_values(file, {"models.cnn.dropout": 2})
    assert file.read_bytes() == SHIPPED.read_bytes()


def test_a_changed_section_keeps_its_comments(file: Path) -> None:
    set_values(file, {"split.seed": 43})
    changed = [
        (before, after)
        for before, after in zip(SHIPPED.read_text().splitlines(), file.read_text().splitlines(), strict=True)
        if before != after
    ]
    assert changed == [("  seed: 42", "  seed: 43")]
