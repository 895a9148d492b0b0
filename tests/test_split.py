"""The split: its shares, what stays together, what stays where it is, and what it says when it cannot."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from touchline.core import files
from touchline.core.errors import TouchlineError
from touchline.core.params import SUBSETS, Params, SplitParams
from touchline.core.paths import Paths
from touchline.data import similarity
from touchline.stages import split as splitting

CLASSES = ["rugby", "soccer"]
DEFAULTS = SplitParams(
    seed=42,
    test_share=0.2,
    validation_share=0.2,
    by_group=True,
    validation_by_group=True,
    method="hash",
    exact=False,
    test_groups=[],
    near_duplicate_bits=6,
)


def options(**changes: object) -> SplitParams:
    return SplitParams(**(DEFAULTS.model_dump() | changes))


def table(rows: Sequence[tuple[str, str, int]], given: Sequence[str] | None = None, first: int = 0) -> pd.DataFrame:
    """Photos of (class, group, perceptual hash), numbered from `first`: a number is a photo, whatever stands beside."""
    numbers = range(first, first + len(rows))
    return pd.DataFrame(
        {
            "path": [f"data/photos/{label}/{number}.jpg" for number, (label, _, _) in zip(numbers, rows, strict=True)],
            "class": [label for label, _, _ in rows],
            "sha256": [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers],
            "perceptual_hash": [f"{bits:016x}" for _, _, bits in rows],
            "group": [group for _, group, _ in rows],
            "subset": list(given) if given is not None else [""] * len(rows),
            **dict.fromkeys(("licence", "author", "origin", "title", "landing_page"), ""),
            "source": "folder",
            "width": "640",
            "height": "480",
        }
    )


def made_up(count: int, classes: Sequence[str] = CLASSES, groups: int = 0, first: int = 0) -> pd.DataFrame:
    """Photos that resemble nothing, of the classes in turn; with `groups`, of so many groups a class."""
    random = np.random.default_rng(first)
    labels = [classes[number % len(classes)] for number in range(count)]
    names = [f"{label}-{random.integers(groups)}" if groups else "" for label in labels]
    hashes = [int(bits) for bits in random.integers(0, 2**64, count, np.uint64)]
    return table(list(zip(labels, names, hashes, strict=True)), first=first)


def subsets(photos: pd.DataFrame, params: SplitParams = DEFAULTS) -> dict[str, str]:
    """Subset of each photo that is not left out, by its path."""
    split, _, _ = splitting.assign(photos, params)
    return dict(zip(split["path"], split["subset"], strict=True))


def shares(photos: pd.DataFrame, params: SplitParams = DEFAULTS) -> dict[tuple[str, str], float]:
    """Share of each class's photos that is in each subset."""
    split, _, _ = splitting.assign(photos, params)
    return split.groupby("class")["subset"].value_counts(normalize=True).to_dict()


def differing_bits(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


@pytest.mark.parametrize("classes", [CLASSES, ["rugby", "soccer", "hockey"]])
def test_four_fifths_train_and_a_fifth_of_them_validates(classes: list[str]) -> None:
    found = shares(made_up(2000, classes))
    assert set(found) == {(label, subset) for label in classes for subset in SUBSETS}
    for label in classes:
        assert found[label, "test"] == pytest.approx(0.20, abs=0.03)
        assert found[label, "validation"] == pytest.approx(0.16, abs=0.03)


def test_many_groups_come_near_the_shares_too() -> None:
    found = shares(made_up(2000, groups=150))
    assert found["rugby", "test"] == pytest.approx(0.2, abs=0.06)
    assert found["soccer", "test"] == pytest.approx(0.2, abs=0.06)


def test_exact_cuts_to_the_photo() -> None:
    photos = made_up(1001)
    counts = splitting.assign(photos, options(exact=True))[0].groupby(["class", "subset"]).size().to_dict()
    assert counts == {
        ("rugby", "test"): 100,  # of 501
        ("rugby", "validation"): 80,
        ("rugby", "train"): 321,
        ("soccer", "test"): 100,  # of 500
        ("soccer", "validation"): 80,
        ("soccer", "train"): 320,
    }


def test_exact_keeps_groups_whole_and_never_exceeds_the_share() -> None:
    photos = made_up(1000, groups=40)
    split, _, _ = splitting.assign(photos, options(exact=True))
    assert (split.groupby("group")["subset"].nunique() == 1).all()
    for _, members in split.groupby("class"):
        assert 0.15 < members["subset"].eq("test").mean() <= 0.2


def test_exact_keeps_a_group_of_two_classes_together() -> None:
    photos = made_up(400)
    # Of uneven sizes, so that a group fits into the share of one class and not into that of the other.
    photos["group"] = [f"album {number}" for number in np.random.default_rng(1).integers(30, size=400)]
    split, _, _ = splitting.assign(photos, options(exact=True))
    assert (split.groupby("group")["class"].nunique() == 2).all()
    assert (split.groupby("group")["subset"].nunique() == 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_stratified_gives_few_large_groups_to_every_subset(seed: int) -> None:
    # Six groups a class, as photos of a few tournaments: by hash many a seed leaves a class without test photos.
    split, _, _ = splitting.assign(made_up(600, groups=6), options(method="stratified", seed=seed))
    assert (split.groupby("group")["subset"].nunique() == 1).all()
    found = split.groupby("class")["subset"].value_counts(normalize=True)
    for label in CLASSES:
        assert all(0.08 < found[label, subset] < 0.35 for subset in ("test", "validation"))


@pytest.mark.parametrize("groups", [0, 10], ids=["single photos", "20 groups"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_stratified_gives_the_share_asked_for(share: float, groups: int) -> None:
    photos = made_up(600)
    if groups:
        photos["group"] = [f"{label}-{number // 2 % groups}" for number, label in enumerate(photos["class"])]
    found = splitting.assign(photos, options(method="stratified", test_share=share, validation_share=0.5))[0]
    for _, members in found.groupby("class"):
        # A group of thirty photos is a tenth of a class.
        assert members["subset"].eq("test").mean() == pytest.approx(share, abs=0.051 if groups else 0.01)


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_stratified_refuses_a_share_that_the_groups_cannot_give(share: float) -> None:
    photos = made_up(100, groups=1)
    with pytest.raises(TouchlineError, match=f"test share of {share}"):
        splitting.assign(photos, options(method="stratified", test_share=share))


@pytest.mark.parametrize("method", ["hash", "stratified"])
def test_a_seed_decides(method: str) -> None:
    photos = made_up(300, groups=30)
    first, again, other = (subsets(photos, options(method=method, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_order_of_the_photos_does_not_matter() -> None:
    photos = made_up(300, groups=30)
    assert subsets(photos.sample(frac=1, random_state=1).reset_index(drop=True)) == subsets(photos)


def test_test_and_validation_are_drawn_independently() -> None:
    # With one number for both, validation would be cut out of what the test subset left above its share.
    found = shares(made_up(2000), options(test_share=0.5, validation_share=0.5))
    assert found["rugby", "validation"] == pytest.approx(0.25, abs=0.04)


# The same examples each time: a test that fails now and then is no help to who changed something else.
PROPERTY = settings(deadline=None, derandomize=True, database=None)
# A handful of far-apart hashes, each a few bits off: plenty of near-duplicates, and chains of them.
HASHES = [0x0, 0xFFFF_0000_FFFF_0000, 0x00FF_00FF_00FF_00FF]


@st.composite
def photos_of_few_scenes(draw: st.DrawFn, at_most: int = 24) -> list[tuple[str, str, int]]:
    scene = st.sampled_from(HASHES)
    touch = st.lists(st.integers(0, 63), max_size=6).map(lambda bits: sum(1 << bit for bit in set(bits)))
    row = st.tuples(st.sampled_from(CLASSES), st.sampled_from(["", "", "", "a", "b", "c"]), scene, touch)
    rows = draw(st.lists(row, min_size=1, max_size=at_most))
    return [(label, group, base ^ flips) for label, group, base, flips in rows]


@settings(PROPERTY, max_examples=50)
@given(rows=photos_of_few_scenes(), seed=st.integers(0, 5), exact=st.booleans(), free_validation=st.booleans())
def test_neither_groups_nor_near_duplicates_straddle(
    rows: list[tuple[str, str, int]], seed: int, exact: bool, free_validation: bool
) -> None:
    photos = table(rows)
    params = options(seed=seed, exact=exact, validation_by_group=not free_validation)
    split, _, conflicts = splitting.assign(photos, params)

    named = photos.set_index("path")["group"][list(split["path"])].to_numpy()
    seen = split["subset"].eq("test") if free_validation else split["subset"]
    for group in {"a", "b", "c"} & set(named):
        assert seen[named == group].nunique() == 1
    rows_left = list(split[["perceptual_hash", "subset"]].itertuples(index=False))
    for number, one in enumerate(rows_left):
        for other in rows_left[number + 1 :]:
            if differing_bits(one.perceptual_hash, other.perceptual_hash) <= params.near_duplicate_bits:
                assert one.subset == other.subset
    # Nothing is lost in silence: a photo is in the split or among those left out.
    assert sorted([*split["path"], *(conflict.path for conflict in conflicts)]) == sorted(photos["path"])
    assert split["group"].ne("").all() and split["subset"].isin(SUBSETS).all()


def test_a_chain_of_near_duplicates_is_one_group() -> None:
    chain = [("rugby", "", (1 << 4 * length) - 1) for length in range(6)]
    split, _, _ = splitting.assign(table(chain), DEFAULTS)
    assert split["group"].nunique() == 1 and split["subset"].nunique() == 1


def test_photos_further_apart_than_the_limit_are_strangers() -> None:
    two = table([("rugby", "", 0), ("rugby", "", 0b111)])
    assert similarity.near_duplicates(two["perceptual_hash"], 3) == [(0, 1)]
    assert similarity.near_duplicates(two["perceptual_hash"], 2) == []


def test_hashes_are_compared_in_blocks_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    hashes = [f"{int(bits):016x}" for bits in random.integers(0, 2**12, 50)]
    at_once = similarity.near_duplicates(hashes, 2)
    expected = [
        (one, other)
        for one in range(50)
        for other in range(one + 1, 50)
        if differing_bits(hashes[one], hashes[other]) <= 2
    ]
    monkeypatch.setattr(similarity, "_PAIRS_AT_ONCE", 120)
    assert similarity.near_duplicates(hashes, 2) == at_once == expected != []


def test_groups_may_be_taken_apart() -> None:
    photos = made_up(600, groups=3)
    together, apart, validation_apart = (
        splitting.assign(photos, options(**changes))[0]
        for changes in ({}, {"by_group": False}, {"validation_by_group": False})
    )
    named = photos["group"]
    assert (together["subset"].groupby(named).nunique() == 1).all()
    assert (apart["subset"].groupby(named).nunique() == 3).all()
    assert (validation_apart["subset"].eq("test").groupby(named).nunique() == 1).all()
    assert set(validation_apart["subset"].groupby(named).nunique()) == {1, 2}


def test_near_duplicates_of_two_named_groups_are_left_out_where_they_are_judged() -> None:
    rows = [("rugby", "", 7919 * number << 20) for number in range(30)]
    rows += [("rugby", group, 0xABCD_EF01_2345_6789 ^ flip) for group, flip in (("shown", 0), ("learned", 1))]
    photos = table(rows)
    split, _, conflicts = splitting.assign(photos, options(test_groups=["shown"], near_duplicate_bits=2))
    shown, learned = photos["path"].iloc[-2:]
    assert [(conflict.path, conflict.subset, conflict.other) for conflict in conflicts] == [(shown, "test", learned)]
    assert learned in set(split["path"]) and shown not in set(split["path"])


def test_more_photos_move_no_old_one() -> None:
    old, new = made_up(500, groups=60), made_up(300, groups=90, first=500)
    before, after = subsets(old), subsets(pd.concat([old, new], ignore_index=True))
    assert before.items() <= after.items()


@settings(PROPERTY, max_examples=60)
@given(
    old=photos_of_few_scenes(16),
    new=photos_of_few_scenes(8),
    seed=st.integers(0, 20),
    by_group=st.booleans(),
    free_validation=st.booleans(),
)
def test_what_more_photos_move_is_listed_and_never_into_the_test_subset(
    old: list[tuple[str, str, int]],
    new: list[tuple[str, str, int]],
    seed: int,
    by_group: bool,
    free_validation: bool,
) -> None:
    params = options(
        seed=seed, by_group=by_group, validation_by_group=not free_validation, test_share=0.4, validation_share=0.4
    )
    before = subsets(table(old), params)
    split, moves, conflicts = splitting.assign(table(old + new), params)
    after = dict(zip(split["path"], split["subset"], strict=True))
    listed = {move.path for move in moves} | {conflict.path for conflict in conflicts}
    moved = {path for path, subset in before.items() if after.get(path) != subset}
    assert moved <= listed
    # A model has learned from the one, or was chosen by it: no champion may be judged by it later.
    assert not [path for path in moved if after.get(path) == "test"]
    assert not [path for path in moved if (before[path], after.get(path)) == ("train", "validation")]


def test_a_photo_that_a_near_duplicate_moves_is_told_with_from_and_to() -> None:
    strangers = made_up(400)
    before = subsets(strangers)
    judged = next(path for path, subset in before.items() if subset == "test")
    row = strangers.set_index("path").loc[judged]
    for number in range(400, 430):
        twin = table([(row["class"], "", int(row["perceptual_hash"], 16) ^ 1)], first=number)
        split, moves, conflicts = splitting.assign(pd.concat([strangers, twin], ignore_index=True), DEFAULTS)
        after = dict(zip(split["path"], split["subset"], strict=True))
        assert conflicts == [] and after[judged] == after[twin["path"][0]]
        if after[judged] == "train":
            break
    assert splitting.Move(judged, "test", "train") in moves


def test_a_given_split_is_kept_and_validation_cut_out_of_its_training_photos() -> None:
    photos = made_up(1000)
    photos["subset"] = ["test" if number % 10 == 3 else "train" for number in range(1000)]
    split, moves, _ = splitting.assign(photos, DEFAULTS)
    assert (split["subset"].eq("test") == photos["subset"].eq("test")).all()
    assert split["subset"].eq("validation").sum() == pytest.approx(0.2 * 900, abs=40)
    assert moves == []


def test_a_validation_subset_that_is_given_is_kept_whole() -> None:
    photos = made_up(300, groups=9)
    photos["subset"] = ["train", "validation", "test"] * 100
    split, _, _ = splitting.assign(photos, options(near_duplicate_bits=0))
    assert list(split["subset"]) == list(photos["subset"])


def test_beside_a_given_split_photos_without_one_are_for_training() -> None:
    photos = made_up(1000)
    photos["subset"] = ["", "", "train", "test"] * 250
    split, moves, _ = splitting.assign(photos, DEFAULTS)
    assert split.loc[photos["subset"].ne("test"), "subset"].isin(["train", "validation"]).all()
    assert moves == []


def test_near_duplicates_across_a_given_split_leave_the_test_photo_out() -> None:
    photos = table([("rugby", "", 5), ("rugby", "", 4), ("soccer", "", 1 << 40), ("soccer", "", 1 << 60)])
    photos["subset"] = ["train", "test", "train", "test"]
    split, _, conflicts = splitting.assign(photos, options(near_duplicate_bits=1))
    assert [(conflict.path, conflict.other) for conflict in conflicts] == [tuple(photos["path"][[1, 0]])]
    assert len(split) == 3


def test_named_groups_are_the_test_subset() -> None:
    photos = made_up(400, groups=5)
    split, _, _ = splitting.assign(photos, options(test_groups=["rugby-2", "soccer-4"]))
    assert set(split.loc[split["subset"].eq("test"), "group"]) == {"rugby-2", "soccer-4"}
    assert split["subset"].eq("test").sum() == photos["group"].isin(["rugby-2", "soccer-4"]).sum()


def test_a_group_that_no_photo_has_is_named() -> None:
    with pytest.raises(TouchlineError, match=r"split\.test_groups.*rugby-9"):
        splitting.assign(made_up(50, groups=3), options(test_groups=["rugby-1", "rugby-9"]))


@pytest.mark.parametrize("photos", [made_up(200, groups=2), made_up(6)], ids=["4 groups", "3 photos a class"])
def test_too_few_for_stratified_says_what_to_do(photos: pd.DataFrame) -> None:
    with pytest.raises(TouchlineError, match=r"\b0\.2\b"):
        splitting.assign(photos, options(method="stratified"))


def test_a_class_missing_from_a_subset_is_an_error_that_says_what_to_do(
    paths: Paths, params_with: Callable[..., Params]
) -> None:
    # One group a class, so a class is whole in one subset.
    files.write_table(paths.validated_table, made_up(100, groups=1))
    with pytest.raises(TouchlineError) as error:
        splitting.run(paths, params_with())
    message = str(error.value)
    assert all(word in message for word in ("test", "split.method: stratified", "split.by_group: false"))
    assert "\n" not in message
    # The counts are there to look at.
    assert files.read_json(paths.reports / "split.json")["groups"] == 2


def test_a_class_with_one_training_photo_is_named(paths: Paths, params_with: Callable[..., Params]) -> None:
    photos = made_up(33, ["soccer"])
    photos["subset"] = ["train", "train", "test"] * 11
    photos.loc[:2, "class"] = "rugby"
    files.write_table(paths.validated_table, photos)
    # Of the two rugby photos that a model might learn from, one goes to validation.
    several = (params_with(split={"seed": seed, "validation_share": 0.5}) for seed in range(100))
    params = next(each for each in several if [subsets(photos, each.split)[path] for path in photos["path"][:2]]
                  == ["train", "validation"])  # fmt: skip
    with pytest.raises(TouchlineError, match="rugby") as error:
        splitting.run(paths, params)
    assert "soccer" not in str(error.value) and "\n" not in str(error.value)


def test_the_stage_writes_a_row_a_photo_and_says_the_real_shares(
    paths: Paths, params_with: Callable[..., Params], capsys: pytest.CaptureFixture[str]
) -> None:
    # Classes and groups that look like numbers are names all the same.
    classes = ["0", "1", "true"]
    photos = made_up(600, classes)
    photos.loc[photos.index[:50], "group"] = "007"
    files.write_table(paths.validated_table, photos)
    result = splitting.run(paths, params_with(classes=classes))

    split = files.read_table(paths.split_table, dtype=str)
    assert tuple(split.columns) == splitting.COLUMNS
    assert sorted(split["path"]) == sorted(photos["path"])
    assert set(split.loc[split["path"].isin(photos["path"][:50]), "group"]) == {"007"}
    report = files.read_json(paths.reports / "split.json")
    counts = split.groupby(["subset", "class"]).size()
    assert report["counts"] == {s: {label: counts[s, label] for label in classes} for s in SUBSETS}
    assert report["photos"] == 600 and report["groups"] == 551
    assert sum(report["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert f"test {counts['test'].sum()} ({report['shares']['test']:.1%})" in result
    assert capsys.readouterr().out == ""
