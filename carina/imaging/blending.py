"""Synthetic lesions on batches from another patient's radiograph: one rectangle mixed in, or patches blended seamlessly.

Foreign patch interpolation (FPI): Tan et al., "Detecting outliers with foreign patch interpolation", 2020 (arXiv
2011.04197). Natural synthetic anomalies (NSA): Schlueter et al., ECCV 2022 (arXiv 2109.15222), by Poisson image editing
(Perez et al., SIGGRAPH 2003).

Re-derived from the papers with every length as a fraction of the side. A sample's result depends on its own draws alone,
not on the batch that it stands in. NSA is computed in windows as large as the largest patch, and on a CPU in pieces of the
batch that stay in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import Draws
from carina.imaging.views import CACHED
from carina.imaging.windows import centers, column_of, lung_box, read_places, row_counts, window_places

FOREIGN_SIDE = (0.1, 0.4)  # FPI: of the side
FOREIGN_SHARE = (0.05, 0.95)  # FPI: how much of the other image
BLEND_SIDE = (0.06, 0.4)  # NSA: least, to which a Gamma(2, 0.1) is added, and largest
BLEND_SCALE = (0.7, 1.3)  # NSA: how much larger than at its source, normal around 1 with deviation 0.5, cut here
BLEND_SHIFT = 0.25  # NSA: largest distance from the source to where it goes, on each axis
BLEND_PATCHES = 3  # NSA: at most; each after the first comes by a coin
CHANGE = (1 / 12, 24)  # NSA: slope and middle of the logistic from change in gray levels of 255 to the map


def interpolate_foreign(
    images: torch.Tensor, others: torch.Tensor, masks: torch.Tensor | None, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend a rectangle of each image with the same place of the other one, by one factor (FPI).

    images, others: (B, 1, S, S) in [0, 1]. masks: (B, 1, S, S) bool or None; where given, the rectangle's center is a lung
    pixel. Returns the images and the factor (B, 1, S, S), 0 outside the rectangle, where the image is unchanged to the bit.
    """
    side, draws = images.shape[-1], draws.part("foreign interpolation")
    size = (draws.uniform("size", *FOREIGN_SIDE, shape=(2,)) * side).round().clip(1, side)
    share = column_of(draws.uniform("share", *FOREIGN_SHARE), images)
    line = torch.arange(side, device=images.device)
    inside = []
    for axis, center in enumerate(centers(masks, images, draws)):
        length = torch.from_numpy(size[:, axis].astype(np.int64)).to(images.device)
        start = torch.minimum((center - length // 2).clamp(min=0), side - length)[:, None]
        inside.append((line >= start) & (line < start + length[:, None]))
    alpha = (share * inside[0][:, :, None] * inside[1][:, None, :])[:, None]
    return images + alpha * (others - images), alpha


def poisson(divergence: torch.Tensor, heights: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Solve Laplace(u) = divergence on rectangles of pixels, u = 0 just outside of them; exact, all of a batch at once.

    divergence: (B, H, W) float32; heights, widths: (B,) the rectangle of each sample, its upper left part. Returns u of
    the same shape, 0 beyond the rectangle. The sine transform diagonalizes the five-point Laplacian.
    """
    with torch.autocast(divergence.device.type, enabled=False):
        rows, down = _sines(heights, divergence.shape[1])
        columns, across = _sines(widths, divergence.shape[2])
        spectrum = rows @ divergence @ columns
        return rows @ (spectrum / (down[:, :, None] + across[:, None, :])) @ columns


def _sines(lengths: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal sine matrices (B, most, most), zero beyond the length of each, and the eigenvalues (B, most) of the second
    difference (-1 beyond)."""
    numbers = torch.arange(1, most + 1, device=lengths.device)
    inside = numbers <= lengths[:, None]
    period = (lengths + 1).double()
    cycles = (numbers[:, None] * numbers) / (2 * period[:, None, None])
    sines = torch.sin(2 * math.pi * (cycles - cycles.floor()).float())  # reduced in double, so that sin may be single
    sines = sines * (2 / period).sqrt().float()[:, None, None] * inside[:, :, None] * inside[:, None, :]
    values = 2 * torch.cos(math.pi / period[:, None] * numbers) - 2
    return sines, torch.where(inside, values, -1.0).float()


def blend_foreign(
    images: torch.Tensor, others: torch.Tensor, masks: torch.Tensor | None, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend one to three patches of the other image, resized and moved, seamlessly into each image (NSA).

    At every pixel border the steeper of both gradients is kept (mixed gradients), and the image is solved for from them
    with its own values around the patch. images, others: (B, 1, S, S) in [0, 1]. masks: (B, 1, S, S) bool or None; where
    given, patches are centered on lung pixels, or so near that they stay in the box around the lungs, and are taken from
    that box. Returns the images and the change map (B, 1, S, S) in [0, 1], a logistic function of the absolute change
    that is 0 where nothing changed; there the image is unchanged to the bit.
    """
    draws, side, device = draws.part("foreign blending"), images.shape[-1], images.device
    result = images.clone(memory_format=torch.contiguous_format)
    chosen = np.ones(len(images), dtype=bool)
    with torch.autocast(device.type, enabled=False):
        for number in range(BLEND_PATCHES):
            part = draws.part(f"patch {number}")
            if number:
                chosen &= part.coin("another")
            rows = np.flatnonzero(chosen)
            if not len(rows):
                break
            part, at = part.select(rows), torch.from_numpy(rows).to(device)
            gamma = -0.1 * np.log1p(-part.uniform("size", shape=(2, 2))).sum(axis=2)  # Gamma(2, 0.1)
            size = ((BLEND_SIDE[0] + gamma).clip(max=BLEND_SIDE[1]) * side).round().clip(min=2).astype(np.int64)
            scale = (1 + 0.5 * part.normal("scale")).clip(*BLEND_SCALE)
            shift = part.uniform("shift", -BLEND_SHIFT, BLEND_SHIFT, shape=(2,)) * side
            sizes = torch.from_numpy(size).to(device)
            scales, shifts = torch.from_numpy(scale).to(device)[:, None], torch.from_numpy(shift).to(device)
            first, last = torch.zeros_like(sizes), torch.full_like(sizes, side)
            lungs = None if masks is None else masks[at]
            if lungs is not None:  # the other's lungs are taken to lie where its own do
                first, last = lung_box(lungs, row_counts(lungs))
                last = last + 1
            target = torch.stack(centers(lungs, images, part), dim=1)
            starts = torch.maximum(torch.minimum(target - sizes // 2, last - sizes), first)
            starts = torch.where(sizes > last - first, (first + last - sizes) // 2, starts).clamp(min=0)
            starts = torch.minimum(starts, side - sizes)
            reach = torch.minimum(sizes / 2 / scales, (last - first) / 2)
            sources = torch.minimum(torch.maximum(starts + sizes / 2 + shifts, first + reach), last - reach)
            for own in _pieces(size, device):
                height, width = size[own].max(axis=0).tolist()
                piece = torch.from_numpy(own).to(device)
                places, change = _blend(
                    result, others, at[piece], sources[piece], scales[piece], sizes[piece], starts[piece], height, width
                )
                # added, because a place that stands in a window several times would be written at random
                result.view(-1).scatter_add_(0, places.view(-1), change.view(-1))
    slope, middle = CHANGE
    least = 1 / (1 + math.exp(slope * middle))
    change = torch.sigmoid(slope * (255 * (result - images).abs() - middle))
    change = ((change - least) / (1 - least)).clamp(0, 1)
    return torch.where(change > 0, result, images), change


def _blend(
    images: torch.Tensor,
    others: torch.Tensor,
    rows: torch.Tensor,
    sources: torch.Tensor,
    scales: torch.Tensor,
    sizes: torch.Tensor,
    starts: torch.Tensor,
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and change (N, height, width) by one patch in each of the images `rows`. sources: (N, 2) its middle in the
    other image; scales: (N, 1); sizes, starts: (N, 2), sizes at most height x width."""
    side = images.shape[-1]
    # with a ring of one pixel around the patch, where the image stays as it is
    places = window_places(rows, starts - 1, height + 2, width + 2, side)
    lines = [torch.arange(-1, length + 1, device=images.device) for length in (height, width)]
    grid = []
    for axis, line in enumerate(lines):
        read = sources[:, axis, None] + (line + 0.5 - sizes[:, axis, None] / 2) / scales
        grid.append(read * (2 / side) - 1)
    shape = (-1, height + 2, width + 2)
    grid = torch.stack([grid[1][:, None, :].expand(shape), grid[0][:, :, None].expand(shape)], dim=3)
    patch = F.grid_sample(others[rows], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    own = read_places(images, places)
    inside = [line[1:-1] < sizes[:, axis, None] for axis, line in enumerate(lines)]
    inside = inside[0][:, :, None] & inside[1][:, None, :]
    divergence = 0.0
    for axis in (1, 2):
        ours, theirs = (part.narrow(3 - axis, 1, part.shape[3 - axis] - 2).diff(dim=axis) for part in (own, patch))
        divergence = divergence + torch.where(theirs.abs() > ours.abs(), theirs - ours, 0).diff(dim=axis)
    change = poisson(divergence * inside, sizes[:, 0], sizes[:, 1])
    own, places = own[:, 1:-1, 1:-1], places[:, 1:-1, 1:-1]
    return places.contiguous(), ((own + change).clamp(0, 1) - own) * inside


def _pieces(sizes: np.ndarray, device: torch.device) -> Iterator[np.ndarray]:
    """Rows of a batch whose windows are (B, 2) pixels: on a CPU such of like sizes, and so few at a time that they stay in
    its cache; elsewhere all at once."""
    if device.type != "cpu":
        yield np.arange(len(sizes))
        return
    bands = np.argsort(np.argsort(sizes[:, 0], kind="stable"), kind="stable") // max(1, round(len(sizes) ** 0.5))
    piece, most = [], np.zeros(2, dtype=np.int64)
    for row in np.lexsort((sizes[:, 1], bands)):
        wider = np.maximum(most, sizes[row])
        if piece and wider.prod() * (len(piece) + 1) > CACHED:
            yield np.array(piece)
            piece, wider = [], sizes[row]
        piece, most = [*piece, row], wider
    yield np.array(piece)
