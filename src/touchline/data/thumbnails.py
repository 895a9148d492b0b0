"""Small copies of photos for pages."""

import base64
from pathlib import Path

import numpy as np

from touchline.data import photos


def thumbnail(photo: Path | bytes, longer_side: int) -> np.ndarray:
    """A photo, given as a file or as its bytes, at its own aspect: RGB, uint8, shape (rows, columns, 3).

    Args:
        longer_side: pixels.

    Raises:
        TouchlineError: the file is missing, or the bytes are not a readable photo.
    """
    if isinstance(photo, bytes):
        return at_its_aspect(photos.decode(photo, longer_side), photos.header(photo), longer_side)
    return at_its_aspect(photos.read(photo, longer_side), photos.header(photo.read_bytes()), longer_side)


def at_its_aspect(square: np.ndarray, header: photos.Header, longer_side: int) -> np.ndarray:
    """A photo that was decoded as a square, uint8 (side, side, 3), as a person wants to see it.

    Args:
        header: of its file.
        longer_side: pixels.
    """
    import cv2

    scale = longer_side / max(header.width, header.height, 1)
    size = (max(1, round(scale * header.width)), max(1, round(scale * header.height)))
    return cv2.resize(square, size, interpolation=cv2.INTER_AREA)


def jpeg(pixels: np.ndarray) -> str:
    """Pixels, RGB, uint8, shape (rows, columns, 3), as a JPEG in base64."""
    return base64.b64encode(jpeg_file(pixels)).decode()


def jpeg_file(pixels: np.ndarray) -> bytes:
    """The same as a file."""
    import cv2

    _, content = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return content.tobytes()
