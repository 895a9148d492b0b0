"""The `register` stage: the better model becomes a version of the registered model, and champion if it has earned it.

Selection is made on validation; the test photos only report and gate. An experiment says what it would have done and
moves nothing.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from touchline.core import parallel
from touchline.core.files import (
    check_digest,
    model_records,
    read_json,
    read_table,
    write_json,
    write_table,
    write_text,
)
from touchline.core.params import Params, RegisterParams
from touchline.core.paths import Paths
from touchline.core.progress import say
from touchline.data import photos, rights
from touchline.models import classifier, inference, scores
from touchline.models.classifier import Classifier
from touchline.report import card, page
from touchline.stages import gates
from touchline.stages.gates import Candidate, Cost, Duel
from touchline.tracking import registry, runs
from touchline.tracking.client import Store
from touchline.tracking.registry import CHALLENGER, CHAMPION, Version

# DVC takes what an experiment's `register` wrote for up to date.
ONCE_MORE = "`dvc repro --force --single-item register`"
# Rounds in which champion and challenger are timed.
_ROUNDS = 3


@dataclass(frozen=True)
class Decision:
    """Whether the challenger becomes champion, and one sentence with the reason."""

    promote: bool
    reason: str


def run(paths: Paths, params: Params) -> str:
    """Register the better model, move the aliases, and write `reports/registration.json` and `reports/report.html`.

    Returns:
        The decision and its reasons, in one sentence.
    """
    metrics = read_json(paths.reports / "metrics.json")
    evaluated = paths.reports / "evaluation.json"
    speeds = read_json(evaluated)
    records = model_records(paths.models, params.models, paths.split_table)
    for name in records:
        check_digest(paths.models / f"{name}.json", speeds[name]["record_sha256"], evaluated)
    better, why_better = choose({name: record["metrics"] for name, record in records.items()})
    rows = rights.learned_from(paths, records[better]["training_photos"])
    rights.check_use(better, rows, params)
    licences = rights.by_author(rows)
    write_table(paths.reports / "licences.csv", licences)
    store = runs.open_store(paths, params.register_.name)
    run_ids = {name: runs.ensure(store, record, paths.models / f"{name}.keras") for name, record in records.items()}
    slices = read_table(paths.reports / "slices.csv")
    slices = slices[slices["model"] == better].to_dict("records")

    while True:
        champion = registry.alias(store, params.register_.name, CHAMPION)
        rolled_back = registry.rolled_back(store, params.register_.name, records[better]["model_sha256"])
        duel = None
        if champion and champion.model_sha256 != records[better]["model_sha256"] and not rolled_back:
            duel = _duel(paths, params, store, champion, records[better])
        candidate = Candidate(better, metrics, slices, duel)
        decision = decide(candidate, params.register_, champion, records[better], rolled_back)
        outcome: dict[str, Any] = {
            "better_model": better,
            "why_better": why_better,
            "promoted": decision.promote,
            "reason": decision.reason,
            "champion_before": champion.number if champion else None,
            "duel": asdict(duel) if duel else None,
            "experiment": os.environ.get("DVC_EXP_NAME"),
            "run_ids": run_ids,
            "registered": None,
        }
        if outcome["experiment"]:
            outcome["promoted"] = False
            verb = "would" if decision.promote else "would not"
            outcome["reason"] = f"an experiment moves no alias; this one {verb} have become champion: {decision.reason}"
            break
        outcome["registered"] = _register(
            store, params, records, better, run_ids[better], metrics, why_better, decision, rights.names(rows)
        )
        version = outcome["registered"]["version"]
        if not decision.promote or registry.replace(store, params.register_.name, champion, version):
            break
        say("another machine made a champion meanwhile: comparing with that one")
    outcome["decision"] = page.decision(outcome, records[better]["run_name"], params.register_.name)
    outcome["headline"] = _headline(records, metrics, outcome)
    runs.conclude(store, run_ids[better], outcome["decision"], "" if outcome["experiment"] else outcome["headline"])
    page.write(paths, params, metrics, speeds, records, outcome)
    described = paths.reports / card.NAME
    costs = page.costs(paths, params)
    write_text(
        described, card.markdown(paths, params, records[better], metrics, speeds, slices, licences, outcome, costs)
    )
    runs.log_report(store, run_ids[better], paths.reports)
    for file in (described, paths.reports / "licences.csv"):
        runs.log_file(store, run_ids[better], file)
    # Last: this file records what was done.
    write_json(paths.reports / "registration.json", outcome)
    if outcome["experiment"]:
        say(f"to register its model: `dvc exp apply {outcome['experiment']}`, then {ONCE_MORE}")
    return outcome["decision"]


def choose(validation: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The model with the highest accuracy on validation; of equals the one with the lowest log loss.

    Args:
        validation: by model, `validation/accuracy` and `validation/loss`.

    Returns:
        The model's name and why.
    """
    ranked = sorted(
        validation, key=lambda name: (-validation[name]["validation/accuracy"], validation[name]["validation/loss"])
    )
    best = validation[ranked[0]]["validation/accuracy"]
    equals = [name for name in ranked if validation[name]["validation/accuracy"] == best]
    if len(ranked) == 1:
        return ranked[0], "the only model"
    if len(equals) > 1:
        return ranked[0], f"validation accuracy {best:.3f}, as {' and '.join(equals[1:])}, and a lower log loss"
    second = validation[ranked[1]]["validation/accuracy"]
    return ranked[0], f"validation accuracy {best:.3f}, {ranked[1]} {second:.3f}"


def decide(
    candidate: Candidate,
    params: RegisterParams,
    champion: Version | None,
    record: Mapping[str, Any],
    rolled_back: Version | None = None,
) -> Decision:
    """Whether the better model becomes champion.

    Args:
        champion: the version that holds the alias, if any.
        record: `models/<name>.json` of the better model.
        rolled_back: the version with this very model, if a person rolled it back.
    """
    model, duel = candidate.model, candidate.duel
    if champion and champion.model_sha256 == record["model_sha256"]:
        return Decision(True, f"{model} already is the champion, version {champion.number}")
    if rolled_back:
        return Decision(
            False,
            f"{model} is version {rolled_back.number}, which was rolled back on {rolled_back.rolled_back[:10]}: "
            f"`touchline promote {rolled_back.number}` makes it champion again",
        )
    if refusals := gates.refusals(candidate, params):
        return Decision(False, f"{model}: {'; '.join(refusals)}")
    if champion is None:
        return Decision(
            True, f"{model} is the first champion: test accuracy {candidate.accuracy:.3f} beats every baseline"
        )
    if duel is None:
        return Decision(
            False, f"the champion, version {champion.number}, has other classes: compare them by hand, then promote"
        )
    if duel.photos < params.min_shared_photos:
        return Decision(
            False,
            f"only {duel.photos} test photos were unseen by both {model} and the champion, version {champion.number} "
            f"(register.min_shared_photos {params.min_shared_photos}): keep the split, or promote by hand",
        )
    verb = "at least equals" if duel.challenger >= duel.champion else "does not reach"
    return Decision(
        duel.challenger >= duel.champion,
        f"{model} with accuracy {duel.challenger:.3f} {verb} the champion, version {champion.number}, with "
        f"{duel.champion:.3f}, on {duel.photos} test photos that neither was trained on",
    )


def _duel(paths: Paths, params: Params, store: Store, champion: Version, record: Mapping[str, Any]) -> Duel | None:
    name = params.register_.name
    if json.loads(champion.tags.get("touchline.classes", "null")) != list(params.classes):
        return None
    split = read_table(paths.split_table)
    seen = registry.training_photos(store, name, champion.number) | set(record["training_photos"])
    shared = split[(split["subset"] == "test") & ~split["sha256"].isin(seen)]
    if len(shared) < params.register_.min_shared_photos:
        return Duel(len(shared), 0.0, 0.0)
    files = [paths.workspace / path for path in shared["path"]]
    truth = [params.classes.index(label) for label in shared["class"]]
    contestants = {
        "champion": classifier.from_stored(registry.model(store, champion), "the champion", params.compute.engine),
        "challenger": classifier.resolve(paths, params, record["model"]),
    }
    accuracies = {
        role: float((inference.predict(each.network, files, role)[0].argmax(axis=1) == truth).mean())
        for role, each in contestants.items()
    }
    timed = params.register_.max_slowdown is not None
    spent = costs(contestants["champion"], contestants["challenger"], files, params) if timed else None
    return Duel(len(shared), **accuracies, costs=spent)


def costs(champion: Classifier, challenger: Classifier, files: Sequence[Path], params: Params) -> tuple[Cost, Cost]:
    """The costs of two models, measured in turn on the same photos: figures from two machines are not comparable."""
    few, both = files[: inference.BATCH], (champion, challenger)
    rounds = [[_seconds(each, few) for each in both] for _ in range(_ROUNDS)]
    # The shortest of several rounds, which other processes disturbed least.
    first, second = (
        Cost(
            round(1000 * min(seconds) / len(few), 2),
            round(each.files.file(params.compute.engine).stat().st_size / 1e6, 2),
        )
        for each, seconds in zip(both, zip(*rounds, strict=True), strict=True)
    )
    return first, second


def _seconds(model: Classifier, files: Sequence[Path]) -> float:
    began = time.perf_counter()
    rows = parallel.in_order(lambda path: (path, photos.read(path, model.side)), files)
    for _ in inference.answers(model.network.forward, rows):
        pass
    return time.perf_counter() - began


def _register(
    store: Store,
    params: Params,
    records: Mapping[str, Mapping[str, Any]],
    better: str,
    run_id: str,
    metrics: Mapping[str, Any],
    why_better: str,
    decision: Decision,
    licences: Mapping[str, int],
) -> dict[str, Any]:
    """Make the version, unless this very model is one already, and move the alias `challenger` to it."""
    name = params.register_.name
    record, found = records[better], metrics["models"][better]
    tags = {
        "touchline.model": record["model"],
        "test/accuracy": found["accuracy"],
        "validation/accuracy": record["metrics"]["validation/accuracy"],
        runs.REASON: decision.reason,
        "touchline.classes": json.dumps(record["classes"]),
        runs.LICENCES: json.dumps(licences),
        "touchline.forecast": json.dumps(record.get("forecast")),
    }
    # MLflow's list of versions shows the beginning, as plain text.
    verdict = "Became champion" if decision.promote else "Did not become champion"
    description = (
        f"{verdict} when it was registered: {decision.reason}.\n\n{record['description']}\n\n"
        f"**Data**: split `{record['dataset']['digest']}`; classes, in order: {', '.join(record['classes'])}.\n\n"
        f"**Licences** of the photos: {_licences(licences)}. Their authors, and a model card, are with the run: "
        "`licences.csv`, `model-card.md`.\n\n"
        f"**Chosen** for its {why_better}.\n\n{_side_by_side(records, metrics)}"
    )
    same = [known for known in registry.versions(store, name) if known.model_sha256 == record["model_sha256"]]
    version = same[-1].number if same else registry.register(store, name, run_id, tags, description)
    if same and CHAMPION in same[-1].aliases:
        # A champion keeps the reason why it became one, also where `registry sync` restores it from this outcome.
        tags |= {key: same[-1].tags[key] for key in tags if key in same[-1].tags}
        description = same[-1].description
    elif same:
        registry.describe_version(store, name, version, tags, description)
    registry.set_alias(store, name, CHALLENGER, version)
    return {
        "model": record["model"],
        "model_sha256": record["model_sha256"],
        "version": version,
        "aliases": [CHALLENGER, CHAMPION] if decision.promote else [CHALLENGER],
        "tags": tags,
        "description": description,
    }


def _headline(records: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    """The result in a line for the page of an experiment: the models, the most accurate first, and the champion."""
    accuracies = {record["run_name"]: metrics["models"][name]["accuracy"] for name, record in records.items()}
    ranked = sorted(accuracies, key=lambda name: -accuracies[name])
    reached = ", ".join(f"{name} {accuracies[name]:.3f}" for name in ranked)
    better = records[outcome["better_model"]]["run_name"]
    champion = f"the champion is {better}" if outcome["promoted"] else f"{better} did not become champion"
    return f"Last run, accuracy on {metrics['test_photos']:,} test photos: {reached}; {champion}."


def _licences(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'not known'} {count:,}" for name, count in counts.items())


def _side_by_side(records: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any]) -> str:
    """The models as a table in Markdown, of their metrics on the test photos."""
    head = ["model", "validation accuracy", *scores.titles()]
    rows = [
        [record["run_name"], f"{record['metrics']['validation/accuracy']:.3f}", *scores.cells(metrics["models"][name])]
        for name, record in records.items()
    ]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"On {metrics['test_photos']:,} test photos:", "", *lines])
