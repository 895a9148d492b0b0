"""What each part of the models is worth, and how fast a model ages: parts taken away, photos and sources added.

    python benchmarks/parts.py features --photos DIR --cache FOLDER    once: what the backbones say of all photos
    python benchmarks/parts.py taken --photos DIR --cache FOLDER       a head without one of its parts
    python benchmarks/parts.py amount --photos DIR --cache FOLDER      a head of fewer training photos
    python benchmarks/parts.py age --photos DIR --cache FOLDER         a head on sources that came after it was trained
    python benchmarks/parts.py cnn --photos DIR --seeds 2              the simple network without its augmentation

DIR holds manifest.csv (file, class, group). Random splits are stratified 80/20; `--test-groups a,b` adds a split whose
test photos are those groups, `--test-groups ^a,b` one whose test photos are all others. The strength of each head is
chosen by cross-validation of its training photos.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from models import Ours, Photos, Split, splits
from sklearn.metrics import balanced_accuracy_score

from touchline.core.params import BackboneFeatures, HeadParams, load
from touchline.models import heads
from touchline.stages.features import pixels, pooled

SHIPPED = load(Path(__file__).resolve().parent.parent / "params.yaml")
HEAD = SHIPPED.models["transfer"]
BACKBONES, SIDE, SMALLER = ("efficientnet_lite0", "efficientnet_lite2"), 320, 224
# By what is taken away from both backbones on photos of 320 pixels and their mirror images, groups weighing the same.
TAKEN = {
    "nothing": ("both-320-2", "group"),
    "the mirror image": ("both-320-1", "group"),
    "the second backbone, Lite0": ("efficientnet_lite2-320-2", "group"),
    "the first backbone, Lite2": ("efficientnet_lite0-320-2", "group"),
    "pixels: 224 for 320": ("both-224-2", "group"),
    "the weights of groups (balance: class)": ("both-320-2", "class"),
    "all weights (balance: none)": ("both-320-2", "none"),
    "Lite0, the mirror image (`fast`)": ("efficientnet_lite2-320-1", "group"),
}
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
OF_SOURCE = (0.0, 0.1, 0.25, 0.5, 1.0)


def compute(photos: Photos, cache: Path) -> None:
    """Write the features of each backbone, side and number of views."""
    cache.mkdir(parents=True, exist_ok=True)
    for side in (SIDE, SMALLER):
        for backbone in BACKBONES:
            for views in (1, 2):
                path = cache / f"{backbone}-{side}-{views}.npy"
                if not path.exists():
                    features = BackboneFeatures(backbone=[backbone], image_size=side, views=views)
                    np.save(path, np.stack(list(pooled(pixels(photos.files, side), features, Path.cwd()))))
                    print(path, file=sys.stderr, flush=True)


def features(name: str, cache: Path) -> np.ndarray:
    """Of all photos, by a name such as `both-320-2`: float32, shape (photos, channels)."""
    backbone, _, rest = name.partition("-")
    names = BACKBONES if backbone == "both" else (backbone,)
    return np.hstack([np.load(cache / f"{each}-{rest}.npy") for each in names])


def probabilities(
    rows: np.ndarray, photos: Photos, train: np.ndarray, test: np.ndarray, balance: str = "group"
) -> np.ndarray:
    assert isinstance(HEAD, HeadParams)
    labels, groups = photos.labels[train], list(photos.groups[train])
    weights = heads.balance(labels, groups, balance)
    losses = heads.cross_validated(rows[train], labels, groups, weights, HEAD.strengths, HEAD.folds, HEAD.seed)
    head = next(heads.path(rows[train], labels, weights, [HEAD.strengths[int(np.argmin(losses))]]))
    return head.probabilities(rows[test])


def line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head_of(columns: tuple[str, ...]) -> None:
    line(*columns)
    line(*["---"] * len(columns))


def taken(photos: Photos, options: argparse.Namespace) -> None:
    cut = list(splits(photos, options.seeds, options.test_groups))
    head_of(("taken away", "random, accuracy", "random, log loss", "by source, balanced", "by source, log loss"))
    for name, (wanted, balance) in TAKEN.items():
        rows = features(wanted, options.cache)
        figures: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for split in cut:
            found = probabilities(rows, photos, learned(split), split.test, balance)
            labels, answers = photos.labels[split.test], found.argmax(axis=1)
            right = balanced_accuracy_score(labels, answers) if split.by_group else (answers == labels).mean()
            figures[split.by_group].append((float(right), heads.log_loss(labels, found)))
        line(name, *(f"{value:.3f}" for each in figures.values() for value in np.mean(each, axis=0)))


def amount(photos: Photos, options: argparse.Namespace) -> None:
    rows = features("efficientnet_lite2-320-1", options.cache)
    head_of(("training photos", "accuracy", "standard deviation", "log loss"))
    for share in SHARES:
        figures = []
        for seed, split in enumerate(splits(photos, options.seeds, [])):
            train = some(learned(split), share, seed, photos)
            found = probabilities(rows, photos, train, split.test)
            labels = photos.labels[split.test]
            figures.append((float((found.argmax(axis=1) == labels).mean()), heads.log_loss(labels, found), len(train)))
        accuracy, loss, count = np.mean(figures, axis=0)
        line(f"{count:.0f}", f"{accuracy:.3f}", f"{np.std(figures, axis=0, ddof=1)[0]:.3f}", f"{loss:.3f}")


def age(photos: Photos, options: argparse.Namespace) -> None:
    """Half of the new sources' photos judge; of the other half, none to all are learned from."""
    rows = features("efficientnet_lite2-320-1", options.cache)
    head_of(("new sources", *(f"{share:.0%} learned" for share in OF_SOURCE)))
    for split in splits(photos, 0, options.test_groups):
        cells = []
        for share in OF_SOURCE:
            figures, counts = [], []
            for seed in range(options.seeds):
                half = some(split.test, 0.5, seed, photos)
                judged = np.setdiff1d(split.test, half)
                new = some(half, share, seed, photos)
                found = probabilities(rows, photos, np.concatenate([learned(split), new]), judged)
                figures.append(balanced_accuracy_score(photos.labels[judged], found.argmax(axis=1)))
                counts.append(len(new))
            cells.append(f"{np.mean(figures):.3f} ({np.mean(counts):.0f})")
        line(", ".join(sorted(set(photos.groups[split.test]))), *cells)


def cnn(photos: Photos, options: argparse.Namespace) -> None:
    head_of(("taken away", "split", "accuracy", "log loss", "seconds"))
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(photos, Path(folder), "fast", "cnn")
        without = ours.model.augmentation.model_copy(update={"rotation": 0, "zoom": 0, "shift": 0, "flip": False})
        models = {"nothing": ours.model, "augmentation": ours.model.model_copy(update={"augmentation": without})}
        for number, split in enumerate(splits(photos, options.seeds, options.test_groups)):
            for name, ours.model in models.items():
                found, seconds, _ = ours(split, first=False)
                labels = photos.labels[split.test]
                right, loss = (found.argmax(axis=1) == labels).mean(), heads.log_loss(labels, found)
                line(name, number, f"{right:.3f}", f"{loss:.3f}", f"{seconds:.0f}")


def learned(split: Split) -> np.ndarray:
    return np.concatenate([split.train, split.validation])


def some(chosen: np.ndarray, share: float, seed: int, photos: Photos) -> np.ndarray:
    """A share of photos, drawn at random from each class."""
    return np.concatenate([*_drawn(chosen, share, seed, photos)])


def _drawn(chosen: np.ndarray, share: float, seed: int, photos: Photos) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    for label in range(len(photos.classes)):
        of_class = random.permutation(chosen[photos.labels[chosen] == label])
        yield of_class[: round(share * len(of_class))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["features", "taken", "amount", "age", "cnn"])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("parts"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--test-groups", nargs="*", default=["source-07", "source-10,source-12", "^source-07,source-10"]
    )
    options = parser.parse_args()
    photos = Photos.of(options.photos)
    if options.what == "features":
        compute(photos, options.cache)
    else:
        {"taken": taken, "amount": amount, "age": age, "cnn": cnn}[options.what](photos, options)


if __name__ == "__main__":
    main()
