"""Random changes of training photos: within their bounds, the same for the same seed, and nothing made up."""

import numpy as np
import pytest

from touchline.core.params import AugmentationParams
from touchline.models.augmentation import augment

SHIPPED = AugmentationParams(rotation=30, zoom=0.2, shift=0.1, flip=True)


def only(**changes: object) -> AugmentationParams:
    return AugmentationParams(**({"rotation": 0, "zoom": 0, "shift": 0, "flip": False} | changes))


def noise(height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def dot(x: int, y: int, side: int = 101) -> np.ndarray:
    photo = np.zeros((side, side, 3), np.uint8)
    photo[y - 3 : y + 4, x - 3 : x + 4] = 255
    return photo


def where(photo: np.ndarray) -> np.ndarray:
    """Centre (x, y) of what is bright."""
    rows, columns = np.nonzero(photo[..., 0] > 100)
    return np.array([columns.mean(), rows.mean()])


def many(photo: np.ndarray, params: AugmentationParams, count: int = 200) -> list[np.ndarray]:
    return [augment(photo, params, np.random.default_rng(seed)) for seed in range(count)]


def test_a_training_photo_really_changes_and_keeps_shape_and_type() -> None:
    photo = noise(48, 64)
    kept = photo.copy()
    changed = many(photo, SHIPPED, 20)
    assert all(one.shape == photo.shape and one.dtype == np.uint8 for one in changed)
    assert all((one != photo).mean() > 0.5 for one in changed)
    np.testing.assert_array_equal(photo, kept)


def test_the_same_seed_changes_a_photo_the_same_way() -> None:
    first, again, other = (augment(noise(), SHIPPED, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_with_every_number_at_nothing_a_photo_stays_as_it_is() -> None:
    for changed in many(noise(), only(), 3):
        np.testing.assert_array_equal(changed, noise())


def test_half_of_the_photos_are_mirrored() -> None:
    photo = noise()
    mirrored = [np.array_equal(changed, photo[:, ::-1]) for changed in many(photo, only(flip=True))]
    same = [np.array_equal(changed, photo) for changed in many(photo, only(flip=True))]
    assert 70 < sum(mirrored) < 130 and sum(mirrored) + sum(same) == 200


def test_rotation_goes_both_ways_as_far_as_allowed() -> None:
    angles = []
    for changed in many(dot(90, 50), only(rotation=30)):
        x, y = where(changed) - 50
        assert np.hypot(x, y) == pytest.approx(40, abs=1)
        angles.append(np.degrees(np.arctan2(y, x)))
    assert -31 < min(angles) < -25 and 25 < max(angles) < 31


def test_zoom_goes_in_and_out_as_far_as_allowed() -> None:
    scales = [(where(changed)[0] - 50) / 30 for changed in many(dot(80, 50), only(zoom=0.2))]
    assert 0.78 < min(scales) < 0.85 and 1.15 < max(scales) < 1.22


def test_shift_goes_to_all_sides_as_far_as_allowed() -> None:
    shifts = np.array([where(changed) - 50 for changed in many(dot(50, 50), only(shift=0.1))])
    assert np.abs(shifts).max() < 11
    assert (shifts.min(axis=0) < -8).all() and (shifts.max(axis=0) > 8).all()


def test_what_comes_into_view_repeats_the_edge() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    assert all((changed == 255).all() for changed in many(white, SHIPPED, 20))
