"""Planted lesions: what changes, by how much, and where, on real and on made-up lungs."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from carina.draws import Draws
from carina.errors import CarinaError
from carina.imaging.planting import body_outside, local_deviation, plant

DIAMETERS = (0.04, 0.08, 0.16, 0.32)


def made_up(side, count=24, seed=0):
    """Two dark ellipses in a gray body, in a black frame, with noise that grows to the right."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    lungs = ((x - 0.3) / 0.15) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1
    lungs = lungs | (((x - 0.7) / 0.15) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1)
    body = ((x - 0.5).abs() < 0.42) & (y > 0.1)
    base = torch.where(lungs, 0.3, torch.where(body, 0.6, 0.0))
    noise = 0.02 * (1 + x) * torch.randn(count, side, side, generator=generator)
    images = (base + noise * body).clamp(0, 1)[:, None]
    return images, lungs[None, None].repeat(count, 1, 1, 1), Draws(seed, 0, np.arange(count, dtype=np.uint64) * 7919)


@pytest.fixture(scope="module")
def real(real_data):
    """Real radiographs with lungs that people outlined, at 128 px."""
    folder = real_data / "kermany"
    table = pd.read_csv(folder / "labels.csv", dtype=str)
    table = table[table.lung_mask.notna()].iloc[::60]
    pictures = [
        [cv2.imread(str(folder / path), cv2.IMREAD_GRAYSCALE) for path in table[c]] for c in ("path", "lung_mask")
    ]
    small = [[cv2.resize(p.astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA) for p in c] for c in pictures]
    images, masks = (torch.from_numpy(np.stack(some))[:, None] for some in small)
    assert len(images) >= 10
    return images / 255, masks > 127, Draws(0, 0, np.arange(len(images), dtype=np.uint64) * 104729)


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_pairs_of_real_radiographs(real, place):
    images, lungs, draws = real
    region = lungs if place == "inside" else body_outside(images, lungs)
    for diameter in DIAMETERS:
        planted, mask = plant(images, lungs, draws, diameter=diameter, contrast=2, place=place)
        found = mask.flatten(1).any(dim=1)
        assert found.sum() >= 0.7 * len(images) and (diameter > 0.08 or found.all())
        assert torch.equal(planted[~mask], images[~mask]) and (planted[mask] >= images[mask]).all()
        assert planted.max() <= 1
        within = (mask & region).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1).clamp(min=1)
        assert (within[found] >= 0.42).all()  # at least half of the disc; the edge bulges
        whole = [
            m for m in mask[:, 0] if m.any() and not (m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any())
        ]
        width = [2 * (float(m.sum()) / np.pi) ** 0.5 / 128 for m in whole]
        np.testing.assert_allclose(width, diameter, rtol=0.12)
        again = plant(images[3:4], lungs[3:4], draws.select(np.array([3])), diameter=diameter, contrast=2, place=place)
        torch.testing.assert_close(again[0], planted[3:4], atol=1e-6, rtol=0)


def test_the_peak_is_contrast_times_the_deviation_of_lung_around_it():
    """The same for all diameters, with the deviation computed anew: weighted by distance, lung pixels only."""
    images, lungs, draws = made_up(96)
    y, x = np.mgrid[:96, :96]
    for contrast in (1, 4):
        for diameter in DIAMETERS[:3]:
            planted, mask = plant(images, lungs, draws, diameter=diameter, contrast=contrast, place="inside")
            added = (planted - images)[:, 0].numpy()
            for number in range(len(images)):
                cy, cx = np.unravel_index(added[number].argmax(), added[number].shape)
                inside = lungs[number, 0].numpy()
                weight = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * (0.125 * 96) ** 2)) * inside
                values = images[number, 0].numpy()
                mean = np.average(values, weights=weight)
                deviation = np.average((values - mean) ** 2, weights=weight) ** 0.5
                assert added[number].max() == pytest.approx(contrast * deviation, rel=2e-3)
                assert mask[number, 0, cy, cx] and inside[cy, cx]


def test_contrast_changes_the_height_and_nothing_else():
    images, lungs, draws = made_up(64)
    (low, mask), (high, other) = (
        plant(images, lungs, draws, diameter=0.16, contrast=c, place="outside") for c in (1, 2)
    )
    assert torch.equal(mask, other) and mask.flatten(1).any(dim=1).all()
    torch.testing.assert_close(high - images, 2 * (low - images), atol=1e-6, rtol=0)


def test_places_are_spread_over_the_region():
    images, lungs, draws = made_up(48, count=600)
    planted, _ = plant(images, lungs, draws, diameter=0.04, contrast=3, place="inside")
    column = (planted - images).flatten(1).argmax(dim=1) % 48
    assert 0.4 < (column < 24).float().mean() < 0.6
    outside = body_outside(images, lungs)
    assert not (outside & lungs).any() and not outside[..., :2, :].any()  # the frame above the body is black
    assert outside[:, 0, 20:30, 22:26].all()  # the mediastinum


def test_the_deviation_far_from_the_lungs_is_that_of_the_nearest_lung():
    image = torch.zeros(1, 1, 64, 64)
    lungs = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    lungs[..., 30:34, 2:4] = lungs[..., 30:34, 60:62] = True
    image[..., 30:34, 2] = 0.2  # deviation 0.1 on the left, none on the right
    for column, expected in ((0.0, 0.1), (63.0, 0.0)):
        found = local_deviation(image, lungs, torch.tensor([32.0]), torch.tensor([column]))
        assert found.item() == pytest.approx(expected, abs=5e-4)


def test_where_there_is_no_place_nothing_changes():
    images, lungs, draws = made_up(64, count=3)
    lungs[1] = False
    for place, diameter in (("inside", 0.08), ("outside", 0.08), ("inside", 0.9)):
        planted, mask = plant(images, lungs, draws, diameter=diameter, contrast=2, place=place)
        assert torch.equal(planted[1], images[1]) and not mask[1].any()
        assert mask[0].any() == mask[2].any() == (diameter < 0.5)
        assert torch.isfinite(planted).all()
    for wrong in ({"diameter": 0, "contrast": 1}, {"diameter": 0.1, "contrast": 0}):
        with pytest.raises(CarinaError, match="cannot be planted"):
            plant(images, lungs, draws, place="inside", **wrong)
