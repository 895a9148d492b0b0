"""Photos of every kind that people have come out upright, in RGB, and square; what is no photo is said to be none."""

import io
import itertools
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from touchline.core.errors import TouchlineError
from touchline.data import layout, photos

ORIENTATION = 0x0112
RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 160, 30), (30, 30, 200), (120, 120, 120)


def encoded(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def four_corners(width: int = 240, height: int = 120, mode: str = "RGB") -> Image.Image:
    """Red and green above, blue and grey below."""
    image = Image.new("RGB", (width, height), GREY)
    for colour, corner in ((RED, (0, 0)), (GREEN, (width // 2, 0)), (BLUE, (0, height // 2))):
        image.paste(colour, (*corner, corner[0] + width // 2, corner[1] + height // 2))
    return image.convert(mode)


def scene(seed: int, width: int = 400, height: int = 300) -> Image.Image:
    """A made-up photo: large soft shapes, small ones upon them, a little noise."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 120), (12, 60), (60, 15)):
        coarse = random.uniform(0, strength, (cells, cells, 3)).astype(np.float32)
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray((pixels + random.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8))


def corners_of(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """Mean colours at the middle of the four quarters: above left, above right, below left, below right."""
    side = len(pixels) // 4
    places = itertools.product((side, 3 * side), repeat=2)
    return [tuple(pixels[y - 4 : y + 4, x - 4 : x + 4].mean(axis=(0, 1)).round().astype(int)) for y, x in places]


def assert_colours(found: list[tuple[int, ...]], expected: list[tuple[int, int, int]], tolerance: float = 12) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance)


def measured(tmp_path: Path, content: bytes, max_megapixels: float = 60, name: str = "photo") -> photos.Measurement:
    (tmp_path / name).write_bytes(content)
    return photos.measure(tmp_path / name, max_megapixels)


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "file_format, mode, options, extension",
    [
        ("JPEG", "RGB", {"quality": 90}, "jpg"),
        ("JPEG", "RGB", {"quality": 90, "progressive": True}, "jpg"),
        ("JPEG", "CMYK", {"quality": 95}, "jpg"),
        ("PNG", "RGB", {}, "png"),
        ("PNG", "RGBA", {}, "png"),
        ("PNG", "P", {}, "png"),
        ("WEBP", "RGB", {"quality": 90}, "webp"),
        ("GIF", "RGB", {}, "gif"),
        ("BMP", "RGB", {}, "bmp"),
        ("TIFF", "RGB", {}, "tif"),
        ("AVIF", "RGB", {"quality": 90, "subsampling": "4:4:4"}, "avif"),
        ("AVIF", "RGBA", {"quality": 90, "subsampling": "4:4:4"}, "avif"),
    ],
)
def test_every_format_keeps_its_colours(
    tmp_path: Path, file_format: str, mode: str, options: dict, extension: str
) -> None:
    content = encoded(four_corners(mode=mode), file_format, **options)
    assert photos.header(content) == photos.Header(extension, 240, 120)
    # Red is red: the article mixed up the order of colours in which OpenCV reads.
    assert_colours(corners_of(photos.decode(content, 64)), [RED, GREEN, BLUE, GREY], 30 if mode == "P" else 15)
    found = measured(tmp_path, content)
    assert (found.error, found.width, found.height, found.bomb) == ("", 240, 120, False)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_and_mirrored_as_its_boxes_say(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Pillow writes it as `irot` and `imir`; what EXIF says besides, viewers pass over.
    content = encoded(four_corners(), "AVIF", exif=exif, quality=90, subsampling="4:4:4")
    upright = encoded(ImageOps.exif_transpose(_oriented(four_corners(), orientation)), "PNG")
    expected, found = photos.header(upright), photos.header(content)
    assert (found.width, found.height) == (expected.width, expected.height)
    assert_colours(corners_of(photos.decode(content, 64)), corners_of(photos.decode(upright, 64)), 15)


def _oriented(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[0x0112] = orientation
    return image


def test_a_grey_photo_has_three_equal_channels() -> None:
    pixels = photos.decode(encoded(four_corners(mode="L")), 64)
    assert pixels.shape == (64, 64, 3)
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_sixteen_bits_a_channel_become_eight(tmp_path: Path) -> None:
    levels = np.array([[0, 20_000], [40_000, 65_535]], np.uint16).repeat(60, 0).repeat(60, 1)
    grey = encoded(Image.fromarray(levels), "PNG")
    assert [colour[0] for colour in corners_of(photos.decode(grey, 64))] == pytest.approx([0, 78, 156, 255], abs=2)
    assert measured(tmp_path, grey).error == ""

    colour = cv2.imencode(".png", np.full((60, 60, 3), (257 * 30, 257 * 30, 257 * 200), np.uint16))[1].tobytes()
    assert_colours(corners_of(photos.decode(colour, 64)), [RED] * 4, 2)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_photo_that_uses_fewer_bits_than_it_has_is_as_bright(file_format: str, bits: int) -> None:
    levels = np.linspace(0, 2**bits - 1, 64 * 64, dtype=np.uint16).reshape(64, 64)
    pixels = photos.decode(encoded(Image.fromarray(levels), file_format), 64)
    np.testing.assert_allclose(pixels[..., 0], levels / 2 ** (bits - 8), atol=1.01)


def cut_out(mode: str, opacity: int) -> Image.Image:
    """A ball and a black line on a clear ground, half of it clear green."""
    image = Image.new("RGBA", (240, 120), (0, 0, 0, 0))
    drawing = ImageDraw.Draw(image)
    drawing.rectangle((120, 0, 240, 120), fill=(0, 200, 0, 0))
    drawing.ellipse((20, 20, 100, 100), fill=(*RED, 255))
    drawing.line((0, 10, 240, 10), fill=(0, 0, 0, 255), width=4)
    drawing.rectangle((150, 40, 210, 100), fill=(*BLUE, opacity))
    return image.convert(mode)


@pytest.mark.parametrize(
    "file_format, mode, options",
    [
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "LA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {"quality": 95}),
        ("AVIF", "RGBA", {"quality": 95, "subsampling": "4:4:4"}),
        ("WEBP", "RGBA", {"lossless": True, "save_all": True, "append_images": [Image.new("RGBA", (240, 120))]}),
        ("TIFF", "RGBA", {}),
        ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
        ("GIF", "RGBA", {}),
    ],
)
def test_a_transparent_photo_lies_on_white_whatever_its_format(
    tmp_path: Path, file_format: str, mode: str, options: dict
) -> None:
    # A GIF has no half measures, and palettes made here have few.
    image = cut_out(mode, 255 if file_format == "GIF" or mode == "P" else 128)
    content = encoded(image, file_format, **options)
    stored = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(stored, mask=stored)
    expected = np.asarray(white.resize((64, 64), Image.Resampling.BOX), np.float32)
    pixels = photos.decode(content, 64)
    assert np.abs(pixels - expected).mean() < 3
    np.testing.assert_allclose(pixels[60, 2], 255, atol=3)
    # A drawing in black on a clear ground is no flat colour.
    found = measured(tmp_path, content)
    assert (found.error, found.width, found.height) == ("", 240, 120) and found.contrast > 20


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_transparent_photo_is_turned_upright_too(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = four_corners(mode="RGBA")
    image.putpixel((239, 119), (0, 0, 0, 0))
    content = encoded(image, file_format, exif=exif if file_format == "TIFF" else exif.tobytes())
    image.getexif()[ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(image).convert("RGB")
    assert layout.read(content).transparent
    assert (photos.header(content).width, photos.header(content).height) == upright.size
    expected = corners_of(np.asarray(upright.resize((64, 64), Image.Resampling.BOX)))
    assert_colours(corners_of(photos.decode(content, 64)), expected)


def test_an_opaque_photo_with_an_opacity_of_each_pixel_looks_as_without() -> None:
    with_it, without = (encoded(scene(1).convert(mode), "PNG") for mode in ("RGBA", "RGB"))
    np.testing.assert_array_equal(photos.decode(with_it, 128), photos.decode(without, 128))


def test_an_mpo_is_its_first_photo(tmp_path: Path) -> None:
    second = Image.new("RGB", (240, 120), BLUE)
    content = encoded(four_corners(), "MPO", save_all=True, append_images=[second], quality=90)
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert photos.header(content).extension == "jpg"
    assert_colours(corners_of(photos.decode(content, 64)), [RED, GREEN, BLUE, GREY])
    assert measured(tmp_path, content).error == ""


@pytest.mark.parametrize("width", [240, 2400])  # the larger one is decoded at a fraction of its size
@pytest.mark.parametrize("orientation, turn", [(6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)])
def test_a_photo_of_a_camera_held_upright_is_turned_upright(
    tmp_path: Path, orientation: int, turn: Image.Transpose, width: int
) -> None:
    upright = four_corners(width // 2, width)
    # The sensor lies on its side; EXIF says by how much.
    stored, exif = upright.transpose(turn), Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(stored, exif=exif, quality=90)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size == upright.size != stored.size

    assert photos.header(content) == photos.Header("jpg", width // 2, width)
    assert_colours(corners_of(photos.decode(content, 64)), [RED, GREEN, BLUE, GREY])
    assert (found := measured(tmp_path, content)).error == "" and (found.width, found.height) == (width // 2, width)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_turned_upright_too(file_format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = encoded(four_corners(120, 240).transpose(Image.Transpose.ROTATE_90), file_format, exif=exif)
    found = photos.header(content)
    assert (found.width, found.height) == (120, 240)
    assert_colours(corners_of(photos.decode(content, 64)), [RED, GREEN, BLUE, GREY], 25)


def test_a_name_does_not_decide_what_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(four_corners(), "JPEG"))
    assert photos.header((tmp_path / "photo.png").read_bytes()).extension == "jpg"
    assert photos.read(tmp_path / "photo.png", 32).shape == (32, 32, 3)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><title>404</title>", "does not decode: "),
        (bytes(range(256)) * 8, "does not decode: "),
        (encoded(Image.new("RGB", (40, 40)), "PPM"), "does not decode: "),
    ],
)
def test_what_is_no_photo_is_said_to_be_none(tmp_path: Path, content: bytes, says: str) -> None:
    found = measured(tmp_path, content)
    assert found.error.startswith(says) and "\n" not in found.error
    assert (found.contrast, found.perceptual_hash) == (0.0, "")
    assert photos.header(content).extension == ""


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_truncated_photo_does_not_decode(tmp_path: Path, file_format: str) -> None:
    whole = encoded(scene(1), file_format)
    assert measured(tmp_path, whole).error == ""
    # OpenCV alone would fill what is missing with grey.
    assert measured(tmp_path, whole[: len(whole) // 2]).error.startswith("does not decode: ")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xd8\xff\xe0 a JPEG that ends here"])
def test_decoding_what_is_no_photo_raises_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(TouchlineError, match=r"cat\.jpg does not decode"):
        photos.read(tmp_path / "cat.jpg", 32)


@pytest.mark.parametrize(
    "content, named",
    [
        (encoded(Image.new("RGB", (64, 64)), "AVIF").replace(b"ftypavif", b"ftypavis", 1), "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    ],
)
def test_files_of_kinds_that_are_not_read_are_named_with_what_to_do(tmp_path: Path, content: bytes, named: str) -> None:
    found = measured(tmp_path, content)
    assert named in found.error and found == measured(tmp_path, content)
    with pytest.raises(TouchlineError, match=named):
        photos.decode(content, 32)
    assert photos.header(content) == photos.Header("", 0, 0)


def test_a_photo_that_is_gone_says_how_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(TouchlineError, match=r"gone\.jpg cannot be read .*: run `dvc checkout`"):
        photos.read(tmp_path / "gone.jpg", 32)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    found = measured(tmp_path, bomb(), max_megapixels=60)
    assert found == photos.Measurement("", 30_000, 30_000, 900.0, bomb=True)
    assert photos.header(bomb()) == photos.Header("png", 30_000, 30_000)


def test_the_limit_of_a_bomb_is_the_one_given(tmp_path: Path) -> None:
    content = encoded(four_corners(240, 120))
    assert measured(tmp_path, content, 0.0288).bomb is False
    assert measured(tmp_path, content, 0.0287).bomb is True


def test_contrast_tells_a_flat_colour_from_a_photo(tmp_path: Path) -> None:
    assert measured(tmp_path, encoded(Image.new("RGB", (90, 90), GREEN))).contrast < 0.5
    assert measured(tmp_path, encoded(scene(1))).contrast > 15


@pytest.mark.parametrize("width, height", [(3000, 2000), (1111, 2777), (640, 480), (150, 300)])
def test_decoding_at_a_fraction_of_the_size_looks_like_decoding_in_full(width: int, height: int) -> None:
    content = encoded(scene(5, width, height), quality=90)
    expected = np.asarray(Image.open(io.BytesIO(content)).resize((128, 128), Image.Resampling.BOX), float)
    difference = np.abs(photos.decode(content, 128) - expected)
    assert difference.mean() < 3 and np.percentile(difference, 99) < 12


def test_a_large_jpeg_is_decoded_at_a_fraction_but_never_below_what_is_asked_for() -> None:
    def factor(width: int, height: int, file_format: str = "JPEG") -> int:
        return photos._factor(layout.read(encoded(Image.new("RGB", (width, height)), file_format)), 128)

    assert factor(255, 400) == 1
    assert factor(256, 400) == 2
    assert factor(4000, 512) == 4
    assert factor(1024, 1024) == 8
    assert factor(1024, 1024, "PNG") == 1


@pytest.mark.parametrize("width, height", [(400, 100), (100, 400), (100, 100), (30, 20), (20, 300), (1, 1)])
def test_any_aspect_becomes_a_square_with_all_of_the_photo_in_it(width: int, height: int) -> None:
    pixels = photos.decode(encoded(four_corners(width, height), "PNG"), 64)
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    if min(width, height) > 1:
        assert_colours(corners_of(pixels), [RED, GREEN, BLUE, GREY])


def bits_between(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def test_a_perceptual_hash_survives_recompression_and_resizing_and_tells_photos_apart(tmp_path: Path) -> None:
    originals = [scene(seed) for seed in range(8)]
    hashes = [measured(tmp_path, encoded(photo, "PNG")).perceptual_hash for photo in originals]
    assert all(len(each) == 16 for each in hashes)
    for photo, original in zip(originals, hashes, strict=True):
        for copy in (
            encoded(photo, quality=40),
            encoded(photo.resize((200, 150)), quality=80),
            encoded(photo.resize((1200, 900)), "WEBP"),
        ):
            assert bits_between(measured(tmp_path, copy).perceptual_hash, original) <= 6
    assert min(bits_between(*pair) for pair in itertools.combinations(hashes, 2)) > 12


def kinds() -> dict[str, bytes]:
    """A photo of each format as it comes over a network."""
    formats = {"JPEG": {"quality": 85}, "PNG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "AVIF": {}}
    return {name: encoded(scene(3, 120, 90), name, **options) for name, options in formats.items()}


@pytest.mark.parametrize("file_format", kinds())
def test_a_whole_photo_of_any_format_has_no_flaw(file_format: str) -> None:
    assert photos.flaw(kinds()[file_format]) == ""


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 0.999])
def test_a_photo_that_was_cut_off_is_told_by_its_end(file_format: str, share: float) -> None:
    content = kinds()[file_format]
    assert photos.flaw(content[: int(share * len(content))]) == "cut off"


def test_the_end_of_a_thumbnail_is_not_the_end_of_its_photo() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a camera's description"
    thumbnail = encoded(scene(4, 40, 30))
    # As cameras do it: a small JPEG, with an end marker of its own, among the EXIF data at the front of the file.
    payload = b"Exif\0\0" + exif.tobytes()[6:] + thumbnail
    segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
    content = encoded(scene(5))
    content = content[:2] + segment + content[2:]
    assert b"\xff\xd9" in content[: len(content) // 2] and photos.flaw(content) == ""
    assert photos.flaw(content[: int(0.9 * len(content))]) == "cut off"


def test_bytes_after_the_end_are_no_flaw() -> None:
    for file_format in ("JPEG", "PNG", "WEBP"):
        assert photos.flaw(kinds()[file_format] + bytes(500)) == ""


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "empty file"),
        (b"\n", "not an image"),
        (b"\xff\xd8", "not an image"),
        (b"%PDF-1.4", "not an image"),
        (b"<!DOCTYPE HTML><title>Sign in</title>", "a web page"),
        (b"\n\n<html>", "a web page"),
        (b"<html><svg>", "a web page"),
        (b'<?xml version="1.0"?><svg>', "a drawing in SVG, which is not supported: save it as JPEG or PNG"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "a web page"),
        (b"\xff\xd8\xff", "cut off"),
    ],
)
def test_what_came_in_place_of_a_photo_is_named(content: bytes, found: str) -> None:
    assert photos.flaw(content) == found


def with_exif(orientation: int | None = None) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "a maker of cameras"
    if orientation:
        exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exif": with_exif()},
        {"exif": with_exif(1)},
        {"icc_profile": bytes(200)},
        {"comment": b"a long way to go", "progressive": True},
    ],
    ids=["JFIF", "EXIF without orientation", "EXIF that says upright", "a colour profile", "progressive"],
)
def test_a_photo_on_its_side_is_shown_upright_by_every_reader(
    tmp_path: Path, rotation: int, options: dict[str, object]
) -> None:
    # Open Images' Rotation is how far a photo has to be turned counter-clockwise; so it lies turned the other way.
    lying = four_corners().rotate(-rotation, expand=True)
    content = photos.turned(encoded(lying, quality=95, **options), rotation)
    expected = [RED, GREEN, BLUE, GREY]
    assert photos.header(content) == photos.Header("jpg", 240, 120)
    assert photos.flaw(content) == "" and measured(tmp_path, content).error == ""
    assert_colours(corners_of(photos.decode(content, 64)), expected)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB").resize((64, 64))
    assert_colours(corners_of(np.asarray(upright)), expected)


def test_turning_changes_no_pixel() -> None:
    content = encoded(scene(6))
    pixels = [np.asarray(Image.open(io.BytesIO(each))) for each in (content, photos.turned(content, 90))]
    np.testing.assert_array_equal(*pixels)
    assert photos.turned(content, 90)[-200:] == content[-200:]


def test_what_is_upright_already_stays_as_it_is() -> None:
    content = encoded(four_corners())
    assert photos.turned(content, 0) is content
    # Its reader turns it by its own EXIF; turned once more it would lie on its side.
    by_itself = encoded(four_corners(), exif=with_exif(6))
    assert photos.turned(by_itself, 270) is by_itself
    png = encoded(four_corners(), "PNG")
    assert photos.turned(png, 90) is png


def test_a_torn_photo_is_turned_without_an_error() -> None:
    for length in (2, 3, 5, 20, 200):
        torn = encoded(four_corners())[:length]
        assert photos.turned(torn, 90).startswith(b"\xff\xd8")
