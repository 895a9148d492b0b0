"""ImageNet as a source: every way to its photos, with real tars, real servers, and the real clients where installed."""

import io
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import servers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagenet_files import (
    RUGBY,
    RUGBY_BALL,
    SOCCER,
    SOCCER_BALL,
    SOCCER_PLAYER,
    hub_site,
    kaggle_site,
    member,
    photo,
    serving,
    shard,
    synset,
    tar_of,
    training_list,
)
from servers import Fault, Host

from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_json, write_json
from touchline.core.params import ImageNetParams
from touchline.sources import Candidate, Planned, imagenet

CLASSES = ["rugby", "soccer"]
DOWNLOAD = servers.settings(tries=3, max_megabytes=20.0)


def params_for(**changed: Any) -> ImageNetParams:
    values = {
        "accept_terms": True,
        "origin": "winter21",
        "url": "http://127.0.0.1:9/winter21_whole",
        "archive": "http://127.0.0.1:9/ILSVRC2012_img_train.tar",
        "folder": "data/imagenet",
        "classes": {"rugby": [RUGBY_BALL], "soccer": [SOCCER_BALL]},
    }
    return ImageNetParams(**(values | changed))


def offered(params: ImageNetParams, project: Path, classes: list[str] = CLASSES) -> list[Candidate]:
    return list(imagenet.candidates(params, DOWNLOAD, classes, project))


def origins(params: ImageNetParams, project: Path, classes: list[str] = CLASSES) -> list[str]:
    return [candidate.origin for candidate in offered(params, project, classes)]


def trouble(params: ImageNetParams, project: Path, kind: type[TouchlineError] = TouchlineError) -> str:
    """The one line that asking for the photos ends with."""
    with pytest.raises(kind) as caught:
        offered(params, project)
    message = str(caught.value)
    assert "\n" not in message
    return message


def in_folder(project: Path, tars: dict[str, bytes]) -> ImageNetParams:
    """Tars put in place by hand; a single one is given to both classes' params as far as they name it."""
    folder = project / "data/imagenet"
    folder.mkdir(parents=True, exist_ok=True)
    for wnid, content in tars.items():
        (folder / f"{wnid}.tar").write_bytes(content)
    return params_for(origin="folder")


TARS = {RUGBY_BALL: tar_of(synset(RUGBY_BALL, [1, 2, 30])), SOCCER_BALL: tar_of(synset(SOCCER_BALL, [7, 8]))}


# What is asked before anything is fetched


def test_nothing_is_asked_of_a_server_before_the_terms_are_accepted(host: Host, tmp_path: Path) -> None:
    params = params_for(url=host.url, accept_terms=False)
    message = trouble(params, tmp_path, ParamsError)
    for part in ("accept_terms", "non-commercial research", "https://image-net.org/download"):
        assert part in message
    with pytest.raises(ParamsError, match="accept_terms"):
        imagenet.plan(params, DOWNLOAD, CLASSES, tmp_path)
    assert not host.requests


def test_each_class_needs_a_synset_and_a_synset_belongs_to_one_class(tmp_path: Path) -> None:
    message = trouble(params_for(classes={"rugby": [RUGBY_BALL]}), tmp_path, ParamsError)
    assert "'soccer'" in message
    message = trouble(params_for(classes={"rugby": [RUGBY], "soccer": [SOCCER, RUGBY]}), tmp_path, ParamsError)
    assert all(word in message for word in (RUGBY, "rugby", "soccer"))


# winter21: a tar for each synset


def test_each_synsets_tar_is_fetched_once_and_its_photos_are_the_bytes_of_its_members(
    host: Host, tmp_path: Path
) -> None:
    for wnid, content in TARS.items():
        host.put(f"/whole/{wnid}.tar", content)
    params = params_for(url=f"{host.url}/whole")
    found = offered(params, tmp_path)
    assert [(candidate.label, candidate.origin) for candidate in found] == [
        ("rugby", f"{RUGBY_BALL}/{RUGBY_BALL}_1.JPEG"),
        ("soccer", f"{SOCCER_BALL}/{SOCCER_BALL}_7.JPEG"),
        ("rugby", f"{RUGBY_BALL}/{RUGBY_BALL}_2.JPEG"),
        ("soccer", f"{SOCCER_BALL}/{SOCCER_BALL}_8.JPEG"),
        ("rugby", f"{RUGBY_BALL}/{RUGBY_BALL}_30.JPEG"),
    ]
    assert [candidate.read() for candidate in found if candidate.label == "soccer"] == list(
        synset(SOCCER_BALL, [7, 8]).values()
    )
    assert {(candidate.source, candidate.licence, candidate.group) for candidate in found} == {
        ("imagenet", imagenet.TERMS, "")
    }
    host.down()
    assert [candidate.origin for candidate in offered(params, tmp_path)] == [candidate.origin for candidate in found]
    assert len(host.requests) == 2


def test_a_cut_connection_goes_on_where_it_broke(host: Host, tmp_path: Path) -> None:
    host.put(f"/{SOCCER_BALL}.tar", TARS[SOCCER_BALL])
    host.put(f"/{RUGBY_BALL}.tar", TARS[RUGBY_BALL], faults=[Fault.cut(after=2000)])
    assert len(offered(params_for(url=host.url), tmp_path)) == 5
    asked = [request.range for request in host.requests if request.path == f"/{RUGBY_BALL}.tar"]
    assert asked == ["", "bytes=2000-"]


def test_a_download_that_was_killed_is_not_taken_for_a_tar(host: Host, tmp_path: Path) -> None:
    for wnid, content in TARS.items():
        host.put(f"/{wnid}.tar", content)
    part = tmp_path / f"data/imagenet/{RUGBY_BALL}.tar.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(tar_of({"other.JPEG": photo(1)}))
    assert len(offered(params_for(url=host.url), tmp_path)) == 5
    assert (part.parent / f"{RUGBY_BALL}.tar").read_bytes() == TARS[RUGBY_BALL]


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_a_login_is_one_line_that_says_where_to_put_the_tar(
    host: Host, tmp_path: Path, status: int
) -> None:
    host.put(f"/{RUGBY_BALL}.tar", b"", faults=[Fault.status(status).always()])
    message = trouble(params_for(url=host.url), tmp_path)
    for part in (str(status), "image-net.org/download-images", f"put {RUGBY_BALL}.tar into", "origin: folder"):
        assert part in message


def test_a_login_page_with_status_200_is_no_tar_and_leaves_nothing_behind(host: Host, tmp_path: Path) -> None:
    host.put(f"/{RUGBY_BALL}.tar", TARS[RUGBY_BALL], faults=[Fault.html().always()])
    message = trouble(params_for(url=host.url), tmp_path)
    assert f"{RUGBY_BALL}.tar" in message and str(tmp_path / "data/imagenet") in message
    assert not list((tmp_path / "data/imagenet").iterdir())
    # One page is an accident.
    for wnid, content in TARS.items():
        host.put(f"/{wnid}.tar", content, faults=[Fault.html()])
    assert len(origins(params_for(url=host.url), tmp_path)) == 5


def test_something_else_than_a_tar_is_said_to_be_none(host: Host, tmp_path: Path) -> None:
    host.put(f"/{RUGBY_BALL}.tar", photo(1) * 3)
    assert f"{RUGBY_BALL}.tar" in trouble(params_for(url=host.url), tmp_path)


def test_a_tar_that_is_not_there_names_its_url_and_the_param(host: Host, tmp_path: Path) -> None:
    message = trouble(params_for(url=host.url), tmp_path)
    assert f"{host.url}/{RUGBY_BALL}.tar" in message and "404" in message and "`ingest.imagenet.url`" in message


def test_a_server_that_is_down_is_not_taken_for_one_that_refuses(host: Host, tmp_path: Path) -> None:
    host.put(f"/{RUGBY_BALL}.tar", b"", faults=[Fault.status(503, retry_after=0).always()])
    message = trouble(params_for(url=host.url), tmp_path)
    assert "503" in message and "log in" not in message


# What is taken from a tar


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read_long_names_too(tmp_path: Path, tar_format: int) -> None:
    long = f"{'deep/' * 25}{RUGBY_BALL}_5.JPEG"
    files = synset(RUGBY_BALL, [1]) | {long: photo(5)}
    params = in_folder(tmp_path, TARS | {RUGBY_BALL: tar_of(files, tar_format=tar_format)})
    assert [(candidate.origin, candidate.read()) for candidate in offered(params, tmp_path, ["rugby"])] == [
        (f"{RUGBY_BALL}/{long}", photo(5)),
        (f"{RUGBY_BALL}/{RUGBY_BALL}_1.JPEG", files[f"{RUGBY_BALL}_1.JPEG"]),
    ]


REFUSED = {
    "leaves the folder": member("../../etc/n04118538_9.JPEG"),
    "absolute path": member("/etc/n04118538_9.JPEG"),
    "a symbolic link": member("n04118538_9.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a symbolic link within": member("n04118538_9.JPEG", type=tarfile.SYMTYPE, linkname="n04118538_1.JPEG"),
    "a hard link": member("n04118538_9.JPEG", type=tarfile.LNKTYPE, linkname="n04118538_1.JPEG"),
    "a device": member("n04118538_9.JPEG", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a block device": member("n04118538_9.JPEG", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
    "a pipe": member("n04118538_9.JPEG", type=tarfile.FIFOTYPE),
    "a backslash": member("..\\..\\n04118538_9.JPEG"),
    "control characters": member("\x1b]0;owned\x07n04118538_9.JPEG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_member_that_is_no_plain_file_within_the_folder_is_left_out_and_said(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params = in_folder(tmp_path, {RUGBY_BALL: tar_of(synset(RUGBY_BALL, [1]), [REFUSED[name]])})
    assert origins(params, tmp_path, ["rugby"]) == [f"{RUGBY_BALL}/{RUGBY_BALL}_1.JPEG"]
    said = capsys.readouterr().out
    assert "left out of" in said and "n04118538_9.JPEG" in said
    assert said.rstrip("\n").isprintable()


def test_what_is_not_named_like_a_photo_is_passed_over_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"README.txt": b"read me", "._n04118538_1.JPEG": b"of a Mac", "a.png": photo(2), "noending": photo(3)}
    params = in_folder(tmp_path, {RUGBY_BALL: tar_of(files, [member("folder", type=tarfile.DIRTYPE)])})
    assert origins(params, tmp_path, ["rugby"]) == [f"{RUGBY_BALL}/a.png"]
    assert not capsys.readouterr().out


def test_a_member_beyond_the_limit_of_a_photo_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = in_folder(tmp_path, {RUGBY_BALL: tar_of({"big.JPEG": bytes(2_000_001), "small.JPEG": photo(1)})})
    download = DOWNLOAD.model_copy(update={"max_megabytes": 2.0})
    found = imagenet.candidates(params, download, ["rugby"], tmp_path)
    assert [candidate.origin for candidate in found] == [f"{RUGBY_BALL}/small.JPEG"]
    assert "big.JPEG" in capsys.readouterr().out


def test_a_sparse_member_is_left_out_because_its_bytes_are_not_what_lies_in_the_tar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = photo(1)
    header = member("n04118538_9.JPEG", len(content), type=tarfile.GNUTYPE_SPARSE)
    sparse = header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    params = in_folder(tmp_path, {RUGBY_BALL: sparse + tar_of({"n04118538_1.JPEG": content})})
    assert origins(params, tmp_path, ["rugby"]) == [f"{RUGBY_BALL}/n04118538_1.JPEG"]
    assert "n04118538_9.JPEG (sparse)" in capsys.readouterr().out


def test_a_size_below_zero_is_an_error_and_no_endless_walk(tmp_path: Path) -> None:
    first = tar_of({"n04118538_1.JPEG": photo(1)}).rstrip(b"\0")
    first += bytes(-len(first) % 512)
    # It leads back to the header before it.
    back = member("n04118538_9.JPEG", -len(first) - 512).tobuf(tarfile.GNU_FORMAT)
    params = in_folder(tmp_path, {RUGBY_BALL: first + back + bytes(1024)})
    with pytest.raises(TouchlineError):
        offered(params, tmp_path, ["rugby"])


def cut_in_a_member(content: bytes) -> bytes:
    return content[:700]


def cut_between_members(content: bytes) -> bytes:
    """Without the second member: what tarfile alone takes for a whole tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return content[: tar.getmembers()[1].offset]


def spoilt_header(content: bytes) -> bytes:
    """A flipped bit in the second header: what tarfile alone takes for the end."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        place = tar.getmembers()[1].offset
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil", [cut_in_a_member, cut_between_members, spoilt_header, lambda content: b"", lambda content: photo(1) * 9]
)
def test_a_tar_that_is_not_whole_is_one_line_that_names_it(
    host: Host, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"data/imagenet/{RUGBY_BALL}.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(spoil(TARS[RUGBY_BALL]))
    assert trouble(in_folder(tmp_path, {SOCCER_BALL: TARS[SOCCER_BALL]}), tmp_path).startswith(str(path))
    # One that was fetched is fetched once more, and stands aside.
    host.put(f"/{RUGBY_BALL}.tar", TARS[RUGBY_BALL])
    assert len(origins(params_for(url=host.url), tmp_path)) == 5
    assert path.with_name(path.name + ".damaged").read_bytes() == spoil(TARS[RUGBY_BALL])
    assert host.count(f"/{RUGBY_BALL}.tar") == 1


def test_a_tar_that_its_server_has_damaged_is_fetched_twice_and_before_the_next(host: Host, tmp_path: Path) -> None:
    host.put(f"/{RUGBY_BALL}.tar", cut_in_a_member(TARS[RUGBY_BALL]))
    host.put(f"/{SOCCER_BALL}.tar", TARS[SOCCER_BALL])
    message = trouble(params_for(url=host.url), tmp_path)
    assert message.startswith(str(tmp_path / f"data/imagenet/{RUGBY_BALL}.tar"))
    assert host.count(f"/{RUGBY_BALL}.tar") == 2 and not host.count(f"/{SOCCER_BALL}.tar")


def test_a_damaged_part_of_the_archive_is_fetched_again(host: Host, tmp_path: Path) -> None:
    host.put("/train.tar", ARCHIVE)
    params = params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar")
    whole = origins(params, tmp_path)
    path = tmp_path / f"data/imagenet/ilsvrc2012/{RUGBY_BALL}.tar"
    path.write_bytes(path.read_bytes()[:900])
    assert origins(params, tmp_path) == whole


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_of_a_tar_do_more_than_give_an_error_or_offer_a_refused_member(
    tmp_path: Path, data: st.DataObject
) -> None:
    tar_format = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    files = synset(RUGBY_BALL, [1, 2]) | {f"{'long/' * 24}{RUGBY_BALL}_3.JPEG": photo(3)}
    content = bytearray(tar_of(files, REFUSED.values(), tar_format))
    # Most of a tar is content and zeros; what decides lies in the headers.
    starts = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.sampled_from(starts))
        field, width = data.draw(st.sampled_from([(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (345, 155)]))
        value = data.draw(st.binary(min_size=1, max_size=width))
        content[start + field : start + field + len(value)] = value
        if data.draw(st.integers(0, 7)):
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    if not data.draw(st.integers(0, 5)):
        content = content[: data.draw(st.integers(0, len(content)))]
    params = in_folder(tmp_path, {RUGBY_BALL: bytes(content)})
    try:
        found = offered(params, tmp_path, ["rugby"])
    except TouchlineError:
        return
    for candidate in found:
        name = candidate.origin.removeprefix(f"{RUGBY_BALL}/")
        assert name.isprintable() and not name.startswith("/") and "\\" not in name
        assert (tmp_path / "x" / name).resolve().is_relative_to(tmp_path / "x")
        assert bytes(candidate.read()) in bytes(content)


def test_photos_may_be_read_from_many_threads_at_once(tmp_path: Path) -> None:
    files = synset(RUGBY_BALL, range(200))
    found = offered(in_folder(tmp_path, {RUGBY_BALL: tar_of(files)}), tmp_path, ["rugby"]) * 5
    random.Random(0).shuffle(found)
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda candidate: candidate.read(), found))
    assert contents == [files[candidate.origin.partition("/")[2]] for candidate in found]


def test_a_tar_that_shrinks_after_it_was_listed_is_an_error_and_no_half_photo(tmp_path: Path) -> None:
    found = offered(in_folder(tmp_path, TARS), tmp_path, ["rugby"])
    with (tmp_path / f"data/imagenet/{RUGBY_BALL}.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(TouchlineError):
        found[0].read()


# Order, and what is offered once


def test_synsets_of_a_class_take_turns_and_a_name_that_stands_in_two_of_them_is_offered_once(tmp_path: Path) -> None:
    ball, player, game = synset(SOCCER_BALL, [1, 2]), synset(SOCCER_PLAYER, [4]), synset(SOCCER, [5, 6, 7])
    in_folder(
        tmp_path,
        {SOCCER: tar_of(game), SOCCER_BALL: tar_of(ball), SOCCER_PLAYER: tar_of(synset(SOCCER_BALL, [2]) | player)},
    )
    params = params_for(origin="folder", classes={"soccer": [SOCCER, SOCCER_BALL, SOCCER_PLAYER]})
    names = [origin.partition("/")[2].removesuffix(".JPEG") for origin in origins(params, tmp_path, ["soccer"])]
    assert names == [
        f"{SOCCER}_5", f"{SOCCER_BALL}_1", f"{SOCCER_BALL}_2", f"{SOCCER}_6", f"{SOCCER_PLAYER}_4", f"{SOCCER}_7",
    ]  # fmt: skip


def test_names_people_gave_are_no_sign_that_two_photos_are_one(tmp_path: Path) -> None:
    in_folder(tmp_path, {SOCCER: tar_of({"1.jpg": photo(1)}), SOCCER_BALL: tar_of({"1.jpg": photo(2)})})
    params = params_for(origin="folder", classes={"soccer": [SOCCER, SOCCER_BALL]})
    assert origins(params, tmp_path, ["soccer"]) == [f"{SOCCER}/1.jpg", f"{SOCCER_BALL}/1.jpg"]


# folder: files put in place by hand


def test_a_tar_and_a_folder_of_a_synset_are_both_used_and_shared_names_once(tmp_path: Path) -> None:
    params = in_folder(tmp_path, TARS)
    files = tmp_path / "data/imagenet" / RUGBY_BALL
    files.mkdir()
    for name, content in synset(RUGBY_BALL, [2, 4]).items():
        (files / name).write_bytes(content)
    (files / "notes.txt").write_text("mine")
    (files / "bad\nname.jpg").write_bytes(photo(1))
    found = offered(params, tmp_path, ["rugby"])
    names = [candidate.origin.partition("_")[2] for candidate in found]
    assert names == ["1.JPEG", "2.JPEG", "30.JPEG", "4.JPEG"]
    assert found[-1].read() == synset(RUGBY_BALL, [4])[f"{RUGBY_BALL}_4.JPEG"]


def test_a_synset_of_which_nothing_lies_there_is_one_line_that_says_what_is_expected_where(tmp_path: Path) -> None:
    message = trouble(in_folder(tmp_path, {RUGBY_BALL: TARS[RUGBY_BALL]}), tmp_path)
    assert f"{tmp_path / 'data/imagenet'} holds neither {SOCCER_BALL}.tar nor {SOCCER_BALL}/" in message


# ilsvrc2012: a tar of tars


def training_archive() -> bytes:
    """Forty inner tars, as the training archive has a thousand; ours are the 11th and the 31st."""
    names = [f"n{number:08d}" for number in range(1, 41)]
    names[10], names[30] = RUGBY_BALL, SOCCER_BALL
    inner = {f"{wnid}.tar": TARS.get(wnid) or tar_of(synset(wnid, [1])) for wnid in names}
    return tar_of(inner)


ARCHIVE = training_archive()


def test_of_the_archive_only_headers_and_the_wanted_parts_are_fetched(host: Host, tmp_path: Path) -> None:
    host.put("/train.tar", ARCHIVE)
    params = params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar")
    found = offered(params, tmp_path)
    assert [candidate.read() for candidate in found if candidate.label == "rugby"] == [
        synset(RUGBY_BALL, [number])[f"{RUGBY_BALL}_{number}.JPEG"] for number in (1, 2, 30)
    ]
    ranges = [request.range for request in host.requests]
    # The size of the archive, 31 headers and two inner tars.
    assert len(ranges) == 1 + 31 + 2 and all(ranges)
    folder = tmp_path / "data/imagenet/ilsvrc2012"
    assert (folder / f"{SOCCER_BALL}.tar").read_bytes() == TARS[SOCCER_BALL]
    host.down()
    assert origins(params, tmp_path) == [candidate.origin for candidate in found]


def test_a_walk_that_was_killed_goes_on_where_it_was(host: Host, tmp_path: Path) -> None:
    host.put("/train.tar", ARCHIVE)
    params = params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar")
    note = tmp_path / "data/imagenet/ilsvrc2012/index.json"
    first = params_for(origin="ilsvrc2012", archive=params.archive, classes={"rugby": [RUGBY_BALL]})
    assert len(offered(first, tmp_path, ["rugby"])) == 3
    assert len(read_json(note)["members"]) == 11
    before = len(host.requests)
    assert len(offered(params, tmp_path)) == 5
    assert len(host.requests) - before == 1 + 20 + 1


def test_a_walk_whose_connection_fails_keeps_what_it_has_seen(host: Host, tmp_path: Path) -> None:
    host.put("/train.tar", ARCHIVE, faults=[Fault.no_ranges()])
    params = params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar")
    trouble(params, tmp_path)
    note = tmp_path / "data/imagenet/ilsvrc2012/index.json"
    assert not note.exists()
    assert len(offered(params, tmp_path)) == 5
    seen = read_json(note)
    for path in note.parent.glob("*.tar"):
        path.unlink()
    before = len(host.requests)
    assert len(offered(params, tmp_path)) == 5
    assert len(host.requests) - before == 2  # the inner tars alone: where they lie is known
    assert read_json(note) == seen


def test_an_archive_of_another_size_is_walked_anew(host: Host, tmp_path: Path) -> None:
    params = params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar", classes={"rugby": [RUGBY_BALL]})
    host.put("/train.tar", ARCHIVE)
    note = tmp_path / "data/imagenet/ilsvrc2012/index.json"
    write_json(note, {"url": params.archive, "size": 5, "next": 512, "complete": False, "members": {}})
    assert len(offered(params, tmp_path, ["rugby"])) == 3
    assert read_json(note)["size"] == len(ARCHIVE)


def test_a_note_that_says_something_else_is_one_line_that_names_it(host: Host, tmp_path: Path) -> None:
    note = tmp_path / "data/imagenet/ilsvrc2012/index.json"
    write_json(note, ["not", "ours"])
    message = trouble(params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar"), tmp_path)
    assert message.startswith(str(note))


@pytest.mark.parametrize("fault", [Fault.no_ranges(), Fault.html(), Fault.other_range()])
def test_a_server_that_gives_no_ranges_is_an_error_and_not_138_gigabytes(
    host: Host, tmp_path: Path, fault: Fault
) -> None:
    # Twice the right range, so that the wrong one comes in the middle of the walk.
    host.put("/train.tar", ARCHIVE, faults=[Fault.slow(1e9), Fault.slow(1e9), fault.always()])
    message = trouble(params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar"), tmp_path)
    assert "`ingest.imagenet.archive`" in message


def test_a_refused_archive_says_where_to_log_in(host: Host, tmp_path: Path) -> None:
    host.put("/train.tar", ARCHIVE, faults=[Fault.status(403).always()])
    message = trouble(params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar"), tmp_path)
    assert "(403)" in message and "download-images" in message


def test_a_local_archive_is_read_in_place_and_nothing_is_copied(tmp_path: Path) -> None:
    (tmp_path / "big.tar").write_bytes(ARCHIVE)
    found = offered(params_for(origin="ilsvrc2012", archive="big.tar"), tmp_path)
    assert {candidate.origin.partition("/")[2]: candidate.read() for candidate in found} == synset(
        RUGBY_BALL, [1, 2, 30]
    ) | synset(SOCCER_BALL, [7, 8])
    assert [path.name for path in tmp_path.iterdir()] == ["big.tar"]
    assert "is no file" in trouble(params_for(origin="ilsvrc2012", archive="other.tar"), tmp_path, ParamsError)


def test_a_synset_that_the_archive_lacks_is_left_out_unless_a_class_has_no_other(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.tar").write_bytes(ARCHIVE)
    host.put("/train.tar", ARCHIVE)
    for archive in ("big.tar", f"{host.url}/train.tar"):
        both = params_for(
            origin="ilsvrc2012", archive=archive, classes={"rugby": [RUGBY, RUGBY_BALL], "soccer": [SOCCER_BALL]}
        )
        assert len(offered(both, tmp_path)) == 5
        assert RUGBY in capsys.readouterr().out
        none = params_for(origin="ilsvrc2012", archive=archive, classes={"rugby": [RUGBY], "soccer": [SOCCER_BALL]})
        assert RUGBY in trouble(none, tmp_path, ParamsError)
    before = len(host.requests)
    offered(both, tmp_path)
    assert len(host.requests) == before  # that it lacks one is known, too


def ends_of_members() -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as tar:
        return [header.offset for header in tar][1:]


@pytest.mark.parametrize("beyond", [0, 100, 512, 600])
def test_an_archive_that_is_cut_off_is_one_line(host: Host, tmp_path: Path, beyond: int) -> None:
    content = ARCHIVE[: ends_of_members()[20] + beyond]
    (tmp_path / "big.tar").write_bytes(content)
    host.put("/train.tar", content)
    for archive in ("big.tar", f"{host.url}/train.tar"):
        assert "cut off" in trouble(params_for(origin="ilsvrc2012", archive=archive), tmp_path)


def test_a_part_that_goes_on_behind_the_end_of_the_archive_is_not_fetched(host: Host, tmp_path: Path) -> None:
    host.put("/train.tar", ARCHIVE[: ends_of_members()[9] + 1500])
    message = trouble(params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar"), tmp_path)
    assert f"{RUGBY_BALL}.tar" in message


def test_a_broken_tar_within_the_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "big.tar").write_bytes(tar_of({f"{RUGBY_BALL}.tar": TARS[RUGBY_BALL][:900]}))
    params = params_for(origin="ilsvrc2012", archive="big.tar", classes={"rugby": [RUGBY_BALL]})
    with pytest.raises(TouchlineError, match=rf"{RUGBY_BALL}\.tar.*big\.tar"):
        offered(params, tmp_path, ["rugby"])


def test_sizes_beyond_8_gigabytes_are_read_from_the_binary_form_of_the_header() -> None:
    header = member("n00000001.tar", 9 * 2**30).tobuf(tarfile.GNU_FORMAT)
    index = imagenet._one_further(imagenet._Index("http://x/train.tar", 2**40), header)
    assert index.next == 512 + 9 * 2**30
    assert index.members == {"n00000001.tar": (512, 9 * 2**30)}


# kaggle: through its client


COMPETITION = synset(RUGBY_BALL, [1, 2]) | synset(SOCCER_BALL, [7]) | synset("n00000001", [3])


class Answer(Exception):
    """As the HTTP errors of `requests` and `httpx`: it carries the answer."""

    def __init__(self, status: int):
        super().__init__(f"{status} Client Error")
        self.response = SimpleNamespace(status_code=status)


def kaggle_client(
    monkeypatch: pytest.MonkeyPatch, refusal: BaseException | None = None, login: BaseException | None = None
) -> list[str]:
    """A module `kaggle` with what is used of the real one; the names of the files that were asked of it."""
    asked: list[str] = []
    files = {f"ILSVRC/Data/CLS-LOC/train/{name.partition('_')[0]}/{name}": body for name, body in COMPETITION.items()}
    files["LOC_train_solution.csv"] = training_list(COMPETITION)

    def authenticate() -> None:
        if login:
            print("First, you will need a Kaggle account.\n")
            raise login

    def competition_download_file(competition: str, file_name: str, path: str, force: bool, quiet: bool) -> None:
        asked.append(file_name)
        if refusal:
            raise refusal
        assert (competition, force, quiet) == ("imagenet-object-localization-challenge", True, True)
        (Path(path) / Path(file_name).name).write_bytes(files[file_name])

    api = SimpleNamespace(authenticate=authenticate, competition_download_file=competition_download_file)
    monkeypatch.setitem(sys.modules, "kaggle", SimpleNamespace(api=api))
    return asked


def test_photos_at_kaggle_are_listed_first_and_fetched_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = kaggle_client(monkeypatch)
    found = offered(params_for(origin="kaggle"), tmp_path)
    assert asked == ["LOC_train_solution.csv"]
    assert {candidate.origin.partition("/")[2]: candidate.read() for candidate in found} == {
        name: content for name, content in COMPETITION.items() if not name.startswith("n00000001")
    }
    assert f"ILSVRC/Data/CLS-LOC/train/{RUGBY_BALL}/{RUGBY_BALL}_2.JPEG" in asked
    monkeypatch.setitem(sys.modules, "kaggle", None)
    again = offered(params_for(origin="kaggle"), tmp_path)
    assert [candidate.read() for candidate in again] == [candidate.read() for candidate in found]


@pytest.mark.parametrize("status, part", [(403, "accept the rules in the browser"), (401, "kaggle auth login")])
def test_a_refusal_of_kaggle_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, part: str
) -> None:
    kaggle_client(monkeypatch, refusal=Answer(status))
    assert part in trouble(params_for(origin="kaggle"), tmp_path)
    assert not list(tmp_path.rglob("*.csv"))


def test_without_a_token_for_kaggle_one_line_takes_the_place_of_its_page_of_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle_client(monkeypatch, login=SystemExit(1))
    assert "KAGGLE_API_TOKEN" in trouble(params_for(origin="kaggle"), tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("origin, package", [("kaggle", "kaggle"), ("huggingface", "datasets")])
def test_a_client_that_is_not_installed_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"`pip install {package}`" in trouble(params_for(origin=origin), tmp_path)


def kaggle_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, token: str = "right") -> None:
    """The installed client, sent to `url`."""
    environment = pytest.importorskip("kagglesdk.kaggle_env", reason="the client `kaggle` is an optional extra")
    monkeypatch.setitem(environment._env_to_endpoint, environment.KaggleEnv.PROD, url)
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)


def test_kaggles_own_client_fetches_the_list_and_the_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"ILSVRC/Data/CLS-LOC/train/{name.partition('_')[0]}/{name}": body for name, body in COMPETITION.items()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("LOC_train_solution.csv", training_list(COMPETITION))
    for table in (training_list(COMPETITION), packed.getvalue()):
        with serving(kaggle_site(files | {"LOC_train_solution.csv": table})) as url:
            kaggle_itself(tmp_path, monkeypatch, url)
            params = params_for(origin="kaggle", folder=f"of {len(table)} bytes")
            assert {
                candidate.origin.partition("/")[2]: candidate.read() for candidate in offered(params, tmp_path)
            } == {name: content for name, content in COMPETITION.items() if not name.startswith("n00000001")}


@pytest.mark.parametrize(
    "refusal, token, part", [(403, "right", "accept the rules in the browser"), (0, "wrong", "no valid token")]
)
def test_a_refusal_through_kaggles_own_client_says_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refusal: int,
    token: str,
    part: str,
) -> None:
    with serving(kaggle_site({}, refusal)) as url:
        kaggle_itself(tmp_path, monkeypatch, url, token)
        assert part in trouble(params_for(origin="kaggle"), tmp_path)
    assert not capsys.readouterr().out


# huggingface: through its client


class FakeStream:
    """What is used of an `IterableDataset`."""

    def __init__(self, rows: list[dict[str, Any]], failing_at: int | None = None):
        self.rows, self.failing_at, self.next, self.given = rows, failing_at, 0, 0

    def cast_column(self, column: str, feature: object) -> "FakeStream":
        assert (column, feature) == ("image", "as bytes")
        return self

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.next < len(self.rows):
            if self.next == self.failing_at:
                raise ConnectionError("the server has gone away")
            self.next += 1
            self.given += 1
            yield self.rows[self.next - 1]


def hub_rows() -> list[dict[str, Any]]:
    rows = [
        {"image": {"bytes": content, "path": f"{name.removesuffix('.JPEG')}_{name[:9]}.JPEG"}, "label": label}
        for label, wnid in ((768, RUGBY_BALL), (805, SOCCER_BALL))
        for name, content in synset(wnid, range(25)).items()
    ]
    random.Random(1).shuffle(rows)
    return rows


def hub_client(
    monkeypatch: pytest.MonkeyPatch, failing_at: int | None = None, refusal: Exception | None = None
) -> list[FakeStream]:
    """A module `datasets` with what is used of the real one; the streams that were opened."""
    opened: list[FakeStream] = []

    def load_dataset(path: str, **options: Any) -> FakeStream:
        if refusal:
            raise refusal
        assert path == "ILSVRC/imagenet-1k"
        assert options["split"] == "train" and options["streaming"] and options["columns"] == ["image", "label"]
        ((column, operation, labels),) = options["filters"]
        assert (column, operation) == ("label", "in")
        opened.append(FakeStream([row for row in hub_rows() if row["label"] in labels], failing_at))
        return opened[-1]

    def image(decode: bool) -> str:
        assert not decode
        return "as bytes"

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, Image=image))
    return opened


HUB = params_for(origin="huggingface", classes={"rugby": [RUGBY, RUGBY_BALL], "soccer": [SOCCER_BALL]})


def test_photos_at_hugging_face_are_kept_as_they_come_and_a_whole_pass_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = hub_client(monkeypatch)
    found = offered(HUB, tmp_path)
    assert {candidate.origin.partition("/")[2]: candidate.read() for candidate in found} == synset(
        RUGBY_BALL, range(25)
    ) | synset(SOCCER_BALL, range(25))
    assert {candidate.label for candidate in found if RUGBY_BALL in candidate.origin} == {"rugby"}
    assert f"does not hold {RUGBY} of class rugby" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert [candidate.origin for candidate in offered(HUB, tmp_path)] == [candidate.origin for candidate in found]
    assert len(opened) == 1


def test_a_pass_that_broke_goes_on_where_it_was_and_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [f"{row['image']['path'][:9]}/{row['image']['path'].rpartition('_')[0]}.JPEG" for row in hub_rows()]
    hub_client(monkeypatch, failing_at=30)
    message = trouble(HUB, tmp_path)
    assert "the server has gone away" in message and "run again" in message
    opened = hub_client(monkeypatch)
    assert origins(HUB, tmp_path) == whole
    assert opened[0].given == 20


def test_photos_that_come_again_after_a_kill_are_offered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_client(monkeypatch, failing_at=30)
    trouble(HUB, tmp_path)
    note = tmp_path / "data/imagenet/huggingface/pass.json"
    write_json(note, read_json(note) | {"position": {"next": 15}})
    opened = hub_client(monkeypatch)
    found = origins(HUB, tmp_path)
    assert len(found) == len(set(found)) == 50
    assert opened[0].given == 35


def test_who_has_enough_stops_and_the_next_run_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = hub_client(monkeypatch)
    photos = imagenet.candidates(HUB, DOWNLOAD, CLASSES, tmp_path)
    first = [next(photos).origin for _ in range(7)]
    photos.close()
    again = imagenet.candidates(HUB, DOWNLOAD, CLASSES, tmp_path)
    assert [next(again).origin for _ in range(7)] == first
    assert len(opened) == 1
    assert next(again).origin not in first
    assert len(opened) == 2


def test_a_pass_for_more_synsets_than_before_is_a_new_one_and_for_fewer_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = hub_client(monkeypatch)
    soccer = HUB.model_copy(update={"classes": {"soccer": [SOCCER_BALL]}})
    assert len(offered(soccer, tmp_path, ["soccer"])) == 25
    both = offered(HUB, tmp_path)
    assert len(both) == 50
    assert len(offered(soccer, tmp_path, ["soccer"])) == 25
    assert len(opened) == 2


def test_a_kept_photo_that_is_gone_makes_the_pass_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_client(monkeypatch)
    found = offered(HUB, tmp_path)
    (tmp_path / "data/imagenet/huggingface" / found[3].origin).unlink()
    again = offered(HUB, tmp_path)
    assert [candidate.origin for candidate in again] == [candidate.origin for candidate in found]
    assert again[3].read()


def refused_by_the_hub(text: str) -> Exception:
    return type("DatasetNotFoundError", (FileNotFoundError,), {})(text)


@pytest.mark.parametrize(
    "refusal, part",
    [
        (refused_by_the_hub("It is gated. You must be authenticated to access it."), "HF_TOKEN"),
        (refused_by_the_hub("It is gated. Visit the dataset page to ask for access."), "accept its terms at"),
        (Answer(401), "HF_TOKEN"),
        (Answer(403), "has not let you in"),
        (OSError("no route to host"), "cannot be read (no route to host)"),
    ],
)
def test_a_refusal_of_hugging_face_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception, part: str
) -> None:
    hub_client(monkeypatch, refusal=refusal)
    assert part in trouble(HUB, tmp_path)


def hugging_face_itself(url: str, folder: Path, stop_after: int) -> list[str]:
    """Origins of the photos, or what went wrong, of a process with the installed client, sent to `url`."""
    pytest.importorskip("datasets", reason="the client `datasets` is an optional extra")
    # The client reads where its server is when it is imported, so it gets a process of its own.
    program = f"""
from itertools import islice
from pathlib import Path
from touchline.core.errors import TouchlineError
from touchline.core.params import DownloadParams, ImageNetParams
from touchline.sources import imagenet
params = ImageNetParams.model_validate({HUB.model_dump()})
download = DownloadParams.model_validate({DOWNLOAD.model_dump()})
photos = imagenet.candidates(params, download, {CLASSES}, Path({str(folder)!r}))
try:
    for photo in islice(photos, {stop_after}):
        print("offered", photo.label, photo.origin, len(photo.read()))
except TouchlineError as error:
    print("offered", error)
"""
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return [line.removeprefix("offered ") for line in done.splitlines() if line.startswith("offered ")]


def test_hugging_faces_own_client_gives_the_photos_and_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = [(row["image"]["path"], row["image"]["bytes"], row["label"]) for row in hub_rows()]
    others = [(f"n00000001_{number}_n00000001.JPEG", b"another class", 3) for number in range(50)]
    mixed = [row for pair in zip(rows, others, strict=True) for row in pair]
    files = {
        f"data/train-{place:05d}-of-00004.parquet": shard(mixed[place * 25 : place * 25 + 25]) for place in range(4)
    }
    read: list[str] = []
    with serving(hub_site(files, read)) as url:
        first = hugging_face_itself(url, tmp_path, 45)
        before = len(read)
        whole = hugging_face_itself(url, tmp_path, 1000)
    labels = {768: "rugby", 805: "soccer"}
    assert whole == [
        f"{labels[label]} {path[:9]}/{path.rpartition('_')[0]}.JPEG {len(content)}" for path, content, label in rows
    ]
    assert first == whole[:45]
    # It was in the fourth file; the first one is read for the columns, and the third may hold the last rows seen.
    assert "data/train-00001-of-00004.parquet" not in read[before:]


@pytest.mark.parametrize("refusal, part", [(401, "HF_TOKEN"), (403, "has not let you in")])
def test_a_refusal_through_hugging_faces_own_client_says_what_to_do(tmp_path: Path, refusal: int, part: str) -> None:
    with serving(hub_site({}, [], refusal)) as url:
        (message,) = hugging_face_itself(url, tmp_path, 1)
    assert part in message


# Dry runs


def test_a_plan_says_what_would_be_fetched_and_fetches_nothing(host: Host, tmp_path: Path) -> None:
    params = params_for(url=host.url)
    for wnid, content in TARS.items():
        host.put(f"/{wnid}.tar", content)
    kept = tmp_path / f"data/imagenet/{SOCCER_BALL}.tar"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(TARS[SOCCER_BALL])
    size = len(TARS[SOCCER_BALL]) / 1e6
    assert imagenet.plan(params, DOWNLOAD, CLASSES, tmp_path) == [
        Planned(f"synset {RUGBY_BALL}", f"{host.url}/{RUGBY_BALL}.tar", size, "to fetch", imagenet.TERMS),
        Planned(f"synset {SOCCER_BALL}", str(kept), size, "there already", imagenet.TERMS),
    ]
    assert [request.method for request in host.requests] == ["HEAD"]
    del host._stored[f"/{RUGBY_BALL}.tar"]
    with pytest.raises(TouchlineError, match=f"{RUGBY_BALL}.tar is not there.*ingest.imagenet.url"):
        imagenet.plan(params, DOWNLOAD, CLASSES, tmp_path)


def test_a_plan_of_the_archive_knows_the_sizes_of_the_parts_seen_so_far(host: Host, tmp_path: Path) -> None:
    host.put("/train.tar", ARCHIVE)
    params = params_for(origin="ilsvrc2012", archive=f"{host.url}/train.tar")
    offered(params.model_copy(update={"classes": {"rugby": [RUGBY_BALL]}}), tmp_path, ["rugby"])
    kept = tmp_path / f"data/imagenet/ilsvrc2012/{RUGBY_BALL}.tar"
    planned = imagenet.plan(params, DOWNLOAD, CLASSES, tmp_path)
    assert [(item.where, item.megabytes, item.state) for item in planned] == [
        (str(kept), kept.stat().st_size / 1e6, "there already"),
        (params.archive, None, "to fetch"),
    ]
    kept.unlink()
    assert imagenet.plan(params, DOWNLOAD, CLASSES, tmp_path)[0].megabytes == len(TARS[RUGBY_BALL]) / 1e6


def test_plans_of_the_other_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(params: ImageNetParams) -> list[tuple[str, bool]]:
        found = imagenet.plan(params, DOWNLOAD, CLASSES, tmp_path)
        return [(item.state, item.megabytes is not None and item.megabytes > 0) for item in found]

    (tmp_path / "big.tar").write_bytes(ARCHIVE)
    assert planned(params_for(origin="ilsvrc2012", archive="big.tar")) == [("there already", True)]
    assert planned(in_folder(tmp_path, TARS)) == [("there already", True)] * 2
    kaggle_client(monkeypatch)
    assert planned(params_for(origin="kaggle")) == [("to fetch", False)] * 2
    for candidate in offered(params_for(origin="kaggle"), tmp_path):
        candidate.read()
    assert planned(params_for(origin="kaggle")) == [("there already", True)] * 2
    hub_client(monkeypatch)
    assert planned(HUB) == [("to fetch", True)]
    offered(HUB, tmp_path)
    assert planned(HUB)[0][0] == "there already"
