"""Pasting on batches: what may change, what is said of it, and the same in fractions of the side at every scale."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.linalg import spsolve

from carina.draws import Draws
from carina.imaging import pasting
from carina.imaging.blending import blend_foreign, interpolate_foreign, poisson
from carina.imaging.dicom import read_radiograph
from carina.imaging.geometry import Geometry, resize, resize_mask
from carina.imaging.lungs import lung_mask
from carina.imaging.pasting import anatpaste, cutpaste_normal, cutpaste_scar
from carina.imaging.windows import lung_points


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


# -- real radiographs, alphas and foreign patches -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_pictures(real_data):
    """Ten radiographs each of children and of adults at their own size, with the masks that a store would hold."""
    images = []
    for folder in ("kermany", "nih_cxr14"):
        paths = pd.read_csv(real_data / folder / "labels.csv", dtype=str)["path"]
        images += [read_radiograph(real_data / folder / path).image for path in paths[:: len(paths) // 10][:10]]
    return [(image, lung_mask(image).mask) for image in images]


@pytest.mark.parametrize("side", [64, 128, 256, *(pytest.param(side, marks=pytest.mark.slow) for side in (512, 1024))])
def test_on_real_radiographs_too_only_lungs_change_and_shapes_do_not_degenerate(real_pictures, side):
    pad = Geometry(fit="pad")
    images = torch.from_numpy(np.stack([resize(image, side, pad)[0] for image, _ in real_pictures]))[:, None]
    lungs = torch.from_numpy(np.stack([resize_mask(mask, side, pad) for _, mask in real_pictures]))[:, None]
    small = []
    for epoch in range(3):
        pasted, alpha = anatpaste(images, lungs, Draws(0, epoch, np.arange(len(images), dtype=np.uint64)))
        assert torch.equal(pasted[~lungs], images[~lungs]) and not alpha[~lungs].any()
        assert torch.equal(pasted[alpha == 0], images[alpha == 0])
        small.append((alpha > 0).sum(dim=(1, 2, 3)) / lungs.sum(dim=(1, 2, 3)) < 0.01)
    assert torch.cat(small).float().mean() <= 0.05


@given(side=st.integers(24, 90), seed=st.integers(0, 2**31), count=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_where_the_map_is_zero_no_bit_changes_whatever_the_side(side, seed, count):
    images, lungs, draws = batch(side, count, seed)
    others, lungs = (
        images.flip(0),
        lungs & (torch.rand(lungs.shape, generator=torch.Generator().manual_seed(seed)) < 0.9),
    )
    found = {
        "anatpaste": anatpaste(images, lungs, draws),
        "normal": cutpaste_normal(images, draws),
        "scar": cutpaste_scar(images, draws),
        "fpi": interpolate_foreign(images, others, lungs, draws),
        "fpi anywhere": interpolate_foreign(images, others, None, draws),
        "nsa": blend_foreign(images, others, lungs, draws),
        "nsa anywhere": blend_foreign(images, others, None, draws),
    }
    for name, (pasted, change) in found.items():
        assert pasted.shape == change.shape == images.shape and pasted.isfinite().all(), name
        assert torch.equal(pasted[change == 0], images[change == 0]), name
        assert change.min() >= 0 and change.max() <= 1 and pasted.min() >= 0 and pasted.max() <= 1, name


def test_anatpaste_composes_a_piece_of_the_image_by_alpha():
    """image = (1 - alpha) x + alpha patch, the patch being the image moved, its brightness and contrast changed."""
    images, lungs, draws = batch(64, count=5)
    images = 0.3 + 0.4 * images  # jitter cannot clip
    pasted, alpha = anatpaste(images, lungs, draws)
    for x, out, a in zip(images[:, 0].double(), pasted[:, 0].double(), alpha[:, 0].double()):
        rows, columns = torch.nonzero(a > 0.05, as_tuple=True)
        patch = ((out - (1 - a) * x) / a)[rows, columns]
        best = np.inf
        for down in range(-int(rows.min()), 64 - int(rows.max())):
            for right in range(-int(columns.min()), 64 - int(columns.max())):
                source = x[rows + down, columns + right]
                design = torch.stack([source, torch.ones_like(source)], dim=1)
                fitted = design @ torch.linalg.lstsq(design, patch[:, None]).solution
                best = min(best, (a[rows, columns] * (fitted[:, 0] - patch)).abs().max().item())
        assert best < 1e-6


def test_the_paste_fades_in_the_middle_as_a_blurred_shape_does():
    """In lungs that fill the image alpha is a Gaussian-blurred ellipse or rectangle: symmetric, falling from its middle."""
    images, _, draws = batch(128, count=32)
    alpha = anatpaste(images, torch.ones_like(images, dtype=torch.bool), draws)[1][:, 0]
    checked = 0
    for a in alpha:
        rows, columns = torch.nonzero(a > 0, as_tuple=True)
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        if top > 4 and left > 4 and bottom < 123 and right < 123:  # not cut by the frame
            whole = a[top : bottom + 1, left : right + 1]
            torch.testing.assert_close(whole, whole.flip(0, 1), atol=1e-5, rtol=0)
            line = whole[whole.shape[0] // 2, whole.shape[1] // 2 :]
            assert (line.diff() <= 1e-6).all() and a.max() == whole[whole.shape[0] // 2, whole.shape[1] // 2]
            checked += 1
    assert checked > 5


def test_fpi_blends_one_rectangle_of_the_other_image_by_one_factor():
    images, lungs, draws = batch(80, count=32)
    others = images.flip(0)
    pasted, alpha = interpolate_foreign(images, others, lungs, draws)
    torch.testing.assert_close(pasted, (1 - alpha) * images + alpha * others, atol=1e-6, rtol=0)
    for a, (top, bottom, left, right) in zip(alpha[:, 0], bounds((alpha > 0).int())):
        inside = a[top:bottom, left:right]
        assert (inside == a.max()).all() and 0.05 <= a.max() <= 0.95 and inside.sum() > 0.999 * a.sum()
        assert all(0.09 * 80 <= length <= 0.41 * 80 for length in (bottom - top, right - left))
        if min(top, left) > 0 and max(bottom, right) < 80:
            assert lungs[0, 0, (top + bottom) // 2, (left + right) // 2]


def test_poisson_solves_what_a_sparse_solver_solves():
    rng = np.random.default_rng(0)
    heights, widths = np.array([1, 7, 20, 33]), np.array([5, 7, 31, 2])
    divergence = torch.zeros(4, 33, 31)
    for place, (h, w) in enumerate(zip(heights, widths)):
        divergence[place, :h, :w] = torch.from_numpy(rng.standard_normal((h, w)).astype(np.float32))
    found = poisson(divergence, torch.from_numpy(heights), torch.from_numpy(widths))
    for place, (h, w) in enumerate(zip(heights, widths)):
        lines = [sparse.diags_array([1.0, -2.0, 1.0], offsets=[-1, 0, 1], shape=(n, n)) for n in (h, w)]
        laplace = sparse.kron(lines[0], sparse.eye_array(w)) + sparse.kron(sparse.eye_array(h), lines[1])
        expected = spsolve(laplace.tocsc(), divergence[place, :h, :w].double().numpy().ravel()).reshape(h, w)
        assert np.abs(found[place, :h, :w].numpy() - expected).max() < 1e-4
        assert not found[place, h:].any() and not found[place, :, w:].any()


def test_nsa_is_seamless_and_says_how_much_it_changed():
    """The change of a patch of constant gray is nothing; of a brighter structure it is there and ends at the border."""
    images, lungs, draws = batch(96, count=16)
    flat = torch.full_like(images, 0.5)
    assert not blend_foreign(images, flat, lungs, draws)[1].any(), "no gradient of the flat image is the steeper one"
    y, x = torch.meshgrid(*[torch.arange(96.0)] * 2, indexing="ij")
    waves = (0.5 + 0.4 * torch.sin(x / 5) * torch.sin(y / 5)).expand_as(images)
    pasted, change = blend_foreign(flat, waves, lungs, draws)
    moved = (pasted - flat).abs()
    assert (moved.amax(dim=(1, 2, 3)) > 0.1).float().mean() > 0.8
    logistic = 1 / (1 + torch.exp(-(255 * moved - 24) / 12))
    rescaled = (logistic - 1 / (1 + np.exp(2))) / (1 - 1 / (1 + np.exp(2)))
    torch.testing.assert_close(change, rescaled.clamp(0, 1), atol=1e-5, rtol=0)
    steps = (pasted - flat).diff(dim=3).abs()
    border = (change[..., :-1] == 0) != (change[..., 1:] == 0)
    assert steps[border].mean() < 0.05, "pasted without blending it would step by 0.16 on average"
    alone = blend_foreign(flat[5:6], waves[5:6], lungs[5:6], draws.select(np.array([5])))[0]
    torch.testing.assert_close(pasted[5:6], alone, atol=2e-5, rtol=0)


def test_without_maps_the_same_is_pasted_and_a_batch_at_once_equals_one_by_one():
    images, lungs, draws = batch(100, count=9)
    pasted, alpha = anatpaste(images, lungs, draws)
    again, nothing = anatpaste(images, lungs, draws, maps=False)
    assert torch.equal(pasted, again) and nothing is None
    with pytest.MonkeyPatch.context() as patch:  # what a GPU runs
        patch.setattr(pasting, "_paste_each", pasting._paste_all)
        at_once = anatpaste(images, lungs, draws)
        wide = anatpaste(images, torch.ones_like(lungs), draws)
    torch.testing.assert_close(at_once, (pasted, alpha), atol=2e-6, rtol=0)
    torch.testing.assert_close(wide, anatpaste(images, torch.ones_like(lungs), draws), atol=2e-6, rtol=0)
