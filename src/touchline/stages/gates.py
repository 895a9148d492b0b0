"""The gates that a model must pass to become champion. A gate returns the reason for refusing the model, else None.

To add a gate, write a function of the type `Gate` and list it in `GATES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from touchline.core.params import RegisterParams


@dataclass(frozen=True)
class Cost:
    """What a model costs in use.

    Attributes:
        milliseconds: for one photo, from its file to its probabilities.
        megabytes: size of the file that the engine reads.
    """

    milliseconds: float
    megabytes: float


@dataclass(frozen=True)
class Duel:
    """Champion and challenger on the same photos, which neither was trained on.

    Attributes:
        photos: how many.
        champion, challenger: accuracies on them.
        costs: of the champion and of the challenger, both measured just now; None if no gate needs them.
    """

    photos: int
    champion: float
    challenger: float
    costs: tuple[Cost, Cost] | None = None


@dataclass(frozen=True)
class Candidate:
    """The model that may become champion, with its figures.

    Attributes:
        model: its name in params.yaml.
        metrics: `reports/metrics.json`.
        slices: its rows of `reports/slices.csv`.
        duel: its comparison with the champion; None if there is none, the model is the champion, or classes differ.
    """

    model: str
    metrics: Mapping[str, Any]
    slices: Sequence[Mapping[str, Any]] = ()
    duel: Duel | None = None

    @property
    def accuracy(self) -> float:
        """On the test photos."""
        return self.metrics["models"][self.model]["accuracy"]


Gate = Callable[[Candidate, RegisterParams], str | None]


def refusals(candidate: Candidate, params: RegisterParams) -> list[str]:
    """The reasons of all gates that refuse the model."""
    return [reason for gate in GATES if (reason := gate(candidate, params))]


def _accuracy(candidate: Candidate, params: RegisterParams) -> str | None:
    if candidate.accuracy >= params.min_accuracy:
        return None
    return f"test accuracy {candidate.accuracy:.3f} is under register.min_accuracy {params.min_accuracy}"


def _baselines(candidate: Candidate, _: RegisterParams) -> str | None:
    unbeaten = [
        f"{name}, {baseline['accuracy']:.3f}"
        for name, baseline in candidate.metrics["baselines"].items()
        if candidate.accuracy <= baseline["accuracy"]
    ]
    if not unbeaten:
        return None
    return f"test accuracy {candidate.accuracy:.3f} does not beat baseline {' and '.join(unbeaten)}"


def _other_models(candidate: Candidate, params: RegisterParams) -> str | None:
    for test in candidate.metrics["mcnemar"]:
        if candidate.model not in test["models"] or test["p_value"] >= params.significance:
            continue
        winner = test["models"][0 if test["only_first_right"] > test["only_second_right"] else 1]
        if winner != candidate.model:
            return f"{winner} is clearly better on the test photos (McNemar p = {test['p_value']:.3f})"
    return None


def _slices(candidate: Candidate, params: RegisterParams) -> str | None:
    """Uses the lower bound of the interval, so that a small slice does not pass by chance."""
    floor = params.min_slice_accuracy
    if floor is None:
        return None
    low = [
        f"{row['by']} {row['slice']} {row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}] "
        f"on {row['photos']} photos"
        for row in sorted(candidate.slices, key=lambda row: row["accuracy_low"])
        if row["photos"] >= params.min_slice_photos and row["accuracy_low"] < floor
    ]
    if not low:
        return None
    # With a hundred classes there are hundreds of slices.
    more = f" (and {len(low) - 3} more slices)" if len(low) > 3 else ""
    return f"accuracy of {', '.join(low[:3])}{more}: the lower bound is under register.min_slice_accuracy {floor}"


def _unknown(candidate: Candidate, params: RegisterParams) -> str | None:
    # A model without a reference calls no photo unknown.
    found = candidate.metrics.get("unknown", {}).get(candidate.model)
    if params.max_unknown_share is None or not found:
        return None
    called, photos = (sum(found[key].values()) for key in ("unknown", "photos"))
    if called <= params.max_unknown_share * photos:
        return None
    return (
        f"it calls {called} of {photos} test photos ({called / photos:.3f}) `unknown`, more than "
        f"register.max_unknown_share {params.max_unknown_share}"
    )


def _slowdown(candidate: Candidate, params: RegisterParams) -> str | None:
    if params.max_slowdown is None or candidate.duel is None or candidate.duel.costs is None:
        return None
    champion, challenger = candidate.duel.costs
    reasons = [
        f"{new:.3g} {unit} are {new / old:.1f} times the champion's {old:.3g}"
        for new, old, unit in (
            (challenger.milliseconds, champion.milliseconds, "milliseconds a photo"),
            (challenger.megabytes, champion.megabytes, "megabytes"),
        )
        if new > params.max_slowdown * old
    ]
    if not reasons:
        return None
    return f"{' and '.join(reasons)}, more than register.max_slowdown {params.max_slowdown}"


GATES: tuple[Gate, ...] = (_accuracy, _baselines, _other_models, _slices, _unknown, _slowdown)
