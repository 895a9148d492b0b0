"""Checks every photo, and the set of them, with Great Expectations."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import State

from flows import project
from flows.project import escaped, report_link
from touchline.core.files import read_json


@flow(name="validation", flow_run_name=project.run_name)
def validation(clone: bool = False) -> State | list[State]:
    """Validate the photos there are.

    Args:
        clone: work in a clone of the project's own, fed by `dvc pull`, and leave the checkout alone.
    """
    return project.run(lambda graph: graph.up_to("validate"), SHOWN, clone=clone)


def show_validation(workspace: Path, _: str) -> None:
    """What was expected and seen, and what failed."""
    report = read_json(workspace / "reports/validation.json")
    # A photo that fails is rejected and that is all; a class or the set that fails stops the pipeline.
    failed = [found for found in report["expectations"] if not found["passed"] and found["level"] != "photo"]
    lines = [
        f"# Validation {'passed' if report['success'] else 'FAILED'}",
        "",
        "| | expectation | of each | allowed | seen |",
        "|---|---|---|---|---|",
    ]
    for found in report["expectations"]:
        mark = "ok" if found["passed"] else "rejected" if found["level"] == "photo" else "**FAILED**"
        words = (mark, found["name"], found["level"], found["allowed"], found["observed"])
        lines.append("| " + " | ".join(map(escaped, words)) + " |")
    if failed:
        lines += ["", "**Failed:** " + escaped("; ".join(f"{found['name']}: {found['observed']}" for found in failed))]
    lines += ["", report_link("validation.html", "What was rejected, and why")]
    create_markdown_artifact("\n".join(lines), key="validation", description="Great Expectations' word on the photos")


SHOWN = {"validate": show_validation}

if __name__ == "__main__":
    project.by_hand(validation)
