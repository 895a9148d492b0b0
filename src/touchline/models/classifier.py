"""A model that can be asked, found by the name that a person gives it, and its answer to one photo.

A photo is decoded as for training, by `photos.decode`. `predict`, `serve`, `app` and `drift` all ask through this
module, so that one photo has one answer.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_json
from touchline.core.params import Params, PredictParams
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data import photos, rights
from touchline.models import explain
from touchline.models.engines import Explain, Forward, Network
from touchline.models.inference import ModelFiles
from touchline.models.reference import Reference, Similar

if TYPE_CHECKING:
    import keras

    from touchline.tracking.runs import StoredModel

UNSURE, UNKNOWN = "unsure", "unknown"


@dataclass(frozen=True)
class Classifier:
    """A model that can be asked.

    Attributes:
        network: the model, ready to run: uint8 (n, side, side, 3) to probabilities (n, len(classes)).
        classes: what the probabilities are of, in their order.
        name: what people call it: `rugby-soccer version 3`, `models/cnn.keras`.
        files: where it lies.
        reference: what photos of something else are told by; None where the model has none, or it is switched off.
        licences: of the photos that it learned from, as `rights.names` has them; None where its version
            does not tell.
    """

    network: Network
    classes: list[str]
    name: str
    files: ModelFiles
    reference: Reference | None = None
    licences: tuple[str, ...] | None = None

    @property
    def side(self) -> int:
        return self.network.side

    @cached_property
    def model(self) -> "keras.Model":
        """The Keras model, whose first use starts TensorFlow."""
        return self.files.load()

    @property
    def forward(self) -> Forward:
        """Turns photos into the rows that `answer` takes: probabilities, then features if the model has a reference."""
        return self.network.described if self.reference and self.network.described else self.network.forward

    def similarities(self, rows: np.ndarray) -> np.ndarray | list[None]:
        """Similarity of each row's photo to the training photos; None for each if the model has no reference."""
        if not self.reference or not len(rows):  # rows of a batch in which no photo could be read have no width
            return [None] * len(rows)
        return self.reference.similarity(rows[:, len(self.classes) :])

    def answer(self, row: np.ndarray, similar: float | None, params: PredictParams) -> "Answer":
        """The answer for the row of one photo.

        Args:
            row: of `forward`, float32, shape (classes,) or (classes + channels,).
            similar: its number from `similarities`, which is quickest for many rows at once.

        Raises:
            TouchlineError: the row has numbers that are not finite, because training went wrong.
        """
        probabilities = row[: len(self.classes)]
        best = int(probabilities.argmax())
        confidence = float(probabilities[best])
        if not np.isfinite(row).all():
            raise TouchlineError("the model's probabilities are no numbers: train it again, or use --model")
        label = self.classes[best] if confidence >= params.min_confidence else UNSURE
        similarity = percentile = None
        if self.reference and similar is not None and params.unknown_share is not None:
            similarity, percentile = round(float(similar), 4), round(self.reference.percentile(similar), 1)
            if similar < self.reference.threshold(params.unknown_share):
                label = UNKNOWN
        rounded = [round(float(value), 6) for value in probabilities]
        of_each = dict(zip(self.classes, rounded, strict=True))
        return Answer(label, self.classes[best], rounded[best], of_each, similarity, percentile)

    def nearest(self, row: np.ndarray, among: Collection[str], count: int = 3) -> list[Similar]:
        """The training photos that the photo of a row resembles most; see `Reference.nearest`."""
        return self.reference.nearest(row[len(self.classes) :], count, among) if self.reference else []

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
        label: the guess; `unknown` where the photo is too unlike the training photos, else `unsure` where the
            guess's confidence is too low.
        guess: the likeliest class.
        confidence: its probability.
        probabilities: of each class.
        similarity: to the training photos, -1 to 1; None where the model does not tell it, see `Reference`.
        percentile: how many of a hundred training photos are less similar to the others.
    """

    label: str
    guess: str
    confidence: float
    probabilities: dict[str, float]
    similarity: float | None = None
    percentile: float | None = None


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
    return found if params.predict.unknown_share is None else with_reference(found)


def resolve_to_serve(paths: Paths, params: Params, wanted: str = "") -> Classifier:
    """As `resolve`; also raises TouchlineError if `rights.serve` does not allow the photos it learned from."""
    found = resolve(paths, params, wanted)
    licences, record = found.licences, found.files.model.with_suffix(".json")
    if licences is None and record.is_file() and paths.split_table.is_file():
        digests = read_json(record).get("training_photos", [])
        rows = rights.learned_from(paths, digests)
        licences = (*rights.names(rows), *([""] if len(rows) < len(digests) else []))
    rights.check_served(found.name, licences, params)
    return found


def with_reference(found: Classifier) -> Classifier:
    """A model with its reference; if it has none, a line says so."""
    reference = found.files.read_reference() if found.network.described else None
    if reference is None:
        say(f"{found.name} has no reference to training photos, so it calls no photo `unknown`: `make run` makes one")
    return replace(found, reference=reference)


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
        found = from_stored(stored, f"{name} version {version.number}", params.compute.engine)
        noted = version.tags.get(runs.LICENCES)
        return replace(found, licences=tuple(json.loads(noted))) if noted else found
    if not wanted:
        raise registered.no_champion(name, known, option=True)
    raise ParamsError(
        f"there is no model {wanted}: name a version or alias of {name}, a run, a model of params.yaml "
        f"({', '.join(params.models)}) or a .keras file"
    )


def from_stored(stored: "StoredModel", name: str, engine: str) -> Classifier:
    """The model of the store that people call `name`."""
    files = ModelFiles(
        stored.file, stored.model_sha256, stored.openvino, stored.openvino_sha256, "`make run` logs a model again",
        stored.reference, stored.reference_sha256,
    )  # fmt: skip
    return Classifier(files.network(engine), stored.classes, name, files)


def pixels(content: bytes, side: int, max_megapixels: float) -> np.ndarray:
    """A photo as the model wants it, RGB uint8 (side, side, 3), if it is fit to be judged.

    Raises:
        TouchlineError: why not. OpenCV fills what is cut off with grey, and a model would judge the grey.
    """
    if flaw := photos.flaw(content):
        raise TouchlineError("cut off") if flaw == "cut off" else NotAnImage(flaw)
    header = photos.header(content)
    if header.width * header.height > 1e6 * max_megapixels:
        raise TouchlineError(f"{header.width} x {header.height} pixels are more than validate.max_megapixels")
    return photos.decode(content, side)
