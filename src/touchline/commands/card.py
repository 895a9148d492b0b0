"""`touchline card`: the model card of a version, as `register` wrote it into the registry."""

from touchline.core.errors import TouchlineError
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.report import card
from touchline.tracking import registry, runs
from touchline.tracking.client import StoreError


def run(paths: Paths, params: Params, wanted: int | None) -> None:
    """Print the card of a version.

    Args:
        wanted: its number; None for the champion.

    Raises:
        TouchlineError: there is no such version, or it has no card.
    """
    name = params.register_.name
    store = runs.open_store(paths, name)
    known = registry.versions(store, name)
    found = [each for each in known if (registry.CHAMPION in each.aliases if wanted is None else each.number == wanted)]
    if not found:
        which = "champion" if wanted is None else f"version {wanted}"
        existing = ", ".join(str(each.number) for each in known) or "none"
        raise TouchlineError(f"{name} has no {which} (existing: {existing}): see `touchline registry list`")
    try:
        file = runs.artifact(store, found[0].run_id, card.NAME)
    except StoreError:
        raise TouchlineError(
            f"version {found[0].number} of {name} has no card: it was restored, or registered before cards existed"
        ) from None
    print(file.read_text(), end="")
