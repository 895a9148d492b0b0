"""Prefect flows: when the stages of dvc.yaml run, tried again where that can help, and shown.

What runs and in which order is DVC's; the work is `touchline`'s.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

# Set before prefect is imported anywhere. Values that are already set are kept.
_DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # A board's server deletes flow runs that ended more than 90 days ago; Prefect's own default keeps all of them.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    # A temporary server, where none runs, takes 15 to 75 s on a small machine; prefect gives it 20.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}
# What `make board` writes while it runs, and the variables it gives to what it starts.
BOARD = Path(".prefect/board.json")
_OF_THE_BOARD = {
    "api_url": "PREFECT_API_URL",
    "api_auth_string": "PREFECT_API_AUTH_STRING",
    "mlflow_url": "TOUCHLINE_MLFLOW_URL",
    "reports_url": "TOUCHLINE_REPORTS_URL",
}

for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
# A flow started by hand is shown on the board if one runs, unless another server is named.
with suppress(OSError, ValueError, KeyError, TypeError):
    _board = json.loads(BOARD.read_text())
    os.kill(_board["pid"], 0)
    if os.environ.get("PREFECT_API_URL", _board["api_url"]) == _board["api_url"]:
        os.environ |= {variable: _board[key] for key, variable in _OF_THE_BOARD.items()}


def private_folder(project: Path) -> Path:
    """The project's `.prefect`, which other users of this machine cannot look into; made if missing."""
    folder = project / BOARD.parent
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    return folder
