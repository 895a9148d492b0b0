"""Files of Open Images in their real formats, put on a loopback server by `publish` as a list of `Shot`s says."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servers import Host

RUGBY, RUGBY_UNION, SOCCER, SOCCER_PLAYER, AMERICAN = "/m/06bqd", "/m/06br8", "/m/02vx4", "/m/0pcq81q", "/m/0jm_"
CC_BY = "https://creativecommons.org/licenses/by/2.0/"
CLASSES = {
    "/m/0c4936": "'Nduja",
    SOCCER: "Soccer",
    SOCCER_PLAYER: "Soccer player",
    RUGBY: "Rugby",
    RUGBY_UNION: "Rugby union",
    "/m/01wdp": "Cucumber, gourd, and melon family",
    "/m/02wvth": 'Fiat 500 "topolino"',
    AMERICAN: "American football",
    "/g/11b5v1_": "Café",
}
LABELS = {
    "validation": "/v7/oidv7-val-annotations-human-imagelabels.csv",
    "test": "/v7/oidv7-test-annotations-human-imagelabels.csv",
    "train": "/v7/oidv7-train-annotations-human-imagelabels.csv",
}
INFO = {
    "validation": "/2018_04/validation/validation-images-with-rotation.csv",
    "test": "/2018_04/test/test-images-with-rotation.csv",
    "train": "/2018_04/train/train-images-boxable-with-rotation.csv",
}
BOXES = {
    "validation": "/v5/validation-annotations-bbox.csv",
    "test": "/v5/test-annotations-bbox.csv",
    "train": "/v6/oidv6-train-annotations-bbox.csv",
}
CLASS_LIST = "/v7/oidv7-class-descriptions.csv"
_LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
_INFO_COLUMNS = (
    "ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title",
    "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation",
)  # fmt: skip
_BOX_COLUMNS = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsOccluded", "IsTruncated",
    "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
_CLICK_COLUMNS = tuple(f"XClick{number}{axis}" for axis in "XY" for number in (1, 2, 3, 4))


@dataclass(frozen=True)
class Shot:
    """One photo as the files describe it: its labels by MID with their confidence as it is written."""

    image: str
    labels: Mapping[str, str]
    author: str = ""
    page: str = ""
    title: str = "A match"
    licence: str = CC_BY
    rotation: str = "0.0"
    depictions: Sequence[int] = ()  # IsDepiction of each of its boxes
    listed: bool = True  # has a row of image info


def text_of(columns: Sequence[str], rows: Iterable[Sequence[Any]], line_end: str = "\n") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=line_end)
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue().encode()


def class_list(names: Mapping[str, str] = CLASSES) -> bytes:
    return text_of(("LabelName", "DisplayName"), names.items(), "\r\n")


def label_file(shots: Iterable[Shot]) -> bytes:
    """Sorted by ImageID, as the real ones are; people of two kinds verified them."""
    rows = [
        (shot.image, ("verification", "crowdsource-verification")[number % 2], mid, confidence)
        for shot in sorted(shots, key=lambda shot: shot.image)
        for number, (mid, confidence) in enumerate(shot.labels.items())
    ]
    return text_of(_LABEL_COLUMNS, rows)


def info_file(shots: Iterable[Shot], subset: str) -> bytes:
    """Not sorted by ImageID, as the real ones are not."""
    rows = [
        (
            shot.image, subset, f"https://farm3.staticflickr.com/{shot.image}_o.jpg",
            f"https://www.flickr.com/photos/{shot.image}", shot.licence, shot.page, shot.author, shot.title, 4405052,
            "KFukvivpCM5QXl5SqKe41g==", "", shot.rotation,
        )
        for shot in sorted(shots, key=lambda shot: shot.image[::-1])
        if shot.listed
    ]  # fmt: skip
    return text_of(_INFO_COLUMNS, rows)


def box_file(shots: Iterable[Shot], subset: str) -> bytes:
    """The files of train have the four clicked points besides."""
    clicks = _CLICK_COLUMNS if subset == "train" else ()
    rows = [
        (shot.image, "xclick", "/m/07j7r", 1, 0.07, 0.15, 0.2, 0.39, -1, 1, 0, flag, 0, *(0.5 for _ in clicks))
        for shot in shots
        for flag in shot.depictions
    ]
    return text_of((*_BOX_COLUMNS, *clicks), rows)


def publish(host: Host, **shots: Sequence[Shot]) -> None:
    """Put the list of classes and the files of each subset named on the host: `publish(host, test=[Shot(...)])`."""
    host.put(CLASS_LIST, class_list(), hash=True)
    for subset, of_subset in shots.items():
        host.put(LABELS[subset], label_file(of_subset), hash=True)
        host.put(INFO[subset], info_file(of_subset, subset), hash=True)
        host.put(BOXES[subset], box_file(of_subset, subset), hash=True)
        for shot in of_subset if subset == "train" else ():
            # Some are tried before the labels of train are read.
            host.put(f"/photos/train/{shot.image}.jpg", b"a photo")
