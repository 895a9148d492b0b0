"""How well `touchline audit` finds wrong labels: 5 % of them are planted among photos of one's own.

    python benchmarks/audit.py --photos DIR

DIR holds a folder of photos for each class; a `manifest.csv` (columns file and group) says which belong together.
Precision and recall are of what the audit lists; average precision is of its whole ranking. What guessing reaches
stands beside them. A label that was wrong before counts as a false alarm, so the true precision is higher.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import pandas as pd

from touchline.commands import audit
from touchline.core import parallel
from touchline.core.params import BackboneFeatures, load
from touchline.core.paths import Paths
from touchline.core.progress import track
from touchline.data import photos, similarity
from touchline.stages import features

PROJECT = Path(__file__).resolve().parent.parent
SHARE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photos for each class")
    parser.add_argument("--seeds", type=int, default=5, help="how often labels are planted")
    arguments = parser.parse_args()

    table = read(arguments.photos)
    params = load(PROJECT / "params.yaml")
    backbone = next(kind for kind in params.features.values() if isinstance(kind, BackboneFeatures))
    files = [arguments.photos / name for name in table["path"]]
    rows = features.pooled(features.pixels(files, backbone.image_size), backbone, PROJECT)
    found = np.stack(list(track(rows, len(files), "computing features")))
    measured = parallel.in_order(lambda path: photos.measure(path, params.validate_.max_megapixels), files)
    hashes = [each.perceptual_hash or "0" for each in track(measured, len(files), "hashing")]
    alike = similarity.near_duplicates(hashes, params.split.near_duplicate_bits)
    groups = audit.groups(Paths(arguments.photos, arguments.photos), table, alike)
    classes = sorted(set(table["class"]))
    labels = table["class"].map({label: number for number, label in enumerate(classes)}).to_numpy()
    counts = ", ".join(f"{label} {(labels == number).sum():,}" for number, label in enumerate(classes))
    print(f"{len(labels):,} photos: {counts}; {len(alike)} pairs of near-duplicates")

    results = []
    for seed in range(arguments.seeds):
        results.append(result := planted(found, labels, groups, seed))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    print(f"\n{SHARE:.0%} wrong labels planted, {arguments.seeds} times: mean (lowest to highest)")
    for name in results[0]:
        values = [result[name] for result in results]
        print(f"{name:36} {np.mean(values):8.3f}  ({min(values):.3f} to {max(values):.3f})")


def read(folder: Path) -> pd.DataFrame:
    """Columns path, class and group, the photos of DIR's manifest or else all there are."""
    manifest = folder / "manifest.csv"
    if manifest.exists():
        with manifest.open(newline="") as file:
            rows = [(row["file"], row.get("group") or "") for row in csv.DictReader(file)]
    else:
        rows = [(path.relative_to(folder).as_posix(), "") for path in sorted(folder.glob("*/*")) if path.is_file()]
    return pd.DataFrame([(path, path.split("/")[0], group) for path, group in rows], columns=["path", "class", "group"])


def planted(found: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float]:
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(seed)
    wrong = np.zeros(len(labels), bool)
    wrong[random.choice(len(labels), round(SHARE * len(labels)), replace=False)] = True
    classes = labels.max() + 1
    given = np.where(wrong, (labels + random.integers(1, classes, len(labels))) % classes, labels)
    began = time.perf_counter()
    probabilities = audit.out_of_fold(found, given, groups)
    listed = [each.photo for each in audit.wrong_labels(given, probabilities)]
    seconds = time.perf_counter() - began
    suspicion = 1 - probabilities[np.arange(len(given)), given]
    return {
        "listed": len(listed),
        "precision": wrong[listed].mean() if listed else 0.0,
        "recall": wrong[listed].sum() / wrong.sum(),
        "average precision": average_precision_score(wrong, suspicion),
        "precision of the first 24": wrong[listed[:24]].mean() if listed else 0.0,
        "guessing: precision": wrong.mean(),
        "guessing: recall, as many listed": len(listed) / len(wrong),
        "guessing: average precision": average_precision_score(wrong, random.random(len(wrong))),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
