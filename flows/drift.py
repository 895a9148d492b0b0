"""Says whether photos that were seen lately are still like those the champion learned from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed, State

from flows import project
from flows.project import escaped, report_link
from touchline.core import params
from touchline.core.files import read_json

# Exit codes of `touchline drift`, and the states they end in.
_STATES = {0: "Completed", 3: "Drift", 4: "TooFew"}


@flow(name="drift", flow_run_name=project.run_name)
def drift(folder: str | None = None) -> State:
    """Compare photos with those the champion learned from; warn where they have drifted away.

    Args:
        folder: of the photos; drift.folder of params.yaml where none is given, and nothing happens where that is empty.
    """
    if late := project.late():
        return late
    chosen = params.load(Path.cwd() / "params.yaml").drift
    if not folder and not chosen.folder:
        message = "nothing is compared: drift.folder in params.yaml names no folder"
        get_run_logger().info(message)
        return Completed(name="Skipped", message=message)
    code, why = project.run_alone("touchline", "drift", *(["--", folder] if folder else []))
    if code not in _STATES:
        return Failed(message=why)
    report = read_json(Path.cwd() / "reports/drift.json")
    create_markdown_artifact(_page(report), key="drift", description="New photos and those the champion learned from")
    if _STATES[code] == "Drift":
        differs = [each["what"] for each in report["comparisons"] if each["warns"]]
        payload = {"differs": differs, "photos": report["photos"]["new"]}
        project.warn("drift", report["verdict"], payload, "drift.html")
        if chosen.train:
            try:
                # It begins once this run has ended: one flow at a time.
                run_deployment("pipeline/pipeline", parameters={"look_for_photos": True}, timeout=0, as_subflow=False)
            except ObjectNotFound:
                return Failed(message="drift.train: this server has no deployment `pipeline`: start `make board`")
    return Completed(name=_STATES[code], message=report["verdict"])


def _page(report: Mapping[str, Any]) -> str:
    lines = [f"# {escaped(report['verdict'])}", ""]
    if report["comparisons"]:
        lines += ["| compared | with | found | distance | p, corrected | |", "|---|---|---|---|---|---|"]
    for each in report["comparisons"]:
        lines.append(
            f"| {each['what']} | {each['against']} photos | {each['statistic']} {each['value']:.3f} | "
            f"{each['distance']:.3f} | {each['corrected']:.4f} | {'drift' if each['warns'] else ''} |"
        )
    return "\n".join([*lines, "", report_link("drift.html", "The whole comparison, with the most unlike photos")])


if __name__ == "__main__":
    project.by_hand(drift)
