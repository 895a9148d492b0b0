"""The registered model as MLflow loads it, even if this package is not installed: photos in, probabilities out.

This module and what it imports (`tracking.runs.CODE`) are logged with each model, so that photos are decoded by the
same code as in training. It needs Keras, NumPy, OpenCV and Pillow.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from touchline.core.errors import TouchlineError
from touchline.data import photos


class PhotoModel:
    """A Keras model of photos, for `mlflow.pyfunc`.

    Args:
        path: a .keras file. It takes uint8 RGB, shape (n, side, side, 3), and gives probabilities, shape (n, classes).
    """

    def __init__(self, path: str | Path) -> None:
        import keras

        self._network = keras.models.load_model(path, safe_mode=True, compile=False)
        self._side = self._network.input_shape[1]

    def predict(self, given: Any) -> np.ndarray:
        """The probabilities of each photo, float32, shape (n, classes).

        Args:
            given: the bytes of image files, or base64 text of them: one, a list, an array, or a table of one column.
                Or pixels: integers from 0 to 255, RGB, shape (n, side, side, 3).

        Raises:
            TouchlineError: a photo cannot be decoded, or `given` is something else.
        """
        return self._network.predict(pixels(given, self._side), verbose=0)


def pixels(given: Any, side: int) -> np.ndarray:
    """The input of `PhotoModel.predict` as uint8 RGB, shape (n, side, side, 3)."""
    if hasattr(given, "columns"):
        if len(given.columns) != 1:
            raise TouchlineError(
                f"the table has {len(given.columns)} columns: give one column, with the bytes of image files"
            )
        given = given.iloc[:, 0]
    if isinstance(given, bytes | str):
        given = [given]
    rows = list(given)
    if all(isinstance(row, bytes | str) for row in rows):
        decoded = [photos.decode(_content(row, f"photo {n}"), side, f"photo {n}") for n, row in enumerate(rows)]
        return np.array(decoded, np.uint8).reshape(-1, side, side, 3)
    try:
        array = np.asarray(rows)
    except ValueError:  # rows of several shapes
        array = np.empty(0)
    if array.shape[1:] != (side, side, 3) or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise TouchlineError(
            "the input is neither bytes of image files nor pixels: give bytes (in JSON: base64), or integers from 0 to "
            f"255, RGB, of shape (n, {side}, {side}, 3)"
        )
    return array.astype(np.uint8)


def _content(row: bytes | str, name: str) -> bytes:
    if isinstance(row, bytes):
        return row
    try:
        # Some encoders break the text into lines.
        return base64.b64decode("".join(row.split()), validate=True)
    except ValueError:
        raise TouchlineError(f"{name} is not base64: send the bytes of an image file as base64") from None


def _load_pyfunc(path: str) -> PhotoModel:
    """MLflow's entry point."""
    return PhotoModel(path)
