"""The audit finds what was planted, its page is safe to open, and `validate` does what people decided."""

import csv
import hashlib
import html
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import names
from PIL import Image
from ruamel.yaml import YAML
from test_validate import Workspace, flat, noise, params

from touchline.commands import audit
from touchline.core.errors import TouchlineError
from touchline.core.params import BackboneFeatures, Params, check
from touchline.core.paths import Paths
from touchline.data import decisions, feature_store

CHANNELS = 32


def clusters(each: int, classes: int, seed: int, apart: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Features in one cloud a class, and the true labels; clouds of deviation 1 lie `apart` from their middle."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    features = random.normal(size=(len(labels), CHANNELS))
    features[np.arange(len(labels)), labels] += apart
    return features.astype(np.float32) + 3, labels


def with_wrong(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, set[int]]:
    """Labels of which a share is wrong, and which ones."""
    random = np.random.default_rng(seed)
    wrong = random.choice(len(labels), round(share * len(labels)), replace=False)
    given = labels.copy()
    given[wrong] = (given[wrong] + random.integers(1, labels.max() + 1, len(wrong))) % (labels.max() + 1)
    return given, set(wrong.tolist())


def singly(labels: np.ndarray) -> np.ndarray:
    return np.arange(len(labels))


@pytest.mark.parametrize("classes", [2, 3])
def test_planted_wrong_labels_are_found(classes: int) -> None:
    precisions, recalls = [], []
    for seed in range(3):
        features, labels = clusters(150, classes, seed)
        given, wrong = with_wrong(labels, 0.05, seed)
        found = audit.wrong_labels(given, audit.out_of_fold(features, given, singly(given)))
        hits = [each for each in found if each.photo in wrong]
        precisions.append(len(hits) / len(found))
        recalls.append(len(hits) / len(wrong))
        assert np.mean([each.suggested == labels[each.photo] for each in hits]) >= 0.9
        assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    # Guessing has a precision of 0.05. The clouds overlap a little, so nothing can find all and only these.
    assert np.mean(precisions) >= 0.9 and np.mean(recalls) >= 0.9, (precisions, recalls)


def test_a_photo_is_judged_by_others_only() -> None:
    """Features that say nothing: whoever saw the photo would know its label all the same."""
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 400)).astype(np.float32)
    labels = np.arange(200) % 2
    probabilities = audit.out_of_fold(features, labels, singly(labels))
    assert 0.35 < (probabilities.argmax(axis=1) == labels).mean() < 0.65


def test_a_group_is_judged_by_other_groups() -> None:
    """Copies of one photo, wrongly filed: only with the group kept together does nobody vouch for them."""
    features, labels = clusters(60, 2, 1)
    given = labels.copy()
    series = np.arange(8)
    features[series] = features[0] + 0.01 * np.random.default_rng(2).normal(size=(8, CHANNELS))
    given[series] = 1
    groups = np.where(singly(given) < 8, 0, singly(given))
    found = {each.photo for each in audit.wrong_labels(given, audit.out_of_fold(features, given, groups))}
    assert found >= set(series)


def test_folds_without_a_class_are_divided_singly() -> None:
    features, labels = clusters(20, 2, 3)
    probabilities = audit.out_of_fold(features, labels, labels)
    assert (probabilities.argmax(axis=1) == labels).mean() > 0.9


@pytest.mark.parametrize("labels", [[0] * 20, [0] * 20 + [1]])
def test_too_few_photos_to_learn_from_is_one_line(labels: list[int]) -> None:
    with pytest.raises(TouchlineError):
        audit.out_of_fold(np.ones((len(labels), 4), np.float32), np.array(labels), np.arange(len(labels)))


def test_planted_outliers_are_found() -> None:
    features, labels = clusters(100, 2, 4)
    features = features + np.float32(10) * (np.arange(CHANNELS) < CHANNELS // 2)
    planted = {7, 120}
    for number, row in enumerate(planted):
        features[row] = 0
        features[row, -1 - number] = 30
    found = audit.outliers(features)
    assert {each.photo for each in found[:2]} == planted
    assert len(found) <= 2 + 0.03 * len(labels)


def test_planted_near_duplicates_are_found_and_pairs_of_two_classes_come_first() -> None:
    features, labels = clusters(50, 2, 5)
    random = np.random.default_rng(6)
    planted = {3: 10, 4: 60}  # a copy in the same class, and one in the other
    for original, copy in planted.items():
        features[copy] = features[original] + 0.02 * random.normal(size=CHANNELS)
    probabilities = audit.out_of_fold(features, labels, singly(labels))
    found = audit.near_duplicates(features, labels, probabilities, alike=[(20, 30)])
    # The copy that lies with the other class is the one to look at.
    assert (found[0].photo, found[0].near) == (60, 4)
    assert {frozenset((each.photo, each.near)) for each in found} == {
        frozenset(pair) for pair in [(3, 10), (4, 60), (20, 30)]
    }
    assert found[0].score > 0.99


def test_a_series_of_near_duplicates_is_not_every_pair_of_it() -> None:
    features, labels = clusters(50, 2, 7)
    features[:6] = features[0] + 0.01 * np.random.default_rng(8).normal(size=(6, CHANNELS))
    found = audit.near_duplicates(features, labels, audit.out_of_fold(features, labels, singly(labels)))
    assert {each.photo for each in found} | {each.near for each in found} == set(range(6))
    assert len(found) <= 5


class Audited:
    """A project as `validate` and `features` leave it, its features planted."""

    def __init__(self, root: Path, classes: tuple[str, ...] = ("rugby", "soccer"), each: int = 40) -> None:
        self.paths, self.classes = Paths(root, root), classes
        self.features, self.labels = clusters(each, len(classes), 9, apart=8.0)
        self.given = self.labels.copy()
        self.origin = {}
        self.source = {}

    def params(self, share: bool = False) -> Params:
        content = YAML(typ="safe", pure=True).load((Path(__file__).parents[1] / "params.yaml").read_text())
        content["rights"]["show"] = "any" if share else "permitted"
        return check({**content, "classes": list(self.classes)})

    def run(self, top: int = 24, share: bool = False) -> None:
        rows = []
        for row, label in enumerate(self.given):
            picture = np.random.default_rng(row).integers(0, 256, (30, 60, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            digest = hashlib.sha256(file.getvalue()).hexdigest()
            path = f"data/photos/{self.classes[label]}/{digest[:16]}.png"
            (self.paths.workspace / path).parent.mkdir(parents=True, exist_ok=True)
            (self.paths.workspace / path).write_bytes(file.getvalue())
            rows.append(
                {"path": path, "class": self.classes[label], "source": self.source.get(row, "folder"), "sha256": digest,
                 "width": 60, "height": 30, "licence": "", "origin": self.origin.get(row, ""), "group": "",
                 "perceptual_hash": digest[:16]}
            )  # fmt: skip
        self.table = pd.DataFrame(rows)
        self.table.to_csv(self.paths.validated_table, index=False)
        params = self.params(share)
        name = next(key for key, kind in params.features.items() if isinstance(kind, BackboneFeatures))
        of_digest = dict(zip(self.table["sha256"], self.features, strict=True))
        feature_store.update(
            self.paths.features / name, {}, list(of_digest), lambda wanted: (of_digest[digest] for digest in wanted)
        )
        audit.run(self.paths, params, top, "Ann")

    def decide(self, *lines: str) -> None:
        self.paths.decisions.parent.mkdir(parents=True, exist_ok=True)
        self.paths.decisions.write_text("\n".join([",".join(decisions.COLUMNS), *lines]) + "\n")

    @property
    def found(self) -> list[dict[str, str]]:
        with (self.paths.reports / "audit.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def page(self) -> str:
        return (self.paths.reports / "audit.html").read_text()

    def lines(self) -> list[str]:
        """The page's ready lines, as a person copies them."""
        return [html.unescape(line) for line in re.findall(r'<code class="line">(.*?)</code>', self.page)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Audited:
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    return Audited(tmp_path)


def test_the_audit_writes_a_table_and_a_page(project: Audited, capsys: pytest.CaptureFixture[str]) -> None:
    project.given[[5, 50]] = [1, 0]
    project.features[12] = project.features[11]
    project.run()
    doubted = [row for row in project.found if row["problem"] == "wrong label"]
    assert {row["path"] for row in doubted} >= set(project.table["path"][[5, 50]])
    first = next(row for row in doubted if row["path"] == project.table["path"][5])
    assert (first["class"], first["suggested"], first["sha256"]) == ("soccer", "rugby", project.table["sha256"][5])
    (pair,) = [row for row in project.found if row["problem"] == "near-duplicate"]
    assert {pair["path"], pair["near_to"]} == set(project.table["path"][[11, 12]])

    assert f"{first['path']},relabel,rugby,Ann,looks like rugby" in project.lines()
    assert f"{first['path']},keep,,Ann," in project.lines()
    alternatives = re.findall(r'<img src="data:image/jpeg;base64,[^"]{99,}" alt="([^"]*)">', project.page)
    assert len(alternatives) == len(project.found) + 1 and all(alternatives)
    out = capsys.readouterr().out
    assert "wrong label" in out and "reports/audit.html" in out


def test_a_pair_of_two_classes_is_one_to_relabel(project: Audited) -> None:
    project.features[50] = project.features[11]
    project.run()
    pair = next(row for row in project.found if row["problem"] == "near-duplicate")
    assert {pair["path"], pair["near_to"]} == set(project.table["path"][[11, 50]])
    for one, label, other in ((11, "soccer", 50), (50, "rugby", 11)):
        paths = project.table["path"]
        assert f"{paths[one]},relabel,{label},Ann,near-duplicate of {paths[other]}" in project.lines()


def test_the_page_shows_the_surest_and_the_table_all(project: Audited) -> None:
    project.given[[5, 6, 7, 50]] = [1, 1, 1, 0]
    project.run(top=2)
    assert len([row for row in project.found if row["problem"] == "wrong label"]) >= 4
    assert sum(",relabel," in line for line in project.lines()) == 2
    assert "reports/audit.csv" in project.page  # where the others are


def test_what_is_decided_is_not_listed_again(project: Audited) -> None:
    project.given[[5, 50]] = [1, 0]
    project.features[12] = project.features[11]
    project.run()
    digests = project.table["sha256"]
    project.decide(f"{project.table['path'][5]},keep,,Ann,", f"{digests[11]},keep,,Ann,")
    project.run()
    listed = {row["path"] for row in project.found}
    assert project.table["path"][5] not in listed and project.table["path"][50] in listed
    (pair,) = [row for row in project.found if row["problem"] == "near-duplicate"]
    assert (pair["path"], pair["near_to"]) == (project.table["path"][12], project.table["path"][11])

    project.decide(f"{digests[11]},keep,,,", f"{digests[12]},keep,,,")
    project.run()
    assert not [row for row in project.found if row["problem"] == "near-duplicate"]


def test_hostile_names_stay_text_and_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    project = Audited(tmp_path, ("<script>alert(1)<b>", 'say "hi", & go'))
    project.given[5] = 1
    project.origin[5] = """it's "quoted" <img src=x onerror=alert(1)>.jpg"""
    project.run()
    page = project.page
    assert "<script" not in page and "<b>" not in page and "onerror=alert(1)>" not in page
    assert "&lt;script&gt;alert(1)&lt;b&gt;" in page
    assert 'alt="photo filed under say &#34;hi&#34;, &amp; go: it&#39;s &#34;quoted&#34; &lt;img' in page
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<(link|script|iframe)\b", re.sub(r"base64,[^\"]*", "", page))
    assert "default-src 'none'" in page

    # A line that is copied from the page is read as it was meant.
    line = next(line for line in project.lines() if ",relabel," in line)
    project.decide(line)
    (decision,) = decisions.read(project.paths.decisions, project.classes)
    path, label = str(project.table["path"][5]), "<script>alert(1)<b>"
    assert (decision.photo, decision.kind, decision.label, decision.who) == (path, "relabel", label, "Ann")


def test_photos_of_imagenet_are_not_shown_unless_params_allow_it(project: Audited) -> None:
    project.given[5] = 1
    project.source = dict.fromkeys(range(80), "imagenet")
    project.run()
    assert "<img" not in project.page and "<code>share</code>" in project.page
    assert f"{project.table['path'][5]},relabel,rugby,Ann," in "\n".join(project.lines())
    project.run(share=True)
    assert "<img" in project.page


def test_without_features_of_a_backbone_it_is_one_line(project: Audited) -> None:
    params = project.params()
    pixels = {key: kind for key, kind in params.features.items() if not isinstance(kind, BackboneFeatures)}
    with pytest.raises(TouchlineError, match="features"):
        audit.run(project.paths, params.model_copy(update={"features": pixels}), 3)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Three good photos in each of two classes."""
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    filled = Workspace(tmp_path)
    filled.add_good("rugby", "soccer")
    return filled


def decide(workspace: Workspace, *lines: str, header: str = "photo,decision,label,who,why") -> None:
    workspace.paths.decisions.parent.mkdir(parents=True, exist_ok=True)
    workspace.paths.decisions.write_text("\n".join([header, *lines]) + "\n")


def classes_of(workspace: Workspace) -> dict[str, str]:
    return {row["path"]: row["class"] for row in workspace.table(workspace.paths.validated_table)}


def test_validate_does_what_people_decided(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    dropped = workspace.add("rugby", noise(1), "dropped")
    moved = workspace.add("rugby", noise(2), "moved")
    kept = workspace.add("soccer", noise(3), "kept")
    small = workspace.add("soccer", flat(), "flat")
    digest = str(workspace.rows[-3]["sha256"])
    lines = [f'{dropped},drop,,Ann,"no ball, no player"', "", f"{digest[:8].upper()},Relabel,soccer,Bo,",
             f"{kept},keep,,Ann,", f"{small},keep,,,", "data/photos/rugby/0123456789abcdef.jpg,keep,,Ann,"]  # fmt: skip
    decide(workspace, *lines)
    workspace.run(params())

    found = classes_of(workspace)
    assert dropped not in found and found[moved] == "soccer" and found[kept] == "soccer"
    assert (workspace.paths.workspace / moved).is_file()
    # To keep a photo says that its label is right; what a rule finds in the file stays found.
    assert workspace.reasons == {
        "dropped": "dropped by Ann: no ball, no player",
        "flat": "one flat colour: contrast under 2",
    }
    assert workspace.report["counts"]["decisions"] == {"keep": 2, "drop": 1, "relabel": 1}
    assert workspace.report["counts"]["classes"]["soccer"]["accepted"] == 5
    assert "2 kept, 1 dropped, 1 relabelled" in workspace.page
    assert "data/decisions.csv, line 2" in workspace.page
    out = capsys.readouterr().out
    assert names(out, "data/decisions.csv", "line 7") and not names(out, "line 2")


def test_a_photo_under_two_classes_is_settled_by_a_decision(workspace: Workspace) -> None:
    one, other = workspace.add("rugby", noise(1), "one"), workspace.add("soccer", noise(1), "other")
    decide(workspace, f"{one},drop,,Ann,")
    workspace.run(params())
    assert other in classes_of(workspace) and workspace.reasons == {"one": "dropped by Ann"}

    decide(workspace, f"{workspace.rows[-1]['sha256']},relabel,soccer,Ann,")
    workspace.run(params())
    assert classes_of(workspace)[one] == "soccer" and workspace.reasons == {"other": "exact duplicate"}


def test_the_ledger_knows_a_drop_until_it_is_taken_back(workspace: Workspace) -> None:
    path = workspace.add("rugby", noise(1), "dropped")
    decide(workspace, f"{path},drop,,Ann,")
    workspace.run(params())
    row = workspace.rows.pop()  # what ingest does with a photo of the network that was rejected
    workspace.run(params())
    assert [entry["reason"] for entry in workspace.table(workspace.paths.ledger)] == ["dropped by Ann"]

    decide(workspace)
    workspace.run(params())
    assert workspace.table(workspace.paths.ledger) == []
    workspace.rows.append(row)
    workspace.run(params())
    assert path in classes_of(workspace)


def test_without_the_file_nothing_is_decided(workspace: Workspace) -> None:
    workspace.run(params())
    assert len(classes_of(workspace)) == 6


PHOTO = "data/photos/rugby/0123456789abcdef.jpg"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("ball.jpg,drop,,,", ["line 2", "'ball.jpg'"]),
        ("0123456,drop,,,", ["line 2", "'0123456'"]),
        (",drop,,,", ["line 2", "''"]),
        (f"{PHOTO},remove,,,", ["line 2", "'remove'", "keep, drop, relabel"]),
        (f"{PHOTO},relabel,polo,,", ["line 2", "'polo'", "rugby, soccer"]),
        (f"{PHOTO},relabel,,,", ["line 2", "''", "rugby, soccer"]),
        (f"{PHOTO},drop,soccer,,", ["line 2", "'soccer'"]),
        (f"{PHOTO},drop,,Ann,no ball, no player", ["line 2", "6"]),
        (f"{PHOTO},drop", ["line 2"]),
        (f'{PHOTO},drop,,,"unclosed', ["line 2"]),
    ],
)
def test_a_line_that_cannot_be_followed_is_named(workspace: Workspace, line: str, named: list[str]) -> None:
    decide(workspace, line)
    with pytest.raises(TouchlineError, match=r"data/decisions\.csv") as failed:
        workspace.run(params())
    assert "\n" not in str(failed.value) and all(word in str(failed.value) for word in named)


def test_a_missing_column_is_named(workspace: Workspace) -> None:
    decide(workspace, header="photo,decision,who")
    with pytest.raises(TouchlineError, match=r"data/decisions\.csv.*line 1\b.*label, why"):
        workspace.run(params())


def test_two_decisions_that_differ_are_named_and_two_that_agree_are_one(workspace: Workspace) -> None:
    path, digest = str(workspace.rows[0]["path"]), str(workspace.rows[0]["sha256"])
    decide(workspace, f"{path},drop,,Ann,", f"{digest},relabel,soccer,Bo,")
    with pytest.raises(TouchlineError, match=r"data/decisions\.csv.*line 3\b.*line 2\b"):
        workspace.run(params())
    decide(workspace, f"{path},drop,,Ann,", f"{digest},drop,,Bo,")
    workspace.run(params())
    assert path not in classes_of(workspace)


def test_digits_that_begin_several_digests_are_named(workspace: Workspace) -> None:
    table = pd.DataFrame({"path": ["a", "b", "c"], "sha256": ["12345678" + end * 56 for end in "aab"]})
    decide(workspace, "12345678,drop,,,", "", "12345678aaaa,keep,,,")
    first, second = decisions.read(workspace.paths.decisions, ["rugby"])
    with pytest.raises(TouchlineError, match=r"line 2\b.*12345678"):
        decisions.match([first], table)
    # One photo filed twice is one photo.
    assert decisions.match([second], table) == ([second, second, None], [])


def test_a_file_from_a_spreadsheet_is_read(workspace: Workspace) -> None:
    text = f"﻿who,photo,decision,label,why,more\r\nAnn,{PHOTO.replace('/', chr(92))},drop,,,\r\n,,,,,\r\n"
    workspace.paths.decisions.parent.mkdir(parents=True, exist_ok=True)
    workspace.paths.decisions.write_bytes(text.encode())
    (decision,) = decisions.read(workspace.paths.decisions, ["rugby"])
    assert (decision.photo, decision.kind, decision.who) == (PHOTO, "drop", "Ann")
    workspace.paths.decisions.write_bytes(text.encode("utf-16"))
    with pytest.raises(TouchlineError, match=r"data/decisions\.csv.*UTF-8"):
        decisions.read(workspace.paths.decisions, ["rugby"])
