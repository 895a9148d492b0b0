"""`touchline tune`: search one model's hyperparameters by its validation loss. Test photos are not used.

The study is in mlflow/tuning.db, beside its runs: hours of work must not be among DVC's temporary files, and MLflow's
own database cannot be shared, since both keep their schema version in a table of the same name. SQLite survives a
process that is killed while it writes; Optuna's journal file would end in half a line and be unreadable.

Processes that tune the same model share the study: a lock guards the choice of the next trial, and each trial records
its process, so that a trial whose process is gone is found and tried again.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from touchline.core import params as params_file
from touchline.core.editing import as_yaml, change, set_values
from touchline.core.errors import Diverged, ParamsError, TouchlineError, one_line
from touchline.core.files import read_table
from touchline.core.params import ArticleParams, CnnParams, HeadParams, ModelParams, NetworkParams, Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.core.tensorflow import import_tensorflow
from touchline.data.feature_store import Arrays
from touchline.models.architectures import train as fit
from touchline.models.training import Labelled
from touchline.stages.train import facts
from touchline.tracking import runs

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

_DIGITS = 4  # of a suggested number; rounded before training, so that what is printed is what was tried
_SHOWN = 5


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`; with `alone`, a list of this one number."""

    low: float
    high: float
    log: bool = False
    alone: bool = False

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, suggested: float) -> float | list[float]:
        rounded = min(max(float(f"{suggested:.{_DIGITS}g}"), self.low), self.high)
        return [rounded] if self.alone else rounded

    def suggestion(self, value: Any) -> float | None:
        """What makes `value`; None if nothing here does."""
        number = value[0] if self.alone and len(value) == 1 else value
        return number if isinstance(number, int | float) and self.low <= number <= self.high else None


class OneOf:
    """One of some values, as JSON to Optuna, which takes no lists."""

    def __init__(self, *choices: Any) -> None:
        self.choices = [json.dumps(choice) for choice in choices]

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)

    def value(self, suggested: str) -> Any:
        return json.loads(suggested)

    def suggestion(self, value: Any) -> str | None:
        return json.dumps(value) if json.dumps(value) in self.choices else None


Space = dict[str, Between | OneOf]


def space(model: ModelParams) -> Space:
    """What is searched, by dotted key below `models.<name>`. Everything else stays as params.yaml has it."""
    augmentation: Space = {
        "augmentation.rotation": Between(0, 45),
        "augmentation.zoom": Between(0, 0.4),
        "augmentation.shift": Between(0, 0.2),
    }
    match model:
        case CnnParams():
            return {
                "learning_rate": Between(2e-4, 2e-2, log=True),
                "weight_decay": Between(1e-4, 0.5, log=True),
                "dropout": Between(0, 0.6),
                # As many blocks as there are, each twice as wide as the one before.
                "filters": OneOf(*([first * 2**n for n in range(len(model.filters))] for first in (8, 16, 24, 32))),
                **augmentation,
            }
        case ArticleParams():
            return {
                "learning_rate": Between(1e-4, 1e-2, log=True),
                "dropout": Between(0, 0.7),
                "dense_units": OneOf(32, 64, 128, 256),
                **augmentation,
            }
        case HeadParams():
            return {
                "strengths": Between(1e-4, 100, log=True, alone=True),
                "balance": OneOf("none", "class", "group"),
            }
        case _:
            raise ParamsError(
                f"touchline tune has no ranges for the architecture {model.architecture}: tune another model, or "
                "change its values by hand"
            )


def run(paths: Paths, params: Params, name: str, trials: int, seed: int, *, apply: bool) -> None:
    """Bring the study to `trials` finished trials; print the best and the command that makes them an experiment.

    Args:
        trials: finished trials of earlier runs and other processes count, those of killed processes do not.
        seed: seed of the search; an interrupted study continues with the same trials.
        apply: write the best values into params.yaml.

    Raises:
        TouchlineError: an output of `dvc repro` is missing, or no trial finished.
    """
    import_tensorflow()
    study = _Study(paths, params, name, seed)
    with study.at_work():
        while (trial := study.ask(trials)) is not None:
            study.attempt(trial, trials)
    best = study.best()
    if not best:
        raise TouchlineError(f"tune {name}: no trial finished; `touchline mlflow` shows why")
    study.show(best)
    changes = {f"models.{name}.{key}": value for key, value in best[0].user_attrs["values"].items()}
    if apply:
        set_values(paths.workspace / "params.yaml", changes)
        say("params.yaml: the best values are written; `dvc repro` trains with them")
    # Printed last and whole, for a person or a program to copy.
    print(command(changes), flush=True)


def command(changes: Mapping[str, Any]) -> str:
    """The line for a shell that makes an experiment of `changes`, by dotted key of params.yaml."""
    options = (f"-S {shlex.quote(f'{key}={as_yaml(value)}')}" for key, value in changes.items())
    return " ".join(["dvc exp run", *options])


class _Study:
    """The study of one model on one split, and its runs in MLflow."""

    def __init__(self, paths: Paths, params: Params, name: str, seed: int) -> None:
        from filelock import FileLock

        self._paths, self._params, self._name, self._seed = paths, params, name, seed
        self._model, self._space = params.models[name], space(params.models[name])
        split = read_table(paths.split_table)
        self._train, self._validation = (
            Labelled.of(split, subset, params.classes, paths.workspace) for subset in ("train", "validation")
        )
        folder = paths.features / self._model.input
        if not folder.is_dir():
            raise TouchlineError(f"{folder} is missing: run `dvc repro` to make it")
        self._arrays, self._split = Arrays(folder), split
        self._store = runs.open_store(paths, params.register_.name)
        paths.locks.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(paths.project / ".dvc/tmp/touchline/tuning.lock")
        with self._lock:
            self._study = self._opened()
            self._parent = self._parent_run()
            self._queue_present()

    def _opened(self) -> "optuna.Study":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        database = self._paths.mlflow / "tuning.db"
        database.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{database.as_posix()}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        # A head has no epochs to stop at. The first quarter of a network's epochs tells little about its end.
        pruner = (
            optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=self._model.epochs // 4)
            if isinstance(self._model, NetworkParams)
            else optuna.pruners.NopPruner()
        )
        return optuna.create_study(
            storage=storage, study_name=self._study_name(), pruner=pruner, direction="minimize", load_if_exists=True
        )

    def _study_name(self) -> str:
        """Losses are compared within one study, so all they hang on besides what is searched is in its name."""
        fixed = self._model.model_dump(mode="json")
        for key in self._space:
            *sections, last = key.split(".")
            del reduce(getitem, sections, fixed)[last]
        about = {
            "split": hashlib.sha256(self._paths.split_table.read_bytes()).hexdigest(),
            "fixed": fixed,
            "features": self._params.features[self._model.input].model_dump(mode="json"),
            "classes": self._params.classes,
            "space": {key: vars(choice) for key, choice in self._space.items()},
        }
        return f"{self._name} {hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]}"

    def _parent_run(self) -> str:
        known = self._study.user_attrs.get("run_id")
        if known and runs.resume(self._store, known):
            return known
        told = facts(self._paths, self._params, self._name, self._split)
        tags = told["tags"] | self._tags()
        run_id = runs.start(self._store, f"tune {self._name}", tags, told["params"], told["dataset"])
        runs.describe(self._store, run_id, f"Hyperparameter search of {self._name}; each trial is nested under it.")
        self._study.set_user_attr("run_id", run_id)
        return run_id

    def _tags(self) -> dict[str, str]:
        return {"touchline.study": self._study.study_name, "mlflow.source.name": f"touchline tune {self._name}"}

    def _queue_present(self) -> None:
        """The values of params.yaml are tried first, so that the best is never worse than what one has."""
        content = self._model.model_dump(mode="json")
        present = {key: reduce(getitem, key.split("."), content) for key in self._space}
        tried = [trial.user_attrs.get("values") for trial in self._trials() if trial.number not in self._lost()]
        if present not in tried:
            self._enqueue(present)

    def _enqueue(self, values: Mapping[str, Any], **attributes: Any) -> None:
        self._study.enqueue_trial(self._suggestions(values), user_attrs={"values": dict(values), **attributes})

    def _suggestions(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's suggestions that equal `values`; one outside the space is tried too, but Optuna learns nothing."""
        found = {key: self._space[key].suggestion(value) for key, value in values.items()}
        return {key: suggestion for key, suggestion in found.items() if suggestion is not None}

    def _trials(self) -> "list[FrozenTrial]":
        return self._study.get_trials(deepcopy=False)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold the parent run open during the block, and end it unless another process is still at a trial."""
        try:
            yield
        except BaseException as error:
            with self._lock:
                if not self._running():
                    runs.fail(self._store, self._parent, one_line(error, 1000))
            raise
        with self._lock:
            best = self.best()
            if best:
                runs.set_tags(self._store, self._parent, {"touchline.best_run": best[0].user_attrs["run_id"]})
            if not self._running():
                runs.end(self._store, self._parent, {"objective": _loss(best[0])} if best else {})

    def ask(self, trials: int) -> "Trial | None":
        """The next trial, with its values; None if as many are finished, or being tried elsewhere, as there shall be.

        What waits in the queue is tried in any case.
        """
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        with self._lock:
            for begun_before in self._trials():
                if begun_before.state == TrialState.RUNNING and begun_before not in self._running():
                    self._lose(begun_before)
            begun = self._done() + len(self._running())
            if begun >= trials and not any(trial.state == TrialState.WAITING for trial in self._trials()):
                return None
            # A seed a trial: a generator begun anew would try the first trials' values again in each process.
            self._study.sampler = TPESampler(seed=self._seed + begun)
            trial = self._study.ask()
            trial.set_user_attr("process", runs.this_process())
            values = trial.user_attrs.get("values")
            for key in self._space if values is None else self._suggestions(values):
                self._suggest(trial, key)
            if values is None:
                trial.set_user_attr("values", {key: self._space[key].value(trial.params[key]) for key in self._space})
            return trial

    def _suggest(self, trial: "Trial", key: str) -> None:
        choice = self._space[key]
        if isinstance(choice, OneOf):
            trial.suggest_categorical(key, choice.choices)
        else:
            trial.suggest_float(key, choice.low, choice.high, log=choice.log)

    def _running(self) -> "list[FrozenTrial]":
        """Trials that a living process is running."""
        from optuna.trial import TrialState

        # A process records itself before it releases the lock: a trial without one belongs to a process that is gone.
        return [
            trial
            for trial in self._trials()
            if trial.state == TrialState.RUNNING and runs.is_alive(trial.user_attrs.get("process", {}))
        ]

    def _done(self) -> int:
        lost = self._lost()
        return sum(trial.state.is_finished() and trial.number not in lost for trial in self._trials())

    def _lost(self) -> list[int]:
        """Numbers of the interrupted trials."""
        return self._study.user_attrs.get("lost", [])

    def _lose(self, trial: "FrozenTrial | Trial") -> None:
        """End an interrupted trial and queue its values again, but only once: they may be the cause."""
        from optuna.trial import TrialState

        values = trial.user_attrs.get("values")
        if "again" not in trial.user_attrs:
            self._study.set_user_attr("lost", [*self._lost(), trial.number])
            if values:
                self._enqueue(values, again=True)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def attempt(self, trial: "Trial", trials: int) -> None:
        """Train with a trial's values and report the result to Optuna and MLflow."""
        import keras
        import optuna
        from optuna.trial import TrialState

        changed = self._changed(trial.user_attrs["values"])
        told = facts(self._paths, changed, self._name, self._split)
        tags = told["tags"] | self._tags() | {"touchline.trial": trial.number}
        run_name = f"{told['run_name']} trial {trial.number}"
        # What is searched gets a param of its own, also where it is part of a text (augmentation).
        tried = trial.user_attrs["values"] | told["params"]
        run_id = runs.start(self._store, run_name, tags, tried, told["dataset"], parent=self._parent)
        runs.describe(self._store, run_id, told["description"])
        model = changed.models[self._name]

        def report(row: dict[str, float]) -> None:
            epoch, loss = int(row["epoch"]), row["validation/loss"]
            runs.log_row(self._store, run_id, row)
            if isinstance(model, HeadParams):
                return
            with self._lock:
                trial.report(loss, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned(f"pruned after epoch {epoch}, validation loss {loss:.4f}")

        try:
            with self._lock:
                trial.set_user_attr("run_id", run_id)
            keras.utils.clear_session()  # TensorFlow keeps the models of all trials otherwise
            data = self._arrays, self._train, self._validation
            trained = fit(model, changed.features[model.input], *data, self._paths.project, report)
            kept = trained.history[trained.kept]
            with self._lock:
                trial.set_user_attr("accuracy", kept["validation/accuracy"])
                self._study.tell(trial, kept["validation/loss"])
            reached = {metric: value for metric, value in kept.items() if metric != "epoch"}
            runs.end(
                self._store,
                run_id,
                {**reached, "objective": kept["validation/loss"]},
                {"touchline.trial_state": "complete"},
                trained.history,
            )
            said = f"validation loss {kept['validation/loss']:.4f}"
        except optuna.TrialPruned as pruned:
            with self._lock:
                self._study.tell(trial, state=TrialState.PRUNED)
            # It ended as it should: KILLED stays the word for a process that is gone.
            runs.end(self._store, run_id, {}, {"touchline.trial_state": "pruned"})
            said = str(pruned)
        except Diverged as error:
            with self._lock:
                self._study.tell(trial, state=TrialState.FAIL)
            runs.fail(self._store, run_id, str(error))
            said = f"failed: {error}"
        except BaseException as error:
            with self._lock:
                self._lose(trial)
            runs.fail(self._store, run_id, one_line(error, 1000))
            raise
        best = self.best()
        so_far = f"; best so far {best[0].value:.4f} (trial {best[0].number})" if best else ""
        say(f"{self._name}: {self._done()} of {trials}: trial {trial.number}, {said}{so_far}")

    def _changed(self, values: Mapping[str, Any]) -> Params:
        content = self._params.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for key, value in values.items():
            change(content, f"models.{self._name}.{key}", value)
        return params_file.check(content)

    def best(self) -> "list[FrozenTrial]":
        """Trials that came to an end, the best first."""
        from optuna.trial import TrialState

        complete = [trial for trial in self._trials() if trial.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda trial: (trial.value, trial.number))

    def show(self, best: "list[FrozenTrial]") -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        title = f"tune {self._name}: the best of {self._done()} trials"
        shown = best[:_SHOWN]
        table = Table("trial", *(str(trial.number) for trial in shown), title=title, title_justify="left")
        table.add_row("validation loss", *(f"{trial.value:.4f}" for trial in shown))
        table.add_row("validation accuracy", *(f"{trial.user_attrs['accuracy']:.3f}" for trial in shown))
        for key in self._space:
            table.add_row(key, *(escape(as_yaml(trial.user_attrs["values"][key])) for trial in shown))
        Console().print(table)


def _loss(trial: "FrozenTrial") -> float:
    assert trial.value is not None  # a trial that came to its end has one
    return trial.value
