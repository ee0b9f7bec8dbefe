"""Lung masks against drawn lungs, against masks of real radiographs, and where there are no lungs."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
import pytest

from carina.imaging.lungs import lung_mask


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def ellipses(height: int, width: int, centers=((0.3, 0.45), (0.7, 0.45)), radii=(0.15, 0.33)) -> np.ndarray:
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    return np.logical_or(*[((x - cx) / radii[0]) ** 2 + ((y - cy) / radii[1]) ** 2 < 1 for cx, cy in centers])


def body(lungs: np.ndarray) -> np.ndarray:
    picture = np.where(lungs, 0.3, 0.7) + 0.05 * np.random.default_rng(0).standard_normal(lungs.shape)
    return np.clip(cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 2), 0, 1)


@pytest.mark.parametrize("shape", [(256, 256), (300, 220), (200, 333)])
def test_drawn_lungs_are_found_wherever_they_lie(shape):
    for shift in (-0.05, 0.0, 0.06):
        lungs = ellipses(*shape, centers=((0.3 + shift, 0.5 + shift), (0.7 + shift, 0.48 + shift)))
        found = lung_mask(body(lungs))
        assert found.mask.shape == shape and found.mask.dtype == bool
        assert found.plausible is True and found.source == "threshold"
        assert overlap(found.mask, lungs) > 0.75 and found.share == pytest.approx(found.mask.mean())


def test_lungs_that_touch_the_frame_are_kept():
    lungs = ellipses(256, 256, centers=((0.2, 0.48), (0.8, 0.48)), radii=(0.24, 0.42))
    assert lungs[:, 0].any() and lungs[:, -1].any()
    found = lung_mask(body(lungs))
    assert found.plausible and overlap(found.mask, lungs) > 0.6


def test_black_margins_change_nothing_but_the_place():
    picture = body(ellipses(240, 240))
    framed = np.pad(picture, ((0, 0), (40, 56)))
    assert overlap(lung_mask(framed).mask[:, 40:-56], lung_mask(picture).mask) > 0.9
    assert not lung_mask(framed).mask[:, :38].any()


def test_the_mask_does_not_depend_on_the_resolution():
    masks = [lung_mask(cv2.resize(body(ellipses(512, 512)), (side, side), interpolation=cv2.INTER_AREA)).mask
             for side in (128, 512)]  # fmt: skip
    large = cv2.resize(masks[0].astype(np.uint8), (512, 512), interpolation=cv2.INTER_NEAREST) > 0
    assert overlap(large, masks[1]) > 0.9


def test_without_lungs_the_prior_stands_and_says_so():
    noise = np.random.default_rng(0).random((256, 256), dtype=np.float32)
    one_sided = body(ellipses(256, 256, centers=((0.3, 0.45), (0.3, 0.45))))
    for picture in (noise, np.full((100, 80), 0.5, np.float32), np.zeros((64, 64), np.float32), 1 - one_sided):
        found = lung_mask(picture)
        assert found.plausible is False and found.source == "prior" and 0.1 < found.share < 0.65
        assert found.mask.shape == picture.shape


@pytest.mark.real
def test_real_masks_are_met_better_than_by_two_ellipses(real_data):
    folder = real_data / "kermany"
    table = pd.read_csv(folder / "labels.csv", dtype=str)
    table = table[table.lung_mask.notna()].iloc[::10]
    ours, fixed = [], []
    for path, mask_path in zip(table.path, table.lung_mask):
        image = cv2.imread(str(folder / path), cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255
        truth = cv2.imread(str(folder / mask_path), cv2.IMREAD_GRAYSCALE) > 0
        ours.append(overlap(lung_mask(image).mask, truth))
        fixed.append(overlap(ellipses(*truth.shape), truth))
    assert len(ours) >= 80
    assert np.mean(ours) >= 0.715, np.mean(ours)
    assert np.mean(ours) > np.mean(fixed) + 0.05
