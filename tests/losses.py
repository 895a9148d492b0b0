"""What kills may have cost: files that are torn, and what the next run did not make as an undisturbed one made it.

losses.unmake(project, "split")
...
assert not losses.lost(project, undisturbed)
"""

import shutil
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
from projects import REGISTERED, Project, runs, versions
from ruamel.yaml import YAML

from touchline.core.errors import TouchlineError
from touchline.core.files import read_json, read_table, sha256

TABLES = ("data/photos.csv", "data/validated.csv", "data/rejected.csv", "data/split.csv")


def unmake(project: Project, stage: str) -> None:
    """Take away what a stage wrote and DVC's memory of it, from which DVC would bring it back: it is to run again."""
    yaml, file = YAML(typ="safe"), project.root / "dvc.lock"
    content = yaml.load(file)
    for out in content["stages"].pop(stage, {"outs": []})["outs"]:
        path = project.root / out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    yaml.dump(content, file)
    shutil.rmtree(project.root / ".dvc/cache/runs", ignore_errors=True)


def torn(project: Project) -> list[str]:
    """Files that are there under their name and not whole."""
    found = []
    for path in (path for name in ("data", "models", "reports") for path in (project.root / name).rglob("*")):
        if path.is_dir() or path.name.startswith("."):
            continue
        try:
            whole = is_whole(path)
        except (TouchlineError, OSError, ValueError, EOFError, zipfile.BadZipFile):
            whole = False
        if not whole:
            found.append(str(path.relative_to(project.root)))
    return found


def is_whole(path: Path) -> bool:
    match path.suffix:
        case ".json":
            return read_json(path) is not None
        case ".csv":
            return path.name == "decisions.csv" or read_table(path) is not None
        case ".keras" | ".npz":
            return zipfile.ZipFile(path).testzip() is None
        case ".npy":
            return len(np.load(path)) == len(path.with_suffix(".txt").read_text().split())
        case ".html":
            return "</html>" in path.read_text()
    return "photos" not in path.parts or sha256(path).startswith(path.stem)


def champion(project: Project) -> tuple[int, bool] | None:
    """Version of the champion, told by MLflow's tables, and whether its model is the file that was registered."""
    with closing(sqlite3.connect(project.root / "mlflow/mlflow.db")) as store:
        row = store.execute(
            "SELECT v.version, v.source, t.value FROM model_versions v JOIN registered_model_aliases a USING (name, "
            "version) JOIN model_version_tags t USING (name, version) WHERE a.alias = 'champion' AND v.name = ? AND "
            "t.key = 'touchline.model_sha256'", (REGISTERED,),
        ).fetchone()  # fmt: skip
    return (row[0], sha256(Path(url2pathname(urlsplit(row[1]).path), "data/model.keras")) == row[2]) if row else None


def lost(project: Project, undisturbed: Project) -> list[str]:
    """What the run after kills did not bring back as an undisturbed one made it."""
    found = [f"{name} is torn" for name in torn(project)]
    found += [
        f"{path.relative_to(project.root)} is left"
        for name in ("data", "models", "reports", "mlflow")
        for path in (project.root / name).rglob(".partial-*")
    ]
    found += [f"{name} is another" for name in TABLES if not same_bytes(project, undisturbed, name)]
    ours, theirs = (each.json("reports/metrics.json")["models"] for each in (project, undisturbed))
    for model in ("cnn", "transfer"):
        for metric in ("accuracy", "balanced_accuracy", "log_loss"):
            if ours[model][metric] != pytest.approx(theirs[model][metric], abs=1e-3):
                found.append(f"{model}: {metric} is {ours[model][metric]}, not {theirs[model][metric]}")
    decided, better = project.json("reports/registration.json"), undisturbed.json("reports/registration.json")
    model = project.json(f"models/{better['better_model']}.json")
    if (decided["better_model"], decided["promoted"]) != (better["better_model"], True):
        found.append(f"{decided['better_model']} was chosen: {decided['reason']}")
    [holder] = [version for version in versions(project) if "champion" in version.aliases] or [None]
    if holder is None or holder.model_sha256 != model["model_sha256"]:
        found.append("the champion is another model")
    if left := runs(project, "attributes.status = 'RUNNING'"):
        found.append(f"{len(left)} runs have not ended")
    return found


def same_bytes(one: Project, other: Project, name: str) -> bool:
    return (one.root / name).read_bytes() == (other.root / name).read_bytes()
