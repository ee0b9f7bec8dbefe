import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from carina.draws import Draws
from carina.imaging.views import ViewSettings, gaussian_blur, jitter, make_view

NOTHING = dict(area=(1, 1), aspect=(1, 1), rotation=0, shift=0, gamma=(1, 1), blur=0)
USUAL = dict(area=(0.5, 1), aspect=(0.9, 1.11), rotation=10, shift=0.06, gamma=(0.8, 1.25), blur=0.004)


def draws(count, seed=0):
    return Draws(seed, 0, np.arange(count, dtype=np.uint64) * 7919)


def test_settings_that_change_nothing_give_the_image_back():
    images = torch.rand(3, 1, 48, 48)
    view = make_view(images, draws(3), ViewSettings(**NOTHING), 48)
    torch.testing.assert_close(view, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 48, 96])
def test_a_sample_looks_the_same_in_any_batch_and_stays_in_range(size):
    images, settings = torch.rand(4, 1, 96, 96), ViewSettings(**USUAL)
    whole = make_view(images, draws(4), settings, size)
    alone = make_view(images[2:3], draws(4).select(np.array([2])), settings, size)
    assert whole.shape == (4, 1, size, size)
    torch.testing.assert_close(whole[2:3], alone, atol=1e-6, rtol=0)
    assert whole.min() >= 0 and whole.max() <= 1
    assert not torch.equal(whole[0], make_view(images, draws(4, seed=1), settings, size)[0])


@pytest.mark.parametrize(("key", "value"), [("rotation", 10), ("shift", 0.06), ("area", (0.5, 0.5))])
def test_lengths_are_fractions_of_the_side(key, value):
    """A disk moved by a view lands at the same place, in fractions, at every scale."""
    settings = ViewSettings(**{**NOTHING, key: value})
    centers = []
    for side in (64, 256):
        y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
        disk = torch.exp(-((x - 0.6) ** 2 + (y - 0.55) ** 2) / 0.002)[None, None].repeat(6, 1, 1, 1)
        view = make_view(disk, draws(6), settings, side)[:, 0]
        mass = view.sum(dim=(1, 2))
        centers.append(torch.stack([(view * x).sum(dim=(1, 2)) / mass, (view * y).sum(dim=(1, 2)) / mass]))
    torch.testing.assert_close(centers[0], centers[1], atol=3e-3, rtol=0)
    assert (centers[0] - torch.tensor([[0.6], [0.55]])).abs().max() > 0.01


def test_blur_equals_scipy_sample_by_sample():
    images, sigma = torch.rand(3, 1, 40, 40), torch.tensor([0.6, 1.3, 2.0])
    blurred = gaussian_blur(images, sigma, 2.0)
    for i in range(3):
        oracle = gaussian_filter(images[i, 0].numpy().astype(np.float64), float(sigma[i]), mode="nearest", radius=6)
        np.testing.assert_allclose(blurred[i, 0], oracle, atol=1e-5)


def test_jitter_keeps_the_range_and_its_strength():
    images = torch.full((200, 1, 8, 8), 0.5)
    values = jitter(images, draws(200), 0.1)[:, 0, 0, 0]
    assert 0.45 - 1e-6 <= values.min() < 0.46 and 0.54 < values.max() <= 0.55 + 1e-6
