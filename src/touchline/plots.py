"""Figures of a run, as PNG files in `reports/figures`: counts, photos, curves, confusion, ROC, mistakes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline import photos
from touchline.files import replacing
from touchline.params import Params
from touchline.paths import Paths

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours can be told apart by people who see fewer of them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_THUMBNAIL = 160
_PHOTOS_A_CLASS = 6
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
}


def draw(paths: Paths, params: Params, split: "pd.DataFrame", tables: Mapping[str, "pd.DataFrame"]) -> dict[str, Path]:
    """Draw every figure.

    Args:
        split: rows of `data/split.csv` with their `source`.
        tables: what evaluation wrote, by name: predictions, curves, roc.

    Returns:
        The path of each figure by its name.
    """
    folder = paths.reports / "figures"
    figures = {
        "class_counts": lambda figure: _class_counts(figure, split, params.classes),
        "random_photos": lambda figure: _random_photos(figure, shown(split, params), params, paths.workspace),
        "learning_curves": lambda figure: _learning_curves(figure, tables["curves"]),
        "confusion": lambda figure: _confusion(figure, tables["predictions"], params.classes),
        "roc": lambda figure: _roc(figure, tables["roc"]),
        "calibration": lambda figure: _calibration(figure, tables["predictions"], params.evaluate.calibration_bins),
        "mistakes": lambda figure: _mistakes(figure, tables["predictions"], params, paths.workspace),
    }
    made = {}
    for name, fill in figures.items():
        made[name] = folder / f"{name}.png"
        with _figure(made[name]) as figure:
            fill(figure)
    return made


def _class_counts(figure: "Figure", split: "pd.DataFrame", classes: Iterable[str]) -> None:
    from touchline.splitting import SUBSETS

    figure.set_size_inches(7, 0.8 + 0.5 * len(list(classes)))
    axes = figure.subplots()
    left = np.zeros(len(list(classes)))
    for colour, subset in zip(COLOURS, SUBSETS, strict=False):
        counts = np.array([((split["subset"] == subset) & (split["class"] == label)).sum() for label in classes])
        bars = axes.barh(list(classes), counts, left=left, color=colour, label=subset)
        axes.bar_label(bars, labels=[f"{count:,}" for count in counts], label_type="center", color="white")
        left += counts
    axes.set(title="Photos by class and subset", xlabel="photos")
    axes.invert_yaxis()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def shown(rows: "pd.DataFrame", params: Params) -> "pd.DataFrame":
    """The rows whose photos may be seen by others: figures are passed on, and ImageNet's photos may not be."""
    return rows if params.ingest.imagenet.share else rows[rows["source"] != "imagenet"]


def _random_photos(figure: "Figure", split: "pd.DataFrame", params: Params, workspace: Path) -> None:
    figure.set_size_inches(1.5 * _PHOTOS_A_CLASS, 1.75 * len(params.classes))
    grid = figure.subplots(len(params.classes), _PHOTOS_A_CLASS, squeeze=False)
    for row, label in zip(grid, params.classes, strict=True):
        members = split.loc[split["class"] == label, "path"]
        chosen = members.sample(min(_PHOTOS_A_CLASS, len(members)), random_state=params.split.seed)
        for axes, path in _padded(row, chosen):
            _show(axes, workspace, path)
        row[0].set_title(label, fontsize=10)
    figure.suptitle("Photos drawn at random", x=0.01, ha="left", fontweight="bold")


def _learning_curves(figure: "Figure", curves: "pd.DataFrame") -> None:
    models = list(dict.fromkeys(curves["model"]))
    figure.set_size_inches(9, 3.4 * len(models))
    grid = figure.subplots(len(models), 2, squeeze=False)
    for row, model in zip(grid, models, strict=True):
        of_model = curves[curves["model"] == model]
        # A head that is fine-tuned goes on by epochs, which have no strength.
        by_strength = of_model["strength"].notna().all()
        steps = of_model["strength"] if by_strength else of_model["epoch"] + 1
        for axes, (value, unit) in zip(row, (("accuracy", "share of photos"), ("loss", "nats a photo")), strict=True):
            for colour, subset in zip(COLOURS, ("train", "validation"), strict=False):
                part = of_model["subset"] == subset
                axes.plot(
                    steps[part], of_model.loc[part, value], ".-" if by_strength else "-", color=colour, label=subset
                )
            axes.axvline(steps[of_model["kept"] == 1].iloc[0], color="grey", linewidth=1, linestyle=":", label="kept")
            axes.set(title=f"{model}: {value}", ylabel=f"{value} ({unit})")
            if by_strength:
                axes.set(xscale="log", xlabel="C (the smaller, the smaller the weights)")
                axes.xaxis.set_major_formatter("{x:g}")
            else:
                axes.set_xlabel("epoch")
                axes.xaxis.get_major_locator().set_params(integer=True)
        row[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _confusion(figure: "Figure", predictions: "pd.DataFrame", classes: list[str]) -> None:
    from sklearn.metrics import confusion_matrix

    models = list(dict.fromkeys(predictions["model"]))
    side = max(2.6, 0.9 * len(classes))
    figure.set_size_inches((side + 0.9) * len(models), side + 0.6)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        part = predictions[predictions["model"] == model]
        counts = confusion_matrix(part["class"], part["predicted"], labels=classes)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            share = shares[row, column]
            axes.text(
                column,
                row,
                f"{count}\n{share:.0%}",
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
            )
        places = range(len(classes))
        axes.set(title=model, xlabel="predicted", ylabel="true class")
        axes.set_xticks(places, classes)
        axes.set_yticks(places, classes, rotation=90, va="center")
        axes.spines[:].set_visible(False)


def _roc(figure: "Figure", roc: "pd.DataFrame") -> None:
    figure.set_size_inches(5.4, 4)
    axes = figure.subplots()
    for number, ((model, label), part) in enumerate(roc.groupby(["model", "class"], sort=False)):
        area = np.trapezoid(part["true_positive_rate"], part["false_positive_rate"])
        axes.plot(
            part["false_positive_rate"], part["true_positive_rate"], color=COLOURS[number % len(COLOURS)],
            label=f"{model}, {label}: area {area:.3f}",
        )  # fmt: skip
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="chance")
    axes.set(title="ROC on the test photos", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.legend(loc="lower right", frameon=False, fontsize=8)


def _calibration(figure: "Figure", predictions: "pd.DataFrame", bins: int) -> None:
    import pandas as pd

    figure.set_size_inches(5.4, 4)
    axes = figure.subplots()
    for colour, (model, part) in zip(COLOURS, predictions.groupby("model", sort=False), strict=False):
        right = (part["class"] == part["predicted"]).groupby(
            pd.cut(part["confidence"], np.linspace(0, 1, bins + 1)), observed=True
        )
        confidence = part["confidence"].groupby(pd.cut(part["confidence"], np.linspace(0, 1, bins + 1)), observed=True)
        axes.plot(confidence.mean(), right.mean(), "o-", color=colour, label=model)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="perfect")
    lowest = 1 / predictions["class"].nunique()
    axes.set(
        title="Calibration on the test photos",
        xlabel="confidence (mean of the bin)",
        ylabel="accuracy (share of photos)",
    )
    axes.set(xlim=(lowest * 0.95, 1.01))
    axes.legend(frameon=False)


def _mistakes(figure: "Figure", predictions: "pd.DataFrame", params: Params, workspace: Path) -> None:
    models, most = list(dict.fromkeys(predictions["model"])), params.evaluate.gallery
    wrong = predictions[predictions["class"] != predictions["predicted"]]
    columns = 6
    lines = {model: max(1, -(-min(most, int((wrong["model"] == model).sum())) // columns)) for model in models}
    figure.set_size_inches(1.75 * columns, 2.15 * sum(lines.values()) + 0.3)
    parts = np.atleast_1d(figure.subfigures(len(models), 1, height_ratios=list(lines.values())))
    for part, model in zip(parts, models, strict=True):
        of_model = wrong[wrong["model"] == model].sort_values("confidence", ascending=False)
        part.suptitle(
            f"{model}: {len(of_model)} mistakes, the most confident first", x=0.01, ha="left", fontweight="bold"
        )
        cells = part.subplots(lines[model], columns, squeeze=False).ravel()
        rows = {row["path"]: row for row in shown(of_model, params).head(most).to_dict("records")}
        for axes, path in _padded(cells, rows):
            _show(axes, workspace, path)
            row = rows[path]
            axes.set_title(
                f"{row['class']}\ntaken for {row['predicted']} ({row['confidence']:.0%})",
                fontsize=7,
                fontweight="normal",
            )


def _padded(cells: Iterable["Axes"], paths: Iterable[str]) -> Iterator[tuple["Axes", str]]:
    """Each path with its cell; cells left over are emptied."""
    cells = iter(cells)
    for path in paths:
        yield next(cells), path
    for axes in cells:
        axes.axis("off")


def _show(axes: "Axes", workspace: Path, path: str) -> None:
    axes.imshow(photos.read(workspace / path, _THUMBNAIL))
    axes.axis("off")


@contextmanager
def _figure(path: Path) -> Iterator[Any]:
    """A figure that is saved when the block ends. Not pyplot's: that keeps figures, and wants a screen."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure()
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path, ".png") as temporary:
            # Class names are text, whatever dollar signs they hold.
            for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
                text.set_parse_math(False)
            figure.savefig(temporary, metadata={"Software": None})
