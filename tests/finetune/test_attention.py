"""Attention must move with the image: nothing to pay where it does, and sides are exchanged in the mirror."""

import numpy as np
import pytest
import torch

from carina.draws import Draws
from carina.finetune.attention import disagreement, mirrored_targets, moved, swapped
from carina.finetune.recipe import ConsistencySettings
from carina.models.heads import HeadSettings, LseHead

LABELS = ["Left_Effusion", "Mass", "Right_Effusion", "Rib_Left"]
SETTINGS = ConsistencySettings(weight=1.0, flip=True)


def toy(outputs: int) -> LseHead:
    """A network that looks at every pixel by itself: one 1x1 convolution."""
    torch.manual_seed(0)
    settings = HeadSettings(name="lse", hidden=1, dropout=0, layers=None, sharpness=5, noisy_or=False)
    return LseHead(settings, [1], outputs, None).eval()


def smooth(count: int, side: int) -> torch.Tensor:
    noise = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (side, side), mode="bicubic", align_corners=True).clamp(0, 1)


def theta(x: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.tensor([[[x, 0.0, shift], [0.0, 1.0, 0.0]]])


def test_sides_are_exchanged():
    assert swapped(LABELS).tolist() == [2, 1, 0, -1]
    assert swapped(["Mass", "Leftover", "left_lung_opacity", "RIGHT_lung_opacity"]).tolist() == [0, 1, 3, 2]
    targets = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    mirrored = mirrored_targets(targets, np.array([False, True]), LABELS)
    np.testing.assert_array_equal(mirrored, [[1, 0, 0, 1], [0, 0, 1, np.nan]])


@pytest.mark.parametrize("matrix", [theta(-1.0), theta(shift=0.25), theta(-1.0, 0.5)], ids=["flip", "shift", "both"])
def test_attention_that_moves_with_the_image_costs_nothing(matrix):
    images, head = smooth(1, 32), toy(2)
    grid = torch.nn.functional.affine_grid(matrix, [1, 1, 32, 32], align_corners=False)
    other = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    flipped = np.array([matrix[0, 0, 0].item() < 0])
    before, after = head.spread([images]), head.spread([other])
    assert disagreement(before, after, matrix, flipped, ["Mass", "Nodule"]).item() < 1e-5
    assert disagreement(before, after.flip(3), matrix, flipped, ["Mass", "Nodule"]).item() > 0.1


def test_small_turns_cost_an_equivariant_network_next_to_nothing():
    """Interpolation is all that is left; the same network with a fixed idea of places pays."""
    images, head = smooth(16, 64), toy(2)
    draws = Draws(0, 0, np.arange(16, dtype=np.uint64))
    other, matrix, flipped = moved(images, draws, SETTINGS)
    assert 0 < flipped.sum() < 16
    labels = ["Mass", "Nodule"]
    before, after = head.spread([images]), head.spread([other])
    assert disagreement(before, after, matrix, flipped, labels).max() < 0.01
    places = torch.softmax(torch.randn(1, 2, 64 * 64, generator=torch.Generator().manual_seed(2)), dim=2)
    fixed = places.view(1, 2, 64, 64).expand(16, -1, -1, -1)
    assert disagreement(fixed, fixed, matrix, flipped, labels).min() > 0.5


def test_in_the_mirror_attention_is_asked_of_the_other_side():
    """By hand: one place each; the left label looks left, the right one right, and the lone one is left out."""
    before = torch.zeros(1, 4, 4, 4)
    before[0, 0, 1, 0] = before[0, 1, 2, 1] = before[0, 2, 1, 3] = before[0, 3, 0, 0] = 1
    mirrored = before[:, [2, 1, 0, 3]].flip(3)
    flip = np.array([True])
    assert disagreement(before, mirrored, theta(-1.0), flip, LABELS).item() < 1e-6
    # two of three labels look at another of 16 places: the correlation of two such maps is -1/15
    wrong = disagreement(before, before.flip(3), theta(-1.0), flip, LABELS).item()
    assert wrong == pytest.approx(2 / 3 * 16 / 15, abs=1e-6)


def test_disagreement_is_a_correlation_and_flat_attention_has_none():
    rng = np.random.default_rng(0)
    before, after = (torch.from_numpy(rng.random((3, 2, 6, 6), dtype=np.float32)) for _ in range(2))
    after.requires_grad_()
    value = disagreement(before, after, theta().expand(3, -1, -1), np.zeros(3, dtype=bool), ["Mass", "Nodule"])
    for row in range(3):
        pairs = [(before[row, label].numpy(), after[row, label].detach().numpy()) for label in range(2)]
        oracle = np.mean([1 - np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs])
        assert value[row].item() == pytest.approx(oracle, abs=1e-5)
    value.sum().backward()
    assert after.grad.abs().sum() > 0
    flat = torch.full((1, 1, 6, 6), 1 / 36, requires_grad=True)
    value = disagreement(flat, flat, theta(), np.array([False]), ["Mass"])
    value.sum().backward()
    assert value.item() == pytest.approx(1, abs=1e-3) and torch.isfinite(flat.grad).all()
