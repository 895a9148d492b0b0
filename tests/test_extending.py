"""docs/extending.md, done: a package of its own adds a source and an architecture, and one line adds a metric.

One project runs with all three, through every stage.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import projects
import pytest

from touchline.core import params
from touchline.core.errors import ParamsError
from touchline.core.files import read_json, read_table
from touchline.models import scores
from touchline.models.scores import Answers, Metric

TOY = '''
"""Photos of one colour with noise, and a network of one layer."""

import cv2
import numpy as np

from touchline.core.licences import Licence
from touchline.core.params import Count, NetworkParams, Section
from touchline.models.architectures import Architecture
from touchline.models.training import network
from touchline.sources import Candidate, Planned, Source


class ToySection(Section):
    photos: Count


def drawn(number, label):
    random = np.random.default_rng([number, label])
    pixels = random.integers(0, 120, (80, 100, 3), np.uint8)
    pixels[..., label] += 120
    return cv2.imencode(".png", pixels)[1].tobytes()


def offers(paths, params):
    for number in range(params.ingest.toy.photos):
        for label, name in enumerate(params.classes):
            licence = "" if number == 1 else "the toys' own terms"
            yield Candidate(name, "toy", f"{name}/{number}", lambda n=number, l=label: drawn(n, l), licence=licence)


def plan(paths, params):
    return [Planned("toys", "the toy box", 0.0, "to draw", "CC0-1.0")]


TERMS = Licence("LicenseRef-Toys", "research", share=False)
SOURCE = Source("toy", offers, plan, params=ToySection, licence=TERMS, licensed=True)


class ToyParams(NetworkParams):
    width: Count


def build(params, side, classes):
    import keras
    from keras import layers

    photo = keras.Input((side, side, 3), dtype="uint8")
    x = layers.Conv2D(params.width, 3, activation="relu")(layers.Rescaling(1 / 255)(photo))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(photo, layers.Dense(classes, activation="softmax", dtype="float32")(x), name="toy")


ARCHITECTURE = Architecture(ToyParams, network(build), "A toy network on photos")
'''
ENTRY_POINTS = """[touchline.sources]
toy = toy_box:SOURCE
[touchline.architectures]
toy = toy_box:ARCHITECTURE
"""
MODEL = {
    "architecture": "toy", "input": "pixels", "width": 4, "dropout": 0.0, "learning_rate": 0.01, "batch_size": 16,
    "epochs": 2, "patience": 0, "seed": 1,
    "augmentation": {"rotation": 0, "zoom": 0.0, "shift": 0.0, "flip": True},
}  # fmt: skip


def share_of_first(answers: Answers) -> float:
    return float((answers.predicted == 0).mean())


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package as pip installs it, on the path: a module, and the metadata with its entry points."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_box.py").write_text(TOY)
    metadata = folder / "toy_box-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-box\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("toy_box", None)


@pytest.fixture(scope="module")
def project(box: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[projects.Project]:
    """A project that names them, after all of its stages."""
    made = projects.make(
        tmp_path_factory.mktemp("extended") / "the project",
        {
            "ingest.sources": ["toy"], "ingest.toy": {"photos": 40}, "ingest.remote": "private",
            "models": {"toy": MODEL}, "features.pooled": projects.GONE, "split.near_duplicate_bits": 0,
        },
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scores.METRICS, "share_of_first", Metric("first class", share_of_first))
        # The set is faulty: two photos have no licence.
        assert "licence" in made.call("ingest").err + made.call("validate", exit_code=1).err
        source = box / "toy_box.py"
        source.write_text(TOY.replace('"" if number == 1 else ', ""))
        sys.modules.pop("toy_box")
        for stage in (["ingest"], ["validate"], ["split"], ["features", "pixels"], ["train", "toy"], ["evaluate"]):
            made.call(*stage)
        made.call("register")
        yield made


def test_a_source_is_one_object(project: projects.Project) -> None:
    table = read_table(project.root / "data/photos.csv")
    assert table.groupby(["source", "class"]).size().to_dict() == {("toy", "rugby"): 40, ("toy", "soccer"): 40}
    assert project.json("reports/ingest.json")["sources"] == {"toy": {"photos": 80}}
    assert len(read_table(project.root / "data/validated.csv")) == 80
    page = (project.root / "reports/report.html").read_text()
    assert '<td class="text">toy</td>' in page
    # Its licence does not allow it.
    assert "rugby/3" not in page and "80 photos of toy may not be shown" in page


def test_what_a_source_would_fetch_is_shown(project: projects.Project) -> None:
    assert "the toy box" in project.call("ingest", "--dry-run").out


def test_a_section_of_a_source_is_checked(shipped: dict, box: Path) -> None:
    shipped["ingest"] |= {"sources": ["toy"], "remote": "private", "toy": {"photos": 0}}
    with pytest.raises(ParamsError, match=r"ingest\.toy\.photos is 0"):
        params.check(shipped)
    shipped["ingest"]["toy"] = {"photos": 3}
    known = params.check(shipped)
    assert params.check(known.model_dump(mode="json", by_alias=True, exclude_unset=True)) == known
    del shipped["ingest"]["toy"]
    with pytest.raises(ParamsError, match=r"ingest\.toy is missing"):
        params.check(shipped)
    shipped["ingest"] |= {"toy": {"photos": 3}, "remote": ""}
    with pytest.raises(ParamsError, match="LicenseRef-Toys"):
        params.check(shipped)
    shipped["rights"]["push"] = ["LicenseRef-Toys"]
    params.check(shipped)


def test_an_architecture_is_one_object(project: projects.Project) -> None:
    record = project.json("models/toy.json")
    assert len(read_table(project.root / "reports/history/toy.csv")) == 2
    assert record["params"]["width"] == 4 and record["description"].startswith("A toy network on photos of 32 x 32")
    assert "A toy network" in (project.root / "reports/report.html").read_text()


def test_params_of_an_architecture_are_checked(shipped: dict, box: Path) -> None:
    shipped["models"] = {"toy": MODEL}
    known = params.check(shipped)
    assert params.check(known.model_dump(mode="json", by_alias=True, exclude_unset=True)) == known
    shipped["models"] = {"toy": MODEL | {"width": 0}}
    with pytest.raises(ParamsError, match=r"models\.toy\.width is 0"):
        params.check(shipped)
    shipped["models"] = {"toy": MODEL | {"input": "pooled"}}
    with pytest.raises(ParamsError, match=r"models\.toy\.input is 'pooled'"):
        params.check(shipped)


def test_a_package_that_cannot_be_loaded_is_one_line(
    shipped: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[touchline.sources]\nbroken = broken_box:SOURCE\n")
    monkeypatch.syspath_prepend(tmp_path)
    shipped["ingest"]["sources"] = ["broken"]
    with pytest.raises(ParamsError, match="broken_box") as caught:
        params.check(shipped)
    assert "\n" not in str(caught.value)


def test_a_metric_is_one_function_in_one_table(project: projects.Project) -> None:
    found = read_json(project.root / "reports/metrics.json")["models"]["toy"]["share_of_first"]
    [run] = projects.runs(project, f"attributes.run_id = '{project.json('models/toy.json')['run_id']}'")
    assert run.data.metrics["test/share_of_first"] == pytest.approx(found)
    [version] = projects.versions(project)
    summary = project.call("summary").out
    for text in ((project.root / "reports/report.html").read_text(), version.description, summary):
        assert "first class" in " ".join(text.split()) and f"{found:.3f}" in text
