"""ImageNet: photos of whole synsets, for those who have accepted its terms.

Where the files come from is `ingest.imagenet.origin`: the tar of each synset (winter 2021), the ILSVRC2012 training
archive (a tar of tars, of which only the wanted parts are fetched), files put in place by hand, or the copies at Kaggle
and Hugging Face through those sites' own clients. What was fetched stays in `ingest.imagenet.folder`, and the next run
asks for nothing.

Tars are never unpacked: their headers are read once, and a photo's bytes from its place in the tar.
"""

import contextlib
import csv
import hashlib
import io
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from touchline.core.errors import ParamsError, TouchlineError, one_line
from touchline.core.files import read_json, remove_partials, replacing, sha256, write_bytes, write_json
from touchline.core.licences import Licence
from touchline.core.params import DownloadParams, ImageNetParams, Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data.forgotten import Forgotten
from touchline.data.photos import EXTENSIONS
from touchline.sources import Candidate, Planned, Source
from touchline.sources.http import HttpError, WrongContent, head, read_range, to_file
from touchline.sources.received import Received, say_left_out, shown

TERMS = "ImageNet terms: non-commercial research and education, no redistribution"

_T = TypeVar("_T")
_BLOCK = tarfile.BLOCKSIZE
_ENDINGS = {*EXTENSIONS.values(), "jpeg", "tiff"}
# A photo is named `<wnid>_<number>` after the synset it was first filed under, whatever archive it is in.
_PHOTO = re.compile(r"n\d{8}_\d+")

_COMPETITION = "imagenet-object-localization-challenge"
_KAGGLE_LIST = "LOC_train_solution.csv"
_HUB_DATASET = "ILSVRC/imagenet-1k"
# The place of a synset in the sorted list of the 1,000 of ILSVRC2012.
_HUB_LABELS = {"n03379051": 560, "n04118538": 768, "n04254680": 805}
_HUB_MEGABYTES = 147_000.0  # all files of the split: rows are shuffled, so a whole pass reads each of them
_HUB_PHOTOS_BETWEEN_NOTES = 20


@dataclass(frozen=True)
class _Photo:
    """One photo of a synset; `name` is its path within the synset."""

    wnid: str
    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class _Index:
    """What is known of an archive of tars: where each inner tar lies, as far as its headers have been read.

    Attributes:
        url: the archive; `size`: its bytes. Another size is another archive.
        next: where the next header begins.
        complete: True once the end of the archive was read.
        members: first byte and number of bytes by name.
    """

    url: str
    size: int
    next: int = 0
    complete: bool = False
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pass:
    """How far the reading of the data set at Hugging Face has come.

    Attributes:
        synsets: whose photos are kept.
        photos: (synset, file name) in the order in which they came.
        position: state of the stream after the last of them.
        done: True once the data set was read to its end.
    """

    synsets: list[str]
    photos: list[tuple[str, str]] = field(default_factory=list)
    position: dict[str, Any] | None = None
    done: bool = False


def candidates(
    params: ImageNetParams,
    download: DownloadParams,
    classes: Sequence[str],
    project: Path,
    *,
    follow_links: bool = False,
) -> Iterator[Candidate]:
    """The photos of each class's synsets: synsets in turn within a class, and classes in turn.

    The order is the same each time. A file name that stands in two synsets of a class is offered once. `read` may be
    called from any thread. From `huggingface` photos come in the order of that data set, each kept before it is
    offered, so whoever has enough may stop.

    Args:
        project: what a relative `params.folder` and `params.archive` are relative to.
        follow_links: of the origin `folder`: links in a synset's folder may leave it.

    Raises:
        ParamsError: the terms are not accepted, or the params do not fit the classes.
        TouchlineError: a file cannot be had or read.
    """
    _check(params, classes)
    folder = project / params.folder
    wnids = [wnid for label in classes for wnid in params.classes[label]]
    label_of = {wnid: label for label in classes for wnid in params.classes[label]}
    if params.origin == "huggingface":
        known = [wnid for wnid in wnids if wnid in _HUB_LABELS]
        _say_missing(params, classes, known, f"{_HUB_DATASET}, as far as known here ({', '.join(_HUB_LABELS)}),")
        offered = _from_hub(known, folder / "huggingface")
    else:
        sources: dict[str, Callable[[], dict[str, list[_Photo]]]] = {
            "winter21": lambda: _from_winter21(params, download, wnids, folder),
            "ilsvrc2012": lambda: _from_ilsvrc2012(params, download, classes, project),
            "folder": lambda: _from_folder(download, wnids, folder, follow_links),
            "kaggle": lambda: _from_kaggle(params, classes, folder / "kaggle"),
        }
        photos = sources[params.origin]()
        offered = _in_turn(
            _distinct(_in_turn(sorted(photos.get(wnid, []), key=_by_name) for wnid in params.classes[label]))
            for label in classes
        )
    for photo in offered:
        yield Candidate(label_of[photo.wnid], "imagenet", f"{photo.wnid}/{photo.name}", photo.read, licence=TERMS)


def plan(params: ImageNetParams, download: DownloadParams, classes: Sequence[str], project: Path) -> list[Planned]:
    """What `candidates` would fetch; only the sizes of the files are asked for.

    Raises:
        ParamsError, TouchlineError: as `candidates`.
    """
    _check(params, classes)
    folder = project / params.folder
    wnids = [wnid for label in classes for wnid in params.classes[label]]
    match params.origin:
        case "winter21":
            return [_planned_winter21(params, download, wnid, folder) for wnid in wnids]
        case "ilsvrc2012":
            return _planned_ilsvrc2012(params, wnids, project)
        case "folder":
            return [
                _there(f"synset {wnid}", path, sum(file.stat().st_size for file in _files_of(path)))
                for wnid in wnids
                for path in _places(wnid, folder)
            ]
        case "kaggle":
            return [_planned_kaggle(wnid, folder / "kaggle") for wnid in wnids]
        case "huggingface":
            note = folder / "huggingface/pass.json"
            known = [wnid for wnid in wnids if wnid in _HUB_LABELS]
            if _read_pass(note, known).done:
                return [_there(f"photos of {', '.join(known)}", note.parent, 0)]
            where = f"https://huggingface.co/datasets/{_HUB_DATASET}"
            return [Planned(f"photos of {', '.join(known)}", where, _HUB_MEGABYTES, "to fetch", TERMS)]


def _check(params: ImageNetParams, classes: Sequence[str]) -> None:
    if not params.accept_terms:
        raise ParamsError(
            "ingest.imagenet.accept_terms is false: ImageNet may be used for non-commercial research and education "
            "only and not be passed on; read its terms at https://image-net.org/download and set it to true"
        )
    seen: dict[str, str] = {}
    for label in classes:
        if not params.classes.get(label):
            raise ParamsError(
                f"ingest.imagenet.classes has no synset for class '{label}': add one, such as `{label}: [n04254680]`"
            )
        for wnid in params.classes[label]:
            if wnid in seen:
                raise ParamsError(
                    f"ingest.imagenet.classes: {wnid} stands twice (in {seen[wnid]} and {label}): name it once"
                )
            seen[wnid] = label


def _say_missing(params: ImageNetParams, classes: Sequence[str], found: Iterable[str], where: str) -> None:
    """Say which synsets a source lacks. Raises ParamsError where a class is left with none."""
    there = set(found)
    for label in classes:
        if there.isdisjoint(params.classes[label]):
            raise ParamsError(
                f"ingest.imagenet.classes.{label}: {where} holds none of {', '.join(params.classes[label])}: "
                "name other synsets or another `ingest.imagenet.origin`"
            )
        missing = [wnid for wnid in params.classes[label] if wnid not in there]
        if missing:
            say(f"imagenet: {where} does not hold {', '.join(missing)} of class {label}: left out")


def _in_turn(lists: Iterable[Iterable[_T]]) -> Iterator[_T]:
    for row in zip_longest(*lists):
        yield from (item for item in row if item is not None)


def _distinct(photos: Iterable[_Photo]) -> Iterator[_Photo]:
    seen: set[str] = set()
    for photo in photos:
        base = PurePosixPath(photo.name)
        # Names of ImageNet's own are unique in all of it; any other name says something within its synset only.
        key = base.name if _PHOTO.fullmatch(base.stem) else f"{photo.wnid}/{photo.name}"
        if key not in seen:
            seen.add(key)
            yield photo


def _by_name(photo: _Photo) -> str:
    return photo.name


# What people have to do themselves where the server wants a login.
def _by_hand(wnids: Iterable[str], folder: Path) -> str:
    tars = ", ".join(f"{wnid}.tar" for wnid in wnids)
    return (
        f"log in at https://image-net.org/download-images, put {tars} into {folder} "
        "and set `ingest.imagenet.origin: folder`"
    )


_ARCHIVE_BY_HAND = (
    "log in at https://image-net.org/download-images, download the training images (task 1 & 2) "
    "and set `ingest.imagenet.archive` to that file"
)


@contextlib.contextmanager
def _explained(url: str, remedy: str, param: str) -> Iterator[None]:
    """Refusals of `url` as one line with what to do."""
    try:
        yield
    except HttpError as error:
        if error.status in {401, 403}:
            raise TouchlineError(f"{url} is not given out without a login ({error.status}): {remedy}") from None
        if error.status in {404, 410}:
            raise TouchlineError(f"{url} is not there ({error.status}): check `{param}`, or {remedy}") from None
        raise


def _fetch_tar(
    url: str, path: Path, download: DownloadParams, remedy: str, param: str, offset: int = 0, size: int | None = None
) -> None:
    """Download a tar, or the part of an archive that is one."""
    try:
        with _explained(url, remedy, param):
            to_file(url, path, download, offset=offset, size=size, is_right=_is_tar, what=path.name)
    except WrongContent as error:
        if "in its place" not in error.why:
            raise
        raise TouchlineError(f"{error}, perhaps of a login: {remedy}") from None


def _is_tar(start: bytes) -> bool:
    return start[257:262] == b"ustar"


# winter21


def _from_winter21(
    params: ImageNetParams, download: DownloadParams, wnids: Sequence[str], folder: Path
) -> dict[str, list[_Photo]]:
    def photos_of(wnid: str) -> list[_Photo]:
        path, url = folder / f"{wnid}.tar", f"{params.url.rstrip('/')}/{wnid}.tar"
        fetch = partial(_fetch_tar, url, path, download, _by_hand([wnid], folder), "ingest.imagenet.url")
        return _photos_fetched(path, wnid, download, fetch)

    return {wnid: photos_of(wnid) for wnid in wnids}


def _planned_winter21(params: ImageNetParams, download: DownloadParams, wnid: str, folder: Path) -> Planned:
    path = folder / f"{wnid}.tar"
    if path.exists():
        return _there(f"synset {wnid}", path, path.stat().st_size)
    url = f"{params.url.rstrip('/')}/{wnid}.tar"
    with _explained(url, _by_hand([wnid], folder), "ingest.imagenet.url"):
        size = head(url, download)
    return Planned(f"synset {wnid}", url, None if size is None else size / 1e6, "to fetch", TERMS)


def _there(what: str, path: Path, size: int) -> Planned:
    return Planned(what, str(path), size / 1e6, "there already", TERMS)


# ilsvrc2012


def _from_ilsvrc2012(
    params: ImageNetParams, download: DownloadParams, classes: Sequence[str], project: Path
) -> dict[str, list[_Photo]]:
    wnids = [wnid for label in classes for wnid in params.classes[label]]
    where = params.archive.rsplit("/", 1)[-1]
    if not _is_url(params.archive):
        path = _local_archive(params, project)
        index = _walk_file(path, wnids)
        found = {wnid: index.members[f"{wnid}.tar"] for wnid in wnids if f"{wnid}.tar" in index.members}
        _say_missing(params, classes, found, where)
        return {wnid: _photos_in_tar(path, wnid, download, *place) for wnid, place in found.items()}
    folder = project / params.folder / "ilsvrc2012"
    paths = {wnid: folder / f"{wnid}.tar" for wnid in wnids}
    wanted = [wnid for wnid in wnids if not paths[wnid].exists()]
    members = _walk_url(params.archive, folder / "index.json", wanted, download).members if wanted else {}
    missing = [wnid for wnid in wanted if f"{wnid}.tar" not in members]
    _say_missing(params, classes, set(wnids) - set(missing), where)

    def fetch(wnid: str) -> None:
        found = members or _walk_url(params.archive, folder / "index.json", [wnid], download).members
        start, size = found[f"{wnid}.tar"]
        _fetch_tar(
            params.archive, paths[wnid], download, _ARCHIVE_BY_HAND, "ingest.imagenet.archive", offset=start, size=size
        )

    return {
        wnid: _photos_fetched(paths[wnid], wnid, download, partial(fetch, wnid))
        for wnid in wnids
        if wnid not in missing
    }


def _planned_ilsvrc2012(params: ImageNetParams, wnids: Sequence[str], project: Path) -> list[Planned]:
    if not _is_url(params.archive):
        path = _local_archive(params, project)
        return [_there("ILSVRC2012 archive", path, path.stat().st_size)]
    folder = project / params.folder / "ilsvrc2012"
    index = _read_index(folder / "index.json", params.archive)
    planned = []
    for wnid in wnids:
        path = folder / f"{wnid}.tar"
        _, size = index.members.get(f"{wnid}.tar", (0, None)) if index else (0, None)
        if path.exists():
            planned.append(_there(f"synset {wnid}", path, path.stat().st_size))
        elif size is not None or not (index and index.complete):
            megabytes = None if size is None else size / 1e6
            planned.append(Planned(f"synset {wnid}", params.archive, megabytes, "to fetch", TERMS))
    return planned


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _local_archive(params: ImageNetParams, project: Path) -> Path:
    path = project / params.archive
    if not path.is_file():
        raise ParamsError(f"ingest.imagenet.archive: {path} is no file: put the archive there, or name its URL or path")
    return path


def _walk_file(path: Path, wnids: Sequence[str]) -> _Index:
    with path.open("rb") as file:
        index = _Index(str(path), path.stat().st_size)
        while not _has(index, wnids):
            file.seek(index.next)
            index = _one_further(index, file.read(_BLOCK))
    return index


def _walk_url(url: str, note: Path, wnids: Sequence[str], download: DownloadParams) -> _Index:
    """Read the headers of the archive's members until all wanted ones are found.

    A header at a time: between two of them lie 150 MB. What is known is noted after each, so a killed walk goes on.
    """
    index = _read_index(note, url)
    if index and _has(index, wnids):
        return index
    say(f"imagenet: looking for {', '.join(wnids)} in {url}")
    _, size = _read_header(url, 0, download)
    if index is None or index.size != size:
        index = _Index(url, size)
    while not _has(index, wnids):
        block, _ = _read_header(url, index.next, download) if index.next < size else (b"", size)
        index = _one_further(index, block)
        write_json(note, asdict(index))
        if len(index.members) % 100 == 0:
            say(f"imagenet: {len(index.members):,} parts of the archive seen")
    return index


def _read_header(url: str, start: int, download: DownloadParams) -> tuple[bytes, int]:
    try:
        with _explained(url, _ARCHIVE_BY_HAND, "ingest.imagenet.archive"):
            return read_range(url, start, _BLOCK, download)
    except WrongContent as error:
        raise TouchlineError(f"{url} cannot be read in parts ({error.why}): {_ARCHIVE_BY_HAND}") from None


def _read_index(note: Path, url: str) -> _Index | None:
    if not note.exists():
        return None
    with _as_noted(note):
        known = read_json(note)
        members = {name: (int(start), int(size)) for name, (start, size) in known["members"].items()}
        index = _Index(known["url"], int(known["size"]), int(known["next"]), known["complete"], members)
    return index if index.url == url else None


@contextlib.contextmanager
def _as_noted(note: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise TouchlineError(f"{note} does not hold what was noted in it: delete it and run again") from None


def _has(index: _Index, wnids: Iterable[str]) -> bool:
    return index.complete or all(f"{wnid}.tar" in index.members for wnid in wnids)


def _one_further(index: _Index, block: bytes) -> _Index:
    """The index with the member whose header is `block`, read at `index.next`."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if block == bytes(_BLOCK):
            return replace(index, complete=True)
        raise TouchlineError(
            f"{index.url} is cut off or no tar of tars ({error} at byte {index.next:,}): get it again"
        ) from None
    start = index.next + _BLOCK
    after = start + -(-member.size // _BLOCK) * _BLOCK
    if member.size < 0 or after > index.size:
        raise TouchlineError(f"{index.url} is cut off: {shown(member.name)} goes on behind its end: get it again")
    members = index.members
    if member.isreg():
        members = {**members, member.name.removeprefix("./"): (start, member.size)}
    return replace(index, next=after, members=members)


# folder


def _from_folder(
    download: DownloadParams, wnids: Sequence[str], folder: Path, follow_links: bool
) -> dict[str, list[_Photo]]:
    def photos_at(path: Path, wnid: str) -> list[_Photo]:
        if path.is_file():
            return _photos_in_tar(path, wnid, download, ours=False)
        return _photos_in_folder(Received(path, download.max_megabytes, follow_links), wnid)

    return {wnid: [photo for path in _places(wnid, folder) for photo in photos_at(path, wnid)] for wnid in wnids}


def _places(wnid: str, folder: Path) -> list[Path]:
    tar, files = folder / f"{wnid}.tar", folder / wnid
    places = [tar] * tar.is_file() + [files] * files.is_dir()
    if not places:
        raise TouchlineError(
            f"{folder} holds neither {wnid}.tar nor {wnid}/: put one there (https://image-net.org/download-images), "
            f"or take {wnid} out of `ingest.imagenet.classes`"
        )
    return places


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]


def _photos_in_folder(folder: Received, wnid: str) -> list[_Photo]:
    left_out, photos = [], []
    for path in sorted(path for path in folder.folder.iterdir() if _named_like_a_photo(path.name)):
        if reason := folder.refusal(path) if path.name.isprintable() else "its name":
            left_out.append(f"{shown(path.name)} ({reason})")
        else:
            photos.append(_Photo(wnid, path.name, partial(folder.read, path)))
    say_left_out("imagenet", folder.folder, left_out)
    return photos


# Tars


class _Damaged(TouchlineError):
    """A tar that is cut off or broken."""


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        content = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _photos_fetched(path: Path, wnid: str, download: DownloadParams, fetch: Callable[[], None]) -> list[_Photo]:
    """The photos of a tar, which is fetched if it is not there, and once more if it is damaged."""
    if not path.exists():
        fetch()
    try:
        return _photos_in_tar(path, wnid, download)
    except _Damaged as error:
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        say(f"imagenet: {error}; it is now {aside.name}, and is fetched again")
        fetch()
        return _photos_in_tar(path, wnid, download)


def _photos_in_tar(
    path: Path, wnid: str, download: DownloadParams, start: int = 0, size: int | None = None, *, ours: bool = True
) -> list[_Photo]:
    """The photos of a tar, or of the tar at `start` in a larger one; only headers are read.

    Args:
        ours: the tar was fetched here and can be fetched again.

    Raises:
        TouchlineError: the tar is cut off or broken.
    """
    photos: list[_Photo] = []
    left_out: list[str] = []
    end = path.stat().st_size - start if size is None else size
    try:
        with path.open("rb") as whole, io.BufferedReader(_Part(whole, start, end)) as file:
            for member in _members(file):
                if member.isdir():
                    continue
                reason = _refusal(member, download)
                if reason:
                    left_out.append(f"{shown(member.name)} ({reason})")
                elif _named_like_a_photo(PurePosixPath(member.name).name):
                    name = PurePosixPath(member.name).as_posix()
                    read = partial(_read_part, path, start + member.offset_data, member.size)
                    photos.append(_Photo(wnid, name, read))
    except Exception as error:  # hostile bytes raise many kinds in tarfile; all of them mean "no whole tar"
        if isinstance(error, OSError) and error.errno is not None:
            raise TouchlineError(f"{path} cannot be read ({error.strerror})") from None
        whole_name = path if size is None else f"{wnid}.tar in {path}"
        remedy = "run again, and it is fetched again" if ours and size is None else "put a whole one in its place"
        reason = shown(one_line(error, 120))
        raise _Damaged(f"{whole_name} is cut off or broken ({reason}): {remedy}") from None
    say_left_out("imagenet", path if size is None else Path(f"{path} {wnid}.tar"), left_out)
    return photos


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Raises tarfile.ReadError, and more, where it is not whole."""
    behind = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # A size below zero would send tarfile round in circles.
            if member.size < 0 or member.offset < behind:
                raise tarfile.ReadError("a member with an impossible size")
            behind = member.offset_data
            yield member
        # tarfile takes a header it cannot read for the end; the true end is a block of zeros.
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")


def _refusal(member: tarfile.TarInfo, download: DownloadParams) -> str:
    """Why a member is not taken; empty where nothing is wrong with it.

    Stricter than `tarfile.data_filter`, which Python has only from 3.11.4 on.
    """
    if not member.isreg():
        return "no regular file"
    if member.issparse():
        return "sparse"
    if not member.name.isprintable() or "\\" in member.name:
        return "its name"
    if member.name.startswith("/"):
        return "absolute path"
    if ".." in PurePosixPath(member.name).parts:
        return "leaves the folder"
    if member.size > download.max_megabytes * 1e6:
        return f"larger than {download.max_megabytes:g} MB"
    return ""


def _named_like_a_photo(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].casefold() in _ENDINGS


def _read_part(path: Path, start: int, size: int) -> bytes:
    # A handle of its own for each read: a shared one would have one position for all threads.
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) != size:
        raise TouchlineError(f"{path} has become shorter while it was read: run again")
    return content


# Kaggle


def _from_kaggle(params: ImageNetParams, classes: Sequence[str], folder: Path) -> dict[str, list[_Photo]]:
    """Photos of the competition's training list, which names those that have boxes: about two in five of all."""
    wnids = [wnid for label in classes for wnid in params.classes[label]]
    path = folder / _KAGGLE_LIST
    client = None
    if not path.exists():
        client = _kaggle_client()
        write_bytes(path, _kaggle_file(client, _KAGGLE_LIST))
    names = _kaggle_names(path, wnids)
    _say_missing(params, classes, names, f"the Kaggle competition's {_KAGGLE_LIST}")
    if not all((folder / wnid / name).exists() for wnid in names for name in names[wnid]):
        # Before the first photo, not in the middle, so that a missing token is reported at once.
        client = client or _kaggle_client()
    return {
        wnid: [_Photo(wnid, name, partial(_kaggle_photo, client, wnid, folder / wnid / name)) for name in names[wnid]]
        for wnid in names
    }


def _planned_kaggle(wnid: str, folder: Path) -> Planned:
    path = folder / _KAGGLE_LIST
    if path.exists():
        paths = [folder / wnid / name for name in _kaggle_names(path, [wnid]).get(wnid, [])]
        if all(path.exists() for path in paths):
            return _there(f"synset {wnid}", folder / wnid, sum(path.stat().st_size for path in paths))
    return Planned(f"synset {wnid}", f"https://www.kaggle.com/c/{_COMPETITION}", None, "to fetch", TERMS)


def _kaggle_names(path: Path, wnids: Sequence[str]) -> dict[str, list[str]]:
    wanted = set(wnids)
    names: dict[str, list[str]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                wnid = row["ImageId"].partition("_")[0]
                if wnid in wanted and _PHOTO.fullmatch(row["ImageId"]):
                    names.setdefault(wnid, []).append(f"{row['ImageId']}.JPEG")
    except (KeyError, AttributeError, UnicodeDecodeError, csv.Error):
        raise TouchlineError(f"{path} is no table with a column `ImageId`: delete it and run again") from None
    return names


def _kaggle_client() -> Any:
    try:
        # The package logs in when it is imported, and prints a page of help where it cannot.
        with contextlib.redirect_stdout(io.StringIO()):
            import kaggle

            kaggle.api.authenticate()
    except ImportError:
        raise TouchlineError(
            "ingest.imagenet.origin is kaggle, whose client is not installed: run `pip install kaggle`"
        ) from None
    except SystemExit:
        raise TouchlineError(
            "Kaggle knows no valid token of yours: run `kaggle auth login`, or set KAGGLE_API_TOKEN "
            "(https://www.kaggle.com/settings/api)"
        ) from None
    except Exception as error:  # the client passes on whatever its HTTP library raises
        raise _kaggle_trouble(error, "logging in") from None
    return kaggle.api


def _kaggle_file(client: Any, name: str) -> bytes:
    """A file of the competition, through the client, which chooses the file's name and zips it at will."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            client.competition_download_file(_COMPETITION, name, path=folder, force=True, quiet=True)
        except Exception as error:  # as in `_kaggle_client`
            raise _kaggle_trouble(error, name) from None
        paths = [path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")]
        if len(paths) != 1:
            raise TouchlineError(f"Kaggle gave {len(paths)} files for {name}: run again")
        if not zipfile.is_zipfile(paths[0]):
            return paths[0].read_bytes()
        with zipfile.ZipFile(paths[0]) as archive:
            try:
                return archive.read(PurePosixPath(name).name)
            except (KeyError, zipfile.BadZipFile) as error:
                raise TouchlineError(f"Kaggle gave a zip without {name} ({error}): run again") from None


def _kaggle_photo(client: Any, wnid: str, path: Path) -> bytes:
    if not path.exists():
        write_bytes(path, _kaggle_file(client, f"ILSVRC/Data/CLS-LOC/train/{wnid}/{path.name}"))
    return path.read_bytes()


def _kaggle_trouble(error: Exception, what: str) -> TouchlineError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return TouchlineError(f"Kaggle refuses your token ({what}): run `kaggle auth login` or make a new one")
    if status == 403:
        return TouchlineError(
            f"Kaggle does not give out {what}: accept the rules in the browser at "
            f"https://www.kaggle.com/c/{_COMPETITION}/rules"
        )
    return TouchlineError(f"Kaggle gives no {what} ({one_line(error, 120)}): run again later")


# Hugging Face


def _from_hub(wnids: Sequence[str], folder: Path) -> Iterator[_Photo]:
    """The photos kept by earlier runs, in the order in which they came, then those that are still to come."""
    note = folder / "pass.json"
    known = _read_pass(note, wnids)
    for wnid, name in known.photos:
        if wnid in wnids:
            yield _Photo(wnid, name, (folder / wnid / name).read_bytes)
    if known.done:
        return
    kept = set(known.photos)
    photos, position, done = list(known.photos), known.position, False
    try:
        stream = _hub_stream(known)
        for row in stream:
            wnid, name, content = _hub_photo(row)
            position = stream.state_dict()
            if (wnid, name) in kept:
                continue
            write_bytes(folder / wnid / name, content)
            kept.add((wnid, name))
            photos.append((wnid, name))
            if len(photos) % _HUB_PHOTOS_BETWEEN_NOTES == 0:
                write_json(note, asdict(_Pass(known.synsets, photos, position)))
            if wnid in wnids:
                yield _Photo(wnid, name, (folder / wnid / name).read_bytes)
        done = True
    except TouchlineError:
        raise
    except Exception as error:  # the client passes on whatever its HTTP and Parquet libraries raise
        raise _hub_trouble(error) from None
    finally:
        if done or position is not None:
            write_json(note, asdict(_Pass(known.synsets, photos, position, done)))


def _read_pass(note: Path, wnids: Sequence[str]) -> _Pass:
    """The pass that is noted, or a new one where that kept other synsets or a photo of it is gone."""
    if note.exists():
        with _as_noted(note):
            found = read_json(note)
            photos = [(wnid, name) for wnid, name in found["photos"]]
            known = _Pass(found["synsets"], photos, found["position"], found["done"])
            if set(wnids) <= set(known.synsets) and all((note.parent / wnid / name).exists() for wnid, name in photos):
                return known
    return _Pass(sorted(wnids))


def _hub_stream(known: _Pass) -> Any:
    try:
        import datasets
    except ImportError:
        raise TouchlineError(
            "ingest.imagenet.origin is huggingface, whose client is not installed: run `pip install datasets`"
        ) from None
    labels = [_HUB_LABELS[wnid] for wnid in known.synsets]
    stream = datasets.load_dataset(
        _HUB_DATASET, split="train", streaming=True, columns=["image", "label"], filters=[("label", "in", labels)]
    )
    say(f"imagenet: reading {_HUB_DATASET} for {', '.join(known.synsets)}; a whole pass reads {_HUB_MEGABYTES:,.0f} MB")
    # The bytes as they are in the file, not decoded and encoded again.
    stream = stream.cast_column("image", datasets.Image(decode=False))
    if known.position is not None:
        stream.load_state_dict(known.position)
    return stream


def _hub_photo(row: dict[str, Any]) -> tuple[str, str, bytes]:
    """Synset, file name and bytes of a row."""
    wnid = next(wnid for wnid, label in _HUB_LABELS.items() if label == row["label"])
    content = row["image"]["bytes"]
    # There a photo is called `n04118538_10_n04118538.JPEG`; without its second half it is called as everywhere else.
    stem = PurePosixPath(row["image"]["path"] or "").stem.removesuffix(f"_{wnid}")
    if not _PHOTO.fullmatch(stem):
        stem = f"{wnid}_{hashlib.sha256(content).hexdigest()[:16]}"
    return wnid, f"{stem}.JPEG", content


def _hub_trouble(error: Exception) -> TouchlineError:
    chain = [error, error.__cause__, error.__context__]
    status = next((found for link in chain if (found := _status(link)) is not None), None)
    page = f"https://huggingface.co/datasets/{_HUB_DATASET}"
    if status == 403 or "ask for access" in " ".join(str(error).split()):
        return TouchlineError(f"Hugging Face has not let you in to {_HUB_DATASET}: accept its terms at {page}")
    if status == 401 or type(error).__name__ == "DatasetNotFoundError":
        return TouchlineError(
            f"Hugging Face wants to know who asks for {_HUB_DATASET}: accept its terms at {page}, "
            "then set HF_TOKEN or run `hf auth login`"
        )
    return TouchlineError(
        f"{_HUB_DATASET} at Hugging Face cannot be read ({one_line(error, 160)}): "
        "run again, it goes on where it stopped"
    )


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _offers(paths: Paths, params: Params) -> Iterator[Candidate]:
    settings = params.ingest
    remove_partials(paths.project / settings.imagenet.folder, below=False)
    return candidates(
        settings.imagenet, settings.download, params.classes, paths.project, follow_links=settings.follow_links
    )


def _plan(paths: Paths, params: Params) -> list[Planned]:
    return plan(params.ingest.imagenet, params.ingest.download, params.classes, paths.project)


def _forget(paths: Paths, params: Params, gone: Forgotten) -> int:
    """Delete photos (files and members of tars) from the folder of ImageNet's files, if it is in the project."""
    folder = (paths.project / params.ingest.imagenet.folder).resolve()
    if not folder.is_relative_to(paths.project.resolve()):
        return 0
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix not in {".json", ".csv"})
    count = sum(_tar_without(file, gone) for file in files if file.suffix == ".tar")
    going = [
        file
        for file in files
        if file.suffix != ".tar"
        and (gone.has("imagenet", f"{file.parent.name}/{file.name}") or sha256(file) in gone.photos)
    ]
    # Lists first: a photo that is listed and has no file would be fetched again.
    names = {(file.parent.name, file.name) for file in going}
    note, listed = folder / "huggingface/pass.json", folder / "kaggle" / _KAGGLE_LIST
    if names and note.exists():
        known = read_json(note)
        write_json(note, known | {"photos": [each for each in known["photos"] if tuple(each) not in names]})
    if listed.exists():
        lines = listed.read_text().splitlines(keepends=True)
        photos = [line.partition(",")[0] for line in lines]
        left = [
            line
            for line, photo in zip(lines, photos, strict=True)
            if not gone.has("imagenet", f"{photo.partition('_')[0]}/{photo}.JPEG")
        ]
        if len(left) < len(lines):
            write_bytes(listed, "".join(left).encode())
    for file in going:
        file.unlink()
    return count + len(going)


def _tar_without(path: Path, gone: Forgotten) -> int:
    """Rewrite a synset's tar without the forgotten photos. Returns how many there were."""
    wnid = path.stem

    def goes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
        content = tar.extractfile(member) if member.isreg() else None
        return gone.has("imagenet", f"{wnid}/{PurePosixPath(member.name).as_posix()}") or (
            content is not None and hashlib.sha256(content.read()).hexdigest() in gone.photos
        )

    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            going = {member.offset for member in members if goes(tar, member)}
            if going:
                with replacing(path) as draft, tarfile.open(draft, "w") as smaller:
                    for member in members:
                        if member.offset not in going:
                            smaller.addfile(member, tar.extractfile(member) if member.isreg() else None)
    except tarfile.TarError as error:
        raise TouchlineError(
            f"{path} cannot be read ({one_line(error)}), so nothing can be deleted from it: delete the whole file"
        ) from None
    return len(going)


SOURCE = Source(
    "imagenet",
    _offers,
    _plan,
    licence=Licence("LicenseRef-ImageNet", "research", share=False),
    network=True,
    collected="ImageNet's photos of whole synsets, found on the web.",
    labelled="By the synset, which people verified for ImageNet; trusted.",
    forget=_forget,
)
