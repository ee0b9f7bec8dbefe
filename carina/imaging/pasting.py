"""Synthetic lesions pasted into the lungs, on batches.

AnatPaste: Sato et al., "Anatomy-aware self-supervised learning for anomaly detection in chest radiographs",
iScience 2023 (doi 10.1016/j.isci.2023.107086). Re-derived from the paper with every length as a fraction of the side
(the paper's 256 px), lung masks from the store, and the whole batch at once.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from carina.draws import Draws
from carina.imaging.views import gaussian_blur, jitter

AREA = (0.02, 0.15)  # of the image
ASPECT = (0.3, 1 / 0.3)  # log-uniform
MARGIN = 10 / 256  # the blend shape is smaller than the patch by this on every side
BLUR = 14 / 256  # largest sigma of the blend mask
OPACITY = (150 / 255, 1.0)
JITTER = 0.1
SMALLEST = 0.01  # of the side: a shape keeps at least this half-axis, whatever the margin takes


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None]


def lung_points(masks: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """A uniformly drawn pixel of each mask (B, 1, S, S) bool -> (row (B,), column (B,)); the center of an empty one."""
    batch, _, height, width = masks.shape
    flat = masks.reshape(batch, -1).to(torch.int64)
    counts = flat.cumsum(dim=1)
    total = counts[:, -1]
    unit = torch.from_numpy(draws.uniform("lung point").astype(np.float64)).to(masks.device)
    rank = torch.minimum((unit * total).floor().to(torch.int64), (total - 1).clamp(min=0)) + 1
    place = torch.searchsorted(counts, rank[:, None]).squeeze(1)
    center = (height // 2) * width + width // 2
    place = torch.where(total > 0, place, torch.full_like(place, center))
    return place // width, place % width


def anatpaste(images: torch.Tensor, masks: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste one patch of each image into its own lungs.

    images: (B, 1, S, S) in [0, 1]. masks: (B, 1, S, S) bool, the lungs. Returns the pasted images and the alpha map
    (B, 1, S, S) in [0, 1]; outside the mask alpha is 0 and the image unchanged to the bit.
    """
    batch, _, side, _ = images.shape
    draws = draws.part("anatpaste")
    area = draws.uniform("area", *AREA) * side * side
    ratio = np.exp(draws.uniform("aspect", math.log(ASPECT[0]), math.log(ASPECT[1])))
    patch_h = np.minimum(np.sqrt(area * ratio), side).round()
    patch_w = np.minimum(np.sqrt(area / ratio), side).round()
    from_y = np.floor(draws.uniform("from y") * (side - patch_h + 1))
    from_x = np.floor(draws.uniform("from x") * (side - patch_w + 1))
    center_y, center_x = (value.float()[:, None, None] for value in lung_points(masks, draws))

    rows = torch.arange(side, device=images.device, dtype=torch.float32)[None, :, None]
    columns = torch.arange(side, device=images.device, dtype=torch.float32)[None, None, :]
    dy, dx = rows - center_y, columns - center_x

    least = SMALLEST * side
    half_h = _column(np.maximum(patch_h / 2 - MARGIN * side, least), images)
    half_w = _column(np.maximum(patch_w / 2 - MARGIN * side, least), images)
    ellipse = (dy / half_h) ** 2 + (dx / half_w) ** 2 <= 1
    rectangle = (dy.abs() <= half_h) & (dx.abs() <= half_w)
    is_ellipse = torch.from_numpy(draws.coin("shape")).to(images.device)[:, None, None]
    shape = torch.where(is_ellipse, ellipse, rectangle).float()
    # The patch ends where its pixels end, so a wide blur cannot reach beyond it.
    inside = (dy.abs() <= _column(patch_h / 2, images)) & (dx.abs() <= _column(patch_w / 2, images))
    sigma = torch.from_numpy(draws.uniform("blur", 0.0, BLUR * side)).to(images.device)
    soft = gaussian_blur(shape[:, None], sigma, BLUR * side)[:, 0] * inside
    alpha = (soft * _column(draws.uniform("opacity", *OPACITY), images))[:, None] * masks

    # The patch's own center comes to lie on the lung pixel; reading outside the image repeats its border.
    shift_y = _column(from_y + np.floor(patch_h / 2), images) - center_y
    shift_x = _column(from_x + np.floor(patch_w / 2), images) - center_x
    source_y = (rows + shift_y).clamp(0, side - 1).long().expand(batch, side, side)
    source_x = (columns + shift_x).clamp(0, side - 1).long().expand(batch, side, side)
    flat = jitter(images, draws.part("patch"), JITTER).reshape(batch, -1)
    patch = flat.gather(1, (source_y * side + source_x).reshape(batch, -1)).reshape(batch, 1, side, side)
    return torch.where(alpha > 0, images + alpha * (patch - images), images), alpha
