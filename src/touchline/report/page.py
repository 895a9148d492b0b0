"""`reports/report.html`: the whole run on one page that opens from disk, without a network."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core import stage
from touchline.core.errors import TouchlineError, one_line
from touchline.core.files import RENEW, read_table, sha256, write_text
from touchline.core.params import SUBSETS, Params
from touchline.core.paths import Paths
from touchline.data import rights, thumbnails
from touchline.models import explain, scores
from touchline.report import html, plots

if TYPE_CHECKING:
    import pandas as pd

_LONGER_SIDE = 240
# A page of a hundred classes is to stay one that can be sent.
_MOST_RANDOM_PHOTOS = 48
_STAGES = ("ingest", "validate", "split", "features", "train", "evaluate")
_PACKAGES = ("tensorflow", "keras", "scikit-learn", "numpy", "opencv-python-headless", "dvc", "mlflow")


def write(
    paths: Paths,
    params: Params,
    metrics: Mapping[str, Any],
    speeds: Mapping[str, Any],
    records: Mapping[str, Any],
    outcome: Mapping[str, Any],
) -> Path:
    """Write the page from what the stages wrote, and return its path.

    Args:
        metrics: `reports/metrics.json`.
        speeds: `reports/evaluation.json`.
        records: `models/<name>.json` by name.
        outcome: what `register` decided.
    """
    split = read_table(paths.split_table)
    tables = {
        name: read_table(paths.reports / f"{name}.csv")
        for name in ("predictions", "per_class", "slices", "roc", "curves", "gallery", "similarity")
    }
    of_model = tables["predictions"].groupby("model", sort=False)
    page = html.render(
        "report.html",
        params=params,
        decision=decision(outcome, records[outcome["better_model"]]["run_name"], params.register_.name),
        better=outcome["better_model"],
        metrics=metrics,
        titles=scores.titles(),
        cells=scores.cells,
        speeds=speeds,
        records=records,
        photos=len(split),
        groups=split["group"].nunique(),
        counts=_counts(split),
        licences=_licences(split),
        attributed=bool(((split["licence"] != "") | (split["author"] != "")).any()),
        brought=[subset for subset in SUBSETS if (split["given"] == subset).any()],
        random_photos=_random_photos(paths, params, split),
        figures=plots.svgs(params, tables),
        named=plots.MOST_IN_A_TABLE,
        confusion={name: _confusion(part, params) for name, part in of_model},
        most_confused={name: plots.most_confused(part) for name, part in of_model},
        per_class=tables["per_class"].to_dict("records"),
        slices=_slices(tables["slices"]),
        mistakes={name: int((part["class"] != part["predicted"]).sum()) for name, part in of_model},
        galleries=_galleries(paths, tables["gallery"], split),
        unlike=_unlike(paths, params, tables["similarity"], split),
        hidden=split.loc[split.index.difference(rights.shown(split, params).index), "source"].tolist(),
        costs=costs(paths, params),
        hardware=records[outcome["better_model"]]["tags"]["touchline.hardware"],
        code=stage.code(paths),
        digests=_digests(paths, records),
        versions={"Python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    )
    path = paths.reports / "report.html"
    write_text(path, page)
    return path


def decision(outcome: Mapping[str, Any], run_name: str, registered_name: str) -> str:
    """The decision of `register` and why, in one sentence.

    Args:
        outcome: `reports/registration.json`.
        run_name: what people call the better model.
    """
    better = f"{run_name} is the better model ({outcome['why_better']})"
    registered = outcome["registered"]
    if registered is None:
        return f"{better}; {outcome['reason']}."
    as_version = f"version {registered['version']} of {registered_name}"
    if outcome["champion_before"] == registered["version"]:
        return f"{better} and stays the champion, {as_version}."
    if outcome["promoted"]:
        return f"{better} and, as {as_version}, the champion: {outcome['reason']}."
    return f"{better} and is {as_version}, but not the champion: {outcome['reason']}."


def _counts(split: "pd.DataFrame") -> list[dict[str, Any]]:
    """Photos of each class and source by subset."""
    rows = split.groupby(["class", "source"])["subset"].value_counts().unstack(fill_value=0)
    return rows.reindex(columns=list(SUBSETS), fill_value=0).reset_index().to_dict("records")


def _licences(split: "pd.DataFrame") -> list[dict[str, Any]]:
    """How many photos of each source have which licence, and how many authors they name."""
    authors = split["author"].where(split["author"] != "")
    rows = split.assign(author=authors).groupby(["source", "licence"])["author"].agg(["size", "nunique"]).reset_index()
    return rows.sort_values("size", ascending=False, kind="stable").to_dict("records")


def _confusion(of_model: "pd.DataFrame", params: Params) -> list[list[tuple[int, float]]]:
    counts, shares = plots.confusion(of_model, params.classes)
    return [list(zip(*row, strict=True)) for row in zip(counts.tolist(), shares.tolist(), strict=True)]


def _slices(slices: "pd.DataFrame") -> list[dict[str, Any]]:
    """One row a slice, with the accuracies of every model."""
    parts = slices.groupby(["by", "slice"], sort=False)
    return [
        {"by": by, "slice": name, "photos": int(part["photos"].iloc[0]), "models": part.to_dict("records")}
        for (by, name), part in parts
    ]


def _random_photos(paths: Paths, params: Params, split: "pd.DataFrame") -> dict[str, list[dict[str, Any]]]:
    most = max(1, min(6, _MOST_RANDOM_PHOTOS // len(params.classes)))
    chosen = plots.random_photos(split, params, most)
    return {
        label: [_card(row, _thumbnail(paths, row)) for row in rows.to_dict("records")]
        for label, rows in zip(params.classes, chosen, strict=True)
    }


def _galleries(paths: Paths, gallery: "pd.DataFrame", split: "pd.DataFrame") -> dict[str, list[dict[str, Any]]]:
    """For each model its photos, mistakes first, and beside each where the model looked."""
    known = split.set_index("path")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, heats in _heats(paths.reports / "heats.npz").items():
        rows = gallery[gallery["model"] == name].to_dict("records")
        found[name] = []
        for said, heat in zip(rows, heats, strict=True):
            row = known.loc[said["path"]].to_dict() | said
            pixels = _thumbnail(paths, row)
            warm = thumbnails.jpeg(explain.warmed(pixels, heat / np.float32(255))) if heat.size else ""
            found[name].append(_card(row, pixels) | {"heat": warm, "wrong": row["class"] != row["predicted"]})
    return found


def _unlike(
    paths: Paths, params: Params, similarity: "pd.DataFrame", split: "pd.DataFrame"
) -> dict[str, list[dict[str, Any]]]:
    """For each model the test photos least similar to the training photos, of those that may be shown."""
    known = split.drop(columns=["class"])
    rows = rights.shown(similarity[similarity["subset"] == "test"].merge(known, on="path"), params)
    return {
        name: [
            _card(row, _thumbnail(paths, row))
            for row in part.nsmallest(params.evaluate.gallery, "similarity").to_dict("records")
        ]
        for name, part in rows.groupby("model", sort=False)
    }


def _heats(path: Path) -> dict[str, np.ndarray]:
    """By model, what `evaluation` found: uint8, shape (photos, height, width)."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except Exception as error:  # a torn zip, no zip, an array alone: NumPy raises many kinds
        raise TouchlineError(f"{path} is no readable archive ({one_line(error)}): {RENEW}") from None


def _thumbnail(paths: Paths, row: Mapping[str, Any]) -> np.ndarray:
    return thumbnails.thumbnail(paths.workspace / row["path"], _LONGER_SIDE)


def _card(row: Mapping[str, Any], pixels: np.ndarray) -> dict[str, Any]:
    """A row of photos.csv and its thumbnail."""
    return {**row, "photo": thumbnails.jpeg(pixels)}


def costs(paths: Paths, params: Params) -> list[dict[str, Any]]:
    """What each stage's last run on this machine cost, in the order in which they follow each other."""
    known = {"", *params.features, *params.models}
    of_stages = stage.costs(paths).items()
    rows: list[dict[str, Any]] = [{"stage": name, "peak_megabytes": None, **cost} for name, cost in of_stages]
    rows = [row for row in rows if row["stage"].split("@")[0] in _STAGES and row["stage"].partition("@")[2] in known]
    return sorted(rows, key=lambda row: _STAGES.index(row["stage"].split("@")[0]))


def _digests(paths: Paths, records: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of what tells two runs apart."""
    files = [paths.workspace / "params.yaml", paths.split_table]
    models = {f"models/{name}.keras": record["model_sha256"] for name, record in records.items()}
    return {paths.relative(file): sha256(file) for file in files} | models
