"""A folder that somebody sent: what is no photo of its own is named, left out, and never reaches DVC."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import projects
import pytest
from test_ingest import offer, photo

from touchline.core.errors import TouchlineError
from touchline.core.files import read_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.sources import imagenet
from touchline.sources.received import Received, check_for_dvc
from touchline.stages import ingest

ParamsWith = Callable[..., Params]
KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n"


@pytest.fixture
def params(params_with: ParamsWith) -> Params:
    return params_with(ingest={"sources": ["folder"], "folder": "incoming"})


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's own, with a private key and a private photo."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "key").write_bytes(KEY)
    (folder / "private.jpg").write_bytes(photo(99))
    return folder


def incoming(paths: Paths) -> Path:
    """The received folder, with a photo of each class."""
    offer(paths, {"rugby/good.jpg": photo(1), "soccer/good.jpg": photo(2)})
    return paths.project / "incoming"


def origins(paths: Paths, params: Params) -> list[str]:
    """What ingest takes; every stored file is looked at for what must not be there."""
    ingest.run(paths, params)
    stored = [path.read_bytes() for path in paths.photos.rglob("*") if path.is_file()]
    assert not any(KEY in content for content in stored)
    return list(read_table(paths.photos_table)["origin"])


GOOD = ["rugby/good.jpg", "soccer/good.jpg"]


@pytest.mark.parametrize("target", ["key", "private.jpg"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_folder_is_named_and_left_out(
    paths: Paths, params: Params, outside: Path, capsys: pytest.CaptureFixture[str], target: str, absolute: bool
) -> None:
    link = incoming(paths) / "rugby/a.jpg"
    link.symlink_to(outside / target if absolute else os.path.relpath(outside / target, link.parent))
    assert origins(paths, params) == GOOD
    assert "rugby/a.jpg" in capsys.readouterr().out


def test_a_folder_linked_from_elsewhere_is_left_out(paths: Paths, params: Params, outside: Path) -> None:
    """As a class, and below one."""
    (incoming(paths) / "rugby/more").symlink_to(outside)
    assert origins(paths, params) == GOOD
    (paths.project / "incoming/rugby/good.jpg").unlink()
    (paths.project / "incoming/rugby/more").unlink()
    (paths.project / "incoming/rugby").rmdir()
    (paths.project / "incoming/rugby").symlink_to(outside)
    assert origins(paths, params) == ["soccer/good.jpg"]


def test_links_that_are_the_user_s_own_lead_where_they_like(
    paths: Paths, params_with: ParamsWith, outside: Path
) -> None:
    params = params_with(ingest={"sources": ["folder"], "folder": "incoming", "follow_links": True})
    rugby = incoming(paths) / "rugby"
    (rugby / "a.jpg").symlink_to(outside / "private.jpg")
    # Not even then is a key a photo.
    (rugby / "b.jpg").symlink_to(outside / "key")
    (rugby / "c.jpg").symlink_to("/proc/self/environ")
    (rugby / "d.jpg").symlink_to("/dev/zero")
    assert origins(paths, params) == ["rugby/a.jpg", *GOOD]


def test_links_inside_the_folder_and_a_folder_that_is_a_link_itself_work(
    paths: Paths, params: Params, tmp_path: Path
) -> None:
    folder = incoming(paths)
    (folder / "rugby/again.jpg").symlink_to("../soccer/good.jpg")
    moved = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(moved)
    assert origins(paths, params) == ["rugby/again.jpg", *GOOD]


def test_a_linked_album_is_followed_inside_the_folder_and_named_outside(
    paths: Paths, params: Params, outside: Path, params_with: ParamsWith, capsys: pytest.CaptureFixture[str]
) -> None:
    rugby = incoming(paths) / "rugby"
    offer(paths, {"albums/x.jpg": photo(7)})
    (rugby / "album").symlink_to("../albums")
    (rugby / "own").symlink_to(outside)
    assert origins(paths, params) == ["rugby/album/x.jpg", *GOOD]
    said = capsys.readouterr().out
    assert "rugby/own" in said and "ingest.follow_links: true" in said
    follow = params_with(ingest={"sources": ["folder"], "folder": "incoming", "follow_links": True})
    assert origins(paths, follow) == ["rugby/album/x.jpg", *GOOD[:1], "rugby/own/private.jpg", *GOOD[1:]]


@pytest.mark.parametrize("target", [".", "..", "../..", "more", "../albums"])
def test_links_in_a_circle_are_refused(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    rugby = incoming(paths) / "rugby"
    offer(paths, {"rugby/more/b.jpg": photo(3), "albums/x.jpg": photo(4)})
    (paths.project / "incoming/albums/back").symlink_to("../rugby")
    (rugby / "link").symlink_to(target)
    found = [GOOD[0], "rugby/link/x.jpg", "rugby/more/b.jpg", GOOD[1]]
    assert origins(paths, params) == [each for each in found if "link" not in each or target == "../albums"]
    assert "rugby/link" in capsys.readouterr().out


@pytest.mark.parametrize("odd", ["name", "link"])
@pytest.mark.parametrize("place", ["rugby", "not used", ".hidden"])
def test_what_dvc_could_not_read_is_named_before_it_tries(paths: Paths, odd: str, place: str) -> None:
    folder = incoming(paths)
    (folder / place).mkdir(exist_ok=True)
    check_for_dvc(folder)
    if odd == "name":
        (folder / place / os.fsdecode(b"caf\xe9.jpg")).touch()
    else:
        (folder / place / "caf.jpg").symlink_to("nowhere")
    with pytest.raises(TouchlineError, match=r"caf(\\udce9)?\.jpg") as error:
        check_for_dvc(folder)
    str(error.value).encode()


def test_a_git_lfs_pointer_and_what_phones_take_are_named_with_their_remedy(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    incoming(paths)
    phone = b"\0\0\0\x24ftypmif1\0\0\0\0mif1heic" + bytes(40)
    offer(paths, {"rugby/a.jpg": pointer, "rugby/IMG_1.HEIC": phone, "rugby/README.md": b"# Photos\n"})
    assert origins(paths, params) == GOOD
    said = capsys.readouterr().out
    assert (
        "rugby/IMG_1.HEIC (a HEIC photo" in said
        and "rugby/a.jpg (a Git LFS pointer: git lfs pull)" in said
        and "rugby/README.md (not an image)" in said
    )


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_pipes_sockets_broken_links_and_files_over_the_limit_are_named_and_not_read(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    rugby = incoming(paths) / "rugby"
    os.mkfifo(rugby / "pipe.jpg")
    # The address of a socket has room for a short path only.
    with in_folder(rugby), socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
    (rugby / "broken.jpg").symlink_to("nowhere")
    (rugby / "circle.jpg").symlink_to("circle.jpg")
    (rugby / "huge.jpg").write_bytes(photo(3))
    # Its blocks are on no disk; to read it would take minutes, and all memory.
    os.truncate(rugby / "huge.jpg", 2**36)
    (rugby / "empty.jpg").touch()
    (rugby / "page\n.jpg").write_bytes(b"<html>")
    assert origins(paths, params) == GOOD
    said = capsys.readouterr().out
    assert "left out" in said and "7" in said and said.count("\n") == len(said.splitlines())


def test_a_dry_run_names_what_would_be_left_out(
    paths: Paths, params: Params, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (incoming(paths) / "rugby/a.jpg").symlink_to(outside / "private.jpg")
    assert ingest.plan(paths, params)[0].what.startswith("2 photos")
    assert "rugby/a.jpg" in capsys.readouterr().out
    assert not paths.photos.exists()


def test_a_manifest_is_a_file_of_the_folder(paths: Paths, params: Params, outside: Path) -> None:
    (incoming(paths) / "manifest.csv").symlink_to(outside / "key")
    with pytest.raises(TouchlineError, match=r"manifest\.csv") as error:
        ingest.run(paths, params)
    assert "c2VjcmV0" not in str(error.value)


def test_a_file_that_becomes_a_link_after_it_was_looked_at_is_not_read(paths: Paths, outside: Path) -> None:
    folder = incoming(paths)
    received = Received(folder, 20)
    path = folder / "rugby/good.jpg"
    assert received.refusal(path) == "" and received.read(path) == photo(1)
    path.unlink()
    path.symlink_to(outside / "private.jpg")
    with pytest.raises(TouchlineError, match=r"good\.jpg"):
        received.read(path)


def test_entries_of_feedback_lead_no_further_than_their_folder(
    paths: Paths, params_with: ParamsWith, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = params_with(ingest={"sources": ["folder", "feedback"], "folder": "incoming"})
    incoming(paths)
    paths.feedback.mkdir(parents=True)
    for name, target in (("a", "private.jpg"), ("b", "key")):
        (paths.feedback / f"{name}.jpg").symlink_to(outside / target)
        (paths.feedback / f"{name}.json").write_text(json.dumps({"photo": f"{name}.jpg", "label": "rugby"}))
    (outside / "entry").write_text(json.dumps({"photo": "c.jpg", "label": "rugby"}))
    (paths.feedback / "c.jpg").write_bytes(photo(5))
    (paths.feedback / "c.json").symlink_to(outside / "entry")
    os.mkfifo(paths.feedback / "d.jpg")
    (paths.feedback / "d.json").write_text(json.dumps({"photo": "d.jpg", "label": "rugby"}))
    assert origins(paths, params) == GOOD
    said = capsys.readouterr().out
    assert "a.jpg" in said and "b.jpg" in said and "c.json" in said


@pytest.mark.parametrize("follow", [False, True])
def test_photos_of_imagenet_s_folder_lead_no_further_either(
    params_with: ParamsWith, tmp_path: Path, outside: Path, follow: bool
) -> None:
    settings = params_with().ingest
    source = settings.imagenet.model_copy(
        update={"accept_terms": True, "origin": "folder", "folder": "tars",
                "classes": {"rugby": ["n00470966"], "soccer": ["n00478262"]}}
    )  # fmt: skip
    for wnid in ("n00470966", "n00478262"):
        (tmp_path / "tars" / wnid).mkdir(parents=True)
        (tmp_path / "tars" / wnid / f"{wnid}_1.jpg").write_bytes(photo(1))
    (tmp_path / "tars/n00470966/n00470966_2.jpg").symlink_to(outside / "private.jpg")
    (tmp_path / "tars/n00470966/n00470966_3.jpg").symlink_to(outside / "key")
    found = imagenet.candidates(source, settings.download, ["rugby", "soccer"], tmp_path, follow_links=follow)
    assert len([each.read() for each in found if each.read]) == (3 if follow else 2)


def test_what_is_no_photo_is_never_pushed(tmp_path: Path, outside: Path) -> None:
    project = projects.make(tmp_path / "the project", {"ingest.sources": ["folder", "feedback"]})
    for number, label in enumerate(["rugby", "soccer"]):
        folder = project.root / "data/incoming" / label
        folder.mkdir(parents=True)
        (folder / "good.jpg").write_bytes(photo(number))
        (folder / "key.jpg").write_bytes(KEY)
        (folder / "linked.jpg").symlink_to(outside / "key")
        (folder / "private.jpg").symlink_to(outside / "private.jpg")
    project.dvc("remote", "add", "--default", "shared", str(tmp_path / "shared"))
    said = project.dvc("repro", "ingest")
    project.dvc("push")
    pushed = [path.read_bytes() for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert photo(0) in pushed and photo(1) in pushed
    assert not any(KEY in content or content == photo(99) for content in pushed)
    assert "key.jpg" in said and "linked.jpg" in said
