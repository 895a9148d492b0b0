"""Which model is registered, and whether it becomes champion: every answer of the two functions that decide."""

from typing import Any

import pytest
from conftest import names
from projects import Project, accepted, built

from touchline.core.params import RegisterParams, load
from touchline.core.paths import Paths
from touchline.models import classifier
from touchline.stages.gates import Candidate, Cost, Duel
from touchline.stages.register import Decision, choose, costs, decide
from touchline.tracking.registry import Version

PARAMS = RegisterParams(
    name="rugby-soccer",
    min_accuracy=0.6,
    min_shared_photos=30,
    significance=0.05,
    min_slice_accuracy=0.5,
    min_slice_photos=30,
    max_unknown_share=0.4,
    max_slowdown=4.0,
)
OFF = PARAMS.model_copy(update={"min_slice_accuracy": None, "max_unknown_share": None, "max_slowdown": None})
CHAMPION = Version("rugby-soccer", 3, "run", "models:/m", "", {"touchline.model_sha256": "old"}, ("champion",))


def measured(accuracy: float, loss: float) -> dict[str, float]:
    return {"validation/accuracy": accuracy, "validation/loss": loss}


def test_the_model_that_is_better_on_validation_is_chosen() -> None:
    chosen, reason = choose({"cnn": measured(0.8, 0.1), "transfer": measured(0.9, 0.5)})
    assert chosen == "transfer" and names(reason, "0.900", "cnn", "0.800")


def test_of_equals_the_one_with_the_lower_log_loss_is_chosen() -> None:
    chosen, reason = choose({"cnn": measured(0.9, 0.4), "transfer": measured(0.9, 0.3), "vgg": measured(0.7, 0.1)})
    assert chosen == "transfer" and names(reason, "0.900", "cnn")


def test_the_only_model_is_chosen() -> None:
    chosen, reason = choose({"cnn": measured(0.4, 0.7)})
    assert chosen == "cnn" and reason


def metrics(accuracy: float = 0.9, p_value: float = 0.5, only: tuple[int, int] = (5, 4), **baselines: float) -> dict:
    """Of the models cnn and transfer, transfer the one in question."""
    return {
        "models": {"transfer": {"accuracy": accuracy}, "cnn": {"accuracy": 0.7}},
        "baselines": {name: {"accuracy": found} for name, found in ({"majority_class": 0.5} | baselines).items()},
        "mcnemar": [
            {
                "models": ["cnn", "transfer"],
                "only_first_right": only[0],
                "only_second_right": only[1],
                "p_value": p_value,
            }
        ],
    }


def decided(
    found: dict[str, Any],
    champion: Version | None = CHAMPION,
    duel: Duel | None = None,
    sha256: str = "new",
    slices: list[dict[str, Any]] | None = None,
    params: RegisterParams = PARAMS,
) -> Decision:
    return decide(Candidate("transfer", found, slices or [], duel), params, champion, {"model_sha256": sha256})


def test_the_first_champion_needs_no_duel() -> None:
    decision = decided(metrics(), champion=None)
    assert decision.promote and names(decision.reason, "transfer", "0.900")


def test_the_champion_stays_champion() -> None:
    # Even with bad figures: what is champion already is not deposed by registering it again.
    decision = decided(metrics(accuracy=0.1), sha256="old")
    assert decision.promote and names(decision.reason, "transfer", "version 3")


def test_a_version_that_a_person_rolled_back_is_not_promoted_again() -> None:
    tags = {"touchline.model_sha256": "new", "touchline.rolled_back": "2026-01-31T12:00:00+00:00"}
    version = Version("rugby-soccer", 4, "run", "models:/m", "", tags, ())
    candidate = Candidate("transfer", metrics(), duel=Duel(100, champion=0.1, challenger=0.9))
    decision = decide(candidate, PARAMS, CHAMPION, {"model_sha256": "new"}, version)
    assert not decision.promote
    assert "version 4" in decision.reason and "2026-01-31" in decision.reason and "promote 4" in decision.reason


@pytest.mark.parametrize("champion", [None, CHAMPION])
@pytest.mark.parametrize(
    "found, named",
    [
        (metrics(accuracy=0.59), ["0.590", "register.min_accuracy", "0.6"]),
        (metrics(size_and_aspect=0.9), ["0.900", "size_and_aspect"]),
        (metrics(colour_histogram=0.95), ["0.900", "colour_histogram", "0.950"]),
        (metrics(p_value=0.01, only=(20, 4)), ["cnn", "transfer"]),
    ],
)
def test_who_fails_a_gate_is_no_champion_even_if_there_is_none(
    found: dict[str, Any], named: list[str], champion: Version | None
) -> None:
    decision = decided(found, champion, Duel(100, champion=0.1, challenger=0.9))
    assert not decision.promote and names(decision.reason, *named)


@pytest.mark.parametrize(
    "found",
    [
        metrics(accuracy=0.6),  # the floor itself will do
        metrics(p_value=0.01, only=(4, 20)),  # it is the clearly better one
        metrics(p_value=0.05, only=(20, 4)),  # the other is better, but not clearly
    ],
)
def test_who_passes_every_gate_is_champion(found: dict[str, Any]) -> None:
    assert decided(found, champion=None).promote


def test_a_test_between_two_other_models_is_no_gate() -> None:
    found = metrics()
    found["mcnemar"] = [{"models": ["cnn", "vgg"], "only_first_right": 20, "only_second_right": 4, "p_value": 0.001}]
    assert decided(found, champion=None).promote


@pytest.mark.parametrize(
    "duel, promote, named",
    [
        (Duel(40, champion=0.8, challenger=0.85), True, ["0.850", "version 3", "0.800"]),
        (Duel(40, champion=0.8, challenger=0.8), True, ["version 3", "0.800"]),
        (Duel(40, champion=0.85, challenger=0.8), False, ["0.800", "version 3", "0.850"]),
        (Duel(30, champion=0.8, challenger=0.9), True, ["30", "0.900"]),
        (Duel(29, champion=0.0, challenger=0.0), False, ["29", "transfer", "version 3"]),
        (None, False, ["version 3", "classes"]),
    ],
)
def test_a_challenger_must_at_least_equal_the_champion_on_enough_photos_unseen_by_both(
    duel: Duel | None, promote: bool, named: list[str]
) -> None:
    decision = decided(metrics(), CHAMPION, duel)
    assert decision.promote is promote
    assert names(decision.reason, *named) and "\n" not in decision.reason


def row(of: str, name: str, photos: int, low: float) -> dict[str, Any]:
    """Of reports/slices.csv."""
    return {
        "by": of, "slice": name, "photos": photos,
        "accuracy": low + 0.1, "accuracy_low": low, "accuracy_high": low + 0.2,
    }  # fmt: skip


@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_a_slice_below_the_floor_is_named_with_its_figures(champion: Version | None) -> None:
    slices = [row("source", "sample", 90, 0.7), row("class", "rugby", 30, 0.48), row("shorter side", "< 256 px", 29, 0)]
    duel = Duel(100, champion=0.1, challenger=0.9)
    decision = decided(metrics(), champion, duel, slices=slices)
    assert not decision.promote
    assert names(decision.reason, "class", "rugby", "0.580", "0.480", "30", "register.min_slice_accuracy")
    assert not names(decision.reason, "sample") and not names(decision.reason, "256")
    assert decided(metrics(), champion, duel, slices=slices, params=OFF).promote
    # The floor itself will do.
    assert decided(metrics(), champion, duel, slices=[row("class", "rugby", 30, 0.5)]).promote


@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_a_model_that_calls_too_many_test_photos_unknown_is_no_champion(champion: Version | None) -> None:
    def found(rugby: int) -> dict[str, Any]:
        called = {"unknown": {"rugby": rugby, "soccer": 10}, "photos": {"rugby": 50, "soccer": 50}}
        return metrics() | {"unknown": {"transfer": called}}

    duel = Duel(100, champion=0.1, challenger=0.9)
    assert decided(found(30), champion, duel).promote
    decision = decided(found(31), champion, duel)
    assert not decision.promote and names(decision.reason, "41", "100", "register.max_unknown_share", "0.4")
    assert decided(found(31), champion, duel, params=OFF).promote


@pytest.mark.parametrize(
    "cost, named",
    [
        (Cost(40.1, 10.0), ["40.1", "10", "milliseconds"]),
        (Cost(40.0, 80.5), ["80.5", "20", "megabytes"]),
        (Cost(40.0, 80.0), []),
    ],
)
def test_a_model_much_slower_or_larger_than_the_champion_is_refused_with_both_figures(
    cost: Cost, named: list[str]
) -> None:
    duel = Duel(100, champion=0.1, challenger=0.9, costs=(Cost(10.0, 20.0), cost))
    decision = decided(metrics(), CHAMPION, duel)
    assert decision.promote is (not named)
    assert not named or names(decision.reason, "register.max_slowdown", *named)
    assert decided(metrics(), CHAMPION, duel, params=OFF).promote


def test_the_reasons_of_all_gates_are_named() -> None:
    decision = decided(metrics(accuracy=0.5), slices=[row("class", "rugby", 40, 0.2)])
    assert names(decision.reason, "register.min_accuracy", "majority_class", "register.min_slice_accuracy")
    assert "\n" not in decision.reason


def test_both_models_costs_are_measured_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = built(tmp_path_factory).project.root
    paths, params = Paths(root, root), load(root / "params.yaml")
    cnn, transfer = (classifier.resolve(paths, params, name) for name in ("cnn", "transfer"))
    files = accepted(Project(root))[:4]
    first, second = costs(cnn, transfer, files, params)
    assert second.megabytes == pytest.approx((root / "models/transfer.openvino").stat().st_size / 1e6, abs=0.01)
    assert second.megabytes > first.megabytes
    assert first.milliseconds > 0 and second.milliseconds > 0
