"""A model's reference: features of its training photos, to recognise a photo of something else.

Two photos are as similar as the cosine of their features says, and a photo is as similar to the training photos as to
the twentieth nearest of them (Sun et al., 2022, https://arxiv.org/abs/2204.06507). A photo that is less similar than
nearly all training photos are to each other shows something else. Probabilities cannot say so: softmax divides 1 among
the classes and leaves nothing for anything else.

If the weights of the backbone include ImageNet's own last layer, its probabilities count too: they differ less from one
source of photos to another than the features do.
"""

import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from touchline.core.errors import TouchlineError
from touchline.core.files import RENEW, replacing

SUFFIX = ".reference.npz"
# The nearest training photos that count. One alone may be a stray: a wrong label, or a photo of something else. From 5
# to 20, results differ little; see benchmarks/unknown.py.
NEIGHBOURS = 20
# Rows kept. At 1,280 channels and ImageNet's 1,000 classes these are 23 MB.
MOST = 5000
# How much ImageNet's classes count beside the features, 1; see benchmarks/unknown.py.
_IMAGENET = 1.5
# Training photos looked at for each row kept, and rows compared at a time.
_DRAWN, _BATCH = 4, 1024


@dataclass(frozen=True)
class ImageNet:
    """The layer that tells ImageNet's classes by the features of a backbone, or of several side by side.

    Attributes:
        weights: shape (channels, classes), those of several backbones behind each other. bias: shape (backbones,
            classes).
    """

    weights: np.ndarray
    bias: np.ndarray

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Of features, float32, shape (n, channels): float32, shape (n, backbones * classes), 1 in all."""
        parts = zip(
            np.split(features, len(self.bias), 1), np.split(self._weights, len(self.bias)), self.bias, strict=True
        )
        logits = np.stack([rows @ weights + bias for rows, weights, bias in parts], axis=1)
        exponents = np.exp(logits - logits.max(axis=2, keepdims=True))
        found = exponents / exponents.sum(axis=2, keepdims=True)
        return (found / len(self.bias)).reshape(len(features), -1)

    @cached_property
    def _weights(self) -> np.ndarray:
        # NumPy multiplies float16 slowly.
        return self.weights.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Similar:
    """A training photo that resembles one that was asked about."""

    sha256: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Reference:
    """Training photos as a model sees them.

    Attributes:
        rows: what they are compared by, of unit length, float16, shape (n, channels); see `_described`.
        labels: the class of each, n of them.
        digests: sha256 of each photo.
        own: how similar training photos, kept or not, are to the others: float32, in ascending order; of very many,
            evenly chosen ones.
    """

    rows: np.ndarray
    labels: Sequence[str]
    digests: Sequence[str]
    own: np.ndarray
    imagenet: ImageNet | None = None

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        labels: Sequence[str],
        digests: Sequence[str],
        imagenet: ImageNet | None = None,
        most: int = MOST,
    ) -> "Reference":
        """Make the reference of training photos.

        Args:
            features: float32, shape (n, channels). labels, digests: n of each.
            imagenet: of the backbone, if its weights have it.
            most: rows to keep; see `covering`.
        """
        rows = _described(features, imagenet)
        chosen = covering(rows, most)
        kept = rows[chosen]
        own = np.empty(len(rows), np.float32)
        for at in range(0, len(rows), _BATCH):
            part = np.arange(at, min(at + _BATCH, len(rows)))
            # Each photo among the others: it is not its own neighbour.
            found = np.where(part[:, None] == chosen, -1, rows[part] @ kept.T)
            own[part] = _similarity(found, _neighbours([labels[number] for number in chosen]))
        return cls(
            kept.astype(np.float16),
            [labels[number] for number in chosen],
            [digests[number] for number in chosen],
            # If there are very many photos, evenly chosen ones of the sorted numbers are enough.
            np.sort(own)[np.linspace(0, len(own) - 1, min(len(own), most)).round().astype(int)],
            imagenet,
        )

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read the file that `save` wrote.

        Raises:
            TouchlineError: the file is torn, or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                imagenet = ImageNet(stored["weights"], stored["bias"]) if "weights" in stored else None
                labels, digests = stored["labels"].tolist(), stored["digests"].tolist()
                return cls(stored["rows"], labels, digests, stored["own"], imagenet)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise TouchlineError(f"{path} is not a readable reference: {RENEW}") from None

    def save(self, path: Path) -> None:
        """Write it to a file; the same photos give the same bytes."""
        content = {"rows": self.rows, "own": self.own}
        content |= {"labels": np.array(self.labels, dtype=str), "digests": np.array(self.digests, dtype=str)}
        if self.imagenet:
            content |= {"weights": self.imagenet.weights.astype(np.float16), "bias": self.imagenet.bias}
        with replacing(path, ".npz") as temporary:
            np.savez(temporary, **content)  # type: ignore[arg-type]  # NumPy's types take each name for `allow_pickle`

    def described(self, features: np.ndarray) -> np.ndarray:
        """What photos, features of shape (n, channels), are compared by: float32, shape (n, columns), unit length."""
        return _described(features, self.imagenet)

    def similarities(self, features: np.ndarray) -> np.ndarray:
        """Of photos, features of shape (n, channels), to each row kept: float32, shape (n, rows), -1 to 1."""
        return _described(features, self.imagenet) @ self._exact.T

    def similarity(self, features: np.ndarray) -> np.ndarray:
        """Of photos, features of shape (n, channels), to the training photos: float32, shape (n,), -1 to 1."""
        return _similarity(self.similarities(features), self._neighbours)

    def threshold(self, share: float) -> float:
        """The similarity that a share of the training photos does not reach among the others."""
        if share not in self._thresholds:
            self._thresholds[share] = float(np.quantile(self.own, share))
        return self._thresholds[share]

    def percentile(self, similarity: float) -> float:
        """How many of a hundred training photos are less similar to the others."""
        return 100 * float(np.searchsorted(self.own, similarity)) / len(self.own)

    def nearest(self, features: np.ndarray, count: int, among: Collection[str]) -> list[Similar]:
        """The training photos that one photo, features of shape (channels,), resembles most, the nearest first.

        Args:
            among: digests of those that count.
        """
        found = self.similarities(features[None])[0]
        order = (number for number in np.argsort(-found) if self.digests[number] in among)
        chosen = [next(order, None) for _ in range(count)]
        return [
            Similar(self.digests[number], self.labels[number], round(float(found[number]), 4))
            for number in chosen
            if number is not None
        ]

    @cached_property
    def _thresholds(self) -> dict[float, float]:
        # A server asks for the same one with each photo.
        return {}

    @cached_property
    def _neighbours(self) -> int:
        return _neighbours(self.labels)

    @cached_property
    def _exact(self) -> np.ndarray:
        # NumPy multiplies float16 slowly.
        return self.rows.astype(np.float32)


def drawn(photos: int, most: int = MOST) -> np.ndarray:
    """Positions of the photos to make a reference of: all, or a random part if there are very many."""
    return np.sort(np.random.default_rng(0).permutation(photos)[: _DRAWN * most])


def covering(rows: np.ndarray, most: int) -> np.ndarray:
    """Positions of at most `most` rows, shape (n, channels), spread evenly: each is the furthest from those before it.

    They are in ascending order. Photos much alike are left out first, so what is rare stays.
    """
    if len(rows) <= most:
        return np.arange(len(rows))
    # A random projection keeps the distances well enough, and stays in the processor's cache.
    short = rows @ np.random.default_rng(0).normal(size=(rows.shape[1], min(rows.shape[1], 64))).astype(np.float32)
    short /= np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
    chosen, nearest = [0], short @ short[0]
    while len(chosen) < most:
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, short @ short[chosen[-1]])
    return np.sort(chosen)


def _described(features: np.ndarray, imagenet: ImageNet | None) -> np.ndarray:
    """What photos are compared by: rows of unit length, float32."""
    given = features.astype(np.float32)
    if imagenet is not None:
        # Behind its channels a model may have the probabilities among its features; see `backbones.pooled`.
        given = given[:, : len(imagenet.weights)]
    # Square roots: else the few largest channels would decide alone.
    rows = _unit(np.sign(given) * np.sqrt(np.abs(given)))
    if imagenet is None:
        return rows
    return _unit(np.hstack([rows, _IMAGENET * np.sqrt(imagenet.probabilities(given))]))


def _unit(features: np.ndarray) -> np.ndarray:
    rows = features.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _similarity(similarities: np.ndarray, neighbours: int) -> np.ndarray:
    """Similarity to the nearest row but `neighbours` - 1."""
    return -np.partition(-similarities, neighbours - 1, axis=1)[:, neighbours - 1]


def _neighbours(labels: Sequence[str]) -> int:
    """How many of the nearest training photos count: at most half of a class, so that small classes have some."""
    return max(1, min(NEIGHBOURS, min(Counter(labels).values()) // 2))
