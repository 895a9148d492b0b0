"""The `evaluate` stage: every model on the same untouched test photos, beside baselines and a control."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.files import (
    model_record,
    model_records,
    positions,
    read_table,
    replacing,
    sha256,
    write_json,
    write_table,
)
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say, track
from touchline.data import photos, rights
from touchline.models import classifier, inference, scores, unknown
from touchline.models.classifier import Classifier
from touchline.models.engines import SUFFIX
from touchline.models.reference import SUFFIX as REFERENCE
from touchline.report import plots

if TYPE_CHECKING:
    import pandas as pd

_HISTOGRAM_SIDE = 64
# A gallery of fewer mistakes is filled up to so many photos with right answers.
_LEAST_SHOWN = 6


def run(paths: Paths, params: Params) -> str:
    """Write `reports/metrics.json`, predictions, curves and figures; log them to the models' MLflow runs.

    Returns:
        The models' accuracies on the test photos, with their 95 % intervals.
    """
    import pandas as pd

    _forget_removed(paths, params)
    split = read_table(paths.split_table)
    records = model_records(paths.models, params.models, paths.split_table)
    test = split[split["subset"] == "test"].reset_index(drop=True)
    labels = positions(test["class"], params.classes)
    files = [paths.workspace / path for path in test["path"]]
    curves = _curves(paths, params)

    probabilities: dict[str, np.ndarray] = {}
    metrics: dict[str, Any] = {"test_photos": len(test), "models": {}, "unknown": {}}
    facts: dict[str, Any] = {}
    galleries: list[pd.DataFrame] = []
    similarities = [pd.DataFrame(columns=unknown.COLUMNS)]
    heats: dict[str, np.ndarray] = {}
    for name in params.models:
        model = classifier.resolve(paths, params, name)
        rows, seconds = inference.predict(model.network, files, name, model.forward)
        probabilities[name] = rows[:, : len(params.classes)]
        metrics["models"][name] = scores.of(labels, probabilities[name], params.evaluate.calibration_bins)
        facts[name] = {
            "model_sha256": records[name]["model_sha256"],
            # `register` depends on this file alone for the models: a record names the digests of its model and split.
            "record_sha256": sha256(paths.models / f"{name}.json"),
            "milliseconds_a_photo": round(1000 * seconds / len(files), 2),
        }
        if model.reference and params.predict.unknown_share is not None:
            others = None
            if params.evaluate.unknown_folder:
                folder = paths.project / params.evaluate.unknown_folder
                others = unknown.foreign(folder, model, params.validate_.max_megapixels)
            similarities.append(unknown.similarities(name, model, test, rows, others))
            threshold = model.reference.threshold(params.predict.unknown_share)
            metrics["unknown"][name] = unknown.worth(similarities[-1], threshold, params.classes)
        galleries.append(_gallery(name, test, probabilities[name], params))
        heats[name] = _heats(model, galleries[-1], paths.workspace)
    metrics["baselines"] = baselines(split, params, paths.workspace)
    metrics["mcnemar"] = [
        {"models": [a, b], **scores.mcnemar(labels, probabilities[a], probabilities[b])}
        for a, b in combinations(params.models, 2)
    ]
    write_json(paths.reports / "metrics.json", metrics)
    # What differs from run to run though nothing changed is kept out of the metrics.
    write_json(paths.reports / "evaluation.json", facts)
    # What DVC compares between experiments: it makes a column of each number, and a terminal has room for few.
    accuracies = {
        "test": {name: found["accuracy"] for name, found in metrics["models"].items()},
        "validation": {name: round(record["metrics"]["validation/accuracy"], 6) for name, record in records.items()},
    }
    write_json(paths.reports / "accuracy.json", accuracies)

    tables = {
        "predictions": _predictions(test, probabilities, params.classes),
        "per_class": _per_class(labels, probabilities, params.classes),
        "slices": _slices(test, labels, probabilities),
        "roc": _roc(labels, probabilities, params.classes),
        "curves": curves,
        "gallery": pd.concat(galleries),
        "similarity": pd.concat(similarities),
    }
    for name, table in tables.items():
        write_table(paths.reports / f"{name}.csv", table)
    with replacing(paths.reports / "heats.npz", ".npz") as temporary:
        np.savez_compressed(temporary, **heats)  # type: ignore[arg-type]  # NumPy's types take each name for `allow_pickle`
    plots.draw(paths, params, split, tables, heats)
    _log(paths, params, records, metrics, facts)
    return "test accuracy " + ", ".join(
        f"{name} {found['accuracy']:.3f} [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]"
        for name, found in metrics["models"].items()
    )


def baselines(split: "pd.DataFrame", params: Params, workspace: Path) -> dict[str, dict[str, float]]:
    """What must be beaten: the largest class, colours alone, and, as a control, width, height and aspect alone.

    The control shows whether a data set gives its classes away by where its photos come from.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    used = split[split["subset"].isin(["train", "test"])]
    files = [workspace / path for path in used["path"]]
    rows = parallel.in_order(_colour_histogram, files)
    colours = np.stack(list(track(rows, len(files), "colour histograms")))
    sides = used[["width", "height"]].to_numpy(float)
    size = np.column_stack([sides, sides[:, 0] / sides[:, 1]])
    labels = positions(used["class"], params.classes)
    train = (used["subset"] == "train").to_numpy()
    seed = params.evaluate.baselines_seed
    candidates = {
        "majority_class": (size, DummyClassifier(strategy="prior")),
        "colour_histogram": (colours, make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))),
        "size_and_aspect": (size, RandomForestClassifier(300, min_samples_leaf=2, random_state=seed)),
    }
    found = {}
    for name, (inputs, candidate) in candidates.items():
        fitted = candidate.fit(inputs[train], labels[train])
        # A class without training photos has no column of its own.
        probabilities = np.zeros(((~train).sum(), len(params.classes)))
        probabilities[:, fitted.classes_] = fitted.predict_proba(inputs[~train])
        found[name] = scores.of(labels[~train], probabilities, params.evaluate.calibration_bins)
    return found


def _colour_histogram(path: Path) -> np.ndarray:
    """Share of pixels in each of 4 x 4 x 4 colours, float64, shape (64,)."""
    levels = photos.read(path, _HISTOGRAM_SIDE) // 64
    colour = levels[..., 0] * 16 + levels[..., 1] * 4 + levels[..., 2]
    return np.bincount(colour.ravel(), minlength=64) / colour.size


def _predictions(test: "pd.DataFrame", probabilities: dict[str, np.ndarray], classes: Sequence[str]) -> "pd.DataFrame":
    """One row a model and photo: what it is, what was predicted, and each class's probability."""
    import pandas as pd

    parts = []
    for name, found in probabilities.items():
        part = test[["path", "class", "source", "group"]].assign(
            model=name,
            predicted=[classes[number] for number in found.argmax(axis=1)],
            confidence=found.max(axis=1).round(6),
        )
        for number, label in enumerate(classes):
            part[f"probability:{label}"] = found[:, number].round(6)
        parts.append(part)
    return pd.concat(parts)


def _gallery(name: str, test: "pd.DataFrame", probabilities: np.ndarray, params: Params) -> "pd.DataFrame":
    """Photos to look at: the most confident mistakes; where they are few, right answers too, the least sure first."""
    import pandas as pd

    rows = _predictions(test, {name: probabilities}, params.classes)
    rows = rows.loc[rights.shown(test, params).index, ["model", "path", "class", "predicted", "confidence"]]
    right = rows["class"] == rows["predicted"]
    mistakes = rows[~right].nlargest(params.evaluate.gallery, "confidence")
    room = max(0, min(_LEAST_SHOWN, params.evaluate.gallery) - len(mistakes))
    return pd.concat([mistakes, rows[right].nsmallest(room, "confidence")])


def _heats(model: Classifier, gallery: "pd.DataFrame", workspace: Path) -> np.ndarray:
    """Where a model found the class it named, for each photo of its gallery: uint8, shape (photos, height, width).

    Of a model that Grad-CAM cannot explain height and width are 0, and why is said: the figures it has stay worth
    having.
    """
    if gallery.empty:
        return np.zeros((0, 0, 0), np.uint8)
    files = [workspace / path for path in gallery["path"]]
    predicted = np.array([model.classes.index(label) for label in gallery["predicted"]])
    try:
        explainer = model.explainer()
    except TouchlineError as error:
        say(f"no heat maps: {error}")
        return np.zeros((len(gallery), 0, 0), np.uint8)
    images = np.stack(list(parallel.in_order(lambda path: photos.read(path, model.side), files)))
    parts = range(0, len(images), inference.BATCH)
    found = [explainer(images[at : at + inference.BATCH], predicted[at : at + inference.BATCH]) for at in parts]
    return np.round(255 * np.concatenate(found)).astype(np.uint8)


def _per_class(labels: np.ndarray, probabilities: dict[str, np.ndarray], classes: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd
    from sklearn.metrics import classification_report

    rows = []
    for name, found in probabilities.items():
        report = classification_report(
            labels,
            found.argmax(axis=1),
            labels=range(len(classes)),
            target_names=classes,
            output_dict=True,
            zero_division=0,
        )
        for label in classes:
            values = report[label]
            rows.append(
                (
                    name,
                    label,
                    *(round(values[key], 6) for key in ("precision", "recall", "f1-score")),
                    int(values["support"]),
                )
            )
    return pd.DataFrame(rows, columns=["model", "class", "precision", "recall", "f1", "photos"])


def _slices(test: "pd.DataFrame", labels: np.ndarray, probabilities: dict[str, np.ndarray]) -> "pd.DataFrame":
    """Accuracy by source, class and size of the photo (shorter side under 256, 256 to 511, 512 pixels and over)."""
    import pandas as pd

    shorter = test[["width", "height"]].min(axis=1)
    by = {
        "source": test["source"],
        "class": test["class"],
        "shorter side": pd.cut(
            shorter, [0, 256, 512, np.inf], right=False, labels=["< 256 px", "256-511 px", ">= 512 px"]
        ),
    }
    rows = []
    for name, found in probabilities.items():
        right = found.argmax(axis=1) == labels
        for slice_by, values in by.items():
            for value, members in pd.Series(right).groupby(values, observed=True):
                low, high = scores.wilson(int(members.sum()), len(members))
                rows.append(
                    (name, slice_by, value, len(members), round(members.mean(), 6), round(low, 6), round(high, 6))
                )
    return pd.DataFrame(rows, columns=["model", "by", "slice", "photos", "accuracy", "accuracy_low", "accuracy_high"])


def _roc(labels: np.ndarray, probabilities: dict[str, np.ndarray], classes: Sequence[str]) -> "pd.DataFrame":
    """ROC curves: with two classes the second one's, with more each class against the rest."""
    import pandas as pd
    from sklearn.metrics import roc_curve

    rows = []
    for name, found in probabilities.items():
        for number in range(1 if len(classes) == 2 else 0, len(classes)):
            false_positive, true_positive, _ = roc_curve(labels == number, found[:, number])
            for x, y in zip(false_positive, true_positive, strict=True):
                rows.append((name, classes[number], round(x, 6), round(y, 6)))
    return pd.DataFrame(rows, columns=["model", "class", "false_positive_rate", "true_positive_rate"])


def _curves(paths: Paths, params: Params) -> "pd.DataFrame":
    """The models' histories in one long table: model, subset, epoch, strength (of a head), accuracy, loss, kept.

    Of a head that was fine-tuned it has the part that the kept weights come from: strengths are no epochs.
    """
    import pandas as pd

    parts = []
    for name in params.models:
        history = read_table(paths.reports / "history" / f"{name}.csv")
        strengths = history.get("strength", pd.Series(np.nan, history.index))
        frozen = strengths.notna()
        history = history[frozen == frozen[history["kept"] == 1].any()]
        for subset in ("train", "validation"):
            part = history[["epoch", f"{subset}/accuracy", f"{subset}/loss", "kept"]]
            parts.append(part.set_axis(["epoch", "accuracy", "loss", "kept"], axis=1).assign(model=name, subset=subset))
            parts[-1]["strength"] = strengths
    return pd.concat(parts)[["model", "subset", "epoch", "strength", "accuracy", "loss", "kept"]]


def _forget_removed(paths: Paths, params: Params) -> None:
    """Delete what earlier runs made of models that params.yaml no longer names, and nothing else.

    A file that no run recorded as its own belongs to a person, such as the copy of a model. Features cost the stages
    that follow nothing; `touchline clean` deletes them.
    """
    for record in sorted(paths.models.glob("*.json")):
        described = None
        with suppress(TouchlineError):
            described = model_record(record)
        if record.stem in params.models or not described:
            continue
        made = [
            path
            for suffix, digest in (
                (".keras", "model_sha256"),
                (SUFFIX, "openvino_sha256"),
                (REFERENCE, "reference_sha256"),
            )
            for path in (record.with_suffix(suffix),)
            if path.is_file() and sha256(path) == described.get(digest)
        ]
        # The record goes last: without it, nothing would say that the others are ours.
        for path in (*made, paths.reports / "history" / f"{record.stem}.csv", record):
            if path.is_file():
                path.unlink()
                say(f"removed {paths.relative(path)}: params.yaml no longer names it")


def _log(
    paths: Paths,
    params: Params,
    records: Mapping[str, Mapping[str, Any]],
    metrics: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    from touchline.tracking import runs

    store = runs.open_store(paths, params.register_.name)
    for name, record in records.items():
        run_id = runs.ensure(store, record, paths.models / f"{name}.keras")
        speed = {"milliseconds_a_photo": facts[name]["milliseconds_a_photo"]}
        runs.log_evaluation(store, run_id, metrics["models"][name] | speed, paths.reports / "figures" / name)
