"""Judges the models side by side."""

import math
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import State

from flows import project
from flows.project import escaped, mlflow_link, report_link
from touchline.core import params
from touchline.core.files import read_json, read_table
from touchline.models import scores
from touchline.report import page


@flow(name="evaluation", flow_run_name=project.run_name)
def evaluation(clone: bool = False) -> State | list[State]:
    """Judge the models on the test photos; register the better one.

    Args:
        clone: work in a clone of the project's own, fed by `dvc pull`, and leave the checkout alone.
    """
    return project.run(lambda graph: graph.up_to("register"), SHOWN, clone=clone)


def show_curves(workspace: Path, _: str) -> None:
    """Accuracy and loss of every model at the epoch whose weights were kept, and where the curves are drawn."""
    kept = read_table(workspace / "reports/curves.csv").query("kept == 1")
    lines = [
        report_link("figures/learning_curves.png", "The curves, epoch by epoch"),
        "",
        "| model | photos | kept | accuracy | loss |",
        "|---|---|---|---|---|",
    ]
    for row in kept.to_dict("records"):
        at = f"epoch {row['epoch']:.0f}" if math.isnan(row["strength"]) else f"strength {row['strength']:g}"
        lines.append(
            f"| {escaped(row['model'])} | {row['subset']} | {at} | {row['accuracy']:.3f} | {row['loss']:.3f} |"
        )
    create_markdown_artifact("\n".join(lines), key="learning-curves", description="Accuracy and loss by epoch")


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
