"""The `features` stage: each photo as arrays, computed once and kept by its digest.

`pixels` is the decoded photo; with a `backbone` it is what a frozen ImageNet network, or several, say of the photo and,
with two views, of its mirror image. Neither depends on the split, so another seed computes nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from touchline import arrays, inference, photos
from touchline.files import read_table
from touchline.params import BackboneFeatures, Params
from touchline.paths import Paths
from touchline.progress import say, track
from touchline.quiet import import_tensorflow


def run(paths: Paths, params: Params, name: str) -> None:
    """Bring `data/features/<name>` up to date with the validated photos."""
    features = params.features[name]
    table = read_table(paths.validated_table)
    files = {row.sha256: paths.workspace / row.path for row in table[["sha256", "path"]].itertuples()}

    def compute(digests: Sequence[str]) -> Iterator[np.ndarray]:
        wanted = [files[digest] for digest in digests]
        rows = pixels(wanted, features.image_size)
        if isinstance(features, BackboneFeatures):
            rows = pooled(rows, features, paths.project)
        return track(rows, len(wanted), f"computing {name}")

    computed = arrays.update(paths.features / name, _settings(features, paths.project), list(files), compute)
    say(f"{name}: {computed:,} computed, {len(files) - computed:,} kept")


def pixels(files: Sequence[Path], image_size: int) -> Iterator[np.ndarray]:
    """Each photo as RGB uint8, shape (image_size, image_size, 3); see `photos.decode`."""
    return photos.in_order(lambda path: photos.read(path, image_size), files)


def pooled(rows: Iterator[np.ndarray], features: BackboneFeatures, project: Path) -> Iterator[np.ndarray]:
    """What the backbone says of each photo, averaged over the places of its feature map.

    Args:
        rows: photos as RGB uint8, shape (image_size, image_size, 3).

    Yields:
        float32, shape (channels,); with two views the mean of what is said of the photo and of its mirror image.
    """
    import_tensorflow()
    from touchline import backbones

    forward = inference.forward_pass(backbones.pooled(features, project), photos_first=1)
    for _, found in inference.answers(forward, ((None, row) for row in rows)):
        yield from found


def _settings(features: Any, project: Path) -> dict[str, Any]:
    """What rows depend on besides the photo; `features.image_size` and the like, and which weights."""
    settings = {"image_size": features.image_size}
    if isinstance(features, BackboneFeatures):
        from touchline import backbones

        settings |= {"backbone": features.backbone, "views": features.views}
        settings["weights"] = backbones.identity(features, project)
    return settings
