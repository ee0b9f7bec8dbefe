"""Geometry against points that are drawn and areas that are counted."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carina.errors import CarinaError
from carina.imaging.geometry import Geometry, frame, resize, resize_mask, resize_scales

SIDES = st.integers(32, 150)
FITS = st.sampled_from(["pad", "stretch", "crop"])
SPACINGS = st.one_of(st.none(), st.tuples(st.floats(0.1, 0.4), st.floats(0.1, 0.4)))


@dataclass
class Case:
    height: int
    width: int
    size: int
    geometry: Geometry
    spacing: tuple[float, float] | None


CASES = st.builds(Case, SIDES, SIDES, st.integers(16, 160), st.builds(Geometry, FITS), SPACINGS)


@settings(max_examples=80, deadline=None)
@given(CASES, st.floats(0.3, 0.7), st.floats(0.3, 0.7))
def test_a_point_lands_where_the_affine_says(case, u, v):
    """A blob's center of mass, drawn in the original, is found at the affine's place to half an original pixel."""
    y, x = np.mgrid[: case.height, : case.width] + 0.5
    px, py = u * case.width, v * case.height
    blob = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 2.5**2)).astype(np.float32)
    image, (ax, bx, ay, by) = resize(blob, case.size, case.geometry, case.spacing)
    fx, fy = ax * px + bx, ay * py + by
    if not (0.2 < fx < 0.8 and 0.2 < fy < 0.8):
        return  # cropped away, wholly or in part
    rows, columns = np.mgrid[: case.size, : case.size] + 0.5
    found = np.array([(columns * image).sum(), (rows * image).sum()]) / image.sum() / case.size
    assert abs(found[0] - fx) <= max(0.5 * ax, 0.25 / case.size) and abs(found[1] - fy) <= max(
        0.5 * ay, 0.25 / case.size
    )


@settings(max_examples=80, deadline=None)
@given(CASES)
def test_corners_size_and_range(case):
    height, width, geometry = case.height, case.width, case.geometry
    image, (ax, bx, ay, by) = resize(np.ones((height, width), np.float32), case.size, geometry, case.spacing)
    assert image.shape == (case.size, case.size) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    assert resize(np.ones((height, width), np.float32), 33, geometry, case.spacing)[1] == (ax, bx, ay, by)
    left, right, top, bottom = bx, ax * width + bx, by, ay * height + by
    if geometry.fit == "stretch":
        np.testing.assert_allclose([left, right, top, bottom], [0, 1, 0, 1], atol=1e-12)
    elif geometry.fit == "pad":
        assert -1e-9 <= left <= right <= 1 + 1e-9 and -1e-9 <= top <= bottom <= 1 + 1e-9
        # The picture's share of the frame is its area in the square, to the last bit of the filter.
        assert image.mean() == pytest.approx((right - left) * (bottom - top), abs=0.02)
        assert abs(left - (1 - right)) <= ax + 1e-9 and abs(top - (1 - bottom)) <= ay + 1e-9
    else:
        assert left <= 1e-9 and top <= 1e-9 and right >= 1 - 1e-9 and bottom >= 1 - 1e-9 and image.min() > 1 - 1e-5
    if geometry.fit != "stretch":
        row, column = case.spacing or (1.0, 1.0)
        assert (ax / column) / (ay / row) == pytest.approx(1, abs=1 / (2 * min(height, width) * 0.2))


def test_shrinking_is_the_mean_of_areas():
    image = np.random.default_rng(0).random((64, 96), dtype=np.float32)
    small, _ = resize(image, 32, Geometry("crop"))
    np.testing.assert_allclose(small, image[:, 16:80].reshape(32, 2, 32, 2).mean(axis=(1, 3)), atol=1e-6)
    padded, (ax, bx, ay, by) = resize(image, 24, Geometry())
    assert (ax, bx, ay, by) == (1 / 96, 0, 1 / 96, 16 / 96)
    np.testing.assert_allclose(padded[4:20], image.reshape(16, 4, 24, 4).mean(axis=(1, 3)), atol=1e-6)
    assert (padded[:4] == 0).all() and (padded[20:] == 0).all()


def test_masks_follow_the_picture():
    mask = np.zeros((90, 60), dtype=bool)
    mask[30:60, 11:41] = True
    small = resize_mask(mask, 45, Geometry())
    assert small.dtype == bool and small.sum() == 15 * 15
    rows, columns = np.nonzero(small)
    assert (rows.min(), rows.max()) == (15, 29) and columns.max() - columns.min() == 14


def test_settings_round_trip_and_name_the_nearest_choice():
    assert Geometry.from_dict(Geometry("crop").to_dict()) == Geometry("crop")
    with pytest.raises(CarinaError, match="did you mean 'fit'"):
        Geometry.from_dict({"fits": "pad"})


def by_opencv(image: np.ndarray, case: Case) -> np.ndarray:
    """Pad or cut in whole pixels, then OpenCV's own area filter or interpolation, an axis at a time."""
    left, top, columns, rows = frame(*image.shape, case.geometry, case.spacing)
    pads = [(max(-s, 0), max(s + n - side, 0)) for s, n, side in zip((top, left), (rows, columns), image.shape)]
    image = np.pad(image, pads)[max(top, 0) : max(top, 0) + rows, max(left, 0) : max(left, 0) + columns]
    for shape in ((columns, case.size), (case.size, case.size)):
        now = image.shape[::-1]
        shrinks = all(new <= old for new, old in zip(shape, now))
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return image


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_the_filter_is_opencvs(case):
    image = np.random.default_rng(case.size).random((case.height, case.width), dtype=np.float32)
    np.testing.assert_allclose(
        resize(image, case.size, case.geometry, case.spacing)[0], by_opencv(image, case), atol=2e-4
    )


@settings(max_examples=60, deadline=None)
@given(CASES, st.permutations([1, 2, 3, 4]))
def test_all_scales_at_once_are_those_one_by_one(case, factors):
    image = np.random.default_rng(case.size).random((case.height, case.width), dtype=np.float32)
    scales = [factor * case.size // 2 for factor in factors]
    frames, affine = resize_scales(image, scales, case.geometry, case.spacing)
    assert list(frames) == list(dict.fromkeys(scales))
    for scale, found in frames.items():
        expected, its_affine = resize(image, scale, case.geometry, case.spacing)
        assert its_affine == affine and found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_allclose(found, expected, atol=1e-6)
