"""How often `touchline drift` cries wolf, and what it hears: real photos, drawn scenes, darkened photos, other sources.

    python benchmarks/drift.py --photos DIR [--cache FOLDER] [--draws 100]

DIR holds a folder of photos for each class; a `manifest.csv` (columns file and group) says where each came from. In
each draw the photos are divided at random into training (half of them), test (a sixth) and new (a third); a head is
fitted to the training photos, and all is compared as the command does it, with the significance and the threshold of
params.yaml. Divided by photo, nothing but chance tells the three apart, so each alarm is false. Divided by group, each
source is new or known as a whole: whether an alarm is false then depends on what one takes for drift.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from audit import read

from touchline.commands import drift
from touchline.core import parallel
from touchline.core.params import BackboneFeatures, Params, load
from touchline.core.progress import track
from touchline.data import photos
from touchline.models import heads
from touchline.sources import sample
from touchline.stages import features

PROJECT = Path(__file__).resolve().parent.parent
# Of the light that is left.
DARKENED = (0.9, 0.75, 0.5, 0.25)
CLASSES = ["rugby", "soccer"]


@dataclass(frozen=True)
class Looked:
    """What is compared of photos, a row a photo."""

    embeddings: np.ndarray
    measured: np.ndarray
    hashes: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Looked":
        return Looked(self.embeddings[rows], self.measured[rows], self.hashes[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photos for each class")
    parser.add_argument("--cache", type=Path, help="where what was looked at is kept for the next time")
    parser.add_argument("--draws", type=int, default=100, help="how often the photos are divided at random")
    arguments = parser.parse_args()
    params = load(PROJECT / "params.yaml")

    table = read(arguments.photos)
    labels = table["class"].map({name: number for number, name in enumerate(CLASSES)}).to_numpy()
    groups = table["group"].to_numpy()
    files = [arguments.photos / name for name in table["path"]]
    real = look(files, params, arguments.cache, "real")
    print(f"{len(files):,} photos of {len(set(groups))} sources")

    def fitted(training: np.ndarray) -> heads.Head:
        balance = heads.balance(labels[training], groups[training], "group")
        return next(heads.path(real.embeddings[training], labels[training], balance, [0.03]))

    def trial(training: np.ndarray, test: np.ndarray, new: np.ndarray | Looked) -> list[drift.Comparison]:
        """Rows of the real photos, or others in the new ones' place, compared as the command does it."""
        head, others = fitted(training), new if isinstance(new, Looked) else real[new]
        predicted = [drift.predicted(head.probabilities(each.embeddings)) for each in (others, real[test])]
        return drift.compare(
            side(others, predicted[0]),
            side(real[training], {}),
            drift.Side(predicted[1], list(real.hashes[test])),
            params.split.near_duplicate_bits,
        )

    for size in (None, 30):
        alarms = Counter[str]()
        areas = []
        for seed in track(range(arguments.draws), arguments.draws, "by photo"):
            training, test, new = divided(len(files), seed)
            found = trial(training, test, new[:size])
            areas.append(found[0].value)
            alarms.update(each.what for each in found if each.warns(params.drift))
            alarms["any"] += any(each.warns(params.drift) for each in found)
            alarms["significant, whatever its size"] += any(
                each.corrected <= params.drift.significance for each in found
            )
            alarms["confidence alone, compared with training photos"] += surer(
                fitted(training), real, training, new[:size]
            )
        report(f"same photos, divided by photo, {size or len(new)} new", alarms, areas, arguments.draws)

    alarms, areas = Counter[str](), []
    for seed in range(20):
        chosen = np.random.default_rng(seed).permutation(sorted(set(groups)))
        new = np.isin(groups, chosen[: len(chosen) // 3])
        rest = np.random.default_rng(seed).permutation(np.flatnonzero(~new))
        # A third of the sources may be a handful of photos, or all there are of a class.
        if new.sum() < drift.FEWEST or len(set(labels[~new])) < len(CLASSES):
            continue
        if found := trial(rest[len(rest) // 4 :], rest[: len(rest) // 4], np.flatnonzero(new)):
            areas.append(found[0].value)
            alarms["any"] += any(each.warns(params.drift) for each in found)
    report("other sources, a third of them new", alarms, areas, len(areas))

    first = divided(len(files), 0)
    print(f"\n{'':34} {'AUC':>6} {'corrected p':>12} alarm")
    with TemporaryDirectory() as folder:
        for light in DARKENED:
            darker = [darkened(files[row], light, Path(folder, f"{light}-{row}.png")) for row in first[2]]
            show(
                f"{light:.0%} of the light",
                trial(*first[:2], look(darker, params, arguments.cache, str(light))),
                params,
            )
        scenes = drawn(Path(folder), params)
        show("drawn scenes", trial(*first[:2], look(scenes, params, arguments.cache, "scenes")), params)
    for name, count in Counter(groups).most_common():
        if count >= drift.FEWEST:
            rest = np.flatnonzero(groups != name)
            order = np.random.default_rng(0).permutation(rest)
            cut = len(order) // 4
            show(f"{name} ({count}) against the rest", trial(order[cut:], order[:cut], np.flatnonzero(groups == name)),
                 params)  # fmt: skip


def side(of: Looked, predicted: dict[str, np.ndarray]) -> drift.Side:
    measured = dict(zip(drift.MEASURES, of.measured.T, strict=True))
    return drift.Side({drift.CONTENT: of.embeddings, **predicted, **measured}, list(of.hashes))


def surer(head: heads.Head, real: Looked, training: np.ndarray, new: np.ndarray) -> bool:
    """What the command avoids: whether new photos seem to have drifted from those that the head learned from."""
    confidences = head.probabilities(real.embeddings).max(axis=1)
    sides = [drift.Side({drift.CONFIDENCE: confidences[rows]}, list(real.hashes[rows])) for rows in (new, training)]
    (found,) = drift.compare(*sides, drift.Side({}, []), 6)
    return found.corrected <= 0.01


def divided(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(count)
    return tuple(np.split(order, [count // 2, 2 * count // 3]))


def look(files: list[Path], params: Params, cache: Path | None, name: str) -> Looked:
    kept = cache / f"{name}.npz" if cache else None
    if kept and kept.exists():
        with np.load(kept) as stored:
            return Looked(**stored)
    backbone = next(kind for kind in params.features.values() if isinstance(kind, BackboneFeatures))
    rows = features.pooled(features.pixels(files, backbone.image_size), backbone, PROJECT)
    embeddings = np.stack(list(track(rows, len(files), f"features: {name}")))
    found = list(track(parallel.in_order(measure, files), len(files), f"measuring: {name}"))
    looked = Looked(embeddings, np.array([row for row, _ in found]), np.array([each for _, each in found]))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **vars(looked))
    return looked


def measure(file: Path) -> tuple[tuple[float, ...], str]:
    found = photos.measure(file, 1000)
    size = (found.width, found.height, found.width / found.height)
    return (*size, found.contrast, *drift.quality(file.read_bytes())), found.perceptual_hash


def darkened(file: Path, light: float, target: Path) -> Path:
    pixels = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    cv2.imwrite(str(target), np.round(pixels * light).astype(np.uint8))
    return target


def drawn(folder: Path, params: Params) -> list[Path]:
    drawing = params.ingest.sample.model_copy(update={"per_class": 150})
    files = []
    # What comes after the scenes are spoilt files.
    for number, each in enumerate(islice(sample.candidates(drawing, CLASSES), 150 * len(CLASSES))):
        files.append(folder / f"scene-{number}")
        files[-1].write_bytes(each.read())
    return files


def show(name: str, found: list[drift.Comparison], params: Params) -> None:
    alarm = [each.what for each in found if each.warns(params.drift)]
    print(f"{name:34} {found[0].value:6.3f} {min(each.corrected for each in found):12.4f} {', '.join(alarm) or 'none'}")


def report(name: str, alarms: Counter[str], areas: list[float], draws: int) -> None:
    parts = ", ".join(f"{what} {count}" for what, count in alarms.items() if what != "any") or "none"
    print(f"{name}: {alarms['any']} alarms of {draws} ({parts}); "
          f"AUC {np.mean(areas):.3f} ({min(areas):.3f} to {max(areas):.3f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
