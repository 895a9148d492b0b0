"""What to label next: the planted model's doubts, photos unlike each other, and what is left out."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_predict
from conftest import names
from test_predict import draw

from touchline.commands import review, suggest
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, sha256, write_table
from touchline.core.params import load
from touchline.core.paths import Paths
from touchline.data import forgotten
from touchline.data.forgotten import Forgotten
from touchline.sources import feedback

# With the tests of photos: starting TensorFlow is most of what both cost.
pytestmark = pytest.mark.xdist_group("test_predict")
project, somewhere = test_predict.project, test_predict.somewhere


def test_doubt_is_of_the_classes_or_of_what_was_never_seen() -> None:
    probabilities = np.array([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
    assert suggest.doubt(probabilities, None) == pytest.approx([1, 0, 0], abs=1e-6)
    assert suggest.doubt(probabilities, np.array([90, 90, 2])) == pytest.approx([1, 0.1, 0.98])


def test_what_is_chosen_is_doubtful_and_unlike_what_was_chosen_before() -> None:
    features = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], float)
    assert suggest.chosen(np.array([0.9, 0.8, 0.5, 0.1]), features, 2) == [0, 2]
    # A folder of fewer photos than were asked for is listed whole, each photo once.
    assert sorted(suggest.chosen(np.ones(4), features, 9)) == [0, 1, 2, 3]


@pytest.fixture
def ask(project: Paths, somewhere: Path, capsys: Any) -> Any:
    paths = Paths(somewhere, somewhere)
    (somewhere / "models").symlink_to(project.models)

    def asked(*wanted: str, count: int = 20, form: str = "json") -> tuple[list[dict[str, Any]], str, Any]:
        error = None
        try:
            suggest.run(paths, load(project.workspace / "params.yaml"), wanted, "cnn", count, form)
        except TouchlineError as raised:
            error = raised
        out, notes = capsys.readouterr()
        rows = [json.loads(line) for line in out.splitlines()] if form == "json" else out
        return rows, notes, error

    asked.paths = paths
    return asked


def test_the_most_doubtful_photos_are_listed_and_kept_for_the_page(ask: Any, somewhere: Path) -> None:
    for name, colour in (("sure.png", "red"), ("doubtful.png", "neither"), ("below/blue.png", "blue")):
        draw(somewhere / "new" / name, colour)
    (somewhere / "new/notes.txt").write_text("not an image")
    rows, _, error = ask("new", count=2)
    assert error is None and len(rows) == 2
    assert (Path(rows[0]["photo"]).name, rows[0]["label"]) == ("doubtful.png", "unsure")
    assert rows[0]["doubt"] > 0.99 > rows[1]["doubt"] and rows[0]["similarity"] is None
    kept = read_table(ask.paths.reports / review.SUGGESTED)
    assert list(kept["photo"]) == [str(somewhere / "new/doubtful.png"), rows[1]["photo"]]
    assert kept["sha256"][0] == sha256(somewhere / "new/doubtful.png")
    table, _, _ = ask("new", form="table")
    assert all(text in table for text in ("photo", "doubt", "doubtful.png", "unsure"))
    listed, _, _ = ask("new", form="csv")
    assert next(csv.DictReader(io.StringIO(listed)))["photo"] == rows[0]["photo"]


def test_photos_with_a_label_and_copies_are_left_out_and_what_is_broken_is_named(ask: Any, somewhere: Path) -> None:
    known, given, new = (draw(somewhere / "new" / f"{name}.png", name) for name in ("red", "blue", "neither"))
    (somewhere / "new/copy.png").write_bytes(new.read_bytes())
    (somewhere / "new/torn.png").write_bytes(new.read_bytes()[:-20])
    row = {"path": "data/photos/rugby/a.png", "sha256": sha256(known), "class": "rugby"}
    write_table(ask.paths.photos_table, pd.DataFrame([row]))
    feedback.remember(ask.paths.feedback, given.read_bytes(), "rugby", [])
    rows, notes, error = ask("new", "missing.jpg")
    assert [row["sha256"] for row in rows] == [sha256(new)]
    assert names(notes, "torn.png", "missing.jpg") and names(str(error), "2") and error.exit_code == 1
    forgotten.add(ask.paths.forgotten, Forgotten(frozenset({sha256(new)})))
    _, _, error = ask("new/neither.png")
    assert error.exit_code == 1
    _, _, error = ask("new/red.png")
    assert names(str(error), "new/red.png") and error.exit_code == 1
