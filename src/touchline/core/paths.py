"""Where everything is. Two roots: the workspace a command works in, and the project it belongs to.

They are the same folder except in `dvc exp run --temp`, which works in a copy under `.dvc/tmp/exps` and names the
project in DVC_ROOT, and in the clone that a scheduled flow may work in, which names it in TOUCHLINE_PROJECT. What every
run shares (the MLflow store, the ledger of rejected photos, the journal of fetched ones, the folder that photos are
taken from) is relative to the project; what a stage reads and writes is relative to the workspace.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from touchline.core.errors import ParamsError


@dataclass(frozen=True)
class Paths:
    """Every path of the project, as absolute `Path`s.

    Args:
        workspace: folder that holds the dvc.yaml and params.yaml in force.
        project: folder that holds the shared store; the workspace itself outside experiments.
    """

    workspace: Path
    project: Path

    @classmethod
    def here(cls) -> "Paths":
        """The workspace is the nearest folder, from the current one up, that holds params.yaml.

        Raises:
            ParamsError: there is none.
        """
        current = Path.cwd()
        for folder in (current, *current.parents):
            if (folder / "params.yaml").is_file():
                project = os.environ.get("TOUCHLINE_PROJECT") or os.environ.get("DVC_ROOT") or folder
                return cls(folder, Path(project).resolve())
        raise ParamsError(f"no params.yaml in {current} or above it: run this inside a Touchline project")

    @property
    def photos(self) -> Path:
        return self.workspace / "data/photos"

    @property
    def photos_table(self) -> Path:
        return self.workspace / "data/photos.csv"

    @property
    def decisions(self) -> Path:
        return self.workspace / "data/decisions.csv"

    @property
    def forgotten(self) -> Path:
        return self.workspace / "data/forgotten.csv"

    @property
    def validated_table(self) -> Path:
        return self.workspace / "data/validated.csv"

    @property
    def rejected_table(self) -> Path:
        return self.workspace / "data/rejected.csv"

    @property
    def split_table(self) -> Path:
        return self.workspace / "data/split.csv"

    @property
    def features(self) -> Path:
        return self.workspace / "data/features"

    @property
    def models(self) -> Path:
        return self.workspace / "models"

    @property
    def reports(self) -> Path:
        return self.workspace / "reports"

    @property
    def exports(self) -> Path:
        """What `touchline export` wrote; no stage reads it."""
        return self.workspace / "exports"

    @property
    def locks(self) -> Path:
        return self.workspace / ".dvc/tmp/touchline"

    @property
    def ledger(self) -> Path:
        return self.project / "data/ledger.csv"

    @property
    def journal(self) -> Path:
        return self.project / "data/fetched.jsonl"

    @property
    def spare(self) -> Path:
        """Fetched photos that are not offered at present."""
        return self.project / "data/spare"

    @property
    def openimages(self) -> Path:
        return self.project / "data/openimages"

    @property
    def feedback(self) -> Path:
        return self.project / "data/feedback"

    @property
    def served(self) -> Path:
        """The records of answers that `serve` and `predict` keep."""
        return self.project / "data/served"

    @property
    def mlflow(self) -> Path:
        return self.project / "mlflow"

    def relative(self, path: Path) -> str:
        """`path` relative to the workspace if it is inside, with forward slashes."""
        return path.relative_to(self.workspace).as_posix() if path.is_relative_to(self.workspace) else str(path)
