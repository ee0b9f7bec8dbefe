import numpy as np
import pytest
import torch

from carina.draws import Draws
from carina.imaging.pasting import anatpaste, lung_points


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
