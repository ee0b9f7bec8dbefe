"""Synthetic lesions on batches: pieces of a radiograph put where they do not belong.

AnatPaste: Sato et al., "Anatomy-aware self-supervised learning for anomaly detection in chest radiographs",
iScience 2023 (doi 10.1016/j.isci.2023.107086). CutPaste: Li et al., "CutPaste: self-supervised learning for anomaly
detection and localization", CVPR 2021 (arXiv 2104.04015). Patches of another image: carina.imaging.blending.

Re-derived from the papers with every length as a fraction of the side (of 256 px where a paper counts pixels). Lung masks
come from the store. A sample's result depends on its own draws alone, not on the batch that it stands in.

Differences from AnatPaste's paper, each because its picture gives the paste away: the patch is cut inside the box around
the lungs, not from the black frame or over a marker; where the blur reaches beyond the patch the image goes on, not a
straight edge; towards the edge of the lungs the paste fades within a hundredth of the side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import Draws
from carina.imaging.views import jitter
from carina.imaging.windows import column_of, lung_box, lung_points, read_places, row_counts, window_places, within

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


def _between(unit: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + unit * (high - low)


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

    counts = row_counts(masks)
    target = torch.stack(lung_points(masks, draws, counts), dim=1)
    sizes, far = (torch.from_numpy(values.astype(np.int64)).to(device) for values in (size, reaches))
    source = within(np.stack(unit, axis=1), sizes, *lung_box(masks, counts))
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
    writes, reads = (window_places(rows, middle - half, height, width, side) for middle in (target, source))
    span = _span(side)
    lungs = read_places(_sums(_padded(masks, span), span) * masks, writes) * (2 / span**2)
    columns = slope[:, None, None], (offset * means)[:, None, None]
    with torch.autocast(device.type, enabled=False):
        alpha, change = _compose(
            read_places(images, writes), read_places(images, reads), lungs, profiles, blurs, *columns
        )
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
        [column_of(values[:, axis], images) for axis in (0, 1)] for values in (size, source, target)
    )
    cos, sin = column_of(np.cos(angle), images), column_of(np.sin(angle), images)
    centers = torch.arange(side, device=images.device, dtype=torch.float32) + 0.5
    dy, dx = centers[None, :, None] - to_y, centers[None, None, :] - to_x
    along, across = cos * dy + sin * dx, cos * dx - sin * dy
    alpha = ((along.abs() <= height / 2) & (across.abs() <= width / 2))[:, None]
    grid = torch.stack([from_x + across, from_y + along], dim=3) * (2 / side) - 1
    patch = jitter(images, draws.part("patch"), JITTER)
    patch = F.grid_sample(patch, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)
    return torch.where(alpha, patch, images), alpha.float()
