"""Photos as files and as arrays: the only place that opens an image.

Decoding is OpenCV's (fast, scaled decoding for JPEG, EXIF orientation applied), or Pillow's where pixels may be
transparent, which are laid on white as viewers show them, and of AVIF, which OpenCV does not turn upright. Whether a
file is whole is Pillow's word, because OpenCV fills what is missing with grey and says nothing. Neither sees a file
before `layout` has found out what decoding it will cost: a thread that decodes cannot be stopped.
"""

import io
import os
import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from touchline.core.budget import Budget
from touchline.core.errors import TouchlineError, one_line
from touchline.data import layout
from touchline.data.layout import Layout, Refused

# The ending that files of each format get.
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}
_HASH_SIDE = 128
_FIRST_BYTES = 2**16
# Bytes that one photo may have as a file, and hold while it is decoded; and that all photos decoded at once may hold.
_MOST, _TOGETHER = 512 * 2**20, Budget(1024 * 2**20)
# Bytes of uncompressed samples that one photo may have: 60 megapixels of three 16-bit samples are 360 million, which a
# TIFF, the slowest format, decodes in 1.6 s.
_MOST_SAMPLES = 400_000_000


@dataclass(frozen=True)
class Header:
    """What a file says of itself without being decoded.

    Attributes:
        extension: by content, not by name; empty where the content is not an image.
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


def content_of(path: Path) -> bytes:
    """The bytes of a file that begins like an image; of any other file, which may be a film, only the first ones.

    Raises:
        TouchlineError: the file is larger than a photo may be.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_FIRST_BYTES)
        if not layout.format_of(start):
            return start
        if os.fstat(file.fileno()).st_size > _MOST:
            raise TouchlineError(f"larger than {_MOST / 2**20:g} MB")
        return start + file.read(_MOST)


def header(content: bytes) -> Header:
    """Read the header of an image file's bytes; never raises for bad content."""
    try:
        found = layout.read(content)
    except Refused:
        return Header("", 0, 0)
    return Header(EXTENSIONS[found.format], *_upright_size(found))


def measure(path: Path, max_megapixels: float) -> Measurement:
    """Decode a photo in full and measure it.

    Args:
        max_megapixels: a larger photo is taken for a decompression bomb and not decoded.
    """
    content = path.read_bytes()
    if not content:
        return Measurement("empty file")
    width = height = 0
    megapixels = 0.0
    try:
        found = layout.read(content)
        width, height = _upright_size(found)
        megapixels = width * height / 1e6
        if megapixels > max_megapixels:
            return Measurement("", width, height, megapixels, bomb=True)
        with _room(found, _HASH_SIDE):
            if reason := _not_whole(content, found):
                return Measurement(f"does not decode: {reason}")
            # The hash and the contrast are taken from what training will see, so a file that only one library reads
            # fails.
            pixels = _pixels(content, found, _HASH_SIDE)
    except TouchlineError as error:
        return Measurement(f"does not decode: {error}", width, height, megapixels)
    return Measurement("", width, height, megapixels, False, _contrast(pixels), _perceptual_hash(pixels))


def flaw(content: bytes) -> str:
    """Why bytes are not a whole image; empty where first and last bytes look right.

    Decoding in full costs more than fetching, and is done later, once, by `measure`.
    """
    # Bytes may follow the end marker, but not many; a marker in the first half is that of a thumbnail.
    middle = max(len(content) // 2, len(content) - 2**16)
    match layout.format_of(content):
        case "JPEG":
            whole = content.rfind(b"\xff\xd9", middle) >= 0
        case "PNG":
            whole = content.rfind(b"IEND", middle) >= 0
        case "WEBP":
            whole = len(content) >= int.from_bytes(content[4:8], "little") + 8
        case "GIF":
            whole = b"\x3b" in content[-16:]
        case "":
            return layout.other(content) or "not an image"
        case _:
            whole = True
    return "" if whole else "cut off"


def turned(content: bytes, rotation: int) -> bytes:
    """A JPEG that its readers show upright, without a pixel being coded anew: an EXIF orientation is written into it.

    Args:
        content: a JPEG; one that has an EXIF orientation of its own is upright by that, and comes back as it is.
        rotation: degrees counter-clockwise that turn it upright: 0, 90, 180 or 270.
    """
    try:
        found = layout.read(content)
    except Refused:
        return content
    if not rotation or found.format != "JPEG" or found.orientation != 1:
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
        TouchlineError: the bytes are not a readable image.
    """
    try:
        found = layout.read(content)
        with _room(found, size):
            return _pixels(content, found, size)
    except TouchlineError as error:
        raise TouchlineError(f"{name} does not decode: {error}") from None


def read(path: Path, size: int) -> np.ndarray:
    """`decode` of a file. Raises TouchlineError where it is missing or not a readable image."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TouchlineError(f"{path} cannot be read ({error.strerror}): run `dvc checkout` or `dvc repro`") from None
    return decode(content, size, str(path))


def _upright_size(found: Layout) -> tuple[int, int]:
    # EXIF orientations 5 to 8 lie on their side.
    return (found.height, found.width) if found.orientation > 4 else (found.width, found.height)


def _factor(found: Layout, size: int) -> int:
    """By how much OpenCV makes a JPEG smaller as it decodes it: less work, and never below `size`."""
    room = min(found.width, found.height) // size if found.format == "JPEG" else 1
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(room, 1))


def _room(found: Layout, size: int) -> AbstractContextManager[None]:
    """The memory to decode a photo for `size`, to be had for a block.

    Raises:
        Refused: decoding it takes more than one photo may.
    """
    needed = found.held + found.width * found.height * found.per_pixel // _factor(found, size) ** 2
    if needed > _MOST or found.samples > _MOST_SAMPLES:
        raise Refused(f"{found.width:,} x {found.height:,} pixels of this kind would take too much memory or time")
    return _TOGETHER.part(needed)


def _pixels(content: bytes, found: Layout, size: int) -> np.ndarray:
    layout.check_inflation(content, found)
    return _on_white(content, found, size) if found.transparent else _opaque(content, found, size)


def _opaque(content: bytes, found: Layout, size: int) -> np.ndarray:
    import cv2

    flags = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
    full = cv2.IMREAD_COLOR | (cv2.IMREAD_ANYDEPTH if found.deep else 0)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags.get(_factor(found, size), full))
    except cv2.error as error:
        raise Refused(one_line(error, 120)) from None
    if image is None:
        raise Refused("not an image that OpenCV reads")
    return cv2.cvtColor(_squash(_eight_bits(image), size), cv2.COLOR_BGR2RGB)


def _eight_bits(image: np.ndarray) -> np.ndarray:
    """Samples of 16 bits as 8; those of cameras and scanners use 10, 12 or 14 of them."""
    if image.dtype != np.uint16:
        return image
    used = int(image.max()).bit_length()
    bits = next(bits for bits in (8, 10, 12, 14, 16) if used <= bits)
    return (image >> (bits - 8)).astype(np.uint8)


def _on_white(content: bytes, found: Layout, size: int) -> np.ndarray:
    """What a viewer shows of a transparent photo. By Pillow: of each format it reads opacity as the format has it."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(content), formats=[found.format]) as image:
            image.load()
            shown = Image.new("RGB", image.size, "white")
            # One that is RGBA already is not copied.
            stored = image if image.mode == "RGBA" else image.convert("RGBA")
            shown.paste(stored, mask=stored)
    except Exception as error:  # Pillow's readers raise many kinds on hostile bytes
        raise Refused(_in_words(error)) from None
    del image, stored
    # Pillow itself turns a TIFF upright.
    return _turned(_squash(np.asarray(shown), size), 1 if found.format == "TIFF" else found.orientation)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A square stored with an EXIF orientation, upright."""
    if orientation in {5, 6, 7, 8}:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in {3, 4, 7, 8} else 1, :: -1 if orientation in {2, 3, 6, 7} else 1].copy()


def _not_whole(content: bytes, found: Layout) -> str:
    """Why Pillow cannot decode it in full; empty where it can."""
    # A WebP is read whole or not at all by OpenCV too, and Pillow would hold a large one five times over; an AVIF is
    # read by Pillow alone.
    if found.format in {"WEBP", "AVIF"}:
        return ""
    from PIL import Image

    # Our own limits decide what is a bomb; Pillow's would only warn or raise somewhere else.
    Image.MAX_IMAGE_PIXELS = None
    try:
        # Closed before OpenCV makes its own pixels: of the largest photos both would not fit.
        with Image.open(io.BytesIO(content), formats=[found.format]) as image:
            # A JPEG decoded at a fraction of its size is still read to its last byte, in a third of the time.
            image.draft("RGB", (_HASH_SIDE, _HASH_SIDE))
            image.load()
    except Exception as error:  # Pillow's readers raise many kinds on hostile bytes; all of them mean "not whole"
        return _in_words(error)
    return ""


def _in_words(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    # Its message holds an address in memory.
    return "its header is damaged" if isinstance(error, UnidentifiedImageError) else one_line(error, 120)


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
