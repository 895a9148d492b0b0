"""Params given to a run: checked as params.yaml is, before anything starts."""

from pathlib import Path
from typing import Any

from touchline.core import params
from touchline.core.editing import change
from touchline.core.errors import ParamsError

_WHERE = "the run's parameters"


def overridden(
    workspace: Path, model: str, backbone: str | None, epochs: int | None, overrides: list[str]
) -> list[str]:
    """What `dvc exp run -S` is to be given: `key=value`, by dotted key.

    Raises:
        ParamsError: params.yaml with these changes would not be allowed.
    """
    content = _content(workspace)
    given = list(overrides)
    if model not in content["models"]:
        raise ParamsError(f"{_WHERE}: there is no model '{model}'; allowed: {', '.join(content['models'])}")
    if epochs is not None:
        if "epochs" not in content["models"][model]:
            raise ParamsError(f"{_WHERE}: models.{model} has no epochs")
        given.append(f"models.{model}.epochs={epochs}")
    if backbone is not None:
        features = content["models"][model]["input"]
        if "backbone" not in content["features"][features]:
            raise ParamsError(f"{_WHERE}: models.{model} works on {features}, which has no backbone to change")
        given.append(f"features.{features}.backbone={backbone}")
    for override in given:
        _apply(content, override)
    params.check(content, _WHERE)
    return given


def _apply(content: dict[str, Any], override: str) -> None:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = override.partition("=")
    try:
        known = bool(equals) and change(content, key.strip(), YAML(typ="safe", pure=True).load(value))
    except YAMLError:
        raise ParamsError(f"{_WHERE}: {override!r} has no readable value") from None
    if not known:
        raise ParamsError(f"{_WHERE}: {override!r} is not <known key>=<value>, for example models.cnn.dropout=0.3")


def _content(workspace: Path) -> dict[str, Any]:
    return params.load(workspace / "params.yaml").model_dump(mode="json", by_alias=True, exclude_unset=True)
