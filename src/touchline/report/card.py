"""The model card of a version, in Markdown: its measurements and limits.

After Mitchell et al., "Model Cards for Model Reporting" (2019, https://arxiv.org/abs/1810.03993). docs/model-card.md
describes what applies to every version.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from touchline.core.params import SUBSETS, Params
from touchline.core.paths import Paths
from touchline.models import scores

if TYPE_CHECKING:
    import pandas as pd

NAME = "model-card.md"


def markdown(
    paths: Paths,
    params: Params,
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    speeds: Mapping[str, Any],
    slices: Sequence[Mapping[str, Any]],
    licences: "pd.DataFrame",
    outcome: Mapping[str, Any],
    costs: Sequence[Mapping[str, Any]],
) -> str:
    """The card of the better model.

    Args:
        record: its `models/<name>.json`.
        metrics: `reports/metrics.json`.
        speeds: `reports/evaluation.json`.
        slices: its rows of `reports/slices.csv`.
        licences: `reports/licences.csv`.
        outcome: what `register` decided.
        costs: of each stage's last run on this machine.
    """
    name, registered = record["model"], outcome["registered"]
    version = f"version {registered['version']}" if registered else "not registered: an experiment"
    size = (paths.models / f"{name}.keras").stat().st_size / 1e6
    by_use = licences.groupby(["licence", "use"], sort=False)["photos"].sum().reset_index()
    counts = record["dataset"]["counts"]
    authors = licences.loc[licences["author"] != "", "author"].nunique()
    compared = {record["run_name"]: metrics["models"][name]} | {
        key.replace("_", " "): found for key, found in metrics["baselines"].items()
    }
    return "\n".join(
        [
            f"# {params.register_.name}, {version}",
            "",
            f"{record['description']}",
            "",
            f"When it was registered: {outcome['reason']}.",
            "",
            f"Model file: SHA-256 `{record['model_sha256']}`, {size:.1f} MB.",
            "",
            "## Intended use",
            "",
            f"Sorting photos that show one of: {', '.join(record['classes'])}; a person checks the doubtful ones. For: "
            f"{params.register_.use} (`register.use`). Not for identifying people, nor for decisions about them.",
            "",
            "## Data",
            "",
            *_table(
                ("subset", *record["classes"]),
                (
                    (subset, *(f"{counts.get(f'{subset}/{label}', 0):,}" for label in record["classes"]))
                    for subset in SUBSETS
                ),
            ),
            "",
            f"It learned from {int(licences['photos'].sum()):,} photos. Authors named: {authors:,}, in `licences.csv` "
            "of the run.",
            "",
            *_table(
                ("licence", "allows at most", "photos"),
                (
                    (row.licence or "not stated", row.use or "not known", f"{row.photos:,}")
                    for row in by_use.itertuples()
                ),
            ),
            "",
            f"## Figures on {metrics['test_photos']:,} test photos",
            "",
            "In brackets: Wilson's 95 % interval. The last rows are baselines; size and aspect is the control.",
            "",
            *_table(("", *scores.titles()), ((key, *scores.cells(found)) for key, found in compared.items())),
            "",
            *_table(
                ("slice", "photos", "accuracy"),
                (
                    (f"{row['by']}: {row['slice']}", f"{row['photos']:,}",
                     f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]")
                    for row in slices
                ),
            ),
            "",
            "## Photos of something else",
            "",
            *_unknown(metrics["unknown"].get(name)),
            "",
            "## Limits",
            "",
            "- The test photos come from the same sources as the training photos; for others the figures may not hold.",
            "- Small slices have wide intervals. Accuracy by people, countries, levels and ages was not measured.",
            f"- Below a confidence of {params.predict.min_confidence} the answer is `unsure`.",
            "",
            "## Cost",
            "",
            f"{speeds[name]['milliseconds_a_photo']} milliseconds a photo on {record['tags']['touchline.hardware']}; "
            f"training {record['metrics']['seconds/train']:.0f} s.",
            "",
            *_table(("stage", "seconds"), ((row["stage"], f"{row['seconds']:.1f}") for row in costs)),
            "",
        ]
    )  # fmt: skip


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: Iterable[str]) -> str:
    # Names of classes, licences and authors may be any text.
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in cells)} |"


def _unknown(found: Mapping[str, Any] | None) -> list[str]:
    """How many test photos and photos of something else are called `unknown`, as `evaluate` measured it."""
    if found is None:
        return ["Not measured: the model calls no photo `unknown`."]
    rows = [(label, f"{count:,}", f"{found['unknown'][label]:,}") for label, count in found["photos"].items()]
    return [
        f"A photo less similar to the training photos than {found['threshold']} is called `unknown`.",
        "",
        *_table(("photos of", "photos", "called unknown"), rows),
    ]
