"""Which photos the terms of their sources let others see."""

from pathlib import Path
from typing import TYPE_CHECKING

from touchline.core.files import read_table
from touchline.core.params import Params
from touchline.core.paths import Paths

if TYPE_CHECKING:
    import pandas as pd


def shown(rows: "pd.DataFrame", params: Params) -> "pd.DataFrame":
    """The rows whose photos may be seen by others: figures are passed on, and some sources' photos may not be."""
    return rows[~rows["source"].isin(params.ingest.unshared)]


def files(paths: Paths, params: Params) -> dict[str, Path]:
    """The photos on this disk that may be seen by others, by their sha256."""
    if not paths.photos_table.is_file():
        return {}
    table = shown(read_table(paths.photos_table), params)
    found = ((row.sha256, paths.workspace / row.path) for row in table[["sha256", "path"]].itertuples())
    return {digest: path for digest, path in found if path.is_file()}
