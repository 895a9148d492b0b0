"""What labels are worth: accuracy after labelling photos that `touchline suggest` chooses, and random ones.

Of the training photos of a finished project a few are taken as labelled, ten a class. Then 20 more are chosen at a
time, as the model that learned from the labelled ones would choose them, and their labels are added. Accuracy is that
on the project's test photos, the mean of many repetitions.

    python benchmarks/suggest.py [PROJECT]
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from touchline.commands.suggest import chosen, doubt
from touchline.core.files import positions, read_table
from touchline.core.params import BackboneFeatures, load
from touchline.core.paths import Paths
from touchline.data.feature_store import Arrays
from touchline.models.reference import Reference

FIRST, STEP, STEPS, REPETITIONS = 10, 20, (20, 40, 80), 20


def fitted(features: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000).fit(features, labels)


def main(root: Path) -> None:
    paths, params = Paths(root, root), load(root / "params.yaml")
    known = read_table(paths.validated_table)[["path", "class", "sha256"]]
    split = read_table(paths.split_table)[["path", "subset"]].merge(known, on="path")
    name = next(key for key, kind in params.features.items() if isinstance(kind, BackboneFeatures))
    features = np.asarray(Arrays(paths.features / name)[list(split["sha256"])], np.float32)
    labels = positions(split["class"], params.classes)
    test = (split["subset"] == "test").to_numpy()
    pool = np.flatnonzero(~test)
    scaled = (features - features[pool].mean(axis=0)) / features[pool].std()

    def ours(model: LogisticRegression, known: np.ndarray, rest: np.ndarray) -> np.ndarray:
        reference = Reference.of(features[known], [str(each) for each in labels[known]], [""] * len(known))
        percentiles = np.array([reference.percentile(each) for each in reference.similarity(features[rest])])
        doubts = doubt(model.predict_proba(scaled[rest]), percentiles)
        return rest[chosen(doubts, reference.described(features[rest]), STEP)]

    def entropy_diverse(model: LogisticRegression, known: np.ndarray, rest: np.ndarray) -> np.ndarray:
        reference = Reference.of(features[known], [str(each) for each in labels[known]], [""] * len(known))
        doubts = doubt(model.predict_proba(scaled[rest]), None)
        return rest[chosen(doubts, reference.described(features[rest]), STEP)]

    def entropy(model: LogisticRegression, _: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return rest[np.argsort(-doubt(model.predict_proba(scaled[rest]), None))[:STEP]]

    def at_random(_: LogisticRegression, known: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.random.default_rng(known.sum()).choice(rest, STEP, replace=False)

    ways = {
        "random": at_random, "entropy alone": entropy, "entropy, unlike each other": entropy_diverse,
        "entropy or novelty, unlike each other": ours,
    }  # fmt: skip
    accuracy = {way: np.zeros((REPETITIONS, max(STEPS) // STEP + 1)) for way in ways}
    for way, choose in ways.items():
        for number in range(REPETITIONS):
            random = np.random.default_rng(number)
            known = np.concatenate(
                [random.choice(pool[labels[pool] == each], FIRST, replace=False) for each in range(len(params.classes))]
            )
            for step in range(accuracy[way].shape[1]):
                model = fitted(scaled[known], labels[known])
                accuracy[way][number, step] = model.score(scaled[test], labels[test])
                known = np.concatenate([known, choose(model, known, np.setdiff1d(pool, known))])
    print(f"{len(pool):,} photos to choose from, {test.sum():,} test photos, {REPETITIONS} repetitions")
    print(f"{'labels added':40}" + "".join(f"{each:>16}" for each in (0, *STEPS)))
    for way, found in accuracy.items():
        shown = [found[:, each // STEP] for each in (0, *STEPS)]
        print(f"{way:40}" + "".join(f"{each.mean():9.3f} ± {each.std() / REPETITIONS**0.5:.3f}" for each in shown))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
