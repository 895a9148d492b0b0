"""Files in a folder that others may have filled: read only what lies in it, and only what begins like an image.

A received folder may contain a link to a private key, a pipe that blocks its reader, or an endless device. Whatever is
read becomes part of data/photos, and `dvc push` sends it on.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.core.progress import say
from touchline.data import layout

_FIRST_BYTES = 64


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
                return "" if not image or layout.format_of(file.read(_FIRST_BYTES)) else "not an image"
        except _Unfit as error:
            return str(error)
        except OSError as error:
            return error.strerror or "cannot be read"

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

    def _opened(self, path: Path) -> BinaryIO:
        try:
            real = path.resolve(strict=True)
        except RuntimeError:  # Python before 3.13 says so of links in a circle
            raise _Unfit("a link in a circle") from None
        if not (self.follow_links or real.is_relative_to(self.folder.resolve())):
            raise _Unfit("a link out of the folder: see ingest.follow_links")
        status = real.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _Unfit("not a file but a folder, pipe, socket or device")
        if status.st_size > self.max_megabytes * 1e6:
            raise _Unfit(f"larger than {self.max_megabytes:g} MB")
        # If it has been replaced since, a link is not followed, and a pipe does not block.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        return open(os.open(real, flags), "rb")  # noqa: PTH123 - a descriptor has no path


def shown(text: str) -> str:
    """`text` without anything that a terminal or a log would obey."""
    return text.encode("unicode_escape", "surrogatepass").decode("ascii")[:120]


def say_left_out(source: str, where: Path, left_out: Sequence[str]) -> None:
    """Name what a source does not take.

    Args:
        left_out: each with its reason, fit to be shown.
    """
    if left_out:
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        say(f"{source}: left out of {where}: {len(left_out):,}: {', '.join(left_out[:3])}{more}")
