"""What fitting a head costs as rows grow: seconds and peak memory, on made-up features of 1,280 numbers a photo.

    python benchmarks/head.py [--rows 10000 100000 1000000] [--compare 100000] [--folder DIR]

Each number of rows has a process of its own. It does what `train` does to a head: cross-validation of each strength of
params.yaml, the head of the training photos, its validation, and the head of all. DIR, by default the folder for
temporary files, takes 5 kB a row. Up to `--compare` rows the weights are compared with those of scikit-learn's
LogisticRegression with a tolerance of 1e-9: its own, 1e-4, ends further from the solution than what is asked here.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

CHANNELS = 1280
VALIDATION_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--compare", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--fit", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        print(json.dumps(fitted(options.folder, options.rows[0], options.fit)))
        return
    print(f"{platform.node()}: {os.cpu_count()} cores, {platform.machine()}", flush=True)
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write(Path(folder), rows)
            ours = measured(folder, rows, "ours")
            print(f"head, {rows:,} rows: {ours['seconds']:.0f} s, {ours['megabytes']:.0f} MB", flush=True)
            if rows <= options.compare:
                exact = measured(folder, rows, f"scikit-learn {ours['strength']}")
                difference = np.abs(np.subtract(ours["weights"], exact["weights"])).max()
                largest = np.abs(exact["weights"]).max()
                print(
                    f"    {difference:.1e} from scikit-learn's weights, the largest {largest:.2f}; one fit of "
                    f"it: {exact['seconds']:.0f} s, {exact['megabytes']:.0f} MB",
                    flush=True,
                )


def measured(folder: str, rows: int, what: str) -> dict:
    command = [sys.executable, __file__, "--folder", folder, "--rows", str(rows), "--fit", what]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def digest(number: int) -> str:
    return sha256(str(number).encode()).hexdigest()


def labels_of(rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2, rows)


def write(folder: Path, rows: int) -> None:
    """Rows like those of a backbone: none below 0, few channels that vary much, classes that they tell in part."""
    from touchline.data import feature_store

    random, labels = np.random.default_rng(0), labels_of(rows)
    spread = np.geomspace(1, 0.05, CHANNELS).astype(np.float32)
    told = random.normal(0, 0.06, CHANNELS).astype(np.float32) * spread

    def compute(digests: Sequence[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(digests), feature_store.PIECE):
            part = labels[start : start + feature_store.PIECE]
            noise = random.standard_normal((len(part), CHANNELS), np.float32) * spread
            yield from np.maximum(noise + (2 * part[:, None] - 1) * told, 0).astype(np.float32)

    feature_store.update(folder, {}, [digest(number) for number in range(rows)], compute)


def fitted(folder: Path, rows: int, what: str) -> dict[str, object]:
    """Seconds, peak megabytes, strength and weights (for scaled rows) of a fit."""
    from touchline.core import params
    from touchline.data.feature_store import Arrays
    from touchline.models import architectures, heads
    from touchline.models.training import Labelled, Task

    photos = Labelled(
        [digest(number) for number in range(rows)],
        [Path()] * rows,
        labels_of(rows),
        [str(n % 997) for n in range(rows)],
    )
    cut = round(rows * (1 - VALIDATION_SHARE))
    parts = [
        Labelled(photos.digests[part], photos.files[part], photos.labels[part], photos.groups[part])
        for part in (slice(cut), slice(cut, None))
    ]
    project = Path(__file__).resolve().parent.parent
    loaded = params.load(project / "params.yaml")
    wanted = loaded.models["transfer"]
    task = Task(loaded.features[wanted.input], Arrays(folder), *parts, project, lambda _: None)
    began = time.perf_counter()
    if what == "ours":
        _, kept, head, _ = architectures._fit_head(wanted, task, photos)
        strength = wanted.strengths[kept]
        seconds = time.perf_counter() - began
        total = squares = 0.0
        for _, batch in Arrays(folder).stream(photos.digests):
            total, squares = total + batch.sum(dtype=np.float64), squares + (batch.astype(np.float64) ** 2).sum()
        scale = np.sqrt(squares / (rows * CHANNELS) - (total / (rows * CHANNELS)) ** 2)
        weights = head.weights[:, 1] * scale
    else:
        from sklearn.linear_model import LogisticRegression

        strength = float(what.split()[1])
        held = Arrays(folder)[photos.digests]
        mean, scale = held.mean(axis=0, dtype=np.float64), held.std(dtype=np.float64)
        regression = LogisticRegression(C=strength, tol=1e-9, max_iter=5000)
        balance = heads.balance(photos.labels, photos.groups, wanted.balance)
        regression.fit((held - mean) / scale, photos.labels, sample_weight=balance)
        weights, seconds = regression.coef_[0] / 2, time.perf_counter() - began
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "megabytes": megabytes, "strength": strength, "weights": weights.tolist()}


if __name__ == "__main__":
    main()
