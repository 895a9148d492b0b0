"""`data/decisions.csv`: what people decided of single photos, a line each; `validate` honours it.

It is written by hand and by clicks in `touchline app`, so whatever is wrong in it is one line that names the file's
line. A click also notes when; lines by hand may do without.
"""

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from touchline.core.errors import TouchlineError
from touchline.core.files import no_formula, write_bytes
from touchline.core.paths import Paths

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("photo", "decision", "label", "who", "why")
_WHEN = "when"
KINDS = ("keep", "drop", "relabel")
# Spreadsheets put a byte order mark in front.
_MARK = "\ufeff"
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_PATH = re.compile(r"data/photos/[^/]+/([0-9a-f]{16})\.[a-z]+")


@dataclass(frozen=True)
class Decision:
    """One line of the file.

    Attributes:
        photo: a path under data/photos, or the first digits of the photo's SHA-256 (8 or more).
        kind: one of KINDS.
        label: the new class; empty unless the photo is relabelled.
        where: file and line, for people.
    """

    photo: str
    kind: str
    label: str
    who: str
    why: str
    where: str

    @property
    def digest(self) -> str:
        """The first digits of the photo's SHA-256."""
        path = _PATH.fullmatch(self.photo)
        return path[1] if path else self.photo

    @property
    def reason(self) -> str:
        """Why a photo that is dropped is rejected."""
        return "dropped by " + (self.who or "hand") + (f": {self.why}" if self.why else "")


def read(path: Path, classes: Sequence[str]) -> list[Decision]:
    """The decisions in `path`; none where there is no such file.

    Raises:
        TouchlineError: a line that cannot be followed; named by its number.
    """
    content = _content(path)
    return [] if content is None else _parsed(path, content, classes)


def add(
    paths: Paths, classes: Sequence[str], photo: str, kind: str, label: str = "", who: str = "", why: str = ""
) -> str:
    """Add a decision to the file; several processes may do so at once.

    Args:
        photo, kind, label, who, why: as of `Decision`.

    Returns:
        The line, for `take_back`; empty if the same had been decided before.

    Raises:
        TouchlineError: the photo has another decision, or a line of the file is invalid.
    """
    with _locked(paths):
        content = re.sub(r"\r(?!\n)", "\n", _content(paths.decisions) or ",".join(COLUMNS) + "\n")
        digest = Decision(photo, kind, label, who, why, "").digest
        for other in _parsed(paths.decisions, content, classes):
            if digest.startswith(other.digest) or other.digest.startswith(digest):
                if (other.kind, other.label) == (kind, label):
                    return ""
                by = f" by {other.who}" if other.who else ""
                raise TouchlineError(f"the photo has a decision{by} already: {other.kind} {other.label}".rstrip())
        end = "\r\n" if "\r\n" in content else "\n"
        head, _, rest = content.partition("\n")
        columns = [column.strip() for column in next(csv.reader([head.removeprefix(_MARK)]))]
        if _WHEN not in columns:
            columns.append(_WHEN)
            content = f"{head.rstrip()},{_WHEN}{end}{rest}"
        when = datetime.now(UTC).isoformat(timespec="seconds")
        texts = {"who": _plain(who), "why": _plain(why), "photo": photo, "decision": kind, "label": label, _WHEN: when}
        new = _csv([texts.get(column, "") for column in columns])
        gap = "" if content.endswith("\n") else end
        write_bytes(paths.decisions, f"{content}{gap}{new}{end}".encode())
        return new


def take_back(paths: Paths, line: str) -> bool:
    """Delete a line that `add` wrote; False if the file no longer has it."""
    with _locked(paths):
        lines = (_content(paths.decisions) or "").splitlines(keepends=True)
        places = [place for place, each in enumerate(lines) if each.rstrip("\r\n") == line]
        if places:
            del lines[places[-1]]
            write_bytes(paths.decisions, "".join(lines).encode())
        return bool(places)


def forget(path: Path, classes: Sequence[str], photos: Collection[str], names: Callable[[str], bool]) -> None:
    """Delete the lines about photos, and from all other lines the notes that name them; the rest stays as it was typed.

    Args:
        photos: their sha256.
        names: whether a text names one of them, or its author.

    Raises:
        TouchlineError: a line that cannot be followed.
    """
    content = _content(path)
    if not content:
        return
    _parsed(path, content, classes)
    mark = _MARK if content.startswith(_MARK) else ""
    typed = io.StringIO(content.removeprefix(_MARK), newline="").readlines()
    lines = csv.reader(typed, strict=True)
    header = [column.strip() for column in next(lines)]
    left, start = typed[: lines.line_num], lines.line_num
    for values in lines:
        line, start = "".join(typed[start : lines.line_num]), lines.line_num
        if not any(value.strip() for value in values):
            left.append(line)
            continue
        digest = _decision(header, [value.strip() for value in values], classes, "").digest
        if any(photo.startswith(digest) for photo in photos):
            continue
        cells = list(zip(header, values, strict=False))  # a line by hand may end before `when`
        notes = [column not in ("photo", "decision", "label") and names(value) for column, value in cells]
        if any(notes):
            kept = ["" if note else value for note, value in zip(notes, values, strict=True)]
            line = _csv(kept) + line[len(line.rstrip("\r\n")) :]
        left.append(line)
    if left != typed:
        write_bytes(path, (mark + "".join(left)).encode())


@contextmanager
def _locked(paths: Paths) -> Iterator[None]:
    from filelock import FileLock

    paths.locks.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.locks / "decisions.lock"):
        yield


def _content(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        name = "/".join(path.parts[-2:])
        raise TouchlineError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def _parsed(path: Path, content: str, classes: Sequence[str]) -> list[Decision]:
    name = "/".join(path.parts[-2:])
    content = content.removeprefix(_MARK)
    lines = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        header = [column.strip() for column in next(lines, [])]
        if missing := [column for column in COLUMNS if column not in header]:
            raise TouchlineError(f"{name}, line 1 lacks the column {', '.join(missing)}: it is {','.join(COLUMNS)}")
        return [
            _decision(header, [value.strip() for value in values], classes, f"{name}, line {lines.line_num}")
            for values in lines
            if any(value.strip() for value in values)
        ]
    except csv.Error as error:
        raise TouchlineError(f"{name}, line {lines.line_num} is no line of a table ({error})") from None


def _decision(header: Sequence[str], values: Sequence[str], classes: Sequence[str], where: str) -> Decision:
    if header[-1] == _WHEN and len(values) == len(header) - 1:
        values = [*values, ""]
    if len(values) != len(header):
        raise TouchlineError(
            f"{where} has {len(values)} values, not {len(header)}: put double quotes around what holds a comma"
        )
    row = dict(zip(header, values, strict=True))
    photo = row["photo"].replace("\\", "/").removeprefix("./")
    photo = photo if "/" in photo else photo.lower()
    if not (_PATH.fullmatch(photo) or _DIGEST.fullmatch(photo)):
        raise TouchlineError(
            f"{where} names the photo {row['photo']!r}; allowed: a path of data/photos.csv, or the first 8 or more "
            "digits of its sha256"
        )
    kind, label = row["decision"].lower(), row["label"]
    if kind not in KINDS:
        raise TouchlineError(f"{where} has the decision {row['decision']!r}; allowed: {', '.join(KINDS)}")
    if kind == "relabel" and label not in classes:
        raise TouchlineError(f"{where} relabels to {label!r}; allowed: {', '.join(classes)}")
    if kind != "relabel" and label:
        raise TouchlineError(f"{where} gives the label {label!r} to a photo it does not relabel: leave it empty")
    return Decision(photo, kind, label, row["who"], row["why"], where)


def match(decisions: Sequence[Decision], photos: "pd.DataFrame") -> tuple[list[Decision | None], list[Decision]]:
    """Which decision each photo falls under.

    Args:
        photos: columns path and sha256. Rows of the same bytes (one photo filed twice) fall under one digest together,
            and under their paths apart.

    Returns:
        One decision or None a row, and the decisions about photos that are not there.

    Raises:
        TouchlineError: two decisions about one photo differ, or the first digits are those of several photos.
    """
    found: list[Decision | None] = [None] * len(photos)
    absent = []
    rows_of_path: dict[str, list[int]] = {}
    for row, path in enumerate(photos["path"]):
        rows_of_path.setdefault(path, []).append(row)
    digests = photos["sha256"].to_numpy()
    for decision in decisions:
        if decision.photo != decision.digest:
            rows = rows_of_path.get(decision.photo, [])
        else:
            rows = [row for row, digest in enumerate(digests) if digest.startswith(decision.digest)]
            if len(set(digests[rows])) > 1:
                raise TouchlineError(
                    f"{decision.where} names {decision.photo}, with which the sha256 of several photos begins: "
                    "write more digits"
                )
        if not rows:
            absent.append(decision)
        for row in rows:
            other = found[row]
            if other and (other.kind, other.label) != (decision.kind, decision.label):
                raise TouchlineError(
                    f"{decision.where} says {decision.kind} {decision.label}".rstrip()
                    + f" of a photo that {other.where} says {other.kind} {other.label}".rstrip()
                    + " of: delete one of them"
                )
            found[row] = other or decision
    return found, absent


def line(photo: str, kind: str, label: str = "", who: str = "", why: str = "") -> str:
    """A line for the file, quoted where it must be, without a line break."""
    return _csv((photo, kind, label, who, why))


def _csv(values: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


def _plain(text: str) -> str:
    """Text as one line that a spreadsheet does not take for a formula."""
    return no_formula(" ".join(text.split()))
