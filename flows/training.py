"""Trains the models, also with other params than those of params.yaml."""

from pathlib import Path

from prefect import flow
from prefect.states import State

from flows import evaluation, ingestion, project
from flows.overrides import overridden


@flow(name="training", flow_run_name=project.run_name)
def training(
    model: str = "transfer",
    backbone: str | None = None,
    epochs: int | None = None,
    overrides: list[str] | None = None,
    clone: bool = False,
) -> State | list[State]:
    """Train, evaluate and register. With other params it is an experiment, which never becomes champion by itself.

    Args:
        model: the entry of `models` in params.yaml that `backbone` and `epochs` are for.
        backbone: another ImageNet backbone, for example mobilenet_v2.
        epochs: at most so many epochs; for a model that has them, which a head has not.
        overrides: any other params, as `dvc exp run -S` takes them: `models.cnn.dropout=0.3`.
        clone: work in a clone of the project's own, fed by `dvc pull`, and leave the checkout alone.
    """

    def changes(workspace: Path) -> list[str]:
        return overridden(workspace, model, backbone, epochs, overrides or [])

    return project.run(lambda graph: graph.up_to("register"), SHOWN, clone=clone, changes=changes)


SHOWN = ingestion.SHOWN | evaluation.SHOWN

if __name__ == "__main__":
    project.by_hand(training)
