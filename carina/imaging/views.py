"""Augmented views on batches: every sample has its own parameters, every length is a fraction of the side.

Parameters are computed on the CPU and copied to the images' device at once. Everything is float32, autocast or not: in
bf16 the coordinates of a sampling grid are wrong by up to half a pixel at 128 px.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field

from carina.draws import Draws
from carina.recipes import Section

Fraction = Annotated[float, Field(ge=0, le=1)]
NOISE_PLACES = 2**20  # where in the bank of noise a sample's own may begin
CACHED = 2**17  # pixels of a view that a CPU works on at a time, so that they stay in its cache
NARROW = 4  # radius in pixels up to which a blur is a few shifted sums; a wide one is a convolution


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the first bound must not be above the second; give [{pair[1]}, {pair[0]}]")
    return pair


Positive = Annotated[float, Field(gt=0)]
Bounds = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_ordered)]


class ViewSettings(Section):
    """What a view may change. A parameter at its neutral value costs nothing and draws nothing.

    area: share of the image that is kept; aspect: of the crop; rotation: largest angle in degrees; shift: largest, as a
    share of the side; flip: probability of a mirror image (the heart has a side: 0, unless a published recipe is
    repeated); blur: largest sigma as a share of the side; gamma: exponent; brightness, contrast: largest relative
    change; noise: largest standard deviation of Gaussian noise, of the range. No cutout: a finding may be all there is.
    """

    area: Shares
    aspect: Bounds
    rotation: Annotated[float, Field(ge=0, le=180)]
    shift: Fraction
    flip: Fraction
    gamma: Bounds
    brightness: Annotated[float, Field(ge=0, lt=1)]
    contrast: Annotated[float, Field(ge=0, lt=1)]
    blur: Annotated[float, Field(ge=0, le=0.1)]
    noise: Fraction


class CropSettings(Section):
    """Multi-crop: two global views and `locals` small ones, each a share of the area; a local view's side is the share
    `local_size` of the global one's."""

    global_area: Shares
    local_area: Shares
    locals: Annotated[int, Field(ge=0)]
    local_size: Annotated[float, Field(gt=0, le=1)]


def _uniform(draws: Draws, name: str, low: float, high: float) -> torch.Tensor:
    """(B,) float32 on the CPU; nothing is drawn where the bounds leave no choice."""
    return torch.full((len(draws),), float(low)) if low == high else torch.from_numpy(draws.uniform(name, low, high))


def _logs(bounds: tuple[float, float]) -> tuple[float, float]:
    return float(np.log(bounds[0])), float(np.log(bounds[1]))


def affine_matrices(draws: Draws, settings: ViewSettings, like: torch.Tensor) -> torch.Tensor:
    """(B, 2, 3) matrices from output to input coordinates in [-1, 1], on the device of `like`: crop, rotation, shift
    and flip in one resampling."""
    area = _uniform(draws, "area", *settings.area)
    root = torch.exp(_uniform(draws, "aspect", *_logs(settings.aspect)) / 2)
    width = (area.sqrt() * root).clamp(max=1.0)
    height = (area.sqrt() / root).clamp(max=1.0)
    angle = torch.deg2rad(_uniform(draws, "rotation", -settings.rotation, settings.rotation))
    reach = 2 * settings.shift  # the frame is 2 wide in these coordinates
    x = _uniform(draws, "crop x", -1, 1) * (1 - width) + _uniform(draws, "shift x", -reach, reach)
    y = _uniform(draws, "crop y", -1, 1) * (1 - height) + _uniform(draws, "shift y", -reach, reach)
    if settings.flip > 0:
        mirror = 1 - 2 * torch.from_numpy(draws.coin("flip", settings.flip)).float()
    else:
        mirror = torch.ones(len(draws))
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([width * cos * mirror, -height * sin, x], dim=1)
    bottom = torch.stack([width * sin * mirror, height * cos, y], dim=1)
    return torch.stack([top, bottom], dim=1).to(like.device)


def _grid(theta: torch.Tensor, size: int) -> torch.Tensor:
    """F.affine_grid for (size, size), by broadcasting: on a CPU a quarter of the time of its matrix product."""
    line = (2 * torch.arange(size, device=theta.device) + 1) / size - 1
    across = theta[:, :, 0, None] * line
    down = theta[:, :, 1, None] * line + theta[:, :, 2, None]
    return (across[:, :, None, :] + down[:, :, :, None]).permute(0, 2, 3, 1)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """Separable Gaussian blur of (B, 1, H, W) with its own `sigma` (B,) in pixels per sample; borders repeat.

    max_sigma bounds sigma and fixes the kernel's width, so that the result does not depend on the batch.
    """
    radius = max(1, int(np.ceil(3 * max_sigma)))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    if radius <= NARROW:
        weights = kernels[:, radius:, None, None]
        return _weighted_shifts(_weighted_shifts(images[:, 0], weights, radius, 2), weights, radius, 1)[:, None]
    batch, _, height, width = images.shape
    flat = images.reshape(1, batch, height, width)
    with torch.autocast(images.device.type, enabled=False):
        flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), "replicate"), kernels[:, None, None, :], groups=batch)
        flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), "replicate"), kernels[:, None, :, None], groups=batch)
    return flat.reshape(batch, 1, height, width)


def _weighted_shifts(images: torch.Tensor, weights: torch.Tensor, radius: int, dim: int) -> torch.Tensor:
    """(B, H, W) filtered along `dim` by symmetric kernels; weights (B, radius + 1, 1, 1), that of the center first."""
    length = images.shape[dim]
    padded = F.pad(images, (radius, radius, 0, 0) if dim == 2 else (0, 0, radius, radius), "replicate")
    out = images * weights[:, 0]
    for offset in range(1, radius + 1):
        pair = padded.narrow(dim, radius - offset, length) + padded.narrow(dim, radius + offset, length)
        out.addcmul_(pair, weights[:, offset])
    return out


@lru_cache(maxsize=4)
def _noise_bank(pixels: int, device: torch.device) -> torch.Tensor:
    """(NOISE_PLACES, pixels) standard normal numbers, always the same ones; the rows overlap in memory."""
    generator = np.random.Generator(np.random.Philox(key=0))
    numbers = torch.from_numpy(generator.standard_normal(NOISE_PLACES + pixels - 1, dtype=np.float32))
    return numbers.to(device).unfold(0, pixels, 1)


def _jitter_factors(draws: Draws, brightness: float, contrast: float) -> dict[str, torch.Tensor]:
    factors = {"brightness": brightness, "contrast": contrast}
    return {name: _uniform(draws, name, 1 - value, 1 + value) for name, value in factors.items() if value > 0}


def _jittered(images: torch.Tensor, factors: dict[str, torch.Tensor]) -> torch.Tensor:
    if "brightness" in factors:
        images = (images * factors["brightness"].view(-1, 1, 1, 1)).clamp_(0, 1)
    if "contrast" in factors:
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean).mul_(factors["contrast"].view(-1, 1, 1, 1)).add_(mean).clamp_(0, 1)
    return images


def jitter(images: torch.Tensor, draws: Draws, strength: float) -> torch.Tensor:
    """Brightness and contrast, each times U(1 - strength, 1 + strength): what color jitter is on one channel."""
    if strength == 0:
        return images
    factors = _jitter_factors(draws, strength, strength)
    brightness, contrast = (value.to(images.device).view(-1, 1, 1, 1) for value in factors.values())
    out = torch.empty_like(images)
    # a few plain passes, whose calls cost more than the larger pieces lose in the cache
    count = max(1, 4 * CACHED // images.shape[-1] ** 2) if images.device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), count):
        rows = slice(start, start + count)
        piece = torch.mul(images[rows], brightness[rows], out=out[rows]).clamp_(0, 1)
        mean = piece.mean(dim=(1, 2, 3), keepdim=True)
        piece.mul_(contrast[rows]).add_(mean * (1 - contrast[rows])).clamp_(0, 1)
    return out


@torch.no_grad()
def make_view(images: torch.Tensor, draws: Draws, settings: ViewSettings, size: int) -> torch.Tensor:
    """One augmented view (B, 1, size, size) float32 in [0, 1] of images (B, 1, S, S) in [0, 1]."""
    drawn = {"theta": affine_matrices(draws, settings, torch.empty(0)).flatten(1)}
    if settings.blur > 0:
        drawn["sigma"] = _uniform(draws, "blur", 0.0, settings.blur * size)
    if tuple(settings.gamma) != (1, 1):
        drawn["gamma"] = torch.exp(_uniform(draws, "gamma", *_logs(settings.gamma)))
    drawn |= _jitter_factors(draws, settings.brightness, settings.contrast)
    if settings.noise > 0:
        drawn["noise"] = _uniform(draws, "noise", 0.0, settings.noise)
        drawn["place"] = torch.from_numpy(draws.integers("noise place", 0, NOISE_PLACES)).float()  # exact below 2^24
    columns = [value.reshape(len(images), -1) for value in drawn.values()]
    packed = torch.cat(columns, dim=1).to(images.device, non_blocking=True)
    widths = [column.shape[1] for column in columns]
    on_cpu = images.device.type == "cpu"
    count = max(1, CACHED // size**2) if on_cpu else max(1, len(images))
    with torch.autocast(images.device.type, enabled=False):
        views = []
        for part, values in zip(images.split(count), packed.split(count)):
            # a copy reads memory in order; a rotation's slanted lines, straight from memory, take three times as long
            near = part.clone() if on_cpu else part
            views.append(_view(near, dict(zip(drawn, values.split(widths, dim=1))), settings, size))
    return views[0] if len(views) == 1 else torch.cat(views)


def _view(images: torch.Tensor, drawn: dict[str, torch.Tensor], settings: ViewSettings, size: int) -> torch.Tensor:
    factor = images.shape[-1] // size
    if factor >= 2:  # bilinear resampling alone would alias
        images = F.avg_pool2d(images, factor)
    grid = _grid(drawn["theta"].unflatten(1, (2, 3)), size)
    view = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if "sigma" in drawn:
        view = gaussian_blur(view, drawn["sigma"][:, 0], settings.blur * size)
    view = view.clamp_(0, 1)
    if "gamma" in drawn:
        view = view.pow_(drawn["gamma"].view(-1, 1, 1, 1))
    view = _jittered(view, drawn)
    if "noise" in drawn:
        noise = _noise_bank(size * size, images.device)[drawn["place"][:, 0].long()].view_as(view)
        view = view.addcmul_(noise, drawn["noise"].view(-1, 1, 1, 1)).clamp_(0, 1)
    return view


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
