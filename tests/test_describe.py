"""The photos described for machines, and a version described for people."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlcroissant
import projects
import pytest

from touchline.core.files import read_table
from touchline.core.paths import Paths
from touchline.report import croissant


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> projects.Project:
    return projects.built(tmp_path_factory).project


@pytest.fixture(scope="module")
def described(project: projects.Project) -> mlcroissant.Dataset:
    """What the pipeline wrote, as Croissant's own library reads it: an error of its would be raised here."""
    return mlcroissant.Dataset(jsonld=project.root / "data/croissant.json")


def records(described: mlcroissant.Dataset, name: str) -> Iterator[dict[str, str]]:
    """The rows of a set of records, by the columns' own names."""
    for row in described.records(name):
        texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}
        yield {key.partition("/")[2]: text for key, text in texts.items()}


def test_the_pipeline_describes_the_set_as_croissant(
    project: projects.Project, described: mlcroissant.Dataset, tmp_path: Path
) -> None:
    assert not described.metadata.ctx.issues.errors
    assert described.metadata.ctx.conforms_to.value.endswith("croissant/1.1")
    project.call("describe", "--output", str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == (project.root / "data/croissant.json").read_bytes()
    assert "data/croissant.json" in (project.root / "reports/report.html").read_text()
    said = project.call("describe", "--output", str(tmp_path), exit_code=1).err
    assert str(tmp_path) in said and said.count("\n") == 1


def test_its_records_are_the_photos_with_their_digests_and_subsets(
    project: projects.Project, described: mlcroissant.Dataset
) -> None:
    split = read_table(project.root / "data/split.csv")
    columns = ["path", "sha256", "subset", "class"]
    rows = list(records(described, "rows"))
    assert [tuple(row[column] for column in columns) for row in rows] == list(
        split[columns].itertuples(index=False, name=None)
    )
    assert {row["source"] for row in rows} == {"sample"}
    assert [row["name"] for row in records(described, "classes")] == ["rugby", "soccer"]
    assert [row["name"] for row in records(described, "subsets")] == ["train", "validation", "test"]


def test_it_states_licences_sources_labels_and_the_biases_of_the_data_card(project: projects.Project) -> None:
    found = project.json("data/croissant.json")
    assert found["license"] == ["https://spdx.org/licenses/CC0-1.0.html"]
    assert "drawn" in found["rai:dataCollection"] and len(found["rai:dataAnnotationProtocol"]) == 1
    card = (projects.REPOSITORY / "docs/data-card.md").read_text().partition("## Known biases")[2].partition("\n## ")[0]
    for bias in (line.partition("**")[2].partition("**")[0] for line in card.splitlines() if line.startswith("- **")):
        assert any(each.startswith(bias.rstrip(".")) for each in found["rai:dataBiases"]), bias


def test_other_sources_and_licences_are_named(project: projects.Project, tmp_path: Path) -> None:
    copy = projects.copy(project, tmp_path / "the project")
    file = copy.root / "data/split.csv"
    table = read_table(file)
    table.loc[table["class"] == "soccer", ["source", "licence"]] = ["imagenet", "ImageNet terms: ..."]
    table.loc[table.index[:1], ["source", "licence"]] = ["openimages", "https://creativecommons.org/licenses/by/2.0/"]
    table.to_csv(file, index=False)
    copy.call("describe")
    found = json.loads((copy.root / "data/croissant.json").read_text())
    assert {"https://spdx.org/licenses/CC-BY-2.0.html", "LicenseRef-ImageNet"} <= set(found["license"])
    assert any("100% of soccer" in each for each in found["rai:dataBiases"])
    assert not mlcroissant.Dataset(jsonld=copy.root / "data/croissant.json").metadata.ctx.issues.errors


def test_a_set_without_a_split_is_one_line(tmp_path: Path) -> None:
    bare = projects.make(tmp_path / "the project", git=False)
    assert "split.csv" in bare.call("describe", exit_code=1).err
    assert not croissant.place(Paths(bare.root, bare.root)).exists()


def test_a_version_has_a_card_of_what_was_measured(project: projects.Project, tmp_path: Path) -> None:
    [version] = projects.versions(project)
    card = project.call("card", str(version.number)).out
    assert card == project.call("card").out == (project.root / "reports/model-card.md").read_text()
    better = project.json("reports/registration.json")["better_model"]
    found = project.json("reports/metrics.json")["models"][better]
    for figure in ("accuracy", "accuracy_low", "accuracy_high", "f1"):
        assert f"{found[figure]:.3f}" in card
    for part in ("CC0-1.0", "shorter side", "unknown", "milliseconds", "research", version.model_sha256):
        assert part in card
    assert "999" in project.call("card", "999", exit_code=1).err
