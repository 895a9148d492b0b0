"""`touchline registry compare`: two versions on the same photos, from the answers that `serve --shadow` records."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core.errors import ParamsError
from touchline.core.files import write_json, write_text
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.data import rights, served
from touchline.models import scores
from touchline.models.scores import Share
from touchline.report import html
from touchline.sources import feedback
from touchline.tracking import registered

if TYPE_CHECKING:
    import pandas as pd

    from touchline.tracking.registry import Version

# Photos that the page and the terminal show.
_ON_PAGE, _PRINTED = 60, 10


def run(paths: Paths, params: Params, first: str, second: str) -> None:
    """Print how often two versions agree and their accuracies; write `reports/compare.json` and `.html`.

    Args:
        first, second: number or alias of each.

    Raises:
        ParamsError: there is no such version, or both are the same.
    """
    name = params.register_.name
    known = registered.versions(paths, name)
    one, other = (_version(name, known, wanted) for wanted in (first, second))
    if one.number == other.number:
        raise ParamsError(f"{first} and {second} are the same version, {one.number}: name two versions")
    both = asked_of_both(served.read(paths.served), one.model_sha256, other.model_sha256)
    numbers = [one.number, other.number]
    if both.empty:
        print(
            f"data/served has no photo that versions {numbers[0]} and {numbers[1]} of {name} both answered: record "
            f"some with `touchline serve --model {numbers[0]} --shadow {numbers[1]}`"
        )
        return
    found = compared(both, feedback.labels(paths.feedback))
    report = {"name": name, "versions": numbers, **found}
    write_json(paths.reports / "compare.json", report)
    shown = found["differing"][:_ON_PAGE]
    # Someone may have asked about a photo of ours.
    may_be_seen = {each["photo"] for each in shown} - rights.hidden(paths, params)
    copies = served.thumbnails(paths.served, may_be_seen)
    photos = {photo: base64.b64encode(jpeg).decode() for photo, jpeg in copies.items()}
    page = html.render("compare.html", report=report, shown=shown, photos=photos)
    write_text(paths.reports / "compare.html", page)
    _print(report, paths)


def asked_of_both(rows: "pd.DataFrame", first: str, second: str) -> "pd.DataFrame":
    """One row for each photo that both models answered, with the last answer of each.

    Args:
        rows: from `served.read`.
        first, second: sha256 of the models.

    Returns:
        photo, and with the suffixes `_first` and `_second` label, guess, confidence and probabilities.
    """
    answered = rows[rows["error"] == ""]
    columns = ["photo", "label", "guess", "confidence", "probabilities"]
    parts = [
        answered.loc[answered["model_sha256"] == digest, columns].drop_duplicates("photo", keep="last")
        for digest in (first, second)
    ]
    return parts[0].merge(parts[1], on="photo", suffixes=("_first", "_second"))


def compared(both: "pd.DataFrame", labels: Mapping[str, str]) -> dict[str, Any]:
    """Compare two models' answers.

    Args:
        both: from `asked_of_both`; not empty.
        labels: the labels that people gave to photos, by sha256.

    Returns:
        `agreement` of the guesses, a `Share`; `differing`, a row for each photo on which they differ, the most
        confident first; and, if people gave labels that both models know, `accuracy`, a `Share` of each, and `mcnemar`.
    """
    truth = both["photo"].map(labels)
    agree = both["guess_first"] == both["guess_second"]
    both = both.assign(truth=truth.where(truth.notna(), None))
    sure = both[["confidence_first", "confidence_second"]].min(axis=1)
    differing = both[~agree].assign(sure=sure).sort_values("sure", ascending=False, kind="stable")
    columns = [f"{what}_{which}" for which in ("first", "second") for what in ("label", "guess", "confidence")]
    found: dict[str, Any] = {
        "agreement": asdict(Share.of(int(agree.sum()), len(both))),
        "differing": differing[["photo", *columns, "truth"]].to_dict("records"),
        "accuracy": None,
        "mcnemar": None,
    }
    first, second = (list(map(json.loads, both[f"probabilities_{which}"])) for which in ("first", "second"))
    classes = [label for label in first[0] if label in second[0]]
    said = both["truth"].isin(classes).to_numpy()
    if said.any():
        right = [both.loc[said, f"guess_{which}"] == both.loc[said, "truth"] for which in ("first", "second")]
        found["accuracy"] = [asdict(Share.of(int(each.sum()), int(said.sum()))) for each in right]
        # McNemar's test needs only whether each answer is right, given here as the probability of one class.
        as_rows = [np.column_stack([~each, each]).astype(float) for each in right]
        found["mcnemar"] = scores.mcnemar(np.ones(int(said.sum()), int), *as_rows)
    return found


def _version(name: str, known: Sequence["Version"], wanted: str) -> "Version":
    for each in known:
        if wanted in {str(each.number), *each.aliases}:
            return each
    existing = ", ".join(str(each.number) for each in known) or "none"
    raise ParamsError(f"{name} has no version or alias {wanted} (existing: {existing}): see `touchline registry list`")


def _print(report: Mapping[str, Any], paths: Paths) -> None:
    one, other = report["versions"]
    print(f"agreement     {Share(**report['agreement'])}, versions {one} and {other} of {report['name']}")
    if report["accuracy"]:
        for number, found in zip((one, other), report["accuracy"], strict=True):
            print(f"accuracy      {Share(**found)} that people labelled, version {number}")
        print(f"McNemar       p = {report['mcnemar']['p_value']:.3f}")
    else:
        print("accuracy      not known: none of these photos was labelled in `touchline app`")
    for each in report["differing"][:_PRINTED]:
        said = f", labelled {each['truth']}" if each["truth"] else ""
        print(
            f"differs       {each['photo'][:16]}  {one}: {each['label_first']} ({each['guess_first']} "
            f"{each['confidence_first']:.2f})  {other}: {each['label_second']} ({each['guess_second']} "
            f"{each['confidence_second']:.2f}){said}"
        )
    print(f"look through  {paths.relative(paths.reports / 'compare.html')}; all photos: reports/compare.json")
