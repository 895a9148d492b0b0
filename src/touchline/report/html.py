"""HTML pages out of `templates/`: every value in them is escaped, and a name that a template lacks is an error."""

from typing import Any


def render(template: str, **values: Any) -> str:
    """The page of `templates/<template>`, with `values` in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("touchline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
