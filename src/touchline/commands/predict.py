"""`touchline predict`: what a model says of photos, to people and to programs.

`touchline.models.classifier` finds the model and makes the answer, here as for `serve`, `app` and `drift`.
"""

import csv
import errno
import glob
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO
from uuid import uuid4

import numpy as np

from touchline.core import parallel
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import no_formula, replacing, write_bytes
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import track
from touchline.data import photos, rights
from touchline.data.served import Asked, Recorder
from touchline.models import engines
from touchline.models import explain as explaining
from touchline.models.classifier import UNKNOWN, UNSURE, Answer, Classifier, NotAnImage, pixels, resolve
from touchline.models.engines import Forward, Network
from touchline.models.inference import BATCH, Row, answers, load_model

STDIN = "-"
# Behind the whole name: a.jpg and a.png may lie side by side.
OVERLAY = ".touchline.jpg"
# A file in a folder counts as a photo by its content; one that only has a photo's name is reported.
NAMED_AS_PHOTOS = {
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif",
}  # fmt: skip
_FIRST_BYTES = 2**16
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}

# A photo, why it has no pixels (None where it is another file that lies about), and what is recorded of it.
_What = tuple[Path, str | None, Asked | None]
# The photos of a batch, and what the model says of those that have pixels.
_Judged = tuple[list[Row[_What]], np.ndarray]


@dataclass(frozen=True)
class Found:
    """Something to read.

    Attributes:
        listed: it was not named, but lies in a folder that was; then it may be something other than a photo.
        error: why it cannot be read, where that is known already.
    """

    path: Path
    listed: bool = False
    error: str = ""


def run(
    paths: Paths,
    params: Params,
    names: Sequence[str],
    wanted: str,
    form: str,
    *,
    explain: bool,
    record: bool = False,
    record_photos: bool = False,
) -> None:
    """Write to stdout what a model says of each photo, in the order of `names`; all else goes to stderr.

    Args:
        names: see `find`.
        wanted: see `resolve`.
        form: `table`, `json` (an object a line) or `csv`.
        explain: draw a heat map beside each photo, `<name>.touchline.jpg`.
        record: keep a row of each photo; `record_photos`: and a thumbnail.

    Raises:
        TouchlineError: at the end, where a photo could not be read or drawn over (each was named when it came), or
            answers could not be recorded.
    """
    results = sys.stdout
    # Names of files are bytes, and leave as they came.
    if isinstance(results, io.TextIOWrapper):
        results.reconfigure(errors="surrogateescape")
    with redirect_stdout(sys.stderr):
        found: Iterable[Found] = find(names)
        total = None if STDIN in names else len(found := list(found))
        if total == 0:
            raise TouchlineError(f"no photo in {', '.join(map(shown, names))}")
        classifier = resolve(paths, params, wanted)
        counts, failed, unrecorded = Counter[str](), 0, Counter[str]()
        recorder = None
        if record or record_photos:
            model = classifier.name, classifier.files.model_sha256
            recorder = Recorder(paths.served, params.monitor, *model, keep_photos=record_photos)
            recorder.on_lost = lambda rows: unrecorded.update({"": rows})
        # Few need no bar; and on one terminal a bar would run through lines that come as it moves.
        few = total is not None and total <= BATCH
        with_bar = not few and not (results.isatty() and form != "table")

        def answered() -> Iterator[tuple[Path, Answer]]:
            nonlocal failed
            outcomes = _answered(paths, classifier, params, found, recorder, explain=explain)
            for outcome in track(outcomes, total, "predicting") if with_bar else outcomes:
                match outcome:
                    case Answer() as answer, path:
                        counts[answer.label] += 1
                        yield path, answer
                    case str() as error, path:
                        failed += 1
                        print(f"touchline: {shown(path)}: {error}")
                    case None, _:
                        counts[""] += 1

        with recorder or nullcontext():
            _WRITERS[form](results, classifier.classes, answered())
        results.flush()
        left_out = counts.pop("", 0)
        if (total or 2) > 1:
            labels = [label for label in dict.fromkeys([*classifier.classes, UNSURE, UNKNOWN]) if counts[label]]
            said = ", ".join(f"{label} {counts[label]:,}" for label in labels) or "none"
            print(f"{classifier.name}: {said}" + (f"; {left_out:,} other files left out" if left_out else ""))
    if failed:
        raise TouchlineError(f"{failed:,} failed, named above")
    if left_out and not counts:
        raise TouchlineError(f"no photo in {', '.join(map(shown, names))}: {left_out:,} other files left out")
    if unrecorded:
        raise TouchlineError(f"{unrecorded.total():,} answers could not be recorded in {paths.served}: see above")


def find(names: Sequence[str]) -> Iterator[Found]:
    """What to read, in the order of the names, each folder's in the order of its paths.

    Args:
        names: files; folders, of which all that is in and below them is meant, without what is hidden; patterns that
            no shell has filled in, where `**` is any depth; and `-`, which reads names, one a line, from stdin.
            What `--explain` drew is left out, unless it is the only name.

    Raises:
        ParamsError: stdin holds a photo where names are wanted.
    """
    for name in without_drawn(names):
        if name == STDIN:
            yield from _from_stdin()
        elif os.path.lexists(name) or not glob.has_magic(name):
            yield from _at(Path(name))
        elif matches := without_drawn(glob.glob(name, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute pattern
            for match in sorted(matches):
                yield from _at(Path(match))
        else:
            yield Found(Path(name), error="no file matches")


def without_drawn(names: Sequence[str]) -> Sequence[str]:
    """Several names, as a shell or a pattern gives them, without the pictures that an earlier `--explain` drew."""
    return names if len(names) == 1 else [name for name in names if not name.endswith(OVERLAY)]


def is_other(found: Found) -> bool:
    """Whether a file that is not an image lies in a folder beside photos, and nothing says that it was meant as one."""
    return found.listed and found.path.suffix.lower() not in NAMED_AS_PHOTOS


def _from_stdin() -> Iterator[Found]:
    for number, line in enumerate(sys.stdin.buffer):
        if number == 0 and photos.flaw(line) in {"", "cut off"}:
            raise ParamsError(
                f"{STDIN} reads names of photos, one a line, and stdin holds a photo itself: name its file"
            )
        if (name := os.fsdecode(line.rstrip(b"\r\n"))) and not name.endswith(OVERLAY):
            yield from _at(Path(name))


def _at(path: Path) -> Iterator[Found]:
    if not path.is_dir():
        yield Found(path)
        return
    unreadable: list[OSError] = []
    for folder, below, files in os.walk(path, onerror=unreadable.append):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and not name.endswith(OVERLAY) and file.is_file():
                yield Found(file, listed=True)
        for error in unreadable:
            yield Found(Path(error.filename), error=error.strerror or "cannot be read")
        unreadable.clear()
    for error in unreadable:
        yield Found(Path(error.filename), error=error.strerror or "cannot be read")


def _judged(
    found: Iterable[Found],
    forward: Forward,
    folder: Path,
    side: int,
    max_megapixels: float,
    record: Callable[[bytes, np.ndarray | None], Asked] | None = None,
    *,
    keep: bool,
) -> Iterator[_Judged]:
    """The photos, their pixels, and what the model says of those that have pixels.

    Args:
        folder: that relative paths hang on.
        record: gives what is recorded of a photo, if that is wanted.
        keep: whether the pixels are wanted afterwards.
    """
    read = partial(_read, folder=folder, side=side, max_megapixels=max_megapixels, record=record)
    for batch, rows in answers(forward, parallel.in_order(read, found)):
        yield (batch if keep else [(what, None) for what, _ in batch]), rows


@contextmanager
def _forward(paths: Paths, classifier: Classifier, scheduler: str, engine: str) -> Iterator[tuple[Forward, list[Path]]]:
    """What asks the model, here or on the workers of a cluster; and the file that these need for it."""
    if not scheduler:
        yield classifier.forward, []
        return
    # Workers may not reach the store; of its own name, so that no worker takes the model of another run for this one.
    source = classifier.files.file(engine)
    file = paths.locks / f"predict-{uuid4().hex}{source.suffix}"
    with replacing(file, file.suffix) as temporary:
        shutil.copyfile(source, temporary)
    try:
        yield partial(_ask, file, described=classifier.reference is not None), [file]
    finally:
        file.unlink(missing_ok=True)


def _ask(file: Path, images: np.ndarray, *, described: bool) -> np.ndarray:
    network = parallel.kept(_loaded, file)
    return (network.described if described and network.described else network.forward)(images)


def _loaded(file: Path) -> Network:
    return engines.with_openvino(file) if file.suffix == engines.SUFFIX else engines.with_tensorflow(load_model(file))


def _read(
    found: Found,
    folder: Path,
    side: int,
    max_megapixels: float,
    record: Callable[[bytes, np.ndarray | None], Asked] | None = None,
) -> Row[_What]:
    if found.error:
        return (found.path, found.error, None), None
    try:
        content = photos.content_of(folder / found.path)
    except TouchlineError as error:
        return (found.path, str(error).removeprefix("photo "), None), None
    except OSError as error:
        return (found.path, error.strerror or "cannot be read", None), None
    except ValueError:  # a zero byte, which no name has
        return (found.path, "no name of a file", None), None
    square, flaw = None, ""
    try:
        square = pixels(content, side, max_megapixels)
    except TouchlineError as error:
        if isinstance(error, NotAnImage) and is_other(found):
            return (found.path, None, None), None
        flaw = str(error).removeprefix("photo ")
    return (found.path, flaw, record(content, square) if record else None), square


def _answered(
    paths: Paths,
    classifier: Classifier,
    params: Params,
    found: Iterable[Found],
    recorder: Recorder | None = None,
    *,
    explain: bool,
) -> Iterator[tuple[Answer | str | None, Path]]:
    """The answer for each photo, or why there is none; None for another file that lies about in a folder."""
    draw = _overlays(classifier, rights.files(paths, params)) if explain else None
    scheduler = parallel.scheduler(params)
    with _forward(paths, classifier, scheduler, params.compute.engine) as (forward, reads):
        work = partial(
            _judged, forward=forward, folder=Path.cwd(), side=classifier.side,
            max_megapixels=params.validate_.max_megapixels, keep=explain, record=recorder.asked if recorder else None,
        )  # fmt: skip
        for batch, rows in parallel.spread(work, found, scheduler, BATCH, reads):
            similar = classifier.similarities(rows)
            made = [classifier.answer(*each, params.predict) for each in zip(rows, similar, strict=True)]
            readable = [(path, image) for (path, *_), image in batch if image is not None]
            drawn = iter(draw(readable, made, rows) if draw and readable else ())
            said = iter(made)
            for (path, error, asked), _ in batch:
                answer = next(said) if error == "" else None
                if recorder and asked:
                    recorder.add(asked, vars(answer) if answer else error or "", wait=True)
                if answer:
                    yield answer, path
                    if draw and (failure := next(drawn)):
                        yield failure, path
                elif scheduler and error == os.strerror(errno.ENOENT) and path.exists():
                    raise parallel.not_shared("a Dask worker", path)
                else:
                    yield error, path


def _overlays(
    classifier: Classifier, shown_photos: Mapping[str, Path]
) -> Callable[[list[tuple[Path, np.ndarray]], list[Answer], np.ndarray], Iterator[str]]:
    """What draws the heat maps of a batch beside its photos, and says of each why that failed, or nothing.

    Args:
        shown_photos: training photos that may stand beside them, by digest.
    """
    explainer = classifier.explainer()

    def draw(of: tuple[Path, Answer, np.ndarray, np.ndarray]) -> str:
        path, answer, heat, row = of
        target = path.with_name(path.name + OVERLAY)
        guess = f"{answer.guess} {answer.confidence:.0%}"
        try:
            caption = guess if answer.label == answer.guess else f"{answer.label} ({guess})"
            similar = [(shown_photos[each.sha256], each.label) for each in classifier.nearest(row, shown_photos)]
            return save_overlay(target, explaining.overlay(path.read_bytes(), heat, caption, similar))
        except OSError as error:  # the photo is gone
            return f"no overlay beside it ({error.strerror})"

    def batch(readable: list[tuple[Path, np.ndarray]], answers: list[Answer], rows: np.ndarray) -> Iterator[str]:
        labels = np.array([classifier.classes.index(answer.guess) for answer in answers])
        heats = explainer(np.stack([image for _, image in readable]), labels)
        paths = (path for path, _ in readable)
        return parallel.in_order(draw, list(zip(paths, answers, heats, rows, strict=True)))

    return batch


def save_overlay(target: Path, content: bytes) -> str:
    """Write what `explain` drew, and say why that failed, or nothing; a file of another's stays as it is.

    Raises:
        OSError: the disk is full.
    """
    try:
        if target.exists():
            with target.open("rb") as file:
                if not explaining.is_overlay(file.read(_FIRST_BYTES)):
                    return f"{shown(target)} was not written by --explain, so it is kept: move it away"
        write_bytes(target, content)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        return f"no overlay beside it ({error.strerror})"
    return ""


def _write_table(results: IO[str], classes: Sequence[str], answers: Iterable[tuple[Path, Answer]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("photo", overflow="fold")
    for name in ("label", "confidence", *classes, "similarity", "percentile"):
        table.add_column(Text(name), justify="left" if name == "label" else "right")
    for path, answer in answers:
        label = Text(answer.label, style="yellow" if answer.label in (UNSURE, UNKNOWN) else "bold")
        numbers = [f"{value:.3f}" for value in (answer.confidence, *answer.probabilities.values())]
        if answer.similarity is not None:
            numbers += [f"{answer.similarity:.3f}", f"{answer.percentile:.1f}"]
        table.add_row(Text(shown(path)), label, *numbers)
    # Without a terminal, no line is folded: rich would take 80 columns.
    if table.row_count:
        Console(file=results, width=None if results.isatty() else 10_000).print(table)


def _write_json(results: IO[str], _: Sequence[str], answers: Iterable[tuple[Path, Answer]]) -> None:
    for path, answer in answers:
        results.write(json.dumps({"photo": str(path), **vars(answer)}, allow_nan=False) + "\n")


def _write_csv(results: IO[str], classes: Sequence[str], answers: Iterable[tuple[Path, Answer]]) -> None:
    probabilities = (f"probability:{name}" for name in classes)
    results.write(csv_line(["photo", "label", "guess", "confidence", *probabilities, "similarity", "percentile"]))
    for path, answer in answers:
        numbers = [answer.confidence, *answer.probabilities.values(), answer.similarity, answer.percentile]
        results.write(csv_line([str(path), answer.label, answer.guess, *numbers]))


def csv_line(values: Sequence[object]) -> str:
    """A line of a CSV file, without texts that a spreadsheet would take for formulas."""
    # Told to end lines with \n alone, csv would put no quotes round a \r, and one name would be two rows.
    line = io.StringIO(newline="")
    csv.writer(line).writerow([no_formula(value) if isinstance(value, str) else value for value in values])
    return line.getvalue().removesuffix("\r\n") + "\n"


_WRITERS = {"table": _write_table, "json": _write_json, "csv": _write_csv}


def shown(path: Path | str) -> str:
    """A name as a terminal and a page can show it: control characters would be obeyed, bytes that are no text torn."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in str(path))
