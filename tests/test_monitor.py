"""`touchline monitor`: silent where the champion does as on the test photos, and what it warns of where not."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import names
from test_drift import Made, made, shared  # noqa: F401 - fixtures
from test_predict import CLASSES
from typer.testing import CliRunner

from touchline import cli
from touchline.commands import monitor
from touchline.commands.drift import FEWEST, SILENT, TOO_FEW
from touchline.commands.monitor import WARNING, Figures
from touchline.core import files
from touchline.core.params import Params
from touchline.data import served
from touchline.data.served import Recorder
from touchline.models.forecast import METHODS, TAG, Forecaster
from touchline.models.scores import Share
from touchline.tracking import runs
from touchline.tracking.registry import PROMOTED_AT


@pytest.fixture
def used(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Used":  # noqa: F811 - a fixture
    return Used(made, tmp_path, monkeypatch)


class Used:
    """A champion that was asked; its record begins empty.

    Attributes:
        logged: what came to MLflow.
    """

    def __init__(self, made: Made, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        self.made, self.root, self.paths = made, root, made.paths
        champion = monitor.drift.find_champion(made.paths, made.params)
        self.sha256 = champion.classifier.files.model_sha256
        made.versions = [self._version(champion.version, 10)]
        self.test = monitor._test_photos(made.paths, made.params, champion.classifier, made.learned_from)
        self.logged: list[dict[str, float]] = []
        monkeypatch.setattr(type(made.paths), "served", property(lambda _: root / "served"))
        monkeypatch.setattr(type(made.paths), "feedback", property(lambda _: root / "feedback"))
        monkeypatch.setattr(runs, "open_store", lambda *_: None)
        monkeypatch.setattr(runs, "log_use", lambda store, run, metrics, when: self.logged.append(metrics))

    def _version(self, version: Any, days: int) -> Any:
        tags = {
            "touchline.model_sha256": self.sha256,
            PROMOTED_AT: (datetime.now(UTC) - timedelta(days=days)).isoformat(),
        }
        return type(version)(**(vars(version) | {"tags": tags}))

    def promoted(self, days: int) -> None:
        self.made.versions = [self._version(self.made.versions[0], days)]

    def asked(self, count: int, confidence: float | None = None, error: str = "", label: str | None = None,
              milliseconds: float = 50, days_ago: float = 1, first: int = 0) -> None:  # fmt: skip
        """Rows as the test photos have them, but for what is given."""
        random = np.random.default_rng(count)
        with Recorder(self.root / "served", self.made.params.monitor, "a model", self.sha256) as recorder:
            for number in range(first, first + count):
                row = self.test.iloc[int(random.integers(len(self.test)))]
                sure = confidence or float(row["confidence"])
                said: dict[str, Any] = {
                    "label": label or row["guess"], "guess": row["guess"], "confidence": sure, "similarity": None,
                    "probabilities": {name: sure if name == row["guess"] else 1 - sure for name in CLASSES},
                }  # fmt: skip
                recorder.add(
                    served.Asked(hashlib.sha256(str(number).encode()).hexdigest(), 1000),
                    error or said,
                    milliseconds,
                    wait=True,
                )
        with closing(sqlite3.connect(recorder._file)) as database, database:
            database.execute("UPDATE answers SET time = time - ?", [days_ago * 24 * 3600])

    def corrected(self, count: int, right: int) -> None:
        rows = served.read(self.root / "served").head(count)
        for number, row in enumerate(rows.to_dict("records")):
            other = next(name for name in CLASSES if name != row["guess"])
            entry = {"photo": f"{row['photo']}.jpg", "label": row["guess"] if number < right else other}
            files.write_json(self.root / "feedback" / f"{row['photo']}.json", entry)

    def run(self) -> str:
        return monitor.run(self.paths, self.made.params)

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.paths.reports / "monitor.json").read_text())

    @property
    def warned(self) -> set[str]:
        return {each["what"] for each in self.report["warnings"]}


def test_a_champion_that_does_as_on_the_test_photos_raises_no_warning(
    used: Used, capsys: pytest.CaptureFixture[str]
) -> None:
    used.asked(60)
    used.asked(20, days_ago=20, first=60)
    used.asked(20, days_ago=40, first=80)
    assert used.run() == SILENT, used.report
    report = used.report
    assert (report["recent"]["asked"], len(report["days"]), report["age_days"]) == (60, 2, 10)
    assert {each["what"] for each in report["comparisons"]} == {"predicted classes", "confidence"}
    assert report["recent"]["p99"] == 50 and report["accuracy"]["in use"] is None
    assert report["accuracy"]["test"]["photos"] == 50
    page = (used.paths.reports / "monitor.html").read_text()
    assert page.count("<svg") == 6 and report["verdict"] in page
    assert "reports/monitor.html" in capsys.readouterr().out
    [metrics] = used.logged
    assert metrics["asked"] == 60 and metrics["p99"] == 50 and metrics["warnings"] == 0


@pytest.mark.parametrize(
    ("what", "asked"),
    [
        ("drift", {"confidence": 0.51}),
        ("unknown", {"label": "unknown"}),
        ("latency", {"milliseconds": 2000}),
    ],
)
def test_what_is_not_as_it_should_be_is_named(used: Used, what: str, asked: dict[str, Any]) -> None:
    used.asked(60, **asked)
    assert used.run() == WARNING
    assert used.warned == {what}
    assert 'class="warns"' in (used.paths.reports / "monitor.html").read_text()


def test_errors_are_a_share_of_what_was_asked(used: Used) -> None:
    used.asked(60)
    used.asked(2, error="cut off", first=60)
    assert used.run() == SILENT and used.report["recent"]["errors"] == pytest.approx(2 / 62, abs=1e-6)
    used.asked(8, error="a web page", first=70)
    assert used.run() == WARNING and used.warned == {"errors"}


def test_the_forecast_of_the_champion_is_told_where_it_has_one(used: Used, capsys: pytest.CaptureFixture[str]) -> None:
    used.asked(60)
    used.run()
    assert used.report["forecast"] is None
    part = {"photos": 40, "accuracy": 0.9, **dict.fromkeys(METHODS, 0.94)}
    forecaster = Forecaster(0.8, 1.0, [part] * 3)
    used.made.versions[0].tags[TAG] = json.dumps(asdict(forecaster))
    used.run()
    found = used.report["forecast"]
    assert found["give_or_take"] == 0.04 and found["photos"] == 60 and 0.5 <= found["accuracy"] <= 1
    assert found["says"] in capsys.readouterr().out
    assert used.logged[-1]["forecast"] == found["accuracy"]


def test_an_old_champion_warns_also_where_nothing_was_asked(used: Used, params_with: Callable[..., Params]) -> None:
    used.promoted(200)
    assert used.run() == WARNING and used.warned == {"age"}
    used.made.params = params_with(monitor={"max_age_days": None})
    assert used.run() == TOO_FEW and used.logged == []


@pytest.mark.parametrize(("right", "outcome"), [(30, SILENT), (18, WARNING)])
def test_what_people_corrected_is_accuracy_in_use(used: Used, right: int, outcome: str) -> None:
    used.asked(60)
    used.corrected(30, right)
    files.write_text(used.root / "feedback/torn.json", "{")
    assert used.run() == outcome, used.report
    in_use = used.report["accuracy"]["in use"]
    assert (in_use["count"], in_use["photos"]) == (right, 30) and in_use["low"] < right / 30 < in_use["high"] + 1e-9
    assert used.warned == (set() if outcome == SILENT else {"accuracy"})


def test_a_photo_counts_once_and_one_that_was_learned_from_not_at_all(used: Used) -> None:
    used.asked(FEWEST - 1)
    used.asked(FEWEST - 1)
    assert used.run() == TOO_FEW and used.report["recent"]["photos"] == FEWEST - 1
    used.asked(1, first=FEWEST)
    assert used.run() == SILENT
    used.made.learned_from |= set(served.read(used.root / "served")["photo"])
    assert used.run() == TOO_FEW and used.report["recent"]["asked"] == 2 * FEWEST - 1


def test_rows_of_other_models_are_shown_by_day_and_warn_of_nothing(used: Used) -> None:
    used.asked(30)
    used.sha256 = "another"
    used.asked(60, confidence=0.5, milliseconds=9000, first=100)
    assert used.run() == SILENT and used.report["recent"]["asked"] == 30


def test_nothing_recorded_is_said_in_a_line_and_an_exit_code(
    used: Used, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (used.paths.workspace / "params.yaml").write_bytes((Path(__file__).parents[1] / "params.yaml").read_bytes())
    monkeypatch.chdir(used.paths.workspace)
    done = CliRunner().invoke(cli.app, ["monitor"])
    assert done.exit_code == 4 and names(done.output, "--record", "data/served"), done.output


def test_two_unknown_of_thirty_are_no_warning(params_with: Callable[..., Params]) -> None:
    def figures(unknown: float) -> Figures:
        return Figures(30, 30, unknown, 0.0, 0.0, 0.9, 10, 20, {})

    def warned(unknown: float) -> list[str]:
        found = monitor.warnings(params_with().monitor, figures(unknown), figures(0.02), [], None, None, None)
        return [each.what for each in found]

    assert warned(2 / 30) == [] and warned(8 / 30) == ["unknown"]


def test_few_corrections_warn_of_nothing(params_with: Callable[..., Params]) -> None:
    figures = Figures(30, 30, 0.0, 0.0, 0.0, 0.9, 10, 20, {})
    of_test = Share.of(95, 100)
    for photos, expected in ((FEWEST - 1, []), (FEWEST, ["accuracy"])):
        in_use = Share.of(photos // 2, photos)
        found = monitor.warnings(params_with().monitor, figures, figures, [], in_use, of_test, None)
        assert [each.what for each in found] == expected
