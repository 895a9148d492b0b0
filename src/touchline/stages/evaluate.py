"""The `evaluate` stage: every model on the same untouched test photos, beside baselines and a control."""

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.files import RENEW, model_record, read_json, read_table, replacing, sha256, write_json, write_table
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.core.progress import say, track
from touchline.core.tensorflow import import_tensorflow
from touchline.data import photos, terms
from touchline.models import explain, inference
from touchline.report import plots

if TYPE_CHECKING:
    import keras
    import pandas as pd

CONFIDENCE = 0.95
_HISTOGRAM_SIDE = 64
# A gallery of fewer mistakes is filled up to so many photos with right answers.
_LEAST_SHOWN = 6


def run(paths: Paths, params: Params) -> None:
    """Write `reports/metrics.json`, predictions, curves and figures; log them to the models' MLflow runs."""
    import pandas as pd

    import_tensorflow()
    _forget_removed(paths, params)
    validated = read_table(paths.validated_table)
    split = read_table(paths.split_table).merge(validated[["path", "source", "width", "height"]], on="path")
    test = split[split["subset"] == "test"].reset_index(drop=True)
    labels = _labels(test, params.classes)
    files = [paths.workspace / path for path in test["path"]]
    curves = _curves(paths, params)

    probabilities: dict[str, np.ndarray] = {}
    metrics: dict[str, Any] = {"test_photos": len(test), "models": {}}
    facts: dict[str, Any] = {}
    galleries: list[pd.DataFrame] = []
    heats: dict[str, np.ndarray] = {}
    for name in params.models:
        model = load_model(paths.models / f"{name}.keras")
        probabilities[name], seconds = predict(model, files, name)
        metrics["models"][name] = scores(labels, probabilities[name], params.evaluate.calibration_bins)
        facts[name] = {
            "model_sha256": read_json(paths.models / f"{name}.json")["model_sha256"],
            "milliseconds_a_photo": round(1000 * seconds / len(files), 2),
        }
        galleries.append(_gallery(name, test, probabilities[name], params))
        heats[name] = _heats(model, galleries[-1], params.classes, paths.workspace)
    metrics["baselines"] = baselines(split, params, paths.workspace)
    metrics["mcnemar"] = [
        {"models": [a, b], **mcnemar(labels, probabilities[a], probabilities[b])}
        for a, b in combinations(params.models, 2)
    ]
    write_json(paths.reports / "metrics.json", metrics)
    # What differs from run to run though nothing changed is kept out of the metrics.
    write_json(paths.reports / "evaluation.json", facts)
    # `dvc metrics show` makes a row of each file: a few columns that a person compares.
    for name, found in {**metrics["models"], **metrics["baselines"]}.items():
        shown = ("accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "log_loss", "calibration_error")
        write_json(paths.reports / "scores" / f"{name}.json", {key: found[key] for key in shown if key in found})

    tables = {
        "predictions": _predictions(test, probabilities, params.classes),
        "per_class": _per_class(labels, probabilities, params.classes),
        "slices": _slices(test, labels, probabilities),
        "roc": _roc(labels, probabilities, params.classes),
        "curves": curves,
        "gallery": pd.concat(galleries),
    }
    for name, table in tables.items():
        write_table(paths.reports / f"{name}.csv", table)
    with replacing(paths.reports / "heats.npz", ".npz") as temporary:
        np.savez_compressed(temporary, **heats)  # type: ignore[arg-type]  # NumPy's types take each name for `allow_pickle`
    figures = plots.draw(paths, params, split, tables, heats)
    _log(paths, params, metrics, facts, figures)
    for name, found in metrics["models"].items():
        say(
            f"{name}: test accuracy {found['accuracy']:.3f} [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]"
        )


def load_model(path: Path) -> "keras.Model":
    """A whole model from its file.

    Raises:
        TouchlineError: the file is missing, no model, or not the one that the record beside it describes; code that a
            file brings along is not run.
    """
    import keras

    if not path.exists():
        raise TouchlineError(f"{path} is missing: run `dvc repro`, or `dvc checkout` to get it from the cache")
    record = path.with_suffix(".json")
    described = read_json(record) if record.is_file() else {}
    expected = described.get("model_sha256") if isinstance(described, dict) else None
    if expected not in (None, sha256(path)):
        raise TouchlineError(f"{path} is not the file that {record.name} describes: run `dvc repro` to renew both")
    try:
        return keras.models.load_model(path, safe_mode=True, compile=False)
    except Exception as error:  # a torn zip, a bad config, a refused layer: Keras raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise TouchlineError(f"{path} is no readable model ({reason}): {RENEW}") from None


def predict(model: "keras.Model", files: Sequence[Path], what: str = "photos") -> tuple[np.ndarray, float]:
    """Class probabilities of photos, decoded beside computing, as many at a time as `inference.BATCH`.

    Returns:
        float32 probabilities, shape (len(files), classes); and seconds from files to probabilities, without the time
        that TensorFlow takes to get ready.
    """
    size = model.input_shape[1]
    forward = inference.forward_pass(model, min(inference.BATCH, len(files)))
    began = time.perf_counter()
    rows = parallel.in_order(lambda path: (path, photos.read(path, size)), files)
    found = [batch for _, batch in inference.answers(forward, track(rows, len(files), f"predicting with {what}"))]
    return np.concatenate(found), time.perf_counter() - began


def scores(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> dict[str, float]:
    """What is said of one model on one set of photos.

    Args:
        labels: int64, shape (n,). probabilities: shape (n, classes).

    Returns:
        accuracy with its Wilson interval at 95 %, balanced accuracy, macro F1, ROC-AUC (one class against the rest,
        averaged over classes), log loss (nats) and expected calibration error.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score

    predicted = probabilities.argmax(axis=1)
    every = list(range(probabilities.shape[1]))
    low, high = wilson(int((predicted == labels).sum()), len(labels))
    # scikit-learn wants rows that sum to one more exactly than float32 does.
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    auc = roc_auc_score(labels, exact[:, 1] if len(every) == 2 else exact, multi_class="ovr", labels=every)
    found = {
        "accuracy": (predicted == labels).mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, average="macro"),
        "roc_auc": auc,
        "log_loss": log_loss(labels, exact, labels=every),
        "calibration_error": calibration_error(labels, probabilities, bins),
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def wilson(right: int, photos: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927), which stays within 0 and 1 for few photos too."""
    from scipy.stats import binomtest

    interval = binomtest(right, photos).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """McNemar's exact test (1947): do two models differ on the same photos?

    Args:
        first, second: probabilities, shape (n, classes).

    Returns:
        photos that only the first, and only the second, got right; the two-sided p-value of so uneven a division.
    """
    from scipy.stats import binomtest

    first_right, second_right = (found.argmax(axis=1) == labels for found in (first, second))
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    differing = only_first + only_second
    p_value = binomtest(only_first, differing).pvalue if differing else 1.0
    return {"only_first_right": only_first, "only_second_right": only_second, "p_value": round(float(p_value), 6)}


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> float:
    """Expected calibration error (Guo et al., 2017): how far confidence and accuracy lie apart, over equal bins."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    number = np.clip((confidence * bins).astype(int), 0, bins - 1)
    gaps = [abs(right[number == each].mean() - confidence[number == each].mean()) * (number == each).mean()
            for each in np.unique(number)]  # fmt: skip
    return float(sum(gaps))


def baselines(split: "pd.DataFrame", params: Params, workspace: Path) -> dict[str, dict[str, float]]:
    """What must be beaten: the largest class, colours alone, and, as a control, width, height and aspect alone.

    The control shows whether a data set gives its classes away by where its photos come from.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    used = split[split["subset"].isin(["train", "test"])]
    files = [workspace / path for path in used["path"]]
    rows = parallel.in_order(_colour_histogram, files)
    colours = np.stack(list(track(rows, len(files), "colour histograms")))
    sides = used[["width", "height"]].to_numpy(float)
    size = np.column_stack([sides, sides[:, 0] / sides[:, 1]])
    labels = _labels(used, params.classes)
    train = (used["subset"] == "train").to_numpy()
    seed = params.evaluate.baselines_seed
    candidates = {
        "majority_class": (size, DummyClassifier(strategy="most_frequent")),
        "colour_histogram": (colours, make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))),
        "size_and_aspect": (size, RandomForestClassifier(300, min_samples_leaf=2, random_state=seed)),
    }
    found = {}
    for name, (inputs, classifier) in candidates.items():
        predicted = classifier.fit(inputs[train], labels[train]).predict(inputs[~train])
        low, high = wilson(int((predicted == labels[~train]).sum()), int((~train).sum()))
        found[name] = {
            "accuracy": round(float((predicted == labels[~train]).mean()), 6),
            "accuracy_low": round(low, 6),
            "accuracy_high": round(high, 6),
            "balanced_accuracy": round(float(balanced_accuracy_score(labels[~train], predicted)), 6),
        }
    return found


def _colour_histogram(path: Path) -> np.ndarray:
    """Share of pixels in each of 4 x 4 x 4 colours, float64, shape (64,)."""
    levels = photos.read(path, _HISTOGRAM_SIDE) // 64
    colour = levels[..., 0] * 16 + levels[..., 1] * 4 + levels[..., 2]
    return np.bincount(colour.ravel(), minlength=64) / colour.size


def _labels(table: "pd.DataFrame", classes: Sequence[str]) -> np.ndarray:
    return table["class"].map({label: number for number, label in enumerate(classes)}).to_numpy(np.int64)


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
    rows = terms.shown(rows, params)[["model", "path", "class", "predicted", "confidence"]]
    right = rows["class"] == rows["predicted"]
    mistakes = rows[~right].nlargest(params.evaluate.gallery, "confidence")
    room = max(0, min(_LEAST_SHOWN, params.evaluate.gallery) - len(mistakes))
    return pd.concat([mistakes, rows[right].nsmallest(room, "confidence")])


def _heats(model: "keras.Model", gallery: "pd.DataFrame", classes: Sequence[str], workspace: Path) -> np.ndarray:
    """Where a model found the class it named, for each photo of its gallery: uint8, shape (photos, height, width).

    Of a model that Grad-CAM cannot explain height and width are 0, and why is said: the figures it has stay worth
    having.
    """
    if gallery.empty:
        return np.zeros((0, 0, 0), np.uint8)
    size = model.input_shape[1]
    files = [workspace / path for path in gallery["path"]]
    predicted = np.array([classes.index(label) for label in gallery["predicted"]])
    try:
        explainer = explain.explainer(model)
    except TouchlineError as error:
        say(f"no heat maps: {error}")
        return np.zeros((len(gallery), 0, 0), np.uint8)
    images = np.stack(list(parallel.in_order(lambda path: photos.read(path, size), files)))
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
                low, high = wilson(int(members.sum()), len(members))
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
        model = record.with_suffix(".keras")
        made = [model] if model.is_file() and sha256(model) == described["model_sha256"] else []
        # The record goes last: without it, nothing would say that the others are ours.
        for path in (*made, paths.reports / "history" / f"{record.stem}.csv", record):
            if path.is_file():
                path.unlink()
                say(f"removed {paths.relative(path)}: params.yaml no longer names it")


def _log(
    paths: Paths, params: Params, metrics: dict[str, Any], facts: dict[str, Any], figures: dict[str, Path]
) -> None:
    from touchline.tracking import open_store

    store = open_store(paths, params.register_.name)
    for name in params.models:
        record = read_json(paths.models / f"{name}.json")
        run_id = store.ensure(record, paths.models / f"{name}.keras")
        speed = {"milliseconds_a_photo": facts[name]["milliseconds_a_photo"]}
        store.log_evaluation(run_id, metrics["models"][name] | speed, figures)
