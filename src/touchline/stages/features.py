"""The `features` stage: each photo as arrays, computed once and kept by its digest.

`pixels` is the decoded photo; with a `backbone` it is what a frozen ImageNet network, or several, say of the photo and,
with two views, of its mirror image; see `backbones.pooled`. Neither depends on the split, so another seed computes
nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from touchline.core import parallel
from touchline.core.errors import TouchlineError
from touchline.core.files import read_table
from touchline.core.params import BackboneFeatures, Params, PixelFeatures
from touchline.core.paths import Paths
from touchline.core.progress import track
from touchline.data import feature_store, photos
from touchline.models import backbones, engines, inference
from touchline.models.engines import Forward


def run(paths: Paths, params: Params, name: str) -> str:
    """Bring `data/features/<name>` up to date with the validated photos; how many had to be computed."""
    features = params.features[name]
    settings = settings_of(features, paths.project)
    table = read_table(paths.validated_table)
    files = {row.sha256: paths.workspace / row.path for row in table[["sha256", "path"]].itertuples()}
    engine = engines.chosen(params.compute.engine)
    work = partial(_rows, features=features, project=paths.project, weights=settings.get("weights", ""), engine=engine)

    def missing(digests: Sequence[str]) -> Iterator[np.ndarray]:
        wanted = [files[digest] for digest in digests]
        rows = parallel.spread(work, wanted, parallel.scheduler(params), inference.BATCH, [paths.photos])
        return track(rows, len(wanted), f"computing {name}")

    made_by = engines.named(engine) if isinstance(features, BackboneFeatures) else ""
    computed = feature_store.update(paths.features / name, settings, list(files), missing, made_by)
    return f"{computed:,} computed, {len(files) - computed:,} kept"


def pixels(files: Sequence[Path], image_size: int) -> Iterator[np.ndarray]:
    """Each photo as RGB uint8, shape (image_size, image_size, 3); see `photos.decode`."""
    return parallel.in_order(lambda path: photos.read(path, image_size), files)


def pooled(
    rows: Iterable[np.ndarray], features: BackboneFeatures, project: Path, engine: str = "auto"
) -> Iterator[np.ndarray]:
    """What the backbone says of each photo, averaged over the places of its feature map.

    Args:
        rows: photos as RGB uint8, shape (image_size, image_size, 3).

    Yields:
        float32, shape (channels,); with two views the mean of what is said of the photo and of its mirror image;
        with ImageNet's classes their probabilities behind it.
    """
    return _through(backbones.network(features, project, engine).forward, rows)


def _rows(
    files: Sequence[Path], features: PixelFeatures | BackboneFeatures, project: Path, weights: str, engine: str
) -> Iterator[np.ndarray]:
    """The rows of photos: of all that are missing, or on a worker of a cluster of one batch."""
    rows = pixels(files, features.image_size)
    if isinstance(features, BackboneFeatures):
        # Params have no hash, so JSON stands for them.
        forward = parallel.kept(_forward_of, features.model_dump_json(), project, weights, engine)
        rows = _through(forward, rows)
    return rows


def _through(forward: Forward, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for _, found in inference.answers(forward, ((None, row) for row in rows)):
        yield from found


def _forward_of(features_json: str, project: Path, weights: str, engine: str) -> Forward:
    features = BackboneFeatures.model_validate_json(features_json)
    if parallel.at_worker() and backbones.identity(features, project) != weights:
        names = " and ".join(features.backbone)
        raise TouchlineError(f"a Dask worker has other weights of {names} than this machine: bring it the same file")
    return backbones.network(features, project, engine).forward


def settings_of(features: PixelFeatures | BackboneFeatures, project: Path) -> dict[str, Any]:
    """What rows depend on besides the photo; `features.image_size` and the like, and which weights."""
    settings: dict[str, Any] = {"image_size": features.image_size}
    if isinstance(features, BackboneFeatures):
        settings |= {"backbone": features.backbone, "views": features.views}
        settings["imagenet_classes"] = features.imagenet_classes
        settings["weights"] = backbones.identity(features, project)
    return settings
