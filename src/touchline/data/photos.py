"""Photos as files and as arrays: the only place that opens an image.

Decoding is OpenCV's (fast, scaled decoding for JPEG, EXIF orientation applied); whether a file is whole is Pillow's
word, because OpenCV fills what is missing with grey and says nothing.
"""

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from touchline.core.errors import TouchlineError

if TYPE_CHECKING:
    from PIL.Image import Image

# What each format that both libraries read calls itself in Pillow, and the ending its files get here.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_HASH_SIDE = 128
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Header:
    """What a file says of itself without being decoded.

    Attributes:
        extension: by content, not by name; empty where the content is no photo.
        width, height: pixels as a person sees it (EXIF orientation applied); 0 where unknown.
    """

    extension: str
    width: int
    height: int


@dataclass(frozen=True)
class Measurement:
    """What decoding a photo in full shows.

    Attributes:
        error: empty if it decodes in full, else why not.
        width, height: pixels as a person sees it; 0 where unknown.
        megapixels: of the header; 0 where unknown.
        bomb: True if the header promises more than allowed; such a file is not decoded.
        contrast: standard deviation of the grey levels, 0 to 127.5.
        perceptual_hash: 64 bits as 16 hexadecimal digits; empty where there is nothing to hash.
    """

    error: str
    width: int = 0
    height: int = 0
    megapixels: float = 0.0
    bomb: bool = False
    contrast: float = 0.0
    perceptual_hash: str = ""


def header(content: bytes) -> Header:
    """Read the header of an image file's bytes; never raises for bad content."""
    try:
        with _open(content) as image:
            width, height = _oriented_size(image)
            return Header(EXTENSIONS.get(image.format or "", ""), width, height)
    except Exception:  # Pillow's readers raise many kinds on hostile bytes; all of them mean "no photo"
        return Header("", 0, 0)


def measure(path: Path, max_megapixels: float) -> Measurement:
    """Decode a photo in full and measure it.

    Args:
        max_megapixels: a larger photo is taken for a decompression bomb and not decoded.
    """
    content = path.read_bytes()
    if not content:
        return Measurement("empty file")
    try:
        with _open(content) as image:
            if image.format not in EXTENSIONS:
                return Measurement(f"format {image.format} is not supported")
            width, height = _oriented_size(image)
            megapixels = width * height / 1e6
            if megapixels > max_megapixels:
                return Measurement("", width, height, megapixels, bomb=True)
            # A JPEG decoded at a fraction of its size is still read to its last byte, in a third of the time.
            image.draft("RGB", (_HASH_SIDE, _HASH_SIDE))
            # A WebP is read whole or not at all, below as here, and Pillow would hold a large one five times over.
            if image.format != "WEBP":
                image.load()
            # The pixels go now, before OpenCV makes its own: of the largest photos both would not fit.
            image.close()
    except Exception as error:  # see `header`
        return Measurement(f"does not decode: {_reason(error)}")
    try:
        # The hash and the contrast are taken from what training will see, so a file that only one library reads fails.
        pixels = decode(content, _HASH_SIDE, str(path))
    except TouchlineError as error:
        return Measurement(str(error), width, height, megapixels)
    return Measurement("", width, height, megapixels, False, _contrast(pixels), _perceptual_hash(pixels))


def flaw(content: bytes) -> str:
    """Why bytes that came over a network are no whole photo; empty where first and last bytes look right.

    Decoding in full costs more than fetching, and is done later, once, by `measure`.
    """
    start, middle = content[:16], max(len(content) // 2, len(content) - 2**16)
    # Bytes may follow the end marker, but not many; a marker in the first half is that of a thumbnail.
    if start.startswith(b"\xff\xd8\xff"):
        whole = content.rfind(b"\xff\xd9", middle) >= 0
    elif start.startswith(_PNG):
        whole = content.rfind(b"IEND", middle) >= 0
    elif start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        whole = len(content) >= int.from_bytes(start[4:8], "little") + 8
    elif start.startswith((b"GIF87a", b"GIF89a")):
        whole = b"\x3b" in content[-16:]
    elif start.startswith((b"BM", b"II*\x00", b"MM\x00*")):
        whole = True
    else:
        page = re.search(rb"<!doctype html|<html|<\?xml", content[:1024], re.IGNORECASE)
        return "a web page" if page else "no photo"
    return "" if whole else "cut off"


def turned(content: bytes, rotation: int) -> bytes:
    """A JPEG that its readers show upright, without a pixel being coded anew: an EXIF orientation is written into it.

    Args:
        content: a JPEG; one that has an EXIF orientation of its own is upright by that, and comes back as it is.
        rotation: degrees counter-clockwise that turn it upright: 0, 90, 180 or 270.
    """
    if not rotation or not content.startswith(b"\xff\xd8") or _states_orientation(content):
        return content
    orientation = {90: 8, 180: 3, 270: 6}[rotation]
    # EXIF 2.3, 4.5 and 4.6: a TIFF header (big-endian, first directory at byte 8) and a directory of one short.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    # A JFIF segment stays the first.
    place = 4 + int.from_bytes(content[4:6], "big") if content[2:4] == b"\xff\xe0" else 2
    return content[:place] + segment + content[place:]


def decode(content: bytes, size: int, name: str = "photo") -> np.ndarray:
    """Decode a photo, turn it upright and squash it to a square.

    Squashed, not cropped: the aspect ratio of a collected photo tells where it came from, and no model may see it.

    Args:
        content: bytes of an image file.
        size: side of the result in pixels.
        name: what an error calls it.

    Returns:
        RGB, uint8, shape (size, size, 3).

    Raises:
        TouchlineError: the bytes are no readable photo.
    """
    import cv2

    if _overstates_a_chunk(content):
        raise TouchlineError(f"{name} does not decode: it is cut off or damaged")
    flags = _scaled_decoding(content, size)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error as error:
        raise TouchlineError(f"{name} does not decode: {_reason(error)}") from None
    if image is None:
        raise TouchlineError(f"{name} does not decode: no photo that OpenCV reads")
    return cv2.cvtColor(_squash(image, size), cv2.COLOR_BGR2RGB)


def read(path: Path, size: int) -> np.ndarray:
    """`decode` of a file. Raises TouchlineError where it is missing or no readable photo."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TouchlineError(f"{path} cannot be read ({error.strerror}): run `dvc checkout` or `dvc repro`") from None
    return decode(content, size, str(path))


def _open(content: bytes) -> "Image":
    from PIL import Image

    # Our own limit, a param, decides what is a bomb; Pillow's would only warn or raise somewhere else.
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(io.BytesIO(content))


def _states_orientation(content: bytes) -> bool:
    try:
        with _open(content) as image:
            return image.getexif().get(0x0112, 1) != 1
    except Exception:  # see `header`
        return False


def _oriented_size(image: "Image") -> tuple[int, int]:
    width, height = image.size
    # Asked for without need, Pillow decodes a whole PNG to look for EXIF behind its pixels, and a bomb would go off
    # there; and a TIFF, whose size Pillow has turned already, would be turned twice.
    exif = image.getexif() if "exif" in image.info else {}
    # EXIF orientations 5 to 8 lie on their side.
    return (height, width) if exif.get(0x0112, 1) in {5, 6, 7, 8} else (width, height)


def _overstates_a_chunk(content: bytes) -> bool:
    """True for a PNG with a chunk that claims more bytes than are left: OpenCV would take memory for all it claims."""
    if not content.startswith(_PNG):
        return False
    place = len(_PNG)
    while place + 8 <= len(content):
        length, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if length > len(content) - place - 8:
            return True
        if kind == b"IEND":
            break
        place += length + 12
    return False


def _scaled_decoding(content: bytes, size: int) -> int:
    import cv2

    if content[:2] != b"\xff\xd8":
        return cv2.IMREAD_COLOR
    found = header(content)
    scaled = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
    room = min(found.width, found.height) // size
    return next((flags for factor, flags in scaled.items() if factor <= room), cv2.IMREAD_COLOR)


def _squash(image: np.ndarray, size: int) -> np.ndarray:
    import cv2

    height, width = image.shape[:2]
    smaller = (min(width, size), min(height, size))
    if smaller != (width, height):
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (size, size):
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return image


def _contrast(pixels: np.ndarray) -> float:
    return round(float(pixels.mean(axis=2).std()), 3)


def _perceptual_hash(pixels: np.ndarray) -> str:
    import imagehash
    from PIL import Image

    return str(imagehash.phash(Image.fromarray(pixels)))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
