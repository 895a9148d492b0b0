"""What an image file is made of, told from its bytes before anything decodes them.

Some files are cheap to send and expensive to decode: scans that repeat, parts by the million, tags that all claim the
same bytes. A thread that decodes cannot be stopped, so the cost is worked out from the file's structure first, and a
file that costs too much is refused. The limits are about twice the worst that ordinary programs write.

Formats: JPEG, ITU-T T.81; PNG, W3C; GIF89a; TIFF 6.0; WebP, RFC 9649; BMP as Windows and OS/2 have it; AVIF, the boxes
of ISO 14496-12 and 23008-12 with images of AV1 (its bitstream specification, 5.3 to 5.5).
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from touchline.core.errors import TouchlineError

# Parts are markers, chunks, blocks and tags. Pillow reads them in Python, in up to 10 microseconds each.
_PARTS, _BYTES_A_PART = 1000, 128
# Values of tags, and bytes of a JPEG's tables: Pillow makes a Python object of each.
_VALUES, _TABLES = 2**17, 2**20
# Bytes before a GIF's first frame: Pillow joins a comment block by block, and copies all of it each time.
_EXTENSIONS = 2**20
_STRIPS = 2**14
# A progressive JPEG of libjpeg or mozjpeg passes over its samples 4 to 6 times, in 6 to 14 scans. Passing over 10**9
# samples takes 0.6 s at most.
_SCANS, _PASSES, _SAMPLES = 100, 10, 10**9
# Bytes: libpng inflates no text or profile any further.
_INFLATED = 8_000_000
# Deflate cannot make more of one byte; inflating so many bytes takes a quarter of a second.
_DEFLATE_RATIO, _UNSEEN = 1032, 128_000_000

# Bytes for each pixel that Pillow holds at most while it lays a transparent photo on white.
_BLENDED, _BLENDED_WEBP = 14, 20
# The same of an AVIF, with samples of 8 bits and of more.
_AVIF, _AVIF_DEEP = 20, 30
# A still picture is one frame, or one a layer. Hidden frames cost as much as shown ones.
_AV1_FRAMES = 4

_PNG = b"\x89PNG\r\n\x1a\n"
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# Baseline, extended, progressive (C0 to C2), and kinds that neither cameras nor browsers use: lossless, arithmetic.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EXIF = b"Exif\0\0"
_SIZE_OF = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTE_TYPES = {1, 2, 6, 7}
# Of TIFF 6.0: sizes, depth, compression, strips, tiles; each is a SHORT or a LONG.
_LAYOUT_TAGS = {256, 257, 258, 259, 273, 277, 278, 279, 284, 322, 323, 324, 325}
# The EXIF orientation for an AVIF's quarter turns (counter-clockwise), then no mirror, top and bottom, left and right.
_AVIF_ORIENTATIONS = ((1, 4, 2), (8, 5, 7), (3, 2, 4), (6, 7, 5))
_ODD_ORDERS = {b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"}
# None, LZW, JPEG, deflate, PackBits, deflate by its old number.
_TIFF_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946}


class Refused(TouchlineError):
    """The file is damaged, of another kind, or would cost too much to decode."""


@dataclass(frozen=True)
class Layout:
    """What a file says of its image.

    Attributes:
        format: JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF.
        width, height: pixels as stored.
        orientation: as in EXIF, 1 to 8.
        samples: bytes of all samples uncompressed, where their depth and number vary: PNG and TIFF.
        per_pixel: bytes that OpenCV holds for each pixel at most while it decodes the file, as measured.
        held: bytes that decoding holds besides: coefficients of several scans, a strip, texts.
        transparent: its pixels may be transparent, wholly or in part; of any AVIF, as Pillow reads them all.
        deep: its samples have 16 bits.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    samples: int = 0
    per_pixel: int = 6
    held: int = 0
    transparent: bool = False
    deep: bool = False


def read(content: bytes) -> Layout:
    """The layout of an image file's bytes.

    Raises:
        Refused: they are none of the formats above, damaged, or made to cost much.
    """
    found = format_of(content)
    if not found:
        raise Refused(other(content) or "not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file")
    try:
        return _READERS[found](content)
    except (struct.error, IndexError, KeyError, ZeroDivisionError):
        raise Refused("its header is damaged") from None


def check_inflation(content: bytes, found: Layout) -> None:
    """Refuse a PNG with data after its last pixel: libpng inflates all of it, only to drop it.

    Only inflating tells, so this is for callers that are about to decode the file, and does nothing where the surplus
    cannot be large.

    Args:
        found: the file's layout.

    Raises:
        Refused: there is twice as much data as the pixels need, or more.
    """
    if found.format != "PNG":
        return
    allowed = 2 * found.samples + _INFLATED
    view = memoryview(content)
    pieces = [view[start : start + length] for kind, start, length in _chunks(content) if kind == b"IDAT"]
    if _DEFLATE_RATIO * sum(map(len, pieces)) <= allowed + _UNSEEN:
        return
    inflater, total = zlib.decompressobj(), 0
    try:
        for piece in pieces:
            left: bytes | memoryview = piece
            while left and not inflater.eof:
                total += len(inflater.decompress(left, 2**20))
                left = inflater.unconsumed_tail
                if total > allowed:
                    raise Refused("a PNG with far more data than its pixels need")
    except zlib.error:
        return  # the decoder finds that too


def format_of(content: bytes) -> str:
    """The format that the first bytes of a file say; empty where they say none of ours."""
    return next((name for name, start in _STARTS.items() if start.match(content)), "")


def other(content: bytes) -> str:
    """What a file is that is not an image we read, and what to do, from its first 1,024 bytes; empty if unknown."""
    return next((words for words, start in _OTHERS.items() if start.match(content)), "")


class _Parts:
    """Counts a file's parts, and refuses it when there are far more than a file of its size needs."""

    def __init__(self, content: bytes) -> None:
        self._left = _PARTS + len(content) // _BYTES_A_PART

    def add(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise Refused("it has far more parts than an image needs")


def _jpeg(content: bytes) -> Layout:
    parts, tables, exif = _Parts(content), 0, []
    width = height = scans = work = 0
    # Of each component its name and how many samples it has.
    components: list[tuple[int, int]] = []
    progressive = buffered = False
    place = 2
    while found := _MARKER.search(content, place):
        kind = found[0][1]
        # Pillow skips the bytes between two segments one by one.
        parts.add(1 if scans else 1 + found.start() - place)
        place = found.end()
        if kind == 0xD9:
            break
        if kind in {0x01, 0xD8}:
            continue
        body = content[place + 2 : place + max(2, int.from_bytes(content[place : place + 2], "big"))]
        place += 2 + len(body)
        if kind in _FRAMES:
            if components or kind > 0xC2:
                raise Refused("a JPEG of a kind that is not supported: save it as an ordinary one")
            progressive = kind == 0xC2
            height, width, components = _frame(body)
        elif kind == 0xDA:
            scans += 1
            scanned = body[1 : 1 + 2 * body[0] : 2]
            work += sum(samples for name, samples in components if name in scanned)
            buffered = progressive or body[0] < len(components)
            if not buffered:
                break
        elif kind == 0xE1 and body.startswith(_EXIF):
            exif.append(body[len(_EXIF) :])
            tables += len(body)
        elif kind == 0xE2 and body.startswith(b"MPF\0"):
            _directory(body[4:])
            tables += len(body)
        elif kind < 0xE0:
            tables += len(body)
    if tables > _TABLES:
        raise Refused("a JPEG with more tables than an image needs")
    total = sum(samples for _, samples in components)
    if not total:
        raise Refused("its header is damaged")
    if scans > _SCANS or work > max(_PASSES * total, _SAMPLES):
        raise Refused(f"{scans:,} scans are more than a JPEG of {width:,} x {height:,} pixels needs")
    orientation = _orientation(b"".join(exif))
    return Layout("JPEG", width, height, orientation, held=2 * total if buffered else 0)


def _frame(body: bytes) -> tuple[int, int, list[tuple[int, int]]]:
    """Height, width, and name and samples of each component, out of a start of frame (T.81, B.2.2)."""
    height, width, count = struct.unpack_from(">HHB", body, 1)
    found = [(body[at], body[at + 1] >> 4, body[at + 1] & 15) for at in range(6, 6 + 3 * count, 3)]
    if not found:
        raise Refused("its header is damaged")
    most = max(across for _, across, _ in found) * max(down for _, _, down in found)
    return height, width, [(name, -(-width * height * across * down // most)) for name, across, down in found]


def _png(content: bytes) -> Layout:
    parts, orientation, held, pixels_begun, animated = _Parts(content), 1, 0, False, False
    width, height, depth, colour = struct.unpack_from(">IIBB", content, len(_PNG) + 8)
    transparent = colour in {4, 6}
    for kind, start, length in _chunks(content):
        parts.add()
        # The sizes are in the first chunk; readers differ in how they treat a second one of its kind.
        if (kind == b"IHDR") != (start == len(_PNG) + 8):
            raise Refused("its header is damaged")
        # OpenCV allocates whatever length a chunk claims.
        if start + length > len(content):
            raise Refused("it is cut off or damaged")
        pixels_begun |= kind == b"IDAT"
        animated |= kind == b"acTL"
        transparent |= kind == b"tRNS" and not pixels_begun
        if kind in {b"zTXt", b"iTXt", b"iCCP"}:
            held += _INFLATED
        elif kind == b"eXIf" and not pixels_begun:
            orientation = _orientation(content[start : start + length])
    samples = width * height * {2: 3, 4: 2, 6: 4}.get(colour, 1) * depth // 8
    per_pixel = _BLENDED if transparent else 12 if animated or depth == 16 else 6
    return Layout("PNG", width, height, orientation, samples, per_pixel, held, transparent, depth == 16)


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and length of what each chunk of a PNG holds, up to its end."""
    kind, place = b"", len(_PNG)
    while place + 8 <= len(content) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, place)
        yield kind, place + 8, length
        place += length + 12


def _gif(content: bytes) -> Layout:
    parts = _Parts(content)
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    place = begin = 13 + _palette(flags)
    transparent = False
    while content[place : place + 1] == b"!":
        # Of a graphic control extension the lowest bit of its flags.
        transparent |= content[place + 1] == 0xF9 and bool(content[place + 3] & 1)
        place += 2
        while size := content[place]:
            parts.add()
            place += 1 + size
        parts.add()
        place += 1
        if place - begin > _EXTENSIONS:
            raise Refused("a GIF with more comments than an image needs")
    if content[place : place + 1] != b",":
        raise Refused("its header is damaged")
    left, top, inner_width, inner_height = struct.unpack_from("<HHHH", content, place + 1)
    # Where the first frame leaves the canvas bare, it is transparent too.
    transparent |= (left, top, inner_width, inner_height) != (0, 0, width, height)
    width, height = max(width, left + inner_width), max(height, top + inner_height)
    return Layout("GIF", width, height, per_pixel=_BLENDED if transparent else 8, transparent=transparent)


def _palette(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 128 else 0


def _bmp(content: bytes) -> Layout:
    (size,) = struct.unpack_from("<I", content, 14)
    if size == 12:
        width, height = struct.unpack_from("<HH", content, 18)
        compression = 0
    else:
        width, height, _, _, compression = struct.unpack_from("<iiHHI", content, 18)
    # Pillow decodes them in Python, pixel by pixel.
    if compression in {1, 2}:
        raise Refused("a run-length encoded BMP, which is not supported: save it as PNG")
    return Layout("BMP", abs(width), abs(height))


def _tiff(content: bytes) -> Layout:
    tags = _directory(content)

    def most(tag: int, default: int) -> int:
        # Where a tag is given twice, readers differ in which one they use.
        return max(tags.get(tag, ()), default=default)

    width, height, samples, depth = most(256, 0), most(257, 0), most(277, 1), most(258, 1)
    compression = tags.get(259, [1])[0]
    if compression not in _TIFF_COMPRESSIONS:
        raise Refused(f"a TIFF with compression {compression}, which is not supported: save it as PNG")
    tiled = 322 in tags
    wide, tall = (min(tags[322]), min(tags[323])) if tiled else (width, min(height, *tags.get(278, [height])))
    across, down = -(-width // wide), -(-height // tall)
    starts, lengths = (tags.get(tag, []) for tag in ((324, 325) if tiled else (273, 279)))
    planes = samples if most(284, 1) == 2 else 1
    if max(across * down * planes, len(starts), len(lengths)) > _STRIPS:
        raise Refused("a TIFF with more strips or tiles than an image needs")
    for start, length in set(zip(starts, lengths, strict=False)) if compression == 7 else ():
        strip = content[start : start + length]
        if strip.startswith(b"\xff\xd8") and _jpeg(strip).held:
            raise Refused("a TIFF of progressive JPEGs, which is not supported: save it as PNG")
    piece = wide * tall * samples * depth // 8
    # ExtraSamples: 1 and 2 are opacity. Programs leave the tag out, too.
    transparent = bool({1, 2} & set(tags.get(338, ()))) or (samples == 4 and tags.get(262) == [2])
    deep = depth == 16
    per_pixel = _BLENDED if transparent else 12 if deep else 6
    # Tiles may reach far beyond the image.
    return Layout(
        "TIFF", width, height, _upright(tags), across * down * piece, per_pixel, piece, transparent, deep
    )  # fmt: skip


def _webp(content: bytes) -> Layout:
    parts, orientation, width, height, animated, place = _Parts(content), 1, 0, 0, False, 12
    transparent = False
    while place + 8 <= len(content):
        parts.add()
        kind, length = struct.unpack_from("<4sI", content, place)
        place += 8
        if kind == b"VP8X":
            sizes = [1 + int.from_bytes(content[place + at : place + at + 3], "little") for at in (4, 7)]
            transparent |= bool(content[place] & 0x10)
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", content, place + 1)
            sizes = [1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)]
            transparent |= bool(bits >> 28 & 1)
        elif kind == b"VP8 ":
            sizes = [side & 0x3FFF for side in struct.unpack_from("<HH", content, place + 6)]
        else:
            sizes = [0, 0]
        width, height = max(width, sizes[0]), max(height, sizes[1])
        animated |= kind == b"ANIM"
        if kind == b"EXIF":
            orientation = _orientation(content[place : place + length])
        place += length + length % 2
    per_pixel = _BLENDED_WEBP if transparent else 12 if animated else 8
    return Layout("WEBP", width, height, orientation, per_pixel=per_pixel, transparent=transparent)


def _avif(content: bytes) -> Layout:
    parts = _Parts(content)
    if content[8:12] == b"avis":
        raise Refused("an animated AVIF, which is not supported: save it as JPEG or PNG")
    top = dict(_boxes(content, 0, len(content), parts))
    start, end = top[b"meta"]
    meta = dict(_boxes(content, start + 4, end, parts))
    kinds = _avif_kinds(content, *meta[b"iinf"], parts)
    if b"grid" in kinds.values():
        raise Refused("an AVIF made of tiles, which is not supported: save it as JPEG or PNG")
    start, _ = meta[b"pitm"]
    primary = int.from_bytes(content[start + 4 : start + (8 if content[start] else 6)], "big")
    places = _avif_places(content, meta, parts)
    properties = _avif_properties(content, *meta[b"iprp"], parts)
    if kinds.get(primary) != b"av01":
        raise Refused("its header is damaged")
    width, height = struct.unpack_from(">4xII", content, properties[primary][b"ispe"])
    deep = False
    for item in (item for item, kind in kinds.items() if kind == b"av01"):
        # The picture itself, its opacity, a thumbnail. What each says of its size has to be what a decoder finds.
        sizes = [struct.unpack_from(">4xII", content, properties[item][b"ispe"])]
        sizes += _av1_sizes(b"".join(content[start:end] for start, end in places[item]), parts)
        if any(across > width or down > height for across, down in sizes):
            raise Refused("its header is damaged")
        deep |= bool(content[properties[item][b"av1C"] + 2] & 0x40)
    known = properties[primary]
    turn = content[known[b"irot"]] & 3 if b"irot" in known else 0
    mirror = 1 + (content[known[b"imir"]] & 1) if b"imir" in known else 0
    return Layout(
        "AVIF", width, height, _AVIF_ORIENTATIONS[turn][mirror], per_pixel=_AVIF_DEEP if deep else _AVIF,
        transparent=True, deep=deep,
    )  # fmt: skip


def _boxes(content: bytes, place: int, end: int, parts: _Parts) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The kind of each box between two bytes of a file, and between which bytes its body is (ISO 14496-12, 4.2)."""
    while place < end:
        parts.add()
        length, kind = struct.unpack_from(">I4s", content, place)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", content, place + 8), 16
        elif length == 0:
            length = end - place
        if length < head or place + length > end:
            raise Refused("it is cut off or damaged")
        yield kind, (place + head, place + length)
        place += length


def _avif_kinds(content: bytes, start: int, end: int, parts: _Parts) -> dict[int, bytes]:
    """The kind of each item (ISO 14496-12, 8.11.6)."""
    kinds = {}
    for _, (at, _) in _boxes(content, start + (8 if content[start] else 6), end, parts):
        item, _, kind = struct.unpack_from(">IH4s" if content[at] > 2 else ">HH4s", content, at + 4)
        if item in kinds:
            raise Refused("its header is damaged")
        kinds[item] = kind
    return kinds


def _avif_places(content: bytes, meta: dict[bytes, tuple[int, int]], parts: _Parts) -> dict[int, list[tuple[int, int]]]:
    """Between which bytes the parts of each item are (ISO 14496-12, 8.11.3)."""
    at, end = meta[b"iloc"]
    version, sizes = content[at], int.from_bytes(content[at + 4 : at + 6], "big")
    of_offset, of_length, of_base, of_index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    at += 6

    def number(size: int) -> int:
        nonlocal at
        parts.add()
        if at + size > end:
            raise Refused("its header is damaged")
        at += size
        return int.from_bytes(content[at - size : at], "big")

    places: dict[int, list[tuple[int, int]]] = {}
    claimed = 0
    for _ in range(number(4 if version > 1 else 2)):
        item = number(4 if version > 1 else 2)
        inside = number(2) & 15 if version else 0
        number(2)
        base = number(of_base) + (meta[b"idat"][0] if inside == 1 else 0)
        places[item] = []
        for _ in range(number(2)):
            number(of_index if version else 0)
            start = base + number(of_offset)
            length = number(of_length)
            claimed += length
            if inside > 1 or start + length > len(content) or claimed > len(content):
                raise Refused("it is cut off or damaged")
            places[item].append((start, start + length))
    return places


def _avif_properties(content: bytes, start: int, end: int, parts: _Parts) -> dict[int, dict[bytes, int]]:
    """By item, where the body of each of its properties begins (ISO 23008-12, 9.3)."""
    of_items: dict[int, dict[bytes, int]] = {}
    known: list[tuple[bytes, int]] = []
    for kind, (body, stop) in _boxes(content, start, end, parts):
        if kind == b"ipco":
            known += [(name, begin) for name, (begin, _) in _boxes(content, body, stop, parts)]
            continue
        wide, long = content[body] > 0, content[body + 3] & 1
        (count,) = struct.unpack_from(">I", content, body + 4)
        place = body + 8
        for _ in range(count):
            parts.add()
            item, number = struct.unpack_from(">IB" if wide else ">HB", content, place)
            place += 5 if wide else 3
            for _ in range(number):
                parts.add()
                index = int.from_bytes(content[place : place + 1 + long], "big") & (0x7FFF if long else 0x7F)
                place += 1 + long
                if index:
                    of_items.setdefault(item, {}).setdefault(*known[index - 1])
    return of_items


def _av1_sizes(data: bytes, parts: _Parts) -> list[tuple[int, int]]:
    """Width and height of each sequence header in an item of AV1 (AV1, 5.3 to 5.5)."""
    sizes, frames, place = [], 0, 0
    while place < len(data):
        parts.add()
        kind, extended, sized = data[place] >> 3 & 15, data[place] >> 2 & 1, data[place] >> 1 & 1
        place += 1 + extended
        length = shift = 0
        while sized:
            length |= (data[place] & 127) << shift
            shift += 7
            sized = data[place] >> 7 if shift < 56 else 0
            place += 1
        if not shift:
            length = len(data) - place
        if kind == 1:
            sizes.append(_av1_size(data[place : place + length]))
        # A frame, or the header of one.
        frames += kind in {3, 6}
        place += length
    if not sizes or frames > _AV1_FRAMES:
        raise Refused("an AVIF of a kind that is not supported: save it as JPEG or PNG")
    return sizes


def _av1_size(header: bytes) -> tuple[int, int]:
    """The most that a frame may have across and down, out of a sequence header (AV1, 5.5.1)."""
    bits, place = int.from_bytes(header, "big"), 8 * len(header)

    def number(size: int) -> int:
        nonlocal place
        place -= size
        if place < 0:
            raise Refused("its header is damaged")
        return bits >> place & (1 << size) - 1

    number(4)
    if number(1):  # a still picture with the short header
        number(5)
    else:
        if number(1):
            raise Refused("an AVIF of a kind that is not supported: save it as JPEG or PNG")
        delays = number(1)
        for _ in range(number(5) + 1):
            number(12)
            if number(5) > 7:
                number(1)
            if delays and number(1):
                number(4)
    across, down = number(4) + 1, number(4) + 1
    return number(across) + 1, number(down) + 1


def _orientation(exif: bytes) -> int:
    exif = exif.removeprefix(_EXIF).removeprefix(_EXIF)
    # Some programs write the prefix twice. Pillow removes any number of them, copying the rest each time.
    if exif.startswith(_EXIF):
        raise Refused("its EXIF data is damaged")
    return _upright(_directory(exif))


def _upright(tags: dict[int, list[int]]) -> int:
    found = tags.get(0x0112, [1])[0]
    return found if 1 <= found <= 8 else 1


def _directory(content: bytes) -> dict[int, list[int]]:
    """Whole numbers in the first directory of a TIFF file or an EXIF block, by tag; empty where there is none.

    Raises:
        Refused: its tags claim more than twice the bytes there are, or too many values. Readers copy what each claims.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None:
        if content[:4] in _ODD_ORDERS:
            raise Refused("its tags are in an order that is not supported")
        return {}
    (at,) = struct.unpack_from(order + "I", content, 4) if len(content) >= 8 else (len(content),)
    if at + 2 > len(content):
        return {}
    (count,) = struct.unpack_from(order + "H", content, at)
    _Parts(content).add(count)
    found: dict[int, list[int]] = {}
    claimed = values = 0
    for place in range(at + 2, min(at + 2 + 12 * count, len(content) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", content, place)
        size = _SIZE_OF.get(kind, 0) * number
        start = place + 8 if size <= 4 else struct.unpack_from(order + "I", content, place + 8)[0]
        if start + size > len(content):
            continue
        claimed += size
        values += number if kind not in _BYTE_TYPES else 0
        if claimed > 2 * len(content) or values > _VALUES:
            raise Refused("its tags claim more than the file has")
        if kind in {3, 4}:
            read = struct.unpack_from(f"{order}{number}{'H' if kind == 3 else 'I'}", content, start)
            found.setdefault(tag, []).extend(read)
        elif tag in _LAYOUT_TAGS:
            raise Refused("its header is damaged")
    return found


_STARTS = {
    name: re.compile(start, re.DOTALL)
    for name, start in {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": re.escape(_PNG),
        "WEBP": rb"RIFF....WEBP",
        "GIF": rb"GIF8[79]a",
        # Many texts begin with these two letters; at byte 14 is the size of a header, of which there are seven.
        "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
        "TIFF": rb"II\*\0|MM\0\*",
        "AVIF": rb"\0\0\0.ftyp(?:avi[fs]|(?:mif1|msf1).{4}(?:.{4}){0,8}avi[fs])",
    }.items()
}
# ISO 14496-12 and 23008-12: a box of brands; HEIC shares some of them with AVIF, which is looked for first.
_OTHERS = {
    words: re.compile(start, re.DOTALL)
    for words, start in {
        "a HEIC photo, which is not supported: save it as JPEG or PNG":
            rb"\0\0\0.ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)",
        "a Git LFS pointer: git lfs pull": rb"version https://git-lfs\.github\.com/spec/",
        "a drawing in SVG, which is not supported: save it as JPEG or PNG":
            rb"(?i:(?!.{0,1000}?<(?:!doctype )?html).{0,1000}?<svg)",
        "a web page": rb"(?i:.{0,1000}?(?:<!doctype html|<html|<\?xml))",
        "empty file": rb"\Z",
    }.items()
}  # fmt: skip
_READERS: dict[str, Callable[[bytes], Layout]] = {
    "JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "BMP": _bmp, "TIFF": _tiff,
    "AVIF": _avif,
}  # fmt: skip
