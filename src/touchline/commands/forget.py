"""`touchline forget`: removes photos, or all photos of an author, from the project and from the models trained on them.

The plan is shown first. It is then noted permanently in `data/forgotten.csv`, and in a file that is deleted at the end,
so that an interrupted run can be continued: every step can safely be repeated. docs/data-card.md lists what is out of
reach.
"""

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline import sources
from touchline.commands import clean
from touchline.commands.forget_search import Traces, files, search, thumbnails
from touchline.commands.predict import OVERLAY
from touchline.core import extensions
from touchline.core.editing import remove_entries
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_json, read_table, sha256, write_bytes, write_json, write_table
from touchline.core.params import HeadParams, Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data import decisions, feature_store, forgotten, layout, served
from touchline.data.forgotten import Forgotten, author_digest, origin_digest, same_author
from touchline.data.similarity import near_duplicates
from touchline.models import engines

if TYPE_CHECKING:
    from touchline.tracking.removal import Learned

_Row = Mapping[str, str]
# Columns of a table of photos that name its author and where it came from.
_NAMES = ("author", "author_page", "origin", "landing_page")


@dataclass
class Task:
    """What is to be forgotten, and what was found before anything was deleted; kept until everything is done.

    Attributes:
        photos: sha256 of each photo's file.
        origins: [source, origin] of each.
        authors: names and pages of authors none of whose photos may come back.
        names: other names of the photos and their authors, without those that photos which stay have too.
        pictures: sha256 of the photo, by the sha256 of each of its thumbnails.
        models: those in the MLflow store that learned from one of the photos (`Learned`).
        places: how many files held each photo, by folder and sha256.
        figures: each model's scores on the test photos, before the removal.
    """

    photos: list[str] = field(default_factory=list)
    origins: list[list[str]] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, dict[str, int]] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def gone(self) -> Forgotten:
        """The same, as digests for `data/forgotten.csv`."""
        return Forgotten(
            frozenset(self.photos),
            frozenset(origin_digest(*origin) for origin in self.origins),
            frozenset(map(author_digest, self.authors)),
        )

    @property
    def traces(self) -> Traces:
        return Traces({photo: photo for photo in self.photos} | self.pictures, self.names)


def run(
    paths: Paths,
    params: Params,
    photos: Sequence[str],
    authors: Sequence[str],
    origins: Sequence[str],
    remotes: Sequence[str],
    *,
    retire: bool,
    yes: bool,
) -> None:
    """Show what would be removed, ask, remove it, search again, and write `reports/forgotten/<time>.json`.

    Without photos, authors and origins, continue an interrupted run; if there is none, remove from this machine the
    photos that `data/forgotten.csv` lists.

    Args:
        photos: files, or the first 8 or more digits of their sha256.
        authors: names, or addresses of their pages.
        origins: as in data/photos.csv, or addresses of a photo or of its page.
        remotes: DVC remotes to remove the photos from too.
        retire: remove networks that learned from them from params.yaml, instead of training them again.
        yes: do not ask.

    Raises:
        TouchlineError: something does not exist or is ambiguous, a stage, flow or other program is running, a tool
            fails, or something is left. The next run continues.
    """
    import typer
    from filelock import FileLock, Timeout

    began = time.monotonic()
    if paths.workspace != paths.project:
        raise TouchlineError(f"{paths.workspace} is a copy of {paths.project}: run `touchline forget` there")
    known = _remotes(paths)
    if unknown := [remote for remote in remotes if remote not in known]:
        raise ParamsError(f"--remote {unknown[0]}: DVC has no such remote (existing: {', '.join(known) or 'none'})")
    if remotes and not _cache(paths).is_relative_to(paths.project):
        raise ParamsError(
            f"--remote: this project shares DVC's cache {_cache(paths)} with others, whose files would be deleted too: "
            "run `dvc gc --cloud` with `--projects` yourself"
        )
    paths.locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(_note(paths).with_suffix(".lock")).acquire(timeout=0):
            task = _task(paths, params, photos, authors, origins)
            retired = _retired(paths, params, task) if retire else []
            _show(paths, params, task, retired, remotes, known)
            if not yes and not (sys.stdin.isatty() and typer.confirm("Remove this for good?")):
                say("nothing was removed: to remove this, run again with --yes")
                return
            write_json(_note(paths), asdict(task))
            _remove(paths, params, task, retired)
            unreached = _collect(paths, remotes)
            _conclude(paths, params, task, unreached, [remote for remote in known if remote not in remotes], began)
    except Timeout:
        raise TouchlineError("`touchline forget` is running in this project: wait until it has ended") from None


def _note(paths: Paths) -> Path:
    """The task at hand. The file names people, so it is deleted at the end."""
    return paths.project / ".dvc/tmp/forget.json"


# What is meant


def _task(paths: Paths, params: Params, photos: Sequence[str], authors: Sequence[str], origins: Sequence[str]) -> Task:
    """What was asked for, with what an interrupted run left to do."""
    task = Task(**read_json(_note(paths))) if _note(paths).exists() else Task()
    pending = bool(task.photos or task.authors)
    if pending:
        say("going on with an interrupted run")
    rows = [*_rows(paths), *_offered(paths, params, authors, origins)]
    found = [row for name in photos for row in _rows_of_photo(paths, rows, name, task)]
    for name in authors:
        written, theirs = _of_author(rows, name, task)
        task.authors += [each for each in written if each not in task.authors]
        found += theirs
    for origin in origins:
        found += _of_origin(paths, rows, origin, task)
    if not (photos or authors or origins or pending):
        # Forgotten elsewhere: of an author this machine may have other photos.
        gone = forgotten.read(paths.forgotten)
        if not gone:
            raise ParamsError("name a photo, --author or --origin: nothing is left to do")
        task.photos = sorted(gone.photos)
        found += [row for row in rows if gone.has(*(row.get(key, "") for key in ("source", "origin", *_NAMES[:2])))]
    digests = {row["sha256"] for row in found} - set(task.photos)
    # The same bytes may have several origins or classes.
    found = [row for row in rows if row["sha256"] in {*digests, *task.photos}]
    task.photos += sorted(digests)
    task.origins = _unique([*task.origins, *([row["source"], row["origin"]] for row in found if row.get("source"))])
    staying = {row[name] for row in rows if row["sha256"] not in task.photos for name in _NAMES if name in row}
    named = {row[name] for row in found for name in _NAMES if row.get(name)}
    named |= {row["url"] for row in found if row.get("url")}
    # Of the authors' other photos nothing is left to name them; but someone may be called as a class is.
    task.names = sorted({*task.names, *named} - staying - {*params.classes, *extensions.sources()})
    for photo, file in _files_of(paths, set(task.photos) - set(task.pictures.values()), photos).items():
        task.pictures |= dict.fromkeys(thumbnails(file.read_bytes()), photo)
    _find(paths, params, task)
    return task


def _unique(pairs: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(pair) for pair in dict.fromkeys(map(tuple, pairs))]


def _rows(paths: Paths) -> list[_Row]:
    """Rows about photos, of the current tables and of those in DVC's cache from earlier commits."""
    tables = [paths.photos_table, paths.ledger]
    for file in _cache(paths).glob("files/md5/??/*"):
        with file.open("rb") as content:
            if content.read(26).startswith(b"path,class,source,sha256,"):
                tables.append(file)
    rows: list[_Row] = [
        row for table in tables if table.exists() for row in read_table(table, dtype=str).to_dict("records")
    ]
    if paths.journal.exists():
        lines = [json.loads(line) for line in paths.journal.read_text().splitlines() if line.endswith("}")]
        rows += [{"sha256": line["sha256"], "url": line["url"]} for line in lines if line.get("sha256")]
    rows += [
        {"sha256": file.stem, "source": "feedback", "origin": file.name}
        for file in paths.feedback.glob("*")
        if re.fullmatch(r"[0-9a-f]{64}", file.stem) and file.suffix != ".json"
    ]
    return rows


def _offered(paths: Paths, params: Params, authors: Sequence[str], origins: Sequence[str]) -> Iterator[_Row]:
    """What sources on this disk have by these authors and from these origins, also where `ingest` leaves it out."""
    wanted = {same_author(author) for author in authors} - {""}
    for source in sources.chosen(params) if wanted or origins else ():
        for each in source.offers(paths, params) if not source.network else ():
            if each.read and (
                wanted & {same_author(each.author), same_author(each.author_page)}
                or {each.origin, each.landing_page} & {*origins}
            ):
                facts = {key: getattr(each, key) for key in ("source", *_NAMES)}
                yield {"sha256": hashlib.sha256(each.read()).hexdigest(), **facts}


def _rows_of_photo(paths: Paths, rows: Sequence[_Row], name: str, task: Task) -> list[_Row]:
    """The rows of a photo that is named by a file or by digits."""
    file = Path(name)
    start = sha256(file) if file.is_file() else file.stem.lower() if "photos" in file.parts else name.lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", start):
        raise ParamsError(f"{name} is neither a file nor the first 8 or more digits of a photo's sha256")
    known = {row["sha256"] for row in rows} | set(task.photos) | forgotten.read(paths.forgotten).photos
    digests = {digest for digest in known if digest.startswith(start)}
    if not digests:  # never taken, but asked about
        asked = served.read(paths.served, columns=["photo"])["photo"]
        digests = {digest for digest in asked if digest.startswith(start)}
    if not digests:  # only its bytes are left, of a commit whose tables are gone
        places = [paths.project / "data", _cache(paths)]
        files = (path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink())
        digests = {digest for digest in map(sha256, filter(_is_photo, files)) if digest.startswith(start)}
    if len(digests) > 1:
        raise ParamsError(f"{name} is the beginning of {len(digests)} photos' sha256: write more digits")
    if not digests:
        raise TouchlineError(
            f"{name}: no such photo in this project; if it is in an older commit, run `dvc fetch` there first"
        )
    return [row for row in rows if row["sha256"] in digests] or [{"sha256": digest} for digest in digests]


def _is_photo(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(layout.format_of(file.read(64)))


def _of_author(rows: Sequence[_Row], name: str, task: Task) -> tuple[list[str], list[_Row]]:
    """All spellings of an author's names and pages, and their rows. Two names with the same page are one author."""
    if not name.strip():
        raise ParamsError("--author is empty: give the digests of photos without an author")
    wanted = {same_author(name)}
    while True:
        theirs = [row for row in rows if wanted & {same_author(row.get(key, "")) for key in _NAMES[:2]}]
        pages = {same_author(row["author_page"]) for row in theirs if row.get("author_page")}
        if pages <= wanted:
            break
        wanted |= pages
    if not theirs and name not in task.authors:
        authors = sorted({row["author"] for row in rows if row.get("author")})
        close = get_close_matches(name, authors, 3) or ["none"]
        raise TouchlineError(
            f"--author {name}: no photo has this author; similar names in data/photos.csv: {', '.join(close)}"
        )
    written = {row[key] for row in theirs for key in _NAMES[:2] if row.get(key)}
    return sorted({name, *written}), theirs


def _of_origin(paths: Paths, rows: Sequence[_Row], origin: str, task: Task) -> list[_Row]:
    wanted = {row["sha256"] for row in rows if origin in {row.get(key) for key in ("origin", "landing_page", "url")}}
    if not wanted and origin not in task.names:
        raise TouchlineError(
            f"--origin {origin}: no photo came from there; see the columns origin and landing_page of "
            f"{paths.relative(paths.photos_table)}"
        )
    return [row for row in rows if row["sha256"] in wanted]


def _files_of(paths: Paths, photos: Collection[str], given: Sequence[str]) -> dict[str, Path]:
    """One file with the bytes of each photo, where one exists."""
    stems = {photo[:16] for photo in photos}
    ours = [*paths.photos.glob("*/*"), *paths.spare.glob("*"), *paths.feedback.glob("*")]
    near = [*(file for file in ours if file.stem[:16] in stems), *map(Path, given)]
    found = {digest: file for file in near if file.is_file() and (digest := sha256(file)) in photos}
    # Photos of earlier commits may have a file only in DVC's cache.
    for file in _cache(paths).glob("files/md5/??/*") if len(found) < len(photos) else ():
        if file.is_file() and (digest := sha256(file)) in photos:
            found.setdefault(digest, file)
    return found


def _find(paths: Paths, params: Params, task: Task) -> None:
    """Add to the task where the photos are and which models learned from them; keep what an interrupted run found."""
    known = {model["model_id"] for model in task.models}
    task.models += [asdict(each) for each in _learned(paths, params, task.photos) if each.model_id not in known]
    for place, count in _places(paths, _search(paths, task)).items():
        task.places.setdefault(place, {}).update(
            {photo: number for photo, number in count.items() if photo not in task.places.get(place, {})}
        )
    task.figures = task.figures or _figures(paths)


def _search(paths: Paths, task: Task) -> dict[Path, set[str]]:
    return search(paths, task.traces, [paths.forgotten, paths.reports / "forgotten", _note(paths)])


def _places(paths: Paths, found: Mapping[Path, Collection[str]]) -> dict[str, dict[str, int]]:
    """How many files hold each photo, by folder, without deeper folders and names of files, which may name people."""
    counts: dict[str, Counter[str]] = {}
    for file, photos in found.items():
        place = "/".join(file.relative_to(paths.project).parent.parts[:2]) or "."
        counts.setdefault(place, Counter()).update(photo or "a name" for photo in photos)
    return {place: dict(count) for place, count in counts.items()}


def _learned(paths: Paths, params: Params, photos: Collection[str]) -> "list[Learned]":
    from touchline.tracking import client, removal, runs

    if client.is_own(paths) and not client.database(paths).exists():
        return []
    return removal.learned_from(runs.open_store(paths, params.register_.name), photos)


def _figures(paths: Paths) -> dict[str, dict[str, float]]:
    file = paths.reports / "metrics.json"
    models = read_json(file)["models"] if file.exists() else {}
    keys = ("accuracy", "log_loss")
    return {name: {key: found[key] for key in keys if key in found} for name, found in models.items()}


def _retired(paths: Paths, params: Params, task: Task) -> list[str]:
    """The models of params.yaml that learned from one of the photos and that no head alone makes again."""
    files = {name: paths.models / f"{name}.json" for name in params.models if not _refits(params, name)}
    learned = [
        name
        for name, file in files.items()
        if file.exists() and not set(task.photos).isdisjoint(read_json(file)["training_photos"])
    ]
    if set(learned) == set(params.models):
        raise ParamsError("--retire would leave no model in params.yaml: run without it, and they are trained again")
    return learned


def _refits(params: Params, name: str) -> bool:
    """Whether a model is a head on frozen features, which is refitted in seconds."""
    model = params.models.get(name)
    return isinstance(model, HeadParams) and not model.fine_tune.blocks


def _show(
    paths: Paths, params: Params, task: Task, retired: Collection[str], remotes: Sequence[str], known: Sequence[str]
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("where", title=f"photos to forget: {len(task.photos):,}", title_justify="left")
    table.add_column("files", justify="right")
    table.add_column("what happens", overflow="fold")
    again = "made again without it"
    happens = {"data": again, "data/features": again, "models": again, "reports": again, "reports/figures": again}
    for place, count in task.places.items():
        table.add_row(escape(place), f"{sum(count.values()):,}", happens.get(place, "deleted"))
    current = {
        read_json(file)["model_sha256"]: file.stem
        for name in params.models
        if (file := paths.models / f"{name}.json").exists()
    }
    for model in task.models:
        versions = ", ".join(f"version {number} of {name}" for name, number in model["versions"]) or "no version"
        aliases = f" ({', '.join(model['aliases'])})" if model["aliases"] else ""
        name = current.get(model["model_sha256"])
        then = "deleted with its files"
        if name in retired:
            then += f", and {name} leaves params.yaml"
        elif name:
            made = "refitted" if _refits(params, name) else "trained again"
            then = f"{made} without it; the new version must pass the gates; this one is {then}"
        table.add_row(f"MLflow: {escape(model['model'])}", "", f"{versions}{aliases}: {then}")
    table.add_row("MLflow: pictures", "", "JPEGs and pages of all runs are deleted; those of the new report stay")
    table.add_row("DVC's cache", "", "`dvc gc --workspace`: older commits and experiments can no longer be checked out")
    for remote in known:
        happens_there = f"`dvc gc --workspace --cloud --remote {remote}`: only what this workspace needs stays there"
        table.add_row(f"remote {escape(remote)}", "", happens_there if remote in remotes else "stays: not in --remote")
    Console().print(table)
    for digest in task.photos[:10]:
        say(f"photo {digest[:16]}")
    if len(task.photos) > 10:
        say(f"and {len(task.photos) - 10:,} more")
    if alike := _alike(paths, params, task):
        say(f"near-duplicates stay, unless you name them too: {', '.join(photo[:16] for photo in alike)}")


def _alike(paths: Paths, params: Params, task: Task) -> list[str]:
    """Photos that stay although they are near-duplicates, by their perceptual hash."""
    if not paths.validated_table.exists():
        return []
    table = read_table(paths.validated_table)
    digests, bits = table["sha256"].tolist(), params.split.near_duplicate_bits
    pairs = [
        (digests[first], digests[second]) for first, second in near_duplicates(table["perceptual_hash"].tolist(), bits)
    ]
    return sorted(
        {other for pair in pairs for one, other in (pair, pair[::-1]) if one in task.photos} - set(task.photos)
    )


# What is done


def _remove(paths: Paths, params: Params, task: Task, retired: Sequence[str]) -> None:
    forgotten.add(paths.forgotten, task.gone)
    with clean.alone(paths):
        _delete_files(paths, params, task)
    if retired:
        remove_entries(paths.workspace / "params.yaml", [f"models.{name}" for name in retired])
    if paths.photos_table.exists():
        _repro(paths)
    with clean.alone(paths):
        _delete_files(paths, params, task)
    _remove_from_mlflow(paths, params, task)


def _heat_maps(paths: Paths) -> list[Path]:
    return [file for file in files(paths.project) if file.name.endswith(OVERLAY)]


def _delete_files(paths: Paths, params: Params, task: Task) -> None:
    """Delete what no stage makes again."""
    gone = forgotten.read(paths.forgotten)
    for name in extensions.sources():
        if source := sources.named(name):
            source.forget(paths, params, gone)
    stems = {photo[:16] for photo in task.photos}
    for file in [*paths.photos.glob("*/*"), *paths.spare.glob("*")]:
        if file.stem in stems:
            file.unlink()
    # Heat maps are drawn beside photos.
    for file in (paths.project / "data").rglob(f"*{OVERLAY}"):
        if not file.with_name(file.name.removesuffix(OVERLAY)).exists():
            file.unlink()
    _delete_rows(paths, params, task)
    for file in served.files(paths.served):
        _delete_answers(file, task.photos)
    _delete_history(paths.project / ".prefect/prefect.db", task)
    for model in task.models:
        engines.discard(model["model_sha256"])
    for folder in paths.features.glob("*"):
        listed = {digest for file in folder.glob("*.txt") for digest in file.read_text().split()}
        if folder.name not in params.features and not listed.isdisjoint(task.photos):
            feature_store.remove(folder)
    # Pages that no stage writes: run `touchline audit`, `drift` or `dvc plots` again for new ones.
    made = (paths.workspace / "dvc.yaml").read_text()
    pages = [file for file in paths.reports.glob("*") if file.is_file() and f"reports/{file.name}" not in made]
    for file in pages:
        if file.suffix == ".html" or task.traces.of(file.read_bytes()):
            file.unlink()
    experiments = paths.project / ".dvc/tmp/exps"
    copies = [*experiments.glob("tmp*"), *experiments.glob("standalone/tmp*")]
    for place in (
        *copies,
        *(clean.exported(paths) if task.models else []),
        paths.project / ".prefect/clone",
        paths.project / "dvc_plots",
    ):
        if place.exists():
            clean.delete(place)


def _delete_rows(paths: Paths, params: Params, task: Task) -> None:
    """Take the photos out of the ledger, the journal of downloads, and what people decided of single photos."""
    if paths.ledger.exists():
        table = read_table(paths.ledger, dtype=str)
        left = table[~table["sha256"].isin(task.photos)]
        if len(left) < len(table):
            write_table(paths.ledger, left)
    if paths.journal.exists():
        lines = paths.journal.read_bytes().splitlines(keepends=True)
        urls = [name.encode() for name in task.names if "://" in name]
        marks = [photo.encode() for photo in task.photos] + [json.dumps(url.decode()).encode() for url in urls]
        kept = [line for line in lines if not any(mark in line for mark in marks)]
        if len(kept) < len(lines):
            write_bytes(paths.journal, b"".join(kept))
    traces = task.traces
    decisions.forget(paths.decisions, params.classes, task.photos, lambda text: bool(traces.of(text.encode())))


def _delete_answers(file: Path, photos: Collection[str]) -> None:
    """Delete what a record of use has of the photos: rows of every table with a column `photo`."""
    with _changing(file) as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if any(column[1] == "photo" for column in database.execute(f'PRAGMA table_info("{table}")')):
                with database:
                    query = f'DELETE FROM "{table}" WHERE photo = ?'  # noqa: S608 - a name of the file's own  # nosec B608
                    database.executemany(query, [(photo,) for photo in photos])


def _delete_history(file: Path, task: Task) -> None:
    """Delete lines of flows' logs, and artifacts, that name the photos: stages say which photos they left out."""
    if not file.exists():
        return
    traces = task.traces
    with _changing(file) as database:
        database.create_function("names_one", 1, lambda text: bool(text and traces.of(str(text).encode())))
        for table, column in (("log", "message"), ("artifact", "data"), ("artifact_collection", "data")):
            if database.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", [table]).fetchone():
                with database:
                    database.execute(f"DELETE FROM {table} WHERE names_one({column})")  # noqa: S608  # nosec B608 - our words


@contextmanager
def _changing(file: Path) -> Iterator[sqlite3.Connection]:
    """A database in which deleted rows are overwritten, not only marked."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=20)) as database:
            database.execute("PRAGMA secure_delete = ON")
            yield database
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise TouchlineError(
            f"{file} cannot be changed ({error}): end the program that writes it, or delete it, then run again"
        ) from None


def _repro(paths: Paths, *arguments: str) -> None:
    """Run `dvc repro`, which says itself what it does."""
    # Stages run `touchline`, also where the environment of this one is not activated.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", *arguments],
        cwd=paths.workspace, env=os.environ | {"PATH": programs}, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode:
        raise TouchlineError("`dvc repro` failed (see above): fix that, then run `touchline forget` to continue")


def _remove_from_mlflow(paths: Paths, params: Params, task: Task) -> None:
    from touchline.tracking import client, registry, removal, runs

    if client.is_own(paths) and not client.database(paths).exists():
        return
    name = params.register_.name
    store = runs.open_store(paths, name)
    models = [removal.Learned(**model) for model in task.models]
    if models:
        removal.remove(paths, store, name, models)
    was = any(registry.CHAMPION in model.aliases and any(name == of for of, _ in model.versions) for model in models)
    if was and paths.photos_table.exists() and registry.alias(store, name, registry.CHAMPION) is None:
        # The new model lost against the old champion, which is deleted now; the other gates still apply.
        _repro(paths, "--force", "--single-item", "register")
    removal.remove_pictures(store, paths.reports)


def _collect(paths: Paths, remotes: Sequence[str]) -> list[str]:
    """Delete from DVC's cache and remotes what the workspace does not need. Returns what could not be reached."""
    if not _cache(paths).is_relative_to(paths.project):
        return [f"DVC's cache {_cache(paths)}, which other projects share: see `dvc gc --projects`"]
    clean.dvc(paths.project, "gc", "--workspace", "--force")
    unreached = []
    for remote in remotes:
        try:
            clean.dvc(paths.project, "gc", "--workspace", "--cloud", "--remote", remote, "--force")
        except TouchlineError as error:
            unreached.append(f"remote {remote}, where `dvc gc` failed: {error}")
    return unreached


@cache
def _cache(paths: Paths) -> Path:
    """DVC's cache."""
    return Path(clean.dvc(paths.project, "cache", "dir").strip()).resolve()


def _remotes(paths: Paths) -> list[str]:
    return [line.split()[0] for line in clean.dvc(paths.project, "remote", "list").splitlines() if line.strip()]


# What is left


def _conclude(
    paths: Paths, params: Params, task: Task, unreached: Sequence[str], not_asked: Sequence[str], began: float
) -> None:
    """Search again, write the receipt, and delete the note unless something is left to do."""
    from touchline.tracking import registry, runs

    left = _search(paths, task)
    still = _learned(paths, params, task.photos)
    champion = None
    if task.models:
        champion = registry.alias(
            runs.open_store(paths, params.register_.name), params.register_.name, registry.CHAMPION
        )
    beyond = [*unreached, *_out_of_reach(paths, params, task, not_asked)]
    receipt = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "photos": task.photos,
        "removed": task.places,
        "models": [
            {
                "model_sha256": model["model_sha256"],
                "versions": [f"{name} {number}" for name, number in model["versions"]],
                "aliases": model["aliases"],
                "what": "deleted, with its files",
            }
            for model in task.models
        ],
        "champion": champion and {"version": champion.number, "model_sha256": champion.model_sha256},
        "figures": {"before": task.figures, "after": _figures(paths)},
        "second_search": {"places": _places(paths, left), "models": [model.model_sha256 for model in still]},
        "out_of_reach": beyond,
    }  # fmt: skip
    file = paths.reports / "forgotten" / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.json"
    write_json(file, receipt)
    say(f"receipt: {paths.relative(file)}")
    for place in beyond:
        say(f"out of reach: {place}")
    if any("champion" in model["aliases"] for model in task.models) and champion is None:
        say("there is no champion now: no new model passed the gates; use `touchline promote` to choose one by hand")
    if left or still:
        names = ", ".join([*map(paths.relative, left), *(f"model {model.model_id} in MLflow" for model in still)][:5])
        raise TouchlineError(f"still found in {names}: delete these, then run `touchline forget` again")
    if unreached and any(line.startswith("remote ") for line in unreached):
        raise TouchlineError(f"{unreached[0]}: all else is done; run again when it answers, or without that --remote")
    _note(paths).unlink()
    say("nothing is left: commit the changes in data/forgotten.csv, data/decisions.csv, dvc.lock and params.yaml")


def _out_of_reach(paths: Paths, params: Params, task: Task, not_asked: Sequence[str]) -> Iterator[str]:
    if clean.in_git(paths.project):
        stems = "|".join(photo[:16] for photo in task.photos)
        found = subprocess.run(
            ["git", "log", "--all", "--format=%h", "--extended-regexp", f"-G{stems}", "--", "data/decisions.csv"],
            cwd=paths.project, capture_output=True, text=True, check=False,
        ).stdout.split()  # fmt: skip
        yield "git's history" + (f": data/decisions.csv names it in {', '.join(found[:10])}" if found else "")
    for remote in not_asked:
        yield f"remote {remote}: not in --remote"
    yield "copies of photos, models, pages or the whole project that others have; servers until they load the new model"
    for name, folder in (("folder", params.ingest.folder), ("imagenet", params.ingest.imagenet.folder)):
        place = (paths.project / folder).resolve()
        is_source = any(source == name for source, _ in task.origins)
        if is_source and not place.is_relative_to(paths.project.resolve()):
            yield f"{place}, which is outside the project: delete it there"
    if params.ingest.imagenet.origin == "ilsvrc2012" and any(source == "imagenet" for source, _ in task.origins):
        yield f"{params.ingest.imagenet.archive}: tars inside a tar are not searched"
    from touchline.tracking import client

    if not client.is_own(paths):
        yield f"{client.place_of(client.tracking_uri(paths))}: run `mlflow gc` where it is kept"
    if maps := _heat_maps(paths):
        yield f"{len(maps)} heat maps by `predict --explain`, the first {maps[0]}: the photos in them may show it"
