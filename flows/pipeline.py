"""Runs everything: photos to a registered model."""

from prefect import flow
from prefect.states import State

from flows import evaluation, ingestion, project


@flow(name="pipeline", flow_run_name=project.run_name)
def pipeline(
    look_for_photos: bool = False, clone: bool = False, push: bool = True, commit_to: str | None = None
) -> State | list[State]:
    """Bring everything up to date; what has not changed is shown as cached.

    Args:
        look_for_photos: run `ingest` even where nothing it depends on has changed.
        clone: work in a clone of the project's own, fed by `dvc pull`, and leave the checkout alone.
        push: `dvc push` afterwards, where a remote is configured.
        commit_to: commit dvc.lock on this branch afterwards; nothing is committed without it.
    """
    return project.run(
        lambda graph: graph.needs,
        ingestion.SHOWN | evaluation.SHOWN,
        forced=["ingest"] if look_for_photos else [],
        clone=clone,
        push=push,
        commit_to=commit_to,
    )


if __name__ == "__main__":
    project.by_hand(pipeline)
