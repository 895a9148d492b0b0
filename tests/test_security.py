"""Data is never a program, files stay where they belong, servers speak to this machine alone, secrets stay secret.

docs/threat-model.md names each of these tests beside what it guards.
"""

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import projects
import pytest
from conftest import SHIPPED, shipped_values
from PIL import Image
from projects import SECRETS

from touchline.commands import predict
from touchline.core import files, params, ports
from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths
from touchline.core.tensorflow import import_tensorflow
from touchline.models import classifier, inference
from touchline.stages.ingest import _attribution
from touchline.tracking import Store, open_store

REPOSITORY = projects.REPOSITORY
# Two names that a shell would run, and one of them a page.
HOSTILE = ["; touch canary #", "$(touch canary) <b>"]
SIDE, CLASSES = 32, ["rugby", "soccer"]


def _model(program: Path | None = None) -> Any:
    """A model of photos; with `program` one that makes that file where its code is run."""
    import_tensorflow()
    import keras

    photo = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    values = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(photo))
    if program:
        source = str(program)
        values = keras.layers.Lambda(lambda x: (open(source, "w").close(), x)[1], output_shape=lambda shape: shape)(
            values
        )
    return keras.Model(photo, keras.layers.Dense(2, activation="softmax")(values))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come to be."""
    canary = tmp_path / "canary"
    yield canary
    assert not canary.exists()


@pytest.fixture
def project(tmp_path: Path) -> Paths:
    root = tmp_path / "a project"
    (root / "models").mkdir(parents=True)
    (root / "params.yaml").write_bytes(SHIPPED.read_bytes())
    return Paths(root, root)


def _logged(project: Paths, model: Any) -> tuple[Store, int, Path]:
    """The model as version 1 of a registry, and where the store has its file."""
    path = project.models / "cnn.keras"
    model.save(path)
    store = open_store(project, "rugby-soccer")
    run_id = store.start("a run", {}, {}, {"name": "photos", "digest": "0", "source": "-", "counts": {}})
    store.finish(run_id, model_path=path, image_size=SIDE, classes=CLASSES, training_photos=[], metrics={})
    version = store.register("rugby-soccer", run_id, {}, "")
    (file,) = (project.mlflow / "artifacts").rglob("model.keras")
    return store, version, file


def test_a_model_that_brings_a_program_is_refused_from_a_file(project: Paths, canary: Path) -> None:
    path = project.models / "cnn.keras"
    _model(canary).save(path)
    canary.unlink(missing_ok=True)
    files.write_json(path.with_suffix(".json"), {"classes": CLASSES})
    values = params.load(project.workspace / "params.yaml")

    for load in (lambda: inference.load_model(path), lambda: classifier.resolve(project, values, "cnn")):
        with pytest.raises(TouchlineError, match=r"\.keras") as refused:
            load()
        assert len(str(refused.value).splitlines()) == 1


def test_a_model_that_brings_a_program_is_refused_from_the_store(project: Paths, canary: Path) -> None:
    store, version, _ = _logged(project, _model(canary))
    canary.unlink(missing_ok=True)
    values = params.load(project.workspace / "params.yaml")

    for load in (lambda: classifier.from_stored(store.model(store.versions("rugby-soccer")[0]), "", "auto").model,
                 lambda: classifier.resolve(project, values, str(version))):  # fmt: skip
        with pytest.raises(TouchlineError, match=r"\.keras") as refused:
            load()
        assert len(str(refused.value).splitlines()) == 1


def test_a_model_that_is_not_the_one_described_is_refused(project: Paths) -> None:
    path = project.models / "cnn.keras"
    _model().save(path)
    record = {"classes": CLASSES, "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    files.write_json(path.with_suffix(".json"), record)
    values = params.load(project.workspace / "params.yaml")
    assert classifier.resolve(project, values, "cnn").classes == CLASSES
    _model().save(path)

    for load in (lambda: inference.load_model(path), lambda: classifier.resolve(project, values, "cnn")):
        with pytest.raises(TouchlineError, match=r"\.keras"):
            load()


def test_a_model_of_the_registry_is_the_one_that_was_registered(project: Paths) -> None:
    store, _, file = _logged(project, _model())
    model = classifier.from_stored(store.model(store.versions("rugby-soccer")[0]), "", "auto").model
    assert model.input_shape == (None, SIDE, SIDE, 3)
    _model().save(file)

    version = store.versions("rugby-soccer")[0]
    for source in (version, version.run_id):
        for engine in ("openvino", "tensorflow"):
            with pytest.raises(TouchlineError, match=r"\.keras"):
                classifier.from_stored(store.model(source), "", engine)


def test_a_version_that_another_tool_registered_without_a_run_is_refused(project: Paths, tmp_path: Path) -> None:
    store, version, file = _logged(project, _model())
    copy = shutil.copytree(file.parents[1], tmp_path / "elsewhere")
    other = store._client.create_model_version("rugby-soccer", copy.as_uri())

    assert store.versions("rugby-soccer")[-1].number == int(other.version) > version
    values = params.load(project.workspace / "params.yaml")
    for load in (lambda: store.model(store.versions("rugby-soccer")[-1]),
                 lambda: classifier.resolve(project, values, str(other.version))):  # fmt: skip
        with pytest.raises(TouchlineError, match="Touchline did not log it"):
            load()


@pytest.mark.parametrize(
    "text", ["classes: !!python/object/apply:os.system ['touch {}']", "classes: !!python/name:os.system ''"]
)
def test_params_make_no_objects(tmp_path: Path, canary: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text.format(canary))

    with pytest.raises(params.ParamsError, match=r"params\.yaml"):
        params.load(path)


@pytest.mark.parametrize("section", ["features", "models"])
@pytest.mark.parametrize("name", ["x; touch canary", "$(touch canary)", "../x", "`x`", "-x", "x\n", "X", ""])
def test_names_that_become_commands_are_plain(section: str, name: str) -> None:
    values = shipped_values()
    values[section][name] = next(iter(values[section].values()))

    with pytest.raises(params.ParamsError, match=section) as refused:
        params.check(values)
    assert len(str(refused.value).splitlines()) == 1


FORMULAS = [
    "=1+1", "-1+1", "@SUM(1)", "\t=x", "\r=x", " =1", '"=1"', "\uff1d1+1",
    "Ann;=1+1", "Ann\t@x", "Ann\n=1+1", "Ann,+1+1", "Ann|=1", 'Ann; "=1', "'=1;=2",
]  # fmt: skip


def run_by_a_spreadsheet(content: str) -> list[str]:
    """Cells of a CSV that begin like a formula, whichever separator a spreadsheet splits it at."""
    cells = [
        cell.strip('"\t\r\n ')
        for separator in ",;\t|"
        for line in (content, *re.split(r"[\r\n]", content))
        for row in csv.reader(io.StringIO(line, newline=""), delimiter=separator)
        for cell in row
    ]
    # A negative number is one.
    return [cell for cell in cells if re.match(r"[=@\uff1d]|[+\-](?!\d+(\.\d+)?(e-?\d+)?$)", cell)]


@pytest.mark.parametrize("text", FORMULAS)
def test_tables_for_people_hold_no_formulas(tmp_path: Path, text: str) -> None:
    import pandas as pd

    assert run_by_a_spreadsheet(f"a,{text}")
    row = dict.fromkeys(
        ("path", "class", "source", "licence", "author", "origin", "title", "author_page", "landing_page", "retrieved"),
        text,
    )
    files.write_table(tmp_path / "ATTRIBUTION.csv", _attribution(pd.DataFrame([row])))
    assert run_by_a_spreadsheet((tmp_path / "ATTRIBUTION.csv").read_text()) == []

    out = io.StringIO()
    answer = classifier.Answer(text, text, 0.9, {"a": 0.9, "b": 0.1})
    predict._write_csv(out, ["a", text], iter([(Path(text), answer)]))
    assert run_by_a_spreadsheet(out.getvalue()) == []


def test_no_table_of_a_run_holds_formulas(hostile: projects.Project) -> None:
    tables = [*hostile.root.glob("data/*.csv"), *hostile.root.rglob("reports/**/*.csv")]
    assert {"photos.csv", "ATTRIBUTION.csv", "predictions.csv"} <= {path.name for path in tables}
    assert any("Ann;'=1+1" in path.read_text() for path in tables)
    assert {path.name: found for path in tables if (found := run_by_a_spreadsheet(path.read_text()))} == {}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> projects.Project:
    """A project of classes and photos whose names a shell would run, through every stage.

    DVC's shell runs the stage that reads the names from a folder; the others run here, where TensorFlow and MLflow are
    imported already.
    """
    project = projects.make(
        tmp_path_factory.mktemp("security") / "project",
        {"classes": HOSTILE, "ingest.sources": ["folder"], "ingest.folder": "data/incoming", "split.by_group": False,
         "features.pooled": projects.GONE, "models.transfer": projects.GONE, "models.cnn.epochs": 1},
        git=False,
    )  # fmt: skip
    project.run("dvc", "config", "--local", "core.no_scm", "true")
    random, rows = np.random.default_rng(3), []
    for label in HOSTILE:
        for number in range(20):
            file = project.root / "data/incoming" / label / f"$(touch canary)`touch canary`;touch canary #{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (80, 90, 3), np.uint8)).save(file)
            rows.append((f"{label}/{file.name}", "Ann;=1+1", "=2+2"))
    with (project.root / "data/incoming/manifest.csv").open("w", newline="") as manifest:
        csv.writer(manifest).writerows([("file", "author", "licence"), *rows])
    project.dvc("repro", "ingest")
    for stage in projects.STAGES:
        if not stage.endswith(("ingest", "@pooled", "@transfer")):
            project.call(*stage.split("@"))
    return project


def test_hostile_names_go_through_the_whole_pipeline_as_names(hostile: projects.Project) -> None:
    for table in ("data/split.csv", "reports/predictions.csv"):
        with (hostile.root / table).open() as rows:
            assert {row["class"] for row in csv.DictReader(rows)} == set(HOSTILE)
    assert hostile.json("models/cnn.json")["classes"] == HOSTILE
    photo = next((hostile.root / "data/incoming" / HOSTILE[1]).iterdir())
    answer = json.loads(hostile.call("predict", str(photo), "--model", "cnn", "--format", "json").out)
    assert list(answer["probabilities"]) == HOSTILE
    for name in ("validation", "report"):
        page = (hostile.root / f"reports/{name}.html").read_text()
        assert "touch canary" in page and "<b>" not in page
    assert not list(hostile.root.rglob("canary")) and not Path("canary").exists()


def test_a_hostile_model_name_reaches_no_shell(tmp_path: Path) -> None:
    project = projects.make(tmp_path / "project", git=False)
    project.run("dvc", "config", "--local", "core.no_scm", "true")
    content = (project.root / "params.yaml").read_text()
    (project.root / "params.yaml").write_text(content.replace("\n  transfer:", "\n  x; touch canary:", 1))

    said = project.dvc("repro", exit_code=None)

    assert not (project.root / "canary").exists(), said
    assert "x; touch canary" in said and "Traceback" not in said


def test_secrets_are_in_no_file_and_no_output(
    tmp_path_factory: pytest.TempPathFactory, hostile: projects.Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in logs nor in the MLflow store, dvc.lock, models, or the report."""
    built = projects.built(tmp_path_factory)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    before = (hostile.root / "params.yaml").read_text()
    hostile.change({"ingest.sources": ["openimages"],
                    "ingest.openimages.url": "http://someone:s3cret-url@127.0.0.1:9/openimages",
                    "ingest.download.tries": 1})  # fmt: skip
    refused = hostile.call("ingest", exit_code=2)
    (hostile.root / "params.yaml").write_text(before)

    assert "ingest.openimages.url" in refused.err and "http://***@127.0.0.1:9/openimages" in refused.err
    secrets = [value for value in SECRETS.values() if value.startswith("s3cret")] + ["s3cret-url"]
    assert [secret for secret in secrets if secret in built.output + refused.out + refused.err] == []
    looked_at = [path for root in (built.project.root, hostile.root) for path in root.rglob("*") if path.is_file()]
    for name in ("mlflow/mlflow.db", "dvc.lock", "reports/report.html", "models/cnn.json"):
        assert built.project.root / name in looked_at
    for path in looked_at:
        content = path.read_bytes()
        assert [secret for secret in secrets if secret.encode() in content] == [], path


def test_servers_listen_on_loopback_unless_told() -> None:
    import inspect

    from flows import board
    from touchline import cli

    for command in (cli.mlflow, cli.serve, cli.try_models, board.main):
        assert inspect.signature(command).parameters["host"].default == "127.0.0.1"


@pytest.mark.parametrize(
    "host, port, trusted",
    [
        ("127.0.0.1", 5000, ["127.0.0.1:5000", "localhost:5000", "[::1]:5000"]),
        ("localhost", 80, ["localhost", "127.0.0.1", "[::1]"]),
        ("127.0.0.2", 1, ["127.0.0.2:1", "127.0.0.1:1", "localhost:1", "[::1]:1"]),
        ("::1", 1, ["[::1]:1", "127.0.0.1:1", "localhost:1"]),
        ("0.0.0.0", 5000, []),
        ("192.0.2.1", 5000, []),
    ],
)
def test_a_server_on_loopback_knows_its_names(host: str, port: int, trusted: list[str]) -> None:
    assert ports.trusted_hosts(host, port) == trusted
