"""Arrays of photos on disk, a row a photo, found by the photo's digest.

An array lies in pieces of at most `PIECE` rows: `<name>.npy` with its `<name>.txt`, one digest a line. A piece is
written whole or not at all and never changed, so a killed run goes on where it stopped, and ten new photos cost ten:
the rows there are, are kept. Pieces are read memory-mapped, so an array may be larger than memory.
"""

import hashlib
import itertools
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from touchline.core import ports
from touchline.core.errors import TouchlineError
from touchline.core.files import RENEW, read_json, remove_partials, replacing, write_json, write_text

PIECE = 256
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Arrays:
    """A stored array, opened for reading.

    Args:
        folder: where `update` put it.
    """

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the array was made with, as given to `update`."""
        return read_json(self.folder / _SETTINGS)

    @cached_property
    def _places(self) -> dict[str, tuple["_Piece", int]]:
        places: dict[str, tuple[_Piece, int]] = {}
        # A mapped piece keeps its file open: 262,144 photos would be the usual limit of 1,024.
        ports.allow_open_files(len(_pieces(self.folder)) + 512)
        for path in _pieces(self.folder):
            try:
                piece = _Piece.open(path)
                places |= {digest: (piece, number) for number, digest in enumerate(_digests(path))}
            except (FileNotFoundError, ValueError, TypeError, KeyError):  # as NumPy and mmap tell of a torn file
                raise TouchlineError(f"{path} or its .txt is torn: {RENEW}") from None
        return places

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of each row; of none where nothing is stored."""
        return next((piece.rows.shape[1:] for piece, _ in self._places.values()), ())

    def _found(self, digests: Sequence[str]) -> list[tuple["_Piece", int]]:
        try:
            return [self._places[digest] for digest in digests]
        except KeyError as error:
            raise TouchlineError(
                f"{self.folder} has no row for photo {error.args[0][:16]}: run `dvc repro` (it is older than the split)"
            ) from None

    def __getitem__(self, digests: Sequence[str]) -> np.ndarray:
        """The rows of `digests`, copied into memory in that order: shape (len(digests), *row).

        Raises:
            TouchlineError: a photo is not in the array, or a piece is torn.
        """
        found: np.ndarray | None = None
        # Piece by piece: the system maps more than a row where one is looked at, and of many pieces that is gigabytes.
        for piece, numbers, positions in self.stream(digests).parts:
            if found is None:
                found = np.empty((len(digests), *piece.rows.shape[1:]), piece.rows.dtype)
            for number, position in zip(numbers, positions, strict=True):
                found[position] = piece.rows[number]
            piece.release()
        return np.empty((0, *self.row_shape)) if found is None else found

    def stream(self, digests: Sequence[str]) -> "Stream":
        """The rows of `digests`, to be read piece by piece; raises as reading them at once does."""
        places = self._found(digests)
        order = sorted(range(len(places)), key=lambda position: (id(places[position][0]), places[position][1]))
        parts = []
        for _, group in itertools.groupby(order, key=lambda position: id(places[position][0])):
            positions = list(group)
            numbers = np.array([places[position][1] for position in positions])
            parts.append((places[positions[0]][0], numbers, np.array(positions)))
        return Stream(parts, len(places))


@dataclass(frozen=True)
class Stream:
    """Rows of chosen photos, as often as they are asked for: a piece is mapped while it is looked at.

    Attributes:
        parts: of each piece the numbers of the rows wanted, and the positions in the list of photos they belong to.
        count: of all rows.
    """

    parts: list["Part"]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions, and the rows that belong to them."""
        return map(self.read, self.parts)

    @staticmethod
    def read(part: "Part") -> tuple[np.ndarray, np.ndarray]:
        """The same of one of the parts; from any thread."""
        piece, numbers, positions = part
        found = piece.rows[numbers]
        piece.release()
        return positions, found


Part = tuple["_Piece", np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Piece:
    """A piece's rows, mapped: its bytes are read from disk where and when they are looked at."""

    rows: np.ndarray
    bytes: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "_Piece":
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](file)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return cls(np.ndarray(shape, dtype, content, offset=file.tell()), content)

    def release(self) -> None:
        """Give back the pages read so far: held, they would count as this process's memory, photo by photo."""
        if hasattr(mmap, "MADV_DONTNEED"):  # Windows has none, and pages them out by itself
            self.bytes.madvise(mmap.MADV_DONTNEED)


def update(
    folder: Path,
    settings: dict[str, Any],
    digests: Sequence[str],
    compute: Callable[[Sequence[str]], Iterator[np.ndarray]],
    engine: str = "",
) -> int:
    """Make the array in `folder` hold exactly the rows of `digests`, keeping those it has.

    Args:
        settings: what the rows depend on besides the photos; rows made with other settings are not kept.
        digests: one a photo, no two alike.
        compute: yields the row of each digest it is given, in order; called once for all rows that are missing.
        engine: what computes them, and its version; it is noted in the settings as one of `engines`. Rows of several
            may stand side by side, for they differ by no more than rounding.

    Returns:
        How many rows were computed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    # The settings are written before any row and go last, so without settings it is unknown how the rows were made.
    known = None
    with suppress(TouchlineError):
        known = read_json(folder / _SETTINGS)
    engines = known.pop("engines", []) if isinstance(known, dict) else []
    if known != settings:
        _clear(folder)
        engines = []
    write_json(folder / _SETTINGS, settings | ({"engines": engines} if engines else {}))

    kept, loose = _sort_pieces(folder, set(digests))
    settled = {digest for piece in kept for digest in _digests(piece)}
    wanted = [digest for digest in digests if digest not in settled]
    there = {
        digest: (piece, number)
        for piece in loose
        for number, digest in enumerate(_digests(piece))
        if digest not in settled
    }
    if len(loose) == 1 and set(wanted) == set(_digests(loose[0])):
        kept, loose, wanted = [*kept, *loose], [], []
    computed = [digest for digest in wanted if digest not in there]
    if computed and engine and engine not in engines:
        write_json(folder / _SETTINGS, settings | {"engines": sorted([*engines, engine])})
    fresh = compute(computed) if computed else iter(())
    for start in range(0, len(wanted), PIECE):
        chosen = wanted[start : start + PIECE]
        rows = [_copy_of_row(*there[digest]) if digest in there else next(fresh) for digest in chosen]
        kept.append(_write_piece(folder, chosen, np.stack(rows)))
    names = {piece.stem for piece in kept}
    for path in _own(folder):
        if path.stem not in names:
            path.unlink()
    return len(computed)


def remove(folder: Path) -> bool:
    """Delete the array in `folder`, and the folder unless it holds something else too.

    Returns:
        False if there was no array; then nothing is touched.
    """
    if not there(folder):
        return False
    _clear(folder)
    with suppress(OSError):  # not empty: what a person put there stays
        folder.rmdir()
    return True


def there(folder: Path) -> bool:
    """Whether `folder` holds an array that `update` made."""
    return (folder / _SETTINGS).is_file()


def _own(folder: Path) -> list[Path]:
    """The files of pieces, by the names that `_write_piece` gives; others in the folder are not ours to touch."""
    return sorted(path for path in folder.glob("*") if re.fullmatch(r"[0-9a-f]{16}\.(npy|txt)", path.name))


def _pieces(folder: Path) -> list[Path]:
    return [path for path in _own(folder) if path.suffix == ".npy"]


def _sort_pieces(folder: Path, wanted: set[str]) -> tuple[list[Path], list[Path]]:
    """Pieces to keep as they are (full, all their photos wanted), and pieces whose rows are to be packed anew."""
    kept, loose, seen = [], [], set[str]()
    for piece in _pieces(folder):
        try:
            digests = _digests(piece)
            whole = len(np.load(piece, mmap_mode="r")) == len(digests)
        except (OSError, ValueError, EOFError):
            whole = False
        if not whole:
            piece.unlink()  # torn by something other than us, which rename whole files; its rows are computed anew
        elif len(digests) == PIECE and wanted.issuperset(digests) and seen.isdisjoint(digests):
            seen.update(digests)
            kept.append(piece)
        else:
            loose.append(piece)
    return kept, loose


def _clear(folder: Path) -> None:
    for path in _own(folder):
        path.unlink()
    (folder / _SETTINGS).unlink(missing_ok=True)


def _write_piece(folder: Path, digests: Sequence[str], rows: np.ndarray) -> Path:
    content = "".join(f"{digest}\n" for digest in digests)
    piece = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.npy"
    # The list goes first: a piece counts once its rows are there.
    write_text(piece.with_suffix(".txt"), content)
    with replacing(piece, ".npy") as temporary:
        np.save(temporary, rows)
    return piece


def _copy_of_row(piece: Path, number: int) -> np.ndarray:
    return np.load(piece, mmap_mode="r")[number]


def _digests(piece: Path) -> list[str]:
    return piece.with_suffix(".txt").read_text().split()
