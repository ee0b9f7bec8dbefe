"""Which pixels and which gray values of a radiograph count: padding, collimation, the robust range."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from carina.imaging.header import Unreadable, number

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Percentiles of the robust range: symmetric, so that inverting the stored values inverts the picture and no more.
ROBUST = (0.5, 99.5)
SAMPLE = 250_000  # pixels that a percentile looks at; its error is then far below one gray level of 8 bits


def sample_step(shape: tuple[int, ...], count: int = SAMPLE) -> int:
    """The step at which every step-th row and column hold about `count` pixels."""
    return max(1, int(np.sqrt(shape[0] * shape[1] / count)))


def collimated(values: np.ndarray, padding: np.ndarray | None = None) -> tuple[slice, slice]:
    """Rows and columns that are left when flat margins (collimator, border of a scan) are trimmed.

    A margin is a run of edge rows or columns whose own spread (5 % to 95 %) is below 2 % of the whole picture's. Never
    trims to less than half of a side, since a picture that flat has no collimator but is empty.
    """
    step = max(1, max(values.shape) // 256)
    small = values[::step, ::step].astype(np.float32)
    if padding is not None:
        # A sentinel far outside the range would make everything else look flat.
        blank = padding[::step, ::step]
        small[blank] = np.median(small[~blank]) if not blank.all() else 0.0
    low, high = np.percentile(small, ROBUST)
    keep = []
    for axis in (0, 1):
        ends = np.percentile(small, (5, 95), axis=1 - axis)
        busy = np.flatnonzero(ends[1] - ends[0] > 0.02 * (high - low))
        side = values.shape[axis]
        start, stop = (int(busy[0]) * step, min(side, (int(busy[-1]) + 1) * step)) if len(busy) else (0, side)
        keep.append(slice(start, stop) if stop - start >= side / 2 else slice(0, side))
    return keep[0], keep[1]


def robust_range(values: np.ndarray, padding: np.ndarray | None = None) -> tuple[float, float]:
    """(low, high): the robust range of the pixels inside the collimated area; `padding` (H, W) bool is left out."""
    area = collimated(values, padding)
    inside = values[area]
    step = sample_step(inside.shape)
    sample = inside[::step, ::step].ravel()
    if padding is not None:
        sample = sample[~padding[area][::step, ::step].ravel()]
        if sample.size == 0:
            sample = values[~padding]
    if sample.size == 0:
        raise Unreadable("every pixel is padding")
    low, high = np.percentile(sample, ROBUST)
    if low == high:
        low, high = sample.min(), sample.max()
    return float(low), float(high)


def padding_of(stored: np.ndarray, header: Dataset) -> np.ndarray | None:
    """(H, W) bool where the stored value is PixelPaddingValue (or within PixelPaddingRangeLimit); None without any."""
    first = number(header, "PixelPaddingValue")
    if first is None:
        return None
    last = number(header, "PixelPaddingRangeLimit", first)
    if stored.dtype.kind == "i" and min(first, last) > np.iinfo(stored.dtype).max:
        # Writers give the value of signed data as unsigned (the element is "US or SS").
        first, last = (value - 2.0 ** (8 * stored.dtype.itemsize) for value in (first, last))
    mask = (stored >= min(first, last)) & (stored <= max(first, last))
    return mask if mask.any() else None


def reaches_frame(mask: np.ndarray) -> np.ndarray:
    """The components of `mask` that touch the frame: padding fills up to the edge, an equal value inside is tissue."""
    # A rim of ones joins all of them, so that one flood from its corner finds them.
    rimmed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    cv2.floodFill(rimmed, None, (0, 0), 2, flags=4)
    return rimmed[1:-1, 1:-1] == 2
