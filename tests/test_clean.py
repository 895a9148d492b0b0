"""`touchline clean` on a project that was worked in for long: what goes, what never does, and what happens half-way."""

import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from projects import REGISTERED, UP_TO_DATE, Project, built, copy, versions
from ruamel.yaml import YAML

from touchline.commands import clean
from touchline.core.files import write_text
from touchline.core.paths import Paths
from touchline.tracking import registry, runs

DATASET = {"name": "split", "digest": "0" * 32, "source": "data/split.csv", "counts": {}}
LONG_AGO = datetime.now() - timedelta(days=100)


def sql(database: Path, statement: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(database)) as connection:
        found = connection.execute(statement, values).fetchall()
        connection.commit()
        return found


def store_of(project: Project):
    return runs.open_store(Paths(project.root, project.root), REGISTERED)


def logged(project: Project, name: str, *, old: bool = True, model: bool = False, **more: str) -> str:
    """A run with an artifact, and with a model's files if so told; ended long ago, or now."""
    store = store_of(project)
    parent = more.pop("parent", None)
    run_id = runs.start(store, name, {"touchline.git_dirty": "false", **more}, {}, DATASET, parent=parent)
    figure = project.root.parent / "figures of a run/figure.png"
    figure.parent.mkdir(exist_ok=True)
    figure.write_bytes(b"a figure" * 1000)
    runs.log_evaluation(store, run_id, {}, figure.parent)
    if model:
        from mlflow.entities import LoggedModelOutput

        client = store.client
        made = client.create_logged_model(store.experiment_id, "model", run_id)
        client.log_model_artifact(made.model_id, str(figure))
        client.finalize_logged_model(made.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step=0)])
        runs.set_tags(store, run_id, {"touchline.model_sha256": hashlib.sha256(name.encode()).hexdigest()})
    runs.end(store, run_id, {"objective": 1.0})
    if old:
        age(project, run_id)
    return run_id


def age(project: Project, run_id: str) -> None:
    milliseconds = int(LONG_AGO.timestamp() * 1000)
    sql(project.root / "mlflow/mlflow.db", "UPDATE runs SET end_time = ? WHERE run_uuid = ?", milliseconds, run_id)


def run_names(project: Project) -> set[str]:
    return {name for (name,) in sql(project.root / "mlflow/mlflow.db", "SELECT name FROM runs")}


def mlflow_folders(project: Project) -> set[str]:
    """Ids of runs and models that have a folder."""
    found = (project.root / "mlflow/artifacts").rglob("artifacts")
    return {path.parent.name for path in found if path.is_dir()}


def cached(project: Project) -> set[str]:
    return {path.parent.name + path.name for path in (project.root / ".dvc/cache/files/md5").rglob("??/*")}


def output_of(project: Project, file: str) -> str:
    return hashlib.md5((project.root / file).read_bytes(), usedforsecurity=False).hexdigest()


def tree(root: Path) -> dict[str, str]:
    """What every file holds, by its path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
        # Written by every program that imports, and by every command of DVC.
        if "__pycache__" not in path.parts and path != root / ".dvc/tmp/lock"
    }


class Littered:
    """A project with all that a long life leaves behind; the names say what shall become of it."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self._dvc()
        self._mlflow()
        self._files()

    def _dvc(self) -> None:
        """Splits by other seeds: one committed on a branch, one of an experiment, one that is nobody's."""
        project = self.project
        project.dvc("exp", "run", "--queue", "--name", "kept", "--set-param", "split.seed=2", "split")
        project.dvc("exp", "run", "--run-all")
        (tip,) = re.findall(r"^(\w+) refs/exps/../\w{38}/kept$", project.git("show-ref"), flags=re.MULTILINE)
        lock = YAML(typ="safe").load(project.git("show", f"{tip}:dvc.lock"))
        of_experiment = lock["stages"]["split"]["outs"][0]["md5"]
        project.git("checkout", "--quiet", "-b", "other")
        project.change({"split.seed": 3})
        project.dvc("repro", "split")
        project.commit("another seed")
        of_branch = output_of(project, "data/split.csv")
        project.git("checkout", "--quiet", "main")
        project.change({"split.seed": 4})
        project.dvc("repro", "split")
        of_split = ("data/split.csv", "data/croissant.json", "reports/split.json")
        self.of_nobody = [output_of(project, file) for file in of_split]
        project.git("checkout", "--quiet", ".")
        project.dvc("checkout")
        seeds = {of_experiment, of_branch, self.of_nobody[0], output_of(project, "data/split.csv")}
        assert len(seeds) == 4 and seeds <= cached(project)

    def _mlflow(self) -> None:
        project = self.project
        for (run_id,) in sql(project.root / "mlflow/mlflow.db", "SELECT run_uuid FROM runs"):
            age(project, run_id)
        self.of_models = run_names(project)
        store = store_of(project)
        replaced = logged(project, "stays: the version a champion replaced", model=True)
        registry.promote(store, REGISTERED, registry.register(store, REGISTERED, replaced, {}, "once champion"))
        registry.promote(store, REGISTERED, 1)
        bare = logged(project, "stays: a version with no alias", model=True)
        registry.register(store, REGISTERED, bare, {}, "never champion")
        logged(project, "stays: young", old=False, model=True)
        logged(project, "stays: of an experiment", **{"touchline.dvc_experiment": "kept"})
        parent = logged(project, "stays: parent of a young one")
        logged(project, "stays: young child", old=False, parent=parent)
        logged(project, "goes: old", model=True)
        parent = logged(project, "goes: old parent")
        logged(project, "goes: old child", parent=parent)
        logged(project, "goes: of an experiment that was removed", **{"touchline.dvc_experiment": "gone"})
        store.client.delete_run(logged(project, "goes: deleted by a person", old=False, model=True))
        foreign = store.client.create_run(store.experiment_id, run_name="stays: of another tool")
        store.client.set_terminated(foreign.info.run_id, "FINISHED")
        age(project, foreign.info.run_id)

    def _files(self) -> None:
        root = self.project.root
        gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        self.going = [
            root / f"data/photos/rugby/.partial-{gone.stdout.strip()}-0123456789ab",
            root / f"reports/.partial-{gone.stdout.strip()}-0123456789ab.json",
            root / "data/features/unnamed/settings.json",
            root / "data/features/unnamed/0123456789abcdef.npy",
            root / ".dvc/tmp/exps/standalone/tmpkilled/data/split.csv",
            root / "data/served/2020-01-01-1-00000000.sqlite",
            root / "data/served/2020-01-01-1-00000000.sqlite-wal",
            root / "exports/old.tflite",
            Path(os.environ["TOUCHLINE_CACHE"], "old.openvino"),
        ]
        self.staying = [
            root / f"models/.partial-{os.getpid()}-0123456789ab.keras",
            root / "data/imagenet/n00470966.tar",
            root / "data/openimages/labels.csv",
            root / "data/fetched.jsonl",
            root / "data/incoming/rugby/mine.jpg",
            root / "exports/young.tflite",
            Path(os.environ["TOUCHLINE_CACHE"], "young.openvino"),
            root / "exports/notes of mine.txt",
        ]
        for path in [*self.going, *self.staying]:
            write_text(path, "content")
        for old in (self.going[-1], self.going[-2], root / "exports/notes of mine.txt"):
            os.utime(old, (LONG_AGO.timestamp(), LONG_AGO.timestamp()))

    def check_clean(self) -> None:
        """All that was to go is gone, and nothing else."""
        project, root = self.project, self.project.root
        assert cached(project) == self.cached_before - set(self.of_nobody)
        assert run_names(project) == {name for name in self.names_before if not name.startswith("goes")}
        assert self.of_models <= run_names(project)
        ids = {row[0] for row in sql(root / "mlflow/mlflow.db", "SELECT run_uuid FROM runs")}
        models = {row[0] for row in sql(root / "mlflow/mlflow.db", "SELECT model_id FROM logged_models")}
        assert len(models) == 5  # two of models/, two of versions, the young one's
        assert mlflow_folders(project) - models <= ids and models <= mlflow_folders(project)
        assert not [path for path in self.going if path.exists()]
        assert not [path for path in self.staying if not path.exists()]
        assert not list((root / "data/features").glob("unnamed"))
        # Photos, tables and decisions are what they were.
        data = {path: digest for path, digest in tree(root / "data").items() if "unnamed" not in path}
        assert data == {path: digest for path, digest in self.data_before.items() if path in data}
        lost = set(self.data_before) - set(data)
        assert all("unnamed" in path or ".partial-" in path or "served/2020" in path for path in lost)
        # The experiment is there, and so is all it needs.
        assert project.dvc("exp", "list", "--name-only").split() == ["kept"]
        for revision in ("other", "main"):
            project.git("checkout", "--quiet", revision)
            # It fails where the cache lacks an object.
            shutil.rmtree(root / "reports")
            project.dvc("checkout", "--force")


@pytest.fixture(scope="module")
def littered_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Littered, Path]:
    folder = tmp_path_factory.mktemp("littered; $(id)")
    littered = Littered(copy(built(tmp_path_factory).project, folder / "the project"))
    littered.cached_before = cached(littered.project)
    littered.names_before = run_names(littered.project)
    littered.data_before = tree(littered.project.root / "data")
    shutil.copytree(littered.project.root, folder / "kept", symlinks=True)
    return littered, folder / "kept"


@pytest.fixture
def littered(littered_once: tuple[Littered, Path]) -> Littered:
    """The same for each test, and in one place: MLflow knows its artifacts by absolute paths."""
    littered, kept = littered_once
    root = littered.project.root
    for path in [*(path for path in root.iterdir() if path.name != "mlflow"), root / "mlflow/artifacts"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Written over, not replaced: MLflow in this process keeps its database open.
    shutil.copytree(kept, root, symlinks=True, dirs_exist_ok=True)
    return littered


def lines(output: str) -> dict[str, tuple[str, str]]:
    """How many and whether they go, by what; out of a wide table."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {what: (count, verdict) for what, count, _, verdict, _ in cells}


def test_a_dry_run_says_what_would_go_and_changes_nothing(littered: Littered) -> None:
    project = littered.project
    before = tree(project.root)
    said = project.run("touchline", "clean", "--dry-run", COLUMNS="200")
    assert tree(project.root) == before
    assert lines(said) == {
        "half-written files": ("2", "would go"),
        "folders of features": ("1", "would go"),
        "exported models": ("1", "would go"),
        "records of answers": ("1", "would go"),
        "copies of the project": ("1", "would go"),
        "objects in DVC's cache": ("3", "would go"),
        "runs in MLflow": ("5", "would go"),
        "network files in your cache": ("1", "would go"),
    }


def test_what_nothing_needs_goes_and_all_else_still_works(littered: Littered) -> None:
    project = littered.project
    said = project.run("touchline", "clean", "--yes", COLUMNS="200")
    assert all(verdict == "goes" for _, verdict in lines(said).values())
    littered.check_clean()
    project.touchline("rollback")
    assert [version.number for version in versions(project) if "champion" in version.aliases] == [2]
    again = project.run("touchline", "clean", "--yes", COLUMNS="200")
    assert again.count("\n") == 1
    # The store needs nothing put back, and the stages have nothing to do.
    assert project.touchline("registry", "sync") == ""


@pytest.mark.slow
def test_killed_twice_in_its_middle_it_is_made_good_by_the_next_run(littered: Littered) -> None:
    project = littered.project
    unneeded = project.root / f".dvc/cache/files/md5/{littered.of_nobody[0][:2]}/{littered.of_nobody[0][2:]}"
    deleted = "SELECT 1 FROM runs WHERE lifecycle_stage = 'deleted' AND name = 'goes: old'"
    for is_half_way in (
        lambda: not unneeded.exists(),
        lambda: sql(project.root / "mlflow/mlflow.db", deleted) or "goes: old" not in run_names(project),
    ):
        with psutil.Popen(
            ["touchline", "clean", "--yes"],
            cwd=project.root, env=project.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            wait_until(is_half_way)
            process.kill()
        assert process.returncode == -9
    # What was begun by the killed one may still be at its end.
    wait_until(lambda: "is running" not in project.touchline("clean", "--yes", exit_code=None), 120)
    littered.check_clean()


def wait_until(is_so: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_export_wrote_is_known_in_every_format(paths: Paths) -> None:
    ours = ["a.onnx", "a.tflite", "openvino/touchline.json", "saved/assets.extra/touchline.json"]
    for name in (*ours, "mine.txt", "mine/touchline.txt"):
        (paths.exports / name).parent.mkdir(parents=True, exist_ok=True)
        (paths.exports / name).touch()
    assert {path.name for path in clean.exported(paths)} == {name.partition("/")[0] for name in ours}


@pytest.mark.parametrize(
    "lock,name",
    [(".dvc/tmp/touchline/train@cnn.lock", "stage train@cnn"),
     pytest.param(".prefect/board.lock", "the board", marks=pytest.mark.slow),
     pytest.param(".prefect/flow.lock", "a flow", marks=pytest.mark.slow)],
)  # fmt: skip
def test_it_is_refused_while_a_stage_a_flow_or_a_board_is_at_work(littered: Littered, lock: str, name: str) -> None:
    before = tree(littered.project.root)
    with FileLock(littered.project.root / lock):
        said = littered.project.touchline("clean", "--yes", exit_code=1)
    assert said.startswith("touchline: ") and name in said and said.count("\n") == 1
    after = tree(littered.project.root)
    assert {path for path, digest in before.items() if after.get(path) != digest} == set()


@pytest.mark.slow
@pytest.mark.parametrize("words", ["dvc push", "touchline tune cnn"])
def test_it_is_refused_while_dvc_or_a_search_is_running(littered: Littered, tmp_path: Path, words: str) -> None:
    name, *arguments = words.split()
    (tmp_path / name).write_text("import time; time.sleep(600)")
    place = littered.project.root / "data"
    with subprocess.Popen([sys.executable, tmp_path / name, *arguments], cwd=place) as process:
        try:
            said = littered.project.touchline("clean", "--yes", exit_code=1)
        finally:
            process.kill()
    assert words in said and str(process.pid) in said and said.count("\n") == 1


def test_it_asks_and_where_nobody_can_answer_it_does_nothing(littered: Littered) -> None:
    before = tree(littered.project.root)
    said = littered.project.touchline("clean", exit_code=2)
    assert "--dry-run" in said and "--yes" in said and said.count("\n") == 1
    assert tree(littered.project.root) == before


@pytest.mark.slow
def test_a_copy_of_the_project_does_not_delete_the_artifacts_of_the_first(littered: Littered, tmp_path: Path) -> None:
    before = tree(littered.project.root / "mlflow")
    copied = Project(tmp_path / "a copy")
    shutil.copytree(littered.project.root, copied.root, symlinks=True)
    said = copied.run("touchline", "clean", "--yes", COLUMNS="300")
    assert lines(said)["runs in MLflow"] == ("5", "goes")
    assert tree(littered.project.root / "mlflow") == before
    assert run_names(copied) == {name for name in littered.names_before if not name.startswith("goes")}


@pytest.mark.slow
def test_a_store_that_is_a_server_is_left_to_whoever_keeps_it(littered: Littered) -> None:
    address = "http://me:secret@127.0.0.1:9/"
    said = littered.project.run("touchline", "clean", "--dry-run", MLFLOW_TRACKING_URI=address, COLUMNS="300")
    assert lines(said)["runs in MLflow"] == ("1", "stays")
    assert "`mlflow gc`" in said and "secret" not in said


@pytest.mark.slow
def test_a_version_whose_run_was_deleted_holds_all_of_mlflow_back(littered: Littered) -> None:
    project = littered.project
    database = project.root / "mlflow/mlflow.db"
    ((run_id,),) = sql(database, "SELECT run_uuid FROM runs WHERE name = 'stays: the version a champion replaced'")
    store_of(project).client.delete_run(run_id)
    before = mlflow_folders(project)
    said = project.run("touchline", "clean", "--yes", COLUMNS="300")
    assert REGISTERED in said and run_id in said
    assert mlflow_folders(project) == before
    assert not (project.root / "data/features/unnamed").exists()


@pytest.mark.slow
def test_a_commit_that_dvc_cannot_read_holds_the_cache_back(littered: Littered) -> None:
    project = littered.project
    (project.root / "dvc.yaml").write_text("stages: [")
    project.commit("a broken dvc.yaml")
    project.git("checkout", "--quiet", "HEAD~", "--", "dvc.yaml")
    said = project.touchline("clean", "--yes", exit_code=1)
    assert said.startswith("touchline: ") and said.count("\n") == 1
    assert cached(project) == littered.cached_before


@pytest.mark.slow
def test_an_archive_without_git_is_cleaned_too(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    project = copy(built(tmp_path_factory).project, tmp_path / "an archive")
    shutil.rmtree(project.root / ".git")
    project.dvc("config", "--local", "core.no_scm", "true")
    stray = project.root / ".dvc/cache/files/md5/aa/bbccddeeff00112233445566778899"
    write_text(stray, "nobody's")
    said = project.run("touchline", "clean", "--yes", COLUMNS="200")
    assert lines(said)["objects in DVC's cache"] == ("1", "goes") and not stray.exists()
    shutil.rmtree(project.root / "reports")
    project.dvc("checkout")
    assert UP_TO_DATE in project.dvc("status")


def test_the_server_of_the_board_deletes_old_flow_runs_by_itself(tmp_path: Path) -> None:
    program = (
        "import flows; from prefect.settings import get_current_settings;"
        "print(*get_current_settings().server.services.db_vacuum.enabled_vacuum_types)"
    )
    unset = {name: value for name, value in os.environ.items() if "VACUUM" not in name}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=unset, capture_output=True, text=True, check=True)
    assert {"flow_runs", "orphans", "events"} == set(done.stdout.split())
