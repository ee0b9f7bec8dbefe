"""Synthetic lesions on batches: pieces of a radiograph, of its own or of another patient's, put where they do not belong.

AnatPaste: Sato et al., "Anatomy-aware self-supervised learning for anomaly detection in chest radiographs",
iScience 2023 (doi 10.1016/j.isci.2023.107086). CutPaste: Li et al., "CutPaste: self-supervised learning for anomaly
detection and localization", CVPR 2021 (arXiv 2104.04015). Foreign patch interpolation (FPI): Tan et al., "Detecting
outliers with foreign patch interpolation", 2020 (arXiv 2011.04197). Natural synthetic anomalies (NSA): Schlueter et
al., ECCV 2022 (arXiv 2109.15222), by Poisson image editing (Perez et al., SIGGRAPH 2003).

Re-derived from the papers with every length as a fraction of the side (of 256 px where a paper counts pixels). Lung masks
come from the store. A sample's result depends on its own draws alone, not on the batch that it stands in. Everything is
computed in windows as large as the largest patch, and on a CPU in pieces of the batch that stay in its cache.

Differences from AnatPaste's paper, each because its picture gives the paste away: the patch is cut inside the box around
the lungs, not from the black frame or over a marker; where the blur reaches beyond the patch the image goes on, not a
straight edge; towards the edge of the lungs the paste fades within a hundredth of the side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import Draws
from carina.imaging.views import CACHED, jitter

AREA = (0.02, 0.15)  # of the image
ASPECT = (0.3, 1 / 0.3)  # log-uniform
MARGIN = 10 / 256  # the blend shape is smaller than the patch by this on every side
BLUR = (4 / 256, 14 / 256)  # sigma of the blend mask; from 0 in the paper, where the sharpest edges give a paste away
OPACITY = (150 / 255, 254 / 255)
JITTER = 0.1
NEAR_ONE = (1 - JITTER, 1 + JITTER)
SMALLEST = 0.01  # of the side: a shape keeps at least this half-axis, whatever the margin takes
FADE = 0.016  # of the side: over which the paste fades towards the edge of the lungs
SIGMAS = 2.5  # where the blur ends
GRID = 1 / 128  # of the side: step at which shapes are drawn before they are blurred
SCAR_WIDTH = (2 / 256, 16 / 256)  # of the side
SCAR_LENGTH = (10 / 256, 25 / 256)
SCAR_ANGLE = 45.0  # degrees to either side of upright
FOREIGN_SIDE = (0.1, 0.4)  # FPI: of the side
FOREIGN_SHARE = (0.05, 0.95)  # FPI: how much of the other image
BLEND_SIDE = (0.06, 0.4)  # NSA: least, to which a Gamma(2, 0.1) is added, and largest
BLEND_SCALE = (0.7, 1.3)  # NSA: how much larger than at its source, normal around 1 with deviation 0.5, cut here
BLEND_SHIFT = 0.25  # NSA: largest distance from the source to where it goes, on each axis
BLEND_PATCHES = 3  # NSA: at most; each after the first comes by a coin
CHANGE = (1 / 12, 24)  # NSA: slope and middle of the logistic from change in gray levels of 255 to the map


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None]


def _between(unit: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + unit * (high - low)


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


# -- windows ------------------------------------------------------------------------------------------------------------


def _places(rows: torch.Tensor, starts: torch.Tensor, height: int, width: int, side: int) -> torch.Tensor:
    """(N, height, width) int64 places in the flattened batch, of windows that begin at `starts` (N, 2) in images `rows`;
    where a window leaves the image, the nearest pixel's."""
    down = (starts[:, 0, None] + torch.arange(height, device=rows.device)).clamp(0, side - 1)
    across = (starts[:, 1, None] + torch.arange(width, device=rows.device)).clamp(0, side - 1)
    return ((rows[:, None] * side + down) * side)[:, :, None] + across[:, None, :]


def _read(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return images.view(-1).index_select(0, places.view(-1)).view(places.shape)


# -- places in the lungs ------------------------------------------------------------------------------------------------


def _row_counts(masks: torch.Tensor) -> torch.Tensor:
    """(B, S) int32: how many pixels of each row of masks (B, 1, S, S) bool are set."""
    side = masks.shape[-1]
    if side % 8 or side > 2040:
        return masks[:, 0].sum(dim=2, dtype=torch.int32)
    eights = masks[:, 0].contiguous().view(torch.int64).sum(dim=2)  # eight columns of counts below 256, a byte each
    return eights.view(torch.uint8).view(-1, side, 8).sum(dim=2, dtype=torch.int32)


def lung_points(
    masks: torch.Tensor, draws: Draws, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A uniformly drawn pixel of each mask (B, 1, S, S) bool -> (row (B,), column (B,)); the center of an empty one.
    counts: what _row_counts gives, where it is known already."""
    height, width = masks.shape[-2:]
    ends = (_row_counts(masks) if counts is None else counts).cumsum(dim=1)
    total = ends[:, -1]
    unit = torch.from_numpy(draws.uniform("lung point").astype(np.float64)).to(masks.device)
    rank = torch.minimum((unit * total).floor().to(torch.int64), (total - 1).clamp(min=0))[:, None]
    row = torch.searchsorted(ends, rank, right=True).clamp(max=height - 1)
    before = torch.where(row > 0, ends.gather(1, (row - 1).clamp(min=0)), 0)
    line = masks[:, 0].gather(1, row[:, :, None].expand(-1, 1, width))[:, 0].to(torch.int32).cumsum(dim=1)
    column = torch.searchsorted(line, rank - before, right=True).clamp(max=width - 1)
    empty = total == 0
    return torch.where(empty, height // 2, row[:, 0]), torch.where(empty, width // 2, column[:, 0])


def _box(masks: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last row and column, (B, 2) each, of masks (B, 1, S, S) bool; the whole image for an empty one."""
    there = torch.stack([(counts > 0).view(torch.uint8), masks[:, 0].view(torch.uint8).amax(dim=1)], dim=1)
    return there.argmax(dim=2), there.shape[2] - 1 - there.flip(2).argmax(dim=2)


def _within(unit: np.ndarray, size: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Centers of intervals of `size` (B, 2) that lie inside [first, last]; the middle where they do not fit."""
    room = last - first + 1 - size
    start = torch.from_numpy(unit.astype(np.float64)).to(size.device) * (room.clamp(min=0) + 1)
    center = first + start.floor().minimum(room.clamp(min=0)) + torch.where(room < 0, room // 2, 0)
    return (center + size // 2).to(torch.int64)


def _centers(masks: torch.Tensor | None, images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """A lung pixel of each image, or any pixel where there are no masks."""
    if masks is not None:
        return lung_points(masks, draws)
    side = images.shape[-1]
    at = torch.from_numpy(np.stack([draws.integers(f"center {axis}", 0, side) for axis in "yx"])).to(images.device)
    return at[0], at[1]


# -- AnatPaste ----------------------------------------------------------------------------------------------------------


def anatpaste(
    images: torch.Tensor, masks: torch.Tensor, draws: Draws, maps: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Paste one patch of each image into its own lungs.

    images: (B, 1, S, S) in [0, 1]. masks: (B, 1, S, S) bool, the lungs. Returns the pasted images and the alpha map
    (B, 1, S, S) in [0, 1], or None without `maps`, for whom has no use of it; outside the mask alpha is 0 and the image
    unchanged to the bit.
    """
    side, device, draws = images.shape[-1], images.device, draws.part("anatpaste")
    area, aspect, spread, is_ellipse, opacity, brightness, contrast, *unit = draws.uniform("paste", shape=(9,)).T
    area = _between(area, *AREA) * side * side
    ratio = np.exp(_between(aspect, *np.log(ASPECT)))
    size = np.minimum(np.sqrt(np.stack([area * ratio, area / ratio], axis=1)), side).round()
    half = np.maximum(size / 2 - MARGIN * side, SMALLEST * side)
    sigma = _between(spread, *BLUR)[:, None] * side
    reach = half + SIGMAS * sigma
    step = max(1, int(GRID * side))
    halves, reaches = np.ceil(half / step).astype(int), np.ceil(reach).astype(int)

    # of each sample and axis, around its middle: the shape's profile, where the window counts; of each the blur's kernel
    inner = step * np.arange(-halves.max(), halves.max() + 1)
    profile = (inner / half[:, :, None]) ** 2
    profile = np.where(is_ellipse[:, None, None] < 0.5, profile, 2 * (profile > 1))  # a rectangle: 0 inside, 2 outside
    offsets = np.arange(-reaches.max(), reaches.max() + 1)
    window = 1.0 * (np.abs(offsets) <= reach[:, :, None])
    window[:, 0] *= _between(opacity, *OPACITY)[:, None]
    ends = reaches.max() + inner[-1]
    kernel = np.exp(-0.5 * (np.arange(-ends, ends + 1) / sigma) ** 2)
    kernel /= kernel[:, ends % step :: step].sum(axis=1, keepdims=True)
    # brightness, then contrast around the mean: one line, but for what would be clipped in between
    brightness = _between(brightness, *NEAR_ONE)
    slope = brightness * _between(contrast, *NEAR_ONE)
    given = [values.astype(np.float32) for values in (profile, window, kernel, slope, brightness - slope)]
    means = images.mean(dim=(1, 2, 3))

    counts = _row_counts(masks)
    target = torch.stack(lung_points(masks, draws, counts), dim=1)
    sizes, far = (torch.from_numpy(values.astype(np.int64)).to(device) for values in (size, reaches))
    source = _within(np.stack(unit, axis=1), sizes, *_box(masks, counts))
    source = torch.minimum(torch.maximum(source, far), side - 1 - far)  # the widest window takes 0.91 of the side
    images, masks = images.contiguous(), masks.contiguous()
    pasted, alphas = images.clone(), torch.zeros_like(images) if maps else None
    paste = _paste_each if device.type == "cpu" else _paste_all
    paste(images, masks, pasted, alphas, means, source, target, halves, reaches, step, given)
    return pasted, alphas


def _paste_each(
    images: torch.Tensor,
    masks: torch.Tensor,
    pasted: torch.Tensor,
    alphas: torch.Tensor | None,
    means: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    halves: np.ndarray,
    reaches: np.ndarray,
    step: int,
    given: list[np.ndarray],
) -> None:
    """Paste into `pasted` and `alphas`, one image after the other, in slices no larger than it needs: on a CPU this stays in
    the innermost cache, and takes a third of the time of `_paste_all`."""
    side, span = images.shape[-1], _span(images.shape[-1])
    padded, masks = _padded(masks, span), masks.view(torch.uint8)
    own, padded, masks, pasted = (values.numpy()[:, 0] for values in (images, padded, masks, pasted))
    given = [*given[:-1], given[-1] * means.numpy()]
    alphas = None if alphas is None else alphas.numpy()[:, 0]
    middle, most = given[1].shape[2] // 2, given[0].shape[2] // 2
    for row, (reads, writes, near, far) in enumerate(
        zip(source.tolist(), target.tolist(), halves.tolist(), reaches.tolist())
    ):
        profile, window, kernel, slope, offset = (values[row] for values in given)
        at, origin, profiles, blurs = [], [], [], []
        for axis in (0, 1):
            first, last = max(-far[axis], -writes[axis]), min(far[axis], side - 1 - writes[axis])
            at.append(slice(writes[axis] + first, writes[axis] + last + 1))
            origin.append(slice(reads[axis] + first, reads[axis] + last + 1))
            profiles.append(profile[axis, most - near[axis] : most + near[axis] + 1])
            start = len(kernel) // 2 + first - step * near[axis]
            strides = kernel.itemsize, kernel.itemsize * step
            blur = np.ndarray((last - first + 1, 2 * near[axis] + 1), np.float32, kernel[start:], 0, strides)
            blurs.append(blur * window[axis, middle + first : middle + last + 1, None])
        around = (row, *(slice(part.start, part.stop + span - 1) for part in at))
        at, origin = (row, *at), (row, *origin)
        lungs = _sums(padded[around], span) * (masks[at] * np.float32(2 / span**2))
        alpha, change = _compose(own[at], own[origin], lungs, profiles, blurs, slope, offset)
        pasted[at] += change
        if alphas is not None:
            alphas[at] = alpha


def _paste_all(
    images: torch.Tensor,
    masks: torch.Tensor,
    pasted: torch.Tensor,
    alphas: torch.Tensor | None,
    means: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    halves: np.ndarray,
    reaches: np.ndarray,
    step: int,
    given: list[np.ndarray],
) -> None:
    """The same for the whole batch at once, in windows as large as the largest."""
    side, device, batch = images.shape[-1], images.device, len(images)
    profile, window, kernel, slope, offset = (torch.from_numpy(values).to(device) for values in given)
    (height, width), (tall, wide) = (2 * reaches.max(axis=0) + 1).tolist(), (2 * halves.max(axis=0) + 1).tolist()
    blurs, profiles = [], []
    for axis, (length, inner) in enumerate(((height, tall), (width, wide))):
        offsets = torch.arange(length, device=device) - length // 2
        there = target[:, axis, None] + offsets
        near = window[:, axis].narrow(1, window.shape[2] // 2 - length // 2, length) * ((there >= 0) & (there < side))
        start = kernel.shape[1] // 2 - length // 2 - step * (inner // 2)
        blur = kernel.as_strided((batch, length, inner), (kernel.shape[1], 1, step), start)
        blurs.append(blur * near[:, :, None])
        profiles.append(profile[:, axis].narrow(1, profile.shape[2] // 2 - inner // 2, inner))
    rows, half = torch.arange(batch, device=device), torch.tensor([height // 2, width // 2], device=device)
    writes, reads = (_places(rows, middle - half, height, width, side) for middle in (target, source))
    span = _span(side)
    lungs = _read(_sums(_padded(masks, span), span) * masks, writes) * (2 / span**2)
    columns = slope[:, None, None], (offset * means)[:, None, None]
    with torch.autocast(device.type, enabled=False):
        alpha, change = _compose(_read(images, writes), _read(images, reads), lungs, profiles, blurs, *columns)
    # added, because the windows' parts beyond the image, of no change, stand for pixels at its border
    pasted.view(-1).scatter_add_(0, writes.view(-1), change.view(-1))
    if alphas is not None:
        alphas.view(-1).scatter_add_(0, writes.view(-1), alpha.view(-1))


def _compose(here, patch, lungs, profiles, blurs, slope, offset):
    """Alpha and what is added to `here`; arrays (h, w) of NumPy or tensors (N, h, w).

    lungs: twice the share of lung around a pixel. profiles: of a shape, down and across, inside where they sum up to 1.
    blurs: matrices from its sides to the window's. slope, offset: of the patch's jitter.
    """
    shape = (profiles[0][..., :, None] + profiles[1][..., None, :] <= 1) * np.float32(1)
    alpha = blurs[0] @ shape @ blurs[1].swapaxes(-1, -2)
    alpha *= (lungs - np.float32(1)).clip(0, 1)
    patch = (patch * slope + offset).clip(0, 1)
    patch -= here
    patch *= alpha
    return alpha, patch


def _span(side: int) -> int:
    """Side in pixels, a power of two, of the square around a pixel that must be lung for the paste not to fade there."""
    return 2 ** max(1, round(math.log2(2 * FADE * side)))


def _padded(masks: torch.Tensor, span: int) -> torch.Tensor:
    """Masks (B, 1, S, S) as numbers that hold sums over a square, with what lies beyond the image: no lung."""
    numbers = masks.view(torch.uint8).to(torch.uint8 if span < 16 else torch.int16)
    return F.pad(numbers, (span // 2, span // 2 - 1, span // 2, span // 2 - 1))


def _sums(numbers, span: int):
    """Over squares of span x span: (..., h + span - 1, w + span - 1) of NumPy or torch -> (..., h, w)."""
    step = 1
    while step < span:
        numbers = numbers[..., :-step, :] + numbers[..., step:, :]
        numbers = numbers[..., :-step] + numbers[..., step:]
        step *= 2
    return numbers


# -- CutPaste -----------------------------------------------------------------------------------------------------------


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


# -- patches of another image -------------------------------------------------------------------------------------------


def interpolate_foreign(
    images: torch.Tensor, others: torch.Tensor, masks: torch.Tensor | None, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend a rectangle of each image with the same place of the other one, by one factor (FPI).

    images, others: (B, 1, S, S) in [0, 1]. masks: (B, 1, S, S) bool or None; where given, the rectangle's center is a lung
    pixel. Returns the images and the factor (B, 1, S, S), 0 outside the rectangle, where the image is unchanged to the bit.
    """
    side, draws = images.shape[-1], draws.part("foreign interpolation")
    size = (draws.uniform("size", *FOREIGN_SIDE, shape=(2,)) * side).round().clip(1, side)
    share = _column(draws.uniform("share", *FOREIGN_SHARE), images)
    line = torch.arange(side, device=images.device)
    inside = []
    for axis, center in enumerate(_centers(masks, images, draws)):
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
                first, last = _box(lungs, _row_counts(lungs))
                last = last + 1
            target = torch.stack(_centers(lungs, images, part), dim=1)
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
    places = _places(rows, starts - 1, height + 2, width + 2, side)
    lines = [torch.arange(-1, length + 1, device=images.device) for length in (height, width)]
    grid = []
    for axis, line in enumerate(lines):
        read = sources[:, axis, None] + (line + 0.5 - sizes[:, axis, None] / 2) / scales
        grid.append(read * (2 / side) - 1)
    shape = (-1, height + 2, width + 2)
    grid = torch.stack([grid[1][:, None, :].expand(shape), grid[0][:, :, None].expand(shape)], dim=3)
    patch = F.grid_sample(others[rows], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    own = _read(images, places)
    inside = [line[1:-1] < sizes[:, axis, None] for axis, line in enumerate(lines)]
    inside = inside[0][:, :, None] & inside[1][:, None, :]
    divergence = 0.0
    for axis in (1, 2):
        ours, theirs = (part.narrow(3 - axis, 1, part.shape[3 - axis] - 2).diff(dim=axis) for part in (own, patch))
        divergence = divergence + torch.where(theirs.abs() > ours.abs(), theirs - ours, 0).diff(dim=axis)
    change = poisson(divergence * inside, sizes[:, 0], sizes[:, 1])
    own, places = own[:, 1:-1, 1:-1], places[:, 1:-1, 1:-1]
    return places.contiguous(), ((own + change).clamp(0, 1) - own) * inside
