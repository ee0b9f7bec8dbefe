"""Localization against definitions written out: thresholds one by one, regions by flood fill, scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_auc_score

from carina.errors import CarinaError
from carina.metrics.localization import aupro, box_masks, lesion_regions, localization, pixel_auroc, pointing_game


def flood(mask):
    """Regions of one mask as lists of pixels, by walking to all eight neighbors."""
    left, found = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        edge = [left.pop()]
        region = list(edge)
        while edge:
            y, x = edge.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
            region += near
        found.append(region)
    return found


def slow_aupro(maps, masks, limit):
    """The curve, threshold by threshold, and its trapezoids up to the limit."""
    regions = [(i, *np.array(r).T) for i, mask in enumerate(masks) for r in flood(mask)]
    free = maps[~masks]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        rates.append((free >= threshold).mean())
        overlaps.append(np.mean([(maps[i, y, x] >= threshold).mean() for i, y, x in regions]))
    rates, overlaps = np.array(rates), np.array(overlaps)
    inside = np.append(rates[rates < limit], limit)
    ends = np.append(overlaps[rates < limit], np.interp(limit, rates, overlaps))
    if (rates == limit).any():  # a jump at the limit itself adds no area
        ends[-1] = overlaps[rates == limit].min()
    return auc(inside, ends) / limit


@st.composite
def cases(draw):
    """Maps with few distinct values, so that ties are common, and masks with at least one pixel of each kind."""
    seed, levels = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([2, 5, 1000]))
    shape = draw(st.integers(1, 4)), draw(st.integers(3, 9)), draw(st.integers(3, 9))
    rng = np.random.default_rng(seed)
    masks = rng.random(shape) < draw(st.sampled_from([0.1, 0.4]))
    masks[0, 0, 0], masks[-1, -1, -1] = True, False
    maps = rng.integers(0, levels, shape) + draw(st.integers(0, 2)) * masks * levels / 4
    return maps.astype(np.float32), masks


@given(cases())
@settings(max_examples=60, deadline=None)
def test_areas_are_those_of_the_curves(case):
    maps, masks = case
    assert pixel_auroc(maps, masks) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    for limit in (0.05, 0.3, 1.0):
        assert aupro(maps, masks, limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-9)
    sizes = sorted(len(region) for mask in masks for region in flood(mask))
    assert sorted(lesion_regions(masks)[1]) == sizes


@given(cases())
@settings(max_examples=30, deadline=None)
def test_only_the_order_of_values_counts(case):
    maps, masks = case
    for measure in (pixel_auroc, aupro):
        assert measure(np.exp(maps.astype(np.float64) / 400) - 7, masks) == pytest.approx(measure(maps, masks))
        assert measure(masks.astype(float), masks) == pytest.approx(1)
    assert pixel_auroc(-maps, masks) == pytest.approx(1 - pixel_auroc(maps, masks))


def test_hand_case():
    """Two regions of 1 and 4 pixels, 10 free pixels of which two lie above the small one and none above the large."""
    masks = np.zeros((1, 3, 5), dtype=bool)
    masks[0, 0, 0] = masks[0, 1:, 3] = masks[0, 1:, 4] = True
    maps = np.zeros((1, 3, 5))
    maps[0, 1:, 3:], maps[0, 2, 0], maps[0, 2, 1], maps[0, 0, 0] = 9, 5, 4, 3
    # overlap 1/2 from rate 0 on, 1 from rate 2/10 on
    assert aupro(maps, masks) == pytest.approx((0.2 * 0.5 + 0.1 * 1) / 0.3)
    assert pixel_auroc(maps, masks) == pytest.approx((4 * 10 + 8) / 50)
    assert aupro(np.zeros_like(maps), masks) == pytest.approx(0.15)


def test_images_without_lesion_count_for_false_positives():
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 8, 8), dtype=bool)
    masks[:2, 2:4, 2:5] = True
    maps = masks + 0.5 * rng.random(masks.shape)
    louder = maps.copy()
    louder[2:] += 5
    for measure in (pixel_auroc, aupro):
        assert measure(maps, masks) == pytest.approx(1) and measure(louder, masks) < 0.9
    assert np.array_equal(pointing_game(louder, masks), [1, 1, np.nan, np.nan], equal_nan=True)


def test_pointing_game_ties_and_tolerance():
    masks = np.zeros((3, 10, 20), dtype=bool)
    masks[:, 4:6, 4:8] = True
    maps = np.zeros((3, 10, 20))
    maps[0, 5, 5] = 1
    maps[1, 5, 10] = 1  # three columns beyond the lesion
    np.testing.assert_allclose(pointing_game(maps, masks), [1, 0, 8 / 200])
    assert pointing_game(maps, masks, tolerance=3 / 20)[1] == 1
    assert pointing_game(maps, masks, tolerance=2.9 / 20)[1] == 0


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=3), st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_boxes_hold_the_centers_of_their_pixels(corners, side):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    (mask,) = box_masks([boxes], side)
    center = (np.arange(side) + 0.5) / side
    expected = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        expected |= np.outer((center >= y0) & (center < y1), (center >= x0) & (center < x1))
    assert not (expected & ~mask).any()
    assert mask.any() == any(min((x0 + x1) / 2, (y0 + y1) / 2) < 1 and max(x0, y0) < 1 for x0, y0, x1, y1 in boxes)
    extra = mask & ~expected  # a box between two centers marks one row or column
    assert not extra.any() or any(
        (not ((center >= a) & (center < b)).any()) for x0, y0, x1, y1 in boxes for a, b in ((x0, x1), (y0, y1))
    )


def test_intervals_resample_patients():
    """Against the exact figures of images repeated as often as their patient is drawn."""
    from carina.metrics.resampling import patient_codes, patient_resamples

    rng = np.random.default_rng(1)
    patients = np.repeat([f"p{i}" for i in range(30)], 2)
    masks = np.zeros((60, 16, 16), dtype=bool)
    masks[:40, 3:6, 4:9] = masks[:20, 10:12, 1:3] = True
    maps = (0.8 * masks + rng.normal(size=masks.shape)).astype(np.float32)
    found = localization(maps, masks, patients, resamples=120)
    codes = patient_codes(patients)
    draws = np.concatenate(list(patient_resamples(codes, 120, 0)), axis=1)[codes].astype(int)
    for name, exact in (("pixel_auroc", pixel_auroc), ("aupro", aupro), ("pointing_game", None)):
        values = []
        for draw in draws.T:
            rows = np.repeat(np.arange(60), draw)
            values.append(exact(maps[rows], masks[rows]) if exact else np.nanmean(pointing_game(maps, masks)[rows]))
        ends = np.quantile(values, [0.025, 0.975])
        np.testing.assert_allclose([found[name]["low"], found[name]["high"]], ends, atol=2e-3)
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert (found["images"], found["images_with_lesions"], found["regions"]) == (60, 40, 60)
    assert found["aupro"]["num_patients"] == 30 and found["aupro"]["estimable"]
    assert found["chance"]["pointing_game"] == pytest.approx((15 + 19) / 2 / 256)
    few = localization(maps[:6], masks[:6], patients[:6], resamples=50)
    assert few["aupro"]["value"] > 0 and not few["aupro"]["estimable"]


def test_nothing_to_find_is_said_and_mistakes_are_refused():
    maps, empty = np.ones((2, 4, 4)), np.zeros((2, 4, 4), dtype=bool)
    assert np.isnan(pixel_auroc(maps, empty)) and np.isnan(aupro(maps, ~empty))
    found = localization(maps, empty, np.array(["a", "b"]), resamples=20)
    assert found["aupro"]["value"] is None and not found["aupro"]["estimable"]
    with pytest.raises(CarinaError, match="do not fit"):
        aupro(maps, empty[:1])
    with pytest.raises(CarinaError, match="1 of 2 anomaly maps"):
        pixel_auroc(np.stack([maps[0], np.full((4, 4), np.nan)]), empty)
    with pytest.raises(CarinaError, match="limit=0"):
        aupro(maps, empty, limit=0)
