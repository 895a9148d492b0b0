"""Choices of features and models that belong together: what `touchline preset NAME` writes into params.yaml.

`fast` trains in seconds and is what params.yaml is shipped with, so that the first run takes minutes; `best` is for
photos that matter; `article` is the simple network of the article that the project began from.
"""

from collections.abc import MutableMapping
from importlib.resources import files
from typing import Any

from touchline.core.errors import ParamsError


def names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in files(__name__).iterdir() if path.name.endswith(".yaml"))


def applied(content: MutableMapping[str, Any], name: str) -> MutableMapping[str, Any]:
    """params.yaml's content with the entries of `features` and `models` that the preset has; others stay.

    Args:
        content: as ruamel.yaml reads it, comments and all; changed in place.

    Raises:
        ParamsError: there is no such preset.
    """
    from ruamel.yaml import YAML

    if name not in names():
        raise ParamsError(f"there is no preset '{name}'; allowed: {', '.join(names())}")
    preset = YAML().load((files(__name__) / f"{name}.yaml").read_text())
    for section, entries in preset.items():
        for entry, values in entries.items():
            content[section][entry] = values
    return content
