"""Touchline: photos to a registered classifier. One command for each stage, and some for you."""

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
    from touchline.tracking.client import Store

# Set unless the environment says otherwise: no telemetry, and no start-up notes of TensorFlow.
_ENVIRONMENT = {
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Eight processes of 0.2 GB each beside the server, for pages about language models.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# The same for commands that answer photo by photo. Threads of NumPy's BLAS wait for work by spinning, on cores that
# decoding and networks need: `predict` of 360 photos took 13.2 s of processor time with two of them, 11.7 s with one.
_ANSWERING = {"predict", "serve", "app"}
_WHILE_ANSWERING = {"OPENBLAS_NUM_THREADS": "1"}

_Record = Annotated[bool, typer.Option("--record", help="record each answer, without the photo, in data/served")]
_RecordPhotos = Annotated[bool, typer.Option("--record-photos", help="the same, and keep a small copy of each photo")]
_Model = Annotated[str, typer.Option(help="as for `predict` (default: the champion)")]

# Options of the servers that answer a browser.
_Host = Annotated[str, typer.Option(help="address to listen on; any but loopback lets other machines in")]
_Port = Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)]
_Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host", metavar="NAME", show_default=False,
        help="another host name that clients may use, besides localhost and --host; can be repeated",
    ),
]  # fmt: skip

# Errors that only the user can mend: the disk is full, over quota or read-only, or permission is missing.
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
    """Entry point: a TouchlineError becomes one line on stderr and its exit code; any other error is a bug."""
    answering = sys.argv[1:2] and sys.argv[1] in _ANSWERING
    for name, value in (_ENVIRONMENT | (_WHILE_ANSWERING if answering else {})).items():
        os.environ.setdefault(name, value)
    try:
        app()
    except TouchlineError as error:
        print(f"touchline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`). Without this, Python would try to write again at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK and not str(error.strerror).startswith("No usable temporary directory"):
            raise
        name = error.filename2 or error.filename  # with two, the second is written to
        # An error while writing names no file.
        if not name and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            name = _least_room()
        where = f" ({name})" if name else ""
        remedy = "make room or allow writing there, then run again; finished work is kept"
        print(f"touchline: {error.strerror}{where}: {remedy}", file=sys.stderr)
        sys.exit(1)


def _least_room() -> str:
    """In words: which of the folders that commands write to has the least room on its disk."""
    import shutil
    import tempfile

    free = {folder: shutil.disk_usage(folder).free for folder in (str(Path.cwd()), tempfile.gettempdir())}
    folder = min(free, key=lambda folder: free[folder])
    return f"{free[folder] / 1e6:,.0f} MB are free in {folder}"


def _run(name: str, entry: str = "", section: str = "") -> None:
    """Run a stage, under its lock: `run` of the module that does its work. Its last line says what came of it.

    Args:
        entry: what a stage that runs once an entry of a `section` of params.yaml runs for.
    """
    from importlib import import_module

    from touchline.core import stage
    from touchline.core.progress import say

    paths, params = _project()
    arguments = [_known(params, entry, section)] if section else []
    with stage.running(paths, "@".join([name, *arguments])):
        result = import_module(STAGES[name]).run(paths, params, *arguments)
    say(f"{' '.join([name, *arguments])}: {result}")


@app.command()
def ingest(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be fetched, and fetch nothing")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="only check whether DVC can read the folder of photos, and name the problem")
    ] = False,
) -> None:
    """Fetch photos from the sources into data/photos."""
    if check:
        from touchline.data import decisions, forgotten
        from touchline.sources.received import check_for_dvc

        paths, params = _project()
        for file, columns in ((paths.forgotten, forgotten.COLUMNS), (paths.decisions, decisions.COLUMNS)):
            if not file.exists():
                name = paths.relative(file)
                raise TouchlineError(f"{name} is missing: `git checkout {name}`, or write the line {','.join(columns)}")
        check_for_dvc(paths.project / params.ingest.folder)
    elif dry_run:
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
    _run("features", name, "features")


@app.command()
def train(name: Annotated[str, typer.Argument(help="an entry of `models` in params.yaml")]) -> None:
    """Train one model."""
    _run("train", name, "models")


@app.command()
def evaluate() -> None:
    """Score every model on the test photos, beside baselines."""
    _run("evaluate")


@app.command()
def register() -> None:
    """Register the better model; make it champion if it passes the gates."""
    _run("register")


@app.command()
def audit(
    top: Annotated[int, typer.Option(help="how many of each problem the page shows", min=1)] = 24,
    who: Annotated[str, typer.Option(help="your name, for the lines that the page offers for decisions.csv")] = "",
) -> None:
    """Look for likely wrong labels, near-duplicates and outliers among the photos."""
    from touchline.commands import audit

    audit.run(*_project(), top, who)


@app.command()
def suggest(
    names: Annotated[list[str], typer.Argument(metavar="PHOTO|FOLDER|GLOB|-", help="as for `predict`")],
    count: Annotated[int, typer.Option(help="how many photos to suggest", min=1)] = 20,
    model: _Model = "",
    form: Annotated[Format, typer.Option("--format", help="json: an object a line")] = Format.table,
) -> None:
    """List the photos whose labels would teach the model most: doubtful, and unlike each other.

    Label them in `touchline app`, under Review. Photos that the project already has are left out.
    """
    from touchline.commands import suggest

    suggest.run(*_project(), names, model, count, form.value)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an entry of `models` in params.yaml")],
    trials: Annotated[
        int, typer.Option(help="how many finished trials the study should have, earlier runs included", min=1)
    ] = 30,
    apply: Annotated[bool, typer.Option("--apply", help="write the best values into params.yaml")] = False,
    seed: Annotated[int, typer.Option(help="seed of the search", min=0)] = 42,
) -> None:
    """Search for the hyperparameters with the lowest validation loss; print the `dvc exp run` of the best trial.

    The values in params.yaml are tried first. An interrupted search continues where it stopped. To run two trials at a
    time, start the command twice: both work on the same study.
    """
    from touchline.commands import tune

    paths, params = _project()
    tune.run(paths, params, _known(params, model, "models"), trials, seed, apply=apply)


@app.command()
def predict(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTO|CLIP|FOLDER|GLOB|ADDRESS|CAMERA|-",
            help="ADDRESS: rtsp:// or http://; CAMERA: a number; -: names of photos from stdin, one a line",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="a version, an alias, a run, a model of params.yaml or a .keras file (default: the champion)"
        ),
    ] = "",
    form: Annotated[Format, typer.Option("--format", help="json: an object a line")] = Format.table,
    explain: Annotated[
        bool, typer.Option("--explain", help="save a heat map of what the model looked at as <photo>.touchline.jpg")
    ] = False,
    record: _Record = False,
    record_photos: _RecordPhotos = False,
    every: Annotated[float, typer.Option(help="video: seconds from one frame to the next", min=0.01)] = 1.0,
    window: Annotated[
        int, typer.Option(help="video: frames that an answer is averaged over; an odd number", min=1)
    ] = 5,
    seconds: Annotated[
        float | None, typer.Option(help="video: how much to classify (default: all; a stream: until Ctrl-C)", min=0.01)
    ] = None,
    frames: Annotated[
        bool, typer.Option("--frames", help="video: one answer per frame instead of per passage")
    ] = False,
) -> None:
    """Classify photos, or the frames of a video, with the champion.

    In a folder, files that are not images are skipped; if it has clips and no photos, the clips are classified. For a
    video the result is a table of passages with the same label. Exit code 1: some photos or clips could not be read;
    they are named, and the others are classified.
    """
    from touchline.commands import predict, video

    if clips := video.find(names):
        if record or record_photos:
            raise ParamsError("--record works for photos, not for videos: leave it out")
        sampling = video.Sampling(every, window, seconds)
        video.run(*_project(), clips, model, form.value, sampling, frames=frames, explain=explain)
    else:
        predict.run(*_project(), names, model, form.value, explain=explain, record=record, record_photos=record_photos)


@app.command()
def export(
    form: Annotated[
        Target, typer.Option("--format", help="saved_model and openvino are folders; onnx needs the extra `onnx`")
    ],
    model: _Model = "",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="must not exist yet (default: exports/<name of the model>)")
    ] = None,
) -> None:
    """Export a model for programs without Keras, and check that both give the same answers on the test photos.

    Exit code 1: the answers differ; nothing is written.
    """
    from touchline.commands import export

    export.run(*_project(), model, form.value, output)


@app.command()
def drift(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="PHOTO|FOLDER|GLOB|-", help="default: drift.folder in params.yaml"),
    ] = None,
) -> None:
    """Check whether photos still look like the champion's training photos; write reports/drift.html.

    Exit code 0: no drift; 3: drift; 4: too few photos to tell; 1 and 2: no comparison was possible. Photos that cannot
    be read are named, and the others are compared.
    """
    from touchline.commands import drift

    raise typer.Exit(drift.EXIT_CODES[drift.run(*_project(), names or [])])


@app.command()
def monitor() -> None:
    """Check how well the champion does in use, from answers kept by `serve --record`; write reports/monitor.html.

    Exit code 0: no warning; 3: warning; 4: too few photos to tell; 1 and 2: there is no champion, or no project.
    """
    from touchline.commands import monitor

    raise typer.Exit(monitor.EXIT_CODES[monitor.run(*_project())])


@app.command()
def promote(version: Annotated[int, typer.Argument(help="version of the registered model", min=1)]) -> None:
    """Make a version champion by hand."""
    from touchline.tracking import registry

    store, name = _store()
    if version not in (known := [found.number for found in registry.versions(store, name)]):
        existing = ", ".join(map(str, known)) or "none"
        raise TouchlineError(f"{name} has no version {version} (existing: {existing}): see `touchline registry list`")
    registry.promote(store, name, version)
    print(f"version {version} of {name} is champion")


@app.command()
def rollback() -> None:
    """Make the previous champion champion again. `register` will not undo this; `promote` can."""
    from touchline.tracking import registry

    store, name = _store()
    print(f"version {registry.rollback(store, name)} of {name} is champion again")


@registry.command("list")
def list_versions() -> None:
    """List the registered versions: model, accuracies, aliases, and why each was promoted or not."""
    from rich.console import Console
    from rich.table import Table

    from touchline.tracking import registry
    from touchline.tracking.runs import REASON

    store, name = _store()
    table = Table("version", "model", "validation", "test", "aliases", "why", title=name, title_justify="left")
    for found in registry.versions(store, name):
        tags = found.tags
        accuracies = (
            f"{float(tags[key]):.3f}" if key in tags else "" for key in ("validation/accuracy", "test/accuracy")
        )
        why = tags.get(REASON, "")
        if found.rolled_back:
            why = f"rolled back on {found.rolled_back[:10]}; before: {why}"
        table.add_row(str(found.number), tags.get("touchline.model", ""), *accuracies, ", ".join(found.aliases), why)
    if table.row_count:
        Console().print(table)
    else:
        print(f"{name} has no version yet: `make run` makes one")


@registry.command("compare")
def compare_versions(
    first: Annotated[str, typer.Argument(metavar="VERSION", help="number or alias")],
    second: Annotated[str, typer.Argument(metavar="VERSION", help="number or alias")],
) -> None:
    """Compare two versions on recorded photos that both answered; write reports/compare.html."""
    from touchline.commands import compare

    compare.run(*_project(), first, second)


@registry.command("sync")
def sync() -> None:
    """Restore missing runs, versions and the champion in the store from the project's files."""
    from touchline.tracking import sync

    paths, params = _project()
    for line in sync.sync(paths, params.register_.name):
        print(line)


@app.command()
def mlflow(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: _Port = 5000,
) -> None:
    """Open the MLflow UI on the project's store, until Ctrl-C."""
    from touchline.core import ports
    from touchline.tracking import client

    ports.bound(host, port).close()
    paths, params = _project()
    settings = client.server_settings(paths, ports.trusted_hosts(host, port))
    page = client.runs_page(paths, params.register_.name)
    print(f"MLflow UI: http://{host}:{port}{page} (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port),
        # One worker is enough for one person; each takes 0.3 GB.
        "--workers", "1",
        # Otherwise any client could write files to ./mlartifacts.
        "--no-serve-artifacts",
        # MLflow's default server, uvicorn, includes its AI assistant, which lets any client on this machine, without a
        # login, name a language model whose answers it runs as commands. gunicorn serves MLflow without it. Threads,
        # because browsers keep idle connections open; no time limit, because starting takes longer on a busy machine.
        "--gunicorn-opts", "--threads 8 --timeout 0 --no-control-socket",
    ]  # fmt: skip
    # Replaces this process, so that ending it ends the server. MLflow warns about every use of gunicorn.
    os.execve(command[0], command, os.environ | settings | {"PYTHONWARNINGS": "ignore::FutureWarning"})


@app.command()
def serve(
    model: _Model = "",
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    allowed_host: _Allowed = None,
    record: _Record = False,
    record_photos: _RecordPhotos = False,
    shadow: Annotated[
        str,
        typer.Option(help="a second model, named as for --model: it classifies the same photos, and is only recorded"),
    ] = "",
    canary: Annotated[
        float,
        typer.Option(help="share of photos answered by --shadow (default: the challenger); recorded", min=0, max=1),
    ] = 0.0,
) -> None:
    """Classify photos over HTTP until Ctrl-C: `curl --data-binary @photo.jpg http://127.0.0.1:8000/predict`."""
    from touchline.commands import serve

    paths, params = _project()
    serve.run(
        paths, params, model, host, port, allowed_host or (),
        record=record, record_photos=record_photos, shadow=shadow, canary=canary,
    )  # fmt: skip


@app.command("app")
def try_models(
    host: _Host = "127.0.0.1",
    port: _Port = 7860,
    model: Annotated[str, typer.Option(help="model shown first, as for `predict` (default: the champion)")] = "",
    allowed_host: _Allowed = None,
    who: Annotated[str, typer.Option(help="your name, for decisions.csv (default: your login)")] = "",
) -> None:
    """Serve a page to try the models, correct their answers and review doubtful photos, until Ctrl-C."""
    from getpass import getuser

    from touchline.commands import app
    from touchline.core import ports

    ports.bound(host, port).close()
    app.run(*_project(), model, host, port, allowed_host or (), who or getuser())


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be deleted, and delete nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    days: Annotated[
        int,
        typer.Option("--older-than", metavar="DAYS", help="age at which runs and exported models count as old", min=1),
    ] = 90,
) -> None:
    """Delete what the project no longer needs, after showing it and asking.

    These are half-written files, features no longer in params.yaml, old exported models, records of answers beyond
    monitor.keep_days and monitor.keep_megabytes, copies left by killed experiments, unused objects in DVC's cache
    (`dvc gc`), and runs in MLflow (`mlflow gc`) that you deleted or that ended long ago, unless a registered version, a
    model in models/ or a DVC experiment needs them. Photos, data/decisions.csv and downloads are never deleted. To
    start over, use `make clean`.
    """
    from touchline.commands import clean

    clean.run(*_project(), days, dry_run=dry_run, yes=yes)


@app.command()
def forget(
    photos: Annotated[
        list[str] | None,
        typer.Argument(metavar="PHOTO|DIGEST", help="a file, or the first 8 or more digits of a photo's sha256"),
    ] = None,
    author: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="all photos of an author (name or page), including later ones; can be repeated"
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="the photo from there: its origin in data/photos.csv, its URL or its page; can be repeated",
        ),
    ] = None,
    remote: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="also delete from this DVC remote all that this workspace does not need; can be repeated",
        ),
    ] = None,
    retire: Annotated[
        bool,
        typer.Option(
            "--retire", help="remove networks that learned from it from params.yaml, instead of training them again"
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove photos permanently: from data, reports, DVC's cache, MLflow, and the models that learned from them.

    It shows its plan and asks, runs `dvc repro` without the photos, deletes old versions that learned from them,
    searches for what is left, and writes a receipt to reports/forgotten/. data/forgotten.csv keeps the photos from
    coming back. To continue after an interruption, run it again. Exit code 1: something is left, and is named.
    """
    from touchline.commands import forget

    forget.run(*_project(), photos or (), author or (), origin or (), remote or (), retire=retire, yes=yes)


@app.command()
def preset(name: Annotated[str, typer.Argument(help="fast, best or article")]) -> None:
    """Write a preset's features and models into params.yaml; everything else in it stays."""
    from touchline.commands import presets
    from touchline.core.editing import set_values
    from touchline.core.paths import Paths

    set_values(Paths.here().workspace / "params.yaml", presets.changes(name))
    print(f"params.yaml has the features and models of '{name}': `dvc repro` trains them")


@app.command()
def describe(
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="default: data/croissant.json, which `split` writes too")
    ] = None,
) -> None:
    """Write Croissant metadata of the photos: files, subsets, classes, licences, sources, labels, biases."""
    from touchline.commands import describe

    describe.run(*_project(), output)


@app.command()
def card(
    version: Annotated[
        int | None, typer.Argument(help="of the registered model (default: the champion)", min=1, show_default=False)
    ] = None,
) -> None:
    """Show the model card of a version: data, figures with intervals, slices, limits, licences, cost."""
    from touchline.commands import card

    card.run(*_project(), version)


@app.command()
def summary() -> None:
    """Show the last run in a table: models, intervals, seconds, decision, where to look."""
    from touchline.commands import summary

    summary.show(*_project())


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
    print(f"to fetch: {known:,.0f} MB at most" + (f", and {unknown} of unknown size" if unknown else ""))


def _store() -> "tuple[Store, str]":
    from touchline.tracking.runs import open_store

    paths, params = _project()
    return open_store(paths, params.register_.name), params.register_.name


def _known(params: "Params", name: str, section: str) -> str:
    """`name`, if the section of params.yaml has it."""
    known = getattr(params, section)
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
