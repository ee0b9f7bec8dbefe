"""Synthetic lesions on batches: pasted into the lungs (AnatPaste) or anywhere (CutPaste).

AnatPaste: Sato et al., "Anatomy-aware self-supervised learning for anomaly detection in chest radiographs",
iScience 2023 (doi 10.1016/j.isci.2023.107086). Re-derived from the paper with every length as a fraction of the side
(the paper's 256 px), lung masks from the store, and the whole batch at once.

CutPaste: Li et al., "CutPaste: self-supervised learning for anomaly detection and localization", CVPR 2021 (arXiv
2104.04015), its pixels at 256 px likewise as fractions of the side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import Draws
from carina.imaging.views import gaussian_blur, jitter

AREA = (0.02, 0.15)  # of the image
ASPECT = (0.3, 1 / 0.3)  # log-uniform
MARGIN = 10 / 256  # the blend shape is smaller than the patch by this on every side
BLUR = 14 / 256  # largest sigma of the blend mask
OPACITY = (150 / 255, 1.0)
JITTER = 0.1
SMALLEST = 0.01  # of the side: a shape keeps at least this half-axis, whatever the margin takes
SCAR_WIDTH = (2 / 256, 16 / 256)  # of the side
SCAR_LENGTH = (10 / 256, 25 / 256)
SCAR_ANGLE = 45.0  # degrees to either side of upright


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


def cutpaste_normal(images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste an upright rectangle of each image (2-15 % of its area, jittered) elsewhere in the same image.

    images: (B, 1, S, S) in [0, 1]. Returns the pasted images and alpha (B, 1, S, S), 1 where pasted, else 0; where it is
    0 the image is unchanged to the bit.
    """
    side, draws = images.shape[-1], draws.part("cutpaste normal")
    area = draws.uniform("area", *AREA) * side * side
    ratio = np.exp(draws.uniform("aspect", math.log(ASPECT[0]), math.log(ASPECT[1])))
    size = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=1).round().clip(1, side)
    source, target = (np.floor(draws.uniform(end, shape=(2,)) * (side - size + 1)) + size / 2 for end in ("from", "to"))
    return _transplant(images, draws, size, source, target, np.zeros_like(area))


def cutpaste_scar(images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste a long thin rectangle of each image, jittered and turned by up to 45 degrees, elsewhere in the same image.

    Arguments and results as for `cutpaste_normal`.
    """
    side, draws = images.shape[-1], draws.part("cutpaste scar")
    lengths = draws.uniform("length", *SCAR_LENGTH), draws.uniform("width", *SCAR_WIDTH)
    size = np.maximum(np.stack(lengths, axis=1) * side, 1)
    angle = np.deg2rad(draws.uniform("angle", -SCAR_ANGLE, SCAR_ANGLE))
    cos, sin = np.cos(angle)[:, None], np.abs(np.sin(angle))[:, None]
    turned = np.minimum(cos * size + sin * size[:, ::-1], side)  # its bounding box
    source = draws.uniform("from", shape=(2,)) * (side - size) + size / 2
    target = draws.uniform("to", shape=(2,)) * (side - turned) + turned / 2
    # A center on a pixel's: even the thinnest scar covers one.
    return _transplant(images, draws, size, source, np.floor(target).clip(0, side - 1) + 0.5, angle)


def _transplant(
    images: torch.Tensor, draws: Draws, size: np.ndarray, source: np.ndarray, target: np.ndarray, angle: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rectangle of `size` around `source`, jittered, turned by `angle` (B,) in radians, around `target`; the others
    are (B, 2), rows and columns from the upper left corner of the image, in pixels."""
    side = images.shape[-1]
    (height, width), (from_y, from_x), (to_y, to_x) = (
        [_column(values[:, axis], images) for axis in (0, 1)] for values in (size, source, target)
    )
    cos, sin = _column(np.cos(angle), images), _column(np.sin(angle), images)
    centers = torch.arange(side, device=images.device, dtype=torch.float32) + 0.5
    dy, dx = centers[None, :, None] - to_y, centers[None, None, :] - to_x
    along, across = cos * dy + sin * dx, cos * dx - sin * dy
    alpha = ((along.abs() <= height / 2) & (across.abs() <= width / 2))[:, None]
    grid = torch.stack([from_x + across, from_y + along], dim=3) * (2 / side) - 1
    patch = jitter(images, draws.part("patch"), JITTER)
    patch = F.grid_sample(patch, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)
    return torch.where(alpha, patch, images), alpha.float()
