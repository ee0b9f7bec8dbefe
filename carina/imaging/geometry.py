"""From a rectangle of original pixels to the square frames of the store, and back: one affine for every scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from scipy.sparse import csr_array

from carina.imaging.photometry import Choices


@dataclass(frozen=True)
class Geometry(Choices):
    """How a rectangle becomes a square: ``pad`` keeps all and the aspect, ``crop`` the aspect, ``stretch`` all."""

    fit: Literal["pad", "stretch", "crop"] = "pad"


Affine = tuple[float, float, float, float]
_BAND = 64  # rows of the result that are made at a time


def frame(height: int, width: int, geometry: Geometry, spacing: tuple[float, float] | None = None) -> tuple[int, ...]:
    """The part of the original that the square shows: (left, top, columns, rows) in whole original pixels.

    With ``pad`` it reaches beyond the picture. With anisotropic `spacing` (row, column; millimeters or any other unit,
    since only their ratio counts) its sides are equal in length to within half a pixel; that, and the odd pixel of
    centering, are the only roundings of the geometry.
    """
    row, col = spacing or (1.0, 1.0)
    if geometry.fit == "stretch":
        return 0, 0, width, height
    side = (max if geometry.fit == "pad" else min)(height * row, width * col)
    columns, rows = max(1, round(side / col)), max(1, round(side / row))
    return (width - columns) // 2, (height - rows) // 2, columns, rows


@lru_cache(maxsize=64)
def _filter(side: int, start: int, length: int, size: int) -> csr_array:
    """(size, side) float32: what each of `size` results takes of a line of `side` pixels, of which the part from `start`
    over `length` is shown; beyond the line lie zeros. The area filter when shrinking, else linear interpolation.
    """
    if length >= size:
        # In units of 1 / (size * length) both grids have whole breakpoints, so that every overlap is exact.
        ends = np.union1d(np.arange(length + 1) * size, np.arange(size + 1) * length)
        source, target, weights = ends[:-1] // size, ends[:-1] // length, np.diff(ends) / length
    else:
        place = (np.arange(size) + 0.5) * length / size - 0.5
        below = np.floor(place).astype(np.int64)
        source = np.clip(np.concatenate([below, below + 1]), 0, length - 1)
        target = np.tile(np.arange(size), 2)
        weights = np.concatenate([below + 1 - place, place - below])
    source = source + start
    inside = (source >= 0) & (source < side)
    places = target[inside], source[inside]
    return csr_array((weights[inside].astype(np.float32), places), shape=(size, side))


@lru_cache(maxsize=64)
def _bands(side: int, start: int, length: int, size: int) -> list[csr_array]:
    whole = _filter(side, start, length, size)
    return [whole[row : row + _BAND] for row in range(0, size, _BAND)]


def _resample(image: np.ndarray, size: int, part: tuple[int, ...]) -> np.ndarray:
    """(H, W) float32 -> (size, size): the `part` (left, top, columns, rows) of it, rows first, then columns."""
    height, width = image.shape
    left, top, columns, rows = part
    image = np.ascontiguousarray(image, dtype=np.float32)
    across = _filter(width, left, columns, size)
    square = np.empty((size, size), dtype=np.float32)
    # A sparse product walks whole rows, which keeps to the order of memory; cv2.resize takes several times as long. In
    # bands, what lies between the two products stays in the cache, and no large array is asked of the system.
    for number, band in enumerate(_bands(height, top, rows, size)):
        lines = cv2.transpose(band @ image)
        square[number * _BAND : (number + 1) * _BAND] = cv2.transpose(across @ lines)
    return np.clip(square, 0.0, 1.0, out=square)


def resize_scales(
    image: np.ndarray, scales: Sequence[int], geometry: Geometry, spacing: tuple[float, float] | None = None
) -> tuple[dict[int, np.ndarray], Affine]:
    """`resize` to several scales at once: ({scale: (scale, scale) float32 in [0, 1]}, affine).

    Means of areas compose exactly: where a scale divides a larger one, and that one shrinks the picture already, the
    smaller is made from it; the result is that of `resize` to rounding (1e-6).
    """
    height, width = image.shape
    left, top, columns, rows = part = frame(height, width, geometry, spacing)
    made: dict[int, np.ndarray] = {}
    for scale in sorted(set(scales), reverse=True):
        larger = [size for size in made if size % scale == 0 and size <= min(columns, rows)]
        if larger:
            made[scale] = cv2.resize(made[min(larger)], (scale, scale), interpolation=cv2.INTER_AREA)
        else:
            made[scale] = _resample(image, scale, part)
    return {scale: made[scale] for scale in scales}, (1.0 / columns, -left / columns, 1.0 / rows, -top / rows)


def resize(
    image: np.ndarray, size: int, geometry: Geometry, spacing: tuple[float, float] | None = None
) -> tuple[np.ndarray, Affine]:
    """(H, W) float32 in [0, 1] -> ((size, size) float32 in [0, 1], affine (ax, bx, ay, by)).

    The affine takes a point in original pixel-edge coordinates (0 <= x <= W, 0 <= y <= H) to fractions of the stored
    frame: fx = ax * x + bx, fy = ay * y + by. It is exact and the same for every `size`: padding and cutting happen
    in whole original pixels, before the (separable) area filter, never in pixels of the result. spacing: (row, column)
    of the pixels in one unit; None is square pixels.
    """
    frames, affine = resize_scales(image, [size], geometry, spacing)
    return frames[size], affine


def resize_mask(
    mask: np.ndarray, size: int, geometry: Geometry, spacing: tuple[float, float] | None = None
) -> np.ndarray:
    """(H, W) bool -> (size, size) bool by the same geometry: a pixel is set when at least half of its area is."""
    # Half an area may come out a rounding below one half.
    return resize(mask.astype(np.float32), size, geometry, spacing)[0] >= 0.5 - 1e-6
