"""Photos and authors that were forgotten: gone from every place of a project, and brought back by no source."""

import hashlib
import io
import json
import os
import sqlite3
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import url2pathname

import imagenet_files
import numpy as np
import pandas as pd
import psutil
import pytest
import servers
from imagenet_files import RUGBY_BALL, SOCCER_BALL, synset, tar_of
from openimages_files import RUGBY, SOCCER, Shot, publish
from projects import REGISTERED, UP_TO_DATE, Project, aliases, built, copy, make, versions
from servers import Host
from test_clean import logged, store_of, wait_until
from test_ingest import offer, photo

from touchline.commands import forget as forgetting
from touchline.commands.forget_search import Traces, search, thumbnails
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.files import read_table, write_json, write_table
from touchline.core.params import Params, SampleParams
from touchline.core.paths import Paths
from touchline.data import forgotten, served
from touchline.data.forgotten import Forgotten, author_digest, origin_digest
from touchline.data.served import Asked
from touchline.data.thumbnails import jpeg, thumbnail
from touchline.sources import feedback, named, sample
from touchline.stages import ingest
from touchline.tracking import registry, runs
from touchline.tracking.runs import StoredModel

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
    assert forget(paths, params, "folder", gone) == 4  # two files and their rows
    assert manifest.read_text() == 'file;author\nb.jpg;"Bo; Example"\n'
    left = {file.name for file in (paths.project / "incoming").rglob("*.jpg")}
    assert left == {"b.jpg", "c.jpg"}  # without its row nothing would say whose d.jpg is
    # Brought back by hand: the same photo under another name, other bytes under the old one, and one by the author.
    offer(paths, {"soccer/same.jpg": photo(1), "rugby/a.jpg": photo(5), "soccer/d.jpg": photo(4)})
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


SCENES = [
    each.read()
    for each in islice(sample.candidates(SampleParams(per_class=10, seed=99), ["rugby", "soccer"]), 2)
    if each.read
]
AUTHOR = "Jürgen O'Example"


def left_of(root: Path, content: bytes, names: list[str]) -> set[str]:
    """Files that hold a photo's bytes, its thumbnail, its digest or a name; told without the code under test."""
    pictures = [jpeg(thumbnail(content, side)) for side in (160, 240)]
    wanted = [content, digest(content)[:16].encode(), *(picture[-300:-40].encode() for picture in pictures)]
    wanted += [form.encode() for name in names for form in (name, json.dumps(name), name.replace("'", "&#39;"))]

    def pieces(file: Path) -> Iterator[bytes]:
        yield file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                yield from (archive.read(name) for name in archive.namelist())

    files = (file for file in root.rglob("*") if file.is_file() and ".git" not in file.relative_to(root).parts)
    return {
        file.relative_to(root).as_posix()
        for file in files
        for piece in pieces(file)
        if any(each in piece or each in piece.replace(b"\0", b"") for each in wanted)
    }


def test_the_search_looks_into_archives_databases_arrays_and_pages(paths: Paths) -> None:
    content = SCENES[0]
    root = paths.project
    picture, name = jpeg(thumbnail(content, 240)), digest(content)[:16]
    with zipfile.ZipFile(root / "model.keras", "w") as archive:
        archive.writestr("inner.jpg", content)
    np.savez(root / "reference.npz", digests=np.array(["0" * 64, digest(content)]), rows=np.zeros(3))
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE tags (key TEXT, value TEXT, run TEXT)")
        database.execute("INSERT INTO tags VALUES ('author', ?, '0123')", [AUTHOR])
    # A text right beside another in the file, so that neither a name nor a digest ends where its letters do.
    with closing(sqlite3.connect(root / "served.sqlite")) as database, database:
        database.execute("CREATE TABLE answers (model TEXT, photo TEXT)")
        database.execute("INSERT INTO answers VALUES (?, ?)", ["b" * 64, digest(content)])
    for file, text in {
        "in.tar": tar_of({"a.jpg": content}), "named.tar": tar_of({f"{name}.jpg": b"x"}), "as it is": content,
        "page.html": f'<img src="data:image/jpeg;base64,{picture}">'.encode(),
        "escaped.json": json.dumps({"author": AUTHOR}).encode(),
        "table.csv": f"path,class\ndata/photos/rugby/{name}.jpg,rugby\n".encode(),
        "other.csv": b"path,class\ndata/photos/rugby/0123456789abcdef.jpg,rugby\n",
        "longer.txt": f"x{AUTHOR}x".encode(), "other.html": f"base64,{jpeg(thumbnail(SCENES[1], 240))}".encode(),
        "src/code.py": content, "passed over": content,
    }.items():  # fmt: skip
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(text)
    photos = dict.fromkeys([digest(content), *thumbnails(content)], digest(content))
    found = search(paths, Traces(photos, [AUTHOR]), [root / "passed over"])
    assert {file.name: bool(hits - {""}) for file, hits in found.items()} == {
        "model.keras": True, "reference.npz": True, "mlflow.db": False, "served.sqlite": True, "in.tar": True,
        "named.tar": True, "as it is": True, "page.html": True, "escaped.json": False, "table.csv": True,
    }  # fmt: skip


ROWS = [
    {"sha256": letter * 64, "source": "openimages", "origin": letter, "author": author, "author_page": page}
    for letter, author, page in [
        ("a", "Ann Example", "https://example.com/ann"), ("b", "Ann E.", "https://example.com/ann"),
        ("c", "Bo Example", ""), ("d", "", ""),
    ]
]  # fmt: skip


@pytest.mark.parametrize("name", ["ann  example", "Ann E.", "https://example.com/ann"])
def test_an_author_with_two_names_is_one_by_the_page(name: str) -> None:
    written, rows = forgetting._of_author(ROWS, name, forgetting.Task())
    assert [row["origin"] for row in rows] == ["a", "b"]
    assert {"Ann Example", "Ann E.", "https://example.com/ann"} <= set(written)


@pytest.mark.parametrize("name,told", [("", "--author"), ("Bob Example", "Bo Example")])
def test_an_author_without_a_name_or_a_photo_is_one_line(name: str, told: str) -> None:
    with pytest.raises(TouchlineError, match=told) as raised:
        forgetting._of_author(ROWS, name, forgetting.Task())
    assert "\n" not in str(raised.value)


def test_a_file_of_decisions_that_is_empty_or_no_table_is_no_traceback(paths: Paths, params_with: ParamsWith) -> None:
    paths.decisions.parent.mkdir()
    paths.decisions.write_text("")
    forgetting._delete_rows(paths, params_with(), forgetting.Task(["a" * 64]))
    paths.decisions.write_text("not a table\n")
    with pytest.raises(TouchlineError, match=r"decisions\.csv, line 1"):
        forgetting._delete_rows(paths, params_with(), forgetting.Task(["a" * 64]))


def test_digits_name_one_photo_in_all_its_classes_and_never_two(paths: Paths) -> None:
    rows = [*ROWS, {**ROWS[0], "class": "soccer"}, {**ROWS[0], "sha256": "a" * 63 + "b"}]
    assert len(forgetting._rows_of_photo(paths, rows[:5], "a" * 8, forgetting.Task())) == 2
    assert len(forgetting._rows_of_photo(paths, rows, "a" * 64, forgetting.Task())) == 2
    table = paths.project / "data/photos.csv"  # a file, and no photo
    table.parent.mkdir(exist_ok=True)
    table.write_text("path,class\n")
    for name in ("a" * 9, "rugby", "aaa"):
        with pytest.raises(ParamsError):
            forgetting._rows_of_photo(paths, rows, name, forgetting.Task())
    with (
        patch.object(forgetting, "_cache", return_value=paths.project / ".dvc/cache"),
        pytest.raises(TouchlineError, match=r"photos\.csv"),
    ):
        forgetting._rows_of_photo(paths, rows, str(table), forgetting.Task())


def test_rows_about_the_photo_go_and_the_others_stay_as_they_were_typed(paths: Paths, params_with: ParamsWith) -> None:
    photo_, other = "a" * 64, "b" * 64
    url = "https://example.com/a.jpg"
    columns = ["sha256", "class", "source", "origin", "reason"]
    write_table(
        paths.ledger,
        pd.DataFrame([[each, "rugby", "folder", "x", "small"] for each in (photo_, other)], columns=columns),
    )
    entries = [{"url": url, "absent": 404}, {"url": f"{url}2", "sha256": other}, {"url": "u", "sha256": photo_}]
    paths.journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    kept = f'\ufeffphoto,decision,label,who,why\r\n{other[:16]},keep,,"me, you","two\nlines"\r\n\r\n'
    near = f"{'c' * 16},keep,,Bo,"
    gone = f'data/photos/rugby/{photo_[:16]}.jpg,drop,,me,"asked by\nAnn"\n{photo_[:9]},drop,,,\n'
    named = f"{near}near-duplicate of data/photos/rugby/{photo_[:16]}.jpg\r\n"  # as the review tab notes it
    paths.decisions.write_bytes(f"{kept}{gone}{named}".encode())
    with closing(sqlite3.connect(paths.project / "served.sqlite")) as database, database:
        database.executescript("PRAGMA journal_mode = WAL; CREATE TABLE answers (photo TEXT, label TEXT)")
        database.executemany("INSERT INTO answers VALUES (?, 'rugby')", [(photo_,), (other,)])
    task = forgetting.Task([photo_], names=[url])
    for _ in range(2):
        forgetting._delete_rows(paths, params_with(), task)
        forgetting._delete_answers(paths.project / "served.sqlite", task.photos)
        assert read_table(paths.ledger, dtype=str)["sha256"].tolist() == [other]
        assert [json.loads(line) for line in paths.journal.read_text().splitlines()] == entries[1:2]
        assert paths.decisions.read_bytes().decode() == f"{kept}{near}\r\n"
    files = paths.project.glob("served.sqlite*")
    assert not any(photo_.encode() in file.read_bytes() for file in files)
    assert other.encode() in (paths.project / "served.sqlite").read_bytes()


def kept(paths: Paths, rows: list[dict[str, str]]) -> None:
    columns = ["path", "class", "source", "sha256", "author", "author_page", "origin"]
    write_table(paths.photos_table, pd.DataFrame(rows, columns=columns, dtype=str).fillna(""))


def told(paths: Paths, params: Params, **named: list[str]) -> forgetting.Task:
    """What `touchline forget` would do."""
    with patch.object(forgetting, "_cache", return_value=paths.project / ".dvc/cache"):
        return forgetting._task(paths, params, *(named.get(key, []) for key in ("photos", "authors", "origins")))


def test_what_rights_left_out_is_found_by_its_author_and_origin(paths: Paths, params_with: ParamsWith) -> None:
    params = params_with(ingest={"sources": ["folder"], "folder": "incoming"})
    offer(paths, {"rugby/a.jpg": photo(1), "rugby/b.jpg": photo(2), "soccer/c.jpg": photo(3)})
    (paths.project / "incoming/manifest.csv").write_text("file,author\nrugby/a.jpg,Ann Example\n")
    kept(paths, [{"sha256": digest(photo(3)), "source": "folder", "origin": "soccer/c.jpg"}])
    assert told(paths, params, authors=["ann example"]).photos == [digest(photo(1))]
    task = told(paths, params, origins=["rugby/b.jpg"])
    assert (task.photos, task.origins) == ([digest(photo(2))], [["folder", "rugby/b.jpg"]])
    with pytest.raises(TouchlineError, match="Bo Example"):
        told(paths, params, authors=["Bo Example"])


def test_on_another_machine_all_that_is_by_a_forgotten_author_goes(paths: Paths, params_with: ParamsWith) -> None:
    kept(paths, ROWS)
    forgotten.add(paths.forgotten, Forgotten(authors=frozenset({author_digest("https://example.com/ann")})))
    assert told(paths, params_with()).photos == ["a" * 64, "b" * 64]


def test_an_author_who_is_called_as_a_class_is_not_looked_for_by_name(paths: Paths, params_with: ParamsWith) -> None:
    kept(paths, [{**ROWS[0], "author": "rugby"}, ROWS[2]])
    task = told(paths, params_with(), authors=["rugby"])
    assert task.photos == ["a" * 64] and task.traces.of(b"class,rugby") == set()
    assert task.traces.of(b"by https://example.com/ann") == {""}


def test_a_photo_that_was_only_asked_about_leaves_the_record_and_the_logs_of_flows(
    paths: Paths, params_with: ParamsWith
) -> None:
    content, other = SCENES[0], "b" * 64
    with served.Recorder(paths.served, params_with().monitor, "transfer", "c" * 64, keep_photos=True) as recorder:
        for asked in (recorder.asked(content, np.zeros((96, 96, 3), np.uint8)), Asked(other, 1)):
            recorder.add(asked, "no answer", wait=True)
    history = paths.project / ".prefect/prefect.db"
    history.parent.mkdir()
    with closing(sqlite3.connect(history)) as database, database:
        database.executescript("CREATE TABLE log (message TEXT); CREATE TABLE artifact (data TEXT)")
        for line in (f"rejected: data/photos/rugby/{digest(content)[:16]}.jpg", "all is well"):
            database.execute("INSERT INTO log VALUES (?)", [line])
    params = params_with()
    task = told(paths, params, photos=[digest(content)[:12]])
    assert task.photos == [digest(content)] and {"data/served", ".prefect"} <= set(task.places)
    forgotten.add(paths.forgotten, task.gone)
    (paths.workspace / "dvc.yaml").touch()
    forgetting._delete_files(paths, params, task)
    assert left_of(paths.project, content, []) == {"data/forgotten.csv"}
    assert list(served.read(paths.served)["photo"]) == [other]
    with closing(sqlite3.connect(history)) as database:
        assert database.execute("SELECT message FROM log").fetchall() == [("all is well",)]


def test_heat_maps_anywhere_in_the_project_are_told_of(paths: Paths, params_with: ParamsWith) -> None:
    (paths.project / "album").mkdir()
    (paths.project / "album/a.jpg.touchline.jpg").write_bytes(b"a photo, and others like it")
    told_of = list(forgetting._out_of_reach(paths, params_with(), forgetting.Task(), []))
    assert any("album/a.jpg.touchline.jpg" in line for line in told_of)


def test_a_copy_of_an_older_commit_takes_nothing_that_the_project_forgot(paths: Paths, params_with: ParamsWith) -> None:
    params = params_with(ingest={"sources": ["folder"], "folder": "incoming", "min_per_class": 1})
    offer(paths, {"rugby/a.jpg": photo(1), "rugby/b.jpg": photo(2), "soccer/c.jpg": photo(3)})
    forgotten.add(paths.project / "data/forgotten.csv", Forgotten(frozenset({digest(photo(1))})))
    clone = Paths(paths.project / ".prefect/clone", paths.project)
    assert ingested(clone, params) == {"rugby/b.jpg", "soccer/c.jpg"}


NAMES = [AUTHOR, "jürgen.jpg"]


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Project:
    """A project in which every store has something of a photo that no stage uses: SCENES[0], by AUTHOR."""
    project = copy(built(tmp_path_factory).project, tmp_path / "the project")
    root, content = project.root, SCENES[0]
    # Of an earlier commit: the photo, and the table that says whose it is.
    table = read_table(root / "data/photos.csv")
    row = {"sha256": digest(content), "author": AUTHOR, "source": "folder", "origin": "rugby/jürgen.jpg"}
    table.loc[[0]].assign(**row).to_csv(root / "old.csv", index=False, lineterminator="\n")
    (root / "old.jpg").write_bytes(content)
    project.dvc("add", "--quiet", "old.csv", "old.jpg")
    for file in root.glob("old.*"):
        file.unlink()
    # The page of the app and the audit have it too, and so have a version in MLflow and the page of its run.
    feedback.remember(root / "data/feedback", content, "rugby", [])
    page = root / "reports/audit.html"
    page.write_text(f'<img src="data:image/jpeg;base64,{jpeg(thumbnail(content, 240))}">')
    store, run_id = store_of(project), logged(project, "an old run", old=False, model=True)
    store.client.log_artifact(run_id, str(page))
    model = store.client.get_logged_model(str(runs.logged_model(store, run_id)))
    write_json(Path(url2pathname(urlsplit(model.artifact_location).path), StoredModel.PHOTOS), [digest(content)])
    registry.set_alias(store, REGISTERED, "old", registry.register(store, REGISTERED, run_id, {}, ""))
    assert len(left_of(root, content, NAMES)) >= 6
    return project


def test_a_photo_of_an_old_commit_leaves_every_store_and_the_champion_stays(project: Project) -> None:
    champion = aliases(project)["champion"]
    # As long as it is not known what one of our models learned from, nothing is forgotten.
    [listed, *_] = (project.root / "mlflow/artifacts").rglob(StoredModel.PHOTOS)
    away = listed.rename(listed.with_name("away"))
    said = project.call("forget", digest(SCENES[0])[:12], "--yes", exit_code=1)
    assert StoredModel.PHOTOS in said.err and said.err.count("\n") == 1
    away.rename(listed)
    project.call("forget", digest(SCENES[0])[:12], "--yes")
    assert "MLFLOW_TRACKING_URI" not in os.environ  # `mlflow gc` sets it, and other projects would be looked for there
    assert unreceipted(project.root, SCENES[0], NAMES) == {"data/forgotten.csv"}
    [receipt] = [json.loads(file.read_text()) for file in (project.root / "reports/forgotten").glob("*.json")]
    assert receipt["photos"] == [digest(SCENES[0])]
    assert not receipt["second_search"]["places"] and not receipt["second_search"]["models"]
    assert {".dvc/cache", "data/feedback", "mlflow/artifacts"} <= set(receipt["removed"])
    assert [version for each in receipt["models"] for version in each["versions"]] == [f"{REGISTERED} 2"]
    assert not any(word in json.dumps(receipt, ensure_ascii=False) for word in ("rgen", "Example"))
    assert [version.number for version in versions(project)] == [1] and aliases(project)["champion"] == champion


@pytest.mark.slow
def test_nothing_happens_without_yes_and_a_remote_that_is_away_is_asked_again_by_the_next_run(project: Project) -> None:
    project.dvc("remote", "add", "away", "http://127.0.0.1:9/")
    before = left_of(project.root, SCENES[0], NAMES)
    assert "--yes" in project.call("forget", digest(SCENES[0])[:12]).out
    assert left_of(project.root, SCENES[0], NAMES) == before
    said = project.call("forget", "--author", AUTHOR.upper(), "--remote", "away", "--yes", exit_code=1)
    assert "away" in said.err and said.err.count("\n") == 1
    assert unreceipted(project.root, SCENES[0], NAMES) == {"data/forgotten.csv", ".dvc/tmp/forget.json"}
    project.call("forget", "--yes")
    assert unreceipted(project.root, SCENES[0], NAMES) == {"data/forgotten.csv"}
    receipt = json.loads(max((project.root / "reports/forgotten").glob("*.json")).read_text())
    assert any("away" in place for place in receipt["out_of_reach"])
    assert UP_TO_DATE in project.dvc("status")


@pytest.mark.slow
def test_an_author_leaves_a_whole_project_however_often_it_is_killed_and_comes_back_from_nowhere(
    tmp_path: Path,
) -> None:
    project = make(tmp_path / "the project", {"ingest.sources": ["folder", "feedback"]})
    root = project.root
    scenes = islice(sample.candidates(SampleParams(per_class=60, seed=5), ["rugby", "soccer"]), 120)
    rows = [("file", "author")]
    for number, scene in enumerate(scenes):
        file = root / "data/incoming" / scene.label / f"{number:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(scene.read())
        rows.append((f"{scene.label}/{file.name}", AUTHOR if number in {6, 7, 40} else f"Author {number}"))
    pd.DataFrame(rows[1:], columns=rows[0]).to_csv(root / "data/incoming/manifest.csv", index=False)
    project.dvc("repro")
    project.commit("with all photos")
    project.dvc("remote", "add", "--default", "store", str(tmp_path / "a remote"))
    project.dvc("push", "--quiet")
    table = read_table(root / "data/photos.csv")
    theirs = table[table["author"] == AUTHOR]
    contents = {row.origin: (root / row.path).read_bytes() for row in theirs.itertuples()}
    assert len(contents) == 3
    learned = set(project.json("models/transfer.json")["training_photos"])
    assert learned & set(theirs["sha256"])
    champion = aliases(project)["champion"]
    command = ["forget", "--author", AUTHOR, "--retire", "--remote", "store", "--yes"]

    with psutil.Popen(
        ["touchline", *command], cwd=root, env=project.environment(), stdout=subprocess.DEVNULL
    ) as process:  # fmt: skip
        wait_until(lambda: not (root / theirs["path"].iloc[0]).exists() and process.children())
        of_it = process.children(recursive=True)
        process.kill()
    assert process.returncode == -9
    psutil.wait_procs(of_it, 300)
    for step in ("_remove_from_mlflow", "_collect", "_conclude"):
        with patch.object(forgetting, step, side_effect=SystemExit(9)):
            project.call(*command, exit_code=9)
    project.call(*command)

    for content in contents.values():
        assert unreceipted(root, content, [AUTHOR]) == {"data/forgotten.csv"}
        assert left_of(tmp_path / "a remote", content, [AUTHOR]) == set()
    assert set(project.json("reports/metrics.json")["models"]) == {"transfer"}
    assert not list((root / "models").glob("cnn.*"))
    assert set(theirs["sha256"]).isdisjoint(project.json("models/transfer.json")["training_photos"])
    assert aliases(project)["champion"] == project.json("models/transfer.json")["model_sha256"] != champion
    assert all(
        registry.training_photos(store_of(project), REGISTERED, version.number).isdisjoint(theirs["sha256"])
        for version in versions(project)
    )
    receipt = json.loads(max((root / "reports/forgotten").glob("*.json")).read_text())
    assert {alias for each in receipt["models"] for alias in each["aliases"]} >= {"champion"}
    assert receipt["figures"]["before"].keys() == {"cnn", "transfer"}
    assert UP_TO_DATE in project.dvc("status")

    for origin, content in contents.items():
        (root / "data/incoming" / origin).write_bytes(content)
        feedback.remember(root / "data/feedback", content, "rugby", [])
    project.dvc("repro")
    assert set(theirs["sha256"]).isdisjoint(read_table(root / "data/photos.csv")["sha256"])
    for content in contents.values():
        places = {file.rpartition("/")[0] for file in unreceipted(root, content, [])}
        assert {place.removesuffix("/rugby").removesuffix("/soccer") for place in places} == {
            "data", "data/incoming", "data/feedback",
        }  # fmt: skip


def unreceipted(root: Path, content: bytes, names: list[str]) -> set[str]:
    """`left_of` without receipts, which name photos by digest."""
    return {file for file in left_of(root, content, names) if not file.startswith("reports/forgotten/")}
