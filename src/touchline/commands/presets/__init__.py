"""Choices of features and models that belong together: what `touchline preset NAME` writes into params.yaml.

`fast` trains in seconds and is what params.yaml is shipped with, so that the first run takes minutes; `best` is for
photos that matter; `article` is the simple network of the article that the project began from.
"""

from importlib.resources import files

from touchline.core.editing import Source, entries
from touchline.core.errors import ParamsError


def names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in files(__name__).iterdir() if path.name.endswith(".yaml"))


def changes(name: str) -> dict[str, Source]:
    """The entries of `features` and `models` that the preset has, for `set_values`; others stay.

    Raises:
        ParamsError: there is no such preset.
    """
    if name not in names():
        raise ParamsError(f"there is no preset '{name}'; allowed: {', '.join(names())}")
    return entries((files(__name__) / f"{name}.yaml").read_text())
