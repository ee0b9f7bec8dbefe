"""Planted lesions: soft round nodules added to a radiograph, to test what a detector sees.

Of a family that no pasting method uses: those move patches of radiographs, these add a smooth profile. The same image
with and without is a pair, so that nothing but the lesion tells the two apart. Lengths are fractions of the side.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from carina.draws import Draws
from carina.errors import CarinaError
from carina.imaging.views import gaussian_blur

Place = Literal["inside", "outside"]

WINDOW = 0.125  # of the side: sigma of the window in which lung pixels are weighted around a place
SMOOTHING = 0.02  # of the side: sigma of the image in which body is told from air
WAVES = (2, 3)  # bulges of the edge around the circle
BULGE = 0.08  # of the radius, the largest of each
HALF = 0.5  # at least this part of a lesion lies where it is said to lie


def plant(
    images: torch.Tensor, lungs: torch.Tensor, draws: Draws, *, diameter: float, contrast: float, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add one nodule to each image: (images (B, 1, S, S) with it, masks (B, 1, S, S) bool of the pixels it covers).

    images: (B, 1, S, S) in [0, 1], bright = dense. lungs: (B, 1, S, S) bool. diameter: fraction of the side. contrast:
    the nodule's peak over the local standard deviation of lung, see `local_deviation`. place: ``inside`` the lungs, or
    ``outside`` them but in the body; its center lies there, and so does at least half of the disc of that diameter.

    The profile is 1 - (r / R)^2, whose edge R bulges with the angle by up to 8 % twice and 8 % three times around; it
    falls to 0 there, and the image outside is unchanged to the bit. Values are cut at 1, as a picture's are. Place and
    shape come from the draws, not from the contrast. Where an image has no such place (no lungs, or none so wide) it
    stays as it is and its mask is empty.
    """
    if not 0 < diameter <= 1 or not contrast > 0:
        raise CarinaError(
            f"a lesion of diameter {diameter} (of the side) and contrast {contrast} cannot be planted; give a diameter "
            "between 0 and 1 and a contrast above 0"
        )
    side, draws = images.shape[-1], draws.part("planting")
    radius = diameter * side / 2
    region = lungs if place == "inside" else body_outside(images, lungs)
    allowed = region & (_covered(region, radius) >= HALF)
    row, column = _drawn_pixel(allowed, draws)
    axis = torch.arange(side, device=images.device, dtype=torch.float32)
    dy, dx = axis[None, :, None] - row[:, None, None], axis[None, None, :] - column[:, None, None]
    angle, edge = torch.atan2(dy, dx), torch.ones_like(dy + dx)
    for wave in WAVES:
        height, phase = draws.uniform(f"bulge {wave}", 0, BULGE), draws.uniform(f"phase {wave}", 0, 2 * math.pi)
        edge = edge + _column(height, images) * torch.cos(wave * angle + _column(phase, images))
    profile = (1 - (dy**2 + dx**2) / (radius * edge) ** 2).clamp(min=0)[:, None]
    profile = profile * allowed.flatten(1).any(dim=1)[:, None, None, None]
    peak = contrast * local_deviation(images, lungs, row, column)[:, None, None, None]
    mask = profile > 0
    return torch.where(mask, (images + peak * profile).clamp(max=1), images), mask


def local_deviation(images: torch.Tensor, lungs: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """(B,) the standard deviation of an image's lung pixels around a place, what is called noise here.

    Of the pixel values as they are, so that vessels and ribs count; every lung pixel is weighted by a Gaussian of its
    distance, with a sigma of 1/8 of the side whatever the size of a lesion. Places outside the lungs are thereby
    measured against the lung nearest to them.
    """
    side = images.shape[-1]
    axis = torch.arange(side, device=images.device, dtype=torch.float64)
    distance = (axis[None, :, None] - row[:, None, None]) ** 2 + (axis[None, None, :] - column[:, None, None]) ** 2
    # relative to the nearest lung pixel, so that the weights of distant places do not vanish
    distance = torch.where(lungs[:, 0], distance, torch.inf)
    nearest = distance.flatten(1).amin(dim=1)[:, None, None]
    weight = torch.exp((nearest - distance) / (2 * (WINDOW * side) ** 2)).nan_to_num(0)
    weight = weight / weight.sum(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    values = images[:, 0].double()
    mean = (weight * values).sum(dim=(1, 2), keepdim=True)
    return (weight * (values - mean) ** 2).sum(dim=(1, 2)).sqrt().float()


def body_outside(images: torch.Tensor, lungs: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) bool: the body beside the lungs, which is where a smoothed image is at least as dense as the median
    of its lungs; air and black margins are not."""
    side = images.shape[-1]
    sigma = torch.full((len(images),), SMOOTHING * side, device=images.device)
    smooth = gaussian_blur(images, sigma, SMOOTHING * side)
    median = torch.where(lungs, smooth, torch.nan).flatten(1).nanmedian(dim=1).values
    return ~lungs & (smooth >= median[:, None, None, None])  # nothing where there are no lungs: NaN compares False


def _covered(region: torch.Tensor, radius: float) -> torch.Tensor:
    """(B, 1, S, S): the part of a disc around each pixel that lies in the region; what lies beyond the frame does not."""
    side = region.shape[-1]
    reach = math.ceil(radius)
    axis = torch.arange(-reach, reach + 1, device=region.device, dtype=torch.float32)
    disc = ((axis[:, None] ** 2 + axis[None, :] ** 2) <= radius**2).float()
    length = side + 2 * reach  # room for the disc, so that nothing wraps around
    spectrum = torch.fft.rfft2(region.float(), s=(length, length)) * torch.fft.rfft2(disc, s=(length, length))
    found = torch.fft.irfft2(spectrum, s=(length, length))[..., reach : reach + side, reach : reach + side]
    return (found / disc.sum()).round(decimals=4)


def _drawn_pixel(allowed: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column (B,) float of a uniformly drawn pixel of each mask (B, 1, S, S); any where there is none."""
    side = allowed.shape[-1]
    flat = allowed.flatten(1)
    rank = torch.from_numpy(draws.uniform("place").astype(np.float64)).to(allowed.device) * flat.sum(dim=1)
    place = torch.searchsorted(flat.long().cumsum(dim=1), rank.floor().long()[:, None] + 1)[:, 0]
    place = place.clamp(max=side * side - 1)
    return (place // side).float(), (place % side).float()


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None]
