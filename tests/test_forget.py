"""Photos and authors that were forgotten: gone from every place of a project, and brought back by no source."""

import hashlib
import io
import tarfile
from collections.abc import Callable

import imagenet_files
import pytest
import servers
from imagenet_files import RUGBY_BALL, SOCCER_BALL, synset, tar_of
from openimages_files import RUGBY, SOCCER, Shot, publish
from servers import Host
from test_ingest import offer, photo

from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, write_json
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data import forgotten
from touchline.data.forgotten import Forgotten, author_digest, origin_digest
from touchline.sources import feedback, named
from touchline.stages import ingest

ParamsWith = Callable[..., Params]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ingested(paths: Paths, params: Params) -> set[str]:
    """The origins of what a run of `ingest` takes; each is a file, and no other file is left."""
    ingest.run(paths, params)
    table = read_table(paths.photos_table)
    assert {paths.relative(file) for file in paths.photos.glob("*/*")} == set(table["path"])
    return set(table["origin"])


def forget(paths: Paths, params: Params, source: str, gone: Forgotten) -> int:
    forgotten.add(paths.forgotten, gone)
    found = named(source)
    assert found
    count = found.forget(paths, params, gone)
    assert found.forget(paths, params, gone) == 0
    return count


def test_what_is_forgotten_is_kept_as_digests_and_added_to(paths: Paths) -> None:
    assert not forgotten.read(paths.forgotten)
    forgotten.add(paths.forgotten, Forgotten(authors=frozenset({author_digest("Ann  Example")})))
    origins = frozenset({origin_digest("folder", "rugby/a.jpg")})
    forgotten.add(paths.forgotten, Forgotten(frozenset({"a" * 64}), origins))
    known = forgotten.read(paths.forgotten)
    assert known.photos == {"a" * 64}
    assert known.has("folder", "rugby/a.jpg") and known.has("any", "b.jpg", "", "ann example")
    assert not known.has("feedback", "rugby/a.jpg", "", "Ann")
    assert "ann" not in paths.forgotten.read_text().casefold() and "rugby" not in paths.forgotten.read_text()


@pytest.mark.parametrize("line", ["photo,0123", "name,Ann Example"])
def test_a_line_that_is_no_digest_is_named(paths: Paths, line: str) -> None:
    paths.forgotten.parent.mkdir()
    paths.forgotten.write_text(f"kind,sha256\nphoto,{'a' * 64}\n{line}\n")
    with pytest.raises(TouchlineError, match=r"forgotten\.csv.*\b3\b"):
        forgotten.read(paths.forgotten)


def test_a_file_of_your_own_folder_is_deleted_with_its_row_and_under_another_name_it_is_not_taken(
    paths: Paths, params_with: ParamsWith
) -> None:
    params = params_with(ingest={"sources": ["folder"], "folder": "incoming", "min_per_class": 1})
    offer(paths, {"rugby/a.jpg": photo(1), "rugby/b.jpg": photo(2), "soccer/c.jpg": photo(3), "soccer/d.jpg": photo(4)})
    manifest = paths.project / "incoming/manifest.csv"
    manifest.write_text('file;author\nrugby/a.jpg;Ann Example\nb.jpg;"Bo; Example"\nsoccer/d.jpg;Cy Example\n')
    assert ingested(paths, params) == {"rugby/a.jpg", "rugby/b.jpg", "soccer/c.jpg", "soccer/d.jpg"}
    gone = Forgotten(
        frozenset({digest(photo(1))}), frozenset({origin_digest("folder", "rugby/a.jpg")}),
        frozenset({author_digest("Cy Example")}),
    )  # fmt: skip
    assert forget(paths, params, "folder", gone) == 3  # a file and two rows
    assert manifest.read_text() == 'file;author\nb.jpg;"Bo; Example"\n'
    assert not (paths.project / "incoming/rugby/a.jpg").exists()
    # Brought back by hand: the same photo under another name, other bytes under the old one, and one by the author.
    offer(paths, {"soccer/same.jpg": photo(1), "rugby/a.jpg": photo(5)})
    manifest.write_text("file,author\nsoccer/d.jpg,CY  example\n")
    assert ingested(paths, params) == {"rugby/b.jpg", "soccer/c.jpg"}


def test_a_folder_outside_the_project_is_left_alone_and_its_photo_not_taken(
    paths: Paths, params_with: ParamsWith
) -> None:
    params = params_with(ingest={"sources": ["folder"], "folder": "../elsewhere", "min_per_class": 1})
    for name, number in {"rugby/a.jpg": 1, "rugby/b.jpg": 2, "soccer/c.jpg": 3}.items():
        file = paths.project.parent / "elsewhere" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photo(number))
    assert forget(paths, params, "folder", Forgotten(frozenset({digest(photo(1))}))) == 0
    assert ingested(paths, params) == {"rugby/b.jpg", "soccer/c.jpg"}
    assert (paths.project.parent / "elsewhere/rugby/a.jpg").exists()


def test_a_photo_given_at_the_page_is_deleted_and_not_taken_when_it_is_given_again(
    paths: Paths, params_with: ParamsWith
) -> None:
    params = params_with(ingest={"sources": ["feedback"], "min_per_class": 1})
    for number, label in ((1, "rugby"), (2, "soccer")):
        feedback.remember(paths.feedback, photo(number), label, [])
    assert len(ingested(paths, params)) == 2
    assert forget(paths, params, "feedback", Forgotten(frozenset({digest(photo(1))}))) == 2
    assert {file.stem for file in paths.feedback.iterdir()} == {digest(photo(2))}
    feedback.remember(paths.feedback, photo(1), "soccer", [])
    assert len(ingested(paths, params)) == 1


def test_imagenet_loses_members_of_tars_files_and_lines_of_lists(paths: Paths, params_with: ParamsWith) -> None:
    folder = paths.project / "data/imagenet"
    classes = {"rugby": [RUGBY_BALL], "soccer": [SOCCER_BALL]}
    imagenet = params_with().ingest.imagenet.model_dump() | {
        "accept_terms": True, "origin": "folder", "classes": classes,
    }  # fmt: skip
    params = params_with(
        ingest={"sources": ["imagenet"], "min_per_class": 1, "imagenet": imagenet, "remote": "private"}
    )
    balls, soccer = synset(RUGBY_BALL, range(3)), synset(SOCCER_BALL, range(2))
    for name, content in {
        f"{RUGBY_BALL}.tar": tar_of(balls),
        **{f"{SOCCER_BALL}/{name}": content for name, content in soccer.items()},
        f"huggingface/{SOCCER_BALL}/{SOCCER_BALL}_0.JPEG": soccer[f"{SOCCER_BALL}_0.JPEG"],
        "kaggle/LOC_train_solution.csv": imagenet_files.training_list([*balls, *soccer]),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    names = [[SOCCER_BALL, name] for name in soccer]
    write_json(folder / "huggingface/pass.json", {"synsets": [], "photos": names, "position": None, "done": True})
    gone = Forgotten(
        frozenset({digest(soccer[f"{SOCCER_BALL}_0.JPEG"])}),
        frozenset({
            origin_digest("imagenet", f"{RUGBY_BALL}/{RUGBY_BALL}_1.JPEG"),
            origin_digest("imagenet", f"{SOCCER_BALL}/{SOCCER_BALL}_0.JPEG"),
        }),
    )  # fmt: skip
    assert forget(paths, params, "imagenet", gone) == 3
    left = [f"{RUGBY_BALL}_0.JPEG", f"{RUGBY_BALL}_2.JPEG", f"{SOCCER_BALL}_1.JPEG"]
    with tarfile.open(fileobj=io.BytesIO((folder / f"{RUGBY_BALL}.tar").read_bytes())) as tar:
        assert tar.getnames() == left[:2]
    assert (folder / "huggingface/pass.json").read_text().count("JPEG") == 1
    assert (folder / "kaggle/LOC_train_solution.csv").read_bytes() == imagenet_files.training_list(left)
    assert ingested(paths, params) == {f"{name.partition('_')[0]}/{name}" for name in left}
    # Put there again, as a download of the whole tar would.
    (folder / f"{RUGBY_BALL}.tar").write_bytes(tar_of(balls))
    assert ingested(paths, params) == {f"{name.partition('_')[0]}/{name}" for name in left}
    assert f"{RUGBY_BALL}_1.JPEG".encode() not in (folder / f"{RUGBY_BALL}.tar").read_bytes()


def test_open_images_loses_the_photo_from_its_lists_and_an_author_s_other_photos_are_not_fetched_for_it(
    paths: Paths, params_with: ParamsWith, host: Host
) -> None:
    shots = [
        Shot(f"{number:016x}", {label: "1"}, author, page)
        for number, (label, author, page) in enumerate([
            (RUGBY, "Ann Example", "https://example.com/ann"), (RUGBY, "Bo Example", "https://example.com/bo"),
            (RUGBY, "Ann E.", "https://example.com/ann"), (SOCCER, "Bo Example", "https://example.com/bo"),
            (SOCCER, "Cy Example", "https://example.com/cy"),
        ])
    ]  # fmt: skip
    publish(host, test=shots)
    for number, shot in enumerate(shots):
        host.put(f"/photos/test/{shot.image}.jpg", photo(number))
    openimages = params_with().ingest.openimages.model_dump() | {
        "url": host.url, "photos_url": f"{host.url}/photos", "subsets": ["test"], "keep_label_files": True,
        "classes": {"rugby": [RUGBY], "soccer": [SOCCER]}, "exclude": [],
    }  # fmt: skip
    params = params_with(
        ingest={
            "sources": ["openimages"], "per_class": 1, "min_per_class": 1, "openimages": openimages,
            "download": servers.settings().model_dump(),
        }
    )  # fmt: skip
    assert ingested(paths, params) == {f"test/{shots[0].image}", f"test/{shots[3].image}"}
    gone = Forgotten(
        frozenset({digest(photo(0))}), frozenset({origin_digest("openimages", f"test/{shots[0].image}")}),
        frozenset({author_digest("Ann Example"), author_digest("https://example.com/ann")}),
    )  # fmt: skip
    assert forget(paths, params, "openimages", gone) == 2
    kept = b"".join(file.read_bytes() for file in paths.openimages.rglob("*") if file.is_file())
    assert b"Ann" not in kept and shots[0].image.encode() not in kept and b"Cy Example" in kept
    before = len(host.requests)
    # Its place is taken by the next photo, which is not hers.
    assert ingested(paths, params) == {f"test/{shots[1].image}", f"test/{shots[3].image}"}
    asked = [request.path for request in host.requests[before:]]
    assert [path for path in asked if "/photos/" in path] == [f"/photos/test/{shots[1].image}.jpg"]
    assert not (paths.spare / f"{digest(photo(0))[:16]}.jpg").exists()
