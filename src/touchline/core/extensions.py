"""Sources and architectures by the name that params.yaml gives them: those of this package, and those of others.

Another package adds one by an entry point of the group `touchline.sources` or `touchline.architectures`. This layer
knows none of them, so it asks for them by name.
"""

from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

from touchline.core.errors import ParamsError, one_line


def source(name: str) -> Any | None:
    """The `touchline.sources.Source` of this name: `SOURCE` of the module `touchline.sources.<name>`, or another's."""
    if name.isidentifier() and find_spec(f"touchline.sources.{name}"):
        return getattr(import_module(f"touchline.sources.{name}"), "SOURCE", None)
    return _of_others("touchline.sources", name)


def sources() -> list[str]:
    """The names that `source` knows."""
    ours = [module.name for module in iter_modules(import_module("touchline.sources").__path__)]
    return sorted({*filter(source, ours), *entry_points(group="touchline.sources").names})


def architecture(name: str) -> Any | None:
    """The `touchline.models.architectures.Architecture` of this name."""
    ours = import_module("touchline.models.architectures").ARCHITECTURES
    return ours.get(name) or _of_others("touchline.architectures", name)


def architectures() -> list[str]:
    """The names that `architecture` knows."""
    ours = import_module("touchline.models.architectures").ARCHITECTURES
    return sorted({*ours, *entry_points(group="touchline.architectures").names})


def _of_others(group: str, name: str) -> Any | None:
    for point in entry_points(group=group, name=name):
        try:
            return point.load()
        except Exception as error:  # whatever another's code raises
            raise ParamsError(
                f"params.yaml names {name}, which {point.value} does not give ({one_line(error)}): mend that package, "
                "or name another"
            ) from None
    return None
