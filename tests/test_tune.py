"""Tuning on planted data, with a real Optuna study and a real MLflow store; where only the study matters, the training
is a formula.
"""

import hashlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import optuna
import pandas as pd
import pytest
from conftest import SHIPPED
from projects import Project
from projects import make as make_project
from projects import runs as project_runs

from touchline.cli import app
from touchline.commands import tune as tuning
from touchline.core import files, params
from touchline.core.editing import set_values
from touchline.core.errors import Diverged, ParamsError, TouchlineError
from touchline.core.paths import Paths
from touchline.data import feature_store
from touchline.data.feature_store import Arrays
from touchline.models.training import Labelled, Trained
from touchline.stages import train

SIDE = 32
NAMES = [hashlib.sha256(bytes([number])).hexdigest() for number in range(96)]
SMALL = {
    "features.pixels.image_size": SIDE,
    "models.cnn.filters": [8, 16],
    "models.cnn.epochs": 4,
    "models.cnn.batch_size": 16,
}


@pytest.fixture
def project(paths: Paths) -> Paths:
    return ready(paths)


def ready(paths: Paths) -> Paths:
    """A project as it is when `tune` begins: params.yaml, a split and stored pixels."""
    file = paths.workspace / "params.yaml"
    file.write_bytes(SHIPPED.read_bytes())
    set_values(file, SMALL)
    labels = np.arange(96) % 2
    split = pd.DataFrame(
        {
            "path": [f"data/photos/{name}.png" for name in NAMES],
            "class": [("rugby", "soccer")[label] for label in labels],
            "subset": ["train"] * 64 + ["validation"] * 16 + ["test"] * 16,
            "group": "",
            "sha256": NAMES,
        }
    )
    files.write_table(paths.split_table, split)
    noise = np.random.default_rng(0).normal(0, 90, (96, SIDE, SIDE, 3))
    pixels = (np.array([(150, 90, 90), (90, 90, 150)])[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    # No row of a test photo is there: looking at one would be an error.
    keep(paths.features / "pixels", NAMES[:80], pixels)
    # A backbone as wide as the real ones makes no difference to the study.
    rows = np.random.default_rng(1).normal(0, 1, (96, 1408)).astype(np.float32)
    rows[:, 7] += 3 * labels
    keep(paths.features / "pooled", NAMES[:80], rows)
    return paths


def keep(folder: Path, digests: Sequence[str], rows: np.ndarray) -> None:
    def compute(wanted: Sequence[str]) -> Iterator[np.ndarray]:
        return (rows[NAMES.index(name)] for name in wanted)

    feature_store.update(folder, {}, digests, compute)


def formula(model, features, stored, train, validation, project, on_epoch) -> Trained:
    """A training whose loss falls to |dropout - 0.5|, and takes no time."""
    history = []
    for epoch in range(model.epochs):
        loss = round(abs(model.dropout - 0.5) + 1 / (epoch + 1), 6)
        history.append({"epoch": epoch, "train/loss": loss, "validation/loss": loss, "validation/accuracy": 1 - loss})
        on_epoch(history[-1])
    return Trained(lambda: None, history, len(history) - 1, train)


@pytest.fixture
def by_formula(project: Paths, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setattr(tuning, "fit", formula)
    return project


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, str]:
    """A project that has had a study of twelve trials: more than are drawn at random; and what was printed."""
    root = tmp_path_factory.mktemp("studied")
    paths = ready(Paths(root, root))
    with patch.object(tuning, "fit", formula), redirect_stdout(io.StringIO()) as out:
        tune(paths, 12)
    return paths, out.getvalue()


def tune(paths: Paths, trials: int, name: str = "cnn", *, apply: bool = False) -> None:
    tuning.run(paths, params.load(paths.workspace / "params.yaml"), name, trials, 1, apply=apply)


def study(paths: Paths) -> optuna.Study:
    storage = f"sqlite:///{paths.mlflow}/tuning.db"
    [name] = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def runs(paths: Paths) -> list:
    """Those of MLflow, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{paths.mlflow}/mlflow.db")
    experiment = client.get_experiment_by_name("rugby-soccer")
    return sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.start_time)


def overrides(line: str) -> list[str]:
    """What the shell gives `dvc exp run -S`."""
    words = shlex.split(line)
    assert words[:3] == ["dvc", "exp", "run"] and set(words[3::2]) == {"-S"}
    return words[4::2]


def test_the_line_at_the_end_gives_the_very_trial_that_was_best(
    project: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvc.utils.hydra import apply_overrides

    tune(project, 2)
    output = capsys.readouterr().out
    best = study(project).best_trial
    assert all(f"trial {number}" in output for number in range(2))

    file = project.workspace / "params.yaml"
    apply_overrides(file, overrides(output.splitlines()[-1]))
    values = params.load(file)
    split = files.read_table(project.split_table)
    subsets = [Labelled.of(split, subset, values.classes, project.workspace) for subset in ("train", "validation")]
    again = train.fit(
        values.models["cnn"], values.features["pixels"], Arrays(project.features / "pixels"), *subsets, project.project,
        lambda row: None,
    )  # fmt: skip
    assert again.history[again.kept]["validation/loss"] == pytest.approx(best.value, rel=1e-3)


def test_the_values_of_params_yaml_come_first_and_numbers_are_rounded_before_they_are_tried(by_formula: Paths) -> None:
    tune(by_formula, 4)
    first, *others = study(by_formula).trials
    cnn = params.load(by_formula.workspace / "params.yaml").models["cnn"]
    assert first.user_attrs["values"] == {
        "learning_rate": cnn.learning_rate, "weight_decay": cnn.weight_decay, "dropout": cnn.dropout,
        "filters": cnn.filters, "augmentation.rotation": 30.0, "augmentation.zoom": 0.2, "augmentation.shift": 0.1,
    }  # fmt: skip
    assert first.params["dropout"] == cnn.dropout
    for trial in others:
        numbers = [value for value in trial.user_attrs["values"].values() if isinstance(value, float)]
        assert numbers == [float(f"{number:.4g}") for number in numbers]
    logged = {run.info.run_id: run.data.params.get("dropout") for run in runs(by_formula)}
    assert all(logged[trial.user_attrs["run_id"]] == str(trial.user_attrs["values"]["dropout"]) for trial in others)


def test_params_yaml_that_changed_is_tried_too_even_when_there_are_trials_enough(by_formula: Paths) -> None:
    tune(by_formula, 2)
    set_values(by_formula.workspace / "params.yaml", {"models.cnn.dropout": 0.5})
    tune(by_formula, 2)
    assert study(by_formula).best_trial.number == 2 and len(study(by_formula).trials) == 3
    tune(by_formula, 2)
    assert len(study(by_formula).trials) == 3


@pytest.mark.slow
def test_a_study_broken_off_goes_on_and_tries_what_it_would_have(by_formula: Paths, studied: tuple[Paths, str]) -> None:
    other = by_formula
    for trials in (2, 2, 11, 12):
        tune(other, trials)
        assert len(study(other).trials) == trials
    tried = [[trial.user_attrs["values"] for trial in study(paths).trials] for paths in (studied[0], other)]
    assert tried[0] == tried[1]
    assert len({str(values) for values in tried[0]}) == 12
    # One parent, however often it went on.
    parents = [run for run in runs(other) if run.info.run_name == "tune cnn"]
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    assert parents[0].data.metrics["objective"] == study(other).best_value


def test_every_trial_is_a_run_under_one_parent_and_the_hopeless_are_pruned(studied: tuple[Paths, str]) -> None:
    paths, output = studied
    parent, *nested = runs(paths)
    trials = study(paths).trials
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert [run.info.run_id for run in nested] == [trial.user_attrs["run_id"] for trial in trials]
    assert [run.info.run_name for run in nested[:2]] == ["cnn trial 0", "cnn trial 1"]
    assert {run.info.status for run in [parent, *nested]} == {"FINISHED"}
    assert not any(run.outputs.model_outputs for run in nested if run.outputs)
    pruned = [trial.number for trial in trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert pruned and min(pruned) >= 4
    states = {run.data.tags["touchline.trial"]: run.data.tags["touchline.trial_state"] for run in nested}
    assert {int(number) for number, state in states.items() if state == "pruned"} == set(pruned)
    assert f"trial {pruned[0]}, pruned" in output
    best = study(paths).best_trial
    assert parent.data.tags["touchline.best_run"] == best.user_attrs["run_id"]
    assert nested[best.number].data.metrics["objective"] == best.value


def test_a_loss_that_is_no_number_fails_its_trial_and_the_study_goes_on(
    by_formula: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(100))

    def some_diverge(*arguments) -> Trained:
        if next(calls) in {0, 2}:
            raise Diverged("the loss is no number any more")
        return formula(*arguments)

    monkeypatch.setattr(tuning, "fit", some_diverge)
    tune(by_formula, 4)
    failed = [trial.number for trial in study(by_formula).trials if trial.state == optuna.trial.TrialState.FAIL]
    assert failed == [0, 2] and len(study(by_formula).trials) == 4
    assert "trial 2, failed" in capsys.readouterr().out
    assert [run.info.status for run in runs(by_formula)[1:]] == ["FAILED", "FINISHED", "FAILED", "FINISHED"]


def test_where_every_trial_fails_that_is_one_line(by_formula: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*arguments) -> Trained:
        raise Diverged("the loss is no number any more")

    monkeypatch.setattr(tuning, "fit", diverge)
    with pytest.raises(TouchlineError, match="cnn"):
        tune(by_formula, 2)


def test_apply_changes_the_values_and_not_one_character_besides(
    by_formula: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    file = by_formula.workspace / "params.yaml"
    before = file.read_text()
    tune(by_formula, 6, apply=True)
    values = study(by_formula).best_trial.user_attrs["values"]
    lines = list(zip(before.splitlines(), file.read_text().splitlines(), strict=True))
    cnn = before[: before.index("  cnn:")].count("\n")
    changed = [number for number, (old, new) in enumerate(lines) if old != new]
    assert changed and all(cnn < number < cnn + 15 for number in changed)
    assert all(re.sub(".*(#|$)", "", old) == re.sub(".*(#|$)", "", new) for old, new in lines)
    applied = params.load(file).models["cnn"].model_dump()
    assert applied["dropout"] == values["dropout"] and applied["filters"] == values["filters"]
    assert applied["augmentation"]["zoom"] == values["augmentation.zoom"] and applied["augmentation"]["flip"] is True
    # They are in the study already: nothing is tried again.
    tune(by_formula, 6)
    assert len(study(by_formula).trials) == 6


def test_values_are_written_wherever_they_stand(tmp_path: Path, shipped: dict) -> None:
    file = tmp_path / "params.yaml"
    block = re.sub(r"strengths: \[.*\]", "strengths:\n      - 0.1", SHIPPED.read_text())
    assert block != SHIPPED.read_text()
    file.write_bytes(block.replace("\n", "\r\n").encode())
    set_values(file, {"models.transfer.strengths": [0.00001234], "models.transfer.balance": "none"})
    head = params.load(file).models["transfer"]
    assert (head.strengths, head.balance, head.folds) == ([0.00001234], "none", shipped["models"]["transfer"]["folds"])
    assert file.read_bytes().count(b"\r\n") > 100 and b"e-0" not in file.read_bytes()
    written = file.read_bytes()
    with pytest.raises(ParamsError, match=r"models\.cnn\.dropout.*\b7\b"):
        set_values(file, {"models.cnn.dropout": 7.0})
    assert file.read_bytes() == written


def test_a_head_is_tuned_by_its_strength_and_what_params_yaml_tries_is_tried_as_a_whole(
    project: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The finished model, which tuning throws away, would need the backbone's weights.
    monkeypatch.setattr(train.architectures, "transfer", lambda *_: None)
    tune(project, 6, "transfer")
    first, *others = study(project).trials
    assert first.user_attrs["values"]["strengths"] == [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    assert all(len(trial.user_attrs["values"]["strengths"]) == 1 for trial in others)
    assert {trial.state for trial in study(project).trials} == {optuna.trial.TrialState.COMPLETE}
    line = capsys.readouterr().out.splitlines()[-1]
    assert "'models.transfer.strengths=[" in line and "-S models.transfer.balance=" in line


def test_another_split_is_another_study(by_formula: Paths) -> None:
    tune(by_formula, 1)
    split = files.read_table(by_formula.split_table)
    files.write_table(by_formula.split_table, split.iloc[::-1])
    tune(by_formula, 1)
    names = optuna.get_all_study_names(f"sqlite:///{by_formula.mlflow}/tuning.db")
    assert len(names) == 2 and all(re.fullmatch("cnn [0-9a-f]{12}", name) for name in names)


@pytest.mark.parametrize(("missing", "said"), [("data/split.csv", r"split\.csv"), ("data/features", "pixels")])
def test_what_dvc_has_not_made_yet_is_one_line(by_formula: Paths, missing: str, said: str) -> None:
    (by_formula.workspace / missing).rename(by_formula.workspace / "away")
    with pytest.raises(TouchlineError, match=said + ".*`dvc repro`"):
        tune(by_formula, 1)


def test_an_unknown_model_is_one_line(project: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.workspace)
    with pytest.raises(ParamsError, match=r"models.*'cmm'.*cnn, transfer"):
        app(["tune", "cmm"], standalone_mode=False)


PROGRAM = """
import sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from touchline.core import params
from touchline.commands import tune
from touchline.core.paths import Paths
import test_tune
def slow(*arguments):
    (root / "started").touch()
    time.sleep(float(sys.argv[3]))
    return test_tune.formula(*arguments)
tune.fit = slow
root = Path(sys.argv[1])
tune.run(Paths(root, root), params.load(root / "params.yaml"), "cnn", int(sys.argv[2]), 1, apply=False)
"""


def start(paths: Paths, trials: int, seconds: float) -> subprocess.Popen:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(paths.workspace), str(trials), str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_work_on_one_study_and_no_trial_is_lost_or_doubled(project: Paths) -> None:
    tuners = [start(project, 8, 1.5) for _ in range(2)]
    outputs = [tuner.communicate()[0] for tuner in tuners]
    assert [tuner.returncode for tuner in tuners] == [0, 0], outputs
    trials = study(project).trials
    assert [trial.number for trial in trials] == list(range(8)) and all(trial.state.is_finished() for trial in trials)
    assert len({str(trial.user_attrs["values"]) for trial in trials}) == 8
    assert len({trial.user_attrs["process"]["touchline.pid"] for trial in trials}) == 2
    parent, *nested = runs(project)
    assert len(nested) == 8 and {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *nested]} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_trial_whose_process_is_ended_is_not_counted_and_its_values_are_tried_again(
    project: Paths, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    tuner = start(project, 5, 600)
    deadline = time.monotonic() + 120
    while not (project.workspace / "started").exists() and tuner.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert tuner.poll() is None, tuner.communicate()[0]
    os.kill(tuner.pid, how)
    tuner.communicate()
    monkeypatch.setattr(tuning, "fit", formula)
    tune(project, 2)
    lost, again, other = study(project).trials
    assert lost.state == optuna.trial.TrialState.FAIL
    assert again.user_attrs["values"] == lost.user_attrs["values"] != other.user_attrs["values"]
    assert again.state == other.state == optuna.trial.TrialState.COMPLETE
    parent, *nested = runs(project)
    ended = "KILLED" if how == signal.SIGKILL else "FAILED"
    assert [run.info.status for run in [parent, *nested]] == ["FINISHED", ended, "FINISHED", "FINISHED"]


@pytest.mark.slow
def test_a_queued_grid_runs_whole_and_is_found_under_its_name_in_dvc_and_in_mlflow(tmp_path: Path) -> None:
    project: Project = make_project(tmp_path / "a grid")
    project.dvc("repro", "train@cnn")
    project.commit("dvc.lock")
    queued = project.dvc(
        "exp", "run", "--queue", "--name", "grid", "--set-param", "models.cnn.dropout=0.3,0.4", "train@cnn"
    )
    assert "'grid-1'" in queued and "'grid-2'" in queued
    project.dvc("exp", "run", "--run-all")

    shown = pd.read_csv(io.StringIO(project.dvc("exp", "show", "--csv")))
    grid = shown[shown["Experiment"].isin(["grid-1", "grid-2"])]
    assert dict(zip(grid["Experiment"], grid["models.cnn.dropout"], strict=True)) == {"grid-1": 0.3, "grid-2": 0.4}
    found = project_runs(project, "tags.`touchline.dvc_experiment` LIKE 'grid-%'")
    assert {run.data.tags["touchline.dvc_experiment"]: run.data.params["dropout"] for run in found} == {
        "grid-1": "0.3", "grid-2": "0.4",
    }  # fmt: skip
