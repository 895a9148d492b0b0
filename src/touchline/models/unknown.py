"""How well a model's reference works: how many test photos, and photos of something else, are called `unknown`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.progress import say
from touchline.models import inference
from touchline.models.classifier import Classifier, pixels

if TYPE_CHECKING:
    import pandas as pd

TRAINING, TEST, FOREIGN = "training", "test", "something else"
COLUMNS = ("model", "subset", "path", "class", "predicted", "similarity")


def foreign(folder: Path, model: Classifier, max_megapixels: float) -> np.ndarray:
    """Rows of the photos in and below a folder, as `Classifier.forward` makes them.

    Raises:
        TouchlineError: there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    read = partial(_read, side=model.side, max_megapixels=max_megapixels)
    images = [image for image in parallel.in_order(read, files) if image is not None]
    if not images:
        raise TouchlineError(f"evaluate.unknown_folder, {folder}, has no photos: put photos of something else into it")
    if len(images) < len(files):
        say(f"{folder}: {len(files) - len(images):,} of {len(files):,} files cannot be judged: left out")
    return np.concatenate([rows for _, rows in inference.answers(model.forward, ((None, image) for image in images))])


def similarities(
    name: str, model: Classifier, test: "pd.DataFrame", rows: np.ndarray, others: np.ndarray | None
) -> "pd.DataFrame":
    """One row a photo: model, subset (training, test, something else), path, class, predicted and similarity.

    Args:
        test: the test photos, with path and class. rows: what `model.forward` makes of them.
        others: rows of photos of something else; None where there are none.
    """
    import pandas as pd

    assert model.reference
    count = len(model.classes)
    parts = [
        pd.DataFrame({"subset": TRAINING, "similarity": model.reference.own}),
        pd.DataFrame({
            "subset": TEST, "path": test["path"], "class": test["class"],
            "predicted": [model.classes[number] for number in rows[:, :count].argmax(axis=1)],
            "similarity": model.reference.similarity(rows[:, count:]),
        }),
    ]  # fmt: skip
    if others is not None:
        found = model.reference.similarity(others[:, count:])
        parts.append(pd.DataFrame({"subset": FOREIGN, "similarity": found}))
    table = pd.concat(parts).assign(model=name)
    return table[list(COLUMNS)].round({"similarity": 4})


def worth(table: "pd.DataFrame", threshold: float, classes: Sequence[str]) -> dict[str, Any]:
    """Summarise the `similarities` of one model.

    Returns:
        `threshold`; `unknown`, by class the number of test photos called so; `photos`, how many there are; and, where
        there are photos of something else, `caught`, their share that is called so, and `roc_auc`.
    """
    from sklearn.metrics import roc_auc_score

    test, others = (table[table["subset"] == subset] for subset in (TEST, FOREIGN))
    called = test["similarity"] < threshold
    found: dict[str, Any] = {
        "threshold": round(threshold, 4),
        "unknown": {label: int(called[test["class"] == label].sum()) for label in classes},
        "photos": {label: int((test["class"] == label).sum()) for label in classes},
    }
    if len(others):
        both = np.concatenate([test["similarity"], others["similarity"]])
        known = np.arange(len(both)) < len(test)
        found |= {
            "others": len(others),
            "caught": round(float((others["similarity"] < threshold).mean()), 6),
            "roc_auc": round(float(roc_auc_score(known, both)), 6),
        }
    return found


def _read(path: Path, side: int, max_megapixels: float) -> np.ndarray | None:
    try:
        return pixels(path.read_bytes(), side, max_megapixels)
    except (TouchlineError, OSError):
        return None
