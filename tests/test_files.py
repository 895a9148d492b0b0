"""Files are whole or not there, and what is not readable is one line that says what to do."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from touchline.core import files
from touchline.core.errors import TouchlineError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_ends_well_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "reports/metrics.json"
    files.write_json(path, {"accuracy": 0.5})
    files.write_json(path, {"accuracy": 0.75, "class": "Ré"})
    assert json.loads(path.read_bytes()) == {"accuracy": 0.75, "class": "Ré"}
    assert path.read_bytes().endswith(b"}\n")
    assert names_in(path.parent) == ["metrics.json"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    path.write_text("old")

    def fail_half_way() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["split.csv"]


def test_a_file_that_cannot_get_its_name_leaves_nothing_behind(tmp_path: Path) -> None:
    file = files.Unsafe(tmp_path / "photo.jpg", b"photo")
    file.flush()
    (tmp_path / "photo.jpg").mkdir()
    with pytest.raises(IsADirectoryError):
        file.settle()
    assert names_in(tmp_path) == ["photo.jpg"] and (tmp_path / "photo.jpg").is_dir()


def test_a_temporary_file_lies_beside_its_target_with_the_ending_a_writer_wants(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "cnn.keras", ".keras") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".keras")
        assert temporary.name.startswith(".partial-")


def test_files_are_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    files.write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    assert names_in(tmp_path) == []


def test_a_table_comes_back_as_it_was_with_empty_text_empty(tmp_path: Path) -> None:
    table = pd.DataFrame({"class": ["NA", "null", "a, b"], "group": ["", "x", "é\n"], "width": [1, 2, 3]})
    files.write_table(tmp_path / "photos.csv", table)
    pd.testing.assert_frame_equal(files.read_table(tmp_path / "photos.csv"), table)


@settings(deadline=None, database=None, derandomize=True)
@given(texts=st.lists(st.text("a=+-@'\";,|\t\n\r \uff1d"), min_size=1, max_size=20))
def test_texts_that_look_like_formulas_come_back_as_they_were(texts: list[str]) -> None:
    table = pd.DataFrame({"title": texts, "width": range(-1, len(texts) - 1)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photos.csv")
        files.write_table(path, table)
        assert list(files.read_table(path)["title"]) == texts


def test_what_a_killed_writer_left_can_be_swept_away(tmp_path: Path) -> None:
    (tmp_path / "rugby").mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = ("rugby/.partial-abc", f".partial-{ended.pid}-def.keras", f".partial-{os.getpid()}-of-an-earlier-life")
    # The parent of this process lives.
    being_written = f".partial-{os.getppid()}-ghi"
    for name in (*left, being_written, "rugby/photo.jpg"):
        (tmp_path / name).write_text("x")
    with files.replacing(tmp_path / "ours.json") as temporary:
        files.remove_partials(tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
            [being_written, temporary.name, "photo.jpg"]
        )


def test_a_process_that_ends_itself_leaves_nothing_half_written_and_begins_nothing_more(tmp_path: Path) -> None:
    script = """
import os, sys, threading
from pathlib import Path
from touchline.core import files
folder = Path(sys.argv[1])
def write_on():
    while True:
        files.write_text(folder / "other.txt", "x")
threading.Thread(target=write_on, daemon=True).start()
with files.replacing(folder / "model.keras", ".keras"):
    files.abandon()
    os._exit(1)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == 1
    assert set(names_in(tmp_path)) <= {"other.txt"}


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    # A class may be called 1, a group 007.
    table = pd.DataFrame({"path": ["a"], "class": ["1"], "group": ["007"], "sha256": ["12e4"], "width": [640]})
    files.write_table(tmp_path / "table.csv", table)
    pd.testing.assert_frame_equal(files.read_table(tmp_path / "table.csv"), table)


@pytest.mark.parametrize("read", [files.read_json, files.read_table])
def test_a_missing_file_says_what_makes_it(tmp_path: Path, read) -> None:
    with pytest.raises(TouchlineError) as error:
        read(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value) and "`dvc repro`" in str(error.value)


@pytest.mark.parametrize(
    "read, content, what",
    [
        (files.read_json, b'{"accuracy": 0.', "JSON"),
        (files.read_json, b"", "JSON"),
        (files.read_json, b"\xff\xfe\x00", "JSON"),
        (files.read_table, b"", "table"),
        (files.read_table, b"path,class\n" + b"a,b,c,d\n" * 2 + b"a,b,c\n" + b"a,b,c,d,e\n", "table"),
        (files.read_table, b'path,class\n"a.jpg,rug', "table"),
        (files.read_table, b"path,class\n\xff\xfe,rugby\n", "table"),
        (files.read_table, b"path,class\na.jpg,rugby\nb.jpg", "table"),
    ],
)
def test_a_torn_file_is_one_line(tmp_path: Path, read, content: bytes, what: str) -> None:
    path = tmp_path / "torn"
    path.write_bytes(content)
    with pytest.raises(TouchlineError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path} is not ") and f"readable {what}" in message
    assert message.endswith(files.RENEW) and "\n" not in message


def test_the_umask_is_left_as_it_was(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "private", "")
        assert (tmp_path / "private").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
