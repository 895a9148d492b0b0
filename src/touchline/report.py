"""`reports/report.html`: the whole run on one page that opens from disk, without a network."""

import base64
from collections.abc import Mapping
from typing import Any

from touchline import pages
from touchline.files import read_json, read_table, write_text
from touchline.params import Params
from touchline.paths import Paths

# What each figure shows, for who cannot see it.
FIGURES = {
    "class_counts": "Bars: photos of each class in training, validation and test.",
    "random_photos": "Photos of each class drawn at random.",
    "learning_curves": "Accuracy and loss of each model by epoch, on training and validation photos.",
    "confusion": "For each model, how many test photos of each class were taken for which class.",
    "roc": "ROC curves of the models on the test photos.",
    "calibration": "Accuracy of the models against the confidence they state.",
    "mistakes": "The photos each model got wrong with most confidence.",
}


def write(
    paths: Paths,
    params: Params,
    metrics: Mapping[str, Any],
    speeds: Mapping[str, Any],
    records: Mapping[str, Any],
    outcome: Mapping[str, Any],
) -> None:
    """Write the page from what the stages wrote.

    Args:
        metrics: `reports/metrics.json`.
        speeds: `reports/evaluation.json`.
        records: `models/<name>.json` by name.
        outcome: what `register` decided.
    """
    figures = {
        name: base64.b64encode((paths.reports / "figures" / f"{name}.png").read_bytes()).decode() for name in FIGURES
    }
    rejected = read_table(paths.rejected_table)
    page = pages.render(
        "report.html",
        classes=params.classes,
        sources=params.ingest.sources,
        metrics=metrics,
        speeds=speeds,
        records=records,
        outcome=outcome,
        split=read_json(paths.reports / "split.json"),
        rejected=rejected["reason"].value_counts().to_dict() if len(rejected) else {},
        per_class=read_table(paths.reports / "per_class.csv").to_dict("records"),
        slices=read_table(paths.reports / "slices.csv").to_dict("records"),
        figures=figures,
        captions=FIGURES,
        registered_name=params.register_.name,
    )
    write_text(paths.reports / "report.html", page)
