"""The pipeline with photos of one's own, without git, in a clone, and with data it must refuse."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from projects import STAGES, UP_TO_DATE, Project, aliases, built, copy, make, ran, versions


def put_photos(folder: Path, labels: Sequence[str], count: int, seed: int = 0) -> None:
    """Coarse patterns, no two alike, one hue weaker in each class: `<folder>/<class>/<seed>-<number>.png`."""
    random = np.random.default_rng(seed)
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = random.integers(0, 256, (7, 7, 3))
            pixels[..., number % 3] //= 4
            image = cv2.resize(pixels.astype(np.uint8), (96, 80), interpolation=cv2.INTER_NEAREST)
            (folder / label / f"{seed}-{index}.png").write_bytes(cv2.imencode(".png", image)[1])


@pytest.mark.slow
def test_classes_with_odd_names_go_the_whole_way_and_a_new_photo_is_noticed(tmp_path: Path) -> None:
    labels = ["rugby, union", "$OCCER & co", "bóule 球"]
    folder = tmp_path / "photos of mine"
    put_photos(folder / "train", labels, 14)
    put_photos(folder / "test", labels, 5, seed=1)
    changes = {"classes": labels, "ingest.sources": ["folder"], "ingest.folder": "../photos of mine"}
    project = make(tmp_path / "odd classes", changes)
    assert sorted(ran(project.dvc("repro"))) == sorted(STAGES)

    split = pd.read_csv(project.root / "data/split.csv")
    assert split[split["subset"] == "test"].groupby("class").size().to_dict() == dict.fromkeys(labels, 5)
    assert set(pd.read_csv(project.root / "reports/per_class.csv")["class"]) == set(labels)
    [version] = versions(project)
    assert json.loads(version.tags["touchline.classes"]) == labels

    put_photos(folder / "train", labels[1:2], 1, seed=2)
    assert ran(project.dvc("repro", "ingest")) == ["ingest"]
    assert len(pd.read_csv(project.root / "data/photos.csv")) == 3 * (14 + 5) + 1


def test_a_class_with_too_few_photos_stops_at_validate_with_one_line(tmp_path: Path) -> None:
    put_photos(tmp_path / "few", ["rugby"], 10)
    put_photos(tmp_path / "few", ["soccer"], 3)
    project = make(tmp_path / "the project", {"ingest.sources": ["folder"], "ingest.folder": "../few"})
    output = project.dvc("repro", exit_code=255)
    assert ran(output) == ["ingest", "validate"]
    assert "failed to run: touchline validate, exited with 1" in output
    [line] = [line for line in output.splitlines() if line.startswith("touchline:")]
    assert "soccer" in line and "min_per_class" in line
    assert "Traceback" not in output
    assert not (project.root / "data/split.csv").exists()


@pytest.mark.slow
def test_an_unpacked_archive_without_git_runs_too(tmp_path: Path) -> None:
    project = make(tmp_path / "unpacked archive", git=False)
    project.dvc("config", "--local", "core.no_scm", "true")
    assert ran(project.dvc("repro", "split")) == ["ingest", "validate", "split"]
    assert UP_TO_DATE in project.dvc("repro", "split")


@pytest.mark.slow
def test_an_experiment_in_a_copy_takes_photos_from_a_folder_outside_the_project(tmp_path: Path) -> None:
    folder = tmp_path / "photos of mine"
    put_photos(folder, ["rugby", "soccer"], 12)
    # DVC looks for a relative dependency from the copy and does not find it; an absolute one is where it says.
    project = make(tmp_path / "the project", {"ingest.sources": ["folder"], "ingest.folder": str(folder)})
    project.dvc("repro", "ingest")
    project.commit("dvc.lock")
    output = project.dvc("exp", "run", "--temp", "--set-param", "ingest.per_class=10", "ingest")
    assert "photos: rugby 10, soccer 10" in output
    assert UP_TO_DATE in project.dvc("status", "ingest")


@pytest.mark.slow
def test_a_fresh_clone_pulls_everything_and_restores_the_registry(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pushed = copy(built(tmp_path_factory).project, tmp_path / "pushed from")
    pushed.dvc("remote", "add", "--default", "storage", str(tmp_path / "the remote"))
    pushed.commit("a remote")
    pushed.dvc("push")
    pushed.git("clone", "--quiet", str(pushed.root), str(tmp_path / "a clone"))
    clone = Project(tmp_path / "a clone")
    clone.dvc("pull")
    assert UP_TO_DATE in clone.dvc("status")
    clone.touchline("registry", "sync")
    registered = clone.json("reports/registration.json")["registered"]
    assert aliases(clone) == dict.fromkeys(("challenger", "champion"), registered["model_sha256"])
    assert UP_TO_DATE in clone.dvc("repro")
