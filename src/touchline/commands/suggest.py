"""`touchline suggest`: the photos without a label whose labels would teach the model most.

A label is informative where the model is in doubt: its probabilities are close to each other, or the photo resembles
few training photos. For very similar photos, one label is nearly as informative as all of them (Settles, 2009, Active
Learning Literature Survey, section 3).
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from touchline.commands import predict, review
from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, write_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say, track
from touchline.data import forgotten, photos
from touchline.models.classifier import Answer, Classifier, NotAnImage, pixels, resolve
from touchline.models.inference import Row, answers
from touchline.sources import feedback

COLUMNS = ("photo", "sha256", "label", "guess", "confidence", "similarity", "percentile", "doubt")
# Path and digest of a photo, and why it is left out (None if that need not be reported); its pixels.
_Read = Row[tuple[Path, str, str | None]]


def run(paths: Paths, params: Params, names: Sequence[str], wanted: str, count: int, form: str) -> None:
    """Write the photos to label next to stdout and, for `touchline app`, to reports/suggested.csv.

    Args:
        names: see `predict.find`. Photos that the project already has, and copies, are left out.
        wanted: see `classifier.resolve`.
        count: of photos to suggest.
        form: `table`, `json` (an object a line) or `csv`.

    Raises:
        TouchlineError: all photos have labels already; or, at the end, some could not be read.
    """
    import pandas as pd

    results, failed = sys.stdout, 0
    with redirect_stdout(sys.stderr):
        classifier = resolve(paths, params, wanted)
        files, made, rows = list[tuple[Path, str]](), list[Answer](), list[np.ndarray]()
        found = list(predict.find(names))
        read = partial(_read, side=classifier.side, max_megapixels=params.validate_.max_megapixels)
        contents = track(parallel.in_order(read, found), len(found), "looking at photos")
        for batch, of_batch in answers(classifier.forward, _new(contents, _labelled(paths))):
            for path, _, error in (what for what, image in batch if image is None):
                if error:
                    failed += 1
                    say(f"touchline: {predict.shown(path)}: {error}")
            files += [(path, digest) for (path, digest, _), image in batch if image is not None]
            similar = classifier.similarities(of_batch)
            made += [classifier.answer(*each, params.predict) for each in zip(of_batch, similar, strict=True)]
            rows += list(of_batch)
        if not rows:
            raise TouchlineError(f"no photo without a label in {', '.join(map(predict.shown, names))}")
        doubts = doubt(*_told(classifier, made))
        picked = chosen(doubts, _features(classifier, np.stack(rows)), count)
        of_picked = [
            {
                "photo": str(files[at][0].absolute()), "sha256": files[at][1], **vars(made[at]),
                "doubt": round(float(doubts[at]), 4),
            }
            for at in picked
        ]  # fmt: skip
        table = pd.DataFrame(of_picked, columns=list(COLUMNS))
        write_table(paths.reports / review.SUGGESTED, table)
        _write(results, form, table.to_dict("records"))
        results.flush()
        say(
            f"chose {len(table):,} of {len(rows):,} photos without a label: label them in `touchline app`, under Review"
        )
    if failed:
        raise TouchlineError(f"{failed:,} failed, named above")


def doubt(probabilities: np.ndarray, percentiles: np.ndarray | None) -> np.ndarray:
    """How doubtful a model is about photos: 0 to 1, shape (n,).

    Args:
        probabilities: of the classes, shape (n, classes).
        percentiles: how many of a hundred training photos are less similar to the others, shape (n,); None if the model
            has no reference.

    Returns:
        The larger of two values: the entropy of the probabilities, scaled to 1 where all are equal; and the share of
        training photos that are more similar to the others than the photo is.
    """
    clipped = np.clip(probabilities, 1e-12, 1)
    entropy = -(clipped * np.log(clipped)).sum(axis=1) / np.log(clipped.shape[1])
    return entropy if percentiles is None else np.maximum(entropy, 1 - percentiles / 100)


def chosen(doubts: np.ndarray, features: np.ndarray, count: int) -> list[int]:
    """Positions of at most `count` photos: first the most doubtful one, then always the one with the highest product
    of doubt and dissimilarity to those already chosen.

    Args:
        doubts: shape (n,).
        features: of unit length, shape (n, channels).
    """
    picked: list[int] = []
    nearest = np.zeros(len(doubts))
    for _ in range(min(count, len(doubts))):
        worth = doubts * (1 - nearest)
        worth[picked] = -1
        picked.append(int(worth.argmax()))
        nearest = np.maximum(nearest, features @ features[picked[-1]])
    return picked


def _labelled(paths: Paths) -> set[str]:
    """Digests of the photos that have a label, or were forgotten."""
    known = set(read_table(paths.photos_table)["sha256"]) if paths.photos_table.is_file() else set()
    known |= forgotten.read(paths.forgotten).photos
    return known | {entry.sha256 for entry in feedback.entries(paths.feedback)}


def _new(rows: Iterable[_Read], known: Set[str]) -> Iterator[_Read]:
    """Photos without a label, each once, and files that could not be read."""
    seen = set(known)
    for row in rows:
        (_, digest, _), image = row
        if image is None or digest not in seen:
            yield row
        seen.add(digest)


def _read(found: predict.Found, side: int, max_megapixels: float) -> _Read:
    try:
        if found.error:
            raise TouchlineError(found.error)
        content = photos.content_of(found.path)
        return (found.path, hashlib.sha256(content).hexdigest(), None), pixels(content, side, max_megapixels)
    except NotAnImage as error:
        return (found.path, "", None if predict.is_other(found) else str(error)), None
    except (TouchlineError, OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).removeprefix("photo ")
        return (found.path, "", why or "cannot be read"), None


def _told(classifier: Classifier, made: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray | None]:
    probabilities = np.array([list(said.probabilities.values()) for said in made])
    percentiles = [said.percentile for said in made if said.percentile is not None]
    return probabilities, np.array(percentiles) if classifier.reference else None


def _features(classifier: Classifier, rows: np.ndarray) -> np.ndarray:
    """The vectors that photos are compared by: without a reference, their probabilities."""
    count = len(classifier.classes)
    if classifier.reference:
        return classifier.reference.described(rows[:, count:])
    return rows[:, :count] / np.linalg.norm(rows[:, :count], axis=1, keepdims=True)


def _write(results: IO[str], form: str, rows: Sequence[dict[str, Any]]) -> None:
    if form == "json":
        for row in rows:
            results.write(json.dumps(_plain(row), allow_nan=False) + "\n")
    elif form == "csv":
        for line in _lines(rows):
            results.write(line)
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("photo", "label", "guess")
        table.columns[0].overflow = "fold"
        for name in ("confidence", "doubt"):
            table.add_column(name, justify="right")
        for row in rows:
            texts = [Text(predict.shown(row[name])) for name in ("photo", "label", "guess")]
            table.add_row(*texts, f"{row['confidence']:.3f}", f"{row['doubt']:.3f}")
        Console(file=results, width=None if results.isatty() else 10_000).print(table)


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield predict.csv_line(COLUMNS)
    for row in rows:
        yield predict.csv_line([_plain(row)[name] for name in COLUMNS])


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None where pandas has NaN."""
    return {name: None if value != value else value for name, value in row.items()}  # noqa: PLR0124
