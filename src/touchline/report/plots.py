"""Figures of a run: files in `reports/figures` for MLflow and DVC, SVG for the report."""

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core.files import positions, replacing
from touchline.core.params import SUBSETS, Params
from touchline.core.paths import Paths
from touchline.data import photos, rights
from touchline.models import explain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

# Okabe and Ito's colours can be told apart by people who see fewer of them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_CURVES = {"accuracy": "share of photos", "loss": "nats a photo"}
_THUMBNAIL = 160
_PHOTOS_A_CLASS = 6
_PANEL, _SQUARE = (4.6, 3.2), (4.6, 4.6)  # inches
# With more classes a table of all pairs cannot be read: a heat map of fixed size is drawn, and pairs are listed.
MOST_IN_A_TABLE = 8
_MOST_NAMED = 40
_MOST_CURVES = len(COLOURS)
_MOST_SHOWN = 48
_WRAPPED = 16  # characters
_MOST_SPELT = 8
# Fonts that have what matplotlib's own lacks, in the order in which they are asked where the machine has them.
_MORE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS", "PingFang SC",
    "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans",
    "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Emoji", "Symbola", "Segoe UI Emoji", "Unifont",
)  # fmt: skip
_STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    # Class names are text, whatever dollar signs they hold.
    "text.parse_math": False,
    # Text stays text, in the reader's own fonts; equal figures are equal files.
    "svg.fonttype": "none",
    "svg.hashsalt": "touchline",
}
_TRANSPARENT: "dict[RcKeyType, Any]" = {
    "figure.facecolor": "none",
    "figure.edgecolor": "none",
    "axes.facecolor": "none",
}


def draw(
    paths: Paths,
    params: Params,
    split: "pd.DataFrame",
    tables: Mapping[str, "pd.DataFrame"],
    heats: Mapping[str, np.ndarray],
) -> dict[str, Path]:
    """Draw every figure into `reports/figures`, those about one model into its folder: photos as JPEG, the rest as PNG.

    Args:
        split: rows of `data/split.csv` with their `source`.
        tables: what evaluation wrote, by name: predictions, curves, roc, gallery.
        heats: by model, where it looked in its photos of the gallery: uint8, shape (photos, height, width).

    Returns:
        The path of each figure by its name.
    """
    folder = paths.reports / "figures"
    figures: dict[str, Callable[[Figure], None]] = {
        "class_counts": lambda figure: _class_counts(figure, split, params.classes),
        "random_photos": lambda figure: _random_photos(figure, split, params, paths.workspace),
        "learning_curves": lambda figure: _learning_curves(figure, tables["curves"]),
        "roc": lambda figure: _in_a_row(figure, _roc_panels(tables["roc"])),
        "calibration": lambda figure: _in_a_row(figure, [_calibration_panel(tables["predictions"], params)]),
    }
    for model in params.models:
        of_model = {name: table[table["model"] == model] for name, table in tables.items() if "model" in table}
        figures |= {
            f"{model}/learning_curves": partial(_learning_curves, curves=of_model["curves"]),
            f"{model}/confusion": partial(_confusion, predictions=of_model["predictions"], classes=params.classes),
            f"{model}/mistakes": partial(_mistakes, tables=of_model, heats=heats, workspace=paths.workspace),
        }
    made = {}
    for name, fill in figures.items():
        # Photos as PNG take six times the room.
        suffix = ".jpg" if name.endswith(("random_photos", "mistakes")) else ".png"
        made[name] = folder / f"{name}{suffix}"
        with replacing(made[name], suffix) as temporary:
            _save(fill, temporary, suffix[1:])
    return made


def svgs(params: Params, tables: Mapping[str, "pd.DataFrame"]) -> dict[str, list[str]]:
    """Figures for a page, as inline SVG in the page's own colours: `currentColor` and `var(--colour-0)` to 5.

    Args:
        tables: predictions, curves, roc, similarity.

    Returns:
        By kind (curves, roc, calibration, similarity; with many classes confusion), one figure after the other.
    """
    curves = tables["curves"].groupby("model", sort=False)
    kinds: dict[str, list[Callable[[Axes], None]]] = {
        "curves": [partial(_curve, of_model=part, value=value) for _, part in curves for value in _CURVES],
        "roc": _roc_panels(tables["roc"]),
        "calibration": [_calibration_panel(tables["predictions"], params)],
        "similarity": [
            partial(_similarity, of_model=part, name=name)
            for name, part in tables["similarity"].groupby("model", sort=False)
        ],
    }
    if len(params.classes) > MOST_IN_A_TABLE:
        answers = tables["predictions"].groupby("model", sort=False)
        kinds["confusion"] = [
            partial(_heat, of_model=part, classes=params.classes, title=f"{name}: share of each true class")
            for name, part in answers
        ]
    return {
        kind: [
            svg(panel, f"{kind}-{number}", _SQUARE if kind == "confusion" else _PANEL)
            for number, panel in enumerate(panels)
        ]
        for kind, panels in kinds.items()
    }


def random_photos(split: "pd.DataFrame", params: Params, most: int = _PHOTOS_A_CLASS) -> Iterator["pd.DataFrame"]:
    """For each class, rows of `split` drawn at random from those that may be shown; always the same ones."""
    rows = rights.shown(split, params)
    for label in params.classes:
        members = rows[rows["class"] == label]
        yield members.sample(min(most, len(members)), random_state=params.split.seed)


def _class_counts(figure: "Figure", split: "pd.DataFrame", classes: Sequence[str]) -> None:
    figure.set_size_inches(7, min(0.8 + 0.5 * len(classes), 12))
    axes = figure.subplots()
    left, places = np.zeros(len(classes)), range(len(classes))
    found = split.groupby(["class", "subset"]).size()
    for colour, subset in zip(COLOURS, SUBSETS, strict=False):
        counts = np.array([int(found.get((label, subset), 0)) for label in classes])
        bars = axes.barh(places, counts, left=left, color=colour, label=subset)
        if len(classes) <= _MOST_NAMED // 2:
            axes.bar_label(bars, labels=[f"{count:,}" for count in counts], label_type="center", color="white")
        left += counts
    _name(axes.yaxis, classes)
    axes.set(title="Photos by class and subset", xlabel="photos")
    axes.invert_yaxis()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _random_photos(figure: "Figure", split: "pd.DataFrame", params: Params, workspace: Path) -> None:
    if len(params.classes) > MOST_IN_A_TABLE:
        columns, count = 8, min(len(params.classes), _MOST_SHOWN)
        figure.set_size_inches(1.5 * columns, 1.75 * -(-count // columns))
        cells = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
        of_all = f" of {count} of {len(params.classes)} classes" if count < len(params.classes) else " of each class"
        named = zip(params.classes[:count], random_photos(split, params, 1), strict=False)
        for axes, (label, chosen) in _padded(cells, named):
            axes.set_title(_wrapped(label), fontsize=8)
            for path in chosen["path"]:
                axes.imshow(photos.read(workspace / path, _THUMBNAIL))
        figure.suptitle(f"A photo{of_all}, drawn at random", x=0.01, ha="left", fontweight="bold")
        return
    figure.set_size_inches(1.5 * _PHOTOS_A_CLASS, 1.75 * len(params.classes))
    parts = figure.subfigures(len(params.classes), 1, squeeze=False)[:, 0]
    for part, label, chosen in zip(parts, params.classes, random_photos(split, params), strict=True):
        part.suptitle(_wrapped(label, 80), x=0.01, ha="left", fontsize=10, fontweight="bold")
        for axes, path in _padded(part.subplots(1, _PHOTOS_A_CLASS, squeeze=False)[0], chosen["path"]):
            axes.imshow(photos.read(workspace / path, _THUMBNAIL))


def _learning_curves(figure: "Figure", curves: "pd.DataFrame") -> None:
    models = list(dict.fromkeys(curves["model"]))
    figure.set_size_inches(9, 3.4 * len(models))
    grid = figure.subplots(len(models), len(_CURVES), squeeze=False)
    for row, model in zip(grid, models, strict=True):
        for axes, value in zip(row, _CURVES, strict=True):
            _curve(axes, curves[curves["model"] == model], value)


def _curve(axes: "Axes", of_model: "pd.DataFrame", value: str) -> None:
    by_strength = of_model["strength"].notna().all()
    steps = of_model["strength"] if by_strength else of_model["epoch"] + 1
    for colour, subset in zip(COLOURS, ("train", "validation"), strict=False):
        part = of_model["subset"] == subset
        axes.plot(steps[part], of_model.loc[part, value], ".-" if by_strength else "-", color=colour, label=subset)
    axes.axvline(steps[of_model["kept"] == 1].iloc[0], color="grey", linewidth=1, linestyle=":", label="kept")
    axes.set(title=f"{of_model['model'].iloc[0]}: {value}", ylabel=f"{value} ({_CURVES[value]})")
    if by_strength:
        axes.set(xscale="log", xlabel="C (the smaller, the smaller the weights)")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
    # Curves may be anywhere, so the legend is below them.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)


def _confusion(figure: "Figure", predictions: "pd.DataFrame", classes: list[str]) -> None:
    models = list(dict.fromkeys(predictions["model"]))
    side = 7 if len(classes) > MOST_IN_A_TABLE else max(2.6, 0.9 * len(classes))
    figure.set_size_inches((side + 0.9) * len(models), side + 0.6)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        of_model = predictions[predictions["model"] == model]
        _heat(axes, of_model, classes, model)
        if len(classes) > MOST_IN_A_TABLE:
            continue
        counts, shares = confusion(of_model, classes)
        for (row, column), count in np.ndenumerate(counts):
            share = shares[row, column]
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{count}\n{share:.0%}", ha="center", va="center", color=colour)


def _heat(axes: "Axes", of_model: "pd.DataFrame", classes: list[str], title: str) -> None:
    _, shares = confusion(of_model, classes)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted", ylabel="true class")
    _name(axes.xaxis, classes, rotation=90 if len(classes) > MOST_IN_A_TABLE // 2 else 0)
    _name(axes.yaxis, classes)
    axes.spines[:].set_visible(False)


def _name(axis: "Axis", classes: Sequence[str], rotation: int = 0) -> None:
    """Put the names of classes at an axis; of many, each so many-th."""
    step = -(-len(classes) // _MOST_NAMED)
    many = len(classes) > MOST_IN_A_TABLE
    labels = [_cut(label, 24) if many else _wrapped(label) for label in classes[::step]]
    axis.set_ticks(range(0, len(classes), step), labels, rotation=rotation, fontsize=6 if many else 10)


def _wrapped(label: str, width: int = _WRAPPED) -> str:
    return textwrap.fill(_cut(label, 4 * width), width)


def _cut(label: str, most: int) -> str:
    return label if len(label) <= most else f"{label[: most - 3]}..."


def most_confused(of_model: "pd.DataFrame", most: int = 20) -> list[dict[str, Any]]:
    """The pairs of true class and answer with the most mistakes: class, predicted, photos and their share of class."""
    wrong = of_model[of_model["class"] != of_model["predicted"]]
    pairs = wrong.groupby(["class", "predicted"]).size().rename("photos").reset_index()
    # Not `map`: of no mistake at all it gives text, which nothing can be divided by.
    pairs["share"] = pairs["photos"] / of_model["class"].value_counts().reindex(pairs["class"]).to_numpy()
    ordered = pairs.sort_values(["photos", "share", "class", "predicted"], ascending=[False, False, True, True])
    return ordered.head(most).to_dict("records")


def confusion(of_model: "pd.DataFrame", classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Photos by true class (rows) and predicted class (columns), and their shares of the true class."""
    # Not scikit-learn's: the report needs it for nothing else, and its import takes a second.
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, tuple(positions(of_model[column], classes) for column in ("class", "predicted")), 1)
    return counts, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _roc_panels(roc: "pd.DataFrame") -> list[Callable[["Axes"], None]]:
    """With two classes all models in one, with more one a model."""
    if roc["class"].nunique() == 1:
        return [partial(_roc, roc=roc, title="ROC on the test photos")]
    return [
        partial(_roc, roc=part, title=f"{model}: ROC on the test photos")
        for model, part in roc.groupby("model", sort=False)
    ]


def _roc(axes: "Axes", roc: "pd.DataFrame", title: str) -> None:
    curves = list(roc.groupby(["model", "class"], sort=False))
    places = np.linspace(0, 1, 201)
    if len(curves) > _MOST_CURVES:
        of_each = [_at(places, part) for _, part in curves]
        axes.plot(places, np.transpose(of_each), color="grey", linewidth=0.5, alpha=0.5)
        axes.plot([], [], color="grey", linewidth=0.5, label=f"each of {len(curves)} classes")
        mean = np.mean(of_each, axis=0)
        label = f"mean of the classes: area {np.mean([_area(part) for _, part in curves]):.3f}"
        axes.plot(places, mean, color=COLOURS[0], label=label)
    else:
        for colour, ((model, label), part) in zip(COLOURS, curves, strict=False):
            axes.plot(
                part["false_positive_rate"], part["true_positive_rate"], color=colour,
                label=f"{model}, {_wrapped(label, 40)}: area {_area(part):.3f}",
            )  # fmt: skip
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="chance")
    axes.set(title=title, xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)


def _at(places: np.ndarray, curve: "pd.DataFrame") -> np.ndarray:
    return np.interp(places, curve["false_positive_rate"], curve["true_positive_rate"])


def _area(curve: "pd.DataFrame") -> float:
    return float(np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"]))


def _calibration_panel(predictions: "pd.DataFrame", params: Params) -> Callable[["Axes"], None]:
    return partial(_calibration, predictions=predictions, bins=params.evaluate.calibration_bins)


def _calibration(axes: "Axes", predictions: "pd.DataFrame", bins: int) -> None:
    import pandas as pd

    for colour, (model, part) in zip(cycle(COLOURS), predictions.groupby("model", sort=False), strict=False):
        binned = part.assign(right=part["class"] == part["predicted"]).groupby(
            pd.cut(part["confidence"], np.linspace(0, 1, bins + 1)), observed=True
        )
        confidence, right = binned["confidence"].mean(), binned["right"].mean()
        axes.plot(confidence, right, "-", color=colour, label=model)
        # A bin of three photos says little, and looks it.
        axes.scatter(confidence, right, s=10 + 200 * binned.size() / len(part), color=colour, alpha=0.6)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="perfect")
    lowest = 1 / predictions["class"].nunique()
    axes.set(
        title="Calibration on the test photos",
        xlabel="confidence (mean of the bin; dots grow with its photos)",
        ylabel="accuracy (share of photos)",
    )
    axes.set(xlim=(lowest * 0.95, 1.03))
    axes.legend(frameon=False)


def _similarity(axes: "Axes", of_model: "pd.DataFrame", name: str) -> None:
    """How similar photos of each subset are to the training photos: shares of them, over 30 bins."""
    bins = np.linspace(min(0.9, of_model["similarity"].min()), 1, 31).tolist()
    for colour, (subset, part) in zip(COLOURS, of_model.groupby("subset", sort=False), strict=False):
        weights = np.full(len(part), 1 / len(part))
        axes.hist(part["similarity"], bins, weights=weights, histtype="step", color=colour, linewidth=1.5, label=subset)
    axes.set(title=name, xlabel="similarity to the training photos (cosine)", ylabel="share of the photos")
    axes.legend(frameon=False)


def _mistakes(
    figure: "Figure", tables: Mapping[str, "pd.DataFrame"], heats: Mapping[str, np.ndarray], workspace: Path
) -> None:
    predictions, gallery = tables["predictions"], tables["gallery"]
    models, columns = list(dict.fromkeys(predictions["model"])), 4
    lines = {model: max(1, -(-int((gallery["model"] == model).sum()) // columns)) for model in models}
    figure.set_size_inches(3.2 * columns, 2.15 * sum(lines.values()) + 0.3 * len(models))
    parts = figure.subfigures(len(models), 1, squeeze=False, height_ratios=list(lines.values()))[:, 0]
    for part, model in zip(parts, models, strict=True):
        wrong = (predictions["model"] == model) & (predictions["class"] != predictions["predicted"])
        part.suptitle(
            f"{model}: {wrong.sum()} mistakes, the most confident first, and where it looked",
            x=0.01, ha="left", fontweight="bold",
        )  # fmt: skip
        cells = part.subplots(lines[model], columns, squeeze=False).ravel()
        rows = gallery[gallery["model"] == model].to_dict("records")
        for axes, (row, heat) in _padded(cells, zip(rows, heats[model], strict=True)):
            photo = photos.read(workspace / row["path"], _THUMBNAIL)
            looked = [explain.warmed(photo, heat / np.float32(255))] if heat.size else []
            axes.imshow(np.hstack([photo, *looked]))
            right = row["class"] == row["predicted"]
            words = "right, but unsure" if right else f"taken for {_cut(row['predicted'], 30)}"
            axes.set_title(
                f"{_cut(row['class'], 40)}\n{words} ({row['confidence']:.0%})", fontsize=8, fontweight="normal"
            )


def _padded(cells: Iterable["Axes"], items: Iterable[Any]) -> Iterator[tuple["Axes", Any]]:
    """Each item with its cell, which shows nothing but what is drawn into it; so do the cells left over."""
    items = iter(items)
    for axes in cells:
        axes.axis("off")
        for item in items:
            yield axes, item
            break


def _in_a_row(figure: "Figure", panels: list[Callable[["Axes"], None]]) -> None:
    figure.set_size_inches(5.4 * len(panels), 4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)


def svg(panel: Callable[["Axes"], None], prefix: str, inches: tuple[float, float] = _PANEL) -> str:
    """A panel as an `<svg>` element, in the page's own colours; its ids begin with `prefix`, for a page has several."""

    def fill(figure: "Figure") -> None:
        figure.set_size_inches(*inches)
        panel(figure.subplots())

    buffer = io.StringIO()
    _save(fill, buffer, "svg")
    text = buffer.getvalue()
    drawn = text[text.index("<svg") :]
    for old, new in [
        (' id="', f' id="{prefix}-'), ("url(#", f"url(#{prefix}-"), ('xlink:href="#', f'xlink:href="#{prefix}-'),
        ("#000000", "currentColor"),
        *((colour.lower(), f"var(--colour-{number})") for number, colour in enumerate(COLOURS)),
    ]:  # fmt: skip
        drawn = drawn.replace(old, new)
    return drawn


def _save(fill: Callable[["Figure"], None], target: Any, kind: str) -> None:
    """Draw a figure and write it as `png`, `jpg` or `svg`. Not pyplot's: that keeps figures, and wants a screen."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    style = _STYLE | {"font.family": _fonts()} | (_TRANSPARENT if kind == "svg" else {})
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Where no font has a letter, its place stays a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure()
        # Not `savefig`: it draws a figure once more, for its layout.
        if kind == "svg":
            canvas = FigureCanvasSVG(figure)
            fill(figure)
            # Matplotlib gives its writers no types.
            canvas.print_svg(target, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))  # type: ignore[no-untyped-call]
            return
        pixels = FigureCanvasAgg(figure)
        fill(figure)
        # An SVG is shown in the reader's own fonts; here a letter that no font has is named below.
        words = (word.strip(",:()") for text in figure.findobj(Text) for word in text.get_text().split())
        if spelt := [_in_words(word) for word in dict.fromkeys(words) if _without_glyph(word)]:
            more = [f"and {len(spelt) - _MOST_SPELT} more"] if len(spelt) > _MOST_SPELT else []
            figure.supxlabel("\n".join([*spelt[:_MOST_SPELT], *more]), x=0.01, ha="left", fontsize=7)
        write = pixels.print_png if kind == "png" else pixels.print_jpg
        write(target)  # type: ignore[no-untyped-call]


def _without_glyph(text: str) -> set[str]:
    """The letters of a text that no font here has."""
    return {letter for letter in text if ord(letter) not in _letters() and unicodedata.category(letter)[0] not in "CZ"}


def _in_words(word: str) -> str:
    """A word with the Unicode name of each letter that no font here has."""
    missing = _without_glyph(word)
    names = {letter: f"[{unicodedata.name(letter, f'U+{ord(letter):04X}').lower()}]" for letter in missing}
    spelt = "".join(names.get(letter, letter) for letter in word)
    return textwrap.fill(_cut(spelt, 300), 100, subsequent_indent="    ")


@cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset().union(*(get_font(findfont(name)).get_charmap() for name in _fonts()))


@cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import get_font_names

    return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in set(get_font_names()))]
