"""`touchline describe`: Croissant metadata of the photos, as the stage `split` writes it."""

from pathlib import Path

from touchline.core.errors import TouchlineError
from touchline.core.files import read_table, write_json
from touchline.core.params import Params
from touchline.core.paths import Paths
from touchline.report import croissant


def run(paths: Paths, params: Params, output: Path | None) -> None:
    """Write the metadata, and print the name of the file.

    Args:
        output: the file; None for data/croissant.json.

    Raises:
        TouchlineError: `validate` or `split` has not run yet, or the file cannot be written.
    """
    found = croissant.metadata(paths, params, read_table(paths.split_table))
    file = output or croissant.place(paths)
    try:
        write_json(file, found)
    except OSError as error:
        raise TouchlineError(f"{file} cannot be written ({error.strerror}): name another --output") from None
    print(f"{file}: {found['name']}, {found['description']}")
