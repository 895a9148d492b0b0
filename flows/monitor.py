"""Checks how well the champion does in use, from the recorded answers, and passes on a warning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed, State

from flows import project
from flows.project import escaped, report_link
from touchline.core.files import read_json

# Exit codes of `touchline monitor`, and the states they end in.
_STATES = {0: "Completed", 3: "Warning", 4: "TooFew"}


@flow(name="monitor", flow_run_name=project.run_name)
def monitor() -> State:
    """Read the answers kept by `serve --record`, and warn if the champion does worse than on the test photos."""
    if late := project.late():
        return late
    if not any((Path.cwd() / "data/served").glob("*.sqlite")):
        message = "nothing to monitor: data/served is empty, because `touchline serve` runs without --record"
        get_run_logger().info(message)
        return Completed(name="Skipped", message=message)
    code, why = project.run_alone("touchline", "monitor")
    if code not in _STATES:
        return Failed(message=why)
    report = read_json(Path.cwd() / "reports/monitor.json")
    create_markdown_artifact(_page(report), key="monitor", description="How well the champion does in use")
    if _STATES[code] == "Warning":
        payload = {"warnings": [each["what"] for each in report["warnings"]], "photos": report["recent"]["photos"]}
        project.warn("monitor", report["verdict"], payload, "monitor.html")
    return Completed(name=_STATES[code], message=report["verdict"])


def _page(report: Mapping[str, Any]) -> str:
    recent, test = report["recent"], report["test"] or {}
    lines = [f"# {escaped(report['verdict'])}", "", "| | in use | test photos |", "|---|---|---|"]
    lines.append(f"| photos | {recent['photos']:,} | {test.get('asked', '')} |")
    names = ("unknown", "unsure", "errors", "confidence", "p50", "p99")
    lines += [f"| {name} | {_number(recent[name])} | {_number(test.get(name))} |" for name in names]
    right = report["accuracy"]
    lines.append(f"| accuracy | {_interval(right['in use'])} | {_interval(right['test'])} |")
    return "\n".join([*lines, "", report_link("monitor.html", "All figures, day by day")])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _interval(found: Mapping[str, float] | None) -> str:
    return f"{found['share']:.3f} ({found['low']:.3f} to {found['high']:.3f})" if found else ""


if __name__ == "__main__":
    project.by_hand(monitor)
