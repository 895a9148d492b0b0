"""Looks for new photos, checks them and divides them anew if any came."""

from collections import Counter
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.states import State

from flows import project, validation
from touchline.core.files import read_json, read_table


@flow(name="ingestion", flow_run_name=project.run_name)
def ingestion(clone: bool = False) -> State | list[State]:
    """Look for new photos; validate and split again if any came.

    Args:
        clone: work in a clone of the project's own, fed by `dvc pull`, and leave the checkout alone.
    """
    return project.run(lambda graph: graph.up_to("split"), SHOWN, forced=["ingest"], clone=clone)


def show_photos(workspace: Path, _: str) -> None:
    """How many photos of each class came from each source, and into which subset; the others were rejected."""
    photos = read_table(workspace / "data/photos.csv")
    split = read_table(workspace / "data/split.csv")
    subset_of = dict(split[["path", "subset"]].itertuples(index=False))
    counts = Counter(
        (row["class"], row["source"], subset_of.get(row["path"], "rejected")) for row in photos.to_dict("records")
    )
    rows = [
        {"class": label, "source": source, "subset": subset, "photos": count}
        for (label, source, subset), count in sorted(counts.items())
    ]
    notes = read_json(workspace / "reports/ingest.json")["notes"]
    create_table_artifact(rows, key="photos", description="  \n".join(["Photos by class, source and subset", *notes]))


SHOWN = validation.SHOWN | {"split": show_photos}

if __name__ == "__main__":
    project.by_hand(ingestion)
