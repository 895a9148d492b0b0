"""The `touchline` command: one command a stage, and a few for people. Thin: the work is in the modules."""

import errno
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from touchline.commands.export_formats import FORMATS
from touchline.core.errors import ParamsError, TouchlineError

if TYPE_CHECKING:
    from touchline.core.params import Params
    from touchline.core.paths import Paths
    from touchline.tracking import Store

# Nothing calls home, and TensorFlow's start-up notes are no news to anyone; whoever wants either sets it before.
_QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Eight processes of 0.2 GB each beside the server, for pages about language models.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Options of the servers that answer a browser.
_Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host", metavar="NAME", show_default=False,
        help="a name that clients reach it by, beside localhost and --host; may be given more than once",
    ),
]  # fmt: skip

# What no code can help: the disk is full, over quota or read-only, or this user may not write there.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

# The module that does the work of each stage.
STAGES = {
    "ingest": "touchline.stages.ingest",
    "validate": "touchline.stages.validate",
    "split": "touchline.stages.split",
    "features": "touchline.stages.features",
    "train": "touchline.stages.train",
    "evaluate": "touchline.stages.evaluate",
    "register": "touchline.stages.register",
}


class Format(StrEnum):
    """How `predict` writes its answers."""

    table = "table"
    json = "json"
    csv = "csv"


# What `export` writes.
Target = StrEnum("Target", list(FORMATS))  # type: ignore[misc]  # mypy wants the names spelt out


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
registry = typer.Typer(no_args_is_help=True, help="The MLflow registry as a whole.")
app.add_typer(registry, name="registry")


def main() -> None:
    """Entry point: a TouchlineError is one line on stderr and its exit code; anything else is a bug and a traceback."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except TouchlineError as error:
        print(f"touchline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever reads has seen enough (`| head`); at its end Python would try once more to write, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        name = error.filename2 or error.filename  # of two the one that is written to
        where = f" ({name})" if name else ""
        print(f"touchline: {error.strerror}{where}: make room or mend that, then run again; what is done is kept",
              file=sys.stderr)  # fmt: skip
        sys.exit(1)


def _run(name: str, *arguments: str) -> None:
    """Run a stage, under its lock: `run` of the module that does its work."""
    from importlib import import_module

    from touchline.core import stage

    paths, params = _project()
    with stage.running(paths, "@".join([name, *arguments])):
        import_module(STAGES[name]).run(paths, params, *arguments)


@app.command()
def ingest(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be fetched, and fetch nothing")] = False,
) -> None:
    """Fetch photos from the sources into data/photos."""
    if dry_run:
        _plan()
    else:
        _run("ingest")


@app.command()
def validate() -> None:
    """Check every photo and the set as a whole; write what is accepted and what is rejected."""
    _run("validate")


@app.command()
def split() -> None:
    """Divide the accepted photos into train, validation and test."""
    _run("split")


@app.command()
def features(name: Annotated[str, typer.Argument(help="an entry of `features` in params.yaml")]) -> None:
    """Turn photos into arrays, once."""
    _run("features", _known(name, "features"))


@app.command()
def train(name: Annotated[str, typer.Argument(help="an entry of `models` in params.yaml")]) -> None:
    """Train one model."""
    _run("train", _known(name, "models"))


@app.command()
def evaluate() -> None:
    """Judge every model on the test photos, beside baselines."""
    _run("evaluate")


@app.command()
def register() -> None:
    """Register the better model; make it champion if it has earned it."""
    _run("register")


@app.command()
def audit(
    top: Annotated[int, typer.Option(help="how many of each problem the page shows", min=1)] = 24,
    who: Annotated[str, typer.Option(help="your name, for the page's ready lines of data/decisions.csv")] = "",
) -> None:
    """Look for likely wrong labels, near-duplicates and outliers among the photos."""
    from touchline.commands import audit

    audit.run(*_project(), top, who)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an entry of `models` in params.yaml")],
    trials: Annotated[
        int, typer.Option(help="finished trials that the study shall have; those of earlier runs count", min=1)
    ] = 30,
    apply: Annotated[bool, typer.Option("--apply", help="write the best values into params.yaml")] = False,
    seed: Annotated[int, typer.Option(help="of what is tried", min=0)] = 42,
) -> None:
    """Search a model's hyperparameters by its validation loss; print the `dvc exp run` of the best.

    The values of params.yaml are tried first. A run that was broken off goes on where it was. For two trials at a time
    start the command twice: both work on one study.
    """
    from touchline.commands import tune

    tune.run(*_project(), _known(model, "models"), trials, seed, apply=apply)


@app.command()
def predict(
    names: Annotated[list[str], typer.Argument(metavar="PHOTO|FOLDER|GLOB|-", help="-: names, one a line, from stdin")],
    model: Annotated[
        str,
        typer.Option(
            help="a version, an alias, a run, a model of params.yaml or a .keras file (default: the champion)"
        ),
    ] = "",
    form: Annotated[Format, typer.Option("--format", help="json: an object a line")] = Format.table,
    explain: Annotated[
        bool, typer.Option("--explain", help="draw what the model looked at into <photo>.touchline.jpg")
    ] = False,
) -> None:
    """Say what is on photos, with the champion.

    In a folder, what is no photo is left out. Exit code 1: some could not be read; they are named, the rest is done.
    """
    from touchline.commands import predict

    predict.run(*_project(), names, model, form.value, explain=explain)


@app.command()
def export(
    form: Annotated[
        Target, typer.Option("--format", help="saved_model and openvino are folders; onnx wants the extra `onnx`")
    ],
    model: Annotated[str, typer.Option(help="as for `predict` (default: the champion)")] = "",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="must not be there yet (default: exports/<name of the model>)")
    ] = None,
) -> None:
    """Write a model for programs without Keras, checked against it on the test photos.

    Exit code 1: it answered differently; then nothing is written.
    """
    from touchline.commands import export

    export.run(*_project(), model, form.value, output)


@app.command()
def drift(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="PHOTO|FOLDER|GLOB|-", help="none: the folder of drift.folder in params.yaml"),
    ] = None,
) -> None:
    """Say whether photos are still like those the champion learned from; reports/drift.html shows it.

    Exit code 0: no drift; 3: drift; 4: too few photos to tell; 1 and 2: they could not be compared. Photos that cannot
    be read are named, and the others compared.
    """
    from touchline.commands import drift

    raise typer.Exit(drift.EXIT_CODES[drift.run(*_project(), names or [])])


@app.command()
def promote(version: Annotated[int, typer.Argument(help="version of the registered model", min=1)]) -> None:
    """Make a version champion by hand."""
    store, name = _store()
    if version not in (known := [found.number for found in store.versions(name)]):
        there = ", ".join(map(str, known)) or "none"
        raise TouchlineError(f"{name} has no version {version} (there: {there}): see `touchline registry list`")
    store.promote(name, version)
    print(f"version {version} of {name} is champion")


@app.command()
def rollback() -> None:
    """Give the champion's place back to the version it replaced; `register` does not undo it, `promote` may."""
    store, name = _store()
    print(f"version {store.rollback(name)} of {name} is champion again")


@registry.command("list")
def list_versions() -> None:
    """The registered versions: model, accuracies, aliases, why promoted or not."""
    from rich.console import Console
    from rich.table import Table

    store, name = _store()
    table = Table("version", "model", "validation", "test", "aliases", "why", title=name, title_justify="left")
    for found in store.versions(name):
        tags = found.tags
        accuracies = (
            f"{float(tags[key]):.3f}" if key in tags else "" for key in ("validation/accuracy", "test/accuracy")
        )
        why = tags.get("touchline.reason", "")
        if found.rolled_back:
            why = f"rolled back on {found.rolled_back[:10]}; before: {why}"
        table.add_row(str(found.number), tags.get("touchline.model", ""), *accuracies, ", ".join(found.aliases), why)
    Console().print(table)


@registry.command("sync")
def sync() -> None:
    """Put runs, version and champion back from the project's files where the store lacks them."""
    from touchline import tracking

    paths, params = _project()
    name = params.register_.name
    if tracking.in_sync(paths, name):
        return
    for line in tracking.sync(paths, name):
        print(line)


@app.command()
def mlflow(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow UI on the project's store, until Ctrl-C."""
    from touchline import tracking
    from touchline.core import ports

    ports.bound(host, port).close()
    paths, params = _project()
    settings = tracking.server_settings(paths, ports.trusted_hosts(host, port))
    page = tracking.page(paths, params.register_.name)
    print(f"MLflow UI: http://{host}:{port}{page} (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port),
        # One worker answers one person, and four would each take 0.3 GB.
        "--workers", "1",
        # Or any client could write files to ./mlartifacts.
        "--no-serve-artifacts",
        # MLflow's default server, uvicorn, has its AI assistant as well: from any client on this machine, without a
        # login, that takes the address of a language model and runs the commands which that one answers. gunicorn
        # serves MLflow without it. Threads, because a browser opens connections and lets them wait; no time limit,
        # because its start takes longer on a busy machine.
        "--gunicorn-opts", "--threads 8 --timeout 0 --no-control-socket",
    ]  # fmt: skip
    # In place of this process, so that ending it ends the server. MLflow warns of every use of gunicorn.
    os.execve(command[0], command, os.environ | settings | {"PYTHONWARNINGS": "ignore::FutureWarning"})


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="as for `predict` (default: the champion)")] = "",
    host: Annotated[str, typer.Option(help="address to listen on; another than loopback lets others in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 8000,
    allowed_host: _Allowed = None,
) -> None:
    """Answer over HTTP what is on a photo, until Ctrl-C: `curl --data-binary @photo.jpg http://127.0.0.1:8000/predict`."""
    from touchline.commands import serve

    serve.run(*_project(), model, host, port, allowed_host or ())


@app.command("app")
def try_models(
    host: Annotated[str, typer.Option(help="address to listen on; another than loopback lets others in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 7860,
    model: Annotated[str, typer.Option(help="the first to ask, as for `predict` (default: the champion)")] = "",
    allowed_host: _Allowed = None,
) -> None:
    """Open a page to try the models on photos and to say where they are wrong, until Ctrl-C."""
    from touchline.commands import app
    from touchline.core import ports

    ports.bound(host, port).close()
    app.run(*_project(), model, host, port, allowed_host or ())


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would go, and change nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    days: Annotated[
        int,
        typer.Option("--older-than", metavar="DAYS", help="what counts as old among runs and exported models", min=1),
    ] = 90,
) -> None:
    """Delete what the project needs no more, after showing it and asking.

    That is half-written files, features that params.yaml no longer names, old exported models, copies that killed
    experiments left, unused objects in DVC's cache (`dvc gc`), and runs in MLflow (`mlflow gc`) that you deleted or
    that ended long ago, unless a registered version, a model in models/ or a DVC experiment needs them. Photos,
    data/decisions.csv and downloads are never deleted. To start over, use `make clean`.
    """
    from touchline.commands import clean

    clean.run(*_project(), days, dry_run=dry_run, yes=yes)


@app.command()
def preset(name: Annotated[str, typer.Argument(help="fast, best or article")]) -> None:
    """Write a preset's features and models into params.yaml; everything else there stays."""
    from touchline.commands import presets
    from touchline.core.editing import set_values
    from touchline.core.paths import Paths

    set_values(Paths.here().workspace / "params.yaml", presets.changes(name))
    print(f"params.yaml has the features and models of '{name}': `dvc repro` trains them")


@app.command()
def summary() -> None:
    """The last run in a table: models, interval, seconds, decision, where to look."""
    from touchline.commands import summary
    from touchline.core.paths import Paths

    summary.show(Paths.here())


def _plan() -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from touchline.stages import ingest

    planned = ingest.plan(*_project())
    licences = list(dict.fromkeys(row.licence for row in planned))
    table = Table("", "what", "MB", "state", "licence", title="would be fetched", title_justify="left")
    for at, row in enumerate(planned, 1):
        size = "?" if row.megabytes is None else f"{row.megabytes:,.1f}"
        reference = f"[{licences.index(row.licence) + 1}]"
        table.add_row(*map(escape, (str(at), row.what, size, row.state, reference)))
    Console().print(table)
    # Outside the table, in which an address would be broken over lines.
    for at, row in enumerate(planned, 1):
        print(f"{at:>2}  {row.where}")
    for number, licence in enumerate(licences, 1):
        print(f"[{number}] {licence}")
    to_fetch = [row for row in planned if row.state == "to fetch"]
    known = sum(row.megabytes or 0 for row in to_fetch)
    unknown = sum(row.megabytes is None for row in to_fetch)
    print(f"to fetch: {known:,.0f} MB at most" + (f", and {unknown} of a size nobody tells" if unknown else ""))


def _store() -> "tuple[Store, str]":
    from touchline.tracking import open_store

    paths, params = _project()
    return open_store(paths, params.register_.name), params.register_.name


def _known(name: str, section: str) -> str:
    """`name`, if the section of params.yaml has it."""
    known = getattr(_project()[1], section)
    if name not in known:
        raise ParamsError(f"params.yaml: {section} has no entry '{name}'; allowed: {', '.join(known)}")
    return name


def _project() -> "tuple[Paths, Params]":
    """The project of the current folder, and its params.yaml."""
    from touchline.core import params
    from touchline.core.paths import Paths

    paths = Paths.here()
    return paths, params.load(paths.workspace / "params.yaml")


if __name__ == "__main__":
    main()
