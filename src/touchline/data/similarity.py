"""Photos that look alike, by their perceptual hashes."""

from collections.abc import Sequence

import numpy as np

_PAIRS_AT_ONCE = 4_000_000


def near_duplicates(hashes: Sequence[str], bits: int) -> list[tuple[int, int]]:
    """Pairs of positions whose 64-bit hashes differ in at most `bits` bits, the smaller position first.

    Hashes are compared in blocks, so memory does not grow with the square of the photos.
    """
    values = np.array([int(value, 16) for value in hashes], dtype=np.uint64)
    rows = max(1, _PAIRS_AT_ONCE // max(1, len(values)))
    pairs = []
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        near = np.bitwise_count(block[:, None] ^ values[None, start:]) <= bits
        for row, column in np.argwhere(np.triu(near, 1)):
            pairs.append((start + int(row), start + int(column)))
    return pairs


def components(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Numbers, shape (count,), equal for positions that pairs link, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]
