"""Photos through a network, batch by batch: for features, for judging models and for predictions alike."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError, one_line
from touchline.core.files import RENEW, read_json, sha256
from touchline.core.progress import track
from touchline.core.tensorflow import import_tensorflow
from touchline.data import photos
from touchline.models import engines
from touchline.models.engines import Forward, Network
from touchline.models.reference import SUFFIX as REFERENCE
from touchline.models.reference import Reference

if TYPE_CHECKING:
    import keras

T = TypeVar("T")
Row = tuple[T, np.ndarray | None]
BATCH = 32


@dataclass(frozen=True)
class ModelFiles:
    """A whole model on disk.

    Attributes:
        model: the `.keras` file.
        model_sha256: its digest; empty where no record has it.
        openvino: the network file for OpenVINO; None for a model from before there were any.
        openvino_sha256: its digest.
        remedy: what to do about a file that cannot be read.
        reference: what photos of something else are told by; None for a model from before there was any.
        reference_sha256: its digest.
    """

    model: Path
    model_sha256: str = ""
    openvino: Path | None = None
    openvino_sha256: str = ""
    remedy: str = RENEW
    reference: Path | None = None
    reference_sha256: str = ""

    @classmethod
    def at(cls, path: Path) -> "ModelFiles":
        """Those of the `.keras` file at `path`, by the record that training wrote beside it, if there is one.

        Raises:
            TouchlineError: the file is missing.
        """
        if not path.exists():
            raise TouchlineError(f"{path} is missing: run `dvc repro`, or `dvc checkout` to get it from the cache")
        record = path.with_suffix(".json")
        known = read_json(record) if record.is_file() else {}
        known = known if isinstance(known, dict) else {}

        def beside(suffix: str, digest: str) -> tuple[Path | None, str]:
            file = path.with_suffix(suffix)
            return (file, known[digest]) if digest in known and file.is_file() else (None, "")

        openvino, reference = beside(engines.SUFFIX, "openvino_sha256"), beside(REFERENCE, "reference_sha256")
        return cls(path, known.get("model_sha256", ""), *openvino, RENEW, *reference)

    def load(self) -> "keras.Model":
        """The Keras model.

        Raises:
            TouchlineError: the file is no model, or not the one that its record describes; code that a file brings
                along is not run.
        """
        _check(self.model, self.model_sha256, self.remedy)
        import_tensorflow()
        import keras

        try:
            return keras.models.load_model(self.model, safe_mode=True, compile=False)
        except Exception as error:  # a torn zip, a bad config, a refused layer: Keras raises many kinds
            raise TouchlineError(f"{self.model} is no readable model ({one_line(error)}): {self.remedy}") from None

    def network(self, engine: str) -> Network:
        """The model, ready to run.

        Args:
            engine: as `compute.engine` has it. For OpenVINO, the network file of a model that has none is made on first
                use, and kept in this user's cache.

        Raises:
            TouchlineError: as `load`.
        """
        if engines.chosen(engine) == engines.TENSORFLOW:
            return engines.with_tensorflow(self.load())
        return engines.with_openvino(self.file(engine))

    def read_reference(self) -> Reference | None:
        """What photos of something else are told by, where the model has it.

        Raises:
            TouchlineError: the file cannot be read, or is not the one that its record describes.
        """
        if self.reference is None:
            return None
        _check(self.reference, self.reference_sha256, self.remedy)
        return Reference.load(self.reference)

    def file(self, engine: str) -> Path:
        """The file that an engine reads, once its digest is known to be right."""
        _check(self.model, self.model_sha256, self.remedy)
        if engines.chosen(engine) == engines.TENSORFLOW:
            return self.model
        if self.openvino:
            _check(self.openvino, self.openvino_sha256, self.remedy)
            return self.openvino
        return engines.cached(sha256(self.model), lambda draft: engines.convert(self.load(), draft), self.model.name)


def _check(path: Path, expected: str, remedy: str) -> None:
    if expected and sha256(path) != expected:
        raise TouchlineError(f"{path} is not the file that its record describes: {remedy}")


def load_model(path: Path) -> "keras.Model":
    """A whole Keras model from its file; see `ModelFiles`."""
    return ModelFiles.at(path).load()


def answers(forward: Forward, rows: Iterable[Row[T]]) -> Iterator[tuple[list[Row[T]], np.ndarray]]:
    """Rows as many at a time as `BATCH`, in their order; the next are asked for when these have been dealt with.

    Args:
        rows: whatever tells a photo, and its pixels, uint8 (side, side, 3); None where it has none.

    Yields:
        The rows of a batch, and what the network makes of those that have pixels, float32, shape (n, outputs).
    """
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        images = [pixels for _, pixels in batch if pixels is not None]
        yield batch, forward(np.stack(images)) if images else np.empty((0, 0), np.float32)


def predict(
    network: Network, files: Sequence[Path], what: str = "photos", forward: Forward | None = None
) -> tuple[np.ndarray, float]:
    """Class probabilities of photos, decoded beside computing, as many at a time as `BATCH`.

    Args:
        forward: what else to ask than the network's own `forward`.

    Returns:
        float32 rows, shape (len(files), classes or what `forward` gives); and seconds from files to rows.
    """
    size, forward = network.side, forward or network.forward
    began = time.perf_counter()
    rows = parallel.in_order(lambda path: (path, photos.read(path, size)), files)
    found = [batch for _, batch in answers(forward, track(rows, len(files), f"predicting with {what}"))]
    return np.concatenate(found), time.perf_counter() - began
