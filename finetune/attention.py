"""Attention consistency: what a head attends to must move with the image (the principle of MS-ANet, 2021; the measure is
ours)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import Draws
from carina.imaging.views import ViewSettings, affine_matrices, make_view

if TYPE_CHECKING:
    from carina.finetune.recipe import ConsistencySettings

# how far an image is moved: what keeps the meaning of a radiograph
MOVE = ViewSettings(
    area=(1, 1),
    aspect=(1, 1),
    rotation=10,
    shift=0.06,
    flip=0,
    gamma=(1, 1),
    brightness=0,
    contrast=0,
    blur=0,
    noise=0,
)
OTHER = {"left": "right", "right": "left"}


def swapped(labels: Sequence[str]) -> np.ndarray:
    """(L,) which label's value each label takes in a mirror image: that of the other side where its name bears one
    (`Left_`, `Right_`, or either word elsewhere), else its own; -1 where the other side is not among the labels."""
    names = [label.lower() for label in labels]
    mirrored = ["_".join(OTHER.get(word, word) for word in re.split("_", name)) for name in names]
    return np.array([names.index(name) if name in names else -1 for name in mirrored])


def mirrored_targets(targets: torch.Tensor, flipped: np.ndarray, labels: Sequence[str]) -> torch.Tensor:
    """Targets (B, L) of images of which those in `flipped` (B,) bool are mirrored; NaN where the other side is no label."""
    takes = swapped(labels)
    other = targets[:, np.maximum(takes, 0)].masked_fill(torch.from_numpy(takes < 0).to(targets.device), float("nan"))
    return torch.where(torch.from_numpy(flipped).to(targets.device)[:, None], other, targets)


def moved(
    images: torch.Tensor, draws: Draws, settings: ConsistencySettings
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images (B, 1, s, s) turned by up to 10 degrees, shifted by up to 6 % and, where `flip` is set, mirrored half of the
    time; with the matrices (B, 2, 3) from output to input coordinates, and which are mirrored (B,) bool."""
    flip = 0.5 if settings.flip else 0.0
    move = MOVE.model_copy(update={"flip": flip})
    view = make_view(images, draws, move, images.shape[-1])
    flipped = draws.coin("flip", flip) if flip else np.zeros(len(images), dtype=bool)
    return view, affine_matrices(draws, move, images), flipped


def disagreement(
    before: torch.Tensor, after: torch.Tensor, theta: torch.Tensor, flipped: np.ndarray, labels: Sequence[str]
) -> torch.Tensor:
    """(B,) mean over labels of 1 - r, with r the correlation, over the places that show the image, between the attention
    of a moved image and the moved attention of the image: 0 where attention moves with the image, 1 where the two have
    nothing in common.

    A correlation, because any difference of the maps themselves is least where attention is the same everywhere, and
    that is what training for it leads to.

    before, after: attention (B, L, h, w) of the images and of the moved ones. theta, flipped: of `moved`. In a mirror
    image attention is asked to lie where that of the other side's label was.
    """
    grid = F.affine_grid(theta.float(), [len(before), 1, *before.shape[-2:]], align_corners=False)
    moving = F.grid_sample(before.float(), grid, padding_mode="zeros", align_corners=False)
    inside = F.grid_sample(torch.ones_like(before[:, :1], dtype=torch.float32), grid, align_corners=False) > 1 - 1e-4
    takes = swapped(labels)
    turned = torch.from_numpy(flipped).to(before.device)
    moving = torch.where(turned[:, None, None, None], moving[:, np.maximum(takes, 0)], moving)
    x, y = (_centered(part, inside) for part in (moving, after.float()))
    apart = 1 - (x * y).sum(dim=(2, 3))
    there = ~(turned[:, None] & torch.from_numpy(takes < 0).to(before.device))
    return (apart * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)


def _centered(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Maps (B, L, h, w) without their mean over the places inside (B, 1, h, w), and of length 1; 0 where they are flat."""
    mean = (maps * inside).sum(dim=(2, 3), keepdim=True) / inside.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    centered = (maps - mean) * inside
    return centered / centered.square().sum(dim=(2, 3), keepdim=True).add(1e-20).sqrt()
