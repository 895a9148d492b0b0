"""Random changes of training photos, as one affine map a photo, so that pixels are interpolated once."""

import numpy as np

from touchline.core.params import AugmentationParams


def augment(photo: np.ndarray, params: AugmentationParams, random: np.random.Generator) -> np.ndarray:
    """Rotate, zoom, shift and mirror a photo at random; what comes into view repeats the edge.

    Args:
        photo: RGB, uint8, shape (height, width, 3).
        params: rotation in degrees to either side; zoom and shift as shares of the size; flip or not.

    Returns:
        RGB, uint8, of the same shape.
    """
    import cv2

    height, width = photo.shape[:2]
    angle = random.uniform(-params.rotation, params.rotation)
    scale = 1 + random.uniform(-params.zoom, params.zoom)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, scale)
    matrix[:, 2] += (random.uniform(-params.shift, params.shift, 2) * (width, height)).astype(matrix.dtype)
    if params.flip and random.random() < 0.5:
        photo = photo[:, ::-1]
    return cv2.warpAffine(np.ascontiguousarray(photo), matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
