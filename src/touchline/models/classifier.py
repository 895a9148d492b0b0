"""A model that can be asked, found by the name that a person gives it, and its answer to one photo.

A photo is decoded as for training, by `photos.decode`. `predict`, `serve`, `app` and `drift` all ask through this
module, so that one photo has one answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_json
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data import photos
from touchline.models import explain
from touchline.models.engines import Explain, Network
from touchline.models.inference import ModelFiles

if TYPE_CHECKING:
    import keras

    from touchline.tracking.runs import StoredModel

UNSURE = "unsure"


@dataclass(frozen=True)
class Classifier:
    """A model that can be asked.

    Attributes:
        network: the model, ready to run: uint8 (n, side, side, 3) to probabilities (n, len(classes)).
        classes: what the probabilities are of, in their order.
        name: what people call it: `rugby-soccer version 3`, `models/cnn.keras`.
        files: where it lies.
    """

    network: Network
    classes: list[str]
    name: str
    files: ModelFiles

    @property
    def side(self) -> int:
        return self.network.side

    @cached_property
    def model(self) -> "keras.Model":
        """The Keras model, whose first use starts TensorFlow."""
        return self.files.load()

    def explainer(self) -> Explain:
        """What tells where in photos the model found a class; without gradients where those are not needed.

        Raises:
            TouchlineError: no layer of it turns a feature map into a vector.
        """
        return self.network.heat or explain.explainer(self.model)


@dataclass(frozen=True)
class Answer:
    """What a model says of one photo.

    Attributes:
        label: the guess, or `unsure` where its confidence is too low.
        guess: the likeliest class.
        confidence: its probability.
        probabilities: of each class.
    """

    label: str
    guess: str
    confidence: float
    probabilities: dict[str, float]

    @classmethod
    def of(cls, probabilities: np.ndarray, classes: Sequence[str], min_confidence: float) -> "Answer":
        """The answer that float32 `probabilities`, shape (classes,), come to.

        Raises:
            TouchlineError: they are no numbers, as those of a model whose training went wrong.
        """
        best = int(probabilities.argmax())
        confidence = float(probabilities[best])
        if not np.isfinite(confidence):
            raise TouchlineError("the model answers with no numbers: train it anew, or name another with --model")
        label = classes[best] if confidence >= min_confidence else UNSURE
        rounded = [round(float(value), 6) for value in probabilities]
        return cls(label, classes[best], rounded[best], dict(zip(classes, rounded, strict=True)))


class NotAnImage(TouchlineError):
    """The content of the file is something else."""


def resolve(paths: Paths, params: Params, wanted: str = "") -> Classifier:
    """The model that is asked for.

    Args:
        wanted: empty for the champion; else the number of a version, a model of params.yaml, an alias, the id of a run,
            or a `.keras` file with the `.json` beside it that training writes.

    Raises:
        ParamsError: `wanted` is none of these.
        TouchlineError: there is no champion yet, the model or its classes cannot be read, or it is no classifier of
            square photos.
    """
    engine = params.compute.engine
    if wanted in params.models:
        found = _from_file(paths.models / f"{wanted}.keras", paths, engine)
    elif wanted.endswith(".keras"):
        found = _from_file(Path(wanted), paths, engine)
    else:
        found = _from_store(paths, params, wanted)
    side, answers = found.network.input_shape, found.network.output_shape
    if len(side) != 4 or side[1] is None or side[1:] != (side[1], side[1], 3) or answers != (None, len(found.classes)):
        raise TouchlineError(
            f"{found.name} takes {side} and answers {answers}: not square RGB photos in and {len(found.classes)} "
            "probabilities out"
        )
    return found


def _from_file(path: Path, paths: Paths, engine: str) -> Classifier:
    network = (files := ModelFiles.at(path)).network(engine)
    record = path.with_suffix(".json")
    classes = read_json(record).get("classes") if record.is_file() else None
    if not classes:
        raise TouchlineError(f"the classes of {path} are not known: put {record.name} beside it, or run `dvc repro`")
    return Classifier(network, list(classes), paths.relative(path), files)


def _from_store(paths: Paths, params: Params, wanted: str) -> Classifier:
    from touchline.tracking import registered, runs
    from touchline.tracking.registry import CHAMPION

    name = params.register_.name
    if re.fullmatch(r"[0-9a-f]{32}", wanted):
        return from_stored(runs.model(runs.open_store(paths, name), wanted), f"run {wanted}", params.compute.engine)
    known = registered.versions(paths, name)
    if wanted.isdecimal():
        version = next((each for each in known if each.number == int(wanted)), None)
    else:
        version = next((each for each in known if (wanted or CHAMPION) in each.aliases), None)
    if version:
        stored = registered.model(paths, version)
        return from_stored(stored, f"{name} version {version.number}", params.compute.engine)
    if not wanted:
        raise TouchlineError(f"{name} has no champion yet: `make run` trains one, or name a model with --model")
    raise ParamsError(
        f"--model {wanted} is no version or alias of {name}, no run, no model of params.yaml "
        f"({', '.join(params.models)}) and no .keras file"
    )


def from_stored(stored: "StoredModel", name: str, engine: str) -> Classifier:
    """The model of the store that people call `name`."""
    files = ModelFiles(
        stored.file, stored.model_sha256, stored.openvino, stored.openvino_sha256, "`make run` logs a model again"
    )
    return Classifier(files.network(engine), stored.classes, name, files)


def pixels(content: bytes, side: int, max_megapixels: float) -> np.ndarray:
    """A photo as the model wants it, RGB uint8 (side, side, 3), if it is fit to be judged.

    Raises:
        TouchlineError: why not. OpenCV fills what is cut off with grey, and a model would judge the grey.
    """
    if not content:
        raise NotAnImage("empty file")
    if flaw := photos.flaw(content):
        raise TouchlineError("cut off") if flaw == "cut off" else NotAnImage(flaw)
    header = photos.header(content)
    if header.width * header.height > 1e6 * max_megapixels:
        raise TouchlineError(f"{header.width} x {header.height} pixels are more than validate.max_megapixels")
    return photos.decode(content, side)
