"""`touchline monitor`: how well the champion does in use, from the answers kept by `serve` and `predict --record`.

Recent answers are compared with the champion's answers on the test photos, which it did not learn from either. In this
comparison a photo that came more than once counts once, and photos that the champion learned from are left out. Rates,
milliseconds and errors count every row.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.commands import drift
from touchline.commands.drift import CLASSES, CONFIDENCE, FEWEST, SILENT, TOO_FEW, Side
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, write_json, write_text
from touchline.core.params import MonitorParams, Params
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data import served
from touchline.models import forecast, inference, scores
from touchline.models.classifier import UNKNOWN, UNSURE, Classifier
from touchline.models.scores import Share
from touchline.report import html, plots
from touchline.sources import feedback

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from touchline.tracking.registry import Version

WARNING = "warning"
EXIT_CODES = {SILENT: 0, WARNING: 3, TOO_FEW: 4}
SIMILARITY = "similarity"
# The subjects of warnings.
DRIFT, UNKNOWN_RATE, ACCURACY, AGE, LATENCY, ERRORS = "drift", "unknown", "accuracy", "age", "latency", "errors"


@dataclass(frozen=True)
class Alert:
    """What `monitor` warns of.

    Attributes:
        what: DRIFT, UNKNOWN_RATE, ACCURACY, AGE, LATENCY or ERRORS.
        found, limit: the figure, and the limit it exceeds or misses.
        says: both in a sentence.
    """

    what: str
    found: float
    limit: float
    says: str


@dataclass(frozen=True)
class Figures:
    """Summary of a table of answers; None where the table has no values for it.

    Attributes:
        asked: number of rows. answered: rows with an answer; all shares except `errors` are of these.
        unknown, unsure, errors: shares.
        confidence: median.
        p50, p99: milliseconds.
        classes: share of each guess.
    """

    asked: int
    answered: int
    unknown: float | None
    unsure: float | None
    errors: float | None
    confidence: float | None
    p50: float | None
    p99: float | None
    classes: dict[str, float]

    @classmethod
    def of(cls, rows: "pd.DataFrame", classes: Sequence[str]) -> "Figures":
        """Summarise rows from `served.read`."""
        answered = rows[rows["error"] == ""]
        waits = answered["milliseconds"].dropna()

        def milliseconds(quantile: float) -> float | None:
            return round(float(waits.quantile(quantile)), 1) if len(waits) else None

        def share(found: "pd.Series") -> float | None:
            return round(float(found.mean()), 6) if len(found) else None

        return cls(
            len(rows), len(answered), share(answered["label"] == UNKNOWN), share(answered["label"] == UNSURE),
            share(rows["error"] != ""),
            round(float(answered["confidence"].median()), 6) if len(answered) else None,
milliseconds(0.5), milliseconds(0.99),
            {name: share(answered["guess"] == name) or 0.0 for name in classes} if len(answered) else {},
        )  # fmt: skip


def run(paths: Paths, params: Params) -> str:
    """Write `reports/monitor.json` and `reports/monitor.html`, and log the figures on the champion's run.

    Returns:
        SILENT, WARNING or TOO_FEW.

    Raises:
        TouchlineError: there is no champion.
    """
    now, watch = datetime.now(UTC), params.monitor
    champion = drift.find_champion(paths, params)
    classifier, version, learned_from = champion.classifier, champion.version, champion.learned_from
    rows = served.read(paths.served, now - timedelta(days=watch.days))
    own = rows[(rows["model_sha256"] == version.model_sha256) & (rows["role"] == served.CHAMPION)]
    recent = own[own["time"] >= (now - timedelta(days=watch.recent_days)).timestamp()]
    asked = _once(recent, learned_from)
    test = _test_photos(paths, params, classifier, learned_from) if len(asked) >= FEWEST else None
    figures, on_test = Figures.of(recent, classifier.classes), None
    comparisons: list[drift.Comparison] = []
    if test is not None:
        on_test = Figures.of(test, classifier.classes)
        sides = (_side(asked, classifier.classes), Side({}, []), _side(test, classifier.classes))
        comparisons = drift.compare(*sides, params.split.near_duplicate_bits)
    in_use = _in_use(paths, _once(own, learned_from), classifier.classes)
    of_test = Share.of(int((test["guess"] == test["class"]).sum()), len(test)) if test is not None else None
    age = _age(version, now)
    differing = [each for each in comparisons if each.warns(params.drift)]
    warned = warnings(watch, figures, on_test, differing, in_use, of_test, age)
    report: dict[str, Any] = {
        "model": classifier.name,
        "written": now.isoformat(timespec="seconds"),
        **_verdict(classifier.name, len(asked), warned, watch),
        "warnings": [asdict(each) for each in warned],
        "recent": asdict(figures) | {"photos": len(asked)},
        "test": asdict(on_test) if on_test else None,
        "comparisons": [vars(each) | {"warns": each.warns(params.drift)} for each in comparisons],
        "accuracy": {"in use": asdict(in_use) if in_use else None, "test": asdict(of_test) if of_test else None},
        "forecast": _forecast(version, asked, classifier.classes),
        "age_days": age,
        "days": [
            {"day": day, "model": model, **asdict(Figures.of(part, classifier.classes))}
            for (day, model), part in rows.groupby([_days(rows), "model"])
        ],
    }
    _write(paths, params, report, rows, classifier, on_test)
    if len(recent):
        _log(paths, params, version, report, now)
    _print(report, paths)
    return report["outcome"]


def warnings(
    params: MonitorParams,
    recent: Figures,
    test: Figures | None,
    differing: Sequence[drift.Comparison],
    in_use: Share | None,
    of_test: Share | None,
    age_days: int | None,
) -> list[Alert]:
    """The warnings; there are none for a limit that is null, or with too few photos.

    Args:
        recent: of the rows of `monitor.recent_days`. test: of the test photos.
        differing: the comparisons of both that warn.
        in_use, of_test: the champion's accuracy on photos that people labelled, and on the test photos.
    """
    found: list[Alert] = []

    def warn(what: str, value: float | None, limit: float | None, says: str) -> None:
        if value is not None and limit is not None and value > limit:
            found.append(Alert(what, round(value, 6), round(limit, 6), says))

    for each in differing:
        says = f"{each.what} differ{'' if each.what == CLASSES else 's'} from the test photos' ({each.statistic} "
        found.append(Alert(DRIFT, each.distance, each.by_chance, f"{says}{each.value:.2f})"))
    enough = recent.answered >= FEWEST
    if enough and test and test.unknown is not None and recent.unknown is not None:
        # The lower end of its interval, so that two of thirty photos raise no warning.
        surely = scores.wilson(round(recent.unknown * recent.answered), recent.answered)[0]
        says = (
            f"{100 * recent.unknown:.0f} % of the answers were unknown; {100 * test.unknown:.0f} % on the test photos"
        )
        limit = params.max_unknown_ratio and params.max_unknown_ratio * test.unknown
        warn(UNKNOWN_RATE, surely, limit, says)
    if in_use and of_test and in_use.photos >= FEWEST and in_use.share < of_test.low:
        says = (
            f"accuracy in use is {in_use.share:.3f}, below the interval of the test accuracy, "
            f"{of_test.low:.3f} to {of_test.high:.3f}"
        )
        found.append(Alert(ACCURACY, round(in_use.share, 6), round(of_test.low, 6), says))
    warn(AGE, age_days, params.max_age_days, f"it has been champion for {age_days} days")
    if enough:
        warn(LATENCY, recent.p99, params.max_milliseconds, f"1 % of the answers took over {recent.p99} ms")
    if recent.asked >= FEWEST:
        warn(
            ERRORS, recent.errors, params.max_errors, f"{100 * (recent.errors or 0):.1f} % of the photos got no answer"
        )
    return found


def _once(rows: "pd.DataFrame", learned_from: set[str]) -> "pd.DataFrame":
    """The last answer on each photo that the champion did not learn from."""
    answered = rows[(rows["error"] == "") & ~rows["photo"].isin(learned_from)]
    return answered.drop_duplicates("photo", keep="last")


def _test_photos(paths: Paths, params: Params, classifier: Classifier, learned_from: set[str]) -> "pd.DataFrame | None":
    """The champion's answers on the test photos, in the columns of `served.read`, with their class and hash.

    None, after printing a line, if too few are left that it did not learn from, or they are not on this machine.
    """
    try:
        table, split = read_table(paths.validated_table), read_table(paths.split_table)
        test = split.loc[split["subset"] == "test", ["path", "class", "sha256"]]
        test = test.merge(table[["path", "perceptual_hash"]], on="path")
        test = test[~test["sha256"].isin(learned_from)].reset_index(drop=True)
        if len(test) < FEWEST:
            raise TouchlineError(
                f"data/split.csv has {len(test)} test photos that it did not learn from, and {FEWEST} are needed"
            )
        files = [paths.workspace / path for path in test["path"]]
        found, _ = inference.predict(classifier.network, files, "test photos", classifier.forward)
        similar = classifier.similarities(found)
        answers = [classifier.answer(*each, params.predict) for each in zip(found, similar, strict=True)]
    except TouchlineError as error:
        say(f"{classifier.name} is not compared with its answers on the test photos: {error}")
        return None
    columns = ("label", "guess", "confidence", "similarity")
    values = {name: [getattr(answer, name) for answer in answers] for name in columns}
    return test.assign(**values, error="", milliseconds=np.nan, photo=test["sha256"])


def _side(rows: "pd.DataFrame", classes: Sequence[str]) -> Side:
    guesses = rows["guess"].map({name: number for number, name in enumerate(classes)})
    values = {CLASSES: guesses.to_numpy(int), CONFIDENCE: rows["confidence"].to_numpy(float)}
    similar = rows["similarity"].to_numpy(float)
    if np.isfinite(similar).all():
        values[SIMILARITY] = similar
    # Recorded answers have no perceptual hash. Digests differ as much as the hashes of unrelated photos.
    hashes = rows["perceptual_hash"] if "perceptual_hash" in rows else rows["photo"].str[:16]
    chosen = drift.sample(list(range(len(rows))))
    return Side({what: found[chosen] for what, found in values.items()}, [hashes.iloc[row] for row in chosen])


def _in_use(paths: Paths, rows: "pd.DataFrame", classes: Sequence[str]) -> Share | None:
    """The champion's accuracy on photos that people labelled in the app; None if there are none."""
    truth = rows["photo"].map(feedback.labels(paths.feedback))
    known = truth.isin(classes)
    return Share.of(int((rows["guess"] == truth)[known].sum()), int(known.sum())) if known.any() else None


def _forecast(version: "Version", rows: "pd.DataFrame", classes: Sequence[str]) -> dict[str, Any] | None:
    """A forecast of the champion's accuracy on these photos; None if there is none for it, or too few photos."""
    if len(rows) < FEWEST:
        return None
    probabilities = np.array([[found[name] for name in classes] for found in map(json.loads, rows["probabilities"])])
    return forecast.for_version(version.tags, probabilities, (rows["label"] == UNKNOWN).to_numpy())


def _age(version: "Version", now: datetime) -> int | None:
    """Days since it became champion; None if the registry has no date."""
    from touchline.tracking.registry import PROMOTED_AT

    since = version.tags.get(PROMOTED_AT)
    return (now - datetime.fromisoformat(since)).days if since else None


def _verdict(model: str, photos: int, warned: Sequence[Alert], params: MonitorParams) -> dict[str, str]:
    asked = f"{photos:,} photo{'s' if photos != 1 else ''} in {params.recent_days} days"
    if warned:
        return {"outcome": WARNING, "verdict": f"{model}, {asked}: {'; '.join(each.says for each in warned)}."}
    if photos < FEWEST:
        return {
            "outcome": TOO_FEW,
            "verdict": f"Too few photos: data/served has {asked} that {model} answered, and {FEWEST} are needed: "
            "start `touchline serve --record`.",
        }
    return {
        "outcome": SILENT,
        "verdict": f"No warning: {asked}; the answers of {model} are like those on the test photos.",
    }


def _days(rows: "pd.DataFrame") -> "pd.Series":
    import pandas as pd

    return pd.to_datetime(rows["time"], unit="s", utc=True).dt.strftime("%Y-%m-%d")


def _figures(rows: "pd.DataFrame", classifier: Classifier, test: Figures | None) -> dict[str, Callable[["Axes"], None]]:
    """Functions that draw a chart by day, all models together, by the chart's title."""
    by_day = {day: Figures.of(part, classifier.classes) for day, part in rows.groupby(_days(rows))}
    first = rows.drop_duplicates("model").assign(day=_days)["day"].iloc[1:]
    days = list(by_day)

    def drawn(axes: "Axes", title: str, unit: str, lines: Mapping[str, tuple[list[Any], float | None]]) -> None:
        for colour, (name, (values, expected)) in zip(plots.COLOURS, lines.items(), strict=False):
            axes.plot(range(len(days)), [np.nan if each is None else each for each in values], ".-", color=colour,
                      label=name)  # fmt: skip
            if expected is not None:
                axes.axhline(expected, color=colour, linestyle=":", label=f"{name}, test photos")
        for day in first:
            axes.axvline(days.index(day), color="#888888", linestyle="--", linewidth=0.8)
        step = max(1, len(days) // 5)
        axes.set_xticks(range(0, len(days), step), [day[5:] for day in days[::step]])
        axes.set(title=title, ylabel=unit)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)

    def of(name: str) -> list[Any]:
        return [getattr(each, name) for each in by_day.values()]

    def expected(name: str) -> float | None:
        return getattr(test, name) if test else None

    shares = {
        name: ([each.classes.get(name) for each in by_day.values()], test.classes.get(name) if test else None)
        for name in classifier.classes[: len(plots.COLOURS)]
    }
    rates = {name: (of(name), expected(name)) for name in (UNKNOWN, UNSURE)}
    panels: dict[str, tuple[str, Mapping[str, tuple[list[Any], float | None]]]] = {
        "volume": ("photos a day", {"asked": (of("asked"), None)}),
        "unknown and unsure": ("share of answers", rates),
        "confidence": ("median", {"confidence": (of("confidence"), expected("confidence"))}),
        "classes": ("share of answers", shares),
        "latency": ("milliseconds", {"p50": (of("p50"), None), "p99": (of("p99"), None)}),
        "errors": ("share of photos", {"errors": (of("errors"), None)}),
    }
    return {title: partial(drawn, title=title, unit=unit, lines=lines) for title, (unit, lines) in panels.items()}


def _write(
    paths: Paths,
    params: Params,
    report: Mapping[str, Any],
    rows: "pd.DataFrame",
    classifier: Classifier,
    test: Figures | None,
) -> None:
    drawn = {
        title: plots.svg(panel, f"monitor-{number}")
        for number, (title, panel) in enumerate(_figures(rows, classifier, test).items())
    }
    write_json(paths.reports / "monitor.json", report)
    page = html.render(
        "monitor.html", report=report, figures=drawn if len(rows) else {}, monitor=params.monitor, drift=params.drift
    )
    write_text(paths.reports / "monitor.html", page)


def _log(paths: Paths, params: Params, version: "Version", report: Mapping[str, Any], now: datetime) -> None:
    """Log the recent figures as metrics of the champion's run; if the store does not answer, print a line."""
    from touchline.tracking import runs
    from touchline.tracking.client import StoreError

    figures = {**report["recent"], **{f"share/{name}": share for name, share in report["recent"]["classes"].items()}}
    if report["accuracy"]["in use"]:
        figures["accuracy"] = report["accuracy"]["in use"]["share"]
    if report["forecast"]:
        figures["forecast"] = report["forecast"]["accuracy"]
    figures["warnings"] = len(report["warnings"])
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    try:
        runs.log_use(runs.open_store(paths, params.register_.name), version.run_id, numbers, now)
    except StoreError as error:
        say(f"the figures are not in MLflow: {error}")


def _print(report: Mapping[str, Any], paths: Paths) -> None:
    print(report["verdict"])
    if report["forecast"]:
        print(report["forecast"]["says"])
    print(f"page: {paths.relative(paths.reports / 'monitor.html')}; all figures: reports/monitor.json")
