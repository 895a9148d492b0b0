"""The flow `monitor`: what it makes of what `touchline monitor` ends with, which is a stand-in here, on the PATH."""

import json
import logging
import sys
from pathlib import Path

import pytest

from flows import monitor as flow
from flows import project as flow_project

SHIPPED = Path(__file__).parents[1] / "params.yaml"
FIGURES = {"asked": 50, "photos": 40, "unknown": 0.3, "unsure": None, "errors": 0.0, "confidence": 0.9, "p50": 10.0,
           "p99": 80.0}  # fmt: skip
RIGHT = {"count": 18, "photos": 30, "share": 0.6, "low": 0.42, "high": 0.75}


class Ran:
    """The flow's function, run in a project of its own, and what it told whom."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.events, self.artifacts, self.messages = root, [], [], []
        (root / "params.yaml").write_bytes(SHIPPED.read_bytes())
        (root / "reports").mkdir()
        monkeypatch.chdir(root)
        monkeypatch.setattr(flow_project, "emit_event", lambda **event: self.events.append(event))
        monkeypatch.setattr(flow, "create_markdown_artifact", lambda text, **_: self.artifacts.append(text))
        monkeypatch.setattr(flow_project, "notify", lambda *message: self.messages.append(message))
        for module in (flow, flow_project):
            monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("a run"))
        monkeypatch.setenv("PATH", str(root / "bin"))

    def command(self, exit_code: int, said: str = "") -> None:
        """What `touchline` shall leave behind, and end with."""
        report = {
            "verdict": "<b>bad</b>" if exit_code == 3 else "Nothing of note.",
            "warnings": [{"what": "unknown"}] if exit_code == 3 else [],
            "recent": FIGURES, "test": None, "accuracy": {"in use": RIGHT, "test": None},
        }  # fmt: skip
        (self.root / "data/served").mkdir(parents=True)
        (self.root / "data/served/2026-11-26-1-a.sqlite").touch()
        (self.root / "bin").mkdir()
        program = self.root / "bin/touchline"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
            f"Path('reports/monitor.json').write_text({json.dumps(report)!r})\n"
            f"print({said!r}, file=sys.stderr)\nsys.exit({exit_code})\n"
        )
        program.chmod(0o755)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    return Ran(tmp_path, monkeypatch)


def test_without_a_record_it_says_so_and_runs_nothing(ran):
    state = flow.monitor.fn()
    assert (state.is_completed(), state.name) == (True, "Skipped") and "--record" in state.message
    assert ran.artifacts == ran.events == []


@pytest.mark.parametrize(("code", "name"), [(0, "Completed"), (4, "TooFew")])
def test_where_nothing_warns_only_the_artifact_is_made(ran, code, name):
    ran.command(code)
    state = flow.monitor.fn()
    assert (state.is_completed(), state.name, state.message) == (True, name, "Nothing of note.")
    assert len(ran.artifacts) == 1 and ran.events == ran.messages == []


def test_a_warning_is_an_event_a_message_and_an_artifact(ran):
    ran.command(3)
    state = flow.monitor.fn()
    assert (state.is_completed(), state.name) == (True, "Warning")
    (event,) = ran.events
    assert event["event"] == "touchline.monitor"
    assert event["payload"]["warnings"] == ["unknown"] and event["payload"]["photos"] == 40
    assert event["resource"]["prefect.resource.id"] == "touchline.registered-model.rugby-soccer"
    assert ran.messages[0][0] == "rugby-soccer: monitor"
    (page,) = ran.artifacts
    assert "| unknown | 0.3 |  |" in page and "0.600 (0.420 to 0.750)" in page and "<b>" not in page


def test_a_command_that_failed_says_why(ran):
    ran.command(1, "touchline: rugby-soccer has no champion yet: `make run` trains one")
    state = flow.monitor.fn()
    assert state.is_failed() and state.message == "rugby-soccer has no champion yet: `make run` trains one"
