"""What `make run` ends with: the last run in one table, and where to look next."""

from touchline.core import stage
from touchline.core.errors import TouchlineError
from touchline.core.files import read_json
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.models import scores
from touchline.stages import register
from touchline.tracking import registered


def show(paths: Paths, params: Params) -> None:
    """Print the models' metrics on the test photos, the seconds spent, the decision and why, and where to look."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    metrics = read_json(paths.reports / "metrics.json")
    outcome = read_json(paths.reports / "registration.json")
    records = {name: read_json(paths.models / f"{name}.json") for name in params.models}
    table = Table(
        Column("model", overflow="fold"), *scores.titles(), "training",
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name, found in metrics["models"].items():
        seconds = f"{records[name]['metrics']['seconds/train']:.0f} s"
        style = "bold" if name == outcome["better_model"] else None
        table.add_row(records[name]["run_name"], *map(escape, scores.cells(found)), seconds, style=style)
    for name, found in metrics["baselines"].items():
        label = f"{name.replace('_', ' ')} ({'control' if name == 'size_and_aspect' else 'baseline'})"
        table.add_row(label, *map(escape, scores.cells(found)), "", style="dim")
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a log has no edge to break lines at
    console.print(table)
    # The cost of a model that was removed from params.yaml is still recorded.
    named = {*params.features, *params.models}
    costs = {name: cost for name, cost in stage.costs(paths).items() if name.partition("@")[2] in {"", *named}}
    total = sum(cost["seconds"] for cost in costs.values())
    each = ", ".join(f"{name} {cost['seconds']:.0f}" for name, cost in costs.items())
    console.print(f"seconds     {total:.0f} ({each})")
    if found := stage.slower(costs, params.compute.slowdown):
        console.print(f"slower      {'; '.join(found)}")
    if made := outcome["registered"]:
        console.print(f"registered  version {made['version']} of {params.register_.name}: {made['model']}")
    elif outcome["experiment"]:
        console.print(
            f"registered  no, these are the results of an experiment: {register.ONCE_MORE} registers its model"
        )
    console.print(f"why         {outcome['why_better']}; {outcome['reason']}")
    # It may have been changed since, by `touchline promote` or `rollback`.
    try:
        champion = registered.champion(registered.versions(paths, params.register_.name))
        console.print(f"champion    {f'version {champion.number}' if champion else 'none'}")
    except TouchlineError as error:  # a server that does not answer
        console.print(f"champion    not known: {error}")
    if "sample" in params.ingest.sources:
        console.print("note        the sample's photos are drawn: accuracy on them says nothing about photos")
    console.print(f"report      {paths.relative(paths.reports / 'report.html')}")
    console.print("MLflow UI   make mlflow")
