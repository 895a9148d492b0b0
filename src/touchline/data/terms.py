"""Which photos the terms of their sources let others see."""

from typing import TYPE_CHECKING

from touchline.core.params import Params

if TYPE_CHECKING:
    import pandas as pd


def shown(rows: "pd.DataFrame", params: Params) -> "pd.DataFrame":
    """The rows whose photos may be seen by others: figures are passed on, and some sources' photos may not be."""
    return rows[~rows["source"].isin(params.ingest.unshared)]
