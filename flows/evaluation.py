"""Judges the models side by side."""

import base64
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.states import State

from flows import project
from flows.project import escaped, mlflow_link, report_link
from touchline.core import params
from touchline.core.files import read_json
from touchline.models import scores
from touchline.report import page


@flow(name="evaluation")
def evaluation(clone: bool = False) -> State | list[State]:
    """Judge the models on the test photos; register the better one.

    Args:
        clone: work in a clone of the project's own, fed by `dvc pull`, and leave the checkout alone.
    """
    return project.run(lambda graph: graph.up_to("register"), SHOWN, clone=clone)


def show_curves(workspace: Path, _: str) -> None:
    """Accuracy and loss by epoch of every model."""
    figure = base64.b64encode((workspace / "reports/figures/learning_curves.png").read_bytes()).decode()
    create_image_artifact(
        f"data:image/png;base64,{figure}", key="learning-curves", description="Accuracy and loss by epoch"
    )


def show_decision(workspace: Path, _: str) -> None:
    """What was decided, the report, the models side by side, and links to their runs."""
    metrics = read_json(workspace / "reports/metrics.json")
    decision = read_json(workspace / "reports/registration.json")
    records = {name: read_json(workspace / f"models/{name}.json") for name in metrics["models"]}
    registered_name = params.load(workspace / "params.yaml").register_.name
    sentence = page.decision(decision, records[decision["better_model"]]["run_name"], registered_name)
    lines = [
        f"**{escaped(sentence)}**",
        "",
        report_link("report.html", "The whole report"),
        "",
        "# The models side by side",
        "",
        f"| model | {' | '.join(scores.titles())} | MLflow |",
        "|---" * (len(scores.METRICS) + 2) + "|",
    ]
    for name, found in metrics["models"].items():
        record = records[name]
        run = mlflow_link(f"experiments/{record['experiment_id']}/runs/{record['run_id']}", record["run_id"][:8])
        lines.append(f"| {' | '.join([escaped(record['run_name']), *scores.cells(found), run])} |")
    for name, found in metrics["baselines"].items():
        lines.append(f"| {' | '.join([name.replace('_', ' '), *scores.cells(found)])} | |")
    lines += ["", *(_mcnemar(pair) for pair in metrics["mcnemar"])]
    if registered := decision["registered"]:
        number = registered["version"]
        place, text = f"models/{registered_name}/versions/{number}", f"version {number} of {registered_name}"
        lines += ["", f"Registered: {mlflow_link(place, text)}"]
    create_markdown_artifact("\n".join(lines), key="decision", description="Which model is better, and what followed")


def _mcnemar(pair: dict[str, Any]) -> str:
    first, second = map(escaped, pair["models"])
    return (
        f"McNemar, {first} against {second}: only the first right "
        f"{pair['only_first_right']}, only the second {pair['only_second_right']}, p = {pair['p_value']:.3g}"
    )


SHOWN = {"evaluate": show_curves, "register": show_decision}

if __name__ == "__main__":
    project.by_hand(evaluation)
