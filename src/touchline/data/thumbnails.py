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
    import cv2

    # Photos are decoded as squares; a person wants to see them as they are.
    if isinstance(photo, bytes):
        square, header = photos.decode(photo, longer_side), photos.header(photo)
    else:
        square, header = photos.read(photo, longer_side), photos.header(photo.read_bytes())
    scale = longer_side / max(header.width, header.height, 1)
    size = (max(1, round(scale * header.width)), max(1, round(scale * header.height)))
    return cv2.resize(square, size, interpolation=cv2.INTER_AREA)


def jpeg(pixels: np.ndarray) -> str:
    """Pixels, RGB, uint8, shape (rows, columns, 3), as a JPEG in base64."""
    import cv2

    _, content = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(content.tobytes()).decode()
