import csv
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import names
from PIL import Image

from touchline.core.errors import TouchlineError
from touchline.core.params import Params, ValidateParams, check
from touchline.core.paths import Paths
from touchline.data.photos import Measurement
from touchline.stages import validate

PARAMS = Path(__file__).parents[1] / "params.yaml"
TIGHT = {
    "min_side": 32,
    "max_aspect": 3.0,
    "max_megapixels": 0.05,
    "min_contrast": 2.0,
    "min_per_class": 2,
    "max_class_ratio": 2.0,
    "max_rejected_share": 0.9,
}


def params(classes: tuple[str, ...] = ("rugby", "soccer"), **limits: float) -> Params:
    from ruamel.yaml import YAML

    content = YAML(typ="safe", pure=True).load(PARAMS.read_text())
    return check({**content, "classes": list(classes), "validate": {**TIGHT, **limits}})


def noise(seed: int, width: int = 48, height: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def flat() -> bytes:
    return encoded(Image.new("RGB", (48, 40), (30, 90, 30)))


class Workspace:
    """A project folder to which photos are added as ingest would."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths(root, root)
        self.rows: list[dict[str, object]] = []

    def add(self, label: str, content: bytes, origin: str = "", **columns: str) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        path = f"data/photos/{label}/{sha256[:16]}.png"
        (self.paths.workspace / path).parent.mkdir(parents=True, exist_ok=True)
        (self.paths.workspace / path).write_bytes(content)
        row = dict.fromkeys(validate.COLUMNS, "") | {
            "path": path,
            "class": label,
            "source": "folder",
            "sha256": sha256,
            "bytes": len(content),
            "width": 1,
            "height": 1,
            "origin": origin or f"{label}/{len(self.rows)}.png",
        }
        self.rows.append(row | columns)
        return path

    def add_good(self, *labels: str, each: int = 3) -> None:
        for label in labels:
            for number in range(each):
                self.add(label, noise(1000 * len(self.rows) + number))

    def run(self, its_params: Params) -> str:
        self.paths.photos_table.parent.mkdir(parents=True, exist_ok=True)
        with self.paths.photos_table.open("w", newline="") as file:
            writer = csv.DictWriter(file, validate.COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        return validate.run(self.paths, its_params)

    def table(self, path: Path) -> list[dict[str, str]]:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def reasons(self) -> dict[str, str]:
        return {row["origin"]: row["reason"] for row in self.table(self.paths.rejected_table)}

    @property
    def report(self) -> dict:
        return json.loads((self.paths.reports / "validation.json").read_text())

    @property
    def page(self) -> str:
        return (self.paths.reports / "validation.html").read_text()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def test_each_fault_is_rejected_with_its_reason(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.add_good("rugby", "soccer")
    workspace.add("rugby", noise(1, 300, 200), "bomb")
    workspace.add("rugby", noise(2)[:-900], "cut short")
    workspace.add("rugby", b"not a photo", "text")
    workspace.add("rugby", noise(3, 31, 40), "small")
    workspace.add("rugby", noise(4, 40, 121), "tall")
    workspace.add("rugby", flat(), "flat")
    for label, origin in (("rugby", "either"), ("soccer", "or"), ("soccer", "or again")):
        workspace.add(label, noise(5), origin)
    workspace.add("soccer", noise(6), "first")
    workspace.add("soccer", noise(6), "second")
    result = workspace.run(params())

    assert workspace.reasons == {
        "bomb": "decompression bomb: over 0.05 megapixels",
        "cut short": "does not decode in full",
        "text": "does not decode in full",
        "small": "shorter side under 32 pixels",
        "tall": "longer side over 3 times the shorter",
        "flat": "one flat colour: contrast under 2",
        "either": "filed under several classes",
        "or": "filed under several classes",
        "or again": "filed under several classes",
        "second": "exact duplicate",
    }
    accepted = workspace.table(workspace.paths.validated_table)
    assert len(accepted) == 7
    assert list(accepted[0]) == [*validate.COLUMNS, "contrast", "perceptual_hash"]
    assert {(row["width"], row["height"]) for row in accepted} == {("48", "40")}
    assert all(len(row["perceptual_hash"]) == 16 and float(row["contrast"]) > 2 for row in accepted)

    report = workspace.report
    assert report["success"]
    seen_once = next(entry for entry in report["expectations"] if entry["name"] == "seen once")
    # The second copy in soccer is a duplicate too, though it is rejected for its two classes.
    assert (seen_once["passed"], seen_once["unexpected_count"]) == (False, 2)
    assert report["counts"]["classes"]["soccer"] == {
        "photos": 7,
        "accepted": 4,
        "rejected_by_reason": {"filed under several classes": 2, "exact duplicate": 1},
    }
    assert names(result, "7", "17", "10") and names(capsys.readouterr().out, "2 does not decode in full")
    assert "copy of first" in workspace.page
    assert str(workspace.paths.workspace) not in workspace.page


def test_a_photo_at_its_limits_is_accepted(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    workspace.add("rugby", noise(1, 32, 96))
    workspace.add("soccer", noise(2, 250, 200))
    workspace.run(params())
    assert workspace.reasons == {}


def test_the_first_rule_a_photo_fails_gives_the_reason() -> None:
    rules = validate.photo_rules(params().validate_)
    reasons = validate.first_reasons(3, rules, [[], [2], [0, 2], [], [0, 1], [], [1]])
    assert reasons == [rules[2].reason, rules[4].reason, rules[1].reason]


def test_text_columns_come_out_as_they_went_in(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    workspace.add("rugby", noise(1), group="007", author="NA", licence='CC "BY", 4.0')
    workspace.run(params())
    last = workspace.table(workspace.paths.validated_table)[-1]
    assert (last["group"], last["author"], last["licence"]) == ("007", "NA", 'CC "BY", 4.0')


def test_a_set_that_fails_names_every_failure_after_all_is_written(workspace: Workspace) -> None:
    workspace.add_good("rugby", each=6)
    workspace.add("soccer", noise(1), source="sample", licence=" ")
    workspace.add("soccer", flat(), "flat")
    with pytest.raises(TouchlineError) as failed:
        workspace.run(params(max_rejected_share=0.1))

    assert "\n" not in str(failed.value)
    by_class, ratio, share, licence = str(failed.value).split("; ")
    assert names(by_class, "soccer 1", "2", "validate.min_per_class")
    assert names(ratio, "6.00", "rugby 6", "soccer 1", "2", "validate.max_class_ratio")
    assert names(share, "1", "8", "validate.max_rejected_share") and "12.5%" in share and "10.0%" in share
    assert "data/photos/soccer/" in licence

    assert not workspace.report["success"]
    assert workspace.reasons == {"flat": "one flat colour: contrast under 2"}
    assert names(workspace.page, "validate.min_per_class", "validate.max_class_ratio", "validate.max_rejected_share")
    assert [row["origin"] for row in workspace.table(workspace.paths.ledger)] == ["flat"]


def test_a_class_without_any_photo_fails(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    with pytest.raises(TouchlineError, match=r"\bhockey 0\b.*validate\.min_per_class.*\bsoccer 3\b.*\bhockey 0\b"):
        workspace.run(params(("rugby", "soccer", "hockey")))


def test_no_photos_at_all_fails_in_words(workspace: Workspace) -> None:
    with pytest.raises(TouchlineError, match=r"\brugby 0\b.*\bsoccer 0\b"):
        workspace.run(params())
    assert workspace.table(workspace.paths.validated_table) == []
    assert workspace.report["counts"]["photos"] == 0


def test_all_photos_rejected_fails_in_words(workspace: Workspace) -> None:
    workspace.add("rugby", flat(), "one")
    workspace.add("soccer", noise(1, 8, 8), "two")
    with pytest.raises(TouchlineError, match=r"100\.0%.*\b2\b.*\b2\b.*validate\.max_rejected_share"):
        workspace.run(params())
    assert set(workspace.reasons) == {"one", "two"}


def test_hostile_names_stay_text_on_every_page(workspace: Workspace) -> None:
    strange = """a <script>alert('x')<b>, "quoted" & $row"""
    workspace.add_good(strange, "soccer")
    workspace.add(strange, flat(), "<script>alert(1)</script>", author="<img src=x>")
    workspace.run(params((strange, "soccer"), min_per_class=3, max_class_ratio=1.0))
    assert workspace.reasons == {"<script>alert(1)</script>": "one flat colour: contrast under 2"}
    with pytest.raises(TouchlineError, match=r"validate\.min_per_class"):
        workspace.run(params((strange, "soccer"), min_per_class=4))

    assert "<script" not in workspace.page and "<img src=x" not in workspace.page
    assert "data/photos/a &lt;script&gt;" in workspace.page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in workspace.page


def test_the_page_asks_nothing_of_the_network(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    workspace.add("rugby", flat())
    workspace.run(params())
    asking = r"""src\s*=\s*(?!"data:image/jpeg;base64,)|srcset|<(script|link|iframe)\b|@import|url\("""
    assert not re.search(asking, workspace.page)
    assert "Content-Security-Policy" in workspace.page
    for target in re.findall(r"""href="([^"#:]+)["#]""", workspace.page):
        assert (workspace.paths.reports / target.replace("%20", " ")).exists(), target


def test_the_page_shows_some_rejected_photos_of_as_many_reasons_as_it_can(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    small = [workspace.add("rugby", noise(number, 31, 40), author="Ann", licence="CC BY") for number in range(20)]
    shown = {workspace.add("soccer", flat()), workspace.add("rugby", noise(50, 40, 121))}
    hidden = {
        workspace.add("rugby", noise(51, 300, 200)),  # taken for a decompression bomb
        workspace.add("rugby", noise(52)[:-900]),  # torn
        workspace.add("rugby", noise(53, 31, 40), source="imagenet"),
        workspace.add("rugby", noise(54)),
    }
    dropped = workspace.rows[-1]["path"]
    workspace.paths.decisions.write_text(f"photo,decision,label,who,why\n{dropped},drop,,Ann,a person asked for it\n")
    workspace.run(params(max_rejected_share=0.9))
    pictures = set(re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="Rejected: ([^"]+)"', workspace.page))
    assert shown < pictures and pictures - shown < set(small) and len(pictures) == 12 and not pictures & hidden
    assert "by Ann (folder, CC BY)" in workspace.page


def test_two_rules_may_look_at_one_column(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = validate.photo_rules

    def with_another(limits: ValidateParams) -> list[validate.Rule]:
        wide = validate.Rule("not too large", "shorter_side", "100 at most", highest=100, reason="too large")
        return [*rules(limits), wide]

    monkeypatch.setattr(validate, "photo_rules", with_another)
    workspace.add_good("rugby", "soccer")
    workspace.add("rugby", noise(1, 31, 40), "small")
    workspace.add("soccer", noise(2, 101, 101), "large")
    workspace.run(params())
    assert workspace.reasons == {"small": "shorter side under 32 pixels", "large": "too large"}
    counts = {entry["name"]: entry["unexpected_count"] for entry in workspace.report["expectations"]}
    assert (counts["shorter side"], counts["not too large"]) == (1, 1)
    assert "too large" in workspace.page


def test_nothing_is_left_behind(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    workspace.run(params())
    root = workspace.paths.workspace
    assert {path.name for path in root.iterdir()} == {"data", "reports", ".dvc"}
    assert {path.name for path in workspace.paths.reports.iterdir()} == {
        "validation.html",
        "validation.json",
    }


def test_the_ledger_follows_what_is_rejected(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    workspace.add("rugby", noise(1, 20, 40), "narrow")
    workspace.add("rugby", noise(2), "kept")
    workspace.add("rugby", noise(2), "copy of an accepted photo")
    workspace.paths.ledger.write_text("sha256,class,source,origin,reason\n00ff,soccer,folder,gone.png,long ago\n")
    workspace.run(params())
    ledger = workspace.table(workspace.paths.ledger)
    assert [(row["origin"], row["reason"]) for row in ledger] == [
        ("narrow", "shorter side under 32 pixels"),
        ("gone.png", "long ago"),
    ]

    workspace.run(params(min_side=20))
    assert [row["origin"] for row in workspace.table(workspace.paths.ledger)] == ["gone.png"]


def test_an_experiment_leaves_the_ledger_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "tall-mule")
    workspace.add_good("rugby", "soccer")
    workspace.add("rugby", flat())
    workspace.run(params())
    assert not workspace.paths.ledger.exists()


def test_the_ledger_replaces_the_reason_of_a_photo_rejected_again() -> None:
    def table(*rows: tuple[str, ...]) -> pd.DataFrame:
        return pd.DataFrame(rows, columns=validate.LEDGER_COLUMNS, dtype=str)

    merged = validate.merge_ledger(
        table(("aa", "rugby", "folder", "1", "old"), ("aa", "soccer", "folder", "2", "stays: another class")),
        accepted=table(),
        rejected=table(("aa", "rugby", "folder", "1", "new"), ("aa", "rugby", "folder", "3", "new")),
    )
    assert list(merged.itertuples(index=False, name=None)) == [
        ("aa", "rugby", "folder", "1", "new"),
        ("aa", "rugby", "folder", "3", "new"),
        ("aa", "soccer", "folder", "2", "stays: another class"),
    ]


def test_what_was_not_decoded_has_no_contrast_to_judge() -> None:
    photos = pd.DataFrame({"sha256": ["a", "b", "c"], "class": "rugby", "origin": ["1", "2", "3"]})
    table = validate.describe(
        photos,
        [
            Measurement("empty file"),
            Measurement("", 9000, 9000, 81.0, bomb=True),
            Measurement("", 60, 30, 0.0018, False, 40.0, "0" * 16),
        ],
    )
    assert table["contrast"].isna().tolist() == [True, True, False]
    assert table["shorter_side"].isna().tolist() == [True, False, False]
    assert table["aspect"].tolist()[1:] == [1.0, 2.0]


def test_a_missing_photo_is_one_line(workspace: Workspace) -> None:
    workspace.add_good("rugby", "soccer")
    path = workspace.add("rugby", noise(1))
    (workspace.paths.workspace / path).unlink()
    with pytest.raises(TouchlineError, match=rf"{path}\b.*data/photos\.csv\b.*`[^`]*ingest`"):
        workspace.run(params())


def test_a_class_that_params_do_not_list_is_one_line(workspace: Workspace) -> None:
    workspace.add_good("rugby", "polo")
    with pytest.raises(TouchlineError, match=r"\bpolo\b.*params\.yaml"):
        workspace.run(params())


def test_a_table_without_a_column_is_one_line(workspace: Workspace) -> None:
    workspace.paths.photos_table.parent.mkdir(parents=True)
    workspace.paths.photos_table.write_text("path,class\n")
    with pytest.raises(TouchlineError, match=r"\bsource\b.*\bsha256\b"):
        validate.run(workspace.paths, params())
