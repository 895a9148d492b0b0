"""What decoding a photo would cost is known before it is decoded: files that are cheap to send and dear to decode.

Each is built here, as small as shows it. docs/threat-model.md names these tests.
"""

import os
import re
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_photos import encoded, scene

from touchline.commands import predict
from touchline.core.budget import Budget
from touchline.core.errors import TouchlineError
from touchline.data import layout, photos

MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def refused(tmp_path: Path, content: bytes) -> str:
    """Why a photo is refused, by everything that opens photos, before a decoder sees it."""
    (tmp_path / "photo").write_bytes(content)
    with pytest.raises(layout.Refused) as reason:
        layout.read(content)
    for look in (lambda: photos.decode(content, 32), lambda: predict.pixels(content, 32, 60)):
        with pytest.raises(TouchlineError, match=re.escape(str(reason.value))) as error:
            look()
        assert "\n" not in str(error.value)
    assert str(reason.value) in photos.measure(tmp_path / "photo", 60).error
    assert photos.header(content) == photos.Header("", 0, 0)
    return str(reason.value)


def taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photo").write_bytes(content)
    assert photos.measure(tmp_path / "photo", 60).error == ""
    assert predict.pixels(content, 32, 60).shape == (32, 32, 3)


# JPEG


def with_scans(jpeg: bytes, more: int) -> bytes:
    """A progressive JPEG whose last scan, with its tables, stands `more` times again."""
    place, ends = 2, [2]
    while found := MARKER.search(jpeg, place):
        if found[0] == b"\xff\xd9":
            break
        place = found.start() + 2 + int.from_bytes(jpeg[found.start() + 2 : found.start() + 4], "big")
        if found[0] == b"\xff\xda":
            place = MARKER.search(jpeg, place).start()
            ends.append(place)
    return jpeg[: ends[-1]] + jpeg[ends[-2] : ends[-1]] * more + jpeg[ends[-1] :]


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    return (
        jpeg[:2] + b"".join(struct.pack(">BBH", 255, kind, len(body) + 2) + body for kind, body in segments) + jpeg[2:]
    )


def test_a_progressive_jpeg_may_have_as_many_scans_as_it_has_use_for(tmp_path: Path) -> None:
    # Ten, as libjpeg and nearly all others write it, and twice as many.
    for subsampling in (0, 2):
        jpeg = encoded(scene(1), progressive=True, subsampling=subsampling)
        taken(tmp_path, jpeg)
        taken(tmp_path, with_scans(jpeg, 10))
        assert photos.decode(with_scans(jpeg, 10), 32).tolist() == photos.decode(jpeg, 32).tolist()


def test_a_progressive_jpeg_that_repeats_its_scans_is_refused(tmp_path: Path) -> None:
    # Of a flat colour an empty scan is some 30 bytes, and goes through all pixels.
    assert "111 scans" in refused(tmp_path, with_scans(encoded(Image.new("RGB", (400, 300)), progressive=True), 101))


@pytest.mark.parametrize("side, most", [(1000, 100), (7000, 40)])
def test_the_larger_a_jpeg_the_fewer_scans_it_may_have(tmp_path: Path, side: int, most: int) -> None:
    jpeg = encoded(Image.new("RGB", (side, side)), progressive=True)
    layout.read(with_scans(jpeg, 10))
    with pytest.raises(layout.Refused):
        layout.read(with_scans(jpeg, most - 9))


@pytest.mark.parametrize("frame", [b"\xff\xc3", b"\xff\xc9", b"\xff\xca"])
def test_jpegs_that_no_camera_writes_are_refused(tmp_path: Path, frame: bytes) -> None:
    # Lossless and arithmetic coding: slow, and the second needs no bytes for what it makes a decoder do.
    refused(tmp_path, encoded(scene(1)).replace(b"\xff\xc0", frame, 1))


def directory(claims: int, size: int, kind: int = 7, unit: int = 1) -> bytes:
    """A TIFF directory of `claims` tags that all say their values are the same `size` bytes."""
    start = 8 + 2 + 12 * claims + 4
    tags = b"".join(struct.pack("<HHII", (40_000 + each) % 2**16, kind, size // unit, start) for each in range(claims))
    return b"II*\0" + struct.pack("<IH", 8, claims) + tags + bytes(4 + size)


@pytest.mark.parametrize("claims", [directory(200, 50_000), directory(3, 1_050_000, 5, 8)], ids=["bytes", "values"])
@pytest.mark.parametrize("place", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
def test_tags_that_claim_more_than_there_is_are_refused(tmp_path: Path, claims: bytes, place: str) -> None:
    whole = encoded(scene(1), "JPEG" if place in {"JPEG", "MPO"} else place)
    parts = [claims[at : at + 65_000] for at in range(0, len(claims), 65_000)]
    match place:
        case "JPEG":
            content = with_segments(whole, *((0xE1, b"Exif\0\0" + part) for part in parts))
        case "MPO":
            content = with_segments(whole, (0xE2, b"MPF\0" + directory(200, 50_000)))
        case "PNG":
            content = whole[:33] + chunk(b"eXIf", claims) + whole[33:]
        case "WEBP":
            content = webp(whole[12:], b"EXIF" + struct.pack("<I", len(claims)) + claims)
        case "TIFF":
            content = claims
    refused(tmp_path, content)


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"no directory", b"MM\0*\0\0\0\x08\0\x05ab"])
def test_a_jpeg_with_broken_exif_is_still_a_photo(tmp_path: Path, exif: bytes) -> None:
    taken(tmp_path, with_segments(encoded(scene(1)), (0xE1, b"Exif\0\0" + exif), (0xE2, b"MPF\0" + exif)))


@pytest.mark.parametrize(
    "between", [b"\xff\xfe\0\2" * 5000, b"\xff" * 5000, bytes(5000)], ids=["empty comments", "fill", "junk"]
)
def test_a_jpeg_of_far_more_parts_than_an_image_needs_is_refused(tmp_path: Path, between: bytes) -> None:
    jpeg = encoded(Image.new("RGB", (90, 70)))
    after_the_first = 2 + 18
    refused(tmp_path, jpeg[:after_the_first] + between + jpeg[after_the_first:])


def test_a_jpeg_of_a_million_tables_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, with_segments(encoded(scene(1)), *[(0xDB, (b"\0" + bytes(64)) * 1000)] * 20))


# PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"prVt", b"tEXt", b"IDAT"])
def test_a_png_of_far_more_chunks_than_an_image_needs_is_refused(tmp_path: Path, kind: bytes) -> None:
    png = encoded(Image.new("RGB", (90, 70)), "PNG")
    for place in (33, len(png) - 12):
        refused(tmp_path, png[:place] + chunk(kind, b"") * 3000 + png[place:])


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_of_many_texts_that_grow_a_thousandfold_is_refused(tmp_path: Path, kind: bytes) -> None:
    png = encoded(scene(1), "PNG")
    packed = (b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0") + zlib.compress(bytes(100))
    taken(tmp_path, png[:33] + chunk(kind, packed) + png[33:])
    with pytest.raises(TouchlineError):
        photos.decode(png[:33] + chunk(kind, packed) * 70 + png[33:], 32)


def test_a_png_whose_pixels_go_on_behind_the_last_is_refused(tmp_path: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100, 100, 8, 2, 0, 0, 0))
    # libpng would inflate all of it, and drop it.
    content = header + chunk(b"IDAT", zlib.compress(bytes(200_000_000))) + chunk(b"IEND", b"")
    (tmp_path / "photo").write_bytes(content)
    assert photos.measure(tmp_path / "photo", 60).error
    with pytest.raises(TouchlineError, match="more data"):
        predict.pixels(content, 32, 60)


# GIF


def with_blocks(gif: bytes, blocks: bytes) -> bytes:
    at = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    return gif[:at] + blocks + gif[at:]


@pytest.mark.parametrize(
    "blocks",
    [
        b"!\xfe\0" * 3000, b"!\xfe\1a\0" * 3000, b"!\xfe" + b"\1a" * 3000 + b"\0",
        b"!\xfe" + (b"\xff" + bytes(255)) * 5000 + b"\0",
    ],
    ids=["empty comments", "short comments", "one comment in short pieces", "one comment of a megabyte"],
)  # fmt: skip
def test_a_gif_of_far_more_comments_than_an_image_needs_is_refused(tmp_path: Path, blocks: bytes) -> None:
    gif = encoded(scene(1, 90, 70), "GIF")
    taken(tmp_path, with_blocks(gif, b"!\xfe\3abc\0"))
    refused(tmp_path, with_blocks(gif, blocks))


# TIFF


def tiff(tags: dict[int, list[int]], strips: int, data: bytes = bytes(16), tiles: bool = False) -> bytes:
    """A TIFF all of whose strips, or tiles, are the same bytes."""
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags = tags | {324 if tiles else 273: [start] * strips, 325 if tiles else 279: [len(data)] * strips}
    entries, rest = b"", data
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        field = packed if len(packed) == 4 else struct.pack("<I", start + len(rest))
        rest += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, 4, len(values)) + field
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rest


GREY = {258: [8], 259: [1], 262: [1], 277: [1]}


def test_a_tiff_of_many_strips_or_tiles_is_refused(tmp_path: Path) -> None:
    taken(tmp_path, tiff(GREY | {256: [64], 257: [100], 278: [1]}, 100, bytes(range(64))))
    refused(tmp_path, tiff(GREY | {256: [2], 257: [100_000], 278: [1]}, 100_000))
    refused(tmp_path, tiff(GREY | {256: [400], 257: [400], 322: [1], 323: [1]}, 160_000, tiles=True))
    # More than it lists: readers go by the sizes.
    refused(tmp_path, tiff(GREY | {256: [400], 257: [400], 322: [1], 323: [1]}, 1, tiles=True))


def test_a_tiff_tile_far_larger_than_its_image_is_refused() -> None:
    content = tiff(GREY | {256: [64], 257: [64], 322: [60_000], 323: [60_000]}, 1, tiles=True)
    with pytest.raises(TouchlineError):
        photos.decode(content, 32)


def test_a_tiff_of_progressive_jpegs_is_refused(tmp_path: Path) -> None:
    tags = GREY | {256: [400], 257: [300], 259: [7], 278: [300]}
    taken(tmp_path, tiff(tags, 1, encoded(scene(1).convert("L"))))
    refused(tmp_path, tiff(tags, 1, encoded(scene(1).convert("L"), progressive=True)))


def test_a_tiff_whose_tags_contradict_each_other_is_judged_by_the_worst() -> None:
    content = bytearray(tiff(GREY | {256: [64], 257: [64], 278: [64], 280: [60_000], 281: [60_000]}, 1))
    # Two more tags of little use become a second width and a second height.
    for number, tag in ((280, 256), (281, 257)):
        at = content.index(struct.pack("<HH", number, 4))
        content[at : at + 2] = struct.pack("<H", tag)
    with pytest.raises(TouchlineError):
        photos.decode(bytes(content), 32)


# WebP and BMP


def webp(*chunks: bytes, flags: int = 8, size: tuple[int, int] = (400, 300)) -> bytes:
    extended = bytes([flags, 0, 0, 0]) + b"".join((side - 1).to_bytes(3, "little") for side in size)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + extended + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_webp_of_far_more_chunks_than_an_image_needs_is_refused(tmp_path: Path) -> None:
    image = encoded(scene(1), "WEBP")[12:]
    taken(tmp_path, webp(image, flags=0))
    refused(tmp_path, webp(image, b"abcd\0\0\0\0" * 3000, flags=0))


def test_a_bmp_in_run_lengths_is_refused(tmp_path: Path) -> None:
    # Pillow takes them apart in Python.
    bmp = bytearray(encoded(scene(1).convert("P"), "BMP"))
    bmp[30] = 1
    refused(tmp_path, bytes(bmp))


# AVIF


def avif(times: int = 1, size: tuple[int, int] = (400, 300), **options: object) -> bytes:
    """A scene as AVIF that says it has `size`; its pictures stand `times` times in its data."""
    content = encoded(scene(1), "AVIF", **options)
    content = content.replace(struct.pack(">II", 400, 300), struct.pack(">II", *size))
    start = content.index(b"mdat") + 4
    data = content[start:]
    # The lengths of `mdat` and of the one item, in `iloc`.
    head = content[: start - 8].replace(struct.pack(">I", len(data)), struct.pack(">I", times * len(data)))
    return head + struct.pack(">I4s", 8 + times * len(data), b"mdat") + times * data


def test_an_avif_as_programs_write_it_is_taken(tmp_path: Path) -> None:
    for subsampling in ("4:4:4", "4:2:0", "4:0:0"):
        taken(tmp_path, avif(subsampling=subsampling))
    taken(tmp_path, encoded(scene(1).convert("RGBA"), "AVIF"))


@pytest.mark.parametrize("size", [(64, 48), (400, 299), (4, 300)])
def test_an_avif_that_is_larger_than_it_says_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    refused(tmp_path, avif(size=size))


def test_an_avif_of_more_frames_than_a_still_picture_has_is_refused(tmp_path: Path) -> None:
    layout.read(avif(4))
    refused(tmp_path, avif(5))


def test_an_avif_of_far_more_parts_than_an_image_needs_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, avif() + struct.pack(">I4s", 8, b"free") * 5000)
    whole = avif()
    place = whole.index(b"ipma") + 8
    refused(tmp_path, whole[:place] + b"\xff\xff\xff\xff" + whole[place + 4 :])


@pytest.mark.parametrize("kind", [b"pitm", b"iloc", b"iinf", b"iprp", b"ispe", b"av1C", b"meta"])
def test_an_avif_that_lacks_a_box_is_refused(tmp_path: Path, kind: bytes) -> None:
    refused(tmp_path, avif().replace(kind, b"free"))


# Memory


def test_a_file_far_larger_than_a_photo_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded(scene(1)))
    # Its blocks are on no disk; to read it would take minutes, and all memory.
    os.truncate(tmp_path / "photo.jpg", 2**36)
    (what, pixels) = predict._read(predict.Found(tmp_path / "photo.jpg"), tmp_path, 32, 60)
    assert pixels is None and "MB" in what[1]


@pytest.mark.parametrize("kind", ["APNG", "animated WebP", "TIFF in one piece", "progressive JPEG in full"])
def test_a_photo_that_takes_more_memory_than_one_may_is_refused(kind: str) -> None:
    side = 7700
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    match kind:
        case "APNG":
            content, size = png + chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"IDAT", b"x"), 96
        case "animated WebP":
            content, size = webp(b"ANIM\6\0\0\0" + bytes(6), flags=2, size=(side, side)), 96
        case "TIFF in one piece":
            tags = {258: [16] * 4, 259: [8], 262: [2], 277: [4], 256: [side], 257: [side], 278: [side]}
            content, size = tiff(tags, 1), 96
        case _:
            content, size = encoded(Image.new("RGB", (65_000, 900)), progressive=True, subsampling=0), 480
    with pytest.raises(TouchlineError, match="too much memory or time"):
        photos.decode(content, size)


def test_photos_decoded_at_once_share_their_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of photos that each take more than half of what there is, one is decoded at a time, by whatever looks at them."""
    at_once, most = 0, 0
    real, guard = photos._pixels, threading.Lock()

    def watched(*arguments: object) -> np.ndarray:
        nonlocal at_once, most
        with guard:
            at_once += 1
            most = max(most, at_once)
        try:
            return real(*arguments)
        finally:
            with guard:
                at_once -= 1

    png = encoded(scene(1), "PNG")
    (tmp_path / "photo").write_bytes(png)
    monkeypatch.setattr(photos, "_pixels", watched)
    monkeypatch.setattr(photos, "_TOGETHER", Budget(400 * 300 * 6 + 1000))
    looks = [lambda: photos.decode(png, 32), lambda: photos.measure(tmp_path / "photo", 60)] * 8
    threads = [threading.Thread(target=look) for look in looks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_budget_is_whole_again_after_every_end() -> None:
    budget = Budget(10)
    with pytest.raises(ZeroDivisionError), budget.part(7):
        1 / 0  # noqa: B018
    with budget.part(10):
        waiting = threading.Thread(target=lambda: budget.part(1).__enter__())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join()
