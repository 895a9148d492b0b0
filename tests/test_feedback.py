"""Corrections that people gave at the page: the queue, and what `ingest` makes of it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import names
from test_ingest import ingested, offer, photo

from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.sources import feedback
from touchline.stages import ingest

ANSWERS = [{"model": "rugby-soccer version 3", "label": "soccer", "probabilities": {"rugby": 0.1, "soccer": 0.9}}]


@pytest.fixture
def both(params_with: Callable[..., Params]) -> Params:
    return params_with(ingest={"sources": ["folder", "feedback"], "folder": "incoming"})


def say(paths: Paths, number: int, label: str) -> bool:
    return feedback.remember(paths.feedback, photo(number), label, ANSWERS)


def digest(number: int) -> str:
    return hashlib.sha256(photo(number)).hexdigest()


def entry(paths: Paths, number: int) -> dict[str, Any]:
    return json.loads((paths.feedback / f"{digest(number)}.json").read_text())


def rows(table: pd.DataFrame, number: int) -> list[tuple[str, str]]:
    found = table[table["sha256"] == digest(number)]
    return list(zip(found["source"], found["class"], strict=True))


def test_an_entry_is_the_photos_own_bytes_and_what_was_said_of_it(paths: Paths) -> None:
    assert say(paths, 1, "rugby")
    assert (paths.feedback / f"{digest(1)}.jpg").read_bytes() == photo(1)
    found = entry(paths, 1)
    assert found.pop("when").endswith("+00:00")
    assert found == {"photo": f"{digest(1)}.jpg", "label": "rugby", "answers": ANSWERS}


def test_the_same_said_twice_is_one_entry_and_changes_no_file(paths: Paths) -> None:
    say(paths, 1, "rugby")
    before = {path.name: path.stat().st_mtime_ns for path in paths.feedback.iterdir()}
    assert not say(paths, 1, "rugby")
    assert {path.name: path.stat().st_mtime_ns for path in paths.feedback.iterdir()} == before
    assert len(before) == 2


def test_what_is_said_last_of_a_photo_counts(paths: Paths, both: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    say(paths, 3, "rugby")
    assert say(paths, 3, "soccer")
    assert len(list(paths.feedback.iterdir())) == 2
    assert rows(ingested(paths, both), 3) == [("feedback", "soccer")]


def test_a_photo_from_the_page_is_a_row_with_its_terms(paths: Paths, both: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    say(paths, 3, "rugby")
    row = ingested(paths, both).set_index("sha256").loc[digest(3)]
    assert (row["class"], row.source, row.licence, row.author) == (
        "rugby", "feedback", "given by the person at the page", ""
    )  # fmt: skip
    assert row.path == f"data/photos/rugby/{digest(3)[:16]}.jpg"
    assert (paths.workspace / row.path).read_bytes() == photo(3)
    assert digest(3)[:16] in (paths.workspace / "data/ATTRIBUTION.csv").read_text()


def test_a_correction_wins_over_another_source_whose_row_keeps_its_terms_and_group(paths: Paths, both: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "rugby/c.jpg": photo(3), "soccer/b.jpg": photo(2)})
    (paths.project / "incoming/manifest.csv").write_text("file,group,licence,author\nrugby/a.jpg,g1,CC BY 4.0,Ann\n")
    say(paths, 1, "soccer")
    table = ingested(paths, both)
    assert rows(table, 1) == [("folder", "soccer")]
    row = table.set_index("sha256").loc[digest(1)]
    assert (row.group, row.licence, row.author, row.origin) == ("g1", "CC BY 4.0", "Ann", "rugby/a.jpg")
    assert (paths.workspace / row.path).read_bytes() == photo(1)
    assert sorted(path.name for path in paths.photos.rglob("*.jpg")) == sorted(
        f"{digest(number)[:16]}.jpg" for number in (1, 2, 3)
    )
    assert rows(table, 3) == [("folder", "rugby")]


def test_a_correction_says_which_class_a_photo_that_is_filed_under_both_is_of(paths: Paths, both: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    say(paths, 1, "rugby")
    assert rows(ingested(paths, both), 1) == [("folder", "rugby"), ("folder", "rugby")]


@pytest.mark.parametrize("sources", [["folder", "feedback"], ["feedback", "folder"]])
def test_corrections_are_taken_where_the_classes_are_full(
    paths: Paths, params_with: Callable[..., Params], sources: list[str]
) -> None:
    offer(paths, {f"{label}/{n}.jpg": photo(10 + n) for label in ("rugby", "soccer") for n in range(3)})
    for number in (1, 2, 3):
        say(paths, number, "rugby")
    table = ingested(paths, params_with(ingest={"sources": sources, "folder": "incoming", "per_class": 2}))
    assert (table["source"] == "feedback").sum() == 3


def test_without_the_source_the_queue_is_left_alone(paths: Paths, params_with: Callable[..., Params]) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    say(paths, 1, "soccer")
    table = ingested(paths, params_with(ingest={"sources": ["folder"], "folder": "incoming"}))
    assert rows(table, 1) == [("folder", "rugby")] and len(table) == 2


def test_a_photo_without_its_record_and_what_a_dead_process_left_are_no_entries(paths: Paths, both: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    paths.feedback.mkdir(parents=True)
    (paths.feedback / f"{digest(3)}.jpg").write_bytes(photo(3))
    (paths.feedback / ".partial-999999999-x.json").write_text("{")
    (paths.feedback / "README.md").write_text("# Photos given at the page\n")
    assert set(ingested(paths, both)["source"]) == {"folder"}
    assert not (paths.feedback / ".partial-999999999-x.json").exists()
    # It becomes one when it is said again.
    say(paths, 3, "rugby")
    assert rows(ingested(paths, both), 3) == [("feedback", "rugby")]


def spoil_class(record: Path) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | {"label": "cricket"}))


def lead_elsewhere(record: Path) -> None:
    photo = record.with_suffix(".jpg")
    photo.rename(record.parent.parent / photo.name)
    record.write_text(json.dumps({"photo": f"../{photo.name}", "label": "rugby"}))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lead_elsewhere, ["photo"]),
        (spoil_class, ["'cricket'", "rugby", "soccer"]),
        (lambda record: record.with_suffix(".jpg").unlink(), ["photo"]),
        (lambda record: record.write_text("[]"), ["photo"]),
        (lambda record: record.write_text('{"photo": "../params.yaml", "label": "rugby"}'), ["photo"]),
        (lambda record: record.write_text("{"), ["JSON"]),
    ],
)
def test_an_entry_that_was_spoilt_by_hand_is_one_line_that_names_it(
    paths: Paths, both: Params, spoil: Callable[[Path], None], named: list[str]
) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    say(paths, 1, "rugby")
    record = paths.feedback / f"{digest(1)}.json"
    spoil(record)
    with pytest.raises(TouchlineError) as caught:
        ingested(paths, both)
    assert names(str(caught.value), f"feedback/{record.name}", *named) and "\n" not in str(caught.value)
    # Nothing of it was taken, and without it all is well.
    assert not paths.photos_table.exists()
    record.unlink()
    assert rows(ingested(paths, both), 1) == [("folder", "rugby")]


def test_the_plan_says_how_many_there_are(paths: Paths, both: Params) -> None:
    offer(paths, {"rugby/a.jpg": photo(1), "soccer/b.jpg": photo(2)})
    say(paths, 1, "rugby")
    say(paths, 2, "rugby")
    planned = ingest.plan(paths, both)[-1]
    assert (planned.what, planned.state, planned.licence) == (
        "2 photos given at the page", "there already", feedback.LICENCE
    )  # fmt: skip
