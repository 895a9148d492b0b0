"""Small copies of photos: at their own aspect, upright, from a file or from bytes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from touchline.core.errors import TouchlineError
from touchline.data.thumbnails import thumbnail


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    """Red in its left half, blue in its right one, before it is turned."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("width, height, shape", [(90, 60, (40, 60, 3)), (60, 90, (60, 40, 3)), (400, 2, (1, 60, 3))])
def test_a_thumbnail_has_the_aspect_of_its_photo(
    width: int, height: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg(width, height))
    small = thumbnail(tmp_path / "photo.jpg", 60)
    assert small.shape == shape and small.dtype == np.uint8
    assert np.array_equal(small, thumbnail(jpeg(width, height), 60))
    red, blue = small[:, 5].mean(axis=0), small[:, -5].mean(axis=0)
    assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]


def test_a_photo_that_lies_on_its_side_is_shown_upright() -> None:
    small = thumbnail(jpeg(90, 60, orientation=6), 60)  # to be turned clockwise: left becomes top
    assert small.shape == (60, 40, 3)
    assert small[5].mean(axis=0)[0] > 200 and small[-5].mean(axis=0)[2] > 200


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    with pytest.raises(TouchlineError, match=r"absent\.jpg"):
        thumbnail(tmp_path / "absent.jpg", 60)
    with pytest.raises(TouchlineError):
        thumbnail(b"not an image", 60)
