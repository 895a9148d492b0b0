"""A whole little project in a temporary folder: this repository's own pipeline on few and small photos, driven by DVC.

DVC and git run as programs, as a person runs them; settings of the machine (identity, remotes, stores) stay out.
"""

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir, closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from touchline import cli
from touchline.core.files import read_table
from touchline.core.paths import Paths
from touchline.tracking import registry
from touchline.tracking.registry import Version
from touchline.tracking.runs import open_store

if TYPE_CHECKING:
    from mlflow.entities import Run

REPOSITORY = Path(__file__).resolve().parent.parent
_COPIED = (
    "dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", ".dvc/plots",
    "src/touchline", "flows", "prefect.yaml", "data/README.md", "data/decisions.csv", "data/incoming",
    "data/feedback/README.md", "mlflow/README.md",
)  # fmt: skip

REGISTERED = "rugby-soccer"
STAGES = (
    "ingest", "validate", "split", "features@pixels", "features@pooled", "train@cnn", "train@transfer", "evaluate",
    "register",
)  # fmt: skip
UP_TO_DATE = "Data and pipelines are up to date"
GONE = object()

# Enough photos for each class to have a test photo, few enough for a stage to cost little but its imports.
SMALL = {
    "ingest.sample.per_class": 60,
    "validate.min_per_class": 8,
    "validate.max_rejected_share": 0.5,
    "features.pixels.image_size": 32,
    "features.pooled.image_size": 128,
    "features.pooled.backbone": "efficientnet_lite0",
    "models.cnn.filters": [8, 16],
    "models.cnn.epochs": 2,
    "models.transfer.strengths": [0.1, 1.0],
    "models.transfer.folds": 3,
    "evaluate.gallery": 2,
    "register.min_accuracy": 0.0,
    "register.min_shared_photos": 4,
    "register.min_slice_accuracy": None,
    "register.max_unknown_share": None,
    "register.max_slowdown": None,
}

# In the environment of the run that all tests share: none of them may come to light (test_security.py).
SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": "s3cret-mlflow",
    "AWS_ACCESS_KEY_ID": "s3cret-aws-id",
    "AWS_SECRET_ACCESS_KEY": "s3cret-aws-key",
    "KAGGLE_KEY": "s3cret-kaggle",
    "HF_TOKEN": "s3cret-hub",
}


@dataclass(frozen=True)
class Said:
    """What a command wrote to stdout and to stderr."""

    out: str
    err: str


@dataclass(frozen=True)
class Project:
    """A project of one's own.

    Attributes:
        root: its folder; what a test puts beside the project (a remote, a folder of photos) lies in the same parent.
    """

    root: Path

    def dvc(self, *arguments: str, exit_code: int | None = 0, **environment: str) -> str:
        """Run `dvc`; its output and errors in one text, as a terminal shows them.

        Args:
            exit_code: the one that is expected; None takes any.
        """
        return self.run("dvc", *arguments, exit_code=exit_code, **environment)

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments)

    def touchline(self, *arguments: str, exit_code: int | None = 0) -> str:
        return self.run("touchline", *arguments, exit_code=exit_code)

    def run(self, *command: str, exit_code: int | None = 0, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert exit_code in (None, done.returncode), f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def call(self, *arguments: str, exit_code: int = 0) -> Said:
        """Run `touchline` in this process: where it imports TensorFlow or MLflow, a new one would pay that first."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with (
            chdir(self.root), patch.object(sys, "argv", ["touchline", *arguments]),
            redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended,
        ):  # fmt: skip
            cli.main()
        said = Said(*(stream.buffer.getvalue().decode() for stream in (out, err)))
        assert (ended.value.code or 0) == exit_code, f"touchline {' '.join(arguments)}: {ended.value.code}\n{said}"
        return said

    def environment(self) -> dict[str, str]:
        """This process's environment, with the project's own code first and nobody's settings in it."""
        # Where Python may keep no compiled modules, each stage would compile TensorFlow's and MLflow's anew.
        others = ("DVC_", "MLFLOW_", "GIT_", "PREFECT_", "TOUCHLINE_", "DASK_", "PYTHONDONTWRITEBYTECODE")
        person = {
            f"GIT_{role}_{key}": "test@example.com" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")
        }
        beside = self.root.parent
        return {key: value for key, value in os.environ.items() if not key.startswith(others)} | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(self.root / "src"),
            "PYTHONUTF8": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(beside / "dvc site cache"),
            "DVC_GLOBAL_CONFIG_DIR": str(beside / "dvc config"),
            "DVC_SYSTEM_CONFIG_DIR": str(beside / "dvc config"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TOUCHLINE_CACHE": os.environ["TOUCHLINE_CACHE"],
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            **person,
        }

    def change(self, changes: Mapping[str, Any]) -> None:
        """Write values into params.yaml by dotted key; the value GONE takes the key out."""
        file = self.root / "params.yaml"
        yaml = YAML()
        content = yaml.load(file.read_text())
        for key, value in changes.items():
            *sections, last = key.split(".")
            section = reduce(getitem, sections, content)
            if value is GONE:
                del section[last]
            else:
                section[last] = value
        with file.open("w") as out:
            yaml.dump(content, out)

    def json(self, name: str) -> Any:
        return json.loads((self.root / name).read_text())

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)


def make(root: Path, changes: Mapping[str, Any] | None = None, *, git: bool = True) -> Project:
    """A new project in `root`, with the params of SMALL and `changes`; without `git` it is an unpacked archive."""
    for name in _COPIED:
        source, target = REPOSITORY / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copyfile(source, target)
    project = Project(root)
    project.change(SMALL | dict(changes or {}))
    if git:
        project.git("init", "--quiet", "--initial-branch", "main")
        project.commit("a little project")
    return project


@dataclass(frozen=True)
class Built:
    """What one `dvc repro` made, once for all tests.

    Attributes:
        project: where it ran; dvc.lock is committed. No test changes it: one that has to takes a copy (see `copy`).
        output: what `dvc repro` printed.
    """

    project: Project
    output: str


def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The project that all tests share, made by the first test that asks for it."""
    base = tmp_path_factory.getbasetemp()
    # With xdist each worker has a folder of its own in the common one.
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "a shared folder"
    folder.mkdir(exist_ok=True)
    project, output = Project(folder / "the project"), folder / "output.txt"
    with FileLock(folder / "lock"):
        if not output.exists():
            make(project.root)
            said = project.dvc("repro", **SECRETS)
            project.commit("dvc.lock of the first run")
            output.write_text(said)
    return Built(project, output.read_text())


def accepted(project: Project, label: str = "") -> list[Path]:
    """The photos that `validate` accepted, of one class or of all; among the others are broken ones."""
    table = read_table(project.root / "data/validated.csv")
    return [project.root / path for path in table["path"][table["class"].eq(label) | (not label)]]


def ran(output: str) -> list[str]:
    """The stages whose commands `dvc repro` ran, in order; not those it left alone or took from its run cache."""
    return re.findall(r"^Running stage '([^']+)':", output, flags=re.MULTILINE)


# Where MLflow's tables hold the absolute path of an artifact; each model's MLmodel holds its own.
_PATHS_IN_STORE = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def copy(project: Project, root: Path) -> Project:
    """The same project in another place, with its MLflow store, whose paths are those of the new place."""
    shutil.copytree(project.root, root, symlinks=True)
    store = root / "mlflow/mlflow.db"
    if store.exists():
        old, new = project.root.as_uri(), root.as_uri()
        with closing(sqlite3.connect(store)) as database, database:
            for table, column in _PATHS_IN_STORE:
                database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, new))
        for file in (root / "mlflow/artifacts").rglob("MLmodel"):
            file.write_text(file.read_text().replace(old, new))
    return Project(root)


def versions(project: Project) -> list[Version]:
    """What the registry of the project's store holds, oldest first."""
    return registry.versions(open_store(Paths(project.root, project.root), REGISTERED), REGISTERED)


def aliases(project: Project) -> dict[str, str]:
    """SHA-256 of the model that each alias points at."""
    return {alias: version.model_sha256 for version in versions(project) for alias in version.aliases}


def runs(project: Project, filter_string: str) -> "list[Run]":
    """The runs in the project's store that MLflow's `filter_string` picks, as MLflow has them."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.root}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(REGISTERED)
    return list(client.search_runs([experiment.experiment_id], filter_string))
