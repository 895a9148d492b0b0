"""The sample: drawn scenes of sports, so that a first run needs no network and no permission.

`rugby` and `soccer` are drawn as people know them. Any other class name gets a made-up sport: a ball, a goal and shirts
combined by the name's position in the list of classes, so the picture has nothing to do with the word. Classes share
one distribution of sizes, file formats, cameras, colours, backgrounds and weather: only what is played tells them
apart.

Among the scenes lie, on purpose, the files that real downloads hold: see `_oddities`.

A scene depends on (seed, class, index) alone: photos may be drawn in any order, in many processes and on any processor.
"""

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import cv2
import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.params import Params, SampleParams
from touchline.core.paths import Paths
from touchline.sources import Candidate, Planned, Source
from touchline.sources.scenes import BALLS, GOALS, SHIRTS, Image, Rng, Sport, draw, resized

_LICENCE = "CC0-1.0"
# From this many scenes on, starting processes pays off: drawing holds Python's lock most of the time.
_MANY = 100
_FORMATS = {7: "png", 13: "webp"}  # of the scenes whose index ends so, modulo 20; the others are JPEG


def sport_of(name: str, position: int) -> Sport:
    """The sport drawn for the class `name` at `position` (from 0) of the list of classes.

    Raises:
        TouchlineError: the made-up sports, 62, are used up.
    """
    known = {"rugby": 0, "soccer": 1}
    number = known.get(name.casefold(), len(known) + position)
    # A Latin square: any four neighbours differ in ball, in goal and in shirt, and all 64 sports differ.
    a, b, c = number % 4, number // 4 % 4, number // 16
    if c >= 4:
        raise TouchlineError(f"the sample has no sport left to draw for class '{name}': list at most 62 classes")
    return Sport(BALLS[a], GOALS[(a + b) % 4], SHIRTS[(a - b + c) % 4])


def candidates(params: SampleParams, classes: Sequence[str]) -> Iterator[Candidate]:
    """`params.per_class` good scenes a class, class by class in turn, then the oddities.

    `read` draws and encodes when it is called; it may be called from any thread and returns the same bytes each time.

    Raises:
        TouchlineError: there are more classes than sports.
    """
    sports = {name: sport_of(name, position) for position, name in enumerate(classes)}
    many = params.per_class * len(classes) > _MANY

    def photo(name: str, index: int) -> bytes:
        wanted = params.seed, sports[name], name, index
        return parallel.in_process(_photo, *wanted) if many else _photo(*wanted)

    def scene(name: str, index: int) -> Image:
        return draw(sports[name], _generator(params.seed, name, index))

    for index in range(params.per_class):
        for name in classes:
            origin = f"{name}/scene-{index:04d}.{_FORMATS.get(index % 20, 'jpg')}"
            yield _candidate(name, origin, partial(photo, name, index))
    for name, filename, read in _oddities(classes[0], classes[1], photo, scene):
        yield _candidate(name, f"{name}/{filename}", read)


def encode(image: Image, extension: str, quality: int = 90) -> bytes:
    """`image` as a `jpg`, `png` or `webp` file; `quality` (0 to 100) is for the lossy two."""
    flags = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, quality], "webp": [cv2.IMWRITE_WEBP_QUALITY, quality], "png": []}
    return cv2.imencode(f".{extension}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags[extension])[1].tobytes()


def _photo(seed: int, sport: Sport, name: str, index: int) -> bytes:
    rng = _generator(seed, name, index)
    return encode(draw(sport, rng), _FORMATS.get(index % 20, "jpg"), int(rng.integers(35, 96)))


def _generator(seed: int, name: str, index: int) -> Rng:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), index])))


def _candidate(name: str, origin: str, read: Callable[[], bytes]) -> Candidate:
    return Candidate(name, "sample", origin, read, licence=_LICENCE, author="Touchline sample")


def _oddities(
    first: str, second: str, photo: Callable[[str, int], bytes], scene: Callable[[str, int], Image]
) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Class, file name and content of what real downloads hold besides good photos.

    `burst.jpg`, an MPO, and `jpeg-inside.png` are good photos that only look odd.
    """

    def smaller(name: str, index: int, share: float, quality: int) -> bytes:
        image = scene(name, index)
        height, width = (round(share * side) for side in image.shape[:2])
        return encode(resized(image, width, height), "jpg", quality)

    def truncated() -> bytes:
        whole = encode(scene(first, 100_000), "jpg")
        return whole[: len(whole) // 2]

    def burst() -> bytes:
        from PIL import Image as Pillow

        buffer = io.BytesIO()
        frames = [Pillow.fromarray(scene(second, index)) for index in (100_000, 100_001)]
        frames[0].save(buffer, "MPO", save_all=True, append_images=frames[1:], quality=85)
        return buffer.getvalue()

    page = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>This photo is gone.</body></html>\n"
    yield first, "truncated.jpg", truncated
    yield second, "empty.jpg", lambda: b""
    yield first, "copy-of-scene-0001.jpg", partial(photo, first, 1)
    yield second, "copy-of-scene-0001.jpg", partial(photo, second, 1)
    yield first, "scene-0002-recompressed.jpg", partial(smaller, first, 2, 1.0, 40)
    yield first, "scene-0003-smaller.jpg", partial(smaller, first, 3, 0.9, 85)
    yield second, "scene-0002-smaller.jpg", partial(smaller, second, 2, 0.95, 60)
    yield second, f"scene-0004-of-{first}.jpg", partial(photo, first, 4)
    yield second, "burst.jpg", burst
    yield first, "jpeg-inside.png", lambda: encode(scene(first, 100_001), "jpg")
    yield second, "page.jpg", lambda: page
    yield first, "flat.png", lambda: encode(np.full((240, 320, 3), (86, 120, 60), np.uint8), "png")
    yield second, "thumbnail.jpg", lambda: encode(resized(scene(second, 100_002), 32, 24), "jpg")
    yield first, "panorama.jpg", lambda: encode(resized(scene(first, 100_003), 900, 180), "jpg")


def _plan(_: Paths, params: Params) -> list[Planned]:
    drawn = params.ingest.sample.per_class * len(params.classes)
    return [Planned(f"{drawn:,} drawn scenes", "this program", 0.0, "to draw", _LICENCE)]


SOURCE = Source(
    "sample",
    lambda _, params: candidates(params.ingest.sample, params.classes),
    _plan,
    licensed=True,
    collected="Scenes of made-up matches, drawn by a program from a seed.",
    labelled="By what was drawn.",
)
