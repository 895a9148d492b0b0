"""The flow `drift`: what it makes of what `touchline drift` ends with. That command is a stand-in here, on the PATH."""

import json
import logging
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from prefect.exceptions import ObjectNotFound

from flows import drift as flow
from flows import project as flow_project
from touchline.core.editing import set_values

SHIPPED = Path(__file__).parents[1] / "params.yaml"


class Ran:
    """The flow's function, run in a project of its own, and what it told whom."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.events, self.artifacts, self.messages = [], [], []
        # With the arguments of the real one, so that none goes astray.
        self.run_deployment = create_autospec(flow.run_deployment)
        (root / "params.yaml").write_bytes(SHIPPED.read_bytes())
        (root / "reports").mkdir()
        monkeypatch.chdir(root)
        monkeypatch.setattr(flow_project, "emit_event", lambda **event: self.events.append(event))
        monkeypatch.setattr(flow, "create_markdown_artifact", lambda text, **_: self.artifacts.append(text))
        monkeypatch.setattr(flow, "run_deployment", self.run_deployment)
        monkeypatch.setattr(flow_project, "notify", lambda *message: self.messages.append(message))
        for module in (flow, flow_project):
            monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("a run"))
        monkeypatch.setenv("PATH", str(root / "bin"))

    def command(self, outcome: str, exit_code: int, said: str = "") -> None:
        """What `touchline` shall leave behind, and end with."""
        report = {
            "verdict": "Drift: | <b>brightness</b> differs." if outcome == "drift" else "Nothing of note.",
            "photos": {"new": 40},
            "comparisons": [
                {"what": "brightness", "against": "training", "statistic": "KS distance", "value": 0.4567,
                 "distance": 0.4567, "corrected": 0.0045, "warns": outcome == "drift"},
            ],
        }  # fmt: skip
        (self.root / "bin").mkdir()
        program = self.root / "bin/touchline"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
            "Path('arguments.txt').write_text(' '.join(sys.argv[1:]))\n"
            f"Path('reports/drift.json').write_text({json.dumps(report)!r})\n"
            f"print({said!r}, file=sys.stderr)\nsys.exit({exit_code})\n"
        )
        program.chmod(0o755)

    def change(self, **values: object) -> None:
        set_values(self.root / "params.yaml", {f"drift.{key}": value for key, value in values.items()})


@pytest.fixture
def ran(tmp_path, monkeypatch):
    return Ran(tmp_path, monkeypatch)


def test_without_a_folder_it_says_so_and_runs_nothing(ran, caplog):
    ran.command("drift", 3)
    caplog.set_level(logging.INFO)
    state = flow.drift.fn()
    assert (state.is_completed(), state.name) == (True, "Skipped")
    assert "drift.folder" in state.message
    assert state.message in caplog.text
    assert not (ran.root / "arguments.txt").exists() and ran.artifacts == ran.events == []


@pytest.mark.parametrize("outcome, code, name", [("silent", 0, "Completed"), ("too few", 4, "TooFew")])
def test_where_nothing_warns_nobody_is_told(ran, outcome, code, name):
    ran.command(outcome, code)
    ran.change(folder="data/seen", train=True)
    state = flow.drift.fn()
    assert (state.is_completed(), state.name, state.message) == (True, name, "Nothing of note.")
    assert (ran.root / "arguments.txt").read_text() == "drift"
    assert len(ran.artifacts) == 1 and ran.events == ran.messages == []
    ran.run_deployment.assert_not_called()


def test_a_warning_is_an_event_a_message_and_an_artifact_and_trains_nothing_by_itself(ran):
    ran.command("drift", 3)
    state = flow.drift.fn(folder="-a folder")
    assert (state.is_completed(), state.name) == (True, "Drift")
    assert (ran.root / "arguments.txt").read_text() == "drift -- -a folder"
    (event,) = ran.events
    assert event["event"] == "touchline.drift" and event["payload"]["differs"] == ["brightness"]
    assert event["resource"]["prefect.resource.id"] == "touchline.registered-model.rugby-soccer"
    assert ran.messages[0][0] == "rugby-soccer: drift"
    ran.run_deployment.assert_not_called()
    (page,) = ran.artifacts
    assert "| brightness | training photos | KS distance 0.457 | 0.457 | 0.0045 | drift |" in page
    assert "<b>" not in page and "reports/drift.html" in page


def test_where_the_params_want_it_a_warning_starts_the_pipeline(ran):
    ran.command("drift", 3)
    ran.change(folder="data/seen", train=True)
    assert flow.drift.fn().name == "Drift"
    ran.run_deployment.assert_called_once_with(
        name="pipeline/pipeline", parameters={"look_for_photos": True}, timeout=0, as_subflow=False
    )


def test_a_server_without_the_pipeline_is_one_line(ran):
    ran.command("drift", 3)
    ran.change(folder="data/seen", train=True)

    ran.run_deployment.side_effect = ObjectNotFound(http_exc=Exception("404"))
    state = flow.drift.fn()
    assert state.is_failed() and "`make board`" in state.message
    assert len(ran.events) == 1


def test_a_comparison_that_failed_says_why(ran):
    ran.command("silent", 1, said="touchline: rugby-soccer has no champion yet: `make run` trains one")
    ran.change(folder="data/seen")
    state = flow.drift.fn()
    assert state.is_failed() and state.message == "rugby-soccer has no champion yet: `make run` trains one"
    assert ran.artifacts == []
