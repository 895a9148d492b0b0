"""How well methods tell photos of something else, from one pass of a frozen backbone: which one `reference.py` has.

    python benchmarks/unknown.py --photos DIR --others DIR [--backbone NAME --image-size SIDE] [--cache FILE.npz]

`--photos` holds manifest.csv (file, class, group), `--others` manifest.csv (file, kind), whose kinds are judged one by
one. Splits: three random ones (80/20, stratified), and one for each `--test-groups a,b`, whose test photos are those
groups (`^a,b`: all others). Learned and chosen by training photos alone: the head, every statistic, and the threshold,
which is the 5 % quantile of the training photos' own scores: leave-one-out where a method looks at neighbours,
out-of-fold where it looks at the head, else in-sample.

Of each method, and for random and by-group splits: AUROC of test photos against each kind, the share of test photos
that is kept, and the share of each kind that is caught. Means over the splits.

Then the other way: half of the photos of something else are a class of their own. Of the rest, and of the test photos,
the shares that are put into it; once with all kinds to learn from, and once without the kind that is asked about.
"""

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from models import Ours, Photos, Split

from touchline.core.params import BackboneFeatures
from touchline.core.tensorflow import import_tensorflow
from touchline.models import backbones, engines, heads, inference
from touchline.models.heads import Head
from touchline.models.reference import NEIGHBOURS, ImageNet, Reference
from touchline.models.training import seen
from touchline.stages.features import pixels

SHARE = 0.05
# Rows to scores: the higher, the more like the training photos. Of the training photos themselves, and of any others.
Fitted = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]
Method = Callable[["Training"], Fitted]


@dataclass(frozen=True)
class Training:
    """What a method may look at.

    Attributes:
        rows: positions of the training photos. layers: of all photos, by name, float32, shape (photos, channels).
    """

    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    layers: dict[str, np.ndarray]
    head: Head
    out_of_fold: np.ndarray

    @property
    def top(self) -> np.ndarray:
        return self.layers["top"]

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return rows @ self.head.weights + self.head.bias

    @classmethod
    def of(cls, chosen: np.ndarray, photos: Photos, layers: dict[str, np.ndarray]) -> "Training":
        labels, groups, rows = photos.labels[chosen], photos.groups[chosen], layers["top"][chosen]
        weights = heads.balance(labels, groups, "group")
        head = next(heads.path(rows, labels, weights, [STRENGTH]))
        left_out = heads.out_of_fold(rows, labels, groups, weights, [STRENGTH], 5, 42)[0]
        return cls(chosen, labels, groups, layers, head, left_out)


STRENGTH = 0.03  # what cross-validation chooses on the 1,205 photos of the docs


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest(rows: np.ndarray, k: int) -> Method:
    """Cosine similarity to the k-th nearest training photo (Sun et al., 2022)."""
    rows = unit(rows)

    def fit(training: Training) -> Fitted:
        known = rows[training.rows]

        def score(similar: np.ndarray) -> np.ndarray:
            return -np.partition(-similar, k - 1, axis=1)[:, k - 1]

        own = known @ known.T
        np.fill_diagonal(own, -1)
        return score(own), lambda chosen: score(rows[chosen] @ known.T)

    return fit


def in_sample(make: Callable[[Training], Callable[[np.ndarray], np.ndarray]]) -> Method:
    """A method that looks at the rows of the top layer one by one."""

    def fit(training: Training) -> Fitted:
        score = make(training)
        return score(training.top[training.rows]), lambda chosen: score(training.top[chosen])

    return fit


def of_probabilities(score: Callable[[np.ndarray], np.ndarray]) -> Method:
    def fit(training: Training) -> Fitted:
        others = lambda chosen: score(training.head.probabilities(training.top[chosen]))  # noqa: E731
        return score(training.out_of_fold), others

    return fit


def energy(training: Training) -> Callable[[np.ndarray], np.ndarray]:
    """Liu et al., 2020."""
    from scipy.special import logsumexp

    return lambda rows: logsumexp(training.logits(rows), axis=1)


def react(training: Training) -> Callable[[np.ndarray], np.ndarray]:
    """Energy of features cut off at the 90 % quantile (Sun et al., 2021)."""
    most = np.quantile(training.top[training.rows], 0.9)
    return lambda rows: energy(training)(np.minimum(rows, most))


def scale(training: Training) -> Callable[[np.ndarray], np.ndarray]:
    """Energy of features scaled by how much the largest 15 % hold of their sum (Xu et al., 2024)."""

    def score(rows: np.ndarray) -> np.ndarray:
        large = np.where(rows >= np.quantile(rows, 0.85, axis=1, keepdims=True), rows, 0)
        return energy(training)(rows * np.exp(rows.sum(1, keepdims=True) / large.sum(1, keepdims=True)))

    return score


def she(training: Training) -> Callable[[np.ndarray], np.ndarray]:
    """Inner product with the mean of the class that is guessed (Zhang et al., 2023)."""
    rows = training.top[training.rows]
    means = np.stack([rows[training.labels == label].mean(0) for label in np.unique(training.labels)])
    return lambda rows: (rows * means[training.logits(rows).argmax(1)]).sum(1)


def mahalanobis(training: Training) -> Callable[[np.ndarray], np.ndarray]:
    """Distance to the nearest class, by one shrunk covariance (Lee et al., 2018)."""
    from sklearn.covariance import LedoitWolf

    rows = training.top[training.rows]
    means = np.stack([rows[training.labels == label].mean(0) for label in np.unique(training.labels)])
    precision = LedoitWolf(assume_centered=True).fit(rows - means[training.labels]).precision_
    far = lambda rows, mean: np.einsum("ij,ij->i", (rows - mean) @ precision, rows - mean)  # noqa: E731
    return lambda rows: -np.min([far(rows, mean) for mean in means], axis=0)


def residual(training: Training, components: int = 64) -> Callable[[np.ndarray], np.ndarray]:
    """What principal components leave."""
    rows = unit(training.top[training.rows])
    mean = rows.mean(0)
    base = np.linalg.svd(rows - mean, full_matrices=False)[2][:components]

    def score(rows: np.ndarray) -> np.ndarray:
        centred = unit(rows) - mean
        return -np.linalg.norm(centred - centred @ base.T @ base, axis=1)

    return score


def vim(training: Training, components: int = 64) -> Callable[[np.ndarray], np.ndarray]:
    """Energy less the residual of principal components, as a logit (Wang et al., 2022)."""
    origin = -np.linalg.pinv(training.head.weights.T) @ training.head.bias
    rows = training.top[training.rows]
    _, vectors = np.linalg.eigh((rows - origin).T @ (rows - origin))
    rest = vectors[:, :-components]
    left = lambda rows: np.linalg.norm((rows - origin) @ rest, axis=1)  # noqa: E731
    alpha = training.logits(rows).max(1).mean() / left(rows).mean()
    return lambda rows: energy(training)(rows) - alpha * left(rows)


def both(first: Method, second: Method) -> Method:
    """The lower of two ranks among the training photos: both are demanded."""

    def fit(training: Training) -> Fitted:
        fitted = [method(training) for method in (first, second)]

        def lower(scores: list[np.ndarray]) -> np.ndarray:
            ranks = [np.searchsorted(np.sort(own), found) for (own, _), found in zip(fitted, scores, strict=True)]
            return np.minimum(*ranks)

        return lower([own for own, _ in fitted]), lambda chosen: lower([score(chosen) for _, score in fitted])

    return fit


def shipped(imagenet: ImageNet | None) -> Method:
    """`Reference`, as training writes it."""

    def fit(training: Training) -> Fitted:
        names = [str(number) for number in training.rows]
        rows = training.top
        reference = Reference.of(rows[training.rows], list(training.labels.astype(str)), names, imagenet)
        return reference.own, lambda chosen: reference.similarity(rows[chosen])

    return fit


def of_cnn(photos: Photos, files: list[Path], folder: Path) -> Method:
    """The reference of the simple network, trained anew for each split: its features differ from split to split."""
    ours = Ours(photos, folder, "fast", "cnn")
    images = list(pixels(files, ours.features.image_size))

    def fit(training: Training) -> Fitted:
        random = np.random.default_rng(0).permutation(training.rows)
        cut = len(random) // 5
        path, _ = ours.trained(Split(random[cut:], random[:cut], random[:0], by_group=False))
        network = inference.ModelFiles.at(path).network(engines.TENSORFLOW)
        rows = seen(network, images)
        learned = np.sort(random[cut:])
        labels = list(photos.labels[learned].astype(str))
        reference = Reference.of(rows[learned], labels, [str(number) for number in learned])
        return reference.own, lambda chosen: reference.similarity(rows[chosen])

    return fit


def methods(layers: dict[str, np.ndarray], imagenet: ImageNet | None) -> Iterator[tuple[str, Method]]:
    top, root = layers["top"], np.sqrt(np.maximum(layers["top"], 0))
    highest = of_probabilities(lambda probabilities: probabilities.max(1))
    yield "highest probability", highest
    yield "GEN", of_probabilities(lambda found: -((found * (1 - found)).clip(1e-12) ** 0.1).sum(1))
    for method in (energy, react, scale, she, mahalanobis, residual, vim):
        yield method.__name__, in_sample(method)
    for k in (1, 5, NEIGHBOURS):
        yield f"kNN, k={k}", nearest(top, k)
    for name in list(layers)[:-1]:
        yield f"kNN, {name}", nearest(layers[name], NEIGHBOURS)
    yield "kNN, last two layers", nearest(np.hstack([unit(rows) for rows in list(layers.values())[-2:]]), NEIGHBOURS)
    yield "kNN, square roots", nearest(root, NEIGHBOURS)
    yield "kNN and highest probability", both(nearest(root, NEIGHBOURS), highest)
    if imagenet:
        yield "kNN, ImageNet's classes", nearest(np.sqrt(imagenet.probabilities(top)), NEIGHBOURS)
        yield "Touchline without ImageNet's classes", shipped(None)
    yield "Touchline", shipped(imagenet)


def splits(photos: Photos, test_groups: list[str]) -> Iterator[tuple[bool, np.ndarray, np.ndarray]]:
    """Whether it is by group, and the positions of training and test photos."""
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(photos.labels))
    for seed in range(3):
        yield False, *train_test_split(everything, test_size=0.2, random_state=seed, stratify=photos.labels)
    for names in test_groups:
        held = np.isin(photos.groups, names.lstrip("^").split(",")) ^ names.startswith("^")
        yield True, everything[~held], everything[held]


def layers_of(files: list[Path], features: BackboneFeatures) -> dict[str, np.ndarray]:
    """What the ends of a backbone's last blocks, each averaged over its places, say of photos; last the top."""
    import_tensorflow()
    import keras

    model = backbones.build(features, Path.cwd())
    ends = [block[-1] for block in backbones.blocks(model) if len(block[-1].output.shape) == 4][-3:-1]
    found = {layer.name: layer.output for layer in ends} | {"top": model.output}
    pooled = [keras.layers.GlobalAveragePooling2D()(each) for each in found.values()]
    network = keras.Model(model.input, keras.layers.Concatenate()(pooled))
    with tempfile.TemporaryDirectory() as folder:
        engines.convert(network, file := Path(folder, "layers.openvino"))
        forward = engines.with_openvino(file).forward
    images = ((None, image) for image in pixels(files, features.image_size))
    rows = [part for _, part in inference.answers(forward, images)]
    cuts = np.cumsum([each.shape[-1] for each in pooled])[:-1]
    return dict(zip(found, np.split(np.concatenate(rows), cuts, axis=1), strict=True))


def as_a_class(cut: list[tuple[bool, Training, np.ndarray]], kinds: np.ndarray, others: np.ndarray) -> Iterator[str]:
    """Lines of a table: shares of photos that a head with a class of its own for something else puts into it."""
    for by_group in (False, True):
        for name in np.unique(kinds):
            for what in ("with it", "without it"):
                found = []
                for _, training, test in (each for each in cut if each[0] == by_group):
                    learned = np.arange(len(others)) % 2 == 0
                    learned &= True if what == "with it" else kinds != name
                    rows = np.concatenate([training.rows, others[learned]])
                    labels = np.concatenate([training.labels, np.full(learned.sum(), training.labels.max() + 1)])
                    groups = np.concatenate([training.groups, np.full(learned.sum(), "something else")])
                    weights = heads.balance(labels, groups, "group")
                    head = next(heads.path(training.top[rows], labels, weights, [STRENGTH]))
                    asked = others[(np.arange(len(others)) % 2 == 1) & (kinds == name)]
                    called = [
                        float((head.probabilities(training.top[each]).argmax(1) == labels.max()).mean())
                        for each in (asked, test)
                    ]
                    found.append(called)
                if found:
                    caught, lost = np.mean(found, axis=0)
                    yield f"| {'by group' if by_group else 'random'} | {name}, {what} | {caught:.3f} | {lost:.3f} |"


def main() -> None:
    from sklearn.metrics import roc_auc_score

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--others", type=Path, required=True)
    parser.add_argument("--backbone", default="efficientnet_lite2")
    parser.add_argument("--image-size", type=int, default=260)
    parser.add_argument("--test-groups", nargs="*", default=[])
    parser.add_argument("--cnn", action="store_true", help="only the simple network, which is trained for each split")
    parser.add_argument("--cache", type=Path, help="layers of all photos, read if it exists, else written")
    chosen = parser.parse_args()
    photos = Photos.of(chosen.photos)
    features = BackboneFeatures(backbone=[chosen.backbone], image_size=chosen.image_size, views=1)
    with (chosen.others / "manifest.csv").open(newline="") as table:
        foreign = list(csv.DictReader(table))
    kinds = np.array([row["kind"] for row in foreign])
    files = photos.files + [chosen.others / row["file"] for row in foreign]
    if chosen.cache and chosen.cache.is_file():
        with np.load(chosen.cache) as stored:
            layers = dict(stored)
    else:
        layers = layers_of(files, features)
        if chosen.cache:
            np.savez(chosen.cache, **layers)
    imagenet = backbones.imagenet(features, Path.cwd())
    others = np.arange(len(photos.labels), len(photos.labels) + len(foreign))
    cut = [(by_group, Training.of(train, photos, layers), test)
           for by_group, train, test in splits(photos, chosen.test_groups)]  # fmt: skip
    names = sorted(set(kinds))
    columns = [f"AUROC {name}" for name in names] + ["kept"] + [f"caught {name}" for name in names]
    print("| method | split | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    asked_for = methods(layers, imagenet)
    if chosen.cnn:
        folder = tempfile.TemporaryDirectory()
        asked_for = iter([("Touchline, simple network", of_cnn(photos, files, Path(folder.name)))])
    for name, method in asked_for:
        found: dict[bool, list[list[float]]] = {False: [], True: []}
        for by_group, training, test in cut:
            own, score = method(training)
            tested, asked, threshold = score(test), score(others), np.quantile(own, SHARE)
            found[by_group].append([
                *(roc_auc_score(np.r_[np.ones(len(test)), np.zeros((kinds == kind).sum())],
                                np.r_[tested, asked[kinds == kind]]) for kind in names),
                float((tested >= threshold).mean()),
                *(float((asked[kinds == kind] < threshold).mean()) for kind in names),
            ])  # fmt: skip
        for by_group, rows in found.items():
            if rows:
                numbers = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
                each = ", ".join(f"{row[len(names)]:.2f}" for row in rows)
                print(f"| {name} | {'by group' if by_group else 'random'} ({each} kept) | {numbers} |", flush=True)
    if chosen.cnn:
        return
    print("\n| split | learned from | caught | test photos lost |\n|---|---|---|---|")
    for line in as_a_class(cut, kinds, others):
        print(line, flush=True)


if __name__ == "__main__":
    main()
