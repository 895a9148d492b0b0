"""The workspace is where params.yaml lies; the project is the same folder, unless DVC names another."""

from pathlib import Path

import pytest

from touchline.core.errors import ParamsError
from touchline.core.paths import Paths


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A project folder, with a folder deep in it."""
    (tmp_path / "project/reports/figures").mkdir(parents=True)
    (tmp_path / "project/params.yaml").write_text("")
    return tmp_path / "project"


@pytest.mark.parametrize("current", [".", "reports/figures"])
def test_the_workspace_is_found_from_below(workspace: Path, current: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace / current)
    assert Paths.here() == Paths(workspace, workspace)


def test_an_experiment_works_in_its_copy_and_shares_the_store_of_the_project(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = workspace / ".dvc/tmp/exps/abc"
    copy.mkdir(parents=True)
    (copy / "params.yaml").write_text("")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(workspace))

    found = Paths.here()

    assert found == Paths(copy, workspace)
    assert found.split_table == copy / "data/split.csv"
    assert found.locks.is_relative_to(copy)
    assert found.mlflow == workspace / "mlflow"
    assert found.ledger == workspace / "data/ledger.csv"


def test_outside_a_project_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        Paths.here()


def test_paths_are_shown_from_the_workspace_with_forward_slashes(workspace: Path, tmp_path: Path) -> None:
    paths = Paths(workspace, workspace)
    assert paths.relative(paths.photos / "rugby/a.jpg") == "data/photos/rugby/a.jpg"
    assert paths.relative(tmp_path / "elsewhere.csv") == str(tmp_path / "elsewhere.csv")
