"""Files in a folder that others may have filled: read only what lies in it, and only what begins like an image.

A received folder may contain a link to a private key, a pipe that blocks its reader, or an endless device. Whatever is
read becomes part of data/photos, and `dvc push` sends it on.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.core.progress import say
from touchline.data import layout

_FIRST_BYTES = 1024
# What macOS, Windows and network drives put beside photos, case ignored; hidden files are passed over anyway.
_OF_SYSTEMS = {"__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir"}


_LEADS_OUT = "a link out of the folder: if it is yours, set ingest.follow_links: true"


class _Unfit(Exception):
    """The file is not taken."""


@dataclass(frozen=True)
class Received:
    """A folder of files.

    Attributes:
        max_megabytes: of one file.
        follow_links: links may lead out of the folder, because they are the user's own.
    """

    folder: Path
    max_megabytes: float
    follow_links: bool = False

    @classmethod
    def of(cls, folder: Path, params: Params) -> "Received":
        """A folder under the limits of params.yaml."""
        return cls(folder, params.ingest.download.max_megabytes, params.ingest.follow_links)

    def refusal(self, path: Path, *, image: bool = True) -> str:
        """Why a file is not taken; empty where nothing is wrong with it.

        Args:
            image: it has to begin like one.
        """
        try:
            with self._opened(path) as file:
                start = file.read(_FIRST_BYTES)
            if not image or layout.format_of(start):
                return ""
            return layout.other(start) or "not an image"
        except _Unfit as error:
            return str(error)
        except OSError as error:
            return error.strerror or "cannot be read"

    def below(self, folder: Path) -> Iterator[tuple[Path, str]]:
        """Every file below `folder`, in the order of their paths, with the reason why it is not taken, or nothing.

        Hidden files and those of the operating system are passed over. Links to folders are followed as links to files
        are, each folder once: a link that is not followed comes with its reason too.

        Raises:
            TouchlineError: the name of a file is not UTF-8.
        """
        if self._leads_out(folder):
            yield folder, _LEADS_OUT
            return
        entered = {_identity(folder)}
        waiting = entries(folder)[::-1]
        while waiting:
            path = waiting.pop()
            if not path.is_dir():
                yield path, self.refusal(path)
            elif reason := self._closed(path, folder, entered):
                yield path, reason
            else:
                entered.add(_identity(path))
                waiting += entries(path)[::-1]

    def _closed(self, path: Path, top: Path, entered: set[tuple[int, int]]) -> str:
        """Why a folder is not entered; empty where it is."""
        if not os.access(path, os.R_OK | os.X_OK):
            return "a folder that cannot be read"
        if self._leads_out(path):
            return _LEADS_OUT
        if path.is_symlink():
            real = path.resolve()
            if top.resolve().is_relative_to(real):
                return "a link in a circle"
            if real.is_relative_to(top.resolve()):
                return "a link to a folder that is taken anyway"
        return "a link to a folder that is taken already" if _identity(path) in entered else ""

    def read(self, path: Path) -> bytes:
        """The bytes of a file that `refusal` accepts.

        Raises:
            TouchlineError: it has become something else since.
            OSError: it cannot be read.
        """
        try:
            with self._opened(path) as file:
                return file.read(int(self.max_megabytes * 1e6))
        except _Unfit as error:
            raise TouchlineError(f"{path} is {error}: take it out of the folder") from None

    def _leads_out(self, path: Path) -> bool:
        return not (self.follow_links or path.resolve().is_relative_to(self.folder.resolve()))

    def _opened(self, path: Path) -> BinaryIO:
        try:
            real = path.resolve(strict=True)
        except RuntimeError:  # Python before 3.13 says so of links in a circle
            raise _Unfit("a link in a circle") from None
        if self._leads_out(real):
            raise _Unfit(_LEADS_OUT)
        status = real.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _Unfit("not a file but a folder, pipe, socket or device")
        if status.st_size > self.max_megabytes * 1e6:
            raise _Unfit(f"larger than {self.max_megabytes:g} MB")
        # If it has been replaced since, a link is not followed, and a pipe does not block.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        return open(os.open(real, flags), "rb")  # noqa: PTH123 - a descriptor has no path


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or the operating system's."""
    return name.startswith(".") or name.casefold() in _OF_SYSTEMS


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in the order of names, without what is `passed_over`.

    Raises:
        TouchlineError: the folder cannot be read, or a name is not UTF-8, so that no table can hold it.
    """
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 - names alone, whatever they are
    except OSError as error:
        raise TouchlineError(f"{folder} cannot be read ({error.strerror}): see its permissions") from None
    paths = [folder / name for name in names if not passed_over(name)]
    for path in paths:
        check_name(path)
    return paths


def check_name(path: Path) -> None:
    """Raises TouchlineError where the name of a file is not UTF-8: DVC reads no folder with one in it."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise TouchlineError(f"the name of {str(path)!a} is not UTF-8: rename it") from None


def shown(text: str) -> str:
    """`text` without anything that a terminal or a log would obey."""
    return text.encode("unicode_escape", "surrogatepass").decode("ascii")[:120]


def check_for_dvc(folder: Path) -> None:
    """Refuse what DVC, which hashes the whole folder before a stage runs, would end on without naming it.

    Raises:
        TouchlineError: a name is not UTF-8, or a link leads nowhere.
    """
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in [*folders, *names]):
            check_name(path)
            if path.is_symlink() and not path.exists():
                raise TouchlineError(f"{shown(str(path))} is a link that leads nowhere: mend it or take it away")


def say_left_out(source: str, where: Path, left_out: Sequence[str], most: int = 3) -> None:
    """Name what a source does not take.

    Args:
        left_out: each with its reason, fit to be shown.
        most: how many of them are named.
    """
    if left_out:
        more = f" and {len(left_out) - most:,} more" if len(left_out) > most else ""
        say(f"{source}: left out of {where}: {len(left_out):,}: {', '.join(left_out[:most])}{more}")
