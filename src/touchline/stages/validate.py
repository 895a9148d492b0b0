"""The `validate` stage: which photos are fit for training, and whether the set of them is.

Great Expectations decides on three tables: a row a photo (a photo that fails is rejected with a reason), a row a class
and one row for the whole set (a set that fails stops the pipeline, after every report is written).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from touchline import sources
from touchline.core import files, parallel
from touchline.core.errors import TouchlineError
from touchline.core.params import Params, ValidateParams
from touchline.core.paths import Paths
from touchline.core.progress import say, track
from touchline.data import decisions, rights, thumbnails
from touchline.data.photos import Measurement, measure
from touchline.report import html

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.data_context import EphemeralDataContext

COLUMNS = (
    "path",
    "class",
    "source",
    "sha256",
    "bytes",
    "width",
    "height",
    "licence",
    "author",
    "origin",
    "group",
    "subset",
    "title",
    "landing_page",
)
# Photos that a worker of a cluster is given at a time: about half a second of work, so that their way costs little.
_BATCH = 64
# Thumbnails of rejected photos on the page, and their longer side in pixels.
_MOST_PICTURES, _LONGER_SIDE = 12, 240
_DONE = {"keep": "kept", "drop": "dropped", "relabel": "relabelled"}
LEDGER_COLUMNS = ["sha256", "class", "source", "origin", "reason"]


@dataclass(frozen=True)
class Rule:
    """One expectation: each value of a column lies between two bounds or, with no bounds, is null.

    Attributes:
        name: what is looked at.
        column: of the table that is judged; null there means "does not apply", which passes a rule with bounds.
        allowed: what passes, in plain words.
        lowest, highest: inclusive bounds.
        reason: why a photo that fails is rejected; empty for rules of classes and of the set.
        remedy: what a person can do when the set fails.
    """

    name: str
    column: str
    allowed: str
    lowest: float | None = None
    highest: float | None = None
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Outcome:
    """What Great Expectations saw of one rule.

    Attributes:
        level: `photo`, `class` or `set`.
        observed: in plain words.
        unexpected_count: rows of the judged table that failed.
    """

    rule: Rule
    level: str
    passed: bool
    observed: str
    unexpected_count: int


def run(paths: Paths, params: Params) -> str:
    """Measure and judge every photo of data/photos.csv, then the set of the accepted ones.

    What people decided of single photos (data/decisions.csv) comes first: a dropped one is rejected, a relabelled one
    is judged under its new class.

    Writes data/validated.csv, data/rejected.csv, reports/validation.html and reports/validation.json; keeps what was
    rejected in the ledger, except in an experiment.

    Returns:
        How many photos were accepted and rejected.

    Raises:
        TouchlineError: an expectation of the set failed (after all is written), data/photos.csv is not what ingest
            writes, a line of data/decisions.csv cannot be followed, or a photo's file is missing.
    """
    limits = params.validate_
    offered = _read_photos(paths.photos_table, params.classes)
    decided, absent = decisions.match(decisions.read(paths.decisions, params.classes), offered)
    photos = relabel(offered, decided)
    dropped = [found is not None and found.kind == "drop" for found in decided]
    # The import of Great Expectations takes one core longer than two take to measure 600 photos.
    with ThreadPoolExecutor(1) as beside:
        starting = beside.submit(_new_context)
        table = describe(photos, _measure_all(paths, photos["path"], params), dropped)
        context = starting.result()
    rules = photo_rules(limits)
    failing = judge(context, table, rules)
    outcomes = photo_outcomes(rules, failing, len(table))
    reasons = first_reasons(len(table), rules, failing)
    for row, decision in enumerate(decided):
        # A person's word comes before any rule.
        if decision and decision.kind == "drop":
            reasons[row] = decision.reason
    judged = table.assign(reason=reasons, decided=[found.where if found else "" for found in decided])
    classes = count_classes(judged, params.classes)
    rules_of_class, rules_of_set = class_rules(limits), set_rules(limits)
    outcomes += class_outcomes(rules_of_class, judge(context, classes, rules_of_class), classes)
    failing_of_set = judge(context, summarise_set(judged, classes), rules_of_set)
    outcomes += set_outcomes(rules_of_set, failing_of_set, judged, classes)

    fit = judged["reason"] == ""
    accepted, rejected = judged[fit], judged[~fit]
    files.write_table(paths.validated_table, accepted[[*photos.columns, "contrast", "perceptual_hash"]])
    files.write_table(paths.rejected_table, photos.assign(reason=judged["reason"])[~fit])
    report = summarise_run(outcomes, classes, rejected, decided)
    files.write_json(paths.reports / "validation.json", report)
    pictures = _pictures(paths, params, rejected)
    # Of a table that `ingest` did not write nothing is known.
    left_out = files.read_json(refused) if (refused := paths.reports / "rights.json").is_file() else None
    files.write_text(paths.reports / "validation.html", render_page(report, outcomes, rejected, pictures, left_out))
    if not os.environ.get("DVC_EXP_NAME"):
        # Ingest knows photos by the class it found them under.
        of_ingest = offered.assign(reason=judged["reason"])
        _update_ledger(paths, of_ingest[fit], of_ingest[~fit], absent)

    for kind, count in report["counts"]["decisions"].items():
        if count:
            say(f"{count:,} {_DONE[kind]} by {paths.relative(paths.decisions)}")
    # Ingest fetches a dropped photo no more, so that one is gone as it should be.
    if gone := [decision.where for decision in absent if decision.kind != "drop"]:
        say(f"note: of photos that are not there any more: {'; '.join(gone)}")
    for reason, count in Counter(rejected["reason"]).most_common():
        say(f"rejected: {count:,} {reason}")
    if failures := _failures(outcomes):
        raise TouchlineError("validation failed: " + "; ".join(_one_line(failure) for failure in failures))
    page = paths.relative(paths.reports / "validation.html")
    return f"{len(accepted):,} of {len(judged):,} photos accepted, {len(rejected):,} rejected; see {page}"


def photo_rules(limits: ValidateParams) -> list[Rule]:
    """What each photo must meet. A photo that fails several rules is rejected for the first of them.

    Two classes comes before duplicate: where the class is uncertain, no copy may stay.
    """
    side, aspect = limits.min_side, f"{limits.max_aspect:g}"
    megapixels, contrast = f"{limits.max_megapixels:g}", f"{limits.min_contrast:g}"
    return [
        Rule(
            "size in megapixels",
            "megapixels",
            f"{megapixels} at most",
            highest=limits.max_megapixels,
            reason=f"decompression bomb: over {megapixels} megapixels",
        ),
        Rule("decodes in full", "error", "no error", reason="does not decode in full"),
        Rule(
            "shorter side",
            "shorter_side",
            f"{side} pixels or more",
            lowest=side,
            reason=f"shorter side under {side} pixels",
        ),
        Rule(
            "longer side over shorter side",
            "aspect",
            f"{aspect} at most",
            highest=limits.max_aspect,
            reason=f"longer side over {aspect} times the shorter",
        ),
        Rule(
            "contrast",
            "contrast",
            f"{contrast} grey levels or more",
            lowest=limits.min_contrast,
            reason=f"one flat colour: contrast under {contrast}",
        ),
        Rule("filed under one class", "also_in", "one class", reason="filed under several classes"),
        Rule("seen once", "copy_of", "no earlier copy", reason="exact duplicate"),
    ]


def class_rules(limits: ValidateParams) -> list[Rule]:
    return [
        Rule(
            "accepted photos of each class",
            "accepted",
            f"{limits.min_per_class:,} or more",
            lowest=limits.min_per_class,
            remedy="run `make refresh`, which fetches others for those rejected, add photos of it, or lower "
            "validate.min_per_class",
        )
    ]


def set_rules(limits: ValidateParams) -> list[Rule]:
    return [
        Rule(
            "largest class over smallest class",
            "class_ratio",
            f"{limits.max_class_ratio:g} at most",
            highest=limits.max_class_ratio,
            remedy="add photos of the smallest class or raise validate.max_class_ratio",
        ),
        Rule(
            "share of rejected photos",
            "rejected_share",
            f"{limits.max_rejected_share:.1%} at most",
            highest=limits.max_rejected_share,
            remedy="run `make refresh`, which fetches others for those rejected, mend what reports/validation.html "
            "lists, or raise validate.max_rejected_share",
        ),
        Rule(
            "accepted photos whose source states licences but gives none",
            "without_licence",
            "none",
            highest=0,
            remedy="fill in the licence where the source has it, then run `dvc repro -f -s ingest`",
        ),
    ]


def relabel(photos: "pd.DataFrame", decided: Sequence[decisions.Decision | None]) -> "pd.DataFrame":
    """`photos` with the classes that people gave them; their files stay where they are."""
    labels = [
        found.label if found and found.kind == "relabel" else label
        for found, label in zip(decided, photos["class"], strict=True)
    ]
    return photos.assign(**{"class": labels})


def describe(
    photos: "pd.DataFrame", measurements: Sequence[Measurement], dropped: Sequence[bool] = ()
) -> "pd.DataFrame":
    """`photos` with measured sizes and the columns that `photo_rules` look at.

    Args:
        photos: the rows of photos.csv.
        measurements: one a row, in its order.
        dropped: True for a photo that a person dropped, one a row; it makes no other a copy. Empty: none is.

    Returns:
        `photos` with width and height replaced (pixels, upright) and these columns added: megapixels, shorter_side
        (pixels), aspect and contrast (float, null where unknown), perceptual_hash, error, also_in (the other classes of
        the same bytes) and copy_of (origin of the earlier row) as text or None.
    """
    import pandas as pd

    classes_of: dict[str, set[str]] = defaultdict(set)
    first_origin: dict[tuple[str, str], str] = {}
    also_in: list[str | None] = []
    copy_of: list[str | None] = []
    rows = list(zip(photos["sha256"], photos["class"], photos["origin"], dropped or repeat(False), strict=False))
    for sha256, label, _, out in rows:
        if not out:
            classes_of[sha256].add(label)
    for sha256, label, origin, out in rows:
        also_in.append(None if out else ", ".join(sorted(classes_of[sha256] - {label})) or None)
        copy_of.append(None if out else first_origin.get((sha256, label)))
        if not out:
            first_origin.setdefault((sha256, label), origin)

    known = [photo.width > 0 and photo.height > 0 for photo in measurements]
    whole = [not photo.error and not photo.bomb for photo in measurements]
    longer = [max(photo.width, photo.height) for photo in measurements]
    shorter = [min(photo.width, photo.height) for photo in measurements]

    def numbers(values: Iterable[float], where: list[bool]) -> "pd.Series":
        return pd.Series(
            [value if true else None for value, true in zip(values, where, strict=True)], photos.index, dtype=float
        )

    def texts(values: list[str | None]) -> "pd.Series":
        return pd.Series(values, photos.index, dtype=object)

    return photos.assign(
        width=[photo.width for photo in measurements],
        height=[photo.height for photo in measurements],
        megapixels=numbers([photo.megapixels for photo in measurements], known),
        error=texts([photo.error or None for photo in measurements]),
        shorter_side=numbers(shorter, known),
        aspect=numbers([long / max(short, 1) for long, short in zip(longer, shorter, strict=True)], known),
        contrast=numbers([photo.contrast for photo in measurements], whole),
        perceptual_hash=[photo.perceptual_hash for photo in measurements],
        also_in=texts(also_in),
        copy_of=texts(copy_of),
    )


def judge(context: "EphemeralDataContext", table: "pd.DataFrame", rules: Sequence[Rule]) -> list[list[int]]:
    """Let Great Expectations find the rows that fail each rule; several rules may look at one column.

    Returns:
        For each rule the positions of the rows that fail it, ascending.

    Raises:
        TouchlineError: Great Expectations failed to evaluate a rule.
    """
    import great_expectations.expectations as gxe

    numbered = table[list(dict.fromkeys(rule.column for rule in rules))].assign(row=range(len(table)))
    batch = context.data_sources.pandas_default.read_dataframe(numbered)
    failing = []
    for rule in rules:
        expectation = (
            gxe.ExpectColumnValuesToBeNull(column=rule.column)
            if rule.lowest is None and rule.highest is None
            else gxe.ExpectColumnValuesToBeBetween(column=rule.column, min_value=rule.lowest, max_value=rule.highest)
        )
        found = batch.validate(
            expectation, result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]}
        )
        rows = sorted(int(entry["row"]) for entry in found.result.get("unexpected_index_list") or ())
        if found.success == bool(rows):
            raise TouchlineError(f"Great Expectations could not evaluate {rule.name}: {found.exception_info}")
        failing.append(rows)
    return failing


def first_reasons(count: int, rules: Sequence[Rule], failing: Sequence[Sequence[int]]) -> list[str]:
    """The one reason of each of `count` photos: that of the first rule it fails; empty if it fails none."""
    reasons = [""] * count
    for rule, rows in zip(rules, failing, strict=True):
        for row in rows:
            reasons[row] = reasons[row] or rule.reason
    return reasons


def photo_outcomes(rules: Sequence[Rule], failing: Sequence[Sequence[int]], count: int) -> list[Outcome]:
    return [
        Outcome(rule, "photo", not rows, f"{len(rows):,} of {count:,} photos fail", len(rows))
        for rule, rows in zip(rules, failing, strict=True)
    ]


def count_classes(judged: "pd.DataFrame", classes: Sequence[str]) -> "pd.DataFrame":
    """One row a class of params.yaml, in its order: class, photos, accepted, rejected; a class with no photo too."""
    import pandas as pd

    photos = Counter(judged["class"])
    accepted = Counter(judged.loc[judged["reason"] == "", "class"])
    return pd.DataFrame(
        {
            "class": list(classes),
            "photos": [photos[name] for name in classes],
            "accepted": [accepted[name] for name in classes],
            "rejected": [photos[name] - accepted[name] for name in classes],
        }
    )


def summarise_set(judged: "pd.DataFrame", classes: "pd.DataFrame") -> "pd.DataFrame":
    """One row: set (a name), class_ratio, rejected_share (0 to 1) and without_licence (a count)."""
    import pandas as pd

    # An empty class has no ratio; one photo in its place keeps the number finite, and min_per_class names the class.
    ratio = classes["accepted"].max() / max(classes["accepted"].min(), 1)
    share = float((judged["reason"] != "").mean()) if len(judged) else 0.0
    return pd.DataFrame(
        {
            "set": ["all photos"],
            "class_ratio": [float(ratio)],
            "rejected_share": [share],
            "without_licence": [len(_without_licence(judged))],
        }
    )


def class_outcomes(rules: Sequence[Rule], failing: Sequence[Sequence[int]], classes: "pd.DataFrame") -> list[Outcome]:
    smallest = int(classes["accepted"].argmin())
    outcomes = []
    for rule, rows in zip(rules, failing, strict=True):
        named = classes.iloc[list(rows) or [smallest]]
        words = ", ".join(f"{name} {count:,}" for name, count in zip(named["class"], named["accepted"], strict=True))
        outcomes.append(Outcome(rule, "class", not rows, words if rows else f"{words} is the smallest", len(rows)))
    return outcomes


def set_outcomes(
    rules: Sequence[Rule], failing: Sequence[Sequence[int]], judged: "pd.DataFrame", classes: "pd.DataFrame"
) -> list[Outcome]:
    ordered = classes.sort_values("accepted", kind="stable")
    smallest, largest = ordered.iloc[0], ordered.iloc[-1]
    summary = summarise_set(judged, classes).iloc[0]
    ratio = f"{largest['class']} {largest['accepted']:,} over {smallest['class']} {smallest['accepted']:,}"
    unlicensed = _without_licence(judged)
    first = f", the first is {unlicensed.iloc[0]['path']}" if len(unlicensed) else ""
    words = {
        "class_ratio": f"{summary['class_ratio']:.2f} ({ratio})" if smallest["accepted"] else ratio,
        "rejected_share": f"{summary['rejected_share']:.1%} ({classes['rejected'].sum():,} of {len(judged):,})",
        "without_licence": f"{len(unlicensed):,}{first}",
    }
    return [
        Outcome(rule, "set", not rows, words[rule.column], len(rows)) for rule, rows in zip(rules, failing, strict=True)
    ]


def summarise_run(
    outcomes: Sequence[Outcome],
    classes: "pd.DataFrame",
    rejected: "pd.DataFrame",
    decided: Sequence[decisions.Decision | None],
) -> dict[str, Any]:
    """What reports/validation.json says: success, expectations and counts."""
    kinds = Counter(found.kind for found in decided if found)
    reasons_of = {name: Counter(rejected.loc[rejected["class"] == name, "reason"]) for name in classes["class"]}
    return {
        "success": not _failures(outcomes),
        "expectations": [
            {
                "name": outcome.rule.name,
                "level": outcome.level,
                "passed": outcome.passed,
                "observed": outcome.observed,
                "allowed": outcome.rule.allowed,
                "unexpected_count": outcome.unexpected_count,
            }
            for outcome in outcomes
        ],
        "counts": {
            "photos": int(classes["photos"].sum()),
            "accepted": int(classes["accepted"].sum()),
            "rejected": len(rejected),
            "rejected_by_reason": dict(Counter(rejected["reason"]).most_common()),
            "decisions": {kind: kinds[kind] for kind in decisions.KINDS},
            "classes": {
                row["class"]: {
                    "photos": row["photos"],
                    "accepted": row["accepted"],
                    "rejected_by_reason": dict(reasons_of[row["class"]].most_common()),
                }
                for row in classes.to_dict("records")
            },
        },
    }


def render_page(
    report: dict[str, Any],
    outcomes: Sequence[Outcome],
    rejected: "pd.DataFrame",
    pictures: Mapping[str, str],
    left_out: Mapping[str, Any] | None,
) -> str:
    """reports/validation.html: a single file without links to others; every value in it is escaped.

    Args:
        pictures: thumbnails of some rejected photos, JPEG in base64, by path.
        left_out: reports/rights.json: what licences and files forbid.
    """
    column_of = {outcome.rule.reason: outcome.rule.column for outcome in outcomes}
    return html.render(
        "validation.html",
        success=report["success"],
        counts=report["counts"],
        failures=_failures(outcomes),
        outcomes=outcomes,
        pictures=pictures,
        left_out=left_out,
        rejected=[
            {**row, "address": quote(f"../{row['path']}"), "seen": _seen(column_of.get(row["reason"], "decided"), row)}
            for row in rejected.to_dict("records")
        ],
    )


def _pictures(paths: Paths, params: Params, rejected: "pd.DataFrame") -> dict[str, str]:
    """Thumbnails, JPEG in base64, by path: of photos rejected for each reason, if they decode and may be shown.

    What a person decided is not shown: a photo may have been dropped because it must not be seen.
    """
    # Only a photo that decodes, and is not taken for a decompression bomb, has a contrast.
    rows = rights.shown(rejected[rejected["contrast"].notna() & rejected["decided"].eq("")], params)
    turn = rows.groupby("reason").cumcount().sort_values(kind="stable")
    chosen = rows.loc[turn.index[:_MOST_PICTURES], "path"]
    return {path: thumbnails.jpeg(thumbnails.thumbnail(paths.workspace / path, _LONGER_SIDE)) for path in chosen}


def merge_ledger(ledger: "pd.DataFrame", accepted: "pd.DataFrame", rejected: "pd.DataFrame") -> "pd.DataFrame":
    """The ledger after a run: what is accepted now leaves it, what is rejected now enters it, the rest stays.

    A photo is its bytes under a class, so the exact duplicate of an accepted photo is no entry: its bytes are fine.

    Args:
        ledger: columns `LEDGER_COLUMNS`, all text.
        accepted, rejected: rows of photos.csv; `rejected` with its reason.
    """
    import pandas as pd

    def among(table: "pd.DataFrame", others: "pd.DataFrame") -> "pd.Series":
        keys = set(zip(others["sha256"], others["class"], strict=True))
        return pd.Series(
            [key in keys for key in zip(table["sha256"], table["class"], strict=True)], table.index, dtype=bool
        )

    kept = ledger[~among(ledger, accepted) & ~among(ledger, rejected)]
    added = rejected.loc[~among(rejected, accepted), LEDGER_COLUMNS]
    merged = pd.concat([kept[LEDGER_COLUMNS], added])
    return merged.sort_values(["class", "sha256", "origin"], kind="stable", ignore_index=True)


def _read_photos(path: Path, classes: Sequence[str]) -> "pd.DataFrame":
    # As text, so that a group called 007 is not turned into a number and every column comes out as it went in.
    photos = files.read_table(path, dtype=str)
    if missing := [column for column in COLUMNS if column not in photos.columns]:
        raise TouchlineError(f"{path} lacks the column {', '.join(missing)}: run `dvc repro -f -s ingest`")
    if unknown := sorted(set(photos["class"]) - set(classes)):
        raise TouchlineError(
            f"{path} has photos of {', '.join(unknown[:5])}, which params.yaml does not list under classes: "
            "add it there or run `dvc repro -f -s ingest`"
        )
    return photos


def _measure_all(paths: Paths, photos: "pd.Series", params: Params) -> list[Measurement]:
    distinct = list(dict.fromkeys(photos))
    work = partial(_measured, workspace=paths.workspace, max_megapixels=params.validate_.max_megapixels)
    rows = parallel.spread(work, distinct, parallel.scheduler(params), _BATCH, [paths.photos])
    by_name = dict(zip(distinct, track(rows, len(distinct), "reading photos"), strict=True))
    return [by_name[name] for name in photos]


def _measured(names: Iterable[str], workspace: Path, max_megapixels: float) -> Iterator[Measurement]:
    def work(name: str) -> Measurement:
        path = workspace / name
        try:
            found = measure(path, max_megapixels)
        except OSError as error:
            raise TouchlineError(
                f"{name} of data/photos.csv cannot be read ({error.strerror}): run `dvc repro -f -s ingest`"
            ) from None
        # Reports must read the same wherever the project lies.
        return Measurement(**{**vars(found), "error": found.error.replace(f"{path} ", "").replace(str(path), name)})

    return parallel.in_order(work, names)


def _without_licence(judged: "pd.DataFrame") -> "pd.DataFrame":
    # A folder of your own photos has licences only where its manifest gives some.
    licensed = [name for name in judged["source"].unique() if (source := sources.named(name)) and source.licensed]
    stated = judged["source"].isin(licensed)
    return judged[(judged["reason"] == "") & stated & (judged["licence"].str.strip() == "")]


def _failures(outcomes: Iterable[Outcome]) -> list[Outcome]:
    # A photo that fails is rejected; only classes and the set stop the pipeline.
    return [outcome for outcome in outcomes if outcome.level != "photo" and not outcome.passed]


def _one_line(failure: Outcome) -> str:
    rule = failure.rule
    return f"{rule.name}: seen {failure.observed}, allowed {rule.allowed} ({rule.remedy})"


def _new_context() -> "EphemeralDataContext":
    """A context of Great Expectations that lives in memory and sends nothing anywhere.

    It builds none of its own pages (Data Docs): they load styles, scripts and a logo from a dozen outside hosts.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def _seen(column: str, row: dict[str, Any]) -> str:
    value = row[column]
    match column:
        case "megapixels":
            return f"{value:,.1f} megapixels, {row['width']:,} x {row['height']:,}"
        case "shorter_side" | "aspect":
            return f"{row['width']:,} x {row['height']:,} pixels"
        case "contrast":
            return f"contrast {value:.2f}"
        case "also_in":
            return f"also in {value}"
        case "copy_of":
            return f"copy of {value}"
        case _:
            return str(value)


def _update_ledger(
    paths: Paths, accepted: "pd.DataFrame", rejected: "pd.DataFrame", absent: Sequence[decisions.Decision]
) -> None:
    import pandas as pd
    from filelock import FileLock

    paths.locks.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.locks / "ledger.lock"):
        if paths.ledger.exists():
            ledger = files.read_table(paths.ledger, dtype=str)
        else:
            ledger = pd.DataFrame(columns=LEDGER_COLUMNS, dtype=str)
        # Where a person took a drop back, ingest may offer the photo again.
        still = tuple(decision.digest for decision in absent if decision.kind == "drop")
        taken_back = ledger["reason"].str.startswith("dropped by ") & ~ledger["sha256"].str.startswith(still)
        ledger = ledger[~taken_back]
        files.write_table(paths.ledger, merge_ledger(ledger, accepted, rejected))
