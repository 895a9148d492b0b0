"""What `make run` ends with: the last run in one table, and where to look next."""

from collections.abc import Mapping

from touchline.core import stage
from touchline.core.files import read_json
from touchline.core.params import load
from touchline.core.paths import Paths


def show(paths: Paths) -> None:
    """Print both models' test accuracy, the seconds spent, what was registered and why, and where to look."""
    from rich.console import Console
    from rich.table import Table

    params = load(paths.workspace / "params.yaml")
    metrics = read_json(paths.reports / "metrics.json")
    outcome = read_json(paths.reports / "registration.json")
    records = {name: read_json(paths.models / f"{name}.json") for name in params.models}
    table = Table("model", "test accuracy", "95 % interval", "balanced", "training")
    for name, found in metrics["models"].items():
        seconds = f"{records[name]['metrics']['seconds/train']:.0f} s"
        style = "bold" if name == outcome["better_model"] else None
        table.add_row(records[name]["run_name"], *_scores(found), seconds, style=style)
    for name, found in metrics["baselines"].items():
        label = f"{name.replace('_', ' ')} ({'control' if name == 'size_and_aspect' else 'baseline'})"
        table.add_row(label, *_scores(found), "", style="dim")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    # The cost of a model that was removed from params.yaml is still recorded.
    named = {*params.features, *params.models}
    costs = {name: cost for name, cost in stage.costs(paths).items() if name.partition("@")[2] in {"", *named}}
    total = sum(cost["seconds"] for cost in costs.values())
    each = ", ".join(f"{name} {cost['seconds']:.0f}" for name, cost in costs.items())
    console.print(f"seconds     {total:.0f} ({each})")
    registered = outcome["registered"]
    if registered:
        aliases = " and ".join(registered["aliases"])
        console.print(
            f"registered  version {registered['version']} of {params.register_.name} ({aliases}): {registered['model']}"
        )
    console.print(f"why         {outcome['why_better']}; {outcome['reason']}")
    if "sample" in params.ingest.sources:
        console.print("note        the sample's photos are drawn: accuracy on them says nothing about photos")
    console.print(f"report      {paths.relative(paths.reports / 'report.html')}")
    console.print("MLflow UI   make mlflow")


def _scores(found: Mapping[str, float]) -> tuple[str, str, str]:
    interval = f"{found['accuracy_low']:.3f} to {found['accuracy_high']:.3f}"
    return f"{found['accuracy']:.3f}", interval, f"{found['balanced_accuracy']:.3f}"
