"""Photos that people gave at the page of `touchline app`, each with the class they say it is.

The queue is a folder: `<sha256>.<ext>` is a photo, `<sha256>.json` beside it says what it is. The second file makes an
entry of the first, and each is written whole, so neither a crash nor two people at once can leave half an entry.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from touchline.core.errors import TouchlineError, one_line
from touchline.core.files import read_json, remove_partials, write_bytes, write_json
from touchline.core.licences import Licence
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data import photos
from touchline.data.forgotten import Forgotten
from touchline.sources import Candidate, Planned, Source
from touchline.sources.received import Received, say_left_out, shown

LICENCE = "given by the person at the page"


def remember(folder: Path, content: bytes, label: str, answers: Sequence[dict[str, Any]]) -> bool:
    """Put a photo and its class into the queue.

    Args:
        content: the file's own bytes; a photo that is there already is one entry, and its last class counts.
        answers: what each model said of it, for people who look into the queue.

    Returns:
        Whether that was new; what is there already is not written again, so DVC sees no change.
    """
    digest = hashlib.sha256(content).hexdigest()
    name = f"{digest}.{photos.header(content).extension or 'bin'}"
    record = folder / f"{digest}.json"
    if record.exists() and (folder / name).exists() and _read(record) == (name, label):
        return False
    write_bytes(folder / name, content)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(record, {"photo": name, "label": label, "when": when, "answers": list(answers)})
    return True


@dataclass(frozen=True)
class Entry:
    """A photo that a person labelled in the app.

    Attributes:
        photo: its file.
        guess, confidence: what the first model had said; empty and 0 where none was asked.
    """

    photo: Path
    sha256: str
    label: str
    guess: str
    confidence: float


def entries(folder: Path) -> list[Entry]:
    """The entries of the queue whose photo lies beside them, for people to look through; ingest takes `candidates`."""
    found = []
    for record in sorted(folder.glob("*.json")):
        name, label = _read(record)
        photo = folder / name
        if (
            name
            and Path(name).name == name
            and photo.stem == record.stem
            and photo.is_file()
            and not photo.is_symlink()
        ):
            said = read_json(record).get("answers")
            first = said[0] if isinstance(said, list) and said and isinstance(said[0], dict) else {}
            confidence = first.get("confidence")
            confidence = confidence if isinstance(confidence, float) else 0.0
            found.append(Entry(photo, record.stem, label, str(first.get("guess", "")), confidence))
    return found


def forget(folder: Path, digest: str) -> bool:
    """Remove a photo from the queue; False if the queue no longer has it."""
    found = next((entry for entry in entries(folder) if entry.sha256 == digest), None)
    if found:
        (folder / f"{digest}.json").unlink(missing_ok=True)
        found.photo.unlink(missing_ok=True)
    return found is not None


def candidates(received: Received, classes: Sequence[str]) -> Iterator[Candidate]:
    """Every entry of the queue, in the order of the photos' digests; what `received` refuses is named and left out.

    Raises:
        TouchlineError: an entry is not readable, its photo is missing, or its class is none of `classes`.
    """
    folder, left_out = received.folder, []
    for record in sorted(folder.glob("*.json")):
        if reason := received.refusal(record, image=False):
            left_out.append(f"{shown(record.name)} ({reason})")
            continue
        photo, label = _read(record)
        where = f"data/feedback/{record.name}"
        # Of the folder's own: an entry that came from elsewhere may name any file of this machine.
        if Path(photo).name != photo or Path(photo).stem != record.stem or not os.path.lexists(folder / photo):
            raise TouchlineError(f"{where} names no photo that lies beside it: delete it")
        if label not in classes:
            raise TouchlineError(
                f"{where} says the class {label!r}; allowed: {', '.join(classes)}: change it there, or delete the file"
            )
        if reason := received.refusal(folder / photo):
            left_out.append(f"{shown(photo)} ({reason})")
        else:
            yield Candidate(label, "feedback", photo, partial(received.read, folder / photo), licence=LICENCE)
    say_left_out("feedback", folder, left_out)


def labels(folder: Path) -> dict[str, str]:
    """The label of each photo in the queue, by its sha256; an entry that cannot be read is named and left out."""
    found = {}
    for record in sorted(folder.glob("*.json")):
        try:
            found[record.stem] = _read(record)[1]
        except (TouchlineError, OSError, UnicodeDecodeError) as error:
            say(f"data/feedback/{shown(record.name)} is left out: {one_line(error)}")
    return found


def _read(record: Path) -> tuple[str, str]:
    """File name and class of the photo that an entry is about; empty where it names none."""
    found = read_json(record)
    found = found if isinstance(found, dict) else {}
    return str(found.get("photo", "")), str(found.get("label", ""))


def _offers(paths: Paths, params: Params) -> Iterator[Candidate]:
    remove_partials(paths.feedback)
    return candidates(Received.of(paths.feedback, params), params.classes)


def _plan(paths: Paths, params: Params) -> list[Planned]:
    given = sum(1 for _ in candidates(Received.of(paths.feedback, params), params.classes))
    return [Planned(f"{given:,} photos given at the page", str(paths.feedback), 0.0, "there already", LICENCE)]


def _forget(paths: Paths, _: Params, gone: Forgotten) -> int:
    # An entry whose photo is missing would be an error: the record goes first.
    files = [file for file in paths.feedback.glob("*.*") if file.stem in gone.photos]
    for file in sorted(files, key=lambda file: file.suffix != ".json"):
        file.unlink()
    return len(files)


SOURCE = Source(
    "feedback",
    _offers,
    _plan,
    licence=Licence("LicenseRef-Feedback", "internal"),
    corrects=True,
    collected="Photos that people submitted in `touchline app`.",
    labelled="By the person who submitted the photo.",
    forget=_forget,
)
