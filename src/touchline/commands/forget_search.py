"""Search all files and databases of a project for traces of a photo, by content and by name."""

import base64
import hashlib
import html
import io
import json
import re
import sqlite3
import tarfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from touchline.core.errors import TouchlineError
from touchline.core.paths import Paths
from touchline.data import layout
from touchline.data.thumbnails import jpeg, thumbnail

# The longer sides, in pixels, of the small copies in pages.
_SIDES = (160, 240)
# Code and the tools' caches of it, where no photo can be.
_CODE = {
    ".git", ".venv", "src", "tests", "docs", "flows", "benchmarks", "__pycache__", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", ".hypothesis",
}  # fmt: skip
_HEX = re.compile(rb"([0-9a-f]{16})[0-9a-f]{0,48}")
# In a database's file texts lie side by side, so that a digest may begin anywhere.
_HEX_ANYWHERE = re.compile(rb"(?=([0-9a-f]{16}))")
_DATABASE = (b"SQLite format 3\0", b"7\x7f\x06\x82", b"7\x7f\x06\x83")  # the file, and its write-ahead log
_BASE64 = re.compile(rb"base64,([A-Za-z0-9+/]+=*)")
# Shorter names would be found by chance.
_SHORTEST = 4


@dataclass(frozen=True)
class Traces:
    """What a trace of a photo can be.

    Attributes:
        photos: sha256 of each photo, by the sha256 of its file and of each of its thumbnails.
        names: of authors, origins and pages.
    """

    photos: Mapping[str, str]
    names: Collection[str] = field(default=())

    @cached_property
    def _stems(self) -> dict[bytes, str]:
        # Files are named after the first digits of the digest.
        return {photo[:16].encode(): photo for photo in self.photos.values()}

    @cached_property
    def _named(self) -> re.Pattern[bytes] | None:
        written = {
            form.encode()
            for name in self.names
            if len(name) >= _SHORTEST
            for form in (name, json.dumps(name)[1:-1], html.escape(name))
        }
        words = b"|".join(re.escape(form) for form in sorted(written, key=len, reverse=True))
        return re.compile(rb"(?<!\w)(?:" + words + rb")(?!\w)") if written else None

    def of(self, content: bytes) -> set[str]:
        """The photos (sha256) that `content` contains or mentions; an empty string stands for one of the names."""
        found = {self.photos.get(hashlib.sha256(content).hexdigest())}
        if layout.format_of(content[:64]):
            return {photo for photo in found if photo}
        if content.startswith(b"\x93NUMPY"):
            if b"'<U" not in content[:128]:
                return set()
            content = content.replace(b"\0", b"")  # text, four bytes a letter
        is_database = content.startswith(_DATABASE)
        found |= {self._stems.get(token[1]) for token in (_HEX_ANYWHERE if is_database else _HEX).finditer(content)}
        for piece in _BASE64.finditer(content):
            found.add(self.photos.get(hashlib.sha256(base64.b64decode(piece[1] + b"==")).hexdigest()))
        is_text = b"\0" not in content[:4096] or is_database
        if is_text and self._named and self._named.search(content):
            found.add("")
        return {photo for photo in found if photo is not None}


def thumbnails(content: bytes) -> list[str]:
    """The sha256 of the small copies of a photo that pages show; empty if the photo cannot be read."""
    try:
        pictures = [jpeg(thumbnail(content, side)) for side in _SIDES]
    except TouchlineError:
        return []
    return [hashlib.sha256(base64.b64decode(picture)).hexdigest() for picture in pictures]


def search(paths: Paths, traces: Traces, besides: Collection[Path]) -> dict[Path, set[str]]:
    """The files of the project that contain or mention one of the photos, and which ones; see `Traces.of`.

    Includes members of tars and zips (models and arrays are zips), databases, and pictures inside pages.

    Args:
        besides: files and folders to skip.
    """
    found = {}
    for file in files(paths.project):
        if any(file.is_relative_to(path) for path in besides):
            continue
        hits: set[str] = set()
        try:
            for content in _contents(file):
                hits |= traces.of(content)
        except FileNotFoundError:  # a temporary file of a program that is running
            continue
        except OSError as error:
            raise TouchlineError(
                f"{file} cannot be read ({error.strerror}), so it is not known whether it holds the photo: allow "
                "reading it, then run again"
            ) from None
        if hits:
            found[file] = hits
    return found


def files(project: Path) -> Iterator[Path]:
    """The files of a project, without code and links."""
    for top in sorted(project.iterdir()):
        for file in (top, *top.rglob("*")) if top.name not in _CODE else ():
            if file.is_file() and not file.is_symlink():
                yield file


def _contents(file: Path) -> Iterator[bytes]:
    """The content of a file; of an archive, its members and their names."""
    if file.suffix == ".tar":
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    yield member.name.encode("utf-8", "replace")
                    if part := tar.extractfile(member) if member.isreg() else None:
                        yield part.read()
            return
        except tarfile.TarError:
            pass
    content = file.read_bytes()
    if content.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name in archive.namelist():
                    yield name.encode()
                    yield archive.read(name)
            return
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
            pass
    if content.startswith(_DATABASE[0]):
        yield from _values(file)
    yield content  # of a database too: what was deleted there may not be overwritten


def _values(file: Path) -> Iterator[bytes]:
    """The pictures in a database, and its texts, of each table together."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=20)) as database:
            database.text_factory = lambda text: text.decode("utf-8", "replace")
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                texts = []
                for row in database.execute(f'SELECT * FROM "{table}"'):  # noqa: S608 - a name of the file's own  # nosec B608
                    texts += [value for value in row if isinstance(value, str)]
                    yield from (value for value in row if isinstance(value, bytes))
                yield "\n".join(texts).encode()
    except sqlite3.OperationalError as error:
        raise TouchlineError(
            f"{file} cannot be read ({error}), so it is not known whether it holds the photo: end the program that "
            "uses it, then run again"
        ) from None
    except sqlite3.DatabaseError:  # torn: its bytes are looked at all the same
        return
