"""Stored arrays: what is there is kept, what is missing is computed, what is torn is computed again."""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from touchline.core.errors import TouchlineError
from touchline.data import feature_store
from touchline.data.feature_store import Arrays

SETTINGS = {"image_size": 2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "PIECE", 8)


def digests(*numbers: int) -> list[str]:
    return [sha256(str(number).encode()).hexdigest() for number in numbers]


def row(digest: str, factor: int = 1) -> np.ndarray:
    """A row that tells which photo it belongs to: uint16, shape (2, 3)."""
    return np.arange(6, dtype=np.uint16).reshape(2, 3) * factor + int(digest[:3], 16)


class Computer:
    """Computes rows and remembers which it was asked for."""

    def __init__(self, factor: int = 1, fails_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.factor, self.fails_after = factor, fails_after

    def __call__(self, wanted: Sequence[str]) -> Iterator[np.ndarray]:
        for done, digest in enumerate(wanted):
            if done == self.fails_after:
                raise TouchlineError("photo does not decode")
            self.asked.append(digest)
            yield row(digest, self.factor)


def assert_holds(folder: Path, wanted: Sequence[str], factor: int = 1) -> None:
    expected = np.stack([row(digest, factor) for digest in wanted])
    np.testing.assert_array_equal(Arrays(folder)[wanted], expected)


def pieces(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def test_rows_are_streamed_as_they_lie_each_with_its_place_in_what_was_asked_for(tmp_path: Path) -> None:
    known = digests(*range(20))
    feature_store.update(tmp_path, SETTINGS, known, Computer())
    wanted = [known[17], known[3], known[11], known[3]]
    stream = Arrays(tmp_path).stream(wanted)
    assert len(stream) == 4
    for _ in range(2):  # as often as one likes
        found = np.zeros((4, 2, 3), np.uint16)
        for positions, rows in stream:
            found[positions] = rows
        np.testing.assert_array_equal(found, np.stack([row(digest) for digest in wanted]))
    with pytest.raises(TouchlineError):
        Arrays(tmp_path).stream(digests(99))


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    wanted = digests(*range(20))
    assert feature_store.update(tmp_path, SETTINGS, wanted, Computer()) == 20
    assert_holds(tmp_path, wanted)
    assert_holds(tmp_path, [wanted[17], wanted[3], wanted[11], wanted[3]])
    assert Arrays(tmp_path)[wanted[:5]].dtype == np.uint16
    assert Arrays(tmp_path).settings == SETTINGS


def test_the_same_again_computes_and_writes_nothing(tmp_path: Path) -> None:
    wanted = digests(*range(20))
    feature_store.update(tmp_path, SETTINGS, wanted, Computer())
    before = pieces(tmp_path)
    again = Computer()
    assert feature_store.update(tmp_path, SETTINGS, wanted[::-1], again) == 0
    assert (again.asked, pieces(tmp_path)) == ([], before)


def test_ten_more_photos_compute_ten(tmp_path: Path) -> None:
    feature_store.update(tmp_path, SETTINGS, digests(*range(100, 120)), Computer())
    full = {name: time for name, time in pieces(tmp_path).items() if len(np.load(tmp_path / name)) == 8}
    wanted = digests(*range(95, 125))
    computer = Computer()
    assert feature_store.update(tmp_path, SETTINGS, wanted, computer) == 10
    assert sorted(computer.asked) == sorted(digests(*range(95, 100), *range(120, 125)))
    assert_holds(tmp_path, wanted)
    assert len(full) == 2 and full.items() < pieces(tmp_path).items()


def test_removed_photos_go_and_the_others_are_not_computed_again(tmp_path: Path) -> None:
    wanted = digests(*range(20))
    feature_store.update(tmp_path, SETTINGS, wanted, Computer())
    left = [digest for digest in wanted if digest not in (wanted[0], wanted[9], wanted[19])]
    assert feature_store.update(tmp_path, SETTINGS, left, Computer()) == 0
    assert_holds(tmp_path, left)
    assert sum(len(np.load(path)) for path in tmp_path.glob("*.npy")) == 17
    with pytest.raises(TouchlineError):
        Arrays(tmp_path)[wanted[:1]]


def test_other_settings_compute_everything_anew(tmp_path: Path) -> None:
    wanted = digests(*range(20))
    feature_store.update(tmp_path, SETTINGS, wanted, Computer())
    assert feature_store.update(tmp_path, {"image_size": 3}, wanted, Computer(factor=2)) == 20
    assert_holds(tmp_path, wanted, factor=2)
    assert Arrays(tmp_path).settings == {"image_size": 3}


@pytest.mark.parametrize("lose", [Path.unlink, lambda file: file.write_text('{"image_si')], ids=["gone", "torn"])
def test_rows_whose_settings_are_not_known_are_not_kept(tmp_path: Path, lose: Callable[[Path], object]) -> None:
    # A run with new settings that is killed while it clears the folder can leave rows of the old ones.
    wanted = digests(*range(20))
    feature_store.update(tmp_path, SETTINGS, wanted, Computer())
    lose(tmp_path / "settings.json")
    assert feature_store.update(tmp_path, {"image_size": 3}, wanted, Computer(factor=2)) == 20
    assert_holds(tmp_path, wanted, factor=2)


def test_an_interrupted_run_keeps_its_finished_pieces(tmp_path: Path) -> None:
    wanted = digests(*range(20))
    with pytest.raises(TouchlineError, match="does not decode"):
        feature_store.update(tmp_path, SETTINGS, wanted, Computer(fails_after=17))
    computer = Computer()
    assert feature_store.update(tmp_path, SETTINGS, wanted, computer) == 4
    assert sorted(computer.asked) == sorted(wanted[16:])
    assert_holds(tmp_path, wanted)


def test_a_run_interrupted_while_packing_anew_loses_no_row(tmp_path: Path) -> None:
    wanted = digests(*range(12))
    feature_store.update(tmp_path, SETTINGS, wanted, Computer())
    more = digests(*range(1, 30))
    with pytest.raises(TouchlineError, match="does not decode"):
        feature_store.update(tmp_path, SETTINGS, more, Computer(fails_after=10))
    computer = Computer()
    feature_store.update(tmp_path, SETTINGS, more, computer)
    assert not set(computer.asked) & set(wanted)
    assert_holds(tmp_path, more)


@pytest.mark.parametrize(
    "tear",
    [
        lambda piece: piece.write_bytes(piece.read_bytes()[:-20]),
        lambda piece: piece.write_bytes(b""),
        lambda piece: piece.unlink(),
        lambda piece: piece.with_suffix(".txt").unlink(),
        lambda piece: piece.with_suffix(".txt").write_text("".join(f"{d}\n" for d in digests(0, 1))),
    ],
    ids=["rows cut off", "rows empty", "rows gone", "list gone", "list cut off"],
)
def test_a_torn_piece_is_computed_again(tmp_path: Path, tear: Callable[[Path], object]) -> None:
    wanted = digests(*range(20))
    feature_store.update(tmp_path, SETTINGS, wanted, Computer())
    tear(next(piece for piece in tmp_path.glob("*.npy") if len(np.load(piece)) == 8))
    assert feature_store.update(tmp_path, SETTINGS, wanted, Computer()) == 8
    assert_holds(tmp_path, wanted)


@pytest.mark.parametrize("content", [b"", b"no array", b"\xff\xfe"])
@pytest.mark.parametrize("ending", [".npy", ".txt"])
def test_reading_a_torn_piece_is_one_line(tmp_path: Path, content: bytes, ending: str) -> None:
    feature_store.update(tmp_path, SETTINGS, digests(1, 2), Computer())
    next(tmp_path.glob(f"*{ending}")).write_bytes(content)
    with pytest.raises(TouchlineError, match="`dvc repro`"):
        Arrays(tmp_path)[digests(1)]


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".partial-abc.npy").write_bytes(b"half a piece")
    feature_store.update(tmp_path, SETTINGS, digests(1, 2), Computer())
    assert len(list(tmp_path.iterdir())) == 3  # the settings, one piece and its list


def test_what_a_person_put_into_the_folder_stays_and_disturbs_nothing(tmp_path: Path) -> None:
    feature_store.update(tmp_path, SETTINGS, digests(1, 2), Computer())
    (tmp_path / "mine.npy").write_bytes(b"no array")
    (tmp_path / "old").mkdir()
    assert feature_store.update(tmp_path, SETTINGS, digests(1, 2), Computer()) == 0
    feature_store.update(tmp_path, {**SETTINGS, "image_size": 7}, digests(3), Computer())
    assert_holds(tmp_path, digests(3))
    assert feature_store.remove(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.npy", "old"]
    assert not feature_store.remove(tmp_path)


def test_a_missing_photo_says_what_to_do(tmp_path: Path) -> None:
    feature_store.update(tmp_path, SETTINGS, digests(1, 2), Computer())
    absent = digests(3)[0]
    with pytest.raises(TouchlineError) as error:
        Arrays(tmp_path)[digests(1, 3)]
    assert all(word in str(error.value) for word in (str(tmp_path), absent[:16], "`dvc repro`"))


def test_rows_are_read_mapped_not_loaded_whole(tmp_path: Path) -> None:
    wanted = digests(*range(16))
    large = np.ones((512, 512), np.uint8)
    feature_store.update(tmp_path, SETTINGS, wanted, lambda missing: (large for _ in missing))
    tracemalloc.start()
    try:
        Arrays(tmp_path)[[wanted[3], wanted[12]]]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 2 * large.nbytes <= peak < 4 * large.nbytes  # of sixteen


def test_what_is_handed_out_is_a_copy(tmp_path: Path) -> None:
    wanted = digests(*range(20))
    feature_store.update(tmp_path, SETTINGS, wanted, Computer())
    stored = Arrays(tmp_path)
    stored[wanted[:2]][:] = 0
    np.testing.assert_array_equal(stored[wanted[:1]], [row(wanted[0])])
    assert_holds(tmp_path, wanted)


def test_rows_of_two_engines_stand_side_by_side_and_both_are_noted(tmp_path: Path) -> None:
    def compute(wanted: Sequence[str]) -> Iterator[np.ndarray]:
        return (np.zeros(2, np.float32) for _ in wanted)

    both = digests(1, 2)
    assert feature_store.update(tmp_path, {"image_size": 8}, both[:1], compute, "first 1") == 1
    assert feature_store.update(tmp_path, {"image_size": 8}, both[:1], compute, "second 1") == 0
    assert Arrays(tmp_path).settings == {"image_size": 8, "engines": ["first 1"]}
    assert feature_store.update(tmp_path, {"image_size": 8}, both, compute, "second 1") == 1
    assert Arrays(tmp_path).settings == {"image_size": 8, "engines": ["first 1", "second 1"]}
    assert feature_store.update(tmp_path, {"image_size": 9}, both, compute, "second 1") == 2
    assert Arrays(tmp_path).settings == {"image_size": 9, "engines": ["second 1"]}
