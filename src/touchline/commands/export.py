"""`touchline export`: a model in a format that other programs run, checked against Keras before it counts as done."""

import hashlib
import importlib.util
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.commands.export_formats import FORMATS, Format
from touchline.core import parallel
from touchline.core.errors import ParamsError, TouchlineError, one_line
from touchline.core.files import read_table, replacing
from touchline.core.params import Params, SampleParams
from touchline.core.paths import Paths
from touchline.data import photos
from touchline.models import engines
from touchline.models.classifier import Classifier, resolve
from touchline.models.engines import Forward
from touchline.models.inference import BATCH
from touchline.sources import sample

if TYPE_CHECKING:
    import keras

# Of a probability. Sums in another order differ by about 1e-6; a layer that was converted wrongly, by far more.
TOLERANCE = 1e-4
PHOTOS = 64
_TIMED_SECONDS = 1.0


def run(paths: Paths, params: Params, wanted: str, form: str, output: Path | None) -> None:
    """Write a model in a format, and print how it compares with Keras.

    Args:
        wanted: see `classifier.resolve`.
        form: a key of FORMATS.
        output: the file (of `saved_model` and `openvino` the folder) to make; None for `exports/<name of the model>`.

    Raises:
        ParamsError: there is something at `output`.
        TouchlineError: a package is missing, the model cannot be had or converted, or the result answers differently
            from Keras; then nothing is left at `output`.
    """
    target = FORMATS[form]
    missing = [name for name in target.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise TouchlineError(
            f"--format {form} needs {' and '.join(missing)}, not installed here: run `pip install 'touchline[{form}]'`"
        )
    if output is not None:
        _refuse_existing(output, paths)
    classifier = resolve(paths, params, wanted)
    if output is None:
        # Not in models/: DVC tells by that folder whether to judge the models again.
        output = paths.exports / (_file_name(classifier) + target.ending)
        _refuse_existing(output, paths)
        paths.exports.mkdir(exist_ok=True)
    images, what = _photos(paths, classifier.side)
    keras_forward = engines.with_tensorflow(classifier.model).forward
    expected = _answers(keras_forward, images)
    if not np.isfinite(expected).all():
        raise TouchlineError(
            f"{classifier.name} answers with NaN or infinity: train it again, or name another with --model"
        )

    try:
        with _new_folder(output) if target.folder else replacing(output, target.ending) as draft:
            _write(target, classifier, draft, form)
            forward = target.load(draft)
            found = _answers(forward, images)
            difference = float(np.abs(found - expected).max())
            # Written so that NaN is refused too.
            if not difference <= TOLERANCE:
                raise TouchlineError(
                    f"the {form} export of {classifier.name} differs from Keras by {difference:.2g} in a probability, "
                    f"over {what}; {TOLERANCE:g} is allowed: nothing was written"
                )
            rows = {
                "Keras": (_keras_megabytes(classifier.model), keras_forward),
                target.engine: (_megabytes(draft), forward),
            }
            timed = {
                engine: (size, *(_milliseconds(each, images, batch) for batch in (1, BATCH)))
                for engine, (size, each) in rows.items()
            }
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise TouchlineError(f"{output} cannot be written ({error.strerror}): name another --output") from None
    _show(f"{classifier.name} as {form}", timed)
    equal = int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
    print(f"{what}: largest difference of a probability {difference:.1e}, equal labels {equal} of {len(images)}")
    print("photos of something else are not told from the classes: exports have no reference to the training photos")
    print(f"written: {paths.relative(output.absolute())}")


def _refuse_existing(output: Path, paths: Paths) -> None:
    if os.path.lexists(output):
        shown = paths.relative(output.absolute())
        raise ParamsError(f"{shown} exists: delete it, or name another file with --output")


def _file_name(classifier: Classifier) -> str:
    name = classifier.name.removesuffix(".keras")
    return re.sub(r"[^\w.-]+", "-", re.split(r"[/\\]", name)[-1])


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Like `files.replacing`, for a new folder: yields a path in a temporary folder, moved if all goes well.

    The temporary folder is not named like a partial file, because those are expected to be files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        draft = Path(folder, path.name)
        yield draft
        draft.rename(path)


def _photos(paths: Paths, side: int) -> tuple[np.ndarray, str]:
    """Photos to compare on, uint8 (n, side, side, 3), and what they are.

    Test photos of the project; drawn scenes where it has none.
    """
    if paths.split_table.is_file():
        split = read_table(paths.split_table)
        files = (paths.workspace / path for path in split.loc[split["subset"] == "test", "path"])
        # Named by digest: in this order classes are mixed, and a second export is compared on the same ones.
        found = sorted((file for file in files if file.is_file()), key=lambda file: file.name)[:PHOTOS]
        if found:
            read = parallel.in_order(lambda file: photos.read(file, side), found)
            return np.stack(list(read)), f"{len(found)} test photos of {paths.relative(paths.split_table)}"
    scenes = islice(sample.candidates(SampleParams(per_class=PHOTOS, seed=0), ["rugby", "soccer"]), PHOTOS)
    drawn = (scene.read for scene in scenes if scene.read)
    read = parallel.in_order(lambda draw: photos.decode(draw(), side), drawn)
    return np.stack(list(read)), f"{PHOTOS} drawn scenes (the project has no test photos)"


def _answers(forward: Forward, images: np.ndarray) -> np.ndarray:
    """Probabilities, shape (n, classes): the first photo alone, the others in batches, the last of which is smaller."""
    return np.concatenate([forward(batch) for batch in np.split(images, range(1, len(images), BATCH))])


def _milliseconds(forward: Forward, images: np.ndarray, batch: int) -> float:
    """Of a photo, when so many are asked about at once: the median of a second's runs, and of at least three."""
    images = np.resize(images, (batch, *images.shape[1:]))
    forward(images)
    took: list[float] = []
    while len(took) < 3 or sum(took) < _TIMED_SECONDS:
        began = time.perf_counter()
        forward(images)
        took.append(time.perf_counter() - began)
    return 1000 * float(np.median(took)) / batch


def _megabytes(path: Path) -> float:
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def _keras_megabytes(model: "keras.Model") -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        return _megabytes(Path(folder))


def _show(title: str, rows: dict[str, tuple[float, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", title=Text(title), title_justify="left")
    for heading in ("MB", "ms a photo, alone", f"ms a photo, {BATCH} at once"):
        table.add_column(heading, justify="right")
    for engine, numbers in rows.items():
        table.add_row(engine, *(f"{number:,.1f}" for number in numbers))
    Console().print(table)


def _about(classifier: Classifier) -> dict[str, Any]:
    """What a program must know to use the model, and which one it is.

    `weights_sha256` is the same for the same weights, whatever the format.
    """
    digest = hashlib.sha256()
    for weight in classifier.model.weights:
        digest.update(weight.numpy().tobytes())
    side = classifier.side
    return {
        "classes": classifier.classes,
        "image_size": side,
        "input": f"uint8 RGB, turned upright, the whole photo squashed to {side} x {side}",
        "model": classifier.name,
        "unknown": "not told: exports have no reference to the training photos",
        "weights_sha256": digest.hexdigest(),
    }


def _write(target: Format, classifier: Classifier, draft: Path, form: str) -> None:
    try:
        with warnings.catch_warnings():
            # Keras asks NumPy for a name that is no more, for the sake of tf2onnx.
            warnings.filterwarnings("ignore", category=FutureWarning, module="keras")
            target.write(classifier.model, draft)
    except OSError:
        raise
    except Exception as error:  # the converters raise many kinds
        raise TouchlineError(
            f"{classifier.name} cannot be converted to {form} ({one_line(error)}): try another --format"
        ) from None
    target.describe(draft, _about(classifier))
