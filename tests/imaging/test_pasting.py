import numpy as np
import pytest
import torch
import torch.nn.functional as F

from carina.draws import Draws
from carina.imaging.pasting import anatpaste, cutpaste_normal, cutpaste_scar, lung_points


def batch(side, count=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, side, side, generator=generator)
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    lungs = ((x - 0.3) / 0.15) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1
    lungs = lungs | (((x - 0.7) / 0.15) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1)
    draws = Draws(seed, 0, np.arange(count, dtype=np.uint64) * 104729)
    return images, lungs[None, None].repeat(count, 1, 1, 1), draws


@pytest.mark.parametrize("side", [64, 128, 256])
def test_only_lung_pixels_change_and_shapes_do_not_degenerate(side):
    images, lungs, draws = batch(side)
    pasted, alpha = anatpaste(images, lungs, draws)
    assert torch.equal(pasted[~lungs], images[~lungs])
    assert torch.equal(pasted[alpha == 0], images[alpha == 0])
    assert alpha.min() >= 0 and alpha.max() <= 1 and pasted.min() >= 0 and pasted.max() <= 1
    share = (alpha > 0).sum(dim=(1, 2, 3)) / lungs.sum(dim=(1, 2, 3))
    assert (share < 0.01).float().mean() <= 0.05


def test_the_same_shapes_at_every_scale():
    """Lengths are fractions of the side: the pasted share of the lungs agrees between scales."""
    shares = []
    for side in (64, 256):
        images, lungs, draws = batch(side)
        alpha = anatpaste(images, lungs, draws)[1]
        shares.append(alpha.sum(dim=(1, 2, 3)) / lungs.sum(dim=(1, 2, 3)))
    assert (shares[0] - shares[1]).abs().median() < 0.02


def test_a_sample_is_pasted_alike_in_any_batch():
    images, lungs, draws = batch(64)
    whole = anatpaste(images, lungs, draws)[0]
    alone = anatpaste(images[5:6], lungs[5:6], draws.select(np.array([5])))[0]
    torch.testing.assert_close(whole[5:6], alone, atol=1e-6, rtol=0)


def test_centers_are_uniform_over_the_mask():
    masks = torch.zeros(3000, 1, 10, 10, dtype=torch.bool)
    masks[:, 0, 2, 3] = masks[:, 0, 7, 8] = masks[:, 0, 7, 1] = True
    rows, columns = lung_points(masks, Draws(0, 0, np.arange(3000, dtype=np.uint64)))
    found, counts = torch.unique(torch.stack([rows, columns]), dim=1, return_counts=True)
    assert found.T.tolist() == [[2, 3], [7, 1], [7, 8]] and (counts > 900).all()


def test_an_empty_mask_changes_nothing():
    images, lungs, draws = batch(64, 4)
    pasted, alpha = anatpaste(images, torch.zeros_like(lungs), draws)
    assert torch.equal(pasted, images) and not alpha.any()


def bounds(alpha):
    """(B, 4) of masks (B, 1, S, S): top, bottom, left and right of what is set, half open."""
    rows, columns = alpha[:, 0].amax(dim=2), alpha[:, 0].amax(dim=1)
    ends = [(m.argmax(dim=1), m.shape[1] - m.flip(1).argmax(dim=1)) for m in (rows, columns)]
    return torch.stack([*ends[0], *ends[1]], dim=1).tolist()


@pytest.mark.parametrize("paste", [cutpaste_normal, cutpaste_scar])
@pytest.mark.parametrize("side", [32, 64, 224])
def test_cutpaste_changes_what_it_pastes_over_and_no_other_pixel(paste, side):
    images, _, draws = batch(side)
    pasted, alpha = paste(images, draws)
    assert torch.equal(pasted[alpha == 0], images[alpha == 0])
    assert ((alpha == 0) | (alpha == 1)).all() and pasted.min() >= 0 and pasted.max() <= 1
    changed = (pasted != images).flatten(1).sum(dim=1)
    assert (changed >= 1).all() and (changed > 0.9 * alpha.sum(dim=(1, 2, 3))).float().mean() > 0.9
    alone = paste(images[5:6], draws.select(np.array([5])))[0]
    torch.testing.assert_close(pasted[5:6], alone, atol=1e-6, rtol=0)


def test_cutpaste_normal_copies_a_rectangle_of_the_image_itself():
    images, _, draws = batch(64, count=24)
    images = 0.3 + 0.4 * images  # jitter cannot clip
    pasted, alpha = cutpaste_normal(images, draws)
    for image, result, mask, (top, bottom, left, right) in zip(images, pasted, alpha, bounds(alpha)):
        height, width = bottom - top, right - left
        assert mask.sum() == height * width, "a whole rectangle inside the image"
        assert 0.015 < height * width / 64**2 < 0.16 and 0.25 < height / width < 4
        patch = result[0, top:bottom, left:right].flatten()
        windows = image[0].unfold(0, height, 1).unfold(1, width, 1).flatten(0, 1).flatten(1)
        both = [F.normalize(x - x.mean(dim=-1, keepdim=True), dim=-1) for x in (patch, windows)]
        assert ((both[1] @ both[0]) > 1 - 1e-4).sum() == 1, "up to brightness and contrast, exactly one place of it"


def test_cutpaste_scars_are_thin_and_turned_by_up_to_45_degrees():
    images, _, draws = batch(256, count=96)
    alpha = cutpaste_scar(images, draws)[1][:, 0]
    y, x = torch.meshgrid(*[torch.arange(256.0)] * 2, indexing="ij")
    angles = []
    for scar in alpha:
        at = torch.stack([y[scar > 0], x[scar > 0]])
        assert 10 * 2 * 0.7 < at.shape[1] < 25 * 16 * 1.1 and (at.amax(dim=1) - at.amin(dim=1)).max() < 30
        values, vectors = torch.linalg.eigh(torch.cov(at))
        if values[1] > 6 * values[0]:  # clearly longer than wide
            angles.append(torch.rad2deg(torch.atan(vectors[1, 1] / vectors[0, 1])).item())
    assert len(angles) > 20 and max(map(abs, angles)) < 48 and min(angles) < -20 and max(angles) > 20


@pytest.mark.parametrize("paste", [cutpaste_normal, cutpaste_scar])
def test_cutpaste_is_the_same_in_fractions_of_the_side_at_every_scale(paste):
    areas, centers = [], []
    for side in (128, 512):
        images, _, draws = batch(side, count=16)
        alpha = paste(images, draws)[1][:, 0]
        areas.append(alpha.mean(dim=(1, 2)))
        at = torch.arange(side) + 0.5
        mass = alpha.sum(dim=(1, 2))
        centers.append(torch.stack([alpha.sum(dim=2) @ at / mass, alpha.sum(dim=1) @ at / mass]) / side)
    assert ((areas[0] - areas[1]).abs() < 0.003 + 0.05 * areas[1]).all()
    torch.testing.assert_close(centers[0], centers[1], atol=0.01, rtol=0)
