"""What a photo's file states about machine learning: IPTC's data-mining field in its XMP, and C2PA's assertion.

XMP is found by a text search, which ISO 16684-1 (7.3) provides for readers that do not know a file's format, so one
method serves all formats. Two cases need more: a JPEG splits XMP of over 64 KB into segments, and a PNG may compress
it. Packets in UTF-16 or UTF-32, which only TIFF allows, are not found.

The field's values: https://iptc.org/std/photometadata/documentation/userguide/#_data_mining; the assertions: CAWG
training and data mining 1.1, and `c2pa.training-mining` of C2PA 1.
"""

import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from xml.parsers import expat

from touchline.core.errors import one_line
from touchline.data import layout

_FIELD = "http://ns.useplus.org/ldf/xmp/1.0/ DataMining"
# A classifier is not generative. Every other value forbids training, including those with conditions and unknown ones.
_ALLOWED = {"", "DMI-UNSPECIFIED", "DMI-ALLOWED", "DMI-PROHIBITED-GENAIMLTRAINING"}
_FORBIDDEN_USES = {"ai_training", "data_mining"}
# Bytes of an XMP packet; larger ones contain pictures.
_LONGEST = 2**20
# A photo has one packet, and one more for each smaller picture in its file.
_MOST_PACKETS = 20
_START = re.compile(rb"<(\w{1,20}:(?:xmpmeta|xapmeta|RDF))[\s>]")
# The bytes between two parts of XMP that a JPEG stores in several segments (ISO 16684-3, 1.1.3.1).
_BETWEEN = re.compile(rb"\xff\xe1..http://ns\.adobe\.com/xmp/extension/\0.{40}", re.DOTALL)
_COMPRESSED = re.compile(rb"iTXtXML:com\.adobe\.xmp\x00\x01\x00[^\x00]{0,80}\x00[^\x00]{0,80}\x00")
# The description of the box that holds a C2PA manifest store (C2PA 2.2, 11.1.4).
_C2PA = b"jumdc2pa\0\x11\0\x10"
_TYPES = {
    "JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "TIFF": "image/tiff",
    "AVIF": "image/avif",
}  # fmt: skip


class _Unreadable(Exception):
    """The statement in the file cannot be read."""


@dataclass(frozen=True)
class Statement:
    """What a file states.

    Attributes:
        forbids: the field and value that forbid training a classifier on it; empty if nothing does.
        unreadable: why a part could not be read; empty if everything could.
    """

    forbids: str = ""
    unreadable: str = ""


def read(content: bytes) -> Statement:
    """The statement in the bytes of an image file; never raises for bad content."""
    forbids, unreadable = "", ""
    for reader in (_iptc, _c2pa):
        try:
            forbids = forbids or reader(content)
        except _Unreadable as error:
            unreadable = unreadable or str(error)
    return Statement(forbids, unreadable)


def _iptc(content: bytes) -> str:
    unreadable = None
    for packet in _packets(content):
        try:
            values = [value.rpartition("/")[2] for value in _values(packet)]
        except _Unreadable as error:
            unreadable = error
            continue
        if forbidding := next((value for value in values if value.upper() not in _ALLOWED), ""):
            return f"IPTC {ascii(forbidding)[1:-1][:60]}"
    if unreadable:
        raise unreadable
    return ""


def _packets(content: bytes) -> Iterator[bytes]:
    """Each XMP packet in a file, by its outermost element."""
    if _BETWEEN.search(content):
        content = _BETWEEN.sub(b"", content)
    if found := _COMPRESSED.search(content):
        inflating = zlib.decompressobj()
        try:
            content += inflating.decompress(content[found.end() :], 2 * _LONGEST)
        except zlib.error:
            yield b""
    at = count = 0
    while start := _START.search(content, at):
        count += 1
        if count > _MOST_PACKETS:
            raise _Unreadable(f"more than {_MOST_PACKETS} packets of XMP")
        end = b"</" + start.group(1)
        stop = content.find(end, start.end())
        yield content[start.start() : stop + len(end)] + b">" if stop >= 0 else b""
        if stop < 0:
            return
        at = stop + len(end)


def _values(packet: bytes) -> list[str]:
    """The values of the data-mining field in a packet: an attribute, an element's text, or its resource."""
    if len(packet) > _LONGEST:
        raise _Unreadable(f"XMP of {len(packet) / 2**20:.1f} MB")
    found: list[list[str]] = []
    depth = field_at = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, field_at
        depth += 1
        found.extend([value] for key, value in attributes.items() if key == _FIELD)
        if name == _FIELD and not field_at:
            field_at = depth
            found.append([value for key, value in attributes.items() if key.endswith("# resource")])

    def text(characters: str) -> None:
        if field_at:
            found[-1].append(characters)

    def end(_: str) -> None:
        nonlocal depth, field_at
        field_at = 0 if field_at == depth else field_at
        depth -= 1

    def refuse(*_: object) -> None:
        raise _Unreadable("XMP with a document type")

    parser = expat.ParserCreate("utf-8", " ")
    parser.StartElementHandler, parser.CharacterDataHandler = start, text
    parser.EndElementHandler, parser.buffer_text = end, True
    # A document type may declare entities, which could expand to far more text than the packet has.
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(packet, True)
    except expat.ExpatError as error:
        raise _Unreadable(f"XMP that is not XML ({one_line(error, 80)})") from None
    return ["".join(parts).strip() for parts in found]


def _c2pa(content: bytes) -> str:
    if _C2PA not in content:
        return ""
    context = _c2pa_context()
    if context is None:
        raise _Unreadable("C2PA data, and the extra `c2pa` is not installed")
    from c2pa import Reader

    try:
        with Reader(_TYPES.get(layout.format_of(content), ""), io.BytesIO(content), context=context) as reader:
            store: dict[str, Any] = json.loads(reader.json())
    except Exception as error:  # hostile bytes raise many kinds of its own
        raise _Unreadable(f"C2PA data that is damaged ({one_line(error, 80)})") from None
    # The signature is not checked: an opt-out with a forged signature is respected too.
    for manifest in store.get("manifests", {}).values():
        for assertion in manifest.get("assertions", []):
            if ".training-mining" in assertion.get("label", ""):
                for key, entry in assertion.get("data", {}).get("entries", {}).items():
                    if key.rpartition(".")[2] in _FORBIDDEN_USES and entry.get("use") in {"notAllowed", "constrained"}:
                        return f"C2PA {key} {entry['use']}"
    return ""


@cache
def _c2pa_context() -> Any | None:
    """Settings of c2pa: it fetches neither remote manifests nor the status of certificates. None if not installed."""
    try:
        from c2pa import Context
    except ImportError:
        return None
    return Context.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}})
