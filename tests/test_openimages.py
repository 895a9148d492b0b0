"""Open Images from files of the real formats on a loopback server, through to the candidates."""

import csv
import io
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import servers
from hypothesis import given, settings
from hypothesis import strategies as st
from openimages_files import (
    AMERICAN,
    BOXES,
    CC_BY,
    CLASS_LIST,
    INFO,
    LABELS,
    RUGBY,
    RUGBY_UNION,
    SOCCER,
    SOCCER_PLAYER,
    Shot,
    box_file,
    class_list,
    info_file,
    label_file,
    publish,
    text_of,
)  # fmt: skip
from servers import Fault, Host

from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import OpenImagesParams
from touchline.sources import Candidate, openimages

DOWNLOAD = servers.settings()


def params_for(host: Host, **changes: Any) -> OpenImagesParams:
    values = {
        "url": host.url,
        "photos_url": f"{host.url}/photos",
        "subsets": ["validation", "test", "train"],
        "classes": {"rugby": [RUGBY, RUGBY_UNION], "soccer": [SOCCER, SOCCER_PLAYER]},
        "exclude": [AMERICAN],
        "max_per_author": 10,
        "leave_out_drawings": ["validation", "test", "train"],
        "keep_label_files": False,
    }
    return OpenImagesParams(**(values | changes))


def offers(params: OpenImagesParams, cache: Path, classes: Sequence[str] = ("rugby", "soccer")) -> Iterator[Candidate]:
    return openimages.candidates(params, DOWNLOAD, classes, cache)


def origins(params: OpenImagesParams, cache: Path, classes: Sequence[str] = ("rugby", "soccer")) -> list[str]:
    return [candidate.origin for candidate in offers(params, cache, classes)]


def image(number: int) -> str:
    return f"{number:016x}"


def message_of(params: OpenImagesParams, cache: Path, classes: Sequence[str] = ("rugby", "soccer")) -> str:
    with pytest.raises(TouchlineError) as caught:
        list(openimages.candidates(params, servers.settings(tries=1), classes, cache))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_photo_comes_with_its_address_licence_and_author(host: Host, tmp_path: Path) -> None:
    shot = Shot(
        "4fa8054781a4c382",
        {RUGBY: "1"},
        author='Zoë, of the "Lions"',
        page="https://www.flickr.com/people/zoe/",
        title="Try!\nIn the corner, 80'",
        rotation="90.0",
    )
    publish(host, validation=[shot])
    assert list(offers(params_for(host, subsets=["validation"]), tmp_path)) == [
        Candidate(
            label="rugby",
            source="openimages",
            origin="validation/4fa8054781a4c382",
            url=f"{host.url}/photos/validation/4fa8054781a4c382.jpg",
            licence=CC_BY,
            author='Zoë, of the "Lions"',
            author_page="https://www.flickr.com/people/zoe/",
            title="Try! In the corner, 80'",
            landing_page="https://www.flickr.com/photos/4fa8054781a4c382",
            group="https://www.flickr.com/people/zoe/",
            rotation=90,
        )
    ]


def test_classes_take_turns_each_in_the_order_of_its_ids_subset_by_subset(host: Host, tmp_path: Path) -> None:
    publish(
        host,
        test=[Shot(image(9), {SOCCER: "1"}), Shot(image(7), {RUGBY: "1"})],
        # The train files begin with images of many labels and go on with images of few.
        train=[
            *(Shot(image(number), {f"/m/0{k:x}": "0" for k in range(16, 200)} | {RUGBY: "1"}) for number in (3, 1, 2)),
            Shot(image(255), {SOCCER_PLAYER: "1"}),
            Shot(image(250), {SOCCER: "1"}),
            Shot(image(251), {SOCCER: "0"}),
        ],
    )
    params = params_for(host, subsets=["test", "train"])
    expected = [("test", 7), ("test", 9), ("train", 1), ("train", 250), ("train", 2), ("train", 255), ("train", 3)]
    assert origins(params, tmp_path) == [f"{subset}/{image(number)}" for subset, number in expected]
    assert origins(params, tmp_path / "afresh") == origins(params, tmp_path)


def test_a_label_file_in_another_order_gives_the_same_photos_in_the_same_order(host: Host, tmp_path: Path) -> None:
    shots = [Shot(image(number), {RUGBY: "1"}) for number in range(50)]
    publish(host, test=shots)
    header, *lines = label_file(shots).splitlines(keepends=True)
    host.put(LABELS["test"], header + b"".join(reversed(lines)))
    assert origins(params_for(host, subsets=["test"]), tmp_path) == [f"test/{image(number)}" for number in range(50)]


def test_labels_that_are_absent_or_not_ours_are_no_reason_to_offer_a_photo(host: Host, tmp_path: Path) -> None:
    publish(
        host,
        test=[
            Shot(image(1), {RUGBY: "1.0"}),
            Shot(image(2), {RUGBY: "0"}),
            Shot(image(3), {RUGBY: "0.0", SOCCER: "1"}),
            Shot(image(4), {"/m/0c4936": "1"}),
            Shot(image(5), {"/m/06bq": "1", "/m/06bqdd": "1"}),
        ],
    )
    assert origins(params_for(host, subsets=["test"]), tmp_path) == [f"test/{image(1)}", f"test/{image(3)}"]


def test_photos_of_two_classes_of_excluded_ones_of_no_licence_and_drawings_are_left_out_and_counted(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(
        host,
        train=[
            Shot(image(1), {RUGBY: "1", SOCCER: "1"}),
            Shot(image(2), {RUGBY: "1", AMERICAN: "1"}),
            Shot(image(3), {RUGBY: "1", AMERICAN: "0"}),
            Shot(image(4), {RUGBY: "1", RUGBY_UNION: "1"}, depictions=[0, -1]),
            Shot(image(5), {SOCCER: "1"}, licence=""),
            Shot(image(6), {SOCCER: "1"}, depictions=[0, 1]),
            Shot(image(7), {SOCCER: "1"}, listed=False),
        ],
    )
    params = params_for(host, subsets=["train"])
    assert origins(params, tmp_path) == [f"train/{image(3)}", f"train/{image(4)}"]
    assert openimages.facts(params, ["rugby", "soccer"], tmp_path) == {
        "train": {
            "rugby": 2,
            "soccer": 0,
            "positive: rugby": 4,
            "positive: soccer": 4,
            "left out: two classes": 1,
            "left out: an excluded class": 1,
            "left out: no licence": 1,
            "left out: a drawing": 1,
            "left out: not on the server": 1,
            "left out: beyond 10 of an author": 0,
        }
    }
    assert (
        "Open Images train: rugby 2 of 4, soccer 0 of 4 photos fit; left out: a drawing 1," in capsys.readouterr().out
    )
    assert f"train/{image(6)}" in origins(params_for(host, subsets=["train"], leave_out_drawings=[]), tmp_path)


def test_the_files_of_boxes_are_not_read_where_drawings_are_welcome(host: Host, tmp_path: Path) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"})])
    assert origins(params_for(host, subsets=["test"], leave_out_drawings=[]), tmp_path) == [f"test/{image(1)}"]
    assert host.count(BOXES["test"]) == 0 < host.count(INFO["test"])


def test_of_one_author_and_class_only_so_many_photos_are_offered_over_all_subsets(host: Host, tmp_path: Path) -> None:
    page = "https://www.flickr.com/people/ann/"
    publish(
        host,
        validation=[Shot(image(1), {RUGBY: "1"}, "Ann", page)],
        test=[
            Shot(image(2), {RUGBY: "1"}, "Ann renamed", page),
            Shot(image(3), {RUGBY: "1"}, "Ann", page),
            Shot(image(4), {SOCCER: "1"}, "Ann", page),
            Shot(image(5), {RUGBY: "1"}, "Ann", "https://www.flickr.com/people/another-ann/"),
            *(Shot(image(number), {RUGBY: "1"}) for number in range(6, 9)),
        ],
    )
    subsets = ["validation", "test"]
    offered = origins(params_for(host, subsets=subsets, max_per_author=2), tmp_path)
    assert {int(origin.split("/")[1], 16) for origin in offered} == {1, 2, 4, 5, 6, 7, 8}
    asked = len(host.requests)
    assert len(origins(params_for(host, subsets=subsets, max_per_author=3), tmp_path)) == 8
    assert len(host.requests) == asked
    known = openimages.facts(params_for(host, subsets=subsets, max_per_author=1), ["rugby", "soccer"], tmp_path)
    assert known["validation"]["rugby"] == 1 and known["test"]["rugby"] == 4
    assert known["test"]["left out: beyond 1 of an author"] == 2


@pytest.mark.parametrize(
    "written, degrees",
    [("0.0", 0), ("90.0", 90), ("180.0", 180), ("270.0", 270), ("90", 90), ("", 0), ("nan", 0)],
)
def test_rotation_is_taken_from_the_image_info(host: Host, tmp_path: Path, written: str, degrees: int) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"}, rotation=written)])
    assert [candidate.rotation for candidate in offers(params_for(host, subsets=["test"]), tmp_path)] == [degrees]


def test_an_author_without_a_page_is_a_group_by_name(host: Host, tmp_path: Path) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"}, "Ann"), Shot(image(2), {RUGBY: "1"})])
    assert [candidate.group for candidate in offers(params_for(host, subsets=["test"]), tmp_path)] == ["Ann", ""]


def test_the_files_of_train_are_not_touched_before_validation_and_test_are_used_up(host: Host, tmp_path: Path) -> None:
    publish(host, **{name: [Shot(image(at), {RUGBY: "1"})] for at, name in enumerate(("validation", "test", "train"))})
    walk = offers(params_for(host), tmp_path)
    assert [candidate.origin for candidate in islice(walk, 2)] == [f"validation/{image(0)}", f"test/{image(1)}"]
    assert not any("train" in request.path for request in host.requests)
    assert next(walk).origin == f"train/{image(2)}"
    assert host.served(LABELS["train"]) == 1


@pytest.mark.parametrize("status", [403, 404])
def test_photos_that_are_refused_are_named_before_the_labels_of_train_are_read(
    host: Host, tmp_path: Path, status: int
) -> None:
    publish(host, train=[Shot(image(number), {RUGBY: "1"}) for number in range(5)])
    params = params_for(host, subsets=["train"])
    for number in range(5):
        host.put(f"/photos/train/{image(number)}.jpg", b"", faults=[Fault.status(status).always()])
    message = message_of(params, tmp_path)
    assert f"{host.url}/photos/train/" in message and "ingest.openimages.photos_url" in message
    assert not host.count(LABELS["train"])
    # One that is there is enough, and a server without ranges is not asked.
    host.put(f"/photos/train/{image(0)}.jpg", b"a photo", faults=[Fault.no_ranges().always()])
    assert len(origins(params, tmp_path)) == 5


def test_a_second_run_with_the_same_settings_asks_the_network_nothing(host: Host, tmp_path: Path) -> None:
    publish(host, validation=[Shot(image(1), {RUGBY: "1"}), Shot(image(2), {SOCCER: "1"})])
    by_mid = params_for(host, subsets=["validation"])
    by_name = params_for(
        host,
        subsets=["validation"],
        classes={"rugby": ["Rugby union", "Rugby"], "soccer": ["Soccer player", "Soccer"]},
        exclude=["American football"],
    )
    first = list(offers(by_mid, tmp_path))
    host.down()
    assert list(offers(by_mid, tmp_path)) == list(offers(by_name, tmp_path)) == first
    assert {candidate.label for candidate in offers(by_mid, tmp_path, ["soccer", "rugby"])} == {"rugby", "soccer"}


def test_another_wish_reads_only_files_that_it_needs(host: Host, tmp_path: Path) -> None:
    shots = [
        Shot(image(1), {RUGBY_UNION: "1", AMERICAN: "1"}, depictions=[1]),
        Shot(image(2), {RUGBY: "1", SOCCER: "1"}),
        Shot(image(3), {SOCCER: "1", "/m/0c4936": "1"}),
        Shot(image(4), {"/g/11b5v1_": "1"}),
    ]
    publish(host, test=shots)

    def found(**changes: Any) -> list[int]:
        wish = params_for(host, subsets=["test"], **changes)
        return [int(origin.rsplit("/")[-1], 16) for origin in origins(wish, tmp_path, [*wish.classes])]

    assert found(leave_out_drawings=[]) == [3]
    assert {request.path for request in host.requests} == {CLASS_LIST, LABELS["test"], INFO["test"]}
    host.down()
    # More excluded, less excluded, fewer classes and classes cut otherwise.
    assert found(leave_out_drawings=[], exclude=["/m/0c4936"]) == [1]
    assert found(leave_out_drawings=[], exclude=[]) == [1, 3]
    assert found(leave_out_drawings=[], exclude=[], classes={"rugby": [RUGBY], "other": [RUGBY_UNION]}) == [2, 1]
    host.up()
    asked = len(host.requests)
    assert found(exclude=[]) == [3]
    assert [request.path for request in host.requests[asked:]] == [BOXES["test"]]
    # A class that was never read for needs the files again, and what is known then is enough for both.
    cafe = {"soccer": [SOCCER], "café": ["/g/11b5v1_"]}
    assert found(exclude=[], classes=cafe) == [2, 4, 3]
    asked = len(host.requests)
    assert found(exclude=[]) == [3] and len(host.requests) == asked


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_cache_is_said_and_read_anew(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"}, "Ann")])
    params = params_for(host, subsets=["test"])
    first = list(offers(params, tmp_path))
    for path in tmp_path.glob("*.json"):
        content = path.read_bytes()
        damaged = {
            "cut": content[:-9],
            "changed": content.replace(b"Ann", b"Bob").replace(b"Rug", b"Gur"),
            "other": b"[]",
        }
        path.write_bytes(damaged[damage])
    capsys.readouterr()
    assert list(offers(params, tmp_path)) == first
    assert capsys.readouterr().out.count(" is damaged") == 2
    assert host.served(LABELS["test"]) == host.served(CLASS_LIST) == 2


def test_whole_files_are_kept_and_read_again_where_that_is_set(host: Host, tmp_path: Path) -> None:
    publish(host, test=[Shot(image(1), {"/m/0c4936": "1"}), Shot(image(2), {RUGBY: "1"})])
    params = params_for(host, subsets=["test"], keep_label_files=True)
    assert origins(params, tmp_path) == [f"test/{image(2)}"]
    assert {path.name for path in (tmp_path / "files").rglob("*.csv")} == {
        Path(files["test"]).name for files in (LABELS, INFO, BOXES)
    }
    asked = len(host.requests)
    another = params.model_copy(update={"classes": {"rugby": [RUGBY], "soccer": ["/m/0c4936"]}})
    assert origins(another, tmp_path) == [f"test/{image(2)}", f"test/{image(1)}"]
    assert len(host.requests) == asked


def test_a_kept_file_that_is_damaged_is_named(host: Host, tmp_path: Path) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"})])
    params = params_for(host, subsets=["test"], keep_label_files=True)
    assert origins(params, tmp_path)
    (kept,) = tmp_path.rglob(Path(LABELS["test"]).name)
    kept.write_text("ImageID,Source\n1,2\n")
    another = {"rugby": [RUGBY], "soccer": ["/m/0c4936"]}
    message = message_of(params.model_copy(update={"classes": another}), tmp_path)
    assert message.startswith(str(kept))


def test_a_class_without_an_entry_is_an_error_that_names_it(host: Host, tmp_path: Path) -> None:
    publish(host)
    with pytest.raises(ParamsError, match=r"ingest\.openimages\.classes\.tennis"):
        list(offers(params_for(host), tmp_path, ["rugby", "tennis"]))


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("rugby", "'rugby' is no class of Open Images; near it: Rugby (/m/06bqd)"),
        ("Rugby football", "American football (/m/0jm_)"),
        ("Cucumber", "'Cucumber' is no class of Open Images"),
        ("DisplayName", "'DisplayName' is no class of Open Images"),
        ("/m/0nothing", "/m/0nothing is no class of Open Images"),
        ("Soccer", "'Soccer' also stands for 'soccer'"),
    ],
)
def test_an_entry_that_names_no_class_or_anothers_is_an_error(
    host: Host, tmp_path: Path, entry: str, expected: str
) -> None:
    publish(host)
    params = params_for(host, classes={"soccer": [SOCCER], "rugby": [RUGBY, entry]})
    with pytest.raises(ParamsError) as caught:
        list(offers(params, tmp_path, ["soccer", "rugby"]))
    assert str(caught.value).startswith("ingest.openimages.classes.rugby: ") and expected in str(caught.value)
    assert {request.path for request in host.requests} == {CLASS_LIST}


def test_an_excluded_entry_must_exist_and_be_none_of_ours(host: Host, tmp_path: Path) -> None:
    publish(host)
    unknown = params_for(host, exclude=["Gridiron"])
    assert message_of(unknown, tmp_path).startswith("ingest.openimages.exclude: 'Gridiron'")
    listed = message_of(params_for(host, exclude=["Rugby"]), tmp_path)
    assert all(word in listed for word in ("/m/06bqd", "Rugby", "'rugby'"))


@pytest.mark.parametrize(
    "content",
    [
        class_list(),
        class_list().split(b"\r\n", 1)[1],
        class_list().replace(b"\r\n", b"\n"),
        b"\xef\xbb\xbf" + class_list().split(b"\r\n", 1)[1],
    ],
    ids=["as published", "no header", "plain line ends", "byte order mark"],
)
def test_names_with_commas_quotes_and_accents_are_found_in_any_form_of_the_list(
    host: Host, tmp_path: Path, content: bytes
) -> None:
    names = {"rugby": ["Cucumber, gourd, and melon family", "Café"], "soccer": ['Fiat 500 "topolino"', "'Nduja"]}
    publish(host, test=[Shot(image(1), {"/m/01wdp": "1"}), Shot(image(2), {"/m/0c4936": "1"})])
    host.put(CLASS_LIST, content)
    found = offers(params_for(host, subsets=["test"], classes=names), tmp_path)
    assert [(candidate.label, candidate.origin) for candidate in found] == [
        ("rugby", f"test/{image(1)}"),
        ("soccer", f"test/{image(2)}"),
    ]


def test_a_name_of_two_classes_asks_for_the_id(host: Host, tmp_path: Path) -> None:
    publish(host)
    host.put(CLASS_LIST, b"/m/018xm,Ball\n/m/0156sn,Ball\n")
    message = message_of(params_for(host, classes={"rugby": ["Ball"], "soccer": ["/m/018xm"]}), tmp_path)
    assert all(word in message for word in ("'Ball'", "/m/018xm", "/m/0156sn"))


def many() -> list[Shot]:
    """Enough for a label file of a few blocks."""
    return [
        Shot(image(number), {f"/m/0{k:x}": "1" for k in range(16, 16 + number % 40)} | {RUGBY: str(number % 2)})
        for number in range(20_000)
    ]


def test_a_label_file_that_breaks_off_is_read_on_from_there(host: Host, tmp_path: Path) -> None:
    shots = many()
    content = label_file(shots)
    publish(host, test=[])
    host.put(INFO["test"], info_file(shots, "test"), hash=True)
    host.put(LABELS["test"], content, hash=True, faults=[Fault.cut(len(content) // 3), Fault.reset()])
    found = origins(params_for(host, subsets=["test"]), tmp_path)
    assert found == [f"test/{image(number)}" for number in range(1, 20_000, 2)]
    assert any(request.range and request.status == 206 for request in host.requests)


def test_a_label_file_that_is_not_what_its_server_promised_gives_nothing(host: Host, tmp_path: Path) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"})])
    host.put(LABELS["test"], label_file([Shot(image(1), {RUGBY: "1"})]), hash="wrong")
    params = params_for(host, subsets=["test"])
    assert message_of(params, tmp_path).startswith(host.url + LABELS["test"])
    assert openimages.facts(params, ["rugby", "soccer"], tmp_path) == {}


@pytest.mark.parametrize("wrong", [CLASS_LIST, LABELS["test"], INFO["test"], BOXES["test"]])
def test_one_web_page_in_place_of_a_file_is_tried_again(host: Host, tmp_path: Path, wrong: str) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"})])
    host._stored[wrong].faults.append(Fault.html())
    assert origins(params_for(host, subsets=["test"]), tmp_path) == [f"test/{image(1)}"]
    assert host.count(wrong) == 2


# In a process of its own, which is killed.
READING = """
import sys
from pathlib import Path
from touchline.core.params import DownloadParams, OpenImagesParams
from touchline.sources import openimages
params = OpenImagesParams.model_validate_json(sys.argv[1])
settings = DownloadParams.model_validate_json(sys.argv[2])
list(openimages.candidates(params, settings, ["rugby", "soccer"], Path(sys.argv[3])))
"""


@pytest.mark.parametrize("at", [LABELS["test"], INFO["test"]], ids=["labels", "image info"])
def test_a_run_killed_in_the_middle_of_a_file_goes_on_there(host: Host, tmp_path: Path, at: str) -> None:
    shots = [replace(shot, labels=shot.labels | {RUGBY: "1"}) for shot in many()]
    publish(host, test=shots)
    stored = host._stored[at]
    stored.faults.append(Fault.stall(after=stored.size * 4 // 5, seconds=300))
    given = [
        params_for(host, subsets=["test"]).model_dump_json(),
        servers.settings(read_timeout=300.0).model_dump_json(),
    ]
    process = subprocess.Popen([sys.executable, "-c", READING, *given, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in tmp_path.rglob(Path(at).name + ".part")) < stored.size // 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    before = len(host.requests)
    assert len(origins(params_for(host, subsets=["test"]), tmp_path)) == len(shots)
    again = host.requests[before:]
    assert LABELS["test"] not in {request.path for request in again if not request.range}
    assert [(request.status, bool(request.range)) for request in again if request.path == at] == [(206, True)]
    # What was read is not left lying.
    assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]


@pytest.mark.parametrize("missing", [CLASS_LIST, LABELS["test"], INFO["test"], BOXES["test"]])
@pytest.mark.parametrize("keep", [False, True], ids=["streamed", "kept"])
def test_a_file_that_is_not_there_is_named_with_the_key_to_mend(
    host: Host, tmp_path: Path, missing: str, keep: bool
) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"})])
    host.put(missing, b"", faults=[Fault.status(404).always()])
    message = message_of(params_for(host, subsets=["test"], keep_label_files=keep), tmp_path)
    assert f"{host.url}{missing} answers 404" in message and "ingest.openimages.url" in message


@pytest.mark.parametrize("wrong", [CLASS_LIST, LABELS["test"], INFO["test"], BOXES["test"]])
@pytest.mark.parametrize("keep", [False, True], ids=["streamed", "kept"])
def test_a_web_page_in_place_of_a_file_is_named(host: Host, tmp_path: Path, wrong: str, keep: bool) -> None:
    publish(host, test=[Shot(image(1), {RUGBY: "1"})])
    host.put(wrong, b"", faults=[Fault.html().always()])
    assert message_of(params_for(host, subsets=["test"], keep_label_files=keep), tmp_path).startswith(host.url + wrong)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "came in its place"),
        (b"ImageID,LabelName\n1,/m/06bqd\n", "is not the table expected"),
        (b"ImageID,Source,LabelName,Confidence\n1,verification\n", "is not the table expected"),
        (b"ImageID,Source,LabelName,Confidence\nabc,verification,/m/06bqd,yes\n", "photo abc has Confidence 'yes'"),
    ],
)
def test_a_label_file_of_another_kind_is_an_error_of_one_line(
    host: Host, tmp_path: Path, content: bytes, expected: str
) -> None:
    publish(host, test=[])
    host.put(LABELS["test"], content)
    assert expected in message_of(params_for(host, subsets=["test"]), tmp_path)
    # It is no beginning for the next run.
    host.put(LABELS["test"], label_file([Shot(image(1), {RUGBY: "0"})]))
    assert origins(params_for(host, subsets=["test"]), tmp_path) == []


def test_a_bad_row_early_in_a_large_file_ends_the_reading(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openimages, "BLOCK", 2**16)
    publish(host, test=[])
    head, rest = label_file(many()).split(b"\n", 1)
    large = tmp_path / "large.csv"
    with large.open("wb") as file:
        file.writelines([head, b"\n1,2\n", *[rest] * 5])
    host.put(LABELS["test"], large)
    assert "Expected 4 columns, got 2" in message_of(params_for(host, subsets=["test"]), tmp_path / "cache")


def test_a_subset_without_a_photo_of_ours_needs_its_labels_alone(host: Host, tmp_path: Path) -> None:
    publish(host, test=[Shot(image(1), {"/m/0c4936": "1"})])
    params = params_for(host, subsets=["test"])
    assert origins(params, tmp_path) == []
    assert {request.path for request in host.requests} == {CLASS_LIST, LABELS["test"]}
    assert openimages.facts(params, ["rugby", "soccer"], tmp_path)["test"]["positive: rugby"] == 0


def test_the_plan_says_what_would_be_fetched_and_fetches_the_list_of_classes_alone(host: Host, tmp_path: Path) -> None:
    shots = [Shot(image(1), {RUGBY: "1"})]
    publish(host, validation=shots, test=shots)
    params = params_for(host, subsets=["validation", "test"])
    assert origins(params.model_copy(update={"subsets": ["validation"]}), tmp_path)
    host.requests.clear()
    planned = openimages.plan(params, DOWNLOAD, ["rugby", "soccer"], tmp_path)
    assert {request.method for request in host.requests} == {"HEAD"}
    (known,) = [file for file in planned if file.state == "there already"]
    assert known.what == "Open Images validation: photos found before" and Path(known.where).exists()
    sizes = {
        LABELS["test"]: label_file(shots),
        INFO["test"]: info_file(shots, "test"),
        BOXES["test"]: box_file(shots, "test"),
    }
    assert {file.where: file.megabytes for file in planned if file.state == "to fetch"} == {
        host.url + path: len(content) / 1e6 for path, content in sizes.items()
    }
    assert all("CC BY" in file.licence for file in planned)
    # Of files of gigabytes the param that asks for them is named.
    assert [file.where for file in planned if "leave_out_drawings" in file.what] == [host.url + BOXES["test"]]
    afresh = openimages.plan(params, DOWNLOAD, ["rugby", "soccer"], tmp_path / "afresh")
    assert len(afresh) == 6
    assert [request.path for request in host.requests if request.method == "GET"] == [CLASS_LIST]


def test_the_plan_finds_an_entry_that_names_no_class(host: Host, tmp_path: Path) -> None:
    publish(host)
    with pytest.raises(ParamsError, match="Rugby"):
        openimages.plan(params_for(host, exclude=["Rugbi"]), DOWNLOAD, ["rugby", "soccer"], tmp_path)


def test_the_plan_gives_no_size_where_the_server_tells_none(host: Host, tmp_path: Path) -> None:
    publish(host, train=[])
    for files in (LABELS, INFO, BOXES):
        host._stored[files["train"]].faults.append(Fault.status(503))
    planned = openimages.plan(params_for(host, subsets=["train"]), DOWNLOAD, ["rugby", "soccer"], tmp_path)
    assert [file.megabytes for file in planned] == [None, None, None]


def test_the_plan_names_a_file_that_is_not_there(host: Host, tmp_path: Path) -> None:
    publish(host, test=[])
    del host._stored[INFO["test"]]
    with pytest.raises(TouchlineError, match=f"{INFO['test']} answers 404.*ingest.openimages.url"):
        openimages.plan(params_for(host, subsets=["test"]), DOWNLOAD, ["rugby", "soccer"], tmp_path)


keys = ["a", "b", "é", 'a"', "aa\nb", ""]
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
rows = st.tuples(texts, st.sampled_from([*keys, " a", "A", "a,b"]), texts, texts)


@given(st.lists(rows, max_size=60), st.sets(st.sampled_from(keys)), st.integers(300, 900))
@settings(max_examples=200, deadline=None)
def test_the_filter_finds_what_a_plain_reader_finds(table: list[tuple[str, ...]], wanted: set[str], block: int) -> None:
    header = ("first", "key", "second", "third")
    table = table * 20  # some blocks
    content = text_of(header, table, "\r\n")
    before = openimages.BLOCK
    openimages.BLOCK = block
    try:
        found = list(openimages.rows_where(io.BytesIO(content), "key", wanted, ("third", "key", "first"), "file"))
    finally:
        openimages.BLOCK = before
    read = csv.DictReader(io.StringIO(content.decode(), newline=""))
    assert found == [(row["third"], row["key"], row["first"]) for row in read if row["key"] in wanted]
