"""How wrong the forecast of `drift` and `monitor` is on photos of sources that a head did not learn from.

    python benchmarks/forecast.py --photos DIR --others DIR [--cache FILE.npz]

As benchmarks/unknown.py, whose splits, features and cache these are. Each source of at least 20 photos is left out in
turn (a head learns from all others), then all but two, then three random fifths. Of each the true accuracy, each
estimate, and what is said without a look at the photos: the accuracy on training photos that were left out. `unknown`:
the same for the photos that the reference does not call unknown, which is what is shipped.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from models import Photos
from unknown import SHARE, STRENGTH, layers_of, splits

from touchline.core.params import BackboneFeatures, HeadParams
from touchline.core.params import load as load_params
from touchline.models import backbones, forecast, heads
from touchline.models.forecast import CALIBRATED, CONFIDENCE, FEWEST, THRESHOLDED, Forecaster
from touchline.models.reference import Reference

SHIPPED = load_params(Path(__file__).parents[1] / "params.yaml")
HEAD = next(model for model in SHIPPED.models.values() if isinstance(model, HeadParams))
ESTIMATES = (THRESHOLDED, CALIBRATED, CONFIDENCE, "left-out accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--others", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    chosen = parser.parse_args()
    photos, features = Photos.of(chosen.photos), BackboneFeatures(
        backbone=["efficientnet_lite2"], image_size=260, views=1
    )  # fmt: skip
    with (chosen.others / "manifest.csv").open(newline="") as table:
        files = photos.files + [chosen.others / row["file"] for row in csv.DictReader(table)]
    if chosen.cache and chosen.cache.is_file():
        with np.load(chosen.cache) as stored:
            rows = stored["top"]
    else:
        rows = layers_of(files, features)["top"]
    rows, imagenet = rows[: len(photos.labels)], backbones.imagenet(features, Path.cwd())
    names, counts = np.unique(photos.groups, return_counts=True)
    cut = [(name, *next(part[1:] for part in splits(photos, [name]) if part[0])) for name in names[counts >= FEWEST]]
    cut += [(name, *next(part[1:] for part in splits(photos, [name]) if part[0]))
            for name in ("source-10,source-12", "^source-07,source-10")]  # fmt: skip
    cut += [("random", train, test) for by_group, train, test in splits(photos, []) if not by_group]
    print(
        "| left out | photos | accuracy | "
        + " | ".join(ESTIMATES)
        + " | give or take | unknown | accuracy | forecast |"
    )
    print("|---" * (len(ESTIMATES) + 7) + "|")
    errors: dict[bool, list[list[float]]] = {False: [], True: []}
    for name, train, test in cut:
        labels, groups = photos.labels[train], photos.groups[train]
        if len(set(labels)) < len(set(photos.labels)):
            continue
        forecaster = forecast.of_head(rows[train], labels, list(groups), STRENGTH, HEAD)
        if forecaster is None:
            print(f"| {name} | {len(test)} | no forecast: too few groups to learn from |", flush=True)
            continue
        head = next(heads.path(rows[train], labels, heads.balance(labels, groups, "group"), [STRENGTH]))
        found = head.probabilities(rows[test])
        right = found.argmax(axis=1) == photos.labels[test]
        said = forecaster.accuracy(found)
        estimates = [said[THRESHOLDED], said[CALIBRATED], said[CONFIDENCE], constant(forecaster)]
        names_of = [str(number) for number in train]
        reference = Reference.of(rows[train], list(labels.astype(str)), names_of, imagenet)
        known = reference.similarity(rows[test]) >= reference.threshold(SHARE)
        shipped = forecaster.accuracy(found[known])
        numbers = [right.mean(), *estimates, said["give_or_take"], 1 - known.mean(), right[known].mean()]
        numbers += [shipped["accuracy"]]
        print(f"| {name} | {len(test)} | " + " | ".join(f"{value:.3f}" for value in numbers) + " |", flush=True)
        errors[name == "random"].append([
            *(each - right.mean() for each in estimates), shipped["accuracy"] - right[known].mean(),
            said["give_or_take"],
        ])  # fmt: skip
    for random, rows_of in errors.items():
        found = np.array(rows_of)
        wrong = ", ".join(
            f"{name} {value:.3f}"
            for name, value in zip((*ESTIMATES, "as shipped"), np.sqrt((found[:, :-1] ** 2).mean(axis=0)), strict=True)
        )
        inside = (np.abs(found[:, -2]) <= found[:, -1]).mean()
        print(f"\n{'random' if random else 'by source'}: root mean square error: {wrong}; "
              f"mean absolute: {np.abs(found[:, -2]).mean():.3f}; inside give or take: {inside:.0%}")  # fmt: skip


def constant(forecaster: Forecaster) -> float:
    photos = [part["photos"] for part in forecaster.left_out]
    return float(np.average([part["accuracy"] for part in forecaster.left_out], weights=photos))


if __name__ == "__main__":
    main()
