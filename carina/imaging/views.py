"""Augmented views on batches: every sample has its own parameters, every length is a fraction of the side."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from carina.draws import Draws
from carina.recipes import Section

Fraction = Annotated[float, Field(ge=0, le=1)]


class ViewSettings(Section):
    """What a view may change. No flip (the heart has a side) and no cutout (a finding may be all there is to see)."""

    area: tuple[Fraction, Fraction]
    aspect: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    rotation: Annotated[float, Field(ge=0, le=180)]
    shift: Fraction
    gamma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    blur: Annotated[float, Field(ge=0, le=0.1)]


class CropSettings(Section):
    """Multi-crop: two global views and `locals` small ones, each a share of the area; a local view's side is the share
    `local_size` of the global one's."""

    global_area: tuple[Fraction, Fraction]
    local_area: tuple[Fraction, Fraction]
    locals: Annotated[int, Field(ge=0)]
    local_size: Annotated[float, Field(gt=0, le=1)]


def _tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, dtype=torch.float32)


def _uniform(draws: Draws, name: str, bounds: tuple[float, float], like: torch.Tensor) -> torch.Tensor:
    return _tensor(draws.uniform(name, *bounds), like)


def affine_matrices(draws: Draws, settings: ViewSettings, like: torch.Tensor) -> torch.Tensor:
    """(B, 2, 3) matrices from output to input coordinates in [-1, 1]: crop, rotation and shift in one resampling."""
    area = _uniform(draws, "area", settings.area, like)
    low, high = (float(np.log(value)) for value in settings.aspect)
    root = torch.exp(_uniform(draws, "aspect", (low, high), like) / 2)
    width = (area.sqrt() * root).clamp(max=1.0)
    height = (area.sqrt() / root).clamp(max=1.0)
    angle = torch.deg2rad(_uniform(draws, "rotation", (-settings.rotation, settings.rotation), like))
    reach = (-2 * settings.shift, 2 * settings.shift)  # the frame is 2 wide in these coordinates
    x = _uniform(draws, "crop x", (-1, 1), like) * (1 - width) + _uniform(draws, "shift x", reach, like)
    y = _uniform(draws, "crop y", (-1, 1), like) * (1 - height) + _uniform(draws, "shift y", reach, like)
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([width * cos, -height * sin, x], dim=1)
    bottom = torch.stack([width * sin, height * cos, y], dim=1)
    return torch.stack([top, bottom], dim=1)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """Separable Gaussian blur of (B, 1, H, W) with its own `sigma` (B,) in pixels per sample; borders repeat.

    max_sigma bounds sigma and fixes the kernel's width, so that the result does not depend on the batch.
    """
    radius = max(1, int(np.ceil(3 * max_sigma)))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    batch, _, height, width = images.shape
    flat = images.reshape(1, batch, height, width)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), "replicate"), kernels[:, None, None, :], groups=batch)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), "replicate"), kernels[:, None, :, None], groups=batch)
    return flat.reshape(batch, 1, height, width)


def make_view(images: torch.Tensor, draws: Draws, settings: ViewSettings, size: int) -> torch.Tensor:
    """One augmented view (B, 1, size, size) in [0, 1] of images (B, 1, S, S) in [0, 1]."""
    factor = images.shape[-1] // size
    if factor >= 2:  # bilinear resampling alone would alias
        images = F.avg_pool2d(images, factor)
    theta = affine_matrices(draws, settings, images)
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    view = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if settings.blur > 0:
        sigma = _uniform(draws, "blur", (0.0, settings.blur * size), images)
        view = gaussian_blur(view, sigma, settings.blur * size)
    gamma = torch.exp(_uniform(draws, "gamma", tuple(float(np.log(g)) for g in settings.gamma), images))
    return view.clamp(0, 1).pow(gamma[:, None, None, None])


def jitter(images: torch.Tensor, draws: Draws, strength: float) -> torch.Tensor:
    """Brightness and contrast, each times U(1 - strength, 1 + strength): what color jitter is on one channel."""
    bounds = (1 - strength, 1 + strength)
    brightness = _uniform(draws, "brightness", bounds, images)[:, None, None, None]
    contrast = _uniform(draws, "contrast", bounds, images)[:, None, None, None]
    images = (images * brightness).clamp(0, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean).clamp(0, 1)


def multi_crop(
    images: torch.Tensor,
    others: torch.Tensor,
    draws: Draws,
    settings: ViewSettings,
    crops: CropSettings,
    size: int,
    multiple: int = 1,
) -> list[torch.Tensor]:
    """Two global views (B, 1, size, size), of `images` and of `others`, then the local ones, taken from both in turn.

    multiple: a local view's side is rounded to a multiple of this (a transformer's patch).
    """
    whole = settings.model_copy(update={"area": crops.global_area})
    part = settings.model_copy(update={"area": crops.local_area})
    side = max(multiple, round(crops.local_size * size / multiple) * multiple)
    pair = (images, others)
    return [make_view(pair[number], draws.part(f"global {number}"), whole, size) for number in range(2)] + [
        make_view(pair[number % 2], draws.part(f"local {number}"), part, side) for number in range(crops.locals)
    ]
