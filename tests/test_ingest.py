"""Photos of one's own folder, through the `ingest` stage, into data/photos and its table."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import names
from PIL import Image

from touchline.core import files
from touchline.core.errors import ParamsError, TouchlineError
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.sources import Candidate, sample
from touchline.stages import ingest

ParamsWith = Callable[..., Params]


def photo(seed: int, file_format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 36, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


def offer(paths: Paths, contents: dict[str, bytes]) -> None:
    """Put files into the folder that photos are taken from."""
    for name, content in contents.items():
        path = paths.project / "incoming" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def ingested(paths: Paths, params: Params) -> pd.DataFrame:
    ingest.run(paths, params)
    return files.read_table(paths.photos_table, dtype={"group": str, "author": str, "licence": str, "subset": str})


@pytest.fixture
def params(params_with: ParamsWith) -> Params:
    return params_with(ingest={"sources": ["folder"], "folder": "incoming"})


def stored(paths: Paths) -> dict[str, int]:
    """Every file under data/photos with the time of its last change."""
    return {paths.relative(path): path.stat().st_mtime_ns for path in paths.photos.rglob("*") if path.is_file()}


def test_a_photo_is_filed_under_its_class_by_the_digest_of_its_bytes(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    table = ingested(paths, params)
    assert tuple(table.columns) == ingest.COLUMNS
    digest = hashlib.sha256(photo(1)).hexdigest()
    row = table.set_index("origin").loc["rugby/a.jpg"]
    assert row.path == f"data/photos/rugby/{digest[:16]}.jpg"
    assert (row["class"], row.source, row.sha256) == ("rugby", "folder", digest)
    assert (row.bytes, row.width, row.height) == (len(photo(1)), 36, 24)
    assert (row.licence, row.author, row.group, row.subset) == ("", "", "", "")
    assert (paths.workspace / row.path).read_bytes() == photo(1)
    assert set(stored(paths)) == set(table["path"])


def test_nested_folders_are_gone_through_and_hidden_files_left_out(paths: Paths, params: Params) -> None:
    offer(
        paths,
        {
            "rugby/2019/final/a.jpg": photo(1),
            "rugby/b.jpg": photo(2),
            "rugby/.DS_Store": b"x",
            "rugby/.cache/c.jpg": photo(3),
            "soccer/d.jpg": photo(4),
            "cricket/e.jpg": photo(5),  # no class of ours
        },
    )
    assert list(ingested(paths, params)["origin"]) == ["rugby/2019/final/a.jpg", "rugby/b.jpg", "soccer/d.jpg"]


def test_a_split_that_comes_with_the_photos_is_kept(paths: Paths, params: Params) -> None:
    names = ["train/rugby/a.jpg", "train/soccer/b.jpg", "test/rugby/c.jpg", "test/soccer/d.jpg"]
    offer(paths, {name: photo(number) for number, name in enumerate(names)})
    table = ingested(paths, params)
    assert list(table["origin"]) == names
    assert list(table["subset"]) == ["train", "train", "test", "test"]
    assert list(table["class"]) == ["rugby", "soccer", "rugby", "soccer"]


@pytest.mark.parametrize("name", ["valid", "val", "validation", "dev", "Val"])
def test_a_validation_folder_that_comes_with_the_photos_is_the_validation_subset(
    paths: Paths, params: Params, name: str
) -> None:
    places = [f"{part}/{label}" for part in ("train", name, "test") for label in ("rugby", "soccer")]
    offer(paths, {f"{place}/a.jpg": photo(number) for number, place in enumerate(places)})
    table = ingested(paths, params)
    assert set(zip(table["origin"].str.split("/").str[0], table["subset"], strict=True)) == {
        ("train", "train"), (name, "validation"), ("test", "test"),
    }  # fmt: skip


@pytest.mark.parametrize("parts", [["train"], ["test"], ["train", "val"], ["val"], ["val", "test"]])
def test_a_split_without_training_or_test_photos_is_an_error(paths: Paths, params: Params, parts: list[str]) -> None:
    offer(paths, {f"{part}/{label}/a.jpg": photo(1) for part in parts for label in ("rugby", "soccer")})
    with pytest.raises(ParamsError, match=r"no (test|train)/"):
        ingest.run(paths, params)


def test_what_lies_beside_the_folders_in_use_is_named_with_its_photos(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {f"{part}/hockey/{number}.jpg": photo(number) for part in ("train", "holdout") for number in range(3)}
    offer(paths, extra | {"loose.jpg": photo(8)})
    offer(paths, {f"{part}/{label}/{part}.jpg": photo(9) for part in ("train", "test") for label in params.classes})
    assert len(ingested(paths, params)) == 4
    said = capsys.readouterr().out
    assert "train/hockey/ (3 photos" in said and "holdout/ (3 photos" in said and "loose.jpg" in said


def test_what_operating_systems_put_beside_photos_is_passed_over(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    junk = ["Icon\r", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/rugby/._a.jpg", "@eaDir/a.jpg"]
    offer(paths, {f"{folder}{name}": photo(3) for folder in ("", "rugby/") for name in junk})
    offer(paths, {"README.md": b"# Photos of your own, which data/incoming has"})
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    assert list(ingested(paths, params)["origin"]) == ["rugby/a.jpg", "soccer/b.jpg"]
    assert "left out" not in capsys.readouterr().out


def test_a_line_break_in_a_name_survives_every_table(paths: Paths, params: Params) -> None:
    names = [f"rugby/a{odd}b.jpg" for odd in ("\r", "\n", "\r\n", '"', ",", "\r,", "\u2028", "'", "\x0b")]
    offer(paths, {"soccer/b.jpg": photo(99)} | {name: photo(number) for number, name in enumerate(names)})
    table = ingested(paths, params)
    assert sorted(table["origin"]) == sorted([*names, "soccer/b.jpg"])
    assert set(table["class"]) == {"rugby", "soccer"}


def test_a_name_that_is_not_utf_8_is_one_line_with_what_to_do(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    (paths.project / "incoming/rugby" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(photo(3))
    with pytest.raises(TouchlineError, match=r"caf\\udce9\.jpg.*rename") as error:
        ingest.run(paths, params)
    str(error.value).encode()


@pytest.mark.parametrize("classes", [["0", "1"], ["null", "true"], ["1e3", "2024-01-01"]])
def test_classes_may_look_like_numbers_and_yaml_s_words(
    paths: Paths, params_with: ParamsWith, classes: list[str]
) -> None:
    offer(paths, {f"{label}/a.jpg": photo(number) for number, label in enumerate(classes)})
    ingest.run(paths, params_with(classes=classes, ingest={"sources": ["folder"], "folder": "incoming"}))
    assert sorted(files.read_table(paths.photos_table)["class"]) == sorted(classes)


def test_classes_may_be_called_train_and_test(paths: Paths, params_with: ParamsWith) -> None:
    params = params_with(classes=["train", "test"], ingest={"sources": ["folder"], "folder": "incoming"})
    offer(paths, {"train/steam.jpg": photo(1), "test/tube.jpg": photo(2)})
    table = ingested(paths, params)
    assert list(table["class"]) == ["train", "test"] and set(table["subset"]) == {""}


def test_a_manifest_gives_group_licence_and_author_and_a_column_of_another_name_is_named(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(paths, {"rugby/a b.jpg": photo(1), "soccer/b.jpg": photo(2)})
    (paths.project / "incoming/manifest.csv").write_text(
        'file,author,group,licence,camera\nrugby/a b.jpg,"Smith, J.",007,CC0,Leica\nrugby/gone.jpg,Nobody,1,CC0,Leica\n'
    )
    table = ingested(paths, params).set_index("class")
    assert tuple(table.loc["rugby", ["group", "licence", "author"]]) == ("007", "CC0", "Smith, J.")
    assert tuple(table.loc["soccer", ["group", "licence", "author"]]) == ("", "", "")
    assert names(capsys.readouterr().out, "manifest.csv", "camera")


@pytest.mark.parametrize(
    "heading, written",
    [
        ("file,group", "rugby\\a.jpg"),
        ("file,group", "./rugby/a.jpg"),
        ("file,group", "a.jpg"),
        ("file,group", "Rugby/A.JPG"),
        ("group, file", "7, rugby/a.jpg"),
        (" File ,Group", "rugby/a.jpg"),
        ("\ufefffile;group", "rugby/a.jpg"),
        ("file\tgroup", "rugby/a.jpg "),
    ],
)
def test_a_manifest_is_matched_as_a_person_means_it(paths: Paths, params: Params, heading: str, written: str) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    between = next(sign for sign in ",;\t" if sign in heading)
    row = written if between in written else f"{written}{between}7"
    (paths.project / "incoming/manifest.csv").write_text(f"{heading}\n{row}\n", encoding="utf-8")
    assert ingested(paths, params).set_index("origin").loc["rugby/a.jpg", "group"] == "7"


def test_rows_and_photos_that_do_not_match_are_counted_and_the_first_is_named(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that two photos have is no match either."""
    offer(paths, {f"{label}/{name}.jpg": photo(ord(name)) for label in ("rugby", "soccer") for name in "ab"})
    rows = "gone.jpg,1\na.jpg,2\nrugby/b.jpg,3\n"
    (paths.project / "incoming/manifest.csv").write_text(f"file,group\n{rows}")
    assert list(ingested(paths, params)["group"]) == ["", "3", "", ""]
    said = capsys.readouterr().out
    assert "2 of 3 rows" in said and "gone.jpg" in said and "3 of 4 photos" in said and "rugby/a.jpg" in said


@pytest.mark.parametrize(
    "content, says", [("", r"manifest\.csv"), ("name,group\nrugby/a.jpg,1\n", r"manifest\.csv.*`file`")]
)
def test_a_manifest_that_cannot_be_used_is_an_error(paths: Paths, params: Params, content: str, says: str) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    (paths.project / "incoming/manifest.csv").write_text(content)
    with pytest.raises(TouchlineError, match=says) as error:
        ingest.run(paths, params)
    assert "\n" not in str(error.value)


def test_the_content_names_the_file_not_its_name(paths: Paths, params: Params) -> None:
    broken = photo(3)[:30]
    offer(paths, {"rugby/a.jpg": photo(1, "PNG"), "rugby/broken.jpg": broken, "soccer/no-name": photo(2)})
    table = ingested(paths, params).set_index("origin")
    endings = {origin: Path(path).suffix for origin, path in table["path"].items()}
    # A damaged photo is kept for validation to reject, with its reason.
    assert endings == {"rugby/a.jpg": ".png", "rugby/broken.jpg": ".bin", "soccer/no-name": ".jpg"}
    assert table.loc["rugby/broken.jpg", "width"] == 0


def test_an_exact_duplicate_in_one_class_is_two_rows_of_one_file(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "rugby/copy.jpg": photo(1), "soccer/b.jpg": photo(2)})
    table = ingested(paths, params)
    assert list(table["origin"]) == ["rugby/a.jpg", "rugby/copy.jpg", "soccer/b.jpg"]
    assert table["path"].nunique() == len(stored(paths)) == 2


def test_one_photo_in_two_classes_is_two_files_of_one_digest(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/a.jpg": photo(1)})
    table = ingested(paths, params)
    assert table["sha256"].nunique() == 1
    assert len(stored(paths)) == 2


def test_names_that_a_shell_would_run_go_through_whole(paths: Paths, params_with: ParamsWith) -> None:
    classes = ["; rm -rf x", "soccer & 'friends'"]
    params = params_with(classes=classes, ingest={"sources": ["folder"], "folder": "incoming"})
    names = ["; rm -rf x/$(id).jpg", '; rm -rf x/`id`,"a".jpg', "soccer & 'friends'/--help\n.jpg"]
    offer(paths, {name: photo(number) for number, name in enumerate(names)})
    table = ingested(paths, params)
    assert sorted(table["origin"]) == sorted(names)
    assert set(table["class"]) == set(classes)
    assert all((paths.workspace / path).is_file() for path in table["path"])


@pytest.mark.parametrize(
    "there, says",
    [
        ([], r"ingest\.folder.*incoming.*<class>"),
        (["rugby/a.jpg"], r"'soccer'.*incoming.*rugby.*`classes`"),
        (["train/rugby/a.jpg", "train/soccer/a.jpg"], r"train/.*test/"),
        (["train/rugby/a.jpg", "test/rugby/a.jpg"], r"'soccer'.*train\b.*rugby"),
    ],
)
def test_a_folder_that_is_missing_is_named(paths: Paths, params: Params, there: list[str], says: str) -> None:
    offer(paths, dict.fromkeys(there, photo(1)))
    with pytest.raises(ParamsError, match=says) as error:
        ingest.run(paths, params)
    assert "\n" not in str(error.value)


def test_empty_folders_offer_no_photo(paths: Paths, params: Params) -> None:
    for label in params.classes:
        (paths.project / "incoming" / label).mkdir(parents=True)
    with pytest.raises(TouchlineError, match=r"folder.*`ingest\.sources`"):
        ingest.run(paths, params)


def test_an_experiment_takes_photos_from_the_project_not_from_its_copy(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    copy = Paths(paths.project / ".dvc/tmp/exps/abc", paths.project)
    copy.workspace.mkdir(parents=True)
    ingest.run(copy, params)
    assert len(stored(copy)) == 2 and not paths.photos.exists()


def test_a_second_run_rewrites_no_photo(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    first = ingested(paths, params)
    before = stored(paths)
    offer(paths, {"rugby/c.jpg": photo(3)})
    second = ingested(paths, params)
    assert before.items() < stored(paths).items()
    pd.testing.assert_frame_equal(second[second["origin"] != "rugby/c.jpg"].reset_index(drop=True), first)


def test_a_photo_torn_by_a_killed_run_is_fetched_again(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    path = paths.workspace / ingested(paths, params)["path"][0]
    path.write_bytes(photo(1)[:100])
    (path.parent / ".partial-xyz").write_bytes(b"half")
    ingested(paths, params)
    assert path.read_bytes() == photo(1)
    assert len(stored(paths)) == 2


def test_a_photo_no_longer_offered_goes(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "rugby/b.jpg": photo(2), "soccer/c.jpg": photo(3)})
    ingested(paths, params)
    assert len(stored(paths)) == 3
    (paths.project / "incoming/rugby/b.jpg").unlink()
    table = ingested(paths, params)
    assert list(table["origin"]) == ["rugby/a.jpg", "soccer/c.jpg"]
    assert set(stored(paths)) == set(table["path"])


@pytest.mark.parametrize(
    "damage", [lambda content: b"\0" * len(content), lambda content: content[:-9]], ids=["same size", "cut off"]
)
def test_a_photo_damaged_on_disk_is_taken_again(paths: Paths, params: Params, damage: Callable[[bytes], bytes]) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    ingested(paths, params)
    before = stored(paths)
    path = min(paths.photos.rglob("*.jpg"))
    path.write_bytes(damage(path.read_bytes()))
    for row in ingested(paths, params).itertuples():
        assert files.sha256(paths.workspace / row.path) == row.sha256
    # The other one is not written again.
    assert sum(before[name] == time for name, time in stored(paths).items()) == 1


def test_what_a_person_put_into_data_photos_stays_and_is_named(
    paths: Paths, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    ours = set(ingested(paths, params)["path"])
    own = {"data/photos/rugby/holiday.jpg", "data/photos/soccer/album/c.jpg"}
    for name in own:
        (paths.workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (paths.workspace / name).write_bytes(photo(3))
    assert set(ingested(paths, params)["path"]) == ours
    assert set(stored(paths)) == ours | own
    said = capsys.readouterr().out
    assert "data/photos/rugby/holiday.jpg" in said and "data/photos/soccer/album" in said


def test_a_class_no_longer_named_leaves_no_folder(paths: Paths, params: Params, params_with: ParamsWith) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2), "hockey/c.jpg": photo(3)})
    ingested(paths, params)
    folder = {"sources": ["folder"], "folder": "incoming"}
    ingested(paths, params_with(classes=["hockey", "soccer"], ingest=folder))
    assert sorted(path.name for path in paths.photos.iterdir()) == ["hockey", "soccer"]


def test_a_limit_a_class_takes_the_first_and_replaces_what_was_rejected(paths: Paths, params_with: ParamsWith) -> None:
    params = params_with(ingest={"sources": ["folder"], "folder": "incoming", "per_class": 2})
    names = [f"{label}/{number}.jpg" for label in ("rugby", "soccer") for number in range(4)]
    offer(paths, {name: photo(number) for number, name in enumerate(names)})
    assert list(ingested(paths, params)["origin"]) == ["rugby/0.jpg", "rugby/1.jpg", "soccer/0.jpg", "soccer/1.jpg"]

    # As validation writes it; the same name in another class, or of another source, is another photo.
    ledger = pd.DataFrame(
        [("rugby", "folder", "rugby/0.jpg"), ("soccer", "sample", "soccer/0.jpg"), ("rugby", "folder", "soccer/1.jpg")],
        columns=["class", "source", "origin"],
    )
    files.write_table(paths.ledger, ledger.assign(sha256="", reason="empty file"))
    assert list(ingested(paths, params)["origin"]) == ["rugby/1.jpg", "rugby/2.jpg", "soccer/0.jpg", "soccer/1.jpg"]


def test_two_sources_add_up(paths: Paths, params_with: ParamsWith) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    sources = {"sources": ["folder", "sample"], "folder": "incoming", "sample": {"per_class": 10, "seed": 1}}
    table = ingested(paths, params_with(ingest={**sources, "per_class": 5}))
    assert table.groupby(["class", "source"]).size().to_dict() == {
        ("rugby", "folder"): 1,
        ("rugby", "sample"): 4,
        ("soccer", "folder"): 1,
        ("soccer", "sample"): 4,
    }


def test_no_offer_is_drawn_once_there_is_no_room_for_it(
    paths: Paths, params_with: ParamsWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offers(*_: object) -> Iterator[Candidate]:
        for number, label in enumerate(["rugby", "rugby", "rugby", "soccer", "soccer"]):
            yield Candidate(label, "sample", f"{label}/{number}", lambda number=number: photo(number))
        pytest.fail("was asked for more than there is room for")

    monkeypatch.setattr(sample, "SOURCE", replace(sample.SOURCE, offers=offers, network=True))
    table = ingested(paths, params_with(ingest={"sources": ["sample"], "per_class": 2, "min_per_class": 2}))
    assert list(table["origin"]) == ["rugby/0", "rugby/1", "soccer/3", "soccer/4"]


def test_a_folder_that_brings_its_split_is_not_left_out_because_another_source_filled_the_classes(
    paths: Paths, params_with: ParamsWith
) -> None:
    names = [
        f"{subset}/{label}/{n}.jpg" for subset in ("train", "test") for label in ("rugby", "soccer") for n in range(3)
    ]
    offer(paths, {name: photo(number) for number, name in enumerate(names)})
    sources = {"sources": ["sample", "folder"], "folder": "incoming", "sample": {"per_class": 10, "seed": 1}}
    table = ingested(paths, params_with(ingest={**sources, "per_class": 2}))
    counts = table.groupby(["source", "subset", "class"]).size().to_dict()
    places = [("sample", ""), ("folder", "train"), ("folder", "test")]
    assert counts == {(*place, label): 2 for place in places for label in ("rugby", "soccer")}


def test_a_limit_holds_for_each_subset_of_a_folder_that_brings_its_split(paths: Paths, params_with: ParamsWith) -> None:
    names = [
        f"{subset}/{label}/{n}.jpg" for subset in ("train", "test") for label in ("rugby", "soccer") for n in range(3)
    ]
    offer(paths, {name: photo(number) for number, name in enumerate(names)})
    params = params_with(ingest={"sources": ["folder"], "folder": "incoming", "per_class": 2})
    counts = ingested(paths, params).groupby(["subset", "class"]).size()
    assert counts.to_dict() == {(subset, label): 2 for subset in ("train", "test") for label in ("rugby", "soccer")}


def test_a_stray_file_among_the_photos_stops_nothing(paths: Paths, params: Params) -> None:
    offer(paths, {"rugby/1.jpg": photo(1), "soccer/2.jpg": photo(2)})
    paths.photos.mkdir(parents=True)
    (paths.photos / ".DS_Store").write_bytes(b"left by a file manager")
    assert len(ingested(paths, params)) == 2
