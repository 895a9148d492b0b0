"""Doubtful photos and what is decided of them: the lists, the lines of data/decisions.csv, and what takes them back."""

import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from touchline.commands import audit, review
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, sha256, write_json, write_table
from touchline.core.paths import Paths
from touchline.data import decisions
from touchline.sources import feedback

CLASSES = ["rugby", "soccer"]


@pytest.fixture
def decide(paths: Paths) -> Any:
    def decided(photo: str, kind: str = "keep", label: str = "", who: str = "Ann", why: str = "") -> str:
        return decisions.add(paths, CLASSES, photo, kind, label, who, why)

    return decided


def lines(paths: Paths) -> list[str]:
    return paths.decisions.read_bytes().decode().splitlines()


def test_a_decision_says_who_and_when_and_the_reader_follows_it(paths: Paths, decide: Any) -> None:
    line = decide("aaaaaaaaaa", "relabel", "soccer", who=' Ann,\n=1+1 "x"', why="=cmd()")
    assert lines(paths)[0] == "photo,decision,label,who,why,when" and lines(paths)[1] == line
    [found] = decisions.read(paths.decisions, CLASSES)
    assert (found.photo, found.kind, found.label) == ("aaaaaaaaaa", "relabel", "soccer")
    assert "\n" not in found.who and found.why.startswith("'=")
    assert line.rpartition(",")[2].endswith("+00:00")


@pytest.mark.parametrize(
    "before",
    [
        "photo,decision,label,who,why\n11111111,drop,,Bo,\n",
        "\ufeffphoto,decision,label,who,why\r\n11111111,drop,,Bo,\r\n",
        "photo,decision,label,who,why\n11111111,drop,,Bo,",
        'who,photo,more,decision,label,why\nBo,11111111,"a, b",drop,,\n',
        "photo,decision,label,who,why,when\n11111111,drop,,Bo,\n",
    ],
    ids=["by hand", "from a spreadsheet", "without a last line break", "other columns", "a line without when"],
)
def test_a_file_from_before_is_added_to_and_given_back(paths: Paths, decide: Any, before: str) -> None:
    paths.decisions.parent.mkdir()
    paths.decisions.write_bytes(before.encode())
    line = decide("22222222", "relabel", "rugby")
    assert [(each.photo, each.kind) for each in decisions.read(paths.decisions, CLASSES)] == [
        ("11111111", "drop"), ("22222222", "relabel"),
    ]  # fmt: skip
    assert decisions.take_back(paths, line) and not decisions.take_back(paths, line)
    assert [each.photo for each in decisions.read(paths.decisions, CLASSES)] == ["11111111"]
    assert lines(paths)[1] == before.splitlines()[1]


def test_a_photo_has_one_decision(paths: Paths, decide: Any) -> None:
    decide("data/photos/rugby/0123456789abcdef.jpg", "drop", who="Bo")
    assert decide("0123456789abcdef0123", "drop") == ""
    with pytest.raises(TouchlineError, match="Bo"):
        decide("0123456789abcdef0123", "keep")
    assert len(lines(paths)) == 2


def test_many_decide_at_once_and_no_line_is_lost(paths: Paths, decide: Any) -> None:
    def some(number: int) -> None:
        for each in range(10):
            line = decide(f"{number}{each}00000000", "drop")
            if each % 2:
                assert decisions.take_back(paths, line)

    threads = [threading.Thread(target=some, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decisions.read(paths.decisions, CLASSES)) == 20


@pytest.fixture
def project(paths: Paths, params_with: Any) -> review.Review:
    """Six photos: three with likely wrong labels, of which one got another class since; two near each other."""
    rows = []
    for number, label in enumerate(["rugby", "rugby", "soccer", "soccer", "soccer", "rugby"]):
        photo = paths.workspace / "data/photos" / label / "new.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number * 40, 90, 90)).save(photo)
        digest = sha256(photo)
        photo = photo.rename(photo.with_name(f"{digest[:16]}.jpg"))
        rows.append({"path": paths.relative(photo), "sha256": digest, "class": label, "source": "folder",
                     "licence": ""})  # fmt: skip
    photos = pd.DataFrame(rows)
    write_table(paths.photos_table, photos)
    write_table(paths.validated_table, photos)
    found = [
        {**rows[0], "problem": audit.WRONG_LABEL, "score": 0.7, "suggested": "soccer", "near_to": ""},
        {**rows[2], "problem": audit.WRONG_LABEL, "score": 0.9, "suggested": "rugby", "near_to": ""},
        {**rows[1], "class": "soccer", "problem": audit.WRONG_LABEL, "score": 1, "suggested": "rugby", "near_to": ""},
        {**rows[3], "problem": audit.NEAR_DUPLICATE, "score": 0.8, "suggested": "", "near_to": rows[4]["path"]},
    ]
    write_table(paths.reports / "audit.csv", pd.DataFrame(found).drop(columns="source"))
    write_json(paths.reports / "registration.json", {"better_model": "cnn"})
    write_json(paths.reports / "metrics.json", {"unknown": {"cnn": {"threshold": 0.3}}})
    said = [(rows[4], 0.55, 0.9), (rows[5], 0.99, 0.1), (rows[0], 0.99, 0.9)]
    predictions = [
        {"path": row["path"], "class": row["class"], "model": "cnn", "predicted": "rugby", "confidence": confidence}
        for row, confidence, _ in said
    ]
    similar = [
        {"model": "cnn", "subset": "test", "path": row["path"], "similarity": similarity} for row, _, similarity in said
    ]
    write_table(paths.reports / "predictions.csv", pd.DataFrame(predictions))
    write_table(paths.reports / "similarity.csv", pd.DataFrame(similar))
    return review.Review(paths, params_with(), lambda content, without: ("cnn says rugby", "", {"rugby": []}))


def photos(paths: Paths) -> list[str]:
    return list(read_table(paths.photos_table)["path"])


def test_the_largest_doubt_comes_first_and_what_the_audit_did_not_see_is_left_out(
    project: review.Review, paths: Paths
) -> None:
    known = photos(paths)
    assert [each.photo for each in project.items(audit.WRONG_LABEL)] == [known[2], known[0]]
    [pair] = project.items(audit.NEAR_DUPLICATE)
    assert (pair.photo, pair.near) == (known[3], paths.workspace / known[4])
    assert [(each.photo, each.suggested) for each in project.items(review.DOUBTFUL)] == [
        (known[5], "rugby"), (known[4], "rugby"),
    ]  # fmt: skip
    assert ["unknown" in each.why for each in project.items(review.DOUBTFUL)] == [True, False]


def test_a_photo_that_may_not_be_shown_is_not(project: review.Review, paths: Paths) -> None:
    table = read_table(paths.photos_table)
    table.loc[2, "source"] = "imagenet"
    write_table(paths.photos_table, table)
    assert [each.photo for each in project.items(audit.WRONG_LABEL)] == [photos(paths)[0]]


def test_what_is_settled_leaves_the_list_and_undo_brings_it_back(project: review.Review, paths: Paths) -> None:
    known, session, name = photos(paths), review.Session(), audit.WRONG_LABEL
    assert project.act(session, name, known[2], "relabel", "rugby", "Ann") == ""
    assert session.at == known[0]
    assert lines(paths)[-1].startswith(f"{known[2]},relabel,rugby,Ann,looks like rugby,20")
    # A class that it has already is a photo to keep.
    project.act(session, name, known[0], "relabel", "rugby", "Ann")
    assert lines(paths)[-1].startswith(f"{known[0]},keep,,Ann") and project.items(name) == []
    assert 'id="left">0<' in project.page(session, name)
    assert [project.act(session, name, "", "undo", "", "Ann") for _ in range(2)] == ["", ""]
    assert len(project.items(name)) == 2 and len(lines(paths)) == 1 and session.at == known[2]
    assert project.act(session, name, "", "undo", "", "Ann") != ""
    project.act(session, audit.NEAR_DUPLICATE, known[3], "drop", "", "Ann")
    assert project.items(audit.NEAR_DUPLICATE) == []


def test_a_pair_whose_other_photo_is_dropped_is_settled(project: review.Review, paths: Paths) -> None:
    project.act(review.Session(), review.DOUBTFUL, photos(paths)[4], "drop", "", "Ann")
    assert project.items(audit.NEAR_DUPLICATE) == []


def test_what_a_browser_makes_up_does_nothing(project: review.Review, paths: Paths) -> None:
    session, [first, _] = review.Session(), project.items(audit.WRONG_LABEL)
    assert project.act(session, audit.WRONG_LABEL, "params.yaml", "drop", "", "Ann") != ""
    for act, label in (("relabel", "tennis"), ("delete", "")):
        with pytest.raises(TouchlineError):
            project.act(session, audit.WRONG_LABEL, first.photo, act, label, "Ann")
    assert not paths.decisions.exists() and session.done == []


def test_corrections_of_people_are_looked_at_again(project: review.Review, paths: Paths, tmp_path: Path) -> None:
    said = {"guess": "soccer", "confidence": 0.9}
    content = (tmp_path / "a.png", tmp_path / "b.png")
    for number, file in enumerate(content):
        Image.new("RGB", (40, 30), (9, 9, number)).save(file)
        feedback.remember(paths.feedback, file.read_bytes(), ["rugby", "soccer"][number], [said])
    first, second = project.items(review.CORRECTED)
    assert (first.label, first.suggested, first.doubt) == ("rugby", "soccer", 0.9) and second.doubt == 0
    project.act(review.Session(), review.CORRECTED, first.photo, "relabel", "soccer", "Ann")
    [decision] = decisions.read(paths.decisions, CLASSES)
    assert sha256(content[0]).startswith(decision.photo) and decision.label == "soccer"
    assert project.items(review.CORRECTED) == [second]


def test_a_photo_without_a_label_is_given_one(project: review.Review, paths: Paths, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 30), (number, 200, 0)).save(file)
        rows.append((str(file), sha256(file), "unsure", "rugby", 0.9 - number / 10))
    table = pd.DataFrame(rows, columns=["photo", "sha256", "label", "guess", "doubt"])
    write_table(paths.reports / review.SUGGESTED, table)
    session, name = review.Session(), review.NEXT
    first, second, third = (each.photo for each in project.items(name))
    project.act(session, name, first, "relabel", "soccer", "Ann")
    project.act(session, name, second, "keep", "", "Ann")
    project.act(session, name, third, "drop", "", "Ann")
    assert {each.sha256[:16]: each.label for each in feedback.entries(paths.feedback)} == {
        first: "soccer", second: "rugby",
    }  # fmt: skip
    assert 'id="left">0<' in project.page(session, name) and not paths.decisions.exists()
    assert [project.act(session, name, "", "undo", "", "Ann") for _ in range(3)] == [""] * 3
    assert feedback.entries(paths.feedback) == [] and len(project.items(name)) == 3


def test_a_page_escapes_names_and_says_what_is_wrong(project: review.Review, paths: Paths) -> None:
    page = project.page(review.Session(), audit.WRONG_LABEL, "<script>")
    assert "<script>" not in page and "&lt;script&gt;" in page and 'data-key="2"' in page
    paths.decisions.write_text("photo\n")
    assert "decisions.csv" in project.page(review.Session(), audit.WRONG_LABEL)
