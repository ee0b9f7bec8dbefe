import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from carina.draws import Draws
from carina.imaging.views import ViewSettings, gaussian_blur, jitter, make_view

NOTHING = dict(
    area=(1, 1), aspect=(1, 1), rotation=0, shift=0, flip=0, gamma=(1, 1), brightness=0, contrast=0, blur=0, noise=0
)
USUAL = dict(NOTHING, area=(0.5, 1), aspect=(0.9, 1.11), rotation=10, shift=0.06, gamma=(0.8, 1.25), blur=0.004)
EVERYTHING = dict(USUAL, flip=0.5, brightness=0.2, contrast=0.3, noise=0.05)


def draws(count, seed=0):
    return Draws(seed, 0, np.arange(count, dtype=np.uint64) * 7919)


def test_settings_that_change_nothing_give_the_image_back():
    images = torch.rand(3, 1, 48, 48)
    view = make_view(images, draws(3), ViewSettings(**NOTHING), 48)
    torch.testing.assert_close(view, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 48, 96])
def test_a_sample_looks_the_same_in_any_batch_and_stays_in_range(size):
    images, settings = torch.rand(4, 1, 96, 96), ViewSettings(**EVERYTHING)
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


def test_the_usual_view_equals_its_definition_written_anew():
    """Each sample by itself: crop, rotation and shift by torch's own grid, scipy's blur, gamma."""
    images, stream, settings, size = torch.rand(5, 1, 64, 64), draws(5), ViewSettings(**USUAL), 64
    view = make_view(images, stream, settings, size)
    area, aspect = stream.uniform("area", 0.5, 1), np.exp(stream.uniform("aspect", np.log(0.9), np.log(1.11)))
    angle = np.deg2rad(stream.uniform("rotation", -10, 10))
    gamma = np.exp(stream.uniform("gamma", np.log(0.8), np.log(1.25)))
    for i in range(5):
        width, height = min(1, np.sqrt(area[i] * aspect[i])), min(1, np.sqrt(area[i] / aspect[i]))
        x = stream.uniform("crop x", -1, 1)[i] * (1 - width) + stream.uniform("shift x", -0.12, 0.12)[i]
        y = stream.uniform("crop y", -1, 1)[i] * (1 - height) + stream.uniform("shift y", -0.12, 0.12)[i]
        rotation = np.array([[np.cos(angle[i]), -np.sin(angle[i])], [np.sin(angle[i]), np.cos(angle[i])]])
        theta = torch.tensor(np.column_stack([rotation * [width, height], [x, y]]), dtype=torch.float64)[None]
        grid = F.affine_grid(theta, [1, 1, size, size], align_corners=False)
        plain = F.grid_sample(images[i : i + 1].double(), grid, padding_mode="zeros", align_corners=False)[0, 0]
        sigma = stream.uniform("blur", 0, 0.004 * size)[i]
        blurred = gaussian_filter(plain.numpy(), sigma, mode="nearest", radius=1)
        np.testing.assert_allclose(view[i, 0], np.clip(blurred, 0, 1) ** gamma[i], atol=2e-5)


def test_autocast_changes_no_bit():
    """In bf16 the sampling grid alone would move pixels by half their side."""
    images, settings = torch.rand(4, 1, 64, 64), ViewSettings(**EVERYTHING)
    plain = make_view(images, draws(4), settings, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make_view(images, draws(4), settings, 64), plain)
        blurred = gaussian_blur(images, torch.full((4,), 0.8), 1.0)
    assert torch.equal(blurred, gaussian_blur(images, torch.full((4,), 0.8), 1.0))


@pytest.mark.parametrize("added", [dict(flip=1e-9), dict(noise=1e-12), dict(brightness=1e-12), dict(contrast=1e-12)])
def test_what_is_added_to_a_view_leaves_its_other_draws_alone(added):
    images = torch.rand(4, 1, 48, 48)
    usual, more = (make_view(images, draws(4), ViewSettings(**{**USUAL, **a}), 48) for a in ({}, added))
    torch.testing.assert_close(more, usual, atol=1e-6, rtol=0)


def test_a_flip_is_the_mirror_image_of_the_view_for_its_share_of_the_samples():
    images = torch.rand(400, 1, 16, 16)
    plain, always, some = (make_view(images, draws(400), ViewSettings(**{**USUAL, "flip": p}), 16) for p in (0, 1, 0.3))
    torch.testing.assert_close(always, plain.flip(3), atol=1e-5, rtol=0)
    mirrored = (some - always).abs().amax(dim=(1, 2, 3)) < 1e-5
    torch.testing.assert_close(some[~mirrored], plain[~mirrored])
    assert 0.2 < mirrored.float().mean() < 0.4


def test_noise_is_gaussian_with_a_deviation_of_its_own_per_sample():
    images = torch.full((300, 1, 40, 40), 0.5)
    noise = make_view(images, draws(300), ViewSettings(**{**NOTHING, "noise": 0.1}), 40) - 0.5
    deviation = noise.std(dim=(1, 2, 3))
    expected = torch.from_numpy(draws(300).uniform("noise", 0, 0.1))
    torch.testing.assert_close(deviation, expected, atol=3e-3, rtol=0.08)
    unit = (noise / deviation.view(-1, 1, 1, 1)).flatten(1)
    assert abs(unit.mean()) < 0.01 and abs((unit**4).mean() - 3) < 0.05
    corners = torch.corrcoef(unit[:, :400]) - torch.eye(300)
    assert corners.abs().max() < 0.35, "samples do not share their noise"
