"""Every reader of foreign bytes, on hostile ones: one clear line or the right answer, quickly, in little memory.

`TOUCHLINE_FUZZ_CASES` is how many cases each test tries, new ones each time; without it 100, always the same.
"""

import asyncio
import csv
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import imagenet_files
import numpy as np
import openimages_files
import pytest
from conftest import SHIPPED, shipped_values
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from test_layout import directory, with_blocks, with_scans, with_segments
from test_torch_weights import HEADER, KERNEL, SIX, state_dict, storage

from touchline.commands import serve
from touchline.core import files
from touchline.core.errors import TouchlineError
from touchline.core.params import Params, check, load
from touchline.core.paths import Paths
from touchline.data import decisions, layout, opt_outs, photos
from touchline.models import classifier, torch_weights
from touchline.models.classifier import Classifier
from touchline.models.engines import Network
from touchline.models.inference import ModelFiles
from touchline.models.training import Labelled
from touchline.sources import feedback, folder, imagenet, openimages
from touchline.sources.fetch import Journal
from touchline.sources.received import Received
from touchline.stages import split
from touchline.stages.validate import _read_photos

CASES = int(os.environ.get("TOUCHLINE_FUZZ_CASES", "100"))
HANG, MEMORY = 2.0, 512  # CPU seconds and MB that one case may cost
FUZZ = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="TOUCHLINE_FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SIDE = 32
CLASSES = ["red", "blue"]


class _Hang(BaseException):
    """Not an Exception: readers of hostile bytes catch all of those."""


class Watch:
    """Counts cases, and fails the one that takes too long, takes too much memory, or ends in anything but one line."""

    def __init__(self) -> None:
        self.cases = self.refused = 0
        self.seconds = self.megabytes = 0.0

    @contextmanager
    def case(self) -> Iterator[None]:
        self.cases += 1
        before = _reset_peak()
        began = time.process_time()
        old = signal.signal(signal.SIGPROF, _hangs)
        signal.setitimer(signal.ITIMER_PROF, HANG)
        try:
            yield
        except TouchlineError as error:
            self.refused += 1
            text = str(error)
            assert text and len(text.splitlines()) == 1 and len(text) < 2000, repr(text)
        except _Hang:
            raise AssertionError(f"more than {HANG:g} s") from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
            self.seconds = max(self.seconds, time.process_time() - began)
            self.megabytes = max(self.megabytes, grown := _peak() - before)
        assert grown < MEMORY, f"{grown:.0f} MB"


def _hangs(*_: object) -> None:
    raise _Hang


def _status(key: str) -> float:
    """MB of this process, by the kernel's own count; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), 0.0)


def _reset_peak() -> float:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS:")


def _peak() -> float:
    return _status("VmHWM:")


@pytest.fixture
def watch(record_property: Callable[[str, Any], None]) -> Iterator[Watch]:
    watch = Watch()
    yield watch
    record_property(
        "fuzz",
        f"{watch.cases:,} cases, {watch.refused:,} refused, slowest {watch.seconds:.2f} s, {watch.megabytes:.0f} MB",
    )


# What hostile bytes are made of

_EXTREMES = [
    b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0", b"\xff\xff",
    b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff",
    b"\0\0\0\0", b"\x80\0\0\0", b"\0\0\0\x80", b"\x40\0\0\0", b"\0\0\0\x40", b"\xff" * 8, b"\x01\0\0\0\0\0\0\0",
]  # fmt: skip
_TEXTS = [
    b"", b",", b'"', b'""', b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"../", b"/etc/passwd", b"nan",
    b"-1", b"1e999", b"9" * 40, b"=1+1", b"null", b"{", b"[" * 50,
    b"&a [*a]", b"!!python/object/apply:os.system [id]", b"? ",
    b": ", b"- ", b"|", b"\xe2\x80\xae", b"<script>", b"true",
    b"\t", b"2001-99-99", b"0x",
    b"!!int ", b"!!timestamp ", b"<<: ",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: st.SearchStrategy[bytes] | bytes, parts: list[bytes] = _EXTREMES) -> bytes:
    """A valid file with some bytes changed, put in, taken out or cut off; now and then bytes of no meaning."""
    content = bytearray(draw(seeds) if isinstance(seeds, st.SearchStrategy) else seeds)
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=400))
    for _ in range(draw(st.integers(1, 4))):
        # Half of the changes hit the beginning, where headers are.
        end = min(len(content), 96) if draw(st.booleans()) else len(content)
        at = draw(st.integers(0, max(0, end)))
        match draw(st.sampled_from(["flip", "set", "insert", "delete", "cut", "repeat"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                part = draw(st.sampled_from(parts) | st.binary(min_size=1, max_size=4))
                content[at : at + len(part)] = part
            case "insert":
                content[at:at] = draw(st.sampled_from(parts) | st.binary(min_size=1, max_size=8))
            case "delete":
                del content[at : at + draw(st.integers(1, 64))]
            case "cut":
                del content[at:]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
    return bytes(content)


def text_of(rows: list[list[Any]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


# params.yaml


def _plain(values: Any) -> bytes:
    out = io.BytesIO()
    YAML(typ="safe", pure=True).dump(values, out)
    return out.getvalue()


def _keys(value: Any) -> Any:
    return {str(key): _keys(each) for key, each in value.items()} if isinstance(value, dict) else None


def _hostile_values() -> st.SearchStrategy[Any]:
    numbers = st.sampled_from([0, -1, 2**31, 2**70, -0.5, 1.0, 1e308, float("inf"), float("nan")])
    words = st.sampled_from(["", " ", "..", "../x", "; touch canary", "$(id)", "a\nb", "x" * 5000, "CNN", "nan"])
    return st.one_of(st.none(), st.booleans(), numbers, words, st.just([]), st.just({}), st.just([[]]), st.dates())


@FUZZ
@given(data=st.data())
def test_params(watch: Watch, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "params.yaml"
    small = shipped_values()
    path.write_bytes(data.draw(mutated(st.sampled_from([SHIPPED.read_bytes()[-1700:], _plain(small)]), _TEXTS)))
    with watch.case():
        found = load(path)
        # What is taken is what stands there: no key is passed over, and none is made up.
        written = YAML(typ="safe", pure=True).load(path.read_text())
        assert _keys(written) == _keys(found.model_dump(by_alias=True, exclude_unset=True))


@FUZZ
@given(data=st.data())
def test_params_of_right_form_with_a_wrong_value_or_key(watch: Watch, data: st.DataObject) -> None:
    values = shipped_values()
    section, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(section[key], dict) and section[key] and data.draw(st.booleans()):
        section = section[key]
        key = data.draw(st.sampled_from(sorted(section)))
    change = data.draw(st.sampled_from(["value", "unknown", "missing"]))
    if change == "value":
        section[key] = data.draw(_hostile_values())
    elif change == "unknown":
        section[key + data.draw(st.sampled_from(["_", " ", "s", "; touch canary", "$(id)", "\n"]))] = section.pop(key)
    else:
        del section[key]
    with watch.case():
        taken = check(values)
        assert _keys(values) == _keys(taken.model_dump(by_alias=True, exclude_unset=True))
        assert all(name.replace("-", "").replace("_", "").isalnum() for name in [*taken.models, *taken.features])


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
                                                for a, b in zip("abcdefghij", "bcdefghijk", strict=True)),
        "classes: &a [*a]\n",
        "[" * 900,
        "classes: " + "[" * 900 + "]" * 900,
        "classes: 2001-99-99\n",
        "classes: 2001-01-01T99:99:99Z\n",
        f"split: {{seed: {'9' * 5000}}}\n",
        "? [a, b]\n: c\n",
        "? {a: b}\n: c\n",
        "classes: !!python/object/apply:os.system [touch canary]\n",
        "classes: !!binary '*'\n",
        "classes: !!int x\n",
        "<<: 3\n",
        "%YAML 9.9\n---\nclasses: a\n",
        "--- a\n--- b\n",
        "",
        "null",
    ],
)  # fmt: skip
def test_params_that_break_yaml_readers(watch: Watch, tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with watch.case():
        load(path)
        pytest.fail("taken")
    assert not Path("canary").exists()


# Tables and lists


PATHS = [f"data/photos/{label}/{number:016x}.jpg" for label in CLASSES for number in range(20)]
DIGESTS = [hashlib.sha256(path.encode()).hexdigest() for path in PATHS]


@FUZZ
@given(content=mutated(text_of([["file", "group", "licence", "author"], ["red/a.jpg", "g", "CC0-1.0", "é, \"x\""],
                                ["blue/b.jpg", "", "", ""]]), _TEXTS))  # fmt: skip
def test_manifest(watch: Watch, tmp_path: Path, content: bytes) -> None:
    for name in ("red/a.jpg", "blue/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photographs()["JPEG"])
    (tmp_path / "manifest.csv").write_bytes(content)
    with watch.case():
        found = list(folder.candidates(Received(tmp_path, 20), CLASSES))
        assert [each.origin for each in found] == ["red/a.jpg", "blue/b.jpg"]
        assert all(isinstance(fact, str) for each in found for fact in (each.group, each.licence, each.author))


@FUZZ
@given(content=mutated(text_of([list(decisions.COLUMNS), [PATHS[0], "drop", "", "me", "blurred, cut"],
                                ["0123abcd", "relabel", "blue", "", ""], ["89abcdef01", "keep", "", "", ""]]),
                       _TEXTS))  # fmt: skip
def test_decisions(watch: Watch, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data/decisions.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with watch.case():
        for found in decisions.read(path, CLASSES):
            assert found.kind in decisions.KINDS and (found.label in CLASSES) == (found.kind == "relabel")
            assert ".." not in found.photo.split("/") and not found.photo.startswith("/")


_SHOTS = [
    openimages_files.Shot(
        f"{number:016x}", {mid: "1"}, f"author {number}", f"https://a/{number}", title, depictions=[0]
    )
    for number, (mid, title) in enumerate(
        [(openimages_files.RUGBY, "A, B"), (openimages_files.SOCCER, '"'), (openimages_files.SOCCER, "é\nö")]
    )
]
_NAMES = {"https://a": "b"} | openimages_files.CLASSES


@cache
def _openimages_params() -> tuple[Any, Any]:
    values = shipped_values()
    values["ingest"]["openimages"] |= {
        "url": "http://127.0.0.1:9/oi", "subsets": ["test"], "keep_label_files": True, "exclude": [],
        "classes": {"red": [openimages_files.RUGBY], "blue": [openimages_files.SOCCER]},
    }  # fmt: skip
    values["classes"] = CLASSES
    values["ingest"]["imagenet"]["classes"] = {"red": [imagenet_files.RUGBY], "blue": [imagenet_files.SOCCER]}
    found = check(values)
    return found.ingest.openimages, found.ingest.download


@FUZZ
@given(data=st.data())
def test_label_files(watch: Watch, data: st.DataObject) -> None:
    params, download = _openimages_params()
    contents = {
        openimages_files.LABELS["test"]: openimages_files.label_file(_SHOTS),
        openimages_files.INFO["test"]: openimages_files.info_file(_SHOTS, "test"),
        openimages_files.BOXES["test"]: openimages_files.box_file(_SHOTS, "test"),
    }
    chosen = data.draw(st.sampled_from(sorted(contents)))
    contents[chosen] = data.draw(mutated(contents[chosen], _TEXTS))
    with tempfile.TemporaryDirectory() as name:
        kept = Path(name)
        openimages._keep(openimages._classes_path(params, kept), _NAMES)
        for path, content in contents.items():
            file = kept / "files/127.0.0.1_9/oi" / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        with watch.case():
            for found in openimages.candidates(params, download, CLASSES, kept):
                assert found.label in CLASSES and found.rotation in {0, 90, 180, 270}
                assert found.url.startswith("https://")


_PHOTOS = [
    ["path", "class", "source", "sha256", "bytes", "width", "height", "licence", "author", "origin", "group", "subset",
     "title", "author_page", "landing_page", "retrieved"],
    *([path, path.split("/")[2], "folder", digest, 9, 64, 64, "CC0", "A, B", f"o{number}", "", "", '"', "", "", ""]
      for number, (path, digest) in enumerate(zip(PATHS, DIGESTS, strict=True))),
]  # fmt: skip
_VALIDATED = [
    row + (["contrast", "perceptual_hash"] if number == 0 else [30.5, DIGESTS[number - 1][:16]])
    for number, row in enumerate(_PHOTOS)
]
_SPLIT = [
    list(split.COLUMNS),
    *([path, path.split("/")[2], ("train", "test")[n % 2], "g", digest, "", "folder", 64, 64, "CC0", "A, B",
       f"o{n}", '"', ""]
      for n, (path, digest) in enumerate(zip(PATHS, DIGESTS, strict=True))),
]  # fmt: skip


@FUZZ
@given(content=mutated(text_of(_PHOTOS), _TEXTS))
def test_photos_table(watch: Watch, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photos.csv"
    path.write_bytes(content)
    with watch.case():
        found = _read_photos(path, CLASSES)
        assert set(found["class"]) <= set(CLASSES)
        assert all(isinstance(name, str) for name in found["path"])


@FUZZ
@given(content=mutated(text_of(_VALIDATED), _TEXTS))
def test_validated_table(watch: Watch, tmp_path: Path, params_with: Callable[..., Params], content: bytes) -> None:
    paths = Paths(tmp_path, tmp_path)
    paths.validated_table.parent.mkdir(exist_ok=True)
    paths.validated_table.write_bytes(content)
    with watch.case():
        split.run(paths, _little_params())


@cache
def _little_params() -> Params:
    values = shipped_values()
    values["classes"] = CLASSES
    return check(values)


@FUZZ
@given(content=mutated(text_of(_SPLIT), _TEXTS))
def test_split_table(watch: Watch, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "split.csv"
    path.write_bytes(content)
    with watch.case():
        found = Labelled.of(files.read_table(path), "train", CLASSES, tmp_path)
        assert set(found.labels.tolist()) <= {0, 1} and len(found.files) == len(found.digests)


# JSON


@FUZZ
@given(content=mutated(json.dumps({"photo": "a.jpg", "label": "red", "when": "é", "answers": [{}]}).encode(), _TEXTS))
@example(b"[" * 100_000)
@example(b"9" * 5000)
@example(b'"\\ud800"')
def test_json_records(watch: Watch, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with watch.case():
        files.read_json(path)


@FUZZ
@given(data=st.data())
def test_feedback_entries(watch: Watch, data: st.DataObject) -> None:
    digest = "ab" * 32
    entry = json.dumps({"photo": f"{digest}.jpg", "label": "red", "when": "", "answers": []}).encode()
    with tempfile.TemporaryDirectory() as name:
        queue = Path(name, "queue")
        queue.mkdir()
        inside, outside = photographs()["JPEG"], photographs()["JPEG grey"]
        (queue / f"{digest}.jpg").write_bytes(inside)
        Path(name, f"{digest}.jpg").write_bytes(outside)
        hostile = [f"../{digest}.jpg".encode(), f"{name}/{digest}.jpg".encode(), *_TEXTS]
        photo = data.draw(st.sampled_from(hostile)) if data.draw(st.booleans()) else None
        content = entry.replace(f"{digest}.jpg".encode(), photo) if photo else data.draw(mutated(entry, hostile))
        (queue / f"{digest}.json").write_bytes(content)
        with watch.case():
            for found in feedback.candidates(Received(queue, 20), CLASSES):
                assert found.label in CLASSES and found.read() == inside


@FUZZ
@given(
    content=mutated(
        b'{"url": "https://a/1", "retrieved": "2025", "sha256": "' + b"ab" * 32 + b'", "extension": "jpg"}\n', _TEXTS
    )
)
@example(b"[" * 100_000 + b"\n")
@example(b'{"url": [], "retrieved": ""}\n')
@example(b'{"url": "https://a/1", "retrieved": "", "sha256": 5}\n')
@example(b'{"url": "https://a/1", "retrieved": "", "sha256": "../../../../x", "extension": "/../../y"}\n')
def test_journal(watch: Watch, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fetched.jsonl"
    path.write_bytes(content)
    with watch.case(), Journal(path) as journal:
        for entry in journal._entries.values():
            assert entry.absent or ("/" not in entry.name and ".." not in entry.name)
    assert path.read_bytes().startswith(content)


# Archives and weights


_WNID = imagenet_files.RUGBY
_TAR = imagenet_files.tar_of(imagenet_files.synset(_WNID, range(3)))
_PAX = imagenet_files.tar_of({f"{'x' * 120}/é{_WNID}_1.JPEG": b"abc"}, tar_format=tarfile.PAX_FORMAT)
_LINKS = imagenet_files.tar_of(
    imagenet_files.synset(_WNID, range(1)),
    [
        imagenet_files.member("../out.JPEG"), imagenet_files.member("/etc/out.JPEG"),
        imagenet_files.member("link.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        imagenet_files.member("hard.JPEG", type=tarfile.LNKTYPE, linkname="../../x"),
        imagenet_files.member("device.JPEG", type=tarfile.CHRTYPE), imagenet_files.member("a/../../b.JPEG"),
    ],
)  # fmt: skip
_OTHER = imagenet_files.tar_of(imagenet_files.synset(imagenet_files.SOCCER, range(1)))


def _imagenet(**changes: Any) -> Any:
    values = shipped_values()
    values["ingest"]["imagenet"] |= {
        "accept_terms": True, "folder": "imagenet",
        "classes": {"red": [_WNID], "blue": [imagenet_files.SOCCER]}, **changes,
    }  # fmt: skip
    return check(values).ingest


_FOLDER, _ARCHIVE = _imagenet(origin="folder"), _imagenet(origin="ilsvrc2012", archive="train.tar")


def _offered(settings_: Any, project: Path, size: int) -> None:
    for found in imagenet.candidates(settings_.imagenet, settings_.download, CLASSES, project):
        name = found.origin.split("/")
        assert ".." not in name and "" not in name and found.origin.isprintable()
        assert len(found.read()) <= size


@FUZZ
@given(content=mutated(st.sampled_from([_TAR, _PAX, _LINKS])))
@example(_LINKS)
def test_tar(watch: Watch, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        here = Path(name, "imagenet")
        here.mkdir()
        (here / f"{_WNID}.tar").write_bytes(content)
        (here / f"{imagenet_files.SOCCER}.tar").write_bytes(_OTHER)
        with watch.case():
            _offered(_FOLDER, Path(name), max(len(content), len(_OTHER)))


@FUZZ
@given(content=mutated(imagenet_files.tar_of({f"{_WNID}.tar": _TAR, f"{imagenet_files.SOCCER}.tar": _OTHER})))
def test_tar_of_tars(watch: Watch, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name, "train.tar").write_bytes(content)
        with watch.case():
            _offered(_ARCHIVE, Path(name), len(content))


def _weights(state: bytes) -> bytes:
    return b"".join([HEADER, state, pickle.dumps(["a"]), storage(SIX)])


_STATES = [
    state_dict(kernel=KERNEL),
    pickle.dumps({"kernel": 1}, 2), pickle.dumps({"kernel": [1.0] * 300}, 4), pickle.dumps(bytearray(9), 5),
]  # fmt: skip
_GLOBALS = [b"cos\nsystem\n(Vtouch canary\ntR.", b"cbuiltins\neval\n(V1\ntR.", b"\x80\x04\x8c\x02os\x8c\x06system\x93."]


@FUZZ
@given(
    content=mutated(
        st.sampled_from([_weights(state) for state in _STATES]), [*_EXTREMES, *_GLOBALS, b"r\xff\xff\xff\x0f"]
    )
)
@example(_weights(b"]r\xff\xff\xff\x0f."))  # a place in the memo that a list would need gigabytes for
@example(_weights(b"\x80\x05\x96\0\0\0\x80\0\0\0\0."))  # so many bytes announced, none there
@example(_weights(_GLOBALS[0]))
@example(_weights(_GLOBALS[1]))
@example(_weights(_GLOBALS[2]))
def test_weight_file(watch: Watch, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with watch.case():
        found = torch_weights.read(path, hashlib.sha256(content).hexdigest())
        assert all(tensor.dtype in (np.float32, np.int64) and tensor.size <= len(content) for tensor in found.values())
    assert not Path("canary").exists()


# Photos


@cache
def photographs() -> dict[str, bytes]:
    """A small photo in each format, and in the variants that are read by code of their own."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (10, 14, 3), np.uint8)).resize((70, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "JPEG": (image, "JPEG", {}),
        "JPEG turned": (image, "JPEG", {"exif": exif, "quality": 95}),
        "JPEG progressive": (image, "JPEG", {"progressive": True}),
        "JPEG grey": (image.convert("L"), "JPEG", {}),
        "JPEG CMYK": (image.convert("CMYK"), "JPEG", {}),
        "PNG": (image, "PNG", {}),
        "PNG palette": (image.convert("P"), "PNG", {}),
        "PNG alpha": (image.convert("RGBA"), "PNG", {"exif": exif}),
        "WEBP": (image, "WEBP", {}),
        "WEBP lossless": (image.convert("RGBA"), "WEBP", {"lossless": True}),
        "AVIF": (image, "AVIF", {"quality": 60}),
        "AVIF transparent": (image.convert("RGBA"), "AVIF", {"quality": 60}),
        "WEBP animated": (image, "WEBP", {"save_all": True, "append_images": [image.rotate(90)]}),
        "GIF": (image, "GIF", {}),
        "GIF animated": (image, "GIF", {"save_all": True, "append_images": [image.rotate(180)]}),
        "BMP": (image, "BMP", {}),
        "BMP palette": (image.convert("P"), "BMP", {}),
        "TIFF": (image, "TIFF", {}),
        "TIFF LZW": (image, "TIFF", {"compression": "tiff_lzw"}),
        "TIFF deflate": (image, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "TIFF JPEG": (image, "TIFF", {"compression": "jpeg"}),
    }
    made = {}
    for name, (picture, kind, options) in wanted.items():
        content = io.BytesIO()
        picture.save(content, kind, **options)
        made[name] = content.getvalue()
    return made


def _looked_at(path: Path, content: bytes) -> None:
    """All that is done with the bytes of a photo."""
    path.write_bytes(content)
    header = photos.header(content)
    assert header.extension in {"", *photos.EXTENSIONS.values()}
    assert photos.flaw(content) in {"", "cut off", "not an image", *layout._OTHERS}
    assert isinstance(photos.turned(content, 90), bytes)
    found = photos.measure(path, 60)
    assert len(found.error.splitlines()) <= 1 and 0 <= found.contrast <= 127.5
    if not (found.error or found.bomb):
        assert found.width > 0 and found.height > 0 and len(found.perceptual_hash) == 16
        assert photos.decode(content, SIDE).shape == (SIDE, SIDE, 3)
    image = classifier.pixels(content, SIDE, 60)
    assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8


_XMP = (
    b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:plus="http://ns.useplus.org/ldf/xmp/1.0/">'
    b"<rdf:Description><plus:DataMining>DMI-PROHIBITED</plus:DataMining></rdf:Description></rdf:RDF></x:xmpmeta>"
)
_XMP_PARTS = [
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<x:xmpmeta ", b"</x:xmpmeta>", b"jumdc2pa\0\x11\0\x10", b"\xff",
]  # fmt: skip


@FUZZ
@given(content=mutated(_XMP, _XMP_PARTS))
def test_what_a_file_says_of_machine_learning(watch: Watch, content: bytes) -> None:
    with watch.case():
        found = opt_outs.read(b"\xff\xd8\xff" + content)
        assert "\n" not in found.forbids + found.unreadable


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@settings(FUZZ, max_examples=max(20, CASES))
@given(data=st.data())
def test_photos(watch: Watch, tmp_path: Path, kind: str, data: st.DataObject) -> None:
    seeds = [content for name, content in photographs().items() if name.split()[0] == kind]
    content = data.draw(mutated(st.sampled_from(seeds)))
    with watch.case():
        _looked_at(tmp_path / "photo", content)


@FUZZ
@given(data=st.data())
def test_a_photo_that_is_cut_off_is_refused_unless_no_pixel_is_lost(
    watch: Watch, tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(photographs())))
    whole = photographs()[name]
    cut = whole[: data.draw(st.integers(0, len(whole) - 1) | st.integers(max(0, len(whole) - 40), len(whole) - 1))]
    _refused_or_whole(watch, tmp_path, whole, cut)


def _refused_or_whole(watch: Watch, tmp_path: Path, whole: bytes, cut: bytes) -> None:
    path = tmp_path / "photo"
    path.write_bytes(cut)
    expected = photos.decode(whole, SIDE)
    with watch.case():
        if not photos.measure(path, 60).error:
            np.testing.assert_array_equal(photos.decode(cut, SIDE), expected, "measured as whole")
        np.testing.assert_array_equal(classifier.pixels(cut, SIDE, 60), expected, "judged as whole")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(*sizes: tuple[int, int], more: int = 0) -> bytes:
    """A PNG of few bytes with a header for each size; its pixels are those of the last, and `more` bytes."""
    width, height = sizes[-1]
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(2**20)) for _ in range(-(-((1 + width * 3) * height + more) // 2**20)))
    headers = b"".join(_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)) for size in sizes)
    return b"\x89PNG\r\n\x1a\n" + headers + _chunk(b"IDAT", rows + packer.flush()) + _chunk(b"IEND", b"")


def _saved(size: tuple[int, int], kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (9, 90, 9)).save(content, kind, **options)
    return content.getvalue()


def _allowed(content: bytes) -> bool:
    try:
        return bool(layout.read(content))
    except layout.Refused:
        return False


def _bombs() -> dict[str, bytes]:
    """Files that are small and claim to be large, or are: each within 20 MB, as a person could send them."""
    small = photographs()
    wide = struct.pack("<II", 60_000, 60_000)
    jpeg, tiff = bytearray(small["JPEG"]), bytearray(small["TIFF"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    for tag in (256, 257):
        at = tiff.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in tiff else tiff.index(
            struct.pack("<HH", tag, 3))  # fmt: skip
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 60_000)
    bmp, gif = bytearray(small["BMP"]), bytearray(small["GIF"])
    bmp[18:26] = wide
    gif[6:10] = b"\xff\xff\xff\xff"
    inner = bytearray(small["GIF"])
    at = inner.index(b",", 13 + 3 * 2 ** ((inner[10] & 7) + 1))
    inner[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    lossless = bytearray(small["WEBP lossless"])
    at = lossless.index(b"VP8L") + 9
    lossless[at : at + 4] = b"\xff\xff\xff\x0f"
    canvas = bytearray(small["WEBP animated"])
    at = canvas.index(b"VP8X") + 12
    canvas[at : at + 6] = b"\xff\x3f\0\xff\x3f\0"
    text = zlib.compress(bytes(100 * 2**20), 9)
    words = small["PNG"].replace(b"IDAT", b"IDAT", 1)
    at = words.index(b"IDAT") - 4
    progressive = _saved((7_700, 7_700), "JPEG", progressive=True, subsampling=0)
    most = max(more for more in range(30) if _allowed(with_scans(progressive, more)))
    return {
        "JPEG of as many scans as it may have": with_scans(progressive, most),
        "JPEG of 100,000 scans": with_scans(_saved((400, 300), "JPEG", progressive=True), 100_000),
        "JPEG whose second photo is in tags that claim 300 MB": with_segments(
            small["JPEG"], (0xE2, b"MPF\0" + directory(5_000, 4_900, 5, 8))
        ),
        "PNG with 2 GB behind its pixels": _png((64, 64), more=2**31),
        "GIF with a comment of 15 MB": with_blocks(small["GIF"], b"!\xfe" + (b"\xff" + bytes(255)) * 60_000 + b"\0"),
        "TIFF whose tags claim 1 TB": directory(60_000, 15_000_000),
        "PNG of 900 megapixels": _png((30_000, 30_000)),
        "PNG of 59 megapixels": _png((7_700, 7_700)),
        "PNG with two headers": _png((64, 64), (30_000, 30_000)),
        "PNG with two headers, the large one first": _png((30_000, 30_000), (64, 64)),
        "PNG with 100 MB of text": words[:at] + _chunk(b"zTXt", b"a\0\0" + text) + words[at:],
        "PNG with a profile of 100 MB": words[:at] + _chunk(b"iCCP", b"a\0\0" + text) + words[at:],
        "PNG whose pixels claim 1 GB": words[:at] + bytes([0x3F]) + words[at + 1 :],
        "PNG with a text that claims 1 GB": words[:-12] + b"\x3f\0\0\0tEXta\0b" + words[-12:],
        "JPEG of 59 megapixels": _saved((7_700, 7_700), "JPEG"),
        "JPEG of 59 megapixels, progressive": _saved((7_700, 7_700), "JPEG", progressive=True),
        "JPEG that claims 65535": bytes(jpeg),
        "TIFF that claims 60000": bytes(tiff),
        "TIFF of 59 megapixels": _saved((7_700, 7_700), "TIFF", compression="tiff_adobe_deflate"),
        "BMP that claims 60000": bytes(bmp),
        "GIF that claims 65535": bytes(gif),
        "GIF with a frame of 65535": bytes(inner),
        "WebP lossless that claims 16384": bytes(lossless),
        "WebP animation that claims 16384": bytes(canvas),
        "WebP of 59 megapixels": _saved((7_700, 7_700), "WEBP", lossless=True, method=0),
    }


_CHILD = """
import sys, time
from pathlib import Path
from touchline.data import photos
from touchline.core.errors import TouchlineError
from touchline.models import classifier
path = Path(sys.argv[1])
classifier.pixels(Path(sys.argv[2]).read_bytes(), 32, 60)  # what every process pays once
photos.measure(Path(sys.argv[2]), 60)
began, said = time.process_time(), []
for look in (lambda: photos.header(path.read_bytes()), lambda: photos.measure(path, 60),
             lambda: classifier.pixels(path.read_bytes(), 32, 60)):
    try:
        look()
        said.append("taken")
    except TouchlineError as error:
        said.append("refused")
        assert len(str(error).splitlines()) == 1, str(error)
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(said[-1], int(peak) // 1024, round(time.process_time() - began, 2))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process took at most")
def test_decompression_bombs(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    good, bomb = tmp_path / "good.jpg", tmp_path / "bomb"
    good.write_bytes(photographs()["JPEG"])
    costs = {}
    for name, content in _bombs().items():
        assert len(content) < 20 * 2**20, name
        bomb.write_bytes(content)
        # In a process of its own, whose memory is known, and ends with it should it grow beyond all.
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, bomb, good], capture_output=True, text=True, timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30)),
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stderr[-500:]}"
        said, peak, seconds = done.stdout.split()
        costs[name] = (int(peak), float(seconds), said)
    record_property("fuzz", f"{len(costs)} bombs, the largest {max(costs.values())[0]} MB with Python and OpenCV, "
                            f"slowest {max(cost[1] for cost in costs.values()):.2f} s")  # fmt: skip
    assert {name: cost for name, cost in costs.items() if cost[0] >= MEMORY} == {}
    assert {name: cost for name, cost in costs.items() if cost[1] >= 3 * HANG} == {}  # three looks


# Requests


_TYPES = ["", "image/jpeg", "multipart/form-data; boundary=x", "application/json", "image/*" * 500, "\x7f"]


def test_requests(watch: Watch, params_with: Callable[..., Params]) -> None:
    network = Network(
        "planted", (None, SIDE, SIDE, 3), (None, 2), lambda images: np.full((len(images), 2), 0.5, np.float32)
    )
    limits = serve.Limits(photo=20_000, form=60_000)
    app = serve.application(
        Classifier(network, CLASSES, "a model", ModelFiles(Path("planted.keras"))), params_with(), limits
    )

    async def ask(client: httpx.AsyncClient, method: str, path: str, body: bytes, kind: str) -> httpx.Response:
        return await client.request(method, path, content=body, headers={"content-type": kind})

    with asyncio.Runner() as runner:
        lifespan = app.router.lifespan_context(app)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://touchline")
        runner.run(lifespan.__aenter__())

        @FUZZ
        @given(
            body=mutated(st.sampled_from(list(photographs().values()))) | st.binary(max_size=200)
            | st.just(bytes(limits.photo + 1)),
            kind=st.sampled_from(_TYPES),
            files=st.integers(0, 3),
            method=st.sampled_from(["POST"] * 12 + ["GET", "PUT", "DELETE", "OPTIONS"]),
            path=st.sampled_from(["/predict"] * 12 + ["/predict?x=%00", "/../etc/passwd", "/%2e%2e/x"]),
        )  # fmt: skip
        def fuzz(body: bytes, kind: str, files: int, method: str, path: str) -> None:
            part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + body + b"\r\n"
            sent = part * files + b"--x--\r\n" if files and kind.startswith("multipart") else body
            with watch.case():
                answer = runner.run(ask(client, method, path, sent, kind))
                assert answer.status_code in {200, 400, 404, 405, 413, 422}, answer.text
                said = answer.json()
                if answer.status_code != 200:
                    watch.refused += 1
                for each in said if isinstance(said, list) else [said]:
                    if "detail" in each:
                        assert isinstance(each["detail"], str) and len(each["detail"].splitlines()) == 1
                    elif path.startswith("/predict") and method == "POST":
                        assert each["probabilities"] == {"red": 0.5, "blue": 0.5}
                        assert sent is not body or classifier.pixels(body, SIDE, 60).shape == (SIDE, SIDE, 3)

        fuzz()
        runner.run(client.aclose())
        runner.run(lifespan.__aexit__(None, None, None))
